"""The walk of guest page tables. The steps are listed in `_walk.pxd`."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvmmu._bits cimport (
    ACC_ALL, ACCESS_FETCH_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, GVA32_MASK, GVA_BITS_4_LEVEL, GVA_BITS_5_LEVEL,
    INVALID_GPA, KVMMU_BITS, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_4K, PT32_PAE_INDEX_MASK,
    PT32_PAE_INDEX_SHIFT, PT32_PSE36_KVM_BITS, PT32_PSE36_SHIFT, PT_ACCESSED_MASK, PT_DIRTY_MASK, PT_PAGE_SIZE_MASK,
    ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_LA57_MASK,
    ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PSE_MASK, ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EFER_LMA_MASK,
    ROLE_EXT_HAS_PFERR_FETCH_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_MASK, STATUS_NON_CANONICAL, STATUS_OK,
    STATUS_PAGE_FAULT,
)
from kvmmu._format cimport (
    has_rsvd_bits, kvm_page_format, permission_fault, permission_params, reset_guest_rsvds_bits_mask, rsvd_params,
    update_permission_bitmask, update_pkru_bitmask,
)
from kvmmu._gpte cimport (
    cmpxchg_gpte, gpte_access, gpte_index, gpte_pkey, gpte_rights, gpte_to_gpa, guest_walker, guest_walker32,
    guest_walker64, has_pdptrs, is_present_gpte, leaf_gpa, read_gpte,
)
from kvmmu._memory cimport gpa_to_hva
from kvmmu._walk cimport cpu_caps, kvm_pagewalk, walk_result, walk_step

# What an A/D update came to.
cdef enum:
    AD_DONE
    AD_RACE_LOST


cdef inline int update_accessed_dirty_bits(guest_walker *walker, bint write) noexcept nogil:
    """Step 7. Sets A on every entry of the walk and, for a write, D on the leaf; entries in read-only slots are skipped."""
    cdef int level
    cdef uint64_t pte, wanted
    for level in range(walker.top_level, walker.level - 1, -1):
        pte = walker.ptes[level - 1]
        wanted = pte | PT_ACCESSED_MASK
        if write and level == walker.level:
            wanted |= PT_DIRTY_MASK
        if wanted == pte or walker.pte_hva[level - 1] is NULL:
            continue
        if not cmpxchg_gpte(walker, walker.pte_hva[level - 1], pte, wanted):
            return AD_RACE_LOST
        walker.ptes[level - 1] = wanted
    return AD_DONE


cdef inline uint32_t walk_addr_once(guest_walker *walker, const kvm_pagewalk *w, uint64_t addr, uint32_t access,
                                    bint *race_lost, bint set_ad) noexcept nogil:
    """Steps 1 to 7 without the restart. Returns 0 or (STATUS_PAGE_FAULT << 16 | the P, RSVD and PK bits of the error code)."""
    cdef int level = w.level
    cdef uint64_t pte = w.vcpu.cr3
    cdef uint64_t rights = ~<uint64_t>0
    cdef uint64_t unset
    cdef uint32_t errcode, fault = <uint32_t>STATUS_PAGE_FAULT << 16
    cdef uint8_t *hva
    cdef bint readonly = False, write = (access & ACCESS_WRITE_MASK) != 0

    race_lost[0] = False
    walker.refs = 0
    walker.hole = False
    if has_pdptrs(walker, level):                                                   # step 1
        pte = w.vcpu.pdptrs[(addr >> PT32_PAE_INDEX_SHIFT) & PT32_PAE_INDEX_MASK]
        walker.level = level
        walker.ptes[level - 1] = pte
        walker.pte_gpa[level - 1] = INVALID_GPA
        walker.pte_access = 0
        if not is_present_gpte(walker, pte):
            return fault
        level -= 1
    walker.top_level = level

    while True:
        walker.level = level                                                        # step 2
        walker.pte_gpa[level - 1] = gpte_to_gpa(walker, pte) + gpte_index(walker, addr, level) * sizeof(walker.ptes[0])
        hva = gpa_to_hva(w.mem, walker.pte_gpa[level - 1], &readonly)
        walker.refs += 1
        if hva is NULL:
            walker.hole = True
            walker.ptes[level - 1] = 0
            walker.pte_access = 0
            return fault
        pte = read_gpte(walker, hva)
        walker.ptes[level - 1] = pte
        walker.pte_hva[level - 1] = NULL if readonly else hva
        rights &= gpte_rights(walker, pte)
        if not is_present_gpte(walker, pte):                                        # step 3
            walker.pte_access = 0
            return fault
        if has_rsvd_bits(w.fmt, pte, level):                                        # step 4
            walker.pte_access = gpte_access(walker, rights)
            return fault | <uint32_t>(PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
        if level == PG_LEVEL_4K or pte & w.page_size_mask:                          # step 5
            break
        level -= 1

    walker.pte_access = gpte_access(walker, rights)                                 # step 6
    errcode = permission_fault(w.fmt, w.vcpu.pkru, walker.pte_access, gpte_pkey(walker, pte), access)
    if errcode:
        return fault | errcode
    walker.gpa = leaf_gpa(walker, pte, level, addr, w.pse36_mask)

    # A of every entry, and for a write D of the leaf: rights hold the AND of all A bits
    unset = PT_ACCESSED_MASK & ~rights
    if write:
        unset |= PT_DIRTY_MASK & ~pte
    if unset and set_ad:                                                            # step 7
        race_lost[0] = update_accessed_dirty_bits(walker, write) == AD_RACE_LOST
    return 0


cdef inline uint32_t walk_addr_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t addr, uint32_t access,
                                       bint set_ad) noexcept nogil:
    """The walk, restarted until no entry changed under it. Each restart finds one more bit set by us or by somebody else."""
    cdef bint race_lost = True
    cdef uint32_t fault = 0
    while race_lost:
        fault = walk_addr_once(walker, w, addr, access, &race_lost, set_ad)
    return fault


cdef inline bint is_noncanonical(const kvm_pagewalk *w, uint64_t gva) noexcept nogil:
    return <uint64_t>(<int64_t>(gva << w.canonical_shift) >> w.canonical_shift) != gva


cdef inline void set_no_walk(walk_result *r, uint64_t gpa, uint8_t status) noexcept nogil:
    """A result that no entry was read for."""
    r.gpa = gpa
    r.pte = 0
    r.pte_gpa = INVALID_GPA
    r.error_code = 0
    r.status = status
    r.level = 0
    r.pte_access = <uint8_t>ACC_ALL
    r.refs = 0
    r.hole = False


cdef inline void gva_to_gpa_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad,
                                    walk_result *r) noexcept nogil:
    cdef uint64_t addr = gva & w.gva_mask
    cdef uint32_t fault
    if is_noncanonical(w, addr):
        set_no_walk(r, INVALID_GPA, STATUS_NON_CANONICAL)
        return
    fault = walk_addr_generic(walker, w, addr, access, set_ad)
    r.status = <uint8_t>(fault >> 16)
    r.gpa = INVALID_GPA if fault else walker.gpa
    r.error_code = ((fault & 0xffff) | (access & w.pferr_mask)) if fault else 0
    r.pte = walker.ptes[walker.level - 1]
    r.pte_gpa = walker.pte_gpa[walker.level - 1]
    r.level = <uint8_t>walker.level
    r.pte_access = <uint8_t>walker.pte_access
    r.refs = walker.refs
    r.hole = walker.hole


cdef inline int walk_steps_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                                   walk_step *steps) noexcept nogil:
    cdef uint64_t addr = gva & w.gva_mask
    cdef int level, n = 0
    if is_noncanonical(w, addr):
        return 0
    walk_addr_generic(walker, w, addr, access, False)
    for level in range(w.level, walker.level - 1, -1):
        steps[n].level = level
        steps[n].pte = walker.ptes[level - 1]
        steps[n].pte_gpa = walker.pte_gpa[level - 1]
        steps[n].access = 0
        if is_present_gpte(walker, walker.ptes[level - 1]):
            steps[n].access = gpte_access(walker, gpte_rights(walker, walker.ptes[level - 1]))
        n += 1
    return n


# ---- the instances ----------------------------------------------------------------------------------------------------

cdef void paging32_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef guest_walker32 walker
    gva_to_gpa_generic(&walker, w, gva, access, set_ad, r)


cdef int paging32_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef guest_walker32 walker
    return walk_steps_generic(&walker, w, gva, access, steps)


cdef void paging64_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef guest_walker64 walker
    gva_to_gpa_generic(&walker, w, gva, access, set_ad, r)


cdef int paging64_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef guest_walker64 walker
    return walk_steps_generic(&walker, w, gva, access, steps)


cdef void nonpaging_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    set_no_walk(r, gva & w.gva_mask, STATUS_OK)


cdef int nonpaging_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    return 0


# ---- from role and processor model to a walk ---------------------------------------------------------------------------

cdef int pse36_bits(const cpu_caps *caps) noexcept nogil:
    """Address bits above 31 in a 4M PDE: up to MAXPHYADDR, at most eight; KVM takes four whatever MAXPHYADDR is."""
    if not caps.pse36:
        return 0
    if caps.kvm:
        return PT32_PSE36_KVM_BITS
    return min(caps.maxphyaddr, 40) - 32


cdef void init_page_format(kvm_page_format *fmt, uint64_t cpu_role, const cpu_caps *caps) noexcept nogil:
    """The format of the tables of a paging role."""
    cdef permission_params p
    cdef rsvd_params rsvd
    p.tdp = False
    p.ept = False
    p.smep = (cpu_role & ROLE_CR4_SMEP_MASK) != 0
    p.smap = (cpu_role & ROLE_EXT_CR4_SMAP_MASK) != 0
    p.wp = (cpu_role & ROLE_CR0_WP_MASK) != 0
    p.nx = (cpu_role & ROLE_EFER_NX_MASK) != 0
    update_permission_bitmask(fmt, &p)
    update_pkru_bitmask(fmt, (cpu_role & ROLE_EXT_CR4_PKE_MASK) != 0, p.wp)
    rsvd.level = <int>(cpu_role & ROLE_LEVEL_MASK)
    rsvd.maxphyaddr = caps.maxphyaddr
    rsvd.nx = p.nx
    rsvd.gbpages = caps.gbpages
    rsvd.pse = (cpu_role & ROLE_EXT_CR4_PSE_MASK) != 0
    rsvd.pse36_bits = pse36_bits(caps)
    rsvd.amd = caps.amd
    reset_guest_rsvds_bits_mask(fmt, &rsvd)


cdef void init_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps) noexcept nogil:
    """All of w that follows from the role; mem, vcpu and fmt are the caller's."""
    cdef bint lma = (cpu_role & ROLE_EXT_EFER_LMA_MASK) != 0
    cdef bint reports_fetch = (cpu_role & ROLE_EXT_HAS_PFERR_FETCH_MASK) != 0
    w.cpu_role = cpu_role
    w.level = <int>(cpu_role & ROLE_LEVEL_MASK)
    w.gva_mask = ~<uint64_t>0 if lma else GVA32_MASK
    w.canonical_shift = 0
    if lma:
        w.canonical_shift = 64 - (GVA_BITS_5_LEVEL if cpu_role & ROLE_EXT_CR4_LA57_MASK else GVA_BITS_4_LEVEL)
    w.page_size_mask = PT_PAGE_SIZE_MASK
    w.pse36_mask = 0
    if cpu_role & ROLE_DIRECT_MASK:
        w.gva_to_gpa = nonpaging_gva_to_gpa
        w.walk_steps = nonpaging_walk_steps
        w.pferr_mask = 0
        return
    if cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK:
        w.gva_to_gpa = paging32_gva_to_gpa
        w.walk_steps = paging32_walk_steps
        if not cpu_role & ROLE_EXT_CR4_PSE_MASK:
            w.page_size_mask = 0
        if pse36_bits(caps):
            w.pse36_mask = KVMMU_BITS(PT32_PSE36_SHIFT, PT32_PSE36_SHIFT + pse36_bits(caps) - 1)
        if not caps.kvm:                            # the manuals: EFER.NXE counts for I/D only with PAE
            reports_fetch = (cpu_role & ROLE_CR4_SMEP_MASK) != 0
    else:
        w.gva_to_gpa = paging64_gva_to_gpa
        w.walk_steps = paging64_walk_steps
    w.pferr_mask = <uint32_t>(ACCESS_WRITE_MASK | ACCESS_USER_MASK)
    if reports_fetch:
        w.pferr_mask |= <uint32_t>ACCESS_FETCH_MASK
