"""PageWalk, the Python face of a walk."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._contexts cimport Contexts, SecondStage, VcpuArch
from kvmmu._format cimport PageFormat
from kvmmu._memory cimport GuestMemory, SlotTable
from kvmmu._plain cimport plain_walk
from kvmmu._walk cimport cpu_caps, kvm_pagewalk, walk_result


cdef class PageWalk:
    cdef kvm_pagewalk w
    cdef plain_walk plain
    cdef cpu_caps caps
    cdef VcpuArch vcpu
    cdef SlotTable table
    cdef object admit
    cdef object deliver
    cdef readonly SecondStage second    # of a nested guest: under this walk, or this walk itself
    cdef readonly GuestMemory mem
    cdef readonly PageFormat fmt
    cdef readonly uint64_t init_count
    cdef int use_second(self) except -1
    cdef const kvm_pagewalk *current(self) except NULL
    cdef object gva_to_gpa_slowly(self, uint64_t gva, uint32_t access)
    cdef object fault(self, const walk_result *r, uint64_t addr, uint32_t access)
    cdef object second_record(self, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access)
    cdef object rule_of(self, const walk_result *r, uint32_t access)
    cdef object widths(self, Contexts contexts, ctx)
