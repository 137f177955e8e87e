"""The TLB of one processor: three set-associative arrays, for 4K, 2M and 1G translations, with least-recently-used replacement.

An entry is a whole translation, linear address to host-physical address, with the rights of both stages. Its key is the linear
page and a tag; a tag is a PCID, or "global", in one of a few spaces, and a space is a root of host page tables (VPID and EP4TA,
or ASID). A processor may drop an entry whenever it likes; this one does so when an entry denies an access, so that the walk
decides, and when it runs out of spaces.

A page of the guest's may be larger than its entries, because the host's pages are smaller or because no array has its size (4M).
Software cannot know of them, so that an invalidation of one address drops all entries of the page ("Details of TLB Use"). Each
entry has the size of the guest's page for that. `split` marks the pages that have smaller entries, by a hash of their numbers,
for each size: an invalidation searches the arrays for marked pages alone.

Sources: SDM vol. 3, "Caching Translation Information", "Invalidation of TLBs and Paging-Structure Caches", "VMX Support for
Address Translation"; vol. 2, "INVLPG", "INVPCID".
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport PAGE_SHIFT
from kvmmu.memory._lock cimport MachineLock

cdef enum:
    TLB_LEVELS = 3
    TLB_VPN_BITS = 45               # of 57-bit linear addresses
    TLB_PCID_BITS = 12
    TLB_GLOBAL_SHIFT = 57           # after page and PCID
    TLB_SPACE_SHIFT = 58
    TLB_SPACES = 64                 # number 0 is none: no key is 0
    TLB_HINTS = 1024
    TLB_MAX_ENTRIES = 1 << 24       # of one array: `hints` has room for 2**30
    TLB_SPLIT_SIZES = 3             # 2M, 4M, 1G

cdef struct tlb_entry:
    uint64_t hpa                    # of the page
    uint64_t gpa
    uint32_t stamp                  # of the last use
    uint8_t acc                     # ACC_*: rights of the guest's tables
    uint8_t nacc                    # and of the host's
    uint8_t pkey
    uint8_t dirty                   # writing needs no D bit set
    uint16_t allowed                # accesses that all this allows, as of `epoch`
    uint8_t as_id                   # address space of gpa
    uint8_t page_shift              # size of the guest's page, where that is larger than this entry
    uint32_t epoch

cdef struct tlb_array:
    int shift                       # page size
    size_t sets                     # power of two
    size_t ways
    size_t valid
    uint64_t *keys                  # [set * ways + way]; 0: free
    tlb_entry *entries

cdef struct tlb:
    tlb_array arrays[3]
    uint32_t clock
    uint64_t spaces[64]             # the root or role of each space
    int nr_spaces
    uint64_t local_tag, global_tag  # of the registers in force, in their place in a key
    uint64_t hits, misses, evictions
    uint32_t hints[1024]            # by 4K page: where the last look-up found its entry, level - 1 in the low bits
    uint64_t split[3]               # bit of a hash of the page: entries smaller than it were made; by size


cdef inline uint64_t tlb_page(int shift, uint64_t gva) noexcept nogil:
    return (gva >> shift) & ((<uint64_t>1 << TLB_VPN_BITS) - 1)


cdef inline tlb_entry *tlb_lookup(tlb *t, uint64_t gva, int *level) noexcept nogil:
    """Return the entry for a canonical address under the tags in force, NULL without one. OUT level."""
    cdef tlb_array *a
    cdef uint64_t page, mine, common
    cdef const uint64_t *keys
    cdef size_t way, base
    cdef int i
    # the place of the last hit: it saves the search, and changes nothing
    cdef uint32_t *hint = &t.hints[(gva >> PAGE_SHIFT) & (TLB_HINTS - 1)]
    a = &t.arrays[hint[0] & 3]
    base = hint[0] >> 2
    page = tlb_page(a.shift, gva)
    if a.keys[base] == (page | t.local_tag) or a.keys[base] == (page | t.global_tag):
        level[0] = <int>(hint[0] & 3) + 1
        t.clock += 1
        a.entries[base].stamp = t.clock
        return &a.entries[base]
    for i in range(TLB_LEVELS):
        a = &t.arrays[i]
        if a.valid == 0:
            continue
        page = tlb_page(a.shift, gva)
        mine, common = page | t.local_tag, page | t.global_tag
        base = (page & (a.sets - 1)) * a.ways
        keys = a.keys + base
        for way in range(a.ways):
            if keys[way] == mine or keys[way] == common:
                level[0] = i + 1
                hint[0] = <uint32_t>((base + way) << 2) | <uint32_t>i
                t.clock += 1
                a.entries[base + way].stamp = t.clock
                return &a.entries[base + way]
    return NULL


# 0, or -1: wrong shape or no memory; t is free of memory then. IN sets: powers of two, by level
cdef int tlb_init(tlb *t, const size_t *sets, const size_t *ways) noexcept nogil
cdef void tlb_free(tlb *t) noexcept nogil
# 0, or -1 for want of memory: to is free of memory then
cdef int tlb_copy(tlb *to, const tlb *t) noexcept nogil
cdef void tlb_swap(tlb *a, tlb *b) noexcept nogil
# Use a space and a PCID; a space that is new takes a number, if need be by dropping all
cdef void tlb_use(tlb *t, uint64_t space, uint32_t pcid) noexcept nogil
# Enter a translation: in a free way, that of the same key, or that of the one used longest ago. The caller sets all but `stamp`
cdef tlb_entry *tlb_fill(tlb *t, uint64_t gva, int level, bint is_global) noexcept nogil
# Mark the guest's page around gva, of 2**21, 2**22 or 2**30 bytes: it has a smaller entry
cdef void tlb_remember_split(tlb *t, uint64_t gva, int page_shift) noexcept nogil
# Drop the entry for one address; of a page with smaller entries this is one of them
cdef void tlb_drop(tlb *t, uint64_t gva) noexcept nogil
cdef void tlb_flush_all(tlb *t) noexcept nogil
# INVLPG, and a page fault: entries of the guest's page around the address, of the PCID in force and global ones
cdef void tlb_invlpg(tlb *t, uint64_t gva) noexcept nogil
# INVPCID 0: entries of a PCID for the page around an address, global ones excepted
cdef void tlb_invpcid_address(tlb *t, uint32_t pcid, uint64_t gva) noexcept nogil
# INVPCID 1, and MOV to CR3: entries of a PCID, global ones excepted
cdef void tlb_flush_pcid(tlb *t, uint32_t pcid) noexcept nogil
# INVVPID and INVEPT, in a space that need not be in force: one page, or all entries. A space that is not known has none
cdef void tlb_invalidate_page_in(tlb *t, uint64_t space, uint64_t gva) noexcept nogil
cdef void tlb_flush_space_of(tlb *t, uint64_t space, bint globals_too) noexcept nogil
# INVPCID 2 (globals too) and 3: entries of every PCID, in the space in force
cdef void tlb_flush_space(tlb *t, bint globals_too) noexcept nogil


cdef class Tlb:
    cdef tlb t
    cdef MachineLock lock           # that of the machine that uses it
