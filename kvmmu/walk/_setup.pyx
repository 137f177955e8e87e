"""Set up a walk from a role and a processor model, as `_setup.pxd` says.

Decided here: which error codes tell instruction fetches (`reports_fetch()`), which bits of an address are ignored or have to
be equal (LAM, UAI, LASS: `init_pre_processing()`, `separate_halves()`), and how wide PSE-36 addresses are (`pse36_bits()`).
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport WALK_DIRECT, WALK_SECOND_STAGE, WALK_TABLES, cpu_caps, kvm_pagewalk, use_walker
from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_IMPLICIT_MASK, ACCESS_PFEC_MASK, ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK,
    ACCESS_USER_MASK, ACCESS_WRITE_MASK, CR3_LAM_U48_MASK, CR3_LAM_U57_MASK, EPT_ACCESSED_MASK, EPT_RWX_MASK,
    EPT_USER_EXECUTABLE_MASK, EPT_VIOLATION_ACC_READ_MASK, EPT_VIOLATION_GVA_TRANSLATED_MASK, GVA32_MASK, GVA_BITS_4_LEVEL,
    GVA_BITS_5_LEVEL, KVMMU_BITS, PAGE_OFFSET_MASK, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT, PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK, PG_LEVEL_1G, PT32_BASE_ADDR_MASK, PT32_PSE36_KVM_BITS, PT32_PSE36_SHIFT, PT64_BASE_ADDR_MASK,
    PT_ACCESSED_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, ROLE_AD_DISABLED_MASK, ROLE_CR4_SMEP_MASK, ROLE_CR0_WP_MASK,
    ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_LA57_MASK, ROLE_EXT_CR4_LAM_SUP_MASK, ROLE_EXT_CR4_LASS_MASK,
    ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PKS_MASK, ROLE_EXT_EFER_UAIE_MASK, ROLE_EXT_CR4_PSE_MASK, ROLE_EXT_CR4_SMAP_MASK,
    ROLE_EXT_EFER_LMA_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_SHADOW_STACK_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK,
    STATUS_EPT_MISCONFIG, STATUS_EPT_VIOLATION, STATUS_NESTED_PAGE_FAULT, UAI_ADDRESS_BITS,
)
from kvmmu.arch._format cimport (
    PageFormat, permission_params, reset_ept_rsvds_bits_mask, reset_guest_rsvds_bits_mask, rsvd_params,
    update_ept_permissions, update_permission_bitmask, update_pkru_bitmask,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT
from kvmmu.arch._linear cimport kvmmu_linear_rules


cdef int pse36_bits(const cpu_caps *caps) noexcept nogil:
    """Address bits above 31 in a 4M PDE: up to MAXPHYADDR, at most eight; KVM takes four whatever MAXPHYADDR is."""
    if not caps.pse36:
        return 0
    if caps.kvm:
        return PT32_PSE36_KVM_BITS
    return min(caps.maxphyaddr, 40) - 32


cdef void init_instance(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps) noexcept nogil:
    """Set what both stages share: the instance of the walk and the data of its format."""
    w.cpu_role = cpu_role
    w.level = <int>(cpu_role & ROLE_LEVEL_MASK)
    w.gva_mask = ~<uint64_t>0 if cpu_role & ROLE_EXT_EFER_LMA_MASK else GVA32_MASK
    w.canonical_shift = 0
    w.present_mask = PT_PRESENT_MASK
    w.address_mask = ~caps.encryption_mask
    w.base_mask = PT64_BASE_ADDR_MASK & w.address_mask
    w.page_size_mask = PT_PAGE_SIZE_MASK
    w.pse36_mask = 0
    w.accessed_mask = PT_ACCESSED_MASK
    w.pferr_mask = <uint32_t>(ACCESS_WRITE_MASK | ACCESS_USER_MASK)
    w.final_before_ad = caps.kvm
    w.is_nested = w.pdptes_in_memory = w.sub_pages = w.raises_ve = False
    w.pdpte_rsvd_mask = w.ngpa_rsvd_mask = 0
    w.pml = NULL
    w.kind = WALK_TABLES
    w.second = 0
    w.lam = 0
    w.pre_processes = False
    w.format = KVMMU_FORMAT_64
    if not cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK:
        return
    w.format = KVMMU_FORMAT_32
    w.base_mask = PT32_BASE_ADDR_MASK
    if not cpu_role & ROLE_EXT_CR4_PSE_MASK:
        w.page_size_mask = 0
    if pse36_bits(caps):
        w.pse36_mask = KVMMU_BITS(PT32_PSE36_SHIFT, PT32_PSE36_SHIFT + pse36_bits(caps) - 1)


cdef bint reports_fetch(uint64_t cpu_role, const cpu_caps *caps, bint smep) noexcept nogil:
    """True if an error code tells fetches: SMEP, or NX; by the manuals NX counts only with PAE."""
    if smep:
        return True
    return (cpu_role & ROLE_EFER_NX_MASK) != 0 and (caps.kvm or not cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK)


cdef void separate_halves(kvm_pagewalk *w) noexcept nogil:
    """Set which accesses violate LASS in the lower and in the upper half of the address space.

    Users have the lower half. Supervisors have the upper one; SMAP decides whether their data accesses are held to that.
    """
    cdef bint smap = (w.cpu_role & ROLE_EXT_CR4_SMAP_MASK) != 0
    cdef uint32_t number, access
    w.linear.has_lass = True
    for number in range(2 * <uint32_t>PERMISSIONS_COUNT):
        access = number << PERMISSIONS_INDEX_SHIFT & <uint32_t>(ACCESS_PFEC_MASK | ACCESS_AC_MASK)
        if access & ACCESS_USER_MASK:
            w.linear.lass[1] |= <uint32_t>1 << number
        elif access & ACCESS_FETCH_MASK or (smap and not access & ACCESS_AC_MASK):
            w.linear.lass[0] |= <uint32_t>1 << number


cdef void set_tag(kvmmu_linear_rules *rules, int half, int width, int last) noexcept nogil:
    """Addresses of a half (by bit 63) have `width` bits that count, and above them a tag that ends with bit `last`."""
    rules.tag[half] = KVMMU_BITS(width, last)
    rules.sign[half] = <uint64_t>1 << (width - 1)


cdef void init_pre_processing(kvm_pagewalk *w, uint64_t lam, const cpu_caps *caps) noexcept nogil:
    """Set what becomes of addresses before they are translated. KVM's walker takes addresses that have no tags any more."""
    cdef uint64_t role = w.cpu_role
    cdef int half
    w.lam = lam
    memset(&w.linear, 0, sizeof(kvmmu_linear_rules))
    w.linear.untagged = ACCESS_FETCH_MASK | ACCESS_IMPLICIT_MASK | ACCESS_PROBE_MASK
    if caps.kvm or not role & ROLE_EXT_EFER_LMA_MASK:
        return
    if role & ROLE_EXT_EFER_UAIE_MASK:
        for half in range(2):
            set_tag(&w.linear, half, UAI_ADDRESS_BITS, 63)
        w.linear.untagged |= ACCESS_SHADOW_STACK_MASK
    else:
        if lam & CR3_LAM_U57_MASK:
            set_tag(&w.linear, 0, GVA_BITS_5_LEVEL, 62)
        elif lam & CR3_LAM_U48_MASK:
            set_tag(&w.linear, 0, GVA_BITS_4_LEVEL, 62)
        if role & ROLE_EXT_CR4_LAM_SUP_MASK:
            set_tag(&w.linear, 1, GVA_BITS_5_LEVEL if role & ROLE_EXT_CR4_LA57_MASK else GVA_BITS_4_LEVEL, 62)
    if role & ROLE_EXT_CR4_LASS_MASK:
        separate_halves(w)
    w.pre_processes = w.linear.has_lass or w.linear.tag[0] | w.linear.tag[1] != 0


cdef void init_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, uint64_t lam, const cpu_caps *caps) noexcept nogil:
    """Set all of a first stage that follows from the role and the LAM bits of CR3; the caller sets mem, vcpu, fmt and ngpa."""
    init_instance(w, cpu_role, caps)
    init_pre_processing(w, lam, caps)
    if not caps.kvm:                                # its walker does not know that an access is one to a shadow stack
        w.pferr_mask |= <uint32_t>ACCESS_SHADOW_STACK_MASK
    if cpu_role & ROLE_DIRECT_MASK:
        w.kind = WALK_DIRECT
        w.pferr_mask = 0
        use_walker(w)
        return
    if cpu_role & ROLE_EXT_EFER_LMA_MASK:
        w.canonical_shift = 64 - (GVA_BITS_5_LEVEL if cpu_role & ROLE_EXT_CR4_LA57_MASK else GVA_BITS_4_LEVEL)
    if reports_fetch(cpu_role, caps, (cpu_role & ROLE_CR4_SMEP_MASK) != 0):
        w.pferr_mask |= <uint32_t>ACCESS_FETCH_MASK
    use_walker(w)


cdef void use_second_stage(kvm_pagewalk *w, const kvm_pagewalk *n, bint npt) noexcept nogil:
    w.ngpa = n
    # APM vol. 2, "Nested Paging": in legacy PAE mode PDPTEs are neither loaded nor checked by VMRUN and MOV to CR3
    w.pdptes_in_memory = npt and w.level == PG_LEVEL_1G
    w.pdpte_rsvd_mask = w.fmt.rsvd_bits_mask[0][PG_LEVEL_1G - 1] if w.pdptes_in_memory else 0


cdef void init_second_stage_walk(kvm_pagewalk *w, const kvm_pagewalk *n) noexcept nogil:
    w[0] = n[0]
    w.ngpa = n
    w.kind = WALK_SECOND_STAGE
    use_walker(w)


cdef void init_nested(kvm_pagewalk *w, const cpu_caps *caps) noexcept nogil:
    """Set what EPT and NPT share."""
    w.is_nested = True
    w.ngpa = NULL
    w.final_before_ad = False
    w.fault_gpa_mask = ~PAGE_OFFSET_MASK if caps.kvm else ~<uint64_t>0
    w.user_always = w.user_by_pte = 0
    w.advanced_info = False
    w.maxphyaddr = caps.maxphyaddr


cdef void init_ept_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps, bint advanced_info) noexcept nogil:
    cdef bint have_ad = not cpu_role & ROLE_AD_DISABLED_MASK
    init_instance(w, cpu_role, caps)
    init_nested(w, caps)
    w.format = KVMMU_FORMAT_EPT
    w.base_mask, w.address_mask = PT64_BASE_ADDR_MASK, ~<uint64_t>0             # no encryption bit
    w.gva_mask = ~<uint64_t>0
    w.present_mask = EPT_RWX_MASK | (EPT_USER_EXECUTABLE_MASK if cpu_role & ROLE_CR4_SMEP_MASK else 0)
    w.accessed_mask = EPT_ACCESSED_MASK if have_ad else 0
    if not caps.kvm and w.level == 4:
        w.ngpa_rsvd_mask = KVMMU_BITS(GVA_BITS_4_LEVEL, 63)
    w.pferr_mask |= <uint32_t>ACCESS_FETCH_MASK
    w.user_by_pte = <uint32_t>ACCESS_USER_MASK
    # With A/D bits every access to a guest paging-structure entry is a write; without, KVM's walker still asks for one
    w.table_access = <uint32_t>ACCESS_WRITE_MASK if have_ad or caps.kvm else 0
    w.fault_status = STATUS_EPT_VIOLATION
    w.rsvd_status = STATUS_EPT_MISCONFIG
    w.stage_final = EPT_VIOLATION_GVA_TRANSLATED_MASK
    w.stage_page = EPT_VIOLATION_ACC_READ_MASK
    w.advanced_info = advanced_info and not caps.kvm
    use_walker(w)


cdef void init_npt_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps, bint host_smep) noexcept nogil:
    cdef bint gmet = (cpu_role & ROLE_CR4_SMEP_MASK) != 0
    init_instance(w, cpu_role, caps)
    init_nested(w, caps)
    w.pdptes_in_memory = w.level == 3
    if not gmet:
        w.user_always = <uint32_t>ACCESS_USER_MASK
    w.table_access = <uint32_t>ACCESS_WRITE_MASK
    w.fault_status = w.rsvd_status = STATUS_NESTED_PAGE_FAULT
    w.stage_final = PFERR_GUEST_FINAL_MASK
    w.stage_page = PFERR_GUEST_PAGE_MASK
    if reports_fetch(cpu_role, caps, host_smep):
        w.pferr_mask |= <uint32_t>ACCESS_FETCH_MASK
    use_walker(w)


# ---- formats -------------------------------------------------------------------------------------------------------------

cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, bint tdp) noexcept:
    """Fill the format of legacy tables, and the parameters it was made from. IN tdp: they are a second stage (NPT)."""
    cdef permission_params p
    cdef rsvd_params rsvd
    p.tdp = tdp
    p.ept = False
    p.smep = (role & ROLE_CR4_SMEP_MASK) != 0
    p.smap = (role & ROLE_EXT_CR4_SMAP_MASK) != 0
    p.wp = (role & ROLE_CR0_WP_MASK) != 0
    p.nx = (role & ROLE_EFER_NX_MASK) != 0
    p.shadow_stacks = not tdp and not caps.kvm          # KVM's walker knows no such accesses, and NPT does not restrict them
    fmt.params = p
    update_pkru_bitmask(&fmt.fmt, (role & ROLE_EXT_CR4_PKE_MASK) != 0, (role & ROLE_EXT_CR4_PKS_MASK) != 0, p.wp)
    update_permission_bitmask(&fmt.fmt, &p)
    rsvd.level = <int>(role & ROLE_LEVEL_MASK)
    rsvd.maxphyaddr = caps.maxphyaddr
    rsvd.nx = p.nx
    rsvd.gbpages = caps.gbpages
    rsvd.pse = (role & ROLE_EXT_CR4_PSE_MASK) != 0
    rsvd.pse36_bits = pse36_bits(caps)
    rsvd.amd = caps.amd
    rsvd.encryption_mask = caps.encryption_mask
    reset_guest_rsvds_bits_mask(&fmt.fmt, &rsvd)


cdef void fill_ept_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, int huge_page_level) noexcept:
    update_ept_permissions(fmt, (role & ROLE_CR4_SMEP_MASK) != 0, (role & ROLE_EXT_SHADOW_STACK_MASK) != 0)
    reset_ept_rsvds_bits_mask(&fmt.fmt, caps.maxphyaddr, (role & ROLE_EXT_EXECONLY_MASK) != 0, huge_page_level)
