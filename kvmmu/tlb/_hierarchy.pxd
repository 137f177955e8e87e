"""The levels of a `TlbHierarchy` for Python, with their lock."""

from kvmmu.memory._lock cimport MachineLock
from kvmmu.tlb._levels cimport tlb_levels


cdef class TlbLevels:
    cdef tlb_levels h
    cdef readonly MachineLock lock
