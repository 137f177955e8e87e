"""The state of a virtual machine at one moment, and how it is put in force.

Registers and walks of the vCPUs come first (`kvmmu.vm.guest_state`), and memory. `put_machines()` then does all else by one call,
within which no Python code runs: nothing interrupts it half-way.
"""

from kvmmu.arch._format cimport kvm_page_format
from kvmmu.machine._machine cimport Machine
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine as machine_state
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.mmu.core._kvm cimport kvm_vcpu
from kvmmu.mmu.kvm._saved cimport SavedKvm, put_kvm
from kvmmu.mmu.kvm._saved cimport save_kvm as c_save_kvm
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.tlb._tlb cimport Tlb, tlb_swap
from kvmmu.walk._second_stage cimport second_stage


# ---- saving ----------------------------------------------------------------------------------------------------------------

def save_kvm(Kvm kvm not None):
    """Return the state of a virtual machine, but for its vCPUs and its memory. With the lock held, and after `save_machine()`."""
    kvm.sync()
    return c_save_kvm(kvm)


def save_machine(Machine machine not None):
    """Return the state of a vCPU on its host. With the lock held."""
    cdef Modes modes = machine.modes
    cdef SavedMachine saved = SavedMachine.__new__(SavedMachine, maker())
    cdef kvm_page_format *formats[5]
    cdef int i
    modes.update()
    modes.kvm.sync()
    formats_of(modes, formats)
    for i in range(5):
        saved.formats[i] = formats[i][0]
    saved.m, saved.vcpu = modes.m, modes.m.vcpu[0]
    saved.cpu_caps, saved.kvm_caps, saved.host_caps = modes.cpu_caps, modes.kvm_caps, modes.host_caps
    saved.widest_shift, saved.cpu_role = modes.widest_shift, modes.cpu_role
    saved.rights_role, saved.rights_root, saved.rights_keys = modes.rights_role, modes.rights_root, modes.rights_keys
    saved.nested = modes.m.mmu == &modes.m.vcpu.guest_mmu
    saved.under_second = modes.taken is not None
    saved.stage = modes.stage
    return saved


cdef void formats_of(Modes modes, kvm_page_format **formats) noexcept:
    formats[0], formats[1], formats[2] = &modes.hw_fmt.fmt, &modes.sw_fmt.fmt, &modes.n_fmt.fmt
    formats[3], formats[4] = &modes.tdp_fmt.fmt, &modes.shadow_fmt.fmt


cdef class SavedMachine:
    """The state of a vCPU on its host at one moment. Made by a snapshot."""

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a SavedMachine is made by Vm.snapshot()")

    def __reduce__(self):
        raise TypeError("a SavedMachine cannot be copied or pickled")

    cdef SavedMachine ready(self):
        """A copy with a walk of L1's second stage of its own."""
        cdef SavedMachine fresh = SavedMachine.__new__(SavedMachine, maker())
        fresh.m, fresh.vcpu, fresh.formats = self.m, self.vcpu, self.formats
        fresh.cpu_caps, fresh.kvm_caps, fresh.host_caps = self.cpu_caps, self.kvm_caps, self.host_caps
        fresh.widest_shift, fresh.cpu_role = self.widest_shift, self.cpu_role
        fresh.rights_role, fresh.rights_root, fresh.rights_keys = self.rights_role, self.rights_root, self.rights_keys
        fresh.nested, fresh.under_second, fresh.stage = self.nested, self.under_second, self.stage
        if self.stage is not None:
            fresh.second = second_stage(self.stage, &self.kvm_caps)
        return fresh

    cdef int put(self, Modes modes, SlotTable table) except -1:
        """Put it in force. IN table: of the memory of its address space."""
        cdef machine_state *m = &modes.m
        cdef kvm_vcpu *vcpu = m.vcpu
        cdef int number = vcpu.id, i
        cdef kvm_page_format *formats[5]
        cdef bint tdp = modes.kvm.k.tdp_enabled
        vcpu[0] = self.vcpu
        vcpu.id = number
        m[0] = self.m
        m.vcpu = vcpu
        modes.connect()
        formats_of(modes, formats)
        for i in range(5):
            formats[i][0] = self.formats[i]
        modes.cpu_caps, modes.kvm_caps, modes.host_caps = self.cpu_caps, self.kvm_caps, self.host_caps
        modes.widest_shift, modes.cpu_role, modes.loads = self.widest_shift, self.cpu_role, modes.arch.loads
        modes.rights_role, modes.rights_root, modes.rights_keys = self.rights_role, self.rights_root, self.rights_keys
        modes.mem, modes.table, modes.stage, modes.second = modes.gva_walk.mem, table, self.stage, self.second
        modes.taken = modes.gva_walk.second if self.under_second else None
        modes.walked = None
        # the walks
        m.hw.mem = &modes.kvm.memslots.ram if tdp else &modes.kvm.arena
        m.hw.vcpu = &modes.arch.arch if tdp else &m.host
        m.hw.ngpa = &m.stage.w if tdp else NULL
        m.sw.mem, m.sw.ngpa = &table.mem, NULL
        m.stage.w.mem = &modes.kvm.arena if tdp else NULL
        m.stage.w.pml = &m.pml if self.m.stage.w.pml is not NULL else NULL
        # the MMUs
        vcpu.root_mmu.w = NULL if tdp else &m.sw
        vcpu.guest_mmu.w = NULL
        m.mmu = vcpu.mmu = &vcpu.guest_mmu if self.nested else &vcpu.root_mmu
        if self.second is None:
            return 0
        self.second.table, self.second.n.mem = table, &table.mem
        vcpu.guest_mmu.w = &self.second.n
        if self.under_second:
            m.sw.ngpa = &self.second.n
            if self.second.n.pml is not NULL:           # one log, whoever walks
                modes.walked = modes.taken
                self.second.n.pml = &modes.taken.pml
        return 0


# ---- putting in force ------------------------------------------------------------------------------------------------------

def ready(SavedKvm saved not None, GuestMemory mem=None, GuestMemory smm_mem=None):
    """Return a copy of a saved state that can be put in force: for the machine that it is of, or for one over other memory."""
    return saved.ready(None if mem is None else mem.current(), None if smm_mem is None else smm_mem.current())


def ready_machine(SavedMachine saved not None):
    """Return a copy of the state of a vCPU that can be put in force."""
    return saved.ready()


cdef list parts_of(Modes modes):
    """Return the objects that a new state takes the place of."""
    return [modes.mem, modes.table, modes.stage, modes.second, modes.taken, modes.walked]


def put_machines(Kvm kvm not None, SavedKvm fresh not None, list loads not None, list idle not None, list tlbs not None):
    """Put a saved state in force, all of it or nothing. With the lock held.

    fresh: of `ready()`. loads: (Machine, SavedMachine of `ready_machine()`) of the vCPUs that ran. idle: Machine objects of those
    that did not run, or were not there: they are as new. tlbs: (Tlb, Tlb with what it is to have). The machine has no vCPUs
    beside them.
    """
    cdef Machine machine
    cdef SavedMachine saved
    cdef Tlb tlb, other
    cdef size_t attached = 0
    cdef list kept = []                                 # what goes, until all is done
    for machine, saved in loads:
        if machine.modes.kvm is not kvm or (saved.second is None) != (saved.stage is None):
            raise ValueError("loads: want vCPUs of this machine, and states of ready_machine()")
        machine.modes.join()
        kept += parts_of(machine.modes)
        attached += 1
    for machine in idle:
        if machine.modes.kvm is not kvm:
            raise ValueError("idle: want vCPUs of this machine")
        if machine.modes.joined:
            kept += parts_of(machine.modes)
            attached += 1
    for tlb, other in tlbs:
        if tlb is other:
            raise ValueError("tlbs: want a copy beside each TLB")
    if attached != kvm.k.nr_vcpus or fresh.ram_slots is NULL:
        raise RuntimeError("the machine has vCPUs that no Vcpu holds")
    # from here on nothing fails, and no Python code runs
    put_kvm(kvm, fresh)
    for machine in idle:
        if machine.modes.joined:
            machine.modes.leave()
    for machine, saved in loads:
        saved.put(machine.modes, kvm.memslots.smm_table if saved.vcpu.as_id else kvm.memslots.table)
    for tlb, other in tlbs:
        tlb_swap(&tlb.t, &other.t)
