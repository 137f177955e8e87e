"""The meaning of an entry of each format: the template header of the walk.

`guest_walker` is a fused type over the walker structs; the first parameter of every accessor selects the format at compile
time. `if guest_walker is ...` stands here and nowhere else. What the walk of many addresses side by side needs too is C, in
`_gpte.h`: a new format is a struct here and a branch in the accessors of both.
Levels, reserved bits, permissions and page sizes are data of the walk (`kvm_pagewalk`), not formats.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    PAGE_SHIFT, PT32_INDEX_BITS, PT32_INDEX_MASK, PT64_INDEX_BITS, PT64_INDEX_MASK,
)
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.memory._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64, kvmmu_read32, kvmmu_read64

cdef extern from "kvmmu/arch/_gpte.h" nogil:
    enum:
        KVMMU_FORMAT_32
        KVMMU_FORMAT_64
        KVMMU_FORMAT_EPT

    int kvmmu_level_shift(int format, int level)
    uint64_t kvmmu_gpte_rights(int format, uint64_t pte)
    uint64_t kvmmu_gpte_access(int format, uint64_t rights)
    uint64_t kvmmu_gpte_shadow_stack(int format, uint64_t upper, uint64_t pte)
    uint32_t kvmmu_gpte_pkey(int format, uint64_t pte)
    uint64_t kvmmu_leaf_gpa(int format, uint64_t pte, uint32_t level, uint64_t addr, uint64_t pse36_mask)
    bint kvmmu_is_canonical(uint64_t addr, int shift)
    uint64_t kvmmu_pdpte_index(uint64_t addr)
    uint64_t kvmmu_pdpte_gpa(uint64_t root, uint64_t index)
    bint kvmmu_is_good_pdpte(uint64_t pdpte, uint64_t rsvd_mask)
    uint64_t kvmmu_gpte_malformed(int format, uint64_t rsvd0, uint64_t rsvd1, uint64_t bad_mt_xwr, uint64_t pte)

# 2-level paging: 4-byte entries
cdef struct guest_walker32:
    int level                   # of the last entry read
    int top_level               # of the first entry that has an accessed bit
    uint8_t refs                # entries read
    bint hole                   # the last entry lies in no slot
    bint dirty_set              # of the leaf, by this walk
    uint32_t accessed_set       # bit per level: A, by this walk
    uint32_t pte_access         # ACC_*: AND over the walk
    uint64_t gpa
    uint32_t ptes[2]            # [level - 1]
    uint64_t pte_gpa[2]
    uint8_t *pte_hva[2]         # NULL: the guest cannot write there

# PAE, 4-level, 5-level: 8-byte entries
cdef struct guest_walker64:
    int level
    int top_level
    uint8_t refs
    bint hole
    bint dirty_set
    uint32_t accessed_set
    uint32_t pte_access
    uint64_t gpa
    uint64_t ptes[5]
    uint64_t pte_gpa[5]
    uint8_t *pte_hva[5]

# EPT: 8-byte entries with rights and accessed/dirty bits of their own
cdef struct guest_walkerEPT:
    int level
    int top_level
    uint8_t refs
    bint hole
    bint dirty_set
    uint32_t accessed_set
    uint32_t pte_access
    uint64_t gpa
    uint64_t ptes[5]
    uint64_t pte_gpa[5]
    uint8_t *pte_hva[5]

ctypedef fused guest_walker:
    guest_walker32
    guest_walker64
    guest_walkerEPT


cdef inline uint64_t gpte_index(const guest_walker *walker, uint64_t addr, int level) noexcept nogil:
    """Index of addr in a table of this level."""
    if guest_walker is guest_walker32:
        return (addr >> (PAGE_SHIFT + PT32_INDEX_BITS * (level - 1))) & PT32_INDEX_MASK
    else:
        return (addr >> (PAGE_SHIFT + PT64_INDEX_BITS * (level - 1))) & PT64_INDEX_MASK


cdef inline int format_of(const guest_walker *walker) noexcept nogil:
    """Return the format as `_gpte.h` counts them."""
    if guest_walker is guest_walker32:
        return KVMMU_FORMAT_32
    elif guest_walker is guest_walker64:
        return KVMMU_FORMAT_64
    else:
        return KVMMU_FORMAT_EPT


cdef inline uint64_t leaf_gpa(const guest_walker *walker, uint64_t pte, int level, uint64_t addr,
                              uint64_t pse36_mask) noexcept nogil:
    """Physical address of addr in the page that a leaf entry maps.

    IN pse36_mask: address bits that a 4M PDE holds in its low half.
    """
    return kvmmu_leaf_gpa(format_of(walker), pte, level, addr, pse36_mask)


cdef inline uint64_t read_gpte(const guest_walker *walker, const uint8_t *hva) noexcept nogil:
    if guest_walker is guest_walker32:
        return kvmmu_read32(hva)
    else:
        return kvmmu_read64(hva)


cdef inline bint cmpxchg_gpte(const guest_walker *walker, uint8_t *hva, uint64_t old, uint64_t new) noexcept nogil:
    """True if the entry still was old, and is new now. Atomic."""
    if guest_walker is guest_walker32:
        return kvmmu_cmpxchg32(hva, <uint32_t>old, <uint32_t>new)
    else:
        return kvmmu_cmpxchg64(hva, old, new)


cdef inline bint is_rsvd_bits_set(const guest_walker *walker, const kvm_page_format *fmt, uint64_t pte, int level) noexcept nogil:
    """True if a present entry is malformed."""
    return kvmmu_gpte_malformed(format_of(walker), fmt.rsvd_bits_mask[0][level - 1], fmt.rsvd_bits_mask[1][level - 1],
                                fmt.bad_mt_xwr, pte) != 0


cdef inline uint64_t gpte_rights(const guest_walker *walker, uint64_t pte) noexcept nogil:
    """Return the entry with every restricting bit inverted, so that rights accumulate by AND."""
    return kvmmu_gpte_rights(format_of(walker), pte)


cdef inline uint32_t gpte_access(const guest_walker *walker, uint64_t rights) noexcept nogil:
    """ACC_* of accumulated rights."""
    return <uint32_t>kvmmu_gpte_access(format_of(walker), rights)


cdef inline uint64_t gpte_shadow_stack(const guest_walker *walker, uint64_t upper, uint64_t pte) noexcept nogil:
    """ACC_SHADOW_STACK if a leaf has the form of a shadow-stack page, below entries with these rights."""
    return kvmmu_gpte_shadow_stack(format_of(walker), upper, pte)


cdef inline uint32_t gpte_pkey(const guest_walker *walker, uint64_t pte) noexcept nogil:
    return kvmmu_gpte_pkey(format_of(walker), pte)


cdef inline bint has_pdptrs(const guest_walker *walker, int root_level) noexcept nogil:
    """PAE: the walk starts at a PDPTE, not at the root register."""
    if guest_walker is guest_walker64:
        return root_level == 3
    else:
        return False
