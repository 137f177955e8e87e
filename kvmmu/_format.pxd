"""The description of a page-table format (kvm_page_format) and the tests of an entry against it.

The tables are built in `_format.pyx` in plain, slow code and read here without branches. One format serves the entries of a
guest and those of the host alike.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmmu._bits cimport (
    ACC_USER_MASK, ACCESS_AC_MASK, ACCESS_IMPLICIT_MASK, ACCESS_PFEC_MASK, ACCESS_USER_MASK, EPT_EXECUTABLE_MASK,
    EPT_MT_XWR_MASK, EPT_USER_EXECUTABLE_MASK, PERMISSIONS_INDEX_SHIFT,
    PFERR_PK_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_SHIFT, PKRU_BITS_PER_KEY, PT_PAGE_SIZE_SHIFT,
)

cdef struct kvm_page_format:
    uint64_t rsvd_bits_mask[2][5]       # [bit 7 of the entry][level - 1]: bits that must be zero
    uint64_t bad_mt_xwr                 # EPT: bit n set: an entry whose low six bits are n is malformed
    uint32_t pkru_mask                  # AD and WD for each error code with U of the translation as bit 3, at that bit
    uint16_t permissions[16]            # [access >> 1]: bit n set: rights n (ACC_*) do not allow it

# What a permission bitmask is made from. smep is MBEC in the ept form, GMET in the tdp form.
cdef struct permission_params:
    bint tdp
    bint ept
    bint smep
    bint smap
    bint wp
    bint nx

# What the reserved bits of guest tables depend on.
cdef struct rsvd_params:
    int level               # of the root: 2 to 5
    int maxphyaddr
    bint nx
    bint gbpages
    bint pse
    int pse36_bits          # address bits that a 4M PDE holds above bit 31; 0 without PSE-36
    bint amd

cdef void update_permission_bitmask(kvm_page_format *fmt, const permission_params *p) noexcept nogil
cdef void update_pkru_bitmask(kvm_page_format *fmt, bint pke, bint wp) noexcept nogil
cdef void reset_guest_rsvds_bits_mask(kvm_page_format *fmt, const rsvd_params *p) noexcept nogil
cdef void reset_ept_rsvds_bits_mask(kvm_page_format *fmt, int maxphyaddr, bint execonly, int huge_page_level) noexcept nogil


cdef inline uint32_t explicit_access(uint32_t access) noexcept nogil:
    """An access with IMPLICIT resolved: an implicit access is a supervisor's, and EFLAGS.AC does not count for it."""
    # if access & IMPLICIT: access &= ~(AC | USER | IMPLICIT)
    cdef uint32_t implicit = <uint32_t>-<int>((access & ACCESS_IMPLICIT_MASK) != 0)
    return access & ~(implicit & <uint32_t>(ACCESS_AC_MASK | ACCESS_USER_MASK | ACCESS_IMPLICIT_MASK))


cdef inline uint32_t permission_fault(const kvm_page_format *fmt, uint32_t pkru, uint32_t pte_access, uint32_t pte_pkey,
                                      uint32_t access) noexcept nogil:
    """P, or P|PK, if rights pte_access do not allow the access; else 0. IN access: without IMPLICIT."""
    cdef uint32_t fault = (fmt.permissions[access >> PERMISSIONS_INDEX_SHIFT] >> pte_access) & 1
    cdef uint32_t errcode = PFERR_PRESENT_MASK, denied
    if fmt.pkru_mask:
        # offset: the error code, with the U bit of the translation in the place of RSVD
        denied = (pkru >> (pte_pkey * PKRU_BITS_PER_KEY)) & 3
        denied &= fmt.pkru_mask >> ((access & <uint32_t>ACCESS_PFEC_MASK) |
                                    ((pte_access & <uint32_t>ACC_USER_MASK) << (PFERR_RSVD_SHIFT - 2)))
        if denied:
            fault = 1
            errcode |= <uint32_t>PFERR_PK_MASK
    return <uint32_t>-<int>fault & errcode


cdef inline bint has_rsvd_bits(const kvm_page_format *fmt, uint64_t pte, int level) noexcept nogil:
    """Whether a present non-EPT entry has a bit set that its format reserves."""
    return (pte & fmt.rsvd_bits_mask[(pte >> PT_PAGE_SIZE_SHIFT) & 1][level - 1]) != 0


cdef inline bint has_bad_mt_xwr(const kvm_page_format *fmt, uint64_t pte) noexcept nogil:
    """Whether a present EPT entry has a bad memory type or combination of rights; user execute counts as execute."""
    cdef uint64_t low = pte & EPT_MT_XWR_MASK
    if pte & EPT_USER_EXECUTABLE_MASK:
        low |= EPT_EXECUTABLE_MASK
    return ((fmt.bad_mt_xwr >> low) & 1) != 0


cdef class PageFormat:
    cdef kvm_page_format fmt
    cdef permission_params params
