"""Comparison on several processes or computers: each page policy with each TLB hierarchy is a task of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.arguments import check_path
from kvmmu.comparison.comparison import Comparison
from kvmmu.comparison.design import Design
from kvmmu.comparison.machines import HostRun
from kvmmu.replay.scheduling import computing, dask
from kvmmu.tlb.counters import TlbStats
from kvmmu.tlb.hierarchy import TlbHierarchy
from kvmmu.traces import ParquetTrace, Recording

__all__ = ["TaskResult", "compared_elsewhere", "place_of"]

Compare = Callable[..., Comparison]


class TaskResult(NamedTuple):
    """The results of a task, without its designs."""

    name: str
    accesses: int
    kinds: dict[str, int]
    results: list[tuple[TlbStats, HostRun]]
    curves: dict[str, NDArray[np.uint64]]
    mapped: dict[str, dict[str, int]]
    regions: dict[str, NDArray[np.uint64]]
    faults: dict[str, NDArray[np.uint64]]


def place_of(trace: Any, phase: str | None) -> tuple[str, str | None]:
    """Return where a worker finds a trace: its path, and the phase of a recording."""
    if isinstance(trace, (str, bytes, bytearray)) or hasattr(trace, "__fspath__"):
        check_path("trace", trace, "a recording or trace")
        return str(Path(trace).resolve()), phase
    if isinstance(trace, Recording):
        return str(Path(trace.path).resolve()), trace.phase
    if isinstance(trace, ParquetTrace):
        return str(Path(trace.path).resolve()), None
    raise ValueError(f"trace: a {type(trace).__name__} cannot go to another process; want a path")


def compared_elsewhere(compare: Compare, trace: Any, designs: Sequence[Design], scheduler: str, phase: str | None
                       ) -> tuple[list[TaskResult], list[list[int]]]:
    """Compare in tasks. Returns their results, and the numbers of the designs of each. IN compare: what a task calls."""
    path, phase = place_of(trace, phase)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, design in enumerate(designs):
        groups.setdefault((design.page, id(design.hierarchy)), []).append(number)
    delayed = dask().delayed
    tasks = []
    for numbers in groups.values():
        some = [designs[number] for number in numbers]
        tlb = some[0].hierarchy._made_of()
        plain = [(design.name, design.host, design.page, design.tlb_name) for design in some]
        tasks.append(delayed(_compare_some)(compare, path, phase, plain, tlb))
    with computing(scheduler) as elsewhere:
        return elsewhere.all(tasks), list(groups.values())


def _compare_some(compare: Compare, path: str, phase: str | None, plain: Sequence[tuple[str, str, str, str]], tlb: dict[str, Any]
                  ) -> TaskResult:
    hierarchy = TlbHierarchy._remade(tlb)
    designs = [Design(name, host, page, hierarchy, tlb_name) for name, host, page, tlb_name in plain]
    found = compare(path, designs, phase=phase)
    return TaskResult(found.name, found.accesses, found.kinds, [(result.stats, result.host) for result in found.results],
                      found.curves, found.mapped, found.regions, found.faults)
