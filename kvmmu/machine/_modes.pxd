"""MachineModes: the registers of one vCPU, and what follows from them on its host: walks, the active MMU, roots, tags."""

from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport cpu_caps
from kvmmu.arch._format cimport PageFormat
from kvmmu.machine._state cimport machine
from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.mmu.core._kvm cimport kvm_mmu
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.tlb._tlb cimport Tlb
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk._vcpu_arch cimport VcpuArch


cdef class MachineModes:
    cdef readonly Kvm kvm
    cdef readonly Tlb tlb
    cdef machine m
    cdef PyObject *owner            # kvm once more, out of the sight of the garbage collector: m.vcpu lives in it
    cdef VcpuArch arch              # the guest's registers
    cdef cpu_caps cpu_caps          # of the guest, as its processor is
    cdef cpu_caps kvm_caps          # of the guest, as KVM's walker takes it
    cdef cpu_caps host_caps
    cdef int widest_shift           # 64 - linear-address width of the guest's processor, whatever CR4.LA57 says
    cdef PageFormat hw_fmt, sw_fmt, n_fmt
    cdef PageFormat tdp_fmt, shadow_fmt     # of the SPTEs of each MMU
    cdef SecondStage second         # L1's second stage as KVM walks it
    cdef object stage               # what it was made from
    cdef SecondStage walked         # L1's second stage of the vCPU's own walks, whose log is written
    cdef uint64_t rights_role       # what the rights in force were made from
    cdef uint32_t rights_root, rights_pkru
    cdef SlotTable table            # guest-physical memory
    cdef int check_mode(self) except -1
    cdef int take_cpu(self, cpu) except -1
    # With the lock held, as all below
    cdef int take_mode(self, GuestMemory mem, bint smm, bint guest_mode, SecondStage second) except -1
    cdef int use_mmu(self, kvm_mmu *mmu) except -1
    cdef int use_guest_walk(self, uint64_t role, bint npt) except -1
    cdef int use_tdp(self, uint64_t role, bint smm, bint guest_mode) except -1
    cdef int use_nested(self, uint64_t role, GuestMemory mem, bint smm, SecondStage second) except -1
    cdef int use_shadow_paging(self, uint64_t role) except -1
    cdef int init_stage(self, uint32_t root_role) except -1
