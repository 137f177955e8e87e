"""Functions that readers of binary records share."""

from libc.stdint cimport uint8_t


# Raise ValueError unless whole records begin at `start`.
cdef int check_span(const uint8_t[::1] records, Py_ssize_t start, Py_ssize_t itemsize) except -1
