"""One set-associative structure of keys: a TLB level, or the paging-structure cache of a level.

A key is a page and a tag:

    bits 44:0   page number, in pages of the key's size
    46:45       size: 0 4K, 1 2M or 4M, 2 1G
    47          the page is global
    62:48       tag: number of an address space and PCID (of an address space alone, for global pages)
    63          1; 0 as a whole is an empty way

The set is the page number modulo the number of sets. LRU and FIFO keep the ways of a set in order, the next victim last, empty
ways behind it. Tree-PLRU and random replacement keep keys in place, and take the first empty way before any victim.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    KEY_PAGE_BITS = 45                  # of 57-bit linear addresses
    KEY_SIZE_SHIFT = 45
    KEY_GLOBAL_SHIFT = 47
    KEY_TAG_SHIFT = 48
    KEY_TAG_BITS = 15
    KEY_VALID_SHIFT = 63
    MOST_ENTRIES = 1 << 24              # of one structure
    MOST_PLRU_WAYS = 64                 # a tree is one word

cdef enum tlb_policy:
    POLICY_LRU
    POLICY_FIFO
    POLICY_PLRU
    POLICY_RANDOM

cdef extern from "kvmmu/tlb/_structure.h" nogil:
    cdef struct key_structure "kvmmu_key_structure":
        uint64_t *keys
        uint64_t *trees
        uint64_t last
        uint64_t random
        uint64_t replaced
        uint32_t sets
        uint32_t ways
        uint32_t stride
        uint32_t set_mask
        int policy

# An empty structure. Returns -1 without memory.
cdef int structure_init(key_structure *s, uint32_t sets, uint32_t ways, tlb_policy policy, uint64_t seed) noexcept nogil
cdef void structure_free(key_structure *s) noexcept nogil
# True if the key is there; replacement knows that it was used.
cdef bint structure_use(key_structure *s, uint64_t key) noexcept nogil
# Enter a key that is not there. Returns the key that it replaced, or 0.
cdef uint64_t structure_insert(key_structure *s, uint64_t key) noexcept nogil
# Drop a key. True if it was there.
cdef bint structure_remove(key_structure *s, uint64_t key) noexcept nogil
# Drop all keys with key & mask == value.
cdef void structure_remove_all(key_structure *s, uint64_t mask, uint64_t value) noexcept nogil
