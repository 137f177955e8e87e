"""TdpMmu: roots, the mapping of a fault, and the accounting of every change. Ranges are in `_range.pyx`."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    ACC_ALL, FROZEN_SPTE, PT64_INDEX_BITS, RET_PF_CONTINUE, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY,
    RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_INVALID_MASK,
    ROLE_LEVEL_MASK, ROLE_SMM_SHIFT, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE,
)
from kvmmu.mmu.core._fault cimport (
    disallowed_hugepage_adjust, fast_page_fault, fault_make_mmio_spte, fault_make_spte, faultin_pfn, hugepage_adjust,
    page_fault_handle_page_track, trace_mark_mmio_spte,
)
from kvmmu.mmu.core._kvm cimport (
    KVM_TDP_MMU, REQ_FREE_OBSOLETE_ROOTS, count_leaf, flush_remote_tlbs, kvm, kvm_page_fault, kvm_vcpu, sp_hpa,
    spte_to_child,
)
from kvmmu.mmu.core._page cimport (
    alloc_page, first_spte, free_page, link_parent, list_append, list_remove, reserve_pages, spte_index,
    track_possible_nx_huge_page, unlink_parent, untrack_possible_nx_huge_page,
)
from kvmmu.mmu.core._pte_list cimport reserve_descs
from kvmmu.mmu.core._spte cimport (
    is_frozen_spte, is_last_spte, is_mmio_spte, is_shadow_present_pte, make_nonleaf_spte, make_small_spte, pages_per_hpage,
    spte_permission_fault, spte_to_pfn,
)
from kvmmu.mmu.core._trace cimport TRACE_SET_SPTE, TRACE_SPLIT_HUGE_PAGE, TRACE_SPTE_REQUESTED, TRACE_TDP_SPTE_CHANGED, trace

cdef enum:
    PAGES_OF_A_FAULT = 8            # one table or split per level, and some


# ---- roots -------------------------------------------------------------------------------------------------------------

cdef uint32_t tdp_get_root(kvm *k, uint32_t role) noexcept nogil:
    cdef uint32_t root = k.tdp_mmu_roots.head
    while root:
        if k.pages[root].role == role:                  # an invalid root has another role word
            k.pages[root].root_count += 1
            return root
        root = k.pages[root].next
    if reserve_pages(k, 1):
        return 0
    root = alloc_page(k, 0, role)
    k.pages[root].tdp_mmu_page = True
    k.pages[root].held = True
    k.pages[root].root_count = 2                        # the caller's, and that of the machine until it is invalidated
    list_append(k, &k.tdp_mmu_roots, root)
    return root


cdef void tdp_put_root(kvm *k, uint32_t root) noexcept nogil:
    if root == 0:
        return
    k.pages[root].root_count -= 1
    if k.pages[root].root_count == 0:
        list_remove(k, &k.tdp_mmu_roots, root)
        tear_down(k, root, 0)
        free_page(k, root)


# ---- changing an entry -------------------------------------------------------------------------------------------------

cdef void tear_down(kvm *k, uint32_t sp, uint64_t gfn) noexcept nogil:
    """Freeze and account every entry of a page that nothing points to any more. IN gfn: of its first entry."""
    cdef int i, level = <int>(k.pages[sp].role & ROLE_LEVEL_MASK)
    cdef uint64_t sptep = first_spte(sp), old
    for i in range(SPTE_ENT_PER_PAGE):
        old = k.sptes[sptep + i]
        if old != SHADOW_NONPRESENT_VALUE:
            k.sptes[sptep + i] = FROZEN_SPTE
            account_change(k, sptep + i, gfn + (<uint64_t>i << (PT64_INDEX_BITS * (level - 1))), level, old, FROZEN_SPTE)


cdef void account_change(kvm *k, uint64_t sptep, uint64_t gfn, int level, uint64_t old, uint64_t new) noexcept nogil:
    cdef bint was_present = is_shadow_present_pte(old), is_present = is_shadow_present_pte(new)
    cdef bint was_leaf = was_present and is_last_spte(old, level), is_leaf = is_present and is_last_spte(new, level)
    cdef bint moved = spte_to_pfn(old) != spte_to_pfn(new)
    cdef uint32_t child
    if old == new:
        return
    trace(&k.trace, TRACE_TDP_SPTE_CHANGED, k.pages[sptep // SPTE_ENT_PER_PAGE].role >> ROLE_SMM_SHIFT, gfn, level, old, new)
    if was_leaf and is_leaf and moved:
        k.stats.bugs += 1                               # must be zapped first: others may hold the old frame
    if was_leaf != is_leaf:
        count_leaf(k, level, 1 if is_leaf else -1)
    if was_present and not was_leaf and (moved or not is_present):
        child = spte_to_child(k, old)
        unlink_parent(k, child, sptep)
        list_remove(k, &k.tdp_mmu_pages, child)
        untrack_possible_nx_huge_page(k, child, KVM_TDP_MMU)
        tear_down(k, child, gfn)
        free_page(k, child)


cdef void tdp_set_spte(kvm *k, uint64_t sptep, uint64_t gfn, int level, uint64_t new) noexcept nogil:
    cdef uint64_t old = k.sptes[sptep]
    k.sptes[sptep] = new
    account_change(k, sptep, gfn, level, old, new)


# ---- tables ------------------------------------------------------------------------------------------------------------

cdef uint32_t new_table(kvm *k, uint64_t sptep, uint64_t gfn) noexcept nogil:
    """An empty page for the place of an entry; nothing points to it yet."""
    cdef uint32_t child = alloc_page(k, gfn, k.pages[sptep // SPTE_ENT_PER_PAGE].role - 1)       # one level down
    k.pages[child].tdp_mmu_page = True
    list_append(k, &k.tdp_mmu_pages, child)
    return child


cdef void link_table(kvm *k, uint64_t sptep, uint64_t gfn, int level, uint32_t child) noexcept nogil:
    link_parent(k, child, sptep)
    tdp_set_spte(k, sptep, gfn, level, make_nonleaf_spte(
        &k.spte, sp_hpa(k, child), (k.pages[child].role & ROLE_AD_DISABLED_MASK) != 0))


cdef void tdp_split_huge_page(kvm *k, uint64_t sptep, uint64_t gfn, int level) noexcept nogil:
    cdef uint64_t huge = k.sptes[sptep], first
    cdef uint32_t child = new_table(k, sptep, gfn)
    cdef int i
    first = first_spte(child)
    for i in range(SPTE_ENT_PER_PAGE):
        k.sptes[first + i] = make_small_spte(&k.spte, huge, k.pages[child].role, i)
    count_leaf(k, level - 1, SPTE_ENT_PER_PAGE)
    link_table(k, sptep, gfn, level, child)
    trace(&k.trace, TRACE_SPLIT_HUGE_PAGE, gfn, huge, level, 0)


# ---- a fault -------------------------------------------------------------------------------------------------------------

cdef int map_target(kvm_vcpu *vcpu, kvm_page_fault *fault, uint64_t sptep, int level) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint64_t old = k.sptes[sptep], new, gfn = fault.gfn & ~(pages_per_hpage(level) - 1)
    cdef uint32_t role = k.pages[sptep // SPTE_ENT_PER_PAGE].role
    cdef bint wrprot = False, flush
    cdef int ret = RET_PF_FIXED
    if is_shadow_present_pte(old) and is_last_spte(old, level) and (                                    # step 3
            fault.prefetch or not spte_permission_fault(&k.spte, vcpu.mmu.fmt, old, fault.error_code)):
        return RET_PF_SPURIOUS
    if fault.slot is NULL:                                                                              # step 4
        new = fault_make_mmio_spte(k, fault.gfn, <uint32_t>ACC_ALL)
    else:
        wrprot = fault_make_spte(
            k, role, fault.slot, <uint32_t>((role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT), fault.gfn, fault.pfn, old,
            fault.prefetch, True, False, fault.map_writable, &new)
    if new == old:
        ret = RET_PF_SPURIOUS
    else:
        flush = is_shadow_present_pte(old) and not is_last_spte(old, level)
        tdp_set_spte(k, sptep, gfn, level, new)
        if flush:
            flush_remote_tlbs(k)
    if is_mmio_spte(&k.spte, new):
        k.stats.pf_mmio_spte_created += 1
        trace_mark_mmio_spte(k, sptep, fault.gfn, <uint32_t>ACC_ALL)
        return RET_PF_EMULATE
    trace(&k.trace, TRACE_SET_SPTE, gfn, new, sptep, level)
    if wrprot and fault.write:
        return RET_PF_WRITE_PROTECTED
    return ret


cdef int tdp_mmu_map(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint32_t sp = vcpu.mmu.root.sp, child
    cdef int level = <int>(k.pages[sp].role & ROLE_LEVEL_MASK)
    cdef uint64_t sptep, old, gfn
    hugepage_adjust(vcpu, fault)                                                                        # step 1
    trace(&k.trace, TRACE_SPTE_REQUESTED, fault.gfn, fault.pfn, fault.goal_level)
    while True:                                                                                         # step 2
        sptep = first_spte(sp) + spte_index(fault.gfn, level)
        old = k.sptes[sptep]
        if k.spte.nx_huge_pages:
            disallowed_hugepage_adjust(fault, old, level)
        if is_frozen_spte(old):
            return RET_PF_RETRY
        if level == fault.goal_level:
            return map_target(vcpu, fault, sptep, level)
        gfn = fault.gfn & ~(pages_per_hpage(level) - 1)
        if not is_shadow_present_pte(old):
            child = new_table(k, sptep, gfn)
            link_table(k, sptep, gfn, level, child)
        elif is_last_spte(old, level):
            tdp_split_huge_page(k, sptep, gfn, level)
            child = spte_to_child(k, k.sptes[sptep])
            flush_remote_tlbs(k)
        else:
            sp, level = spte_to_child(k, old), level - 1
            continue
        if fault.huge_page_disallowed and fault.req_level >= level:
            track_possible_nx_huge_page(k, child, KVM_TDP_MMU)
        sp, level = child, level - 1


cdef int tdp_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef int r
    # a CR3 that was loaded outside long mode may be wider than the tables, in which it would stand for another address
    if fault.gfn >> (PT64_INDEX_BITS * <int>(vcpu.mmu.root_role & ROLE_LEVEL_MASK)):
        return RET_PF_EMULATE
    if page_fault_handle_page_track(fault):
        return RET_PF_WRITE_PROTECTED
    r = fast_page_fault(vcpu, fault)
    if r != RET_PF_INVALID:
        return r
    if reserve_pages(k, PAGES_OF_A_FAULT) or reserve_descs(&k.lists, PAGES_OF_A_FAULT):
        return -ENOMEM
    r = faultin_pfn(vcpu, fault, <uint32_t>((vcpu.mmu.root_role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT))
    if r != RET_PF_CONTINUE:
        return r
    if k.pages[vcpu.mmu.root.sp].role & ROLE_INVALID_MASK:
        vcpu.requests |= REQ_FREE_OBSOLETE_ROOTS
        return RET_PF_RETRY
    return tdp_mmu_map(vcpu, fault)
