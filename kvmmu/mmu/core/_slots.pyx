"""Memslots: look-up, large-page limits, counters, as `_slots.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memset

from kvmmu.arch._bits cimport PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, PT64_INDEX_BITS
from kvmmu.memory._alloc cimport kvmmu_grow_array
from kvmmu.mmu.core._slots cimport HOST_LEVEL_MASK, SLOT_VERSIONS, kvm_memory_slot, level_index, lpage_disallowed, slot_table


cdef size_t first_memslot_at(const slot_table *table, uint64_t gfn) noexcept nogil:
    cdef size_t low = 0, high = table.count, middle
    while low < high:
        middle = (low + high) // 2
        if table.slots[middle].base_gfn + table.slots[middle].npages <= gfn:
            low = middle + 1
        else:
            high = middle
    return low


cdef kvm_memory_slot *find_memslot(slot_table *table, uint64_t gfn) noexcept nogil:
    cdef size_t i = first_memslot_at(table, gfn)
    if i == table.count or gfn < table.slots[i].base_gfn:
        return NULL
    table.last = table.slots[i]
    return table.last


cdef int max_mapping_level(const kvm_memory_slot *slot, uint64_t gfn, int max_level, uint8_t host_page) noexcept nogil:
    cdef int level = min(max_level, host_page & HOST_LEVEL_MASK)
    while level > PG_LEVEL_4K and lpage_disallowed(slot, gfn, level):
        level -= 1
    return level


cdef void account_disallow_lpage(kvm_memory_slot *slot, uint64_t gfn, int count) noexcept nogil:
    cdef int level
    for level in range(PG_LEVEL_2M, PG_LEVEL_1G + 1):
        slot.disallow_lpage[level - PG_LEVEL_2M][level_index(slot, gfn, level)] += count


cdef int account_write_track(kvm_memory_slot *slot, uint64_t gfn, int count) noexcept nogil:
    if slot.write_track is NULL:
        slot.write_track = <uint16_t *>calloc(slot.npages, sizeof(uint16_t))
        if slot.write_track is NULL:
            return -1
    slot.write_track[gfn - slot.base_gfn] += count
    account_disallow_lpage(slot, gfn, count)
    return 0


cdef uint64_t pages_at(const kvm_memory_slot *slot, int level) noexcept nogil:
    """Return how many pages of this level the slot touches."""
    return level_index(slot, slot.base_gfn + slot.npages - 1, level) + 1


cdef int alloc_rmaps(kvm_memory_slot *slot) noexcept nogil:
    cdef int i
    for i in range(3):
        if slot.rmap[i] is NULL:
            slot.rmap[i] = <uint64_t *>calloc(pages_at(slot, i + 1), sizeof(uint64_t))
            if slot.rmap[i] is NULL:
                return -1
    return 0


cdef int alloc_host_pages(kvm_memory_slot *slot) noexcept nogil:
    if slot.host_page is NULL:
        slot.host_page = <uint8_t *>calloc(slot.npages, 1)
        if slot.host_page is NULL:
            return -1
        memset(slot.host_page, slot.backing, slot.npages)
    return 0


cdef int set_dirty_log(kvm_memory_slot *slot, bint on) noexcept nogil:
    slot.dirty_log = on
    slot.log_began_full = False
    if not on:
        free(slot.dirty_bitmap)
        slot.dirty_bitmap = NULL
    elif slot.dirty_bitmap is NULL:
        slot.dirty_bitmap = <uint64_t *>calloc((slot.npages + 63) // 64, sizeof(uint64_t))
        if slot.dirty_bitmap is NULL:
            slot.dirty_log = False
            return -1
    return 0


cdef void limit_edges(kvm_memory_slot *slot) noexcept nogil:
    """Forbid the huge pages that reach over an edge of the slot: they would map memory of another one."""
    cdef int level
    cdef uint64_t mask, end = slot.base_gfn + slot.npages
    for level in range(PG_LEVEL_2M, PG_LEVEL_1G + 1):
        mask = (<uint64_t>1 << (PT64_INDEX_BITS * (level - 1))) - 1
        if slot.base_gfn & mask:
            slot.disallow_lpage[level - PG_LEVEL_2M][0] = 1
        if end & mask:
            slot.disallow_lpage[level - PG_LEVEL_2M][pages_at(slot, level) - 1] = 1


cdef kvm_memory_slot *new_memslot(uint32_t id, int as_id, uint64_t gfn, uint64_t npages, uint8_t *hva, int backing,
                                  bint readonly, uint64_t *pfn) noexcept nogil:
    cdef uint64_t gig = <uint64_t>1 << (PT64_INDEX_BITS * (PG_LEVEL_1G - 1))
    cdef kvm_memory_slot *slot = <kvm_memory_slot *>calloc(1, sizeof(kvm_memory_slot))
    cdef int level
    if slot is NULL:
        return NULL
    slot.id, slot.as_id = id, as_id
    slot.base_gfn, slot.npages, slot.hva = gfn, npages, hva
    slot.backing, slot.readonly = backing, readonly
    # the same place in a gigabyte as in guest-physical space, if a large page may ever map it
    slot.base_pfn = ((pfn[0] + gig - 1) & ~(gig - 1)) + (gfn & (gig - 1)) if backing > PG_LEVEL_4K else pfn[0]
    slot.span = (npages + (gfn & (gig - 1)) + gig - 1) & ~(gig - 1) if backing > PG_LEVEL_4K else npages
    pfn[0] = slot.base_pfn + SLOT_VERSIONS * slot.span
    for level in range(PG_LEVEL_2M, PG_LEVEL_1G + 1):
        slot.disallow_lpage[level - PG_LEVEL_2M] = <int32_t *>calloc(pages_at(slot, level), sizeof(int32_t))
        if slot.disallow_lpage[level - PG_LEVEL_2M] is NULL:
            free_memslot(slot)
            return NULL
    limit_edges(slot)
    return slot


cdef void free_memslot(kvm_memory_slot *slot) noexcept nogil:
    cdef int i
    for i in range(2):
        free(slot.disallow_lpage[i])
    for i in range(3):
        free(slot.rmap[i])
    free(slot.host_page)
    free(slot.dirty_bitmap)
    free(slot.write_track)
    free(slot)


cdef int reserve_memslots(slot_table *table, size_t n) noexcept nogil:
    cdef size_t capacity
    cdef kvm_memory_slot **grown
    if table.capacity - table.count >= n:
        return 0
    capacity = 2 * table.capacity + n
    grown = <kvm_memory_slot **>kvmmu_grow_array(table.slots, capacity, sizeof(kvm_memory_slot *))
    if grown is NULL:
        return -1
    table.slots, table.capacity = grown, capacity
    return 0


cdef void append_memslot(slot_table *table, kvm_memory_slot *slot) noexcept nogil:
    table.slots[table.count] = slot
    table.count += 1


cdef int compare_slots(const void *a, const void *b) noexcept nogil:
    cdef uint64_t first = (<kvm_memory_slot * const *>a)[0].base_gfn, second = (<kvm_memory_slot * const *>b)[0].base_gfn
    return (first > second) - (first < second)


cdef void sort_memslots(slot_table *table) noexcept nogil:
    if table.count:
        qsort(table.slots, table.count, sizeof(kvm_memory_slot *), compare_slots)


cdef void remove_invalid_memslots(slot_table *table) noexcept nogil:
    cdef size_t i, kept = 0
    table.last = NULL
    for i in range(table.count):
        if not table.slots[i].invalid:
            table.slots[kept] = table.slots[i]
            kept += 1
    table.count = kept
