"""May this leaf be used: the last entry of one row, checked as the scalar walk checks it.

`check_leaf()` repeats steps 3 to 7 of the walk (`_walk.pxd`) for the last entry: not present, reserved bits, not a leaf,
rights and protection key, and which accessed and dirty bits are clear. `kernels/` does the same for 64 entries at a time.
`set_leaf_bits()` repeats step 7 where nothing but bits of the leaf is to set.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport ACCESS_PROBE_MASK, ACCESS_WRITE_MASK, PG_LEVEL_4K, ROLE_CR4_SMEP_MASK
from kvmmu.arch._format cimport KVMMU_ACCESS_INFO_SHIFT
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.memory._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64
from kvmmu.walk.batch._kernels cimport (
    PSCE_ACCESSED_CLEAR_SHIFT, PSCE_READONLY_SHIFT, PSCE_WRITE_REFUSED_SHIFT, kvmmu_leaf_rules, kvmmu_psce_level,
    kvmmu_read_entry,
)

# Result of a leaf check.
cdef enum:
    LEAF_OK
    LEAF_FAULT
    LEAF_SLOW                   # accessed or dirty bits are to set, or the entry is no leaf any more

cdef struct leaf_result:
    uint64_t gpa
    uint64_t pte
    uint32_t pte_access
    uint32_t error              # of a fault: P, RSVD, PK of the error code

# Check the last entry of one row: LEAF_*. IN psce: all of it but the address counts; entry: kvmmu_entry_hva(); access_info:
# kvm_page_format.access_info of the access
cdef int check_leaf(const kvmmu_leaf_rules *rules, uint64_t psce, uint64_t entry, uint64_t addr, uint64_t access_info,
                    leaf_result *out) noexcept nogil


cdef inline bint set_leaf_bits(const kvmmu_leaf_rules *rules, uint64_t psce, uint64_t entry, uint64_t pte,
                               uint64_t access_info) noexcept nogil:
    """Set the accessed bit of a leaf and, for a write, its dirty bit; nothing for a probe. False: the scalar walk must take
    the row.

    IN entry: address of the leaf in the host; pte: what it was; access_info: of the access
    """
    cdef uint64_t bits = rules.accessed_mask, now
    cdef uint8_t *hva = <uint8_t *><uintptr_t>entry
    if access_info & <uint64_t>ACCESS_PROBE_MASK << KVMMU_ACCESS_INFO_SHIFT and (
            kvmmu_psce_level(psce) == PG_LEVEL_4K or pte & rules.page_size_mask):
        return True
    if not rules.sets_ad or ((psce >> PSCE_ACCESSED_CLEAR_SHIFT) | (psce >> PSCE_WRITE_REFUSED_SHIFT)) & 1:
        return False
    if kvmmu_psce_level(psce) > PG_LEVEL_4K and not pte & rules.page_size_mask:
        return False
    if access_info & <uint64_t>ACCESS_WRITE_MASK << KVMMU_ACCESS_INFO_SHIFT:
        if rules.logs:
            return False
        bits |= bits << 1
    if (psce >> PSCE_READONLY_SHIFT) & 1:
        return True
    if rules.format == KVMMU_FORMAT_32:
        if kvmmu_cmpxchg32(hva, <uint32_t>pte, <uint32_t>(pte | bits)):
            return True
    elif kvmmu_cmpxchg64(hva, pte, pte | bits):
        return True
    now = kvmmu_read_entry(rules.format, entry)
    return now & bits == bits and (now ^ pte) & ~(rules.accessed_mask * 3) == 0        # somebody else set them


cdef inline bint asks_rights(const kvm_pagewalk *n) noexcept nogil:
    """True if rights of the first stage decide over what this second stage grants: MBEC."""
    return n.user_by_pte and n.cpu_role & ROLE_CR4_SMEP_MASK
