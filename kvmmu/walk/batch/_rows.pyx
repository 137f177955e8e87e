"""Rows of a batch, one by one; see `_rows.pxd`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport WALK_SECOND_STAGE, WALK_TABLES, kvm_pagewalk, second_stage_access, walk_result
from kvmmu.arch._bits cimport (
    ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_USER_MASK, ACC_ALL, ACC_USER_MASK, GPA_LIMIT, INVALID_GPA,
    PAGE_OFFSET_MASK, PAGE_SHIFT, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT,
    STATUS_OK, STATUS_PAGE_FAULT, STATUS_VIRT_EXCEPTION,
)
from kvmmu.arch._format cimport KVMMU_ACCESS_INFO_SHIFT, KVMMU_COMMON_ACCESS_MAX, explicit_access, resolved_access
from kvmmu.arch._gpte cimport kvmmu_is_canonical
from kvmmu.arch._linear cimport kvmmu_linear_address
from kvmmu.walk.batch._kernels cimport (
    MEMO_FRAME_SHIFT, MEMO_ID_BITS, MEMO_LEVEL_SHIFT, PSC_ADDR_MASK, kvmmu_entry_hva, kvmmu_memo_entry, kvmmu_memo_gpa,
    kvmmu_memo_slot, kvmmu_psce_level,
)
from kvmmu.walk.batch._leaf cimport LEAF_FAULT, LEAF_OK, check_leaf, leaf_result, set_leaf_bits
from kvmmu.walk.batch._psc cimport (
    find_psce, forget_all, init_cached_walk, mark_word, psce_of, reset_backoff,
)
from kvmmu.walk.batch._rows cimport (
    BLOCK_WALKS, MIXED_WALK, ROW_WALKS, batch, batch_columns, cached_walks, context_of, more_column, walk_of,
    write_row,
)


cdef void write_more(const batch_columns *out, size_t i, const walk_result *r) noexcept nogil:
    cdef const more_column *c
    cdef const uint8_t *field
    cdef size_t k
    for k in range(out.more_count):
        c = &out.more[k]
        field = <const uint8_t *>r + c.place
        if c.size == sizeof(uint64_t):
            (<uint64_t *>c.data)[i] = (<const uint64_t *>field)[0]
        elif c.size == sizeof(uint32_t):
            (<uint32_t *>c.data)[i] = (<const uint32_t *>field)[0]
        else:
            c.data[i] = field[0]


cdef inline bint memo_takes(uint32_t access, const kvm_pagewalk *w) noexcept nogil:
    """True if the memo can tell a translation by its page and its access, IMPLICIT resolved."""
    if access <= KVMMU_COMMON_ACCESS_MAX:
        return True
    return not access & <uint32_t>(ACCESS_SHADOW_STACK_MASK | ACCESS_PROBE_MASK) and not w.pre_processes     # no tag if IMPLICIT


cdef void remember(batch *b, size_t i, uint64_t gpa, uint8_t level, uint64_t first, uint64_t second) noexcept nogil:
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, memo_id = b.memo_id, tag
    cdef uint32_t access = b.access[i * b.access_stride]
    cdef uint64_t passes = <uint64_t>1 << (explicit_access(access) >> PERMISSIONS_INDEX_SHIFT & PERMISSIONS_COUNT - 1)
    cdef uint64_t slot
    cdef kvmmu_memo_entry *e
    if gpa >= GPA_LIMIT or not memo_takes(access, walk_of(b, i)):
        return
    if b.ctx is not NULL:
        memo_id += context_of(b, i)
    slot = kvmmu_memo_slot(page, memo_id)
    if first:
        mark_word(b.touched, first, <uint16_t>slot)
    if second:
        mark_word(b.touched, second, <uint16_t>slot)
    e = &b.memo[slot]
    tag = page << MEMO_ID_BITS | memo_id
    if e.tag == tag:
        e.page |= passes
    else:
        e.tag = tag
        e.page = <uint64_t>level << MEMO_LEVEL_SHIFT | gpa >> PAGE_SHIFT << MEMO_FRAME_SHIFT | passes


cdef bint recall_row(const batch *b, size_t i) noexcept nogil:
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, memo_id = b.memo_id
    cdef uint32_t access = b.access[i * b.access_stride]
    cdef const kvmmu_memo_entry *e
    if b.ctx is not NULL:
        memo_id += context_of(b, i)
    e = &b.memo[kvmmu_memo_slot(page, memo_id)]
    if e.tag != (page << MEMO_ID_BITS | memo_id) or not memo_takes(access, walk_of(b, i)):
        return False
    if not (e.page >> (explicit_access(access) >> PERMISSIONS_INDEX_SHIFT & PERMISSIONS_COUNT - 1)) & 1:
        return False
    write_row(b, i, kvmmu_memo_gpa(e.page) | b.gva[i] & PAGE_OFFSET_MASK, STATUS_OK, 0, <uint8_t>(e.page >> MEMO_LEVEL_SHIFT))
    return True


cdef void walk_row(batch *b, size_t i) noexcept nogil:
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef walk_result r
    cdef bint logs = w.ngpa is not NULL and w.ngpa.pml is not NULL
    cdef uint16_t index = w.ngpa.pml.index if logs else 0
    w.gva_to_gpa(w, b.gva[i], resolved_access(b.access[i * b.access_stride]), b.set_ad, &r)
    # the log, or the information area of a #VE, may lie over a table
    if b.by_blocks and ((logs and w.ngpa.pml.index != index) or r.status == STATUS_VIRT_EXCEPTION):
        forget_all(b.tables)
    write_row(b, i, r.gpa, r.status, r.error_code, r.level)
    if b.more:
        write_more(b.out, i, &r)
    if b.recalls and r.status == STATUS_OK and b.touched is NULL:           # which words it read is not known
        remember(b, i, r.gpa, r.level, 0, 0)


cdef cached_walks *next_cached_walks(batch *b) noexcept nogil:
    """Return the place that was taken longest ago, and that no block needs."""
    cdef cached_walks *m
    cdef size_t i
    cdef bint needed = True
    while needed:
        b.next_cached = (b.next_cached + 1) % BLOCK_WALKS
        m = &b.cached[b.next_cached]
        needed = False
        for i in range(<size_t>BLOCKS):
            needed = needed or (b.blocks[i].w is not NULL and b.blocks[i].cached is m)
    b.last_cached = b.next_cached
    return m


cdef cached_walks *cached_walks_of(batch *b, const kvm_pagewalk *w, bint for_block) noexcept nogil:
    cdef cached_walks *m = &b.cached[b.last_cached]
    cdef size_t i
    if m.w is w:
        return m
    if for_block:
        for i in range(<size_t>BLOCK_WALKS):
            if b.cached[i].w is w:
                b.last_cached = i
                return &b.cached[i]
        m = next_cached_walks(b)
    else:
        m = &b.cached[BLOCK_WALKS + <size_t>(w - b.walks) % ROW_WALKS]
        if m.w is w:
            return m
    init_cached_walks(b, m, w)
    return m


cdef cached_walks *mixed_walks_of(batch *b, const kvm_pagewalk *w) noexcept nogil:
    cdef cached_walks *m = &b.cached[<size_t>MIXED_WALK]
    if m.w is not w:
        init_cached_walks(b, m, w)
    return m


cdef void init_cached_walks(batch *b, cached_walks *m, const kvm_pagewalk *w) noexcept nogil:
    """Begin with nothing cached but what walks of the same tables have in the paging-structure cache."""
    cdef uint32_t walk_id = b.walk_id
    m.w = w
    if b.ctx is not NULL:
        walk_id += b.alike[w - b.walks] if b.alike is not NULL else <uint32_t>(w - b.walks)
    m.begun = False
    m.second.found = 0
    if w.ngpa is not NULL:
        init_cached_walk(&m.second, w.ngpa, b.tables, 1, NULL, b.walk_id + <uint32_t>(b.count + w.second), b.set_ad,
                         b.shadow_stacks, b.touched)
    init_cached_walk(&m.first, w, b.tables, 0, &m.second if w.ngpa is not NULL else NULL, walk_id, b.set_ad, b.shadow_stacks,
                     b.touched)
    reset_backoff(&m.uniform_backoff, 0)


cdef bint check_row(batch *b, cached_walks *m, size_t i, uint64_t psce, uint64_t entry, uint64_t addr, uint32_t access,
                    leaf_result *leaf) noexcept nogil:
    cdef const kvm_pagewalk *w = m.w
    cdef uint64_t access_info = w.fmt.access_info[access]
    cdef int result = check_leaf(&m.first.rules, psce, entry, addr, access_info, leaf)
    if result == LEAF_FAULT:
        write_row(b, i, INVALID_GPA, STATUS_PAGE_FAULT,
                  leaf.error | <uint32_t>(access_info >> KVMMU_ACCESS_INFO_SHIFT) & w.pferr_mask, <uint8_t>kvmmu_psce_level(psce))
        return False
    if result == LEAF_OK or (w.ngpa is NULL and set_leaf_bits(&m.first.rules, psce, entry, leaf.pte, access_info)):
        return True
    walk_row(b, i)
    find_psce(&m.first, addr)                     # upper levels may have their accessed bits by now
    return False


cdef void fast_row(batch *b, size_t i) noexcept nogil:
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef cached_walks *m = cached_walks_of(b, w, False)
    cdef leaf_result leaf
    cdef uint64_t addr = b.gva[i] & w.gva_mask, psce
    cdef uint32_t byte = b.access[i * b.access_stride]
    cdef uint8_t level = 0
    cdef uint64_t entries[2]
    cdef uint32_t access = explicit_access(byte)
    if w.pre_processes:
        addr = kvmmu_linear_address(&w.linear, addr, byte)
    leaf.gpa = addr
    leaf.pte_access = ACC_ALL
    entries[0] = entries[1] = 0
    if w.kind == WALK_TABLES:
        psce = psce_of(&m.first, addr) if kvmmu_is_canonical(addr, w.canonical_shift) else 0
        if not psce:
            walk_row(b, i)
            return
        level = <uint8_t>kvmmu_psce_level(psce)
        entries[0] = kvmmu_entry_hva(w.format, psce, addr)
        if not check_row(b, m, i, psce, entries[0], addr, access, &leaf):
            return
    elif w.kind == WALK_SECOND_STAGE and not access & ACCESS_USER_MASK:
        leaf.pte_access &= ~<uint32_t>ACC_USER_MASK
    if w.ngpa is not NULL:
        addr = leaf.gpa
        access = second_stage_access(w.ngpa, access, True, leaf.pte_access)
        psce = 0
        if not addr & w.ngpa.ngpa_rsvd_mask:
            addr &= w.ngpa.gva_mask & PSC_ADDR_MASK
            psce = psce_of(&m.second, addr)
        if psce:
            entries[1] = kvmmu_entry_hva(w.ngpa.format, psce, addr)
        if not psce or check_leaf(&m.second.rules, psce, entries[1], addr, w.ngpa.fmt.access_info[access], &leaf) != LEAF_OK:
            walk_row(b, i)
            return
        if w.kind == WALK_SECOND_STAGE:
            level = <uint8_t>kvmmu_psce_level(psce)
    write_row(b, i, leaf.gpa, STATUS_OK, 0, level)
    if b.recalls:
        remember(b, i, leaf.gpa, level, entries[0], entries[1])
