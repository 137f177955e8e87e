"""What whole page tables map: every leaf that a walk can come to, found table by table."""

from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.walk._contexts cimport WalkCopy


cdef class TableQueries:
    """The questions about whole tables that a PageWalk answers."""
    cdef readonly GuestMemory mem
    # The walk as it is now, over a table of its memory
    cdef WalkCopy now(self, SlotTable table)
