"""Replay of rows: those of a trace as they come, or those of a recording, in memory that does not grow."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import numpy as np

from kvmmu.arch._bits import INVALID_GPA, PAGE_SHIFT
from kvmmu.arch.faults import GuestFault
from kvmmu.arch.registers import Regs
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay.checkpoint import CheckpointError, Checkpoints
from kvmmu.replay.register_events import Context, context_of, lacks_pdptrs, pdptrs_at, use_context
from kvmmu.replay.result import Report
from kvmmu.replay.row_run import MakeTlbs, RowRun, new_vcpu
from kvmmu.traces import Chunk, ParquetTrace, Recording, RecordingError, Trace, TraceError
from kvmmu.traces._recorded_rows import RecordedRows
from kvmmu.traces.conversion import recording_header
from kvmmu.vm.vcpu import Vcpu

__all__ = ["recording_vcpu", "replay_recording", "replay_trace", "with_file"]

_MAX_OFF = 0xFFFF                       # of the 16 bits of a recorded offset
Progress = Callable[[int, int], object]


def replay_trace(trace: Trace, vcpu: Vcpu | None = None, progress: Progress | None = None,
                 tlbs: MakeTlbs | None = None, checkpoints: Checkpoints | None = None) -> Report:
    """Walk every access of a trace and hold each against its recorded physical address, where it has one.

    Parameters
    ----------
    trace : Trace
    vcpu : Vcpu, optional
        Whose memory to walk, for a trace that brings none; its registers are those of the header.
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) after each chunk.
    tlbs : callable, optional
        Called with the number of vCPUs; makes the TLBs that the accesses go through.
    checkpoints : Checkpoints, optional

    Raises
    ------
    CheckpointError
        The state to go on from does not fit.
    TraceError
        The trace is damaged, or tells of something that no CPU does; its `report` is what was done until then.
    ReplayInterrupted
        Ctrl-C; its `report` likewise.
    """
    # A program that makes chunks, or looks on, may write the tables meanwhile: those of a vCPU that it has
    alone = vcpu is None or (type(trace) is ParquetTrace and progress is None)
    run = RowRun(trace.header, vcpu, alone, tlbs)
    keeper = checkpoints or Checkpoints(trace, {})
    run.saved, run.keeps_pages = keeper.saved, keeper.writes
    try:
        with keeper, closing(_chunks(trace, run)) as chunks:
            while True:
                started = time.perf_counter()
                chunk = next(chunks, None)
                run.waited += time.perf_counter() - started
                if chunk is None:
                    break
                with keeper.busy():
                    run.chunk(chunk)
                if progress and run.loop is not None:
                    progress(run.loop.accesses, trace.header.accesses or 0)
                keeper.tick(run.state)
            with keeper.busy():
                run.finish()
        return run.report(complete=True)
    except KeyboardInterrupt:
        raise keeper.interruption(run.state, run.report(complete=False)) from None
    except TraceError as error:
        named = with_file(error, trace)
        named.report = run.report(complete=False)
        raise named from error.__cause__


def _chunks(trace: Trace, run: RowRun) -> Generator[Chunk]:
    """Yield the chunks of a trace, but for those that were done before the state that it goes on from, where they can be told."""
    with closing(trace._chunks_from(0, placed=True) if type(trace) is ParquetTrace else trace.chunks()) as chunks:
        for chunk in chunks:
            yield chunk
            if isinstance(trace, ParquetTrace) and run.rows < run.skipped:
                break
        else:
            return
    assert isinstance(trace, ParquetTrace)
    run.rows = trace._group_start(run.skipped)
    with closing(trace._chunks_from(run.rows, placed=True)) as chunks:
        yield from chunks


def replay_recording(recording: Recording, progress: Progress | None = None, tlbs: MakeTlbs | None = None,
                     checkpoints: Checkpoints | None = None) -> Report:
    """Walk every access of a recording and hold each against its recorded physical address.

    Parameters
    ----------
    recording : Recording
    progress : callable, optional
        Called with (accesses done, accesses in all) about every million accesses.
    tlbs, checkpoints
        As for `replay_trace()`.

    Raises
    ------
    RecordingError
        The recording is damaged, or tells of something that no CPU does.
    ReplayInterrupted
        Ctrl-C; its `report` is what was done until then.
    """
    recording.check()
    if recording.pages_gpa.max(initial=0) > INVALID_GPA - _MAX_OFF:
        # a walk that faults ends at INVALID_GPA, and no recorded address may be that
        raise RecordingError(f"{recording.path}: pages_gpa: is {int(recording.pages_gpa.max()):#x}; allowed is below 2**52")
    run = RowRun(recording_header(recording), recording_vcpu(recording)[0], True, tlbs)
    keeper = checkpoints or Checkpoints(recording, {})
    run.saved, run.recording = keeper.saved, recording
    try:
        with keeper:
            with keeper.busy():
                run.begin_recording(RecordedRows(recording))
            done = False
            while not done:
                with keeper.busy():
                    done = run.stretch()
                if progress:
                    progress(run.position, len(recording))
                keeper.tick(run.state)
        return run.report(complete=True)
    except KeyboardInterrupt:
        raise keeper.interruption(run.state, run.report(complete=False)) from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise RecordingError(f"{recording.path}: {str(error).removeprefix('header: ')}") from error.__cause__


def recording_vcpu(recording: Recording) -> tuple[Vcpu, list[Context]]:
    """Return a vCPU over the page tables of a recording, and the register sets of its contexts.

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
    header = recording_header(recording)
    try:
        mem = GuestMemory.from_pages(recording.table_pfn << np.uint64(PAGE_SHIFT), recording.table_data)
        vcpu = new_vcpu(mem, header)
        contexts = [context_of(regs) for regs in header.contexts]
        contexts = [replace(context, pdptrs=pdptrs_at(mem, vcpu.cpu, context.cr3, header.pdpte_clear))
                    if isinstance(context, Regs) and lacks_pdptrs(context) else context for context in contexts]
        use_context(vcpu, contexts[0])
    except (GuestFault, ValueError) as error:
        raise RecordingError(f"{recording.path}: {str(error).removeprefix('header: ')}") from error
    return vcpu, contexts


def with_file(error: TraceError, trace: Trace) -> TraceError:
    """Return the error, with the file of the trace in its message if there is one."""
    path = getattr(trace, "path", None)
    return error if path is None or str(error).startswith(str(path)) else TraceError(f"{path}: {error}")
