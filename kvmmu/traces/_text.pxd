"""Tokens of text: numbers, words and ends of lines. Every text ends with a line feed, which ends every token."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memchr

from kvmmu.traces._sink cimport row_sink

ctypedef struct text_state:
    const uint8_t *end
    size_t lines                    # that were read
    size_t skipped                  # of them, those that are not rows
    uint64_t ip                     # of the last instruction
    bint fetch                      # rows of instruction fetches are wanted
    bint strict                     # every line shall be a row


cdef class LineParser:
    cdef text_state state

    # Read lines from *p on, until they end or the rows are full. Returns 0, or a key of REASONS with *p at the broken line.
    cdef int parse(self, const uint8_t **p, row_sink *rows) noexcept nogil


cdef uint8_t[256] HEX               # the value of a hexadecimal digit, 255 of any other byte


# Each moves *p behind what it read and returns 1, or returns 0 and leaves *p where it cannot go on.

# Hexadecimal digits, 1 to 16 of them behind leading zeros.
cdef inline bint read_hex(const uint8_t **p, uint64_t *value) noexcept nogil:
    cdef const uint8_t *q = p[0]
    cdef const uint8_t *start
    cdef uint64_t number = 0
    if HEX[q[0]] > 15:
        return False
    while q[0] == b'0':
        q += 1
    start = q
    while HEX[q[0]] < 16:
        number = number << 4 | HEX[q[0]]
        q += 1
    if q - start > 16:
        return False
    p[0] = q
    value[0] = number
    return True


# Hexadecimal digits behind 0x, which may be left out; "(nil)", which glibc prints for a pointer that is 0, is 0.
cdef inline bint read_pointer(const uint8_t **p, uint64_t *value) noexcept nogil:
    cdef const uint8_t *q = p[0]
    if q[0] == b'0' and (q[1] | 0x20) == b'x':
        q += 2
    elif q[0] == b'(' and q[1] == b'n' and q[2] == b'i' and q[3] == b'l' and q[4] == b')':
        p[0] = q + 5
        value[0] = 0
        return True
    if not read_hex(&q, value):
        return False
    p[0] = q
    return True


# Decimal digits, 1 to 9 of them.
cdef inline bint read_decimal(const uint8_t **p, uint64_t *value) noexcept nogil:
    cdef const uint8_t *q = p[0]
    cdef uint64_t number = 0
    while q[0] >= b'0' and q[0] <= b'9' and q - p[0] < 10:
        number = number * 10 + HEX[q[0]]
        q += 1
    if q == p[0] or q - p[0] > 9:
        return False
    p[0] = q
    value[0] = number
    return True


cdef inline const uint8_t *skip_blanks(const uint8_t *p) noexcept nogil:
    while p[0] == b' ' or p[0] == b'\t':
        p += 1
    return p


# Behind the next line feed. Guarantee: there is one before `end`.
cdef inline const uint8_t *next_line(const uint8_t *p, const uint8_t *end) noexcept nogil:
    return <const uint8_t *>memchr(p, b'\n', end - p) + 1


# The end of a line: a line feed, with a carriage return before it or not.
cdef inline bint read_end(const uint8_t **p) noexcept nogil:
    cdef const uint8_t *q = p[0]
    if q[0] == b'\r':
        q += 1
    if q[0] != b'\n':
        return False
    p[0] = q + 1
    return True
