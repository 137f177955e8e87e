"""Addresses of rows as places: numbers of pairs (linear page, guest-physical address of its first byte), and offsets in the page.

A row group of a trace has few pairs and many rows. `find_places()` makes the pairs of given addresses, `addresses_of()` the
addresses of given places.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import numpy as np

from kvmmu.arch._bits cimport INVALID_GPA, PAGE_SHIFT, PAGE_SIZE

MAX_PAIRS = MAX_PAIR + 1

cdef enum:
    MAX_PAIR = (1 << 20) - 1
    OFFSET_MASK = PAGE_SIZE - 1
    FIRST_SLOTS = 1 << 12           # of the table that finds pairs; it grows when half of it is taken


def find_places(const uint64_t[::1] addr not None, const uint64_t[::1] gpa not None):
    """Return the places of addresses, and their pairs.

    Parameters
    ----------
    addr, gpa : ndarray of uint64, shape (n,)
        n is at most `MAX_PAIRS`. gpa is INVALID_GPA where there is none.

    Returns
    -------
    place : ndarray of uint32, shape (n,)
        Number of the pair in bits 31:12, offset in the page in bits 11:0.
    page, frame : ndarray of uint64, shape (pairs,)
        What is added to an offset, modulo 2^64, to make the addresses: of a page, as a rule. INVALID_GPA: there is no gpa.
    """
    cdef size_t n = addr.shape[0], pairs = 0
    if <size_t>gpa.shape[0] != n or n > MAX_PAIRS:
        raise ValueError(f"gpa: want as many rows as addr has, at most {MAX_PAIRS}; got {gpa.shape[0]} and {n}")
    place, page, frame = np.empty(n, np.uint32), np.empty(n, np.uint64), np.empty(n, np.uint64)
    cdef uint32_t[::1] places = place
    cdef uint64_t[::1] pages = page, frames = frame
    if n:
        with nogil:
            pairs = find(&addr[0], &gpa[0], n, &places[0], &pages[0], &frames[0])
        if pairs == 0:
            raise MemoryError
    return place, page[:pairs].copy(), frame[:pairs].copy()


cdef inline size_t slot_of(uint64_t page, uint64_t frame, size_t slots) noexcept nogil:
    cdef uint64_t mixed = (page >> PAGE_SHIFT) * <uint64_t>0x9E3779B97F4A7C15 ^ frame * <uint64_t>0xC2B2AE3D27D4EB4F
    return (mixed ^ mixed >> 29) & (slots - 1)


cdef size_t find(const uint64_t *addr, const uint64_t *gpa, size_t n, uint32_t *place, uint64_t *page,
                 uint64_t *frame) noexcept nogil:
    """Return the number of pairs; 0 if there is no memory."""
    cdef size_t slots = FIRST_SLOTS, pairs = 0, i, j, at, last = 0
    cdef uint32_t *table = <uint32_t *>calloc(slots, sizeof(uint32_t))        # one more than the number of a pair; 0: none
    cdef uint32_t *grown
    cdef uint64_t offset, first, base
    if table is NULL:
        return 0
    for i in range(n):
        offset = addr[i] & OFFSET_MASK
        first = addr[i] - offset
        base = gpa[i] if gpa[i] == INVALID_GPA else gpa[i] - offset
        if base == INVALID_GPA and gpa[i] != INVALID_GPA:                     # would be read as none: a pair for this very byte
            offset, first, base = 0, addr[i], gpa[i]
        if not (pairs and page[last] == first and frame[last] == base):
            at = slot_of(first, base, slots)
            while table[at] and not (page[table[at] - 1] == first and frame[table[at] - 1] == base):
                at = (at + 1) & (slots - 1)
            if table[at] == 0:
                if 2 * pairs >= slots:
                    grown = <uint32_t *>calloc(2 * slots, sizeof(uint32_t))
                    if grown is NULL:
                        free(table)
                        return 0
                    slots *= 2
                    free(table)
                    table = grown
                    for j in range(pairs):
                        at = slot_of(page[j], frame[j], slots)
                        while table[at]:
                            at = (at + 1) & (slots - 1)
                        table[at] = <uint32_t>(j + 1)
                    at = slot_of(first, base, slots)
                    while table[at]:
                        at = (at + 1) & (slots - 1)
                page[pairs], frame[pairs] = first, base
                pairs += 1
                table[at] = <uint32_t>pairs
            last = table[at] - 1
        place[i] = <uint32_t>(last << PAGE_SHIFT | offset)
    free(table)
    return pairs


def addresses_of(const uint32_t[::1] place not None, const uint64_t[::1] page not None, const uint64_t[::1] frame not None,
                 uint64_t[::1] addr not None, uint64_t[::1] gpa not None):
    """Make the addresses of places: what `find_places()` was given.

    Parameters
    ----------
    place : ndarray of uint32, shape (n,)
    page, frame : ndarray of uint64, shape (pairs,)
    addr, gpa : ndarray of uint64, shape (n,)
        Where they go.

    Raises
    ------
    ValueError
        A place names a pair that is not there; the message has its row. Or an array of another length.
    """
    cdef size_t n = place.shape[0], pairs = page.shape[0], i
    cdef bint all_known = True
    cdef uint32_t highest = 0
    for name, rows, wanted in (("frame", frame.shape[0], pairs), ("addr", addr.shape[0], n), ("gpa", gpa.shape[0], n)):
        if rows != wanted:
            raise ValueError(f"{name}: want {wanted} rows, got {rows}")
    if n == 0:
        return
    for i in range(n):
        highest = max(highest, place[i])
    if (highest >> PAGE_SHIFT) >= pairs:
        for i in range(n):
            if (place[i] >> PAGE_SHIFT) >= pairs:
                raise ValueError(f"row {i}: place is {place[i]:#x}, of page {place[i] >> PAGE_SHIFT}; allowed is one of the "
                                 f"{pairs} pages of the row group")
    for i in range((highest >> PAGE_SHIFT) + 1):
        all_known &= frame[i] != INVALID_GPA
    with nogil:
        expand(&place[0], &page[0], &frame[0], n, all_known, &addr[0], &gpa[0])


cdef void expand(const uint32_t *place, const uint64_t *page, const uint64_t *frame, size_t n, bint all_known,
                 uint64_t *addr, uint64_t *gpa) noexcept nogil:
    cdef size_t i
    cdef uint64_t offset, base
    for i in range(n):
        offset, base = place[i] & OFFSET_MASK, frame[place[i] >> PAGE_SHIFT]
        addr[i] = page[place[i] >> PAGE_SHIFT] + offset
        gpa[i] = base + offset if all_known or base != INVALID_GPA else <uint64_t>INVALID_GPA
