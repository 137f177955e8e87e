"""The order of a batch: which way each row takes. `walk/batch/__init__.py` tells the ways."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu.walk.batch._psc cimport WalkCache, touched_words
from kvmmu.walk.batch._rows cimport batch, block, cached_walks, deferred_rows


cdef class Workspace:
    """The memory that one batch, or one thread's part of it, works in."""
    cdef WalkCache cache
    cdef void *block_memory
    cdef block *blocks                  # in it
    cdef cached_walks *cached
    cdef deferred_rows *deferred
    cdef touched_words *touched

cdef Workspace new_workspace()
# Begin a batch with an empty cache. IN count: of walks; rows: about how many are to come; watch: the caller changes tables
# between calls of translate_rows(), and calls forget_word() for each aligned word of them
cdef void begin_batch(batch *b, Workspace work, uint64_t count, size_t rows, bint watch) noexcept nogil
cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil
# Forget what is cached of the aligned word at hva. False: that takes a new begin_batch()
cdef bint forget_word(batch *b, const uint8_t *hva) noexcept nogil
