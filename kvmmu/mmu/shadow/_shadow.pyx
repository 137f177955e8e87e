"""ShadowMmu, as `_shadow.pxd` describes it."""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    ACCESS_PFEC_MASK, ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, PAGE_SHIFT, PFERR_RSVD_MASK, PG_LEVEL_2M,
    PG_LEVEL_4K, RET_PF_CONTINUE, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED, ROLE_ACCESS_MASK,
    ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK,
    ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK, ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_MASK, ROLE_QUADRANT_SHIFT,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_EPT
from kvmmu.mmu.core._fault cimport (
    disallowed_hugepage_adjust, fast_page_fault, faultin_pfn, hugepage_adjust, page_fault_handle_page_track,
)
from kvmmu.mmu.core._kvm cimport (
    KVM_SHADOW_MMU, REQ_FREE_OBSOLETE_ROOTS, flush_remote_tlbs, kvm, kvm_mmu_page, kvm_page_fault, kvm_vcpu, memslots_of,
    page_list, sp_hpa, sp_level, sp_of, spte_to_child,
)
from kvmmu.mmu.core._page cimport (
    first_spte, forget_new_page, hash_first, link_parent, list_init, new_shadow_page, reserve_pages, sp_has_gptes,
    spte_index, track_possible_nx_huge_page,
)
from kvmmu.mmu.core._pte_list cimport reserve_descs
from kvmmu.mmu.core._rmap cimport slot_of_sp
from kvmmu.mmu.core._slots cimport account_disallow_lpage, account_write_track, gfn_to_memslot, kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_last_spte, is_shadow_present_pte, make_nonleaf_spte, pages_per_hpage
from kvmmu.mmu.core._trace cimport TRACE_GET_PAGE, TRACE_SPTE_REQUESTED, trace
from kvmmu.mmu.core._unsync cimport mark_unsync_child
from kvmmu.mmu.shadow._guest_tables cimport gpte_changed, guest_walk, walk_guest
from kvmmu.mmu.shadow._leaf cimport mmu_set_spte, pte_prefetch
from kvmmu.mmu.shadow._sync cimport mmu_sync_children, sync_page
from kvmmu.mmu.shadow._zap cimport commit_zap, drop_spte, is_obsolete_sp, make_pages_available, prepare_zap_page, zap_spte

cdef enum:
    PAGES_OF_A_FAULT = 8            # one per level, and some
    DESCS_OF_A_FAULT = 32           # parents, the leaf, and its neighbours


# ---- pages -----------------------------------------------------------------------------------------------------------------

cdef int account_shadowed(kvm *k, uint32_t sp) noexcept nogil:
    """Account a shadow of a guest's table: no huge page may map it, and writes to it are tracked. 0, or -1 for want of memory."""
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef kvm_memory_slot *slot = slot_of_sp(k, page, page.gfn)
    if slot is NULL:
        k.stats.bugs += 1
        return 0
    if sp_level(page) > PG_LEVEL_4K:
        if account_write_track(slot, page.gfn, 1):
            return -1
    else:
        account_disallow_lpage(slot, page.gfn, 1)
    k.indirect_shadow_pages += 1
    if k.write_protect_gfn(k, slot, page.gfn, PG_LEVEL_4K):
        flush_remote_tlbs(k)
    return 0


cdef uint32_t find_shadow_page(kvm_vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil:
    """Return the page of (gfn, role), 0 if there is none. Unsync pages of the frame are zapped if it is an upper table now."""
    cdef kvm *k = vcpu.kvm
    cdef uint32_t sp = hash_first(k, gfn), found = 0
    cdef kvm_mmu_page *page
    cdef page_list invalid
    cdef int64_t collisions = 0
    cdef int r
    list_init(&invalid)
    while sp:
        page = &k.pages[sp]
        if is_obsolete_sp(k, page):
            pass
        elif page.gfn != gfn:
            collisions += 1
        elif page.role != role:
            # an upper table may never be unsync
            if role & ROLE_LEVEL_MASK > PG_LEVEL_4K and page.unsync:
                prepare_zap_page(k, sp, &invalid)
        else:
            found = sp
            if not page.role & ROLE_DIRECT_MASK:
                if page.unsync:
                    r = sync_page(vcpu, sp)             # and it stays unsync
                    if r < 0:
                        prepare_zap_page(k, sp, &invalid)
                        found = 0
                        break
                    if r > 0:
                        flush_remote_tlbs(k)
                page.write_flooding_count = 0
            break
        sp = page.hash_next
    commit_zap(k, &invalid)
    k.stats.max_mmu_page_hash_collisions = max(k.stats.max_mmu_page_hash_collisions, collisions)
    return found


cdef uint32_t get_shadow_page(kvm_vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint32_t sp = find_shadow_page(vcpu, gfn, role)
    cdef kvm_mmu_page *page
    cdef bint created = sp == 0
    if created:
        sp = new_shadow_page(k, gfn, role)
        if sp == 0:
            return 0
        if sp_has_gptes(&k.pages[sp]) and account_shadowed(k, sp):
            forget_new_page(k, sp)
            return 0
        k.stats.mmu_cache_miss += 1
    page = &k.pages[sp]
    trace(&k.trace, TRACE_GET_PAGE, page.mmu_valid_gen, gfn, page.role, page.root_count, page.unsync, created)
    return sp


cdef uint32_t child_role(kvm *k, uint64_t sptep, bint direct, uint32_t access) noexcept nogil:
    """Return the role of the page that an entry is to point to."""
    cdef uint32_t parent = sp_of(k, sptep).role
    cdef uint32_t role = (parent - 1) & ~<uint32_t>(ROLE_ACCESS_MASK | ROLE_DIRECT_MASK | ROLE_PASSTHROUGH_MASK)
    role |= access << ROLE_ACCESS_SHIFT
    if direct:
        role |= <uint32_t>ROLE_DIRECT_MASK
    if role & ROLE_HAS_4_BYTE_GPTE_MASK:
        # Half a table of 1024 entries: which one, by the entry of its parent. A direct page has no table to be a part of
        role &= ~<uint32_t>ROLE_QUADRANT_MASK
        if role & ROLE_LEVEL_MASK == PG_LEVEL_4K:
            role |= <uint32_t>(sptep & 1) << ROLE_QUADRANT_SHIFT
    return role


cdef int get_child_page(kvm_vcpu *vcpu, uint64_t sptep, uint64_t gfn, bint direct, uint32_t access, uint32_t *sp) noexcept nogil:
    """Find or make the page below an entry. 1: the entry points to it already; 0: it is to be linked; or a negative errno."""
    cdef kvm *k = vcpu.kvm
    cdef uint64_t spte = k.sptes[sptep]
    cdef uint32_t role = child_role(k, sptep, direct, access), child
    if is_shadow_present_pte(spte) and not is_last_spte(spte, sp_level(sp_of(k, sptep))):
        child = spte_to_child(k, spte)
        if k.pages[child].gfn == gfn and k.pages[child].role == role:
            sp[0] = child
            return 1
    sp[0] = get_shadow_page(vcpu, gfn, role)
    return 0 if sp[0] else -ENOMEM


cdef void link_shadow_page(kvm *k, uint64_t sptep, uint32_t child) noexcept nogil:
    if is_shadow_present_pte(k.sptes[sptep]):
        zap_spte(k, sptep, NULL)
        flush_remote_tlbs(k)
    else:
        drop_spte(k, sptep)                             # an MMIO entry
    k.sptes[sptep] = make_nonleaf_spte(&k.spte, sp_hpa(k, child), (k.pages[child].role & ROLE_AD_DISABLED_MASK) != 0)
    link_parent(k, child, sptep)
    if k.pages[child].unsync or k.pages[child].unsync_children:
        mark_unsync_child(k, sptep)


# ---- from root to leaf -----------------------------------------------------------------------------------------------------

# A place in a walk from the root to a leaf.
cdef struct shadow_walk:
    uint32_t sp                     # 0: the walk ends
    int level
    uint64_t sptep


cdef void shadow_walk_init(kvm_vcpu *vcpu, uint64_t addr, shadow_walk *it) noexcept nogil:
    """Begin at the first page of the root that a guest table stands behind."""
    cdef kvm *k = vcpu.kvm
    it.sp = vcpu.mmu.root.sp
    while it.sp:
        it.level = sp_level(&k.pages[it.sp])
        it.sptep = first_spte(it.sp) + spte_index(addr >> PAGE_SHIFT, it.level)
        if not k.pages[it.sp].special:
            return
        it.sp = spte_to_child(k, k.sptes[it.sptep]) if is_shadow_present_pte(k.sptes[it.sptep]) else 0


cdef void shadow_walk_next(kvm *k, uint64_t addr, shadow_walk *it) noexcept nogil:
    """Go one level down, through an entry that points to a page."""
    it.sp = spte_to_child(k, k.sptes[it.sptep])
    it.level -= 1
    it.sptep = first_spte(it.sp) + spte_index(addr >> PAGE_SHIFT, it.level)


cdef inline uint64_t first_gfn(uint64_t gfn, int level) noexcept nogil:
    return gfn & ~(pages_per_hpage(level) - 1)


cdef int map_direct(kvm_vcpu *vcpu, kvm_page_fault *fault, shadow_walk *it, uint32_t access) noexcept nogil:
    """Do steps 6 and 7: from an entry on the guest's level, or from a direct root, to the leaf."""
    cdef kvm *k = vcpu.kvm
    cdef uint64_t gfn
    cdef uint32_t sp = 0
    cdef int r
    while True:
        if k.spte.nx_huge_pages:
            disallowed_hugepage_adjust(fault, k.sptes[it.sptep], it.level)
        gfn = first_gfn(fault.gfn, it.level)
        if it.level == fault.goal_level:
            break
        r = get_child_page(vcpu, it.sptep, gfn, True, access, &sp)
        if r < 0:
            return r
        if r == 0:
            link_shadow_page(k, it.sptep, sp)
            if fault.huge_page_disallowed and fault.req_level >= it.level:
                track_possible_nx_huge_page(k, sp, KVM_SHADOW_MMU)
        shadow_walk_next(k, fault.addr, it)
    r = mmu_set_spte(vcpu, fault.slot, it.sptep, access, gfn, fault.pfn, fault)
    if r != RET_PF_SPURIOUS:
        pte_prefetch(vcpu, it.sptep)
    return r


cdef int fetch(kvm_vcpu *vcpu, kvm_page_fault *fault, const guest_walk *walk, uint32_t access) noexcept nogil:
    """Do steps 5 to 7."""
    cdef kvm *k = vcpu.kvm
    cdef const kvm_pagewalk *w = vcpu.mmu.w
    cdef shadow_walk it
    cdef uint64_t table_gfn
    cdef uint32_t sp = 0
    cdef int r
    if gpte_changed(vcpu, w, walk, walk.top_level):
        return RET_PF_RETRY
    if vcpu.mmu.root.sp == 0:                           # the dummy root, and the guest's root has memory behind it now
        vcpu.requests |= REQ_FREE_OBSOLETE_ROOTS
        return RET_PF_RETRY
    shadow_walk_init(vcpu, fault.addr, &it)
    if it.sp == 0:                                      # no root for a PDPTE that has memory behind it now
        vcpu.requests |= REQ_FREE_OBSOLETE_ROOTS
        return RET_PF_RETRY
    while it.level > walk.level:
        sp_of(k, it.sptep).write_flooding_count = 0
        table_gfn = walk.table_gfn[it.level - 2]
        r = get_child_page(vcpu, it.sptep, table_gfn, False, walk.pt_access[it.level - 2], &sp)
        if r < 0:
            return r
        if r == 0 and k.pages[sp].unsync_children:
            mmu_sync_children(vcpu, sp)
        if gpte_changed(vcpu, w, walk, it.level - 1):
            return RET_PF_RETRY
        if r == 0:
            link_shadow_page(k, it.sptep, sp)
        shadow_walk_next(k, fault.addr, &it)
    hugepage_adjust(vcpu, fault)                        # by now every table on the way forbids huge pages over itself
    trace(&k.trace, TRACE_SPTE_REQUESTED, fault.gfn, fault.pfn, fault.goal_level)
    sp_of(k, it.sptep).write_flooding_count = 0
    return map_direct(vcpu, fault, &it, access)


# ---- faults ----------------------------------------------------------------------------------------------------------------

cdef inline bint is_stale(kvm_vcpu *vcpu) noexcept nogil:
    """True if the root is obsolete."""
    cdef kvm *k = vcpu.kvm
    cdef uint32_t root = vcpu.mmu.root.sp
    if root and not k.pages[root].special:
        return is_obsolete_sp(k, &k.pages[root])
    return (vcpu.requests & REQ_FREE_OBSOLETE_ROOTS) != 0


cdef int prepare_to_map(kvm_vcpu *vcpu, kvm_page_fault *fault, uint32_t access) noexcept nogil:
    """Reserve memory, find the host page, make room for pages: CONTINUE, or the RET_PF_* or errno that ends the fault."""
    cdef kvm *k = vcpu.kvm
    cdef int r
    if reserve_pages(k, PAGES_OF_A_FAULT) or reserve_descs(&k.lists, DESCS_OF_A_FAULT):
        return -ENOMEM
    r = faultin_pfn(vcpu, fault, access)
    if r != RET_PF_CONTINUE:
        return r
    if is_stale(vcpu):
        return RET_PF_RETRY
    r = make_pages_available(k)
    return r if r < 0 else RET_PF_CONTINUE


cdef void clear_flooding_on_the_way(kvm_vcpu *vcpu, uint64_t addr) noexcept nogil:
    """Clear the flooding counts of the pages that a fault has walked through: the guest uses their tables."""
    cdef kvm *k = vcpu.kvm
    cdef shadow_walk it
    shadow_walk_init(vcpu, addr, &it)
    while it.sp:
        k.pages[it.sp].write_flooding_count = 0
        if not is_shadow_present_pte(k.sptes[it.sptep]) or is_last_spte(k.sptes[it.sptep], it.level):
            return
        shadow_walk_next(k, addr, &it)


cdef int shadow_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    cdef const kvm_pagewalk *w = vcpu.mmu.w
    cdef guest_walk walk
    cdef uint32_t access = <uint32_t>(fault.error_code & ACCESS_PFEC_MASK & ~PFERR_RSVD_MASK) | vcpu.eflags_ac
    cdef int r
    if not walk_guest(vcpu, w, fault.addr, access, &walk):                          # step 1
        vcpu.injected = True
        vcpu.guest_fault = walk.result
        return RET_PF_RETRY
    fault.gfn, fault.max_level = walk.gfn, min(fault.max_level, walk.level)
    fault.slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), walk.gfn)
    if page_fault_handle_page_track(fault):                                         # step 2
        clear_flooding_on_the_way(vcpu, fault.addr)
        return RET_PF_WRITE_PROTECTED
    access = walk.pte_access
    r = prepare_to_map(vcpu, fault, access)                                         # step 3
    if r != RET_PF_CONTINUE:
        return r
    if w.format != KVMMU_FORMAT_EPT and fault.write and not fault.user and fault.slot is not NULL and (
            not w.cpu_role & ROLE_CR0_WP_MASK and not access & ACC_WRITE_MASK):     # step 4
        access = (access | <uint32_t>ACC_WRITE_MASK) & ~<uint32_t>ACC_USER_MASK
        if w.cpu_role & ROLE_CR4_SMEP_MASK:             # U is clear now, so that SMEP would not stop a fetch by the supervisor
            access &= ~<uint32_t>ACC_EXEC_MASK
    return fetch(vcpu, fault, &walk, access)


cdef int nonpaging_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef shadow_walk it
    cdef int r
    fault.max_level = min(fault.max_level, <int>PG_LEVEL_2M)
    if page_fault_handle_page_track(fault):
        return RET_PF_WRITE_PROTECTED
    r = fast_page_fault(vcpu, fault)
    if r != RET_PF_INVALID:
        return r
    r = prepare_to_map(vcpu, fault, <uint32_t>ACC_ALL)
    if r != RET_PF_CONTINUE:
        return r
    hugepage_adjust(vcpu, fault)
    trace(&k.trace, TRACE_SPTE_REQUESTED, fault.gfn, fault.pfn, fault.goal_level)
    shadow_walk_init(vcpu, fault.addr, &it)
    return map_direct(vcpu, fault, &it, <uint32_t>ACC_ALL)
