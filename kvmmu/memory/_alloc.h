/* Arrays on the heap: products of counts and sizes that do not fit give NULL. */
#ifndef KVMMU_ALLOC_H
#define KVMMU_ALLOC_H

#include <stddef.h>
#include <stdlib.h>

/* realloc() to n elements */
static inline void *kvmmu_grow_array(void *p, size_t n, size_t size)
{
    size_t bytes;
    return __builtin_mul_overflow(n, size, &bytes) ? NULL : realloc(p, bytes);
}

/* rows * columns zeroed elements */
static inline void *kvmmu_alloc_table(size_t rows, size_t columns, size_t size)
{
    size_t n;
    return __builtin_mul_overflow(rows, columns, &n) ? NULL : calloc(n, size);
}

#endif /* KVMMU_ALLOC_H */
