"""Rows of a batch 64 at a time, of one walk each. All rules are checked for them.

Blocks pass three points, so that last entries are prefetched while the block before is checked:

    start     the paging-structure cache tells where the last entries lie
    advance   the first stage is checked; without a second one the rows are written
    finish    the second stage is checked, and the rows are written

Rows that set bits in upper levels, lose a race, or whose psce cannot be known, are left to the scalar walk.
"""

from libc.stddef cimport size_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._rows cimport batch

# Start a block of up to 64 rows of one walk, from first on; few rows are walked one by one
cdef void enqueue_run(batch *b, const kvm_pagewalk *w, size_t first, size_t count) noexcept nogil
# The same of rows that do not stand side by side
cdef void enqueue_rows(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t count) noexcept nogil
# Finish the blocks that are under way
cdef void drain_blocks(batch *b) noexcept nogil
