"""Memory that a processor reads and writes beside page tables; see `_vmx_memory.pxd`."""

from libc.stdint cimport uint8_t, uint64_t

from kvmmu.arch._bits cimport (
    EXIT_REASON_EPT_VIOLATION, KVMMU_BITS, PAGE_SHIFT, PT64_BASE_ADDR_MASK, PT64_INDEX_BITS, PT64_INDEX_MASK,
    SPPT_LEVELS, SPPT_RSVD_MASK, SPPT_SUB_PAGE_MASK, SPPT_SUB_PAGE_SHIFT, SPPT_VALID_MASK, SPPT_VECTOR_RSVD_MASK,
    SPP_EVENT_NOT_VALID_MASK, VE_BUSY, VE_BUSY_OFFSET, VE_EPTP_INDEX_OFFSET, VE_GPA_OFFSET, VE_GVA_OFFSET,
    VE_QUALIFICATION_OFFSET,
)
from kvmmu.memory._memory cimport gpa_to_hva, guest_mem, kvmmu_cmpxchg64, kvmmu_read64, kvmmu_store, kvmmu_write64


cdef int sub_page_verdict(const guest_mem *mem, uint64_t root, int maxphyaddr, uint64_t gpa,
                          uint64_t *qualification) noexcept nogil:
    cdef uint64_t entry = root, reserved
    cdef const uint8_t *hva
    cdef bint readonly = False
    cdef int level
    for level in range(SPPT_LEVELS, 0, -1):
        hva = gpa_to_hva(mem, (entry & PT64_BASE_ADDR_MASK) + sizeof(uint64_t) * (
            gpa >> (PAGE_SHIFT + PT64_INDEX_BITS * (level - 1)) & PT64_INDEX_MASK), &readonly)
        entry = 0 if hva is NULL else kvmmu_read64(hva)
        if level == 1:
            break
        if not entry & SPPT_VALID_MASK:
            qualification[0] = SPP_EVENT_NOT_VALID_MASK
            return SUB_PAGE_EVENT
        reserved = SPPT_RSVD_MASK | KVMMU_BITS(maxphyaddr, 63)
        if entry & reserved:
            qualification[0] = 0
            return SUB_PAGE_EVENT
    if entry & SPPT_VECTOR_RSVD_MASK:
        qualification[0] = 0
        return SUB_PAGE_EVENT
    # two bits of the vector for each sub-page
    if (entry >> 2 * (gpa >> SPPT_SUB_PAGE_SHIFT & SPPT_SUB_PAGE_MASK)) & 1:
        return SUB_PAGE_ALLOWS
    return SUB_PAGE_REFUSES


cdef bint take_ve_area(const guest_mem *mem, uint64_t area, uint64_t qualification, uint64_t gva, uint64_t gpa,
                       bint store) noexcept nogil:
    cdef uint64_t before = 0, eptp_index = 0
    cdef bint readonly = False, taken = False
    cdef uint8_t *hva = gpa_to_hva(mem, area, &readonly)
    while not taken:
        before = 0 if hva is NULL else kvmmu_read64(hva)
        if before >> (8 * VE_BUSY_OFFSET):
            return False
        if hva is NULL or readonly or not store:
            return True
        taken = kvmmu_cmpxchg64(hva, before, EXIT_REASON_EPT_VIOLATION | VE_BUSY << (8 * VE_BUSY_OFFSET))
    kvmmu_write64(hva + VE_QUALIFICATION_OFFSET, qualification)
    kvmmu_write64(hva + VE_GVA_OFFSET, gva)
    kvmmu_write64(hva + VE_GPA_OFFSET, gpa)
    kvmmu_store(hva + VE_EPTP_INDEX_OFFSET, <const uint8_t *>&eptp_index, 2)
    return True
