"""Recorded page faults held against the walk; see `_recorded_faults.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, translate_nested_gpa, walk_result
from kvmmu.arch._bits cimport (
    ACC_ALL, ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, OP_NPT_FAULT, OP_PAGE_FAULT,
    PFERR_GUEST_FINAL_MASK, STATUS_NESTED_PAGE_FAULT, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.replay._recorded_faults cimport FAULT_CODES, fault_count, fault_counts


cdef inline uint32_t access_of(uint64_t code) noexcept nogil:
    """Return the access that a fault tells of, as far as its error code or EXITINFO1 knows."""
    return <uint32_t>(code & (ACCESS_WRITE_MASK | ACCESS_USER_MASK | ACCESS_FETCH_MASK))


cdef inline bint faults_with(const kvm_pagewalk *w, uint64_t gva, uint32_t access, uint64_t code) noexcept nogil:
    cdef walk_result r
    w.gva_to_gpa(w, gva, access, False, &r)
    return r.status == STATUS_PAGE_FAULT and r.error_code == code


cdef bint reproduces_page_fault(const kvm_pagewalk *w, uint64_t gva, uint64_t code) noexcept nogil:
    cdef uint32_t access = access_of(code)
    # A supervisor's fault does not tell EFLAGS.AC: SMAP faults only with it clear, all others with it set too.
    if not access & ACCESS_USER_MASK and faults_with(w, gva, access | <uint32_t>ACCESS_AC_MASK, code):
        return True
    return faults_with(w, gva, access, code)


cdef bint reproduces_npt_fault(const kvm_pagewalk *n, uint64_t gpa, uint64_t info) noexcept nogil:
    cdef walk_result r
    cdef uint64_t reached
    r.refs, r.error_code = 0, 0
    if n.fault_status != STATUS_NESTED_PAGE_FAULT:
        return False
    if translate_nested_gpa(n, gpa, access_of(info), (info & PFERR_GUEST_FINAL_MASK) != 0, ACC_ALL, False, &reached,
                            &r) == STATUS_OK:
        return False
    return r.exit_qualification == info and r.fault_gpa == gpa


cdef bint count_fault(fault_counts *counts, int op, uint64_t code) noexcept nogil:
    cdef fault_count *f
    cdef size_t i
    for i in range(FAULT_CODES):
        f = &counts.of_code[i]
        if not f.count:
            f.op, f.code = <uint8_t>op, code
        if f.op == op and f.code == code:
            f.count += 1
            return True
    return False


cdef dict faults_found(fault_counts *faults):
    cdef fault_count *of_code = faults.of_code
    cdef int i
    return {(int(of_code[i].op), int(of_code[i].code)): int(of_code[i].count) for i in range(FAULT_CODES) if of_code[i].count}


cdef int restore_faults(fault_counts *faults, counts) except -1:
    memset(faults, 0, sizeof(fault_counts))
    for place, ((op, code), count) in enumerate(counts.items()):
        if place == FAULT_CODES or op not in (OP_PAGE_FAULT, OP_NPT_FAULT) or count < 1:
            raise ValueError(f"{count} faults of code {code}: they are of no replay like this")
        faults.of_code[place] = fault_count(op=op, code=code, count=count)
    return 0
