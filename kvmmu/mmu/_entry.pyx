"""The way into an MMU, as `_entry.pxd` describes it."""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._bits cimport (
    ACC_ALL, ACC_USER_MASK, PAGE_SHIFT, PFERR_GUEST_PAGE_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PFERR_WRITE_MASK,
    RET_PF_EMULATE, RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED, ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK,
    ROLE_GUEST_MODE_MASK, ROLE_LEVEL_SHIFT, ROLE_SMM_SHIFT,
)
from kvmmu.mmu._fault cimport handle_mmio_page_fault, init_direct_fault, init_fault
from kvmmu.mmu._kvm cimport REQ_FREE_OBSOLETE_ROOTS, kvm, kvm_page_fault, kvm_vcpu
from kvmmu.mmu._tdp cimport tdp_get_root, tdp_page_fault, tdp_put_root


cdef int write_protect_fault(kvm_vcpu *vcpu, uint64_t addr, uint64_t error_code) noexcept nogil:
    """A write to a frame that holds shadowed tables: carried out for the guest, unless the tables can go instead."""
    cdef uint64_t walked = PFERR_PRESENT_MASK | PFERR_WRITE_MASK | PFERR_GUEST_PAGE_MASK
    if vcpu.mmu.root_role & ROLE_DIRECT_MASK and error_code & walked == walked and vcpu.kvm.unprotect_gfn is not NULL:
        # the processor's own update of A and D in a table, which nobody can emulate
        if vcpu.kvm.unprotect_gfn(vcpu.kvm, addr >> PAGE_SHIFT):
            return RET_PF_RETRY
    return RET_PF_EMULATE


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
        r = vcpu.mmu.page_fault(vcpu, &fault)
        if r == RET_PF_INVALID:
            k.stats.bugs += 1
            return -EIO
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


cdef void free_mmu_root(kvm_vcpu *vcpu) noexcept nogil:
    if vcpu.mmu.root.valid:
        tdp_put_root(vcpu.kvm, vcpu.mmu.root.sp)
    vcpu.mmu.root.valid = False
    vcpu.mmu.root.sp = 0


cdef int load_tdp_mmu(kvm_vcpu *vcpu, uint32_t role) noexcept nogil:
    if vcpu.mmu.root.valid and vcpu.mmu.root_role == role and not vcpu.requests & REQ_FREE_OBSOLETE_ROOTS:
        return 0
    free_mmu_root(vcpu)
    vcpu.requests &= ~<uint32_t>REQ_FREE_OBSOLETE_ROOTS
    vcpu.mmu.page_fault = tdp_page_fault
    vcpu.mmu.w = NULL
    vcpu.mmu.root_role = role
    vcpu.mmu.root.sp = tdp_get_root(vcpu.kvm, role)
    vcpu.mmu.root.valid = vcpu.mmu.root.sp != 0
    return 0 if vcpu.mmu.root.valid else -ENOMEM
