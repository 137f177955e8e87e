"""Exits of a workload on a host: its first touches, on a whole machine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import RetPf, Status
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.arch.second_stages import Ept, Npt
from kvmmu.comparison.first_touches import FirstTouches
from kvmmu.comparison.spaces import MadeSpaces
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.replay.machine_replay import SHADOW_EXITS, replay_machine
from kvmmu.replay.machine_start import TDP_OF, Backing, HostKind
from kvmmu.tables.page_tables import PageTables
from kvmmu.traces import Trace
from kvmmu.vm.vcpu import Vcpu, Vm

__all__ = ["HostRun", "run_first_touches", "run_own"]

_MAXPHYADDR = 46
_PAGES = {"4k": 1 << 12, "2m": 1 << 21, "1g": 1 << 30}


@dataclass
class HostRun:
    """The exits that the first touches of a workload took on a host.

    Attributes
    ----------
    exits : dict of str to int
        By reason.
    position : ndarray of uint64
        Of each access that took exits for the host's page tables: its number.
    count : ndarray of uint64
        How many it took.
    by_ret : dict of str to int
        Accesses by the RET_PF code of their last exit.
    stats : dict of str to int
        KVM's counters.
    """

    exits: dict[str, int] = field(default_factory=dict)
    position: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    count: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    by_ret: dict[str, int] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All exits."""
        return sum(self.exits.values())


def run_first_touches(spaces: MadeSpaces, first: FirstTouches, host: str, host_page: Backing | None, events: Any) -> HostRun:
    """Run the first touches of a trace on a machine.

    Parameters
    ----------
    spaces : MadeSpaces
        The guest's tables. They are clean again behind the call.
    first : FirstTouches
    host : {"native", "ept", "npt", "shadow", "nested-ept", "nested-npt"}
    host_page : {"4k", "2m", "1g"} or None
        Backing of guest memory.
    events : Counter of Op
        Of the whole trace; a host with shadow paging takes an exit for some of them.
    """
    if host == "native":
        return HostRun()
    assert host_page is not None
    position, gva, access, space = first.columns()
    spaces.clean()
    tdp = TDP_OF[host.removeprefix("nested-")]
    mem, nested = (spaces.mem, None) if not host.startswith("nested") else _with_second_stage(spaces, host, host_page)
    vm = Vm(mem, CpuModel(maxphyaddr=_MAXPHYADDR), Host(tdp=tdp, maxphyaddr=_MAXPHYADDR), backing=host_page)
    vcpu = vm.create_vcpu()
    exits, ret = np.zeros(gva.size, np.uint64), np.zeros(gva.size, np.uint8)
    changes = np.flatnonzero(np.diff(space)) + 1 if space.size else np.empty(0, np.int64)
    for start, stop in zip([0, *changes.tolist()], [*changes.tolist(), gva.size], strict=True):
        if start == stop:
            continue
        _enter(vcpu, spaces.regs(int(space[start])), nested)
        rows = vcpu.access(np.ascontiguousarray(gva[start:stop]), np.ascontiguousarray(access[start:stop]))
        exits[start:stop], ret[start:stop] = rows.exits, rows.ret
        bad = np.isin(rows.status, (Status.OK, Status.NON_CANONICAL), invert=True)
        if bad.any():
            raise RuntimeError(f"access to {int(gva[start:stop][bad][0]):#x} fails on the machine: status "
                               f"{Status(rows.status[bad][0]).name}")
    spaces.clean()
    took = np.flatnonzero(exits)
    found = HostRun({_reason(host): int(exits.sum())}, position[took], exits[took], stats=vm.stats)
    found.by_ret = {RetPf(code).name: int(count) for code, count in enumerate(np.bincount(ret[took]).tolist()) if count}
    if host == "shadow":
        found.exits |= {name: events[op] for op, name in SHADOW_EXITS.items() if events[op]}
    return found


def run_own(opened: Callable[[], Trace], host: str, host_page: Backing | None) -> HostRun:
    """Run all of a trace with page tables of its own on a machine. IN opened: returns the trace from its beginning."""
    if host not in ("ept", "npt", "shadow"):
        return HostRun()                                # native
    kind: HostKind = "ept" if host == "ept" else "npt" if host == "npt" else "shadow"
    report = replay_machine(opened, host=kind, backing=host_page or "2m")
    return HostRun(report.exits, report.exit_position, report.exit_count, report.by_ret, report.stats)


def _reason(host: str) -> str:
    names = {"ept": "EPT violations", "nested-ept": "EPT violations", "shadow": "shadow page faults"}
    return names.get(host, "nested page faults")


def _enter(vcpu: Vcpu, regs: Regs, nested: Ept | Npt | None) -> None:
    vcpu.leave_nested()
    vcpu.set_regs(regs)
    if nested is not None:
        vcpu.enter_nested(nested, cr3=regs.cr3)


def _with_second_stage(spaces: MadeSpaces, host: str, host_page: str) -> tuple[GuestMemory, Ept | Npt]:
    """Return the memory with a guest hypervisor's second stage, which maps all of it to the same addresses."""
    size = _PAGES[host_page]
    used = [np.arange(0, -(-spaces.table_bytes // size), dtype=np.uint64)]
    for page, (start, count) in spaces.frames.items():
        used.append(np.arange(start // size, -(-(start + page * count) // size), dtype=np.uint64))
    gpa = np.unique(np.concatenate(used)) * np.uint64(size)
    room = spaces.second_stage_room(gpa.size)
    tables = PageTables(spaces.mem, "ept" if host == "nested-ept" else "4l", frames=room)
    tables.map(gpa, gpa, size)
    if host == "nested-ept":
        return spaces.mem, Ept(tables.root)
    regs = tables.regs()
    return spaces.mem, Npt(tables.root, cr4=regs.cr4, efer=regs.efer)
