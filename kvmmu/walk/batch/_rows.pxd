"""Rows of a batch, one by one: the structures that a batch works with, and what writes a row.

A row is recalled, or found quickly from the psc of its walk, or walked by the scalar walk, which is the reference.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.memory._memory cimport kvmmu_load32, kvmmu_load64
from kvmmu.walk.batch._lanes cimport KVMMU_BLOCK_ROWS, kvmmu_kernels, kvmmu_leaf_block, kvmmu_memo_entry
from kvmmu.walk.batch._psc cimport leaf_result, cached_walk, backoff, walk_tables

# Columns of a batch; a NULL column is not wanted.
cdef struct batch_columns:
    uint64_t *gpa
    uint8_t *status
    uint32_t *error_code
    uint8_t *level
    uint64_t *pte
    uint64_t *pte_gpa
    uint8_t *pte_access
    uint8_t *refs
    uint64_t *ngpa
    uint64_t *fault_gpa
    uint64_t *exit_qualification

# Stretches of the common columns, NULL where one is not wanted.
cdef struct common_columns:
    uint64_t *gpa
    uint8_t *status
    uint32_t *error_code
    uint8_t *level

cdef struct cached_walks:
    const kvm_pagewalk *w
    cached_walk first
    cached_walk second
    backoff uniform_backoff               # of blocks: see `_straight.pxd`

# Walks whose spaces are kept: for blocks, more than there are blocks; and for single rows.
cdef enum:
    BLOCKS = 3
    BLOCK_WALKS = 16
    ROW_WALKS = 64
    CACHED_WALKS = BLOCK_WALKS + ROW_WALKS

# Up to 64 rows of one walk on their way: first stage in a, second stage in b.
cdef struct block:
    cached_walks *cached
    const kvm_pagewalk *w           # NULL: free
    size_t count
    bint contiguous                 # the rows are base, base + 1, ...
    size_t base
    bint halfway                    # the first stage is done
    uint64_t held                   # lanes whose row was written already, or that hold no row
    # of the first stage:
    uint64_t failed                 # lanes that fault
    uint64_t unknown                # lanes that the scalar walk must take
    uint64_t bits_deferred                 # lanes that set accessed or dirty bits after the second stage
    size_t rows[64]                 # where they are not
    const uint64_t *gva             # 64 of each: the caller's own, or
    const uint8_t *access
    uint64_t own_gva[64]
    uint8_t own_access[64]
    uint8_t second_access[64]
    kvmmu_leaf_block a
    kvmmu_leaf_block b

# Rows of one context that wait until they are as many as a block holds.
cdef enum:
    DEFERRED_CONTEXTS = 64

cdef struct deferred_rows:
    uint32_t ctx
    uint32_t count
    size_t rows[64]

# One batch, or a thread's part of it. IN walks: one, or one per context; ctx: NULL, or the context of each row (checked by
# the caller); access: one value (access_stride 0) or one per row (access_stride 1). All else is begin_batch()'s.
cdef struct batch:
    const kvm_pagewalk *walks
    const uint32_t *ctx
    const uint64_t *gva
    const uint8_t *access
    size_t access_stride
    bint set_ad
    const batch_columns *out
    bint more                       # a column beside gpa, status, error_code and level is wanted
    bint by_blocks                    # False: row by row
    uint8_t same_access[64]         # where access_stride is 0
    bint may_recall
    bint recalls                    # translations are remembered
    size_t recall_after                   # chunks to go before trying again whether that helps
    size_t recall_backoff
    size_t tried, missed
    uint32_t walk_id                   # of the first walk's psc; then the second stages'
    uint32_t memo_id                  # of the first walk's translations
    uint64_t count                  # walks
    uint32_t last_context           # count - 1
    const kvmmu_kernels *kernels
    walk_tables *tables
    kvmmu_memo_entry *memo            # of tables
    uint8_t *touched                # NULL, or which words of memory something remembered depends on; see mark_word()
    block *blocks                   # BLOCKS
    size_t next_block
    deferred_rows *deferred           # DEFERRED_CONTEXTS, by context modulo that
    bint has_deferred                      # there are some
    cached_walks *cached             # CACHED_WALKS, of the walks of late
    size_t last_cached, next_cached

cdef void write_more(const batch_columns *out, size_t i, const walk_result *r) noexcept nogil
cdef void remember(batch *b, size_t i, uint64_t gpa, uint8_t level) noexcept nogil
# Write row i if its translation is known by now.
cdef bint recall_row(const batch *b, size_t i) noexcept nogil
cdef void walk_row(batch *b, size_t i) noexcept nogil
cdef void fast_row(batch *b, size_t i) noexcept nogil
# The first stage of row i by its last entry. False: the row is written. OUT leaf: of a row that passes
cdef bint check_row(batch *b, cached_walks *m, size_t i, uint64_t psce, uint64_t entry, uint64_t addr, uint32_t access,
                    leaf_result *leaf) noexcept nogil
cdef cached_walks *cached_walks_of(batch *b, const kvm_pagewalk *w, bint for_block) noexcept nogil


cdef inline uint32_t context_of(const batch *b, size_t i) noexcept nogil:
    """The context of a row of a batch that has some: in range, whoever has written to the column since it was checked."""
    return min(kvmmu_load32(&b.ctx[i]), b.last_context)


cdef inline const kvm_pagewalk *walk_of(const batch *b, size_t i) noexcept nogil:
    return b.walks if b.ctx is NULL else &b.walks[context_of(b, i)]


cdef inline bint order_shows(const kvm_pagewalk *w) noexcept nogil:
    """Whether a log tells in which order rows were walked."""
    return w.pml is not NULL or (w.ngpa is not NULL and w.ngpa.pml is not NULL)


cdef inline common_columns columns_from(const batch *b, size_t row) noexcept nogil:
    cdef common_columns c
    c.gpa = NULL if b.out.gpa is NULL else &b.out.gpa[row]
    c.status = NULL if b.out.status is NULL else &b.out.status[row]
    c.error_code = NULL if b.out.error_code is NULL else &b.out.error_code[row]
    c.level = NULL if b.out.level is NULL else &b.out.level[row]
    return c


cdef inline const uint8_t *accesses_from(const batch *b, size_t row) noexcept nogil:
    """The accesses of 64 rows."""
    return &b.access[row] if b.access_stride else b.same_access


cdef inline void write_row(const batch *b, size_t i, uint64_t gpa, uint8_t status, uint32_t error_code,
                           uint8_t level) noexcept nogil:
    if b.out.gpa is not NULL:
        b.out.gpa[i] = gpa
    if b.out.status is not NULL:
        b.out.status[i] = status
    if b.out.error_code is not NULL:
        b.out.error_code[i] = error_code
    if b.out.level is not NULL:
        b.out.level[i] = level


cdef inline bint of_one_context(const uint32_t *ctx) noexcept nogil:
    """Whether 64 rows are of one context."""
    cdef uint64_t differ = 0, first = ctx[0] * ((<uint64_t>1 << 32) + 1)
    cdef size_t i
    for i in range(KVMMU_BLOCK_ROWS // 2):
        differ |= kvmmu_load64(<const uint8_t *>&ctx[2 * i]) ^ first
    return differ == 0
