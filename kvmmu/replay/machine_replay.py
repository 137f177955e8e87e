"""Replay of a trace with page tables on a whole machine: exits, faults, and what the host builds below."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import CR3_NOFLUSH, INVALID_GPA, OP_KIND, OP_MMIO, PAGE_SHIFT, PAGE_SIZE, Cr4, Efer, Op, RetPf, Status
from kvmmu.arch.arguments import check_name
from kvmmu.arch.faults import GuestFault
from kvmmu.arch.registers import Regs, pdpte_gpas
from kvmmu.replay.checkpoint import Checkpoints
from kvmmu.replay.machine_start import BACKINGS, Backing, HostKind, MachineStart, given_machine, made_machine
from kvmmu.replay.register_events import Context, pdptrs_at, registers_of
from kvmmu.replay.result import ReplayInterrupted, Report, failed_walks
from kvmmu.replay.row_run import MakeTlbs, fault_text, mode_of
from kvmmu.replay.trace_replay import replay_trace, with_file
from kvmmu.tlb.counters import TlbStats
from kvmmu.tlb.processor import invpcid_operands
from kvmmu.traces import Chunk, Trace, TraceError
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.vm.vcpu import Vcpu, Vm
from kvmmu.walk.results import Accesses

__all__ = ["SHADOW_EXITS", "MachineReport", "replay_machine"]

# Instructions and events that a host with shadow paging intercepts, and one with two-dimensional paging does not
SHADOW_EXITS = {Op.MOV_CR3: "MOV to CR3", Op.INVLPG: "INVLPG", Op.INVPCID: "INVPCID", Op.PAGE_FAULT: "guest page faults"}
_SAMPLES = 256                                  # of dirty pages over time
_CONTEXTS = 1024                                # that are told from each other, to count them
_EXITS_TO_L1 = (Status.EPT_VIOLATION, Status.EPT_MISCONFIG, Status.NESTED_PAGE_FAULT, Status.PML_FULL)
_FLUSHES = ("tlb_flush", "remote_tlb_flush", "remote_tlb_flush_requests")
Progress = Callable[[int, int], object]


@dataclass
class MachineReport(Report):
    """The result of a replay on a machine.

    Attributes
    ----------
    host, backing : str
        "ept", "npt" or "shadow", and the pages that back guest memory.
    exits : dict of str to int
        By reason: faults of the host's page tables, MMIO, and under shadow paging what the guest does to its own tables and TLBs.
    exits_to_l1 : int
        Accesses of a nested guest that its hypervisor's second stage does not let through.
    by_ret : dict of str to int
        Accesses that took exits, by the RET_PF code of the last one.
    sptes : dict of str to int
        SPTEs that map pages, by size.
    shadow_pages, table_bytes : int
        Pages of SPTEs, and the memory that they take (bytes).
    flushes : dict of str to int
        KVM's counters of TLB flushes.
    stats : dict of str to int
        All of KVM's counters.
    exit_position, exit_count : ndarray of uint64
        Of each access that took exits: its number, and how many.
    dirty_over_time : list of (int, int)
        Number of the access, and pages written until then.
    """

    host: str = "ept"
    backing: str = "2m"
    exits: dict[str, int] = field(default_factory=dict)
    exits_to_l1: int = 0
    by_ret: dict[str, int] = field(default_factory=dict)
    sptes: dict[str, int] = field(default_factory=dict)
    shadow_pages: int = 0
    table_bytes: int = 0
    flushes: dict[str, int] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)
    exit_position: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64), repr=False)
    exit_count: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64), repr=False)
    dirty_over_time: list[tuple[int, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        plain = super().to_dict()
        del plain["exit_position"], plain["exit_count"]
        total = np.cumsum(self.exit_count)
        at = np.unique(np.linspace(0, total.size - 1, min(total.size, _SAMPLES)).astype(np.int64))
        return plain | {"exits_over_time": [[int(self.exit_position[i]), int(total[i])] for i in at.tolist()]}


def replay_machine(opened: Callable[[], Trace], *, host: HostKind = "ept", backing: Backing = "2m",
                   progress: Progress | None = None, vm: Vm | None = None, tlbs: MakeTlbs | None = None) -> MachineReport:
    """Run every access of a trace on a machine, in order, with its register loads and table writes.

    Parameters
    ----------
    opened : callable
        Returns the trace from its beginning; it is read twice, first for the memory that it reaches.
    host : {"ept", "npt", "shadow"}
    backing : {"4k", "2m", "1g"}
        Pages of the host.
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) after each chunk.
    vm : Vm, optional
        The machine to run it on; host and backing are its own then.
    tlbs : callable, optional
        Called with the number of vCPUs; makes TLBs that the accesses go through in a walk of their own, before the machine runs.

    Raises
    ------
    TraceError
        The trace is damaged, brings no memory, or reaches beyond 1 TiB of it; its `report` is what was done until then.
    ReplayInterrupted
        Ctrl-C; its `report` likewise.
    """
    check_name("host", host, ("ept", "npt", "shadow"))
    check_name("backing", backing, BACKINGS)
    start = made_machine(opened(), host, backing) if vm is None else given_machine(opened(), vm)
    stats = None if tlbs is None else _tlb_stats(opened(), start, tlbs)
    run = _MachineRun(start)
    keeper = Checkpoints(start.trace, {}, waits=True)
    trace = opened() if start.loads else start.trace
    try:
        with keeper, closing(trace.chunks()) as chunks:
            for chunk in chunks:
                with keeper.busy():
                    run.take(chunk)
                if progress:
                    progress(run.accesses, run.header.accesses or 0)
        report = run.report(complete=True)
    except KeyboardInterrupt:
        raise ReplayInterrupted(run.report(complete=False)) from None
    except TraceError as error:
        named = with_file(error, trace)
        named.report = run.report(complete=False)
        raise named from error.__cause__
    report.tlb = stats
    report.skipped = trace.notes.skipped if isinstance(trace, TraceOnMemory) else {}
    return report


def _tlb_stats(trace: Trace, start: MachineStart, tlbs: MakeTlbs) -> TlbStats | None:
    """Return what the accesses meet in TLBs. They are walked on memory of their own."""
    if start.loads and start.restart is not None:
        return replay_trace(trace, None, None, tlbs).tlb
    vcpu = Vcpu(start.vm.mem.copy(), cpu=start.vm.cpu, tdp="ept")
    if start.loads:
        return replay_trace(trace, vcpu, None, tlbs).tlb
    return replay_trace(start.trace, vcpu, None, tlbs).tlb


class _MachineRun:
    """One replay on a machine under way."""

    def __init__(self, start: MachineStart) -> None:
        self.start, self.header, self.host, self.backing = start, start.trace.header, start.host, start.backing
        self.started = time.perf_counter()
        self.vm, self.vcpus, self.contexts = start.vm, start.vcpus, start.contexts
        self.mem = self.vm.mem
        nested = any(isinstance(context, tuple) for context in self.contexts)
        self.told = self.host == "shadow" or nested
        if self.host == "shadow" and nested:
            raise ValueError("host: a nested guest with a second stage runs in the trace; want 'ept' or 'npt', got 'shadow'")
        self.first = [self._loaded(context) for context in start.starts]
        self.states = list(self.first)
        self.seen = set(self.first)                     # contexts so far, up to a number of them
        if start.loads:
            self._load_start()
        self.accesses = self.verified = self.unchecked = self.mismatches = self.writes = self.to_l1 = 0
        self.kinds, self.rets = np.zeros(3, np.int64), np.zeros(256, np.int64)
        self.error_codes: Counter[int] = Counter()      # of walks that fail, without a recorded address
        self.statuses = np.zeros(256, np.int64)
        self.events: Counter[Op] = Counter()
        self.faults: Counter[tuple[int, int]] = Counter()       # recorded: events and error codes
        self.pieces: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []
        self.mmio = 0
        self.host_exits = 0
        self.dirty: set[int] = set()
        self.dirty_over_time: list[tuple[int, int]] = []

    def _load_start(self) -> None:
        for vcpu, context in enumerate(self.first):
            try:
                self._use(vcpu, context)
            except (GuestFault, ValueError) as error:
                raise TraceError(f"header: registers[{vcpu}]: {error}") from error

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def take(self, chunk: Chunk) -> None:
        """Run the rows of a chunk."""
        if chunk.vcpus > len(self.vcpus):
            raise TraceError(f"rows of vCPU {chunk.vcpus - 1} behind access {self.accesses}; the vm has {len(self.vcpus)} vCPUs")
        row = 0
        stops = np.flatnonzero(chunk.op >= Op.MOV_CR3).tolist() if chunk.has_events else []
        addr, access = np.ascontiguousarray(chunk.addr), np.ascontiguousarray(chunk.access)
        pieces: list[Accesses] = []
        for stop in [*stops, len(chunk)]:
            if row < stop:
                for vcpu, start, end in self._by_vcpu(chunk, row, stop):
                    pieces.append(self.vcpus[vcpu].access(addr[start:end], access[start:end]))
            if stop < len(chunk):
                self._event(chunk, stop)
            row = stop + 1
        if pieces:
            self._count(chunk, pieces)
        self.dirty_over_time.append((self.accesses, len(self.dirty)))

    def _by_vcpu(self, chunk: Chunk, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (vCPU, start, stop) of runs of rows of one vCPU, in order: exits of one vCPU spare another's."""
        if chunk.vcpu is None or len(self.vcpus) == 1:
            return [(0, start, stop)]
        vcpu = chunk.vcpu[start:stop]
        cuts = [start, *(np.flatnonzero(np.diff(vcpu)) + start + 1).tolist(), stop]
        return [(int(chunk.vcpu[first]), first, last) for first, last in pairwise(cuts)]

    def _count(self, chunk: Chunk, pieces: list[Accesses]) -> None:
        """Count what the accesses of a chunk met. IN pieces: their results, in order."""
        is_access = chunk.op < Op.MOV_CR3
        op, recorded = chunk.op[is_access], chunk.gpa[is_access]
        gpa, hpa, status, code, ret, exits = (np.concatenate([getattr(piece, name) for piece in pieces])
                                              for name in ("gpa", "hpa", "status", "error_code", "ret", "exits"))
        known = recorded != np.uint64(INVALID_GPA)
        good = known & (gpa == recorded)
        self.verified += int(np.count_nonzero(good))
        self.mismatches += int(np.count_nonzero(known & ~good))
        self.unchecked += int(np.count_nonzero(~known))
        if status.any():
            failed = ~known & (status != Status.OK)
            self.statuses += np.bincount(status[failed], minlength=256)
            codes, counts = np.unique(code[failed & (status == Status.PAGE_FAULT)], return_counts=True)
            self.error_codes.update(dict(zip(codes.tolist(), counts.tolist(), strict=True)))
        self.kinds += np.bincount(op & np.uint8(OP_KIND), minlength=4)[:3]
        self.mmio += int(np.count_nonzero(op & np.uint8(OP_MMIO)))
        took = np.flatnonzero(exits)
        if took.size:
            self.pieces.append((took.astype(np.uint64) + np.uint64(self.accesses), exits[took].astype(np.uint64)))
            self.rets += np.bincount(ret[took], minlength=256)
        self.to_l1 += int(np.count_nonzero(np.isin(status, _EXITS_TO_L1)))
        stores = (op == Op.STORE) & (hpa != np.uint64(INVALID_GPA))
        if stores.any():
            self.dirty.update(np.unique(gpa[stores] >> np.uint64(PAGE_SHIFT)).tolist())
        self.accesses += op.size

    def _event(self, chunk: Chunk, row: int) -> None:
        """Carry out the event of a row."""
        assert chunk.value is not None
        assert chunk.size is not None
        op, vcpu = Op(chunk.op[row]), 0 if chunk.vcpu is None else int(chunk.vcpu[row])
        addr, value = int(chunk.addr[row]), int(chunk.value[row])
        if op in (Op.MEMORY, Op.MEMORY_WORD):
            return
        self.events[op] += 1
        if op in (Op.PAGE_FAULT, Op.NPT_FAULT):
            self.faults[op, value] += 1
        try:
            if op == Op.GUEST_WRITE:
                self._write(addr, value, int(chunk.size[row]))
            elif op == Op.INVLPG:
                self.vcpus[vcpu].invlpg(addr)
            elif op == Op.INVPCID:
                self.vcpus[vcpu].invpcid(*invpcid_operands(value), addr)
            elif op == Op.RESTART:
                self._restart()
            elif op in (Op.SET_REGS, Op.VMENTER, Op.VMEXIT):
                self._use(vcpu, self._loaded(self.contexts[value]))
                self._note_context(vcpu)
            elif op in (Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU, Op.WRMSR_PKRS):
                self._load(vcpu, op, value)
                self._note_context(vcpu)
        except (GuestFault, ValueError) as error:
            raise TraceError(f"{op.name} in row {row} of the chunk behind access {self.accesses}: {error}") from error

    def _write(self, gpa: int, value: int, size: int) -> None:
        """Store into guest memory. KVM learns of it where it shadows tables, as it write-protects them."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if self.told:
            self.vm.write_guest_physical(gpa, data)
        else:
            self.mem.write(gpa, data)
        self.writes += 1
        self.dirty.add(gpa >> PAGE_SHIFT)

    def _restart(self) -> None:
        """Put memory and registers back to what they were at the start."""
        if self.start.restart is None:
            raise TraceError("needs memory that the trace brings itself, and it has none")
        self.start.restart()
        for vcpu, context in enumerate(self.first):
            self._use(vcpu, context)

    # ---- registers -----------------------------------------------------------------------------------------------------

    def _loaded(self, context: Context) -> Context:
        """Return a context of L1 under PAE paging with the PDPTEs that are in memory now."""
        if isinstance(context, tuple) or not context.is_pae_paging:
            return context
        return replace(context, pdptrs=pdptrs_at(self.mem, self.vm.cpu, context.cr3, self.header.pdpte_clear))

    def _use(self, vcpu: int, context: Context) -> None:
        """Load a context on a vCPU; as on a real one, that drops what its TLB has unless the trace says otherwise."""
        one = self.vcpus[vcpu]
        one.leave_nested()
        if isinstance(context, tuple):
            one.enter_nested(context[1], **registers_of(context[0]))
        else:
            registers = registers_of(context)
            if self.host == "shadow":
                del registers["pkru"]                   # shadow paging has no protection keys
            if context.pdptrs is not None:              # an NPT host takes them from memory
                for gpa, pdpte in zip(pdpte_gpas(context.cr3), context.pdptrs, strict=True):
                    self.mem.write_u64(gpa, pdpte)
            one.set_regs(**registers)
        self.states[vcpu] = context

    def _note_context(self, vcpu: int) -> None:
        if len(self.seen) < _CONTEXTS:
            self.seen.add(self.states[vcpu])

    def _load(self, vcpu: int, op: Op, value: int) -> None:
        """Carry out a register load by the guest, whose legality the recorded CPU has checked."""
        context = self.states[vcpu]
        one = self.vcpus[vcpu]
        if isinstance(context, tuple):
            regs, stage = context
            self._use(vcpu, (self._changed(regs, op, value), stage))
            return
        after = self._changed(context, op, value)
        if op == Op.WRPKRU:
            if self.host != "shadow":
                one.wrpkru(value)
            self.states[vcpu] = after
        elif op == Op.WRMSR_PKRS:
            one.wrmsr_pkrs(value)
            self.states[vcpu] = after
        elif op == Op.MOV_CR3 and not after.is_pae_paging:
            one.mov_cr(3, value)
            self.states[vcpu] = replace(after, cr3=value & ~CR3_NOFLUSH if after.cr4 & Cr4.PCIDE else value)
        else:
            self._use(vcpu, self._loaded(after))

    @staticmethod
    def _changed(regs: Regs, op: Op, value: int) -> Regs:
        if op == Op.MOV_CR3:
            return replace(regs, cr3=value & ~CR3_NOFLUSH if regs.cr4 & Cr4.PCIDE else value, pdptrs=None)
        if op == Op.WRMSR_EFER:
            return replace(regs, efer=value | regs.efer & int(Efer.LMA))     # that bit is the processor's
        if op == Op.WRPKRU:
            return replace(regs, pkru=value)
        if op == Op.WRMSR_PKRS:
            return replace(regs, pkrs=value)
        return replace(regs, cr0=value, pdptrs=None) if op == Op.MOV_CR0 else replace(regs, cr4=value, pdptrs=None)

    # ---- what was found ------------------------------------------------------------------------------------------------

    def report(self, complete: bool) -> MachineReport:
        """Return what the replay found."""
        header, before = self.header, self.start.stats
        stats = {name: count if name.startswith("pages_") else count - before.get(name, 0)
                 for name, count in self.vm.stats.items()}
        pages = len(self.vm.sptes()["sp"])
        found = MachineReport(
            name=header.name, phase=header.phase, mode=mode_of(header), complete=complete, accesses=self.accesses,
            verified=self.verified,
            kinds=dict(zip(("load", "store", "fetch"), self.kinds.tolist(), strict=True)), mismatches=self.mismatches,
            table_writes=self.writes, contexts=len(header.contexts) or len(self.seen), unchecked=self.unchecked, mmio=self.mmio,
            host=self.host, backing=self.backing, exits=self._exits(stats), exits_to_l1=self.to_l1, stats=stats,
            shadow_pages=pages, table_bytes=PAGE_SIZE * pages,
            sptes={size: stats[f"pages_{size}"] for size in BACKINGS},
            flushes={name: stats[name] for name in _FLUSHES if name in stats},
            walk_faults=failed_walks(self.error_codes, self.statuses.tolist()), faults_checked=False,
            dirty_over_time=self._samples(), seconds=time.perf_counter() - self.started)
        found.faults = {fault_text(*fault): count for fault, count in self.faults.items()}
        found.by_ret = {RetPf(code).name: int(count) for code, count in enumerate(self.rets.tolist()) if count}
        if self.pieces:
            found.exit_position, found.exit_count = (np.concatenate(column) for column in zip(*self.pieces, strict=True))
        return found

    def _exits(self, stats: dict[str, int]) -> dict[str, int]:
        reason = {"ept": "EPT violations", "npt": "nested page faults"}.get(self.host, "shadow page faults")
        total = sum(int(count.sum()) for _, count in self.pieces)
        exits = {reason: total - stats.get("mmio_exits", 0), "MMIO": stats.get("mmio_exits", 0)}
        if self.host == "shadow":
            exits |= {name: self.events[op] for op, name in SHADOW_EXITS.items()}
        return {name: count for name, count in exits.items() if count}

    def _samples(self) -> list[tuple[int, int]]:
        step = -(-len(self.dirty_over_time) // _SAMPLES) or 1
        return self.dirty_over_time[::step][:-1] + self.dirty_over_time[-1:] if self.dirty_over_time else []
