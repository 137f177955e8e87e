"""One pass over the columns of a chunk that answers, for nearly all chunks, that no row of them breaks a rule."""

from libc.stdint cimport uint8_t, uint64_t

from kvmmu.arch._bits cimport (
    ACCESS_FETCH_MASK, ACCESS_PLAIN_MASK, ACCESS_WRITE_MASK, GPA_LIMIT, INVALID_GPA, OP_EVENT, OP_FETCH,
    OP_KIND_MASK, OP_LAST, OP_MMIO_MASK, OP_STORE,
)

cdef enum:
    BLOCK = 4096                    # rows that fit into the first-level cache


def scan(const uint8_t[::1] op, const uint8_t[::1] access, gpa):
    """Look at all rows of a chunk.

    Parameters
    ----------
    op, access : ndarray of uint8, shape (n,)
    gpa : ndarray of uint64, shape (n,), or None
        INVALID_GPA where none was recorded.

    Returns
    -------
    has_events : bool
    broken : bool
        Some op is unknown, or some access byte does not go with its op.
    unknown : bool
        Some access has no recorded address; always if gpa is None.
    beyond : bool
        Some access has a recorded address beyond 52 bits.
    """
    cdef const uint64_t[::1] addresses
    cdef size_t n = op.shape[0], start = 0, stop
    cdef int found = 0
    cdef bint events = False, broken = False, known = gpa is not None
    if access.shape[0] != op.shape[0]:
        raise ValueError(f"access has {access.shape[0]} rows, op has {op.shape[0]}")
    if known:
        addresses = gpa
        if addresses.shape[0] != op.shape[0]:
            raise ValueError(f"gpa has {addresses.shape[0]} rows, op has {op.shape[0]}")
    with nogil:
        while start < n:
            stop = min(start + BLOCK, n)
            scan_rows(&op[start], &access[start], stop - start, &events, &broken)
            if known:
                found |= scan_gpa(&op[start], &addresses[start], stop - start)
            start = stop
    return bool(events), bool(broken), not known or bool(found & 1), bool(found & 2)


cdef void scan_rows(const uint8_t *op, const uint8_t *access, size_t n, bint *events, bint *broken) noexcept nogil:
    cdef uint8_t asked, as_access, as_event, event, wrong = 0, seen = 0
    cdef uint8_t other = <uint8_t>~ACCESS_PLAIN_MASK
    cdef size_t i
    for i in range(n):
        # if op < OP_EVENT: wrong if its kind is 3, bit 3 is set, or WRITE and FETCH are not what the kind asks for
        # else: wrong if access is not 0 or the op is beyond the last
        event = <uint8_t>-<int>(op[i] >= OP_EVENT)
        asked = <uint8_t>(((access[i] & ACCESS_WRITE_MASK) != 0) * OP_STORE | ((access[i] & ACCESS_FETCH_MASK) != 0) * OP_FETCH)
        as_access = <uint8_t>((asked ^ (op[i] & OP_KIND_MASK)) | (access[i] & other) | (op[i] & ~(OP_KIND_MASK | OP_MMIO_MASK))
                              | ((op[i] & OP_KIND_MASK) == OP_KIND_MASK))
        as_event = <uint8_t>(access[i] | (op[i] > OP_LAST))
        wrong |= (as_access & ~event) | (as_event & event)
        seen |= event
    if seen:
        events[0] = True
    if wrong:
        broken[0] = True


cdef int scan_gpa(const uint8_t *op, const uint64_t *gpa, size_t n) noexcept nogil:
    """Return 1 if an access has none, 2 if an access has one beyond 52 bits."""
    cdef uint64_t seen = 0
    cdef int found = 0
    cdef size_t i
    for i in range(n):
        seen |= gpa[i]
    if seen < GPA_LIMIT:
        return 0
    for i in range(n):
        if gpa[i] >= GPA_LIMIT and op[i] < OP_EVENT:
            found |= 1 if gpa[i] == INVALID_GPA else 2
    return found
