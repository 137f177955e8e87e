"""Anything as a file in the trace format; a recording with its table writes, faults and register loads as rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvmmu.arch._bits import Cr4, Op
from kvmmu.arch.arguments import check_int
from kvmmu.traces._npz import Arrays, RecordingError, StrPath
from kvmmu.traces.header import Header, RegisterSet, Stage
from kvmmu.traces.parquet import ROW_GROUP, ParquetTrace, ParquetWriter
from kvmmu.traces.recording import Recording, recording_files
from kvmmu.traces.stream import Trace

__all__ = ["convert", "recording_chunks", "recording_header", "source_files"]

_CR3, _CR4, _INVLPG, _CR0, _WORLD_SWITCH = 1, 2, 3, 4, 7
_LOADS = {_CR3: (Op.MOV_CR3, 1), _CR4: (Op.MOV_CR4, 4), _CR0: (Op.MOV_CR0, 3)}         # event, and column of ctx
_GUEST, _CR4_COLUMN = 0, 4
_PAGE = 4096
_REPEAT_MAX = 1 << 32
_TCG_PDPTE_ACCESSED = 1 << 5            # QEMU's TCG sets it in PDPTEs, where a CPU has it reserved
_KEY = np.dtype([("pos", np.uint64), ("op", np.uint8), ("addr", np.uint64), ("value", np.uint64), ("size", np.uint8)])
Progress = Callable[[int, int], object]


def recording_header(recording: Recording) -> Header:
    """The header of the trace that `recording_chunks()` gives.

    Raises
    ------
    RecordingError
        The recording has no register contexts.
    """
    if not len(recording.ctx):
        raise RecordingError(f"{recording.path}: has no register contexts, and a trace has to begin with one")
    contexts = tuple(_register_set(recording, *row) for row in recording.ctx.tolist())
    start = int(recording.pages_ctx[recording.pidx[0]]) if len(recording) else 0
    return Header(
        registers=(contexts[start],), contexts=contexts, name=recording.name, phase=recording.phase, mode=recording.mode,
        cpu={"vendor": "amd", "maxphyaddr": recording.maxphyaddr}, source="QEMU TCG recording",
        tables_at="start" if recording.phase == "dyn" else "end", pdpte_clear=_TCG_PDPTE_ACCESSED)


def _register_set(recording: Recording, guest: int, cr3: int, ncr3: int, cr0: int, cr4: int, efer: int) -> RegisterSet:
    stage = _stage(recording, ncr3) if guest else None
    return RegisterSet(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=recording.pkru, second_stage=stage)


def _stage(recording: Recording, ncr3: int) -> Stage:
    """The NPT at a nested CR3, in the format that the registers of L1 choose."""
    for guest, _, _, _, cr4, efer in recording.ctx.tolist():
        if not guest:
            return Stage(ncr3=ncr3, cr4=cr4, efer=efer)
    return Stage(ncr3=ncr3, cr4=recording.registers["cr4"], efer=recording.registers["efer"])


# ---- memory at the start -----------------------------------------------------------------------------------------------

def _memory(recording: Recording) -> Iterator[Arrays]:
    """MEMORY rows for the runs of table pages, and a MEMORY_WORD row for every word that is not zero."""
    order = np.argsort(recording.table_pfn)
    pfn = recording.table_pfn[order]
    first_of_run = np.ones(pfn.size, bool)
    first_of_run[1:] = np.diff(pfn) != 1
    starts = np.flatnonzero(first_of_run)
    pages = np.diff(np.append(starts, pfn.size)).astype(np.uint64)
    yield _event_rows(np.full(starts.size, Op.MEMORY), pfn[starts] * np.uint64(_PAGE), pages * np.uint64(_PAGE))
    step = ROW_GROUP // (_PAGE // 8)
    for first in range(0, pfn.size, step):
        words = recording.table_data[order[first:first + step]].view("<u8")
        page, word = np.nonzero(words)
        addr = pfn[first + page] * np.uint64(_PAGE) + word.astype(np.uint64) * np.uint64(8)
        yield _event_rows(np.full(page.size, Op.MEMORY_WORD), addr, words[page, word].astype(np.uint64))


def _event_rows(op: np.ndarray, addr: np.ndarray, value: np.ndarray) -> Arrays:
    n = op.size
    return {"op": op.astype(np.uint8), "addr": addr.astype(np.uint64), "value": value.astype(np.uint64),
            "access": np.zeros(n, np.uint8), "size": np.full(n, 8, np.uint8), "gpa": np.zeros(n, np.uint64)}


# ---- events ------------------------------------------------------------------------------------------------------------

class _Events:
    """The events of a recording as rows of the trace, each before access `pos`."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.rows: list[tuple[int, int, int, int]] = []             # pos, op, addr, value
        self.ctx = recording.ctx.tolist()
        self.ctx_of = recording.pages_ctx[recording.pidx]
        self.start = int(self.ctx_of[0]) if len(recording) else 0
        self.regs = list(self.ctx[self.start]) if self.ctx else []  # in force
        self.last_guest = next((row for row, ctx in enumerate(self.ctx) if ctx[_GUEST]), None)
        self.last_host = next((row for row, ctx in enumerate(self.ctx) if not ctx[_GUEST]), None)

    def table(self) -> np.ndarray:
        """All of them in order, as a structured array."""
        recording, total = self.recording, len(self.recording)
        positions = {pos for column in (recording.events.pos, recording.faults.pos, recording.npt_faults.pos)
                     for pos in column.tolist()}
        positions |= set((np.flatnonzero(np.diff(self.ctx_of)) + 1).tolist())
        events = self._by_position(recording.events)
        faults, npt_faults = self._by_position(recording.faults), self._by_position(recording.npt_faults)
        for pos in sorted(positions):
            self._at(pos, min(pos, total), events.get(pos, []), faults.get(pos, []), npt_faults.get(pos, []))
        table = np.zeros(recording.writes.pos.size + len(self.rows), _KEY)
        writes = table[:recording.writes.pos.size]
        writes["pos"] = recording.writes.pos + np.uint64(1)         # a store takes effect behind its access
        writes["addr"], writes["value"] = recording.writes.gpa, recording.writes.val
        writes["op"], table["size"] = Op.GUEST_WRITE, 8
        others = table[recording.writes.pos.size:]
        for column, values in zip(("pos", "op", "addr", "value"), zip(*self.rows, strict=True), strict=False):
            others[column] = np.array(values, _KEY[column])
        return table[np.argsort(table["pos"], kind="stable")]

    @staticmethod
    def _by_position(columns: Any) -> dict[int, list[tuple[int, ...]]]:
        rows: dict[int, list[tuple[int, ...]]] = {}
        for pos, *values in zip(*(column.tolist() for column in columns), strict=True):
            rows.setdefault(pos, []).append(tuple(values))
        return rows

    def _at(self, pos: int, access: int, events: list[tuple[int, ...]], faults: list[tuple[int, ...]],
            npt_faults: list[tuple[int, ...]]) -> None:
        """The rows before access `pos`: register loads, faults, and what the contexts say that no event told."""
        following = int(self.ctx_of[access]) if access < self.ctx_of.size else None
        switches = [event for event in events if event[0] == _WORLD_SWITCH]
        left = len(switches) if pos else 0
        for code, value, aux in events:
            if code == _INVLPG:
                self._emit(pos, Op.INVLPG, value, 0)
            elif pos == 0:
                continue                                            # these tell the registers at the start
            elif code == _WORLD_SWITCH:
                left -= 1
                if left == 0 and not value:                         # a #NPF of L2 is taken before its #VMEXIT
                    npt_faults = self._npt_faults(pos, npt_faults)
                self._switch(pos, value, aux, following)
            elif not switches:                                      # else it is the switch that loads them
                op, column = _LOADS[code]
                self._emit(pos, op, 0, value)
                self.regs[column] = value
        self._npt_faults(pos, npt_faults)
        for cr2, error_code, ctx in faults:
            self._force(pos, ctx)
            self._emit(pos, Op.PAGE_FAULT, cr2, error_code)
        if following is not None:
            self._force(pos, following)

    def _emit(self, pos: int, op: Op, addr: int, value: int) -> None:
        self.rows.append((pos, int(op), addr, value))

    def _npt_faults(self, pos: int, faults: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        for gpa, info in faults:
            self._emit(pos, Op.NPT_FAULT, gpa, info)
        return []

    def _switch(self, pos: int, enters: int, ncr3: int, following: int | None) -> None:
        """A VMRUN or #VMEXIT: to the registers of the next access if they are of that side, else to those of last time."""
        fits = following is not None and self.ctx[following][_GUEST] == enters
        row = following if fits else self.last_guest if enters else self.last_host
        if enters and not fits:
            row = next((number for number, ctx in enumerate(self.ctx) if ctx[_GUEST] and ctx[2] == ncr3), row)
        if row is not None:
            self._emit(pos, Op.VMENTER if enters else Op.VMEXIT, 0, row)
            self._in_force(row)

    def _force(self, pos: int, row: int) -> None:
        """Load the registers of a context unless they are in force."""
        mine, wanted = list(self.regs), list(self.ctx[row])
        for regs in (mine, wanted):
            regs[_CR4_COLUMN] &= ~int(Cr4.PGE)                      # recorded contexts leave it out
        if mine != wanted:
            self._emit(pos, Op.SET_REGS, 0, row)
        self._in_force(row)

    def _in_force(self, row: int) -> None:
        self.regs = list(self.ctx[row])
        if self.ctx[row][_GUEST]:
            self.last_guest = row
        else:
            self.last_host = row


# ---- chunks ------------------------------------------------------------------------------------------------------------

def recording_chunks(recording: Recording, repeat: int = 1) -> Iterator[Arrays]:
    """The rows of a recording, as columns that `Chunk.checked()` takes.

    Parameters
    ----------
    recording : Recording
    repeat : int
        How often its accesses come. Each time starts from the same registers, and in a dyn phase from the same memory
        (RESTART).
    """
    repeat = check_int("repeat", repeat, 1, _REPEAT_MAX)
    yield from _memory(recording)
    events = _Events(recording)
    table = events.table()
    again = _again(recording, events)
    for round_ in range(repeat):
        if round_ and again is not None:
            yield again
        yield from _once(recording, table)


def _again(recording: Recording, events: _Events) -> Arrays | None:
    """The row between two rounds."""
    zero = np.zeros(1, np.uint64)
    if recording.phase == "dyn":
        return _event_rows(np.array([Op.RESTART]), zero, zero)
    if events.regs != events.ctx[events.start]:
        return _event_rows(np.array([Op.SET_REGS]), zero, np.array([events.start]))
    return None


def _once(recording: Recording, table: np.ndarray) -> Iterator[Arrays]:
    total = len(recording)
    bounds = [*range(0, total, ROW_GROUP), total]
    cuts = np.searchsorted(table["pos"], np.array(bounds, np.uint64)).tolist()
    cuts[-1] = table.size                                           # events behind the last access
    for start, stop, first, last in zip(bounds, bounds[1:], cuts, cuts[1:], strict=False):
        yield _interleaved(recording, start, stop, table[first:last])
    if not total and table.size:
        yield _interleaved(recording, 0, 0, table)


def _interleaved(recording: Recording, start: int, stop: int, events: np.ndarray) -> Arrays:
    """Accesses start to stop, and the events among them in their places."""
    columns = recording.columns(start, stop)
    accesses = {"op": columns["kind"] | columns["io"] << np.uint8(2), "addr": columns["gva"],
                "access": recording.access_bytes(start, stop), "size": columns["size"], "gpa": columns["gpa"]}
    if not events.size:
        return accesses
    n = stop - start + events.size
    here = events["pos"].astype(np.int64) - start + np.arange(events.size)
    is_access = np.ones(n, bool)
    is_access[here] = False
    rows: Arrays = {"value": np.zeros(n, np.uint64)}
    for name, column in accesses.items():
        rows[name] = np.zeros(n, column.dtype)
        rows[name][is_access] = column
    for name in ("op", "addr", "value", "size"):
        rows[name][here] = events[name]
    return rows


def convert(source: Recording | Trace, out: StrPath, *, repeat: int = 1, compression: str = "lz4",
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
    with ParquetWriter(out, header, compression=compression, inputs=source_files(source)) as writer:
        for columns in chunks:
            writer.write(columns)
            if progress:
                progress(writer.accesses, total)
    return writer.accesses


def source_files(source: Recording | Trace) -> list[Path]:
    """The files that a recording or a trace is read from."""
    if isinstance(source, Recording):
        return recording_files(source.path)
    path = getattr(source, "path", None)
    if path is None:
        return []
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
