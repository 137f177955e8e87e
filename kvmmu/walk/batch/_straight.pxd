"""Rows that go straight through: 64 at once, from addresses to results in one go, where most of them pass.

What does not surely pass is found one by one. Where too many rows are like that, blocks take them (`_blocks.pxd`).
"""

from libc.stddef cimport size_t

from kvmmu.walk.batch._rows cimport batch

# Rows of one walk, from first on, 64 at a time, as far as they go. Returns how many.
cdef size_t translate_uniform_blocks(batch *b, size_t first, size_t stop) noexcept nogil
