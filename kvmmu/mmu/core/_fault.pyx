"""The part of a page fault that both MMUs share, as `_fault.pxd` describes it."""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    ACC_READ_MASK, ACC_WRITE_MASK, MEMSLOT_GEN_UPDATE_IN_PROGRESS, MMIO_SPTE_GEN_MASK, PAGE_SHIFT, PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK, PG_LEVEL_4K, PT_WRITABLE_MASK, RET_PF_CONTINUE,
    RET_PF_EMULATE, RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS, ROLE_DIRECT_MASK, ROLE_LEVEL_MASK,
    SHADOW_NONPRESENT_VALUE,
)
from kvmmu.mmu.core._kvm cimport (
    invalidation_under_way, kvm, kvm_page_fault, kvm_vcpu, memslots_of, spte_to_child,
)
from kvmmu.mmu.core._page cimport first_spte, spte_index
from kvmmu.mmu.core._slots cimport (
    HOST_READONLY, HOST_UNMAPPED, HOST_VERSION_SHIFT, SLOT_VERSIONS, gfn_to_memslot,
    host_page_of, host_pfn_of, is_write_tracked, kvm_memory_slot, mark_slot_dirty, max_mapping_level,
)
from kvmmu.mmu.core._spte cimport (
    get_mmio_spte_access, get_mmio_spte_generation, get_mmio_spte_gfn, is_access_track_spte, is_last_spte, is_mmio_spte,
    is_mmu_writable_spte, is_rsvd_spte, is_shadow_present_pte, is_writable_pte, make_mmio_spte, make_spte, pages_per_hpage,
    restore_acc_track_spte, spte_permission_fault, spte_request,
)
from kvmmu.mmu.core._trace cimport (
    TRACE_CHECK_MMIO_SPTE, TRACE_FAST_PAGE_FAULT, TRACE_HANDLE_MMIO_PAGE_FAULT, TRACE_MARK_MMIO_SPTE, trace,
)
from kvmmu.mmu.core._unsync cimport UNSYNC_OK, try_to_unsync


cdef void init_fault(kvm_vcpu *vcpu, kvm_page_fault *fault, uint64_t addr, uint64_t error_code) noexcept nogil:
    fault.addr = addr
    fault.error_code = error_code
    fault.exec = (error_code & PFERR_FETCH_MASK) != 0
    fault.write = (error_code & PFERR_WRITE_MASK) != 0
    fault.present = (error_code & PFERR_PRESENT_MASK) != 0
    fault.rsvd = (error_code & PFERR_RSVD_MASK) != 0
    fault.user = (error_code & PFERR_USER_MASK) != 0
    fault.prefetch = False
    fault.max_level = vcpu.kvm.spte.max_huge_page_level
    fault.req_level = fault.goal_level = PG_LEVEL_4K
    fault.huge_page_disallowed = fault.map_writable = False
    fault.host_page = 0
    fault.gfn = fault.pfn = 0
    fault.slot = NULL


cdef void init_direct_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    fault.gfn = fault.addr >> PAGE_SHIFT
    fault.slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), fault.gfn)


cdef bint page_fault_handle_page_track(const kvm_page_fault *fault) noexcept nogil:
    if fault.rsvd or not fault.present or not fault.write or fault.slot is NULL:
        return False
    return is_write_tracked(fault.slot, fault.gfn)


# ---- the host ----------------------------------------------------------------------------------------------------------

cdef void move_host_page(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    cdef uint8_t page = slot.host_page[gfn - slot.base_gfn]
    cdef int version = ((page >> HOST_VERSION_SHIFT) + 1) % SLOT_VERSIONS
    slot.host_page[gfn - slot.base_gfn] = <uint8_t>((page & ((1 << HOST_VERSION_SHIFT) - 1)) | (version << HOST_VERSION_SHIFT))


cdef int populate(kvm *k, kvm_page_fault *fault) noexcept nogil:
    """Let the host map a page: the zero page for a read, a page of its own for a write."""
    cdef kvm_memory_slot *slot = fault.slot
    cdef uint64_t i = fault.gfn - slot.base_gfn
    if fault.host_page & HOST_UNMAPPED:
        slot.host_page[i] &= ~HOST_UNMAPPED
        if not fault.write:
            slot.host_page[i] |= HOST_READONLY
        else:
            slot.host_page[i] &= ~HOST_READONLY
        fault.host_page = slot.host_page[i]
        return RET_PF_CONTINUE
    # copy-on-write: the zero page goes, its notifier finds every mapping of it
    slot.host_page[i] &= ~HOST_READONLY
    move_host_page(slot, fault.gfn)
    fault.host_page = slot.host_page[i]
    k.unmap_gfns(k, slot, fault.gfn, fault.gfn + 1)
    return RET_PF_RETRY


cdef void host_writes(kvm *k, kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    cdef uint8_t page = host_page_of(slot, gfn)
    if not page & (HOST_UNMAPPED | HOST_READONLY):
        return
    slot.host_page[gfn - slot.base_gfn] &= ~(HOST_UNMAPPED | HOST_READONLY)
    if page & HOST_READONLY:
        move_host_page(slot, gfn)
        k.unmap_gfns(k, slot, gfn, gfn + 1)


cdef void host_reads(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil:
    if host_page_of(slot, gfn) & HOST_UNMAPPED:
        slot.host_page[gfn - slot.base_gfn] = (slot.host_page[gfn - slot.base_gfn] & ~HOST_UNMAPPED) | HOST_READONLY


cdef int faultin_noslot(kvm_vcpu *vcpu, kvm_page_fault *fault, uint32_t access) noexcept nogil:
    cdef bint direct = (vcpu.mmu.root_role & ROLE_DIRECT_MASK) != 0
    cache_mmio(vcpu, 0 if direct else fault.addr, fault.gfn, access)
    # a guest wider than its host: an entry has no room for the frame, so every access to it exits
    if not vcpu.kvm.spte.mmio_caching or fault.gfn >> (vcpu.kvm.spte.maxphyaddr - PAGE_SHIFT):
        return RET_PF_EMULATE
    return RET_PF_CONTINUE


cdef int faultin_pfn(kvm_vcpu *vcpu, kvm_page_fault *fault, uint32_t access) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef kvm_memory_slot *slot = fault.slot
    cdef int r
    if slot is NULL:
        return faultin_noslot(vcpu, fault, access)
    if slot.invalid or invalidation_under_way(k, fault.gfn):
        return RET_PF_RETRY
    if slot.readonly and fault.write:
        return RET_PF_EMULATE
    fault.host_page = host_page_of(slot, fault.gfn)
    if fault.host_page & HOST_UNMAPPED or (fault.host_page & HOST_READONLY and fault.write):
        r = populate(k, fault)
        if r != RET_PF_CONTINUE:
            return r
    fault.pfn = host_pfn_of(slot, fault.gfn, fault.host_page)
    fault.map_writable = not slot.readonly and not fault.host_page & HOST_READONLY
    return RET_PF_CONTINUE


# ---- size ----------------------------------------------------------------------------------------------------------------

cdef void hugepage_adjust(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    fault.huge_page_disallowed = fault.exec and vcpu.kvm.spte.nx_huge_pages
    if fault.max_level == PG_LEVEL_4K or fault.slot is NULL or fault.slot.dirty_log:
        return
    fault.req_level = max_mapping_level(fault.slot, fault.gfn, fault.max_level, fault.host_page)
    if fault.req_level == PG_LEVEL_4K or fault.huge_page_disallowed:
        return
    fault.goal_level = fault.req_level
    fault.pfn &= ~(pages_per_hpage(fault.goal_level) - 1)


cdef void disallowed_hugepage_adjust(kvm_page_fault *fault, uint64_t spte, int level) noexcept nogil:
    cdef uint64_t part
    if level > PG_LEVEL_4K and level == fault.goal_level and is_shadow_present_pte(spte) and not is_last_spte(spte, level):
        part = pages_per_hpage(level) - pages_per_hpage(level - 1)
        fault.pfn |= fault.gfn & part
        fault.goal_level -= 1


# ---- the present entry -------------------------------------------------------------------------------------------------

cdef void walk_sptes(const kvm *k, uint32_t root, uint64_t addr, spte_walk *walk) noexcept nogil:
    cdef uint64_t gfn = addr >> PAGE_SHIFT
    cdef uint32_t sp = root
    cdef int level
    walk.level = 0
    walk.spte = SHADOW_NONPRESENT_VALUE
    walk.sptep = 0
    if sp == 0:
        return
    level = <int>(k.pages[sp].role & ROLE_LEVEL_MASK)
    while True:
        walk.level = level
        walk.sptep = first_spte(sp) + spte_index(gfn, level)
        walk.spte = k.sptes[walk.sptep]
        if not is_shadow_present_pte(walk.spte) or is_last_spte(walk.spte, level):
            return
        sp = spte_to_child(k, walk.spte)
        level -= 1


cdef int fast_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef spte_walk walk
    cdef uint64_t new
    cdef int ret = RET_PF_INVALID
    if fault.rsvd:
        return RET_PF_INVALID
    if not fault.present:
        if k.spte.ad:
            return RET_PF_INVALID
    elif not fault.write:
        return RET_PF_INVALID
    walk_sptes(k, vcpu.mmu.root.sp, fault.addr, &walk)
    if not is_shadow_present_pte(walk.spte):
        return RET_PF_INVALID
    new = walk.spte
    if not spte_permission_fault(&k.spte, vcpu.mmu.fmt, walk.spte, fault.error_code):
        ret = RET_PF_SPURIOUS
    else:
        if is_access_track_spte(&k.spte, walk.spte):
            new = restore_acc_track_spte(&k.spte, new)
        new |= k.spte.accessed_mask
        if fault.write and is_mmu_writable_spte(&k.spte, walk.spte):
            if walk.level > PG_LEVEL_4K and fault.slot is not NULL and fault.slot.dirty_log:
                return RET_PF_INVALID                   # a huge page has to be split first
            new |= PT_WRITABLE_MASK
        if new == walk.spte or spte_permission_fault(&k.spte, vcpu.mmu.fmt, new, fault.error_code):
            return RET_PF_INVALID
        k.sptes[walk.sptep] = new
        if is_writable_pte(new) and not is_writable_pte(walk.spte) and fault.slot is not NULL:
            mark_slot_dirty(fault.slot, fault.gfn)
        ret = RET_PF_FIXED
        k.stats.pf_fast += 1
    trace(&k.trace, TRACE_FAST_PAGE_FAULT, vcpu.id, fault.addr, fault.error_code, walk.sptep, walk.spte, new, ret)
    return ret


# ---- the new entry -------------------------------------------------------------------------------------------------------

cdef bint fault_make_spte(kvm *k, uint32_t role, kvm_memory_slot *slot, uint32_t access, uint64_t gfn, uint64_t pfn,
                          uint64_t old, bint prefetch, bint can_unsync, bint synchronizing, bint host_writable,
                          uint64_t *spte) noexcept nogil:
    cdef int level = <int>(role & ROLE_LEVEL_MASK)
    cdef spte_request q
    cdef bint wrprot = False
    if access & ACC_WRITE_MASK and host_writable:
        # a writable leaf in the same place: the guest could write before
        if not (is_shadow_present_pte(old) and is_last_spte(old, level) and is_writable_pte(old)):
            wrprot = try_to_unsync(k, slot, gfn, can_unsync and not synchronizing, prefetch) != UNSYNC_OK
    q.role, q.access, q.pfn = role, access, pfn
    q.prefetch, q.synchronizing, q.host_writable = prefetch, synchronizing, host_writable
    q.may_write = not wrprot
    spte[0] = make_spte(&k.spte, &q)
    if is_writable_pte(spte[0]) and slot is not NULL:
        mark_slot_dirty(slot, gfn)
    return wrprot


# ---- MMIO ----------------------------------------------------------------------------------------------------------------

cdef inline uint64_t mmio_generation(const kvm *k) noexcept nogil:
    return k.memslot_gen & MMIO_SPTE_GEN_MASK


cdef void cache_mmio(kvm_vcpu *vcpu, uint64_t gva, uint64_t gfn, uint32_t access) noexcept nogil:
    if vcpu.kvm.memslot_gen & MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return
    vcpu.mmio_gva = 0 if vcpu.mmu == &vcpu.guest_mmu else gva >> PAGE_SHIFT << PAGE_SHIFT     # an nGPA is no linear address
    vcpu.mmio_gfn, vcpu.mmio_gen = gfn, vcpu.kvm.memslot_gen
    vcpu.mmio_access = <uint32_t>((access & vcpu.kvm.spte.mmio_access_mask) | ACC_READ_MASK)


cdef bint is_mmio_cached(const kvm_vcpu *vcpu, uint64_t addr, bint direct) noexcept nogil:
    if vcpu.mmio_gen != vcpu.kvm.memslot_gen:
        return False
    if direct:
        return vcpu.mmio_gfn != 0 and vcpu.mmio_gfn == addr >> PAGE_SHIFT
    return vcpu.mmio_gva != 0 and vcpu.mmio_gva == addr >> PAGE_SHIFT << PAGE_SHIFT


cdef uint64_t fault_make_mmio_spte(kvm *k, uint64_t gfn, uint32_t access) noexcept nogil:
    return make_mmio_spte(&k.spte, gfn, access, mmio_generation(k))


cdef void trace_mark_mmio_spte(kvm *k, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil:
    trace(&k.trace, TRACE_MARK_MMIO_SPTE, sptep, gfn, access & k.spte.mmio_access_mask, mmio_generation(k))


cdef bint is_current_mmio_spte(kvm *k, uint64_t spte) noexcept nogil:
    cdef uint64_t gen = get_mmio_spte_generation(spte)
    if k.memslot_gen & MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    trace(&k.trace, TRACE_CHECK_MMIO_SPTE, mmio_generation(k), gen, spte)
    return gen == mmio_generation(k)


cdef int handle_mmio_page_fault(kvm_vcpu *vcpu, uint64_t addr, bint direct) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef spte_walk walk
    cdef uint64_t gfn
    cdef uint32_t access
    if is_mmio_cached(vcpu, addr, direct):
        return RET_PF_EMULATE
    walk_sptes(k, vcpu.mmu.root.sp, addr, &walk)
    if is_shadow_present_pte(walk.spte) and is_rsvd_spte(vcpu.mmu.fmt, walk.spte, walk.level):
        return -EINVAL
    if not is_mmio_spte(&k.spte, walk.spte):
        return RET_PF_RETRY                             # zapped meanwhile
    if not is_current_mmio_spte(k, walk.spte):
        return RET_PF_INVALID
    gfn = get_mmio_spte_gfn(&k.spte, walk.spte)
    access = get_mmio_spte_access(&k.spte, walk.spte)
    trace(&k.trace, TRACE_HANDLE_MMIO_PAGE_FAULT, addr, gfn, access)
    cache_mmio(vcpu, 0 if direct else addr, gfn, access)
    return RET_PF_EMULATE
