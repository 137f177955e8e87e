"""What is behind a walk, for people: its entries, and the rule that ended it."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._bits cimport (
    ACC_ALL, ACCESS_FETCH_MASK, ACCESS_PFEC_MASK, ACCESS_WRITE_MASK, EPT_VIOLATION_ACC_INSTR_MASK,
    EPT_VIOLATION_ACC_WRITE_MASK, INVALID_GPA, PAGE_SHIFT, PFERR_GUEST_PAGE_MASK, PFERR_PK_MASK, PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK, PT32_INDEX_BITS, PT64_INDEX_BITS, PT_MAX_LEVELS, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK,
    STATUS_NESTED_PAGE_FAULT,
)
from kvmmu._format cimport PageFormat
from kvmmu._walk cimport kvm_pagewalk, walk_result, walk_step

from kvmmu.record import WalkStep


cdef list walk_steps(const kvm_pagewalk *w, uint64_t addr, uint32_t access):
    """The entries of a walk, root first."""
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef int i, n = w.walk_steps(w, addr, access, steps)
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
    """The rule behind an error code."""
    if not error_code & PFERR_PRESENT_MASK:
        return "hole" if r.hole else "not-present"
    if error_code & PFERR_RSVD_MASK:
        return "reserved"
    return fmt.rule(r.pte_access, access, pkey_denied=bool(error_code & PFERR_PK_MASK))


cdef object second_stage_rule(PageFormat fmt, const walk_result *r, uint32_t access):
    """The rule behind an EPT violation or a nested page fault, from what the exit tells."""
    cdef uint64_t info = r.exit_qualification
    if r.status == STATUS_NESTED_PAGE_FAULT:
        if info & PFERR_GUEST_PAGE_MASK:
            access = 0
        return entry_rule(fmt, r, info & 0xffffffff, (info & ACCESS_PFEC_MASK) | (access & ACCESS_FETCH_MASK))
    if not r.pte_access:
        return "hole" if r.hole else "not-present"
    if info & EPT_VIOLATION_ACC_WRITE_MASK:
        return fmt.rule(r.pte_access, ACCESS_WRITE_MASK)
    if info & EPT_VIOLATION_ACC_INSTR_MASK:
        return "nx"
    return fmt.rule(r.pte_access, 0)
