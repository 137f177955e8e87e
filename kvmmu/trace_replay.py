"""Replay of a trace: chunks of rows walked as they come, events in their places, in memory that does not grow."""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np

from kvmmu._bits import CR3_NOFLUSH, Cr0, Cr4, Efer, Op, Status
from kvmmu._contexts import Contexts
from kvmmu._memory import GuestMemory
from kvmmu._replay import RowLoop
from kvmmu.faults import GuestFault, access_text, error_code_text, npf_info_text
from kvmmu.nested import Ept, Npt, Stage
from kvmmu.outcome import EXPLAINED, Mismatch, ReplayInterrupted, Report
from kvmmu.recorded_faults import (
    Context,
    npt_fault,
    npt_fault_text,
    page_fault_access,
    page_fault_reproduced,
    pdptrs_at,
    use_context,
)
from kvmmu.registers import CpuModel, Regs, after_mov_cr, after_wrmsr_efer, after_wrpkru
from kvmmu.traces import Chunk, Header, RegisterSet, Trace, TraceError
from kvmmu.traces import Stage as TraceStage
from kvmmu.vcpu import Vcpu

__all__ = ["replay_trace"]

_PREPARED = 1024                        # register sets kept ready
_SET_UP = (Op.MEMORY, Op.MEMORY_WORD)
_MEMORY_LIMIT = 1 << 40
_PAGE_SIZES = ("paging off", "4K", "2M", "1G")
Progress = Callable[[int, int], object]


def replay_trace(trace: Trace, vcpu: Vcpu | None = None, progress: Progress | None = None) -> Report:
    """Walk every access of a trace and hold each against its recorded physical address, where it has one.

    Parameters
    ----------
    trace : Trace
    vcpu : Vcpu, optional
        Whose memory to walk, for a trace that brings none; its registers are those of the header.
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) after each chunk.

    Raises
    ------
    TraceError
        The trace is damaged, or tells of something that no CPU does; its `report` is what was done until then.
    ReplayInterrupted
        Ctrl-C; its `report` likewise.
    """
    run = _TraceRun(trace.header, vcpu, progress)
    try:
        with closing(trace.chunks()) as chunks:
            while True:
                started = time.perf_counter()
                chunk = next(chunks, None)
                run.waited += time.perf_counter() - started
                if chunk is None:
                    break
                run.chunk(chunk)
        run.finish()
        return run.report(complete=True)
    except KeyboardInterrupt:
        raise ReplayInterrupted(run.report(complete=False)) from None
    except TraceError as error:
        error.report = run.report(complete=False)
        raise


def _mode_of(regs: Regs) -> str:
    if not regs.cr0 & Cr0.PG:
        return "off"
    if not regs.cr4 & Cr4.PAE:
        return "32"
    if not regs.efer & Efer.LMA:
        return "pae"
    return "5l" if regs.cr4 & Cr4.LA57 else "4l"


def _stage_of(stage: TraceStage) -> Stage:
    """A second stage of a header as the walks take it."""
    given = stage.given()
    try:
        return Npt(**given) if "ncr3" in given else Ept(**given)
    except ValueError as error:
        raise TraceError(f"header: second_stage: {error}") from None


def _cpu_of(header: Header) -> CpuModel:
    try:
        return CpuModel(**header.cpu)
    except (TypeError, ValueError) as error:
        raise TraceError(f"header: cpu: {error}") from None


class _SetUp:
    """Memory that a trace brings: its MEMORY and MEMORY_WORD rows, which come before all others."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int]] = []
        self.words: list[tuple[np.ndarray, np.ndarray]] = []

    def take(self, chunk: Chunk) -> int:
        """Take the rows at the beginning of a chunk; returns how many those are."""
        others = np.flatnonzero(~np.isin(chunk.op, _SET_UP))
        rows = int(others[0]) if others.size else len(chunk)
        if rows and chunk.value is not None:
            op, addr, value = chunk.op[:rows], chunk.addr[:rows], chunk.value[:rows]
            here = op == Op.MEMORY
            self.regions += zip(addr[here].tolist(), value[here].tolist(), strict=True)
            self.words.append((addr[~here], value[~here]))
            if sum(size for _, size in self.regions) > _MEMORY_LIMIT:
                raise TraceError(f"MEMORY: more than {_MEMORY_LIMIT:#x} bytes in all")
        return rows

    def memory(self) -> tuple[GuestMemory, list[tuple[int, bytes]]]:
        """The memory, and a copy of what is in it: a list of (gpa, bytes)."""
        if not self.regions:
            raise TraceError("the trace brings no memory (MEMORY rows), and no vCPU was given to replay it on")
        regions = sorted(self.regions)
        try:
            blocks = [(gpa, np.zeros(size, np.uint8)) for gpa, size in regions]
        except MemoryError:
            raise TraceError(f"MEMORY: {sum(size for _, size in regions):#x} bytes are more than this machine gives") from None
        starts = np.array([gpa for gpa, _ in regions], np.uint64)
        ends = starts + np.array([size for _, size in regions], np.uint64)
        for lower, upper in zip(ends[:-1], starts[1:], strict=True):
            if lower > upper:
                raise TraceError(f"MEMORY: two regions overlap at gpa {int(upper):#x}")
        for addr, value in self.words:
            at = np.searchsorted(starts, addr, side="right") - 1
            outside = (at < 0) | (addr >= ends[np.maximum(at, 0)])
            if outside.any():
                raise TraceError(f"MEMORY_WORD: gpa {int(addr[outside][0]):#x} is in no MEMORY region")
            for region in np.unique(at).tolist():
                here = at == region
                blocks[region][1].view("<u8")[(addr[here] - starts[region]) >> np.uint64(3)] = value[here]
        return _memory_of(blocks), [(gpa, data.tobytes()) for gpa, data in blocks]


def _memory_of(blocks: list[tuple[int, np.ndarray]]) -> GuestMemory:
    gpas = np.concatenate([np.arange(gpa, gpa + data.size, 4096, dtype=np.uint64) for gpa, data in blocks])
    return GuestMemory.from_pages(gpas, np.concatenate([data for _, data in blocks]).reshape(-1, 4096))


class _TraceRun:
    """One replay under way."""

    def __init__(self, header: Header, vcpu: Vcpu | None, progress: Progress | None) -> None:
        self.header, self.progress = header, progress
        self.given = vcpu
        self.started = time.perf_counter()
        self.waited = 0.0
        self.accesses = self.rows = 0
        self.set_up: _SetUp | None = _SetUp()
        self.loop: RowLoop | None = None
        self.examples: list[Mismatch] = []
        self.faults: dict[str, int] = {}
        self.faults_reproduced: dict[str, int] = {}
        self.fault_mismatches = 0
        self.seen: set[Context] = set()
        self.prepared: OrderedDict[Context, Contexts] = OrderedDict()

    # ---- beginning and end ---------------------------------------------------------------------------------------------

    def _begin(self, brings_memory: bool) -> None:
        """The first row that is not of the set-up: memory is known, registers are loaded."""
        assert self.set_up is not None
        set_up, self.set_up = self.set_up, None
        self.initial: list[tuple[int, bytes]] | None = None
        if self.given is None:
            mem, self.initial = set_up.memory()
            self.vcpu = Vcpu(mem, cpu=_cpu_of(self.header), tdp="ept")       # PDPTEs are registers: as they were loaded
        elif brings_memory:
            raise TraceError("the trace brings its own memory (MEMORY rows): replay it without a vCPU")
        else:
            self.vcpu = self.given
            self.vcpu.leave_nested()
        self.mem, self.cpu, self.walk = self.vcpu.mem, self.vcpu.cpu, self.vcpu.gva_walk
        self.sets = [self._context(regs) for regs in self.header.contexts]
        self.loop = RowLoop(self.walk, self.header.vcpus, EXPLAINED)
        self.states: list[Context] = [Regs(0, 0, 0, 0)] * self.header.vcpus
        self.in_force: list[Contexts | None] = [None] * self.header.vcpus
        self.stages: list[Stage | None] = [None] * self.header.vcpus
        self._load_start()

    def finish(self) -> None:
        """The trace has ended; memory that nothing has used is checked all the same."""
        if self.set_up is not None and (self.set_up.regions or self.set_up.words):
            self._begin(brings_memory=True)

    def _load_start(self) -> None:
        for vcpu, regs in enumerate(self.header.registers):
            try:
                self._enter(vcpu, self._with_pdptrs(self._context(regs)))
            except GuestFault as error:
                raise TraceError(f"header: registers[{vcpu}]: {error}") from error

    def report(self, complete: bool) -> Report:
        """What was found so far."""
        header, loop = self.header, self.loop
        report = Report(
            name=header.name, phase=header.phase, mode=header.mode or self._mode(), accesses=0, complete=complete,
            faults=self.faults, faults_reproduced=self.faults_reproduced, faults_checked=header.tables_at == "start",
            examples=self.examples, contexts=len(header.contexts) or len(self.seen), waited=self.waited,
            seconds=time.perf_counter() - self.started)
        if loop is None:
            return report
        report.kinds = dict(zip(("load", "store", "fetch"), loop.kinds, strict=True))
        report.accesses = sum(loop.kinds)
        report.verified, report.unchecked = loop.verified, loop.unchecked
        report.table_writes, report.mmio = loop.writes, loop.mmio
        report.mismatches = loop.mismatches + self.fault_mismatches
        sizes = [("4M" if report.mode == "32" and size == "2M" else size) for size in _PAGE_SIZES]
        report.page_sizes = {size: count for size, count in zip(sizes, loop.page_sizes, strict=True) if count}
        report.walk_faults = {error_code_text(code): count for code, count in loop.error_codes.items()} | {
            Status(status).name: count for status, count in enumerate(loop.statuses)
            if count and status not in (Status.OK, Status.PAGE_FAULT)}
        return report

    def _mode(self) -> str:
        regs = self.header.registers[0]
        return _mode_of(Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer))

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def chunk(self, chunk: Chunk) -> None:
        """Walk a chunk."""
        row = 0
        if self.set_up is not None:
            row = self.set_up.take(chunk)
            if row == len(chunk):
                self.rows += row
                return
            self._begin(brings_memory=bool(self.set_up.regions or self.set_up.words))
        loop = self.loop
        assert loop is not None
        loop.load(chunk)
        while True:
            row = loop.run(row)
            stopped = loop.take_mismatches()
            for bad in stopped:
                self._mismatch_at(chunk, bad)
            if stopped:
                continue
            if row == len(chunk):
                break
            row = self._event(chunk, row)
        self.rows += len(chunk)
        self.accesses = sum(loop.kinds)
        if self.progress:
            self.progress(self.accesses, self.header.accesses or 0)

    def _position(self, chunk: Chunk, row: int) -> int:
        """Number of the access of a row, or of the one that follows an event."""
        return self.accesses + int(np.count_nonzero(chunk.op[:row] < Op.MOV_CR3))

    def _vcpu_of(self, chunk: Chunk, row: int) -> int:
        return 0 if chunk.vcpu is None else int(chunk.vcpu[row])

    def _mismatch_at(self, chunk: Chunk, row: int) -> None:
        gva, gpa, access = int(chunk.addr[row]), int(chunk.gpa[row]), int(chunk.access[row])
        self.examples.append(Mismatch(
            self._position(chunk, row), gva, f"{access_text(access)} of {gva:#x} reached gpa {gpa:#x}",
            self._explain(self.states[self._vcpu_of(chunk, row)], gva, access)))

    def _explain(self, context: Context, gva: int, access: int) -> str:
        use_context(self.vcpu, context)
        text = str(self.walk.walk_record(gva, access))
        self.vcpu.leave_nested()
        return text

    def _event(self, chunk: Chunk, row: int) -> int:
        """Carry out the event in a row; returns the next row."""
        op, vcpu, addr = Op(chunk.op[row]), self._vcpu_of(chunk, row), int(chunk.addr[row])
        assert chunk.value is not None
        value = int(chunk.value[row])
        place = f"row {self.rows + row}: {op.name}"
        try:
            if op == Op.PAGE_FAULT:
                self._check_fault(self._position(chunk, row), vcpu, addr, value)
            elif op == Op.NPT_FAULT:
                self._check_npt_fault(self._position(chunk, row), vcpu, addr, value)
            elif op == Op.GUEST_WRITE:
                raise TraceError(f"goes to gpa {addr:#x}, where the guest has no memory")
            elif op in _SET_UP:
                raise TraceError("comes behind another kind of row; memory is set up first")
            elif op == Op.RESTART:
                self._restart()
            elif op in (Op.SET_REGS, Op.VMENTER, Op.VMEXIT):
                self._enter(vcpu, self._with_pdptrs(self.sets[value], self.states[vcpu]))
            elif op in (Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU):
                self._load(vcpu, op, value)
            # INVLPG, INVPCID, HOST_INVALIDATE: the walk keeps nothing; SET_CPL_AC: accesses say it themselves
        except (GuestFault, ValueError) as error:
            raise TraceError(f"{place}: {error}") from error
        return row + 1

    # ---- registers -----------------------------------------------------------------------------------------------------

    def _context(self, regs: RegisterSet) -> Context:
        context = Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs)
        return context if regs.second_stage is None else (context, _stage_of(regs.second_stage))

    def _pdptrs(self, cr3: int) -> tuple[int, ...]:
        return pdptrs_at(self.mem, self.cpu, cr3, self.header.pdpte_clear)

    def _with_pdptrs(self, context: Context, before: Context | None = None) -> Context:
        """A context of L1 under PAE paging with its PDPTEs: those in force if CR3 stays, else from memory now."""
        if isinstance(context, tuple) or not context.is_pae_paging or context.pdptrs is not None:
            return context
        stays = isinstance(before, Regs) and before.is_pae_paging and before.cr3 == context.cr3
        return replace(context, pdptrs=before.pdptrs if stays and isinstance(before, Regs) else self._pdptrs(context.cr3))

    def _enter(self, vcpu: int, context: Context) -> None:
        """Put a context in force on a vCPU."""
        assert self.loop is not None
        # PDPTEs of L2 are loaded through the second stage when it is prepared, so each load needs a new one
        lasting = not isinstance(context, tuple) or not context[0].is_pae_paging
        contexts = self.prepared.get(context) if lasting else None
        if contexts is None:
            contexts = self.prepared[context] = self.walk.prepare([context])
            if len(self.prepared) > _PREPARED:
                self.prepared.popitem(last=False)
        if len(self.seen) < _PREPARED:
            self.seen.add(context)
        self.states[vcpu], self.in_force[vcpu] = context, contexts
        if isinstance(context, tuple):
            self.stages[vcpu] = context[1]
        self.loop.use(vcpu, contexts)

    def _load(self, vcpu: int, op: Op, value: int) -> None:
        """A register load by the guest."""
        context = self.states[vcpu]
        regs, stage = context if isinstance(context, tuple) else (context, None)
        if op == Op.WRMSR_EFER:
            after = after_wrmsr_efer(self.cpu, regs, value)
        elif op == Op.WRPKRU:
            after = after_wrpkru(regs, value)
        elif op == Op.MOV_CR3:
            cr3 = value & ~CR3_NOFLUSH if regs.cr4 & Cr4.PCIDE else value
            after = replace(regs, cr3=cr3, pdptrs=None)
        else:
            # PDPTEs are loaded below, as the recorded CPU did it
            space = _NoPdptrs()
            after = after_mov_cr(self.cpu, regs, 0 if op == Op.MOV_CR0 else 4, value, space)
            if space.used:
                after = replace(after, pdptrs=None)
        self._enter(vcpu, (after, stage) if stage is not None else self._with_pdptrs(after))

    def _restart(self) -> None:
        """Memory and registers as at the start."""
        if self.initial is None:
            raise TraceError("needs memory that the trace brings itself, and it has none")
        for gpa, data in self.initial:
            self.mem.write(gpa, data)
        self._load_start()

    # ---- recorded faults -----------------------------------------------------------------------------------------------

    def _check_fault(self, position: int, vcpu: int, gva: int, error_code: int) -> None:
        code = error_code_text(error_code)
        self.faults[code] = self.faults.get(code, 0) + 1
        if self.header.tables_at != "start":
            return
        context, contexts = self.states[vcpu], self.in_force[vcpu]
        assert contexts is not None
        if page_fault_reproduced(self.walk, contexts, 0, gva, error_code):
            self.faults_reproduced[code] = self.faults_reproduced.get(code, 0) + 1
            return
        self.fault_mismatches += 1
        if len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(
                position, gva, f"#PF {code} at {gva:#x}", self._explain(context, gva, int(page_fault_access(error_code)))))

    def _check_npt_fault(self, position: int, vcpu: int, gpa: int, info: int) -> None:
        code = f"#NPF {npf_info_text(info)}"
        self.faults[code] = self.faults.get(code, 0) + 1
        if self.header.tables_at != "start":
            return
        stage = self.stages[vcpu]
        if not isinstance(stage, Npt):
            raise TraceError("no nested guest under an NPT has run on this vCPU")
        walked = npt_fault(self.vcpu, stage, gpa, info)
        self.vcpu.leave_nested()
        if walked == (info, gpa):
            self.faults_reproduced[code] = self.faults_reproduced.get(code, 0) + 1
            return
        self.fault_mismatches += 1
        if len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(position, gpa, f"{code} at gpa {gpa:#x}", npt_fault_text(walked)))


class _NoPdptrs:
    """Memory for a register load whose PDPTEs are not looked at: it remembers that they were asked for."""

    def __init__(self) -> None:
        self.used = False

    def is_backed(self, gpa: int, n: int) -> bool:
        self.used = True
        return True

    def read_u64(self, gpa: int) -> int:
        self.used = True
        return 0
