"""Recordings and traces of any format, opened and described by one call that tells which of them a path is."""

from pathlib import Path
from typing import Any

from kvmmu.arch.arguments import check_path
from kvmmu.traces._files import kind_of, no_such_trace
from kvmmu.traces._npz import StrPath, find_npz
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.traces.header import TraceError
from kvmmu.traces.opening import Count, describe_trace, open_trace
from kvmmu.traces.parquet import is_parquet
from kvmmu.traces.recording import META, PHASES, Recording, recording_files
from kvmmu.traces.stream import Trace

__all__ = ["describe_source", "is_recording", "open_source"]

_ROWS = 1 << 20                     # of a recording that are decoded at a time
_TRACE_FILES = tuple(f"{phase}_trace.npz" for phase in PHASES)


def is_recording(path: StrPath) -> bool:
    """True if a path is meant to be a recording: a directory with files of one, or one of its trace files by name."""
    path = Path(path)
    if path.is_dir():
        return (path / META).exists() or any(find_npz(path / name) is not None for name in _TRACE_FILES)
    return path.name.removesuffix(".zst") in _TRACE_FILES


def open_source(path: StrPath, format: str | None = None, phase: str | None = None, **options: Any) -> Recording | Trace:
    """Open a recording, or a trace of any format.

    Parameters
    ----------
    path : str or path-like
        The directory of a recording, its trace file, or a trace as for `open_trace()`.
    format : str, optional
        Of a trace; told by its first bytes otherwise.
    phase : {"static", "dyn"}, optional
        Of a recording.
    **options
        Of the trace's format.

    Raises
    ------
    RecordingError, TraceError
        It is neither, or damaged; the message says what can be read, or what is wrong.
    FileNotFoundError
        There is nothing.
    ValueError, TypeError
        An option that the format does not have, or a phase of a trace.
    ImportError
        An optional package is needed; the message names the extra.
    """
    path = Path(check_path("path", path, "a recording or trace"))
    if format is None and is_recording(path):
        if options:
            raise TypeError(f"{path}: a recording has no option {next(iter(options))!r}")
        return Recording.open(path, phase)
    if phase is not None and (path.exists() or is_parquet(path)):
        raise ValueError(f"phase {phase}: a trace has one phase")
    if not path.exists():
        raise no_such_trace(path, "trace" if is_parquet(path) else "recording or trace")
    kind = None if path.is_dir() else kind_of(path.stat().st_mode)
    if kind is not None:
        raise TraceError(f"{path}: is {kind}; allowed is a regular file, or a directory")
    return open_trace(path, format, **options)


def describe_source(path: StrPath, format: str | None = None, phase: str | None = None, **options: Any) -> dict[str, Any]:
    """Read a recording or a trace once and say what is in it.

    Parameters
    ----------
    path, format, phase, **options
        As for `open_source()`.

    Returns
    -------
    dict
        `kind`: "recording" or "trace"; what `describe_trace()` tells, of a recording that of its rows; of a recording also
        `phase`, `phases` and `mode`.
    """
    source = open_source(path, format, phase, **options)
    if not isinstance(source, Recording):
        return {"kind": "trace"} | describe_trace(path, format, **options)
    count = Count()
    rows = RecordedRows(source, sizes=True)
    while (columns := rows.columns(_ROWS)) is not None:
        count.add(columns)
    found = count.result()
    found["brings"]["tables"] = True
    return {"kind": "recording", "path": str(path), "format": "recording", "compression": "none",
            "bytes": sum(file.stat().st_size for file in recording_files(source.path)), "phase": source.phase,
            "phases": list(source.phases), "mode": source.mode, **found, "skipped": {}, "damage": None}
