"""One batch from Python; see `_job.pxd`."""

import os

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport ACCESS_SHADOW_STACK_MASK
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport SlotTable, kvmmu_cmpxchg64, kvmmu_load32, kvmmu_read64, kvmmu_store32
from kvmmu.walk._columns cimport FIELDS
from kvmmu.walk.batch._arrays cimport (
    MIN_ROWS_WITHOUT_GIL, MOST_COLUMNS, access_column, aligned, check_apart, column, column_of, context_column, stretch,
)
from kvmmu.walk.batch._kernels cimport KVMMU_BLOCK_ROWS
from kvmmu.walk.batch._rows cimport batch, more_column
from kvmmu.walk.batch._schedule cimport Workspace, begin_batch, new_workspace, translate_rows

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    # Pieces of a batch for each thread: the faster threads take more of them, and the last ones end within an eighth of each
    # other's time.
    PIECES = 8
    MOST_THREADS = 64               # more count as so many
    # Rows for each thread below which one thread does it all: the fastest rows (2 ns each) of as many take the time in which
    # another thread is woken and waited for.
    FEW_ROWS_OF_THREAD = 16384
    # Rows between two looks at the clock: a tenth of a second or so at first if every row is of the slowest kind (200 ns);
    # enough later that looks are rare in batches of the fastest kind (2 ns).
    FIRST_SLICE = 524288
    LAST_SLICE = 4194304
    # Nanoseconds that a slice should take, and after which Python may handle signals: several times in the 0.2 s that a person
    # takes for at once.
    SHORT_SLICE = 5000000
    LONG_SLICE = 20000000
    SIGNAL_TIME = 50000000


# Workspaces that no batch uses.
cdef list spare = []
cdef Py_ssize_t rows_of_thread = FEW_ROWS_OF_THREAD
# Threads that wait for parts of batches, as many as a batch ever asked for; None: none was needed yet in this process.
cdef object pool = None
cdef Py_ssize_t pool_size = 0


def _forget_pool():
    """Forget the threads of the process that forked: this one does not have them."""
    global pool, pool_size
    pool, pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def set_rows_of_thread(Py_ssize_t rows=FEW_ROWS_OF_THREAD):
    """Set the rows for each thread below which one thread does it all, so that tests see threads in small batches."""
    global rows_of_thread
    rows_of_thread = max(rows, <Py_ssize_t>KVMMU_BLOCK_ROWS)


cdef list submit(run, Py_ssize_t count):
    """Have threads of the pool call run(), so many of them; fewer, if Python is shutting down. Returns their futures."""
    global pool, pool_size
    cdef list futures = []
    try:
        if count > pool_size:
            from concurrent.futures import ThreadPoolExecutor
            if pool is not None:
                pool.shutdown(wait=False)               # its threads end when they have done what they have
            pool, pool_size = ThreadPoolExecutor(count, "kvmmu"), count
        for _ in range(count):
            futures.append(pool.submit(run))
    except RuntimeError:                                # no thread can be started: the caller's does it alone
        pass
    return futures


cdef int leave_pool() except -1:
    """Let the threads of the pool end when they have done what they have; the next batch has new ones."""
    left = pool
    _forget_pool()
    if left is not None:
        left.shutdown(wait=False)
    return 0


cdef uint64_t now() noexcept nogil:
    """Return nanoseconds since some moment."""
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
        cdef uint8_t seen = 0
        cdef column accesses = access_column(access, rows.rows, &self.one_access, &seen)
        if <uintptr_t>rows.data % sizeof(uint64_t):
            gva = aligned(gva, sizeof(uint64_t))
            rows = column_of("", "gva", gva, sizeof(uint64_t), -1, False)
        self.gva, self.access, self.rows = gva, access, rows.rows
        self.whole.gva, self.whole.access = <const uint64_t *>rows.data, <const uint8_t *>accesses.data
        self.whole.access_stride = 1 if accesses.rows > 1 else 0
        self.whole.shadow_stacks = seen & ACCESS_SHADOW_STACK_MASK != 0
        return rows.rows

    cdef int take_columns(self, tuple names, list arrays, bint apart) except -1:
        cdef str name
        cdef Py_ssize_t i, place, size
        cdef bint in_blocks
        cdef column found
        cdef stretch stretches[MOST_COLUMNS]
        cdef more_column *more
        if len(names) > MOST_COLUMNS - 3:
            raise ValueError(f"fields: {len(names)} names, and there are {len(FIELDS)} columns")
        for i in range(len(names)):
            name = names[i]
            place, size, in_blocks = FIELDS[name]
            found = column_of("out.", name, arrays[i], size, self.rows, True)
            if name == "gpa":
                self.columns.gpa = <uint64_t *>found.data
            elif name == "status":
                self.columns.status = <uint8_t *>found.data
            elif name == "error_code":
                self.columns.error_code = <uint32_t *>found.data
            elif name == "level":
                self.columns.level = <uint8_t *>found.data
            else:
                more = &self.columns.more[self.columns.more_count]
                more.data, more.place, more.size = <uint8_t *>found.data, place, size
                self.columns.more_count += 1
                self.columns.scalar_walk = self.columns.scalar_walk or not in_blocks
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

    cdef void take_walks(self, walks, const kvm_pagewalk *first, const uint32_t *alike, uint64_t count, SlotTable table,
                         bint set_ad):
        self.walks, self.table = walks, table
        self.whole.walks, self.whole.alike, self.whole.count, self.whole.set_ad = first, alike, count, set_ad

    cdef size_t take_piece(self) noexcept nogil:
        """Take a piece that no thread has; returns its first row."""
        cdef uint64_t start = kvmmu_read64(<const uint8_t *>&self.next_row)
        while start < self.rows and not kvmmu_cmpxchg64(&self.next_row, start, start + self.piece):
            start = kvmmu_read64(<const uint8_t *>&self.next_row)
        return start

    cdef bint run_some(self, batch *part, place *at) noexcept nogil:
        """Translate for SIGNAL_TIME. False: no rows are left, or the batch is to stop."""
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
            if after - begun > SIGNAL_TIME:
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
        begin_batch(&part, work, self.whole.count, self.rows, False)
        try:
            if self.rows < MIN_ROWS_WITHOUT_GIL:
                more = self.run_some(&part, &at)
            while more:
                with nogil:
                    more = self.run_some(&part, &at)
                if more:
                    PyErr_CheckSignals()
        finally:
            spare.append(work)
        return 0

    cdef int run_all(self, threads) except -1:
        cdef Py_ssize_t block = KVMMU_BLOCK_ROWS
        threads = min(threads, MOST_THREADS)
        self.piece = self.rows
        threads = min(threads, <Py_ssize_t>self.rows // rows_of_thread)
        if threads <= 1:
            self.run_pieces()
            return 0
        # whole blocks: no two threads write one line of the cache
        self.piece = -(-<Py_ssize_t>self.rows // (threads * PIECES) // block) * block
        others = submit(self.run, threads - 1)
        try:
            self.run_pieces()
            for other in others:
                if not other.cancel():                  # one that has not begun would find no rows
                    other.result()
        except BaseException:
            kvmmu_store32(&self.stopped, 1)             # they stop soon, whether somebody waits for them or not
            leave_pool()
            for other in others:
                if not other.cancel():
                    other.exception()
            raise
        return 0
