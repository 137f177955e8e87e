"""Replay of a trace: chunks of rows walked as they come, events in their places, in memory that does not grow."""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from kvmmu.arch._bits import CR3_NOFLUSH, INVALID_GPA, Cr0, Cr4, Efer, Op, Status
from kvmmu.arch.faults import GuestFault, access_text, error_code_text, npf_info_text
from kvmmu.arch.registers import CpuModel, Regs, after_mov_cr, after_wrmsr_efer, after_wrpkru
from kvmmu.arch.second_stages import Ept, Npt, Stage
from kvmmu.replay._replay import RowLoop, new_row_loop
from kvmmu.replay.recorded_faults import (
    Context,
    FaultCounts,
    npt_fault,
    npt_fault_text,
    page_fault_access,
    page_fault_reproduced,
    pdptrs_at,
    use_context,
)
from kvmmu.replay.result import EXPLAINED, Mismatch, ReplayInterrupted, Report
from kvmmu.replay.trace_memory import SetUp, TraceMemory
from kvmmu.tlb.processor import ProcessorTlbs
from kvmmu.traces import Chunk, Header, ParquetTrace, RegisterSet, Trace, TraceError
from kvmmu.traces import Stage as TraceStage
from kvmmu.vm.vcpu import Vcpu
from kvmmu.walk._register_sets import RegisterSets

__all__ = ["TraceStart", "replay_trace", "trace_start"]

_PREPARED = 1024                        # register sets kept ready
_REGISTER_EVENTS = (Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU, Op.VMENTER, Op.VMEXIT, Op.SET_REGS, Op.RESTART)
_TOUCHED_LIMIT = 1 << 22                # pages
_PAGE_SHIFT, _MMIO = np.uint64(12), np.uint8(4)
_PAGE_SIZES = ("paging off", "4K", "2M", "1G")
Progress = Callable[[int, int], object]


def replay_trace(trace: Trace, vcpu: Vcpu | None = None, progress: Progress | None = None,
                 tlbs: Callable[[int], ProcessorTlbs] | None = None) -> Report:
    """Walk every access of a trace and hold each against its recorded physical address, where it has one.

    Parameters
    ----------
    trace : Trace
    vcpu : Vcpu, optional
        Whose memory to walk, for a trace that brings none; its registers are those of the header.
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) after each chunk.
    tlbs : callable, optional
        Called with the number of vCPUs; makes the TLBs that the accesses go through.

    Raises
    ------
    TraceError
        The trace is damaged, or tells of something that no CPU does; its `report` is what was done until then.
    ReplayInterrupted
        Ctrl-C; its `report` likewise.
    """
    # A program that makes chunks, or looks on, may write the tables meanwhile: those of a vCPU that it has
    alone = vcpu is None or (type(trace) is ParquetTrace and progress is None)
    run = _TraceRun(trace.header, vcpu, progress, alone, tlbs)
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
        named = _with_file(error, trace)
        named.report = run.report(complete=False)
        raise named from error.__cause__


def _with_file(error: TraceError, trace: Trace) -> TraceError:
    """The error, with the file of the trace in its message if there is one."""
    path = getattr(trace, "path", None)
    return error if path is None or str(error).startswith(str(path)) else TraceError(f"{path}: {error}")


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


class _TraceRun:
    """One replay under way."""

    def __init__(self, header: Header, vcpu: Vcpu | None, progress: Progress | None, alone: bool,
                 tlbs: Callable[[int], ProcessorTlbs] | None = None) -> None:
        self.tlbs = None if tlbs is None else tlbs(header.vcpus)
        self.header, self.progress, self.alone = header, progress, alone
        self.given = vcpu
        self.started = time.perf_counter()
        self.waited = 0.0
        self.accesses = self.rows = 0
        self.set_up: SetUp | None = SetUp()
        self.own_memory: TraceMemory | None = None
        self.loop: RowLoop | None = None
        self.examples: list[Mismatch] = []
        self.fault_counts = FaultCounts()
        self.seen: set[Context] = set()
        self.prepared: OrderedDict[Context, RegisterSets] = OrderedDict()

    # ---- beginning and end ---------------------------------------------------------------------------------------------

    def _begin(self, brings_memory: bool) -> None:
        """The first row that is not of the set-up: memory is known, registers are loaded."""
        assert self.set_up is not None
        set_up, self.set_up = self.set_up, None
        if self.given is None:
            self.own_memory = set_up.memory()
            # PDPTEs are registers: as they were loaded
            self.vcpu = Vcpu(self.own_memory.guest, cpu=_cpu_of(self.header), tdp="ept")
        elif brings_memory:
            raise TraceError("the trace brings its own memory (MEMORY rows): replay it without a vCPU")
        else:
            self.vcpu = self.given
            self.vcpu.leave_nested()
        self.mem, self.cpu, self.walk = self.vcpu.mem, self.vcpu.cpu, self.vcpu.gva_walk
        try:
            self.sets = [self._context(regs) for regs in self.header.contexts]
        except ValueError as error:
            raise TraceError(f"header: contexts: {str(error).removeprefix('header: ')}") from error
        self.loop = new_row_loop(self.walk, self.header.vcpus, EXPLAINED)
        if self.tlbs is not None:
            self.loop.feed(self.tlbs.stream)
        self.states: list[Context] = [Regs(0, 0, 0, 0)] * self.header.vcpus
        self.in_force: list[RegisterSets | None] = [None] * self.header.vcpus
        self.stages: list[Stage | None] = [None] * self.header.vcpus
        self._load_start()

    def finish(self) -> None:
        """The trace has ended; memory that nothing has used is checked all the same."""
        if self.set_up:
            self._begin(brings_memory=True)

    def _load_start(self) -> None:
        for vcpu, regs in enumerate(self.header.registers):
            try:
                self._enter(vcpu, self._with_pdptrs(self._context(regs)))
                if self.tlbs is not None:
                    self.tlbs.follow(vcpu, self.states[vcpu])
            except (GuestFault, ValueError) as error:
                raise TraceError(f"header: registers[{vcpu}]: {str(error).removeprefix('header: ')}") from error

    def report(self, complete: bool) -> Report:
        """What was found so far."""
        header, loop = self.header, self.loop
        report = Report(
            name=header.name, phase=header.phase, mode=header.mode or self._mode(), accesses=0, complete=complete,
            faults=self.fault_counts.by_code(), faults_reproduced=self.fault_counts.by_code(True),
            faults_checked=header.tables_at == "start",
            examples=self.examples, contexts=len(header.contexts) or len(self.seen), waited=self.waited,
            seconds=time.perf_counter() - self.started)
        if loop is None:
            return report
        report.kinds = dict(zip(("load", "store", "fetch"), loop.kinds, strict=True))
        report.accesses = sum(loop.kinds)
        report.verified, report.unchecked = loop.verified, loop.unchecked
        report.table_writes, report.mmio = loop.writes, loop.mmio
        report.mismatches = loop.mismatches + self.fault_counts.mismatches
        sizes = [("4M" if report.mode == "32" and size == "2M" else size) for size in _PAGE_SIZES]
        report.page_sizes = {size: count for size, count in zip(sizes, loop.page_sizes, strict=True) if count}
        report.tlb = None if self.tlbs is None else self.tlbs.stats()
        report.walk_faults = {error_code_text(code): count for code, count in loop.error_codes.items()} | {
            Status(status).name: count for status, count in enumerate(loop.statuses)
            if count and status not in (Status.OK, Status.PAGE_FAULT)}
        return report

    def _mode(self) -> str:
        regs = self.header.registers[0]
        return _mode_of(Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer))

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def set_up_rows(self, chunk: Chunk) -> int:
        """Take the rows of the set-up that a chunk has; returns how many those are. Begins with the first other row."""
        if self.set_up is None:
            return 0
        rows = self.set_up.take(chunk)
        if rows < len(chunk):
            self._begin(brings_memory=bool(self.set_up))
        return rows

    def chunk(self, chunk: Chunk) -> None:
        """Walk a chunk."""
        row = self.set_up_rows(chunk)
        if self.set_up is not None:
            self.rows += row
            return
        loop = self.loop
        assert loop is not None
        if self.own_memory is not None:
            self.own_memory.note_writes(chunk)
        loop.load(chunk)
        if not self.alone:
            loop.forget()
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
        before = self.states[vcpu]
        try:
            if op == Op.PAGE_FAULT:
                self._check_fault(self._position(chunk, row), vcpu, addr, value)
            elif op == Op.NPT_FAULT:
                self._check_npt_fault(self._position(chunk, row), vcpu, addr, value)
            elif op == Op.GUEST_WRITE:
                raise TraceError(f"goes to gpa {addr:#x}, where the guest has no memory")
            elif op in (Op.MEMORY, Op.MEMORY_WORD):
                raise TraceError("comes behind another kind of row; memory is set up first")
            elif op == Op.RESTART:
                self._restart()
            elif op in (Op.SET_REGS, Op.VMENTER, Op.VMEXIT):
                self._enter(vcpu, self._with_pdptrs(self.sets[value], self.states[vcpu]))
            elif op in (Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU):
                self._load(vcpu, op, value)
            # INVLPG, INVPCID, HOST_INVALIDATE: the walk keeps nothing; SET_CPL_AC: accesses say it themselves
            if self.tlbs is not None:
                self.tlbs.event(op, vcpu, addr, value, before, self.states[vcpu])
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
        if self.own_memory is None:
            raise TraceError("needs memory that the trace brings itself, and it has none")
        self.own_memory.restart()
        self._load_start()

    # ---- recorded faults -----------------------------------------------------------------------------------------------

    def _check_fault(self, position: int, vcpu: int, gva: int, error_code: int) -> None:
        code = error_code_text(error_code)
        if self.header.tables_at != "start":
            self.fault_counts.add(code, None)
            return
        context, contexts = self.states[vcpu], self.in_force[vcpu]
        assert contexts is not None
        reproduced = page_fault_reproduced(self.walk, contexts, 0, gva, error_code)
        self.fault_counts.add(code, reproduced)
        if reproduced:
            return
        if len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(
                position, gva, f"#PF {code} at {gva:#x}", self._explain(context, gva, int(page_fault_access(error_code)))))

    def _check_npt_fault(self, position: int, vcpu: int, gpa: int, info: int) -> None:
        code = f"#NPF {npf_info_text(info)}"
        if self.header.tables_at != "start":
            self.fault_counts.add(code, None)
            return
        stage = self.stages[vcpu]
        if not isinstance(stage, Npt):
            raise TraceError("no nested guest under an NPT has run on this vCPU")
        walked = npt_fault(self.vcpu, stage, gpa, info)
        self.vcpu.leave_nested()
        self.fault_counts.add(code, walked == (info, gpa))
        if walked == (info, gpa):
            return
        if len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(position, gpa, f"{code} at gpa {gpa:#x}", npt_fault_text(walked)))


# ---- a trace without its replay ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TraceStart:
    """A trace at its start, and which pages it touches later.

    Attributes
    ----------
    vcpu : Vcpu
        Has the memory that the trace brings, and the registers of its first vCPU.
    contexts : list of Context
        The register sets of the header.
    memory : TraceMemory
    touched : dict of Context to set of int
        Linear addresses of pages, by the registers under which they were accessed.
    end : int
        Behind the last byte of memory, brought or accessed.
    """

    vcpu: Vcpu
    contexts: list[Context]
    memory: TraceMemory
    touched: dict[Context, set[int]]
    end: int


def trace_start(trace: Trace, touched: bool = False) -> TraceStart:
    """Read a trace up to the end of its set-up; with `touched` to its end, for the pages that it touches.

    Raises
    ------
    TraceError
        The trace is damaged, brings no memory, or touches too many pages.
    """
    run = _TouchRun(trace.header)
    try:
        with closing(trace.chunks()) as chunks:
            for chunk in chunks:
                run.touch(chunk)
                if run.set_up is None and not touched:
                    break
        return run.start()
    except TraceError as error:
        raise _with_file(error, trace) from error.__cause__


class _TouchRun(_TraceRun):
    """Registers followed through a trace, and pages noted. Nothing is walked, and writes are passed over."""

    def __init__(self, header: Header) -> None:
        super().__init__(header, None, None, True)
        self.touched: dict[Context, set[int]] = {}
        self.pages = self.end = 0

    def touch(self, chunk: Chunk) -> None:
        row = self.set_up_rows(chunk)
        if self.set_up is None:
            stops = np.flatnonzero(np.isin(chunk.op, _REGISTER_EVENTS)).tolist() if chunk.has_events else []
            for stop in [*stops, len(chunk)]:
                if row < stop:
                    self._note(chunk, slice(row, stop))
                if stop < len(chunk):
                    self._event(chunk, stop)
                row = stop + 1
        self.rows += len(chunk)

    def _note(self, chunk: Chunk, rows: slice) -> None:
        op, addr, gpa = chunk.op[rows], chunk.addr[rows], chunk.gpa[rows]
        accesses = op < Op.MOV_CR3
        memory = gpa[accesses & (op & _MMIO == 0) & (gpa != np.uint64(INVALID_GPA))]
        self.end = max(self.end, int(memory.max(initial=0)) + 1)
        vcpus = [0] if chunk.vcpu is None else np.unique(chunk.vcpu[rows]).tolist()
        for vcpu in vcpus:
            here = accesses if chunk.vcpu is None else accesses & (chunk.vcpu[rows] == vcpu)
            pages = self.touched.setdefault(self.states[vcpu], set())
            self.pages -= len(pages)
            pages.update((np.unique(addr[here] >> _PAGE_SHIFT) << _PAGE_SHIFT).tolist())
            self.pages += len(pages)
        if self.pages > _TOUCHED_LIMIT:
            raise TraceError(f"touches more than {_TOUCHED_LIMIT:,} pages, which is all that is allowed here")

    def start(self) -> TraceStart:
        if self.set_up is not None:
            self._begin(brings_memory=True)
        assert self.own_memory is not None
        end = max(gpa + size for gpa, size, _ in self.own_memory.guest.slots)
        state = self._with_pdptrs(self._context(self.header.registers[0]))
        use_context(self.vcpu, state)
        return TraceStart(self.vcpu, [self._with_pdptrs(context) for context in self.sets], self.own_memory, self.touched,
                          max(self.end, end))


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
