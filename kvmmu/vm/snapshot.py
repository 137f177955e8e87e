"""Snapshots of virtual machines: taken, and put in force again."""

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from kvmmu.arch.registers import CpuModel
from kvmmu.machine._saved import SavedMachine, put_machines, ready, ready_machine, save_kvm, save_machine
from kvmmu.memory._saved import SavedMemory
from kvmmu.mmu.kvm._saved import SavedKvm
from kvmmu.tlb._tlb import Tlb
from kvmmu.vm.guest_state import SavedGuest
from kvmmu.vm.tracepoints import Tracepoints

__all__ = ["Snapshot", "load_into", "take_snapshot"]


@dataclass(frozen=True)
class _SavedVcpu:
    """One vCPU. `machine` is None if it did not run yet."""

    vcpu: Any
    number: int
    cr2: int
    rip: int
    guest: SavedGuest
    tlb: Tlb
    machine: SavedMachine | None


class Snapshot:
    """The state of a virtual machine at one moment. Made by `Vm.snapshot()`, for `Vm.restore()` of the same machine.

    Attributes
    ----------
    vm : Vm
    nbytes : int
        Bytes of guest memory that it keeps.

    Notes
    -----
    It never changes, and can be restored any number of times. As long as it lives, the buffers of its slots stay exported: a
    bytearray cannot be resized, and an mmap not be closed.
    """

    vm: Any
    _vcpus: tuple[_SavedVcpu, ...]
    _listed: tuple[Any, ...]
    _made_vcpus: int
    _cpu: CpuModel
    _kvm: SavedKvm
    _memories: tuple[SavedMemory, ...]
    _trace: Tracepoints | None

    def __init__(self) -> None:
        raise TypeError("a Snapshot is made by Vm.snapshot()")

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memories)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Snapshot cannot be copied or pickled: it belongs to its machine, and never changes")

    def __repr__(self) -> str:
        return f"<Snapshot of {self.vm!r}, {self.nbytes:#x} bytes of memory>"


def take_snapshot(vm: Any, *, memory: bool = True) -> Snapshot:
    """Return the present state of a machine. The caller has the lock. IN memory: the bytes, too."""
    snapshot = Snapshot.__new__(Snapshot)
    vcpus = sorted(vm._joined, key=lambda vcpu: vcpu.id)
    machines = [None if running is None else save_machine(running) for running in (vcpu._running() for vcpu in vcpus)]
    snapshot._kvm = save_kvm(vm.kvm)
    if memory:
        spaces = (vm.mem,) if vm.smm_mem is vm.mem else (vm.mem, vm.smm_mem)
        snapshot._memories = tuple(SavedMemory(space) for space in spaces)
    else:
        snapshot._memories = ()
    snapshot._vcpus = tuple(
        _SavedVcpu(vcpu, vcpu.id, vcpu.cr2, vcpu.rip, vcpu._guest.save(), vcpu._tlb.copy(), machine)
        for vcpu, machine in zip(vcpus, machines, strict=True))
    snapshot._listed, snapshot._made_vcpus = tuple(vm.vcpus), vm._made_vcpus
    snapshot.vm, snapshot._cpu, snapshot._trace = vm, vm.cpu, vm._trace
    return snapshot


def load_into(vm: Any, snapshot: Snapshot, counterparts: dict[Any, Any] | None = None) -> None:
    """Put a snapshot in force: in its own machine, or in a copy of it. The caller has the lock.

    counterparts: of each vCPU of the snapshot, that in the copy, whose memory is a copy already.
    """
    own = counterparts is None
    of = {saved.vcpu: saved.vcpu for saved in snapshot._vcpus} if counterparts is None else counterparts
    fresh = ready(snapshot._kvm) if own else ready(snapshot._kvm, vm.mem, vm.smm_mem)
    tlbs = [(of[saved.vcpu]._tlb, saved.tlb.copy()) for saved in snapshot._vcpus]
    loads = [(of[saved.vcpu]._machine(), ready_machine(saved.machine)) for saved in snapshot._vcpus if saved.machine is not None]
    idle = {vcpu._made for vcpu in vm._joined if vcpu._made is not None}.difference(machine for machine, _ in loads)
    for memory in snapshot._memories:
        memory.restore()
    for saved in snapshot._vcpus:
        vcpu = of[saved.vcpu]
        vcpu._guest.put(saved.guest, own=own)
        vcpu.id, vcpu.cr2, vcpu.rip = saved.number, saved.cr2, saved.rip
    put_machines(vm.kvm, fresh, loads, list(idle), tlbs)
    for vcpu in vm._joined - set(of.values()):          # made since: without translations
        vcpu._tlb.flush()
    vm.vcpus[:] = [of[vcpu] for vcpu in snapshot._listed]
    vm.cpu, vm._made_vcpus = snapshot._cpu, snapshot._made_vcpus
    vm._trace = snapshot._trace
    if vm._trace is not None and not own:
        vm._trace = copy.copy(vm._trace)
        vm._trace._kvm = vm.kvm
