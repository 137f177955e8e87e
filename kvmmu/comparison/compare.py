"""compare(): one trace under several designs, in as few passes as there are kinds of tables."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import Access
from kvmmu.arch.arguments import check_path
from kvmmu.comparison.comparison import Comparison, DesignResult
from kvmmu.comparison.cost import CostModel, cost_of
from kvmmu.comparison.design import Design
from kvmmu.comparison.distributed import compared_elsewhere
from kvmmu.comparison.first_touches import FirstTouches
from kvmmu.comparison.machines import HostRun, run_first_touches, run_own
from kvmmu.comparison.passes import MadePasses, Progress
from kvmmu.comparison.spaces import MadeSpaces
from kvmmu.replay.replay import trace_of
from kvmmu.replay.scheduling import check_scheduler
from kvmmu.replay.trace_replay import replay_trace
from kvmmu.tlb.hierarchy import TlbHierarchy
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Recording, Trace
from kvmmu.traces._npz import StrPath

__all__ = ["compare"]

_SIZES = {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}


def compare(trace: Recording | Trace | StrPath, designs: Iterable[Design], *, cost: CostModel | StrPath | None = None,
            phase: str | None = None, progress: Progress | None = None, scheduler: str | None = None) -> Comparison:
    """Run one trace under several MMU designs.

    All TLB hierarchies of a page policy go along in one pass. Tables are made for the trace's address spaces, those of its CR3
    values; "own" walks the tables that it brings.

    Parameters
    ----------
    trace : str or path-like, Recording or Trace
        As for `replay()`, but an iterable of chunks: it is read twice.
    designs : iterable of Design
    cost : CostModel, str or path-like, optional
        Cycles for what the designs meet: a model, a preset by its name, or a TOML file by its path.
    phase : {"static", "dyn"}, optional
        Of a path to a recording: which phase.
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) as the passes go on. Not with a scheduler.
    scheduler : str, optional
        Compare in tasks, one for each page policy with each TLB hierarchy: in "processes" or "threads", or on the workers of a
        scheduler of Dask at an address (tcp://host:8786), which open the trace by its path. Needs the extra `dask`.

    Returns
    -------
    Comparison
        After Ctrl-C in the walks over made tables: what was found until then, `complete` is False.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C before the first walks, or while the trace runs on its own tables.
    RecordingError, TraceError
        The trace is damaged, or takes too much memory for tables.
    ValueError, TypeError
        An argument is not what is allowed.
    """
    started = time.perf_counter()
    chosen = _checked(designs)
    model = cost_of("cost", cost)
    if scheduler is not None:
        return _elsewhere(trace, chosen, model, phase, progress, check_scheduler(scheduler), started)
    opened = _opener(trace, phase)
    header = opened().header
    if any(design.page == "own" for design in chosen) and not header.registers:
        raise ValueError("page: the trace brings no page tables of its own; want '4k', '2m', '1g' or 'thp'")
    results: dict[int, DesignResult] = {}
    made = _made_designs(chosen)
    curves: dict[str, NDArray[np.uint64]] = {}
    mapped: dict[str, dict[str, int]] = {}
    regions: dict[str, NDArray[np.uint64]] = {}
    faults: dict[str, NDArray[np.uint64]] = {}
    accesses, kinds, complete = 0, {}, True
    if made:
        run = _run_made(opened, made, progress)
        complete = run.passes.complete
        accesses, kinds = run.passes.accesses, run.passes.kinds
        faults = _faults(run.passes)
        for number, design in made.items():
            results[number] = run.result(design)
        for page, spaces in run.passes.spaces.items():
            curves[page] = run.curve(page)
            mapped[page] = {_SIZES[size]: count for size, count in spaces.page_count.items() if count}
            regions[page] = _regions(spaces, run.passes.first)
    own = {number: design for number, design in enumerate(chosen) if design.page == "own"}
    if own and complete:
        found, accesses, kinds, curves["own"] = _run_own(opened, own, progress)
        results |= found
    in_order = tuple(results[number] for number in sorted(results))
    return Comparison(header.name or "trace", accesses, kinds, in_order, curves, mapped, regions, model,
                      time.perf_counter() - started, complete, faults)


def _elsewhere(trace: Any, designs: list[Design], model: CostModel | None, phase: str | None, progress: Progress | None,
               scheduler: str, started: float) -> Comparison:
    """Compare in tasks, and put what they found together."""
    if progress is not None:
        raise ValueError("progress: is of one process; want None, or no scheduler")
    done, groups = compared_elsewhere(compare, trace, designs, scheduler, phase)
    results: dict[int, DesignResult] = {}
    curves: dict[str, NDArray[np.uint64]] = {}
    mapped: dict[str, dict[str, int]] = {}
    regions: dict[str, NDArray[np.uint64]] = {}
    faults: dict[str, NDArray[np.uint64]] = {}
    for task, numbers in zip(done, groups, strict=True):
        for number, (stats, host) in zip(numbers, task.results, strict=True):
            results[number] = DesignResult(designs[number], task.accesses, stats, host)
        curves |= task.curves
        mapped |= task.mapped
        regions |= task.regions
        faults |= task.faults
    return Comparison(done[0].name, done[0].accesses, done[0].kinds, tuple(results[number] for number in sorted(results)), curves,
                      mapped, regions, model, time.perf_counter() - started, True, faults)


def _checked(designs: Iterable[Design]) -> list[Design]:
    if isinstance(designs, Design) or not isinstance(designs, Iterable):
        raise TypeError(f"designs: want a list of Designs, got {type(designs).__name__}")
    chosen = list(designs)
    for design in chosen:
        if not isinstance(design, Design):
            raise TypeError(f"designs: want Designs, got {type(design).__name__}")
        if design.page == "own" and design.host.startswith("nested"):
            raise ValueError(f"designs: {design.name!r} has page 'own' and host {design.host!r}, and the tables of a trace are "
                             "not those of a nested guest; want another page or host")
    if not chosen:
        raise ValueError("designs: want one or more, got none")
    names = [design.name for design in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"designs: {names.count(name)} have the name {name!r}")
    return chosen


def _opener(trace: Any, phase: str | None) -> Callable[[], Trace]:
    """Return a function that gives the trace from its beginning."""
    if isinstance(trace, (str, bytes, bytearray)) or hasattr(trace, "__fspath__"):
        check_path("trace", trace, "a recording or trace")
        from kvmmu.traces.source import open_source

        source: Any = open_source(trace, phase=phase)
    elif phase is not None:
        raise ValueError(f"phase: the trace is open already; want None, got {phase!r}")
    else:
        source = trace
    if isinstance(source, Recording):
        recording = source
        return lambda: trace_of(recording)
    if not isinstance(source, Trace):
        raise TypeError(f"trace: want a path, a Recording or a Trace, got {type(source).__name__}")
    if type(source) is Trace and not isinstance(source._chunks, Sequence):
        raise ValueError("trace: its chunks can be read once, and a comparison reads them twice; want a file or a list of chunks")
    opened = source
    return lambda: opened


# ---- made tables -------------------------------------------------------------------------------------------------------

def _made_designs(designs: list[Design]) -> dict[int, Design]:
    return {number: design for number, design in enumerate(designs) if design.page != "own"}


class _MadeRun:
    """The passes over made tables, and the machines."""

    def __init__(self, passes: MadePasses, hierarchies: list[Any]) -> None:
        self.passes, self._hierarchies, self._stats = passes, hierarchies, passes.stats
        self._hosts: dict[tuple[str, str], HostRun] = {}

    def result(self, design: Design) -> DesignResult:
        """Return what a design met."""
        at = next(i for i, tlb in enumerate(self._hierarchies) if tlb is design.hierarchy)
        key = design.page, design.host
        if key not in self._hosts:
            self._hosts[key] = run_first_touches(
                self.passes.spaces[design.page], self.passes.first, design.host, design.host_page, self.passes.events)
        return DesignResult(design, self.passes.accesses, self._stats[design.page][at], self._hosts[key])

    def curve(self, page: str) -> NDArray[np.uint64]:
        """Return the misses by TLB size of a page policy."""
        details = self._stats[page][-1].details
        assert details is not None
        return details.curve()


def _run_made(opened: Callable[[], Trace], designs: dict[int, Design], progress: Progress | None) -> _MadeRun:
    pages = list(dict.fromkeys(design.page for design in designs.values()))
    hierarchies = list({id(design.hierarchy): design.hierarchy for design in designs.values()}.values())
    tlbs = [tlb._another(details=True) for tlb in hierarchies]
    tlbs.append(_curve_only())
    passes = MadePasses(opened, pages, tlbs, any(design.two_stages for design in designs.values()), progress)
    passes.run()
    return _MadeRun(passes, hierarchies)


def _faults(passes: MadePasses) -> dict[str, NDArray[np.uint64]]:
    """Return the accesses that touch pages for the first time, and those before which the trace tells page faults."""
    position, gva, _, space = passes.first.columns()
    order = np.lexsort((position, gva >> np.uint64(12), space))
    page, where = gva[order] >> np.uint64(12), space[order]
    first = np.ones(order.size, bool)
    first[1:] = (page[1:] != page[:-1]) | (where[1:] != where[:-1])
    told = np.concatenate(passes.fault_positions) if passes.fault_positions else np.empty(0, np.uint64)
    found = {"first touches of 4K pages": np.sort(position[order[first]]), "page faults of the trace": told}
    return {name: positions for name, positions in found.items() if positions.size}


def _curve_only() -> TlbHierarchy:
    """Return a hierarchy without levels that keeps stack distances."""
    return TlbHierarchy([], curve=True)


def _regions(spaces: MadeSpaces, first: FirstTouches) -> NDArray[np.uint64]:
    """Return (start, size, level, kinds) of the touched ranges of all spaces; neighbours that are alike are merged."""
    _, gva, access, _ = first.columns()
    kinds = np.where(access & np.uint8(Access.FETCH), 4, np.where(access & np.uint8(Access.WRITE), 2, 1)).astype(np.uint64)
    page = gva >> np.uint64(12)
    pages, place = np.unique(page, return_inverse=True)
    used = np.zeros(pages.size, np.uint64)
    np.bitwise_or.at(used, place.reshape(-1), kinds)
    level = spaces.level_of(pages << np.uint64(12))
    if not pages.size:
        return np.empty((0, 4), np.uint64)
    starts = np.ones(pages.size, bool)
    starts[1:] = (np.diff(pages) != 1) | (np.diff(used) != 0) | (np.diff(level) != 0)
    at = np.flatnonzero(starts)
    counts = np.diff(np.append(at, pages.size)).astype(np.uint64)
    return np.column_stack((pages[at] << np.uint64(12), counts << np.uint64(12), level[at], used[at]))


# ---- the trace's own tables --------------------------------------------------------------------------------------------

def _run_own(opened: Callable[[], Trace], designs: dict[int, Design], progress: Progress | None) -> tuple[
        dict[int, DesignResult], int, dict[str, int], NDArray[np.uint64]]:
    made: list[ProcessorTlbs] = []
    numbers = list(designs)
    tlbs = [TlbOfHost(designs[number].hierarchy._another(details=True), designs[number].host_page if designs[number].two_stages
                      else None) for number in numbers]
    tlbs.append(TlbOfHost(_curve_only()))

    def make(vcpus: int) -> ProcessorTlbs:
        made.append(ProcessorTlbs(tlbs, vcpus))
        return made[0]

    report = replay_trace(opened(), None, progress, make)
    hosts: dict[str, HostRun] = {}
    results = {}
    for place, number in enumerate(numbers):
        design = designs[number]
        if design.host not in hosts:
            hosts[design.host] = run_own(opened, design.host, design.host_page)
        results[number] = DesignResult(design, report.accesses, made[0].stats(place), hosts[design.host])
    details = made[0].stats(len(numbers)).details
    assert details is not None
    return results, report.accesses, report.kinds, details.curve()
