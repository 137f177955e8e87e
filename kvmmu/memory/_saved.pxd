"""Guest memory as it was at one moment."""

from kvmmu.memory._memory cimport GuestMemory, SlotTable


cdef class SavedMemory:
    cdef readonly GuestMemory mem
    cdef SlotTable table            # of the slots at that moment; it keeps their bytes
    cdef list slots                 # SavedBytes of each
