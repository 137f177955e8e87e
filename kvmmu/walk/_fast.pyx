"""The walk of one address when nothing stands in its way; see `_fast.pxd`. The steps are those listed in `_walk.pxd`."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, vcpu_arch
from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_EXEC_MASK, ACC_READ_MASK, ACC_USER_MASK, ACC_WRITE_MASK, ACCESS_WRITE_MASK, INVALID_GPA,
    PERMISSIONS_INDEX_SHIFT, PG_LEVEL_1G, PG_LEVEL_256T, PG_LEVEL_2M, PG_LEVEL_4K, PG_LEVEL_512G, PT64_NX_MASK,
    PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, ROLE_DIRECT_MASK, ROLE_HAS_4_BYTE_GPTE_MASK,
)
from kvmmu.arch._format cimport explicit_access
from kvmmu.arch._gpte cimport (
    KVMMU_FORMAT_32, KVMMU_FORMAT_64, kvmmu_is_good_pdpte, kvmmu_pdpte_gpa, kvmmu_pdpte_index,
)
from kvmmu.arch._linear cimport kvmmu_linear_address
from kvmmu.memory._memory cimport guest_mem, kvmmu_read64
from kvmmu.walk._fast cimport (
    KVMMU_FAST_ACCESSES, kvmmu_fast_walk, kvmmu_fast_access, kvmmu_fast_tables, kvmmu_translation, fast_walk,
)


cdef kvmmu_translation no_fast_walk(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                    uint32_t access) noexcept nogil:
    cdef kvmmu_translation none
    none.gpa = INVALID_GPA
    none.error_code = none.status = none.level = 0
    return none


cdef kvmmu_translation fast_walk_2_levels(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                          uint32_t access) noexcept nogil:
    return kvmmu_fast_walk(KVMMU_FORMAT_32, PG_LEVEL_2M, p, arch.cr3, arch.keys, gva, access)


cdef kvmmu_translation fast_walk_pae(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                     uint32_t access) noexcept nogil:
    cdef uint64_t pdpte = arch.pdptrs[kvmmu_pdpte_index(gva)]
    if not kvmmu_is_good_pdpte(pdpte, 0):
        return no_fast_walk(p, arch, gva, access)
    return kvmmu_fast_walk(KVMMU_FORMAT_64, PG_LEVEL_2M, p, pdpte, arch.keys, gva, access)


cdef kvmmu_translation fast_walk_pae_in_memory(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                               uint32_t access) noexcept nogil:
    cdef uint64_t offset = kvmmu_pdpte_gpa(arch.cr3, kvmmu_pdpte_index(gva)) - p.slot_gpa, pdpte
    if offset >= p.slot_size:
        return no_fast_walk(p, arch, gva, access)
    pdpte = kvmmu_read64(p.hva + offset)
    if not kvmmu_is_good_pdpte(pdpte, p.pdpte_rsvd_mask):
        return no_fast_walk(p, arch, gva, access)
    return kvmmu_fast_walk(KVMMU_FORMAT_64, PG_LEVEL_2M, p, pdpte, arch.keys, gva, access)


cdef kvmmu_translation fast_walk_4_levels(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                          uint32_t access) noexcept nogil:
    return kvmmu_fast_walk(KVMMU_FORMAT_64, PG_LEVEL_512G, p, arch.cr3, arch.keys, gva, access)


cdef kvmmu_translation fast_walk_5_levels(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                          uint32_t access) noexcept nogil:
    return kvmmu_fast_walk(KVMMU_FORMAT_64, PG_LEVEL_256T, p, arch.cr3, arch.keys, gva, access)


cdef kvmmu_translation fast_walk_4_levels_untagged(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                                   uint32_t access) noexcept nogil:
    return fast_walk_4_levels(p, arch, kvmmu_linear_address(&p.linear, gva, access), access)


cdef kvmmu_translation fast_walk_5_levels_untagged(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                                   uint32_t access) noexcept nogil:
    return fast_walk_5_levels(p, arch, kvmmu_linear_address(&p.linear, gva, access), access)


# ---- what is asked of entries ------------------------------------------------------------------------------------------

cdef bint allows(uint16_t permissions, uint32_t rights) noexcept nogil:
    return not (permissions >> rights) & 1


cdef void init_fast_access(kvmmu_fast_access *a, uint16_t permissions, bint write, uint64_t accessed_mask) noexcept nogil:
    """Rights that must be there, and rights that must not, if that is all that permissions say."""
    cdef uint32_t always = <uint32_t>ACC_ALL, never = <uint32_t>(ACC_WRITE_MASK | ACC_USER_MASK | ACC_EXEC_MASK), rights
    cdef bint known
    for rights in range(<uint32_t>ACC_ALL + 1):
        if rights & ACC_READ_MASK and allows(permissions, rights):
            always &= rights
            never &= ~rights
    known = not never & ACC_EXEC_MASK               # NX in any one entry withholds it: no question to an AND
    for rights in range(<uint32_t>ACC_ALL + 1):
        if rights & ACC_READ_MASK and allows(permissions, rights) != (rights & always == always and not rights & never):
            known = False
    # P, W and U are the same bits in entries as in rights
    a.wanted = PT_PRESENT_MASK | (always & (ACC_WRITE_MASK | ACC_USER_MASK)) | accessed_mask
    a.mask = a.wanted | never
    a.upper_denied = PT64_NX_MASK if always & ACC_EXEC_MASK else 0
    a.leaf_wanted = accessed_mask << 1 if write else 0
    if not known:
        a.mask, a.wanted = 0, PT_PRESENT_MASK


cdef void init_fast_walk(fast_walk *fast, const kvm_pagewalk *w) noexcept nogil:
    cdef kvmmu_fast_tables *p = &fast.p
    cdef kvmmu_fast_access *a
    cdef uint64_t rsvd_upper = w.page_size_mask
    cdef int level
    cdef uint32_t i, access
    memset(fast, 0, sizeof(fast_walk))
    fast.gva_to_gpa = no_fast_walk
    if w.ngpa is not NULL or w.is_nested or not w.cpu_role or w.cpu_role & ROLE_DIRECT_MASK or ~w.address_mask:
        return
    if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK:
        fast.gva_to_gpa = fast_walk_2_levels
    elif w.page_size_mask != PT_PAGE_SIZE_MASK:     # 8-byte entries always have large pages
        return
    elif w.level == PG_LEVEL_1G:
        fast.gva_to_gpa = fast_walk_pae_in_memory if w.pdptes_in_memory else fast_walk_pae
        p.pdpte_rsvd_mask = w.pdpte_rsvd_mask
    elif w.level == PG_LEVEL_512G:
        fast.gva_to_gpa = fast_walk_4_levels
        fast.four_levels = True
    elif w.level == PG_LEVEL_256T:
        fast.gva_to_gpa = fast_walk_5_levels
    p.page_size_mask, p.pse36_mask, p.gva_mask = w.page_size_mask, w.pse36_mask, w.gva_mask
    p.fmt, p.linear = w.fmt, w.linear
    if w.pre_processes:                             # a walk for its own sake, so that the others need not ask
        fast.four_levels = False
        fast.gva_to_gpa = fast_walk_4_levels_untagged if w.level == PG_LEVEL_512G else fast_walk_5_levels_untagged
    for level in range(PG_LEVEL_2M if w.level == PG_LEVEL_1G else w.level, PG_LEVEL_4K, -1):    # PDPTEs are checked apart
        rsvd_upper |= w.fmt.rsvd_bits_mask[0][level - 1]
    for i in range(<uint32_t>KVMMU_FAST_ACCESSES):
        a = &p.accesses[i]
        access = explicit_access(i << PERMISSIONS_INDEX_SHIFT)
        init_fast_access(a, w.fmt.permissions[access >> PERMISSIONS_INDEX_SHIFT], access & ACCESS_WRITE_MASK != 0,
                         w.accessed_mask)
        for level in range(PG_LEVEL_1G):
            a.leaf_mask[level] = a.leaf_wanted | a.upper_denied | w.fmt.rsvd_bits_mask[1][level]
        a.leaf_mask[0] |= w.fmt.rsvd_bits_mask[0][0]            # bit 7 of a PTE is PAT
        a.upper_denied |= rsvd_upper
    if w.mem is not NULL:
        use_fast_memory(fast, w.mem)


cdef void use_fast_memory(fast_walk *fast, const guest_mem *mem) noexcept nogil:
    fast.p.slot_gpa, fast.p.slot_size = mem.slots[0].gpa, mem.slots[0].size
    fast.p.hva = mem.slots[0].hva
