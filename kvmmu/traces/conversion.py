"""Anything as a file in the trace format; a recording with its table writes, faults and register loads as rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvmmu.arch._bits import PAGE_SIZE, Op, Pte
from kvmmu.arch.arguments import check_int
from kvmmu.traces._npz import Arrays, RecordingError, StrPath
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.traces.header import Header, RegisterSet, Stage
from kvmmu.traces.parquet import ROW_GROUP, ParquetTrace, ParquetWriter
from kvmmu.traces.recording import Recording, recording_files
from kvmmu.traces.stream import Trace

__all__ = ["convert", "recording_chunks", "recording_header", "source_files"]

_REPEAT_MAX = 1 << 32
Progress = Callable[[int, int], object]


def recording_header(recording: Recording) -> Header:
    """Return the header of the trace that `recording_chunks()` gives.

    Raises
    ------
    RecordingError
        The recording has no register contexts.
    """
    if not len(recording.ctx):
        raise RecordingError(f"{recording.path}: has no register contexts, and a trace has to begin with one")
    contexts = tuple(_register_set(recording, *row) for row in recording.ctx.tolist())
    ignored = int(Pte.ACCESSED)     # QEMU's TCG sets it in PDPTEs that it walks, where a CPU has it reserved
    return Header(
        registers=(contexts[_start(recording)],), contexts=contexts, name=recording.name, phase=recording.phase,
        mode=recording.mode, cpu={"vendor": "amd", "maxphyaddr": recording.maxphyaddr}, source="QEMU TCG recording",
        tables_at="start" if recording.phase == "dyn" else "end", pdpte_clear=ignored)


def _start(recording: Recording) -> int:
    """Return the context of the first access."""
    return int(recording.pages_ctx[recording.pidx[0]]) if len(recording) else 0


def _register_set(recording: Recording, guest: int, cr3: int, ncr3: int, cr0: int, cr4: int, efer: int) -> RegisterSet:
    stage = _stage(recording, ncr3) if guest else None
    return RegisterSet(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=recording.pkru, pkrs=recording.pkrs,
                       second_stage=stage)


def _stage(recording: Recording, ncr3: int) -> Stage:
    """Return the NPT at a nested CR3, in the format that the registers of L1 choose."""
    for guest, _, _, _, cr4, efer in recording.ctx.tolist():
        if not guest:
            return Stage(ncr3=ncr3, cr4=cr4, efer=efer)
    return Stage(ncr3=ncr3, cr4=recording.registers["cr4"], efer=recording.registers["efer"])


# ---- memory at the start -----------------------------------------------------------------------------------------------

def _memory(recording: Recording) -> Iterator[Arrays]:
    """Yield MEMORY rows for the runs of table pages, and a MEMORY_WORD row for every word that is not zero."""
    order = np.argsort(recording.table_pfn)
    pfn = recording.table_pfn[order]
    first_of_run = np.ones(pfn.size, bool)
    first_of_run[1:] = np.diff(pfn) != 1
    starts = np.flatnonzero(first_of_run)
    pages = np.diff(np.append(starts, pfn.size)).astype(np.uint64)
    yield _event_rows(np.full(starts.size, Op.MEMORY), pfn[starts] * np.uint64(PAGE_SIZE), pages * np.uint64(PAGE_SIZE))
    step = ROW_GROUP // (PAGE_SIZE // 8)
    for first in range(0, pfn.size, step):
        words = recording.table_data[order[first:first + step]].view("<u8")
        page, word = np.nonzero(words)
        addr = pfn[first + page] * np.uint64(PAGE_SIZE) + word.astype(np.uint64) * np.uint64(8)
        yield _event_rows(np.full(page.size, Op.MEMORY_WORD), addr, words[page, word].astype(np.uint64))


def _event_rows(op: np.ndarray, addr: np.ndarray, value: np.ndarray) -> Arrays:
    n = op.size
    return {"op": op.astype(np.uint8), "addr": addr.astype(np.uint64), "value": value.astype(np.uint64),
            "access": np.zeros(n, np.uint8), "size": np.full(n, 8, np.uint8), "gpa": np.zeros(n, np.uint64)}


# ---- chunks ------------------------------------------------------------------------------------------------------------

def recording_chunks(recording: Recording, repeat: int = 1) -> Iterator[Arrays]:
    """Yield the rows of a recording, as columns that `Chunk.checked()` takes.

    Parameters
    ----------
    recording : Recording
    repeat : int
        How often its accesses come. Each time starts from the same registers, and in a dyn phase from the same memory
        (RESTART).
    """
    repeat = check_int("repeat", repeat, 1, _REPEAT_MAX)
    yield from _memory(recording)
    yield from _rounds(recording, repeat)


def _rounds(recording: Recording, repeat: int) -> Iterator[Arrays]:
    rows = RecordedRows(recording, sizes=True)
    while True:
        while (columns := rows.columns(ROW_GROUP)) is not None:
            yield columns
        repeat -= 1
        if not repeat:
            return
        if recording.phase == "dyn":
            yield _event_rows(np.array([Op.RESTART]), np.zeros(1), np.zeros(1))
        elif rows.ends_elsewhere:
            yield _event_rows(np.array([Op.SET_REGS]), np.zeros(1), np.array([_start(recording)]))
        rows = RecordedRows(recording, sizes=True)


def convert(source: Recording | Trace, out: StrPath, *, repeat: int = 1, compression: str = "lz4", layout: str = "places",
            progress: Progress | None = None) -> int:
    """Write a recording or a trace as a Parquet trace, in memory that depends neither on its length nor on `repeat`.

    Parameters
    ----------
    source : Recording or Trace
    out : str or path-like
        The file, new or a regular one, and none of the source's; it appears when it is complete (see `ParquetWriter`).
    repeat : int
        How often the accesses of a recording come.
    compression : {"lz4", "zstd", "snappy", "none"}
    layout : {"places", "plain"}
        As for `ParquetWriter`: "plain" has the columns `op`, `addr`, `access` and `gpa`, for other tools.
    progress : callable, optional
        Called with (accesses written, accesses in all; 0 if unknown).

    Returns
    -------
    int
        Accesses written.

    Raises
    ------
    OSError
        `out` is anything else, or cannot be written.
    RecordingError, TraceError
        The source is damaged, or has no registers where it needs them.
    ValueError
        `repeat` of a trace.
    """
    repeat = check_int("repeat", repeat, 1, _REPEAT_MAX)
    chunks: Iterator[Any]
    if isinstance(source, Recording):
        chunks, header, total = recording_chunks(source, repeat), recording_header(source), len(source) * repeat
    elif repeat != 1:
        raise ValueError(f"repeat: only the accesses of a recording are repeated; want 1, got {repeat}")
    else:
        if isinstance(source, ParquetTrace):
            source = ParquetTrace(source.path, lean=False)          # with the columns that a replay leaves out
        chunks, header, total = source.chunks(), source.header, source.header.accesses or 0
    with ParquetWriter(out, header, compression=compression, layout=layout, inputs=source_files(source)) as writer:
        for columns in chunks:
            writer.write(columns)
            if progress:
                progress(writer.accesses, total)
    return writer.accesses


def source_files(source: Recording | Trace) -> list[Path]:
    """Return the files that a recording or a trace is read from."""
    if isinstance(source, Recording):
        return recording_files(source.path)
    path = getattr(source, "path", None)
    if path is None:
        return []
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
