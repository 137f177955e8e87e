"""Translate from a Cython extension outside the tree: the walk is inlined into it. `setup.py` beside this file builds it."""

from libc.stdint cimport uint64_t

from kvmmu.walker cimport ACCESS_USER_MASK, STATUS_OK, Walker, translate, translation, walk_handle


def count_mapped(Walker walker, uint64_t first, Py_ssize_t pages):
    """Return how many of the pages from `first` on user code may read."""
    cdef walk_handle handle = walker.handle
    cdef translation t
    cdef Py_ssize_t i, found = 0
    with nogil:
        for i in range(pages):
            t = translate(handle, first + 4096 * i, ACCESS_USER_MASK, True)
            found += t.status == STATUS_OK
    return found
