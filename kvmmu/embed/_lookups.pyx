"""Look-ups and records of walks for a C program; see `_lookups.pxd`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, walk_result, walk_step
from kvmmu.arch._bits cimport (
    ACC_ALL, PAGE_SIZE, PG_LEVEL_1G, PG_LEVEL_4K, PT32_INDEX_MASK, PT64_INDEX_MASK, PT_GLOBAL_MASK,
    PT_MAX_LEVELS, STATUS_OK,
)
from kvmmu.arch._format cimport resolved_access
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, kvmmu_gpte_malformed, kvmmu_gpte_pkey, kvmmu_leaf_gpa, kvmmu_level_shift
from kvmmu.embed._structs cimport (
    KVMMU_ACCESS_NO_AD, KVMMU_ACCESS_PROBE, KVMMU_E_ARGUMENT, KVMMU_OK, c_vcpu, kvmmu_mapping, kvmmu_record,
    kvmmu_step, kvmmu_vcpu,
)
from kvmmu.embed._vcpus cimport PLAIN_ACCESS, enter, fetch_again, is_access, leave, vcpu_asked, walk_row


cdef void put_mapping(const c_vcpu *v, const walk_result *r, kvmmu_mapping *out) noexcept nogil:
    cdef const kvm_pagewalk *w = &v.w
    memset(out, 0, sizeof(kvmmu_mapping))
    out.gpa, out.pte, out.pte_gpa, out.error_code = r.gpa, r.pte, r.pte_gpa, r.error_code
    out.status, out.level, out.rights = r.status, r.level, r.pte_access
    if r.status != STATUS_OK:
        return
    out.size = PAGE_SIZE
    if not r.level:                                 # paging is off
        return
    out.size = <uint64_t>1 << kvmmu_level_shift(w.format, r.level)
    out.pkey = <uint8_t>kvmmu_gpte_pkey(w.format, r.pte)
    out.accessed = r.pte & w.accessed_mask != 0
    out.dirty = r.pte & (w.accessed_mask << 1) != 0
    out.global_ = r.pte & PT_GLOBAL_MASK != 0


cdef void ignore_rights(const kvm_pagewalk *w, uint64_t gva, walk_result *r) noexcept nogil:
    """Turn a walk that its rights have ended into one that succeeded."""
    if not r.level or not r.pte & w.present_mask or (r.level != PG_LEVEL_4K and not r.pte & w.page_size_mask):
        return
    if kvmmu_gpte_malformed(w.format, w.fmt.rsvd_bits_mask[0][r.level - 1], w.fmt.rsvd_bits_mask[1][r.level - 1],
                            w.fmt.bad_mt_xwr, r.pte):
        return
    r.status, r.error_code = STATUS_OK, 0
    r.gpa = kvmmu_leaf_gpa(w.format, r.pte, r.level, gva & w.gva_mask, w.pse36_mask)


cdef int c_lookup(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_mapping *out) noexcept nogil:
    cdef int code
    cdef bint probe = access == KVMMU_ACCESS_PROBE
    cdef walk_result r
    cdef c_vcpu *v = vcpu_asked(handle, out, &code)
    if v is NULL:
        return code
    if not probe and not is_access(access):
        return KVMMU_E_ARGUMENT
    code = walk_row(v, gva, KVMMU_ACCESS_NO_AD if probe else access, &r)
    if code != KVMMU_OK:
        return code
    if probe and r.status != STATUS_OK:
        ignore_rights(&v.w, gva, &r)
    put_mapping(v, &r, out)
    return KVMMU_OK


cdef void put_steps(const c_vcpu *v, uint64_t gva, const walk_step *steps, int n, kvmmu_record *out) noexcept nogil:
    cdef kvmmu_step *to
    cdef bint is_pdpte
    cdef int i
    out.count = <uint32_t>n
    for i in range(n):
        to = &out.steps[i]
        is_pdpte = v.w.level == PG_LEVEL_1G and steps[i].level == PG_LEVEL_1G       # it gives and takes no rights
        to.entry, to.entry_gpa, to.level = steps[i].pte, steps[i].pte_gpa, <uint8_t>steps[i].level
        to.rights = <uint8_t>(ACC_ALL if is_pdpte and steps[i].access else steps[i].access)
        to.index = <uint16_t>((gva & v.w.gva_mask) >> kvmmu_level_shift(v.w.format, steps[i].level) & (
            PT32_INDEX_MASK if v.w.format == KVMMU_FORMAT_32 else PT64_INDEX_MASK))


cdef int c_record(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_record *out) noexcept nogil:
    cdef int code, n, attempt = 0
    cdef walk_result r
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef uint32_t resolved
    cdef c_vcpu *v = vcpu_asked(handle, out, &code)
    if v is NULL:
        return code
    if not is_access(access):
        return KVMMU_E_ARGUMENT
    resolved = resolved_access((access | v.ac) & <uint32_t>PLAIN_ACCESS)
    code = enter(v)
    if code != KVMMU_OK:
        return code
    while True:
        v.w.gva_to_gpa(&v.w, gva, resolved, False, &r)
        n = v.w.walk_steps(&v.w, gva, resolved, steps)
        code = fetch_again(v, attempt)
        if code != 1:
            break
        attempt += 1
    leave(v)
    if code != KVMMU_OK:
        return code
    memset(out, 0, sizeof(kvmmu_record))
    put_mapping(v, &r, &out.end)
    put_steps(v, gva, steps, n, out)
    return KVMMU_OK
