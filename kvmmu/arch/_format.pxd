"""The description of a page-table format (kvm_page_format) and the tests of an entry against it.

The tables are built in `_format.pyx` in plain, slow code. The tests are C (`_format.h`), the same for one entry and for many
side by side. One format serves the entries of a guest and those of the host alike.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport PFERR_PK_MASK, PFERR_PRESENT_MASK, PKRU_SHIFT

cdef extern from "kvmmu/arch/_format.h" nogil:
    enum:
        KVMMU_ACCESS_BYTES
        KVMMU_COMMON_ACCESS_MAX
        KVMMU_ACCESS_INFO_SHIFT
        KVMMU_ACCESS_KEYS_SHIFT
        KVMMU_ACCESS_KEYS_USER_SHIFT

    cdef struct kvm_page_format:
        uint64_t rsvd_bits_mask[2][5]
        uint64_t bad_mt_xwr
        uint32_t pkru_mask
        uint16_t permissions[16]
        uint64_t access_info[256]

    uint32_t kvmmu_explicit_access(uint32_t access)
    uint32_t kvmmu_resolved_access(uint32_t access)
    uint64_t kvmmu_pkey_denied(uint64_t keys, uint64_t pte_access, uint64_t pte_pkey, uint64_t access_info)
    uint64_t kvmmu_rsvd_bits(uint64_t rsvd0, uint64_t rsvd1, uint64_t pte)
    uint64_t kvmmu_bad_mt_xwr(uint64_t bad_mt_xwr, uint64_t pte)

# The parameters of a permission bitmask. smep is MBEC in the ept form, GMET in the tdp form.
cdef struct permission_params:
    bint tdp
    bint ept
    bint smep
    bint smap
    bint wp
    bint nx
    # Shadow-stack accesses (in the ept form those of supervisors) have rules of their own; else they are reads and writes
    bint shadow_stacks

# The parameters of the reserved bits of guest tables.
cdef struct rsvd_params:
    int level               # of the root: 2 to 5
    int maxphyaddr
    bint nx
    bint gbpages
    bint pse
    int pse36_bits          # address bits that a 4M PDE holds above bit 31; 0 without PSE-36
    bint amd
    uint64_t encryption_mask    # no address bit, and not reserved

cdef class PageFormat

# Fill permissions and access_info; the keys of an access_info are those of pkru_mask, which comes first
cdef void update_permission_bitmask(kvm_page_format *fmt, const permission_params *p) noexcept nogil
# The permissions of EPT entries, with MBEC or without, and supervisor shadow-stack control; keys do not count for them
cdef void update_ept_permissions(PageFormat fmt, bint mbec, bint supervisor_shadow_stack) noexcept
cdef void update_pkru_bitmask(kvm_page_format *fmt, bint pke, bint pks, bint wp) noexcept nogil
cdef void reset_guest_rsvds_bits_mask(kvm_page_format *fmt, const rsvd_params *p) noexcept nogil
cdef void reset_ept_rsvds_bits_mask(kvm_page_format *fmt, int maxphyaddr, bint execonly, int huge_page_level) noexcept nogil


cdef inline uint32_t explicit_access(uint32_t access) noexcept nogil:
    """Return an access with IMPLICIT resolved: an implicit access is a supervisor's, and EFLAGS.AC does not count for it."""
    return kvmmu_explicit_access(access)


cdef inline uint32_t resolved_access(uint32_t access) noexcept nogil:
    """The same with IMPLICIT in it: what walks are asked for."""
    return kvmmu_resolved_access(access)


cdef inline uint64_t key_registers(uint32_t pkru, uint32_t pkrs) noexcept nogil:
    """Return the two registers of protection keys in one word."""
    return <uint64_t>pkru << PKRU_SHIFT | pkrs


cdef inline uint64_t access_info_of(const kvm_page_format *fmt, uint8_t access) noexcept nogil:
    """Look an access byte up in `access_info`."""
    return fmt.access_info[access]


cdef inline uint32_t permission_fault(const kvm_page_format *fmt, uint64_t keys, uint32_t pte_access, uint32_t pte_pkey,
                                      uint32_t access) noexcept nogil:
    """P, or P|PK, if rights pte_access do not allow the access; else 0. IN keys: key_registers()."""
    cdef uint64_t access_info = fmt.access_info[access]
    cdef uint32_t fault = <uint32_t>(access_info >> pte_access) & 1
    cdef uint32_t errcode = PFERR_PRESENT_MASK
    if fmt.pkru_mask and kvmmu_pkey_denied(keys, pte_access, pte_pkey, access_info):
        fault = 1
        errcode |= <uint32_t>PFERR_PK_MASK
    return <uint32_t>-<int>fault & errcode


cdef inline bint has_rsvd_bits(const kvm_page_format *fmt, uint64_t pte, int level) noexcept nogil:
    """True if a present non-EPT entry has a bit set that its format reserves."""
    return kvmmu_rsvd_bits(fmt.rsvd_bits_mask[0][level - 1], fmt.rsvd_bits_mask[1][level - 1], pte) != 0


cdef inline bint has_bad_mt_xwr(const kvm_page_format *fmt, uint64_t pte) noexcept nogil:
    """True if a present EPT entry has a bad memory type or combination of rights; user execute counts as execute."""
    return kvmmu_bad_mt_xwr(fmt.bad_mt_xwr, pte) != 0


cdef class PageFormat:
    cdef kvm_page_format fmt
    cdef permission_params params
