"""Lists of SPTEs, as `_pte_list.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free

from kvmmu.memory._alloc cimport kvmmu_grow_array
from kvmmu.mmu.core._pte_list cimport PTE_LIST_EXT, pte_list_desc, pte_list_pool


cdef inline uint64_t single(uint64_t sptep) noexcept nogil:
    return (sptep + 1) << 1


cdef void free_pool(pte_list_pool *pool) noexcept nogil:
    free(pool.descs)
    pool.descs = NULL


cdef int reserve_descs(pte_list_pool *pool, size_t n) noexcept nogil:
    cdef size_t capacity
    cdef pte_list_desc *grown
    if pool.count + n < pool.capacity:
        return 0
    capacity = 2 * pool.capacity + n + 64
    grown = <pte_list_desc *>kvmmu_grow_array(pool.descs, capacity, sizeof(pte_list_desc))
    if grown is NULL:
        return -1
    if pool.count == 0:
        pool.count = 1
    pool.descs, pool.capacity = grown, capacity
    return 0


cdef uint32_t new_desc(pte_list_pool *pool) noexcept nogil:
    cdef uint32_t d = pool.free
    if d:
        pool.free = pool.descs[d].next
    else:
        d = <uint32_t>pool.count
        pool.count += 1
    pool.descs[d].next = 0
    pool.descs[d].count = 0
    return d


cdef void free_desc(pte_list_pool *pool, uint32_t d) noexcept nogil:
    pool.descs[d].next = pool.free
    pool.free = d


cdef size_t pte_list_add(pte_list_pool *pool, uint64_t *head, uint64_t sptep) noexcept nogil:
    cdef uint32_t d, last
    cdef size_t n = 0
    if head[0] == 0:
        head[0] = single(sptep)
        return 0
    if not head[0] & 1:
        d = new_desc(pool)
        pool.descs[d].sptes[0] = (head[0] >> 1) - 1
        pool.descs[d].sptes[1] = sptep
        pool.descs[d].count = 2
        head[0] = (<uint64_t>d << 1) | 1
        return 1
    last = <uint32_t>(head[0] >> 1)
    n = pool.descs[last].count
    while pool.descs[last].next:
        last = pool.descs[last].next
        n += pool.descs[last].count
    if pool.descs[last].count == PTE_LIST_EXT:
        d = new_desc(pool)
        pool.descs[last].next = d
        last = d
    pool.descs[last].sptes[pool.descs[last].count] = sptep
    pool.descs[last].count += 1
    return n


cdef bint pte_list_remove(pte_list_pool *pool, uint64_t *head, uint64_t sptep) noexcept nogil:
    cdef uint32_t d, found = 0, last = 0, before = 0
    cdef size_t i, place = 0
    cdef pte_list_desc *desc
    if head[0] == 0:
        return False
    if not head[0] & 1:
        if head[0] != single(sptep):
            return False
        head[0] = 0
        return True
    d = <uint32_t>(head[0] >> 1)
    while d:
        desc = &pool.descs[d]
        if not found:
            for i in range(desc.count):
                if desc.sptes[i] == sptep:
                    found, place = d, i
                    break
        if desc.next:
            before = d
        last = d
        d = desc.next
    if not found:
        return False
    desc = &pool.descs[last]
    desc.count -= 1
    pool.descs[found].sptes[place] = desc.sptes[desc.count]
    if desc.count == 0:                                 # never the first descriptor: that one ends as a single entry
        pool.descs[before].next = 0
        free_desc(pool, last)
    d = <uint32_t>(head[0] >> 1)
    if pool.descs[d].next == 0 and pool.descs[d].count == 1:
        head[0] = single(pool.descs[d].sptes[0])
        free_desc(pool, d)
    return True


cdef size_t pte_list_count(const pte_list_pool *pool, uint64_t head) noexcept nogil:
    cdef uint32_t d
    cdef size_t n = 0
    if not head & 1:
        return 1 if head else 0
    d = <uint32_t>(head >> 1)
    while d:
        n += pool.descs[d].count
        d = pool.descs[d].next
    return n


cdef uint64_t pte_list_get(const pte_list_pool *pool, uint64_t head, size_t i) noexcept nogil:
    cdef uint32_t d
    if not head & 1:
        return (head >> 1) - 1
    d = <uint32_t>(head >> 1)
    while i >= pool.descs[d].count:
        i -= pool.descs[d].count
        d = pool.descs[d].next
    return pool.descs[d].sptes[i]
