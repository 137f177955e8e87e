"""The loop of replay: rows in, each access walked and each event carried out, in order.

Rows come as the columns of a chunk, or from a recording or places that are decoded a block at a time. The loop stops for its
caller at events that it has not carried out before, at mismatches that are to be explained, and at the end.
"""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport SIZE_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    OP_EVENT, OP_GUEST_WRITE, OP_HOST_INVALIDATE, OP_INVLPG, OP_INVPCID, OP_MEMORY, OP_NPT_FAULT, OP_PAGE_FAULT, OP_RESTART,
    OP_SET_CPL_AC, PAGE_SHIFT,
)
from kvmmu.memory._maker cimport maker
from kvmmu.memory._memory cimport SlotTable, kvmmu_keep_copies
from kvmmu.replay._recorded_faults cimport (
    count_fault, fault_counts, faults_found, reproduces_npt_fault, reproduces_page_fault, restore_faults,
)
from kvmmu.replay._replay_blocks cimport (
    BLOCK, LEVELS, MOST_EXPLAINED, NEAR_WRITE, STRETCH, WRITE_MALFORMED, WRITTEN, BlockWalker, decoded_rows, replay_rows,
)
from kvmmu.replay._replay_registers cimport NO_SET, ReplayRegisters, new_registers
from kvmmu.tlb._stream cimport stream_begin, stream_run
from kvmmu.traces._places cimport PlacedRows
from kvmmu.traces._recorded_rows cimport RecordedRows, row_columns
from kvmmu.walk._register_sets cimport RegisterSets
from kvmmu.walk.batch._arrays cimport aligned, column_of, exact_column
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.traces.stream import PLACED as _PLACED, PlacedChunk
from kvmmu.walk.results import check_array

_COLUMN_TYPES = {"op": np.dtype(np.uint8), "addr": np.dtype(np.uint64), "access": np.dtype(np.uint8), "gpa": np.dtype(np.uint64),
                 "size": np.dtype(np.uint8), "vcpu": np.dtype(np.uint16), "value": np.dtype(np.uint64)}
_MAY_BE_NONE = ("size", "vcpu", "value")

# The reasons for which run() returns.
cdef enum:
    STOP_END
    STOP_ROW
    STOP_EVENT
    STOP_MISMATCHES
    STOP_MALFORMED                  # an error of the caller's: an event without its columns, a write of no size

END, AT_ROW, AT_EVENT, AT_MISMATCHES = int(STOP_END), int(STOP_ROW), int(STOP_EVENT), int(STOP_MISMATCHES)


cdef class RowLoop(BlockWalker):
    """Walks the rows of a trace and carries out its events.

    Attributes
    ----------
    registers : ReplayRegisters
    checks_faults : bool
        Recorded faults are held against the walk, and those that it does not reproduce are events for the caller. Otherwise
        they are only counted.
    """

    cdef readonly ReplayRegisters registers
    cdef public bint checks_faults
    cdef uint64_t version           # of registers, when the batch under way began
    cdef list kept                  # the arrays behind the rows at hand
    cdef replay_rows rows
    cdef size_t base                # rows of this load() before those at hand
    cdef size_t at                  # the next of the rows at hand
    cdef RecordedRows source        # more rows, decoded into `decoded`; or None
    cdef PlacedRows placed          # likewise
    cdef replay_rows of_placed      # the other columns of all its rows
    cdef decoded_rows *decoded
    cdef bint crosses               # rows that reach into the next page are walked there, too
    cdef int shifts[LEVELS]         # of the pages of leaves
    cdef fault_counts faults
    cdef uint32_t ctx[BLOCK]
    cdef uint32_t vcpu[BLOCK]       # of rows of several vCPUs
    cdef uint32_t filled_with       # the first `filled` of them are this set
    cdef size_t filled

    def __cinit__(self, mark=None, walk=None, vcpu_count=0, explain=0, *args):
        if not 0 <= explain <= MOST_EXPLAINED:
            raise ValueError(f"explain: want 0 to {int(MOST_EXPLAINED)}, got {explain}")
        self.walk, self.explain, self.kept = walk, explain, []
        self.registers = new_registers(walk, vcpu_count)
        self.rows.n = self.base = self.at = self.filled = 0
        self.crosses, self.checks_faults = False, True
        memset(&self.faults, 0, sizeof(self.faults))

    def __dealloc__(self):
        free(self.decoded)

    @property
    def accesses(self):
        """Accesses walked so far."""
        return sum(self.kinds)

    @property
    def row(self):
        """Rows of what was loaded that are done."""
        return int(self.base + self.at)

    @property
    def fault_counts(self):
        """Recorded faults that the walk reproduced, or that were only counted, by (op, error code or exit information)."""
        return faults_found(&self.faults)

    @property
    def event(self):
        """The event at which run() has stopped: its row, op, vCPU, address and value."""
        cdef size_t i = self.at - 1
        self.check_idle()
        if not 0 < self.at <= self.rows.n or self.rows.value is NULL:
            raise ValueError("the loop has not stopped at an event")
        return (int(self.base + i), int(self.rows.op[i]), int(vcpu_of(self, i)), int(self.rows.addr[i]), int(self.rows.value[i]))

    def carry_out(self):
        """Carry out the event at which run() has stopped so that TLBs follow it; False if it is the caller's to carry out."""
        cdef SlotTable table = self.walk.mem.current()
        cdef int done
        self.event                                      # there is one
        self.registers.bind(table)
        self.check_vcpus(&self.rows, 0, 1)
        done = carry_out(self, table, self.at - 1)
        if done == STOP_MALFORMED:
            raise ValueError(f"row {self.row - 1}: an event without its columns")
        return done == STOP_END

    def use(self, Py_ssize_t vcpu, RegisterSets contexts not None):
        """Put a register set in force on a vCPU; returns its number."""
        self.check_idle()
        number = self.registers.add(contexts)
        self.registers.use(vcpu, number)
        return number

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
        if self.registers.vcpus != 1 or len(shifts) != LEVELS:
            raise ValueError(f"{len(shifts)} shifts and {self.registers.vcpus} vCPUs; want {int(LEVELS)} and 1")
        for level in range(LEVELS):
            if not PAGE_SHIFT <= shifts[level] < 64:
                raise ValueError(f"shifts: {shifts[level]} is no page; want {PAGE_SHIFT} to 63")
            self.shifts[level] = shifts[level]
        self.crosses = True

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def load(self, chunk, size_t first=0):
        """Take the rows of a chunk: its columns `op`, `addr`, `access`, `gpa`, and `size`, `vcpu`, `value` or None.

        Of a PlacedChunk the first four are decoded a block at a time.

        Parameters
        ----------
        chunk : Chunk
        first : int
            The row to begin with.

        Raises
        ------
        ValueError
            Columns of other types or of different lengths, a vCPU without registers, or a chunk with events that lacks their
            columns.
        """
        cdef replay_rows rows
        cdef Py_ssize_t n = -1
        cdef PlacedRows placed = chunk.places if isinstance(chunk, PlacedChunk) else None
        self.check_idle()
        self.rows.n = self.base = self.at = 0
        self.source = self.placed = None
        kept = [] if placed is None else [placed]
        arrays = dict.fromkeys(_PLACED)
        for name, dtype in _COLUMN_TYPES.items():
            if placed is not None and name in _PLACED:
                continue
            array = getattr(chunk, name)
            if array is not None or name not in _MAY_BE_NONE:
                check_array(name, array, dtype)
                array = aligned(exact_column(array), dtype.itemsize)
                kept.append(array)
            arrays[name] = array
        lengths = {len(column) for column in kept}
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} rows, want one length")
        n, = lengths
        rows.op = <const uint8_t *>pointer_to(arrays, "op", n)
        rows.addr = <const uint64_t *>pointer_to(arrays, "addr", n)
        rows.access = <const uint8_t *>pointer_to(arrays, "access", n)
        rows.gpa = <const uint64_t *>pointer_to(arrays, "gpa", n)
        rows.size = <const uint8_t *>pointer_to(arrays, "size", n)
        rows.vcpu = <const uint16_t *>pointer_to(arrays, "vcpu", n)
        rows.value = <const uint64_t *>pointer_to(arrays, "value", n)
        if chunk.has_events and (rows.size is NULL or rows.value is NULL):
            raise ValueError("a chunk with events has no size or no value column")
        self.check_vcpus(&rows, n, chunk.vcpus)
        if self.crosses and (rows.size is NULL or chunk.all_known and n):
            raise ValueError("a chunk without sizes, or with recorded addresses, where rows are walked in both pages")
        if first > <size_t>n:
            raise ValueError(f"first: row {first} is not within the {n} rows")
        if self.fed is not None:
            self.fed.use_ips(chunk.ip, n)
        rows.n, rows.all_known = n if placed is None else 0, chunk.all_known
        self.rows, self.kept, self.at = rows, kept, first if placed is None else 0
        if placed is not None:
            self.use_decoded()
            self.base, self.placed, self.of_placed = first, placed, rows

    def load_recording(self, RecordedRows source not None):
        """Take the rows of a recording, of which the loop decodes a block at a time. They are of the first vCPU."""
        self.check_idle()
        self.rows.n = self.base = self.at = 0
        self.check_vcpus(&self.rows, 0, 1)
        if self.crosses:
            raise ValueError("a recording has recorded addresses, where rows are walked in both pages")
        self.use_decoded()
        self.rows.size, self.rows.value = self.decoded.size, self.decoded.value
        self.rows.vcpu, self.rows.all_known = NULL, True
        if self.fed is not None:
            self.fed.use_ips(None, 0)
        self.kept, self.source, self.placed = [], source, None

    cdef int use_decoded(self) except -1:
        """Let the columns of the rows at hand be those that rows are decoded to."""
        if self.decoded is NULL:
            self.decoded = <decoded_rows *>calloc(1, sizeof(decoded_rows))
            if self.decoded is NULL:
                raise MemoryError
        self.rows.op, self.rows.addr, self.rows.access = self.decoded.op, self.decoded.addr, self.decoded.access
        self.rows.gpa = self.decoded.gpa
        return 0

    def restore_faults(self, counts):
        """Take up counts of recorded faults that `fault_counts` returned, in place of none."""
        self.check_idle()
        restore_faults(&self.faults, counts)

    def skip(self, size_t row):
        """Pass over the rows of a recording up to one, which is there; they are decoded alone. False if it is not."""
        self.check_idle()
        while self.base + self.rows.n < row:
            if not next_rows(self):
                return False
        self.at = row - self.base
        return True

    cdef int check_vcpus(self, const replay_rows *rows, Py_ssize_t n, Py_ssize_t vcpus) except -1:
        """Check that all vCPUs have registers, and that rows are of them."""
        cdef Py_ssize_t i, ready = 0
        cdef uint16_t highest = 0
        if rows.vcpu is not NULL and self.registers.vcpus > 1:
            for i in range(n):
                highest = max(highest, rows.vcpu[i])
        for i in range(self.registers.vcpus):
            ready += self.registers.current[i] != NO_SET
        vcpus = max(vcpus, highest + 1)
        if ready < self.registers.vcpus or vcpus > self.registers.vcpus:
            raise ValueError(f"rows of {vcpus} vCPUs, registers of {ready}")
        return 0

    def run(self, size_t stop=SIZE_MAX):
        """Go on with the rows that were loaded.

        Parameters
        ----------
        stop : int
            The row of them before which to stop.

        Returns
        -------
        int
            AT_ROW : `stop` is reached
            AT_EVENT : `event` is the caller's to carry out. If TLBs are fed, each event but a GUEST_WRITE: `carry_out()` goes on
            AT_MISMATCHES : `take_mismatches()` tells them
            END : all rows are done

        Raises
        ------
        ValueError
            The chunk is not what it says it is.
        """
        cdef int why
        cdef SlotTable table
        self.check_idle()
        table = self.walk.mem.current()
        self.registers.bind(table)
        if self.version != self.registers.version:
            self.begun, self.version = False, self.registers.version
            self.check_vcpus(&self.rows, 0, 1)
        self.running = True
        with nogil:
            why = run_rows(self, table, stop)
        self.running = False
        if self.source is not None and self.source.failed:
            raise MemoryError("events of a recording")
        if self.broken:
            raise ValueError("a chunk says that it has the address of each access, and has not")
        if why == STOP_MALFORMED:
            size = 0 if self.rows.size is NULL else self.rows.size[self.at]
            raise ValueError(f"row {self.base + self.at}: a write of {size} bytes to {self.rows.addr[self.at]:#x}; want 1, 2, 4 "
                             "or 8 bytes, aligned, in a chunk with events")
        return why


cdef const void *pointer_to(dict arrays, str name, Py_ssize_t rows) except? NULL:
    """Return the first row of a column, and keep the column; NULL if there is no such column."""
    array = arrays[name]
    return NULL if array is None else column_of("", name, array, _COLUMN_TYPES[name].itemsize, rows, False).data


cdef inline uint32_t vcpu_of(RowLoop loop, size_t i) noexcept nogil:
    """Return the vCPU of a row, in range, whoever has written there since it was checked."""
    return 0 if loop.rows.vcpu is NULL or loop.registers.vcpus == 1 else min(
        <uint32_t>loop.rows.vcpu[i], loop.registers.vcpus - 1)


cdef int run_rows(RowLoop loop, SlotTable table, size_t stop) noexcept nogil:
    """Go on up to row `stop`; returns why it has stopped there or before."""
    cdef const replay_rows *rows = &loop.rows
    cdef size_t end, limit
    cdef int done
    while not loop.bad_count and not loop.broken:
        if loop.at == rows.n and not next_rows(loop):
            return STOP_END
        if loop.base + loop.at >= stop:
            return STOP_ROW
        if rows.op[loop.at] < OP_EVENT:
            limit = min(rows.n, stop - loop.base)
            end = loop.at + walk_among_writes(loop, limit)
            if end == loop.at:
                end = end_of_accesses(loop, limit)
                walk_accesses(loop, end)
            loop.at = end
            continue
        done = STOP_EVENT
        if loop.stream is NULL or rows.op[loop.at] == OP_GUEST_WRITE:
            done = carry_out(loop, table, loop.at)
        if done == STOP_MALFORMED:
            return done
        loop.at += 1
        if done == STOP_EVENT:
            return done
    return STOP_MISMATCHES


cdef bint next_rows(RowLoop loop) noexcept nogil:
    """Decode the next rows of a recording or of places."""
    cdef replay_rows *whole = &loop.of_placed
    cdef decoded_rows *d = loop.decoded
    cdef row_columns out
    if loop.source is None and loop.placed is None:
        return False
    loop.base += loop.rows.n
    loop.at = 0
    if loop.source is not None:
        out.op, out.addr, out.access, out.gpa, out.size, out.value = d.op, d.addr, d.access, d.gpa, d.size, d.value
        loop.rows.n = loop.source.fill(&out, BLOCK)
    else:
        loop.rows.n = loop.placed.fill(loop.base, BLOCK, d.op, d.addr, d.access, d.gpa)
        loop.rows.size = whole.size if whole.size is NULL else whole.size + loop.base
        loop.rows.vcpu = whole.vcpu if whole.vcpu is NULL else whole.vcpu + loop.base
        loop.rows.value = whole.value if whole.value is NULL else whole.value + loop.base
    return loop.rows.n != 0


# ---- accesses ----------------------------------------------------------------------------------------------------------

cdef size_t end_of_accesses(RowLoop loop, size_t limit) noexcept nogil:
    """Return the first event from the next row on, at most a block away; counts the accesses up to there by kind."""
    cdef size_t start = loop.at, i = start, k
    cdef const uint8_t *op = loop.rows.op
    cdef uint8_t seen
    limit = min(limit, start + BLOCK)
    while i + 64 <= limit:
        seen = 0
        for k in range(64):
            seen |= op[i + k]
        if seen >= OP_EVENT:
            break
        i += 64
    while i < limit and op[i] < OP_EVENT:
        i += 1
    loop.count_kinds(&op[start], i - start)
    return i


cdef size_t walk_among_writes(RowLoop loop, size_t limit) noexcept nogil:
    """Walk accesses from the next row on and do the writes among them, if one is near. Returns how many rows are done."""
    cdef const replay_rows *rows = &loop.rows
    cdef const uint64_t *kinds = loop.counters.kinds
    cdef size_t i = loop.at, near = min(limit, i + NEAR_WRITE)
    if rows.value is NULL or rows.size is NULL or loop.stream is not NULL or loop.crosses or not (
            rows.vcpu is NULL or loop.registers.vcpus == 1):
        return 0
    while i < near and rows.op[i] < OP_EVENT:
        i += 1
    if i == near or rows.op[i] != OP_GUEST_WRITE:
        return 0
    return loop.walk_stretch(loop.registers.walks, sets_of_one(loop, STRETCH), rows, loop.at, limit,
                             kinds[0] + kinds[1] + kinds[2], loop.registers.count)


cdef void walk_accesses(RowLoop loop, size_t end) noexcept nogil:
    """Walk the accesses from the next row up to end."""
    cdef const replay_rows *rows = &loop.rows
    cdef const uint32_t *ctx
    cdef size_t start = loop.at, n = end - start
    cdef uint64_t accesses = loop.counters.kinds[0] + loop.counters.kinds[1] + loop.counters.kinds[2]
    cdef bint one_vcpu = rows.vcpu is NULL or loop.registers.vcpus == 1
    ctx = sets_of_one(loop, n) if one_vcpu else sets_of_rows(loop, start, n)
    loop.walk_block(loop.registers.walks, ctx, &rows.addr[start], &rows.access[start], &rows.gpa[start], accesses - n, n,
                    loop.registers.count, rows.all_known)
    if loop.stream is not NULL:
        stream_begin(loop.stream, &rows.addr[start], &rows.access[start], loop.result.gpa, loop.result.level,
                     loop.columns.status, start, n)
    if loop.crosses:
        loop.walk_next_pages(&rows.addr[start], &rows.access[start], &rows.size[start], loop.shifts, n)
    if loop.stream is not NULL:
        stream_run(loop.stream, loop.registers.walks, loop.registers.current, NULL if one_vcpu else loop.vcpu)


cdef const uint32_t *sets_of_one(RowLoop loop, size_t n) noexcept nogil:
    """Return the number of the register set of each of n rows of the first vCPU; NULL if it is 0 of all."""
    cdef uint32_t number = loop.registers.current[0]
    cdef size_t k
    if not number:
        return NULL
    if number != loop.filled_with:
        loop.filled_with, loop.filled = number, 0
    for k in range(loop.filled, n):
        loop.ctx[k] = number
    loop.filled = max(loop.filled, n)
    return loop.ctx


cdef const uint32_t *sets_of_rows(RowLoop loop, size_t start, size_t n) noexcept nogil:
    cdef uint32_t last = loop.registers.vcpus - 1
    cdef size_t k
    for k in range(n):                          # in range, whoever has written there since
        loop.vcpu[k] = loop.rows.vcpu[start + k]
    kvmmu_keep_copies()
    for k in range(n):
        loop.vcpu[k] = min(loop.vcpu[k], last)
        loop.ctx[k] = loop.registers.current[loop.vcpu[k]]
    return loop.ctx


# ---- events ------------------------------------------------------------------------------------------------------------

cdef int carry_out(RowLoop loop, SlotTable table, size_t i) noexcept nogil:
    """Carry out the event in a row: STOP_END. STOP_EVENT if it is the caller's."""
    cdef const replay_rows *rows = &loop.rows
    cdef int op = rows.op[i], written
    cdef uint32_t vcpu = vcpu_of(loop, i)
    cdef uint64_t value
    if rows.value is NULL or rows.size is NULL:
        return STOP_MALFORMED
    value = rows.value[i]
    if op == OP_GUEST_WRITE:
        written = loop.write_guest(loop.registers.walks, rows.addr[i], value, rows.size[i])
        return STOP_END if written == WRITTEN else STOP_MALFORMED if written == WRITE_MALFORMED else STOP_EVENT
    if op in (OP_INVLPG, OP_INVPCID, OP_HOST_INVALIDATE, OP_SET_CPL_AC):
        return STOP_END                         # a walk keeps nothing; accesses say CPL and AC themselves
    if op == OP_PAGE_FAULT or op == OP_NPT_FAULT:
        return check_fault(loop, op, vcpu, rows.addr[i], value)
    if op == OP_RESTART or op >= OP_MEMORY or not loop.registers.follow(&table.mem, vcpu, <uint8_t>op, value):
        return STOP_EVENT
    return STOP_END


cdef int check_fault(RowLoop loop, int op, uint32_t vcpu, uint64_t addr, uint64_t code) noexcept nogil:
    """Hold the walk against a recorded fault."""
    cdef const kvm_pagewalk *walks = loop.registers.walks
    cdef uint32_t nested = loop.registers.last_nested[vcpu]
    cdef bint counts = not loop.checks_faults
    if not counts and op == OP_PAGE_FAULT:
        counts = reproduces_page_fault(&walks[loop.registers.current[vcpu]], addr, code)
    elif not counts and nested != NO_SET:
        counts = reproduces_npt_fault(walks[nested].ngpa, addr, code)
    return STOP_END if counts and count_fault(&loop.faults, op, code) else STOP_EVENT


def new_row_loop(PageWalk walk not None, Py_ssize_t vcpus, Py_ssize_t explain=0):
    """Return a RowLoop without registers. IN explain: how many mismatches are wanted one by one"""
    return RowLoop.__new__(RowLoop, maker(), walk, vcpus, explain)
