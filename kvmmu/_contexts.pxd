"""The objects that the registers behind a walk live in."""

from libc.stdint cimport uint64_t

from kvmmu._format cimport PageFormat
from kvmmu._memory cimport GuestMemory
from kvmmu._walk cimport cpu_caps, kvm_pagewalk, vcpu_arch


cdef class VcpuArch:
    """The registers of one vCPU as the walks read them."""
    cdef vcpu_arch arch


cdef class Contexts:
    """Register sets prepared for translate(regs=...): one walk each, formats shared by role."""
    cdef vcpu_arch *arches
    cdef kvm_pagewalk *walks
    cdef list formats
    cdef list tables                # slot tables that walks point to, or pointed to while a batch ran
    cdef readonly Py_ssize_t count
    cdef void use_memory(self, GuestMemory mem)
    cdef int reload(self, Py_ssize_t i, legal) except -1
    cdef object widths(self)

cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept
cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps) noexcept
# IN admit: maps a Regs to one that is legal, with PDPTEs loaded, or raises
cdef Contexts prepare_contexts(list rows, admit, const cpu_caps *caps)
