/* The fields of an ndarray that every extension built with NumPy's headers reads, so that no NumPy with their binary interface can
 * move them. The package is built without these headers; `_arrays.pyx` holds the fields against what NumPy says of an array. */
#ifndef KVMMU_NDARRAY_H
#define KVMMU_NDARRAY_H

#include <Python.h>

struct kvmmu_ndarray {
    PyObject_HEAD
    void *data;
    int dimension_count;
    Py_ssize_t *dimensions;
    Py_ssize_t *strides;
    PyObject *base;
    PyObject *descr;
    int flags;
};

#define KVMMU_NDARRAY_C_CONTIGUOUS 0x1
#define KVMMU_NDARRAY_ALIGNED 0x100
#define KVMMU_NDARRAY_WRITEABLE 0x400
#define KVMMU_NDARRAY_WARN_ON_WRITE (1 << 31)

#endif /* KVMMU_NDARRAY_H */
