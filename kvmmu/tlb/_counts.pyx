"""Counters by key, as `_counts.pxd` describes them."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu.memory._memory cimport hash_gfn
from kvmmu.tlb._counts cimport key_counts

cdef enum:
    FIRST_CAPACITY = 1 << 10


cdef int counts_init(key_counts *c) noexcept nogil:
    memset(c, 0, sizeof(key_counts))
    c.keys = <uint64_t *>calloc(FIRST_CAPACITY, sizeof(uint64_t))
    c.counts = <uint64_t *>calloc(FIRST_CAPACITY, sizeof(uint64_t))
    c.mask = FIRST_CAPACITY - 1
    if c.keys is NULL or c.counts is NULL:
        counts_free(c)
        return -1
    return 0


cdef void counts_free(key_counts *c) noexcept nogil:
    free(c.keys)
    free(c.counts)
    memset(c, 0, sizeof(key_counts))


cdef bint double_size(key_counts *c) noexcept nogil:
    cdef size_t capacity = 2 * (c.mask + 1), i, place
    cdef uint64_t *keys = <uint64_t *>calloc(capacity, sizeof(uint64_t))
    cdef uint64_t *counts = <uint64_t *>calloc(capacity, sizeof(uint64_t))
    if keys is NULL or counts is NULL:
        free(keys)
        free(counts)
        return False
    for i in range(c.mask + 1):
        if c.keys[i]:
            place = hash_gfn(c.keys[i]) & (capacity - 1)
            while keys[place]:
                place = (place + 1) & (capacity - 1)
            keys[place], counts[place] = c.keys[i], c.counts[i]
    free(c.keys)
    free(c.counts)
    c.keys, c.counts, c.mask = keys, counts, capacity - 1
    return True


cdef bint counts_add(key_counts *c, uint64_t key, uint64_t more) noexcept nogil:
    cdef size_t place
    if not key:
        c.zero += more
        return True
    if 2 * c.used > c.mask and not double_size(c):
        return False
    place = hash_gfn(key) & c.mask
    while c.keys[place] and c.keys[place] != key:
        place = (place + 1) & c.mask
    if not c.keys[place]:
        c.keys[place] = key
        c.used += 1
    c.counts[place] += more
    return True


cdef object words_at(const uint64_t *from_, size_t count):
    cdef uint64_t[::1] out
    found = np.empty(count, np.uint64)
    if count:
        out = found
        memcpy(&out[0], from_, count * sizeof(uint64_t))
    return found


cdef object counts_rows(const key_counts *c):
    cdef size_t i
    cdef Py_ssize_t row = 0
    found = np.empty((c.used + (c.zero != 0), 2), np.uint64)
    cdef uint64_t[:, ::1] rows = found
    if c.zero:
        rows[0, 0], rows[0, 1] = 0, c.zero
        row = 1
    for i in range(c.mask + 1):
        if c.keys[i]:
            rows[row, 0], rows[row, 1] = c.keys[i], c.counts[i]
            row += 1
    return found
