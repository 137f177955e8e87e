"""Details of a hierarchy beside its counters, as `_details.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from kvmmu.tlb._counts cimport counts_add, counts_free, counts_init, key_counts
from kvmmu.tlb._details cimport (
    MISS_CAPACITY, MISS_COMPULSORY, MISS_CONFLICT, MISS_REMOVED, MOST_REFERENCES, distance_counts, tlb_details,
)
from kvmmu.tlb._recency cimport (
    AFTER_REMOVAL, FIRST_USE, recency_free, recency_init, recency_remove, recency_remove_all, recency_use,
)
from kvmmu.tlb._structure cimport KEY_GLOBAL_SHIFT

cdef tlb_details *details_new(int count, const uint64_t *entries, bint curve) noexcept nogil:
    cdef tlb_details *d = <tlb_details *>calloc(1, sizeof(tlb_details))
    cdef int i
    cdef bint good
    if d is NULL:
        return NULL
    good = counts_init(&d.pages) == 0 and counts_init(&d.ips) == 0
    d.curve = curve
    if curve:
        good = good and recency_init(&d.all) == 0
    for i in range(count):
        d.entries[i] = entries[i]
        good = good and recency_init(&d.asked[i]) == 0
    d.count = count
    if not good:
        details_free(d)
        return NULL
    return d


cdef void details_free(tlb_details *d) noexcept nogil:
    cdef int i
    if d is NULL:
        return
    for i in range(d.count):
        recency_free(&d.asked[i])
    counts_free(&d.pages)
    counts_free(&d.ips)
    recency_free(&d.all)
    free(d.distances.counts)
    free(d)


cdef bint count_distance(distance_counts *c, uint32_t distance) noexcept nogil:
    cdef size_t limit = 1 << 10
    cdef uint64_t *counts
    if distance == FIRST_USE:
        c.first_uses += 1
        return True
    if distance == AFTER_REMOVAL:
        c.after_removals += 1
        return True
    if distance >= c.limit:
        while limit <= distance:
            limit *= 2
        counts = <uint64_t *>realloc(c.counts, limit * sizeof(uint64_t))
        if counts is NULL:
            return False
        memset(counts + c.limit, 0, (limit - c.limit) * sizeof(uint64_t))
        c.counts, c.limit = counts, limit
    c.counts[distance] += 1
    c.longest = max(c.longest, <size_t>distance)
    return True


cdef void details_take(tlb_details *d, uint64_t key, const uint8_t *path, int depth, int found, int refs,
                       const uint64_t *ip) noexcept nogil:
    cdef int place, number
    cdef uint32_t distance
    cdef bint good = True
    if d.curve:
        good = count_distance(&d.distances, recency_use(&d.all, key))
        d.out_of_memory |= d.all.out_of_memory
    for place in range(depth):
        number = path[place]
        distance = recency_use(&d.asked[number], key)
        d.out_of_memory |= d.asked[number].out_of_memory
        if number == found:
            break
        if distance == FIRST_USE:
            d.misses[number][MISS_COMPULSORY] += 1
        elif distance == AFTER_REMOVAL:
            d.misses[number][MISS_REMOVED] += 1
        elif distance > d.entries[number]:
            d.misses[number][MISS_CAPACITY] += 1
        else:
            d.misses[number][MISS_CONFLICT] += 1
    else:
        d.by_references[min(refs, MOST_REFERENCES - 1)] += 1
        good = counts_add(&d.pages, key & ((<uint64_t>1 << KEY_GLOBAL_SHIFT) - 1), 1) and good
        if ip is not NULL:
            d.has_ips = True
            good = counts_add(&d.ips, ip[0], 1) and good
    d.out_of_memory |= not good


cdef void details_remove(tlb_details *d, uint64_t key) noexcept nogil:
    cdef int i
    for i in range(d.count):
        recency_remove(&d.asked[i], key)
    if d.curve:
        recency_remove(&d.all, key)


cdef void details_remove_all(tlb_details *d, uint64_t mask, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(d.count):
        recency_remove_all(&d.asked[i], mask, value)
    if d.curve:
        recency_remove_all(&d.all, mask, value)


cdef void clear_counts(key_counts *c) noexcept nogil:
    memset(c.keys, 0, (c.mask + 1) * sizeof(uint64_t))
    memset(c.counts, 0, (c.mask + 1) * sizeof(uint64_t))
    c.used = 0
    c.zero = 0


cdef void details_clear(tlb_details *d) noexcept nogil:
    memset(d.misses, 0, sizeof(d.misses))
    memset(d.by_references, 0, sizeof(d.by_references))
    clear_counts(&d.pages)
    clear_counts(&d.ips)
    d.has_ips = False
    free(d.distances.counts)
    memset(&d.distances, 0, sizeof(distance_counts))
