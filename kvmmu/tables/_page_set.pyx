"""PageSet: the distinct pages of a stream of addresses."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport PAGE_SHIFT

cdef enum:
    FIRST_CAPACITY = 1 << 12


cdef inline size_t place_of(uint64_t page, size_t mask) noexcept nogil:
    return <size_t>((page * <uint64_t>0x9E3779B97F4A7C15ULL) >> 20) & mask


cdef class PageSet:
    """Numbers of 4K pages, each once, in an open-addressing table at most half full."""

    cdef uint64_t *keys         # page number + 1; 0: free
    cdef size_t mask
    cdef size_t count
    cdef uint64_t last

    def __cinit__(self):
        self.keys = <uint64_t *>calloc(FIRST_CAPACITY, sizeof(uint64_t))
        if self.keys is NULL:
            raise MemoryError
        self.mask = FIRST_CAPACITY - 1

    def __dealloc__(self):
        free(self.keys)

    def __len__(self):
        return self.count

    cdef bint double_size(self) noexcept nogil:
        cdef size_t capacity = 2 * (self.mask + 1), i, place
        cdef uint64_t *keys = <uint64_t *>calloc(capacity, sizeof(uint64_t))
        if keys is NULL:
            return False
        for i in range(self.mask + 1):
            if self.keys[i]:
                place = place_of(self.keys[i], capacity - 1)
                while keys[place]:
                    place = (place + 1) & (capacity - 1)
                keys[place] = self.keys[i]
        free(self.keys)
        self.keys, self.mask = keys, capacity - 1
        return True

    def add(self, const uint64_t[::1] addr not None):
        """Add the pages of addresses (bytes).

        Returns
        -------
        int
            How many of them are new.
        """
        cdef Py_ssize_t i
        cdef size_t place, before = self.count
        cdef uint64_t key, last = self.last
        cdef bint memory = True
        with nogil:
            for i in range(addr.shape[0]):
                key = (addr[i] >> PAGE_SHIFT) + 1
                if key == last:
                    continue
                last = key
                place = place_of(key, self.mask)
                while self.keys[place] and self.keys[place] != key:
                    place = (place + 1) & self.mask
                if self.keys[place]:
                    continue
                if 2 * self.count >= self.mask:
                    memory = self.double_size()
                    if not memory:
                        break
                    place = place_of(key, self.mask)
                    while self.keys[place]:
                        place = (place + 1) & self.mask
                self.keys[place] = key
                self.count += 1
        if not memory:
            raise MemoryError
        self.last = last
        return self.count - before

    def pages(self):
        """Page numbers (address >> 12), ascending: ndarray of uint64."""
        cdef size_t i, n = 0
        found = np.empty(self.count, np.uint64)
        cdef uint64_t[::1] rows = found
        for i in range(self.mask + 1):
            if self.keys[i]:
                rows[n] = self.keys[i] - 1
                n += 1
        found.sort()
        return found
