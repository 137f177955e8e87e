"""The walk over arrays. Rows are independent; columns, shapes and contexts were checked by the caller (`pagewalk.pyx`).

    recall     64 rows at a time, translations that this batch made already (by page and access)
    straight   what is left, 64 rows of one walk at a time, where most of them pass and few tables are in use: their last
               entries, which psc of their walks lead to (`_psc.pxd`), are read side by side and compared with what
               surely passes (`_straight.pxd`, `_lanes.h`)
    lanes      elsewhere, blocks of up to 64 rows of one walk, a few of them on their way at a time: their last entries are
               fetched ahead, and leaf side by side by the whole rules (`_blocks.pxd`)
    one by one rows that set accessed or dirty bits in upper levels, lose a race, or whose prefix cannot be known: the scalar
               walk (`_walk.pyx`), which is the reference for all the others
"""

import os
from concurrent.futures import ThreadPoolExecutor

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport SlotTable, kvmmu_cmpxchg64, kvmmu_keep_copies, kvmmu_load32, kvmmu_read64, kvmmu_store32
from kvmmu.walk.batch._arrays cimport (
    MOST_COLUMNS, access_column, aligned, check_apart, column, column_of, context_column, stretch,
)
from kvmmu.walk.batch._blocks cimport drain_blocks, enqueue_rows, enqueue_run
from kvmmu.walk.batch._lanes cimport (
    KVMMU_BLOCK_ROWS, KVMMU_BLOCK_ALIGNMENT, kvmmu_count_bits, kvmmu_first_bit, kvmmu_kernels, kvmmu_kernels_of,
)
from kvmmu.walk.batch._psc cimport TOUCHED_BYTES, is_marked, new_walk_cache
from kvmmu.walk.batch._rows cimport (
    CACHED_WALKS, BLOCKS, DEFERRED_CONTEXTS, accesses_from, batch, batch_columns, block, columns_from, common_columns,
    of_one_context,
    order_shows, fast_row, recall_row, deferred_rows, walk_of, walk_row, cached_walks,
)
from kvmmu.walk.batch._straight cimport translate_uniform_blocks

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

# Fewer rows than this are walked one by one.
cdef size_t FEW_ROWS = 8
# Of 64 rows so many or fewer unknown translations are looked up one after the other.
cdef int FEW_MISSES = 12
# Changes of the context in 64 rows, from which on rows wait for others of their context.
cdef uint32_t MANY_CHANGES = 2
# Rows (in chunks of 64) over which is judged whether remembering translations pays, and for how long not to.
cdef size_t TRIAL = 32
cdef size_t FIRST_LOOK = 4              # if nearly all are missing so soon, the trial is over
cdef size_t FIRST_REST = 128
cdef size_t LAST_REST = 8192
# Of the rows of a batch, for each thread: the faster ones take more of them.
_PIECES = 8
_BLOCK = int(KVMMU_BLOCK_ROWS)               # rows; no two threads write one line of the cache
# More threads than this count as so many.
_MOST_THREADS = 64
# A thread access_info at the clock after so many rows at first: a tenth of a second or so if every row is of the slowest kind.
cdef size_t FIRST_SLICE = 524288
cdef size_t LAST_SLICE = 4194304
# Nanoseconds that a slice should take, and after which Python may handle signals. 0.2 s is what a person takes for at once.
cdef uint64_t SHORT_SLICE = 5000000
cdef uint64_t LONG_SLICE = 20000000
cdef uint64_t A_WHILE = 50000000

cdef const kvmmu_kernels *KERNELS = NULL
_INSTRUCTION_SETS = ("avx512", "avx2", "portable")


def use_instruction_set(name):
    """Walk batches with the functions for an instruction set: "avx512", "avx2" or "portable".

    Raises
    ------
    ValueError
        There is no such set, or this CPU or build does not have it.
    """
    global KERNELS
    cdef const kvmmu_kernels *kernels = NULL
    encoded = str(name).encode()
    if name in _INSTRUCTION_SETS:
        kernels = kvmmu_kernels_of(encoded)
    if kernels is NULL:
        raise ValueError(f"instruction set {name!r}: want one of {', '.join(instruction_sets())}")
    KERNELS = kernels


def instruction_sets():
    """The instruction sets that this CPU and build have, best first."""
    return [name for name in _INSTRUCTION_SETS if kvmmu_kernels_of(name.encode()) is not NULL]


def default_instruction_set():
    """The best instruction set whose functions have run in tests: AVX-512 has to be chosen by name."""
    return next(name for name in instruction_sets() if name != "avx512")


use_instruction_set(os.environ.get("KVMMU_INSTRUCTION_SET") or default_instruction_set())


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef void enqueue_chunk(batch *b, size_t start, size_t count) noexcept nogil:
    """Up to 64 rows from start on, in runs of one walk."""
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
    """64 rows of several contexts, until there are enough of each. False: they go on at once."""
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
    """Rows from start on whose bit is set, in runs of one walk."""
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


cdef void recall_chunk(batch *b, size_t start) noexcept nogil:
    """64 rows from start on: those whose translations are known at once, the others by blocks or one after the other."""
    cdef uint64_t room[64]
    cdef common_columns out = columns_from(b, start)
    cdef const uint32_t *ctx = b.ctx
    cdef uint64_t misses, memo_id = b.memo_id
    cdef size_t row
    if out.gpa is NULL:
        out.gpa = room
    if ctx is not NULL:
        ctx = &b.ctx[start]
        if of_one_context(ctx):
            memo_id += ctx[0]
            ctx = NULL
    misses = b.kernels.recall(b.memo, &b.gva[start], accesses_from(b, start), ctx, memo_id, out.gpa, out.level, out.status,
                              out.error_code)
    b.tried += 1
    if not misses:
        return
    b.missed += kvmmu_count_bits(misses)
    if kvmmu_count_bits(misses) > FEW_MISSES:
        enqueue_some(b, start, misses)
        return
    while misses:
        row = start + kvmmu_first_bit(misses)
        misses &= misses - 1
        if not recall_row(b, row):
            fast_row(b, row)


cdef void consider_recall(batch *b) noexcept nogil:
    """Remember translations as long as most rows find theirs; try again later, and ever later."""
    cdef size_t rows = b.tried * KVMMU_BLOCK_ROWS
    if b.tried < TRIAL and not (b.tried == FIRST_LOOK and b.missed > rows - rows // 4):
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


cdef bint wants_more(const batch_columns *out) noexcept nogil:
    """Whether a column beside gpa, status, error_code and level is wanted."""
    return (out.pte is not NULL or out.pte_gpa is not NULL or out.pte_access is not NULL or out.refs is not NULL or
            out.ngpa is not NULL or out.fault_gpa is not NULL or out.exit_qualification is not NULL)


cdef void begin_batch(batch *b, Workspace work, uint64_t count, size_t rows, bint watch) noexcept nogil:
    cdef size_t i
    b.more = wants_more(b.out)
    b.kernels = KERNELS
    b.tables, b.memo = &work.cache.tables, work.cache.tables.memo
    b.blocks, b.cached, b.deferred = work.blocks, work.cached, work.deferred
    b.has_deferred = False
    b.touched = NULL
    if watch:
        b.touched = work.touched
        memset(b.touched, 0, TOUCHED_BYTES)
    b.count = count
    b.last_context = <uint32_t>(count - 1)
    b.walk_id = b.memo_id = 0
    b.last_cached = b.next_cached = 0
    for i in range(<size_t>CACHED_WALKS):
        b.cached[i].w = NULL
    b.tried = b.missed = b.recall_after = b.next_block = 0
    b.recall_backoff = FIRST_REST
    if rows >= FEW_ROWS:
        b.walk_id = work.cache.take_walk_ids(2 * count)
    b.by_blocks = b.walk_id != 0
    if b.by_blocks and not b.more and rows >= 2 * KVMMU_BLOCK_ROWS:
        b.memo_id = work.cache.take_memo_ids(count)
    b.may_recall = b.recalls = b.memo_id != 0
    if not b.access_stride and rows:
        memset(b.same_access, b.access[0], sizeof(b.same_access))


cdef bint depends_on(const batch *b, const uint8_t *hva) noexcept nogil:
    return b.touched is NULL or is_marked(b.touched, <uint64_t><uintptr_t>hva)


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


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef class Workspace:
    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a Workspace is made by a batch")
        self.cache = new_walk_cache()
        self.block_memory = calloc(1, BLOCKS * sizeof(block) + KVMMU_BLOCK_ALIGNMENT)
        self.blocks = <block *>((<uintptr_t>self.block_memory + KVMMU_BLOCK_ALIGNMENT - 1) & ~(KVMMU_BLOCK_ALIGNMENT - 1))
        self.cached = <cached_walks *>calloc(CACHED_WALKS, sizeof(cached_walks))
        self.deferred = <deferred_rows *>calloc(DEFERRED_CONTEXTS, sizeof(deferred_rows))
        self.touched = <uint8_t *>calloc(TOUCHED_BYTES, 1)
        if self.block_memory is NULL or self.cached is NULL or self.deferred is NULL or self.touched is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.block_memory)
        free(self.cached)
        free(self.deferred)
        free(self.touched)


cdef Workspace new_workspace():
    return Workspace.__new__(Workspace, maker())


# Those that no batch uses at the moment.
cdef list spare = []


cdef dict places():
    """Where the pointers of columns stand in a batch_columns, and the size of an element; by name."""
    cdef batch_columns c
    cdef char *start = <char *>&c
    return {
        "gpa": (<char *>&c.gpa - start, sizeof(c.gpa[0])), "status": (<char *>&c.status - start, sizeof(c.status[0])),
        "error_code": (<char *>&c.error_code - start, sizeof(c.error_code[0])),
        "level": (<char *>&c.level - start, sizeof(c.level[0])), "pte": (<char *>&c.pte - start, sizeof(c.pte[0])),
        "pte_gpa": (<char *>&c.pte_gpa - start, sizeof(c.pte_gpa[0])),
        "pte_access": (<char *>&c.pte_access - start, sizeof(c.pte_access[0])),
        "refs": (<char *>&c.refs - start, sizeof(c.refs[0])), "ngpa": (<char *>&c.ngpa - start, sizeof(c.ngpa[0])),
        "fault_gpa": (<char *>&c.fault_gpa - start, sizeof(c.fault_gpa[0])),
        "exit_qualification": (<char *>&c.exit_qualification - start, sizeof(c.exit_qualification[0])),
    }


cdef dict PLACES = places()


cdef uint64_t now() noexcept nogil:
    """Nanoseconds since some moment."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef Job new_job():
    return Job.__new__(Job, maker())


cdef class Job:
    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a Job is made by PageWalk.translate()")

    cdef Py_ssize_t take_rows(self, gva, access) except -1:
        cdef column rows = column_of("", "gva", gva, sizeof(uint64_t), -1, False)
        cdef column accesses = access_column(access, rows.rows, &self.one_access)
        if <uintptr_t>rows.data % sizeof(uint64_t):
            gva = aligned(gva, sizeof(uint64_t))
            rows = column_of("", "gva", gva, sizeof(uint64_t), -1, False)
        self.gva, self.access, self.rows = gva, access, rows.rows
        self.whole.gva, self.whole.access = <const uint64_t *>rows.data, <const uint8_t *>accesses.data
        self.whole.access_stride = 1 if accesses.rows > 1 else 0
        return rows.rows

    cdef int take_columns(self, tuple names, list arrays, bint apart) except -1:
        cdef str name
        cdef Py_ssize_t i, place, size
        cdef column found
        cdef stretch stretches[MOST_COLUMNS]
        if len(names) > MOST_COLUMNS - 3:
            raise ValueError(f"fields: {len(names)} names, and there are {len(PLACES)} columns")
        for i in range(len(names)):
            name = names[i]
            place, size = PLACES[name]
            found = column_of("out.", name, arrays[i], size, self.rows, True)
            (<void **>(<char *>&self.columns + place))[0] = found.data
            if not apart:
                stretches[i].start, stretches[i].bytes = <uintptr_t>found.data, size * self.rows
        self.arrays = arrays
        if not apart:
            i = len(names)
            stretches[i].start, stretches[i].bytes = <uintptr_t>self.whole.gva, sizeof(uint64_t) * self.rows
            stretches[i + 1].start = <uintptr_t>self.whole.access
            stretches[i + 1].bytes = self.rows if self.whole.access != &self.one_access else 0
            stretches[i + 2].start = <uintptr_t>self.whole.ctx
            stretches[i + 2].bytes = sizeof(uint32_t) * self.rows if self.whole.ctx is not NULL else 0
            check_apart(stretches, i + 3, i, names)
        return 0

    cdef int take_contexts(self, ctx, uint64_t count) except -1:
        ctx = aligned(ctx, sizeof(uint32_t))
        self.whole.ctx = context_column(ctx, self.rows, count)
        self.ctx = ctx
        return 0

    cdef void take_walks(self, walks, const kvm_pagewalk *first, uint64_t count, SlotTable table, bint set_ad):
        self.walks, self.table = walks, table
        self.whole.walks, self.whole.count, self.whole.set_ad = first, count, set_ad

    cdef size_t take_piece(self) noexcept nogil:
        """The first row of a piece that nobody has."""
        cdef uint64_t start = kvmmu_read64(<const uint8_t *>&self.next_row)
        while start < self.rows and not kvmmu_cmpxchg64(&self.next_row, start, start + self.piece):
            start = kvmmu_read64(<const uint8_t *>&self.next_row)
        return start

    cdef bint run_some(self, batch *part, place *at) noexcept nogil:
        """Translate for a while. False: no rows are left, or the batch is to stop."""
        cdef size_t stop
        cdef uint64_t begun = 0, before = 0, after
        while not kvmmu_load32(&self.stopped):
            if at.row == at.stop:
                at.row = self.take_piece()
                if at.row >= self.rows:
                    return False
                at.stop = min(at.row + self.piece, self.rows)
            if at.row == 0 and at.stop <= FIRST_SLICE:          # a small batch
                translate_rows(part, 0, at.stop)
                at.row = at.stop
                continue
            if not begun:
                begun = before = now()
            stop = min(at.stop, at.row + at.slice)
            translate_rows(part, at.row, stop)
            at.row = stop
            after = now()
            if after - before < SHORT_SLICE:
                at.slice = min(2 * at.slice, LAST_SLICE)
            elif after - before > LONG_SLICE:
                at.slice = max(at.slice // 2, <size_t>KVMMU_BLOCK_ROWS)
            if after - begun > A_WHILE:
                return True
            before = after
        return False

    def run(self):
        """Translate pieces of the rows, until there are none left; other threads may do the same at the same time."""
        self.run_pieces()

    cdef int run_pieces(self) except -1:
        cdef batch part = self.whole
        cdef place at
        cdef bint more = True
        cdef Workspace work = spare.pop() if spare else new_workspace()
        part.out = &self.columns
        at.row = at.stop = 0
        at.slice = FIRST_SLICE
        with nogil:
            begin_batch(&part, work, self.whole.count, self.piece, False)
        try:
            while more:
                with nogil:
                    more = self.run_some(&part, &at)
                if more:
                    PyErr_CheckSignals()
        finally:
            spare.append(work)
        return 0

    cdef int run_all(self, threads) except -1:
        threads = min(threads, _MOST_THREADS)
        self.piece = self.rows
        if threads == 1 or <Py_ssize_t>self.rows < threads * _BLOCK:
            self.run_pieces()
            return 0
        self.piece = -(-<Py_ssize_t>self.rows // (threads * _PIECES) // _BLOCK) * _BLOCK
        with ThreadPoolExecutor(threads - 1) as pool:
            try:
                others = [pool.submit(self.run) for _ in range(threads - 1)]
                self.run_pieces()
                for other in others:
                    other.result()
            except BaseException:
                kvmmu_store32(&self.stopped, 1)         # they stop soon, whether somebody has_deferred for them or not
                raise
        return 0
