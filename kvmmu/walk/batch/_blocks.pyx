"""Blocks of a batch; see `_blocks.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport WALK_SECOND_STAGE, WALK_TABLES, kvm_pagewalk, second_stage_access, walk_result
from kvmmu.arch._bits cimport (
    ACCESS_USER_MASK, ACC_ALL, ACC_USER_MASK, INVALID_GPA, PFERR_RSVD_MASK, ROLE_EXT_SHADOW_STACK_MASK,
    STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.arch._format cimport KVMMU_ACCESS_INFO_SHIFT, explicit_access
from kvmmu.walk.batch._kernels cimport (
    KVMMU_BLOCK_ROWS, PSCE_ACCESSED_CLEAR_SHIFT, kvmmu_count_bits, kvmmu_first_bit, kvmmu_leaf_block, kvmmu_psce_level,
)
from kvmmu.walk.batch._leaf cimport asks_rights
from kvmmu.walk.batch._leaves cimport (
    MAX_REMAINING_IN_BLOCK, are_far, check_leaves, find_leaves, lane_bit, set_bits_of,
)
from kvmmu.walk.batch._psc cimport find_psce
from kvmmu.walk.batch._rows cimport (
    BLOCKS, accesses_from, batch, block, cached_walks_of, columns_from, common_columns, fast_row, remember, walk_row,
    write_more, write_row,
)

cdef enum:
    MIN_LANES = 8                   # fewer rows are walked one by one: kernels do 64 rows, however few count. Tuned by hand


cdef inline size_t row_of(const block *k, size_t lane) noexcept nogil:
    return k.base + lane if k.contiguous else k.rows[lane]


cdef inline uint8_t level_of(const block *k, size_t lane) noexcept nogil:
    """Return the level of the last entry of the first stage, or of a second stage that is walked alone."""
    if k.w.kind == WALK_TABLES:
        return <uint8_t>kvmmu_psce_level(k.a.psce[lane])
    return <uint8_t>kvmmu_psce_level(k.b.psce[lane]) if k.w.kind == WALK_SECOND_STAGE else 0


cdef void start_block(batch *b, block *k) noexcept nogil:
    """Do point 1: find where the last entries of the first stage lie. IN k: rows, addresses and accesses"""
    cdef const kvm_pagewalk *w = k.w
    cdef size_t lane
    k.cached = cached_walks_of(b, w, True)
    k.cached.begun = True
    k.halfway = False
    k.bits_deferred = k.failed = k.unknown = 0
    k.held = 0 if k.count == KVMMU_BLOCK_ROWS else ~<uint64_t>0 << k.count
    if w.kind == WALK_TABLES:
        find_leaves(b.kernels, &k.cached.first, &k.a, k.gva, ~k.held, are_far(&k.cached.first))
        return
    for lane in range(KVMMU_BLOCK_ROWS):
        k.a.gpa[lane] = k.gva[lane] & w.gva_mask


cdef void leave_to_walk(batch *b, block *k, uint64_t lanes) noexcept nogil:
    """Walk the rows of these lanes one by one. Upper levels may have their accessed bits then: find their psce anew."""
    cdef size_t lane
    lanes &= ~k.held
    k.held |= lanes
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        walk_row(b, row_of(k, lane))
        if k.w.kind == WALK_TABLES and not k.a.noncanonical & lane_bit(lane) and (
                k.a.miss & lane_bit(lane) or (k.a.psce[lane] >> PSCE_ACCESSED_CLEAR_SHIFT) & 1 or k.a.slow & lane_bit(lane)):
            find_psce(&k.cached.first, k.gva[lane] & k.w.gva_mask)


cdef inline uint32_t error_code_of(const block *k, size_t lane) noexcept nogil:
    """Return the error code of a lane that the first stage refuses."""
    return <uint32_t>(k.a.error[lane] | (k.a.access_info[lane] >> KVMMU_ACCESS_INFO_SHIFT) & k.w.pferr_mask)


cdef void write_more_of(batch *b, const block *k, size_t lane, uint8_t status, uint64_t gpa) noexcept nogil:
    """Write the columns of a row of one stage beside gpa, status, error_code and level."""
    cdef walk_result r
    cdef int top = 2 if k.w.level == 3 else k.w.level
    r.gpa = r.ngpa = gpa
    r.fault_gpa = INVALID_GPA
    r.exit_qualification = 0
    r.pte_gpa = INVALID_GPA
    if status == STATUS_NON_CANONICAL:
        r.pte = r.level = r.pte_access = r.refs = 0
    else:
        r.pte = k.a.pte[lane]
        r.level = <uint8_t>kvmmu_psce_level(k.a.psce[lane])
        r.pte_access = <uint8_t>k.a.pte_access[lane] if r.pte & k.w.present_mask else 0
        r.refs = <uint8_t>(top + 1 - r.level)
    write_more(b.out, row_of(k, lane), &r)


cdef void fail_lanes(batch *b, block *k, uint64_t lanes) noexcept nogil:
    """Write the rows of lanes that the first stage refuses."""
    cdef size_t lane
    lanes &= ~k.held
    k.held |= lanes
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if k.a.noncanonical & lane_bit(lane):
            write_row(b, row_of(k, lane), INVALID_GPA, STATUS_NON_CANONICAL, 0, 0)
            if b.more:
                write_more_of(b, k, lane, STATUS_NON_CANONICAL, INVALID_GPA)
        else:
            write_row(b, row_of(k, lane), INVALID_GPA, STATUS_PAGE_FAULT, error_code_of(k, lane), level_of(k, lane))
            if b.more:
                write_more_of(b, k, lane, STATUS_PAGE_FAULT, INVALID_GPA)


cdef void write_passed(batch *b, block *k, const uint64_t *gpa) noexcept nogil:
    """Write the rows of lanes that passed; those written before stay as they are."""
    cdef uint64_t lanes = ~k.held
    cdef size_t lane
    k.held = ~<uint64_t>0
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        write_row(b, row_of(k, lane), gpa[lane], STATUS_OK, 0, level_of(k, lane))
        if b.more:
            write_more_of(b, k, lane, STATUS_OK, gpa[lane])
        if b.recalls:
            remember(b, row_of(k, lane), gpa[lane], level_of(k, lane), k.a.entry[lane],
                     0 if k.w.ngpa is NULL else k.b.entry[lane])


cdef inline uint64_t *room_for(const batch *b, block *k, kvmmu_leaf_block *l) noexcept nogil:
    """Return where the addresses of the last stage go: the column itself, if the whole block is one stretch of it."""
    if k.contiguous and k.count == KVMMU_BLOCK_ROWS and b.out.gpa is not NULL:
        return &b.out.gpa[k.base]
    return l.gpa


cdef void write_columns(batch *b, block *k, uint64_t fault) noexcept nogil:
    """Write all rows of a block as if those in fault failed by the first stage and the others passed; gpa is there already.

    Rows that do neither are written again afterwards.
    """
    cdef common_columns out
    cdef size_t lane, row
    cdef bint many = kvmmu_count_bits(fault) > MAX_REMAINING_IN_BLOCK
    if not k.contiguous or b.more or b.recalls:
        return
    if k.count < KVMMU_BLOCK_ROWS:
        k.contiguous = False                            # row by row
        for row in range(k.count):
            k.rows[row] = k.base + row
        return
    out = columns_from(b, k.base)
    if out.level is not NULL:
        for lane in range(KVMMU_BLOCK_ROWS):
            out.level[lane] = level_of(k, lane)
    b.kernels.emit(&k.a, fault if many else 0, k.w.pferr_mask, out.gpa, out.status, out.error_code)
    if many:
        k.held |= fault


cdef void advance_block(batch *b, block *k) noexcept nogil:
    """Do point 2: check the first stage; without a second one write the rows."""
    cdef const kvm_pagewalk *w = k.w
    cdef const kvm_pagewalk *n = w.ngpa
    cdef uint64_t *gpa
    cdef uint64_t unknown = 0
    k.halfway = True
    if w.kind == WALK_TABLES:
        gpa = k.a.gpa
        if n is NULL:
            gpa = room_for(b, k, &k.a)
        check_leaves(b.kernels, &k.cached.first, &k.a, k.held, k.gva, k.access,
                     b.more or (n is not NULL and batch_asks_rights(b, n)), gpa)
        unknown = k.a.miss & ~(k.a.noncanonical | k.held)
        k.a.slow &= ~(unknown | k.a.noncanonical | k.held)
        k.a.fault &= ~unknown
        k.failed = (k.a.fault | k.a.noncanonical) & ~k.held
        if w.pre_processes:                         # an address of another kind may be refused by LASS
            unknown |= k.a.noncanonical & ~k.held
            k.failed &= ~unknown
        if k.a.slow and (n is NULL or not w.final_before_ad):
            unknown |= set_bits_of(&k.cached.first, &k.a, k.a.slow)
        elif k.a.slow:
            k.bits_deferred = k.a.slow
        if n is NULL:
            write_columns(b, k, k.failed & ~k.a.noncanonical)
            if k.failed:
                fail_lanes(b, k, k.failed)
            if unknown:
                leave_to_walk(b, k, unknown)
            if not k.contiguous or b.more or b.recalls:
                write_passed(b, k, gpa)
            k.w = NULL
            return
    else:
        k.a.noncanonical = k.a.fault = k.a.slow = k.a.miss = 0
    k.unknown = unknown
    start_second(b, k)


cdef inline bint batch_asks_rights(const batch *b, const kvm_pagewalk *n) noexcept nogil:
    """True if rights of the first stage decide over what this second stage grants to the accesses of a batch: whether a
    shadow-stack access is a supervisor's, too."""
    return asks_rights(n) or (b.shadow_stacks and n.cpu_role & ROLE_EXT_SHADOW_STACK_MASK)


cdef void start_second(batch *b, block *k) noexcept nogil:
    """Find where the last entries of the second stage lie."""
    cdef const kvm_pagewalk *n = k.w.ngpa
    cdef size_t lane
    cdef uint32_t access
    cdef uint64_t pte_access = ACC_ALL
    cdef bint rights = batch_asks_rights(b, n)
    for lane in range(KVMMU_BLOCK_ROWS):
        access = explicit_access(k.access[lane])
        if k.w.kind == WALK_SECOND_STAGE:
            pte_access = ACC_ALL if access & ACCESS_USER_MASK else ACC_ALL & ~ACC_USER_MASK
        elif k.w.kind == WALK_TABLES and rights:
            pte_access = k.a.pte_access[lane]
        k.second_access[lane] = <uint8_t>second_stage_access(n, access, True, <uint32_t>pte_access)
    if n.ngpa_rsvd_mask:
        for lane in range(KVMMU_BLOCK_ROWS):
            if k.a.gpa[lane] & n.ngpa_rsvd_mask:
                k.unknown |= lane_bit(lane) & ~(k.failed | k.held)
    find_leaves(b.kernels, &k.cached.second, &k.b, k.a.gpa, ~(k.held | k.failed | k.unknown), are_far(&k.cached.second))


cdef void finish_block(batch *b, block *k) noexcept nogil:
    """Do point 3: check the second stage, and write the rows."""
    cdef uint64_t unknown, faults, done = k.held | k.failed
    cdef uint64_t *gpa = room_for(b, k, &k.b)
    cdef size_t lane
    k.b.miss |= k.unknown | k.failed                    # not to be checked
    check_leaves(b.kernels, &k.cached.second, &k.b, k.held, k.a.gpa, k.second_access, False, gpa)
    unknown = k.b.miss & ~done
    faults = k.b.fault & ~(unknown | done)
    if k.w.ngpa.sub_pages or k.w.ngpa.raises_ve:        # a fault may be none, or another one
        unknown |= faults
        faults = 0
    k.b.slow &= ~(unknown | done)
    if k.bits_deferred:                          # the second stage has been granted: now the bits of the first
        unknown |= k.bits_deferred & k.b.slow
        unknown |= set_bits_of(&k.cached.first, &k.a, k.bits_deferred & ~(unknown | faults | done))
    unknown |= set_bits_of(&k.cached.second, &k.b, k.b.slow & ~unknown)
    write_columns(b, k, k.failed & ~k.a.noncanonical)
    fail_lanes(b, k, k.failed)
    while faults:
        lane = kvmmu_first_bit(faults)
        faults &= faults - 1
        k.held |= lane_bit(lane)
        write_row(b, row_of(k, lane), INVALID_GPA, second_fault(k, lane), 0, <uint8_t>kvmmu_psce_level(k.b.psce[lane]))
    leave_to_walk(b, k, unknown)
    if not k.contiguous or b.recalls:
        write_passed(b, k, gpa)
    k.w = NULL


cdef inline uint8_t second_fault(const block *k, size_t lane) noexcept nogil:
    """Return the STATUS_* of a fault of the second stage."""
    return k.w.ngpa.rsvd_status if k.b.error[lane] & PFERR_RSVD_MASK else k.w.ngpa.fault_status


cdef void push_block(batch *b, block *k) noexcept nogil:
    """Start this block, and take the two before it one point further."""
    cdef size_t next = b.next_block + 1 if b.next_block + 1 < BLOCKS else 0
    cdef block *before = &b.blocks[next]
    cdef block *last = &b.blocks[b.next_block - 1 if b.next_block else BLOCKS - 1]
    start_block(b, k)
    if last.w is not NULL and not last.halfway:
        advance_block(b, last)
    if before.w is not NULL:
        finish_block(b, before)
    b.next_block = next


cdef void drain_blocks(batch *b) noexcept nogil:
    cdef size_t i
    cdef block *k
    for i in range(<size_t>BLOCKS):                              # oldest first
        k = &b.blocks[(b.next_block + i) % BLOCKS]
        if k.w is not NULL and not k.halfway:
            advance_block(b, k)
        if k.w is not NULL:
            finish_block(b, k)


cdef bint fits_block(const batch *b, const kvm_pagewalk *w) noexcept nogil:
    """True if blocks can hold rows of this walk."""
    if w.kind != WALK_TABLES and w.ngpa is NULL:
        return False                                # identity
    if b.out.scalar_walk:
        return False
    return w.ngpa is NULL or not b.more


cdef void translate_each(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t first, size_t count) noexcept nogil:
    """Translate rows of one walk that make no block. IN rows: NULL: first and those after it."""
    cdef bint fast = b.by_blocks and not b.more and (w.kind == WALK_TABLES or w.ngpa is not NULL)
    cdef size_t i, row
    for i in range(count):
        row = first + i if rows is NULL else rows[i]
        if fast:
            fast_row(b, row)
        else:
            walk_row(b, row)


cdef inline void pre_process_block(const batch *b, block *k) noexcept nogil:
    """Take the tags from the addresses of a block."""
    if k.w.pre_processes:
        b.kernels.pre_process(&k.w.linear, k.gva, k.access, k.own_gva)
        k.gva = k.own_gva


cdef void enqueue_run(batch *b, const kvm_pagewalk *w, size_t first, size_t count) noexcept nogil:
    cdef block *k
    cdef size_t i
    if count < MIN_LANES or not fits_block(b, w):
        translate_each(b, w, NULL, first, count)
        return
    k = &b.blocks[b.next_block]
    k.w, k.count, k.contiguous, k.base = w, count, True, first
    k.gva, k.access = &b.gva[first], accesses_from(b, first)
    if count < KVMMU_BLOCK_ROWS:
        for i in range(KVMMU_BLOCK_ROWS):
            k.own_gva[i] = b.gva[first + (i if i < count else 0)]
            k.own_access[i] = b.access[(first + (i if i < count else 0)) * b.access_stride]
        k.gva, k.access = k.own_gva, k.own_access
    pre_process_block(b, k)
    push_block(b, k)


cdef void enqueue_rows(batch *b, const kvm_pagewalk *w, const size_t *rows, size_t count) noexcept nogil:
    cdef block *k
    cdef size_t i, row
    if count < MIN_LANES or not fits_block(b, w):
        translate_each(b, w, rows, 0, count)
        return
    k = &b.blocks[b.next_block]
    k.w, k.count, k.contiguous = w, count, False
    for i in range(KVMMU_BLOCK_ROWS):
        row = rows[i if i < count else 0]
        k.rows[i] = row
        k.own_gva[i] = b.gva[row]
        k.own_access[i] = b.access[row * b.access_stride]
    k.gva, k.access = k.own_gva, k.own_access
    pre_process_block(b, k)
    push_block(b, k)
