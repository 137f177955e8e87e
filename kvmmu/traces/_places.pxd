"""Rows of a trace as places; see `_places.pyx`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef class PlacedRows:
    cdef const uint32_t[::1] place
    cdef const uint64_t[::1] page
    cdef const uint64_t[::1] frame
    cdef const uint16_t[::1] kind       # access byte in bits 15:8, op in bits 7:0
    cdef readonly bint all_known
    cdef readonly bint has_events       # a use is of an event
    cdef readonly bint legal
    # Write rows from `first` on, at most `most`; returns how many
    cdef size_t fill(self, size_t first, size_t most, uint8_t *op, uint64_t *addr, uint8_t *access, uint64_t *gpa) noexcept nogil
