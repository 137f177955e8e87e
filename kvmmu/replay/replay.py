"""Replay: what to walk, and on which tables; the accesses of a trace, each address held against the recorded one."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvmmu.replay.machine_replay import Backing, HostKind, replay_machine
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.register_events import use_context
from kvmmu.replay.result import Mismatch, Report
from kvmmu.replay.synthetic import TablesToOrder, replay_synthetic
from kvmmu.replay.trace_replay import recording_vcpu, replay_recording, replay_trace
from kvmmu.tables.layout import Frames, Page
from kvmmu.tables.modes import Mode
from kvmmu.tables.pager import Pager
from kvmmu.tlb.hierarchy import TlbHierarchy, tlb_of
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Header, Recording, RegisterSet, Trace
from kvmmu.traces._npz import StrPath
from kvmmu.traces.conversion import recording_chunks, recording_header
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.vm.vcpu import Vcpu

__all__ = ["Mismatch", "Report", "recording_vcpu", "replay", "use_context"]

Progress = Callable[[int, int], object]


def replay(trace: Recording | Trace | StrPath | Iterable[Any], vm: Vcpu | None = None, *, mode: str = "walk",
           tlb: TlbHierarchy | StrPath | None = None,
           paging: Mode | None = None, page: Page | None = None, frames: Frames | None = None, pager: Pager | None = None,
           host: HostKind | None = None, backing: Backing | None = None, phase: str | None = None,
           progress: bool | Progress = False) -> Report:
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
    mode : {"walk", "machine"}
        What to model: the walk of guest page tables; or a whole machine, for a trace that brings page tables: exits, faults, and
        what the host builds below.
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
    host : {"ept", "npt", "shadow"}, optional
        Of mode "machine": how the host translates guest-physical addresses, by default "ept".
    backing : {"4k", "2m", "1g"}, optional
        Likewise: the pages that the host maps guest memory with, by default "2m".
    phase : {"static", "dyn"}, optional
        Of a path to a recording: which phase.
    progress : bool or callable
        True shows a bar on a terminal. A callable is called with (accesses done, accesses in all; 0 if unknown) about every
        million accesses or oftener.

    Returns
    -------
    Report
        A `SyntheticReport` if tables were made, a `MachineReport` in mode "machine".

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
    if mode not in ("walk", "machine"):
        raise ValueError(f"mode: want 'walk' or 'machine', got {mode!r}")
    tlbs = None
    if tlb is not None:
        hierarchy = tlb_of("tlb", tlb)
        tlbs = partial(ProcessorTlbs, [TlbOfHost(hierarchy)])
    if vm is not None and not isinstance(vm, Vcpu):
        raise TypeError(f"vm: want a Vcpu or None, got {type(vm).__name__}")
    order = _order(paging, page, frames, pager)
    source = _source(trace, vm, phase, order)
    if mode == "machine":
        return _machine(source, vm, order, tlb, host, backing, progress)
    for name, given in (("host", host), ("backing", backing)):
        if given is not None:
            raise ValueError(f"{name}: is of mode 'machine'; want None, got {given!r}")
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
        return replay_recording(source, progress, tlbs)
    if source.header.registers:
        return replay_trace(source, vm, progress, tlbs)
    if vm is not None:
        on_vcpu = TraceOnMemory(source, _header_of(vm).registers[0], vm.mem.slots)
        report = replay_trace(on_vcpu, vm, progress, tlbs)
        report.skipped = on_vcpu.notes.skipped
        return report
    return replay_synthetic(source, order or TablesToOrder(), progress, tlbs)


def _machine(source: Recording | Trace, vm: Vcpu | None, order: TablesToOrder | None, tlb: Any, host: HostKind | None,
             backing: Backing | None, progress: bool | Progress) -> Report:
    """Run a trace that brings page tables on a machine."""
    for name, given in (("vm", vm), ("tlb", tlb), ("paging, page, frames, pager", order)):
        if given is not None:
            raise ValueError(f"{name}: mode 'machine' makes a machine of its own for the tables of the trace; want None")
    if isinstance(source, Trace) and not source.header.registers:
        raise ValueError("mode: 'machine' is for traces that bring registers and page tables; want 'walk', or kvmmu.compare()")
    if type(source) is Trace and not isinstance(source._chunks, Sequence):
        raise ValueError("trace: its chunks can be read once, and mode 'machine' reads them twice; want a file or a list")

    def opened() -> Trace:
        return trace_of(source) if isinstance(source, Recording) else source

    if callable(progress) or not progress:
        return replay_machine(opened, host=host or "ept", backing=backing or "2m", progress=progress or None)
    with progress_bar(f"running {opened().header.name}") as bar:
        return replay_machine(opened, host=host or "ept", backing=backing or "2m", progress=bar)


def trace_of(recording: Recording) -> Trace:
    """Return a recording as a trace, which brings its memory as rows."""
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
        cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pkrs=regs.pkrs, pdptrs=regs.pdptrs),))
