"""The kvmmu command."""

import argparse
import json
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import numpy as np

import kvmmu
from kvmmu.arch._bits import Access, Status
from kvmmu.arch.faults import error_code_text
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.recorded_faults import Context
from kvmmu.replay.recorded_machine import touched_machine
from kvmmu.replay.replay import recording_vcpu, replay, use_context
from kvmmu.replay.result import ReplayInterrupted, Report
from kvmmu.replay.terminal import StreamError, encodable, printable, say, warn, write
from kvmmu.replay.trace_replay import trace_start
from kvmmu.report.figure import plot_walk
from kvmmu.report.spte_tree import spte_runs, spte_text
from kvmmu.report.tables import replay_tables, show_tables
from kvmmu.traces import ParquetTrace, Recording, TraceError, bundled, convert, is_parquet
from kvmmu.traces._files import check_output
from kvmmu.traces.parquet import COMPRESSIONS
from kvmmu.traces.recording import recording_files
from kvmmu.vm.vcpu import Vcpu

__all__ = ["main"]

_ACCESS_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.FETCH, "u": Access.USER, "a": Access.AC, "i": Access.IMPLICIT}
_PAGE = 0xFFF
_OK, _MISMATCH, _BAD, _BUG, _INTERRUPTED = 0, 1, 2, 3, 130
_DEADLY = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
_EXIT_STATUS = "Exit status: 0; 1 a mismatch; 2 bad arguments, input or output; 3 a bug of kvmmu; 130 Ctrl-C."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    That is 0, 1 on a mismatch, 2 on bad arguments, input or output, 3 on a bug, 130 on Ctrl-C. Help, and arguments that argparse
    refuses, leave by SystemExit with 0 or 2.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt as stop:
        warn(f"kvmmu: {stop}" if str(stop) else "kvmmu: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_output()                                  # the reader of stdout closed it, which is no mismatch
        return _OK
    except StreamError as error:
        _drop_output()
        warn(f"kvmmu: {error}")
    except _Deadly as stop:
        os.kill(os.getpid(), stop.number)               # as if nobody had caught it
        return 128 + stop.number
    except MemoryError as error:
        warn(f"kvmmu: out of memory{f': {error}' if str(error) else ''}")
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        warn(f"kvmmu: {os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {error.strerror}"
             if named else f"kvmmu: {error}")
    except (ValueError, ImportError, kvmmu.GuestFault) as error:
        warn(f"kvmmu: {error}")
    except Exception:  # exit status 1 would say that there is a mismatch
        warn("kvmmu: a bug; please report it with what follows")
        traceback.print_exc()
        return _BUG
    return _BAD


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit:
        _flush()
        raise
    if sys.stdout is None:
        raise StreamError("standard output is closed: there is nowhere to print to")
    status = int(args.run(args))
    _flush()
    return status


def _flush() -> None:
    """Write what is still to be written to stdout, so that a failure is told here and not by Python at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise StreamError(f"standard output: {getattr(error, 'strerror', None) or error}") from error


def _drop_output() -> None:
    """Let what Python still wants to flush at exit go nowhere."""
    with suppress(AttributeError, OSError, ValueError):             # no stdout, or none with a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- signals that end a process ----------------------------------------------------------------------------------------

class _Deadly(BaseException):
    """A signal that is to end the process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Signals that would end the process at once end the block by an exception first, which removes temporary files."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)        # until all is removed
        raise _Deadly(number)

    try:
        for number in _DEADLY:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:
        pass                                            # not in the main thread
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- arguments ---------------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    """Does not pass over a failure to print its help."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is not None and file is sys.stdout:
            write(message)
        elif message and sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stderr.write(encodable(message, sys.stderr))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvmmu", description="Replay and inspect page walks of recorded x86 guests.",
                     epilog=_epilog("replay", "walk bundled 0x401000", "spt bundled --backing 4k",
                                    "convert bundled l4.parquet", "replay --help"),
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"kvmmu {kvmmu.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "replay", _replay, "walk every access of a recording or trace and check each physical address",
                   "Walk every access of a recording or trace and hold each against the recorded physical address. Exit status "
                   "1 on a mismatch; Ctrl-C reports what was done so far.",
                   "replay", "replay RECORDING --phase dyn", "replay l4.parquet --json")
    run.add_argument("recording", nargs="?", metavar="RECORDING",
                     help="directory of a recording, a trace file in it (.npz or .npz.zst), or a Parquet trace; default: the "
                          "bundled recording")
    _add_phase(run)
    run.add_argument("--json", action="store_true", help="print one JSON object")

    conversion = _command(commands, "convert", _convert, "write a recording as a Parquet trace",
                          "Write a recording as a Parquet trace that holds all it takes to replay it.",
                          "convert bundled l4.parquet", "convert RECORDING long.parquet --repeat 100 --compression zstd")
    conversion.add_argument("recording", metavar="RECORDING",
                            help="directory of a recording, or a trace file in it; 'bundled' is the bundled one")
    conversion.add_argument("out", metavar="OUT.parquet",
                            help="the file to write, new or a regular one to replace, but none of the recording's; it appears "
                                 "when it is complete")
    _add_phase(conversion)
    conversion.add_argument("--repeat", type=_count, default=1, metavar="N",
                            help="write the accesses N times, each time from the same registers and, in a dyn phase, memory")
    conversion.add_argument("--compression", choices=COMPRESSIONS, default="lz4",
                            help="lz4 (default) decodes two to three times as fast as zstd, which takes half the space")
    _add_walk(commands)
    _add_spt(commands)
    return parser


def _epilog(*examples: str) -> str:
    return "\n".join(["Examples:", *(f"  kvmmu {example}" for example in examples), "", _EXIT_STATUS])


def _command(commands: "argparse._SubParsersAction[_Parser]", name: str, run: Any, summary: str, description: str,
             *examples: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, epilog=_epilog(*examples), description=textwrap.fill(description, 78),
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    return command


def _add_phase(command: argparse.ArgumentParser) -> None:
    command.add_argument("--phase", choices=("static", "dyn"), help="phase of the recording (default: static if there is one)")


def _add_walk(commands: "argparse._SubParsersAction[_Parser]") -> None:
    walk = _command(commands, "walk", _walk, "print walks level by level",
                    "Walk linear addresses through the page tables of a recording or trace, as they are at the start of the "
                    "phase or trace. Exit status 1 if a walk contradicts an address that the recording has; a trace is not "
                    "searched for addresses.",
                    "walk bundled 0x401000", "walk RECORDING 0xffffffff81000000 --access x --ctx 3",
                    "walk bundled 0x401000 --plot walk.png", "walk l4.parquet 0x401000 --json")
    walk.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    walk.add_argument("gva", nargs="+", type=_address, metavar="GVA", help="linear address, hexadecimal with 0x")
    _add_phase(walk)
    walk.add_argument("--ctx", type=int, metavar="N",
                      help="row of the register contexts of the recording (default: 0) or of the trace's header (default: the "
                           "registers at the start)")
    walk.add_argument("--access", type=_access, default=Access.AC, metavar="LETTERS",
                      help="r read, w write, x fetch; u user; a EFLAGS.AC set; i implicit (default: ra)")
    walk.add_argument("--json", action="store_true", help="print one JSON object")
    walk.add_argument("--plot", metavar="FILE", help="save a figure of the walk of a single GVA (.png, .svg, .pdf)")


def _add_spt(commands: "argparse._SubParsersAction[_Parser]") -> None:
    spt = _command(commands, "spt", _spt, "print the host's page tables of a recorded guest",
                   "Touch every page that a recording or trace touches, on a machine under two-dimensional paging whose guest "
                   "tables are those of the start, and print the tree of SPTEs that its host built.",
                   "spt bundled", "spt RECORDING --tdp npt --backing 1g", "spt l4.parquet --json")
    spt.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    _add_phase(spt)
    spt.add_argument("--tdp", choices=("ept", "npt"), default="ept", help="kind of two-dimensional paging (default: ept)")
    spt.add_argument("--backing", choices=("4k", "2m", "1g"), default="2m", help="pages of the host (default: 2m)")
    spt.add_argument("--nx-huge-pages", action="store_true", help="with the mitigation: no huge page is executable")
    spt.add_argument("--json", action="store_true", help="print one JSON object")


def _address(text: str) -> int:
    """An address, hexadecimal with 0x. A number without it is refused unless it is the same in both bases."""
    digits = text.removeprefix("-").lower()
    if not digits.startswith("0x") and len(digits) > 1:
        both = [f"0x{digits}"] if _is_number(digits, 16) else []
        both += [f"{int(digits):#x} (decimal {digits})"] if _is_number(digits, 10) else []
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address; want hexadecimal with 0x" + (f": {' or '.join(both)}" if both else ""))
    try:
        value = int(text, 16)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address; want hexadecimal with 0x") from None
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is not within 64 bits")
    return value


def _is_number(text: str, base: int) -> bool:
    return len(text) <= 20 and text.isascii() and all(character in "0123456789abcdef"[:base] for character in text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; want 1 or more")
    return int(text)


def _access(text: str) -> Access:
    access = Access.READ
    for letter in text:
        if letter not in _ACCESS_LETTERS:
            raise argparse.ArgumentTypeError(f"{letter!r} is none of the letters {' '.join(_ACCESS_LETTERS)}")
        access |= _ACCESS_LETTERS[letter]
    if access & Access.WRITE and access & Access.FETCH:
        raise argparse.ArgumentTypeError(f"{text!r} both writes and fetches")
    return access


# ---- commands ----------------------------------------------------------------------------------------------------------

def _open(args: argparse.Namespace) -> Recording:
    path = bundled() if args.recording in (None, "bundled") else args.recording
    return Recording.open(path, args.phase)


def _open_any(args: argparse.Namespace) -> Recording | ParquetTrace:
    if args.recording in (None, "bundled") or not is_parquet(args.recording):
        return _open(args)
    if args.phase is not None:
        raise ValueError(f"--phase {args.phase}: a trace has one phase")
    return ParquetTrace(args.recording)


def _replay(args: argparse.Namespace) -> int:
    source = _open_any(args)
    titled = source if isinstance(source, Recording) else source.header
    name = f"{titled.name} {titled.phase}"
    try:
        with progress_bar(f"replaying {name}") as progress:
            report = replay(source, progress=progress or False)
    except (ReplayInterrupted, TraceError) as stop:
        if stop.report is not None and stop.report.accesses:
            _show(stop.report, args.json)
        raise
    _show(report, args.json)
    return _MISMATCH if report.mismatches else _OK


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        say(json.dumps(report.to_dict()))
        return
    show_tables(replay_tables(report))
    for example in report.examples:
        say(f"MISMATCH {example}")
    if report.mismatches > len(report.examples):
        say(f"... and {report.mismatches - len(report.examples):,} more")


def _convert(args: argparse.Namespace) -> int:
    check_output(args.out, recording_files(bundled() if args.recording == "bundled" else args.recording))
    recording = _open(args)
    with _cleaning_up(), progress_bar(f"converting {recording.name} {recording.phase}") as progress:
        accesses = convert(recording, args.out, repeat=args.repeat, compression=args.compression, progress=progress)
    say(f"{printable(args.out)}: {accesses:,} accesses, {os.path.getsize(args.out):,} bytes")
    return _OK


def _walk_in(source: Recording | ParquetTrace, ctx: int | None) -> tuple[Vcpu, int]:
    """A vCPU that has the registers of a context, and the number of that context; -1 are those of a trace's start."""
    if isinstance(source, Recording):
        vcpu, contexts = recording_vcpu(source)
        what, number = "recording", ctx or 0
    else:
        start = trace_start(source)
        vcpu, contexts = start.vcpu, start.contexts
        if ctx is None:
            return vcpu, -1
        what, number = "trace", ctx
    if not 0 <= number < len(contexts):
        there = f"contexts 0 to {len(contexts) - 1}" if contexts else "no contexts"
        raise ValueError(f"--ctx {number}: the {what} has {there}")
    _use(vcpu, contexts[number], source, number)
    return vcpu, number


def _use(vcpu: Vcpu, context: Context, source: Recording | ParquetTrace, number: int) -> None:
    try:
        use_context(vcpu, context)
    except (kvmmu.GuestFault, ValueError) as error:
        raise ValueError(f"{source.path}: context {number}: {error}") from error


def _walk(args: argparse.Namespace) -> int:
    if args.plot is not None and len(args.gva) > 1:
        raise ValueError(f"--plot: a figure shows one walk, got {len(args.gva)} addresses")
    source = _open_any(args)
    vcpu, ctx = _walk_in(source, args.ctx)
    started = time.perf_counter()
    records = [vcpu.gva_walk.walk_record(gva, args.access) for gva in args.gva]
    seconds = time.perf_counter() - started
    if args.plot is not None:
        plot_walk(records[0], args.plot)
    recorded = [_recorded_gpas(source, ctx, record.gva) if isinstance(source, Recording) else [] for record in records]
    verified = [record.gpa in gpas for record, gpas in zip(records, recorded, strict=True)]
    # the tables of a dyn phase move on: an address recorded later proves nothing about its start
    is_static = isinstance(source, Recording) and source.phase == "static"
    wrong = [is_static and bool(gpas) and record.status == Status.OK and not right
             for record, gpas, right in zip(records, recorded, verified, strict=True)]
    if args.json:
        faults: dict[str, int] = {}
        for record in records:
            if record.status:
                kind = error_code_text(record.error_code) if record.status == Status.PAGE_FAULT else Status(record.status).name
                faults[kind] = faults.get(kind, 0) + 1
        walks = [record.to_dict() | {"recorded_gpa": [hex(gpa) for gpa in gpas]}
                 for record, gpas in zip(records, recorded, strict=True)]
        say(json.dumps({"accesses": len(records), "verified": sum(verified), "faults": faults, "mismatches": sum(wrong),
                        "seconds": seconds, "walks": walks}))
    else:
        for record, gpas, right in zip(records, recorded, verified, strict=True):
            say(str(record))
            if gpas:
                say(f"  recorded: gpa {' then '.join(hex(gpa) for gpa in gpas)}{' - as walked' if right else ''}")
    return _MISMATCH if any(wrong) else _OK


def _spt(args: argparse.Namespace) -> int:
    vm = touched_machine(_open_any(args), tdp=args.tdp, backing=args.backing, nx_huge_pages=args.nx_huge_pages)
    if args.json:
        say(json.dumps({"stats": vm.stats, "sptes": [run.__dict__ for run in spte_runs(vm)]}))
    else:
        say(spte_text(vm))
        say("  ".join(f"{name} {count}" for name, count in vm.stats.items() if count))
    return _OK


def _recorded_gpas(recording: Recording, ctx: int, gva: int) -> list[int]:
    """Physical addresses that the trace recorded for a linear address in this context, in order of first use."""
    rows = (recording.pages_gva == np.uint64(gva & ~_PAGE)) & (recording.pages_ctx == ctx)
    return [gpa + (gva & _PAGE) for gpa in recording.pages_gpa[rows].tolist()]


if __name__ == "__main__":
    sys.exit(main())
