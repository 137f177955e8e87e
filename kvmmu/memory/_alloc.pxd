"""Arrays on the heap whose size is checked: `calloc()` multiplies two numbers safely, these what it cannot."""

from libc.stddef cimport size_t

cdef extern from "kvmmu/memory/_alloc.h" nogil:
    # NULL for want of memory, or where the product is too large: p stays as it is. IN n: elements
    void *kvmmu_grow_array(void *p, size_t n, size_t size)
    # Zeroed; NULL likewise
    void *kvmmu_alloc_table(size_t rows, size_t columns, size_t size)
    void *kvmmu_alloc_lines(size_t rows, size_t columns, size_t size)
