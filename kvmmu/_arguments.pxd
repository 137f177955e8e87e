"""Arguments of scalar calls, checked on the way to C: ValueError or TypeError that names the value."""

from libc.stdint cimport uint32_t, uint64_t

cdef uint32_t check_scalar_access(access) except? 0xffffffff
cdef uint64_t check_scalar_gva(gva) except? 0xffffffffffffffff
