"""Copies of the bytes of slots, which take the pages that were written, as far as the kernel tells which ones these are.

Bytes have a base: a file that is mapped copy-on-write, or zeros for memory that numpy has allocated. A page that the process
never wrote is that of the base. `/proc/self/pagemap` of Linux tells which were written; where nothing tells it, or for a
caller's own buffer, all pages count as written.

Sources: Linux, "Examining Process Page Tables", for the words of the page map and for PAGEMAP_SCAN.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.memory._mapping import PrivateFile, PrivateMapping, new_bytes, put_pages

__all__ = ["SavedBytes", "copies_of"]

_PAGE = int(PAGE_SIZE)
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
# The call that finds pages: the number and the size of its argument, and categories of pages.
_PAGEMAP_SCAN, _SCAN_BYTES = 0xC0606610, 96
_SCAN_FILE, _SCAN_PRESENT, _SCAN_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 1 << 12                          # that one call finds
_AT_ONCE = 1 << 20                          # words of the page map that are read at once
_PART = 1 << 10                             # pages that are written back at once
_FEW = 1 << 8                               # pages for which no file is made

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint64]


class _Base:
    """The file or the zeros that an array was before anybody wrote to it."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.file: PrivateFile | None = None
        self.offset = 0                     # of the array in the file
        owner: Any = data
        while isinstance(owner, np.ndarray | memoryview) and not (isinstance(owner, np.ndarray) and owner.flags.owndata):
            owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        self.known = isinstance(owner, np.ndarray | PrivateMapping) and os.sysconf("SC_PAGE_SIZE") == _PAGE
        if isinstance(owner, PrivateMapping):
            self.file = owner.file
            self.offset = data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        mmap: Any = sys.modules.get("mmap")
        self.is_file = not data.flags.writeable and mmap is not None and isinstance(owner, mmap.mmap)

    def written(self) -> Numbers:
        """Return the numbers of the pages that may differ from the base, ascending."""
        count = self.data.size // _PAGE
        pages = _written(self.data.ctypes.data, count, self.file is not None) if self.known else None
        return np.arange(count, dtype=np.uint64) if pages is None else pages

    def pages(self, numbers: Numbers) -> Bytes:
        """Return pages as the base has them."""
        pages = np.zeros((numbers.size, _PAGE), np.uint8)
        if self.file is not None:
            for i, number in enumerate(numbers.tolist()):
                pages[i] = np.frombuffer(self.file.read(self.offset + number * _PAGE, _PAGE), np.uint8)
        return pages


def _written(address: int, count: int, over_file: bool) -> Numbers | None:
    """Return which of `count` pages from an address on were written, ascending; None if the system does not tell."""
    first, stop = address // _PAGE, -(-(address + count * _PAGE) // _PAGE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            try:
                pages = _scan(file.fileno(), first, stop, over_file)
            except OSError:                 # a kernel before 6.7
                pages = _read_map(file.fileno(), first, stop, over_file)
    except OSError:
        return None
    if address % _PAGE:                     # a page of the slot lies in two
        pages = np.union1d(pages, pages[pages != 0] - np.uint64(1))
    return pages[pages < count]


def _scan(fd: int, first: int, stop: int, over_file: bool) -> Numbers:
    """Return the pages that were written, from `first` on, by a call that passes over what was never touched."""
    import fcntl

    regions = np.empty((_REGIONS, 3), np.uint64)
    wanted = _SCAN_FILE if over_file else 0
    found = [np.empty(0, np.uint64)]
    at = first
    while at < stop:
        argument = np.array([_SCAN_BYTES, 0, at * _PAGE, stop * _PAGE, 0, regions.ctypes.data, _REGIONS, 0, wanted, wanted,
                             _SCAN_PRESENT | _SCAN_SWAPPED, 0], np.uint64)
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument, True)
        starts, ends = regions[:count, 0] // _PAGE - first, regions[:count, 1] // _PAGE - first
        sizes = (ends - starts).astype(np.intp)
        behind = np.cumsum(sizes) - sizes   # of each region, how many pages the ones before have
        found.append(np.repeat(starts - behind.astype(np.uint64), sizes) + np.arange(sizes.sum(), dtype=np.uint64))
        at = int(argument[4]) // _PAGE
    return np.concatenate(found)


def _read_map(fd: int, first: int, stop: int, over_file: bool) -> Numbers:
    """Return the pages that were written, from `first` on, by a word for each page."""
    words = np.empty(stop - first, np.uint64)
    for start in range(0, words.size, _AT_ONCE):
        part = words[start:start + _AT_ONCE]
        if os.preadv(fd, [part], (first + start) * 8) != part.nbytes:
            raise OSError("the page map ends")
    there = (words & (_PRESENT | _SWAPPED)) != 0
    if over_file:
        there &= (words & _OF_FILE) == 0
    return np.flatnonzero(there).astype(np.uint64)


def _pages_of(data: Bytes) -> Bytes:
    return data.reshape(-1, _PAGE)


class SavedBytes:
    """The bytes of a slot at one moment.

    Parameters
    ----------
    data : ndarray of uint8
        The bytes of the slot, whole pages. Those of a read-only buffer are not saved: they are their owner's.
    """

    __slots__ = ("base", "data", "numbers", "pages")

    def __init__(self, data: Bytes) -> None:
        self.data, self.base = data, _Base(data)
        self.numbers = self.base.written() if data.flags.writeable else np.empty(0, np.uint64)
        self.pages: Bytes = _pages_of(data)[self.numbers]

    def restore(self) -> None:
        """Store the bytes where they were, but for pages that have them."""
        if not self.data.flags.writeable:
            return
        put_pages(self.data, self.numbers, self.pages)
        if self.base.known:
            others = np.setdiff1d(self.base.written(), self.numbers, assume_unique=True)
            for start in range(0, others.size, _PART):
                put_pages(self.data, others[start:start + _PART], self.base.pages(others[start:start + _PART]))


# ---- copies --------------------------------------------------------------------------------------------------------------

def copies_of(arrays: Sequence[Bytes]) -> list[Bytes]:
    """Return an array with the bytes of each of some arrays, in its order.

    The copies of memory over a copy-on-write file are mappings of the same file. All other memory goes to one new file in
    memory, of which copies of these copies will be mappings; a file that is mapped read-only is no copy.
    """
    copies = list(arrays)
    mappings: dict[PrivateFile, Bytes] = {}
    rest = []
    for i, data in enumerate(arrays):
        base = _Base(data)
        if base.is_file:
            continue
        if base.file is not None:
            whole = mappings.get(base.file)
            if whole is None:
                whole = mappings[base.file] = np.frombuffer(base.file.map(), np.uint8)
            copies[i] = _with_pages(whole[base.offset:base.offset + data.size], data, base.written())
        else:
            rest.append((i, data, base.written()))
    for (i, _, _), copy in zip(rest, _new_memory([(data, numbers) for _, data, numbers in rest]), strict=True):
        copies[i] = copy
    for data, copy in zip(arrays, copies, strict=True):
        if copy is not data:
            copy.flags.writeable = data.flags.writeable
    return copies


def _new_memory(parts: list[tuple[Bytes, Numbers]]) -> list[Bytes]:
    """Return copies of arrays, of which the pages with these numbers count, others are zero: in one file if they are many."""
    if sum(numbers.size for _, numbers in parts) > _FEW:
        try:
            whole = np.frombuffer(_file_of(parts).map(), np.uint8)
        except OSError:                     # no such files, or no more descriptors
            pass
        else:
            ends = np.cumsum([data.size for data, _ in parts]).tolist()
            return [whole[end - data.size:end] for end, (data, _) in zip(ends, parts, strict=True)]
    return [_with_pages(new_bytes(data.size), data, numbers) for data, numbers in parts]


def _with_pages(copy: Bytes, data: Bytes, numbers: Numbers) -> Bytes:
    """Return an array after it was given pages of another one."""
    _pages_of(copy)[numbers] = _pages_of(data)[numbers]
    return copy


def _file_of(parts: list[tuple[Bytes, Numbers]]) -> PrivateFile:
    """Return a file in memory with the pages of arrays, one array behind the other."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no files in memory")
    fd = os.memfd_create("kvmmu")
    try:
        os.ftruncate(fd, sum(data.size for data, _ in parts))
        at = 0
        for data, numbers in parts:
            for start, stop in _runs(numbers):
                _write(fd, memoryview(data[start:stop]), at + start)
            at += data.size
        return PrivateFile(fd)
    finally:
        os.close(fd)


def _runs(numbers: Numbers) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the one behind the last of each run of pages."""
    if not numbers.size:
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    firsts = numbers[np.concatenate(([0], breaks))].tolist()
    lasts = numbers[np.concatenate((breaks - 1, [numbers.size - 1]))].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        yield first * _PAGE, (last + 1) * _PAGE


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
