"""The order of a batch: which way each row takes; see `_schedule.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu._walk cimport WALK_TABLES
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport kvmmu_keep_copies
from kvmmu.walk.batch._blocks cimport drain_blocks, enqueue_rows, enqueue_run
from kvmmu.walk.batch._kernels cimport (
    KVMMU_BLOCK_ALIGNMENT, KVMMU_BLOCK_ROWS, kernels_in_use, kvmmu_count_bits, kvmmu_first_bit,
)
from kvmmu.walk.batch._mixed cimport translate_mixed_blocks
from kvmmu.walk.batch._psc cimport (
    MANY_DEPEND, back_off, is_backing_off, is_marked, new_walk_cache, reset_backoff, touched_bit, touched_words,
)
from kvmmu.walk.batch._rows cimport (
    BLOCKS, CACHED_WALKS, DEFERRED_CONTEXTS, accesses_from, batch, block, cached_walks, columns_from,
    common_columns, deferred_rows, fast_row, of_one_context, order_shows, recall_row, walk_of, walk_row,
)
from kvmmu.walk.batch._uniform cimport translate_uniform_blocks

cdef enum:
    FEW_ROWS = 16                   # fewer are walked one by one: they share too little of the cache. Tuned by hand
    # Of 64 rows that the memo does not have so many or fewer are walked one by one; more make a block. Tuned by hand, between
    # MIN_LANES and MAX_REMAINING_IN_BLOCK.
    FEW_MISSES = 12
    # More are looked up again after each walk, until so many have been walked: often they are of one page or two. Tuned by hand:
    # 8 take 5% less in recordings with table writes, but 5% more where random pages are accessed several times in a row.
    FEW_WALKS = 4
    # Rows of a batch from which on the memo is tried. A trial costs as much as 500 rows, and batches of 8 pages, which the memo
    # serves best, take the same time with it and without at 2,000 rows.
    MEMO_ROWS = 2048
    # Changes of the context in 64 rows from which on rows are deferred. One change leaves two runs, which can be blocks.
    MANY_CHANGES = 2
    # Chunks of 64 rows over which the memo is tried: 2,048 rows, half of its entries. If most rows miss, it is left alone for
    # four times as many chunks, so that trials are a fifth of them at most, and four times as long after each failed trial, up
    # to LAST_REST; if nearly all miss in the first 4 chunks, the trial ends there, and trials are 3%.
    TRIAL = 32
    SHORT_TRIAL = 4
    FIRST_REST = 128
    LAST_REST = 8192


cdef void enqueue_chunk(batch *b, size_t start, size_t count) noexcept nogil:
    """Enqueue up to 64 rows from start on, in runs of one walk."""
    cdef size_t i, first = start
    if b.ctx is not NULL and not (count == KVMMU_BLOCK_ROWS and of_one_context(&b.ctx[start])):
        for i in range(start + 1, start + count):
            if b.ctx[i] != b.ctx[first]:
                enqueue_run(b, walk_of(b, first), first, i - first)
                first = i
    enqueue_run(b, walk_of(b, first), first, start + count - first)


cdef void enqueue_deferred(batch *b, deferred_rows *g) noexcept nogil:
    enqueue_rows(b, &b.walks[g.ctx], g.rows, g.count)
    g.count = 0


cdef void enqueue_all_deferred(batch *b) noexcept nogil:
    cdef size_t i
    if b.has_deferred:
        for i in range(<size_t>DEFERRED_CONTEXTS):
            if b.deferred[i].count:
                enqueue_deferred(b, &b.deferred[i])
    b.has_deferred = False


cdef bint defer_rows(batch *b, size_t start) noexcept nogil:
    """Defer 64 rows of several contexts until there are enough of each. False: none is deferred."""
    cdef uint32_t ctx[64]
    cdef deferred_rows *g
    cdef uint32_t last = b.last_context, beyond = 0, changes = 0
    cdef size_t i
    memcpy(ctx, &b.ctx[start], sizeof(ctx))
    kvmmu_keep_copies()                             # a comparison that reads the column twice would let a change through
    for i in range(KVMMU_BLOCK_ROWS):
        beyond |= ctx[i] | (last - ctx[i])          # the highest bit: ctx[i] > last, both being below 2^31 as a rule
    if beyond >> 31:
        for i in range(KVMMU_BLOCK_ROWS):
            ctx[i] = min(ctx[i], last)
    for i in range(1, KVMMU_BLOCK_ROWS):
        changes += ctx[i] != ctx[i - 1]
    if b.more or changes < MANY_CHANGES:
        return False
    for i in range(KVMMU_BLOCK_ROWS):
        if order_shows(&b.walks[ctx[i]]):
            return False
    for i in range(KVMMU_BLOCK_ROWS):
        g = &b.deferred[ctx[i] % DEFERRED_CONTEXTS]
        if g.count and g.ctx != ctx[i]:
            enqueue_deferred(b, g)
        if not g.count:
            g.ctx = ctx[i]
        g.rows[g.count] = start + i
        g.count += 1
        if g.count == KVMMU_BLOCK_ROWS:
            enqueue_deferred(b, g)
    b.has_deferred = True
    return True


cdef void enqueue_some(batch *b, size_t start, uint64_t some) noexcept nogil:
    """Enqueue the rows from start on whose bit is set, in runs of one walk."""
    cdef size_t rows[64]
    cdef size_t row, first = 0, count = 0
    while some:
        row = start + kvmmu_first_bit(some)
        some &= some - 1
        if b.ctx is not NULL and count > first and b.ctx[row] != b.ctx[rows[first]]:
            enqueue_rows(b, walk_of(b, rows[first]), &rows[first], count - first)
            first = count
        rows[count] = row
        count += 1
    enqueue_rows(b, walk_of(b, rows[first]), &rows[first], count - first)


cdef uint64_t walk_missing(batch *b, size_t start, uint64_t misses, size_t most) noexcept nogil:
    """Translate the rows from start on whose bit is set, in order, until so many had to be walked. Returns the bits left."""
    cdef size_t row, walked = 0
    while misses:
        row = start + kvmmu_first_bit(misses)
        if not recall_row(b, row):                  # none before it was of its page
            if walked == most:
                break
            fast_row(b, row)
            walked += 1
        misses &= misses - 1
    return misses


cdef uint64_t recall_rows(batch *b, size_t start) noexcept nogil:
    cdef uint64_t room[64]
    cdef common_columns out = columns_from(b, start)
    cdef const uint32_t *ctx = b.ctx
    cdef uint64_t memo_id = b.memo_id
    if out.gpa is NULL:
        out.gpa = room
    if ctx is not NULL:
        ctx = &b.ctx[start]
        if of_one_context(ctx):
            memo_id += ctx[0]
            ctx = NULL
    b.tried += 1
    return b.kernels.recall(b.memo, &b.gva[start], accesses_from(b, start), ctx, memo_id, out.gpa, out.level, out.status,
                            out.error_code)


cdef void recall_chunk(batch *b, size_t start) noexcept nogil:
    """Translate 64 rows from start on by the memo, those that it does not have in blocks or one by one."""
    cdef uint64_t misses = recall_rows(b, start)
    cdef size_t missing = kvmmu_count_bits(misses)
    if not misses:
        return
    if missing <= FEW_MISSES:
        misses = walk_missing(b, start, misses, missing)
    elif not is_backing_off(&b.walk_backoff):
        misses = walk_missing(b, start, misses, FEW_WALKS)
        if misses:
            back_off(&b.walk_backoff)
        else:
            reset_backoff(&b.walk_backoff, 1)
            missing = FEW_MISSES                    # they cost no more
    b.missed += missing
    if misses:
        enqueue_some(b, start, misses)


cdef void consider_recall(batch *b) noexcept nogil:
    """Use the memo as long as most rows find their translations; else try it again later, each time later."""
    cdef size_t rows = b.tried * KVMMU_BLOCK_ROWS
    if b.tried < TRIAL and not (b.tried == SHORT_TRIAL and b.missed > rows - rows // 4):
        return
    if b.missed > rows // 2:
        drain_blocks(b)
        b.recalls = False
        b.recall_after = b.recall_backoff
        if b.recall_backoff < LAST_REST:
            b.recall_backoff *= 4
    elif b.tried >= TRIAL:
        b.recall_backoff = FIRST_REST
    b.tried = b.missed = 0


cdef bint mixes_entry_sizes(const batch *b) noexcept nogil:
    """True if some contexts have entries of 4 bytes, others of 8: accessed and dirty bits of one are address bits of the other,
    if their tables are the same memory."""
    cdef bint short_entries = False, long_entries = False
    cdef uint64_t i
    for i in range(b.count):
        if b.walks[i].kind == WALK_TABLES:
            short_entries |= b.walks[i].format == KVMMU_FORMAT_32
            long_entries |= b.walks[i].format != KVMMU_FORMAT_32
    return short_entries and long_entries


cdef void begin_batch(batch *b, Workspace work, uint64_t count, size_t rows, bint watch) noexcept nogil:
    cdef size_t i
    b.more = b.out.more_count != 0
    b.kernels = kernels_in_use()
    b.tables, b.memo = &work.cache.tables, work.cache.tables.memo
    b.blocks, b.cached, b.deferred = work.blocks, work.cached, work.deferred
    b.has_deferred = False
    b.touched = NULL
    if watch:
        b.touched = work.touched
        memset(b.touched.bits, 0, sizeof(b.touched.bits))
    b.count = count
    b.last_context = <uint32_t>(count - 1)
    b.walk_id = b.memo_id = 0
    b.last_cached = b.next_cached = 0
    for i in range(<size_t>CACHED_WALKS):
        b.cached[i].w = NULL
    b.tried = b.missed = b.recall_after = b.next_block = 0
    reset_backoff(&b.mixed_backoff, 0)
    reset_backoff(&b.walk_backoff, 1)
    b.recall_backoff = FIRST_REST
    if rows >= FEW_ROWS:
        b.walk_id = work.cache.take_walk_ids(2 * count)
    b.by_blocks = b.walk_id != 0 and not (count > 1 and b.set_ad and mixes_entry_sizes(b))
    if b.by_blocks and not b.more and rows >= MEMO_ROWS:
        b.memo_id = work.cache.take_memo_ids(count)
    b.may_recall = b.recalls = b.memo_id != 0
    if not b.access_stride and rows:
        memset(b.same_access, b.access[0], sizeof(b.same_access))


cdef bint forget_word(batch *b, const uint8_t *hva) noexcept nogil:
    cdef uint64_t bit = touched_bit(<uint64_t><uintptr_t>hva)
    if not is_marked(b.touched, bit):
        return True
    if b.touched.dependent[bit] == MANY_DEPEND:
        return False
    b.memo[b.touched.dependent[bit]].tag = 0
    return True


cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil:
    cdef size_t i = start, row, count, last, done
    if not b.by_blocks:
        for i in range(start, stop):
            walk_row(b, i)
        return
    while i < stop:
        count = min(stop - i, <size_t>KVMMU_BLOCK_ROWS)
        if b.recalls and count == KVMMU_BLOCK_ROWS:
            recall_chunk(b, i)
            consider_recall(b)
        elif b.recalls:                             # the last few
            for row in range(i, stop):
                if not recall_row(b, row):
                    fast_row(b, row)
        else:
            last = stop
            if b.may_recall:
                last = min(stop, i + b.recall_after * KVMMU_BLOCK_ROWS)
            done = translate_uniform_blocks(b, i, last)
            if not done:
                done = translate_mixed_blocks(b, i, last)
            if done:
                count = done
            elif count < KVMMU_BLOCK_ROWS or b.ctx is NULL or not defer_rows(b, i):
                enqueue_chunk(b, i, count)
            if b.may_recall:
                b.recall_after -= min(b.recall_after, (count + KVMMU_BLOCK_ROWS - 1) // KVMMU_BLOCK_ROWS)
                if not b.recall_after:
                    enqueue_all_deferred(b)
                    drain_blocks(b)
                    b.recalls = True
        i += count
    enqueue_all_deferred(b)
    drain_blocks(b)


cdef class Workspace:
    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a Workspace is made by a batch")
        self.cache = new_walk_cache()
        self.block_memory = calloc(1, BLOCKS * sizeof(block) + KVMMU_BLOCK_ALIGNMENT)
        self.blocks = <block *>((<uintptr_t>self.block_memory + KVMMU_BLOCK_ALIGNMENT - 1) & ~(KVMMU_BLOCK_ALIGNMENT - 1))
        self.cached = <cached_walks *>calloc(CACHED_WALKS, sizeof(cached_walks))
        self.deferred = <deferred_rows *>calloc(DEFERRED_CONTEXTS, sizeof(deferred_rows))
        self.touched = <touched_words *>calloc(1, sizeof(touched_words))
        if self.block_memory is NULL or self.cached is NULL or self.deferred is NULL or self.touched is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.block_memory)
        free(self.cached)
        free(self.deferred)
        free(self.touched)


cdef Workspace new_workspace():
    return Workspace.__new__(Workspace, maker())
