"""Files mapped copy-on-write."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t


cdef class PrivateFile:
    cdef int fd                     # -1: none
    cdef readonly size_t size


cdef class PrivateMapping:
    cdef uint8_t *address
    cdef size_t size
    cdef readonly PrivateFile file
