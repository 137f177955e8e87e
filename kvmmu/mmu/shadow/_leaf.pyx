"""Leaf entries of shadow pages, as `_leaf.pxd` describes them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    ACC_WRITE_MASK, PG_LEVEL_4K, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED, ROLE_ACCESS_MASK,
    ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_DIRECT_MASK, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE,
)
from kvmmu.mmu.core._fault cimport fault_make_mmio_spte, fault_make_spte, trace_mark_mmio_spte
from kvmmu.mmu.core._kvm cimport (
    flush_remote_tlbs, kvm, kvm_mmu_page, kvm_page_fault, kvm_vcpu, memslots_of, sp_level, sp_of, spte_to_child,
)
from kvmmu.mmu.core._page cimport sp_get_access, sp_get_gfn, sp_set_translation, unlink_parent
from kvmmu.mmu.core._rmap cimport RMAP_RECYCLE_THRESHOLD, rmap_add
from kvmmu.mmu.core._slots cimport HOST_READONLY, HOST_UNMAPPED, gfn_to_memslot, host_page_of, host_pfn_of, kvm_memory_slot
from kvmmu.mmu.core._spte cimport (
    get_mmio_spte_gfn, is_last_spte, is_mmio_spte, is_mmu_writable_spte, is_shadow_present_pte, spte_to_pfn,
)
from kvmmu.mmu.core._trace cimport TRACE_SET_SPTE, trace
from kvmmu.mmu.shadow._guest_tables cimport (
    first_gpte_gpa, gpte_rights_of, gpte_size, gpte_to_gfn, is_accessed_gpte, is_malformed_gpte, is_present_gpte,
    protect_clean, read_guest_pte,
)
from kvmmu.mmu.shadow._zap cimport drop_spte, zap_rmap

cdef enum:
    PTE_PREFETCH_NUM = 8


cdef inline int sptep_index(uint64_t sptep) noexcept nogil:
    return <int>(sptep % SPTE_ENT_PER_PAGE)


cdef inline uint32_t role_access(const kvm_mmu_page *sp) noexcept nogil:
    return <uint32_t>((sp.role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)


cdef inline bint loses_write(const kvm *k, uint64_t old, uint64_t new) noexcept nogil:
    """True if a TLB may still allow writes that the new entry must not allow."""
    return is_mmu_writable_spte(&k.spte, old) and not is_mmu_writable_spte(&k.spte, new)


# ---- a fault ---------------------------------------------------------------------------------------------------------------

cdef int mmu_set_spte(kvm_vcpu *vcpu, kvm_memory_slot *slot, uint64_t sptep, uint32_t access, uint64_t gfn, uint64_t pfn,
                      const kvm_page_fault *fault) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef kvm_mmu_page *sp = sp_of(k, sptep)
    cdef int level = sp_level(sp), ret = RET_PF_FIXED
    cdef uint64_t old = k.sptes[sptep], new
    cdef bint prefetch = fault is NULL or fault.prefetch, host_writable = fault is NULL or fault.map_writable
    cdef bint flush = False, was_rmapped = False, wrprot
    if is_shadow_present_pte(old):
        if prefetch and is_last_spte(old, level) and spte_to_pfn(old) == pfn:
            return RET_PF_SPURIOUS
        if not is_last_spte(old, level):                # a table where the page goes
            unlink_parent(k, spte_to_child(k, old), sptep)
            k.sptes[sptep] = SHADOW_NONPRESENT_VALUE
            flush = True
        elif spte_to_pfn(old) != pfn:
            drop_spte(k, sptep)
            flush = True
        else:
            was_rmapped = True
    if slot is NULL:
        drop_spte(k, sptep)
        sp_set_translation(sp, sptep_index(sptep), gfn, access)
        k.sptes[sptep] = fault_make_mmio_spte(k, gfn, access)
        k.stats.pf_mmio_spte_created += 1
        trace_mark_mmio_spte(k, sptep, gfn, access)
        if flush:
            flush_remote_tlbs(k)
        return RET_PF_EMULATE
    old = k.sptes[sptep]
    wrprot = fault_make_spte(k, sp.role, slot, access, gfn, pfn, old, prefetch, True, False, host_writable, &new)
    if new == old:
        ret = RET_PF_SPURIOUS
    else:
        flush |= was_rmapped and loses_write(k, old, new)
        k.sptes[sptep] = new
        trace(&k.trace, TRACE_SET_SPTE, gfn, new, sptep, level)
    if wrprot and fault is not NULL and fault.write:
        ret = RET_PF_WRITE_PROTECTED
    if flush:
        flush_remote_tlbs(k)
    if was_rmapped:
        sp_set_translation(sp, sptep_index(sptep), gfn, access)
    elif rmap_add(k, slot, sptep, gfn, access) > RMAP_RECYCLE_THRESHOLD:
        zap_rmap(k, slot, gfn, level)
        flush_remote_tlbs(k)
    return ret


# ---- prefetch --------------------------------------------------------------------------------------------------------------

cdef bint prefetch_frame(kvm_vcpu *vcpu, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil:
    """Map a frame that no access has asked for, if it needs no work of the host; False: do not go on."""
    cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), gfn)
    cdef uint8_t host_page
    if slot is NULL or slot.invalid or slot.readonly or (slot.dirty_log and access & ACC_WRITE_MASK):
        return False
    host_page = host_page_of(slot, gfn)
    if host_page & (HOST_UNMAPPED | HOST_READONLY):
        return False
    mmu_set_spte(vcpu, slot, sptep, access, gfn, host_pfn_of(slot, gfn, host_page), NULL)
    return True


cdef bint is_usable_gpte(const kvm_pagewalk *w, uint64_t gpte, int level) noexcept nogil:
    """True if an entry may be mapped before the guest accesses its page."""
    return is_present_gpte(w, gpte) and is_accessed_gpte(w, gpte) and not is_malformed_gpte(w, gpte, level)


cdef void prefetch_indirect(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t sptep) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint64_t first = sptep & ~<uint64_t>(PTE_PREFETCH_NUM - 1), gpte, gpa
    cdef const kvm_mmu_page *sp = sp_of(k, sptep)
    cdef int i
    gpa = first_gpte_gpa(sp) + (first % SPTE_ENT_PER_PAGE) * gpte_size(w)
    for i in range(PTE_PREFETCH_NUM):
        if first + i == sptep or is_shadow_present_pte(k.sptes[first + i]):
            continue
        if not read_guest_pte(vcpu, w, gpa + i * gpte_size(w), &gpte):
            return
        if not is_usable_gpte(w, gpte, PG_LEVEL_4K):
            drop_spte(k, first + i)
            return
        if not prefetch_frame(vcpu, first + i, gpte_to_gfn(w, gpte),
                              protect_clean(w, role_access(sp) & gpte_rights_of(w, gpte), gpte)):
            return


cdef int prefetch_run(kvm_vcpu *vcpu, uint64_t sptep, int n) noexcept nogil:
    """Map n frames in a row, up to the first that cannot be mapped; returns how many."""
    cdef const kvm_mmu_page *sp = sp_of(vcpu.kvm, sptep)
    cdef uint64_t gfn = sp_get_gfn(sp, sptep_index(sptep))
    cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), gfn)
    cdef int i
    if slot is NULL or gfn + n > slot.base_gfn + slot.npages:
        return 0
    for i in range(n):
        if not prefetch_frame(vcpu, sptep + i, gfn + i, role_access(sp)):
            return i
    return n


cdef void prefetch_direct(kvm_vcpu *vcpu, uint64_t sptep) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint64_t first = sptep & ~<uint64_t>(PTE_PREFETCH_NUM - 1)
    cdef int start = 0, end
    while start < PTE_PREFETCH_NUM:
        end = start
        while end < PTE_PREFETCH_NUM and first + end != sptep and not is_shadow_present_pte(k.sptes[first + end]):
            end += 1
        if end > start and prefetch_run(vcpu, first + start, end - start) == 0:
            return
        start = end + 1


cdef void pte_prefetch(kvm_vcpu *vcpu, uint64_t sptep) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef const kvm_mmu_page *sp = sp_of(k, sptep)
    if sp_level(sp) > PG_LEVEL_4K or k.mmu_invalidate_start != k.mmu_invalidate_end:
        return
    if not sp.role & ROLE_DIRECT_MASK:
        prefetch_indirect(vcpu, vcpu.mmu.w, sptep)
    elif not sp.role & ROLE_AD_DISABLED_MASK:           # without A bits a page that nobody uses would look used
        prefetch_direct(vcpu, sptep)


# ---- synchronization -------------------------------------------------------------------------------------------------------

cdef int sync_mmio_spte(kvm *k, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil:
    if get_mmio_spte_gfn(&k.spte, k.sptes[sptep]) != gfn:
        k.sptes[sptep] = SHADOW_NONPRESENT_VALUE
        return 1
    k.sptes[sptep] = fault_make_mmio_spte(k, gfn, access)
    trace_mark_mmio_spte(k, sptep, gfn, access)
    return 0


cdef int sync_spte(kvm_vcpu *vcpu, uint64_t sptep) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef const kvm_pagewalk *w = vcpu.mmu.w
    cdef kvm_mmu_page *sp = sp_of(k, sptep)
    cdef int i = sptep_index(sptep)
    cdef uint64_t old = k.sptes[sptep], new, gpte, gfn
    cdef uint32_t access
    cdef kvm_memory_slot *slot
    if old == SHADOW_NONPRESENT_VALUE:
        return 0
    if not read_guest_pte(vcpu, w, first_gpte_gpa(sp) + i * gpte_size(w), &gpte):
        return -1
    if not is_usable_gpte(w, gpte, PG_LEVEL_4K):
        drop_spte(k, sptep)
        return 1
    gfn = gpte_to_gfn(w, gpte)
    access = protect_clean(w, role_access(sp) & gpte_rights_of(w, gpte), gpte)
    if is_mmio_spte(&k.spte, old) and not is_shadow_present_pte(old):
        return sync_mmio_spte(k, sptep, gfn, access)
    if gfn != sp_get_gfn(sp, i):
        drop_spte(k, sptep)
        return 1
    if access == sp_get_access(sp, i):
        return 0
    slot = gfn_to_memslot(memslots_of(k, vcpu.as_id), gfn)
    fault_make_spte(k, sp.role, slot, access, gfn, spte_to_pfn(old), old, True, True, True,
                    (old & k.spte.host_writable_mask) != 0, &new)
    sp_set_translation(sp, i, gfn, access)
    k.sptes[sptep] = new
    return 1 if loses_write(k, old, new) else 0
