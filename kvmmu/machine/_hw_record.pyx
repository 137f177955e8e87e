"""The record of the processor's own walk, through the SPTEs."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.machine._access cimport machine_linear_address
from kvmmu.machine._machine cimport Machine
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine as machine_state
from kvmmu.machine._state cimport use_arena
from kvmmu.memory._maker cimport maker
from kvmmu.mmu.core._kvm cimport sp_hpa
from kvmmu.walk._arguments cimport check_scalar_access, check_scalar_gva
from kvmmu.walk._explain cimport record_of
from kvmmu.walk._register_sets cimport WalkCopy
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk._vcpu_arch cimport rflags_ac

from kvmmu.arch._bits import Cr4, Efer
from kvmmu.arch.second_stages import Ept, Npt
from kvmmu.walk.record import in_host


def hw_walk_record(Machine machine not None, gva, access):
    """Return the walk that the processor would make for an access that its TLB does not know, as a WalkRecord."""
    cdef uint64_t addr = check_scalar_gva(gva)
    cdef uint32_t a = check_scalar_access(access)
    cdef Modes modes = machine.modes
    cdef machine_state *m = &modes.m
    with machine.kvm.lock:
        modes.update()
        if not m.mmu.root.valid or m.root_hpa != sp_hpa(m.k, m.mmu.root.sp):
            raise RuntimeError("the processor has no root of page tables now; vm_enter() loads one, and so does an access")
        use_arena(m)
        addr = machine_linear_address(m, addr, a)
        return in_host(record_of(copy_of(modes), addr, a | rflags_ac(m.arch)))


cdef WalkCopy copy_of(Modes modes):
    """The processor's walk with the formats of Modes: for as long as the lock is held."""
    cdef machine_state *m = &modes.m
    cdef WalkCopy copy = WalkCopy.__new__(WalkCopy, maker())
    copy.fmt = modes.hw_fmt
    copy.w = m.hw
    copy.arch = m.hw.vcpu[0]
    copy.w.vcpu = &copy.arch
    if not m.k.tdp_enabled:
        return copy
    copy.n = m.stage.w
    copy.n.gva_to_gpa, copy.n.pml = m.stage.walk, NULL
    copy.w.ngpa = &copy.n
    copy.second = host_stage(modes)
    return copy


cdef SecondStage host_stage(Modes modes):
    """The host's second stage as a record asks for it: its kind and its format."""
    cdef SecondStage second
    if modes.kvm.k.spte.ept:
        stage = Ept(int(modes.m.host.nested_pgd))
    else:
        stage = Npt(int(modes.m.host.nested_pgd), cr4=int(Cr4.PAE), efer=int(Efer.LME | Efer.LMA | Efer.NX))
    second = SecondStage.__new__(SecondStage, maker(), stage)
    second.fmt = modes.n_fmt
    return second
