"""The rows of a recording; see `_recorded_rows.pxd`."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport SIZE_MAX, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy

from kvmmu.arch._bits cimport (
    CR4_PGE_MASK, OP_GUEST_WRITE, OP_INVLPG, OP_KIND_MASK, OP_MMIO_MASK, OP_MOV_CR0, OP_MOV_CR3, OP_MOV_CR4, OP_NPT_FAULT,
    OP_PAGE_FAULT, OP_SET_REGS, OP_VMENTER, OP_VMEXIT,
)
from kvmmu.traces._recorded_rows cimport event_row, page_row, register_row, row_columns

cdef enum:
    PIECE = 256                     # accesses that are decoded before their contexts are looked at
    SHORT_PIDX = 1 << 16            # values of a page number of two bytes
    PRIV_MASK = 3                   # of a recorded privilege
    WRITE_SIZE = 8

# Codes of recorded events.
cdef enum:
    RECORDED_CR3 = 1
    RECORDED_CR4 = 2
    RECORDED_INVLPG = 3
    RECORDED_CR0 = 4
    RECORDED_WORLD_SWITCH = 7

ctypedef fused page_index:
    uint16_t
    uint32_t


cdef class RecordedRows:
    """The rows of one round of a recording.

    Its columns may be anybody's: lengths and types are checked here, and every number is held in its range where it is used.

    Parameters
    ----------
    recording
        An object with the columns of `Recording`.
    sizes : bool
        Give the sizes of accesses as well.

    Raises
    ------
    ValueError
        Columns of other types or lengths, or a context that is not there.
    """

    def __cinit__(self, recording, bint sizes=False):
        cdef size_t i
        self.kept = []
        self.take_contexts(recording)
        self.take_pages(recording)
        self.take_accesses(recording, sizes)
        self.take_events(recording)
        if self.accesses:
            self.context = self.pages[self.page_at(0)].ctx
        self.start = self.regs = self.contexts[self.context]
        self.last_guest = self.last_host = -1
        for i in range(self.last_context + 1, 0, -1):
            if self.contexts[i - 1].guest:
                self.last_guest = i - 1
            else:
                self.last_host = i - 1
        self.find_next_place()

    def __dealloc__(self):
        free(self.pages)
        free(self.contexts)
        free(self.pending)

    def __len__(self):
        """Count the accesses."""
        return self.accesses

    @property
    def ends_elsewhere(self):
        """True if the registers in force behind the rows so far are not those of the start."""
        return memcmp(&self.regs, &self.start, sizeof(register_row)) != 0

    # ---- the columns ---------------------------------------------------------------------------------------------------

    cdef const void *column(self, str name, array, dtype, Py_ssize_t rows) except? NULL:
        """Return the first row of a column. IN rows: how many there must be, -1: any"""
        plain = np.require(np.asarray(array), requirements=["C", "A"])
        if plain.dtype != dtype or plain.ndim != 1:
            raise ValueError(f"{name}: is {plain.dtype} of shape {plain.shape}; want one dimension of {np.dtype(dtype)}")
        if rows >= 0 and plain.shape[0] != rows:
            raise ValueError(f"{name}: want shape ({rows},), got {plain.shape}")
        self.kept.append(plain)
        self.rows_of_last = plain.shape[0]
        return <const void *><size_t>plain.ctypes.data

    cdef int take_contexts(self, recording) except -1:
        ctx = np.ascontiguousarray(recording.ctx)
        if ctx.dtype != np.uint64 or ctx.ndim != 2 or ctx.shape[1] != 6 or not len(ctx):
            raise ValueError(f"ctx: is {ctx.dtype} of shape {ctx.shape}; want uint64 of shape (contexts, 6), one at least")
        self.contexts = <register_row *>calloc(len(ctx), sizeof(register_row))
        if self.contexts is NULL:
            raise MemoryError
        self.last_context = <uint32_t>(len(ctx) - 1)
        memcpy(self.contexts, <const void *><size_t>ctx.ctypes.data, ctx.nbytes)
        return 0

    cdef int take_pages(self, recording) except -1:
        """Copy the columns that are by page number."""
        cdef size_t pages = len(recording.pages_gva), room = max(pages, <size_t>SHORT_PIDX), i
        cdef const uint64_t *gva = <const uint64_t *>self.column("pages_gva", recording.pages_gva, np.uint64, pages)
        cdef const uint64_t *gpa = <const uint64_t *>self.column("pages_gpa", recording.pages_gpa, np.uint64, pages)
        cdef const uint32_t *ctx = <const uint32_t *>self.column("pages_ctx", recording.pages_ctx, np.uint32, pages)
        cdef const uint8_t *io = <const uint8_t *>self.column("pages_io", recording.pages_io, np.uint8, pages)
        self.pages = <page_row *>calloc(room, sizeof(page_row))
        if self.pages is NULL:
            raise MemoryError
        self.last_page = <uint32_t>(room - 1)
        for i in range(pages):
            self.pages[i].gva, self.pages[i].gpa, self.pages[i].ctx = gva[i], gpa[i], ctx[i]
            self.pages[i].mmio = OP_MMIO_MASK if io[i] else 0
            if self.pages[i].ctx > self.last_context:
                raise ValueError(f"pages_ctx: {self.pages[i].ctx} is beyond the last, {self.last_context}")
        return 0

    cdef int take_accesses(self, recording, bint sizes) except -1:
        cdef Py_ssize_t rows
        pidx = np.asarray(recording.pidx)
        self.short_pidx = pidx.dtype == np.uint16
        self.pidx = self.column("pidx", pidx, np.uint16 if self.short_pidx else np.uint32, -1)
        self.accesses = rows = self.rows_of_last
        self.off = <const uint16_t *>self.column("off", recording.off, np.uint16, rows)
        self.kind = <const uint8_t *>self.column("kind", recording.kind, np.uint8, rows)
        self.priv = <const uint8_t *>self.column("priv", recording.priv, np.uint8, rows)
        if sizes:
            self.size = <const uint8_t *>self.column("size", recording.size, np.uint8, rows)
        return 0

    cdef int take_events(self, recording) except -1:
        cdef Py_ssize_t rows
        events, faults, npt_faults, writes = recording.events, recording.faults, recording.npt_faults, recording.writes
        self.ev_pos = <const uint64_t *>self.column("events.pos", events.pos, np.uint64, -1)
        self.events = rows = self.rows_of_last
        self.ev_code = <const uint8_t *>self.column("events.code", events.code, np.uint8, rows)
        self.ev_val = <const uint64_t *>self.column("events.val", events.val, np.uint64, rows)
        self.ev_aux = <const uint64_t *>self.column("events.aux", events.aux, np.uint64, rows)
        self.pf_pos = <const uint64_t *>self.column("faults.pos", faults.pos, np.uint64, -1)
        self.faults = rows = self.rows_of_last
        self.pf_cr2 = <const uint64_t *>self.column("faults.cr2", faults.cr2, np.uint64, rows)
        self.pf_err = <const uint32_t *>self.column("faults.err", faults.err, np.uint32, rows)
        self.pf_ctx = <const uint32_t *>self.column("faults.ctx", faults.ctx, np.uint32, rows)
        self.npf_pos = <const uint64_t *>self.column("npt_faults.pos", npt_faults.pos, np.uint64, -1)
        self.npt_faults = rows = self.rows_of_last
        self.npf_gpa = <const uint64_t *>self.column("npt_faults.gpa", npt_faults.gpa, np.uint64, rows)
        self.npf_info1 = <const uint64_t *>self.column("npt_faults.info1", npt_faults.info1, np.uint64, rows)
        self.w_pos = <const uint64_t *>self.column("writes.pos", writes.pos, np.uint64, -1)
        self.writes = rows = self.rows_of_last
        self.w_gpa = <const uint64_t *>self.column("writes.gpa", writes.gpa, np.uint64, rows)
        self.w_val = <const uint64_t *>self.column("writes.val", writes.val, np.uint64, rows)
        return 0

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def columns(self, size_t most):
        """Return the next rows, at most so many, as columns that `Chunk.checked()` takes; None behind the last."""
        cdef row_columns out
        cdef size_t rows
        arrays = {"op": np.empty(most, np.uint8), "addr": np.empty(most, np.uint64), "access": np.empty(most, np.uint8),
                  "gpa": np.empty(most, np.uint64), "size": np.ones(most, np.uint8), "value": np.zeros(most, np.uint64)}
        out.op = <uint8_t *><size_t>arrays["op"].ctypes.data
        out.addr = <uint64_t *><size_t>arrays["addr"].ctypes.data
        out.access = <uint8_t *><size_t>arrays["access"].ctypes.data
        out.gpa = <uint64_t *><size_t>arrays["gpa"].ctypes.data
        out.size = <uint8_t *><size_t>arrays["size"].ctypes.data
        out.value = <uint64_t *><size_t>arrays["value"].ctypes.data
        before = self.pos
        with nogil:
            rows = self.fill(&out, most)
        if self.failed:
            raise MemoryError("events of a recording")
        if self.pos - before == rows:                   # no event is among them
            del arrays["value"]
        return {name: array[:rows] for name, array in arrays.items()} if rows else None

    cdef size_t fill(self, const row_columns *out, size_t most) noexcept nogil:
        cdef size_t n = 0, stop
        while n < most and not self.failed:
            if self.pending_at < self.pending_count:
                n += self.put_pending(out, n, most)
                continue
            # a store takes effect behind its access
            if self.next_write < self.writes and self.w_pos[self.next_write] < self.pos:
                out.op[n], out.access[n], out.gpa[n], out.size[n] = OP_GUEST_WRITE, 0, 0, WRITE_SIZE
                out.addr[n], out.value[n] = self.w_gpa[self.next_write], self.w_val[self.next_write]
                self.next_write += 1
                n += 1
                continue
            if self.next_place <= self.pos or self.context_changes:
                self.gather_events()
                continue
            if self.pos >= self.accesses:
                break
            stop = min(self.accesses, self.next_place)
            if self.next_write < self.writes and self.w_pos[self.next_write] < stop:
                stop = self.w_pos[self.next_write] + 1
            n += self.put_accesses(out, n, min(stop, self.pos + most - n))
        return n

    cdef size_t put_accesses(self, const row_columns *out, size_t n, size_t stop) noexcept nogil:
        """Write the rows of the accesses up to stop, or up to one of another context. Returns how many."""
        cdef size_t first = n, count, done, k
        cdef const uint8_t *kind
        cdef const uint8_t *priv
        cdef uint8_t *op
        cdef uint8_t *access
        while self.pos < stop:
            count = min(stop - self.pos, <size_t>PIECE)
            if self.short_pidx:
                done = decode(self, <const uint16_t *>self.pidx, out, n, count)
            else:
                done = decode(self, <const uint32_t *>self.pidx, out, n, count)
            kind, priv, op, access = &self.kind[self.pos], &self.priv[self.pos], &out.op[n], &out.access[n]
            for k in range(done):
                op[k] |= kind[k] & <uint8_t>OP_KIND_MASK
            for k in range(done):
                access[k] = access_of(kind[k], priv[k])
            if self.size is not NULL:
                memcpy(&out.size[n], &self.size[self.pos], done)
            self.pos += done
            n += done
            if done < count:
                self.context_changes = True
                break
        return n - first

    cdef uint32_t page_at(self, size_t access) noexcept nogil:
        if self.short_pidx:
            return (<const uint16_t *>self.pidx)[access]
        return min((<const uint32_t *>self.pidx)[access], self.last_page)

    cdef size_t put_pending(self, const row_columns *out, size_t n, size_t most) noexcept nogil:
        cdef size_t first = n
        cdef const event_row *e
        while n < most and self.pending_at < self.pending_count:
            e = &self.pending[self.pending_at]
            out.op[n], out.access[n], out.gpa[n], out.size[n] = e.op, 0, 0, WRITE_SIZE
            out.addr[n], out.value[n] = e.addr, e.value
            self.pending_at += 1
            n += 1
        return n - first

    # ---- events --------------------------------------------------------------------------------------------------------

    cdef void find_next_place(self) noexcept nogil:
        cdef uint64_t place = SIZE_MAX
        if self.next_event < self.events:
            place = min(place, self.ev_pos[self.next_event])
        if self.next_fault < self.faults:
            place = min(place, self.pf_pos[self.next_fault])
        if self.next_npt_fault < self.npt_faults:
            place = min(place, self.npf_pos[self.next_npt_fault])
        self.next_place = place

    cdef void gather_events(self) noexcept nogil:
        """Gather the events before access pos: register loads, faults, and what the contexts say that no event told."""
        cdef const register_row *following = NULL
        cdef size_t stop = self.next_event, left = 0
        cdef bint switches
        cdef uint64_t value
        cdef long number = -1
        cdef int code
        self.pending_at = self.pending_count = 0
        if self.pos < self.accesses:
            number = self.context = self.pages[self.page_at(self.pos)].ctx
            following = &self.contexts[number]
        while stop < self.events and self.ev_pos[stop] <= self.pos:
            left += self.ev_code[stop] == RECORDED_WORLD_SWITCH
            stop += 1
        switches = left != 0
        while self.next_event < stop:
            code, value = self.ev_code[self.next_event], self.ev_val[self.next_event]
            if code == RECORDED_INVLPG:
                self.emit(OP_INVLPG, value, 0)
            elif not self.pos:
                pass                                    # these tell the registers at the start
            elif code == RECORDED_WORLD_SWITCH:
                left -= 1
                if not left and not value:              # a #NPF of L2 is taken before its #VMEXIT
                    self.gather_npt_faults()
                self.switch_world(value, self.ev_aux[self.next_event], following, number)
            elif not switches:                          # else it is the switch that loads them
                if code == RECORDED_CR3:
                    self.emit(OP_MOV_CR3, 0, value)
                    self.regs.cr3 = value
                elif code == RECORDED_CR4:
                    self.emit(OP_MOV_CR4, 0, value)
                    self.regs.cr4 = value
                elif code == RECORDED_CR0:
                    self.emit(OP_MOV_CR0, 0, value)
                    self.regs.cr0 = value
            self.next_event += 1
        self.gather_npt_faults()
        while self.next_fault < self.faults and self.pf_pos[self.next_fault] <= self.pos:
            self.force(min(self.pf_ctx[self.next_fault], self.last_context))
            self.emit(OP_PAGE_FAULT, self.pf_cr2[self.next_fault], self.pf_err[self.next_fault])
            self.next_fault += 1
        if following is not NULL:
            self.force(<uint32_t>number)
        self.context_changes = False
        self.find_next_place()

    cdef void gather_npt_faults(self) noexcept nogil:
        while self.next_npt_fault < self.npt_faults and self.npf_pos[self.next_npt_fault] <= self.pos:
            self.emit(OP_NPT_FAULT, self.npf_gpa[self.next_npt_fault], self.npf_info1[self.next_npt_fault])
            self.next_npt_fault += 1

    cdef void switch_world(self, uint64_t enters, uint64_t ncr3, const register_row *following, long number) noexcept nogil:
        """Carry out a VMRUN or #VMEXIT, to the registers of the next access if they are of that side, else to the last ones."""
        cdef long to = self.last_guest if enters else self.last_host
        cdef size_t i
        if following is not NULL and following.guest == enters:
            to = number
        elif enters:
            for i in range(self.last_context + 1):
                if self.contexts[i].guest and self.contexts[i].ncr3 == ncr3:
                    to = i
                    break
        if to >= 0:
            self.emit(OP_VMENTER if enters else OP_VMEXIT, 0, to)
            self.use(<uint32_t>to)

    cdef void force(self, uint32_t number) noexcept nogil:
        """Load the registers of a context unless they are in force."""
        cdef register_row mine = self.regs, wanted = self.contexts[number]
        mine.cr4 &= ~CR4_PGE_MASK                       # recorded contexts leave it out
        wanted.cr4 &= ~CR4_PGE_MASK
        if memcmp(&mine, &wanted, sizeof(register_row)):
            self.emit(OP_SET_REGS, 0, number)
        self.use(number)

    cdef void use(self, uint32_t number) noexcept nogil:
        self.regs = self.contexts[number]
        if self.regs.guest:
            self.last_guest = number
        else:
            self.last_host = number

    cdef void emit(self, int op, uint64_t addr, uint64_t value) noexcept nogil:
        cdef event_row *grown
        cdef event_row *e
        if self.pending_count == self.pending_room:
            grown = <event_row *>realloc(self.pending, 2 * (self.pending_room + 8) * sizeof(event_row))
            if grown is NULL:
                self.failed = True
                return
            self.pending, self.pending_room = grown, 2 * (self.pending_room + 8)
        e = &self.pending[self.pending_count]
        e.op, e.addr, e.value = <uint8_t>op, addr, value
        self.pending_count += 1


cdef inline uint8_t access_of(uint8_t kind, uint8_t priv) noexcept nogil:
    """Return the access byte: of a store WRITE, of a fetch FETCH; of a user USER, of a supervisor with SMAP off AC."""
    return <uint8_t>((kind & 1) << 1 | (kind & 2) << 3 | (priv & PRIV_MASK) << 2)


cdef size_t decode(RecordedRows rows, const page_index *pidx, const row_columns *out, size_t n, size_t count) noexcept nogil:
    """Write what pages say of so many accesses: address, recorded address, MMIO. Returns how many are of the context in force."""
    cdef const uint16_t *off = &rows.off[rows.pos]
    cdef const page_row *pages = rows.pages
    cdef const page_row *page
    cdef uint64_t *addr = &out.addr[n]
    cdef uint64_t *gpa = &out.gpa[n]
    cdef uint8_t *op = &out.op[n]
    cdef uint32_t last = rows.last_page, context = rows.context, other = 0
    cdef size_t k
    pidx += rows.pos
    for k in range(count):
        if page_index is uint16_t:
            page = &pages[pidx[k]]
        else:
            page = &pages[min(pidx[k], last)]
        addr[k] = page.gva + off[k]
        gpa[k] = page.gpa + off[k]
        op[k] = page.mmio
        other |= page.ctx ^ context
    if other:
        for k in range(count):
            if rows.pages[rows.page_at(rows.pos + k)].ctx != context:
                return k
    return count
