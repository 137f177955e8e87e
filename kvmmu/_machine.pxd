"""Machine and TdpMmu, the Python faces of one vCPU on its host."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._access cimport access_columns, machine
from kvmmu._contexts cimport VcpuArch
from kvmmu._format cimport PageFormat
from kvmmu._memory cimport SlotTable
from kvmmu._tlb cimport Tlb
from kvmmu._walk cimport cpu_caps
from kvmmu.mmu._state cimport Kvm


cdef class TdpMmu:
    """The builder of a vCPU's host page tables under two-dimensional paging."""
    cdef Machine machine
    cdef readonly PageFormat fmt


cdef class Machine:
    """All of one vCPU but its registers' rules. Made by a Vcpu."""
    cdef readonly Kvm kvm
    cdef readonly Tlb tlb
    cdef readonly TdpMmu tdp_mmu
    cdef machine m
    cdef VcpuArch arch              # the guest's registers
    cdef cpu_caps cpu_caps          # of the guest, as its processor is
    cdef cpu_caps kvm_caps          # of the guest, as KVM's walker takes it
    cdef cpu_caps host_caps
    cdef PageFormat hw_fmt, sw_fmt, n_fmt
    cdef uint64_t rights_role       # what the rights in force were made from
    cdef uint32_t rights_root, rights_pkru
    cdef SlotTable table            # guest-physical memory
    cdef int prepare(self) except -1
    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out) except -1
