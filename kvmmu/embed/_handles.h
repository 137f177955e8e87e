/* The thread that runs, and the word that says which thread a vCPU belongs to. */
#ifndef KVMMU_HANDLES_H
#define KVMMU_HANDLES_H

#include <stdint.h>

#if !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#include <pthread.h>
#endif

/* A number of this thread, not 0, that no other thread has while this one lives. One instruction where it matters: a thread-local
 * variable of a module that was loaded at run time costs a call. */
static inline uintptr_t kvmmu_this_thread(void)
{
    uintptr_t self;
#if defined(__linux__) && defined(__x86_64__)
    __asm__("movq %%fs:0, %0" : "=r"(self));
#elif defined(__linux__) && defined(__aarch64__)
    __asm__("mrs %0, tpidr_el0" : "=r"(self));
#else
    self = (uintptr_t)pthread_self();
#endif
    return self;
}

static inline uintptr_t kvmmu_owner(const uintptr_t *owner)
{
    return __atomic_load_n(owner, __ATOMIC_ACQUIRE);
}

/* Take what belongs to nobody. Returns 0 if it belongs to somebody. */
static inline int kvmmu_take(uintptr_t *owner, uintptr_t self)
{
    uintptr_t nobody = 0;
    return __atomic_compare_exchange_n(owner, &nobody, self, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline void kvmmu_let_go(uintptr_t *owner)
{
    __atomic_store_n(owner, (uintptr_t)0, __ATOMIC_RELEASE);
}

#define KVMMU_TABLE_LOAD(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
#define KVMMU_TABLE_STORE(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)

#endif /* KVMMU_HANDLES_H */
