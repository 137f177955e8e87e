"""TableBuilder: one set of page tables over arrays of rows."""

from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.tables._edit cimport builder


cdef class TableBuilder:
    cdef builder b
    cdef readonly GuestMemory mem
    cdef SlotTable _begin(self)
    cdef SlotTable _begin_rows(self, bint lengths)
