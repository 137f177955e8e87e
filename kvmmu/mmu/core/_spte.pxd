"""Entries of the host's page tables (SPTEs): layouts, predicates and the making of each kind. Pure functions, no state.

An SPTE holds in one word the entry that the processor walks and KVM's own marks: bit 11 (MMU-present) is set in a real entry,
not in an empty, frozen or MMIO one; host-writable and MMU-writable say why a clear W is clear; bits 61:60 say how A and D are
kept.

    W  MMU-writable  host-writable
    1       1             1         writable
    0       1             1         write-protected for the dirty log or access tracking: a fast page fault may set W again
    0       0             1         write-protected because the page holds guest page tables
    0       0             0         read-only in the host
                                    anything else is a bug

How the pieces are used: `fault_make_spte()` of `_fault` asks `_unsync` if the frame may be writable, and calls `make_spte()`;
upper entries are `make_nonleaf_spte()`. The rights of a request are those of the role, or of the guest's walk in a shadow MMU,
which sets `synchronizing` when it makes an entry anew that stands there already.

Sources: SDM vol. 3, "EPT Translation Mechanism", "EPT Misconfigurations"; APM vol. 2, "Nested Paging".
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    ACC_EXEC_MASK, ACC_READ_MASK, ACC_USER_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, ACCESS_PFEC_MASK, EPT_EXECUTABLE_MASK,
    EPT_USER_EXECUTABLE_MASK, FROZEN_SPTE, MMIO_SPTE_GEN_HIGH_SHIFT, MMIO_SPTE_GEN_LOW_BITS, MMIO_SPTE_GEN_LOW_MASK,
    MMIO_SPTE_GEN_LOW_SHIFT, MMIO_SPTE_GEN_HIGH_MASK, PAGE_SHIFT, PERMISSIONS_INDEX_SHIFT, PG_LEVEL_4K, PT64_INDEX_BITS,
    PT64_NX_MASK, PT_PAGE_SIZE_MASK, PT_USER_MASK, PT_WRITABLE_MASK, SPTE_BASE_ADDR_MASK, SPTE_MMU_PRESENT_MASK,
    SPTE_TDP_AD_DISABLED, SPTE_TDP_AD_MASK,
)
from kvmmu.arch._format cimport PageFormat, has_bad_mt_xwr, has_rsvd_bits, kvm_page_format

# The layout of SPTEs on one host: KVM's shadow_*_mask.
cdef struct spte_format:
    bint ept                        # EPT entries, else legacy ones (NPT and shadow paging)
    bint ad                         # hardware keeps A and D
    bint pml
    bint nx_huge_pages              # no huge page is executable
    bint mmio_caching
    int maxphyaddr
    int max_huge_page_level
    uint64_t present_mask           # what every SPTE has: P, or suppress-#VE
    uint64_t user_mask
    uint64_t nx_mask
    uint64_t xs_mask                # EPT: execute, by a supervisor under MBEC
    uint64_t xu_mask                # EPT with MBEC: execute by user mode
    uint64_t accessed_mask
    uint64_t dirty_mask
    uint64_t acc_track_mask         # rights that access tracking takes away; 0: A/D bits always
    uint64_t host_writable_mask
    uint64_t mmu_writable_mask
    uint64_t memtype_mask
    uint64_t mmio_value
    uint64_t mmio_mask
    uint64_t mmio_access_mask
    uint64_t me_value               # memory encryption
    uint64_t me_mask
    uint64_t l1tf_mask              # of an MMIO SPTE: address bits that are set, and saved five bits higher

# The arguments of a leaf SPTE.
cdef struct spte_request:
    uint32_t role                   # of the shadow page that it goes into
    uint32_t access                 # ACC_*
    uint64_t pfn
    bint prefetch
    bint synchronizing
    bint host_writable
    bint may_write                  # the frame may be writable, as far as shadowing is concerned


# ---- predicates --------------------------------------------------------------------------------------------------------

cdef inline bint is_shadow_present_pte(uint64_t spte) noexcept nogil:
    return (spte & SPTE_MMU_PRESENT_MASK) != 0


cdef inline bint is_last_spte(uint64_t spte, int level) noexcept nogil:
    return level == PG_LEVEL_4K or (spte & PT_PAGE_SIZE_MASK) != 0


cdef inline bint is_frozen_spte(uint64_t spte) noexcept nogil:
    return spte == FROZEN_SPTE


cdef inline bint is_mmio_spte(const spte_format *f, uint64_t spte) noexcept nogil:
    return f.mmio_caching and (spte & f.mmio_mask) == f.mmio_value


cdef inline bint is_writable_pte(uint64_t spte) noexcept nogil:
    return (spte & PT_WRITABLE_MASK) != 0


cdef inline bint is_mmu_writable_spte(const spte_format *f, uint64_t spte) noexcept nogil:
    return (spte & f.mmu_writable_mask) != 0


cdef inline bint spte_ad_enabled(uint64_t spte) noexcept nogil:
    """True if the processor keeps A and D of this entry."""
    return (spte & SPTE_TDP_AD_MASK) != SPTE_TDP_AD_DISABLED


cdef inline bint spte_ad_need_write_protect(uint64_t spte) noexcept nogil:
    """True if dirty logging of this entry works by its W, not by its D."""
    return (spte & SPTE_TDP_AD_MASK) != 0


cdef inline bint is_access_track_spte(const spte_format *f, uint64_t spte) noexcept nogil:
    return not spte_ad_enabled(spte) and f.acc_track_mask != 0 and (spte & f.acc_track_mask) == 0


cdef inline bint is_accessed_spte(const spte_format *f, uint64_t spte) noexcept nogil:
    return (spte & f.accessed_mask) != 0


cdef inline bint check_writable(const spte_format *f, uint64_t spte) noexcept nogil:
    """True if W, MMU-writable and host-writable of a present leaf are one of the four rows above."""
    if is_mmu_writable_spte(f, spte):
        return (spte & f.host_writable_mask) != 0
    return not is_writable_pte(spte)


# ---- fields of an entry ------------------------------------------------------------------------------------------------

cdef inline uint64_t spte_to_pfn(uint64_t spte) noexcept nogil:
    return (spte & SPTE_BASE_ADDR_MASK) >> PAGE_SHIFT


cdef inline uint64_t pages_per_hpage(int level) noexcept nogil:
    return <uint64_t>1 << (PT64_INDEX_BITS * (level - 1))


cdef inline uint32_t spte_access(const spte_format *f, uint64_t spte) noexcept nogil:
    """Return ACC_* that the entry grants."""
    cdef uint32_t acc = <uint32_t>(spte & (ACC_READ_MASK | ACC_WRITE_MASK))     # P or R, and W, stand in place
    if f.ept:
        if spte & EPT_EXECUTABLE_MASK:
            acc |= <uint32_t>ACC_EXEC_MASK
        if spte & EPT_USER_EXECUTABLE_MASK:
            acc |= <uint32_t>ACC_USER_EXEC_MASK
        return acc
    if spte & PT_USER_MASK:
        acc |= <uint32_t>ACC_USER_MASK
    if not spte & PT64_NX_MASK:
        acc |= <uint32_t>ACC_EXEC_MASK
    return acc


cdef inline bint spte_permission_fault(const spte_format *f, const kvm_page_format *fmt, uint64_t spte,
                                       uint64_t error_code) noexcept nogil:
    """True if a present entry denies the access of an error code. IN fmt: the MMU's own."""
    cdef uint64_t index = (error_code & ACCESS_PFEC_MASK) >> PERMISSIONS_INDEX_SHIFT
    return ((fmt.permissions[index] >> spte_access(f, spte)) & 1) != 0


cdef inline bint is_rsvd_spte(const kvm_page_format *fmt, uint64_t spte, int level) noexcept nogil:
    """True if the processor would find a present entry malformed (the shadow-zero check)."""
    return has_rsvd_bits(fmt, spte, level) or (fmt.bad_mt_xwr != 0 and has_bad_mt_xwr(fmt, spte))


# ---- MMIO entries ------------------------------------------------------------------------------------------------------

cdef inline uint64_t generation_mmio_spte_mask(uint64_t gen) noexcept nogil:
    return ((gen << MMIO_SPTE_GEN_LOW_SHIFT) & MMIO_SPTE_GEN_LOW_MASK) | (
        ((gen >> MMIO_SPTE_GEN_LOW_BITS) << MMIO_SPTE_GEN_HIGH_SHIFT) & MMIO_SPTE_GEN_HIGH_MASK)


cdef inline uint64_t get_mmio_spte_generation(uint64_t spte) noexcept nogil:
    return ((spte & MMIO_SPTE_GEN_LOW_MASK) >> MMIO_SPTE_GEN_LOW_SHIFT) | (
        ((spte & MMIO_SPTE_GEN_HIGH_MASK) >> MMIO_SPTE_GEN_HIGH_SHIFT) << MMIO_SPTE_GEN_LOW_BITS)


# IN gen: of the memslots, any width
cdef uint64_t make_mmio_spte(const spte_format *f, uint64_t gfn, uint32_t access, uint64_t gen) noexcept nogil
cdef uint64_t get_mmio_spte_gfn(const spte_format *f, uint64_t spte) noexcept nogil
# READ is always there: the entry has no room for it
cdef uint32_t get_mmio_spte_access(const spte_format *f, uint64_t spte) noexcept nogil

# ---- making and changing entries ---------------------------------------------------------------------------------------

cdef uint64_t make_spte(const spte_format *f, const spte_request *q) noexcept nogil
# IN hpa: of the child's page
cdef uint64_t make_nonleaf_spte(const spte_format *f, uint64_t hpa, bint ad_disabled) noexcept nogil
# Return part `index` of a huge SPTE, one level down. IN role: of the page that it goes into
cdef uint64_t make_small_spte(const spte_format *f, uint64_t huge, uint32_t role, int index) noexcept nogil
# A small SPTE to the huge one above it; level is that of the result
cdef uint64_t make_huge_spte(const spte_format *f, uint64_t small, int level) noexcept nogil
cdef uint64_t mark_spte_for_access_track(const spte_format *f, uint64_t spte) noexcept nogil
cdef uint64_t restore_acc_track_spte(const spte_format *f, uint64_t spte) noexcept nogil

# ---- formats -----------------------------------------------------------------------------------------------------------

# The MMU's own PageFormat: permissions and the shadow-zero check. IN level: of the root; smep: SMEP, MBEC or GMET
cdef void init_tdp_format(PageFormat fmt, const spte_format *f, int level, bint smep) noexcept
# IN nested: of an EPT12/NPT12 (else of CR3 tables); execonly as L1 negotiated; gbpages of the guest
cdef void init_shadow_format(PageFormat fmt, const spte_format *f, int level, bint smep, bint nested, bint execonly,
                             bint gbpages) noexcept


# Return the faults of an entry: 0, or a sum as `SpteFormat.audit_page()` describes it
cdef uint8_t audit_spte(const spte_format *f, PageFormat fmt, uint64_t spte, int level, uint32_t role) noexcept


cdef class SpteFormat:
    cdef spte_format f
