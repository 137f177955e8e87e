"""Host: the features of the host's processor, and the settings of its KVM."""

from dataclasses import dataclass
from typing import Literal

from kvmmu.arch._bits import MAXPHYADDR_MAX
from kvmmu.arch.arguments import check_bool, check_int, check_name
from kvmmu.arch.words import fields_text

__all__ = ["Host"]

_LEVELS = {"4k": 1, "2m": 2, "1g": 3}
_SWITCHES = ("mbec", "gmet", "ad", "pml", "nx_huge_pages", "eager_split", "l1tf")


@dataclass(frozen=True)
class RoleBits:
    """The packing of a shadow page's role by a kernel.

    Attributes
    ----------
    smep_andnot_wp : bool
        SMEP counts only while CR0.WP is clear; else it is in the role by itself.
    access_letters : tuple of (int, str)
        Rights (`Acc`) that the role tells apart for legacy tables, and their letters in a trace.
    """

    smep_andnot_wp: bool
    access_letters: tuple[tuple[int, str], ...]


_KERNELS = {
    "7.3": RoleBits(smep_andnot_wp=False, access_letters=((1, "r"), (2, "w"), (4, "u"), (8, "x"))),
    "6.18": RoleBits(smep_andnot_wp=True, access_letters=((2, "w"), (4, "u"), (8, "x"))),
}
_MAXPHYADDR_MIN = 36                    # page tables and guest memory share the physical addresses of the host


@dataclass(frozen=True)
class Host:
    """The host below a virtual machine.

    Parameters
    ----------
    tdp : {"ept", "npt", None}
        Two-dimensional paging; None: shadow paging.
    maxphyaddr : int
        Physical-address width of the host, 36 to 52. Below 52 a legacy SPTE (npt, shadow paging) can mark MMIO.
    mbec : bool
        EPT tells execution by supervisor and by user mode apart.
    gmet : bool
        NPT guards supervisor fetches (GMET) for the guest itself.
    ad : bool
        EPT has accessed and dirty bits; without them accesses are tracked by taking rights away.
    pml : bool
        The processor logs dirty pages (EPT with `ad`).
    nx_huge_pages : bool
        No huge page may be executable (the mitigation of the iTLB multihit erratum).
    max_page : {"4k", "2m", "1g"}
        Largest page of the host's tables.
    eager_split : bool
        Split huge pages when dirty logging of a slot begins, not at the first write.
    l1tf : bool
        The processor has the L1 terminal fault: MMIO SPTEs invert the top address bits.
    kernel : str
        Whose role bits to use: "7.3", or "6.18" to compare with recordings of that kernel. Nothing else depends on it.
    """

    tdp: Literal["ept", "npt"] | None = "ept"
    maxphyaddr: int = 52
    mbec: bool = True
    gmet: bool = False
    ad: bool = True
    pml: bool = False
    nx_huge_pages: bool = False
    max_page: Literal["4k", "2m", "1g"] = "1g"
    eager_split: bool = True
    l1tf: bool = False
    kernel: Literal["7.3", "6.18"] = "7.3"

    def __post_init__(self) -> None:
        check_name("tdp", self.tdp, ("ept", "npt", None))
        object.__setattr__(self, "maxphyaddr", check_int("maxphyaddr", self.maxphyaddr, _MAXPHYADDR_MIN, MAXPHYADDR_MAX))
        check_name("max_page", self.max_page, _LEVELS)
        for name in _SWITCHES:
            object.__setattr__(self, name, check_bool(name, getattr(self, name)))
        if self.pml and (self.tdp != "ept" or not self.ad):
            raise ValueError("pml: page-modification logging needs tdp='ept' and ad=True")
        if self.gmet and self.tdp != "npt":
            raise ValueError(f"gmet: is of NPT, got tdp={self.tdp!r}")
        check_name("kernel", self.kernel, _KERNELS)

    def __repr__(self) -> str:
        return fields_text(self, {}, always=("tdp", "maxphyaddr"))

    @property
    def role_bits(self) -> RoleBits:
        """The role bits of `kernel`."""
        return _KERNELS[self.kernel]

    @property
    def max_huge_page_level(self) -> int:
        """Level of the largest page: 1, 2 or 3."""
        return _LEVELS[self.max_page]
