"""Rows that go straight through; see `_straight.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport WALK_TABLES, kvm_pagewalk
from kvmmu.arch._bits cimport STATUS_OK
from kvmmu.arch._format cimport explicit_access, access_info_of
from kvmmu.walk.batch._lanes cimport KVMMU_BLOCK_ROWS, kvmmu_count_bits, kvmmu_first_bit, kvmmu_leaf_block, kvmmu_psce_level
from kvmmu.walk.batch._leaf cimport make_accept_masks, rights_count, set_bits_of
from kvmmu.walk.batch._psc cimport is_backing_off, leaf_result, cached_walk, back_off, reset_backoff
from kvmmu.walk.batch._rows cimport (
    accesses_from, batch, columns_from, common_columns, check_row, of_one_context, order_shows, fast_row, cached_walks_of,
    walk_of, cached_walks, write_row,
)

# Of 64 rows so many or fewer that do not surely pass are dealt with one after the other.
cdef int MAX_REMAINING_UNIFORM = 12
# Tables of last entries (of 4 KiB) up to which those are taken to be in the cache; others are fetched ahead, by blocks.
cdef size_t MAX_CACHED_TABLES_UNIFORM = 2048


cdef bint can_be_uniform(const kvm_pagewalk *w) noexcept nogil:
    """Whether what passes is a matter of each stage by itself, and the order of rows does not matter."""
    if order_shows(w):
        return False
    return w.kind == WALK_TABLES if w.ngpa is NULL else not rights_count(w.ngpa)


cdef uint64_t accept_leaves(batch *b, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva, const uint8_t *access,
                            const common_columns *out, size_t sample) noexcept nogil:
    """Returns the rows that do not surely pass; all of them, if that cannot be known. IN sample: a row to learn from"""
    l.slow = 0
    if not s.has_masks and not make_accept_masks(s, gva[sample]):
        return ~<uint64_t>0
    b.kernels.find[s.w.format](l, &s.checker, gva, False)
    return b.kernels.read[s.w.format](l, &s.checker, gva, access, out.gpa, out.level, out.status, out.error_code)


cdef bint translate_uniform_block(batch *b, cached_walks *m, size_t first) noexcept nogil:
    """64 rows. False: nothing is done."""
    cdef const kvm_pagewalk *w = m.w
    cdef kvmmu_leaf_block *lanes = &b.blocks[b.next_block].a               # of the block that is free
    cdef const uint64_t *gva = &b.gva[first]
    cdef const uint8_t *access = accesses_from(b, first)
    cdef common_columns out = columns_from(b, first)
    cdef leaf_result leaf
    cdef uint64_t remaining = 0, slow, psce
    cdef size_t lane
    if out.gpa is NULL:
        out.gpa = lanes.gpa
    if w.kind == WALK_TABLES:
        remaining = accept_leaves(b, &m.first, lanes, gva, access, &out, 0)
        if w.ngpa is not NULL:
            gva = out.gpa
    elif out.level is not NULL:
        memset(out.level, 0, KVMMU_BLOCK_ROWS)
    out.level = NULL                                            # of the first stage
    if w.ngpa is not NULL and kvmmu_count_bits(remaining) <= MAX_REMAINING_UNIFORM:
        remaining |= accept_leaves(b, &m.second, lanes, gva, access, &out, kvmmu_first_bit(~remaining))
    if kvmmu_count_bits(remaining) > MAX_REMAINING_UNIFORM:
        slow = lanes.slow
        if w.ngpa is not NULL or kvmmu_count_bits(remaining & ~slow) > MAX_REMAINING_UNIFORM:
            return False
        for lane in range(KVMMU_BLOCK_ROWS):                     # their addresses are right already
            lanes.access_info[lane] = access_info_of(w.fmt, access[lane])
        remaining = (remaining & ~slow) | set_bits_of(&m.first, lanes, slow)
    while remaining:
        lane = kvmmu_first_bit(remaining)
        remaining &= remaining - 1
        psce = lanes.psce[lane]
        if w.ngpa is not NULL or psce == m.first.checker.nothing:
            fast_row(b, first + lane)
        elif check_row(b, m, first + lane, psce, lanes.entry[lane], gva[lane] & w.gva_mask, explicit_access(access[lane]),
                       &leaf):
            write_row(b, first + lane, leaf.gpa, STATUS_OK, 0, <uint8_t>kvmmu_psce_level(psce))
    return True


cdef size_t translate_uniform_blocks(batch *b, size_t first, size_t stop) noexcept nogil:
    cdef size_t row = first
    cdef cached_walks *m
    if b.more or stop - first < KVMMU_BLOCK_ROWS or (b.ctx is not NULL and not of_one_context(&b.ctx[first])):
        return 0
    m = cached_walks_of(b, walk_of(b, first), True)
    if is_backing_off(&m.uniform_backoff):
        return 0
    while m.first.found <= MAX_CACHED_TABLES_UNIFORM and m.second.found <= MAX_CACHED_TABLES_UNIFORM:
        if not can_be_uniform(m.w) or not translate_uniform_block(b, m, row):
            m.first.has_masks = m.second.has_masks = False
            back_off(&m.uniform_backoff)
            break
        reset_backoff(&m.uniform_backoff, 0)
        row += KVMMU_BLOCK_ROWS
        if stop - row < KVMMU_BLOCK_ROWS:
            break
        if b.ctx is not NULL and not (b.ctx[row] == b.ctx[first] and of_one_context(&b.ctx[row])):
            break
    return row - first
