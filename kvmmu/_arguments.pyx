"""Arguments of scalar calls, checked on the way to C."""

from cpython.number cimport PyNumber_Index
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._bits cimport ACCESS_VALID_MASK

from kvmmu.columns import check_access

_GVA_LIMIT = 1 << 64


cdef uint32_t convert_access(access) except? 0xffffffff:
    cdef uint64_t value
    try:
        value = PyNumber_Index(access)
    except (OverflowError, TypeError):
        value = ~<uint64_t>0
    if value & ~ACCESS_VALID_MASK:
        check_access(access, 1)                     # lets nothing pass but an array of one row
        raise ValueError(f"access: want one Access, got {access!r}")
    return <uint32_t>value


cdef uint64_t convert_gva(gva) except? 0xffffffffffffffff:
    try:
        return PyNumber_Index(gva)
    except TypeError:
        raise TypeError(f"gva: want an integer, got {gva!r}") from None
    except OverflowError:
        raise ValueError(f"gva: want 0 to {_GVA_LIMIT - 1:#x}, got {gva:#x}") from None
