"""Replay: a recorded guest walked access by access, each address held against the recorded one."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kvmmu.arch._bits import INVALID_GPA
from kvmmu.arch.faults import GuestFault, access_text, error_code_text, npf_info_text
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.arch.second_stages import Npt
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay._replay import new_replayer
from kvmmu.replay.progress import progress_bar
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
from kvmmu.replay.synthetic import TablesToOrder, replay_synthetic
from kvmmu.replay.trace_replay import replay_trace
from kvmmu.tables.layout import Frames, Page
from kvmmu.tables.modes import Mode
from kvmmu.tables.pager import Pager
from kvmmu.tlb.hierarchy import TlbHierarchy, tlb_of
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Header, Recording, RecordingError, RegisterSet, Trace
from kvmmu.traces._npz import StrPath
from kvmmu.traces.conversion import recording_chunks, recording_header
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.traces.recording import ACCESS_OF_KIND, ACCESS_OF_PRIV
from kvmmu.vm.vcpu import Vcpu

__all__ = ["Mismatch", "Report", "recording_vcpu", "replay", "use_context"]

_EVENT_CR3 = 1
_EVENT_WORLD_SWITCH = 7
_PDPTE_ACCESSED = 1 << 5                # QEMU's TCG sets it in the PDPTEs that it walks, where a CPU has it reserved
_CHUNK = 1 << 20
_MAX_OFF = 0xFFFF                       # of the 16 bits of `off`
Progress = Callable[[int, int], object]

_PAGE_SIZES = {0: "paging off", 1: "4K", 2: "2M", 3: "1G"}


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
    try:
        return _recording_vcpu(recording)
    except (GuestFault, ValueError) as error:
        raise RecordingError(f"{recording.path}: {error}") from error


def _recording_vcpu(recording: Recording) -> tuple[Vcpu, list[Context]]:
    mem = GuestMemory.from_pages(recording.table_pfn << np.uint64(12), recording.table_data)
    cpu = CpuModel(vendor="amd", maxphyaddr=recording.maxphyaddr)
    contexts = [_context(mem, cpu, recording, *registers) for registers in recording.ctx.tolist()]
    vcpu = Vcpu(mem, cpu=cpu, tdp="ept")       # PDPTEs are registers: as they were loaded
    if contexts:
        use_context(vcpu, contexts[0])
    return vcpu, contexts


def _context(mem: GuestMemory, cpu: CpuModel, recording: Recording, guest: int, cr3: int, ncr3: int, cr0: int, cr4: int,
             efer: int) -> Context:
    regs = Regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=recording.pkru)
    if guest:
        return regs, nested_stage(recording, ncr3)
    return replace(regs, pdptrs=pdptrs_at(mem, cpu, cr3, _PDPTE_ACCESSED)) if regs.is_pae_paging else regs


def nested_stage(recording: Recording, ncr3: int) -> Npt:
    """The second stage at a nested CR3, in the format that the registers of L1 choose."""
    for guest, _, _, _, cr4, efer in recording.ctx.tolist():
        if not guest:
            return Npt(ncr3, cr4=cr4, efer=efer)
    return Npt(ncr3, cr4=recording.registers["cr4"], efer=recording.registers["efer"])


def replay(trace: Recording | Trace | StrPath | Iterable[Any], vm: Vcpu | None = None, *, mode: str = "walk",
           tlb: TlbHierarchy | StrPath | None = None,
           paging: Mode | None = None, page: Page | None = None, frames: Frames | None = None, pager: Pager | None = None,
           phase: str | None = None, progress: bool | Progress = False) -> Report:
    """Walk every access of a trace and hold each against the recorded physical address, if there is one.

    A trace without registers (those of other tools) is walked on page tables that are made for it.

    Parameters
    ----------
    trace : str or path-like, Recording, Trace, or iterable
        Where a recording or a trace of any format of `open_trace()` lies; one of them opened; or chunks of rows, each an Arrow
        record batch or a mapping of column names to arrays, whose memory and registers at the start are those of `vm`.
    vm : Vcpu, optional
        For a trace that brings no memory: whose memory, processor and, if the trace brings none, registers to take. Accessed and
        dirty bits and the writes of the trace go to it.
    mode : {"walk"}
        What to model: the walk of guest page tables.
    tlb : TlbHierarchy, str or path-like, optional
        A hierarchy that all accesses go through, each by the page that the walk finds: one, of whose shape an empty one is made
        for each vCPU, or with all details a preset by its name or a TOML file by its path. Register loads, INVLPG, INVPCID and
        page faults of the trace drop what the manuals say. The counters are `report.tlb`.
    paging : {"4l", "5l", "pae", "32"}, optional
        Of a trace without registers: the paging mode of its tables, by default "4l".
    page : {"4k", "2m", "1g", "thp"}, optional
        Likewise: the size of its pages, by default "4k"; "thp" is 2M where half of the 4K pages are touched.
    frames : {"linear", "random"}, optional
        Likewise: in which order pages get frames, by default "linear".
    pager : Pager, optional
        Likewise: its tables fill by demand paging as pages are touched. It says itself what the three before it would say. An
        iterable of chunks needs it, as they are read once; without it a trace is read twice.
    phase : {"static", "dyn"}, optional
        Of a path to a recording: which phase.
    progress : bool or callable
        True shows a bar on a terminal. A callable is called with (accesses done, accesses in all; 0 if unknown) about every
        million accesses or oftener.

    Returns
    -------
    Report
        A `SyntheticReport` if tables were made.

    Raises
    ------
    RecordingError, TraceError
        The trace is damaged, or has parts that cannot be replayed; the message names the file. A TraceError has what was done
        until then as `report`.
    OSError
        A file cannot be opened or read; FileNotFoundError if it is not there.
    ImportError
        A file is `.zst` or Parquet, and what reads it is not installed.
    ValueError, TypeError
        An argument is not what is allowed.
    ReplayInterrupted
        Ctrl-C, a KeyboardInterrupt that has what was done until then as `report`.

    Notes
    -----
    A Parquet trace and an iterable are replayed in memory that does not depend on their length; other threads decode a
    Parquet trace ahead of the walk.
    """
    if mode != "walk":
        raise ValueError(f"mode: want 'walk', got {mode!r}")
    tlbs = None
    if tlb is not None:
        hierarchy = tlb_of("tlb", tlb)
        tlbs = partial(ProcessorTlbs, [TlbOfHost(hierarchy)])
    if vm is not None and not isinstance(vm, Vcpu):
        raise TypeError(f"vm: want a Vcpu or None, got {type(vm).__name__}")
    order = _order(paging, page, frames, pager)
    source = _source(trace, vm, phase, order)
    if callable(progress):
        return _replay(source, vm, order, progress, tlbs)
    if not isinstance(progress, bool):
        raise TypeError(f"progress: want a bool or a callable, got {type(progress).__name__}")
    if not progress:
        return _replay(source, vm, order, None, tlbs)
    name = source.name if isinstance(source, Recording) else source.header.name
    with progress_bar(f"replaying {name}") as bar:
        return _replay(source, vm, order, bar, tlbs)


def _replay(source: Recording | Trace, vm: Vcpu | None, order: TablesToOrder | None, progress: Progress | None,
            tlbs: Callable[[int], ProcessorTlbs] | None) -> Report:
    if isinstance(source, Recording):
        if tlbs is None:
            return _Run(source, progress).run()
        return replay_trace(trace_of(source), None, progress, tlbs)     # as rows, in which register loads are events
    if source.header.registers:
        return replay_trace(source, vm, progress, tlbs)
    if vm is not None:
        on_vcpu = TraceOnMemory(source, _header_of(vm).registers[0], vm.mem.slots)
        report = replay_trace(on_vcpu, vm, progress, tlbs)
        report.skipped = on_vcpu.notes.skipped
        return report
    return replay_synthetic(source, order or TablesToOrder(), progress, tlbs)


def trace_of(recording: Recording) -> Trace:
    """Return a recording as a trace."""
    return Trace(recording_header(recording), recording_chunks(recording))


def _order(paging: Any, page: Any, frames: Any, pager: Any) -> TablesToOrder | None:
    """The tables that a caller asks for; None if it says nothing about them."""
    given = {name: value for name, value in (("paging", paging), ("page", page), ("frames", frames)) if value is not None}
    if pager is None:
        return TablesToOrder(**given) if given else None
    if not isinstance(pager, Pager):
        raise TypeError(f"pager: want a Pager or None, got {type(pager).__name__}")
    for name, value in given.items():
        raise ValueError(f"{name}: the pager says it; want None, got {value!r}")
    return TablesToOrder(pager.mode, pager.page, pager.frames, pager)


def _source(trace: Any, vm: Vcpu | None, phase: str | None, order: TablesToOrder | None) -> Recording | Trace:
    """What to replay: a Recording or a Trace."""
    if isinstance(trace, (Recording, Trace)):
        source: Recording | Trace = trace
    elif isinstance(trace, str) or hasattr(trace, "__fspath__"):
        from kvmmu.traces.source import open_source  # the readers of other formats take time to load

        source = open_source(trace, phase=phase)
    elif isinstance(trace, Iterable):
        if vm is None and (order is None or order.pager is None):
            raise ValueError("vm: an iterable of chunks has no memory and no registers of its own; want a Vcpu, or a pager that "
                             "makes tables")
        source = Trace(_header_of(vm) if vm is not None else Header(registers=()), trace)
    else:
        raise TypeError(f"trace: want a path, a Recording, a Trace or an iterable of chunks, got {type(trace).__name__}")
    if phase is not None and isinstance(source, Trace):
        raise ValueError(f"phase: a trace has one; want None, got {phase!r}")
    if vm is not None and isinstance(source, Recording):
        raise ValueError("vm: a recording brings its own memory; want None")
    if order is not None and vm is not None:
        raise ValueError("vm: tables are made for the trace, and they have memory of their own; want None")
    if order is not None and (isinstance(source, Recording) or source.header.registers):
        raise ValueError("paging, page, frames, pager: the trace brings registers and page tables of its own; want None")
    if type(source) is Trace and vm is None and not source.header.registers and (order is None or order.pager is None):
        raise ValueError("pager: the chunks of a Trace are read once, and tables for all of its addresses take two readings; "
                         "want a Pager")
    return source


def _header_of(vcpu: Vcpu) -> Header:
    if vcpu.mmu_is_nested:
        raise ValueError("vm: a nested guest runs on it; want registers of L1")
    regs = vcpu.regs
    return Header(registers=(RegisterSet(
        cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs),))


class _Run:
    """One replay under way."""

    def __init__(self, recording: Recording, progress: Progress | None) -> None:
        self.recording = recording
        self.progress = progress
        recording.check()
        if recording.pages_gpa.max(initial=0) > INVALID_GPA - _MAX_OFF:
            # a walk that faults ends at INVALID_GPA, and no recorded address may be that
            raise RecordingError(f"{recording.path}: pages_gpa: is {int(recording.pages_gpa.max()):#x}; allowed is below 2**52")
        self.vcpu, self.regs = recording_vcpu(recording)
        self.walk = self.vcpu.gva_walk
        self.vcpu.leave_nested()                        # so that contexts of L1 walk one stage
        try:
            self.contexts = self.walk.prepare(self.regs)
        except (GuestFault, ValueError) as error:
            raise RecordingError(f"{recording.path}: {error}") from error
        self.fault_counts = FaultCounts()
        access_of = (ACCESS_OF_KIND[:, None] | ACCESS_OF_PRIV).ravel()
        self.replayer = new_replayer(self.walk, self.contexts, recording, access_of, EXPLAINED)
        kinds = np.bincount(recording.kind, minlength=3).tolist()
        self.report = Report(
            name=recording.name, phase=recording.phase, mode=recording.mode, accesses=len(recording),
            kinds=dict(zip(("load", "store", "fetch"), kinds, strict=True)), contexts=len(self.regs),
            faults_checked=recording.phase == "dyn",
            mmio=int(recording.pages_io[recording.pidx].sum()) if recording.pages_io.any() else 0)

    def run(self) -> Report:
        recording, report = self.recording, self.report
        started = time.perf_counter()
        try:
            for start, stop, action in self._segments():
                self._walk_rows(start, stop)
                action()
                if self.progress:
                    self.progress(stop, len(recording))
        except KeyboardInterrupt:
            self._cut()
            self._finish(started)
            raise ReplayInterrupted(report) from None
        self._finish(started)
        return report

    def _finish(self, started: float) -> None:
        report, replayer = self.report, self.replayer
        report.seconds = time.perf_counter() - started
        report.verified = replayer.verified
        report.mismatches = replayer.mismatches + self.fault_counts.mismatches
        report.faults, report.faults_reproduced = self.fault_counts.by_code(), self.fault_counts.by_code(True)
        report.table_writes = replayer.writes
        report.page_sizes = {self._page_size(level): count for level, count in enumerate(replayer.page_sizes) if count}

    def _cut(self) -> None:
        """The report is about the accesses that were walked; the loop alone knows how many those are."""
        recording, report = self.recording, self.report
        done = self.replayer.verified + self.replayer.mismatches
        kinds = np.bincount(recording.kind[:done], minlength=3).tolist()
        report.complete, report.accesses = False, done
        report.kinds = dict(zip(("load", "store", "fetch"), kinds, strict=True))
        report.mmio = int(recording.pages_io[recording.pidx[:done]].sum(dtype=np.int64))

    def _page_size(self, level: int) -> str:
        return "4M" if self.recording.mode == "32" and level == 2 else _PAGE_SIZES[level]

    def _segments(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        """(start, stop, what to do before access stop): between page faults, CR3 loads that reload PDPTEs, and chunks."""
        recording, total = self.recording, len(self.recording)
        actions = [(pos, 1, number) for number, pos in enumerate(recording.faults.pos.tolist())]
        if recording.mode == "pae":
            loads = recording.events.code == _EVENT_CR3
            actions += [(pos, 0, cr3) for pos, cr3 in zip(
                recording.events.pos[loads].tolist(), recording.events.val[loads].tolist(), strict=True)]
        actions += [(pos, 3, number) for number, pos in enumerate(recording.npt_faults.pos.tolist())]
        actions += [(pos, 2, 0) for pos in range(_CHUNK, total, _CHUNK)] + [(total, 2, 0)]
        handlers: dict[int, Callable[[int], None]] = {
            0: self._reload_pdptrs, 1: self._check_fault, 2: lambda _: None, 3: self._check_npt_fault}
        start = 0
        for pos, what, argument in sorted(actions):
            yield start, pos, partial(handlers[what], argument)
            start = pos

    def _walk_rows(self, start: int, stop: int) -> None:
        while start < stop:
            try:
                start = self.replayer.run(start, stop)
            except ValueError as error:
                raise RecordingError(f"{self.recording.path}: {error}") from None
            for row in self.replayer.take_mismatches():
                self._mismatch_at(row)
        self._settle(stop)                              # also what the last accesses wrote

    def _settle(self, pos: int) -> None:
        try:
            self.replayer.settle(pos)
        except ValueError as error:
            raise RecordingError(f"{self.recording.path}: {error}") from None

    def _mismatch_at(self, row: int) -> None:
        columns = {name: int(values[0]) for name, values in self.recording.columns(row, row + 1).items()}
        access = int(self.recording.access_bytes(row, row + 1)[0])
        self.report.examples.append(Mismatch(
            row, columns["gva"], f"{access_text(access)} of {columns['gva']:#x} reached gpa {columns['gpa']:#x}",
            self._explain(columns["gva"], access, columns["ctx"])))

    def _explain(self, gva: int, access: int, ctx: int) -> str:
        use_context(self.vcpu, self.regs[ctx])
        text = str(self.walk.walk_record(gva, access))
        self.vcpu.leave_nested()                        # the register sets were prepared so
        return text

    def _reload_pdptrs(self, cr3: int) -> None:
        """A CR3 load under PAE paging: the contexts with this CR3 take the PDPTEs as they are in memory now."""
        for i, regs in enumerate(self.regs):
            if isinstance(regs, Regs) and regs.cr3 == cr3:
                loaded = replace(regs, pdptrs=pdptrs_at(self.vcpu.mem, self.vcpu.cpu, cr3, _PDPTE_ACCESSED))
                self.regs[i] = loaded
                self.walk._reload(self.contexts, i, loaded)

    def _check_fault(self, number: int) -> None:
        """Hold the walk against a recorded page fault; the tables stand as they were when it was taken."""
        faults, report = self.recording.faults, self.report
        gva, error_code, ctx = (int(column[number]) for column in (faults.cr2, faults.err, faults.ctx))
        code = error_code_text(error_code)
        if not report.faults_checked:
            self.fault_counts.add(code, None)
            return
        self._settle(int(faults.pos[number]))
        reproduced = page_fault_reproduced(self.walk, self.contexts, ctx, gva, error_code)
        self.fault_counts.add(code, reproduced)
        if reproduced:
            return
        if len(report.examples) < EXPLAINED:
            report.examples.append(Mismatch(
                int(faults.pos[number]), gva, f"#PF {code} at {gva:#x}", self._explain(gva, page_fault_access(error_code), ctx)))

    def _check_npt_fault(self, number: int) -> None:
        """Hold the second stage against a recorded #NPF; its tables stand as they were when it was taken."""
        report, faults = self.report, self.recording.npt_faults
        pos, gpa, info = (int(column[number]) for column in (faults.pos, faults.gpa, faults.info1))
        code = f"#NPF {npf_info_text(info)}"
        if not report.faults_checked:
            self.fault_counts.add(code, None)
            return
        self._settle(pos)
        walked = self._npt_fault_at(number, pos, gpa, info)
        self.fault_counts.add(code, walked == (info, gpa))
        if walked == (info, gpa):
            return
        if len(report.examples) < EXPLAINED:
            report.examples.append(Mismatch(pos, gpa, f"{code} at gpa {gpa:#x}", npt_fault_text(walked)))

    def _npt_fault_at(self, number: int, pos: int, gpa: int, info: int) -> tuple[int, int] | None:
        """(EXITINFO1, EXITINFO2) of the access that a recorded #NPF tells of, or None if it succeeds."""
        events = self.recording.events
        entries = np.flatnonzero((events.code == _EVENT_WORLD_SWITCH) & (events.val == 1) & (events.pos <= pos))
        if not entries.size:
            raise RecordingError(f"{self.recording.path}: npf_pos[{number}]: is {pos}; no nested guest has run before that")
        return npt_fault(self.vcpu, nested_stage(self.recording, int(events.aux[entries[-1]])), gpa, info)
