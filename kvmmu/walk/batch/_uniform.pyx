"""Uniform blocks of one walk; see `_uniform.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport WALK_DIRECT, WALK_SECOND_STAGE, WALK_TABLES, kvm_pagewalk
from kvmmu.arch._bits cimport STATUS_OK
from kvmmu.arch._format cimport access_info_of, explicit_access
from kvmmu.walk.batch._blocks cimport drain_blocks
from kvmmu.walk.batch._kernels cimport (
    KVMMU_BLOCK_ROWS, kvmmu_count_bits, kvmmu_first_bit, kvmmu_leaf_block, kvmmu_psce_level,
)
from kvmmu.walk.batch._leaf cimport asks_rights, leaf_result
from kvmmu.walk.batch._leaves cimport are_far, make_accept_masks, seek_leaves, set_bits_of
from kvmmu.walk.batch._psc cimport back_off, cached_walk, is_backing_off, reset_backoff
from kvmmu.walk.batch._rows cimport (
    BLOCKS, accesses_from, batch, cached_walks, cached_walks_of, check_row, columns_from, common_columns, fast_row,
    of_one_context, order_shows, walk_of, write_row,
)

cdef enum:
    # Of 64 rows of a uniform block so many or fewer that are not accepted are checked one by one. Tuned by hand; fewer than
    # MAX_REMAINING_IN_BLOCK, because each of them is written twice.
    MAX_REMAINING_UNIFORM = 12
    # Tables of last entries of both stages up to which the steps of a block follow each other: blocks that are under way take
    # room in the cache of the CPU, too. Tuned by hand.
    MAX_NEAR_TABLES_OF_TWO = 1024

# 64 rows under way.
cdef struct uniform_block:
    size_t first
    const uint64_t *gva             # linear addresses: the caller's own, or
    uint64_t own_gva[64]
    const uint64_t *ngpa            # addresses that the second stage translates
    common_columns out
    kvmmu_leaf_block *a             # of the first stage
    kvmmu_leaf_block *b             # of the second one
    uint64_t remaining              # rows that are not accepted


cdef bint can_be_uniform(const kvm_pagewalk *w) noexcept nogil:
    if order_shows(w):
        return False
    return w.kind == WALK_TABLES if w.ngpa is NULL else not asks_rights(w.ngpa)


cdef inline bint are_few(uint64_t lanes) noexcept nogil:
    return kvmmu_count_bits(lanes) <= MAX_REMAINING_UNIFORM


cdef inline uint64_t accept(batch *b, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *addr, const uint8_t *access,
                            const common_columns *out, const uint64_t *ahead) noexcept nogil:
    """Return the rows that the accept masks of a stage do not accept. IN ahead: as in `kernels/kernels.h`"""
    return b.kernels.accept[s.w.format](l, &s.checker, addr, access, out.gpa, out.level, out.status, out.error_code, ahead)


cdef inline bint seek(batch *b, cached_walks *m, uniform_block *u, size_t first) noexcept nogil:
    """Do the first step of the rows from one on. False: they are no uniform block."""
    u.first, u.gva, u.out, u.remaining = first, &b.gva[first], columns_from(b, first), 0
    if u.out.gpa is NULL:
        u.out.gpa = u.b.gpa
    if m.w.pre_processes:
        b.kernels.pre_process(&m.w.linear, u.gva, accesses_from(b, first), u.own_gva)
        u.gva = u.own_gva
    u.ngpa = u.gva
    if m.w.kind != WALK_TABLES:
        return True
    return (m.first.has_masks or make_accept_masks(&m.first, u.gva[0])) and (
        are_few(seek_leaves(b.kernels, &m.first, u.a, u.gva, False)))


cdef bint reach(batch *b, cached_walks *m, uniform_block *u, const uint64_t *ahead) noexcept nogil:
    """Do the second step of three. False: as seek()"""
    cdef common_columns out = u.out
    out.status, out.error_code = NULL, NULL
    if m.w.kind != WALK_SECOND_STAGE:
        u.out.level = NULL                                      # it is that of the first stage
    if m.w.kind == WALK_TABLES:
        u.remaining = accept(b, &m.first, u.a, u.gva, accesses_from(b, u.first), &out, ahead)
        u.ngpa = out.gpa
        if not are_few(u.remaining & ~u.a.slow):
            m.first.has_masks = False
            return False
    elif m.w.kind == WALK_DIRECT and out.level is not NULL:
        memset(out.level, 0, KVMMU_BLOCK_ROWS)
    return (m.second.has_masks or make_accept_masks(&m.second, u.ngpa[kvmmu_first_bit(~u.remaining | u.a.slow)])) and (
        are_few(seek_leaves(b.kernels, &m.second, u.b, u.ngpa, False)))


cdef inline bint finish(batch *b, cached_walks *m, uniform_block *u, const uint64_t *ahead) noexcept nogil:
    """Do the last step. False: as seek()"""
    cdef const kvm_pagewalk *w = m.w
    cdef const uint8_t *access = accesses_from(b, u.first)
    cdef leaf_result leaf
    cdef uint64_t passed, slow, lanes, psce
    cdef size_t lane
    if w.ngpa is not NULL:
        passed = ~accept(b, &m.second, u.b, u.ngpa, access, &u.out, ahead)
        slow = u.remaining & u.a.slow & passed
        u.remaining |= ~passed
    else:
        u.remaining = accept(b, &m.first, u.a, u.gva, access, &u.out, ahead)
        slow = u.a.slow
    if not are_few(u.remaining & ~slow):
        m.first.has_masks = m.second.has_masks = False
        return False
    if slow:                                                    # their addresses are right already
        u.remaining &= ~slow
        lanes = slow
        while lanes:
            lane = kvmmu_first_bit(lanes)
            lanes &= lanes - 1
            u.a.access_info[lane] = access_info_of(w.fmt, access[lane])
        u.remaining |= set_bits_of(&m.first, u.a, slow)
    while u.remaining:
        lane = kvmmu_first_bit(u.remaining)
        u.remaining &= u.remaining - 1
        psce = u.a.psce[lane]
        if w.ngpa is not NULL or psce == m.first.checker.nothing:
            fast_row(b, u.first + lane)
        elif check_row(b, m, u.first + lane, psce, u.a.entry[lane], u.gva[lane] & w.gva_mask, explicit_access(access[lane]),
                       &leaf):
            write_row(b, u.first + lane, leaf.gpa, STATUS_OK, 0, <uint8_t>kvmmu_psce_level(psce))
    return True


cdef inline bint leads(const cached_walks *m) noexcept nogil:
    """True if it pays to prefetch last entries."""
    return are_far(&m.first) if m.w.ngpa is NULL else m.first.found + m.second.found > MAX_NEAR_TABLES_OF_TWO


cdef inline bint are_of_context(const batch *b, size_t first, size_t row) noexcept nogil:
    """True if 64 rows from one on are of the context of another row."""
    return b.ctx is NULL or (b.ctx[row] == b.ctx[first] and of_one_context(&b.ctx[row]))


cdef size_t translate_in_turn(batch *b, cached_walks *m, size_t first, size_t end, bint *fits) noexcept nogil:
    """Translate up to so many blocks, one after the other. Returns how many. OUT fits: False: the next one is no uniform block"""
    cdef uniform_block u
    cdef size_t n = 0
    u.a, u.b = &b.blocks[0].a, &b.blocks[0].b
    while n < end and are_of_context(b, first, first + n * KVMMU_BLOCK_ROWS) and not leads(m):
        if not seek(b, m, &u, first + n * KVMMU_BLOCK_ROWS) or (m.w.ngpa is not NULL and not reach(b, m, &u, NULL)) or (
                not finish(b, m, &u, NULL)):
            fits[0] = False
            break
        n += 1
    return n


cdef size_t translate_ahead(batch *b, cached_walks *m, size_t first, size_t end, bint *fits) noexcept nogil:
    """The same with the steps of blocks one behind the other."""
    cdef uniform_block blocks[BLOCKS]
    cdef size_t turn = 0, steps = 1 if m.w.ngpa is NULL else 2, i              # steps: after the first one
    cdef const uint64_t *ahead
    for i in range(<size_t>BLOCKS):
        blocks[i].a, blocks[i].b = &b.blocks[i].a, &b.blocks[i].b
    while turn < end + steps:
        ahead = NULL
        if turn < end:
            i = first + turn * KVMMU_BLOCK_ROWS
            if not are_of_context(b, first, i):
                end = turn
            elif not seek(b, m, &blocks[turn % BLOCKS], i):
                end, fits[0] = turn, False
            elif m.w.kind == WALK_TABLES:
                ahead = blocks[turn % BLOCKS].a.entry
        i = turn - 1                                            # none: beyond the end
        if steps == 2 and i < end:
            if not reach(b, m, &blocks[i % BLOCKS], ahead):
                end, fits[0] = i, False
            ahead = blocks[i % BLOCKS].b.entry
        i = turn - steps
        if i < end and not finish(b, m, &blocks[i % BLOCKS], ahead):
            end, fits[0] = i, False
        turn += 1
    return end


cdef size_t translate_uniform_blocks(batch *b, size_t first, size_t stop) noexcept nogil:
    cdef size_t blocks = (stop - first) // KVMMU_BLOCK_ROWS
    cdef bint fits = True
    cdef cached_walks *m
    if b.more or not blocks or not are_of_context(b, first, first):
        return 0
    m = cached_walks_of(b, walk_of(b, first), True)
    if not m.begun or not can_be_uniform(m.w) or is_backing_off(&m.uniform_backoff):
        return 0
    drain_blocks(b)
    if leads(m):
        blocks = translate_ahead(b, m, first, blocks, &fits)
    else:
        blocks = translate_in_turn(b, m, first, blocks, &fits)
    if blocks:
        reset_backoff(&m.uniform_backoff, 0)
    if not fits:
        back_off(&m.uniform_backoff)
    return blocks * KVMMU_BLOCK_ROWS
