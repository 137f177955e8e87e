"""Records of kvmmu's plugin for QEMU to rows. Headers of blocks and records have 16 bytes both."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, ACCESS_USER_MASK, INVALID_GPA, OP_FETCH, OP_GUEST_WRITE, OP_LOAD, OP_MMIO_MASK, OP_MOV_CR0, OP_MOV_CR3,
    OP_MOV_CR4, OP_STORE, OP_WRMSR_EFER, PAGE_SHIFT,
)
from kvmmu.traces._binary cimport check_span
from kvmmu.traces._sink cimport Sink, access_of, is_full, kind_of, put, put_event, row_sink

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
    CR0
    CR4
    EFER
    CPL                             # and EFLAGS.AC

cdef enum:
    CPL_MASK = 3                    # of a record of CPL
    AC_SHIFT = 18
    KNOWN = 1 << 7                  # of what is remembered of it: CPL in the low bits, and
    HAS_AC = 1 << 2

cdef enum:                          # why a reading stopped
    AT_END
    AT_FULL
    NO_BLOCK
    NO_RECORD

REASONS = {NO_BLOCK: "is not the header of a block", NO_RECORD: "is a record of a kind or size that is not known"}


ctypedef struct qemu_state:
    uint64_t *ips                   # of the last fetch of each vCPU
    uint8_t *privileges             # of each vCPU: 0, or KNOWN with CPL and HAS_AC
    uint32_t left                   # records of the block
    uint16_t vcpu
    bint fetch
    bint events
    bint has_fetches
    uint64_t values
    uint64_t registers
    uint64_t cut


cdef class QemuRecords:
    """A reader of blocks and records.

    Attributes
    ----------
    left : int
        Records of the last block that have not come yet.
    values, registers : int
        Records of values of stores, and of CR0, CR3, CR4 and EFER.
    cut : int
        Values of stores that reach into the next page, where nothing tells of its address.
    """

    cdef qemu_state state

    def __cinit__(self, *, bint fetch=True, bint events=False):
        self.state.fetch, self.state.events = fetch, events
        self.state.ips = <uint64_t *>calloc(MAX_BLOCK, sizeof(uint64_t))
        self.state.privileges = <uint8_t *>calloc(MAX_BLOCK, sizeof(uint8_t))
        if self.state.ips == NULL or self.state.privileges == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.state.ips)
        free(self.state.privileges)

    @property
    def left(self):
        return self.state.left

    @property
    def values(self):
        return self.state.values

    @property
    def registers(self):
        return self.state.registers

    @property
    def cut(self):
        return self.state.cut

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
    """False if it is none."""
    cdef uint64_t gpa = info & ((<uint64_t>1 << GPA_BITS) - 1)
    cdef uint64_t size = info >> SIZE_SHIFT & NIBBLE
    cdef uint64_t kind = info >> KIND_SHIFT & NIBBLE
    cdef uint64_t ip = s.ips[s.vcpu]
    cdef uint8_t op
    if info >> (IO_SHIFT + 1):
        return False
    if gpa == (<uint64_t>1 << GPA_BITS) - 1:
        gpa = INVALID_GPA
    if kind == FETCH:
        if size == 0:
            return False
        s.ips[s.vcpu] = address
        if s.fetch:
            put(rows, OP_FETCH, address, access_at(s, OP_FETCH, address, address), size, address, gpa)
        return True
    if size > 6:                                            # 64 bytes
        return False
    if kind == VALUE:
        return put_value(s, rows, address, gpa, size)
    if kind > VALUE:
        return put_register(s, rows, kind, address)
    op = OP_LOAD if kind == LOAD else OP_STORE
    if info >> IO_SHIFT & 1:
        op |= OP_MMIO_MASK
    put(rows, op, address, access_at(s, op, address, ip if ip else address), <uint64_t>1 << size, ip, gpa)
    return True


cdef inline uint8_t access_at(qemu_state *s, uint8_t op, uint64_t addr, uint64_t who) noexcept nogil:
    """Return the access byte by the privilege level of the vCPU, if it is known."""
    cdef uint8_t privilege = s.privileges[s.vcpu], access
    if not privilege:
        return access_of(op, addr, who)
    access = kind_of(op)
    if privilege & CPL_MASK != CPL_MASK:
        return access | ACCESS_AC_MASK if privilege & HAS_AC else access
    # a user's instruction that loads a descriptor, for example, reaches the upper half as a supervisor
    return access | ACCESS_AC_MASK if addr >> 63 else access | ACCESS_USER_MASK


cdef bint put_value(qemu_state *s, row_sink *rows, uint64_t value, uint64_t gpa, uint64_t log) noexcept nogil:
    cdef uint64_t size = <uint64_t>1 << log, i
    s.values += 1
    if log > 3 or gpa == INVALID_GPA or log < 3 and value >> (8 << log):
        return False
    if not s.events:
        return True
    if gpa & (size - 1) == 0:
        put_event(rows, OP_GUEST_WRITE, gpa, <uint8_t>size, value)
        return True
    for i in range(size):
        if gpa >> PAGE_SHIFT != (gpa + i) >> PAGE_SHIFT:
            s.cut += 1
            break
        put_event(rows, OP_GUEST_WRITE, gpa + i, 1, value >> (8 * i) & 0xFF)
    return True


cdef bint put_register(qemu_state *s, row_sink *rows, uint64_t kind, uint64_t value) noexcept nogil:
    cdef uint8_t op
    if kind == CPL:
        if value & ~(CPL_MASK | <uint64_t>1 << AC_SHIFT):
            return False
        s.privileges[s.vcpu] = <uint8_t>(KNOWN | (value & CPL_MASK) | (HAS_AC if value >> AC_SHIFT else 0))
        return True
    if kind == CR3:
        op = OP_MOV_CR3
    elif kind == CR0:
        op = OP_MOV_CR0
    elif kind == CR4:
        op = OP_MOV_CR4
    elif kind == EFER:
        op = OP_WRMSR_EFER
    else:
        return False
    s.registers += 1
    if s.events:
        put_event(rows, op, 0, 1, value)
    return True
