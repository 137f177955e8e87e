"""Prefixes of walks, and the tables that a batch keeps them in; see `_psc.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, second_stage_access
from kvmmu.arch._bits cimport (
    ACCESS_USER_MASK, ACCESS_WRITE_MASK, ACC_ALL, CR3_PAE_PDPT_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_1G,
    PG_LEVEL_2M, PG_LEVEL_4K, PT32_INDEX_MASK, PT32_PAE_INDEX_MASK, PT32_PAE_INDEX_SHIFT, PT64_INDEX_MASK, PT_PRESENT_MASK,
)
from kvmmu.arch._format cimport KVMMU_LOOK_ACCESS_SHIFT, kvm_page_format, permission_fault
from kvmmu.arch._gpte cimport (
    KVMMU_FORMAT_32, KVMMU_FORMAT_64, gpte_access, gpte_index, gpte_rights, gpte_to_gpa, guest_walker, guest_walker32,
    guest_walker64, guest_walkerEPT, has_pdptrs, is_rsvd_bits_set, kvmmu_gpte_access, kvmmu_gpte_malformed, kvmmu_gpte_pkey,
    kvmmu_gpte_rights, kvmmu_leaf_gpa, kvmmu_level_shift, read_gpte,
)
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport gpa_to_hva, kvmmu_read64
from kvmmu.walk.batch._lanes cimport (
    PREFIX_ACCESS_SHIFT, PREFIX_ADDR_MASK, PREFIX_ASID_BITS, PREFIX_BITS, PREFIX_COLD_SHIFT, PREFIX_HVA_MASK,
    PREFIX_LEVEL_SHIFT, PREFIX_READONLY_SHIFT, PREFIX_REFUSED_SHIFT, PREFIX_TABLE_SHIFT, PREFIX_TAG_COLD, TLB_ASID_BITS,
    TLB_BITS, kvmmu_entry_hva, kvmmu_prefix, kvmmu_prefix_level, kvmmu_prefix_place_of, kvmmu_prefix_slot, kvmmu_prefix_tag,
    kvmmu_read_entry, kvmmu_region, kvmmu_tlb_entry, kvmmu_use_tables,
)
from kvmmu.walk.batch._psc cimport (
    JUDGED_FAULT, JUDGED_OK, JUDGED_SLOW, forget_upper, judged_entry, lane_space, mark_word, start_patience, walk_tables,
)

cdef uint64_t[512] NO_TABLE             # what lies in a hole: zeros, not present in any format


cdef uint64_t table_of(const lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil:
    cdef uint64_t hva = ref & PREFIX_HVA_MASK
    cdef int level = <int>kvmmu_prefix_level(ref), format = s.w.format
    if level == PG_LEVEL_4K:
        return hva
    if hva == <uint64_t><uintptr_t>NO_TABLE or level >= s.w.level:
        return 0
    addr >>= kvmmu_level_shift(format, level)
    if format == KVMMU_FORMAT_32:
        return hva - (addr & PT32_INDEX_MASK) * sizeof(uint32_t)
    return hva - (addr & PT64_INDEX_MASK) * sizeof(uint64_t)


cdef void enter_prefix(kvmmu_prefix *p, uint64_t tag, uint64_t ref) noexcept nogil:
    p.tag = tag | PREFIX_TAG_COLD if (ref >> PREFIX_COLD_SHIFT) & 1 else tag
    p.ref = ref


cdef void remember_table(lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil:
    cdef uint64_t table = table_of(s, ref, addr)
    if table and <int>kvmmu_prefix_level(ref) == s.stage.level:
        enter_prefix(&s.stage.prefixes[kvmmu_prefix_place_of(&s.stage, addr)], addr >> s.stage.region_shift ^ s.stage.space,
                     (ref & ~PREFIX_HVA_MASK) | table | <uint64_t>1 << PREFIX_TABLE_SHIFT)


cdef void init_space(lane_space *s, const kvm_pagewalk *w, walk_tables *tables, int stage, lane_space *second, uint32_t asid,
                     bint set_ad, uint8_t *touched) noexcept nogil:
    s.touched = touched
    s.w, s.second = w, second
    s.found = 0
    forget_upper(s)
    s.lane.fmt = w.fmt
    s.lane.present_mask, s.lane.page_size_mask, s.lane.pse36_mask = w.present_mask, w.page_size_mask, w.pse36_mask
    s.lane.accessed_mask = w.accessed_mask
    s.lane.pkru = w.vcpu.pkru
    s.lane.asid = asid
    # without stores the bits do not count, unless their update would be a write of its own, or fill a log
    if not set_ad and w.pml is NULL and (w.ngpa is NULL or w.ngpa.table_access):
        s.lane.accessed_mask = 0
    s.sets_ad = set_ad
    s.stage.prefixes = tables.prefixes[stage]
    kvmmu_use_tables(w.format, &s.stage, asid, PG_LEVEL_4K)
    s.stage.gva_mask = w.gva_mask
    if not w.canonical_shift:                   # addresses that these tables cannot translate have no prefix
        s.stage.gva_mask = w.gva_mask & PREFIX_ADDR_MASK | w.ngpa_rsvd_mask
    s.stage.nothing = <uint64_t><uintptr_t>NO_TABLE
    s.known = False
    start_patience(&s.sure, 1)


cdef int judge_one(const lane_space *s, uint64_t ref, uint64_t entry, uint64_t addr, uint32_t look,
                   judged_entry *out) noexcept nogil:
    cdef int format = s.w.format
    cdef const kvm_page_format *fmt = s.lane.fmt
    cdef uint32_t level = <uint32_t>kvmmu_prefix_level(ref), access = look >> KVMMU_LOOK_ACCESS_SHIFT
    cdef uint64_t pte, need = s.lane.accessed_mask
    pte = out.pte = kvmmu_read_entry(format, entry)
    out.pte_access = <uint32_t>((ref >> PREFIX_ACCESS_SHIFT) & kvmmu_gpte_access(format, kvmmu_gpte_rights(format, pte)))
    out.error = 0
    if not pte & s.lane.present_mask:
        return JUDGED_FAULT
    if kvmmu_gpte_malformed(format, fmt.rsvd_bits_mask[0][level - 1], fmt.rsvd_bits_mask[1][level - 1], fmt.bad_mt_xwr, pte):
        out.error = <uint32_t>(PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
        return JUDGED_FAULT
    if level > PG_LEVEL_4K and not pte & s.lane.page_size_mask:
        return JUDGED_SLOW
    out.error = permission_fault(fmt, s.lane.pkru, out.pte_access, kvmmu_gpte_pkey(format, pte), access)
    if out.error:
        return JUDGED_FAULT
    out.gpa = kvmmu_leaf_gpa(format, pte, level, addr, s.lane.pse36_mask)
    if access & ACCESS_WRITE_MASK:
        need |= need << 1
    if need & ~pte or (need and (ref >> PREFIX_COLD_SHIFT) & 1):
        return JUDGED_SLOW
    return JUDGED_OK


cdef bint warm_table_gpa(const lane_space *second, uint64_t ngpa, uint64_t *gpa, bint *refused) noexcept nogil:
    """The second stage of a table of the first, if it needs no accessed or dirty bit set. OUT refused: it does not let a later
    update of an entry pass, or would have to be asked by the scalar walk."""
    cdef const kvm_pagewalk *n = second.w
    cdef uint64_t ref, entry
    cdef uint32_t access
    cdef judged_entry judged
    if ngpa & n.ngpa_rsvd_mask:
        return False
    ngpa &= n.gva_mask & PREFIX_ADDR_MASK
    ref = prefix_of(<lane_space *>second, ngpa)
    if not ref:
        return False
    access = second_stage_access(n, n.table_access | <uint32_t>ACCESS_USER_MASK, False, 0)
    entry = kvmmu_entry_hva(n.format, ref, ngpa)
    if judge_one(second, ref, entry, ngpa, n.fmt.looks[access], &judged) != JUDGED_OK:
        return False
    mark_word(second.touched, entry)
    gpa[0] = judged.gpa
    if not n.table_access:
        access = second_stage_access(n, <uint32_t>ACCESS_WRITE_MASK, False, 0)
        refused[0] = judge_one(second, ref, entry, ngpa, n.fmt.looks[access], &judged) != JUDGED_OK
    return True


cdef inline uint64_t prefix_word(const uint8_t *hva, int level, uint64_t access, bint cold, bint readonly,
                                 bint refused) noexcept nogil:
    """A prefix, or 0 if the address is too wide for one."""
    cdef uint64_t address = <uint64_t><uintptr_t>hva
    if address & ~PREFIX_HVA_MASK:
        return 0
    return (address | <uint64_t>cold << PREFIX_COLD_SHIFT | <uint64_t>readonly << PREFIX_READONLY_SHIFT |
            <uint64_t>refused << PREFIX_REFUSED_SHIFT |
            <uint64_t>level << PREFIX_LEVEL_SHIFT | access << PREFIX_ACCESS_SHIFT |
            <uint64_t>(level == PG_LEVEL_4K) << PREFIX_TABLE_SHIFT)


cdef inline uint64_t find_prefix_generic(const guest_walker *walker, lane_space *s, uint64_t addr) noexcept nogil:
    """Steps 1 to 5 of the walk (`_walk.pxd`), looked at and not touched, up to the last entry."""
    cdef const kvm_pagewalk *w = s.w
    cdef int level = w.level
    cdef uint64_t pte = w.vcpu.nested_pgd if w.is_nested else w.vcpu.cr3
    cdef uint64_t rights = ~<uint64_t>0, gpa, offset
    cdef const uint8_t *hva
    cdef bint readonly = False, cold = False, refused = False
    cdef bint asks_second = w.ngpa is not NULL and not w.ngpa.table_access      # for every update of an entry
    cdef uint64_t upper = addr >> kvmmu_level_shift(w.format, PG_LEVEL_1G)
    if s.upper == upper:
        level, pte, rights = PG_LEVEL_2M, s.upper_pte, s.upper_rights
    elif has_pdptrs(walker, level):
        if w.pdptes_in_memory:
            gpa = (pte & CR3_PAE_PDPT_MASK) + ((addr >> PT32_PAE_INDEX_SHIFT) & PT32_PAE_INDEX_MASK) * sizeof(pte)
            if s.second is not NULL and not warm_table_gpa(s.second, gpa, &gpa, &refused):
                return 0
            hva = gpa_to_hva(w.mem, gpa, &readonly)
            if hva is NULL:
                return 0
            pte = kvmmu_read64(hva)
            mark_word(s.touched, <uint64_t><uintptr_t>hva)
            if not pte & PT_PRESENT_MASK or pte & w.pdpte_rsvd_mask:
                return 0
        else:
            hva = <const uint8_t *>&w.vcpu.pdptrs[(addr >> PT32_PAE_INDEX_SHIFT) & PT32_PAE_INDEX_MASK]
            pte = kvmmu_read64(hva)
            if not pte & PT_PRESENT_MASK:
                return prefix_word(hva, level, ACC_ALL, False, True, False)
        level -= 1
    while True:
        if level == PG_LEVEL_2M and not cold:
            s.upper, s.upper_pte, s.upper_rights = upper, pte, rights
        offset = gpte_index(walker, addr, level) * sizeof(walker.ptes[0])
        gpa = gpte_to_gpa(walker, pte) + offset
        if s.second is not NULL and not warm_table_gpa(s.second, gpa, &gpa, &refused):
            return 0
        hva = gpa_to_hva(w.mem, gpa, &readonly)
        if hva is NULL:
            return prefix_word(<const uint8_t *>NO_TABLE, level, gpte_access(walker, rights), cold, True, False)
        if level == PG_LEVEL_4K:
            return prefix_word(hva - offset, level, gpte_access(walker, rights), cold, readonly, refused)
        pte = read_gpte(walker, hva)
        if not pte & w.present_mask or is_rsvd_bits_set(walker, w.fmt, pte, level) or pte & w.page_size_mask:
            return prefix_word(hva, level, gpte_access(walker, rights), cold, readonly, refused)
        mark_word(s.touched, <uint64_t><uintptr_t>hva)
        rights &= gpte_rights(walker, pte)
        if s.lane.accessed_mask & ~pte and (not readonly or asks_second):
            cold = True
        level -= 1


cdef inline bint is_tagged(const kvmmu_prefix *p, uint64_t tag) noexcept nogil:
    """Whether this is the prefix for a tag, cold or not."""
    return (p.tag ^ tag) & ~PREFIX_TAG_COLD == 0


cdef uint64_t find_prefix(lane_space *s, uint64_t addr) noexcept nogil:
    cdef guest_walker32 walker32
    cdef guest_walker64 walker64
    cdef guest_walkerEPT walkerEPT
    cdef uint64_t ref, tag, region = kvmmu_region(s.w.format, addr)
    cdef kvmmu_prefix *p
    if s.w.format == KVMMU_FORMAT_32:
        ref = find_prefix_generic(&walker32, s, addr)
    elif s.w.format == KVMMU_FORMAT_64:
        ref = find_prefix_generic(&walker64, s, addr)
    else:
        ref = find_prefix_generic(&walkerEPT, s, addr)
    if ref:
        p = &s.stage.prefixes[kvmmu_prefix_slot(region, s.lane.asid)]
        tag = kvmmu_prefix_tag(region, s.lane.asid)
        s.found += not is_tagged(p, tag)
        enter_prefix(p, tag, ref)
    return ref


cdef uint64_t prefix_of(lane_space *s, uint64_t addr) noexcept nogil:
    cdef uint64_t region = kvmmu_region(s.w.format, addr)
    cdef const kvmmu_prefix *p = &s.stage.prefixes[kvmmu_prefix_slot(region, s.lane.asid)]
    if is_tagged(p, kvmmu_prefix_tag(region, s.lane.asid)):
        return p.ref
    return find_prefix(s, addr)


cdef void forget_all(walk_tables *tables) noexcept nogil:
    cdef int stage
    for stage in range(2):
        memset(tables.prefixes[stage], 0, sizeof(kvmmu_prefix) << PREFIX_BITS)
    memset(tables.tlb, 0, sizeof(kvmmu_tlb_entry) << TLB_BITS)


cdef WalkCache new_walk_cache():
    return WalkCache.__new__(WalkCache, maker())


cdef class WalkCache:
    def __cinit__(self, mark=None, *args):
        cdef int stage
        cdef bint whole = True
        check_maker(mark, "a WalkCache is made by a batch")
        for stage in range(2):
            self.tables.prefixes[stage] = <kvmmu_prefix *>calloc(1 << PREFIX_BITS, sizeof(kvmmu_prefix))
            whole = whole and self.tables.prefixes[stage] is not NULL
        self.tables.tlb = <kvmmu_tlb_entry *>calloc(1 << TLB_BITS, sizeof(kvmmu_tlb_entry))
        if not whole or self.tables.tlb is NULL:
            raise MemoryError
        self.next_asid = self.next_space = 1

    def __dealloc__(self):
        for stage in range(2):
            free(self.tables.prefixes[stage])
        free(self.tables.tlb)

    cdef uint32_t take_asids(self, uint64_t count) noexcept nogil:
        cdef uint32_t first
        cdef int stage
        if count >= (<uint64_t>1 << PREFIX_ASID_BITS):
            return 0
        if self.next_asid + count > (<uint64_t>1 << PREFIX_ASID_BITS):
            for stage in range(2):
                memset(self.tables.prefixes[stage], 0, sizeof(kvmmu_prefix) << PREFIX_BITS)
            self.next_asid = 1
        first = self.next_asid
        self.next_asid = first + <uint32_t>count
        return first

    cdef uint32_t take_spaces(self, uint64_t count) noexcept nogil:
        cdef uint32_t first
        if count >= (<uint64_t>1 << TLB_ASID_BITS):
            return 0
        if self.next_space + count > (<uint64_t>1 << TLB_ASID_BITS):
            memset(self.tables.tlb, 0, sizeof(kvmmu_tlb_entry) << TLB_BITS)
            self.next_space = 1
        first = self.next_space
        self.next_space = first + <uint32_t>count
        return first
