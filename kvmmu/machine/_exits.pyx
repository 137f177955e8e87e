"""Exits and faults of the guest, as `_exits.pxd` describes them."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, translate_nested_gpa, walk_result
from kvmmu.arch._bits cimport (
    ACCESS_PFEC_MASK, ACC_USER_MASK, EPT_VIOLATION_ACC_INSTR_MASK, EPT_VIOLATION_ACC_WRITE_MASK, EPT_VIOLATION_GVA_NX_MASK,
    EPT_VIOLATION_GVA_TRANSLATED_MASK, EPT_VIOLATION_GVA_USER_MASK, EPT_VIOLATION_GVA_VALID_MASK,
    EPT_VIOLATION_GVA_WRITABLE_MASK, EPT_VIOLATION_PROT_EXEC_MASK, EPT_VIOLATION_PROT_READ_MASK,
    EPT_VIOLATION_PROT_USER_EXEC_MASK, EPT_VIOLATION_PROT_WRITE_MASK, INVALID_GPA, PFERR_FETCH_MASK, PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK, PML_ENTITY_NUM,
    RET_PF_RETRY, ROLE_CR4_SMEP_MASK, STATUS_EPT_MISCONFIG, STATUS_EPT_VIOLATION, STATUS_NON_CANONICAL, STATUS_OK,
    STATUS_PAGE_FAULT, STATUS_PML_FULL,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_EPT
from kvmmu.machine._state cimport access_result, machine, use_arena
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.kvm._entry cimport drain_pml, kvm_mmu_page_fault
from kvmmu.tlb._tlb cimport tlb_invlpg


# ---- exits ---------------------------------------------------------------------------------------------------------------

cdef uint64_t error_code_of_violation(uint64_t qualification, bint mbec) noexcept nogil:
    """Return the page-fault error code that KVM makes of an EPT violation."""
    cdef uint64_t error_code = 0
    if mbec and qualification & EPT_VIOLATION_PROT_USER_EXEC_MASK:
        error_code |= PFERR_PRESENT_MASK
    if qualification & EPT_VIOLATION_ACC_WRITE_MASK:
        error_code |= PFERR_WRITE_MASK
    if qualification & EPT_VIOLATION_ACC_INSTR_MASK:
        error_code |= PFERR_FETCH_MASK
    if qualification & (EPT_VIOLATION_PROT_READ_MASK | EPT_VIOLATION_PROT_WRITE_MASK | EPT_VIOLATION_PROT_EXEC_MASK):
        error_code |= PFERR_PRESENT_MASK
    if qualification & EPT_VIOLATION_GVA_VALID_MASK:
        error_code |= PFERR_GUEST_FINAL_MASK if qualification & EPT_VIOLATION_GVA_TRANSLATED_MASK else PFERR_GUEST_PAGE_MASK
    if qualification & EPT_VIOLATION_GVA_TRANSLATED_MASK and qualification & EPT_VIOLATION_GVA_USER_MASK:
        error_code |= PFERR_USER_MASK
    return error_code


cdef uint64_t error_code_of_exit(const machine *m, const walk_result *r) noexcept nogil:
    """Return the page-fault error code of an exit; an EPT misconfiguration gives RSVD alone."""
    cdef const kvm_pagewalk *w = m.mmu.w
    cdef uint64_t error_code = PFERR_RSVD_MASK
    if r.status == STATUS_EPT_VIOLATION:
        error_code = error_code_of_violation(r.exit_qualification, (m.mmu.root_role & ROLE_CR4_SMEP_MASK) != 0)
    elif r.status != STATUS_EPT_MISCONFIG:
        return r.exit_qualification
    if w is not NULL and w.format != KVMMU_FORMAT_EPT:  # below L1's NPT every access is a user's
        error_code |= PFERR_USER_MASK
    return error_code


cdef void machine_drain_pml(machine *m) noexcept nogil:
    if m.vcpu.pml_page == 0:
        return
    drain_pml(m.vcpu, <uint16_t>m.pml.index)
    m.pml.index = PML_ENTITY_NUM - 1


cdef int handle_exit(machine *m, uint64_t addr, const walk_result *r) noexcept nogil:
    cdef kvm *k = m.k
    cdef int ret
    k.stats.exits += 1
    machine_drain_pml(m)
    if r.status == STATUS_PML_FULL:
        k.stats.pml_full += 1
        return RET_PF_RETRY
    if r.status == STATUS_PAGE_FAULT:                   # of the tables that stand for the guest's
        ret = kvm_mmu_page_fault(m.vcpu, addr, r.error_code)
    else:
        ret = kvm_mmu_page_fault(m.vcpu, r.fault_gpa, error_code_of_exit(m, r))
    use_arena(m)
    return ret


# ---- faults of the guest -------------------------------------------------------------------------------------------------

cdef void set_fault(access_result *out, const walk_result *r) noexcept nogil:
    out.gpa = out.hpa = INVALID_GPA
    out.status, out.error_code = r.status, r.error_code
    out.fault_gpa, out.exit_qualification = INVALID_GPA, 0
    if r.status != STATUS_PAGE_FAULT and r.status != STATUS_NON_CANONICAL:
        out.error_code = 0
        out.fault_gpa, out.exit_qualification = r.fault_gpa, r.exit_qualification


cdef bint take_guest_fault(machine *m, uint64_t addr, const walk_result *exit_, access_result *out) noexcept nogil:
    cdef const kvm_pagewalk *w = m.mmu.w
    cdef walk_result r
    cdef uint64_t gpa = 0, error_code = error_code_of_exit(m, exit_), copied
    cdef bint final
    if not m.k.tdp_enabled:
        tlb_invlpg(m.tlb, addr)
        set_fault(out, &m.vcpu.guest_fault)
        return True
    final = not error_code & PFERR_GUEST_PAGE_MASK
    r.refs = 0
    r.error_code = 0
    r.status = translate_nested_gpa(w, exit_.fault_gpa, <uint32_t>(error_code & ACCESS_PFEC_MASK & ~PFERR_RSVD_MASK), final,
                                    <uint32_t>ACC_USER_MASK if error_code & PFERR_USER_MASK else 0, False, &gpa, &r)
    if r.status == STATUS_OK:
        return False
    tlb_invlpg(m.tlb, addr)                             # combined mappings of the linear address
    r.fault_gpa = exit_.fault_gpa
    if r.status == STATUS_EPT_VIOLATION and exit_.status == STATUS_EPT_VIOLATION:
        copied = EPT_VIOLATION_GVA_VALID_MASK | EPT_VIOLATION_GVA_TRANSLATED_MASK
        if m.advanced_info:
            copied |= EPT_VIOLATION_GVA_USER_MASK | EPT_VIOLATION_GVA_WRITABLE_MASK | EPT_VIOLATION_GVA_NX_MASK
        r.exit_qualification = (r.exit_qualification & ~copied) | (exit_.exit_qualification & copied)
    set_fault(out, &r)
    return True
