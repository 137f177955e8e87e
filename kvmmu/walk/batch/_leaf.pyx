"""May this leaf be used: the last entry of one row; see `_leaf.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_WRITE_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_4K,
)
from kvmmu.arch._format cimport KVMMU_ACCESS_INFO_SHIFT, kvm_page_format, permission_fault
from kvmmu.arch._gpte cimport (
    kvmmu_gpte_access, kvmmu_gpte_malformed, kvmmu_gpte_pkey, kvmmu_gpte_rights, kvmmu_gpte_shadow_stack,
    kvmmu_leaf_gpa,
)
from kvmmu.walk.batch._kernels cimport (
    PSCE_ACCESSED_CLEAR_SHIFT, PSCE_ACCESS_SHIFT, kvmmu_leaf_rules, kvmmu_psce_level, kvmmu_read_entry,
)
from kvmmu.walk.batch._leaf cimport LEAF_FAULT, LEAF_OK, LEAF_SLOW, leaf_result


cdef int check_leaf(const kvmmu_leaf_rules *rules, uint64_t psce, uint64_t entry, uint64_t addr, uint64_t access_info,
                    leaf_result *out) noexcept nogil:
    cdef int format = rules.format
    cdef const kvm_page_format *fmt = rules.fmt
    cdef uint32_t level = <uint32_t>kvmmu_psce_level(psce), access = <uint8_t>(access_info >> KVMMU_ACCESS_INFO_SHIFT), asked
    cdef uint64_t pte, need = rules.accessed_mask
    pte = out.pte = kvmmu_read_entry(format, entry)
    out.pte_access = <uint32_t>((psce >> PSCE_ACCESS_SHIFT) & kvmmu_gpte_access(format, kvmmu_gpte_rights(format, pte)))
    out.error = 0
    if not pte & rules.present_mask:                                                                    # step 3
        return LEAF_FAULT
    if kvmmu_gpte_malformed(format, fmt.rsvd_bits_mask[0][level - 1], fmt.rsvd_bits_mask[1][level - 1], fmt.bad_mt_xwr, pte):
        out.error = <uint32_t>(PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
        return LEAF_FAULT
    if level > PG_LEVEL_4K and not pte & rules.page_size_mask:
        return LEAF_SLOW
    asked = out.pte_access
    if access & ACCESS_SHADOW_STACK_MASK:
        asked |= <uint32_t>kvmmu_gpte_shadow_stack(format, psce >> PSCE_ACCESS_SHIFT, pte)
    out.error = permission_fault(fmt, rules.keys, asked, kvmmu_gpte_pkey(format, pte), access)
    if out.error:
        return LEAF_FAULT
    out.gpa = kvmmu_leaf_gpa(format, pte & rules.address_mask, level, addr, rules.pse36_mask)
    if access & ACCESS_WRITE_MASK:
        need |= need << 1
    if access & ACCESS_PROBE_MASK:
        return LEAF_OK
    if need & ~pte or (need and (psce >> PSCE_ACCESSED_CLEAR_SHIFT) & 1):
        return LEAF_SLOW
    return LEAF_OK
