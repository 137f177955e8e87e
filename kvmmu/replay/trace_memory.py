"""The memory that a trace brings, by its MEMORY and MEMORY_WORD rows: guest memory that costs what is written."""

import sys
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SHIFT, PAGE_SIZE, Op
from kvmmu.memory._memory import GuestMemory
from kvmmu.traces import Chunk, TraceError
from kvmmu.traces._files import limit_of

__all__ = ["SetUp", "TraceMemory", "check_pages", "memory_limit", "pages_at", "put_pages", "reserve"]

LIMIT_VARIABLE = "KVMMU_TRACE_MEMORY_LIMIT"
_LIMIT = 4 << 30                        # bytes that the set-up rows and the writes of a trace may take here
_DECLARED_LIMIT = 1 << 40
_REGIONS_LIMIT = 1 << 18
_COPIED_LIMIT = 1 << 30                 # bytes that are kept twice
_PENDING = 1 << 20                      # words that are gathered before those of one address become one
_PAGE_SHIFT, _WORD_SHIFT = np.uint64(PAGE_SHIFT), np.uint64(3)
_PAIR_BYTES = 16                        # of an address and a value
_MAP_NORESERVE = 0x4000                 # Linux; Python names it from 3.13 on
_SET_UP = (Op.MEMORY, Op.MEMORY_WORD)

U64 = NDArray[np.uint64]


def reserve(size: int) -> tuple[NDArray[np.uint8], Any]:
    """Return zeroed memory of which only what is written takes room.

    Returns
    -------
    ndarray of uint8, mmap or None
        The bytes, and the mapping behind them if there is one.

    Raises
    ------
    MemoryError
        There is not so much address space.
    """
    if not sys.platform.startswith("linux"):
        return np.zeros(size, np.uint8), None
    import mmap

    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size:#x} bytes of address space: {error}") from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):                         # a kernel without huge pages
            area.madvise(mmap.MADV_NOHUGEPAGE)          # a word would take 2 MiB
    return np.frombuffer(area, np.uint8), area


def memory_limit() -> int:
    """Return how many bytes of guest memory a replay may take for a trace."""
    return limit_of(LIMIT_VARIABLE, _LIMIT)


class _Pairs:
    """Pairs of an address and a value, as arrays, in the order in which they came."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[tuple[U64, U64]] = []

    def add(self, addr: U64, value: U64) -> None:
        if addr.size:
            self._parts.append((addr.copy(), value.copy()))
            self.count += addr.size

    def sorted(self, last_only: bool = False) -> tuple[U64, U64]:
        """Return all of them by address, and keep them so. IN last_only: of those of one address the last one alone."""
        empty = np.zeros(0, np.uint64)
        addr, value = (np.concatenate(columns) for columns in zip(*self._parts, strict=True)) if self._parts else (empty, empty)
        if not np.all(addr[:-1] < addr[1:]):
            order = np.argsort(addr, kind="stable")
            addr, value = addr[order], value[order]
            if last_only:
                last = np.append(addr[:-1] != addr[1:], True)
                addr, value = addr[last], value[last]
        self.replace(addr, value)
        return addr, value

    def replace(self, addr: U64, value: U64) -> None:
        """Replace all pairs by these, which are not copied."""
        self._parts, self.count = [(addr, value)], addr.size


class SetUp:
    """Gathers the MEMORY and MEMORY_WORD rows of a trace, which come before all others."""

    def __init__(self) -> None:
        self._limit = memory_limit()
        self._regions, self._words = _Pairs(), _Pairs()
        self._zeros = np.zeros(0, np.uint64)            # the lowest address of a word of 0 in each page that was told of one
        self._declared = 0
        self._settled = 0                               # words, when those of one address became one the last time

    def __bool__(self) -> bool:
        return bool(self._regions.count or self._words.count)

    def take(self, chunk: Chunk) -> int:
        """Take the rows at the beginning of a chunk; returns how many those are."""
        others = np.flatnonzero(~np.isin(chunk.op, _SET_UP))
        rows = int(others[0]) if others.size else len(chunk)
        if rows and chunk.value is not None:
            op, addr, value = chunk.op[:rows], chunk.addr[:rows], chunk.value[:rows]
            here = op == Op.MEMORY
            self._add_regions(addr[here], value[here])
            self._words.add(addr[~here], value[~here])
            if self._words.count > 2 * self._settled + _PENDING:
                self._settle_words()
        return rows

    def _add_regions(self, gpa: U64, size: U64) -> None:
        if self._regions.count + gpa.size > _REGIONS_LIMIT:
            raise TraceError(f"MEMORY: more than {_REGIONS_LIMIT:,} rows")
        largest = int(size.max(initial=0))
        if largest <= _DECLARED_LIMIT:
            self._declared += int(size.sum(dtype=np.uint64))
        if max(self._declared, largest) > _DECLARED_LIMIT:
            raise TraceError(f"MEMORY: more than {_DECLARED_LIMIT:#x} bytes in all")
        self._regions.add(gpa, size)

    def _settle_words(self) -> tuple[U64, U64]:
        """Sort the words by address, and keep one for each, but none of 0: the memory is zeros."""
        addr, value = self._words.sorted(last_only=True)
        zero = value == 0
        if zero.any():
            told = _merged(self._zeros, addr[zero])
            self._zeros = told[_is_first_of_page(told)]
            addr, value = addr[~zero], value[~zero]
            self._words.replace(addr, value)
        self._settled = addr.size
        room = _pages_of(addr).size * PAGE_SIZE + addr.size * _PAIR_BYTES + self._zeros.nbytes
        check_room(room, "MEMORY_WORD rows", self._limit)
        return addr, value

    def memory(self) -> "TraceMemory":
        """Return the memory, with what is in it at the start."""
        if not self._regions.count:
            raise TraceError("the trace brings no memory (MEMORY rows), and no vCPU was given to replay it on")
        starts, sizes = self._regions.sorted()
        ends = starts + sizes
        overlap = ends[:-1] > starts[1:]
        if overlap.any():
            raise TraceError(f"MEMORY: two regions overlap at gpa {int(starts[1:][overlap][0]):#x}")
        addr, value = self._settle_words()
        told = _merged(addr, self._zeros)
        at = np.searchsorted(starts, told, side="right") - 1
        outside = (at < 0) | (told >= ends[np.maximum(at, 0)])
        if outside.any():
            raise TraceError(f"MEMORY_WORD: gpa {int(told[outside][0]):#x} is in no MEMORY region")
        at = np.searchsorted(starts, addr, side="right") - 1
        places = np.cumsum(sizes) - sizes               # of the regions in one block of bytes
        offsets = places[at] + (addr - starts[at])
        joined = ends[:-1] == starts[1:]
        first = np.flatnonzero(np.append(True, ~joined))
        slots = list(zip(starts[first].tolist(), places[first].tolist(), strict=True))
        return TraceMemory(slots, self._declared, addr, offsets, value, self._limit)


def _merged(one: U64, other: U64) -> U64:
    """All of two ascending arrays, ascending."""
    return np.sort(np.concatenate((one, other)), kind="stable")       # which finds the two runs


def _is_first_of_page(addr: U64) -> NDArray[np.bool_]:
    """Return for each of some ascending addresses whether it is the first one of its page."""
    pages = addr >> _PAGE_SHIFT
    return np.append(True, pages[:-1] != pages[1:])[:addr.size]


def _pages_of(addr: U64) -> U64:
    """Return page numbers of ascending addresses, each once."""
    return addr[_is_first_of_page(addr)] >> _PAGE_SHIFT


def check_room(size: int, what: str, limit: int) -> None:
    """Raise TraceError if a trace takes more memory than it may."""
    if size > limit:
        raise TraceError(f"{what} take {size:,} bytes of memory; allowed are {limit:,}, a limit against hostile files. "
                         f"Set {LIMIT_VARIABLE} to a larger number of bytes if it is what you want to replay")


class TraceMemory:
    """Guest memory of a trace, and what it takes to have it as at the start again.

    Memory of which most pages have words is filled and copied. Other memory, and memory of more than 1 GiB, is address space
    alone, and its words are kept.

    Parameters
    ----------
    slots : list of (int, int)
        Guest-physical address and place in the block of bytes of each slot, ascending.
    size : int
        Of the block.
    addr, offsets, values : ndarray of uint64
        The words that are not 0 at the start: their guest-physical addresses, ascending, and their places in the block.
    limit : int
        Bytes of memory that may be written.

    Attributes
    ----------
    guest : GuestMemory
    words : tuple of two ndarrays of uint64
        `addr` and `values`.

    Raises
    ------
    TraceError
        The machine does not give so much.
    """

    def __init__(self, slots: list[tuple[int, int]], size: int, addr: U64, offsets: U64, values: U64, limit: int) -> None:
        self.words = addr, values
        self._where = offsets >> _WORD_SHIFT
        self._pages = self._pages_at_start = self._written = pages = _pages_of(addr)
        self.keeps_pages = False                        # for `changed()`: note all pages that rows write
        self._limit = limit
        self._bounded = size <= limit                   # whatever is written
        self._area: Any = None
        dense = 2 * pages.size * PAGE_SIZE >= size and size <= _COPIED_LIMIT
        try:
            if dense:
                self._block = np.zeros(size, np.uint8)
            else:
                self._block, self._area = reserve(size)
            self._put_words()
            self._copy = self._block.copy() if dense else None
        except MemoryError:
            raise TraceError(f"MEMORY: {size:#x} bytes are more than this machine gives") from None
        stops = [place for _, place in slots[1:]] + [size]
        self.guest = GuestMemory.from_slots(
            [(gpa, self._block[place:stop]) for (gpa, place), stop in zip(slots, stops, strict=True)])

    def _put_words(self) -> None:
        self._block.view("<u8")[self._where] = self.words[1]

    def restart(self) -> None:
        """Put the memory back to what it was at the start."""
        if self._copy is not None:
            np.copyto(self._block, self._copy)
            return
        if self._area is not None:
            import mmap

            self._area.madvise(mmap.MADV_DONTNEED)      # zeros again, without touching what nobody wrote
        else:
            self._block[:] = 0
        self._put_words()
        self._pages = self._pages_at_start

    def note_writes(self, chunk: Chunk) -> None:
        """Raise TraceError if what the writes of a chunk touch goes beyond the limit."""
        if self._bounded and not self.keeps_pages or not chunk.has_events:
            return
        pages = np.unique(chunk.addr[chunk.op == Op.GUEST_WRITE] >> _PAGE_SHIFT)
        if pages.size:
            self._pages = np.union1d(self._pages, pages)
            if self.keeps_pages:
                self._written = np.union1d(self._written, pages)
            check_room(self._pages.size * PAGE_SIZE, "GUEST_WRITE rows", self._limit)

    def changed(self) -> tuple[U64, NDArray[np.uint8]]:
        """Return the pages that are not as at the start: their guest-physical addresses, ascending, and bytes.

        `keeps_pages` is set since then.
        """
        backed = [page for page in self._written.tolist() if self.guest.is_backed(page << PAGE_SHIFT, PAGE_SIZE)]
        pages = np.array(backed, np.uint64)
        now = pages_at(self.guest, pages << _PAGE_SHIFT)
        start = np.zeros((pages.size, PAGE_SIZE // 8), np.uint64)
        addr, values = self.words
        start[np.searchsorted(pages, addr >> _PAGE_SHIFT), (addr >> _WORD_SHIFT & np.uint64(PAGE_SIZE // 8 - 1)).astype(np.intp)
              ] = values
        other = (now.view(np.uint64) != start).any(axis=1)
        return pages[other] << _PAGE_SHIFT, now[other]

    def restore(self, gpa: U64, data: NDArray[np.uint8]) -> None:
        """Put pages that `changed()` returned in place of those of the start."""
        put_pages(self.guest, gpa, data)
        pages = gpa >> _PAGE_SHIFT
        self._pages, self._written = np.union1d(self._pages, pages), np.union1d(self._written, pages)


def pages_at(mem: GuestMemory, gpa: U64) -> NDArray[np.uint8]:
    """Return the bytes of pages, a row each."""
    found = np.empty((gpa.size, PAGE_SIZE), np.uint8)
    for row, start in enumerate(gpa.tolist()):
        found[row] = np.frombuffer(mem.read(start, PAGE_SIZE), np.uint8)
    return found


def check_pages(gpa: Any, data: Any) -> None:
    """Raise ValueError unless these are addresses and bytes of pages."""
    if gpa.dtype != np.uint64 or gpa.ndim != 1 or data.dtype != np.uint8 or data.shape != (gpa.size, PAGE_SIZE):
        raise ValueError(f"pages: {gpa.dtype} of shape {gpa.shape}, {data.dtype} of shape {data.shape}")


def put_pages(mem: GuestMemory, gpa: U64, data: NDArray[np.uint8]) -> None:
    """Store pages, all of which there are.

    Raises
    ------
    ValueError
        The memory has no such pages.
    """
    for start in gpa.tolist():
        if start % PAGE_SIZE or not mem.is_backed(start, PAGE_SIZE):
            raise ValueError(f"gpa {start:#x}: there is no page of memory")
    for start, page in zip(gpa.tolist(), data, strict=True):
        mem.write(start, page.tobytes())
