"""Rows of a batch, one by one: the structures that a batch works with, and the functions that write a row.

A row is recalled from the memo of translations, or found from the paging-structure cache and its last entry (`fast_row()`), or
walked by the scalar walk, which is the reference.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.memory._memory cimport kvmmu_load32, kvmmu_load64
from kvmmu.walk.batch._kernels cimport KVMMU_BLOCK_ROWS, kvmmu_kernels, kvmmu_leaf_block, kvmmu_memo_entry
from kvmmu.walk.batch._leaf cimport leaf_result
from kvmmu.walk.batch._psc cimport backoff, cached_walk, touched_words, walk_tables

# A column that is copied from a walk_result.
cdef struct more_column:
    uint8_t *data
    size_t place                    # of the field
    size_t size                     # of an element: 1, 4 or 8 bytes

cdef enum:
    MOST_MORE_COLUMNS = 16          # no fewer than `fields` may name

# Columns of a batch; a NULL column is not wanted.
cdef struct batch_columns:
    uint64_t *gpa
    uint8_t *status
    uint32_t *error_code
    uint8_t *level
    more_column more[MOST_MORE_COLUMNS]
    size_t more_count
    bint scalar_walk                # a column is wanted that the scalar walk alone knows

# Stretches of the common columns, NULL where one is not wanted.
cdef struct common_columns:
    uint64_t *gpa
    uint8_t *status
    uint32_t *error_code
    uint8_t *level

# Both stages of a walk, with what is cached of them.
cdef struct cached_walks:
    const kvm_pagewalk *w
    cached_walk first
    cached_walk second
    backoff uniform_backoff         # from uniform blocks
    bint begun                      # a block was translated, which cached what it found

cdef enum:
    BLOCKS = 3                      # under way at a time: one for each of the three points in `_blocks.pxd`
    # Walks that stay cached. Of blocks: some more than there are blocks; of single rows: as many as contexts that are deferred.
    BLOCK_WALKS = 16
    ROW_WALKS = 64
    MIXED_WALK = BLOCK_WALKS + ROW_WALKS        # of blocks of several contexts
    CACHED_WALKS = MIXED_WALK + 1

# Up to 64 rows of one walk that are translated side by side: first stage in a, second stage in b.
cdef struct block:
    cached_walks *cached
    const kvm_pagewalk *w           # NULL: free
    size_t count
    bint contiguous                 # the rows are base, base + 1, ...
    size_t base
    bint halfway                    # the first stage is done
    uint64_t held                   # lanes whose row is written, or that hold no row
    # of the first stage:
    uint64_t failed                 # lanes that fault
    uint64_t unknown                # lanes that the scalar walk must take
    uint64_t bits_deferred          # lanes that set accessed or dirty bits after the second stage
    size_t rows[64]                 # of a block that is not contiguous
    const uint64_t *gva             # 64 of each: the caller's own, or
    const uint8_t *access
    uint64_t own_gva[64]
    uint8_t own_access[64]
    uint8_t second_access[64]
    kvmmu_leaf_block a
    kvmmu_leaf_block b

# Rows of one context that are deferred until they fill a block.
cdef enum:
    DEFERRED_CONTEXTS = 64          # 33 KiB: about a first-level cache

cdef struct deferred_rows:
    uint32_t ctx
    uint32_t count
    size_t rows[64]

# One batch, or a thread's part of it. IN walks: one, or one per context; alike: NULL, or for each walk the first one that reads
# the same tables by the same rules, rights aside; ctx: NULL, or the context of each row (checked by the caller); access: one
# value (access_stride 0) or one per row (access_stride 1). begin_batch() sets the others.
cdef struct batch:
    const kvm_pagewalk *walks
    const uint32_t *alike
    const uint32_t *ctx
    const uint64_t *gva
    const uint8_t *access
    size_t access_stride
    bint set_ad
    bint shadow_stacks              # some accesses are to shadow stacks
    const batch_columns *out
    bint more                       # a column beside gpa, status, error_code and level is wanted
    bint by_blocks                  # False: row by row
    uint8_t same_access[64]         # where access_stride is 0
    bint may_recall
    bint recalls                    # translations are looked up in the memo, and put there
    size_t recall_after             # chunks to go before the memo is tried again
    size_t recall_backoff
    size_t tried, missed
    uint32_t walk_id                # of the first walk in the paging-structure cache; then those of the second stages
    uint32_t memo_id                # of the first walk in the memo
    uint64_t count                  # walks
    uint32_t last_context           # count - 1
    const kvmmu_kernels *kernels
    walk_tables *tables
    kvmmu_memo_entry *memo          # of tables
    touched_words *touched          # NULL, or the words of memory that something cached depends on
    block *blocks                   # BLOCKS
    size_t next_block
    deferred_rows *deferred         # DEFERRED_CONTEXTS, by context modulo that
    bint has_deferred
    cached_walks *cached            # CACHED_WALKS, of the walks used last
    size_t last_cached, next_cached
    backoff mixed_backoff           # from blocks of several contexts
    backoff walk_backoff            # from walking rows that the memo does not have one by one, where there are many

# Write the columns of row i beside gpa, status, error_code and level
cdef void write_more(const batch_columns *out, size_t i, const walk_result *r) noexcept nogil
# Put a translation of row i, which passes, into the memo. IN first, second: where its last entries of both stages lie; 0: no word
# that may change
cdef void remember(batch *b, size_t i, uint64_t gpa, uint8_t level, uint64_t first, uint64_t second) noexcept nogil
# Write row i if the memo has its translation.
cdef bint recall_row(const batch *b, size_t i) noexcept nogil
# Write row i by the scalar walk
cdef void walk_row(batch *b, size_t i) noexcept nogil
# Write row i by the paging-structure cache and its last entry, or else by the scalar walk
cdef void fast_row(batch *b, size_t i) noexcept nogil
# Check the first stage of row i by its last entry. False: the row is written. OUT leaf: of a row that passes
cdef bint check_row(batch *b, cached_walks *m, size_t i, uint64_t psce, uint64_t entry, uint64_t addr, uint32_t access,
                    leaf_result *leaf) noexcept nogil
# Return what is cached of a walk. IN for_block: it stays as long as a block has it; else until the next row
cdef cached_walks *cached_walks_of(batch *b, const kvm_pagewalk *w, bint for_block) noexcept nogil
# The same for blocks of several contexts, whose walks read the same tables as w
cdef cached_walks *mixed_walks_of(batch *b, const kvm_pagewalk *w) noexcept nogil


cdef inline uint32_t context_of(const batch *b, size_t i) noexcept nogil:
    """Return the context of a row, below the count even if the column was written to after it was checked."""
    return min(kvmmu_load32(&b.ctx[i]), b.last_context)


cdef inline const kvm_pagewalk *walk_of(const batch *b, size_t i) noexcept nogil:
    return b.walks if b.ctx is NULL else &b.walks[context_of(b, i)]


cdef inline bint order_shows(const kvm_pagewalk *w) noexcept nogil:
    """True if a log, or an information area that the first #VE takes, tells in which order rows were walked."""
    return w.pml is not NULL or (w.ngpa is not NULL and (w.ngpa.pml is not NULL or w.ngpa.raises_ve))


cdef inline common_columns columns_from(const batch *b, size_t row) noexcept nogil:
    cdef common_columns c
    c.gpa = NULL if b.out.gpa is NULL else &b.out.gpa[row]
    c.status = NULL if b.out.status is NULL else &b.out.status[row]
    c.error_code = NULL if b.out.error_code is NULL else &b.out.error_code[row]
    c.level = NULL if b.out.level is NULL else &b.out.level[row]
    return c


cdef inline const uint8_t *accesses_from(const batch *b, size_t row) noexcept nogil:
    """Return the accesses of 64 rows."""
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
    """True if 64 rows are of one context."""
    cdef uint64_t differ = 0, first = ctx[0] * ((<uint64_t>1 << 32) + 1)
    cdef size_t i
    for i in range(KVMMU_BLOCK_ROWS // 2):
        differ |= kvmmu_load64(<const uint8_t *>&ctx[2 * i]) ^ first
    return differ == 0
