"""The state of one vCPU on its host at one moment."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport cpu_caps
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine
from kvmmu.memory._memory cimport SlotTable
from kvmmu.mmu.core._kvm cimport kvm_vcpu
from kvmmu.walk._second_stage cimport SecondStage


cdef class SavedMachine:
    """Copies of the structs of Modes. Pointers in them are those of then, and are set anew when it is put in force."""
    cdef machine m
    cdef kvm_vcpu vcpu
    cdef kvm_page_format formats[5]     # hw, sw, n, tdp, shadow
    cdef cpu_caps cpu_caps, kvm_caps, host_caps
    cdef int widest_shift
    cdef uint64_t cpu_role, rights_role
    cdef uint32_t rights_root
    cdef uint64_t rights_keys
    cdef bint nested                    # guest_mmu is active
    cdef bint under_second              # L2 runs under L1's second stage
    cdef object stage                   # Modes.stage
    cdef SecondStage second             # KVM's own walk of it, to be put in force
    cdef SavedMachine ready(self)
    cdef int put(self, Modes modes, SlotTable table) except -1
