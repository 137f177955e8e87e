"""Details of a hierarchy beside its counters: why keys were missed, how often at all sizes, on which pages, by which
instructions.

A level is asked for a key and misses it: the miss is
    compulsory  the level was never asked for the key before
    removed     an invalidation has dropped the key since
    capacity    a fully associative LRU level of as many entries, asked for the same keys, misses it as well
    conflict    it does not
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu.tlb._counts cimport key_counts
from kvmmu.tlb._recency cimport recency

cdef enum:
    MISS_CLASSES = 4
    MOST_REFERENCES = 6                 # of a walk: 0 to 5
    DETAIL_LEVELS = 16

cdef enum:
    MISS_COMPULSORY
    MISS_CAPACITY
    MISS_CONFLICT
    MISS_REMOVED

cdef struct distance_counts:
    uint64_t *counts                    # by distance
    size_t limit                        # of distances
    size_t longest
    uint64_t first_uses, after_removals

cdef struct tlb_details:
    int count                           # levels
    uint64_t entries[DETAIL_LEVELS]
    recency asked[DETAIL_LEVELS]        # by level: the keys that it was asked for
    uint64_t misses[DETAIL_LEVELS][MISS_CLASSES]
    uint64_t by_references[MOST_REFERENCES]     # walks, by the entries that they read
    key_counts pages                    # walks by page: its number, with the size in the bits of a key
    key_counts ips                      # walks by instruction
    bint has_ips
    bint curve
    recency all                         # if curve: the keys of all accesses
    distance_counts distances
    bint out_of_memory

cdef tlb_details *details_new(int count, const uint64_t *entries, bint curve) noexcept nogil       # NULL without memory
cdef void details_free(tlb_details *d) noexcept nogil
# An access. IN path, depth: the levels that it asks; found: the one that had the key, or none of them; refs: of its walk
cdef void details_take(tlb_details *d, uint64_t key, const uint8_t *path, int depth, int found, int refs,
                       const uint64_t *ip) noexcept nogil
cdef void details_remove(tlb_details *d, uint64_t key) noexcept nogil
cdef void details_remove_all(tlb_details *d, uint64_t mask, uint64_t value) noexcept nogil
cdef void details_clear(tlb_details *d) noexcept nogil             # counters; what was asked for stays
