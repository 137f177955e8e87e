"""Unsync pages, as `_unsync.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport PG_LEVEL_2M, PG_LEVEL_4K, ROLE_INVALID_MASK, SPTE_ENT_PER_PAGE
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, sp_level
from kvmmu.mmu.core._page cimport hash_first, sp_has_gptes
from kvmmu.mmu.core._pte_list cimport pte_list_count, pte_list_get
from kvmmu.mmu.core._slots cimport is_write_tracked, kvm_memory_slot, lpage_disallowed
from kvmmu.mmu.core._trace cimport TRACE_SYNC_PAGE, TRACE_UNSYNC_PAGE, trace


cdef void mark_unsync_child(kvm *k, uint64_t sptep) noexcept nogil:
    cdef uint32_t sp = <uint32_t>(sptep // SPTE_ENT_PER_PAGE)
    cdef int index = <int>(sptep % SPTE_ENT_PER_PAGE)
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef uint64_t bit = <uint64_t>1 << (index & 63)
    if page.unsync_child_bitmap[index >> 6] & bit:
        return
    page.unsync_child_bitmap[index >> 6] |= bit
    page.unsync_children += 1
    if page.unsync_children == 1:
        mark_parents_unsync(k, sp)


cdef void mark_parents_unsync(kvm *k, uint32_t sp) noexcept nogil:
    cdef size_t i
    for i in range(pte_list_count(&k.lists, k.pages[sp].parents)):
        mark_unsync_child(k, pte_list_get(&k.lists, k.pages[sp].parents, i))


cdef void clear_unsync_child(kvm *k, uint64_t sptep) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sptep // SPTE_ENT_PER_PAGE]
    cdef int index = <int>(sptep % SPTE_ENT_PER_PAGE)
    cdef uint64_t bit = <uint64_t>1 << (index & 63)
    if page.unsync_child_bitmap[index >> 6] & bit:
        page.unsync_child_bitmap[index >> 6] &= ~bit
        page.unsync_children -= 1


cdef void clear_unsync(kvm *k, uint32_t sp) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sp]
    if page.unsync:
        trace(&k.trace, TRACE_SYNC_PAGE, page.mmu_valid_gen, page.gfn, page.role, page.root_count, page.unsync)
        page.unsync = False
        k.stats.mmu_unsync -= 1


cdef void unsync_page(kvm *k, uint32_t sp) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sp]
    trace(&k.trace, TRACE_UNSYNC_PAGE, page.mmu_valid_gen, page.gfn, page.role, page.root_count, page.unsync)
    page.unsync = True
    k.stats.mmu_unsync += 1
    mark_parents_unsync(k, sp)


cdef int try_to_unsync(kvm *k, kvm_memory_slot *slot, uint64_t gfn, bint can_unsync, bint prefetch) noexcept nogil:
    cdef uint32_t sp
    cdef kvm_mmu_page *page
    if slot is NULL or k.indirect_shadow_pages == 0:
        return UNSYNC_OK
    if is_write_tracked(slot, gfn):
        return UNSYNC_TRACKED
    if not lpage_disallowed(slot, gfn, PG_LEVEL_2M):    # a shadowed table would be a reason against huge pages
        return UNSYNC_OK
    sp = hash_first(k, gfn)
    while sp:
        page = &k.pages[sp]
        if page.gfn == gfn and sp_has_gptes(page) and not page.role & ROLE_INVALID_MASK:
            if not can_unsync or sp_level(page) != PG_LEVEL_4K:
                return UNSYNC_TRACKED
            if not page.unsync:
                if prefetch:
                    return UNSYNC_PREFETCH
                unsync_page(k, sp)
        sp = page.hash_next
    return UNSYNC_OK
