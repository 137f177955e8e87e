"""Entries of guest tables in the format of the walk that a shadow MMU shadows."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result, walk_step
from kvmmu.arch._bits cimport (
    ACC_WRITE_MASK, PAGE_SHIFT, PT64_INDEX_BITS, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_QUADRANT_MASK, ROLE_QUADRANT_SHIFT,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, kvmmu_gpte_access, kvmmu_gpte_malformed, kvmmu_gpte_rights, kvmmu_leaf_gpa
from kvmmu.memory._memory cimport kvmmu_read32, kvmmu_read64
from kvmmu.mmu.core._kvm cimport kvm_mmu_page, kvm_vcpu, memslots_of
from kvmmu.mmu.core._slots cimport HOST_UNMAPPED, gfn_to_memslot, host_page_of, kvm_memory_slot

# A walk of the guest's tables that succeeded, level by level.
cdef struct guest_walk:
    walk_result result
    int level                       # of the leaf
    int top_level                   # of the first entry whose table is shadowed
    uint64_t ptes[5]                # [level - 1], as the walk left them
    uint64_t pte_gpa[5]
    uint64_t table_gfn[5]           # the table that the entry of this level lies in
    uint32_t pt_access[5]           # ACC_*: AND over the levels above this one
    uint32_t pte_access             # ACC_*: of the page; no W while D is clear and the access does not write
    uint64_t gfn


cdef inline bint read_guest_pte(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t gpa, uint64_t *gpte) noexcept nogil:
    """Read an entry; False if the host would have to map the table first. OUT gpte."""
    cdef const kvm_memory_slot *slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), gpa >> PAGE_SHIFT)
    cdef const uint8_t *hva
    if slot is NULL or host_page_of(slot, gpa >> PAGE_SHIFT) & HOST_UNMAPPED:
        return False
    hva = slot.hva + (gpa - (slot.base_gfn << PAGE_SHIFT))
    gpte[0] = kvmmu_read32(hva) if w.format == KVMMU_FORMAT_32 else kvmmu_read64(hva)
    return True


cdef inline uint64_t gpte_size(const kvm_pagewalk *w) noexcept nogil:
    return sizeof(uint32_t) if w.format == KVMMU_FORMAT_32 else sizeof(uint64_t)


cdef inline bint is_present_gpte(const kvm_pagewalk *w, uint64_t gpte) noexcept nogil:
    return (gpte & w.present_mask) != 0


cdef inline bint is_malformed_gpte(const kvm_pagewalk *w, uint64_t gpte, int level) noexcept nogil:
    return kvmmu_gpte_malformed(w.format, w.fmt.rsvd_bits_mask[0][level - 1], w.fmt.rsvd_bits_mask[1][level - 1],
                                w.fmt.bad_mt_xwr, gpte) != 0


cdef inline bint is_accessed_gpte(const kvm_pagewalk *w, uint64_t gpte) noexcept nogil:
    """True if A is set, or the format has no A."""
    return gpte & w.accessed_mask == w.accessed_mask


cdef inline uint32_t gpte_rights_of(const kvm_pagewalk *w, uint64_t gpte) noexcept nogil:
    """Return ACC_* of an entry."""
    return <uint32_t>kvmmu_gpte_access(w.format, kvmmu_gpte_rights(w.format, gpte))


cdef inline uint32_t protect_clean(const kvm_pagewalk *w, uint32_t access, uint64_t gpte) noexcept nogil:
    """Return rights without W if D is clear: the write to come must set it."""
    if w.accessed_mask and not gpte & (w.accessed_mask << 1):
        return access & ~<uint32_t>ACC_WRITE_MASK
    return access


cdef inline uint64_t gpte_to_gfn(const kvm_pagewalk *w, uint64_t gpte) noexcept nogil:
    """Return the frame that a level-1 entry maps."""
    return kvmmu_leaf_gpa(w.format, gpte, 1, 0, 0) >> PAGE_SHIFT


cdef inline uint64_t first_gpte_gpa(const kvm_mmu_page *sp) noexcept nogil:
    """Return the address of the part of the guest's table that a level-1 page shadows."""
    cdef uint64_t part = 0
    if sp.role & ROLE_HAS_4_BYTE_GPTE_MASK:             # 1024 entries: two pages
        part = ((sp.role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT) << (PT64_INDEX_BITS + 2)
    return (sp.gfn << PAGE_SHIFT) + part


# Walk the tables that the vCPU's MMU shadows; False: the result is a fault of the guest. Writes A and D, and enters that in the
# dirty log and the trace. IN access: as of the walk
cdef bint walk_guest(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t addr, uint32_t access, guest_walk *walk) noexcept nogil
# True if the entry of a level has changed since the walk
cdef bint gpte_changed(kvm_vcpu *vcpu, const kvm_pagewalk *w, const guest_walk *walk, int level) noexcept nogil
# Enter a walk that KVM makes in the trace, and its writes in the dirty log; the host has pages now for the tables that it read
cdef void account_walk(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t addr, uint32_t access, const walk_result *r,
                       const walk_step *steps, int n) noexcept nogil
