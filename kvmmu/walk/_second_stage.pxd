"""A second stage (Ept or Npt) ready to walk."""

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, pml_log, vcpu_arch
from kvmmu.arch._format cimport PageFormat
from kvmmu.memory._memory cimport GuestMemory, SlotTable


cdef class SecondStage:
    """A second stage (Ept or Npt). Only its log changes, and the memory of the one whose owner calls `use_memory()`."""
    cdef kvm_pagewalk n
    cdef vcpu_arch arch             # holds the root
    cdef pml_log pml
    cdef readonly PageFormat fmt
    cdef readonly object stage
    cdef SlotTable table
    # For a walker that has the second stage to itself
    cdef int use_memory(self, GuestMemory mem) except -1

# True if it is nested paging of SVM; False of None
cdef bint is_npt(SecondStage second)
cdef SecondStage second_stage(stage, const cpu_caps *caps)
