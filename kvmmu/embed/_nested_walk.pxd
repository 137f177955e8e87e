"""Walks of two stages over pages that a vCPU keeps: which words one may change, and which it did. Nothing here takes the GIL."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.embed._structs cimport c_vcpu

cdef enum:
    # entries: 5 tables and the address through 5 levels each, and of the 5 tables; pages that are logged; a #VE area
    MAX_WATCHED = 6 * 5 + 5 + 6 + 5

# A word before a walk.
cdef struct watched_word:
    uint64_t gpa
    uint64_t value
    uint32_t size                       # 4 or 8 bytes

cdef struct watched_words:
    int count
    watched_word words[MAX_WATCHED]

# Note all words that a walk of two stages may change, and read the pages that they lie in: those that are not there are misses of
# the cache. IN access: resolved
cdef void watch_walk(const c_vcpu *v, uint64_t gva, uint32_t access, watched_words *watched) noexcept nogil
# The same for an address of the first stage's tables, as the second stage translates it: PDPTEs that are loaded
cdef void watch_table(const c_vcpu *v, uint64_t ngpa, uint32_t access, watched_words *watched) noexcept nogil
# Give the words that have changed to the write callback: KVMMU_E_CALLBACK if that fails
cdef int store_changes(const c_vcpu *v, const watched_words *watched) noexcept nogil
