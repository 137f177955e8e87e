"""Columns that callers pass, on the way to C, in two steps.

    plain      an exact ndarray, or an integer; code of the caller's (subclasses, conversions) may run to make it
    column     where the rows of an exact ndarray lie: no code of the caller's runs
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

# A checked column: where its rows lie, for as long as the array is kept, and how many there are.
cdef struct column:
    void *data
    Py_ssize_t rows

# A column by itself: an exact ndarray for one, anything else as it is
cdef object exact_column(array)
# An access: an exact ndarray, or an Access for all rows as an exact int
cdef object exact_access(access)
# IN prefix: before the name in messages; array: plain; itemsize: bytes of an unsigned integer; rows: how many there must be, -1:
# any
cdef column column_of(str prefix, str name, array, Py_ssize_t itemsize, Py_ssize_t rows, bint writable) except *
# An input column itself, or a copy whose rows are aligned. IN array: plain
cdef object aligned(array, Py_ssize_t itemsize)
# The access column; all bytes are modelled accesses. IN access: plain; an Access for all rows: one row, in *one. OUT all_bits:
# OR of the rows
cdef column access_column(access, Py_ssize_t rows, uint8_t *one, uint8_t *all_bits) except *
# The number of the register set of each row, below count; NULL where one serves all rows. IN ctx: plain, or None
cdef const uint32_t *context_column(ctx, Py_ssize_t rows, uint64_t count) except? NULL
# Rows from which on the GIL is released. Handing it over takes 0.1 us, the fastest rows of as many as long, the slowest 13 us.
cdef enum:
    MIN_ROWS_WITHOUT_GIL = 64

# Columns of one batch, and where the bytes of one lie.
cdef enum:
    MOST_COLUMNS = 16

cdef struct stretch:
    uintptr_t start
    Py_ssize_t bytes

# ValueError if any of the first `written` stretches overlaps another one. IN names: of those; gva, access and ctx follow
cdef int check_apart(const stretch *s, Py_ssize_t count, Py_ssize_t written, tuple names) except -1
