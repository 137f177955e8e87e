"""Columns that callers pass, on the way to C: one-dimensional arrays, checked without a detour over NumPy's attributes."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

# A checked column: where its rows lie, for as long as the array is kept, and how many there are.
cdef struct column:
    void *data
    Py_ssize_t rows

# IN prefix: before the name in messages; itemsize: bytes of an unsigned integer; rows: how many there must be, -1: any
cdef column column_of(str prefix, str name, array, Py_ssize_t itemsize, Py_ssize_t rows, bint writable) except *
# The access column; all bytes are modelled accesses. An Access for all rows: one row, in *one.
cdef column access_column(access, Py_ssize_t rows, uint8_t *one) except *
# Which of count register sets each row uses; NULL where one serves all rows.
cdef const uint32_t *context_column(ctx, Py_ssize_t rows, uint64_t count) except? NULL
