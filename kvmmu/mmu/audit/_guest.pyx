"""Shadow pages against the guest's tables, as `_guest.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, PAGE_SHIFT, PG_LEVEL_4K, PT64_INDEX_BITS, ROLE_ACCESS_MASK,
    ROLE_ACCESS_SHIFT, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK,
    ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_MASK, ROLE_QUADRANT_SHIFT, SPTE_BASE_ADDR_MASK,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_EPT, kvmmu_leaf_gpa
from kvmmu.memory._memory cimport kvmmu_read32, kvmmu_read64
from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_mmu_page, sp_level, spte_to_child
from kvmmu.mmu.core._page cimport sp_get_access, sp_get_gfn
from kvmmu.mmu.core._rmap cimport slot_of_sp
from kvmmu.mmu.core._slots cimport kvm_memory_slot
from kvmmu.mmu.core._spte cimport get_mmio_spte_gfn, is_last_spte, is_shadow_present_pte
from kvmmu.mmu.shadow._guest_tables cimport (
    gpte_rights_of, gpte_size, is_accessed_gpte, is_malformed_gpte, is_present_gpte, protect_clean,
)


cdef bint walks(const kvm_mmu *mmu, uint32_t role) noexcept:
    """True if pages of this role shadow tables of the MMU's walk."""
    cdef uint64_t free = ROLE_LEVEL_MASK | ROLE_ACCESS_MASK | ROLE_QUADRANT_MASK | ROLE_PASSTHROUGH_MASK
    return mmu.w is not NULL and not mmu.root_role & ROLE_DIRECT_MASK and not (role ^ mmu.root_role) & ~free


cdef const kvm_pagewalk *shadowed_walk(const kvm *k, uint32_t sp) noexcept:
    cdef size_t i
    for i in range(k.nr_vcpus):
        if walks(&k.vcpus[i].root_mmu, k.pages[sp].role):
            return k.vcpus[i].root_mmu.w
        if walks(&k.vcpus[i].guest_mmu, k.pages[sp].role):
            return k.vcpus[i].guest_mmu.w
    return NULL


cdef uint64_t gpte_index_of(const kvm_mmu_page *page, int i) noexcept:
    """Return the index in its table of the guest's entry that entry i shadows."""
    cdef uint64_t index = i
    if page.role & ROLE_HAS_4_BYTE_GPTE_MASK:
        index |= ((page.role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT) << PT64_INDEX_BITS
        if sp_level(page) > PG_LEVEL_4K:                # 4M are two entries
            index >>= 1
    return index


cdef bint is_wider(const kvm_mmu_page *page, const kvm_pagewalk *w, uint32_t access, uint32_t allowed) noexcept:
    """True if an entry has more rights than the guest's tables give, other than by a supervisor's write with CR0.WP clear."""
    cdef uint32_t more = access & ~allowed
    if more == 0:
        return False
    if more != <uint32_t>ACC_WRITE_MASK or page.role & ROLE_CR0_WP_MASK or w.format == KVMMU_FORMAT_EPT:
        return True
    return (access & ACC_USER_MASK) != 0 or (page.role & ROLE_CR4_SMEP_MASK and access & ACC_EXEC_MASK)


cdef audit_guest_entry(_Findings f, const kvm_pagewalk *w, uint32_t sp, int i, uint64_t spte):
    cdef kvm *k = f.k
    cdef const kvm_mmu_page *page = &k.pages[sp]
    cdef const kvm_mmu_page *child = NULL
    cdef const kvm_memory_slot *slot = slot_of_sp(k, page, page.gfn)
    cdef int level = sp_level(page)
    cdef uint64_t gpa = (page.gfn << PAGE_SHIFT) + gpte_index_of(page, i) * gpte_size(w), gpte, frame, gfn = sp_get_gfn(page, i)
    cdef uint32_t rights, access
    cdef bint table = is_shadow_present_pte(spte) and not is_last_spte(spte, level), leaf
    if slot is NULL:
        return
    gpte = gpa - (slot.base_gfn << PAGE_SHIFT)
    gpte = kvmmu_read32(slot.hva + gpte) if gpte_size(w) == sizeof(uint32_t) else kvmmu_read64(slot.hva + gpte)
    # outside of L1's nested paging EFER.NX and CR4.PSE, which decide what is malformed, are not in the role
    if not is_present_gpte(w, gpte) or (w.is_nested and is_malformed_gpte(w, gpte, level)):
        f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} is not present, or malformed")
        return
    if not is_accessed_gpte(w, gpte) and not slot.readonly:
        f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} was not accessed")
    rights = <uint32_t>((page.role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT) & gpte_rights_of(w, gpte)
    leaf = level == PG_LEVEL_4K or (gpte & w.page_size_mask) != 0
    frame = gpte & SPTE_BASE_ADDR_MASK                  # of a table
    if leaf:
        frame = kvmmu_leaf_gpa(w.format, gpte, level, 0, w.pse36_mask)
        if gpte_size(w) == sizeof(uint32_t) and level > PG_LEVEL_4K and i & 1:
            frame += <uint64_t>1 << (PAGE_SHIFT + PT64_INDEX_BITS)
        if not slot.readonly:
            rights = protect_clean(w, rights, gpte)
    frame >>= PAGE_SHIFT
    if not is_shadow_present_pte(spte):
        if not leaf or get_mmio_spte_gfn(&k.spte, spte) != frame:
            f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} does not map this MMIO")
        return
    access = sp_get_access(page, i)
    if table:
        child = &k.pages[spte_to_child(k, spte)]
        gfn, access = child.gfn, <uint32_t>((child.role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)
        if leaf != ((child.role & ROLE_DIRECT_MASK) != 0):
            f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} is a {'page' if leaf else 'table'}")
            return
    elif not leaf:
        f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} is a table")
        return
    if gfn != frame:
        f.report(sp, gfn, level, spte, f"the guest's entry {gpte:#x} at {gpa:#x} has frame {frame:#x}")
    if is_wider(page, w, access, rights) if leaf else access != rights:
        f.report(sp, gfn, level, spte, f"rights {access}, and the guest's entry {gpte:#x} at {gpa:#x} gives {rights}")
