"""Arguments of scalar calls, checked on the way to C."""

from cpython.number cimport PyNumber_Index
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._bits cimport ACCESS_VALID_MASK

from kvmmu.columns import check_access

_GVA_LIMIT = 1 << 64


cdef uint32_t check_scalar_access(access) except? 0xffffffff:
    """An access of a scalar call."""
    cdef uint64_t value
    try:
        value = PyNumber_Index(access)
    except (OverflowError, TypeError):
        value = ~<uint64_t>0
    if value & ~ACCESS_VALID_MASK:
        check_access(access, 1)
    return <uint32_t>value


cdef uint64_t check_scalar_gva(gva) except? 0xffffffffffffffff:
    """An address of a scalar call."""
    try:
        return PyNumber_Index(gva)
    except TypeError:
        raise TypeError(f"gva: want an integer, got {gva!r}") from None
    except OverflowError:
        raise ValueError(f"gva: want 0 to {_GVA_LIMIT - 1:#x}, got {gva:#x}") from None
