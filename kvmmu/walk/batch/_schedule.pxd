"""The order of a batch: which way each row takes. `walk/batch/__init__.py` tells the ways."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from kvmmu.walk.batch._psc cimport WalkCache, is_marked, touched_bit, touched_words
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
# Write those of 64 rows from start on whose translations the memo has; returns the bits of the others. b.recalls is set
cdef uint64_t recall_rows(batch *b, size_t start) noexcept nogil
# Write the rows of those bits, in order, until `most` of them were walked; returns the bits of the others
cdef uint64_t walk_missing(batch *b, size_t start, uint64_t misses, size_t most) noexcept nogil
# Use the memo as long as most rows find their translations; else try it again later, each time later
cdef void consider_recall(batch *b) noexcept nogil
# Forget what is cached of the aligned word at hva. False: that takes a new begin_batch()
cdef bint forget_word(batch *b, const uint8_t *hva) noexcept nogil


cdef inline bint depends_on(const batch *b, const uint8_t *hva) noexcept nogil:
    """True if something cached may depend on the aligned word at hva."""
    return is_marked(b.touched, touched_bit(<uint64_t><uintptr_t>hva))
