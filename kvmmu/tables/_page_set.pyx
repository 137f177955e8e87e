"""PageSet: the distinct pages of a stream of addresses."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from kvmmu.arch._bits cimport PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport hash_gfn

cdef enum:
    FIRST_CAPACITY = 1 << 12


cdef struct page_table:
    uint64_t *keys              # page number + 1; 0: free
    size_t mask
    size_t count
    uint64_t last               # key of the address before


cdef bint double_size(page_table *t) noexcept nogil:
    cdef size_t capacity = 2 * (t.mask + 1), i, place
    cdef uint64_t *keys = <uint64_t *>calloc(capacity, sizeof(uint64_t))
    if keys is NULL:
        return False
    for i in range(t.mask + 1):
        if t.keys[i]:
            place = hash_gfn(t.keys[i]) & (capacity - 1)
            while keys[place]:
                place = (place + 1) & (capacity - 1)
            keys[place] = t.keys[i]
    free(t.keys)
    t.keys, t.mask = keys, capacity - 1
    return True


cdef bint add_key(page_table *t, uint64_t key) noexcept nogil:
    """Add a page that is not the last one. False: no memory."""
    cdef size_t place = hash_gfn(key) & t.mask
    while t.keys[place] and t.keys[place] != key:
        place = (place + 1) & t.mask
    if not t.keys[place]:
        if 2 * t.count >= t.mask:
            if not double_size(t):
                return False
            place = hash_gfn(key) & t.mask
            while t.keys[place]:
                place = (place + 1) & t.mask
        t.keys[place] = key
        t.count += 1
    t.last = key
    return True


cdef bint add_rows(page_table *t, const uint64_t *addr, const uint8_t *size, size_t rows) noexcept nogil:
    """IN size: bytes of each access, or NULL for 1. False: no memory."""
    cdef size_t i
    cdef uint64_t key
    for i in range(rows):
        key = (addr[i] >> PAGE_SHIFT) + 1
        if key != t.last and not add_key(t, key):
            return False
        if size is not NULL and (addr[i] & PAGE_OFFSET_MASK) + size[i] > PAGE_SIZE:
            if not add_key(t, (addr[i] + PAGE_SIZE >> PAGE_SHIFT) + 1):
                return False
    return True


cdef class PageSet:
    """Numbers of 4K pages, each once, in an open-addressing table at most half full. Threads wait for each other."""

    cdef page_table t
    cdef MachineLock lock

    def __cinit__(self):
        self.lock = MachineLock()
        self.t.keys = <uint64_t *>calloc(FIRST_CAPACITY, sizeof(uint64_t))
        if self.t.keys is NULL:
            raise MemoryError
        self.t.mask = FIRST_CAPACITY - 1

    def __dealloc__(self):
        free(self.t.keys)

    def __len__(self):
        return self.t.count

    def add(self, const uint64_t[::1] addr not None, const uint8_t[::1] size=None):
        """Add the pages of accesses.

        Parameters
        ----------
        addr : ndarray of uint64, shape (n,)
            Their addresses (bytes).
        size : ndarray of uint8, shape (n,), optional
            Their sizes (bytes), 1 by default. One that reaches into the next page touches both.

        Returns
        -------
        int
            How many of them are new.
        """
        cdef size_t before, rows = addr.shape[0]
        cdef page_table *t = &self.t
        cdef bint memory = True
        cdef const uint8_t *sizes = NULL
        if size is not None:
            if <size_t>size.shape[0] != rows:
                raise ValueError(f"size: {size.shape[0]} rows, addr has {rows}")
            if rows:
                sizes = &size[0]
        with self.lock:
            before = t.count
            if rows:
                with nogil:
                    memory = add_rows(t, &addr[0], sizes, rows)
            if not memory:
                raise MemoryError
            return t.count - before

    def pages(self):
        """Page numbers (address >> 12), ascending: ndarray of uint64."""
        cdef size_t i, n = 0
        cdef uint64_t[::1] rows
        with self.lock:
            found = np.empty(self.t.count, np.uint64)
            rows = found
            for i in range(self.t.mask + 1):
                if self.t.keys[i]:
                    rows[n] = self.t.keys[i] - 1
                    n += 1
        found.sort()
        return found
