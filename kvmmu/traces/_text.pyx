"""Valgrind's lackey, Pin's pinatrace and QEMU's execlog: lines of text to rows.

Each parser takes whole lines, from a position on, until they end or the rows are full. The text ends with a line feed and
has no other end: a parser that reads bytes one after the other and stops at a line feed stays inside it.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memchr

from kvmmu.arch._bits cimport INVALID_GPA, OP_FETCH, OP_LOAD, OP_MMIO_MASK, OP_STORE
from kvmmu.traces._sink cimport Sink, access_of, is_full, put, row_sink

cdef enum:
    MAX_SIZE = 65535

cdef enum:
    PARSED
    BROKEN_LINE                     # begins like a row and is none
    NO_TEXT                         # has a NUL

REASONS = {BROKEN_LINE: "is no row of this format", NO_TEXT: "is no text: it has a byte of 0"}


cdef void fill_digits() noexcept nogil:
    cdef const char *digits = "0123456789abcdef0123456789ABCDEF"
    cdef int i
    for i in range(256):
        HEX[i] = 255
    for i in range(32):
        HEX[<uint8_t>digits[i]] = i & 15


fill_digits()


cdef class LineParser:
    """The state that a parser keeps from one block of text to the next.

    Attributes
    ----------
    line : int
        Of the next line, from 1.
    skipped : int
        Lines that are not rows.
    """

    def __cinit__(self, *, bint fetch=True, bint strict=False, **_of_subclass):
        self.state.fetch, self.state.strict = fetch, strict

    @property
    def line(self):
        return self.state.lines + 1

    @property
    def skipped(self):
        return self.state.skipped

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        return BROKEN_LINE

    def run(self, const uint8_t[::1] text, Py_ssize_t start, Sink sink):
        """Read lines until they end, the rows are full, or a line is broken.

        Parameters
        ----------
        text : bytes-like
            Whole lines; the last byte is a line feed.
        start : int
            Where to begin.
        sink : Sink

        Returns
        -------
        stop : int
            Where to go on, or where the broken line begins.
        reason : str or None
            What is wrong with that line.
        """
        cdef const uint8_t *p
        cdef const uint8_t *first
        cdef int result
        if text.shape[0] == 0 or text[text.shape[0] - 1] != b'\n' or not 0 <= start < text.shape[0]:
            raise ValueError(f"text of {text.shape[0]} bytes from {start}: want some that ends with a line feed")
        first = &text[0]
        p = first + start
        self.state.end = first + text.shape[0]
        with nogil:
            result = self.parse(&p, &sink.rows)
        return p - first, REASONS.get(result)


# A line that is not a row is passed over, unless every line shall be one and it is not of the tracer itself. OUT p: behind it.
cdef int skip_line(text_state *s, const uint8_t **p, bint of_tracer) noexcept nogil:
    cdef const uint8_t *following = next_line(p[0], s.end)
    if memchr(p[0], 0, following - p[0]) != NULL:
        return NO_TEXT
    if s.strict and not of_tracer:
        return BROKEN_LINE
    p[0] = following
    s.lines += 1
    s.skipped += 1
    return PARSED


# ---- lackey ------------------------------------------------------------------------------------------------------------

cdef class Lackey(LineParser):
    """`I  0401ab70,3`, ` L 1fff000778,8`, ` S ...`, ` M ...`: the address is hexadecimal, the size decimal."""

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        return parse_lackey(&self.state, p, rows)


# True if Valgrind wrote a line: "==19857== ", "--19857-- " or "**19857** ", with a time before the PID if it was asked for.
cdef bint is_valgrind_line(const uint8_t *q) noexcept nogil:
    cdef uint8_t mark = q[0]
    if (mark != b'=' and mark != b'-' and mark != b'*') or q[1] != mark:
        return False
    q += 2
    if q[0] < b'0' or q[0] > b'9':
        return False
    while b'0' <= q[0] <= b'9' or q[0] == b':' or q[0] == b'.' or q[0] == b' ':
        q += 1
    return q[0] == mark and q[1] == mark


cdef int parse_lackey(text_state *s, const uint8_t **p, row_sink *rows) noexcept nogil:
    cdef const uint8_t *q
    cdef uint64_t addr, size
    cdef uint8_t kind
    cdef int result
    while p[0] < s.end and not is_full(rows):
        q = p[0]
        if q[0] == b' ' and (q[1] == b'L' or q[1] == b'S' or q[1] == b'M') and q[2] == b' ':
            kind = q[1]
        elif q[0] == b'I' and q[1] == b' ' and q[2] == b' ':
            kind = b'I'
        else:
            result = skip_line(s, p, is_valgrind_line(q))
            if result != PARSED:
                return result
            continue
        q += 3
        if not read_hex(&q, &addr) or q[0] != b',':
            return BROKEN_LINE
        q += 1
        if not read_decimal(&q, &size) or size == 0 or size > MAX_SIZE or not read_end(&q):
            return BROKEN_LINE
        if kind == b'I':
            s.ip = addr
            if s.fetch:
                put(rows, OP_FETCH, addr, access_of(OP_FETCH, 0, 0), size, addr, INVALID_GPA)
        else:
            if kind != b'S':
                put(rows, OP_LOAD, addr, access_of(OP_LOAD, 0, 0), size, s.ip, INVALID_GPA)
            if kind != b'L':
                put(rows, OP_STORE, addr, access_of(OP_STORE, 0, 0), size, s.ip, INVALID_GPA)
        p[0] = q
        s.lines += 1
    return PARSED


# ---- pinatrace ---------------------------------------------------------------------------------------------------------

cdef class Pinatrace(LineParser):
    """`0x7f1c: R 0x7ffd [SIZE [VALUE]]`, W for stores. Lines that begin with # are passed over."""

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        return parse_pinatrace(&self.state, p, rows)


cdef int parse_pinatrace(text_state *s, const uint8_t **p, row_sink *rows) noexcept nogil:
    cdef const uint8_t *q
    cdef uint64_t ip, addr, size
    cdef uint8_t op
    while p[0] < s.end and not is_full(rows):
        q = skip_blanks(p[0])
        if q[0] == b'#' or q[0] == b'\n' or q[0] == b'\r':
            p[0] = next_line(q, s.end)
            s.lines += 1
            s.skipped += 1
            continue
        if not read_pointer(&q, &ip):
            return BROKEN_LINE
        if q[0] == b':':
            q += 1
        q = skip_blanks(q)
        if q[0] == b'R' or q[0] == b'L':
            op = OP_LOAD
        elif q[0] == b'W' or q[0] == b'S':
            op = OP_STORE
        else:
            return BROKEN_LINE
        if q[1] != b' ' and q[1] != b'\t':
            return BROKEN_LINE
        q = skip_blanks(q + 1)
        if not read_pointer(&q, &addr):
            return BROKEN_LINE
        size = 1
        if q[0] == b' ' or q[0] == b'\t':
            q = skip_blanks(q)
            if q[0] >= b'0' and q[0] <= b'9' and not (q[0] == b'0' and (q[1] | 0x20) == b'x'):
                if not read_decimal(&q, &size) or size == 0 or size > MAX_SIZE:
                    return BROKEN_LINE
            if q[0] == b' ' or q[0] == b'\t' or HEX[q[0]] < 16 or q[0] == b'-':
                q = next_line(q, s.end) - 1             # the value
        if not read_end(&q):
            return BROKEN_LINE
        put(rows, op, addr, access_of(op, 0, 0), size, ip, INVALID_GPA)
        p[0] = q
        s.lines += 1
    return PARSED


# ---- execlog -----------------------------------------------------------------------------------------------------------

cdef class Execlog(LineParser):
    """`0, 0x40101c, 0x8b48, "movq (%rax), %rbx", load, 0x7ffd`: a processor, an instruction, and what it accessed.

    Under system emulation addresses of data are physical, and the name of a device follows each.
    """

    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil:
        return parse_execlog(&self.state, p, rows)


# Behind ", ".
cdef inline bint read_comma(const uint8_t **p) noexcept nogil:
    if p[0][0] != b',' or p[0][1] != b' ':
        return False
    p[0] += 2
    return True


# The kind of ", load, 0x" or ", store, 0x" at q, 3 if there is none. OUT q: at the address.
cdef inline uint8_t data_access(const uint8_t **p) noexcept nogil:
    cdef const uint8_t *q = p[0]
    cdef uint8_t op
    if q[0] != b',' or q[1] != b' ':
        return 3
    if q[2] == b'l' and q[3] == b'o' and q[4] == b'a' and q[5] == b'd':
        op = OP_LOAD
        q += 6
    elif q[2] == b's' and q[3] == b't' and q[4] == b'o' and q[5] == b'r' and q[6] == b'e':
        op = OP_STORE
        q += 7
    else:
        return 3
    if q[0] != b',' or q[1] != b' ' or q[2] != b'0' or q[3] != b'x':
        return 3
    p[0] = q + 2
    return op


cdef int parse_execlog(text_state *s, const uint8_t **p, row_sink *rows) noexcept nogil:
    cdef const uint8_t *q
    cdef const uint8_t *line_end
    cdef uint64_t vcpu, ip, opcode, addr
    cdef uint8_t op, following
    cdef bint physical
    cdef size_t n
    cdef int result
    while p[0] < s.end and not is_full(rows):
        q = p[0]
        if q[0] < b'0' or q[0] > b'9':
            result = skip_line(s, p, False)
            if result != PARSED:
                return result
            continue
        line_end = next_line(q, s.end) - 1
        if not read_decimal(&q, &vcpu) or vcpu > MAX_SIZE or not read_comma(&q) or not read_pointer(&q, &ip) \
                or not read_comma(&q) or not read_pointer(&q, &opcode) or not read_comma(&q) or q[0] != b'"':
            return BROKEN_LINE
        q = <const uint8_t *>memchr(q + 1, b'"', line_end - q)
        if q == NULL:
            return BROKEN_LINE
        q += 1
        n = rows.n
        rows.vcpu_now = <uint16_t>vcpu
        if s.fetch:
            put(rows, OP_FETCH, ip, access_of(OP_FETCH, ip, ip), 1, ip, INVALID_GPA)
        while q < line_end and not is_full(rows):
            op = data_access(&q)
            if op == 3:
                if q[0] != b',' and q[0] != b'\r':
                    rows.n = n
                    return BROKEN_LINE
                q += 1                                  # registers, of later versions
                while q < line_end and q[0] != b',':
                    q += 1
                continue
            if not read_pointer(&q, &addr):
                rows.n = n
                return BROKEN_LINE
            # a device's name may follow: text that is neither the next access nor a register
            physical = False
            if q[0] == b',' and q[1] == b' ' and not is_register(q + 2, line_end):
                following = data_access(&q)
                if following != 3:
                    q -= 8 if following == OP_LOAD else 9
                else:
                    physical = True
                    if not (q[2] == b'R' and q[3] == b'A' and q[4] == b'M' and (q[5] == b',' or q[5] == b'\r' or q[5] == b'\n')):
                        op |= OP_MMIO_MASK
                    q += 2
                    while q < line_end and q[0] != b',':
                        q += 1
            if physical:
                put(rows, op, addr, access_of(op, 0, ip), 1, ip, addr)
            else:
                put(rows, op, addr, access_of(op, addr, ip), 1, ip, INVALID_GPA)
        if q < line_end:                                # one line with more accesses than a chunk has rows
            rows.n = n
            return BROKEN_LINE if n == 0 else PARSED
        p[0] = line_end + 1
        s.lines += 1
    return PARSED


# True if "NAME -> 0x" stands before the next comma.
cdef inline bint is_register(const uint8_t *q, const uint8_t *line_end) noexcept nogil:
    while q + 1 < line_end and q[0] != b',':
        if q[0] == b'-' and q[1] == b'>':
            return True
        q += 1
    return False
