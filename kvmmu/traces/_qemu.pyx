"""Records of kvmmu's plugin for QEMU to rows. Headers of blocks and records have 16 bytes both."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from kvmmu.arch._bits cimport INVALID_GPA, OP_FETCH, OP_GUEST_WRITE, OP_LOAD, OP_MMIO_MASK, OP_MOV_CR3, OP_STORE
from kvmmu.traces._binary cimport check_span
from kvmmu.traces._sink cimport Sink, access_of, is_full, put, put_event, row_sink

cdef enum:
    UNIT = 16
    MAX_BLOCK = 65536
    GPA_BITS = 52
    SIZE_SHIFT = 52
    KIND_SHIFT = 56
    IO_SHIFT = 60
    NIBBLE = 15

cdef enum:                          # kinds of records
    LOAD
    STORE
    FETCH
    VALUE
    CR3

cdef enum:                          # why a reading stopped
    AT_END
    AT_FULL
    NO_BLOCK
    NO_RECORD

REASONS = {NO_BLOCK: "is not the header of a block", NO_RECORD: "is a record of a kind or size that is not known"}


ctypedef struct qemu_state:
    uint64_t *ips                   # of the last fetch of each vCPU
    uint32_t left                   # records of the block
    uint16_t vcpu
    bint fetch
    bint events
    bint has_fetches
    uint64_t values
    uint64_t cr3s


cdef class QemuRecords:
    """A reader of blocks and records.

    Attributes
    ----------
    left : int
        Records of the last block that have not come yet.
    values, registers : int
        Records that were passed over: values of stores, and CR3.
    """

    cdef qemu_state state

    def __cinit__(self, *, bint fetch=True, bint events=False):
        self.state.fetch, self.state.events = fetch, events
        self.state.ips = <uint64_t *>calloc(MAX_BLOCK, sizeof(uint64_t))
        if self.state.ips == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.state.ips)

    @property
    def left(self):
        return self.state.left

    @property
    def values(self):
        return self.state.values

    @property
    def registers(self):
        return self.state.cr3s

    def run(self, const uint8_t[::1] records, Py_ssize_t start, Sink sink):
        """Read units of 16 bytes.

        Parameters
        ----------
        records : bytes-like
            Whole units.
        start : int
        sink : Sink
            With vcpu, gpa and, for events, value.

        Returns
        -------
        stop : int
            Where to go on, or where a unit is damaged.
        reason : str or None
            What is wrong there.
        """
        cdef const uint8_t *p
        cdef int why
        check_span(records, start, UNIT)
        if self.state.events and sink.rows.value == NULL:
            raise ValueError("sink: has no values; wanted for events")
        if start == records.shape[0]:
            return start, None
        p = &records[start]
        with nogil:
            why = read_units(&self.state, &p, p + (records.shape[0] - start), &sink.rows)
        return p - &records[0], REASONS.get(why)


cdef int read_units(qemu_state *s, const uint8_t **place, const uint8_t *end, row_sink *rows) noexcept nogil:
    cdef const uint8_t *p = place[0]
    cdef uint64_t address, info
    rows.vcpu_now = s.vcpu
    while p < end:
        place[0] = p
        if is_full(rows):
            return AT_FULL
        if s.left == 0:
            if not begin_block(s, p):
                return NO_BLOCK
            rows.vcpu_now = s.vcpu
        else:
            memcpy(&address, p, 8)
            memcpy(&info, p + 8, 8)
            if not put_record(s, rows, address, info):
                return NO_RECORD
            s.left -= 1
        p += UNIT
    place[0] = p
    return AT_END


cdef bint begin_block(qemu_state *s, const uint8_t *p) noexcept nogil:
    cdef uint16_t zero
    cdef uint32_t count, zero_too
    memcpy(&zero, p + 6, 2)
    memcpy(&count, p + 8, 4)
    memcpy(&zero_too, p + 12, 4)
    if memcmp(p, b"KVMB", 4) != 0 or zero != 0 or zero_too != 0 or count == 0 or count > MAX_BLOCK:
        return False
    memcpy(&s.vcpu, p + 4, 2)
    s.left = count
    return True


cdef bint put_record(qemu_state *s, row_sink *rows, uint64_t address, uint64_t info) noexcept nogil:
    cdef uint64_t gpa = info & ((<uint64_t>1 << GPA_BITS) - 1)
    cdef uint64_t size = info >> SIZE_SHIFT & NIBBLE
    cdef uint64_t kind = info >> KIND_SHIFT & NIBBLE
    cdef uint8_t op
    cdef uint64_t ip = s.ips[s.vcpu]
    if info >> (IO_SHIFT + 1) or kind > CR3:
        return False
    if gpa == (<uint64_t>1 << GPA_BITS) - 1:
        gpa = INVALID_GPA
    if kind == FETCH:
        if size == 0:
            return False
        s.ips[s.vcpu] = address
        if s.fetch:
            put(rows, OP_FETCH, address, access_of(OP_FETCH, address, address), size, address, gpa)
        return True
    if size > 6:                                            # 64 bytes
        return False
    if kind == VALUE:
        s.values += 1
        if size > 3 or gpa == INVALID_GPA or size < 3 and address >> (8 << size):
            return False
        if s.events and gpa & ((<uint64_t>1 << size) - 1) == 0:
            put_event(rows, OP_GUEST_WRITE, gpa, <uint8_t>(1 << size), address)
        return True
    if kind == CR3:
        s.cr3s += 1
        if s.events:
            put_event(rows, OP_MOV_CR3, 0, 1, address)
        return True
    op = OP_LOAD if kind == LOAD else OP_STORE
    if info >> IO_SHIFT & 1:
        op |= OP_MMIO_MASK
    put(rows, op, address, access_of(op, address, ip if ip else address), <uint64_t>1 << size, ip, gpa)
    return True
