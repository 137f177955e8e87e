"""The inner loop of replay: blocks of rows in, counters and mismatches out.

Both loops, that of recordings and that of traces, cut their rows into blocks within which neither tables nor registers
change. A block is translated by one call and then compared with the recorded addresses.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmmu._batch cimport Workspace, begin_batch, depends_on, translate_rows
from kvmmu._bits cimport (
    INVALID_GPA, OP_EVENT, OP_GUEST_WRITE, OP_KIND_MASK, OP_MMIO_SHIFT, PG_LEVEL_1G, PG_LEVEL_2M,
    PG_LEVEL_4K, PG_LEVEL_NONE, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu._contexts cimport Contexts
from kvmmu._memory cimport gpa_to_hva
from kvmmu._pagewalk cimport PageWalk
from kvmmu._rows cimport batch, batch_columns
from kvmmu._walk cimport kvm_pagewalk

cdef enum:
    BLOCK = 8192                    # rows whose scratch columns stay in the second-level cache
    LEVELS = 4                      # of leaves: paging off, 4K, 2M or 4M, 1G
    STATUSES = 7
    ERROR_CODES = 128               # P to SS

ctypedef fused page_index:
    uint16_t
    uint32_t

# What a block of rows came to, row by row.
cdef struct block_result:
    uint64_t gpa[BLOCK]
    uint8_t level[BLOCK]
    uint8_t status[BLOCK]
    uint32_t error_code[BLOCK]

cdef struct replay_counters:
    uint64_t levels[LEVELS]         # walks that ended as recorded, by level of their leaf
    uint64_t verified
    uint64_t unchecked              # walked, without a recorded address
    uint64_t mismatches
    uint64_t writes
    uint64_t kinds[3]
    uint64_t mmio
    uint64_t statuses[STATUSES]     # of unchecked rows
    uint64_t error_codes[ERROR_CODES]   # of unchecked rows that end in a #PF


cdef class BlockWalker:
    """Walks blocks, compares and counts. The loops are made from it.

    Attributes
    ----------
    explain : int
        How many mismatches are still wanted one by one; the loop stops behind a block that has some, until then.
    """

    cdef PageWalk walk
    cdef block_result result
    cdef batch_columns columns
    cdef batch rows_under_way       # goes on from block to block until tables or walks change
    cdef bint begun
    cdef Workspace work
    cdef replay_counters counters
    cdef uint32_t bad[BLOCK]
    cdef Py_ssize_t bad_count
    cdef readonly Py_ssize_t explain

    def __cinit__(self, *args):
        memset(&self.counters, 0, sizeof(self.counters))
        memset(&self.columns, 0, sizeof(self.columns))
        self.columns.gpa = self.result.gpa
        self.columns.level = self.result.level
        memset(&self.rows_under_way, 0, sizeof(self.rows_under_way))
        self.begun = False
        self.work = Workspace()
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

    def take_mismatches(self):
        """Rows of the last block whose walk did not end as recorded, as far as they are to be explained: a list."""
        rows = [int(self.bad[i]) for i in range(self.bad_count)]
        self.bad_count = 0
        self.explain -= len(rows)
        return rows

    cdef void walk_block(self, const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         const uint64_t *truth, size_t first, size_t n, uint64_t count, bint all_known) noexcept nogil:
        """Walk n <= BLOCK rows whose columns start at the pointers; first: number of the first of them, for mismatches.

        IN count: of walks; all_known: no truth is INVALID_GPA, which means that the address was not recorded.
        """
        cdef block_result *r = &self.result
        cdef uint64_t wrong = 0
        cdef uint32_t level_4k = 0, level_2m = 0, level_1g = 0, level_none = 0
        cdef size_t i
        self.columns.status = NULL if all_known else r.status
        self.columns.error_code = NULL if all_known else r.error_code
        self.rows_under_way.walks, self.rows_under_way.ctx = walks, ctx
        self.rows_under_way.gva, self.rows_under_way.access = gva, access
        if not self.begun:
            begin_batch(&self.rows_under_way, self.work, count, BLOCK, True)
            self.begun = True
        translate_rows(&self.rows_under_way, 0, n)
        for i in range(n):                                  # a walk that fails ends at INVALID_GPA, which no truth is
            wrong |= r.gpa[i] ^ truth[i]
        for i in range(n):
            level_4k += r.level[i] == PG_LEVEL_4K
        for i in range(n):
            level_2m += r.level[i] == PG_LEVEL_2M
        if level_4k + level_2m != n:
            for i in range(n):
                level_1g += r.level[i] == PG_LEVEL_1G
                level_none += r.level[i] == PG_LEVEL_NONE
        self.counters.levels[PG_LEVEL_4K] += level_4k
        self.counters.levels[PG_LEVEL_2M] += level_2m
        self.counters.levels[PG_LEVEL_1G] += level_1g
        self.counters.levels[PG_LEVEL_NONE] += level_none
        self.counters.verified += n
        if wrong or not all_known:
            self.judge_rows(truth, first, n)

    cdef void judge_rows(self, const uint64_t *truth, size_t first, size_t n) noexcept nogil:
        """Take back from the counters what is no verified walk of a block, and note it."""
        cdef block_result *r = &self.result
        cdef size_t i
        for i in range(n):
            if r.gpa[i] == truth[i] != INVALID_GPA:
                continue
            self.counters.verified -= 1
            if truth[i] != INVALID_GPA:
                self.counters.mismatches += 1
                if self.bad_count < self.explain:
                    self.bad[self.bad_count] = <uint32_t>(first + i)
                    self.bad_count += 1
                if r.level[i] < LEVELS:
                    self.counters.levels[r.level[i]] -= 1
                continue
            self.counters.unchecked += 1
            self.counters.statuses[r.status[i]] += 1
            if r.status[i] == STATUS_PAGE_FAULT:
                self.counters.error_codes[r.error_code[i] & (ERROR_CODES - 1)] += 1
            if r.status[i] != STATUS_OK and r.level[i] < LEVELS:
                self.counters.levels[r.level[i]] -= 1

    cdef bint write_guest(self, const kvm_pagewalk *w, uint64_t gpa, uint64_t value, size_t size) noexcept nogil:
        """Store the low bytes of a value, aligned to its size of at most 8; False where the guest has no memory."""
        cdef bint readonly = False
        cdef uint8_t *hva = gpa_to_hva(w.mem, gpa, &readonly)
        if hva is NULL or readonly:
            return False
        memcpy(hva, &value, size)
        self.counters.writes += 1
        if self.begun and depends_on(&self.rows_under_way, hva):
            self.begun = False
        return True


cdef class Replayer(BlockWalker):
    """Walks a recording in order. Tables live in the walk's memory; writes to them are applied as the trace goes.

    Parameters
    ----------
    walk : PageWalk
    contexts : Contexts
        One per context of the recording.
    recording
        An object with the columns of `traces.Recording`, checked by it.
    access_of : ndarray of uint8, shape (9,)
        Access byte for kind * 3 + priv.
    explain : int
        How many mismatches are wanted one by one.
    """

    cdef Contexts contexts
    cdef object pidx
    cdef const uint64_t[::1] page_gva
    cdef const uint64_t[::1] page_gpa
    cdef const uint32_t[::1] page_ctx
    cdef const uint16_t[::1] off
    cdef const uint8_t[::1] kind
    cdef const uint8_t[::1] priv
    cdef const uint8_t[::1] access_of
    cdef const uint64_t[::1] w_pos
    cdef const uint64_t[::1] w_gpa
    cdef const uint64_t[::1] w_val
    cdef size_t next_write
    # the rows of a block as plain columns
    cdef uint64_t gva[BLOCK]
    cdef uint64_t truth[BLOCK]
    cdef uint32_t ctx[BLOCK]
    cdef uint8_t access[BLOCK]

    def __init__(self, PageWalk walk, Contexts contexts, recording, access_of, Py_ssize_t explain=0):
        self.walk, self.contexts, self.explain = walk, contexts, explain
        self.page_gva, self.page_gpa, self.page_ctx = recording.pages_gva, recording.pages_gpa, recording.pages_ctx
        self.pidx, self.off, self.kind, self.priv = recording.pidx, recording.off, recording.kind, recording.priv
        self.w_pos, self.w_gpa, self.w_val = recording.writes.pos, recording.writes.gpa, recording.writes.val
        self.access_of = access_of

    def settle(self, uint64_t pos):
        """Apply the table writes made by accesses before pos.

        Raises
        ------
        ValueError
            A write lies outside guest memory.
        """
        self.contexts.use_memory(self.walk.mem)
        if not self.apply_writes(pos):
            gpa = int(self.w_gpa[self.next_write])
            raise ValueError(f"table write {self.next_write} goes to gpa {gpa:#x}, which is no table page")

    cdef bint apply_writes(self, uint64_t pos) noexcept nogil:
        while self.next_write < <size_t>self.w_pos.shape[0] and self.w_pos[self.next_write] < pos:
            if not self.write_guest(self.contexts.walks, self.w_gpa[self.next_write], self.w_val[self.next_write], 8):
                return False
            self.next_write += 1
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
            A write lies outside guest memory.
        """
        if not start <= stop <= <size_t>self.off.shape[0]:
            raise ValueError(f"rows {start} to {stop} are not within the {self.off.shape[0]} accesses")
        self.contexts.use_memory(self.walk.mem)
        self.begun = False                      # PDPTEs may have been loaded
        if self.pidx.dtype.itemsize == 2:
            row = self.run_rows[uint16_t](self.pidx, start, stop)
        else:
            row = self.run_rows[uint32_t](self.pidx, start, stop)
        self.settle(row)                        # raises if it was a write that stopped the loop
        return row

    cdef size_t run_rows(self, const page_index[::1] pidx, size_t start, size_t stop):
        cdef size_t i = start, k, n
        cdef uint32_t row, context, other
        cdef size_t writes = self.w_pos.shape[0]
        with nogil:
            while i < stop and not self.bad_count:
                if not self.apply_writes(i):
                    break
                n = min(stop - i, <size_t>BLOCK)
                if self.next_write < writes:        # a store takes effect behind its access
                    n = min(n, <size_t>(self.w_pos[self.next_write] - i + 1))
                context = self.page_ctx[pidx[i]]
                other = 0
                for k in range(n):
                    row = pidx[i + k]
                    self.gva[k] = self.page_gva[row] + self.off[i + k]
                    self.truth[k] = self.page_gpa[row] + self.off[i + k]
                    self.ctx[k] = self.page_ctx[row]
                    other |= self.page_ctx[row] ^ context
                    self.access[k] = self.access_of[self.kind[i + k] * 3 + self.priv[i + k]]
                self.walk_block(self.contexts.walks, self.ctx if other or context else NULL, self.gva, self.access, self.truth,
                                i, n, self.contexts.count, True)
                i += n
        return i


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

    cdef list owners                # Contexts in force, by vCPU: keeps alive what walks points to
    cdef bytearray storage
    cdef kvm_pagewalk *walks        # one per vCPU
    cdef Py_ssize_t vcpus
    cdef const uint8_t[::1] op
    cdef const uint64_t[::1] addr
    cdef const uint8_t[::1] access
    cdef const uint64_t[::1] gpa
    cdef const uint8_t[::1] size    # these three: of no rows where the chunk does not have them
    cdef const uint16_t[::1] vcpu
    cdef const uint64_t[::1] value
    cdef bint all_known
    cdef size_t rows
    cdef uint32_t ctx[BLOCK]

    def __init__(self, PageWalk walk, Py_ssize_t vcpus, Py_ssize_t explain=0):
        if vcpus < 1:
            raise ValueError(f"vcpus: want at least 1, got {vcpus}")
        self.walk, self.vcpus, self.explain = walk, vcpus, explain
        self.owners = [None] * vcpus
        self.storage = bytearray(vcpus * sizeof(kvm_pagewalk))
        self.walks = <kvm_pagewalk *><char *>self.storage
        self.rows = 0

    def use(self, Py_ssize_t vcpu, Contexts contexts):
        """Put the first register set of `contexts` in force on a vCPU."""
        if not 0 <= vcpu < self.vcpus or contexts.count < 1:
            raise ValueError(f"vCPU {vcpu} of {self.vcpus}, with {contexts.count} register sets")
        contexts.use_memory(self.walk.mem)
        self.owners[vcpu] = contexts
        self.walks[vcpu] = contexts.walks[0]
        self.walks[vcpu].second = <uint32_t>vcpu
        self.begun = False

    def load(self, chunk):
        """Take the columns of a checked chunk: `op`, `addr`, `access`, `gpa`, and `size`, `vcpu`, `value` or None.

        Raises
        ------
        ValueError
            Columns of different lengths, a vCPU without registers, or a chunk with events that lacks their columns.
        """
        self.op, self.addr, self.access, self.gpa = chunk.op, chunk.addr, chunk.access, chunk.gpa
        self.rows = self.op.shape[0]
        lengths = {self.addr.shape[0], self.access.shape[0], self.gpa.shape[0], self.op.shape[0]}
        self.vcpu, self.size, self.value = chunk.vcpu, chunk.size, chunk.value
        for column in (chunk.vcpu, chunk.size, chunk.value):
            if column is not None:
                lengths.add(column.shape[0])
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} rows, want one length")
        if chunk.has_events and (chunk.size is None or chunk.value is None):
            raise ValueError("a chunk with events has no size or no value column")
        if None in self.owners or chunk.vcpus > self.vcpus:
            raise ValueError(f"rows of {chunk.vcpus} vCPUs, registers of {self.vcpus - self.owners.count(None)}")
        self.all_known = chunk.all_known

    def run(self, size_t start):
        """Walk the chunk's rows from start up to an event that is the caller's, the end, or a block with mismatches.

        Returns
        -------
        int
            The first row that was not consumed. If it is a GUEST_WRITE, it goes to where the guest has no memory.
        """
        cdef size_t i = start, stop
        cdef bint one_vcpu = self.vcpu is None or self.vcpus == 1
        if start > self.rows:
            raise ValueError(f"row {start} is not within the {self.rows} rows")
        with nogil:
            while i < self.rows and not self.bad_count:
                if self.op[i] < OP_EVENT:
                    stop = self.end_of_accesses(i)
                    self.walk_rows(i, stop, one_vcpu)
                    i = stop
                elif self.op[i] == OP_GUEST_WRITE:
                    if not self.write_guest(self.walks, self.addr[i], self.value[i], self.size[i]):
                        break
                    i += 1
                else:
                    break
        return i

    cdef size_t end_of_accesses(self, size_t start) noexcept nogil:
        """First event from start on, at most a block away; counts the accesses up to there by kind."""
        cdef size_t limit = min(self.rows, start + BLOCK), i = start, k
        cdef const uint8_t *op = &self.op[0]
        cdef uint32_t stores = 0, fetches = 0, mmio = 0
        cdef uint8_t seen
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
        self.counters.kinds[0] += i - start - stores - fetches
        self.counters.kinds[1] += stores
        self.counters.kinds[2] += fetches
        self.counters.mmio += mmio
        return i

    cdef void walk_rows(self, size_t start, size_t stop, bint one_vcpu) noexcept nogil:
        cdef size_t k, n = stop - start
        cdef uint32_t first, other = 0
        cdef const uint32_t *ctx = NULL
        first = 0 if one_vcpu else self.vcpu[start]
        if not one_vcpu:
            for k in range(n):
                self.ctx[k] = self.vcpu[start + k]
                other |= self.ctx[k] ^ first
            if other or first:
                ctx = self.ctx
        self.walk_block(self.walks, ctx, &self.addr[start], &self.access[start], &self.gpa[start], start, n, self.vcpus,
                        self.all_known)
