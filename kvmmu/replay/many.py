"""Replays of several traces side by side: one virtual machine each."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvmmu.replay.replay import replay
from kvmmu.replay.result import Report
from kvmmu.replay.scheduling import check_scheduler, computing, dask
from kvmmu.tlb.hierarchy import TlbHierarchy
from kvmmu.traces._npz import StrPath

__all__ = ["replay_each"]

_LOCAL_ARGUMENTS = ("vm", "pager", "progress", "checkpoint", "resume", "scheduler")


def replay_each(traces: Iterable[StrPath], *, scheduler: str = "processes", **arguments: Any) -> list[Report]:
    """Replay several traces side by side, each as `replay()` does it: on a machine of its own in mode "machine".

    Parameters
    ----------
    traces : iterable of str or path-like
        Recordings and traces of any format that `replay()` takes. Every worker can open them under these paths.
    scheduler : str
        "threads", "processes", or the address of a scheduler of Dask, as tcp://host:8786.
    **arguments
        Of `replay()`, for all of them; but vm, pager, progress, checkpoint and resume.

    Returns
    -------
    list of Report
        In the order of the traces: each is the report of one process.

    Raises
    ------
    ImportError
        Dask is not installed.
    """
    scheduler = check_scheduler(scheduler)
    for name in _LOCAL_ARGUMENTS:
        if name in arguments:
            raise ValueError(f"{name}: cannot go to another process; want it left out")
    paths = [str(Path(trace).resolve()) for trace in traces]
    tlb = arguments.pop("tlb", None)
    made = tlb._made_of() if isinstance(tlb, TlbHierarchy) else tlb
    delayed = dask().delayed
    with computing(scheduler) as elsewhere:
        reports: list[Report] = elsewhere.all([delayed(_replay_one)(path, made, arguments) for path in paths])
    return reports


def _replay_one(path: str, tlb: Any, arguments: Mapping[str, Any]) -> Report:
    return replay(path, tlb=TlbHierarchy._remade(tlb) if isinstance(tlb, dict) else tlb, **arguments)
