"""The objects that the registers behind a walk live in."""

from libc.stdint cimport uint64_t

from kvmmu._format cimport PageFormat
from kvmmu._memory cimport GuestMemory
from kvmmu._walk cimport cpu_caps, kvm_pagewalk, pml_log, vcpu_arch


cdef class VcpuArch:
    """The registers of one vCPU as the walks read them."""
    cdef vcpu_arch arch


cdef class SecondStage:
    """A second stage (Ept or Npt) ready to walk."""
    cdef kvm_pagewalk n
    cdef vcpu_arch arch             # holds the root
    cdef pml_log pml
    cdef readonly PageFormat fmt
    cdef readonly object stage
    cdef list tables                # slot tables that n points to, or pointed to while a batch ran
    cdef void use_memory(self, GuestMemory mem)


cdef class Contexts:
    """Register sets prepared for translate(regs=...): one walk each, formats shared by role."""
    cdef vcpu_arch *arches
    cdef kvm_pagewalk *walks
    cdef list formats
    cdef list seconds               # SecondStage or None of each row
    cdef list tables                # slot tables that walks point to, or pointed to while a batch ran
    cdef readonly Py_ssize_t count
    cdef void use_memory(self, GuestMemory mem)
    cdef int reload(self, Py_ssize_t i, legal) except -1
    cdef object widths(self)

cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept
cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, bint tdp) noexcept
# Whether it is nested paging of SVM; False of None
cdef bint is_npt(SecondStage second)
cdef SecondStage second_stage(stage, const cpu_caps *caps)
# IN admit: maps (Regs, SecondStage or None) to a Regs that is legal, with PDPTEs loaded, or raises; second: of rows without one
cdef Contexts prepare_contexts(list rows, admit, const cpu_caps *caps, SecondStage second)
