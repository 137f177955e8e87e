"""Questions about whole tables, and walks over memory of callbacks: each is repeated with the pages that it missed."""

import numpy as np

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, linear_address, walk_result
from kvmmu.arch._bits cimport ACC_USER_MASK, GPA_LIMIT, INVALID_GPA, PAGE_SIZE, STATUS_OK
from kvmmu.arch._format cimport resolved_access
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._arguments cimport check_scalar_access, check_scalar_gva
from kvmmu.walk._register_sets cimport RegisterSetWalks, RegisterSets, WalkCopy, linear_addresses
from kvmmu.walk._explain cimport fault_behind, record_of
from kvmmu.walk._scan cimport large_shift, scan_rows

from kvmmu.arch._bits import Acc
from kvmmu.arch.arguments import check_bool, check_gpa, check_int, check_word
from kvmmu.walk.mapped import MAPPING as _MAPPING
from kvmmu.walk.mapped import Lookup, Mappings
from kvmmu.walk.results import Span, check_access, check_array, check_size

_ROWS_MAX = 1 << 40
_PAGE = int(PAGE_SIZE)


cdef WalkCopy walk_wholly(TableQueries queries, uint64_t gva, uint32_t access, bint set_ad, walk_result *r):
    cdef SlotTable table
    cdef WalkCopy walk
    while True:
        table = queries.mem.walked()
        walk = queries.now(table)
        walk.w.gva_to_gpa(&walk.w, gva, access, set_ad, r)
        if r.status == STATUS_OK or not queries.mem.fetch_missing(table):
            return walk


cdef object whole_record(TableQueries queries, uint64_t gva, uint32_t access):
    cdef SlotTable table
    while True:
        table = queries.mem.walked()
        record = record_of(queries.now(table), gva, access)
        if not queries.mem.fetch_missing(table):
            return record


cdef int repeat_faults(TableQueries queries, out, tuple names, gva, access, ctx, dict options) except -1:
    rows = np.arange(gva.size) if out.status is None else np.flatnonzero(out.status)
    if rows.size and isinstance(access, np.ndarray) and access.size == gva.size:
        access = access[rows]
    queries.mem.keep(True)
    try:
        again = queries.translate(gva[rows], access, ctx=None if ctx is None else ctx[rows], fields=names, **options)
    finally:
        queries.mem.keep(False)
    for name in names:
        getattr(out, name)[rows] = getattr(again, name)
    return 0


cdef object translate_spans(TableQueries queries, gva, size, access, regs, ctx, dict options):
    cdef RegisterSets contexts
    cdef WalkCopy walk
    cdef RegisterSetWalks held = None               # what walks points to
    cdef const kvm_pagewalk *walks
    n = check_array("gva", gva, np.dtype(np.uint64)).size
    last = gva % np.uint64(_PAGE) + check_size(size, n) - np.uint64(1)
    access = check_access(access, n)
    if regs is not None and not isinstance(regs, RegisterSets):
        regs = queries.prepare(regs)
    options["regs"] = contexts = regs
    t = queries.translate(gva, access if access.size == n else int(access[0]), ctx=ctx, **options)
    walk = queries.now(queries.mem.walked())
    if contexts is not None:
        held = contexts.walks
    walks = &walk.w if held is None else held.walks
    faulted = t.status != STATUS_OK
    address = np.where(faulted, linear_addresses(walks, ctx, gva, access), np.uint64(0))
    result = Span(t.gpa, np.full(n, INVALID_GPA, np.uint64), t.status, t.error_code, address)
    rows = np.flatnonzero((last >= _PAGE) & ~faulted)
    # the page after 2**64, or after 2**32 outside long mode, is page 0: the walk takes the address modulo its width
    following = (gva[rows] & ~np.uint64(_PAGE - 1)) + np.uint64(_PAGE)
    accesses = access[rows] if access.size == n and n != 1 else access
    ctx = None if ctx is None else ctx[rows]
    t = queries.translate(following, accesses if accesses.size == rows.size != 1 else int(access[0]) if access.size else 0,
                          ctx=ctx, **options)
    faulted = t.status != STATUS_OK
    result.gpa_next[rows], result.status[rows], result.error_code[rows] = t.gpa, t.status, t.error_code
    result.address[rows] = np.where(faulted, linear_addresses(walks, ctx, following, accesses), np.uint64(0))
    return result


cdef object mappings_of(TableQueries queries, uint64_t first, uint64_t last, bint merge, size_t limit):
    cdef SlotTable table = queries.mem.walked()
    rows = scan_rows(queries.now(table), first, last, merge, limit)
    if table.mem.missing is NULL:
        return rows
    queries.mem.keep(True)
    try:
        while queries.mem.fetch_missing(table):
            table = queries.mem.walked()
            rows = scan_rows(queries.now(table), first, last, merge, limit)
    finally:
        queries.mem.keep(False)
    return rows


cdef object rows_at(TableQueries queries, uint64_t addr):
    """The row of one address, or none. IN addr: of a single call, wider than the address space, maybe."""
    cdef SlotTable table = queries.mem.walked()
    addr &= queries.now(table).w.gva_mask
    return mappings_of(queries, addr, addr, False, 1)


cdef class TableQueries:
    """The questions about whole tables that a PageWalk answers. Made as one, never alone."""

    cdef WalkCopy now(self, SlotTable table):
        raise TypeError("only a PageWalk has tables")

    def mappings(self, start=0, stop=None, *, merge=True, limit=1 << 24):
        """Find everything that the tables map.

        Parameters
        ----------
        start, stop : int
            Linear addresses (of `ngpa_walk`: nested guest-physical ones) from start to below stop; None: to the end.
        merge : bool
            Join neighbours that differ in nothing but their addresses, which follow each other.
        limit : int
            Rows that may be found.

        Returns
        -------
        Mappings
            Ascending by address. What lies in it is mapped whatever rights it has; what does not is mapped for nobody.

        Raises
        ------
        ValueError
            There are more rows than `limit`, or more than 64 leaves for each row that it allows, as of tables that point to
            themselves again and again.
        RuntimeError
            The walk is not in use.

        Notes
        -----
        Sets A/D bits: no. Releases the GIL: yes. Under a second stage a mapping ends where a page of either stage does.
        """
        cdef uint64_t first = check_word("start", start)
        last = (1 << 64) - 1 if stop is None else check_int("stop", stop, 0, 1 << 64) - 1
        cdef size_t rows = check_int("limit", limit, 1, _ROWS_MAX)
        if last < first:
            return Mappings(np.empty(0, _MAPPING))
        found = mappings_of(self, first, last, check_bool("merge", merge), rows)
        return Mappings(found, 1 << large_shift(self.now(self.mem.walked())))

    def lookup(self, gva, access=0):
        """Find where one address leads to, and what a TLB would keep of it.

        Parameters
        ----------
        gva : int
            Linear address (bytes).
        access : Access
            Made as by `gva_to_gpa()`: it needs the rights, and sets accessed and dirty bits. `Access.PROBE`: neither.

        Returns
        -------
        Lookup

        Raises
        ------
        GuestFault
            As `gva_to_gpa()`. With PROBE: nothing is mapped there.
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef walk_result r
        cdef WalkCopy walk
        cdef uint32_t a = check_scalar_access(access)
        self.gva_to_gpa(addr, a)
        walk = self.now(self.mem.walked())
        found = rows_at(self, linear_address(&walk.w, addr, a))
        if not len(found):
            walk = walk_wholly(self, addr, resolved_access(a), False, &r)
            if r.status != STATUS_OK:
                raise fault_behind(walk, &r, linear_address(&walk.w, addr, a), a)
            raise RuntimeError(f"the tables of {addr:#x} changed meanwhile")
        row = found[0]
        return Lookup(row["gpa"].item(), 1 << row["page_shift"].item(),
                      Acc(row["pte_access"].item() & (row["second_access"].item() | int(ACC_USER_MASK))), row["accessed"].item(),
                      row["dirty"].item(), row["global_"].item(), row["pkey"].item())

    def who_maps(self, gpa, size=1):
        """Find what maps physical memory.

        Parameters
        ----------
        gpa : int
            Guest-physical address (bytes).
        size : int
            Bytes.

        Returns
        -------
        Mappings
            Those parts of mappings that lie in [gpa, gpa + size), ascending by linear address.

        Raises
        ------
        ValueError
            There are more mappings than `mappings()` finds by default.
        RuntimeError
            The walk is not in use.
        """
        gpa = check_gpa("gpa", gpa)
        size = check_int("size", size, 1, int(GPA_LIMIT) - gpa)
        return self.mappings().of_memory(gpa, size)
