"""TdpMmu over ranges of frames, as `_range.pxd` describes it."""

from libc.errno cimport ENOMEM
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, PT64_INDEX_BITS, PT_WRITABLE_MASK, ROLE_INVALID_MASK, ROLE_LEVEL_MASK,
    ROLE_SMM_SHIFT, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE,
)
from kvmmu.mmu.core._kvm cimport (
    KVM_TDP_MMU, flush_remote_tlbs, kvm, memslots_of, spte_to_child,
)
from kvmmu.mmu.core._page cimport first_spte, reserve_pages
from kvmmu.mmu.core._pte_list cimport pte_list_first, reserve_descs
from kvmmu.mmu.core._slots cimport (
    gfn_to_memslot, host_page_of, host_pfn_of, kvm_memory_slot, max_mapping_level, slot_end,
)
from kvmmu.mmu.core._spte cimport (
    is_accessed_spte, is_last_spte, is_shadow_present_pte, is_writable_pte, make_huge_spte, mark_spte_for_access_track,
    pages_per_hpage, spte_ad_need_write_protect, spte_to_pfn,
)
from kvmmu.mmu.core._trace cimport TRACE_SPLIT_HUGE_PAGE, trace
from kvmmu.mmu.tdp._tdp cimport tdp_put_root, tdp_set_spte, tdp_split_huge_page

# The arguments and results of a visit of leaves.
cdef struct visit:
    int min_level
    bint flush                      # OUT
    bint young                      # OUT
    bint clear
    bint wrprot
    int error                       # OUT: a negative errno ends the visit
    uint64_t mask                   # frames from gfn on
    uint64_t gfn
    const kvm_memory_slot *slot

# IN gfn: first one of the entry. A visitor may change the entry, and what is below it
ctypedef void (*visitor)(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil


cdef void visit_page(kvm *k, uint32_t sp, uint64_t base, uint64_t start, uint64_t end, int at_level, visitor fn,
                     visit *v) noexcept nogil:
    """Visit entries of a page for [start, end): present leaves; if at_level is given, all of that level but empty ones."""
    cdef int level = <int>(k.pages[sp].role & ROLE_LEVEL_MASK), shift = PT64_INDEX_BITS * (level - 1)
    cdef uint64_t size = pages_per_hpage(level), gfn, spte
    cdef uint64_t i = 0 if start <= base else (start - base) >> shift
    while i < SPTE_ENT_PER_PAGE and v.error == 0:
        gfn = base + (i << shift)
        if gfn >= end:
            return
        spte = k.sptes[first_spte(sp) + i]
        if not is_shadow_present_pte(spte):
            # passes of a whole root take MMIO entries too
            if at_level == level and spte != SHADOW_NONPRESENT_VALUE:
                fn(k, first_spte(sp) + i, gfn, level, v)
        elif at_level == level or (at_level == 0 and is_last_spte(spte, level)):
            fn(k, first_spte(sp) + i, gfn, level, v)
        elif not is_last_spte(spte, level) and level > at_level:
            visit_page(k, spte_to_child(k, spte), gfn, max(start, gfn), min(end, gfn + size), at_level, fn, v)
        i += 1


cdef void visit_leaves(kvm *k, int as_id, uint64_t start, uint64_t end, visitor fn, visit *v) noexcept nogil:
    """Visit the leaves of every valid root of an address space; both, where they share their slots."""
    cdef uint32_t root = k.tdp_mmu_roots.head, next
    while root:
        next = k.pages[root].next
        if not k.pages[root].role & ROLE_INVALID_MASK and (
                k.one_address_space or <int>(k.pages[root].role >> ROLE_SMM_SHIFT) == as_id):
            visit_page(k, root, 0, start, end, 0, fn, v)
        root = next


cdef visit new_visit() noexcept nogil:
    cdef visit v
    v.min_level = PG_LEVEL_4K
    v.flush = v.young = v.clear = v.wrprot = False
    v.error = 0
    v.mask = v.gfn = 0
    v.slot = NULL
    return v


# ---- zap -----------------------------------------------------------------------------------------------------------------

cdef void zap(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    tdp_set_spte(k, sptep, gfn, level, SHADOW_NONPRESENT_VALUE)
    v.flush = True


cdef bint tdp_zap_leafs(kvm *k, int as_id, uint64_t start, uint64_t end) noexcept nogil:
    cdef visit v = new_visit()
    visit_leaves(k, as_id, start, end, zap, &v)
    return v.flush


cdef void tdp_invalidate_all_roots(kvm *k) noexcept nogil:
    cdef uint32_t root = k.tdp_mmu_roots.head
    while root:
        k.pages[root].role |= <uint32_t>ROLE_INVALID_MASK
        root = k.pages[root].next


cdef void tdp_zap_invalidated_roots(kvm *k) noexcept nogil:
    cdef uint32_t root = k.tdp_mmu_roots.head, next
    cdef int level
    cdef visit v = new_visit()
    while root:
        next = k.pages[root].next
        if k.pages[root].role & ROLE_INVALID_MASK and k.pages[root].held:
            for level in range(PG_LEVEL_4K, <int>(k.pages[root].role & ROLE_LEVEL_MASK) + 1):
                visit_page(k, root, 0, 0, ~<uint64_t>0, level, zap, &v)
            k.pages[root].held = False
            tdp_put_root(k, root)
        root = next
    flush_remote_tlbs(k)


# ---- age -----------------------------------------------------------------------------------------------------------------

cdef void age(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    cdef uint64_t spte = k.sptes[sptep]
    if not is_accessed_spte(&k.spte, spte):
        return
    v.young = True
    if v.clear:
        tdp_set_spte(k, sptep, gfn, level, mark_spte_for_access_track(&k.spte, spte))


cdef bint tdp_age_gfn_range(kvm *k, int as_id, uint64_t start, uint64_t end, bint clear) noexcept nogil:
    cdef visit v = new_visit()
    v.clear = clear
    visit_leaves(k, as_id, start, end, age, &v)
    return v.young


# ---- write protection and dirty bits -------------------------------------------------------------------------------------

cdef void wrprot(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    cdef uint64_t spte = k.sptes[sptep]
    if level >= v.min_level and is_writable_pte(spte):
        tdp_set_spte(k, sptep, gfn, level, spte & ~PT_WRITABLE_MASK)
        v.flush = True


cdef bint tdp_wrprot_slot(kvm *k, const kvm_memory_slot *slot, int min_level) noexcept nogil:
    cdef visit v = new_visit()
    v.min_level = min_level
    visit_leaves(k, slot.as_id, slot.base_gfn, slot_end(slot), wrprot, &v)
    return v.flush


cdef void clear_dirty(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    cdef uint64_t spte = k.sptes[sptep], bit = k.spte.dirty_mask
    if v.mask and (level > PG_LEVEL_4K or not (v.mask >> (gfn - v.gfn)) & 1):
        return
    if v.wrprot or spte_ad_need_write_protect(spte) or bit == 0:
        bit = PT_WRITABLE_MASK
    if spte & bit:
        tdp_set_spte(k, sptep, gfn, level, spte & ~bit)
        v.flush = True


cdef bint tdp_clear_dirty_slot(kvm *k, const kvm_memory_slot *slot) noexcept nogil:
    cdef visit v = new_visit()
    visit_leaves(k, slot.as_id, slot.base_gfn, slot_end(slot), clear_dirty, &v)
    return v.flush


cdef bint tdp_clear_dirty_pt_masked(kvm *k, const kvm_memory_slot *slot, uint64_t gfn, uint64_t mask, bint wrprot) noexcept nogil:
    cdef visit v = new_visit()
    v.gfn, v.mask, v.wrprot = gfn, mask, wrprot
    visit_leaves(k, slot.as_id, gfn, min(gfn + 64, slot_end(slot)), clear_dirty, &v)
    return v.flush


cdef void write_protect(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    cdef uint64_t spte = k.sptes[sptep], bits = PT_WRITABLE_MASK | k.spte.mmu_writable_mask
    if level >= v.min_level and spte & bits:
        tdp_set_spte(k, sptep, gfn, level, spte & ~bits)
        v.flush = True


cdef bint tdp_write_protect_gfn(kvm *k, const kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil:
    cdef visit v = new_visit()
    v.min_level = min_level
    visit_leaves(k, slot.as_id, gfn, gfn + 1, write_protect, &v)
    return v.flush


# ---- split and recover ---------------------------------------------------------------------------------------------------

cdef void split(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    cdef uint64_t spte = k.sptes[sptep]
    if level != v.min_level:
        return
    if reserve_pages(k, 1) or reserve_descs(&k.lists, 1):
        v.error = -ENOMEM
        trace(&k.trace, TRACE_SPLIT_HUGE_PAGE, gfn, spte, level, <uint64_t>v.error)
        return
    tdp_split_huge_page(k, sptep, gfn, level)
    v.flush = True


cdef int tdp_try_split_huge_pages(kvm *k, int as_id, uint64_t start, uint64_t end, int target_level) noexcept nogil:
    cdef visit v = new_visit()
    cdef int level
    for level in range(PG_LEVEL_1G, target_level, -1):
        v.min_level = level
        visit_leaves(k, as_id, start, end, split, &v)
    if v.flush:
        flush_remote_tlbs(k)
    return v.error


cdef void recover(kvm *k, uint64_t sptep, uint64_t gfn, int level, visit *v) noexcept nogil:
    """Replace a table by the huge leaf that its first leaf belongs to, if slot and host allow one."""
    cdef const kvm_memory_slot *slot = v.slot
    cdef uint64_t spte = k.sptes[sptep], size = pages_per_hpage(level), first, small
    cdef int i
    if not is_shadow_present_pte(spte) or is_last_spte(spte, level) or gfn < slot.base_gfn or gfn + size > slot_end(slot):
        return
    if max_mapping_level(slot, gfn, k.spte.max_huge_page_level, host_page_of(slot, gfn)) < level:
        return
    first = first_spte(spte_to_child(k, spte))
    for i in range(SPTE_ENT_PER_PAGE):
        small = k.sptes[first + i]
        if not is_shadow_present_pte(small) or not is_last_spte(small, level - 1):
            continue
        if spte_to_pfn(small) != host_pfn_of(slot, gfn, host_page_of(slot, gfn)) + i * pages_per_hpage(level - 1):
            continue
        tdp_set_spte(k, sptep, gfn, level, make_huge_spte(&k.spte, small, level))
        v.flush = True
        return


cdef bint tdp_recover_huge_pages(kvm *k, const kvm_memory_slot *slot) noexcept nogil:
    cdef visit v = new_visit()
    cdef uint32_t root = k.tdp_mmu_roots.head
    cdef int level
    v.slot = slot
    while root:
        if not k.pages[root].role & ROLE_INVALID_MASK and (
                k.one_address_space or <int>(k.pages[root].role >> ROLE_SMM_SHIFT) == slot.as_id):
            for level in range(PG_LEVEL_2M, k.spte.max_huge_page_level + 1):
                visit_page(k, root, 0, slot.base_gfn, slot_end(slot), level, recover, &v)
        root = k.pages[root].next
    return v.flush


cdef size_t tdp_recover_nx_huge_pages(kvm *k, size_t n) noexcept nogil:
    cdef uint32_t sp = k.possible_nx_huge_pages[KVM_TDP_MMU].head, next
    cdef kvm_memory_slot *slot
    cdef uint64_t sptep, gfn
    cdef size_t zapped = 0
    cdef int as_id
    while sp and zapped < n:
        next = k.pages[sp].nx_next
        gfn = k.pages[sp].gfn
        as_id = <int>(k.pages[sp].role >> ROLE_SMM_SHIFT)
        slot = gfn_to_memslot(memslots_of(k, as_id), gfn)
        if slot is NULL or not slot.dirty_log:          # under the dirty log it would come back small at once
            sptep = pte_list_first(&k.lists, k.pages[sp].parents)
            tdp_set_spte(k, sptep, gfn, <int>(k.pages[sp].role & ROLE_LEVEL_MASK) + 1, SHADOW_NONPRESENT_VALUE)
            zapped += 1
            next = k.possible_nx_huge_pages[KVM_TDP_MMU].head if next and not k.pages[next].nx_huge_page_disallowed else next
        sp = next
    if zapped:
        flush_remote_tlbs(k)
    return zapped
