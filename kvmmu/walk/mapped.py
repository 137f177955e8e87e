"""Mappings: what page tables map, as columns."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import Acc
from kvmmu.arch.arguments import check_bool, check_choice, check_gpa, check_int
from kvmmu.arch.words import rights_text
from kvmmu.walk.html import HTML_ROWS, table_html

__all__ = ["MAPPING", "Lookup", "Mapping", "Mappings"]

MAPPING = np.dtype([
    ("gva", np.uint64), ("gpa", np.uint64), ("ngpa", np.uint64), ("size", np.uint64), ("pte_gpa", np.uint64), ("level", np.uint8),
    ("pte_access", np.uint8), ("second_access", np.uint8), ("pkey", np.uint8), ("accessed", np.bool_), ("dirty", np.bool_),
    ("global_", np.bool_), ("page_shift", np.uint8)])
_NAMES = ("gva", "gpa", "size", "level", "pte_access", "accessed", "dirty", "global_", "pkey", "pte_gpa", "ngpa", "second_access")
_LETTERS = np.array([f"{'r' if n & 1 else '-'}{'w' if n & 2 else '-'}{'x' if n & 8 else '-'}{'u' if n & 4 else '-'}"
                     for n in range(16)])


class Lookup(NamedTuple):
    """One translation, as an emulator or a debugger keeps it.

    size is that of the page, the smaller one of both stages; pte_access the rights that both leave, USER by the first.
    """

    gpa: int
    size: int
    pte_access: Acc
    accessed: bool
    dirty: bool
    global_: bool
    pkey: int

    def __repr__(self) -> str:
        return _row_text(self)


class Mapping(NamedTuple):
    """One row of `Mappings`."""

    gva: int
    gpa: int
    size: int
    level: int
    pte_access: int
    accessed: bool
    dirty: bool
    global_: bool
    pkey: int
    pte_gpa: int
    ngpa: int
    second_access: int
    rights: str

    def __repr__(self) -> str:
        return _row_text(self)


_HEXADECIMAL = {"gva", "gpa", "ngpa", "size", "pte_gpa"}
_RIGHTS = {"pte_access", "second_access"}


def _cell_text(name: str, value: object) -> str:
    if isinstance(value, int):
        return hex(value) if name in _HEXADECIMAL else rights_text(value) if name in _RIGHTS else str(value)
    return str(value)


def _row_text(row: Lookup | Mapping) -> str:
    """Return a row with addresses and sizes in hexadecimal, and rights in letters."""
    cells = ", ".join(f"{name}={_cell_text(name, value)}" for name, value in row._asdict().items())
    return f"{type(row).__name__}({cells})"


class Mappings:
    """The mappings of page tables: columns, ascending by `gva`.

    Attributes
    ----------
    gva : ndarray of uint64, shape (n,)
        First linear address (bytes).
    gpa : ndarray of uint64, shape (n,)
        Where it leads to, after both stages.
    size : ndarray of uint64, shape (n,)
        Bytes; of joined neighbours all of them.
    level : ndarray of uint8, shape (n,)
        Of the leaf: 1 4K, 2 2M or 4M, 3 1G; 0 with paging off.
    pte_access : ndarray of uint8, shape (n,)
        Rights (`Acc`): the AND over the walk. Of the second stage alone (`ngpa_walk`) under EPT, USER is the right to execute in
        user mode.
    accessed, dirty, global_ : ndarray of bool, shape (n,)
        These bits of the leaf.
    pkey : ndarray of uint8, shape (n,)
        Protection key.
    pte_gpa : ndarray of uint64, shape (n,)
        Where the leaf lies, of joined neighbours the first one, before a second stage.
    ngpa : ndarray of uint64, shape (n,)
        Where the first stage leads to; without a second one the same as `gpa`.
    second_access : ndarray of uint8, shape (n,)
        Rights that the second stage gives; without one all of them.
    """

    gva: NDArray[np.uint64]
    gpa: NDArray[np.uint64]
    ngpa: NDArray[np.uint64]
    size: NDArray[np.uint64]
    pte_gpa: NDArray[np.uint64]
    level: NDArray[np.uint8]
    pte_access: NDArray[np.uint8]
    second_access: NDArray[np.uint8]
    pkey: NDArray[np.uint8]
    accessed: NDArray[np.bool_]
    dirty: NDArray[np.bool_]
    global_: NDArray[np.bool_]

    def __init__(self, rows: NDArray[Any], large: int = 1 << 21) -> None:
        """large: bytes of the pages of level 2."""
        self._large = large
        for name in _NAMES:
            setattr(self, name, np.ascontiguousarray(rows[name]))

    def __len__(self) -> int:
        return int(self.gva.size)

    def __getitem__(self, i: int) -> Mapping:
        i = range(len(self))[i]
        row = {name: getattr(self, name)[i].item() for name in _NAMES}
        return Mapping(**row, rights=str(_LETTERS[self._effective()[i]]))

    def __iter__(self) -> Iterator[Mapping]:
        columns = [getattr(self, name).tolist() for name in _NAMES]
        for row in zip(*columns, self.rights.tolist(), strict=True):
            yield Mapping(*row)

    def _effective(self) -> NDArray[np.uint8]:
        """Return the rights that both stages leave; USER is the first stage's."""
        return self.pte_access & (self.second_access | np.uint8(Acc.USER))

    @property
    def rights(self) -> NDArray[np.str_]:
        """The rights that both stages leave, in letters: r w x u, each of them or -."""
        return _LETTERS[self._effective()]

    def where(self, *, writable: bool | None = None, executable: bool | None = None, user: bool | None = None,
              size: int | None = None) -> "Mappings":
        """Return the rows that are wanted.

        Parameters
        ----------
        writable, executable, user : bool, optional
            Rows with, or without, this right of both stages.
        size : int, optional
            Rows of pages of so many bytes, of the first stage: 4096, 2 MiB or 4 MiB, 1 GiB.
        """
        wanted = np.ones(len(self), bool)
        rights = self._effective()
        for name, right, value in (("writable", Acc.WRITE, writable), ("executable", Acc.EXEC, executable),
                                   ("user", Acc.USER, user)):
            if value is not None:
                wanted &= ((rights & np.uint8(right)) != 0) == check_bool(name, value)
        if size is not None:
            size = check_choice("size", size, (1 << 12, 1 << 21, 1 << 22, 1 << 30))
            levels = {1 << 12: 1, self._large: 2, 1 << 30: 3}
            wanted &= self.level == levels.get(size, 255)
        return self._rows(wanted)

    def of_memory(self, gpa: int, size: int) -> "Mappings":
        """Return the parts of mappings that lead to [gpa, gpa + size)."""
        gpa = check_gpa("gpa", gpa)
        first, last = np.uint64(gpa), np.uint64(check_int("size", size, 1, (1 << 52) - gpa) - 1 + gpa)
        found = self._rows((self.gpa <= last) & (self.gpa + (self.size - np.uint64(1)) >= first))
        skip = np.where(found.gpa < first, first - found.gpa, np.uint64(0))
        end = np.minimum(found.gpa + (found.size - np.uint64(1)), last)
        found.gva, found.gpa, found.ngpa = found.gva + skip, found.gpa + skip, found.ngpa + skip
        found.size = end - found.gpa + np.uint64(1)
        return found

    def _rows(self, wanted: NDArray[np.bool_]) -> "Mappings":
        chosen = Mappings.__new__(Mappings)
        chosen._large = self._large
        for name in _NAMES:
            setattr(chosen, name, getattr(self, name)[wanted])
        return chosen

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name, and `rights` in letters."""
        return {name: getattr(self, name) for name in _NAMES} | {"rights": self.rights}

    def _repr_html_(self) -> str:
        names = ("gva", "size", "gpa", "level", "rights", "accessed", "dirty", "global_", "pkey", "pte_gpa")
        first = (self[i]._asdict() for i in range(min(len(self), HTML_ROWS)))
        rows = [[_cell_text(name, row[name]) for name in names] for row in first]
        return table_html(f"Mappings: {len(self):,} rows, {int(self.size.sum()) if len(self) else 0:#x} bytes", names, rows,
                          len(self) - HTML_ROWS)

    def __repr__(self) -> str:
        return f"<Mappings: {len(self)} rows, {int(self.size.sum()) if len(self) else 0:#x} bytes>"
