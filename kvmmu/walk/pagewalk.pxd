"""PageWalk, a walk for Python code."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, vcpu_arch
from kvmmu.arch._format cimport PageFormat
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._fast cimport fast_walk
from kvmmu.walk._mappings cimport TableQueries
from kvmmu.walk._register_sets cimport RegisterSets, WalkCopy
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk._vcpu_arch cimport VcpuArch


cdef class PageWalk(TableQueries):
    cdef kvm_pagewalk w                 # but for the memory
    cdef fast_walk fast               # over the table with the number `table`, which the memory keeps while it is in force
    cdef uint64_t table
    cdef WalkCopy copy                  # the last one; None: something of the walk has changed since
    cdef cpu_caps caps
    cdef object cpu                     # the processor model
    cdef VcpuArch vcpu
    cdef const vcpu_arch *registers     # of it
    cdef object admit
    cdef object deliver
    cdef readonly SecondStage second    # of a nested guest: under this walk, or this walk itself
    cdef PageFormat format
    cdef public uint64_t init_count
    # The walk as it is now, over a table of its memory. RuntimeError if it is not in use
    cdef WalkCopy now(self, SlotTable table)
    cdef int changed(self) except -1
    cdef int use_second(self) except -1
    cdef int check_in_use(self) except -1
    cdef int use_memory(self) except -1
    cdef object gva_to_gpa_slowly(self, uint64_t gva, uint32_t access)
    cdef int check_contexts(self, RegisterSets contexts) except -1
