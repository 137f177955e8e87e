"""Rows that go straight through; see `_straight.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport WALK_TABLES, kvm_pagewalk
from kvmmu.arch._bits cimport STATUS_OK
from kvmmu.arch._format cimport explicit_access, look_of
from kvmmu.walk.batch._lanes cimport KVMMU_LANES, kvmmu_count_bits, kvmmu_first_bit, kvmmu_lanes, kvmmu_prefix_level
from kvmmu.walk.batch._leaf cimport learn_passes, rights_count, set_bits_of
from kvmmu.walk.batch._psc cimport is_resting, judged_entry, lane_space, rest_longer, start_patience
from kvmmu.walk.batch._rows cimport (
    accesses_from, batch, columns_from, common_columns, judge_row, of_one_context, order_shows, quick_row, spaces_of,
    walk_of, walk_spaces, write_row,
)

# Of 64 rows so many or fewer that do not surely pass are dealt with one after the other.
cdef int FEW_ODD = 12
# Tables of last entries (of 4 KiB) up to which those are taken to be in the cache; others are fetched ahead, by blocks.
cdef size_t NEAR = 2048


cdef bint may_go(const kvm_pagewalk *w) noexcept nogil:
    """Whether what passes is a matter of each stage by itself, and the order of rows does not matter."""
    if order_shows(w):
        return False
    return w.kind == WALK_TABLES if w.ngpa is NULL else not rights_count(w.ngpa)


cdef uint64_t pass_stage(batch *b, lane_space *s, kvmmu_lanes *l, const uint64_t *gva, const uint8_t *access,
                         const common_columns *out, size_t sample) noexcept nogil:
    """Returns the rows that do not surely pass; all of them, if that cannot be known. IN sample: a row to learn from"""
    l.slow = 0
    if not s.known and not learn_passes(s, gva[sample]):
        return ~<uint64_t>0
    b.ops.find[s.w.format](l, &s.stage, gva, False)
    return b.ops.read[s.w.format](l, &s.stage, gva, access, out.gpa, out.level, out.status, out.error_code)


cdef bint pass_block(batch *b, walk_spaces *m, size_t first) noexcept nogil:
    """64 rows. False: nothing is done."""
    cdef const kvm_pagewalk *w = m.w
    cdef kvmmu_lanes *lanes = &b.blocks[b.turn].a               # of the block that is free
    cdef const uint64_t *gva = &b.gva[first]
    cdef const uint8_t *access = accesses_from(b, first)
    cdef common_columns out = columns_from(b, first)
    cdef judged_entry judged
    cdef uint64_t odd = 0, slow, ref
    cdef size_t lane
    if out.gpa is NULL:
        out.gpa = lanes.gpa
    if w.kind == WALK_TABLES:
        odd = pass_stage(b, &m.first, lanes, gva, access, &out, 0)
        if w.ngpa is not NULL:
            gva = out.gpa
    elif out.level is not NULL:
        memset(out.level, 0, KVMMU_LANES)
    out.level = NULL                                            # of the first stage
    if w.ngpa is not NULL and kvmmu_count_bits(odd) <= FEW_ODD:
        odd |= pass_stage(b, &m.second, lanes, gva, access, &out, kvmmu_first_bit(~odd))
    if kvmmu_count_bits(odd) > FEW_ODD:
        slow = lanes.slow
        if w.ngpa is not NULL or kvmmu_count_bits(odd & ~slow) > FEW_ODD:
            return False
        for lane in range(KVMMU_LANES):                     # their addresses are right already
            lanes.look[lane] = look_of(w.fmt, access[lane])
        odd = (odd & ~slow) | set_bits_of(&m.first, lanes, slow)
    while odd:
        lane = kvmmu_first_bit(odd)
        odd &= odd - 1
        ref = lanes.ref[lane]
        if w.ngpa is not NULL or ref == m.first.stage.nothing:
            quick_row(b, first + lane)
        elif judge_row(b, m, first + lane, ref, lanes.entry[lane], gva[lane] & w.gva_mask, explicit_access(access[lane]),
                       &judged):
            write_row(b, first + lane, judged.gpa, STATUS_OK, 0, <uint8_t>kvmmu_prefix_level(ref))
    return True


cdef size_t go_straight(batch *b, size_t first, size_t stop) noexcept nogil:
    cdef size_t row = first
    cdef walk_spaces *m
    if b.more or stop - first < KVMMU_LANES or (b.ctx is not NULL and not of_one_context(&b.ctx[first])):
        return 0
    m = spaces_of(b, walk_of(b, first), True)
    if is_resting(&m.straight):
        return 0
    while m.first.found <= NEAR and m.second.found <= NEAR:
        if not may_go(m.w) or not pass_block(b, m, row):
            m.first.known = m.second.known = False
            rest_longer(&m.straight)
            break
        start_patience(&m.straight, 0)
        row += KVMMU_LANES
        if stop - row < KVMMU_LANES:
            break
        if b.ctx is not NULL and not (b.ctx[row] == b.ctx[first] and of_one_context(&b.ctx[row])):
            break
    return row - first
