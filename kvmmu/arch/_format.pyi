import numpy as np
from numpy.typing import ArrayLike, NDArray

class PageFormat:
    @property
    def permissions(self) -> NDArray[np.uint16]: ...
    @property
    def pkru_mask(self) -> int: ...
    @property
    def rsvd_bits_mask(self) -> NDArray[np.uint64]: ...
    @property
    def bad_mt_xwr(self) -> int: ...
    @staticmethod
    def permission_bitmask(
        *,
        tdp: ArrayLike = False,
        ept: ArrayLike = False,
        smep: ArrayLike = False,
        smap: ArrayLike = False,
        wp: ArrayLike = True,
        nx: ArrayLike = True,
    ) -> NDArray[np.uint16]: ...
    @staticmethod
    def pkru_bitmask(*, pke: bool = True, wp: bool = True, pks: bool = False) -> int: ...
    @staticmethod
    def guest_rsvd_bits(
        level: int,
        *,
        maxphyaddr: int,
        nx: bool = True,
        gbpages: bool = True,
        pse: bool = True,
        pse36_bits: int = 0,
        amd: bool = False,
    ) -> NDArray[np.uint64]: ...
    @staticmethod
    def ept_rsvd_bits(*, maxphyaddr: int, execonly: bool = True, huge_page_level: int = 3) -> tuple[NDArray[np.uint64], int]: ...
    def is_fault(self, pte_access: ArrayLike, access: ArrayLike) -> bool | NDArray[np.bool_]: ...
    def is_rsvd_bits_set(self, pte: ArrayLike, level: ArrayLike) -> bool | NDArray[np.bool_]: ...
    def permission_fault(
        self, pte_access: ArrayLike, pkey: ArrayLike, access: ArrayLike, pkru: int, pkrs: int = 0
    ) -> np.uint32 | NDArray[np.uint32]: ...
    def rule(self, pte_access: int, access: int, pkey_denied: bool = False, shadow_stack: bool = False) -> str | None: ...
