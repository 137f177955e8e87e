/* Compare-and-set on guest memory: what an accessed/dirty update of a page walk needs. */
#ifndef KVMMU_MEMORY_H
#define KVMMU_MEMORY_H

#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER)
#include <intrin.h>
static inline int kvmmu_cmpxchg64(void *p, uint64_t old, uint64_t val)
{
    return _InterlockedCompareExchange64((volatile long long *)p, (long long)val, (long long)old) == (long long)old;
}
static inline int kvmmu_cmpxchg32(void *p, uint32_t old, uint32_t val)
{
    return _InterlockedCompareExchange((volatile long *)p, (long)val, (long)old) == (long)old;
}
#else
static inline int kvmmu_cmpxchg64(void *p, uint64_t old, uint64_t val)
{
    return __atomic_compare_exchange_n((uint64_t *)p, &old, val, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int kvmmu_cmpxchg32(void *p, uint32_t old, uint32_t val)
{
    return __atomic_compare_exchange_n((uint32_t *)p, &old, val, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
#endif

/* no assumption on alignment: a read-only slot may lie over any bytes */
static inline uint64_t kvmmu_read64(const void *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline uint32_t kvmmu_read32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void kvmmu_write64(void *p, uint64_t v)
{
    memcpy(p, &v, sizeof v);
}

#endif /* KVMMU_MEMORY_H */
