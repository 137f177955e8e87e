"""The walk over arrays. Rows are independent; columns, shapes and contexts were checked by the caller (`_pagewalk.pyx`).

    recall     64 rows at a time, translations that this batch made already (by page and access)
    lanes      what is left: blocks of up to 64 rows of one walk, their last entries read and judged side by side
               (`_lanes.h`), from prefixes of their walks (`_prefixes.pxd`)
    one by one rows that set accessed or dirty bits in upper levels, lose a race, or whose prefix cannot be known: the scalar
               walk (`_walk.pyx`), which is the reference for all the others

A block passes three points, so that its entries travel to the cache while the block before it is judged.
"""

import os

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu._batch cimport batch, batch_columns, block, walk_spaces
from kvmmu._bits cimport (
    ACC_ALL, ACC_USER_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, INVALID_GPA, PAGE_SHIFT, PERMISSIONS_INDEX_SHIFT,
    PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_4K, ROLE_CR4_SMEP_MASK, STATUS_NON_CANONICAL, STATUS_OK,
    STATUS_PAGE_FAULT,
)
from kvmmu._format cimport KVMMU_ACCESS_BYTES, KVMMU_LOOK_ACCESS_SHIFT, explicit_access, kvm_page_format, permission_fault
from kvmmu._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_EPT, kvmmu_gpte_malformed, kvmmu_gpte_pkey
from kvmmu._lanes cimport (
    KVMMU_LANES, PREFIX_ADDR_MASK, PREFIX_COLD_SHIFT, PREFIX_LIKE_MASK, PREFIX_READONLY_SHIFT, TLB_ASID_BITS, TLB_FRAME_SHIFT, kvmmu_count_bits,
    kvmmu_first_bit, kvmmu_lane_ops, kvmmu_lane_ops_of, kvmmu_lanes, kvmmu_prefix_level, kvmmu_read_entry, kvmmu_tlb_entry,
    kvmmu_set_prefix, kvmmu_sure_pass, kvmmu_tlb_slot,
)
from kvmmu._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64, kvmmu_read64
from kvmmu._prefixes cimport (
    JUDGED_FAULT, JUDGED_OK, JUDGED_SLOW, WalkCache, find_prefix, init_space, judge_one, judged_entry, lane_space,
    prefix_of, sure_passes,
)
from kvmmu._walk cimport (
    WALK_DIRECT, WALK_SECOND_STAGE, WALK_TABLES, kvm_pagewalk, second_stage_access, walk_result,
)

cdef uint64_t NOTHING[512]              # an entry that reads as zero, for lanes without a prefix

# Walks whose spaces are kept: for blocks, at least one more than there are blocks; and for single rows.
cdef enum:
    BLOCK_SPACES = 4
    ROW_SPACES = 64
    ALL_SPACES = BLOCK_SPACES + ROW_SPACES

# Fewer rows than this are walked one by one.
cdef size_t MIN_LANES = 8
# Tables of last entries (of 4 KiB) up to which those are taken to be in the cache.
cdef size_t NEAR = 96
# Of 64 rows so many or fewer unknown translations are looked up one after the other.
cdef int FEW_MISSES = 12
# Of 64 lanes so many or fewer that do not surely pass are judged one after the other.
cdef int FEW_ODD = 16
# Blocks to go without trying that again, at most.
cdef int MAX_PATIENCE = 31
# Rows (in chunks of 64) over which is judged whether remembering translations pays, and for how long not to.
cdef size_t TRIAL = 32
cdef size_t FIRST_LOOK = 4              # if nearly all are missing so soon, the trial is over
cdef size_t FIRST_REST = 128
cdef size_t LAST_REST = 8192

cdef const kvmmu_lane_ops *OPS = NULL
_INSTRUCTION_SETS = ("avx512", "avx2", "portable")


def use_instruction_set(name):
    """Walk batches with the functions for an instruction set: "avx512", "avx2" or "portable".

    Raises
    ------
    ValueError
        There is no such set, or this CPU or build does not have it.
    """
    global OPS
    cdef const kvmmu_lane_ops *ops = NULL
    encoded = str(name).encode()
    if name in _INSTRUCTION_SETS:
        ops = kvmmu_lane_ops_of(encoded)
    if ops is NULL:
        raise ValueError(f"instruction set {name!r}: want one of {', '.join(instruction_sets())}")
    OPS = ops


def instruction_sets():
    """The instruction sets that this CPU and build have, best first."""
    return [name for name in _INSTRUCTION_SETS if kvmmu_lane_ops_of(name.encode()) is not NULL]


use_instruction_set(os.environ.get("KVMMU_INSTRUCTION_SET") or instruction_sets()[0])


# ---- columns -----------------------------------------------------------------------------------------------------------

cdef bint wants_more(const batch_columns *out) noexcept nogil:
    """Whether a column beside gpa, status and error_code is wanted."""
    return (out.level is not NULL or out.pte is not NULL or out.pte_gpa is not NULL or out.pte_access is not NULL or
            out.refs is not NULL or out.ngpa is not NULL or out.fault_gpa is not NULL or out.exit_qualification is not NULL)


cdef inline void write_row(const batch *b, size_t i, uint64_t gpa, uint8_t status, uint32_t error_code) noexcept nogil:
    if b.out.gpa is not NULL:
        b.out.gpa[i] = gpa
    if b.out.status is not NULL:
        b.out.status[i] = status
    if b.out.error_code is not NULL:
        b.out.error_code[i] = error_code


cdef void write_more(const batch_columns *out, size_t i, const walk_result *r) noexcept nogil:
    if out.level is not NULL:
        out.level[i] = r.level
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


# ---- one row -----------------------------------------------------------------------------------------------------------

cdef inline void remember(batch *b, size_t i, uint64_t gpa) noexcept nogil:
    """Row i passes with this access, and comes to gpa."""
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, space = b.space, tag
    cdef uint64_t passes = <uint64_t>1 << (explicit_access(b.access[i * b.access_stride]) >> PERMISSIONS_INDEX_SHIFT)
    cdef kvmmu_tlb_entry *e
    if b.ctx is not NULL:
        space += b.ctx[i]
    e = &b.tlb[kvmmu_tlb_slot(page, space)]
    tag = page << TLB_ASID_BITS | space
    if e.tag == tag:
        e.page |= passes
    else:
        e.tag = tag
        e.page = gpa >> PAGE_SHIFT << TLB_FRAME_SHIFT | passes


cdef inline bint recall_row(const batch *b, size_t i) noexcept nogil:
    """Write row i if its translation is known by now."""
    cdef uint64_t page = b.gva[i] >> PAGE_SHIFT, space = b.space
    cdef const kvmmu_tlb_entry *e
    if b.ctx is not NULL:
        space += b.ctx[i]
    e = &b.tlb[kvmmu_tlb_slot(page, space)]
    if e.tag != (page << TLB_ASID_BITS | space):
        return False
    if not (e.page >> (explicit_access(b.access[i * b.access_stride]) >> PERMISSIONS_INDEX_SHIFT)) & 1:
        return False
    write_row(b, i, e.page >> TLB_FRAME_SHIFT << PAGE_SHIFT | b.gva[i] & ((<uint64_t>1 << PAGE_SHIFT) - 1), STATUS_OK, 0)
    return True


cdef inline const kvm_pagewalk *walk_of(const batch *b, size_t i) noexcept nogil:
    return b.walks if b.ctx is NULL else &b.walks[b.ctx[i]]


cdef void walk_row(batch *b, size_t i) noexcept nogil:
    """The scalar walk."""
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef walk_result r
    w.gva_to_gpa(w, b.gva[i], explicit_access(b.access[i * b.access_stride]), b.set_ad, &r)
    write_row(b, i, r.gpa, r.status, r.error_code)
    if b.more:
        write_more(b.out, i, &r)
    if b.recalls and r.status == STATUS_OK:
        remember(b, i, r.gpa)


cdef walk_spaces *spaces_of(batch *b, const kvm_pagewalk *w, bint for_block) noexcept nogil:
    """The spaces of a walk. Those of a block stay while three more blocks start; a single row's, until the next row's."""
    cdef walk_spaces *m = &b.spaces[b.last_space]
    cdef uint32_t asid = b.asid
    if m.w is w:
        return m
    if for_block:
        b.last_space = (b.last_space + 1) % BLOCK_SPACES
        m = &b.spaces[b.last_space]
    else:
        m = &b.spaces[BLOCK_SPACES + <size_t>(w - b.walks) % ROW_SPACES]
        if m.w is w:
            return m
    m.w = w
    if b.ctx is not NULL:
        asid += <uint32_t>(w - b.walks)
    if w.ngpa is not NULL:
        init_space(&m.second, w.ngpa, b.prefixes, NULL, b.asid + <uint32_t>(b.count + w.second), b.set_ad)
    init_space(&m.first, w, b.prefixes, &m.second if w.ngpa is not NULL else NULL, asid, b.set_ad)
    return m


cdef void quick_row(batch *b, size_t i) noexcept nogil:
    """One row from the prefixes of its walk, if it passes without a change to the tables; else the scalar walk."""
    cdef const kvm_pagewalk *w = walk_of(b, i)
    cdef walk_spaces *m = spaces_of(b, w, False)
    cdef judged_entry judged
    cdef uint64_t addr = b.gva[i] & w.gva_mask, ref
    cdef uint32_t access = explicit_access(b.access[i * b.access_stride])
    judged.gpa = addr
    judged.pte_access = ACC_ALL
    if w.kind == WALK_TABLES:
        if <uint64_t>(<long long>(addr << w.canonical_shift) >> w.canonical_shift) != addr:
            walk_row(b, i)
            return
        ref = prefix_of(&m.first, addr)
        if not ref or judge_one(&m.first, ref, addr, w.fmt.looks[access], &judged) != JUDGED_OK:
            walk_row(b, i)
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
        if not ref or judge_one(&m.second, ref, addr, w.ngpa.fmt.looks[access], &judged) != JUDGED_OK:
            walk_row(b, i)
            return
    write_row(b, i, judged.gpa, STATUS_OK, 0)
    if b.recalls:
        remember(b, i, judged.gpa)


# ---- blocks ------------------------------------------------------------------------------------------------------------

cdef inline uint64_t lane_bit(size_t lane) noexcept nogil:
    return <uint64_t>1 << lane


cdef inline size_t row_of(const block *k, size_t lane) noexcept nogil:
    return k.base + lane if k.contiguous else k.rows[lane]


cdef void find_missing(block *k, lane_space *s, kvmmu_lanes *l, uint64_t wanted) noexcept nogil:
    """Prefixes of lanes that nothing is remembered of; those that stay unknown are left in l.miss."""
    cdef uint64_t missing = l.miss & wanted, ref
    cdef size_t lane
    l.miss = 0
    while missing:
        lane = kvmmu_first_bit(missing)
        missing &= missing - 1
        ref = prefix_of(s, l.addr[lane])
        if ref:
            kvmmu_set_prefix(s.w.format, l, lane, ref)
        else:
            l.miss |= lane_bit(lane)


cdef void start_block(batch *b, block *k) noexcept nogil:
    """Point 1: where the last entries of the first stage lie. The rows, and their addresses and accesses, are in the block."""
    cdef const kvm_pagewalk *w = k.w
    cdef size_t lane
    k.spaces = spaces_of(b, w, True)
    k.halfway = False
    k.cold = k.failed = k.unknown = 0
    k.held = 0 if k.count == KVMMU_LANES else ~<uint64_t>0 << k.count
    if w.kind == WALK_TABLES:
        b.ops.start[w.format](&k.a, k.gva, w.gva_mask, w.canonical_shift, k.spaces.first.found > NEAR, b.prefixes,
                              k.spaces.first.lane.asid, NOTHING)
        if k.a.miss:
            find_missing(k, &k.spaces.first, &k.a, ~k.held)
        return
    for lane in range(KVMMU_LANES):
        k.a.gpa[lane] = k.gva[lane] & w.gva_mask


cdef inline bint all_alike(const uint8_t *access) noexcept nogil:
    """Whether 64 access bytes are the same."""
    cdef uint64_t differ = 0, first = access[0] * (~<uint64_t>0 // 255)
    cdef size_t i
    for i in range(KVMMU_LANES // sizeof(uint64_t)):
        differ |= kvmmu_read64(&access[i * sizeof(uint64_t)]) ^ first
    return differ == 0


cdef bint find_sure(sure_passes *p, const lane_space *s, const kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    """Learn from one of these lanes which last entries surely pass each access."""
    cdef size_t lane, access
    cdef uint64_t ref, sample
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        ref = l.ref[lane] & PREFIX_LIKE_MASK
        if (ref >> PREFIX_COLD_SHIFT) & 1:
            continue
        sample = kvmmu_read_entry(s.w.format, l.entry[lane])
        if p.of is s and p.like == ref and (s.w.format != KVMMU_FORMAT_EPT or p.sample == sample):
            return True                             # what is known is for lanes like this
        p.of, p.like, p.sample = s, ref, sample
        for access in range(KVMMU_ACCESS_BYTES):
            if explicit_access(access) != access:
                p.passes[access] = p.passes[explicit_access(access)]
            elif access % 2 or not kvmmu_sure_pass(s.w.format, &s.lane, ref, s.lane.fmt.looks[access], sample, &p.passes[access]):
                p.passes[access].care, p.passes[access].want = 0, 1             # none
        return True
    return False


cdef bint judge_surely(batch *b, block *k, const lane_space *s, kvmmu_lanes *l, const uint8_t *access, sure_passes *p,
                       uint64_t *gpa) noexcept nogil:
    """Judge a block in which most lanes surely pass, and the others one by one. False: too many others."""
    cdef uint64_t lanes = ~(k.held | l.miss | l.noncanonical), odd
    cdef size_t lane
    cdef judged_entry judged
    cdef int said
    if p.rest:
        p.rest -= 1
        return False
    if p.of is not s or not p.fits:
        if not find_sure(p, s, l, lanes):
            return False
    if all_alike(access):
        odd = b.ops.sure[s.w.format](l, &p.passes[access[0]], NULL, p.like, gpa) & lanes
    else:
        odd = b.ops.sure[s.w.format](l, p.passes, access, p.like, gpa) & lanes
    p.fits = kvmmu_count_bits(odd) <= FEW_ODD
    if not p.fits:
        p.patience = min(2 * p.patience + 1, MAX_PATIENCE)
        p.rest = p.patience
        return False
    p.patience = 0
    l.fault = l.slow = 0
    while odd:
        lane = kvmmu_first_bit(odd)
        odd &= odd - 1
        l.look[lane] = s.lane.fmt.looks[access[lane]]
        said = judge_one(s, l.ref[lane], l.addr[lane], <uint32_t>l.look[lane], &judged)
        l.pte[lane], l.pte_access[lane], l.error[lane] = judged.pte, judged.pte_access, judged.error
        gpa[lane] = judged.gpa
        if said == JUDGED_FAULT:
            l.fault |= lane_bit(lane)
        elif said == JUDGED_SLOW:
            l.slow |= lane_bit(lane)
    return True


cdef void judge_block(batch *b, block *k, const lane_space *s, kvmmu_lanes *l, const uint8_t *access, sure_passes *p,
                      uint64_t *gpa) noexcept nogil:
    """The rules of the last entries: l.fault, l.slow, and gpa of the lanes that are in neither.

    IN access: of each lane; p: NULL where l.pte_access of all lanes is wanted.
    """
    cdef size_t lane
    if p is not NULL and judge_surely(b, k, s, l, access, p, gpa):
        return
    for lane in range(KVMMU_LANES):
        l.look[lane] = s.lane.fmt.looks[access[lane]]
    b.ops.judge[s.w.format](l, &s.lane)
    if gpa != l.gpa:
        memcpy(gpa, l.gpa, sizeof(l.gpa))


cdef bint set_leaf_bits(const lane_space *s, const kvmmu_lanes *l, size_t lane) noexcept nogil:
    """Step 7 of the walk for a lane with nothing else to set than bits of its leaf. False: not so, or the race is lost."""
    cdef uint64_t pte = l.pte[lane], bits = s.lane.accessed_mask, now
    cdef uint8_t *hva = <uint8_t *><uintptr_t>l.entry[lane]
    if not s.sets_ad or (l.ref[lane] >> PREFIX_COLD_SHIFT) & 1:
        return False
    if kvmmu_prefix_level(l.ref[lane]) > PG_LEVEL_4K and not pte & s.lane.page_size_mask:
        return False
    if l.look[lane] & <uint64_t>ACCESS_WRITE_MASK << KVMMU_LOOK_ACCESS_SHIFT:
        if s.w.pml is not NULL:
            return False
        bits |= bits << 1
    if (l.ref[lane] >> PREFIX_READONLY_SHIFT) & 1:
        return True
    if s.w.format == KVMMU_FORMAT_32:
        if kvmmu_cmpxchg32(hva, <uint32_t>pte, <uint32_t>(pte | bits)):
            return True
    elif kvmmu_cmpxchg64(hva, pte, pte | bits):
        return True
    now = kvmmu_read_entry(s.w.format, l.entry[lane])
    return now & bits == bits and (now ^ pte) & ~(s.lane.accessed_mask * 3) == 0        # somebody else set them


cdef void leave_to_walk(batch *b, block *k, uint64_t lanes) noexcept nogil:
    """Walk the rows of these lanes one by one, and find their prefixes anew if they were cold."""
    cdef size_t lane
    lanes &= ~k.held
    k.held |= lanes
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        walk_row(b, row_of(k, lane))
        if k.w.kind == WALK_TABLES and not k.a.noncanonical & lane_bit(lane) and (
                k.a.miss & lane_bit(lane) or (k.a.ref[lane] >> PREFIX_COLD_SHIFT) & 1 or k.a.slow & lane_bit(lane)):
            find_prefix(&k.spaces.first, k.a.addr[lane])


cdef inline uint32_t error_code_of(const block *k, size_t lane) noexcept nogil:
    """The error code of a lane of the first stage that faults."""
    return <uint32_t>(k.a.error[lane] | (k.a.look[lane] >> KVMMU_LOOK_ACCESS_SHIFT) & k.w.pferr_mask)


cdef void write_more_of(batch *b, const block *k, size_t lane, uint8_t status) noexcept nogil:
    """The optional columns of a row of one stage."""
    cdef walk_result r
    cdef int top = 2 if k.w.level == 3 else k.w.level
    r.gpa = r.ngpa = k.a.gpa[lane] if status == STATUS_OK else INVALID_GPA
    r.fault_gpa = INVALID_GPA
    r.exit_qualification = 0
    r.pte_gpa = INVALID_GPA
    if status == STATUS_NON_CANONICAL:
        r.pte = r.level = r.pte_access = r.refs = 0
    else:
        r.pte = k.a.pte[lane]
        r.level = <uint8_t>kvmmu_prefix_level(k.a.ref[lane])
        r.pte_access = <uint8_t>k.a.pte_access[lane] if r.pte & k.w.present_mask else 0
        r.refs = <uint8_t>(top + 1 - r.level)
    write_more(b.out, row_of(k, lane), &r)


cdef void fail_lanes(batch *b, block *k, uint64_t lanes) noexcept nogil:
    """Rows of lanes that the first stage refuses."""
    cdef size_t lane
    lanes &= ~k.held
    k.held |= lanes
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if k.a.noncanonical & lane_bit(lane):
            write_row(b, row_of(k, lane), INVALID_GPA, STATUS_NON_CANONICAL, 0)
            if b.more:
                write_more_of(b, k, lane, STATUS_NON_CANONICAL)
        else:
            write_row(b, row_of(k, lane), INVALID_GPA, STATUS_PAGE_FAULT, error_code_of(k, lane))
            if b.more:
                write_more_of(b, k, lane, STATUS_PAGE_FAULT)


cdef uint64_t set_bits_of(const lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    """Set the bits of the leaves of these lanes. Returns those that the scalar walk must take."""
    cdef uint64_t left = 0
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not set_leaf_bits(s, l, lane):
            left |= lane_bit(lane)
    return left


cdef void write_passed(batch *b, block *k, const uint64_t *gpa) noexcept nogil:
    """Rows of lanes that passed; rows written before stay as they are."""
    cdef uint64_t lanes = ~k.held
    cdef size_t lane
    k.held = ~<uint64_t>0
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        write_row(b, row_of(k, lane), gpa[lane], STATUS_OK, 0)
        if b.more:
            write_more_of(b, k, lane, STATUS_OK)
        if b.recalls:
            remember(b, row_of(k, lane), gpa[lane])


cdef inline uint64_t *room_for(const batch *b, block *k, kvmmu_lanes *l) noexcept nogil:
    """Where the addresses of the last stage go: the column itself, if the whole block is one stretch of it."""
    if k.contiguous and k.count == KVMMU_LANES and b.out.gpa is not NULL:
        return &b.out.gpa[k.base]
    return l.gpa


cdef void write_columns(batch *b, block *k, uint64_t fault, const uint64_t *gpa) noexcept nogil:
    """All rows of a block, in order, as if those in fault failed by the first stage and the others passed.

    What is neither is written over it afterwards.
    """
    cdef size_t row = k.base
    cdef uint64_t *to_gpa = NULL
    cdef uint8_t *to_status = NULL
    cdef uint32_t *to_error = NULL
    if not k.contiguous or b.more or b.recalls:
        return
    if k.count < KVMMU_LANES:
        k.contiguous = False                            # row by row
        for row in range(k.count):
            k.rows[row] = k.base + row
        return
    if b.out.gpa is not NULL:
        to_gpa = &b.out.gpa[row]
    if b.out.status is not NULL:
        to_status = &b.out.status[row]
    if b.out.error_code is not NULL:
        to_error = &b.out.error_code[row]
    if kvmmu_count_bits(fault) > FEW_ODD:
        b.ops.emit(&k.a, fault, k.w.pferr_mask, gpa, to_gpa, to_status, to_error)
        k.held |= fault
        return
    if to_gpa is not NULL and to_gpa != gpa:
        memcpy(to_gpa, gpa, KVMMU_LANES * sizeof(uint64_t))
    if to_status is not NULL:
        memset(to_status, STATUS_OK, KVMMU_LANES)
    if to_error is not NULL:
        memset(to_error, 0, KVMMU_LANES * sizeof(uint32_t))


cdef void advance_block(batch *b, block *k) noexcept nogil:
    """Point 2: the first stage is judged; without a second one the rows are written."""
    cdef const kvm_pagewalk *w = k.w
    cdef const kvm_pagewalk *n = w.ngpa
    cdef sure_passes *sure = NULL
    cdef uint64_t *gpa
    cdef uint64_t unknown = 0
    k.halfway = True
    if w.kind == WALK_TABLES:
        gpa = k.a.gpa
        if n is NULL:
            gpa = room_for(b, k, &k.a)
        if not b.more and (n is NULL or not rights_count(n)):
            sure = &b.sure[0]
        judge_block(b, k, &k.spaces.first, &k.a, k.access, sure, gpa)
        unknown = k.a.miss & ~(k.a.noncanonical | k.held)
        k.a.slow &= ~(unknown | k.a.noncanonical | k.held)
        k.a.fault &= ~unknown
        k.failed = (k.a.fault | k.a.noncanonical) & ~k.held
        if k.a.slow and (n is NULL or not w.final_before_ad):
            unknown |= set_bits_of(&k.spaces.first, &k.a, k.a.slow)
        elif k.a.slow:
            k.cold = k.a.slow
        if n is NULL:
            write_columns(b, k, k.failed & ~k.a.noncanonical, gpa)
            fail_lanes(b, k, k.failed)
            leave_to_walk(b, k, unknown)
            if not k.contiguous or b.more or b.recalls:
                write_passed(b, k, gpa)
            k.w = NULL
            return
    else:
        k.a.noncanonical = k.a.fault = k.a.slow = k.a.miss = 0
    k.unknown = unknown
    start_second(b, k)


cdef inline bint rights_count(const kvm_pagewalk *n) noexcept nogil:
    """Whether rights of the first stage decide what the second one grants: MBEC."""
    return n.user_by_pte and n.cpu_role & ROLE_CR4_SMEP_MASK


cdef void start_second(batch *b, block *k) noexcept nogil:
    """Where the last entries of the second stage lie."""
    cdef const kvm_pagewalk *n = k.w.ngpa
    cdef size_t lane
    cdef uint32_t access
    cdef uint64_t pte_access = ACC_ALL
    cdef bint rights = rights_count(n)
    for lane in range(KVMMU_LANES):
        access = explicit_access(k.access[lane])
        if k.w.kind == WALK_SECOND_STAGE:
            pte_access = ACC_ALL if access & ACCESS_USER_MASK else ACC_ALL & ~ACC_USER_MASK
        elif k.w.kind == WALK_TABLES and rights:
            pte_access = k.a.pte_access[lane]
        k.second_access[lane] = <uint8_t>second_stage_access(n, access, True, <uint32_t>pte_access)
    if n.ngpa_rsvd_mask:
        for lane in range(KVMMU_LANES):
            if k.a.gpa[lane] & n.ngpa_rsvd_mask:
                k.unknown |= lane_bit(lane) & ~(k.failed | k.held)
    b.ops.start[n.format](&k.b, k.a.gpa, n.gva_mask, 0, k.spaces.second.found > NEAR, b.prefixes,
                          k.spaces.second.lane.asid, NOTHING)
    if k.b.miss:
        find_missing(k, &k.spaces.second, &k.b, ~(k.held | k.failed | k.unknown))


cdef void finish_block(batch *b, block *k) noexcept nogil:
    """Point 3: the second stage is judged, and the rows are written."""
    cdef uint64_t unknown, faults, done = k.held | k.failed
    cdef uint64_t *gpa = room_for(b, k, &k.b)
    cdef size_t lane
    k.b.miss |= k.unknown | k.failed                    # do not judge them
    judge_block(b, k, &k.spaces.second, &k.b, k.second_access, &b.sure[1], gpa)
    unknown = k.b.miss & ~done
    faults = k.b.fault & ~(unknown | done)
    k.b.slow &= ~(unknown | done)
    if k.cold:                          # the second stage has been granted: now the bits of the first
        unknown |= k.cold & k.b.slow
        unknown |= set_bits_of(&k.spaces.first, &k.a, k.cold & ~(unknown | faults | done))
    unknown |= set_bits_of(&k.spaces.second, &k.b, k.b.slow & ~unknown)
    write_columns(b, k, k.failed & ~k.a.noncanonical, gpa)
    fail_lanes(b, k, k.failed)
    while faults:
        lane = kvmmu_first_bit(faults)
        faults &= faults - 1
        k.held |= lane_bit(lane)
        write_row(b, row_of(k, lane), INVALID_GPA, second_fault(k, lane), 0)
    leave_to_walk(b, k, unknown)
    if not k.contiguous or b.recalls:
        write_passed(b, k, gpa)
    k.w = NULL


cdef inline uint8_t second_fault(const block *k, size_t lane) noexcept nogil:
    """STATUS_* of a fault of the second stage."""
    cdef const kvm_pagewalk *n = k.w.ngpa
    cdef uint64_t pte = k.b.pte[lane], level = kvmmu_prefix_level(k.b.ref[lane])
    if pte & n.present_mask and kvmmu_gpte_malformed(
            n.format, n.fmt.rsvd_bits_mask[0][level - 1], n.fmt.rsvd_bits_mask[1][level - 1], n.fmt.bad_mt_xwr, pte):
        return n.rsvd_status
    return n.fault_status


cdef void push_block(batch *b, block *k) noexcept nogil:
    """Start this block, and take the two before it one point further."""
    cdef block *last = &b.blocks[(b.turn + 2) % 3]
    cdef block *before = &b.blocks[(b.turn + 1) % 3]
    start_block(b, k)
    if last.w is not NULL and not last.halfway:
        advance_block(b, last)
    if before.w is not NULL:
        finish_block(b, before)
    b.turn = (b.turn + 1) % 3


cdef void drain_blocks(batch *b) noexcept nogil:
    cdef size_t i
    cdef block *k
    for i in range(3):                              # oldest first
        k = &b.blocks[(b.turn + i) % 3]
        if k.w is not NULL and not k.halfway:
            advance_block(b, k)
        if k.w is not NULL:
            finish_block(b, k)


cdef bint fits_lanes(const batch *b, const kvm_pagewalk *w) noexcept nogil:
    """Whether blocks can hold rows of this walk."""
    if w.kind != WALK_TABLES and w.ngpa is NULL:
        return False                                # identity
    if b.out.pte_gpa is not NULL:
        return False
    return w.ngpa is NULL or not b.more


cdef void put_one_by_one(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t first, size_t count) noexcept nogil:
    """Rows of one walk that make no block. IN rows: NULL: first and those after it."""
    cdef bint quick = b.lanes and not b.more and (w.kind == WALK_TABLES or w.ngpa is not NULL)
    cdef size_t i, row
    for i in range(count):
        row = first + i if rows is NULL else rows[i]
        if quick:
            quick_row(b, row)
        else:
            walk_row(b, row)


cdef void put_run(batch *b, const kvm_pagewalk *w, size_t first, size_t count) noexcept nogil:
    """Up to 64 rows of one walk that stand side by side."""
    cdef block *k
    cdef size_t i
    if count < MIN_LANES or not fits_lanes(b, w):
        put_one_by_one(b, w, NULL, first, count)
        return
    k = &b.blocks[b.turn]
    k.w, k.count, k.contiguous, k.base = w, count, True, first
    k.gva, k.access = &b.gva[first], &b.access[first * b.access_stride]
    if count < KVMMU_LANES or not b.access_stride:
        for i in range(KVMMU_LANES):
            k.own_gva[i] = b.gva[first + (i if i < count else 0)]
            k.own_access[i] = b.access[(first + (i if i < count else 0)) * b.access_stride]
        k.gva, k.access = k.own_gva, k.own_access
    push_block(b, k)


cdef void put_rows(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t count) noexcept nogil:
    """Up to 64 rows of one walk."""
    cdef block *k
    cdef size_t i, row
    if count < MIN_LANES or not fits_lanes(b, w):
        put_one_by_one(b, w, rows, 0, count)
        return
    k = &b.blocks[b.turn]
    k.w, k.count, k.contiguous = w, count, False
    for i in range(KVMMU_LANES):
        row = rows[i if i < count else 0]
        k.rows[i] = row
        k.own_gva[i] = b.gva[row]
        k.own_access[i] = b.access[row * b.access_stride]
    k.gva, k.access = k.own_gva, k.own_access
    push_block(b, k)


cdef void put_chunk(batch *b, size_t start, size_t count) noexcept nogil:
    """Up to 64 rows from start on, in runs of one walk."""
    cdef size_t i, first = start
    if b.ctx is not NULL:
        for i in range(start + 1, start + count):
            if b.ctx[i] != b.ctx[first]:
                put_run(b, walk_of(b, first), first, i - first)
                first = i
    put_run(b, walk_of(b, first), first, start + count - first)


cdef void put_some(batch *b, size_t start, uint64_t some) noexcept nogil:
    """Rows from start on whose bit is set, in runs of one walk."""
    cdef size_t rows[64]
    cdef size_t row, first = 0, count = 0
    while some:
        row = start + kvmmu_first_bit(some)
        some &= some - 1
        if b.ctx is not NULL and count > first and b.ctx[row] != b.ctx[rows[first]]:
            put_rows(b, walk_of(b, rows[first]), &rows[first], count - first)
            first = count
        rows[count] = row
        count += 1
    put_rows(b, walk_of(b, rows[first]), &rows[first], count - first)


cdef void recall_chunk(batch *b, size_t start) noexcept nogil:
    """64 rows from start on: those whose translations are known at once, the others by blocks or one after the other."""
    cdef uint64_t gpa[64]
    cdef uint64_t *to = &gpa[0]
    cdef const uint32_t *ctx = NULL
    cdef uint64_t misses
    cdef size_t row
    if b.out.gpa is not NULL:
        to = &b.out.gpa[start]
    if b.ctx is not NULL:
        ctx = &b.ctx[start]
    misses = b.ops.recall(b.tlb, &b.gva[start], &b.access[start * b.access_stride], b.access_stride, ctx, b.space, to)
    if b.out.status is not NULL:
        memset(&b.out.status[start], STATUS_OK, KVMMU_LANES)
    if b.out.error_code is not NULL:
        memset(&b.out.error_code[start], 0, KVMMU_LANES * sizeof(uint32_t))
    b.tried += 1
    if not misses:
        return
    b.missed += kvmmu_count_bits(misses)
    if kvmmu_count_bits(misses) > FEW_MISSES:
        put_some(b, start, misses)
        return
    while misses:
        row = start + kvmmu_first_bit(misses)
        misses &= misses - 1
        if not recall_row(b, row):
            quick_row(b, row)


cdef void consider_recall(batch *b) noexcept nogil:
    """Remember translations as long as most rows find theirs; try again later, and ever later."""
    cdef size_t rows = b.tried * KVMMU_LANES
    if b.tried < TRIAL and not (b.tried == FIRST_LOOK and b.missed > rows - rows // 4):
        return
    if b.missed > rows // 2:
        drain_blocks(b)
        b.recalls = False
        b.skip = b.patience
        if b.patience < LAST_REST:
            b.patience *= 4
    elif b.tried >= TRIAL:
        b.patience = FIRST_REST
    b.tried = b.missed = 0


cdef void begin_batch(batch *b, WalkCache cache, uint64_t count, size_t rows) noexcept nogil:
    cdef size_t i
    b.more = wants_more(b.out)
    b.ops = OPS
    b.prefixes, b.tlb = cache.prefixes, cache.tlb
    b.count = count
    b.asid = b.space = 0
    b.last_space = 0
    for i in range(ALL_SPACES):
        b.spaces[i].w = NULL
    for i in range(2):
        b.sure[i].of = NULL
        b.sure[i].rest = b.sure[i].patience = 0
    b.tried = b.missed = b.skip = b.turn = 0
    b.patience = FIRST_REST
    if rows >= MIN_LANES:
        b.asid = cache.take_asids(2 * count)
    b.lanes = b.asid != 0
    if b.lanes and not b.more and rows >= 2 * KVMMU_LANES:
        b.space = cache.take_spaces(count)
    b.recalls = b.space != 0


cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil:
    cdef size_t i = start, count
    cdef bint could_recall = b.recalls
    if not b.lanes:
        for i in range(start, stop):
            walk_row(b, i)
        return
    while i < stop:
        count = min(stop - i, <size_t>KVMMU_LANES)
        if b.recalls and count == KVMMU_LANES:
            recall_chunk(b, i)
            consider_recall(b)
        else:
            put_chunk(b, i, count)
            if could_recall and not b.recalls:
                b.skip -= 1
                if not b.skip:
                    drain_blocks(b)
                    b.recalls = True
        i += count
    drain_blocks(b)


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef void *column(columns, name):
    """Data pointer of an output column, NULL if it is not wanted."""
    array = columns.get(name)
    if array is None:
        return NULL
    return <void *><uintptr_t>array.ctypes.data


cdef class Blocks:
    """The blocks of one batch, or of one thread of it, with its cache."""
    cdef block *blocks
    cdef walk_spaces *spaces
    cdef sure_passes *sure
    cdef WalkCache cache

    def __cinit__(self):
        self.cache = WalkCache()
        self.blocks = <block *>calloc(3, sizeof(block))
        self.spaces = <walk_spaces *>calloc(ALL_SPACES, sizeof(walk_spaces))
        self.sure = <sure_passes *>calloc(2, sizeof(sure_passes))
        if self.blocks is NULL or self.spaces is NULL or self.sure is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.blocks)
        free(self.spaces)
        free(self.sure)


# Those that no batch uses at the moment.
_spare = []


cdef class Job:
    def __cinit__(self, dict columns, gva, access, bint set_ad):
        """IN columns: checked output arrays by name; gva, access: checked arrays of n >= 1 rows, access of n or one."""
        self.arrays = (columns, gva, access)
        self.whole.gva = <const uint64_t *><uintptr_t>gva.ctypes.data
        self.whole.access = <const uint8_t *><uintptr_t>access.ctypes.data
        self.whole.access_stride = 1 if access.size > 1 else 0
        self.whole.set_ad = set_ad
        self.columns.gpa = <uint64_t *>column(columns, "gpa")
        self.columns.status = <uint8_t *>column(columns, "status")
        self.columns.error_code = <uint32_t *>column(columns, "error_code")
        self.columns.level = <uint8_t *>column(columns, "level")
        self.columns.pte = <uint64_t *>column(columns, "pte")
        self.columns.pte_gpa = <uint64_t *>column(columns, "pte_gpa")
        self.columns.pte_access = <uint8_t *>column(columns, "pte_access")
        self.columns.refs = <uint8_t *>column(columns, "refs")
        self.columns.ngpa = <uint64_t *>column(columns, "ngpa")
        self.columns.fault_gpa = <uint64_t *>column(columns, "fault_gpa")
        self.columns.exit_qualification = <uint64_t *>column(columns, "exit_qualification")

    def run(self, size_t start, size_t stop):
        """Translate the rows start to stop."""
        cdef batch part = self.whole
        cdef Blocks blocks
        try:
            blocks = _spare.pop()
        except IndexError:
            blocks = Blocks()
        part.out = &self.columns
        part.blocks, part.spaces, part.sure = blocks.blocks, blocks.spaces, blocks.sure
        with nogil:
            begin_batch(&part, blocks.cache, self.count, stop - start)
            translate_rows(&part, start, stop)
        _spare.append(blocks)
