"""One replay of rows under way: walks, events, faults, what was found, and its state to go on from."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SHIFT, Acc, Access, Cr0, NpfInfo, Op
from kvmmu.arch.arguments import check_int
from kvmmu.arch.faults import GuestFault, NestedFault, access_text, error_code_text, npf_info_text
from kvmmu.arch.registers import CpuModel, Regs, paging_mode
from kvmmu.arch.second_stages import Npt
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay._replay import AT_EVENT, AT_MISMATCHES, END, RowLoop, new_row_loop
from kvmmu.replay.checkpoint import CheckpointError, Saved, fingerprint, restoring
from kvmmu.replay.register_events import (
    REGISTER_EVENTS,
    Context,
    RegisterEvents,
    context_of,
    contexts_of,
    plain_contexts,
    use_context,
)
from kvmmu.replay.result import EXPLAINED, Mismatch, Report, take_counts
from kvmmu.replay.trace_memory import SetUp, TraceMemory, check_pages, pages_at, put_pages
from kvmmu.tlb.processor import ProcessorTlbs
from kvmmu.traces import Chunk, Header, Recording, TraceError
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.vm.vcpu import Vcpu

__all__ = ["MakeTlbs", "RowRun", "fault_text", "mode_of", "new_vcpu"]

_STRETCH = 1 << 20                      # rows of a recording between two calls of progress
_MOST_ROWS = 1 << 62
_NO_REGISTERS = Regs(cr0=0, cr3=0, cr4=0, efer=0)       # beside a second stage that is told alone
MakeTlbs = Callable[[int], ProcessorTlbs]


def new_vcpu(mem: GuestMemory, header: Header) -> Vcpu:
    """Return a vCPU of the processor of a header, whose PDPTEs are registers: they are as they were loaded."""
    try:
        cpu = CpuModel(**header.cpu)
    except (TypeError, ValueError) as error:
        raise TraceError(f"header: cpu: {error}") from None
    return Vcpu(mem, cpu=cpu, tdp="ept")


def mode_of(header: Header) -> str:
    """Return the paging mode that a header names, else that of its first vCPU's registers."""
    if header.mode:
        return header.mode
    regs = header.registers[0]
    return paging_mode(regs.cr0, regs.cr4, regs.efer)


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
        self.recording: Recording | None = None
        self.saved: Saved | None = None                 # the state to go on from, until it is taken up
        self.keeps_pages = False                        # states are wanted
        self.skipped = 0                                # rows that were done before it
        self.first_rows: list[int] = []

    # ---- beginning and end ---------------------------------------------------------------------------------------------

    def begin(self, brings_memory: bool = False) -> RowLoop:
        """End the set-up: memory is known, registers are loaded."""
        header, set_up = self.header, self.set_up
        assert set_up is not None
        self.set_up = None
        if self.given is None:
            self.own_memory = set_up.memory()
            self.vcpu = new_vcpu(self.own_memory.guest, header)
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
        if self.own_memory is not None:
            self.own_memory.keeps_pages = self.keeps_pages
        if self.saved is not None:
            with restoring():
                self._go_on_from(self.saved)
            self.saved = None
        return loop

    def finish(self) -> None:
        """End the trace; memory that nothing has used is checked all the same."""
        if self.set_up:
            self.begin(brings_memory=True)
        if self.rows < self.skipped:
            raise CheckpointError(f"the trace ends at row {self.rows}, before the row {self.skipped} of the checkpoint")

    def _load_start(self) -> None:
        for vcpu, regs in enumerate(self.header.registers):
            try:
                self.registers.enter(vcpu, context_of(regs))
                if self.tlbs is not None:
                    self.tlbs.follow(vcpu, self.registers.context(vcpu))
            except (GuestFault, ValueError) as error:
                raise TraceError(f"header: registers[{vcpu}]: {str(error).removeprefix('header: ')}") from error

    def restart(self) -> None:
        """Put memory and registers back to what they were at the start."""
        if self.own_memory is None:
            raise TraceError("needs memory that the trace brings itself, and it has none")
        self.own_memory.restart()
        if self.loop is not None:
            self.loop.forget()
        self._load_start()

    def report(self, complete: bool) -> Report:
        """Return what was found so far."""
        header, loop = self.header, self.loop
        report = Report(
            name=header.name, phase=header.phase, mode=mode_of(header), accesses=0,
            complete=complete, faults_checked=header.tables_at == "start", examples=self.examples,
            contexts=len(header.contexts), waited=self.waited, seconds=time.perf_counter() - self.started)
        if loop is None:
            return report
        sizes = ("paging off", "4K", "4M" if report.mode == "32" else "2M", "1G")
        take_counts(report, loop, sizes)
        report.tlb = None if self.tlbs is None else self.tlbs.stats()
        report.contexts = len(header.contexts) or len(self.registers.seen)
        counted = {fault_text(*fault): count for fault, count in loop.fault_counts.items()}
        others = {fault_text(*fault): count for fault, count in self.other_faults.items()}
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
        if not self.first_rows:
            self.first_rows = fingerprint(chunk)
        rows = self.set_up_rows(chunk)
        loop = self.loop
        if loop is not None and self.rows + len(chunk) > self.skipped:
            if self.own_memory is not None:
                self.own_memory.note_writes(chunk)
            loop.load(chunk, max(rows, self.skipped - self.rows))
            if not self.alone:
                loop.forget()
            self._go_on(loop)
        self.rows += len(chunk)

    def begin_recording(self, rows: RecordedRows) -> None:
        """Begin with the rows of a recording."""
        self.has_rows = False
        loop = self.begin()
        loop.load_recording(rows)
        if not loop.skip(self.skipped):
            raise CheckpointError(f"the recording ends before the row {self.skipped} of the checkpoint")

    def stretch(self) -> bool:
        """Walk some more rows of a recording; True if those were the last ones."""
        assert self.loop is not None
        return self._go_on(self.loop, self.loop.row + _STRETCH)

    # ---- a state to go on from -----------------------------------------------------------------------------------------

    def state(self) -> Saved | None:
        """Return all that the rows so far have led to; None if that cannot be told now."""
        loop = self.loop
        if loop is None or self.has_rows and self.rows < self.skipped:
            return None                                 # nothing is done that would not have to be done again
        registers = self.registers.saved()
        if registers is None:
            return None
        plain: dict[str, Any] = {
            "rows": self.rows if self.has_rows else loop.row, "first_rows": self.first_rows, "registers": registers,
            "seconds": time.perf_counter() - self.started, "waited": self.waited, "explain": loop.explain,
            "examples": [[example.position, example.gva, example.recorded, example.walked] for example in self.examples],
            "faults": [[*key, count] for key, count in loop.fault_counts.items()],
            "other_faults": [[*key, count] for key, count in self.other_faults.items()]}
        gpa, data = self._changed_pages()
        arrays = {"counts": loop.counts(), "pages_gpa": gpa, "pages_data": data}
        if self.tlbs is not None:
            plain["tlbs"], found = self.tlbs.saved()
            plain["spaces"] = plain_contexts([(_NO_REGISTERS, stage) for stage in self.tlbs.spaces])
            arrays |= found
        return Saved(plain, arrays)

    def _changed_pages(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return the pages of memory that are not as at the start: their addresses and bytes."""
        if self.own_memory is not None:
            return self.own_memory.changed()
        assert self.recording is not None
        gpa = self.recording.table_pfn << np.uint64(PAGE_SHIFT)
        now = pages_at(self.vcpu.mem, gpa)
        other = (now != self.recording.table_data).any(axis=1)
        return gpa[other], now[other]

    def _go_on_from(self, saved: Saved) -> None:
        """Take up a state that `state()` returned."""
        plain, arrays, loop = saved.plain, saved.arrays, self.loop
        assert loop is not None
        if plain["first_rows"] != self.first_rows:
            raise ValueError("the first rows of the trace are others: want the same options of its reader")
        gpa, data = arrays["pages_gpa"], arrays["pages_data"]
        check_pages(gpa, data)
        if self.own_memory is not None:
            self.own_memory.restore(gpa, data)
        else:
            put_pages(self.vcpu.mem, gpa, data)
        self.registers.restore(plain["registers"])
        loop.restore_counts(arrays["counts"], plain["explain"])
        loop.restore_faults({(op, code): count for op, code, count in plain["faults"]})
        self.other_faults = {(op, code): count for op, code, count in plain["other_faults"]}
        self.examples = [Mismatch(*example) for example in plain["examples"]]
        if self.tlbs is not None:
            stages = [context[1] for context in contexts_of(plain["spaces"]) if isinstance(context, tuple)]
            self.tlbs.restore(plain["tlbs"], arrays, stages)
            for vcpu in range(self.header.vcpus):
                self.tlbs.follow(vcpu, self.registers.context(vcpu))
        self.skipped = check_int("rows", plain["rows"], 0, _MOST_ROWS)
        self.started -= float(plain["seconds"])
        self.waited += float(plain["waited"])

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
        """Return the walk of an access, level by level."""
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
            place = f"row {self.rows + row}" if self.has_rows else f"before access {self.position}"
            raise TraceError(f"{place}: {op.name}: {error}") from error

    # ---- recorded faults that the loop does not count ------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Number of the access that follows."""
        return 0 if self.loop is None else self.loop.accesses

    def _page_fault(self, vcpu: int, gva: int, code: int) -> None:
        self.other_faults[Op.PAGE_FAULT, code] = self.other_faults.get((Op.PAGE_FAULT, code), 0) + 1
        if self.header.tables_at == "start" and len(self.examples) < EXPLAINED:
            access = code & (Access.WRITE | Access.USER | Access.FETCH)
            self.examples.append(Mismatch(self.position, gva, f"#PF {error_code_text(code)} at {gva:#x}",
                                          self._walked(self.registers.context(vcpu), gva, int(access))))

    def _npt_fault(self, vcpu: int, gpa: int, info: int) -> None:
        stage = self.registers.nested_stage(vcpu)
        if self.header.tables_at == "start" and not isinstance(stage, Npt):
            raise TraceError("no nested guest under an NPT has run on this vCPU")
        self.other_faults[Op.NPT_FAULT, info] = self.other_faults.get((Op.NPT_FAULT, info), 0) + 1
        if isinstance(stage, Npt) and self.header.tables_at == "start" and len(self.examples) < EXPLAINED:
            self.examples.append(Mismatch(
                self.position, gpa, f"#NPF {npf_info_text(info)} at gpa {gpa:#x}", self._npt_walked(stage, gpa, info)))

    def _npt_walked(self, stage: Npt, gpa: int, info: int) -> str:
        """Return what the second stage says to the access that a #NPF with this EXITINFO1 tells of."""
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


def fault_text(op: int, code: int) -> str:
    """Return a recorded fault, as reports name it."""
    return error_code_text(code) if op == Op.PAGE_FAULT else f"#NPF {npf_info_text(code)}"
