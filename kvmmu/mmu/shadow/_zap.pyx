"""Zapping of entries and shadow pages, as `_zap.pxd` describes it."""

from libc.errno cimport ENOSPC
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport PG_LEVEL_4K, ROLE_GUEST_MODE_MASK, ROLE_INVALID_MASK, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE
from kvmmu.mmu.core._kvm cimport (
    KVM_SHADOW_MMU, REQ_FREE_OBSOLETE_ROOTS, flush_remote_tlbs, kvm, kvm_mmu_page, make_all_vcpus_request, page_list,
    sp_level, sp_of, spte_to_child,
)
from kvmmu.mmu.core._page cimport (
    first_spte, free_page, list_append, list_init, list_remove, sp_has_gptes, unhash_page, unlink_parent,
    untrack_possible_nx_huge_page,
)
from kvmmu.mmu.core._pte_list cimport pte_list_first, pte_list_remove
from kvmmu.mmu.core._rmap cimport rmap_head, rmap_remove, slot_of_sp
from kvmmu.mmu.core._slots cimport account_disallow_lpage, account_write_track, kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_last_spte, is_shadow_present_pte
from kvmmu.mmu.core._trace cimport TRACE_PREPARE_ZAP_PAGE, trace
from kvmmu.mmu.core._unsync cimport clear_unsync

# ---- the reverse map -----------------------------------------------------------------------------------------------------

cdef bint zap_rmap(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int level) noexcept nogil:
    cdef uint64_t *head = rmap_head(slot, gfn, level)
    if head[0] == 0:
        return False
    while head[0]:
        drop_first(k, head)
    return True


cdef void drop_first(kvm *k, uint64_t *head) noexcept nogil:
    """Make the first entry of a list empty; it leaves the list even if it did not belong there, which is a bug."""
    cdef uint64_t sptep = pte_list_first(&k.lists, head[0])
    drop_spte(k, sptep)
    if head[0] and pte_list_first(&k.lists, head[0]) == sptep:
        pte_list_remove(&k.lists, head, sptep)
        k.stats.bugs += 1


# ---- entries -------------------------------------------------------------------------------------------------------------

cdef void drop_spte(kvm *k, uint64_t sptep) noexcept nogil:
    cdef uint64_t old = k.sptes[sptep]
    k.sptes[sptep] = SHADOW_NONPRESENT_VALUE
    if not is_shadow_present_pte(old):
        return
    if is_last_spte(old, sp_level(sp_of(k, sptep))):
        rmap_remove(k, sptep)
    else:
        unlink_parent(k, spte_to_child(k, old), sptep)


cdef size_t zap_spte(kvm *k, uint64_t sptep, page_list *invalid) noexcept nogil:
    cdef uint64_t old = k.sptes[sptep]
    cdef uint32_t child
    drop_spte(k, sptep)
    if invalid is NULL or not is_shadow_present_pte(old) or is_last_spte(old, sp_level(sp_of(k, sptep))):
        return 0
    child = spte_to_child(k, old)
    # a page that shadows L1's EPT or NPT is hardly ever found again; other children stay in the hash
    if k.tdp_enabled and k.pages[child].role & ROLE_GUEST_MODE_MASK and k.pages[child].parents == 0:
        return prepare_zap_page(k, child, invalid)
    return 0


# ---- pages ---------------------------------------------------------------------------------------------------------------

cdef void unaccount_shadowed(kvm *k, uint32_t sp) noexcept nogil:
    """Take a page out of the accounts of its guest table."""
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef kvm_memory_slot *slot = slot_of_sp(k, page, page.gfn)
    k.indirect_shadow_pages -= 1
    if slot is NULL:
        k.stats.bugs += 1
    elif sp_level(page) > PG_LEVEL_4K:
        account_write_track(slot, page.gfn, -1)
    else:
        account_disallow_lpage(slot, page.gfn, -1)


cdef size_t prepare_zap_page(kvm *k, uint32_t sp, page_list *invalid) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef size_t zapped = 0
    cdef int i
    cdef bint was_root = False
    trace(&k.trace, TRACE_PREPARE_ZAP_PAGE, page.mmu_valid_gen, page.gfn, page.role, page.root_count, page.unsync)
    k.stats.mmu_shadow_zapped += 1
    for i in range(SPTE_ENT_PER_PAGE):
        if k.sptes[first_spte(sp) + i] != SHADOW_NONPRESENT_VALUE:
            zapped += zap_spte(k, first_spte(sp) + i, invalid)
    while page.parents:
        drop_first(k, &page.parents)
    if not page.role & ROLE_INVALID_MASK and sp_has_gptes(page):
        unaccount_shadowed(k, sp)
    clear_unsync(k, sp)
    if not page.role & ROLE_INVALID_MASK:
        list_remove(k, &k.active_mmu_pages, sp)
    if page.root_count == 0:
        zapped += 1
        list_append(k, invalid, sp)
        k.n_used_mmu_pages -= 1
    else:
        was_root = not is_obsolete_sp(k, page)
    untrack_possible_nx_huge_page(k, sp, KVM_SHADOW_MMU)
    page.role |= <uint32_t>ROLE_INVALID_MASK
    if was_root:
        make_all_vcpus_request(k, REQ_FREE_OBSOLETE_ROOTS)
    return zapped


cdef void commit_zap(kvm *k, page_list *invalid) noexcept nogil:
    cdef uint32_t sp
    if invalid.head == 0:
        return
    flush_remote_tlbs(k)
    while invalid.head:
        sp = invalid.head
        list_remove(k, invalid, sp)
        unhash_page(k, sp)
        free_page(k, sp)


cdef void flush_or_zap(kvm *k, page_list *invalid, bint flush) noexcept nogil:
    if invalid.head:
        commit_zap(k, invalid)
    elif flush:
        flush_remote_tlbs(k)


# ---- the limit -----------------------------------------------------------------------------------------------------------

cdef size_t zap_oldest_pages(kvm *k, size_t n) noexcept nogil:
    cdef page_list invalid
    cdef uint32_t sp = k.active_mmu_pages.head, next
    cdef size_t zapped = 0, one
    list_init(&invalid)
    while sp and zapped < n:
        next = k.pages[sp].next
        if k.pages[sp].root_count == 0:                 # a root in use would only have to be built anew
            one = prepare_zap_page(k, sp, &invalid)
            zapped += one
            if one > 1:
                next = k.active_mmu_pages.head          # next may be among them
        sp = next
    commit_zap(k, &invalid)
    k.stats.mmu_recycled += zapped
    return zapped


cdef inline uint64_t available_pages(const kvm *k) noexcept nogil:
    return k.n_max_mmu_pages - k.n_used_mmu_pages if k.n_max_mmu_pages > k.n_used_mmu_pages else 0


cdef int make_pages_available(kvm *k) noexcept nogil:
    cdef uint64_t available = available_pages(k)
    if available >= KVM_MIN_FREE_MMU_PAGES:
        return 0
    zap_oldest_pages(k, KVM_REFILL_PAGES - available)
    return 0 if available_pages(k) else -ENOSPC


cdef void change_mmu_pages(kvm *k, uint64_t limit) noexcept nogil:
    if k.n_used_mmu_pages > limit:
        zap_oldest_pages(k, k.n_used_mmu_pages - limit)
        limit = max(limit, k.n_used_mmu_pages)
    k.n_max_mmu_pages = limit
