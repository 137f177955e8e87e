"""Replay: what to walk, and on which tables; the accesses of a trace, each address held against the recorded one."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kvmmu.arch.arguments import check_name, check_path
from kvmmu.replay.checkpoint import Checkpoints, check_seconds
from kvmmu.replay.machine_replay import replay_machine
from kvmmu.replay.machine_start import BACKINGS, HOSTS, Backing, HostKind, registers_in_force
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.register_events import use_context
from kvmmu.replay.result import Mismatch, Report
from kvmmu.replay.scheduling import check_scheduler
from kvmmu.replay.synthetic import TablesToOrder, check_order, replay_synthetic
from kvmmu.replay.trace_replay import recording_vcpu, replay_recording, replay_trace
from kvmmu.tables.layout import Frames, Page
from kvmmu.tables.modes import Mode
from kvmmu.tables.pager import Pager
from kvmmu.tlb.hierarchy import TlbHierarchy, tlb_of
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Header, ParquetTrace, Recording, Trace
from kvmmu.traces._npz import StrPath
from kvmmu.traces.conversion import recording_chunks, recording_header
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.vm.vcpu import Vcpu, Vm

__all__ = ["Mismatch", "Report", "recording_vcpu", "replay", "use_context"]

Progress = Callable[[int, int], object]


def replay(trace: Recording | Trace | StrPath | Iterable[Any], vm: Vm | Vcpu | None = None, *, mode: str = "walk",
           tlb: TlbHierarchy | StrPath | None = None,
           paging: Mode | None = None, page: Page | None = None, frames: Frames | None = None, pager: Pager | None = None,
           host: HostKind | None = None, backing: Backing | None = None, phase: str | None = None,
           progress: bool | Progress = False, checkpoint: StrPath | None = None, checkpoint_every: float = 60.0,
           resume: StrPath | None = None, scheduler: str | None = None) -> Report:
    """Walk every access of a trace and hold each against the recorded physical address, if there is one.

    A trace without registers (those of other tools) is walked on page tables that are made for it.

    Parameters
    ----------
    trace : str or path-like, Recording, Trace, or iterable
        Where a recording or a trace of any format of `open_trace()` lies; one of them opened; or chunks of rows, each an Arrow
        record batch or a mapping of column names to arrays, whose memory and registers at the start are those of `vm`.
    vm : Vm or Vcpu, optional
        For a trace that brings no memory: whose memory, processor and, if the trace brings none, registers to take. Accessed and
        dirty bits and the writes of the trace go to it. Of a Vm it is the first vCPU.
        In mode "machine": the machine to run the trace on, with its memory, host, backing and TLBs, on whose vCPUs rows run by
        their number. Memory that the trace brings is stored in its slots first. Of a Vcpu it is its machine.
    mode : {"walk", "machine"}
        What to model: the walk of guest page tables; or a whole machine, for a trace that brings page tables or on those of a
        `vm`: exits, faults, and what the host builds below.
    tlb : TlbHierarchy, str or path-like, optional
        A hierarchy that all accesses go through, each by the page that the walk finds: one, of whose shape an empty one is made
        for each vCPU, or with all details a preset by its name or a TOML file by its path. Register loads, INVLPG, INVPCID and
        page faults of the trace drop what the manuals say. The counters are `report.tlb`. In mode "machine" they are those of a
        walk beside it: under two-dimensional paging with the host's entries, under shadow paging of the shadow page tables.
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
    checkpoint : str or path-like, optional
        A file that the state of the replay goes to, every so often and at Ctrl-C or SIGTERM, in place of the one before. Not of
        mode "machine", and not with `vm`: their memory is not kept in a file.
    checkpoint_every : float
        Seconds between two of them.
    resume : str or path-like, optional
        A checkpoint to go on from, of the same trace and the same other arguments: the report is that of a replay that was never
        stopped, but for `seconds`.
    scheduler : str, optional
        Of a Parquet trace without registers: replay it in parts, by "threads" or "processes", or by the workers of a scheduler of
        Dask at an address (tcp://host:8786), which can open its file. Needs the extra `dask`. Counters are those of one process;
        `tlb.details` are None.

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
        A file is `.zst` or Parquet, and what reads it is not installed; or Dask is not.
    CheckpointError
        `resume` is no whole checkpoint, or one of another trace or other arguments: a ValueError.
    ValueError, TypeError
        An argument is not what is allowed.
    ReplayInterrupted
        Ctrl-C, and SIGTERM if there is a `checkpoint`: a KeyboardInterrupt that has what was done until then as `report`.

    Notes
    -----
    A Parquet trace and an iterable are replayed in memory that does not depend on their length; other threads decode a
    Parquet trace ahead of the walk.
    """
    tlbs = None
    if tlb is not None:
        hierarchy = tlb_of("tlb", tlb)
        tlbs = partial(ProcessorTlbs, [TlbOfHost(hierarchy)])
    order = _order(paging, page, frames, pager)
    _check_choices(mode, host, backing, progress, scheduler)
    every = check_seconds("checkpoint_every", checkpoint_every)
    kept = [name for name, given in (("checkpoint", checkpoint), ("resume", resume)) if given is not None]
    if kept and (mode == "machine" or vm is not None):
        raise ValueError(f"{kept[0]}: the state of a whole machine cannot be kept in a file; want None, or mode 'walk'"
                         if mode == "machine" else f"{kept[0]}: the memory of a vm is not kept in a file; want None, or a trace "
                         "that brings its memory, or none")
    machine, vm = _machine_and_vcpu(vm, mode)
    source = _source(trace, vm, phase, order, mode)
    if mode == "machine":
        return _machine(source, machine, order, tlb, host, backing, progress)
    if scheduler is not None:
        return _in_parts(source, vm, order, tlb, scheduler, kept, progress)
    checkpoints = None
    if kept:
        made = order if isinstance(source, Recording) or source.header.registers else order or TablesToOrder()
        checkpoints = Checkpoints(source, _settings(made, tlbs), checkpoint, every, resume)
    if callable(progress):
        return _replay(source, vm, order, progress, tlbs, checkpoints)
    if not progress:
        return _replay(source, vm, order, None, tlbs, checkpoints)
    name = source.name if isinstance(source, Recording) else source.header.name
    with progress_bar(f"replaying {name}", resume is not None) as bar:
        return _replay(source, vm, order, bar, tlbs, checkpoints)


def _check_choices(mode: Any, host: Any, backing: Any, progress: Any, scheduler: Any) -> None:
    """Raise ValueError or TypeError if one of these is not what is allowed, whatever the trace is."""
    if mode not in ("walk", "machine"):
        raise ValueError(f"mode: want 'walk' or 'machine', got {mode!r}")
    for name, given, names in (("host", host, HOSTS), ("backing", backing, BACKINGS)):
        if given is not None and mode == "walk":
            raise ValueError(f"{name}: is of mode 'machine'; want None, got {given!r}")
        if given is not None:
            check_name(name, given, names)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress: want a bool or a callable, got {type(progress).__name__}")
    if scheduler is not None:
        check_scheduler(scheduler)
        if mode == "machine":
            raise ValueError("scheduler: a machine runs in one process; want None, or one trace per machine by replay_each()")


def _replay(source: Recording | Trace, vm: Vcpu | None, order: TablesToOrder | None, progress: Progress | None,
            tlbs: Callable[[int], ProcessorTlbs] | None, checkpoints: Checkpoints | None) -> Report:
    if isinstance(source, Recording):
        return replay_recording(source, progress, tlbs, checkpoints)
    if source.header.registers:
        return replay_trace(source, vm, progress, tlbs, checkpoints)
    if vm is not None:
        on_vcpu = TraceOnMemory(source, registers_in_force(vm), vm.mem.slots)
        report = replay_trace(on_vcpu, vm, progress, tlbs)
        report.skipped = on_vcpu.notes.skipped
        return report
    return replay_synthetic(source, order or TablesToOrder(), progress, tlbs, checkpoints)


def _in_parts(source: Recording | Trace, vm: Vcpu | None, order: TablesToOrder | None, tlb: Any, scheduler: str, kept: list[str],
              progress: bool | Progress) -> Report:
    """Replay a trace in parts, wherever a scheduler has workers."""
    for name, given in (("vm", vm), ("pager", None if order is None else order.pager), *((name, True) for name in kept)):
        if given is not None:
            raise ValueError(f"{name}: is of one process; want None, or no scheduler")
    if callable(progress):
        raise ValueError("progress: is of one process; want a bool, or no scheduler")
    if not isinstance(source, ParquetTrace) or source.header.registers:
        raise ValueError("scheduler: what register loads and table writes do depends on all rows before; want a Parquet trace of "
                         "accesses alone (kvmmu convert makes one), or several traces by replay_each()")
    from kvmmu.replay.sharded import replay_parts

    return replay_parts(source, order or TablesToOrder(), scheduler, None if tlb is None else tlb_of("tlb", tlb))


def _settings(order: TablesToOrder | None, tlbs: Callable[[int], ProcessorTlbs] | None) -> dict[str, Any]:
    """Return the arguments that a state depends on, as plain data for JSON."""
    pager = None if order is None else order.pager
    return {"tlb": None if tlbs is None else tlbs(1).shape(), "tables": None if order is None else list(order[:3]),
            "pager": None if pager is None else pager._shape_and_state()}


def _machine(source: Recording | Trace, vm: Vm | None, order: TablesToOrder | None, tlb: Any, host: HostKind | None,
             backing: Backing | None, progress: bool | Progress) -> Report:
    """Run a trace on a machine: the caller's, or one that is made for its page tables."""
    if order is not None:
        raise ValueError("paging, page, frames, pager: mode 'machine' takes the page tables that there are; want None")
    for name, given in (("host", host), ("backing", backing)):
        if given is not None and vm is not None:
            raise ValueError(f"{name}: the vm has one; want None, got {given!r}")
    if isinstance(source, Trace) and not source.header.registers and vm is None:
        raise ValueError("mode: 'machine' is for traces that bring registers and page tables, or with a vm; want 'walk', or "
                         "kvmmu.compare()")
    if type(source) is Trace and not isinstance(source._chunks, Sequence):
        raise ValueError("trace: its chunks can be read once, and mode 'machine' reads them twice; want a file or a list")
    tlbs = None
    if tlb is not None:
        kind = host or "ept" if vm is None else vm.host.tdp or "shadow"
        pages = backing or "2m" if vm is None else BACKINGS[vm.kvm.backing - 1]
        tlbs = partial(ProcessorTlbs, [TlbOfHost(tlb_of("tlb", tlb), None if kind == "shadow" else pages)])

    def opened() -> Trace:
        return trace_of(source) if isinstance(source, Recording) else source

    run = partial(replay_machine, opened, host=host or "ept", backing=backing or "2m", vm=vm, tlbs=tlbs)
    if callable(progress) or not progress:
        return run(progress=progress or None)
    with progress_bar(f"running {opened().header.name}") as bar:
        return run(progress=bar)


def trace_of(recording: Recording) -> Trace:
    """Return a recording as a trace, which brings its memory as rows."""
    return Trace(recording_header(recording), recording_chunks(recording))


def _order(paging: Any, page: Any, frames: Any, pager: Any) -> TablesToOrder | None:
    """Return the tables that a caller asks for; None if it says nothing about them."""
    given = {name: value for name, value in (("paging", paging), ("page", page), ("frames", frames)) if value is not None}
    if pager is None:
        order = TablesToOrder(**given) if given else None
        if order is not None:
            check_order(order)
        return order
    if not isinstance(pager, Pager):
        raise TypeError(f"pager: want a Pager or None, got {type(pager).__name__}")
    for name, value in given.items():
        raise ValueError(f"{name}: the pager says it; want None, got {value!r}")
    return TablesToOrder(pager.mode, pager.page, pager.frames, pager)


def _machine_and_vcpu(vm: Any, mode: str) -> tuple[Vm | None, Vcpu | None]:
    """Return the machine of an argument, and its first vCPU or the one that the argument is. A walk makes no machine of that."""
    if vm is None:
        return None, None
    if isinstance(vm, Vcpu):
        return vm.vm if mode == "machine" else None, vm
    if not isinstance(vm, Vm):
        raise TypeError(f"vm: want a Vm, a Vcpu or None, got {type(vm).__name__}")
    if not vm.vcpus:
        raise ValueError("vm: has no vCPU; want one at least, made by create_vcpu()")
    return vm, vm.vcpus[0]


def _source(trace: Any, vm: Vcpu | None, phase: str | None, order: TablesToOrder | None, mode: str) -> Recording | Trace:
    """Return what to replay: a Recording or a Trace."""
    if isinstance(trace, (Recording, Trace)):
        source: Recording | Trace = trace
    elif isinstance(trace, (str, bytes, bytearray)) or hasattr(trace, "__fspath__"):
        check_path("trace", trace, "a recording or trace")
        from kvmmu.traces.source import open_source  # the readers of other formats take time to load

        source = open_source(trace, phase=phase)
    elif isinstance(trace, Iterable):
        if vm is None and (order is None or order.pager is None):
            raise ValueError("vm: an iterable of chunks has no memory and no registers of its own; want a Vcpu, or a pager that "
                             "makes tables")
        vcpus = [] if vm is None else vm.vm.vcpus if mode == "machine" else [vm]
        source = Trace(Header(registers=tuple(map(registers_in_force, vcpus))), trace)
    else:
        raise TypeError(f"trace: want a path, a Recording, a Trace or an iterable of chunks, got {type(trace).__name__}")
    if phase is not None and isinstance(source, Trace):
        raise ValueError(f"phase: a trace has one; want None, got {phase!r}")
    if vm is not None and isinstance(source, Recording) and mode == "walk":
        raise ValueError("vm: a recording brings its own memory; want None")
    if order is not None and vm is not None:
        raise ValueError("vm: tables are made for the trace, and they have memory of their own; want None")
    if order is not None and (isinstance(source, Recording) or source.header.registers):
        raise ValueError("paging, page, frames, pager: the trace brings registers and page tables of its own; want None")
    if type(source) is Trace and vm is None and not source.header.registers and (order is None or order.pager is None):
        raise ValueError("pager: the chunks of a Trace are read once, and tables for all of its addresses take two readings; "
                         "want a Pager")
    return source
