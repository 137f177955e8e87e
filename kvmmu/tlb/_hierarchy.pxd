"""Several TLB levels and paging-structure caches that a stream of accesses goes through, and what each access met.

A level holds keys of some kinds of accesses (load, store, fetch) and some page sizes. An access asks the levels of its kind and
size in their order. A hit fills the levels asked before; a miss in all of them is a page walk, which fills all. The lowest level
is filled first. An exclusive level is not filled by walks: it takes what the level before it replaces, and a hit in it takes the
key out. What an inclusive level replaces is dropped from all levels before it.
"""

from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t

from kvmmu.memory._lock cimport MachineLock
from kvmmu.tlb._structure cimport key_structure

cdef enum:
    MOST_LEVELS = 16
    KINDS = 3                           # load, store, fetch
    SIZES = 3                           # 4K; 2M or 4M; 1G
    CLASSES = 18                        # kind, user, size: places in a row of counters
    UPPER_LEVELS = 4                    # of tables, whose entries paging-structure caches hold: 2 to 5
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
    uint64_t psc_hits[4]
    uint64_t unmapped                   # rows without a page

cdef class TlbLevels:
    cdef tlb_levels h
    cdef readonly MachineLock lock
