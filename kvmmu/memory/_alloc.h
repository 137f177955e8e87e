/* Arrays on the heap: products of counts and sizes that do not fit give NULL. */
#ifndef KVMMU_ALLOC_H
#define KVMMU_ALLOC_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

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

/* the same at the start of a cache line; free() takes it back */
static inline void *kvmmu_alloc_lines(size_t rows, size_t columns, size_t size)
{
    size_t n, bytes;
    void *p;
    if (__builtin_mul_overflow(rows, columns, &n) || __builtin_mul_overflow(n, size, &bytes) || posix_memalign(&p, 64, bytes))
        return NULL;
    return memset(p, 0, bytes);
}

#endif /* KVMMU_ALLOC_H */
