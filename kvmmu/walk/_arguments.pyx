"""Arguments of scalar calls, checked on the way to C."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch.arguments import check_word
from kvmmu.walk.results import check_one_access


cdef uint32_t convert_access(access) except? 0xffffffff:
    return <uint32_t>check_one_access(access)


cdef uint64_t convert_word(str name, value) except? 0xffffffffffffffff:
    return <uint64_t>check_word(name, value)
