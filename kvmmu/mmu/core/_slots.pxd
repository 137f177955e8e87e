"""Memslots: guest frames, the host pages behind them, and what the MMUs count per frame.

A slot maps guest frames to bytes (`hva`) and to host frames. Host frames are linear in the guest frame, from `base_pfn`, which
agrees with `base_gfn` in the low 18 bits where the host's pages are larger than 4K, so that huge pages can map; when the host
takes a page away and gives another, the frame moves to the next of SLOT_VERSIONS images of the slot, all over the same bytes. So
a stale entry is seen by its address.

The host side of a frame is one byte (`host_page`), NULL while all of the slot is alike: the level that the host maps it at,
whether it is unmapped or read-only (a zero page before copy-on-write), and its version.

How the pieces are used: a fault finds the slot with `gfn_to_memslot()`, the host page with `host_page_of()`; a mapping may be
huge up to `max_mapping_level()`. `account_shadowed` of a shadow MMU raises write tracking (upper tables) or `disallow_lpage`
(leaf tables); `rmap[level - 1]` holds one list head (see `_rmap.pxd`) per page of that level, once there are rmaps.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport PG_LEVEL_2M, PT64_INDEX_BITS

cdef enum:
    SLOT_VERSIONS = 4               # images of a slot in host-physical space
    HOST_LEVEL_MASK = 3
    HOST_UNMAPPED = 4
    HOST_READONLY = 8
    HOST_VERSION_SHIFT = 4

cdef struct kvm_memory_slot:
    uint64_t base_gfn
    uint64_t npages
    uint8_t *hva
    uint64_t base_pfn
    uint64_t span                   # frames from one image to the next
    uint32_t id
    uint8_t as_id                   # address space: 1 is SMM
    uint8_t backing                 # level that the host maps the slot at
    uint8_t log_began_full          # all pages dirty at first: nothing was protected, and no huge page split, yet
    bint readonly
    bint dirty_log
    bint invalid                    # being deleted or moved
    uint8_t *host_page
    uint64_t *dirty_bitmap
    uint16_t *write_track
    int32_t *disallow_lpage[2]      # levels 2 and 3: reasons against a huge page
    uint64_t *rmap[3]

cdef struct slot_table:
    kvm_memory_slot **slots         # ascending by base_gfn
    size_t count
    size_t capacity
    kvm_memory_slot *last           # of the look-up before


cdef kvm_memory_slot *find_memslot(slot_table *table, uint64_t gfn) noexcept nogil


cdef inline kvm_memory_slot *gfn_to_memslot(slot_table *table, uint64_t gfn) noexcept nogil:
    """The slot of a guest frame, NULL in a hole."""
    if table.last is not NULL and gfn - table.last.base_gfn < table.last.npages:
        return table.last
    return find_memslot(table, gfn)


cdef inline uint64_t slot_end(const kvm_memory_slot *slot) noexcept nogil:
    """Return the first frame behind the slot."""
    return slot.base_gfn + slot.npages


cdef inline uint64_t level_index(const kvm_memory_slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Index of the page of this level in the slot's arrays."""
    cdef int shift = PT64_INDEX_BITS * (level - 1)
    return (gfn >> shift) - (slot.base_gfn >> shift)


cdef inline uint8_t host_page_of(const kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    return slot.backing if slot.host_page is NULL else slot.host_page[gfn - slot.base_gfn]


cdef inline uint64_t host_pfn_of(const kvm_memory_slot *slot, uint64_t gfn, uint8_t host_page) noexcept nogil:
    return slot.base_pfn + (host_page >> HOST_VERSION_SHIFT) * slot.span + (gfn - slot.base_gfn)


cdef inline int32_t lpage_disallowed(const kvm_memory_slot *slot, uint64_t gfn, int level) noexcept nogil:
    return slot.disallow_lpage[level - PG_LEVEL_2M][level_index(slot, gfn, level)]


cdef inline bint is_write_tracked(const kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    return slot.write_track is not NULL and slot.write_track[gfn - slot.base_gfn] != 0


cdef inline void mark_slot_dirty(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    cdef uint64_t i = gfn - slot.base_gfn
    if slot.dirty_bitmap is not NULL:
        slot.dirty_bitmap[i >> 6] |= <uint64_t>1 << (i & 63)


# IN slot: with a dirty log
cdef inline bint is_slot_dirty(const kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    cdef uint64_t i = gfn - slot.base_gfn
    return (slot.dirty_bitmap[i >> 6] >> (i & 63)) & 1


# Largest level that slot edges, shadowed tables and the host allow for gfn, at most max_level. IN host_page: of gfn
cdef int max_mapping_level(const kvm_memory_slot *slot, uint64_t gfn, int max_level, uint8_t host_page) noexcept nogil
# One more (1) or one fewer (-1) reason against huge pages around gfn
cdef void account_disallow_lpage(kvm_memory_slot *slot, uint64_t gfn, int count) noexcept nogil
# 0, or -1 for want of memory (of the counters, at the first use)
cdef int account_write_track(kvm_memory_slot *slot, uint64_t gfn, int count) noexcept nogil
cdef int alloc_rmaps(kvm_memory_slot *slot) noexcept nogil
cdef int alloc_host_pages(kvm_memory_slot *slot) noexcept nogil
cdef int set_dirty_log(kvm_memory_slot *slot, bint on) noexcept nogil
# NULL for want of memory. IN pfn: first host frame that is free; OUT: the next one
cdef kvm_memory_slot *new_memslot(uint32_t id, int as_id, uint64_t gfn, uint64_t npages, uint8_t *hva, int backing,
                                  bint readonly, uint64_t *pfn) noexcept nogil
cdef void free_memslot(kvm_memory_slot *slot) noexcept nogil
# Make sure that n insertions need no memory: 0, or -1
cdef int reserve_memslots(slot_table *table, size_t n) noexcept nogil
# Needs a reserved place. The caller has checked that nothing overlaps, and sorts when all are inserted
cdef void append_memslot(slot_table *table, kvm_memory_slot *slot) noexcept nogil
cdef void sort_memslots(slot_table *table) noexcept nogil
# Take out the slots that are marked invalid; the caller frees them
cdef void remove_invalid_memslots(slot_table *table) noexcept nogil
# The number of the first slot that ends beyond gfn
cdef size_t first_memslot_at(const slot_table *table, uint64_t gfn) noexcept nogil
