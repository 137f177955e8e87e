"""Columns that callers pass; see `_arrays.pxd`."""

import numpy as np

from cpython.bool cimport PyBool_Check
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_AsLong, PyLong_Check
from cpython.object cimport PyObject
from libc.stdint cimport INT32_MAX, uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu.arch._bits cimport ACCESS_VALID_MASK
from kvmmu.walk.batch._arrays cimport stretch

from kvmmu.arch.arguments import is_masked
from kvmmu.walk.results import check_access, check_array

cdef extern from "kvmmu/walk/batch/_ndarray.h" nogil:
    enum:
        KVMMU_NDARRAY_C_CONTIGUOUS
        KVMMU_NDARRAY_ALIGNED
        KVMMU_NDARRAY_WRITEABLE
        KVMMU_NDARRAY_WARN_ON_WRITE

    cdef struct kvmmu_ndarray:
        void *data
        int dimension_count
        Py_ssize_t *dimensions
        PyObject *descr
        int flags

cdef object ndarray = np.ndarray
cdef object asarray = np.asarray
cdef dict DTYPES = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
cdef object UINT8 = DTYPES[1], UINT32 = DTYPES[4], UINT64 = DTYPES[8]


cdef bint is_plain(const kvmmu_ndarray *a, Py_ssize_t itemsize, bint writable) noexcept:
    """True if an ndarray has one dimension and contiguous, aligned rows of NumPy's own uint8, uint32 or uint64."""
    cdef PyObject *wanted = <PyObject *>(UINT64 if itemsize == 8 else UINT32 if itemsize == 4 else UINT8)
    cdef int flags = KVMMU_NDARRAY_C_CONTIGUOUS | KVMMU_NDARRAY_ALIGNED
    if writable:
        flags |= KVMMU_NDARRAY_WRITEABLE
    return (a.dimension_count == 1 and a.descr is wanted and itemsize != 2 and a.flags & flags == flags and
            not (writable and a.flags & KVMMU_NDARRAY_WARN_ON_WRITE))


def _fields_are_known():
    """True if the fields of ndarrays are where NumPy's binary interface has them."""
    cdef const kvmmu_ndarray *a
    for writable in (True, False):
        array = np.zeros(5, np.uint64)
        array.flags.writeable = writable
        a = <const kvmmu_ndarray *><PyObject *>array
        if <uintptr_t>a.data != array.ctypes.data or a.dimension_count != 1 or a.descr is not <PyObject *>UINT64:
            return False
        if a.dimensions[0] != 5:
            return False
        if not is_plain(a, 8, False) or is_plain(a, 8, True) != writable or is_plain(a, 4, False):
            return False
    return not is_plain(<const kvmmu_ndarray *><PyObject *>np.zeros((5, 5), np.uint64)[:, 1], 8, False)


cdef bint fields_are_known = _fields_are_known()


cdef object exact_column(array):
    if type(array) is not ndarray and isinstance(array, ndarray) and not is_masked(array):
        return asarray(array)
    return array


cdef object exact_access(access):
    cdef long value = -1
    if isinstance(access, ndarray):
        return exact_column(access)
    if PyLong_Check(access) and not PyBool_Check(access):
        try:
            value = PyLong_AsLong(access)
        except OverflowError:
            pass
    if value & ~<long>ACCESS_VALID_MASK:
        value = check_access(access, 1)[0]              # raises, but for NumPy's integers
    return value


cdef column column_of(str prefix, str name, array, Py_ssize_t itemsize, Py_ssize_t rows, bint writable) except *:
    cdef Py_buffer view
    cdef column found
    cdef const kvmmu_ndarray *fields = <const kvmmu_ndarray *><PyObject *>array
    cdef bint good = False
    if type(array) is ndarray and fields_are_known and is_plain(fields, itemsize, writable) and (
            rows < 0 or rows == fields.dimensions[0]):
        found.data, found.rows = fields.data, fields.dimensions[0]
        return found
    if type(array) is ndarray:                          # the same of other types of the size, and unaligned ones
        try:
            PyObject_GetBuffer(array, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        except (BufferError, ValueError):               # no plain numbers
            pass
        else:
            good = (view.ndim == 1 and view.itemsize == itemsize and view.format[0] in b"BHILQ" and view.format[1] == 0 and
                    (view.strides[0] == itemsize or view.shape[0] < 2) and not (writable and view.readonly) and
                    not (writable and <uintptr_t>view.buf % <uintptr_t>itemsize))
            found.data = view.buf
            found.rows = view.shape[0] if view.ndim == 1 else 0
            PyBuffer_Release(&view)
            if good and (rows < 0 or rows == found.rows):
                return found
    name = prefix + name                                # the seldom half: what is wrong, in words
    check_array(name, array, DTYPES[itemsize], rows if rows >= 0 else None)
    if writable and not array.flags.writeable:
        raise ValueError(f"{name}: the array is read-only")
    if writable and not array.flags.aligned:
        raise ValueError(f"{name}: its rows are not aligned to {itemsize} bytes; those of a copy are")
    found.data, found.rows = <void *><uintptr_t>array.ctypes.data, array.size
    return found


cdef object aligned(array, Py_ssize_t itemsize):
    cdef Py_buffer view
    cdef bint good
    if type(array) is not ndarray:
        return array
    try:
        PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    except (BufferError, ValueError):
        return array
    good = <uintptr_t>view.buf % <uintptr_t>itemsize == 0
    PyBuffer_Release(&view)
    return array if good else array.copy()


cdef uint8_t or_of(const uint8_t *data, Py_ssize_t n) noexcept nogil:
    cdef uint8_t seen = 0
    cdef Py_ssize_t i
    for i in range(n):
        seen |= data[i]
    return seen


cdef column access_column(access, Py_ssize_t rows, uint8_t *one, uint8_t *all_bits) except *:
    cdef column found
    cdef uint8_t seen = 0
    if isinstance(access, ndarray):
        found = column_of("", "access", access, sizeof(uint8_t), rows, False)
        if found.rows < MIN_ROWS_WITHOUT_GIL:
            seen = or_of(<const uint8_t *>found.data, found.rows)
        else:
            with nogil:
                seen = or_of(<const uint8_t *>found.data, found.rows)
        if seen & ~<uint8_t>ACCESS_VALID_MASK:
            check_access(access, rows)
            raise ValueError("access: somebody changed it while it was checked")
        all_bits[0] = seen
        return found
    one[0] = all_bits[0] = <uint8_t>(<long>access)
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


cdef int check_apart(const stretch *s, Py_ssize_t count, Py_ssize_t written, tuple names) except -1:
    cdef Py_ssize_t i, k
    while count > written and not s[count - 1].bytes:
        count -= 1
    for i in range(written):
        for k in range(i + 1, count):
            if s[i].start < s[k].start + <uintptr_t>s[k].bytes and s[k].start < s[i].start + <uintptr_t>s[i].bytes:
                one, other = ([f"out.{name}" for name in names] + ["gva", "access", "ctx"])[i:k + 1:k - i]
                if one == other:                        # named twice
                    continue
                raise ValueError(f"{one} and {other} share memory: what is written to the one changes the other")
    return 0
