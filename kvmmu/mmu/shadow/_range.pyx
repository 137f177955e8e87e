"""A shadow MMU over ranges of frames, as `_range.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport PG_LEVEL_1G, PG_LEVEL_4K, PT64_INDEX_BITS, PT_WRITABLE_MASK, ROLE_DIRECT_MASK, ROLE_SMM_SHIFT
from kvmmu.mmu.core._kvm cimport KVM_SHADOW_MMU, kvm, kvm_mmu_page, page_list, sp_level, sp_of
from kvmmu.mmu.core._page cimport hash_first, list_init, sp_has_gptes
from kvmmu.mmu.core._pte_list cimport pte_list_count, pte_list_get
from kvmmu.mmu.core._rmap cimport has_rmaps, rmap_head, slot_of_sp
from kvmmu.mmu.core._slots cimport host_page_of, kvm_memory_slot, max_mapping_level, slot_end
from kvmmu.mmu.core._spte cimport is_accessed_spte, mark_spte_for_access_track
from kvmmu.mmu.shadow._zap cimport commit_zap, drop_spte, is_obsolete_sp, prepare_zap_page, zap_rmap


cdef inline uint64_t next_page(uint64_t gfn, int level) noexcept nogil:
    """Return the first frame of the next page of a level."""
    return ((gfn >> (PT64_INDEX_BITS * (level - 1))) + 1) << (PT64_INDEX_BITS * (level - 1))


cdef bint shadow_zap_gfn_range(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t gfn
    cdef bint flush = False
    cdef int level
    if not has_rmaps(slot):
        return False
    for level in range(PG_LEVEL_4K, PG_LEVEL_1G + 1):
        gfn = start
        while gfn < end:
            flush |= zap_rmap(k, slot, gfn, level)
            gfn = next_page(gfn, level)
    return flush


cdef bint shadow_age_gfn_range(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end, bint clear) noexcept nogil:
    cdef uint64_t gfn, sptep, head
    cdef size_t i
    cdef bint young = False
    cdef int level
    if not has_rmaps(slot):
        return False
    for level in range(PG_LEVEL_4K, PG_LEVEL_1G + 1):
        gfn = start
        while gfn < end:
            head = rmap_head(slot, gfn, level)[0]
            for i in range(pte_list_count(&k.lists, head)):
                sptep = pte_list_get(&k.lists, head, i)
                if is_accessed_spte(&k.spte, k.sptes[sptep]):
                    young = True
                    if clear:
                        k.sptes[sptep] = mark_spte_for_access_track(&k.spte, k.sptes[sptep])
            gfn = next_page(gfn, level)
    return young


# ---- write protection ----------------------------------------------------------------------------------------------------

cdef bint write_protect_rmap(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int level, uint64_t bits) noexcept nogil:
    """Clear bits of all leaves of a page; True if a processor's TLB may still allow a write by one of them."""
    cdef uint64_t head = rmap_head(slot, gfn, level)[0], sptep, spte
    cdef size_t i
    cdef bint flush = False
    for i in range(pte_list_count(&k.lists, head)):
        sptep = pte_list_get(&k.lists, head, i)
        spte = k.sptes[sptep]
        if not spte & bits:
            continue
        k.sptes[sptep] = spte & ~bits
        flush |= (spte & bits & (PT_WRITABLE_MASK | k.spte.mmu_writable_mask)) != 0
    return flush


cdef bint shadow_write_protect_gfn(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil:
    cdef bint flush = False
    cdef int level
    if not has_rmaps(slot):
        return False
    for level in range(min_level, PG_LEVEL_1G + 1):
        flush |= write_protect_rmap(k, slot, gfn, level, PT_WRITABLE_MASK | k.spte.mmu_writable_mask)
    return flush


cdef bint shadow_wrprot_slot(kvm *k, kvm_memory_slot *slot, int min_level) noexcept nogil:
    cdef uint64_t gfn
    cdef bint flush = False
    cdef int level
    if not has_rmaps(slot):
        return False
    for level in range(min_level, PG_LEVEL_1G + 1):
        gfn = slot.base_gfn
        while gfn < slot_end(slot):
            flush |= write_protect_rmap(k, slot, gfn, level, PT_WRITABLE_MASK)
            gfn = next_page(gfn, level)
    return flush


cdef bint shadow_wrprot_pt_masked(kvm *k, kvm_memory_slot *slot, uint64_t gfn, uint64_t mask) noexcept nogil:
    cdef bint flush = False
    cdef int bit
    if not has_rmaps(slot):
        return False
    for bit in range(64):
        if (mask >> bit) & 1 and gfn + bit < slot_end(slot):
            flush |= write_protect_rmap(k, slot, gfn + bit, PG_LEVEL_4K, PT_WRITABLE_MASK)
    return flush


cdef bint is_collapsible(kvm *k, kvm_memory_slot *slot, uint64_t sptep) noexcept nogil:
    cdef const kvm_mmu_page *sp = sp_of(k, sptep)
    if not sp.role & ROLE_DIRECT_MASK or sp.gfn < slot.base_gfn:
        return False
    return sp_level(sp) < max_mapping_level(slot, sp.gfn, k.spte.max_huge_page_level, host_page_of(slot, sp.gfn))


cdef bint shadow_zap_collapsible(kvm *k, kvm_memory_slot *slot) noexcept nogil:
    cdef uint64_t gfn, sptep, head
    cdef size_t i
    cdef bint flush = False
    cdef int level
    if not has_rmaps(slot):
        return False
    for level in range(PG_LEVEL_4K, k.spte.max_huge_page_level):
        gfn = slot.base_gfn
        while gfn < slot_end(slot):
            i = 0
            while True:
                head = rmap_head(slot, gfn, level)[0]
                if i >= pte_list_count(&k.lists, head):
                    break
                sptep = pte_list_get(&k.lists, head, i)
                if is_collapsible(k, slot, sptep):
                    drop_spte(k, sptep)                 # the last one of the list takes its place
                    flush = True
                else:
                    i += 1
            gfn = next_page(gfn, level)
    return flush


# ---- pages ---------------------------------------------------------------------------------------------------------------

cdef size_t zap_pages_of_gfns(kvm *k, int as_id, uint64_t start, uint64_t end, page_list *invalid) noexcept nogil:
    cdef uint64_t gfn
    cdef uint32_t sp
    cdef kvm_mmu_page *page
    cdef size_t zapped = 0
    for gfn in range(start, end):
        if k.active_mmu_pages.head == 0:
            break
        sp = hash_first(k, gfn)
        while sp:
            page = &k.pages[sp]
            if page.gfn == gfn and sp_has_gptes(page) and not is_obsolete_sp(k, page) and (
                    k.one_address_space or <int>(page.role >> ROLE_SMM_SHIFT) == as_id):
                zapped += prepare_zap_page(k, sp, invalid)
            sp = page.hash_next                         # prepared pages stay in the hash
    return zapped


cdef void zap_obsolete_pages(kvm *k) noexcept nogil:
    cdef page_list invalid
    cdef uint32_t sp = k.active_mmu_pages.head
    list_init(&invalid)
    while sp and is_obsolete_sp(k, &k.pages[sp]):       # oldest first: no page behind a new one is obsolete
        prepare_zap_page(k, sp, &invalid)
        sp = k.active_mmu_pages.head
    commit_zap(k, &invalid)


cdef size_t shadow_recover_nx_huge_pages(kvm *k, size_t n) noexcept nogil:
    cdef page_list invalid
    cdef uint32_t sp = k.possible_nx_huge_pages[KVM_SHADOW_MMU].head, next
    cdef kvm_memory_slot *slot
    cdef size_t zapped = 0
    list_init(&invalid)
    while sp and zapped < n:
        next = k.pages[sp].nx_next
        slot = slot_of_sp(k, &k.pages[sp], k.pages[sp].gfn)
        if slot is NULL or not slot.dirty_log:          # under the dirty log it would come back small at once
            prepare_zap_page(k, sp, &invalid)
            zapped += 1
            if next and not k.pages[next].nx_huge_page_disallowed:
                next = k.possible_nx_huge_pages[KVM_SHADOW_MMU].head
        sp = next
    commit_zap(k, &invalid)
    return zapped
