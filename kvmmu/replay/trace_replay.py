"""Replay of rows: those of a trace as they come, or those of a recording, in memory that does not grow."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np

from kvmmu.arch._bits import INVALID_GPA, PAGE_SHIFT, Acc, Access, Cr0, Cr4, Efer, NpfInfo, Op
from kvmmu.arch.faults import GuestFault, NestedFault, access_text, error_code_text, npf_info_text
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.arch.second_stages import Npt
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay._replay import AT_EVENT, AT_MISMATCHES, END, RowLoop, new_row_loop
from kvmmu.replay.register_events import (
    REGISTER_EVENTS,
    Context,
    RegisterEvents,
    context_of,
    lacks_pdptrs,
    pdptrs_at,
    use_context,
)
from kvmmu.replay.result import EXPLAINED, Mismatch, ReplayInterrupted, Report, take_counts
from kvmmu.replay.trace_memory import SetUp, TraceMemory
from kvmmu.tlb.processor import ProcessorTlbs
from kvmmu.traces import Chunk, Header, ParquetTrace, Recording, RecordingError, RegisterSet, Trace, TraceError
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.traces.conversion import recording_header
from kvmmu.vm.vcpu import Vcpu

__all__ = ["RowRun", "recording_vcpu", "replay_recording", "replay_trace", "with_file"]

_STRETCH = 1 << 20                      # rows of a recording between two calls of progress
_MAX_OFF = 0xFFFF                       # of the 16 bits of a recorded offset
Progress = Callable[[int, int], object]
MakeTlbs = Callable[[int], ProcessorTlbs]


def replay_trace(trace: Trace, vcpu: Vcpu | None = None, progress: Progress | None = None,
                 tlbs: MakeTlbs | None = None) -> Report:
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
    run = RowRun(trace.header, vcpu, alone, tlbs)
    try:
        with closing(trace.chunks()) as chunks:
            while True:
                started = time.perf_counter()
                chunk = next(chunks, None)
                run.waited += time.perf_counter() - started
                if chunk is None:
                    break
                run.chunk(chunk)
                if progress and run.loop is not None:
                    progress(run.loop.accesses, trace.header.accesses or 0)
        run.finish()
        return run.report(complete=True)
    except KeyboardInterrupt:
        raise ReplayInterrupted(run.report(complete=False)) from None
    except TraceError as error:
        named = with_file(error, trace)
        named.report = run.report(complete=False)
        raise named from error.__cause__


def replay_recording(recording: Recording, progress: Progress | None = None, tlbs: MakeTlbs | None = None) -> Report:
    """Walk every access of a recording and hold each against its recorded physical address.

    Parameters
    ----------
    recording : Recording
    progress : callable, optional
        Called with (accesses done, accesses in all) about every million accesses.
    tlbs : callable, optional
        As for `replay_trace()`.

    Raises
    ------
    RecordingError
        The recording is damaged, or tells of something that no CPU does.
    ReplayInterrupted
        Ctrl-C; its `report` is what was done until then.
    """
    recording.check()
    if recording.pages_gpa.max(initial=0) > INVALID_GPA - _MAX_OFF:
        # a walk that faults ends at INVALID_GPA, and no recorded address may be that
        raise RecordingError(f"{recording.path}: pages_gpa: is {int(recording.pages_gpa.max()):#x}; allowed is below 2**52")
    run = RowRun(recording_header(recording), recording_vcpu(recording)[0], True, tlbs)
    try:
        for accesses in run.recorded(RecordedRows(recording)):
            if progress:
                progress(accesses, len(recording))
        return run.report(complete=True)
    except KeyboardInterrupt:
        raise ReplayInterrupted(run.report(complete=False)) from None
    except ValueError as error:
        raise RecordingError(f"{recording.path}: {str(error).removeprefix('header: ')}") from error.__cause__


def recording_vcpu(recording: Recording) -> tuple[Vcpu, list[Context]]:
    """A vCPU over the page tables of a recording, and the register sets of its contexts.

    Parameters
    ----------
    recording : Recording

    Returns
    -------
    Vcpu, list of Regs
        The vCPU has the registers of the first context.

    Raises
    ------
    RecordingError
        Table pages or registers that no guest has.
    """
    header = recording_header(recording)
    try:
        mem = GuestMemory.from_pages(recording.table_pfn << np.uint64(PAGE_SHIFT), recording.table_data)
        vcpu = _new_vcpu(mem, header)
        contexts = [context_of(regs) for regs in header.contexts]
        contexts = [replace(context, pdptrs=pdptrs_at(mem, vcpu.cpu, context.cr3, header.pdpte_clear))
                    if isinstance(context, Regs) and lacks_pdptrs(context) else context for context in contexts]
        use_context(vcpu, contexts[0])
    except (GuestFault, ValueError) as error:
        raise RecordingError(f"{recording.path}: {str(error).removeprefix('header: ')}") from error
    return vcpu, contexts


def with_file(error: TraceError, trace: Trace) -> TraceError:
    """The error, with the file of the trace in its message if there is one."""
    path = getattr(trace, "path", None)
    return error if path is None or str(error).startswith(str(path)) else TraceError(f"{path}: {error}")


def _new_vcpu(mem: GuestMemory, header: Header) -> Vcpu:
    """A vCPU of the processor of a header, whose PDPTEs are registers: they are as they were loaded."""
    try:
        cpu = CpuModel(**header.cpu)
    except (TypeError, ValueError) as error:
        raise TraceError(f"header: cpu: {error}") from None
    return Vcpu(mem, cpu=cpu, tdp="ept")


def _mode_of(regs: RegisterSet) -> str:
    if not regs.cr0 & Cr0.PG:
        return "off"
    if not regs.cr4 & Cr4.PAE:
        return "32"
    if not regs.efer & Efer.LMA:
        return "pae"
    return "5l" if regs.cr4 & Cr4.LA57 else "4l"


class RowRun:
    """One replay under way.

    Parameters
    ----------
    header : Header
    vcpu : Vcpu or None
        Whose memory to walk; None: MEMORY rows bring it.
    alone : bool
        Nobody else writes that memory between two chunks.
    tlbs : callable, optional
        Called with the number of vCPUs; makes the TLBs that the accesses go through.
    """

    def __init__(self, header: Header, vcpu: Vcpu | None, alone: bool, tlbs: MakeTlbs | None = None) -> None:
        self.tlbs = None if tlbs is None else tlbs(header.vcpus)
        self.header, self.alone, self.given = header, alone, vcpu
        self.started = time.perf_counter()
        self.waited = 0.0
        self.rows = 0                                   # of chunks before
        self.has_rows = True                            # by which messages tell a place; else by accesses
        self.set_up: SetUp | None = SetUp()
        self.own_memory: TraceMemory | None = None
        self.loop: RowLoop | None = None                # until the first row that is not of the set-up
        self.examples: list[Mismatch] = []
        self.other_faults: dict[tuple[int, int], int] = {}      # those that the loop does not count

    # ---- beginning and end ---------------------------------------------------------------------------------------------

    def begin(self, brings_memory: bool = False) -> RowLoop:
        """The set-up is over: memory is known, registers are loaded."""
        header, set_up = self.header, self.set_up
        assert set_up is not None
        self.set_up = None
        if self.given is None:
            self.own_memory = set_up.memory()
            self.vcpu = _new_vcpu(self.own_memory.guest, header)
        elif brings_memory:
            raise TraceError("the trace brings its own memory (MEMORY rows): replay it without a vCPU")
        else:
            self.vcpu = self.given
            self.vcpu.leave_nested()                    # so that register sets of L1 walk one stage
        try:
            sets = [context_of(regs) for regs in header.contexts]
        except ValueError as error:
            raise TraceError(f"header: contexts: {str(error).removeprefix('header: ')}") from error
        loop = self.loop = new_row_loop(self.vcpu.gva_walk, header.vcpus, EXPLAINED)
        loop.checks_faults = header.tables_at == "start"
        if self.tlbs is not None:
            loop.feed(self.tlbs.stream)
        self.registers = RegisterEvents(self.vcpu, loop.registers, sets, header.pdpte_clear)
        self._load_start()
        return loop

    def finish(self) -> None:
        """The trace has ended; memory that nothing has used is checked all the same."""
        if self.set_up:
            self.begin(brings_memory=True)

    def _load_start(self) -> None:
        for vcpu, regs in enumerate(self.header.registers):
            try:
                self.registers.enter(vcpu, context_of(regs))
                if self.tlbs is not None:
                    self.tlbs.follow(vcpu, self.registers.context(vcpu))
            except (GuestFault, ValueError) as error:
                raise TraceError(f"header: registers[{vcpu}]: {str(error).removeprefix('header: ')}") from error

    def restart(self) -> None:
        """Memory and registers as at the start."""
        if self.own_memory is None:
            raise TraceError("needs memory that the trace brings itself, and it has none")
        self.own_memory.restart()
        if self.loop is not None:
            self.loop.forget()
        self._load_start()

    def report(self, complete: bool) -> Report:
        """What was found so far."""
        header, loop = self.header, self.loop
        report = Report(
            name=header.name, phase=header.phase, mode=header.mode or _mode_of(header.registers[0]), accesses=0,
            complete=complete, faults_checked=header.tables_at == "start", examples=self.examples,
            contexts=len(header.contexts), waited=self.waited, seconds=time.perf_counter() - self.started)
        if loop is None:
            return report
        sizes = ("paging off", "4K", "4M" if report.mode == "32" else "2M", "1G")
        take_counts(report, loop, sizes)
        report.tlb = None if self.tlbs is None else self.tlbs.stats()
        report.contexts = len(header.contexts) or len(self.registers.seen)
        counted = {_fault_text(*fault): count for fault, count in loop.fault_counts.items()}
        others = {_fault_text(*fault): count for fault, count in self.other_faults.items()}
        report.faults = {code: counted.get(code, 0) + others.get(code, 0) for code in {**counted, **others}}
        if report.faults_checked:
            report.faults_reproduced = counted
            report.mismatches += sum(others.values())
        return report

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def set_up_rows(self, chunk: Chunk) -> int:
        """Take the rows of the set-up that a chunk has; returns how many those are. Begins with the first other row."""
        if self.set_up is None:
            return 0
        rows = self.set_up.take(chunk)
        if rows < len(chunk):
            self.begin(brings_memory=bool(self.set_up))
        return rows

    def chunk(self, chunk: Chunk) -> None:
        """Walk a chunk."""
        rows = self.set_up_rows(chunk)
        loop = self.loop
        if loop is not None:
            if self.own_memory is not None:
                self.own_memory.note_writes(chunk)
            loop.load(chunk, rows)
            if not self.alone:
                loop.forget()
            self._go_on(loop)
        self.rows += len(chunk)

    def recorded(self, rows: RecordedRows) -> Iterator[int]:
        """Walk the rows of a recording; gives how many accesses are done, again and again."""
        loop = self.begin()
        loop.load_recording(rows)
        self.has_rows = False
        done = False
        while not done:
            done = self._go_on(loop, loop.row + _STRETCH)
            yield loop.accesses

    def _go_on(self, loop: RowLoop, *stop: int) -> bool:
        """Walk the rows at hand, up to row `stop` if it is given; True if there are no more."""
        while (why := loop.run(*stop)) in (AT_EVENT, AT_MISMATCHES):
            if why == AT_EVENT:
                self._event(loop)
            else:
                for mismatch in loop.take_mismatches():
                    self._mismatch(*mismatch)
        return why == END

    def _mismatch(self, position: int, gva: int, gpa: int, access: int, number: int) -> None:
        self.examples.append(Mismatch(
            position, gva, f"{access_text(access)} of {gva:#x} reached gpa {gpa:#x}",
            self._walked(self.registers.context_at(number), gva, access)))

    def _walked(self, context: Context, gva: int, access: int) -> str:
        """The walk of an access, level by level."""
        use_context(self.vcpu, context)
        text = str(self.vcpu.gva_walk.walk_record(gva, access))
        self.vcpu.leave_nested()
        return text

    def _event(self, loop: RowLoop) -> None:
        """Carry out an event of the loop's, and let the TLBs follow it."""
        row, op, vcpu, addr, value = loop.event
        if self.tlbs is None:
            self.carry_out(row, op, vcpu, addr, value)
            return
        before = self.registers.context(vcpu)
        if not loop.carry_out():
            self.carry_out(row, op, vcpu, addr, value)
        self.tlbs.event(Op(op), vcpu, addr, value, before, self.registers.context(vcpu))

    def carry_out(self, row: int, number: int, vcpu: int, addr: int, value: int) -> None:
        """Carry out the event in a row of the chunk."""
        op = Op(number)
        try:
            if op == Op.PAGE_FAULT:
                self._page_fault(vcpu, addr, value)
            elif op == Op.NPT_FAULT:
                self._npt_fault(vcpu, addr, value)
            elif op == Op.GUEST_WRITE:
                raise TraceError(f"goes to gpa {addr:#x}, where the guest has no memory")
            elif op in (Op.MEMORY, Op.MEMORY_WORD):
                raise TraceError("comes behind another kind of row; memory is set up first")
            elif op == Op.RESTART:
                self.restart()
            elif op in REGISTER_EVENTS:
                self.registers.carry_out(vcpu, op, value)
        except (GuestFault, ValueError) as error:
            place = f"row {self.rows + row}" if self.has_rows else f"before access {self._position}"
            raise TraceError(f"{place}: {op.name}: {error}") from error

    # ---- recorded faults that the loop does not count ------------------------------------------------------------------

    @property
    def _position(self) -> int:
        """The number of the access that follows."""
        return 0 if self.loop is None else self.loop.accesses

    def _page_fault(self, vcpu: int, gva: int, code: int) -> None:
        self.other_faults[Op.PAGE_FAULT, code] = self.other_faults.get((Op.PAGE_FAULT, code), 0) + 1
        if self.header.tables_at == "start" and len(self.examples) < EXPLAINED:
            access = code & (Access.WRITE | Access.USER | Access.FETCH)
            self.examples.append(Mismatch(self._position, gva, f"#PF {error_code_text(code)} at {gva:#x}",
                                          self._walked(self.registers.context(vcpu), gva, int(access))))

    def _npt_fault(self, vcpu: int, gpa: int, info: int) -> None:
        stage = self.registers.nested_stage(vcpu)
        if self.header.tables_at == "start" and not isinstance(stage, Npt):
            raise TraceError("no nested guest under an NPT has run on this vCPU")
        self.other_faults[Op.NPT_FAULT, info] = self.other_faults.get((Op.NPT_FAULT, info), 0) + 1
        if isinstance(stage, Npt) and self.header.tables_at == "start" and len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(
                self._position, gpa, f"#NPF {npf_info_text(info)} at gpa {gpa:#x}", self._npt_walked(stage, gpa, info)))

    def _npt_walked(self, stage: Npt, gpa: int, info: int) -> str:
        """What the second stage says to the access that a #NPF with this EXITINFO1 tells of."""
        self.vcpu.enter_nested(stage, cr0=int(Cr0.PE | Cr0.ET), cr4=0, efer=0)
        access = info & (Access.WRITE | Access.USER | Access.FETCH)
        try:
            self.vcpu.ngpa_walk._second_stage_gpa(gpa, access, int(Acc.READ | Acc.WRITE | Acc.USER | Acc.EXEC),
                                                  final=bool(info & NpfInfo.GUEST_FINAL))
        except NestedFault as fault:
            return f"{npf_info_text(fault.exit_qualification)} at gpa {fault.fault_gpa:#x}"
        finally:
            self.vcpu.leave_nested()
        return "no fault"


def _fault_text(op: int, code: int) -> str:
    """A recorded fault, as reports name it."""
    return error_code_text(code) if op == Op.PAGE_FAULT else f"#NPF {npf_info_text(code)}"
