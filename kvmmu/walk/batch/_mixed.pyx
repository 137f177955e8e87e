"""Uniform blocks of several contexts; see `_mixed.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._kernels cimport KVMMU_BLOCK_ROWS, kvmmu_count_bits, kvmmu_first_bit, kvmmu_leaf_block
from kvmmu.walk.batch._leaves cimport find_leaves, make_common_masks
from kvmmu.walk.batch._psc cimport back_off, is_backing_off, reset_backoff
from kvmmu.walk.batch._rows cimport (
    accesses_from, batch, cached_walks, columns_from, common_columns, context_of, fast_row, mixed_walks_of, of_one_context,
    order_shows, walk_of,
)
from kvmmu.walk.batch._uniform cimport can_be_uniform

cdef enum:
    # Of 64 rows so many or fewer that are not accepted, or are of other tables, are translated one by one. They cost as much as
    # in blocks of their own, the others a quarter.
    MAX_REMAINING_MIXED = 24
    FIRST_LANES = 8                 # among which a context with tables is looked for


cdef bint can_be_mixed(const kvm_pagewalk *w) noexcept nogil:
    """True if rows of this walk can stand in a block with rows of walks that are alike."""
    return w.ngpa is NULL and not w.pre_processes and can_be_uniform(w)


cdef uint64_t lanes_of_others(const batch *b, size_t first, uint32_t group) noexcept nogil:
    """Return which of 64 rows are of contexts that are not like those of a group."""
    cdef uint64_t others = 0
    cdef size_t lane
    for lane in range(KVMMU_BLOCK_ROWS):
        others |= <uint64_t>(b.alike[context_of(b, first + lane)] != group) << lane
    return others


cdef bint translate_mixed_block(batch *b, cached_walks *m, size_t first) noexcept nogil:
    """Translate 64 rows, most of them of contexts that are alike, by what passes in all of these. False: nothing is done."""
    cdef kvmmu_leaf_block *lanes = &b.blocks[b.next_block].a               # of the block that is free
    cdef const uint64_t *gva = &b.gva[first]
    cdef const uint8_t *access = accesses_from(b, first)
    cdef common_columns out = columns_from(b, first)
    cdef uint64_t others = lanes_of_others(b, first, b.alike[m.w - b.walks]), remaining
    cdef size_t lane
    if kvmmu_count_bits(others) > MAX_REMAINING_MIXED:
        return False
    remaining = others
    while remaining:
        lane = kvmmu_first_bit(remaining)
        remaining &= remaining - 1
        if order_shows(walk_of(b, first + lane)):
            return False
    if out.gpa is NULL:
        out.gpa = lanes.gpa
    if not m.first.has_masks and not make_common_masks(&m.first, gva[kvmmu_first_bit(~others)], b.walks, b.alike, b.count):
        return False
    find_leaves(b.kernels, &m.first, lanes, gva, ~others, False)
    remaining = b.kernels.accept[m.w.format](lanes, &m.first.checker, gva, access, out.gpa, out.level, out.status,
                                             out.error_code, NULL)
    remaining |= others | lanes.miss | lanes.noncanonical | lanes.accessed_clear
    if kvmmu_count_bits(remaining) > MAX_REMAINING_MIXED:
        return False
    while remaining:
        lane = kvmmu_first_bit(remaining)
        remaining &= remaining - 1
        fast_row(b, first + lane)
    return True


cdef size_t translate_mixed_blocks(batch *b, size_t first, size_t stop) noexcept nogil:
    cdef size_t row = first, lane = 0
    cdef uint32_t group
    cdef cached_walks *m
    if b.more or b.alike is NULL or b.ctx is NULL or stop - first < KVMMU_BLOCK_ROWS or of_one_context(&b.ctx[first]):
        return 0
    if is_backing_off(&b.mixed_backoff):
        return 0
    group = b.alike[context_of(b, first)]
    while not can_be_mixed(&b.walks[group]) and lane < FIRST_LANES:         # without paging, say
        lane += 1
        group = b.alike[context_of(b, first + lane)]
    m = mixed_walks_of(b, &b.walks[group])
    while stop - row >= KVMMU_BLOCK_ROWS and (row == first or not of_one_context(&b.ctx[row])):
        if not can_be_mixed(m.w) or not translate_mixed_block(b, m, row):
            m.first.has_masks = False
            back_off(&b.mixed_backoff)
            break
        reset_backoff(&b.mixed_backoff, 0)
        row += KVMMU_BLOCK_ROWS
    return row - first
