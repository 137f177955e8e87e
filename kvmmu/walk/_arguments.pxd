"""Arguments of scalar calls, checked on the way to C; what is no plain int in range goes to `arguments.py`, which says why."""

from cpython.bool cimport PyBool_Check
from cpython.exc cimport PyErr_Clear
from cpython.long cimport PyLong_Check
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport ACCESS_PLAIN_MASK, ACCESS_VALID_MASK

cdef extern from "Python.h":
    uint64_t PyLong_AsUnsignedLongLong(object value) noexcept

# Convert an argument that is no plain int in range: another integer type, or an error.
cdef uint32_t convert_access(access) except? 0xffffffff
cdef uint64_t convert_word(str name, value) except? 0xffffffffffffffff


cdef inline uint64_t to_uint64(value) noexcept:
    """Return an int as 64 bits; all ones, without an exception, for what is none, for bools, and out of range (and for all
    ones)."""
    cdef uint64_t word = ~<uint64_t>0
    if PyLong_Check(value) and not PyBool_Check(value):
        word = PyLong_AsUnsignedLongLong(value)
        if word == ~<uint64_t>0:
            PyErr_Clear()
    return word


cdef inline uint32_t check_scalar_access(access) except? 0xffffffff:
    """Return an access of a scalar call."""
    cdef uint64_t value = to_uint64(access)
    return convert_access(access) if value & ~ACCESS_VALID_MASK else <uint32_t>value


cdef inline bint is_plain_access(uint32_t access) noexcept nogil:
    """True if fast paths know an access: it is neither to a shadow stack nor a probe."""
    return access <= ACCESS_PLAIN_MASK


cdef inline uint64_t check_scalar_word(str name, value) except? 0xffffffffffffffff:
    """Return an address, or another argument of 64 bits, of a scalar call."""
    cdef uint64_t word = to_uint64(value)
    return convert_word(name, value) if word == ~<uint64_t>0 else word


cdef inline uint64_t check_scalar_gva(gva) except? 0xffffffffffffffff:
    """Return a linear address of a scalar call."""
    return check_scalar_word("gva", gva)
