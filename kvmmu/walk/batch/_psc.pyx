"""The paging-structure cache of a batch; see `_psc.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmmu._walk cimport get_guest_pgd, kvm_pagewalk, second_stage_access
from kvmmu.arch._bits cimport (
    ACCESS_USER_MASK, ACCESS_WRITE_MASK, ACC_ALL, EPT_MT_XWR_MASK, EPT_RWX_MASK, PG_LEVEL_2M, PG_LEVEL_4K,
    PT32_INDEX_MASK, PT64_INDEX_MASK, PT_PRESENT_MASK,
)
from kvmmu.arch._gpte cimport (
    KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT, gpte_access, gpte_index, gpte_rights, guest_walker, guest_walker32,
    guest_walker64, guest_walkerEPT, has_pdptrs, is_rsvd_bits_set, kvmmu_is_good_pdpte, kvmmu_level_shift, kvmmu_pdpte_gpa,
    kvmmu_pdpte_index, read_gpte,
)
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport gpa_to_hva, guest_slot, kvmmu_read64
from kvmmu.walk.batch._kernels cimport (
    MEMO_BITS, MEMO_ID_BITS, PSCE_ACCESSED_CLEAR_SHIFT, PSCE_ACCESS_SHIFT, PSCE_HVA_MASK, PSCE_LEVEL_SHIFT,
    PSCE_READONLY_SHIFT, PSCE_TABLE_SHIFT, PSCE_WRITE_REFUSED_SHIFT, PSC_ADDR_MASK, PSC_BITS, PSC_TAG_ACCESSED_CLEAR,
    PSC_WALK_ID_BITS, kvmmu_addr_tag, kvmmu_descent, kvmmu_entry_hva, kvmmu_memo_entry, kvmmu_psc_entry, kvmmu_psc_slot,
    kvmmu_psc_slot_of, kvmmu_psc_tag, kvmmu_psce_level, kvmmu_use_tables,
)
from kvmmu.walk.batch._leaf cimport LEAF_OK, check_leaf, leaf_result
from kvmmu.walk.batch._psc cimport MANY_DEPEND, cached_walk, mark_word, reset_backoff, touched_words, walk_tables

cdef uint64_t[512] NO_TABLE             # read where a table lies in a hole: zeros are not present in any format


cdef inline uint64_t entry_offset(int format, uint64_t addr, int level) noexcept nogil:
    """Return the offset of the entry of an address in its table of a level."""
    addr >>= kvmmu_level_shift(format, level)
    if format == KVMMU_FORMAT_32:
        return (addr & PT32_INDEX_MASK) * sizeof(uint32_t)
    return (addr & PT64_INDEX_MASK) * sizeof(uint64_t)


cdef uint64_t table_of(const cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil:
    cdef uint64_t hva = psce & PSCE_HVA_MASK
    cdef int level = <int>kvmmu_psce_level(psce), format = s.w.format
    if level == PG_LEVEL_4K:
        return hva
    if hva == <uint64_t><uintptr_t>NO_TABLE or level >= s.w.level:
        return 0
    return hva - entry_offset(format, addr, level)


cdef void enter_psce(kvmmu_psc_entry *p, uint64_t tag, uint64_t psce) noexcept nogil:
    p.tag = tag | PSC_TAG_ACCESSED_CLEAR if (psce >> PSCE_ACCESSED_CLEAR_SHIFT) & 1 else tag
    p.value = psce


cdef void remember_table(cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil:
    cdef uint64_t table = table_of(s, psce, addr)
    if table and <int>kvmmu_psce_level(psce) == s.checker.level:
        enter_psce(&s.checker.psc[kvmmu_psc_slot_of(&s.checker, addr)], addr >> s.checker.tag_shift ^ s.checker.walk_tag,
                   (psce & ~PSCE_HVA_MASK) | table | <uint64_t>1 << PSCE_TABLE_SHIFT)


cdef void init_descent(cached_walk *s) noexcept nogil:
    """Work out which entries of level 2 lead to tables of the largest slot."""
    cdef const kvm_pagewalk *w = s.w
    cdef const guest_slot *slot = w.mem.slots
    cdef kvmmu_descent *d = &s.descent
    cdef uint64_t hva = <uint64_t><uintptr_t>slot.hva
    d.want = s.rules.accessed_mask | (EPT_RWX_MASK if w.format == KVMMU_FORMAT_EPT else w.present_mask)
    d.care = d.want | w.page_size_mask | w.fmt.rsvd_bits_mask[0][PG_LEVEL_2M - 1]
    if w.format == KVMMU_FORMAT_EPT:
        d.care |= EPT_MT_XWR_MASK
    if d.want & w.fmt.rsvd_bits_mask[0][PG_LEVEL_2M - 1] or hva + slot.size > PSCE_HVA_MASK or w.format == KVMMU_FORMAT_32:
        d.care = 0
    d.gva_mask, d.base = s.checker.gva_mask, w.base_mask
    d.nothing = s.checker.nothing
    d.gpa, d.size, d.hva = slot.gpa, slot.size, hva - slot.gpa
    d.psce = psce_word(NULL, PG_LEVEL_4K, 0, False, slot.readonly, False)
    d.present_mask, d.page_size_mask = w.present_mask, w.page_size_mask


cdef void init_cached_walk(cached_walk *s, const kvm_pagewalk *w, walk_tables *tables, int stage, cached_walk *second,
                           uint32_t walk_id, bint set_ad, bint shadow_stacks, touched_words *touched) noexcept nogil:
    s.touched = touched
    s.w, s.second = w, second
    s.found = 0
    s.rules.fmt = w.fmt
    s.rules.present_mask, s.rules.page_size_mask, s.rules.pse36_mask = w.present_mask, w.page_size_mask, w.pse36_mask
    s.rules.accessed_mask, s.rules.address_mask = w.accessed_mask, w.address_mask
    s.rules.keys = w.vcpu.keys
    s.rules.shadow_stacks = shadow_stacks
    s.rules.walk_id = walk_id
    # Without stores the bits do not count, unless their update would be a write of its own, or fill a log.
    if not set_ad and w.pml is NULL and (w.ngpa is NULL or w.ngpa.table_access):
        s.rules.accessed_mask = 0
    s.rules.sets_ad, s.rules.logs, s.rules.format = set_ad, w.pml is not NULL, w.format
    s.checker.psc = tables.psc[stage]
    kvmmu_use_tables(w.format, &s.checker, walk_id, PG_LEVEL_4K)
    s.checker.base = w.base_mask
    s.checker.gva_mask = w.gva_mask
    if not w.canonical_shift:                   # addresses that these tables cannot translate have no entry
        s.checker.gva_mask = w.gva_mask & PSC_ADDR_MASK | w.ngpa_rsvd_mask
    s.checker.nothing = <uint64_t><uintptr_t>NO_TABLE
    s.has_masks = False
    reset_backoff(&s.mask_backoff, 1)
    s.directories.psc, s.directories.gva_mask, s.directories.nothing = s.checker.psc, s.checker.gva_mask, s.checker.nothing
    kvmmu_use_tables(w.format, &s.directories, walk_id, PG_LEVEL_2M)
    s.descent.care = 0
    if second is NULL and w.fmt is not NULL:
        init_descent(s)


cdef bint cached_table_gpa(const cached_walk *second, uint64_t ngpa, uint64_t *gpa, bint *write_refused) noexcept nogil:
    """Translate the address of an entry of the first stage, if that sets no accessed or dirty bit. OUT write_refused: the second
    stage does not grant a later update of the entry, or only the scalar walk can tell."""
    cdef const kvm_pagewalk *n = second.w
    cdef uint64_t psce, entry
    cdef uint32_t access
    cdef leaf_result leaf
    if ngpa & n.ngpa_rsvd_mask:
        return False
    ngpa &= n.gva_mask & PSC_ADDR_MASK
    psce = psce_of(<cached_walk *>second, ngpa)
    if not psce:
        return False
    access = second_stage_access(n, n.table_access | <uint32_t>ACCESS_USER_MASK, False, 0)
    entry = kvmmu_entry_hva(n.format, psce, ngpa)
    if check_leaf(&second.rules, psce, entry, ngpa, n.fmt.access_info[access], &leaf) != LEAF_OK:
        return False
    mark_word(second.touched, entry, MANY_DEPEND)
    gpa[0] = leaf.gpa
    if not n.table_access:
        access = second_stage_access(n, <uint32_t>ACCESS_WRITE_MASK, False, 0)
        write_refused[0] = check_leaf(&second.rules, psce, entry, ngpa, n.fmt.access_info[access], &leaf) != LEAF_OK
    return True


cdef inline uint64_t psce_word(const uint8_t *hva, int level, uint64_t access, bint accessed_clear, bint readonly,
                               bint write_refused) noexcept nogil:
    """Return a psce, or 0 if the address is too wide for one."""
    cdef uint64_t address = <uint64_t><uintptr_t>hva
    if address & ~PSCE_HVA_MASK:
        return 0
    return (address | <uint64_t>accessed_clear << PSCE_ACCESSED_CLEAR_SHIFT | <uint64_t>readonly << PSCE_READONLY_SHIFT |
            <uint64_t>write_refused << PSCE_WRITE_REFUSED_SHIFT |
            <uint64_t>level << PSCE_LEVEL_SHIFT | access << PSCE_ACCESS_SHIFT |
            <uint64_t>(level == PG_LEVEL_4K) << PSCE_TABLE_SHIFT)


cdef inline uint64_t find_psce_generic(const guest_walker *walker, cached_walk *s, uint64_t addr) noexcept nogil:
    """Return the psce of addr: steps 1 to 5 of the walk (`_walk.pxd`) down to the last entry, which set no bits."""
    cdef const kvm_pagewalk *w = s.w
    cdef int level = w.level
    cdef uint64_t pte = get_guest_pgd(w)
    cdef uint64_t rights = ~<uint64_t>0, upper_access = ACC_ALL, acc, psce = 0, gpa, offset
    cdef const uint8_t *hva
    cdef bint readonly = False, accessed_clear = False, write_refused = False
    cdef bint asks_second = w.ngpa is not NULL and not w.ngpa.table_access      # for every update of an entry
    cdef uint64_t directory_tag = addr >> s.directories.tag_shift ^ s.directories.walk_tag
    cdef kvmmu_psc_entry *directory = &s.directories.psc[kvmmu_psc_slot_of(&s.directories, addr)]
    cdef bint is_known = directory.tag == directory_tag
    if is_known:
        psce = directory.value
        level, upper_access = PG_LEVEL_2M, psce >> PSCE_ACCESS_SHIFT & ACC_ALL
        readonly, write_refused = (psce >> PSCE_READONLY_SHIFT) & 1, (psce >> PSCE_WRITE_REFUSED_SHIFT) & 1
    elif has_pdptrs(walker, level):
        if w.pdptes_in_memory:
            gpa = kvmmu_pdpte_gpa(pte, kvmmu_pdpte_index(addr))
            if s.second is not NULL and not cached_table_gpa(s.second, gpa, &gpa, &write_refused):
                return 0
            hva = gpa_to_hva(w.mem, gpa, &readonly)
            if hva is NULL:
                return 0
            pte = kvmmu_read64(hva)
            mark_word(s.touched, <uint64_t><uintptr_t>hva, MANY_DEPEND)
            if not kvmmu_is_good_pdpte(pte, w.pdpte_rsvd_mask):
                return 0
        else:
            hva = <const uint8_t *>&w.vcpu.pdptrs[kvmmu_pdpte_index(addr)]
            pte = kvmmu_read64(hva)
            if not pte & PT_PRESENT_MASK:
                return psce_word(hva, level, ACC_ALL, False, True, False)
        level -= 1
    while True:
        acc = gpte_access(walker, rights) & upper_access
        offset = gpte_index(walker, addr, level) * sizeof(walker.ptes[0])
        if is_known:
            hva, is_known = <const uint8_t *><uintptr_t>(psce & PSCE_HVA_MASK) + offset, False
        else:
            gpa = (pte & w.base_mask) + offset
            if s.second is not NULL and not cached_table_gpa(s.second, gpa, &gpa, &write_refused):
                return 0
            hva = gpa_to_hva(w.mem, gpa, &readonly)
            if hva is NULL:
                return psce_word(<const uint8_t *>NO_TABLE, level, acc, accessed_clear, True, False)
            if level == PG_LEVEL_2M and not accessed_clear:
                psce = psce_word(hva - offset, level, acc, False, readonly, write_refused)
                if psce:
                    enter_psce(directory, directory_tag, psce | <uint64_t>1 << PSCE_TABLE_SHIFT)
        if level == PG_LEVEL_4K:
            return psce_word(hva - offset, level, acc, accessed_clear, readonly, write_refused)
        pte = read_gpte(walker, hva)
        if not pte & w.present_mask or is_rsvd_bits_set(walker, w.fmt, pte, level) or pte & w.page_size_mask:
            return psce_word(hva, level, acc, accessed_clear, readonly, write_refused)
        mark_word(s.touched, <uint64_t><uintptr_t>hva, MANY_DEPEND)
        rights &= gpte_rights(walker, pte)
        if s.rules.accessed_mask & ~pte and (not readonly or asks_second):
            accessed_clear = True
        level -= 1


cdef inline bint is_tagged(const kvmmu_psc_entry *p, uint64_t tag) noexcept nogil:
    """True if an entry has this tag, whatever its flag."""
    return (p.tag ^ tag) & ~PSC_TAG_ACCESSED_CLEAR == 0


cdef void remember_psce(cached_walk *s, uint64_t addr, uint64_t psce) noexcept nogil:
    cdef uint64_t addr_tag = kvmmu_addr_tag(s.w.format, addr)
    cdef uint64_t tag = kvmmu_psc_tag(addr_tag, s.rules.walk_id)
    cdef kvmmu_psc_entry *p = &s.checker.psc[kvmmu_psc_slot(addr_tag, s.rules.walk_id)]
    s.found += not is_tagged(p, tag)
    enter_psce(p, tag, psce)


cdef uint64_t find_psce(cached_walk *s, uint64_t addr) noexcept nogil:
    cdef guest_walker32 walker32
    cdef guest_walker64 walker64
    cdef guest_walkerEPT walkerEPT
    cdef uint64_t psce
    if s.w.format == KVMMU_FORMAT_32:
        psce = find_psce_generic(&walker32, s, addr)
    elif s.w.format == KVMMU_FORMAT_64:
        psce = find_psce_generic(&walker64, s, addr)
    else:
        psce = find_psce_generic(&walkerEPT, s, addr)
    if psce:
        remember_psce(s, addr, psce)
    return psce


cdef uint64_t psce_of(cached_walk *s, uint64_t addr) noexcept nogil:
    cdef uint64_t addr_tag = kvmmu_addr_tag(s.w.format, addr)
    cdef const kvmmu_psc_entry *p = &s.checker.psc[kvmmu_psc_slot(addr_tag, s.rules.walk_id)]
    if is_tagged(p, kvmmu_psc_tag(addr_tag, s.rules.walk_id)):
        return p.value
    return find_psce(s, addr)


cdef void forget_all(walk_tables *tables) noexcept nogil:
    cdef int stage
    for stage in range(2):
        memset(tables.psc[stage], 0, sizeof(kvmmu_psc_entry) << PSC_BITS)
    memset(tables.memo, 0, sizeof(kvmmu_memo_entry) << MEMO_BITS)


cdef WalkCache new_walk_cache():
    return WalkCache.__new__(WalkCache, maker())


cdef class WalkCache:
    def __cinit__(self, mark=None, *args):
        cdef int stage
        cdef bint whole = True
        check_maker(mark, "a WalkCache is made by a batch")
        for stage in range(2):
            self.tables.psc[stage] = <kvmmu_psc_entry *>calloc(1 << PSC_BITS, sizeof(kvmmu_psc_entry))
            whole = whole and self.tables.psc[stage] is not NULL
        self.tables.memo = <kvmmu_memo_entry *>calloc(1 << MEMO_BITS, sizeof(kvmmu_memo_entry))
        if not whole or self.tables.memo is NULL:
            raise MemoryError
        self.next_walk_id = self.next_memo_id = 1

    def __dealloc__(self):
        for stage in range(2):
            free(self.tables.psc[stage])
        free(self.tables.memo)

    cdef uint32_t take_walk_ids(self, uint64_t count) noexcept nogil:
        cdef uint32_t first
        cdef int stage
        if count >= (<uint64_t>1 << PSC_WALK_ID_BITS):
            return 0
        if self.next_walk_id + count > (<uint64_t>1 << PSC_WALK_ID_BITS):
            for stage in range(2):
                memset(self.tables.psc[stage], 0, sizeof(kvmmu_psc_entry) << PSC_BITS)
            self.next_walk_id = 1
        first = self.next_walk_id
        self.next_walk_id = first + <uint32_t>count
        return first

    cdef uint32_t take_memo_ids(self, uint64_t count) noexcept nogil:
        cdef uint32_t first
        if count >= (<uint64_t>1 << MEMO_ID_BITS):
            return 0
        if self.next_memo_id + count > (<uint64_t>1 << MEMO_ID_BITS):
            memset(self.tables.memo, 0, sizeof(kvmmu_memo_entry) << MEMO_BITS)
            self.next_memo_id = 1
        first = self.next_memo_id
        self.next_memo_id = first + <uint32_t>count
        return first
