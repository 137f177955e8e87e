"""Accesses as places: numbers of uses of a page, and offsets in the page.

A use is a linear page, the guest-physical address of its first byte, an op and an access byte. A row group of a trace has few
uses and many rows. `find_places()` makes the uses of given rows, `PlacedRows` the rows of given places. `addresses_of()` is for
those places of older files, of addresses alone.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import numpy as np

from kvmmu.arch._bits cimport GPA_LIMIT, INVALID_GPA, OP_EVENT, PAGE_SHIFT, PAGE_SIZE

from kvmmu.traces._rows import scan

MAX_USES = MAX_USE + 1

cdef enum:
    MAX_USE = (1 << 20) - 1
    OFFSET_MASK = PAGE_SIZE - 1
    OP_MASK = 0xFF                  # of a kind
    FEW = 512                       # rows that are done at a time
    FIRST_SLOTS = 1 << 12           # of the table that finds uses; it grows when half of it is taken


# Of the use of a page.
cdef struct page_use:
    uint64_t page
    uint64_t frame
    uint64_t kind                   # access byte in bits 15:8, op in bits 7:0


def find_places(const uint8_t[::1] op not None, const uint64_t[::1] addr not None, const uint8_t[::1] access not None,
                const uint64_t[::1] gpa not None):
    """Return the places of rows, and the uses of pages that they name.

    Parameters
    ----------
    op, access : ndarray of uint8, shape (n,)
    addr, gpa : ndarray of uint64, shape (n,)
        n is at most `MAX_USES`. gpa is INVALID_GPA where there is none.

    Returns
    -------
    place : ndarray of uint32, shape (n,)
        Number of the use in bits 31:12, offset in the page in bits 11:0.
    page, frame : ndarray of uint64, shape (uses,)
        What is added to an offset, modulo 2^64, to make the addresses: of a page, as a rule. INVALID_GPA: there is no gpa.
    page_op, page_access : ndarray of uint8, shape (uses,)
    """
    cdef size_t n = addr.shape[0], count = 0
    cdef page_use *uses
    for name, rows in (("op", op.shape[0]), ("access", access.shape[0]), ("gpa", gpa.shape[0])):
        if rows != n or n > MAX_USES:
            raise ValueError(f"{name}: want as many rows as addr has, at most {MAX_USES}; got {rows} and {n}")
    place = np.empty(n, np.uint32)
    cdef uint32_t[::1] places = place
    uses = <page_use *>malloc(max(n, 1) * sizeof(page_use))
    if uses is NULL:
        raise MemoryError
    try:
        if n:
            with nogil:
                count = find(&op[0], &addr[0], &access[0], &gpa[0], n, &places[0], uses)
            if count == 0:
                raise MemoryError
        found = np.empty((count, 3), np.uint64)
        if count:
            memcpy(<void *><size_t>found.ctypes.data, uses, count * sizeof(page_use))
    finally:
        free(uses)
    page, frame, kind = found.T
    return place, page.copy(), frame.copy(), kind.astype(np.uint8), (kind >> np.uint64(8)).astype(np.uint8)


cdef inline size_t slot_of(const page_use *use, size_t slots) noexcept nogil:
    cdef uint64_t mixed = ((use.page >> PAGE_SHIFT) * <uint64_t>0x9E3779B97F4A7C15 ^ use.frame * <uint64_t>0xC2B2AE3D27D4EB4F
                           ^ use.kind * <uint64_t>0x165667B19E3779F9)
    return (mixed ^ mixed >> 29) & (slots - 1)


cdef inline bint same(const page_use *use, const page_use *other) noexcept nogil:
    return use.page == other.page and use.frame == other.frame and use.kind == other.kind


cdef size_t find(const uint8_t *op, const uint64_t *addr, const uint8_t *access, const uint64_t *gpa, size_t n, uint32_t *place,
                 page_use *uses) noexcept nogil:
    """Return the number of uses; 0 if there is no memory."""
    cdef size_t slots = FIRST_SLOTS, count = 0, i, j, at, last = 0
    cdef uint32_t *table = <uint32_t *>calloc(slots, sizeof(uint32_t))        # one more than the number of a use; 0: none
    cdef uint32_t *grown
    cdef page_use use
    cdef uint64_t offset
    if table is NULL:
        return 0
    for i in range(n):
        offset = addr[i] & OFFSET_MASK
        use.page = addr[i] - offset
        use.frame = gpa[i] if gpa[i] == INVALID_GPA else gpa[i] - offset
        use.kind = <uint64_t>access[i] << 8 | op[i]
        if use.frame == INVALID_GPA and gpa[i] != INVALID_GPA:                # would be read as none: a use of this very byte
            offset, use.page, use.frame = 0, addr[i], gpa[i]
        if not (count and same(&use, &uses[last])):
            at = slot_of(&use, slots)
            while table[at] and not same(&use, &uses[table[at] - 1]):
                at = (at + 1) & (slots - 1)
            if table[at] == 0:
                if 2 * count >= slots:
                    grown = <uint32_t *>calloc(2 * slots, sizeof(uint32_t))
                    if grown is NULL:
                        free(table)
                        return 0
                    slots *= 2
                    free(table)
                    table = grown
                    for j in range(count):
                        at = slot_of(&uses[j], slots)
                        while table[at]:
                            at = (at + 1) & (slots - 1)
                        table[at] = <uint32_t>(j + 1)
                    at = slot_of(&use, slots)
                    while table[at]:
                        at = (at + 1) & (slots - 1)
                uses[count] = use
                count += 1
                table[at] = <uint32_t>count
            last = table[at] - 1
        place[i] = <uint32_t>(last << PAGE_SHIFT | offset)
    free(table)
    return count


def addresses_of(const uint32_t[::1] place not None, const uint64_t[::1] page not None, const uint64_t[::1] frame not None,
                 uint64_t[::1] addr not None, uint64_t[::1] gpa not None):
    """Make the addresses of places: what `find_places()` was given.

    Parameters
    ----------
    place : ndarray of uint32, shape (n,)
    page, frame : ndarray of uint64, shape (uses,)
    addr, gpa : ndarray of uint64, shape (n,)
        Where they go.

    Raises
    ------
    ValueError
        A place names a use that is not there; the message has its row. Or an array of another length.
    """
    cdef size_t n = place.shape[0], uses = page.shape[0], used, i
    cdef bint all_known = True
    for name, rows, wanted in (("frame", frame.shape[0], uses), ("addr", addr.shape[0], n), ("gpa", gpa.shape[0], n)):
        check_rows(name, rows, wanted)
    used = used_of(place, uses)
    if n == 0:
        return
    with nogil:
        for i in range(used):
            all_known &= frame[i] != INVALID_GPA
        expand(&place[0], &page[0], &frame[0], NULL, n, all_known, &addr[0], &gpa[0], NULL)


cdef class PlacedRows:
    """Rows that are places, and the uses of pages that these name.

    Parameters
    ----------
    place : ndarray of uint32, shape (n,)
    page, frame : ndarray of uint64, shape (uses,)
    page_op, page_access : ndarray of uint8, shape (uses,)
        As `find_places()` returns them.

    Attributes
    ----------
    all_known : bool
        No use is without a frame.
    legal : bool
        Whatever the places, op and access of a row are what the format allows, and accesses have recorded addresses.

    Raises
    ------
    ValueError
        As `addresses_of()`.
    """

    def __cinit__(self, const uint32_t[::1] place not None, const uint64_t[::1] page not None, const uint64_t[::1] frame not None,
                  page_op, page_access):
        cdef size_t uses = page.shape[0], i
        cdef uint64_t highest = 0, of_accesses = 0
        for name, rows in (("frame", frame.shape[0]), ("page_op", len(page_op)), ("page_access", len(page_access))):
            check_rows(name, rows, uses)
        used_of(place, uses)
        self.place, self.page, self.frame = place, page, frame
        self.kind = page_op | page_access.astype(np.uint16) << np.uint16(8)
        self.has_events, broken, *_ = scan(page_op, page_access, None)
        for i in range(uses):
            highest = max(highest, frame[i])
            if (self.kind[i] & OP_MASK) < OP_EVENT:
                of_accesses = max(of_accesses, frame[i])
        self.all_known = highest != INVALID_GPA
        self.legal = not broken and of_accesses <= GPA_LIMIT - PAGE_SIZE

    def __len__(self):
        return self.place.shape[0]

    def events(self):
        """Return the numbers of the rows that are events, and their op and addr."""
        cdef size_t n = self.place.shape[0] if self.has_events else 0, count = 0, start = 0, stop, i
        cdef const uint32_t *place
        cdef const uint8_t[::1] is_event = ((np.asarray(self.kind) & OP_MASK) >= OP_EVENT).view(np.uint8)
        cdef const uint8_t *of_use
        cdef uint32_t[::1] rows
        cdef uint8_t seen
        found = rows = np.empty(n, np.uint32)           # memory that nobody writes is none
        if n:
            place, of_use = &self.place[0], &is_event[0]
        with nogil:
            while start < n:
                stop, seen = min(start + FEW, n), 0
                for i in range(start, stop):
                    seen |= of_use[place[i] >> PAGE_SHIFT]
                if seen:
                    for i in range(start, stop):
                        if of_use[place[i] >> PAGE_SHIFT]:
                            rows[count] = <uint32_t>i
                            count += 1
                start = stop
        found = found[:count].copy()
        places = np.asarray(self.place)[found]
        uses = places >> PAGE_SHIFT
        return found, np.asarray(self.kind)[uses].astype(np.uint8), np.asarray(self.page)[uses] + (places & OFFSET_MASK)

    def put(self, uint8_t[::1] op not None, uint64_t[::1] addr not None, uint8_t[::1] access not None,
            uint64_t[::1] gpa not None):
        """Write the columns of all rows: what `find_places()` was given."""
        cdef size_t n = self.place.shape[0]
        for name, rows in (("op", op.shape[0]), ("addr", addr.shape[0]), ("access", access.shape[0]), ("gpa", gpa.shape[0])):
            check_rows(name, rows, n)
        if n:
            with nogil:
                self.fill(0, n, &op[0], &addr[0], &access[0], &gpa[0])

    cdef size_t fill(self, size_t first, size_t most, uint8_t *op, uint64_t *addr, uint8_t *access, uint64_t *gpa) noexcept nogil:
        cdef size_t rows = self.place.shape[0], n, start = 0, count, i
        cdef const uint32_t *place
        cdef const uint64_t *page
        cdef const uint64_t *frame
        cdef const uint16_t *kind
        cdef uint16_t kinds[FEW]
        if first >= rows:
            return 0
        n = min(rows - first, most)
        place, page, frame, kind = &self.place[first], &self.page[0], &self.frame[0], &self.kind[0]
        while start < n:
            count = min(n - start, <size_t>FEW)
            expand(&place[start], page, frame, kind, count, self.all_known, &addr[start], &gpa[start], kinds)
            for i in range(count):
                op[start + i] = <uint8_t>kinds[i]
            for i in range(count):
                access[start + i] = <uint8_t>(kinds[i] >> 8)
            start += count
        return n


cdef inline void expand(const uint32_t *place, const uint64_t *page, const uint64_t *frame, const uint16_t *kind, size_t n,
                        bint all_known, uint64_t *addr, uint64_t *gpa, uint16_t *kinds) noexcept nogil:
    """Write the addresses of places, and their kinds. IN kind, kinds: NULL: they have none"""
    cdef uint64_t offset, base
    cdef size_t i
    cdef uint32_t use
    for i in range(n):
        use, offset = place[i] >> PAGE_SHIFT, place[i] & OFFSET_MASK
        base = frame[use]
        addr[i] = page[use] + offset
        gpa[i] = base + offset if all_known or base != INVALID_GPA else <uint64_t>INVALID_GPA
        if kinds is not NULL:
            kinds[i] = kind[use]


cdef int check_rows(str name, size_t rows, size_t wanted) except -1:
    if rows != wanted:
        raise ValueError(f"{name}: want {wanted} rows, got {rows}")
    return 0


cdef size_t used_of(const uint32_t[::1] place, size_t uses) except? 0:
    """Return how many of the uses places may name: all up to the highest that they do name."""
    cdef size_t n = place.shape[0], i
    cdef uint32_t highest
    if n == 0:
        return 0
    highest = np.asarray(place).max()
    if (highest >> PAGE_SHIFT) >= uses:
        for i in range(n):
            if (place[i] >> PAGE_SHIFT) >= uses:
                raise ValueError(f"row {i}: place is {place[i]:#x}, of page {place[i] >> PAGE_SHIFT}; allowed is one of the "
                                 f"{uses} pages of the row group")
    return (highest >> PAGE_SHIFT) + 1
