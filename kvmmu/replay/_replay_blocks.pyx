"""The inner loop of replay; see `_replay_blocks.pxd`."""

import numpy as np

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.arch._bits cimport (
    GPA_LIMIT, INVALID_GPA, OP_EVENT, OP_GUEST_WRITE, OP_KIND_MASK, OP_MMIO_SHIFT, PAGE_OFFSET_MASK, PAGE_SIZE, PG_LEVEL_1G,
    PG_LEVEL_2M, PG_LEVEL_4K, PG_LEVEL_NONE, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.memory._maker cimport check_maker
from kvmmu.memory._memory cimport gpa_to_hva, kvmmu_keep_copies
from kvmmu.replay._replay_blocks cimport (
    BLOCK, ERROR_CODES, LEVELS, STATUSES, STRETCH, WRITE_MALFORMED, WRITE_SIZE_MAX, WRITE_TO_HOLE, WRITTEN,
    block_result, guest_write, mismatch, replay_counters, replay_rows, stretch,
)
from kvmmu.tlb._stream cimport STREAM_ROWS, TlbStream, stream_hold, stream_insert
from kvmmu.walk.batch._kernels cimport kvmmu_count_bits, kvmmu_first_bit
from kvmmu.walk.batch._rows cimport batch, context_of, order_shows
from kvmmu.walk.batch._schedule cimport (
    begin_batch, consider_recall, depends_on, forget_word, new_workspace, recall_rows, translate_rows, walk_missing,
)


cdef class BlockWalker:
    """Walks blocks, compares and counts. The loop of rows is made from it.

    One thread uses it at a time.

    Attributes
    ----------
    explain : int
        How many mismatches are still wanted one by one; the loop stops behind a block that has some, until then.
    """

    def __cinit__(self, mark=None, *args):
        check_maker(mark, f"a {type(self).__name__} is made by a replay")
        memset(&self.counters, 0, sizeof(self.counters))
        memset(&self.columns, 0, sizeof(self.columns))
        self.columns.gpa = self.result.gpa
        self.columns.level = self.result.level
        memset(&self.rows_under_way, 0, sizeof(self.rows_under_way))
        self.begun = False
        self.work = new_workspace()
        self.rows_under_way.out = &self.columns
        self.rows_under_way.access_stride = 1
        self.rows_under_way.set_ad = True
        self.bad_count = self.explain = 0

    @property
    def page_sizes(self):
        """Verified and unchecked accesses by level of their leaf: a list of four, from paging off to 1G."""
        return [int(self.counters.levels[level]) for level in range(PG_LEVEL_NONE, PG_LEVEL_1G + 1)]

    @property
    def verified(self):
        """Accesses whose walk ended at the recorded address."""
        return int(self.counters.verified)

    @property
    def unchecked(self):
        """Accesses without a recorded address."""
        return int(self.counters.unchecked)

    @property
    def mismatches(self):
        """Accesses whose walk did not end at the recorded address."""
        return int(self.counters.mismatches)

    @property
    def writes(self):
        """Table writes applied so far."""
        return int(self.counters.writes)

    @property
    def kinds(self):
        """Loads, stores and fetches of a trace, a list of three."""
        return [int(self.counters.kinds[kind]) for kind in range(3)]

    @property
    def mmio(self):
        """Accesses of a trace that are marked as MMIO."""
        return int(self.counters.mmio)

    @property
    def statuses(self):
        """Unchecked accesses by Status, a list."""
        return [int(self.counters.statuses[status]) for status in range(STATUSES)]

    @property
    def error_codes(self):
        """Unchecked accesses that end in a page fault, by error code: a dict."""
        return {code: int(self.counters.error_codes[code]) for code in range(ERROR_CODES) if self.counters.error_codes[code]}

    @property
    def crossings(self):
        """Accesses that reach into the next page, if they are walked there."""
        return int(self.counters.crossings)

    @property
    def next_page_sizes(self):
        """Walks that succeed beside those of `page_sizes`, by level of their leaf.

        They are those of next pages, and of the first pages of accesses that fail in the next one.
        """
        return [int(self.counters.next_levels[level]) for level in range(PG_LEVEL_NONE, PG_LEVEL_1G + 1)]

    def counts(self):
        """Return all counters: an ndarray of uint64, in the order of the struct."""
        cdef uint64_t[::1] out
        self.check_idle()
        found = np.empty(sizeof(replay_counters) // sizeof(uint64_t), np.uint64)
        out = found
        memcpy(&out[0], &self.counters, sizeof(replay_counters))
        return found

    def restore_counts(self, const uint64_t[::1] counts not None, Py_ssize_t explain):
        """Go on from counters that `counts()` returned. IN explain: mismatches that are still wanted one by one."""
        self.check_idle()
        if counts.shape[0] != sizeof(replay_counters) // sizeof(uint64_t) or not 0 <= explain <= self.explain:
            raise ValueError(f"{counts.shape[0]} counters, {explain} mismatches to be explained: they are of no replay like this")
        memcpy(&self.counters, &counts[0], sizeof(replay_counters))
        self.explain = explain

    def take_mismatches(self):
        """Return rows of the last block whose walk did not end as recorded, as far as they are to be explained.

        Returns
        -------
        list of tuple of int
            Number of the access, linear address, recorded address, access byte, and number of the register set.
        """
        cdef Py_ssize_t i
        self.check_idle()
        rows = [(int(self.bad[i].position), int(self.bad[i].gva), int(self.bad[i].truth), int(self.bad[i].access),
                 int(self.bad[i].ctx)) for i in range(self.bad_count)]
        self.bad_count = 0
        self.explain -= len(rows)
        return rows

    def feed(self, TlbStream stream not None):
        """Let all rows that are walked from now on go through TLB hierarchies, each by the page that it is walked to."""
        cdef walk_result r
        self.check_idle()
        if BLOCK > STREAM_ROWS:
            raise ValueError(f"blocks of {int(BLOCK)} rows; a stream takes {int(STREAM_ROWS)}")
        self.fed, self.stream = stream, &stream.s
        self.columns.more[0].data = <uint8_t *>stream.s.pte
        self.columns.more[0].place = <size_t>(<char *>&r.pte - <char *>&r)
        self.columns.more[0].size = sizeof(r.pte)
        self.columns.more_count = 1
        self.begun = False

    cdef int check_idle(self) except -1:
        if self.running:
            raise RuntimeError("another thread walks rows with this loop")
        return 0

    cdef void walk_block(self, const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         const uint64_t *truth, uint64_t first, size_t n, uint64_t count, bint all_known) noexcept nogil:
        self.take_rows(walks, ctx, gva, access, count, all_known)
        translate_rows(&self.rows_under_way, 0, n)
        self.count_rows(truth, first, n, all_known)

    cdef void take_rows(self, const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                        uint64_t count, bint all_known) noexcept nogil:
        """Make these the rows under way; begin the batch if it has not begun."""
        self.columns.status = NULL if all_known else self.result.status
        self.columns.error_code = NULL if all_known else self.result.error_code
        self.rows_under_way.walks, self.rows_under_way.ctx = walks, ctx
        self.rows_under_way.gva, self.rows_under_way.access = gva, access
        self.begin(count)

    cdef void begin(self, uint64_t count) noexcept nogil:
        """Begin the batch if it has not begun."""
        if not self.begun:
            begin_batch(&self.rows_under_way, self.work, count, BLOCK, True)
            self.begun = True

    cdef void count_rows(self, const uint64_t *truth, uint64_t first, size_t n, bint all_known) noexcept nogil:
        """Count the results of the rows under way."""
        cdef block_result *r = &self.result
        cdef replay_counters *c = &self.counters
        cdef uint64_t wrong = 0, ends = 0
        cdef uint32_t level_4k = 0, level_2m = 0, level_1g = 0, level_none = 0
        cdef size_t i
        for i in range(n):                                  # a walk that fails ends at INVALID_GPA
            wrong |= r.gpa[i] ^ truth[i]
            ends |= r.gpa[i]
        for i in range(n):
            level_4k += r.level[i] == PG_LEVEL_4K
        for i in range(n):
            level_2m += r.level[i] == PG_LEVEL_2M
        if level_4k + level_2m != n:
            for i in range(n):
                level_1g += r.level[i] == PG_LEVEL_1G
                level_none += r.level[i] == PG_LEVEL_NONE
        c.levels[PG_LEVEL_4K] += level_4k
        c.levels[PG_LEVEL_2M] += level_2m
        c.levels[PG_LEVEL_1G] += level_1g
        c.levels[PG_LEVEL_NONE] += level_none
        c.verified += n
        if wrong or not all_known or ends >= GPA_LIMIT:
            self.judge_rows(truth, first, n, all_known)

    cdef void judge_rows(self, const uint64_t *truth, uint64_t first, size_t n, bint all_known) noexcept nogil:
        cdef block_result *r = &self.result
        cdef replay_counters *c = &self.counters
        cdef const batch *b = &self.rows_under_way
        cdef mismatch *bad
        cdef size_t i
        for i in range(n):
            if r.gpa[i] == truth[i] != INVALID_GPA:
                continue
            c.verified -= 1
            if truth[i] != INVALID_GPA:
                c.mismatches += 1
                if self.bad_count < self.explain:
                    bad = &self.bad[self.bad_count]
                    bad.position, bad.gva, bad.truth, bad.access = first + i, b.gva[i], truth[i], b.access[i]
                    bad.ctx = 0 if b.ctx is NULL else context_of(b, i)
                    self.bad_count = self.bad_count + 1
                if r.level[i] < LEVELS:
                    c.levels[r.level[i]] -= 1
                continue
            if all_known:                           # what became of it is not known
                self.broken = True
                continue
            c.unchecked += 1
            c.statuses[r.status[i]] += 1
            if r.status[i] == STATUS_PAGE_FAULT:
                c.error_codes[r.error_code[i] & (ERROR_CODES - 1)] += 1
            if r.status[i] != STATUS_OK and r.level[i] < LEVELS:
                c.levels[r.level[i]] -= 1

    cdef void count_kinds(self, const uint8_t *op, size_t n) noexcept nogil:
        cdef replay_counters *c = &self.counters
        cdef uint32_t stores = 0, fetches = 0, mmio = 0
        cdef size_t k
        for k in range(n):
            stores += op[k] & 1
        for k in range(n):
            fetches += (op[k] & OP_KIND_MASK) >> 1
        for k in range(n):
            mmio += (op[k] >> OP_MMIO_SHIFT) & 1
        c.kinds[0] += n - stores - fetches
        c.kinds[1] += stores
        c.kinds[2] += fetches
        c.mmio += mmio

    cdef void walk_next_pages(self, const uint64_t *gva, const uint8_t *access, const uint8_t *size, const int *shifts,
                              size_t n) noexcept nogil:
        cdef block_result *r = &self.result
        cdef replay_counters *c = &self.counters
        cdef uint64_t offset_mask
        cdef size_t i, rows = 0
        for i in range(n):
            # quick: most rows do not even cross a page of 4K
            if (gva[i] & PAGE_OFFSET_MASK) + size[i] <= PAGE_SIZE or r.status[i] != STATUS_OK:
                continue
            offset_mask = (<uint64_t>1 << shifts[r.level[i]]) - 1
            if (gva[i] & offset_mask) + size[i] > offset_mask + 1:
                self.next_gva[rows] = (gva[i] | offset_mask) + 1
                self.next_access[rows] = access[i]
                self.row_level[rows] = r.level[i]
                self.next_row[rows] = <uint32_t>i
                rows += 1
        if not rows:
            return
        self.rows_under_way.gva, self.rows_under_way.access = self.next_gva, self.next_access
        if self.stream is not NULL:
            stream_hold(self.stream)
        translate_rows(&self.rows_under_way, 0, rows)
        if self.stream is not NULL:
            stream_insert(self.stream, self.next_row, self.next_gva, self.next_access, r.gpa, r.level, r.status, rows)
        c.crossings += rows
        for i in range(rows):
            if r.status[i] == STATUS_OK:
                c.next_levels[r.level[i]] += 1
                continue
            c.levels[self.row_level[i]] -= 1            # the access fails, its first walk does not
            c.next_levels[self.row_level[i]] += 1
            c.statuses[STATUS_OK] -= 1
            c.statuses[r.status[i]] += 1
            if r.status[i] == STATUS_PAGE_FAULT:
                c.error_codes[r.error_code[i] & (ERROR_CODES - 1)] += 1

    # ---- accesses and writes -----------------------------------------------------------------------------------------------

    cdef size_t walk_stretch(self, const kvm_pagewalk *walks, const uint32_t *ctx, const replay_rows *rows, size_t start,
                             size_t limit, uint64_t first, uint64_t count) noexcept nogil:
        cdef stretch *s = &self.between
        cdef batch *b = &self.rows_under_way
        cdef size_t n
        cdef uint64_t misses
        if not self.begun or not b.recalls or order_shows(walks if ctx is NULL else &walks[ctx[0]]):
            return 0
        self.gather_stretch(walks, rows, start, limit)
        if not s.writes or not s.accesses:              # none, if somebody writes to the columns
            return 0
        self.take_rows(walks, ctx, s.gva, s.access, count, rows.all_known)
        # No write goes to a word that something in the memo depends on: what it has now holds before them and after them.
        misses = recall_rows(b, 0) & ~<uint64_t>0 >> (STRETCH - s.accesses)
        b.missed += kvmmu_count_bits(misses)
        n = self.finish_stretch(misses, count)
        if n:
            self.count_kinds(s.op, n)
            self.count_rows(s.truth, first, n, rows.all_known)
        return n + s.writes

    cdef void gather_stretch(self, const kvm_pagewalk *w, const replay_rows *rows, size_t start, size_t limit) noexcept nogil:
        """Gather accesses and writes, up to a write that cannot be done or to a word that something cached depends on."""
        cdef stretch *s = &self.between
        cdef size_t n = 0, writes = 0, i
        for i in range(start, limit):
            if rows.op[i] < OP_EVENT:
                s.op[n], s.gva[n], s.access[n], s.truth[n] = rows.op[i], rows.addr[i], rows.access[i], rows.gpa[i]
                s.writes_before[n] = <uint8_t>writes
                n += 1
                if n == STRETCH:
                    break
            else:
                if rows.op[i] != OP_GUEST_WRITE or writes == STRETCH or find_write(
                        w, rows.addr[i], rows.value[i], rows.size[i], &s.write[writes]) != WRITTEN:
                    break
                if depends_on(&self.rows_under_way, s.write[writes].hva):
                    break
                writes += 1
        s.accesses, s.writes = n, writes

    cdef size_t finish_stretch(self, uint64_t misses, uint64_t count) noexcept nogil:
        """Walk the accesses whose bit is set, and do the writes, in order. Returns how many accesses are done.

        A mismatch that is to be explained needs the tables as they are before the next write: the stretch ends before it, and it
        is walked again, in a block.
        """
        cdef stretch *s = &self.between
        cdef const block_result *r = &self.result
        cdef uint64_t open = misses
        cdef size_t n = s.accesses, done = 0, i
        if self.explain:
            for i in range(n):
                open |= <uint64_t>(r.gpa[i] != s.truth[i]) << i
        while open:
            i = kvmmu_first_bit(open)
            open &= open - 1
            while done < s.writes_before[i]:
                self.do_write(&s.write[done])
                done += 1
            if misses >> i & 1:
                self.begin(count)
                walk_missing(&self.rows_under_way, 0, <uint64_t>1 << i, 1)
            if self.explain and r.gpa[i] != s.truth[i] and s.truth[i] != INVALID_GPA:
                n, s.writes = i, done
                break
        while done < s.writes:
            self.do_write(&s.write[done])
            done += 1
        consider_recall(&self.rows_under_way)
        return n

    cdef int write_guest(self, const kvm_pagewalk *w, uint64_t gpa, uint64_t value, size_t size) noexcept nogil:
        cdef guest_write write
        cdef int written = find_write(w, gpa, value, size, &write)
        if written == WRITTEN:
            self.do_write(&write)
        return written

    cdef void do_write(self, const guest_write *write) noexcept nogil:
        memcpy(write.hva, &write.value, write.size)
        self.counters.writes = self.counters.writes + 1
        if self.begun:
            self.begun = forget_word(&self.rows_under_way, write.hva)


cdef inline int find_write(const kvm_pagewalk *w, uint64_t gpa, uint64_t value, size_t size, guest_write *out) noexcept nogil:
    """Find where a write goes: WRITTEN, if it can be done."""
    cdef bint readonly = False
    out.gpa, out.value, out.size = gpa, value, size
    kvmmu_keep_copies()                         # what is checked is what is done, whoever writes to the columns
    if out.size - 1 >= WRITE_SIZE_MAX or (out.size | out.gpa) & (out.size - 1):
        return WRITE_MALFORMED
    out.hva = gpa_to_hva(w.mem, out.gpa, &readonly)
    return WRITE_TO_HOLE if out.hva is NULL or readonly else WRITTEN
