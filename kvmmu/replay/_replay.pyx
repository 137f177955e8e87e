"""The loops of replay: the rows of recordings and of traces, cut into blocks; see `_replay_blocks.pxd`."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport SIZE_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport OP_EVENT, OP_GUEST_WRITE, OP_KIND_MASK, OP_MMIO_SHIFT, PAGE_SHIFT
from kvmmu.memory._maker cimport maker
from kvmmu.memory._memory cimport NEVER_SEEN, SlotTable, kvmmu_keep_copies, kvmmu_load32
from kvmmu.replay._replay_blocks cimport BLOCK, LEVELS, WRITE_MALFORMED, WRITTEN, BlockWalker, replay_counters
from kvmmu.tlb._stream cimport stream_run
from kvmmu.walk._register_sets cimport RegisterSetWalks, RegisterSets
from kvmmu.walk.batch._arrays cimport aligned, column, column_of, exact_column
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.walk.results import check_access, check_array

_COLUMN_TYPES = {"op": np.dtype(np.uint8), "addr": np.dtype(np.uint64), "access": np.dtype(np.uint8), "gpa": np.dtype(np.uint64),
                 "size": np.dtype(np.uint8), "vcpu": np.dtype(np.uint16), "value": np.dtype(np.uint64)}

cdef enum:
    SHORT_PIDX = 1 << 16            # values of a page number of two bytes, or of a vCPU
    KIND_PRIVS = 3 * 255 + 255 + 1  # of any two bytes

ctypedef fused page_index:
    uint16_t
    uint32_t


cdef column checked_column(str name, array, Py_ssize_t itemsize, Py_ssize_t rows, list kept) except *:
    """A column that a caller may have made. IN rows: how many there must be, -1: any; kept: takes the array to be kept."""
    plain = aligned(exact_column(array), itemsize)
    kept.append(plain)
    return column_of("", name, plain, itemsize, rows, False)


cdef class Replayer(BlockWalker):
    """Walks a recording in order. Tables live in the walk's memory; writes to them are applied as the trace goes.

    Parameters
    ----------
    walk : PageWalk
    contexts : RegisterSets
        One per context of the recording.
    recording
        An object with the columns of `traces.Recording`, checked by it.
    access_of : ndarray of uint8, shape (9,)
        Access byte for kind * 3 + priv.
    explain : int
        How many mismatches are wanted one by one.
    """

    cdef RegisterSets contexts
    cdef list kept                  # the arrays behind the pointers
    cdef const void *pidx           # of two bytes, or of four
    cdef bint short_pidx
    cdef Py_ssize_t rows
    cdef const uint16_t *off
    cdef const uint8_t *kind
    cdef const uint8_t *priv
    # by page number; so many that there is one for each number of two bytes
    cdef uint64_t *page_gva
    cdef uint64_t *page_gpa
    cdef uint32_t *page_ctx
    cdef uint32_t last_page
    cdef uint8_t access_of[KIND_PRIVS]
    cdef const uint64_t *w_pos
    cdef const uint64_t *w_gpa
    cdef const uint64_t *w_val
    cdef size_t writes
    cdef size_t next_write
    # the rows of a block as plain columns
    cdef uint64_t gva[BLOCK]
    cdef uint64_t truth[BLOCK]
    cdef uint32_t ctx[BLOCK]
    cdef uint8_t access[BLOCK]

    def __cinit__(self, mark=None, walk=None, contexts=None, recording=None, access_of=None, explain=0, *args):
        self.walk, self.contexts, self.explain, self.kept = walk, contexts, explain, []
        self.take_accesses(recording, access_of)
        self.take_pages(recording)
        self.take_writes(recording.writes)

    cdef int take_accesses(self, recording, access_of) except -1:
        cdef Py_ssize_t i
        cdef column pidx
        self.short_pidx = isinstance(recording.pidx, np.ndarray) and recording.pidx.dtype.itemsize == sizeof(uint16_t)
        pidx = checked_column("pidx", recording.pidx, sizeof(uint16_t) if self.short_pidx else sizeof(uint32_t), -1, self.kept)
        self.rows, self.pidx = pidx.rows, pidx.data
        self.off = <const uint16_t *>checked_column("off", recording.off, sizeof(uint16_t), self.rows, self.kept).data
        self.kind = <const uint8_t *>checked_column("kind", recording.kind, sizeof(uint8_t), self.rows, self.kept).data
        self.priv = <const uint8_t *>checked_column("priv", recording.priv, sizeof(uint8_t), self.rows, self.kept).data
        for name in ("kind", "priv"):
            check_below(name, getattr(recording, name), 3)
        access_of = check_access(np.asarray(access_of), 9)
        for i in range(9):
            self.access_of[i] = access_of[i]
        return 0

    cdef int take_pages(self, recording) except -1:
        """Copies of what is known by page number."""
        cdef Py_ssize_t pages = len(recording.pages_gva), room
        check_below("pidx", recording.pidx, pages)
        check_below("pages_ctx", recording.pages_ctx, self.contexts.count)
        room = max(pages, <Py_ssize_t>SHORT_PIDX)
        self.last_page = <uint32_t>(room - 1)
        self.page_gva = <uint64_t *>calloc(room, sizeof(uint64_t))
        self.page_gpa = <uint64_t *>calloc(room, sizeof(uint64_t))
        self.page_ctx = <uint32_t *>calloc(room, sizeof(uint32_t))
        if self.page_gva is NULL or self.page_gpa is NULL or self.page_ctx is NULL:
            raise MemoryError
        memcpy(self.page_gva, checked_column("pages_gva", recording.pages_gva, sizeof(uint64_t), pages, self.kept).data,
               pages * sizeof(uint64_t))
        memcpy(self.page_gpa, checked_column("pages_gpa", recording.pages_gpa, sizeof(uint64_t), pages, self.kept).data,
               pages * sizeof(uint64_t))
        memcpy(self.page_ctx, checked_column("pages_ctx", recording.pages_ctx, sizeof(uint32_t), pages, self.kept).data,
               pages * sizeof(uint32_t))
        return 0

    cdef int take_writes(self, writes) except -1:
        cdef column pos = checked_column("writes.pos", writes.pos, sizeof(uint64_t), -1, self.kept)
        self.writes, self.w_pos = pos.rows, <const uint64_t *>pos.data
        self.w_gpa = <const uint64_t *>checked_column("writes.gpa", writes.gpa, sizeof(uint64_t), pos.rows, self.kept).data
        self.w_val = <const uint64_t *>checked_column("writes.val", writes.val, sizeof(uint64_t), pos.rows, self.kept).data
        return 0

    def __dealloc__(self):
        free(self.page_gva)
        free(self.page_gpa)
        free(self.page_ctx)

    def settle(self, uint64_t pos):
        """Apply the table writes made by accesses before pos.

        Raises
        ------
        ValueError
            A write lies outside guest memory.
        """
        cdef SlotTable table = self.walk.mem.current()
        cdef RegisterSetWalks walks = self.contexts.walks_over(table)
        self.check_idle()
        if not self.apply_writes(walks.walks, pos):
            gpa = int(self.w_gpa[self.next_write])
            raise ValueError(f"table write {self.next_write} goes to gpa {gpa:#x}, which is no table page")

    cdef bint apply_writes(self, const kvm_pagewalk *w, uint64_t pos) noexcept nogil:
        while self.next_write < self.writes and self.w_pos[self.next_write] < pos:
            if self.write_guest(w, self.w_gpa[self.next_write], self.w_val[self.next_write], 8) != WRITTEN:
                return False
            self.next_write = self.next_write + 1
        return True

    def run(self, size_t start, size_t stop):
        """Walk the accesses start to stop, or up to a block with mismatches that `take_mismatches()` tells.

        Returns
        -------
        int
            The first row that was not walked.

        Raises
        ------
        ValueError
            A write lies outside guest memory, or a page has no address.
        """
        cdef SlotTable table
        cdef RegisterSetWalks walks
        cdef size_t row
        if not start <= stop <= <size_t>self.rows:
            raise ValueError(f"rows {start} to {stop} are not within the {self.rows} accesses")
        self.check_idle()
        table = self.walk.mem.current()
        walks = self.contexts.walks_over(table)
        self.begun = False                      # PDPTEs may have been loaded
        self.running = True
        with nogil:
            if self.short_pidx:
                row = self.run_rows(<const uint16_t *>self.pidx, walks.walks, walks.count, start, stop)
            else:
                row = self.run_rows(<const uint32_t *>self.pidx, walks.walks, walks.count, start, stop)
        self.running = False
        if self.broken:
            raise ValueError("pages_gpa: a page has no address below 2**52")
        self.settle(row)                        # raises if it was a write that stopped the loop
        return row

    cdef size_t run_rows(self, const page_index *pidx, const kvm_pagewalk *walks, uint64_t count, size_t start,
                         size_t stop) noexcept nogil:
        cdef size_t i = start, k, n
        cdef uint32_t row, context, other
        while i < stop and not self.bad_count and not self.broken:
            if not self.apply_writes(walks, i):
                break
            n = min(stop - i, <size_t>BLOCK)
            if self.next_write < self.writes:       # a store takes effect behind its access
                n = min(n, <size_t>(self.w_pos[self.next_write] - i + 1))
            context = self.page_ctx[self.page_of(pidx, i)]
            other = 0
            for k in range(n):
                row = self.page_of(pidx, i + k)
                self.gva[k] = self.page_gva[row] + self.off[i + k]
                self.truth[k] = self.page_gpa[row] + self.off[i + k]
                self.ctx[k] = self.page_ctx[row]
                other |= self.page_ctx[row] ^ context
                self.access[k] = self.access_of[self.kind[i + k] * 3 + self.priv[i + k]]
            self.walk_block(walks, self.ctx if other or context else NULL, self.gva, self.access, self.truth, i, n, count, True)
            i += n
        return i

    cdef inline uint32_t page_of(self, const page_index *pidx, size_t row) noexcept nogil:
        """The page number of a row, within the copies: somebody may have changed it since it was checked."""
        if page_index is uint16_t:
            return pidx[row]
        else:
            return min(kvmmu_load32(&pidx[row]), self.last_page)


cdef class RowLoop(BlockWalker):
    """Walks the rows of a trace, chunk by chunk, and applies its table writes; other events are its caller's.

    Parameters
    ----------
    walk : PageWalk
    vcpus : int
        Processors of the trace, each with a register set of its own.
    explain : int
        How many mismatches are wanted one by one.
    """

    cdef list owners                # RegisterSets in force, by vCPU
    cdef list bound                 # their walks over the table with the number `table`: own what walks points to
    cdef kvm_pagewalk *walks        # one per vCPU
    cdef uint64_t table
    cdef Py_ssize_t vcpus
    cdef const uint8_t[::1] op
    cdef const uint64_t[::1] addr
    cdef const uint8_t[::1] access
    cdef const uint64_t[::1] gpa
    cdef const uint8_t[::1] size    # these three: of no rows where the chunk does not have them
    cdef const uint16_t[::1] vcpu
    cdef const uint64_t[::1] value
    cdef bint writes                # there are the columns of events
    cdef bint all_known
    cdef size_t rows
    cdef size_t stop                # of run(), at most rows
    cdef bint crosses               # rows that reach into the next page are walked there, too
    cdef int shifts[LEVELS]         # of the pages of leaves
    cdef uint32_t ctx[BLOCK]

    def __cinit__(self, mark=None, walk=None, vcpu_count=0, explain=0, *args):
        cdef Py_ssize_t vcpus = vcpu_count
        if not 1 <= vcpus <= SHORT_PIDX:
            raise ValueError(f"vcpus: want 1 to {int(SHORT_PIDX)}, got {vcpus}")
        self.walk, self.vcpus, self.explain = walk, vcpus, explain
        self.owners, self.bound = [None] * vcpus, [None] * vcpus
        self.walks = <kvm_pagewalk *>calloc(vcpus, sizeof(kvm_pagewalk))
        if self.walks is NULL:
            raise MemoryError
        self.table = NEVER_SEEN
        self.rows = self.stop = 0
        self.crosses = False

    def __dealloc__(self):
        free(self.walks)

    def use(self, Py_ssize_t vcpu, RegisterSets contexts not None):
        """Put the first register set of `contexts` in force on a vCPU."""
        if not 0 <= vcpu < self.vcpus or contexts.count < 1:
            raise ValueError(f"vCPU {vcpu} of {self.vcpus}, with {contexts.count} register sets")
        self.check_idle()
        self.owners[vcpu] = contexts
        self.begun = False
        self.bind(vcpu, self.walk.mem.current())

    cdef int bind(self, Py_ssize_t vcpu, SlotTable table) except -1:
        """Walk a vCPU's register set over a table; all of them if it is another table than before."""
        cdef RegisterSets contexts
        cdef RegisterSetWalks walks
        cdef Py_ssize_t i, first = vcpu, stop = vcpu + 1
        if table.number != self.table:
            first, stop = 0, self.vcpus
            self.table = NEVER_SEEN                 # until all are
        for i in range(first, stop):
            contexts = self.owners[i]
            if contexts is not None:
                walks = contexts.walks_over(table)
                self.walks[i] = walks.walks[0]
                self.walks[i].second = <uint32_t>i
                self.bound[i] = walks
        self.table = table.number
        return 0

    def forget(self):
        """Remember no translation of the rows so far: somebody may have written the tables since."""
        self.check_idle()
        self.begun = False

    def walk_both_pages(self, shifts):
        """Walk rows that reach into the next page there, too, from now on. Chunks have to have sizes, and no recorded addresses.

        Parameters
        ----------
        shifts : sequence of int
            Of the size of a page, by the level of its leaf: paging off, 4K, 2M or 4M, 1G.
        """
        cdef int level
        self.check_idle()
        if self.vcpus != 1 or len(shifts) != LEVELS:
            raise ValueError(f"{len(shifts)} shifts and {self.vcpus} vCPUs; want {int(LEVELS)} and 1")
        for level in range(LEVELS):
            if not PAGE_SHIFT <= shifts[level] < 64:
                raise ValueError(f"shifts: {shifts[level]} is no page; want {PAGE_SHIFT} to 63")
            self.shifts[level] = shifts[level]
        self.crosses = True

    def load(self, chunk):
        """Take the columns of a chunk: `op`, `addr`, `access`, `gpa`, and `size`, `vcpu`, `value` or None.

        Raises
        ------
        ValueError
            Columns of other types or of different lengths, a vCPU without registers, or a chunk with events that lacks their
            columns.
        """
        cdef uint16_t highest = 0
        cdef Py_ssize_t i
        self.check_idle()
        self.rows = 0
        columns = {}
        for name, dtype in _COLUMN_TYPES.items():
            array = getattr(chunk, name)
            if array is not None or name not in ("vcpu", "size", "value"):
                check_array(name, array, dtype)
            columns[name] = aligned(exact_column(array), dtype.itemsize)
        self.op, self.addr, self.access, self.gpa = (columns[name] for name in ("op", "addr", "access", "gpa"))
        lengths = {self.addr.shape[0], self.access.shape[0], self.gpa.shape[0], self.op.shape[0]}
        self.vcpu, self.size, self.value = (columns[name] for name in ("vcpu", "size", "value"))
        if self.vcpu is not None:
            lengths.add(self.vcpu.shape[0])
        if self.size is not None:
            lengths.add(self.size.shape[0])
        if self.value is not None:
            lengths.add(self.value.shape[0])
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} rows, want one length")
        self.writes = self.size is not None and self.value is not None
        if chunk.has_events and not self.writes:
            raise ValueError("a chunk with events has no size or no value column")
        if self.vcpu is not None and self.vcpus > 1:
            for i in range(self.vcpu.shape[0]):
                highest = max(highest, self.vcpu[i])
        if None in self.owners or highest >= self.vcpus or chunk.vcpus > self.vcpus:
            vcpus = max(highest + 1, chunk.vcpus)
            raise ValueError(f"rows of {vcpus} vCPUs, registers of {self.vcpus - self.owners.count(None)}")
        if self.crosses and (self.size is None or chunk.all_known and len(chunk.op)):
            raise ValueError("a chunk without sizes, or with recorded addresses, where rows are walked in both pages")
        self.all_known = chunk.all_known
        if self.fed is not None:
            self.fed.use_ips(chunk.ip, self.op.shape[0])
        self.rows = self.op.shape[0]

    def run(self, size_t start, size_t stop=SIZE_MAX):
        """Walk the chunk's rows from start up to stop or an event that is the caller's, the end, or a block with mismatches.

        Returns
        -------
        int
            The first row that was not consumed. If it is a GUEST_WRITE, it goes to where the guest has no memory.

        Raises
        ------
        ValueError
            The chunk is not what it says it is.
        """
        cdef size_t i = start
        cdef int written = WRITTEN
        cdef SlotTable table
        if start > self.rows:
            raise ValueError(f"row {start} is not within the {self.rows} rows")
        self.check_idle()
        self.stop = min(stop, self.rows)
        table = self.walk.mem.current()
        if table.number != self.table:
            self.begun = False
            self.bind(0, table)
        self.running = True
        with nogil:
            written = self.run_rows(&i)
        self.running = False
        if self.broken:
            raise ValueError("a chunk says that it has the address of each access, and has not")
        if written == WRITE_MALFORMED:
            size = self.size[i] if self.writes else 0
            raise ValueError(f"row {i}: a write of {size} bytes to {self.addr[i]:#x}; want 1, 2, 4 or 8 bytes, aligned")
        return i

    cdef int run_rows(self, size_t *row) noexcept nogil:
        """IN/OUT row: where to begin; the first row that was not consumed. Returns what became of the last write."""
        cdef size_t i = row[0], stop
        cdef bint one_vcpu = self.vcpu is None or self.vcpus == 1
        cdef int written = WRITTEN
        while i < self.stop and not self.bad_count and not self.broken:
            if self.op[i] < OP_EVENT:
                stop = self.end_of_accesses(i)
                self.walk_rows(i, stop, one_vcpu)
                i = stop
            elif self.op[i] == OP_GUEST_WRITE:
                written = WRITE_MALFORMED
                if self.writes:
                    written = self.write_guest(self.walks, self.addr[i], self.value[i], self.size[i])
                if written != WRITTEN:
                    break
                i += 1
            else:
                break
        row[0] = i
        return written

    cdef size_t end_of_accesses(self, size_t start) noexcept nogil:
        """First event from start on, at most a block away; counts the accesses up to there by kind."""
        cdef size_t limit = min(self.stop, start + BLOCK), i = start, k
        cdef const uint8_t *op = &self.op[0]
        cdef uint32_t stores = 0, fetches = 0, mmio = 0
        cdef uint8_t seen
        cdef replay_counters *c = &self.counters
        while i + 64 <= limit:
            seen = 0
            for k in range(64):
                seen |= op[i + k]
            if seen >= OP_EVENT:
                break
            i += 64
        while i < limit and op[i] < OP_EVENT:
            i += 1
        for k in range(start, i):
            stores += op[k] & 1
        for k in range(start, i):
            fetches += (op[k] & OP_KIND_MASK) >> 1
        for k in range(start, i):
            mmio += (op[k] >> OP_MMIO_SHIFT) & 1
        c.kinds[0] += i - start - stores - fetches
        c.kinds[1] += stores
        c.kinds[2] += fetches
        c.mmio += mmio
        return i

    cdef void walk_rows(self, size_t start, size_t stop, bint one_vcpu) noexcept nogil:
        cdef size_t k, n = stop - start
        cdef uint32_t first = 0, other = 0, last = <uint32_t>(self.vcpus - 1)
        cdef const uint32_t *ctx = NULL
        if not one_vcpu:
            first = self.vcpu[start]
            for k in range(n):                      # in range, whoever has written there since
                self.ctx[k] = self.vcpu[start + k]
            kvmmu_keep_copies()
            for k in range(n):
                self.ctx[k] = min(self.ctx[k], last)
                other |= self.ctx[k] ^ first
            if other or first:
                ctx = self.ctx
        self.walk_block(self.walks, ctx, &self.addr[start], &self.access[start], &self.gpa[start], start, n, self.vcpus,
                        self.all_known)
        if self.crosses:
            self.walk_next_pages(&self.addr[start], &self.access[start], &self.size[start], self.shifts, n)
        if self.stream is not NULL:
            stream_run(self.stream, self.walks, ctx)


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef int check_below(str name, array, limit) except -1:
    """IN array: a checked column."""
    highest = int(np.max(array)) if len(array) else -1
    if highest >= limit:
        raise ValueError(f"{name}: {highest} is beyond the last, {limit - 1}")
    return 0


def new_replayer(PageWalk walk not None, RegisterSets contexts not None, recording, access_of, Py_ssize_t explain=0):
    """A Replayer; its columns are checked here, whoever made the recording."""
    return Replayer.__new__(Replayer, maker(), walk, contexts, recording, access_of, explain)


def new_row_loop(PageWalk walk not None, Py_ssize_t vcpus, Py_ssize_t explain=0):
    """A RowLoop without registers."""
    return RowLoop.__new__(RowLoop, maker(), walk, vcpus, explain)
