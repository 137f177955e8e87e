/* Compare-and-set on guest memory: what an accessed/dirty update of a page walk needs; and words that threads share. */
#ifndef KVMMU_MEMORY_H
#define KVMMU_MEMORY_H

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline int kvmmu_cmpxchg64(void *p, uint64_t old, uint64_t val)
{
    return __atomic_compare_exchange_n((uint64_t *)p, &old, val, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int kvmmu_cmpxchg32(void *p, uint32_t old, uint32_t val)
{
    return __atomic_compare_exchange_n((uint32_t *)p, &old, val, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
/* for a few instructions at a time, without the GIL or with it: nobody who holds it waits for anything */
static inline void kvmmu_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        sched_yield();
}
static inline void kvmmu_unlock(uint32_t *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}
static inline void kvmmu_keep_copies(void) /* what was read before is not read again behind this */
{
    __asm__ volatile("" ::: "memory");
}
static inline uint32_t kvmmu_load32(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline void kvmmu_store32(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

/* Words of guest memory, which other threads may change meanwhile: one load each, which the compiler neither splits nor repeats.
 * No assumption on alignment: a read-only slot may lie over any bytes. clang would call a library for an atomic one of those. */
#if defined(__clang__)
#define KVMMU_LOAD(type, p) (*(const volatile type *)(p))
#define KVMMU_STORE(type, p, v) (*(volatile type *)(p) = (v))
#else
#define KVMMU_LOAD(type, p) __atomic_load_n((const type *)(p), __ATOMIC_RELAXED)
#define KVMMU_STORE(type, p, v) __atomic_store_n((type *)(p), (v), __ATOMIC_RELAXED)
#endif
typedef uint64_t kvmmu_word64 __attribute__((may_alias, aligned(1)));
typedef uint32_t kvmmu_word32 __attribute__((may_alias, aligned(1)));
static inline uint64_t kvmmu_read64(const void *p)
{
    return KVMMU_LOAD(kvmmu_word64, p);
}
static inline uint32_t kvmmu_read32(const void *p)
{
    return KVMMU_LOAD(kvmmu_word32, p);
}
static inline void kvmmu_write64(void *p, uint64_t v)
{
    KVMMU_STORE(kvmmu_word64, p, v);
}
/* what an instruction of the guest stores: aligned words at once */
static inline void kvmmu_store(uint8_t *to, const uint8_t *from, size_t n)
{
    for (; n && ((uintptr_t)to & 7); n--)
        KVMMU_STORE(uint8_t, to++, *from++);
    for (; n >= 8; n -= 8, to += 8, from += 8) {
        uint64_t v;
        memcpy(&v, from, sizeof v);
        kvmmu_write64(to, v);
    }
    for (; n; n--)
        KVMMU_STORE(uint8_t, to++, *from++);
}
/* of memory that nobody else changes */
static inline uint64_t kvmmu_load64(const void *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

#endif /* KVMMU_MEMORY_H */
