"""Uniform blocks of rows whose contexts change from row to row, but read the same tables by the same rules, rights aside.

The accept masks of such a block accept what passes in every context that is alike, so that nobody asks which one a row is of.
Rows that are not accepted, and those of other contexts, are translated one by one.
"""

from libc.stddef cimport size_t

from kvmmu.walk.batch._rows cimport batch

# Translate rows of several contexts, from first on, as far as such blocks go. Returns how many rows
cdef size_t translate_mixed_blocks(batch *b, size_t first, size_t stop) noexcept nogil
