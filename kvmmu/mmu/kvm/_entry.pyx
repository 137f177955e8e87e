"""The way into an MMU, as `_entry.pxd` describes it."""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_USER_MASK, PAGE_SHIFT, PFERR_GUEST_PAGE_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PFERR_WRITE_MASK,
    PML_ENTITY_NUM, PT64_BASE_ADDR_MASK, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED, ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK,
    ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_GUEST_MODE_MASK, ROLE_LEVEL_SHIFT, ROLE_SMM_SHIFT, STATUS_EPT_VIOLATION,
    STATUS_NESTED_PAGE_FAULT, STATUS_PAGE_FAULT,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_EPT
from kvmmu.mmu.core._fault cimport handle_mmio_page_fault, init_direct_fault, init_fault
from kvmmu.mmu.core._kvm cimport (
    REQ_FREE_OBSOLETE_ROOTS, REQ_LOAD_MMU_PGD, REQ_MMU_SYNC, REQ_TLB_FLUSH, REQ_TLB_FLUSH_GUEST, ROOTS_ALL, ROOT_CURRENT, kvm,
    kvm_mmu, kvm_page_fault, kvm_vcpu, memslots_of,
)
from kvmmu.mmu.core._page cimport first_spte, free_page
from kvmmu.mmu.core._slots cimport gfn_to_memslot, kvm_memory_slot, mark_slot_dirty
from kvmmu.mmu.shadow._roots cimport (
    free_obsolete_roots, free_shadow_roots, load_shadow_root, prev_roots_of, sync_prev_roots,
)
from kvmmu.mmu.shadow._sync cimport mmu_invalidate_addr, sync_roots
from kvmmu.mmu.shadow._track cimport unprotect_gfn
from kvmmu.mmu.tdp._tdp cimport tdp_get_root, tdp_page_fault, tdp_put_root


cdef int write_protect_fault(kvm_vcpu *vcpu, uint64_t addr, uint64_t error_code) noexcept nogil:
    """Handle a write to a frame that holds shadowed tables: KVM carries it out, unless it can zap their shadow pages instead."""
    cdef uint64_t walked = PFERR_PRESENT_MASK | PFERR_WRITE_MASK | PFERR_GUEST_PAGE_MASK
    cdef bint again = vcpu.last_retry_eip == vcpu.rip and vcpu.last_retry_addr == addr
    if again:                                           # it was repeated once already: now it is carried out
        return RET_PF_EMULATE
    vcpu.last_retry_eip = vcpu.last_retry_addr = 0
    if vcpu.mmu.root_role & ROLE_DIRECT_MASK and error_code & walked == walked:
        # the processor's own update of A and D in a table, which nobody can emulate
        if unprotect_gfn(vcpu.kvm, vcpu.as_id, addr >> PAGE_SHIFT):
            return RET_PF_RETRY
    vcpu.allow_retry = not vcpu.guest_mode
    return RET_PF_EMULATE


cdef bint unprotect_and_retry(kvm_vcpu *vcpu, uint64_t addr, uint64_t gfn) noexcept nogil:
    if not unprotect_gfn(vcpu.kvm, vcpu.as_id, gfn):
        return False
    vcpu.last_retry_eip, vcpu.last_retry_addr = vcpu.rip, addr
    return True


cdef uint32_t walker_error_code(const kvm_vcpu *vcpu, const walk_result *r) noexcept nogil:
    """Return P and RSVD of the walk that failed; exit information of a second stage has them in a form of its own."""
    if r.status == STATUS_NESTED_PAGE_FAULT:
        return <uint32_t>r.exit_qualification
    if r.status == STATUS_EPT_VIOLATION:
        return <uint32_t>PFERR_PRESENT_MASK if r.pte & vcpu.mmu.w.present_mask else 0
    return r.error_code


cdef void account_guest_fault(kvm_vcpu *vcpu, uint64_t addr, const walk_result *r, bint by_ngpa_walk) noexcept nogil:
    cdef kvm_mmu *mmu = vcpu.mmu
    cdef uint32_t error_code = walker_error_code(vcpu, r)
    cdef bint stale = error_code & PFERR_PRESENT_MASK and not error_code & PFERR_RSVD_MASK
    if not by_ngpa_walk:
        vcpu.kvm.stats.pf_guest += 1
    # an entry that grants more than the guest's tables would fault here for ever
    if stale and by_ngpa_walk == vcpu.kvm.tdp_enabled:
        mmu_invalidate_addr(vcpu, mmu, addr, ROOT_CURRENT)
    # a violation drops the processor's translations of the address by the same tables, whatever else is in the EPTP
    if by_ngpa_walk and mmu.w.format == KVMMU_FORMAT_EPT and not error_code & PFERR_RSVD_MASK and (
            r.status == STATUS_EPT_VIOLATION or r.status == STATUS_PAGE_FAULT):
        mmu_invalidate_addr(vcpu, mmu, addr, prev_roots_of(mmu, mmu.root.pgd, PT64_BASE_ADDR_MASK))


cdef int kvm_mmu_page_fault(kvm_vcpu *vcpu, uint64_t addr, uint64_t error_code) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef bint direct = (vcpu.mmu.root_role & ROLE_DIRECT_MASK) != 0
    cdef kvm_page_fault fault
    cdef int r = RET_PF_INVALID
    if not vcpu.mmu.root.valid:
        return RET_PF_RETRY
    k.trace.vcpu = vcpu.id
    if error_code & PFERR_RSVD_MASK:
        r = handle_mmio_page_fault(vcpu, addr, direct)
        if r == RET_PF_EMULATE:
            return r
    if r == RET_PF_INVALID:
        k.stats.pf_taken += 1
        init_fault(vcpu, &fault, addr, error_code)
        if direct:
            init_direct_fault(vcpu, &fault)
        vcpu.injected = vcpu.allow_retry = False
        r = vcpu.mmu.page_fault(vcpu, &fault)
        if r == RET_PF_INVALID:
            k.stats.bugs += 1
            return -EIO
        if vcpu.injected:
            account_guest_fault(vcpu, addr, &vcpu.guest_fault, k.tdp_enabled)
    if r < 0:
        return r
    if r == RET_PF_WRITE_PROTECTED:
        r = write_protect_fault(vcpu, addr, error_code)
    if r == RET_PF_FIXED:
        k.stats.pf_fixed += 1
    elif r == RET_PF_EMULATE:
        k.stats.pf_emulate += 1
    elif r == RET_PF_SPURIOUS:
        k.stats.pf_spurious += 1
    return r


cdef uint32_t tdp_root_role(const kvm *k, int level, bint smm, bint guest_mode, bint gmet) noexcept nogil:
    cdef uint64_t role = ROLE_CR0_WP_MASK | ROLE_EFER_NX_MASK | ROLE_DIRECT_MASK
    cdef uint64_t access = ACC_ALL & ~ACC_USER_MASK if gmet else ACC_ALL     # supervisors may fetch from U=0 alone
    role |= (<uint64_t>level << ROLE_LEVEL_SHIFT) | (access << ROLE_ACCESS_SHIFT) | (<uint64_t>smm << ROLE_SMM_SHIFT)
    if gmet:
        role |= ROLE_CR4_SMEP_MASK
    if guest_mode:
        role |= ROLE_GUEST_MODE_MASK
    if not k.spte.ad:
        role |= ROLE_AD_DISABLED_MASK
    return <uint32_t>role


# ---- roots -----------------------------------------------------------------------------------------------------------------

cdef void free_tdp_root(kvm *k, kvm_mmu *mmu) noexcept nogil:
    if mmu.root.valid:
        tdp_put_root(k, mmu.root.sp)
    mmu.root.valid = False
    mmu.root.sp = 0


cdef void free_mmu_roots(kvm_vcpu *vcpu, kvm_mmu *mmu) noexcept nogil:
    if mmu.page_fault == tdp_page_fault:
        free_tdp_root(vcpu.kvm, mmu)
    else:
        free_shadow_roots(vcpu.kvm, mmu, ROOTS_ALL)
    vcpu.mmio_gva = 0


cdef void drain_pml(kvm_vcpu *vcpu, uint16_t index) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef kvm_memory_slot *slot
    cdef uint64_t gfn
    cdef int i
    for i in range(<uint16_t>(index + 1), PML_ENTITY_NUM):     # past zero: the log is full, and its first entry is 0
        gfn = k.sptes[first_spte(vcpu.pml_page) + i] >> PAGE_SHIFT
        slot = gfn_to_memslot(memslots_of(k, vcpu.as_id), gfn)
        if slot is not NULL:
            mark_slot_dirty(slot, gfn)


cdef void free_top_page(kvm *k, uint32_t *sp) noexcept nogil:
    if sp[0]:
        free_page(k, sp[0])
        sp[0] = 0


cdef void free_mmu_pages(kvm_vcpu *vcpu, kvm_mmu *mmu) noexcept nogil:
    free_mmu_roots(vcpu, mmu)
    free_top_page(vcpu.kvm, &mmu.pae_root)
    free_top_page(vcpu.kvm, &mmu.pml4_root)
    free_top_page(vcpu.kvm, &mmu.pml5_root)


cdef void free_vcpu_pages(kvm_vcpu *vcpu) noexcept nogil:
    if vcpu.pml_page:
        drain_pml(vcpu, vcpu.pml_index)
        free_page(vcpu.kvm, vcpu.pml_page)
        vcpu.pml_page = 0
    free_mmu_pages(vcpu, &vcpu.root_mmu)
    free_mmu_pages(vcpu, &vcpu.guest_mmu)


cdef int load_tdp_root(kvm_vcpu *vcpu) noexcept nogil:
    cdef kvm_mmu *mmu = vcpu.mmu
    if not mmu.root.valid:
        mmu.root.sp = tdp_get_root(vcpu.kvm, mmu.root_role)
        mmu.root.valid = mmu.root.sp != 0
        vcpu.requests |= REQ_TLB_FLUSH                  # of the same root, too: flushes under another one did not reach them
    return 0 if mmu.root.valid else -ENOMEM


cdef int prepare_mmu(kvm_vcpu *vcpu) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    if vcpu.requests & REQ_FREE_OBSOLETE_ROOTS:
        vcpu.requests &= ~<uint32_t>REQ_FREE_OBSOLETE_ROOTS
        if k.tdp_enabled:
            free_tdp_root(k, &vcpu.root_mmu)
            free_obsolete_roots(k, &vcpu.guest_mmu)
        else:
            free_obsolete_roots(k, &vcpu.root_mmu)
    if vcpu.requests & REQ_MMU_SYNC:
        vcpu.requests &= ~<uint32_t>REQ_MMU_SYNC
        sync_roots(vcpu)
    if vcpu.requests & REQ_TLB_FLUSH_GUEST:             # every root that there still is agrees with the guest's tables again
        vcpu.requests = (vcpu.requests & ~<uint32_t>REQ_TLB_FLUSH_GUEST) | REQ_TLB_FLUSH
        sync_roots(vcpu)
        sync_prev_roots(k, vcpu.mmu)
    vcpu.requests &= ~<uint32_t>REQ_LOAD_MMU_PGD
    if vcpu.mmu.page_fault == tdp_page_fault:
        return load_tdp_root(vcpu)
    return load_shadow_root(vcpu)
