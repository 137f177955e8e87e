"""Blocks of a batch: up to 64 rows of one walk, leaf side by side.

A block passes three points, so that its last entries travel to the cache while the block before it is checked:

    start     psc of the rows' walks, and where their last entries lie
    advance   the first stage is checked; without a second one the rows are written
    finish    the second stage is checked, and the rows are written

Rows that set bits in upper levels, lose a race, or whose prefix cannot be known, are left to the scalar walk.
"""

from libc.stddef cimport size_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._rows cimport batch

# Up to 64 rows of one walk that stand side by side; few of them are walked one by one.
cdef void enqueue_run(batch *b, const kvm_pagewalk *w, size_t first, size_t count) noexcept nogil
# The same of rows that do not.
cdef void enqueue_rows(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t count) noexcept nogil
# Finish what is under way.
cdef void drain_blocks(batch *b) noexcept nogil
