"""The questions about whole tables, and walks that ask for pages which are missing in memory of callbacks until all are there."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.walk._register_sets cimport WalkCopy


cdef class TableQueries:
    """The questions about whole tables that a PageWalk answers."""
    cdef readonly GuestMemory mem
    # The walk as it is now, over a table of its memory
    cdef WalkCopy now(self, SlotTable table)

# One address; returns the walk that r is of. IN access: resolved_access()
cdef WalkCopy walk_wholly(TableQueries queries, uint64_t gva, uint32_t access, bint set_ad, walk_result *r)
# A WalkRecord. IN access: EFLAGS.AC added
cdef object whole_record(TableQueries queries, uint64_t gva, uint32_t access)
# The Span of accesses that may cross a page. IN options: set_ad and threads of translate()
cdef object translate_spans(TableQueries queries, gva, size, access, regs, ctx, dict options)
# Those rows of a Translation that failed, once more. IN names: its columns; gva, access, ctx, options: of translate()
cdef int repeat_faults(TableQueries queries, out, tuple names, gva, access, ctx, dict options) except -1
