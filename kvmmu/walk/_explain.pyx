"""Records and faults of a walk: its entries, and the rule that ended it."""

from dataclasses import replace

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport (
    kvm_pagewalk, linear_address, second_stage_access, table_access, translate_nested_gpa, walk_result, walk_step,
)
from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_USER_MASK, ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_PFEC_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_USER_MASK,
    ACCESS_WRITE_MASK, EPT_VIOLATION_ACC_INSTR_MASK, EPT_VIOLATION_ACC_WRITE_MASK, EPT_VIOLATION_SHADOW_STACK_MASK,
    INVALID_GPA, PAGE_SHIFT, PFERR_GUEST_PAGE_MASK, PFERR_PK_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PT32_INDEX_BITS,
    PT64_INDEX_BITS, PT_MAX_LEVELS, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK, STATUS_EPT_MISCONFIG, STATUS_LASS_VIOLATION,
    STATUS_NESTED_PAGE_FAULT, STATUS_NON_CANONICAL, SPP_EVENT_NOT_VALID_MASK, STATUS_OK, STATUS_PAGE_FAULT, STATUS_PML_FULL,
    STATUS_SPP_EVENT,
)
from kvmmu.arch._format cimport PageFormat, explicit_access, resolved_access
from kvmmu.walk._register_sets cimport WalkCopy

from kvmmu.arch._bits import Access, Status
from kvmmu.arch.faults import fault_of, nested_fault_of
from kvmmu.arch.second_stages import Ept
from kvmmu.walk.record import WalkRecord, WalkStep


cdef list walk_steps(const kvm_pagewalk *w, uint64_t addr, uint32_t access):
    """Return the entries of a walk, root first."""
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef int i, n = w.walk_steps(w, addr, access, steps)
    addr = linear_address(w, addr, access)
    cdef int bits = PT32_INDEX_BITS if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else PT64_INDEX_BITS
    acc, entries = int(ACC_ALL), []
    for i in range(n):
        is_pdpte = steps[i].level == 3 and (w.cpu_role & ROLE_LEVEL_MASK) == 3
        rights = int(ACC_ALL) if is_pdpte and steps[i].access else int(steps[i].access)     # it gives and takes none
        acc &= rights
        entries.append(WalkStep(
            level=steps[i].level, index=int((addr >> (PAGE_SHIFT + bits * (steps[i].level - 1))) & ((1 << bits) - 1)),
            gpa=None if steps[i].pte_gpa == INVALID_GPA else int(steps[i].pte_gpa), entry=int(steps[i].pte),
            access=rights, pte_access=acc))
    return entries


cdef object entry_rule(PageFormat fmt, const walk_result *r, uint64_t error_code, uint32_t access):
    """Return the rule behind an error code."""
    if not error_code & PFERR_PRESENT_MASK:
        return "hole" if r.hole else "not-present"
    if error_code & PFERR_RSVD_MASK:
        return "reserved"
    return fmt.rule(
        r.pte_access, access, pkey_denied=bool(error_code & PFERR_PK_MASK), shadow_stack=bool(r.shadow_stack))


cdef object second_stage_rule(PageFormat fmt, const walk_result *r, uint32_t access):
    """Return the rule behind an EPT violation or a nested page fault, from what the exit tells."""
    cdef uint64_t info = r.exit_qualification
    if r.status == STATUS_NESTED_PAGE_FAULT:
        if info & PFERR_GUEST_PAGE_MASK:
            access = 0
        return entry_rule(fmt, r, info & 0xffffffff, (info & ACCESS_PFEC_MASK) | (access & ACCESS_FETCH_MASK))
    if not r.pte_access:
        return "hole" if r.hole else "not-present"
    if info & EPT_VIOLATION_SHADOW_STACK_MASK:
        access = (access & ACCESS_USER_MASK) | ACCESS_SHADOW_STACK_MASK | (
            ACCESS_WRITE_MASK if info & EPT_VIOLATION_ACC_WRITE_MASK else 0)
        return fmt.rule(r.pte_access, access, shadow_stack=bool(r.shadow_stack))
    if info & EPT_VIOLATION_ACC_WRITE_MASK:
        return fmt.rule(r.pte_access, ACCESS_WRITE_MASK)
    if info & EPT_VIOLATION_ACC_INSTR_MASK:
        return "nx"
    return fmt.rule(r.pte_access, 0)


cdef object rule_of(WalkCopy walk, const walk_result *r, uint32_t access):
    """Return the rule behind a fault, as one word."""
    if r.status == STATUS_NON_CANONICAL:
        return "non-canonical"
    if r.status == STATUS_LASS_VIOLATION:
        return "lass"
    if r.status == STATUS_PAGE_FAULT:
        return entry_rule(walk.fmt, r, r.error_code, access)
    if r.status == STATUS_EPT_MISCONFIG:
        return "misconfig"
    if r.status == STATUS_PML_FULL:
        return "pml-full"
    if r.status == STATUS_SPP_EVENT:
        return "sppt-miss" if r.exit_qualification & SPP_EVENT_NOT_VALID_MASK else "sppt-misconfig"
    return second_stage_rule(walk.second.fmt, r, access)


cdef object fault_behind(WalkCopy walk, const walk_result *r, uint64_t addr, uint32_t access):
    details = {"address": int(addr), "access": Access(access), "level": int(r.level), "entry": int(r.pte),
               "entry_gpa": int(r.pte_gpa) if r.pte_gpa != INVALID_GPA else None, "rule": rule_of(walk, r, access)}
    if r.status in (STATUS_PAGE_FAULT, STATUS_NON_CANONICAL, STATUS_LASS_VIOLATION):
        return fault_of(r.status, error_code=int(r.error_code), **details)
    return nested_fault_of(
        r.status, fault_gpa=int(r.fault_gpa), exit_qualification=int(r.exit_qualification), **details)


cdef object record_of(WalkCopy walk, uint64_t addr, uint32_t access):
    cdef const kvm_pagewalk *w = &walk.w
    cdef walk_result r
    if w.is_nested:
        return second_record(walk, addr, access & ~<uint32_t>ACCESS_AC_MASK, True, access)
    w.gva_to_gpa(w, addr, resolved_access(access), False, &r)
    steps = walk_steps(w, addr, resolved_access(access))
    addr = linear_address(w, addr, access)
    final = None
    if walk.second is not None:
        asked = int(table_access(&walk.n, access))
        steps = [replace(step, nested=second_record(walk, step.gpa, asked, False, 0)) if step.gpa is not None else step
                 for step in steps]
        if r.ngpa != INVALID_GPA:
            final = second_record(walk, r.ngpa, explicit_access(access), True, r.pte_access if r.status == STATUS_OK else (
                steps[-1].pte_access if steps else int(ACC_ALL)))
    return WalkRecord(
        gva=int(addr), access=Access(access), status=Status(r.status), gpa=int(r.gpa) if r.status == STATUS_OK else None,
        error_code=int(r.error_code), level=int(r.level), rule=None if r.status == STATUS_OK else rule_of(walk, &r, access),
        steps=tuple(steps), mode_bits=32 if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else 64, refs=int(r.refs), final=final,
        ngpa=int(r.ngpa) if walk.second is not None and r.ngpa != INVALID_GPA else None,
        exit_qualification=int(r.exit_qualification))


cdef object second_record(WalkCopy walk, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access):
    """Return the record of one walk of the second stage."""
    cdef const kvm_pagewalk *n = &walk.n
    cdef walk_result r
    cdef uint64_t gpa = 0
    if walk.w.is_nested:                    # by itself: U says whether the first stage would grant the page to users
        pte_access = <uint32_t>(ACC_ALL if access & ACCESS_USER_MASK else ACC_ALL & ~ACC_USER_MASK)
    r.refs = 0
    r.error_code = 0
    status = translate_nested_gpa(n, ngpa, access, final, pte_access, False, &gpa, &r)
    r.status = status
    steps = walk_steps(n, ngpa & n.gva_mask, second_stage_access(n, access, final, pte_access))
    if isinstance(walk.second.stage, Ept):
        steps = [replace(step, ept=True) for step in steps]
    return WalkRecord(
        gva=int(ngpa), access=Access(access), status=Status(status), gpa=int(gpa) if status == STATUS_OK else None,
        error_code=0, level=steps[-1].level if steps else 0, rule=None if status == STATUS_OK else rule_of(walk, &r, access),
        steps=tuple(steps), mode_bits=32 if n.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else 64, refs=int(r.refs),
        exit_qualification=int(r.exit_qualification) if status != STATUS_OK else 0)
