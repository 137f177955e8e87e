"""Uniform blocks: 64 rows of one walk that go from addresses to results in the caller's own columns.

They pay where the accept masks accept most rows. Rows that are not accepted are checked one by one. A block takes two steps, or
three if there are two stages:

    seek      the paging-structure cache tells where the last entries of the first stage lie
    reach     the first of two stages is accepted, and the cache tells where the last entries of the second one lie
    finish    the last stage is accepted, and the other rows are translated

Where the page tables are larger than a cache of the CPU, the steps are those of blocks one behind the other, so that each step
prefetches what the next one of the block behind it reads.
"""

from libc.stddef cimport size_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._rows cimport batch

# True if each stage decides by itself what passes, and the order of rows does not matter
cdef bint can_be_uniform(const kvm_pagewalk *w) noexcept nogil
# Translate rows of one walk in uniform blocks, from first on, as far as they go. Returns how many rows
cdef size_t translate_uniform_blocks(batch *b, size_t first, size_t stop) noexcept nogil
