"""Rows of a batch, one by one; see `_rows.pxd`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport WALK_SECOND_STAGE, WALK_TABLES, kvm_pagewalk, second_stage_access, walk_result
from kvmmu.arch._bits cimport (
    ACCESS_USER_MASK, ACC_ALL, ACC_USER_MASK, GPA_LIMIT, INVALID_GPA, PAGE_OFFSET_MASK, PAGE_SHIFT, PERMISSIONS_INDEX_SHIFT,
    STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.arch._format cimport KVMMU_LOOK_ACCESS_SHIFT, explicit_access
from kvmmu.walk.batch._lanes cimport (
    PREFIX_ADDR_MASK, TLB_ASID_BITS, TLB_FRAME_SHIFT, TLB_LEVEL_SHIFT, kvmmu_entry_hva, kvmmu_prefix_level, kvmmu_tlb_entry,
    kvmmu_tlb_gpa, kvmmu_tlb_slot,
)
from kvmmu.walk.batch._leaf cimport set_leaf_bits
from kvmmu.walk.batch._psc cimport (
    JUDGED_FAULT, JUDGED_OK, find_prefix, forget_all, forget_upper, init_space, is_canonical, judge_one, judged_entry,
    mark_word, prefix_of, start_patience,
)
from kvmmu.walk.batch._rows cimport (
    ALL_SPACES, BLOCK_SPACES, ROW_SPACES, batch, batch_columns, context_of, walk_of, walk_spaces, write_row,
)


cdef void write_more(const batch_columns *out, size_t i, const walk_result *r) noexcept nogil:
    if out.pte is not NULL:
        out.pte[i] = r.pte
    if out.pte_gpa is not NULL:
        out.pte_gpa[i] = r.pte_gpa
    if out.pte_access is not NULL:
        out.pte_access[i] = r.pte_access
    if out.refs is not NULL:
        out.refs[i] = r.refs
    if out.ngpa is not NULL:
        out.ngpa[i] = r.ngpa
    if out.fault_gpa is not NULL:
        out.fault_gpa[i] = r.fault_gpa
    if out.exit_qualification is not NULL:
        out.exit_qualification[i] = r.exit_qualification


cdef void remember(batch *b, size_t i, uint64_t gpa, uint8_t level) noexcept nogil:
    """Row i passes with this access, and comes to gpa."""
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, space = b.space, tag
    cdef uint64_t passes = <uint64_t>1 << (explicit_access(b.access[i * b.access_stride]) >> PERMISSIONS_INDEX_SHIFT)
    cdef kvmmu_tlb_entry *e
    if gpa >= GPA_LIMIT:
        return
    if b.ctx is not NULL:
        space += context_of(b, i)
    e = &b.tlb[kvmmu_tlb_slot(page, space)]
    tag = page << TLB_ASID_BITS | space
    if e.tag == tag:
        e.page |= passes
    else:
        e.tag = tag
        e.page = <uint64_t>level << TLB_LEVEL_SHIFT | gpa >> PAGE_SHIFT << TLB_FRAME_SHIFT | passes


cdef bint recall_row(const batch *b, size_t i) noexcept nogil:
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, space = b.space
    cdef const kvmmu_tlb_entry *e
    if b.ctx is not NULL:
        space += context_of(b, i)
    e = &b.tlb[kvmmu_tlb_slot(page, space)]
    if e.tag != (page << TLB_ASID_BITS | space):
        return False
    if not (e.page >> (explicit_access(b.access[i * b.access_stride]) >> PERMISSIONS_INDEX_SHIFT)) & 1:
        return False
    write_row(b, i, kvmmu_tlb_gpa(e.page) | b.gva[i] & PAGE_OFFSET_MASK, STATUS_OK, 0, <uint8_t>(e.page >> TLB_LEVEL_SHIFT))
    return True


cdef void walk_row(batch *b, size_t i) noexcept nogil:
    """The scalar walk."""
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef walk_result r
    cdef size_t space
    cdef bint logs = w.ngpa is not NULL and w.ngpa.pml is not NULL
    cdef uint16_t index = w.ngpa.pml.index if logs else 0
    w.gva_to_gpa(w, b.gva[i], explicit_access(b.access[i * b.access_stride]), b.set_ad, &r)
    if logs and b.lanes and w.ngpa.pml.index != index:                      # the log may lie over a table
        forget_all(b.tables)
        for space in range(<size_t>ALL_SPACES):
            forget_upper(&b.spaces[space].first)
            forget_upper(&b.spaces[space].second)
    write_row(b, i, r.gpa, r.status, r.error_code, r.level)
    if b.more:
        write_more(b.out, i, &r)
    if b.recalls and r.status == STATUS_OK and b.touched is NULL:           # which words it read is not known
        remember(b, i, r.gpa, r.level)


cdef walk_spaces *next_space(batch *b) noexcept nogil:
    """The spaces that were taken longest ago, and that no block needs."""
    cdef walk_spaces *m
    cdef size_t i
    cdef bint needed = True
    while needed:
        b.next_space = (b.next_space + 1) % BLOCK_SPACES
        m = &b.spaces[b.next_space]
        needed = False
        for i in range(<size_t>BLOCKS):
            needed = needed or (b.blocks[i].w is not NULL and b.blocks[i].spaces is m)
    b.last_space = b.next_space
    return m


cdef walk_spaces *spaces_of(batch *b, const kvm_pagewalk *w, bint for_block) noexcept nogil:
    """The spaces of a walk. Those of a block stay as long as the block; a single row's, until the next row's."""
    cdef walk_spaces *m = &b.spaces[b.last_space]
    cdef uint32_t asid = b.asid
    cdef size_t i
    if m.w is w:
        return m
    if for_block:
        for i in range(<size_t>BLOCK_SPACES):
            if b.spaces[i].w is w:
                b.last_space = i
                return &b.spaces[i]
        m = next_space(b)
    else:
        m = &b.spaces[BLOCK_SPACES + <size_t>(w - b.walks) % ROW_SPACES]
        if m.w is w:
            return m
    m.w = w
    if b.ctx is not NULL:
        asid += <uint32_t>(w - b.walks)
    m.second.found = 0
    if w.ngpa is not NULL:
        init_space(&m.second, w.ngpa, b.tables, 1, NULL, b.asid + <uint32_t>(b.count + w.second), b.set_ad, b.touched)
    init_space(&m.first, w, b.tables, 0, &m.second if w.ngpa is not NULL else NULL, asid, b.set_ad, b.touched)
    start_patience(&m.straight, 0)
    return m


cdef bint judge_row(batch *b, walk_spaces *m, size_t i, uint64_t ref, uint64_t entry, uint64_t addr, uint32_t access,
                    judged_entry *judged) noexcept nogil:
    cdef const kvm_pagewalk *w = m.w
    cdef uint64_t look = w.fmt.looks[access]
    cdef int said = judge_one(&m.first, ref, entry, addr, <uint32_t>look, judged)
    if said == JUDGED_FAULT:
        write_row(b, i, INVALID_GPA, STATUS_PAGE_FAULT, judged.error | <uint32_t>(look >> KVMMU_LOOK_ACCESS_SHIFT) & w.pferr_mask,
                  <uint8_t>kvmmu_prefix_level(ref))
        return False
    if said == JUDGED_OK or (w.ngpa is NULL and set_leaf_bits(&m.first, ref, entry, judged.pte, look)):
        return True
    walk_row(b, i)
    find_prefix(&m.first, addr)                     # upper levels may have their accessed bits by now
    return False


cdef void quick_row(batch *b, size_t i) noexcept nogil:
    """One row from the prefixes of its walk, if they and its last entry are all that counts; else the scalar walk."""
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef walk_spaces *m = spaces_of(b, w, False)
    cdef judged_entry judged
    cdef uint64_t addr = b.gva[i] & w.gva_mask, ref
    cdef uint8_t level = 0
    cdef uint64_t entries[2]
    cdef uint32_t access = explicit_access(b.access[i * b.access_stride])
    judged.gpa = addr
    judged.pte_access = ACC_ALL
    entries[0] = entries[1] = 0
    if w.kind == WALK_TABLES:
        ref = prefix_of(&m.first, addr) if is_canonical(w, addr) else 0
        if not ref:
            walk_row(b, i)
            return
        level = <uint8_t>kvmmu_prefix_level(ref)
        entries[0] = kvmmu_entry_hva(w.format, ref, addr)
        if not judge_row(b, m, i, ref, entries[0], addr, access, &judged):
            return
    elif w.kind == WALK_SECOND_STAGE and not access & ACCESS_USER_MASK:
        judged.pte_access &= ~<uint32_t>ACC_USER_MASK
    if w.ngpa is not NULL:
        addr = judged.gpa
        access = second_stage_access(w.ngpa, access, True, judged.pte_access)
        ref = 0
        if not addr & w.ngpa.ngpa_rsvd_mask:
            addr &= w.ngpa.gva_mask & PREFIX_ADDR_MASK
            ref = prefix_of(&m.second, addr)
        if ref:
            entries[1] = kvmmu_entry_hva(w.ngpa.format, ref, addr)
        if not ref or judge_one(&m.second, ref, entries[1], addr, w.ngpa.fmt.looks[access], &judged) != JUDGED_OK:
            walk_row(b, i)
            return
    write_row(b, i, judged.gpa, STATUS_OK, 0, level)
    if b.recalls:
        mark_word(b.touched, entries[0])
        mark_word(b.touched, entries[1])
        remember(b, i, judged.gpa, level)
