"""The machine that a replay in mode "machine" runs on: one that is made for a trace, or the caller's."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.arch.registers import Regs
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.replay.recorded_machine import trace_start
from kvmmu.replay.register_events import Context, context_of
from kvmmu.replay.trace_memory import SetUp, TraceMemory, pages_at, put_pages, reserve
from kvmmu.traces import RegisterSet, Trace, TraceError
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.vm.vcpu import Vcpu, Vm
from kvmmu.vm.virtual_machine import PageSize

__all__ = ["BACKINGS", "HOSTS", "TDP_OF", "Backing", "HostKind", "MachineStart", "given_machine", "made_machine",
           "registers_in_force"]

Backing = PageSize
HostKind = Literal["ept", "npt", "shadow"]
HOSTS: tuple[HostKind, ...] = get_args(HostKind)
BACKINGS: tuple[Backing, ...] = get_args(Backing)
TDP_OF: dict[str, Literal["ept", "npt"] | None] = {"ept": "ept", "npt": "npt", "shadow": None}
_HOST_OF: dict[str | None, HostKind] = {"ept": "ept", "npt": "npt", None: "shadow"}
_MEMORY_UNIT, _MEMORY_LIMIT = 1 << 21, 1 << 40
_HOST_MAXPHYADDR = 46
_PIECE = 1 << 20                                # bytes that are looked at at a time


@dataclass
class MachineStart:
    """A machine at the start of a trace.

    Attributes
    ----------
    trace : Trace
        With registers at the start.
    vm : Vm
    vcpus : list of Vcpu
        By the number that rows have.
    host : {"ept", "npt", "shadow"}
    backing : {"4k", "2m", "1g"}
    contexts : list of Context
        The register sets of the header.
    loads : bool
        The trace says what registers the vCPUs begin with; else they keep theirs.
    restart : callable or None
        Puts memory as at the start; None if the trace brings none.
    stats : dict of str to int
        The machine's counters at the start.
    """

    trace: Trace
    vm: Vm
    vcpus: list[Vcpu]
    host: HostKind
    backing: Backing
    contexts: list[Context]
    loads: bool
    restart: Callable[[], None] | None
    stats: dict[str, int]

    @property
    def starts(self) -> list[Context]:
        """The registers of each vCPU at the start."""
        if not self.loads:
            return [vcpu.regs for vcpu in self.vcpus]
        made: list[Context] = []
        for regs in self.trace.header.registers:
            if regs.second_stage is not None:
                made.append(next(context for context, given in zip(self.contexts, self.trace.header.contexts, strict=True)
                                 if given == regs))
            else:
                made.append(Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs,
                                 pkrs=regs.pkrs))
        return made


def made_machine(trace: Trace, host: HostKind, backing: Backing) -> MachineStart:
    """Make a machine for a trace that brings memory. The trace is read, for what memory it reaches."""
    start = trace_start(trace, touched=True)
    if start.end > _MEMORY_LIMIT:
        raise TraceError(f"its memory reaches to gpa {start.end - 1:#x}; allowed here is below {_MEMORY_LIMIT:#x}")
    block, _ = reserve(-(-start.end // _MEMORY_UNIT) * _MEMORY_UNIT)
    addr, values = start.memory.words

    def restart() -> None:
        block[:] = 0
        block.view("<u8")[addr >> np.uint64(3)] = values

    block.view("<u8")[addr >> np.uint64(3)] = values
    vm = Vm(GuestMemory(block), start.vcpu.cpu, Host(tdp=TDP_OF[host], maxphyaddr=_HOST_MAXPHYADDR), backing=backing)
    vcpus = [vm.create_vcpu() for _ in range(trace.header.vcpus)]
    return MachineStart(trace, vm, vcpus, host, backing, start.contexts, True, restart, {})


def given_machine(trace: Trace, vm: Vm) -> MachineStart:
    """Take the caller's machine. Memory that the trace brings is stored in its own."""
    if not vm.vcpus:
        raise ValueError("vm: has no vCPU; want one at least, made by create_vcpu()")
    if not trace.header.registers:
        on_memory = TraceOnMemory(trace, registers_in_force(vm.vcpus[0]), vm.mem.slots)
        return MachineStart(on_memory, vm, list(vm.vcpus), _HOST_OF[vm.host.tdp], BACKINGS[vm.kvm.backing - 1], [], False, None,
                            vm.stats)
    if trace.header.vcpus > len(vm.vcpus):
        raise ValueError(f"vm: has {len(vm.vcpus)} vCPUs, the trace has {trace.header.vcpus}; want as many, made by "
                         "create_vcpu()")
    memory = _memory_of(trace)

    def restart() -> None:
        assert memory is not None
        _store(memory, vm.mem)

    if memory is not None:
        restart()
    contexts = [context_of(regs) for regs in trace.header.contexts]
    return MachineStart(trace, vm, list(vm.vcpus), _HOST_OF[vm.host.tdp], BACKINGS[vm.kvm.backing - 1], contexts, True,
                        None if memory is None else restart, vm.stats)


def registers_in_force(vcpu: Vcpu) -> RegisterSet:
    """Return the registers of a vCPU that runs no nested guest."""
    if vcpu.mmu_is_nested:
        raise ValueError("vm: a nested guest runs on it; want registers of L1")
    regs = vcpu.regs
    return RegisterSet(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pkrs=regs.pkrs,
                       pdptrs=regs.pdptrs)


def _memory_of(trace: Trace) -> TraceMemory | None:
    """Return the memory that a trace brings, or None."""
    set_up = SetUp()
    with closing(trace.chunks()) as chunks:
        for chunk in chunks:
            if set_up.take(chunk) < len(chunk):
                break
    return set_up.memory() if set_up else None


def _store(memory: TraceMemory, mem: GuestMemory) -> None:
    """Put the bytes of a trace's memory in place of those that are there."""
    for gpa, size, _ in memory.guest.slots:
        if not mem.is_backed(gpa, size):
            raise ValueError(f"vm: the trace brings memory from gpa {gpa:#x} to {gpa + size - 1:#x}, and that of the vm is not "
                             "there; want slots that hold it")
    for gpa, size, _ in memory.guest.slots:
        for at in range(gpa, gpa + size, _PIECE):
            length = min(_PIECE, gpa + size - at)
            if any(mem.read(at, length)):
                mem.write(at, bytes(length))
    pages = np.unique(memory.words[0] & ~np.uint64(PAGE_SIZE - 1))
    put_pages(mem, pages, pages_at(memory.guest, pages))
