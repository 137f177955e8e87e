"""Samples of `perf script` and events of ftrace: lines of text to rows, by parsers of the kind of `_text`."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memchr, memcmp, memset

from kvmmu.arch._bits cimport (
    ACCESS_USER_MASK, GPA_LIMIT, INVALID_GPA, OP_FETCH, OP_LOAD, OP_MMIO_MASK, OP_STORE, PAGE_OFFSET_MASK, PAGE_SHIFT,
    PFERR_FETCH_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK,
)
from kvmmu.traces._sink cimport access_of, is_full, map_free, map_get, map_init, map_set, put, row_sink, u64_map
from kvmmu.traces._text cimport LineParser, next_line, read_decimal, read_pointer, skip_blanks

cdef enum:
    PARSED = 0
    BROKEN_LINE = 1
    NO_TEXT = 2
    MAX_NUMBERS = 8
    MAX_VCPU = 65535
    UNKNOWN_OP = 255
    QUALIFICATION_WRITE = 1 << 1    # of an exit qualification
    QUALIFICATION_FETCH = 1 << 2
    QUALIFICATION_ADDRESS = 1 << 7  # the linear address is valid: set in nearly all, and never in an error code


ctypedef struct word:
    const uint8_t *start
    const uint8_t *stop


# The next word of a line; False at the line's end.
cdef inline bint next_word(const uint8_t **p, word *w) noexcept nogil:
    cdef const uint8_t *q = skip_blanks(p[0])
    w.start = q
    while q[0] > b' ' or q[0] < b'\t':              # a blank, a tab, a carriage return or a line feed ends it
        q += 1
    w.stop = q
    p[0] = q
    return q > w.start


cdef inline bint is_word(const word *w, const char *text, size_t length) noexcept nogil:
    return <size_t>(w.stop - w.start) == length and memcmp(w.start, text, length) == 0


cdef inline bint ends_in_colon(const word *w) noexcept nogil:
    return w.stop - w.start > 1 and (w.stop - 1)[0] == b':'


cdef inline bint contains(const word *w, const char *text, size_t length) noexcept nogil:
    cdef const uint8_t *q = w.start
    while q + length <= w.stop:
        if memcmp(q, text, length) == 0:
            return True
        q += 1
    return False


# A whole word that is a number: hexadecimal digits, behind 0x or not.
cdef inline bint is_number(const word *w, uint64_t *value) noexcept nogil:
    cdef const uint8_t *q = w.start
    return read_pointer(&q, value) and q == w.stop


# The processor that stands in brackets: [003].
cdef inline bint is_processor(const word *w, uint64_t *cpu) noexcept nogil:
    cdef const uint8_t *q = w.start + 1
    return w.start[0] == b'[' and read_decimal(&q, cpu) and q[0] == b']' and q + 1 == w.stop


# ---- numbers of threads ------------------------------------------------------------------------------------------------

cdef class Tasks(LineParser):
    """A parser that knows threads as vCPUs."""

    cdef u64_map vcpus

    def __cinit__(self, **options):
        if map_init(&self.vcpus) < 0:
            raise MemoryError()

    def __dealloc__(self):
        map_free(&self.vcpus)


# The vCPU of a thread: in order of appearance; the last one for all behind 65,536.
cdef uint16_t vcpu_of(u64_map *vcpus, uint64_t tid) noexcept nogil:
    cdef uint64_t vcpu = map_get(vcpus, tid, INVALID_GPA)
    if vcpu == INVALID_GPA:
        vcpu = min(vcpus.used + vcpus.has_zero, <size_t>MAX_VCPU)
        map_set(vcpus, tid, vcpu)
    return <uint16_t>vcpu


# ---- perf script -------------------------------------------------------------------------------------------------------

cdef class PerfScript(Tasks):
    """`sort 4084 [001] 1053.881246: cpu/mem-loads/P: 5601a77ad548 ffffffff81775dda`: address, instruction, physical address.

    Parameters
    ----------
    weight, ip, phys : bool
        Fields that were printed; of two numbers the second is the physical address if ip is False.
    """

    cdef bint weight, ip, phys

    def __cinit__(self, *, bint weight=False, bint ip=True, bint phys=True, bint strict=False):
        self.weight, self.ip, self.phys = weight, ip, phys

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        cdef const uint8_t *line_end
        cdef sample s
        while p[0] < self.state.end and not is_full(rows):
            line_end = next_line(p[0], self.state.end) - 1
            if memchr(p[0], 0, line_end - p[0]) != NULL:
                return NO_TEXT
            if read_sample(p[0], &s):
                if s.count > 0 and s.numbers[0]:
                    self.put_sample(&s, rows)
                else:
                    self.state.skipped += 1
            elif self.state.strict and p[0][0] != b'#':         # perf's own
                return BROKEN_LINE
            else:
                self.state.skipped += 1
            p[0] = line_end + 1
            self.state.lines += 1
        return PARSED

    cdef void put_sample(self, const sample *s, row_sink *rows) noexcept nogil:
        cdef int place = s.source
        cdef uint64_t addr = s.numbers[0], ip = 0, gpa = INVALID_GPA
        cdef uint8_t op = s.op
        if self.weight:
            place += 1
        if self.ip and place < s.count:
            ip = s.numbers[place]
            place += 1
        if self.phys and place < s.count and s.numbers[place] and s.numbers[place] < GPA_LIMIT:
            gpa = s.numbers[place]
        if op == UNKNOWN_OP:
            op = OP_FETCH if ip == addr else OP_LOAD
        if s.has_cpu:
            rows.vcpu_now = <uint16_t>min(s.cpu, <uint64_t>MAX_VCPU)
        else:
            rows.vcpu_now = vcpu_of(&self.vcpus, s.tid) if s.has_tid else 0
        put(rows, op, addr, access_of(op, addr, ip if ip else addr), 1, ip, gpa)


ctypedef struct sample:
    uint64_t tid
    uint64_t cpu
    bint has_tid
    bint has_cpu
    uint8_t op
    int count
    int source                      # numbers before those that follow the address, and the data source if there is one
    uint64_t[MAX_NUMBERS] numbers


# True if a word is a time: 1053.881246:
cdef inline bint is_time(const word *w) noexcept nogil:
    cdef const uint8_t *q = w.start
    cdef bint dot = False
    if not ends_in_colon(w) or q[0] < b'0' or q[0] > b'9':
        return False
    while q < w.stop - 1:
        if q[0] == b'.' and not dot:
            dot = True
        elif q[0] < b'0' or q[0] > b'9':
            return False
        q += 1
    return dot


cdef bint has_time(const uint8_t *p) noexcept nogil:
    cdef word w
    while next_word(&p, &w):
        if is_time(&w):
            return True
    return False


# Read the words of a sample; False if the line is none. OUT s.
cdef bint read_sample(const uint8_t *p, sample *s) noexcept nogil:
    cdef word w
    cdef uint64_t value
    cdef const uint8_t *q
    cdef bint timed = has_time(p), passed = False, event = False
    memset(s, 0, sizeof(sample))
    s.op = UNKNOWN_OP
    s.source = 1
    while next_word(&p, &w):
        if is_processor(&w, &value):
            s.cpu, s.has_cpu = value, True
        elif is_time(&w):
            passed = True
        elif ends_in_colon(&w) and (passed or not timed):
            event = True
            break
        elif not passed:
            q = w.start
            if read_decimal(&q, &value):                # TID or PID/TID
                if q[0] == b'/':
                    q += 1
                    read_decimal(&q, &value)
                if q == w.stop:
                    s.tid, s.has_tid = value, True
    if not event:
        return False
    if contains(&w, "store", 5):
        s.op = OP_STORE
    elif contains(&w, "load", 4):
        s.op = OP_LOAD
    while next_word(&p, &w):
        if w.start[0] == b'|':
            if is_word(&w, "|OP", 3) and next_word(&p, &w):
                if contains(&w, "STORE", 5):
                    s.op = OP_STORE
                elif contains(&w, "LOAD", 4):
                    s.op = OP_LOAD
                elif contains(&w, "EXEC", 4):
                    s.op = OP_FETCH
            s.source = s.count                          # what follows stands behind the data source
            skip_source(&p)
        elif s.count < MAX_NUMBERS and is_number(&w, &value):
            s.numbers[s.count] = value
            s.count += 1
    return True


# Behind the last word of a line with a bar in it and the word after that, its value.
cdef void skip_source(const uint8_t **p) noexcept nogil:
    cdef const uint8_t *q = p[0]
    cdef word w
    while next_word(&q, &w):
        if memchr(w.start, b'|', w.stop - w.start) != NULL:
            p[0] = q
            next_word(p, &w)


# ---- ftrace ------------------------------------------------------------------------------------------------------------

cdef enum:                          # events
    PAGE_FAULT = 1
    PAGETABLE_WALK = 2
    FAST_PAGE_FAULT = 4
    MMIO_PAGE_FAULT = 8

EVENTS = {"kvm_page_fault": PAGE_FAULT, "kvm_mmu_pagetable_walk": PAGETABLE_WALK, "fast_page_fault": FAST_PAGE_FAULT,
          "handle_mmio_page_fault": MMIO_PAGE_FAULT}


ctypedef struct event:
    int kind
    uint64_t tid
    uint64_t vcpu
    uint64_t address
    uint64_t rip
    uint64_t error_code
    uint64_t gfn
    bint has_vcpu
    bint has_address
    bint has_rip
    bint has_error_code
    bint has_gfn
    bint letters                    # the error code was letters


cdef class Ftrace(Tasks):
    """`CPU 0/KVM-812 [001] 52.100: kvm_page_fault: vcpu 0 rip 0x.. address 0x.. error_code 0x..` and events of kvmmmu.

    Parameters
    ----------
    events : int
        Sum of EVENTS: those that are rows.
    shadow : bool
        Addresses of page faults are linear, not guest-physical.
    """

    cdef int events
    cdef bint shadow

    def __cinit__(self, *, int events=PAGE_FAULT, bint shadow=False, bint strict=False):
        self.events, self.shadow = events, shadow

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        cdef const uint8_t *line_end
        cdef event e
        while p[0] < self.state.end and not is_full(rows):
            line_end = next_line(p[0], self.state.end) - 1
            if memchr(p[0], 0, line_end - p[0]) != NULL:
                return NO_TEXT
            read_event(p[0], &e)
            if e.kind and e.has_vcpu:
                map_set(&self.vcpus, e.tid, min(e.vcpu, <uint64_t>MAX_VCPU))
            if not e.kind & self.events:
                if self.state.strict and not is_header(p[0]):
                    return BROKEN_LINE
                self.state.skipped += 1
            elif not e.has_address:
                return BROKEN_LINE
            else:
                self.put_event(&e, rows)
            p[0] = line_end + 1
            self.state.lines += 1
        return PARSED

    cdef void put_event(self, const event *e, row_sink *rows) noexcept nogil:
        cdef uint64_t gpa = INVALID_GPA
        cdef uint8_t op = op_of(e), access
        rows.vcpu_now = vcpu_of(&self.vcpus, e.tid)
        if e.has_gfn and e.gfn < GPA_LIMIT >> PAGE_SHIFT:
            gpa = e.gfn << PAGE_SHIFT | (e.address & PAGE_OFFSET_MASK)
        elif e.kind == PAGE_FAULT and not self.shadow and e.address < GPA_LIMIT:
            gpa = e.address
        if e.has_rip:
            access = access_of(op, e.address if gpa == INVALID_GPA else 0, e.rip)
        else:
            access = access_of(op, 0, 0)
            if not e.error_code & PFERR_USER_MASK:
                access &= ~<uint8_t>ACCESS_USER_MASK
        put(rows, op, e.address, access, 1, e.rip, gpa)


# The kind of access by an error code: of a #PF or #NPF, or VMX's exit qualification of an EPT violation.
cdef uint8_t op_of(const event *e) noexcept nogil:
    cdef uint8_t op = OP_LOAD
    if e.kind == PAGE_FAULT and e.error_code & QUALIFICATION_ADDRESS and e.error_code >> 32 == 0:
        if e.error_code & QUALIFICATION_FETCH:
            op = OP_FETCH
        elif e.error_code & QUALIFICATION_WRITE:
            op = OP_STORE
    elif e.error_code & PFERR_FETCH_MASK:
        op = OP_FETCH
    elif e.error_code & PFERR_WRITE_MASK:
        op = OP_STORE
    return op | OP_MMIO_MASK if e.kind == MMIO_PAGE_FAULT else op


# Which event a word such as kvm_page_fault: or kvmmmu:fast_page_fault: names, 0 for others.
cdef int event_of(const word *w) noexcept nogil:
    cdef word name = w[0]
    cdef const uint8_t *q
    name.stop -= 1
    q = <const uint8_t *>memchr(name.start, b':', name.stop - name.start)
    if q != NULL:
        name.start = q + 1
    if is_word(&name, "kvm_page_fault", 14):
        return PAGE_FAULT
    if is_word(&name, "kvm_mmu_pagetable_walk", 22):
        return PAGETABLE_WALK
    if is_word(&name, "fast_page_fault", 15):
        return FAST_PAGE_FAULT
    if is_word(&name, "handle_mmio_page_fault", 22):
        return MMIO_PAGE_FAULT
    return 0


# True if ftrace or trace-cmd wrote a line of its own: a comment, or the number of processors. The line ends with a line feed.
cdef bint is_header(const uint8_t *p) noexcept nogil:
    cdef const char *processors = "cpus="
    cdef size_t i = 0
    if p[0] == b'#':
        return True
    while i < 5 and p[i] == <uint8_t>processors[i]:
        i += 1
    return i == 5


cdef void read_event(const uint8_t *p, event *e) noexcept nogil:
    cdef word w
    cdef word before
    cdef uint64_t value = 0
    memset(e, 0, sizeof(event))
    memset(&before, 0, sizeof(word))
    while next_word(&p, &w):
        if is_processor(&w, &value):
            e.tid = task_of(&before)
        elif ends_in_colon(&w):
            e.kind = event_of(&w)
            if e.kind:
                break
        before = w
    if not e.kind:
        return
    while next_word(&p, &w):
        if w.stop - w.start > 5 and memcmp(w.start, "addr:", 5) == 0:
            w.start += 5
            e.has_address = is_number(&w, &e.address)
        elif is_word(&w, "vcpu", 4):
            e.has_vcpu = next_word(&p, &w) and read_all_decimal(&w, &e.vcpu)
        elif is_word(&w, "rip", 3):
            e.has_rip = next_word(&p, &w) and is_number(&w, &e.rip)
        elif is_word(&w, "address", 7) or is_word(&w, "addr", 4) or is_word(&w, "gva", 3):
            e.has_address = next_word(&p, &w) and is_number(&w, &e.address)
        elif is_word(&w, "gfn", 3):
            e.has_gfn = next_word(&p, &w) and is_number(&w, &e.gfn)
        elif is_word(&w, "pferr", 5):
            e.has_error_code = next_word(&p, &w) and is_number(&w, &e.error_code)
        elif is_word(&w, "error_code", 10) and next_word(&p, &w):
            if e.kind == FAST_PAGE_FAULT:
                e.error_code = letters_of(&w)
            else:
                is_number(&w, &e.error_code)


cdef inline bint read_all_decimal(const word *w, uint64_t *value) noexcept nogil:
    cdef const uint8_t *q = w.start
    return read_decimal(&q, value) and q == w.stop


# The error code of P|W|U|RSVD|F.
cdef uint64_t letters_of(const word *w) noexcept nogil:
    cdef uint64_t code = 0
    cdef const uint8_t *q = w.start
    while q < w.stop:
        if q == w.start or (q - 1)[0] == b'|':
            if q[0] == b'W':
                code |= PFERR_WRITE_MASK
            elif q[0] == b'U':
                code |= PFERR_USER_MASK
            elif q[0] == b'F':
                code |= PFERR_FETCH_MASK
        q += 1
    return code


# The thread in a task such as KVM-812 or in a word that is its number.
cdef uint64_t task_of(const word *w) noexcept nogil:
    cdef const uint8_t *q = w.stop
    cdef uint64_t tid = 0
    if w.start == NULL:
        return 0
    while q > w.start and (q - 1)[0] >= b'0' and (q - 1)[0] <= b'9':
        q -= 1
    read_decimal(&q, &tid)
    return tid
