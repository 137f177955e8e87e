from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvmmu.memory._memory import GuestMemory
from kvmmu.tables._builder import TableBuilder

BEFORE_PROMOTION: int
OUT_OF_SMALL_FRAMES: int
OUT_OF_LARGE_FRAMES: int

class PageFiller(TableBuilder):
    faults: int
    small_pages: int
    large_pages: int
    replaced: int
    def __new__(cls, mem: GuestMemory, format: int, levels: int, large_level: int, fixed_level: int, keeps_stores: bool,
                 level: int, threshold: int, addr_bits: int, canonical: bool, bits: int) -> Self: ...
    def supply_pages(self, frames: NDArray[np.uint64], large: bool) -> None: ...
    def touch_rows(self, gva: NDArray[np.uint64], size: NDArray[np.uint8] | None, start: int,
                   pauses_from: int = ...) -> tuple[int, int]: ...
    def take_pages(self) -> list[int]: ...
