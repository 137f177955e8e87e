"""Files mapped copy-on-write: memory of which a copy costs no more than the pages that were changed."""

import os

import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from kvmmu.arch._bits cimport PAGE_SIZE
from kvmmu.memory._maker cimport check_maker, maker

from kvmmu.arch.arguments import check_int

cdef extern from "kvmmu/memory/_memory.h" nogil:
    void kvmmu_store(uint8_t *to, const uint8_t *from_, size_t n)

cdef extern from * nogil:
    """
    #include <sys/mman.h>
    #ifndef MAP_NORESERVE
    #define MAP_NORESERVE 0
    #endif
    """
    enum:
        MAP_NORESERVE

LARGE = 1 << 28                             # bytes of zeros that are mapped apart
_FILE_MAX = (1 << 63) - 1


cdef class PrivateFile:
    """A file that is mapped copy-on-write any number of times.

    Parameters
    ----------
    fd : int
        Descriptor of a regular file, which is duplicated. Whoever changes or truncates the file changes what its mappings read.

    Attributes
    ----------
    size : int
    """

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, fd):
        if self.fd >= 0:
            raise RuntimeError("a PrivateFile is initialized once")
        number = os.dup(check_int("fd", fd, 0, (1 << 31) - 1))
        try:
            size = os.fstat(number).st_size
            if not size:
                raise ValueError("fd: the file is empty")
        except BaseException:
            os.close(number)
            raise
        self.size, self.fd = size, number

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def map(self):
        """Return a new `PrivateMapping` of the whole file."""
        if self.fd < 0:
            raise RuntimeError("this PrivateFile has no file")
        return new_mapping(self.size, self)

    def read(self, offset, n):
        """Return n bytes of the file; what is behind its end is zero."""
        offset, n = check_int("offset", offset, 0, _FILE_MAX), check_int("n", n, 0, _FILE_MAX)
        if self.fd < 0:
            raise RuntimeError("this PrivateFile has no file")
        parts = []
        while n:
            part = os.pread(self.fd, min(n, 1 << 30), offset)
            if not part:
                parts.append(bytes(n))
                break
            parts.append(part)
            offset, n = offset + len(part), n - len(part)
        return b"".join(parts)

    def __reduce__(self):
        raise TypeError("a PrivateFile cannot be copied or pickled; `map()` makes another mapping of the same file")


cdef class PrivateMapping:
    """The bytes of a `PrivateFile`, as a buffer. Stores to it stay in it. Made by `PrivateFile.map()`.

    Attributes
    ----------
    file : PrivateFile or None
        None: it was zeros.
    """

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a PrivateMapping is made by PrivateFile.map()")

    def __dealloc__(self):
        if self.address is not NULL:
            munmap(self.address, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.address is NULL:
            raise BufferError("this PrivateMapping has no bytes")
        PyBuffer_FillInfo(view, self, self.address, self.size, False, flags)

    def __len__(self):
        return int(self.size)

    def __reduce__(self):
        raise TypeError("a PrivateMapping cannot be copied or pickled; `PrivateFile.map()` makes another one")


cdef PrivateMapping new_mapping(size_t size, PrivateFile file):
    """Return a mapping of a whole file, or of zeros (None)."""
    cdef PrivateMapping mapping = PrivateMapping.__new__(PrivateMapping, maker())
    cdef int flags = MAP_PRIVATE | MAP_NORESERVE | (MAP_ANONYMOUS if file is None else 0)
    cdef void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1 if file is None else file.fd, 0)
    cdef int error = errno
    if address is MAP_FAILED:
        raise OSError(error, f"a mapping of {size:#x} bytes: {os.strerror(error)}")
    mapping.address, mapping.size, mapping.file = <uint8_t *>address, size, file
    return mapping


def new_bytes(size):
    """Return zeros, uint8 (size,); large ones take address space, and memory for the pages that are written."""
    n = check_int("size", size, 1, _FILE_MAX)
    if n < LARGE:
        return np.zeros(n, np.uint8)
    try:
        return np.frombuffer(new_mapping(n, None), np.uint8)
    except OSError:
        raise MemoryError(f"there is no address space for {n:#x} bytes") from None


def put_pages(uint8_t[::1] data not None, const uint64_t[::1] numbers not None, const uint8_t[:, ::1] pages not None):
    """Store pages, uint8 (n, 4096), at their numbers in data; those that are there already are not touched."""
    cdef size_t i, n = numbers.shape[0], count = data.shape[0] // PAGE_SIZE
    cdef const uint64_t *number
    cdef const uint8_t *page
    cdef uint8_t *place
    if <size_t>pages.shape[0] < n or pages.shape[1] != PAGE_SIZE:
        raise ValueError(f"pages: want shape ({n}, {PAGE_SIZE}), got ({pages.shape[0]}, {pages.shape[1]})")
    for i in range(n):
        if numbers[i] >= count:
            raise ValueError(f"numbers: want less than {count}, got {numbers[i]}")
    if n == 0:
        return
    number, page, place = &numbers[0], &pages[0, 0], &data[0]
    with nogil:
        for i in range(n):
            if memcmp(place + number[i] * PAGE_SIZE, page + i * PAGE_SIZE, PAGE_SIZE):
                kvmmu_store(place + number[i] * PAGE_SIZE, page + i * PAGE_SIZE, PAGE_SIZE)
