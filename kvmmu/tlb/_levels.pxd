"""Several TLB levels and paging-structure caches that a stream of accesses goes through, and what each access met.

A level holds keys of some kinds of accesses (load, store, fetch) and some page sizes. An access asks the levels of its kind and
size in their order. A hit fills the levels asked before; a miss in all of them is a page walk, which fills all. The lowest level
is filled first. An exclusive level is not filled by walks: it takes what the level before it replaces, and a hit in it takes the
key out. What an inclusive level replaces is dropped from all levels before it.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t

from kvmmu.tlb._details cimport tlb_details
from kvmmu.tlb._structure cimport key_structure

cdef enum:
    MOST_LEVELS = 16
    KINDS = 3                           # load, store, fetch
    SIZES = 3                           # 4K; 2M or 4M; 1G
    CLASSES = 18                        # kind, user, size: places in a row of counters
    UPPER_LEVELS = 4                    # of tables, whose entries paging-structure caches hold: 2 to 5
    MOST_LINEAR_BITS = 57
    NOWHERE = 255                       # as number of the level that hit: none, a page walk

cdef enum tlb_inclusion:
    INCLUSION_NONE
    INCLUSION_INCLUSIVE
    INCLUSION_EXCLUSIVE

cdef struct tlb_level:
    key_structure s
    tlb_inclusion inclusion
    uint32_t kinds                      # bit per kind
    uint32_t sizes                      # bit per size
    int8_t below[3]                     # by size: the next level that shares a kind, or -1
    uint32_t above[3]                   # by size: bit per level before this one that shares a kind

cdef struct tlb_levels:
    tlb_level levels[16]
    int count
    uint8_t path[3][3][16]              # by kind and size: the levels that are asked
    int depth[3][3]
    key_structure psc[4]                # by level of the cached entry, from 2 on; no keys: not there
    int root_level
    int index_bits
    int shifts[3]                       # by size
    uint64_t local_tag                  # in their place in a key, with the bit that is always 1
    uint64_t global_tag
    uint64_t hits[16][18]               # by level; by kind, user, size
    uint64_t walks[18]
    bint is_lru                         # all levels are, and none is inclusive or exclusive
    uint64_t references                 # entries that walks read
    uint64_t cached_references          # entries that walks did not read because of a paging-structure cache
    uint64_t psc_hits[4]
    uint64_t unmapped                   # rows without a page
    tlb_details *details                # NULL: none are kept

# Columns of accesses. gva, access, leaf: as `TlbLevels.run()` has them, of which access and leaf may be one value (stride 0).
cdef struct tlb_rows:
    size_t rows
    const uint64_t *gva
    const uint8_t *access
    const uint8_t *leaf
    size_t access_stride
    size_t leaf_stride
    const uint8_t *is_global            # or NULL
    const uint64_t *ip                  # or NULL
    uint8_t *level                      # OUT, or NULL
    uint8_t *references                 # OUT, or NULL

cdef enum tlb_way:
    WAY_FASTEST
    WAY_PORTABLE                        # without vectors
    WAY_SCALAR                          # the one for all hierarchies

# Let rows go through the levels. The caller holds the lock, or has the levels for itself
cdef void run_levels(tlb_levels *h, const tlb_rows *rows, tlb_way how) noexcept nogil
# Drop keys with key & mask == value, and entries of paging-structure caches likewise
cdef void remove_all(tlb_levels *h, uint64_t mask, uint64_t value, uint64_t psc_mask, uint64_t psc_value) noexcept nogil
# Drop the page around an address, of every size
cdef void remove_address(tlb_levels *h, uint64_t addr, uint64_t tag) noexcept nogil
