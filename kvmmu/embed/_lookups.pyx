"""Look-ups and records of walks for a C program; see `_lookups.pxd`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, linear_address, second_stage_access, walk_result, walk_step
from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_USER_MASK, ACCESS_PROBE_MASK, PAGE_SIZE, PG_LEVEL_1G, PT32_INDEX_MASK, PT64_INDEX_MASK,
    PT_GLOBAL_MASK, PT_MAX_LEVELS, STATUS_EPT_MISCONFIG, STATUS_EPT_VIOLATION, STATUS_NESTED_PAGE_FAULT, STATUS_OK,
    STATUS_PML_FULL, STATUS_SPP_EVENT,
)
from kvmmu.arch._format cimport resolved_access
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, kvmmu_gpte_pkey, kvmmu_level_shift
from kvmmu.embed._structs cimport (
    KVMMU_E_ARGUMENT, KVMMU_E_VERSION, KVMMU_EXIT_EPT_MISCONFIG, KVMMU_EXIT_EPT_VIOLATION, KVMMU_EXIT_NONE,
    KVMMU_EXIT_NPF, KVMMU_EXIT_PML_FULL, KVMMU_EXIT_SPP_EVENT, KVMMU_OK, c_vcpu, kvmmu_mapping, kvmmu_nested_result,
    kvmmu_record, kvmmu_second_stage, kvmmu_step, kvmmu_vcpu,
)
from kvmmu.embed._vcpus cimport ANY_ACCESS, enter, fetch_again, is_access, leave, vcpu_asked, walk_row


cdef inline uint32_t resolve(const c_vcpu *v, uint32_t access) noexcept nogil:
    return resolved_access((access | v.ac) & <uint32_t>ANY_ACCESS)


cdef int walk_asked(kvmmu_vcpu handle, uint64_t gva, uint32_t access, const void *out, c_vcpu **v, walk_result *r) noexcept nogil:
    """Walk an address for a function that wants a result. OUT v, r: if it is KVMMU_OK."""
    cdef int code
    v[0] = vcpu_asked(handle, True, out, &code)
    if v[0] is NULL:
        return code
    return walk_row(v[0], gva, access, r) if is_access(access) else KVMMU_E_ARGUMENT


# ---- two stages --------------------------------------------------------------------------------------------------------

cdef uint32_t exit_reason(uint8_t status) noexcept nogil:
    if status == STATUS_EPT_VIOLATION:
        return KVMMU_EXIT_EPT_VIOLATION
    if status == STATUS_EPT_MISCONFIG:
        return KVMMU_EXIT_EPT_MISCONFIG
    if status == STATUS_NESTED_PAGE_FAULT:
        return KVMMU_EXIT_NPF
    if status == STATUS_PML_FULL:
        return KVMMU_EXIT_PML_FULL
    return KVMMU_EXIT_SPP_EVENT if status == STATUS_SPP_EVENT else KVMMU_EXIT_NONE


cdef int c_translate_nested(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_nested_result *out) noexcept nogil:
    cdef walk_result r
    cdef c_vcpu *v
    cdef int code = walk_asked(handle, gva, access, out, &v, &r)
    if code != KVMMU_OK:
        return code
    memset(out, 0, sizeof(kvmmu_nested_result))
    out.gpa, out.ngpa, out.linear = r.gpa, r.ngpa, linear_address(&v.w, gva, resolve(v, access))
    out.pte, out.pte_gpa, out.fault_gpa = r.pte, r.pte_gpa, r.fault_gpa
    out.exit_qualification, out.error_code, out.exit_reason = r.exit_qualification, r.error_code, exit_reason(r.status)
    out.status, out.level, out.rights, out.reads = r.status, r.level, r.pte_access, r.refs
    return KVMMU_OK


cdef int c_get_second_stage(kvmmu_vcpu handle, kvmmu_second_stage *out) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = vcpu_asked(handle, False, out, &code)
    if v is NULL:
        return code
    if out.size != sizeof(kvmmu_second_stage):
        return KVMMU_E_VERSION
    out[0] = v.stage
    if v.n.pml is not NULL and v.stage.flags:
        out.pml_index = v.pml.index
    return KVMMU_OK


# ---- one address -------------------------------------------------------------------------------------------------------

cdef void put_second_stage(const c_vcpu *v, const walk_result *r, kvmmu_mapping *out) noexcept nogil:
    """Narrow a mapping of the first stage to the page and the rights of the second one."""
    cdef const kvm_pagewalk *n = &v.n
    cdef walk_result s
    n.gva_to_gpa(n, r.ngpa, second_stage_access(n, <uint32_t>ACCESS_PROBE_MASK, True, r.pte_access), False, &s)
    if s.status == STATUS_OK:
        out.size = min(out.size, <uint64_t>1 << kvmmu_level_shift(n.format, s.level))
        out.rights &= s.pte_access | <uint8_t>ACC_USER_MASK


cdef void put_mapping(const c_vcpu *v, const walk_result *r, kvmmu_mapping *out) noexcept nogil:
    cdef const kvm_pagewalk *w = &v.w
    memset(out, 0, sizeof(kvmmu_mapping))
    out.gpa, out.pte, out.pte_gpa, out.error_code = r.gpa, r.pte, r.pte_gpa, r.error_code
    out.status, out.level, out.rights = r.status, r.level, r.pte_access
    if r.status != STATUS_OK:
        return
    out.size = PAGE_SIZE
    if r.level:                                     # paging is on
        out.size = <uint64_t>1 << kvmmu_level_shift(w.format, r.level)
    if v.stage.flags:
        put_second_stage(v, r, out)
    if not r.level:
        return
    out.pkey = <uint8_t>kvmmu_gpte_pkey(w.format, r.pte)
    out.accessed = r.pte & w.accessed_mask != 0
    out.dirty = r.pte & (w.accessed_mask << 1) != 0
    out.global_ = r.pte & PT_GLOBAL_MASK != 0


cdef int c_lookup(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_mapping *out) noexcept nogil:
    cdef walk_result r
    cdef c_vcpu *v
    cdef int code = walk_asked(handle, gva, access, out, &v, &r)
    if code != KVMMU_OK:
        return code
    put_mapping(v, &r, out)
    return KVMMU_OK


cdef void put_steps(const c_vcpu *v, uint64_t linear, const walk_step *steps, int n, kvmmu_record *out) noexcept nogil:
    cdef kvmmu_step *to
    cdef bint is_pdpte
    cdef int i
    out.count = <uint32_t>n
    for i in range(n):
        to = &out.steps[i]
        is_pdpte = v.w.level == PG_LEVEL_1G and steps[i].level == PG_LEVEL_1G       # it gives and takes no rights
        to.entry, to.entry_gpa, to.level = steps[i].pte, steps[i].pte_gpa, <uint8_t>steps[i].level
        to.rights = <uint8_t>(ACC_ALL if is_pdpte and steps[i].access else steps[i].access)
        to.index = <uint16_t>(linear >> kvmmu_level_shift(v.w.format, steps[i].level) & (
            PT32_INDEX_MASK if v.w.format == KVMMU_FORMAT_32 else PT64_INDEX_MASK))


cdef int c_record(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_record *out) noexcept nogil:
    cdef int code, n, attempt = 0
    cdef walk_result r
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef uint32_t resolved
    cdef c_vcpu *v = vcpu_asked(handle, True, out, &code)
    if v is NULL:
        return code
    if not is_access(access):
        return KVMMU_E_ARGUMENT
    resolved = resolve(v, access)
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
    put_steps(v, linear_address(&v.w, gva, resolved), steps, n, out)
    return KVMMU_OK
