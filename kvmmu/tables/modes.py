"""The shapes of the page tables that can be made."""

from typing import Literal, NamedTuple

from kvmmu.arch._bits import GPA_BITS, PAGE_SIZE

__all__ = ["FORMAT_32", "FORMAT_64", "FORMAT_EPT", "MODES", "Mode", "ModeShape"]

Mode = Literal["32", "pae", "4l", "5l", "ept", "ept5"]

FORMAT_32, FORMAT_64, FORMAT_EPT = range(3)
_2M_SHIFT, _4M_SHIFT, _1G_SHIFT = 21, 22, 30
_BELOW_4G, _BELOW_52_BITS = 1 << 32, 1 << GPA_BITS
_64_BIT_SIZES = {PAGE_SIZE: 1, 1 << _2M_SHIFT: 2, 1 << _1G_SHIFT: 3}


class ModeShape(NamedTuple):
    """The shape of the tables of one paging mode.

    Attributes
    ----------
    format, levels : int
        Format of entries, levels of the walk.
    fixed_level, fixed_tables : int
        Tables from this level up exist from the start; how many that are.
    addr_bits : int
        Width of the addresses that are mapped.
    signed : bool
        Those are canonical.
    sizes : dict of int to int
        Page sizes in bytes, and the level of their entry.
    table_shifts : list of int
        For each level with tables that come and go, from the lowest: the shift of the range that one of them covers.
    below : int
        Table frames and pages lie below this address.
    """

    format: int
    levels: int
    fixed_level: int
    fixed_tables: int
    addr_bits: int
    signed: bool
    sizes: dict[int, int]
    table_shifts: list[int]
    below: int

    @property
    def large_shift(self) -> int:
        """Of the page size above 4K."""
        return self.table_shifts[0]


MODES: dict[str, ModeShape] = {
    "32": ModeShape(FORMAT_32, 2, 2, 1, 32, False, {PAGE_SIZE: 1, 1 << _4M_SHIFT: 2}, [_4M_SHIFT], _BELOW_4G),
    "pae": ModeShape(FORMAT_64, 3, 2, 5, 32, False, {PAGE_SIZE: 1, 1 << _2M_SHIFT: 2}, [_2M_SHIFT], _BELOW_4G),
    "4l": ModeShape(FORMAT_64, 4, 4, 1, 48, True, _64_BIT_SIZES, [21, 30, 39], _BELOW_52_BITS),
    "5l": ModeShape(FORMAT_64, 5, 5, 1, 57, True, _64_BIT_SIZES, [21, 30, 39, 48], _BELOW_52_BITS),
    "ept": ModeShape(FORMAT_EPT, 4, 4, 1, 48, False, _64_BIT_SIZES, [21, 30, 39], _BELOW_52_BITS),
    "ept5": ModeShape(FORMAT_EPT, 5, 5, 1, GPA_BITS, False, _64_BIT_SIZES, [21, 30, 39, 48], _BELOW_52_BITS),
}
