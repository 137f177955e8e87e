"""ChampSim's and DynamoRIO's records to rows.

Each reader takes whole records, from a position on, until they end or the rows are full. Positions and lengths are checked
where Python calls; sizes of records are fixed.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmmu.arch._bits cimport GPA_LIMIT, INVALID_GPA, OP_FETCH, OP_LOAD, OP_STORE, PAGE_SHIFT, PAGE_SIZE
from kvmmu.traces._sink cimport (
    SLACK, Sink, access_of, is_full, map_free, map_get, map_init, map_set, put, put_row, row_sink, u64_map,
)


cdef inline uint64_t word_at(const uint8_t *p) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, p, 8)
    return value


cdef inline uint64_t half_at(const uint8_t *p) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, p, 2)
    return value


cdef int check_span(const uint8_t[::1] records, Py_ssize_t start, Py_ssize_t itemsize) except -1:
    """Raise ValueError unless whole records begin at `start`."""
    if not 0 <= start <= records.shape[0] or (records.shape[0] - start) % itemsize:
        raise ValueError(f"records of {itemsize} bytes from byte {start} of {records.shape[0]}: want whole ones")
    return 0


# ---- ChampSim ----------------------------------------------------------------------------------------------------------

def champsim(const uint8_t[::1] records, Py_ssize_t start, Sink sink, *, bint cloudsuite=False, bint fetch=True):
    """Read records of ChampSim: the fetch of an instruction, its loads, its stores.

    Parameters
    ----------
    records : bytes-like
        Whole records of 64 bytes, of 96 for CloudSuite.
    start : int
        Where to begin.
    sink : Sink

    Returns
    -------
    stop : int
        Where to go on.
    """
    cdef size_t itemsize = 96 if cloudsuite else 64
    cdef size_t stores = 24 if cloudsuite else 16           # where they begin
    cdef size_t loads = 56 if cloudsuite else 32
    cdef size_t place
    cdef const uint8_t *p
    cdef const uint8_t *end
    cdef uint64_t ip, addr
    cdef row_sink rows
    check_span(records, start, itemsize)
    if start == records.shape[0]:
        return start
    p = &records[start]
    end = p + (records.shape[0] - start)
    with nogil:
        rows = sink.rows
        while p < end and not is_full(&rows):
            ip = word_at(p)
            if fetch:
                put_row(&rows, OP_FETCH, ip, access_of(OP_FETCH, ip, ip), 1, ip, INVALID_GPA)
            for place in range(loads, loads + 32, 8):
                addr = word_at(p + place)
                if addr:
                    put_row(&rows, OP_LOAD, addr, access_of(OP_LOAD, addr, ip), 1, ip, INVALID_GPA)
            for place in range(stores, loads, 8):
                addr = word_at(p + place)
                if addr:
                    put_row(&rows, OP_STORE, addr, access_of(OP_STORE, addr, ip), 1, ip, INVALID_GPA)
            p += itemsize
        sink.rows = rows
    return p - &records[0]


# ---- DynamoRIO ---------------------------------------------------------------------------------------------------------

cdef enum:                          # types of entries
    READ = 0
    WRITE = 1
    PREFETCH = 2
    LAST_PREFETCH = 9
    INSTR = 10
    LAST_BRANCH = 16
    INSTR_BUNDLE = 17
    LAST_FLUSH = 21
    THREAD = 22
    THREAD_EXIT = 23
    PID = 24
    HEADER = 25
    FOOTER = 26
    HARDWARE_PREFETCH = 27
    MARKER = 28
    INSTR_NO_FETCH = 29
    INSTR_MAYBE_FETCH = 30
    INSTR_SYSENTER = 31
    LAST_OTHER_PREFETCH = 46
    ENCODING = 47
    INSTR_TAKEN_JUMP = 48
    INSTR_UNTAKEN_JUMP = 49

cdef enum:                          # markers
    TIMESTAMP = 2
    FILETYPE = 9
    VERSION = 12
    PHYSICAL_ADDRESS = 15
    PHYSICAL_ADDRESS_NOT_AVAILABLE = 16
    VIRTUAL_ADDRESS = 17
    MARKER_PAGE_SIZE = 18

cdef enum:
    CORE_SHARDED = 0x10000          # of a file's type: it has what one core ran, not what one thread did
    MAX_VCPUS = 65536

# The reasons for which a reading stops.
cdef enum:
    AT_END
    AT_FULL
    AT_TIMESTAMP
    AT_DAMAGE
    AT_MANY_THREADS
    AT_NO_MEMORY


cdef class Threads:
    """The processors of the threads of a trace, in order of appearance, and the pages whose frames were told."""

    cdef u64_map vcpus, frames
    cdef int page_shift

    def __cinit__(self):
        self.page_shift = PAGE_SHIFT
        if map_init(&self.vcpus) < 0 or map_init(&self.frames) < 0:
            raise MemoryError()

    def __dealloc__(self):
        map_free(&self.vcpus)
        map_free(&self.frames)

    def __len__(self):
        return self.vcpus.used + self.vcpus.has_zero


ctypedef struct drmemtrace_state:
    uint64_t pc                     # of the last instruction, 0 before the first
    uint64_t next_pc
    uint64_t physical               # of a marker whose virtual address has not come yet
    uint64_t page                   # the last page that was looked up, and its frame's address
    uint64_t frame
    uint64_t file_type
    uint64_t version
    uint64_t timestamp
    uint64_t prefetches
    uint64_t flushes
    uint64_t footers
    uint16_t vcpu
    bint core_sharded
    bint fetch


cdef class Drmemtrace:
    """A reader of the entries of one file.

    Parameters
    ----------
    threads : Threads
        Shared by the files of a trace.
    core : int
        The file's place among them: its processor, if it has what one core ran.

    Attributes
    ----------
    version, file_type, timestamp, prefetches, flushes, footers : int
    """

    cdef drmemtrace_state state
    cdef Threads threads
    cdef size_t width

    def __init__(self, Threads threads, *, int core=0, bint fetch=True, bint narrow=False):
        self.threads = threads
        self.width = 8 if narrow else 12
        self.state.vcpu = core
        self.state.fetch = fetch
        self.state.physical = self.state.page = self.state.frame = INVALID_GPA

    @property
    def version(self):
        return self.state.version

    @property
    def file_type(self):
        return self.state.file_type

    @property
    def timestamp(self):
        return self.state.timestamp

    @property
    def prefetches(self):
        return self.state.prefetches

    @property
    def flushes(self):
        return self.state.flushes

    @property
    def footers(self):
        return self.state.footers

    def run(self, const uint8_t[::1] records, Py_ssize_t start, Sink sink, bint to_timestamp=False):
        """Read entries.

        Parameters
        ----------
        records : bytes-like
            Whole entries.
        start : int
        sink : Sink
        to_timestamp : bool
            Stop behind a timestamp, whose value `timestamp` is then.

        Returns
        -------
        stop : int
            Where to go on, or where an entry is damaged.
        at_timestamp : bool
        reason : str or None
            What is wrong there.
        """
        cdef const uint8_t *p
        cdef int why
        check_span(records, start, self.width)
        if start == records.shape[0]:
            return start, False, None
        p = &records[start]
        sink.rows.vcpu_now = self.state.vcpu
        self.state.page = INVALID_GPA           # another file may have told another frame of it
        with nogil:
            why = read_entries(&self.state, self.threads, &p, p + (records.shape[0] - start), self.width, to_timestamp,
                               &sink.rows)
        reason = None
        if why == AT_DAMAGE:
            reason = f"has the type {int(half_at(p))}; the last that is known is {int(INSTR_UNTAKEN_JUMP)}"
        elif why == AT_MANY_THREADS:
            reason = f"is of one thread more than {MAX_VCPUS}, the processors that a trace may have"
        elif why == AT_NO_MEMORY:
            raise MemoryError("no memory for the frames of pages")
        return p - &records[0], why == AT_TIMESTAMP, reason


cdef inline uint64_t frame_of(drmemtrace_state *s, Threads threads, uint64_t addr) noexcept nogil:
    cdef uint64_t page
    if threads.frames.used == 0 and not threads.frames.has_zero:
        return INVALID_GPA
    page = addr >> threads.page_shift
    if page != s.page:
        s.page = page
        s.frame = map_get(&threads.frames, page, INVALID_GPA)
    if s.frame == INVALID_GPA:
        return INVALID_GPA
    return s.frame | (addr & ((<uint64_t>1 << threads.page_shift) - 1))


# One row. IN size: 0 in an entry is one byte.
cdef inline void put_entry(drmemtrace_state *s, Threads threads, row_sink *rows, uint8_t op, uint64_t addr,
                           uint64_t size) noexcept nogil:
    put(rows, op, addr, access_of(op, addr, s.pc if s.pc else addr), size if size else 1, s.pc, frame_of(s, threads, addr))


cdef int read_entries(drmemtrace_state *s, Threads threads, const uint8_t **place, const uint8_t *end, size_t width,
                      bint to_timestamp, row_sink *rows) noexcept nogil:
    cdef const uint8_t *p = place[0]
    cdef uint64_t kind, size, addr
    cdef uint32_t narrow
    cdef int result
    while p < end:
        if threads.frames.used == 0 and not threads.frames.has_zero:
            p = plain_entries(s, p, end, 12, rows) if width == 12 else plain_entries(s, p, end, 8, rows)
        if is_full(rows):
            place[0] = p
            return AT_FULL
        if p == end:
            break
        kind = half_at(p)
        size = half_at(p + 2)
        if width == 12:
            addr = word_at(p + 4)
        else:
            memcpy(&narrow, p + 4, 4)
            addr = narrow
        if kind <= WRITE:
            put_entry(s, threads, rows, OP_LOAD if kind == READ else OP_STORE, addr, size)
        elif is_fetched(kind):
            s.pc = addr
            s.next_pc = addr + size
            if s.fetch:
                put_entry(s, threads, rows, OP_FETCH, addr, size)
        elif kind != ENCODING:
            result = rare_entry(s, threads, rows, kind, size, addr, p + 4, width - 4)
            if result != AT_END and not (result == AT_TIMESTAMP and not to_timestamp):
                place[0] = p + width if result == AT_TIMESTAMP else p
                return result
        p += width
    place[0] = p
    return AT_END


cdef inline bint is_fetched(uint64_t kind) noexcept nogil:
    return kind >= INSTR and kind <= LAST_BRANCH or kind == INSTR_SYSENTER or kind == INSTR_TAKEN_JUMP \
        or kind == INSTR_UNTAKEN_JUMP


# Write the rows of accesses and instructions up to the first entry of another kind, or of more than 255 bytes, or until the rows
# are full. Guarantee: no frames are known. Nearly all entries of a trace go through here: no other function gets the address of
# a variable, so that all of them stay in registers, and columns of one value are filled behind the loop.
cdef inline const uint8_t *plain_entries(drmemtrace_state *s, const uint8_t *p, const uint8_t *end, size_t width,
                                         row_sink *rows) noexcept nogil:
    cdef uint8_t *ops = rows.op
    cdef uint8_t *accesses = rows.access
    cdef uint8_t *sizes = rows.size
    cdef uint64_t *addrs = rows.addr
    cdef uint64_t *ips = rows.ip
    cdef size_t n = rows.n, most = rows.capacity - SLACK
    cdef uint64_t kind, size, addr, pc = s.pc, next_pc = s.next_pc, seen = 0
    cdef uint32_t narrow
    cdef bint fetch = s.fetch
    cdef uint8_t op
    while p < end and n <= most:
        kind = half_at(p)
        size = half_at(p + 2)
        if width == 12:
            addr = word_at(p + 4)
        else:
            memcpy(&narrow, p + 4, 4)
            addr = narrow
        p += width
        if kind == ENCODING:
            continue
        if size > 255 or kind > WRITE and not is_fetched(kind):
            p -= width
            break
        op = <uint8_t>kind
        if kind > WRITE:
            op = OP_FETCH
            pc = addr
            next_pc = addr + size
            if not fetch:
                continue
        ops[n] = op
        addrs[n] = addr
        accesses[n] = access_of(op, addr, pc if pc else addr)
        sizes[n] = <uint8_t>(size if size else 1)
        ips[n] = pc
        seen |= pc
        n += 1
    s.pc, s.next_pc = pc, next_pc
    rows.ips_seen |= seen
    fill_rows(rows, n)
    return p


# Fill the columns that are the same in all rows up to n, and count these.
cdef void fill_rows(row_sink *rows, size_t n) noexcept nogil:
    cdef size_t i
    cdef uint16_t vcpu = rows.vcpu_now
    if n == rows.n:
        return
    if rows.vcpu != NULL:
        rows.vcpus_seen |= vcpu
        for i in range(rows.n, n):
            rows.vcpu[i] = vcpu
    if rows.gpa != NULL:
        for i in range(rows.n, n):
            rows.gpa[i] = INVALID_GPA
    if rows.value != NULL:
        for i in range(rows.n, n):
            rows.value[i] = 0
    rows.n = n


# An entry that is not an access, or a bundle of instructions. IN lengths: of the instructions, at most `most`.
cdef int rare_entry(drmemtrace_state *s, Threads threads, row_sink *rows, uint64_t kind, uint64_t size, uint64_t addr,
                    const uint8_t *lengths, size_t most) noexcept nogil:
    cdef size_t i
    if kind == MARKER:
        return marker(s, threads, rows, size, addr)
    if kind == THREAD:
        return enter_thread(s, threads, rows, addr)
    if kind == INSTR_NO_FETCH or kind == INSTR_MAYBE_FETCH:
        s.pc = addr
        s.next_pc = addr + size
    elif kind == INSTR_BUNDLE:
        if size > most:
            return AT_DAMAGE
        for i in range(size):
            s.pc = s.next_pc
            s.next_pc += lengths[i]
            if s.fetch:
                put_entry(s, threads, rows, OP_FETCH, s.pc, lengths[i])
    elif kind == HEADER:
        s.version = addr
    elif kind == FOOTER:
        s.footers += 1
    elif kind >= PREFETCH and kind <= LAST_PREFETCH or kind == HARDWARE_PREFETCH \
            or kind > INSTR_SYSENTER and kind <= LAST_OTHER_PREFETCH:
        s.prefetches += 1
    elif kind > INSTR_BUNDLE and kind <= LAST_FLUSH:
        s.flushes += 1
    elif kind != THREAD_EXIT and kind != PID:
        return AT_DAMAGE
    return AT_END


cdef int enter_thread(drmemtrace_state *s, Threads threads, row_sink *rows, uint64_t tid) noexcept nogil:
    cdef uint64_t vcpu
    cdef size_t known = threads.vcpus.used + threads.vcpus.has_zero
    if s.core_sharded:
        return AT_END
    vcpu = map_get(&threads.vcpus, tid, INVALID_GPA)
    if vcpu == INVALID_GPA:
        if known == MAX_VCPUS:
            return AT_MANY_THREADS
        vcpu = known
        if map_set(&threads.vcpus, tid, vcpu) < 0:
            return AT_NO_MEMORY
    s.vcpu = rows.vcpu_now = <uint16_t>vcpu
    return AT_END


cdef int marker(drmemtrace_state *s, Threads threads, row_sink *rows, uint64_t kind, uint64_t value) noexcept nogil:
    cdef uint64_t frame
    if kind == TIMESTAMP:
        s.timestamp = value
        return AT_TIMESTAMP
    if kind == FILETYPE:
        s.file_type = value
        if value & CORE_SHARDED and not s.core_sharded:
            s.core_sharded = True
    elif kind == VERSION:
        s.version = value
    elif kind == MARKER_PAGE_SIZE:
        if value >= PAGE_SIZE and value & (value - 1) == 0 and value < GPA_LIMIT and threads.frames.used == 0:
            threads.page_shift = PAGE_SHIFT
            while <uint64_t>1 << threads.page_shift < value:
                threads.page_shift += 1
    elif kind == PHYSICAL_ADDRESS:
        s.physical = value
    elif kind == VIRTUAL_ADDRESS or kind == PHYSICAL_ADDRESS_NOT_AVAILABLE:
        frame = INVALID_GPA
        if kind == VIRTUAL_ADDRESS and s.physical < GPA_LIMIT:
            frame = s.physical >> threads.page_shift << threads.page_shift
        s.physical = INVALID_GPA
        s.page = INVALID_GPA                # what was looked up may be this one
        if map_set(&threads.frames, value >> threads.page_shift, frame) < 0:
            return AT_NO_MEMORY
    return AT_END
