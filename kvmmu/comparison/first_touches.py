"""First touches of a trace: the rows that can exit where all others hit what the first ones built."""

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SHIFT, Access
from kvmmu.tables._page_set import PageSet

__all__ = ["FirstTouches", "kind_of"]

_PAGE_SHIFT, _KIND_BITS = np.uint64(PAGE_SHIFT), np.uint64(3)
_BITS = (Access.WRITE, Access.FETCH, Access.USER)


def kind_of(access: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return a number below 8 for the bits of each access that rights depend on: WRITE, FETCH, USER."""
    number = np.zeros(access.size, np.uint64)
    for place, bit in enumerate(_BITS):
        number |= (access & np.uint8(bit) != 0).astype(np.uint64) << np.uint64(place)
    return number


class FirstTouches:
    """The first access of each kind to each 4K page of each address space, in order.

    `columns()` has them.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], PageSet] = {}
        self._pieces: list[tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint32]]] = []

    def take(self, gva: NDArray[np.uint64], access: NDArray[np.uint8], space: int, first: int) -> None:
        """Take accesses of one address space. IN first: number of the first of them."""
        if not gva.size:
            return
        kinds = kind_of(access)
        key = gva >> _PAGE_SHIFT << _KIND_BITS | kinds
        changes = np.ones(key.size, bool)                       # most rows repeat one of the two before
        changes[1:] = key[1:] != key[:-1]
        changes[2:] &= key[2:] != key[:-2]
        rows = np.flatnonzero(changes)
        _, index = np.unique(key[rows], return_index=True)
        rows = np.sort(rows[index])
        new = np.zeros(rows.size, bool)
        for kind in np.unique(kinds[rows]).tolist():
            seen = self._seen.setdefault((space, kind), PageSet())
            mine = np.flatnonzero(kinds[rows] == kind)
            known = np.isin(gva[rows[mine]] >> _PAGE_SHIFT, seen.pages(), assume_unique=True)
            new[mine[~known]] = True
            seen.add(np.ascontiguousarray(gva[rows[mine]]))
        rows = rows[new]
        if rows.size:
            self._pieces.append((rows.astype(np.uint64) + np.uint64(first), gva[rows], access[rows],
                                 np.full(rows.size, space, np.uint32)))

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint32]]:
        """Return position, gva, access and space of all of them."""
        if not self._pieces:
            return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty(0, np.uint32)
        position, gva, access, space = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        return position, gva, access, space
