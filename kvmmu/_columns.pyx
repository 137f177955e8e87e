"""Columns that callers pass; see `_columns.pxd`."""

import numpy as np

from cpython.bool cimport PyBool_Check
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_AsLong, PyLong_Check
from libc.stdint cimport INT32_MAX, uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._bits cimport ACCESS_VALID_MASK

from kvmmu.arguments import is_masked
from kvmmu.columns import check_access, check_array

cdef object ndarray = np.ndarray
cdef dict DTYPES = {n: np.dtype(f"u{n}") for n in (1, 4, 8)}


cdef column column_of(str prefix, str name, array, Py_ssize_t itemsize, Py_ssize_t rows, bint writable) except *:
    cdef Py_buffer view
    cdef column found
    cdef bint good = False
    if type(array) is ndarray or isinstance(array, ndarray) and not is_masked(array):
        try:
            PyObject_GetBuffer(array, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        except (BufferError, ValueError):               # no plain numbers
            pass
        else:
            good = (view.ndim == 1 and view.itemsize == itemsize and view.format[0] in b"BILQ" and view.format[1] == 0 and
                    (view.strides[0] == itemsize or view.shape[0] < 2) and not (writable and view.readonly))
            found.data = view.buf
            found.rows = view.shape[0] if view.ndim == 1 else 0
            PyBuffer_Release(&view)
            if good and (rows < 0 or rows == found.rows):
                return found
    name = prefix + name                                # the seldom half: what is wrong, in words
    check_array(name, array, DTYPES[itemsize], rows if rows >= 0 else None)
    if writable and not array.flags.writeable:
        raise ValueError(f"{name}: the array is read-only")
    found.data, found.rows = <void *><uintptr_t>array.ctypes.data, array.size
    return found


cdef column access_column(access, Py_ssize_t rows, uint8_t *one) except *:
    cdef column found
    cdef const uint8_t *data
    cdef Py_ssize_t i
    cdef uint8_t seen = 0
    cdef long value = -1
    if isinstance(access, ndarray):
        found = column_of("", "access", access, sizeof(uint8_t), rows, False)
        data = <const uint8_t *>found.data
        with nogil:
            for i in range(found.rows):
                seen |= data[i]
        if seen & ~<uint8_t>ACCESS_VALID_MASK:
            check_access(access, rows)
        return found
    if PyLong_Check(access) and not PyBool_Check(access):
        try:
            value = PyLong_AsLong(access)
        except OverflowError:
            pass
    if value & ~<long>ACCESS_VALID_MASK:
        value = check_access(access, rows)[0]           # raises, but for NumPy's integers
    one[0] = <uint8_t>value
    found.data, found.rows = one, 1
    return found


cdef const uint32_t *context_column(ctx, Py_ssize_t rows, uint64_t count) except? NULL:
    cdef const uint32_t *data
    cdef uint32_t last = <uint32_t>min(count - 1, <uint64_t>INT32_MAX), beyond = 0, highest = 0
    cdef Py_ssize_t i
    if ctx is None:
        if count != 1:
            raise ValueError(f"ctx: {count} register sets need a ctx that says which one each row uses")
        return NULL
    data = <const uint32_t *>column_of("", "ctx", ctx, sizeof(uint32_t), rows, False).data
    with nogil:
        for i in range(rows):                           # vector code; the sign counts
            beyond |= (last - data[i]) | data[i]
        if beyond >> 31:
            for i in range(rows):
                highest = max(highest, data[i])
    if rows and highest >= count:
        raise ValueError(f"ctx: {highest} is beyond the {count} register sets of regs")
    return data if rows and count > 1 else NULL
