"""The slots of a GuestMemory as Python sees them, in the order of their addresses."""

from bisect import bisect_right

import numpy as np

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uintptr_t

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_SIZE

from kvmmu.arch.arguments import check_bytes, check_int, check_length, check_pages
from kvmmu.memory._mapping import new_bytes

cdef int ENTRY_ALIGNMENT = 8
_PAGE = int(PAGE_SIZE)
_BUCKET = 512                                   # regions that lie in one list


class _Region:
    """One memslot as Python sees it: its place, its bytes (a uint8 array over the caller's buffer) and its rights.

    `export` is the buffer as it was exported for this region. As long as that is there, its owner cannot resize or close it.
    """

    __slots__ = ("address", "data", "export", "gpa", "readonly", "size")

    def __init__(self, gpa, data, export, readonly):
        self.gpa = gpa
        self.data = data
        self.export = export
        self.size = data.size
        self.readonly = readonly or not data.flags.writeable
        self.address = _address_of(data)

    @property
    def end(self):
        return self.gpa + self.size

    def __repr__(self):
        return f"[{self.gpa:#x}, {self.end:#x}){' read-only' if self.readonly else ''}"


def _address_of(data):
    """Return the address of the bytes of an array."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    address = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return address


class _Regions:
    """The regions of a memory in the order of their addresses, in lists of limited length: one more costs the same however many
    there are."""

    __slots__ = ("buckets", "count", "firsts", "starts")

    def __init__(self):
        self.buckets, self.starts = [], []      # the regions; their first addresses
        self.firsts = []                        # first address of each bucket
        self.count = 0

    def __iter__(self):
        for bucket in self.buckets:
            yield from bucket

    def place(self, gpa):
        """(bucket, number in it) of the last region that begins at gpa or before; (0, -1) without one."""
        bucket = max(bisect_right(self.firsts, gpa) - 1, 0)
        return bucket, bisect_right(self.starts[bucket], gpa) - 1 if self.starts else -1

    def following(self, gpa):
        """The regions from the one that gpa may lie in on, ascending."""
        first, number = self.place(gpa)
        number = max(number, 0)
        for bucket in self.buckets[first:]:
            yield from bucket[number:]
            number = 0

    def find(self, gpa):
        """The region that begins at gpa, or None."""
        bucket, number = self.place(gpa)
        if number < 0 or self.starts[bucket][number] != gpa:
            return None
        return self.buckets[bucket][number]

    def add(self, region):
        """Raises ValueError if it overlaps another one."""
        bucket, number = self.place(region.gpa)
        if not self.buckets:
            self.buckets, self.starts, self.firsts = [[]], [[]], [region.gpa]
        here = self.buckets[bucket]
        if number >= 0 and here[number].end > region.gpa:
            raise ValueError(f"slots overlap: {here[number]} and {region}")
        upper = here[number + 1] if number + 1 < len(here) else (
            self.buckets[bucket + 1][0] if bucket + 1 < len(self.buckets) else None)
        if upper is not None and region.end > upper.gpa:
            raise ValueError(f"slots overlap: {region} and {upper}")
        here.insert(number + 1, region)
        self.starts[bucket].insert(number + 1, region.gpa)
        self.count += 1
        self.firsts[bucket] = self.starts[bucket][0]
        if len(here) > _BUCKET:
            half = _BUCKET // 2
            self.buckets[bucket:bucket + 1] = [here[:half], here[half:]]
            starts = self.starts[bucket]
            self.starts[bucket:bucket + 1] = [starts[:half], starts[half:]]
            self.firsts.insert(bucket + 1, starts[half])

    def remove(self, region):
        """IN region: one of them."""
        bucket, number = self.place(region.gpa)
        del self.buckets[bucket][number], self.starts[bucket][number]
        self.count -= 1
        if self.buckets[bucket]:
            self.firsts[bucket] = self.starts[bucket][0]
        else:
            del self.buckets[bucket], self.starts[bucket], self.firsts[bucket]


def _as_bytes(size_or_buffer):
    """(a C-contiguous uint8 array: zeroed of the given size, or over the buffer without a copy; the export of its bytes)."""
    if isinstance(size_or_buffer, (int, np.generic)) or hasattr(type(size_or_buffer), "__index__") and not isinstance(
            size_or_buffer, np.ndarray):
        own = new_bytes(check_pages("size_or_buffer", size_or_buffer, PAGE_SIZE, GPA_LIMIT))
        return own[:], memoryview(own)              # a view of an array cannot be resized
    try:
        data = check_bytes("size_or_buffer", size_or_buffer)
    except TypeError:
        raise TypeError("size_or_buffer: want a size in bytes or an object with the buffer protocol, got "
                        f"{type(size_or_buffer).__name__}") from None
    view = memoryview(size_or_buffer)
    check_int("size_or_buffer", data.size, 1, GPA_LIMIT)
    if data.flags.writeable and _address_of(data) % ENTRY_ALIGNMENT:
        raise ValueError(
            f"a writable buffer must be {ENTRY_ALIGNMENT}-byte aligned for atomic A/D updates, this one starts at "
            f"{_address_of(data):#x}; pass it read-only (memoryview.toreadonly()) or copy it")
    return data, view


def _regions_of(gpa, size_or_buffer, readonly):
    """The regions of a slot: one, or two if it ends within a page."""
    data, export = _as_bytes(size_or_buffer)
    whole = data.size // _PAGE * _PAGE
    check_length("size_or_buffer", -(-data.size // _PAGE) * _PAGE, gpa)
    if whole == data.size:
        return [_Region(gpa, data, export, readonly)]
    page = np.zeros(_PAGE, np.uint8)
    page[:data.size - whole] = data[whole:]
    last = _Region(gpa + whole, page[:], memoryview(page), readonly or not data.flags.writeable)
    return [_Region(gpa, data[:whole], export, readonly), last] if whole else [last]
