"""The walk of guest page tables. The steps are listed in `_walk.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport (
    WALK_DIRECT, WALK_SECOND_STAGE, convert_ept_violation, get_guest_pgd, is_sub_page_write, kvm_pagewalk, log_dirty,
    pre_process, second_stage_access, second_stage_fault, set_no_walk, table_access, walk_result, walk_step,
)
from kvmmu.arch._bits cimport (
    ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_SUB_PAGE_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, ACC_ALL,
    ACC_READ_MASK, ACC_USER_MASK, INVALID_GPA, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_4K, PML_ENTITY_NUM,
    PT_PRESENT_MASK, ROLE_EXT_SHADOW_STACK_MASK, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT, STATUS_PML_FULL,
    STATUS_SPP_EVENT,
)
from kvmmu.arch._format cimport kvm_page_format, permission_fault
from kvmmu.arch._gpte cimport (
    KVMMU_FORMAT_32, KVMMU_FORMAT_64, cmpxchg_gpte, gpte_access, gpte_index, gpte_pkey, gpte_rights,
    gpte_shadow_stack, guest_walker, guest_walker32, guest_walker64, guest_walkerEPT, has_pdptrs, is_rsvd_bits_set,
    kvmmu_is_canonical, kvmmu_pdpte_gpa, kvmmu_pdpte_index, leaf_gpa, read_gpte,
)
from kvmmu.memory._memory cimport gpa_to_hva, guest_mem, kvmmu_lock, kvmmu_read64, kvmmu_unlock
from kvmmu.memory._vmx_memory cimport SUB_PAGE_ALLOWS, SUB_PAGE_EVENT, sub_page_verdict

# The result of an attempt, beside STATUS_*.
cdef enum:
    WALK_RACE_LOST = 0xff


# ---- the second stage, as the first one sees it ------------------------------------------------------------------------

cdef bint sub_page_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint set_ad, walk_result *s,
                       walk_result *r) noexcept nogil:
    """Make a write that EPT refuses if the sub-page permission table allows it. False: there is a fault. OUT s: how it ends"""
    cdef int verdict
    if n.cpu_role & ROLE_EXT_SHADOW_STACK_MASK and (
            access & (ACCESS_SHADOW_STACK_MASK | ACCESS_USER_MASK) == ACCESS_SHADOW_STACK_MASK):
        return False                        # it is no write right that is missing
    verdict = sub_page_verdict(n.mem, n.spptp, n.maxphyaddr, ngpa, &s.exit_qualification)
    if verdict == SUB_PAGE_EVENT:
        s.status = STATUS_SPP_EVENT
    elif verdict == SUB_PAGE_ALLOWS:
        n.gva_to_gpa(n, ngpa, access | <uint32_t>ACCESS_SUB_PAGE_MASK, set_ad, s)
    return s.status == STATUS_OK


cdef inline uint8_t nested_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access,
                               bint set_ad, uint64_t *gpa, walk_result *r) noexcept nogil:
    """`translate_nested_gpa()`, short enough to be inlined where it counts."""
    cdef walk_result s
    access = second_stage_access(n, access, final, pte_access)
    n.gva_to_gpa(n, ngpa, access, set_ad, &s)
    r.refs += s.refs
    if s.status == STATUS_OK:
        gpa[0] = s.gpa
        return STATUS_OK
    gpa[0] = INVALID_GPA
    if n.sub_pages and final and is_sub_page_write(n, access, &s):
        if sub_page_gpa(n, ngpa, access, set_ad, &s, r):
            gpa[0] = s.gpa
            return STATUS_OK
    return second_stage_fault(n, ngpa, access, final, pte_access, &s, r)


cdef uint8_t translate_nested_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access,
                                  bint set_ad, uint64_t *gpa, walk_result *r) noexcept nogil:
    return nested_gpa(n, ngpa, access, final, pte_access, set_ad, gpa, r)


# ---- the walk ----------------------------------------------------------------------------------------------------------

cdef inline uint8_t set_accessed_dirty_bits(guest_walker *walker, const kvm_pagewalk *w, uint64_t addr, bint write, bint logs,
                                            bint set_ad, walk_result *r) noexcept nogil:
    """Sets A on every entry of the walk and, for a write, D on the leaf; entries in read-only slots are skipped.

    IN logs: the leaf's D is clear, and a log has room for the page.
    """
    cdef int level
    cdef uint64_t pte, wanted, gpa
    cdef uint8_t status, refs = r.refs             # the check of a write right reads no entry again
    cdef bint leaf_dirties
    for level in range(walker.top_level, walker.level - 1, -1):
        pte = walker.ptes[level - 1]
        wanted = pte | w.accessed_mask
        leaf_dirties = write and level == walker.level
        if leaf_dirties:
            wanted |= w.accessed_mask << 1
        if wanted == pte:
            continue
        if w.ngpa is not NULL and not w.ngpa.table_access:          # only read so far: the update is a write of its own
            status = translate_nested_gpa(
                w.ngpa, walker.pte_gpa[level - 1], <uint32_t>ACCESS_WRITE_MASK, False, 0, set_ad, &gpa, r)
            r.refs = refs
            if status != STATUS_OK:
                return status
        if not set_ad:
            continue
        if leaf_dirties and logs:
            log_dirty(w, addr)
        if walker.pte_hva[level - 1] is not NULL and not cmpxchg_gpte(walker, walker.pte_hva[level - 1], pte, wanted):
            return WALK_RACE_LOST
        if leaf_dirties and logs:                   # now the entry counts
            w.pml.index -= 1
        if walker.pte_hva[level - 1] is NULL:
            continue
        if wanted & ~pte & w.accessed_mask:
            walker.accessed_set |= 1 << level
        if wanted & ~pte & (w.accessed_mask << 1):
            walker.dirty_set = True
        walker.ptes[level - 1] = wanted
    return STATUS_OK


cdef inline uint8_t update_accessed_dirty_bits(guest_walker *walker, const kvm_pagewalk *w, uint64_t addr, bint write,
                                               bint set_ad, walk_result *r) noexcept nogil:
    """Step 7. A page that becomes dirty takes an entry of the log, if there is one; a full log stops it before any bit is set."""
    cdef uint8_t status
    if not write or w.pml is NULL or walker.ptes[walker.level - 1] & (w.accessed_mask << 1):
        return set_accessed_dirty_bits(walker, w, addr, write, False, set_ad, r)
    kvmmu_lock(&w.pml.lock)                         # one page at a time, so that each has an entry of its own
    status = STATUS_PML_FULL
    if w.pml.index < PML_ENTITY_NUM:
        status = set_accessed_dirty_bits(walker, w, addr, write, True, set_ad, r)
    kvmmu_unlock(&w.pml.lock)
    return status


cdef inline uint8_t final_gpa(guest_walker *walker, const kvm_pagewalk *w, uint32_t access, bint set_ad,
                              walk_result *r) noexcept nogil:
    """Step 8."""
    if w.ngpa is NULL:
        return STATUS_OK
    return translate_nested_gpa(w.ngpa, walker.gpa, access, True, walker.pte_access, set_ad, &walker.gpa, r)


cdef uint8_t read_pdpte(const kvm_pagewalk *w, uint64_t addr, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    """Step 1 where PDPTEs are in memory. OUT r: pte, pte_gpa, hole, refs, all of a second-stage fault."""
    cdef uint64_t gpa = kvmmu_pdpte_gpa(get_guest_pgd(w), 0), offset
    cdef const uint8_t *hva
    cdef uint8_t status
    cdef bint readonly = False
    r.pte_gpa = kvmmu_pdpte_gpa(get_guest_pgd(w), kvmmu_pdpte_index(addr))
    offset = r.pte_gpa - gpa
    if w.ngpa is not NULL:
        status = translate_nested_gpa(w.ngpa, gpa, table_access(w.ngpa, access), False, 0, set_ad, &gpa, r)
        if status != STATUS_OK:                         # the exit names the table, not the entry
            return status
    r.refs += 1
    hva = gpa_to_hva(w.mem, gpa + offset, &readonly)
    r.hole = hva is NULL
    r.pte = 0 if hva is NULL else kvmmu_read64(hva)
    return STATUS_OK


cdef inline uint8_t shadow_stack_right(const guest_walker *walker) noexcept nogil:
    """ACC_SHADOW_STACK if the entries of a walk make a shadow-stack address: W in all of them but the leaf, which has the form of
    such a leaf."""
    cdef uint64_t upper = ~<uint64_t>0
    cdef int level
    for level in range(walker.level + 1, walker.top_level + 1):
        upper &= gpte_rights(walker, walker.ptes[level - 1])
    return <uint8_t>gpte_shadow_stack(walker, upper, walker.ptes[walker.level - 1])


cdef inline uint8_t walk_addr_once(guest_walker *walker, const kvm_pagewalk *w, uint64_t addr, uint32_t access, bint set_ad,
                                   walk_result *r) noexcept nogil:
    """Steps 1 to 8. Returns STATUS_* or WALK_RACE_LOST. OUT r: error_code (P, RSVD, PK), refs, all of a second-stage fault."""
    cdef int level = w.level
    cdef uint64_t pte = get_guest_pgd(w)
    cdef uint64_t rights = ~<uint64_t>0
    cdef uint64_t unset, gpa
    cdef uint32_t asked
    cdef uint8_t *hva
    cdef uint8_t status
    cdef bint readonly = False, write = (access & ACCESS_WRITE_MASK) != 0
    # in locals, because the compiler must take every store below for one to w
    cdef const guest_mem *mem = w.mem
    cdef const kvm_page_format *fmt = w.fmt
    cdef const kvm_pagewalk *ngpa = w.ngpa
    cdef uint64_t present_mask = w.present_mask, page_size_mask = w.page_size_mask, base_mask = w.base_mask

    r.refs = 0
    r.error_code = 0
    walker.hole = False
    if has_pdptrs(walker, level):                                                   # step 1
        walker.level = level
        walker.pte_gpa[level - 1] = INVALID_GPA
        walker.pte_access = 0
        if w.pdptes_in_memory:
            status = read_pdpte(w, addr, access, set_ad, r)
            if status != STATUS_OK:
                return status
            pte, walker.pte_gpa[level - 1], walker.hole = r.pte, r.pte_gpa, r.hole
        else:
            pte = w.vcpu.pdptrs[kvmmu_pdpte_index(addr)]
        walker.ptes[level - 1] = pte
        if not pte & PT_PRESENT_MASK:
            return STATUS_PAGE_FAULT
        if pte & w.pdpte_rsvd_mask:
            r.error_code = <uint32_t>(PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
            return STATUS_PAGE_FAULT
        level -= 1
    walker.top_level = level

    while True:
        walker.level = level                                                        # step 2
        gpa = (pte & base_mask) + gpte_index(walker, addr, level) * sizeof(walker.ptes[0])
        walker.pte_gpa[level - 1] = gpa
        if ngpa is not NULL:
            status = nested_gpa(ngpa, gpa, table_access(ngpa, access), False, 0, set_ad, &gpa, r)
            if status != STATUS_OK:
                return status
        hva = gpa_to_hva(mem, gpa, &readonly)
        r.refs += 1
        if hva is NULL:
            walker.hole = True
            walker.ptes[level - 1] = 0
            walker.pte_access = 0
            return STATUS_PAGE_FAULT
        pte = read_gpte(walker, hva)
        walker.ptes[level - 1] = pte
        walker.pte_hva[level - 1] = NULL if readonly else hva
        rights &= gpte_rights(walker, pte)
        if not pte & present_mask:                                                  # step 3
            walker.pte_access = 0
            return STATUS_PAGE_FAULT
        if is_rsvd_bits_set(walker, fmt, pte, level):                               # step 4
            walker.pte_access = gpte_access(walker, rights)
            r.error_code = <uint32_t>(PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
            return STATUS_PAGE_FAULT
        if level == PG_LEVEL_4K or pte & page_size_mask:                            # step 5
            break
        level -= 1

    walker.pte_access = gpte_access(walker, rights)                                 # step 6
    asked = walker.pte_access
    if access & ACCESS_SHADOW_STACK_MASK:
        r.shadow_stack = shadow_stack_right(walker)
        asked |= r.shadow_stack
    r.error_code = permission_fault(fmt, w.vcpu.keys, asked, gpte_pkey(walker, pte), access)
    if r.error_code:
        if not w.sub_pages or not access & ACCESS_SUB_PAGE_MASK or not walker.pte_access & ACC_READ_MASK:
            return STATUS_PAGE_FAULT
        r.error_code = 0                            # the sub-page permission table has allowed the write
    walker.gpa = r.ngpa = leaf_gpa(walker, pte & w.address_mask, level, addr, w.pse36_mask)

    if w.final_before_ad:
        status = final_gpa(walker, w, access, set_ad, r)
        if status != STATUS_OK:
            return status
    # A of every entry, and for a write D of the leaf: rights hold the AND of all A bits
    unset = w.accessed_mask & ~rights
    if write:
        unset |= (w.accessed_mask << 1) & ~pte
    if unset and not access & ACCESS_PROBE_MASK:                                    # step 7
        status = update_accessed_dirty_bits(walker, w, addr, write, set_ad, r)
        if status != STATUS_OK:
            return status
    return STATUS_OK if w.final_before_ad else final_gpa(walker, w, access, set_ad, r)      # step 8


cdef inline void gva_to_gpa_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad,
                                    walk_result *r) noexcept nogil:
    cdef uint64_t addr = gva & w.gva_mask
    cdef uint8_t status = WALK_RACE_LOST
    if not kvmmu_is_canonical(addr, w.canonical_shift):
        set_no_walk(r, INVALID_GPA, STATUS_NON_CANONICAL)
        return
    if addr & w.ngpa_rsvd_mask:
        set_no_walk(r, INVALID_GPA, STATUS_PAGE_FAULT)
        r.error_code = access & w.pferr_mask
        return
    r.ngpa = r.fault_gpa = INVALID_GPA
    r.exit_qualification = 0
    r.shadow_stack = 0
    walker.accessed_set, walker.dirty_set = 0, False
    while status == WALK_RACE_LOST:         # each restart finds one more bit set by us or by somebody else
        status = walk_addr_once(walker, w, addr, access, set_ad, r)
    r.status = status
    r.gpa = INVALID_GPA
    if status == STATUS_OK:
        r.gpa = walker.gpa
    elif status == STATUS_PAGE_FAULT:
        r.error_code |= access & w.pferr_mask
        r.ngpa = INVALID_GPA
    elif w.ngpa is not NULL:                # the entry that failed is the second stage's
        convert_ept_violation(w, addr, set_ad, r)
        return
    r.pte = walker.ptes[walker.level - 1]
    r.pte_gpa = walker.pte_gpa[walker.level - 1]
    r.level = <uint8_t>walker.level
    r.pte_access = <uint8_t>walker.pte_access
    r.hole = walker.hole


cdef inline int record_steps(const guest_walker *walker, const kvm_pagewalk *w, walk_step *steps) noexcept nogil:
    """Record the entries that a walk has read, root first. Returns their number."""
    cdef int level, n = 0
    for level in range(w.level, walker.level - 1, -1):
        steps[n].level = level
        steps[n].pte = walker.ptes[level - 1]
        steps[n].pte_gpa = walker.pte_gpa[level - 1]
        steps[n].access = 0
        steps[n].sets_accessed = steps[n].sets_dirty = False
        if steps[n].pte & w.present_mask:
            steps[n].access = gpte_access(walker, gpte_rights(walker, walker.ptes[level - 1]))
        n += 1
    return n


cdef inline void clear_steps(guest_walker *walker, const kvm_pagewalk *w) noexcept nogil:
    """Nothing read yet: no entry is known, at any level."""
    cdef int level
    for level in range(w.level):
        walker.ptes[level] = 0
        walker.pte_gpa[level] = INVALID_GPA
    walker.level = w.level + 1


cdef inline int walk_steps_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                                   walk_step *steps) noexcept nogil:
    cdef uint64_t addr = gva & w.gva_mask
    cdef walk_result r
    if not kvmmu_is_canonical(addr, w.canonical_shift) or addr & w.ngpa_rsvd_mask:
        return 0
    clear_steps(walker, w)
    walk_addr_once(walker, w, addr, access, False, &r)
    return record_steps(walker, w, steps)


cdef inline int walk_addr_generic(guest_walker *walker, const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                                  walk_step *steps) noexcept nogil:
    cdef int i, n
    clear_steps(walker, w)
    walker.accessed_set, walker.dirty_set = 0, False
    gva_to_gpa_generic(walker, w, gva, access, True, r)
    n = record_steps(walker, w, steps)
    for i in range(n):
        steps[i].sets_accessed = (walker.accessed_set >> steps[i].level) & 1
    if n:
        steps[n - 1].sets_dirty = walker.dirty_set
    return n


# ---- the instances ----------------------------------------------------------------------------------------------------

cdef void paging32_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef guest_walker32 walker
    gva_to_gpa_generic(&walker, w, gva, access, set_ad, r)


cdef int paging32_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef guest_walker32 walker
    return walk_steps_generic(&walker, w, gva, access, steps)


cdef int paging32_walk_addr(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                            walk_step *steps) noexcept nogil:
    cdef guest_walker32 walker
    return walk_addr_generic(&walker, w, gva, access, r, steps)


cdef void paging64_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef guest_walker64 walker
    gva_to_gpa_generic(&walker, w, gva, access, set_ad, r)


cdef int paging64_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef guest_walker64 walker
    return walk_steps_generic(&walker, w, gva, access, steps)


cdef int paging64_walk_addr(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                            walk_step *steps) noexcept nogil:
    cdef guest_walker64 walker
    return walk_addr_generic(&walker, w, gva, access, r, steps)


# Long mode where registers pre-process addresses

cdef void pre_processed_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad,
                                   walk_result *r) noexcept nogil:
    cdef uint8_t status
    if pre_process(w, &gva, access, &status):
        paging64_gva_to_gpa(w, gva, access, set_ad, r)
    else:
        set_no_walk(r, INVALID_GPA, status)


cdef int pre_processed_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef uint8_t status
    return paging64_walk_steps(w, gva, access, steps) if pre_process(w, &gva, access, &status) else 0


cdef int pre_processed_walk_addr(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                                 walk_step *steps) noexcept nogil:
    cdef uint8_t status
    if pre_process(w, &gva, access, &status):
        return paging64_walk_addr(w, gva, access, r, steps)
    set_no_walk(r, INVALID_GPA, status)
    return 0


cdef void ept_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef guest_walkerEPT walker
    gva_to_gpa_generic(&walker, w, gva, access, set_ad, r)


cdef int ept_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    cdef guest_walkerEPT walker
    return walk_steps_generic(&walker, w, gva, access, steps)


cdef int ept_walk_addr(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                       walk_step *steps) noexcept nogil:
    cdef guest_walkerEPT walker
    return walk_addr_generic(&walker, w, gva, access, r, steps)


cdef inline void translate_whole_gpa(const kvm_pagewalk *n, uint32_t access, uint32_t pte_access, bint set_ad,
                                     walk_result *r) noexcept nogil:
    """Translate r.ngpa by the second stage, with no first stage before it: the fault address is the whole address in either
    conformance."""
    r.status = translate_nested_gpa(n, r.ngpa, access, True, pte_access, set_ad, &r.gpa, r)
    if r.status != STATUS_OK:
        r.fault_gpa = r.ngpa


cdef void nonpaging_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    """Identity; under a second stage, that stage with every right of the first: each address is a user-mode one."""
    set_no_walk(r, gva & w.gva_mask, STATUS_OK)
    if w.ngpa is not NULL:
        translate_whole_gpa(w.ngpa, access, <uint32_t>ACC_ALL, set_ad, r)
        convert_ept_violation(w, r.ngpa, set_ad, r)


cdef void second_stage_gva_to_gpa(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad,
                                  walk_result *r) noexcept nogil:
    """Walk the second stage by itself: a final access whose U says whether the first stage would grant it to users."""
    cdef const kvm_pagewalk *n = w.ngpa
    cdef walk_result s
    cdef uint32_t pte_access = <uint32_t>ACC_ALL
    if not access & ACCESS_USER_MASK:
        pte_access &= ~<uint32_t>ACC_USER_MASK
    set_no_walk(r, gva, STATUS_OK)
    access = second_stage_access(n, access, True, pte_access)
    n.gva_to_gpa(n, gva, access, set_ad, &s)
    r.refs = s.refs
    if n.sub_pages and s.status != STATUS_OK and is_sub_page_write(n, access, &s):
        sub_page_gpa(n, gva, access, set_ad, &s, r)
    r.gpa = s.gpa
    if s.status == STATUS_OK:
        r.pte, r.pte_gpa, r.level, r.pte_access = s.pte, s.pte_gpa, s.level, s.pte_access
        return
    r.status = second_stage_fault(n, gva, access, True, pte_access, &s, r)
    r.gpa = INVALID_GPA
    r.fault_gpa = gva                       # the whole address in either conformance


cdef int nonpaging_walk_steps(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil:
    return 0


cdef int nonpaging_walk_addr(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                             walk_step *steps) noexcept nogil:
    w.gva_to_gpa(w, gva, access, True, r)
    return 0


# ---- which instance ----------------------------------------------------------------------------------------------------

cdef void use_walker(kvm_pagewalk *w) noexcept nogil:
    if w.kind == WALK_DIRECT:
        w.gva_to_gpa, w.walk_steps, w.walk_addr = nonpaging_gva_to_gpa, nonpaging_walk_steps, nonpaging_walk_addr
    elif w.kind == WALK_SECOND_STAGE:
        w.gva_to_gpa = second_stage_gva_to_gpa
    elif w.format == KVMMU_FORMAT_32:
        w.gva_to_gpa, w.walk_steps, w.walk_addr = paging32_gva_to_gpa, paging32_walk_steps, paging32_walk_addr
    elif w.pre_processes:
        w.gva_to_gpa, w.walk_steps, w.walk_addr = pre_processed_gva_to_gpa, pre_processed_walk_steps, pre_processed_walk_addr
    elif w.format == KVMMU_FORMAT_64:
        w.gva_to_gpa, w.walk_steps, w.walk_addr = paging64_gva_to_gpa, paging64_walk_steps, paging64_walk_addr
    else:
        w.gva_to_gpa, w.walk_steps, w.walk_addr = ept_gva_to_gpa, ept_walk_steps, ept_walk_addr
