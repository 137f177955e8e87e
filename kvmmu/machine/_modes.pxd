"""Modes: the walks, formats, active MMU, roots and TLB tags that follow from the registers of one vCPU on its host.

`update()` compares the registers and walks of the vCPU with those that were taken last, and takes those that changed. Whoever
runs the vCPU, or flushes for it, calls it first: with the lock held, as all methods.
"""

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
from kvmmu.walk.pagewalk cimport PageWalk


cdef class Modes:
    cdef Kvm kvm
    cdef Tlb tlb
    cdef machine m
    cdef bint joined                # m.vcpu is a vCPU of kvm; else this owns it, and it holds no pages
    cdef PyObject *owner            # kvm, by a reference that the garbage collector cannot clear: m.vcpu lives in it
    cdef PageWalk gva_walk          # the walk of the vCPU: its registers, role, second stage and memory are taken from it
    cdef VcpuArch arch              # the guest's registers
    cdef uint64_t loads             # what was taken last: loads of the registers,
    cdef uint64_t cpu_role          # the role of gva_walk, 0: nothing,
    cdef SecondStage taken          # its second stage,
    cdef GuestMemory mem            # its memory,
    cdef SlotTable table            # and the slots of that
    cdef cpu_caps cpu_caps          # of the guest, as its processor is
    cdef cpu_caps kvm_caps          # of the guest, as KVM's walker takes it
    cdef cpu_caps host_caps
    cdef int widest_shift           # 64 - linear-address width of the guest's processor, whatever CR4.LA57 says
    cdef PageFormat hw_fmt, sw_fmt, n_fmt
    cdef PageFormat tdp_fmt, shadow_fmt     # of the SPTEs of each MMU
    cdef SecondStage second         # L1's second stage as KVM walks it
    cdef object stage               # the Ept or Npt that it was made from
    cdef SecondStage walked         # L1's second stage of the vCPU's own walks: all walks write its log
    cdef uint64_t rights_role       # role, root role and PKRU that the rights in force were made from
    cdef uint32_t rights_root
    cdef uint64_t rights_keys
    # Let the parts point to each other, and to those of the vCPU
    cdef void connect(self) noexcept
    # Become a vCPU of the machine, if it is none
    cdef int join(self) except -1
    # Become as new, and no vCPU of the machine until it runs. Its pages are gone, with all of the machine's
    cdef void leave(self) noexcept
    # Take the processor model of the walk anew
    cdef int take_cpu(self) except -1
    cdef int update(self) except -1
    # update(), and all else that comes before the vCPU runs: slots, the log of dirty pages, a root
    cdef int enter(self) except -1
    # ValueError for registers that no guest of KVM can have
    cdef int check_offered(self) except -1
    cdef void take_linear_rules(self, uint64_t role) noexcept
    cdef int take_registers(self, uint64_t role, GuestMemory mem, SecondStage second) except -1
    cdef int use_mmu(self, kvm_mmu *mmu) except -1
    cdef int use_guest_walk(self, uint64_t role, bint npt) except -1
    cdef int use_tdp(self, uint64_t role, bint smm, bint guest_mode) except -1
    cdef int use_nested(self, uint64_t role, GuestMemory mem, bint smm, SecondStage second) except -1
    cdef int use_shadow_paging(self, uint64_t role) except -1
    cdef int init_stage(self, uint32_t root_role) except -1

# The modes of a new vCPU. IN gva_walk: of it
cdef Modes new_modes(Kvm kvm, uint32_t vcpu_id, Tlb tlb, PageWalk gva_walk)
