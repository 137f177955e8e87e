"""Counters by key, in an open-addressing table at most half full."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

cdef struct key_counts:
    uint64_t *keys                      # 0: free
    uint64_t *counts
    size_t mask
    size_t used
    uint64_t zero                       # count of the key 0

cdef int counts_init(key_counts *c) noexcept nogil       # -1 without memory
cdef void counts_free(key_counts *c) noexcept nogil
cdef bint counts_add(key_counts *c, uint64_t key, uint64_t more) noexcept nogil      # False without memory
# Return keys and their counts as an ndarray, a row each.
cdef object counts_rows(const key_counts *c)
# Return a copy of some words as an ndarray.
cdef object words_at(const uint64_t *from_, size_t count)
