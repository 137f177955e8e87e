"""Replay: a recording of a real guest walked access by access, each address held against the recorded one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from kvmmu._bits import CR3_PAE_PDPT, Access, NpfInfo, Status
from kvmmu._memory import GuestMemory
from kvmmu._replay import Replayer
from kvmmu.faults import GeneralProtection, NestedFault, access_text, error_code_text, npf_info_text
from kvmmu.host import Host
from kvmmu.nested import Npt
from kvmmu.registers import CpuModel, Regs, check_pdptrs
from kvmmu.traces import Recording
from kvmmu.traces._npz import StrPath
from kvmmu.traces.recording import ACCESS_OF_KIND, ACCESS_OF_PRIV
from kvmmu.vcpu import Vcpu
from kvmmu.vm import Vm

__all__ = ["Mismatch", "Report", "recording_vcpu", "replay"]

_EVENT_CR3 = 1
_EVENT_WORLD_SWITCH = 7
_PDPTE_ACCESSED = 1 << 5
_CHUNK = 1 << 20
_EXPLAINED = 20
_MEMORY_UNIT = 1 << 21                      # a slot that ends between large pages has small ones there
_HOST_MAXPHYADDR = 46
Progress = Callable[[int, int], object]

_PAGE_SIZES = {0: "paging off", 1: "4K", 2: "2M", 3: "1G"}


Context = Regs | tuple[Regs, Npt]         # inside a nested guest: with its second stage


@dataclass(frozen=True)
class Mismatch:
    """An access or a page fault of the recording that the walk does not reproduce.

    Attributes
    ----------
    position : int
        Row of the access; for a page fault, of the access that followed it.
    gva : int
        Linear address (bytes).
    recorded : str
        What the recording says.
    walked : str
        What the walk says, level by level.
    """

    position: int
    gva: int
    recorded: str
    walked: str

    def __str__(self) -> str:
        return f"access {self.position}: recorded {self.recorded}\n  walked: {self.walked}"


@dataclass
class Report:
    """What a replay found.

    Attributes
    ----------
    name, phase, mode : str
        Of the recording.
    accesses, verified : int
        Recorded, and walked to the recorded physical address.
    kinds : dict of str to int
        Accesses by load, store and fetch.
    page_sizes : dict of str to int
        Verified accesses by the size of the page they hit.
    faults, faults_reproduced : dict of str to int
        Recorded page faults by error code, and those that the walk reproduces with the same error code.
    faults_checked : bool
        False in a static phase, whose tables are those of its end: the pages of its faults are mapped in them.
    mismatches : int
        Accesses and faults that were not reproduced.
    examples : list of Mismatch
        The first of them, explained.
    table_writes, contexts, mmio : int
        Page-table writes applied, register contexts, and accesses to MMIO pages.
    seconds : float
        Time for walking and checking, without reading files.
    """

    name: str
    phase: str
    mode: str
    accesses: int
    verified: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    page_sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    faults_reproduced: dict[str, int] = field(default_factory=dict)
    faults_checked: bool = True
    mismatches: int = 0
    examples: list[Mismatch] = field(default_factory=list)
    table_writes: int = 0
    contexts: int = 0
    mmio: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Accesses per second."""
        return self.accesses / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dict(self.__dict__)
        plain["examples"] = [example.__dict__ for example in self.examples]
        return plain | {"rate": self.rate}


def recording_vcpu(recording: Recording) -> tuple[Vcpu, list[Context]]:
    """A vCPU over the page tables of a recording, and the register sets of its contexts.

    Parameters
    ----------
    recording : Recording

    Returns
    -------
    Vcpu, list of Regs
        The vCPU has the registers of the first context.
    """
    mem = GuestMemory.from_pages(recording.table_pfn << np.uint64(12), recording.table_data)
    cpu = CpuModel(vendor="amd", maxphyaddr=recording.maxphyaddr)
    contexts = [_context(mem, cpu, recording, *registers) for registers in recording.ctx.tolist()]
    vcpu = Vcpu(mem, cpu=cpu, tdp="npt")
    if contexts:
        use_context(vcpu, contexts[0])
    return vcpu, contexts


def touched_machine(recording: Recording, *, tdp: str = "ept", backing: str = "2m", nx_huge_pages: bool = False) -> Vm:
    """A machine whose guest has read every page that a recording touches, each once.

    Parameters
    ----------
    recording : Recording
    tdp, backing, nx_huge_pages
        Of its `Host` and `Vm`.

    Returns
    -------
    Vm
        Its memory reaches to the last page touched. Contexts inside a nested guest are left out.
    """
    plain, contexts = recording_vcpu(recording)
    real = recording.pages_gpa[recording.pages_io == 0]
    end = max(int(real.max(initial=0)), int(recording.table_pfn.max(initial=0)) << 12) + 1
    mem = GuestMemory(-(-end // _MEMORY_UNIT) * _MEMORY_UNIT)
    for pfn, page in zip(recording.table_pfn.tolist(), recording.table_data, strict=True):
        mem.write(pfn << 12, page.tobytes())
    vm = Vm(mem, plain.cpu, Host(tdp=tdp, maxphyaddr=_HOST_MAXPHYADDR, nx_huge_pages=nx_huge_pages), backing=backing)
    vcpu = vm.create_vcpu()
    for number, context in enumerate(contexts):
        if isinstance(context, Regs):
            use_context(vcpu, context)
            vcpu.access(np.ascontiguousarray(recording.pages_gva[recording.pages_ctx == number]), Access.AC)
    return vm


def use_context(vcpu: Vcpu, context: Context) -> None:
    """Put a register context of a recording in force: a Regs, or (Regs, Npt) inside the nested guest."""
    vcpu.leave_nested()
    if isinstance(context, tuple):
        regs, stage = context
        vcpu.enter_nested(stage, **_registers(regs))
    else:
        vcpu.set_regs(**_registers(context))


def _context(mem: GuestMemory, cpu: CpuModel, recording: Recording, guest: int, cr3: int, ncr3: int, cr0: int, cr4: int,
             efer: int) -> Context:
    regs = Regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=recording.pkru)
    if guest:
        return regs, nested_stage(recording, ncr3)
    return replace(regs, pdptrs=_pdptrs(mem, cpu, cr3)) if regs.is_pae_paging else regs


def nested_stage(recording: Recording, ncr3: int) -> Npt:
    """The second stage at a nested CR3, in the format that the registers of L1 choose."""
    for guest, _, _, _, cr4, efer in recording.ctx.tolist():
        if not guest:
            return Npt(ncr3, cr4=cr4, efer=efer)
    return Npt(ncr3, cr4=recording.registers["cr4"], efer=recording.registers["efer"])


def _pdptrs(mem: GuestMemory, cpu: CpuModel, cr3: int) -> tuple[int, ...]:
    """The PDPTEs at CR3 as the recorded CPU took them; none present where there is no PDPT (yet).

    QEMU's TCG sets bit 5 of the PDPTEs that it walks, which is reserved on a CPU: it is cleared here.
    """
    base = cr3 & CR3_PAE_PDPT
    pdptrs = tuple(mem.read_u64(base + 8 * i) & ~_PDPTE_ACCESSED for i in range(4))
    try:
        check_pdptrs(cpu, pdptrs)
    except GeneralProtection:
        return (0, 0, 0, 0)
    return pdptrs


def _registers(regs: Regs) -> dict[str, Any]:
    return {name: getattr(regs, name) for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")}


def replay(trace: Recording | StrPath, *, phase: str | None = None, progress: Progress | None = None) -> Report:
    """Walk every access of a recording and hold each against the recorded physical address.

    Parameters
    ----------
    trace : Recording, str or path-like
        The recording, or where it lies.
    phase : {"static", "dyn"}, optional
        Of a path: which phase.
    progress : callable, optional
        Called with (accesses done, accesses in all) about every million accesses.

    Returns
    -------
    Report

    Raises
    ------
    RecordingError
        The recording cannot be read, or has parts that cannot be replayed.
    """
    recording = trace if isinstance(trace, Recording) else Recording.open(trace, phase)
    return _Run(recording, progress).run()


class _Run:
    """One replay under way."""

    def __init__(self, recording: Recording, progress: Progress | None) -> None:
        self.recording = recording
        self.progress = progress
        self.vcpu, self.regs = recording_vcpu(recording)
        self.walk = self.vcpu.gva_walk
        self.vcpu.leave_nested()                        # so that contexts of L1 walk one stage
        self.contexts = self.walk.prepare(self.regs)
        access_of = (ACCESS_OF_KIND[:, None] | ACCESS_OF_PRIV).ravel()
        self.replayer = Replayer(self.walk, self.contexts, recording, access_of)
        kinds = np.bincount(recording.kind, minlength=3).tolist()
        self.report = Report(
            name=recording.name, phase=recording.phase, mode=recording.mode, accesses=len(recording),
            kinds=dict(zip(("load", "store", "fetch"), kinds, strict=True)), contexts=len(self.regs),
            faults_checked=recording.phase == "dyn",
            mmio=int(recording.pages_io[recording.pidx].sum()) if recording.pages_io.any() else 0)

    def run(self) -> Report:
        recording, report = self.recording, self.report
        started = time.perf_counter()
        for start, stop, action in self._segments():
            self._walk_rows(start, stop)
            action()
            if self.progress:
                self.progress(stop, len(recording))
        report.seconds = time.perf_counter() - started
        report.verified = self.replayer.verified
        report.table_writes = self.replayer.writes
        report.page_sizes = {
            self._page_size(level): count for level, count in enumerate(self.replayer.page_sizes) if count}
        return report

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
            row = self.replayer.run(start, stop)
            if row < stop:
                self._mismatch_at(row)
            start = row + 1
        self.replayer.settle(stop)                      # also what a mismatch at the end wrote

    def _mismatch_at(self, row: int) -> None:
        self.report.mismatches += 1
        if len(self.report.examples) >= _EXPLAINED:
            return
        columns = {name: int(values[0]) for name, values in self.recording.columns(row, row + 1).items()}
        access = int(self.recording.access_bytes(row, row + 1)[0])
        self.report.examples.append(Mismatch(
            row, columns["gva"], f"{access_text(access)} of {columns['gva']:#x} reached gpa {columns['gpa']:#x}",
            self._explain(columns["gva"], access, columns["ctx"])))

    def _explain(self, gva: int, access: int, ctx: int) -> str:
        use_context(self.vcpu, self.regs[ctx])
        return str(self.walk.walk_record(gva, access))

    def _reload_pdptrs(self, cr3: int) -> None:
        """A CR3 load under PAE paging: the contexts with this CR3 take the PDPTEs as they are in memory now."""
        for i, regs in enumerate(self.regs):
            if isinstance(regs, Regs) and regs.cr3 == cr3:
                loaded = replace(regs, pdptrs=_pdptrs(self.vcpu.mem, self.vcpu.cpu, cr3))
                self.regs[i] = loaded
                self.walk.reload(self.contexts, i, loaded)

    def _check_fault(self, number: int) -> None:
        """Hold the walk against a recorded page fault; the tables stand as they were when it was taken."""
        faults, report = self.recording.faults, self.report
        gva, error_code, ctx = (int(column[number]) for column in (faults.cr2, faults.err, faults.ctx))
        code = error_code_text(error_code)
        report.faults[code] = report.faults.get(code, 0) + 1
        if not report.faults_checked:
            return
        self.replayer.settle(int(faults.pos[number]))
        access = error_code & (Access.WRITE | Access.USER | Access.FETCH)
        # A supervisor's fault does not tell EFLAGS.AC: SMAP faults only with it clear, all others with it set too.
        for tried in (access,) if access & Access.USER else (access | Access.AC, access):
            t = self.walk.translate(
                np.array([gva], np.uint64), int(tried), regs=self.contexts, ctx=np.array([ctx], np.uint32), set_ad=False)
            if t.status[0] == Status.PAGE_FAULT and t.error_code[0] == error_code:
                report.faults_reproduced[code] = report.faults_reproduced.get(code, 0) + 1
                return
        report.mismatches += 1
        if len(report.examples) < _EXPLAINED:
            report.examples.append(Mismatch(
                int(faults.pos[number]), gva, f"#PF {code} at {gva:#x}", self._explain(gva, int(access), ctx)))

    def _check_npt_fault(self, number: int) -> None:
        """Hold the second stage against a recorded #NPF; its tables stand as they were when it was taken."""
        report, faults = self.report, self.recording.npt_faults
        pos, gpa, info = (int(column[number]) for column in (faults.pos, faults.gpa, faults.info1))
        code = f"#NPF {npf_info_text(info)}"
        report.faults[code] = report.faults.get(code, 0) + 1
        if not report.faults_checked:
            return
        self.replayer.settle(pos)
        walked = self._npt_fault_at(pos, gpa, info)
        if walked == (info, gpa):
            report.faults_reproduced[code] = report.faults_reproduced.get(code, 0) + 1
            return
        report.mismatches += 1
        if len(report.examples) < _EXPLAINED:
            text = "no fault" if walked is None else f"{npf_info_text(walked[0])} at gpa {walked[1]:#x}"
            report.examples.append(Mismatch(pos, gpa, f"{code} at gpa {gpa:#x}", text))

    def _npt_fault_at(self, pos: int, gpa: int, info: int) -> tuple[int, int] | None:
        """(EXITINFO1, EXITINFO2) of the access that a recorded #NPF tells of, or None if it succeeds."""
        events = self.recording.events
        entries = np.flatnonzero((events.code == _EVENT_WORLD_SWITCH) & (events.val == 1) & (events.pos <= pos))
        self.vcpu.leave_nested()
        self.vcpu.enter_nested(nested_stage(self.recording, int(events.aux[entries[-1]])), cr0=0x11, cr4=0, efer=0)
        try:
            self.vcpu.ngpa_walk.second_stage_gpa(
                gpa, info & (Access.WRITE | Access.USER | Access.FETCH), 15, final=bool(info & NpfInfo.GUEST_FINAL))
        except NestedFault as fault:
            return fault.exit_qualification, fault.fault_gpa
        return None
