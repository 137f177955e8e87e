"""The scan of whole page tables for what they map."""

from libc.stdint cimport uint64_t

from kvmmu.walk._register_sets cimport WalkCopy

# Rows of `mapped.MAPPING` for the linear addresses first to last, ascending. IN merge: join neighbours. ValueError beyond limit.
# The table of slots that the walk is over is kept by the caller
cdef object scan_rows(WalkCopy walk, uint64_t first, uint64_t last, bint merge, size_t limit)
# Number of offset bits of the pages of level 2
cdef int large_shift(WalkCopy walk)
