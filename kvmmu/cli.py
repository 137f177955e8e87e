"""The kvmmu command."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

import kvmmu
from kvmmu._bits import Access, Status
from kvmmu.faults import error_code_text
from kvmmu.figure import plot_walk
from kvmmu.outcome import ReplayInterrupted, Report
from kvmmu.progress import progress_bar
from kvmmu.recorded_machine import touched_machine
from kvmmu.replay import recording_vcpu, replay, use_context
from kvmmu.report import replay_tables, show_tables
from kvmmu.spt import spte_runs, spte_text
from kvmmu.traces import ParquetTrace, Recording, Trace, TraceError, bundled, convert, is_parquet
from kvmmu.traces.parquet import COMPRESSIONS

__all__ = ["main"]

_ACCESS_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.FETCH, "u": Access.USER, "a": Access.AC, "i": Access.IMPLICIT}
_PAGE = 0xFFF


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 on a mismatch, 2 on bad input."""
    args = _parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt as stop:
        print(f"kvmmu: {stop}" if str(stop) else "kvmmu: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, kvmmu.GuestFault) as error:
        print(f"kvmmu: {error}", file=sys.stderr)
        return 2


def _reader_left() -> int:
    """The reader of stdout closed it, which is no mismatch. What Python still wants to flush at exit goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvmmu", description="Replay and inspect page walks of recorded x86 guests.")
    parser.add_argument("--version", action="version", version=f"kvmmu {kvmmu.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("replay", help="walk every access of a recording or trace and check each physical address",
                              description="Walk every access of a recording or trace and hold each against the recorded "
                                          "physical address. Exit status 1 on a mismatch; Ctrl-C reports what was done so far.")
    run.add_argument("recording", nargs="?", metavar="RECORDING",
                     help="directory of a recording, a trace file in it (.npz or .npz.zst), or a Parquet trace; default: the "
                          "bundled recording")
    run.add_argument("--phase", choices=("static", "dyn"), help="which phase (default: static if there is one)")
    run.add_argument("--json", action="store_true", help="print one JSON object")
    run.set_defaults(run=_replay)

    conversion = commands.add_parser("convert", help="write a recording as a Parquet trace",
                                     description="Write a recording as a Parquet trace that holds all it takes to replay it.")
    conversion.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    conversion.add_argument("out", metavar="OUT.parquet", help="the file to write; it appears when it is complete")
    conversion.add_argument("--phase", choices=("static", "dyn"), help="which phase (default: static if there is one)")
    conversion.add_argument("--repeat", type=_count, default=1, metavar="N",
                            help="write the accesses N times, each time from the same registers and, in a dyn phase, memory")
    conversion.add_argument("--compression", choices=COMPRESSIONS, default="lz4",
                            help="lz4 (default) decodes two to three times as fast as zstd, which takes half the space")
    conversion.set_defaults(run=_convert)

    walk = commands.add_parser("walk", help="print walks level by level",
                               description="Walk linear addresses through the page tables of a recording, as they are at the "
                                           "start of the phase. Exit status 1 if a walk contradicts a recorded address.")
    walk.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    walk.add_argument("gva", nargs="+", type=_address, metavar="GVA", help="linear address, hexadecimal (0x...) or decimal")
    walk.add_argument("--phase", choices=("static", "dyn"), help="which phase (default: static if there is one)")
    walk.add_argument("--ctx", type=int, default=0, help="row of the recording's register contexts (default: 0)")
    walk.add_argument("--access", type=_access, default=Access.AC, metavar="LETTERS",
                      help="r read, w write, x fetch; u user; a EFLAGS.AC set; i implicit (default: ra)")
    walk.add_argument("--json", action="store_true", help="print one JSON object")
    walk.add_argument("--plot", metavar="FILE", help="save a figure of the walk of a single GVA (.png, .svg, .pdf)")
    walk.set_defaults(run=_walk)
    _add_spt(commands)
    return parser


def _add_spt(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    spt = commands.add_parser("spt", help="print the host's page tables of a recorded guest",
                              description="Touch every page that a recording touches, on a machine under two-dimensional "
                                          "paging, and print the tree of SPTEs that its host built.")
    spt.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    spt.add_argument("--phase", choices=("static", "dyn"), help="which phase (default: static if there is one)")
    spt.add_argument("--tdp", choices=("ept", "npt"), default="ept", help="kind of two-dimensional paging (default: ept)")
    spt.add_argument("--backing", choices=("4k", "2m", "1g"), default="2m", help="pages of the host (default: 2m)")
    spt.add_argument("--nx-huge-pages", action="store_true", help="with the mitigation: no huge page is executable")
    spt.add_argument("--json", action="store_true", help="print one JSON object")
    spt.set_defaults(run=_spt)


def _address(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; want 0x... or decimal") from None
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is not within 64 bits")
    return value


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


def _open(args: argparse.Namespace) -> Recording:
    path = bundled() if args.recording in (None, "bundled") else args.recording
    return Recording.open(path, args.phase)


def _replay(args: argparse.Namespace) -> int:
    source: Recording | Trace
    if args.recording is not None and is_parquet(args.recording):
        if args.phase is not None:
            raise ValueError(f"--phase {args.phase}: a trace has one phase")
        source = ParquetTrace(args.recording)
        name = f"{source.header.name} {source.header.phase}"
    else:
        source = _open(args)
        name = f"{source.name} {source.phase}"
    try:
        with progress_bar(f"replaying {name}") as progress:
            report = replay(source, progress=progress or False)
    except (ReplayInterrupted, TraceError) as stop:
        if stop.report is not None and stop.report.accesses:
            _show(stop.report, args.json)
        raise
    _show(report, args.json)
    return 1 if report.mismatches else 0


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    show_tables(replay_tables(report))
    for example in report.examples:
        print(f"MISMATCH {example}")
    if report.mismatches > len(report.examples):
        print(f"... and {report.mismatches - len(report.examples):,} more")


def _convert(args: argparse.Namespace) -> int:
    recording = _open(args)
    with progress_bar(f"converting {recording.name} {recording.phase}") as progress:
        accesses = convert(recording, args.out, repeat=args.repeat, compression=args.compression, progress=progress)
    print(f"{args.out}: {accesses:,} accesses, {os.path.getsize(args.out):,} bytes")
    return 0


def _walk(args: argparse.Namespace) -> int:
    if args.plot is not None and len(args.gva) > 1:
        raise ValueError(f"--plot: a figure shows one walk, got {len(args.gva)} addresses")
    recording = _open(args)
    vcpu, contexts = recording_vcpu(recording)
    if not 0 <= args.ctx < len(contexts):
        raise ValueError(f"--ctx {args.ctx}: the recording has contexts 0 to {len(contexts) - 1}")
    use_context(vcpu, contexts[args.ctx])
    started = time.perf_counter()
    records = [vcpu.gva_walk.walk_record(gva, args.access) for gva in args.gva]
    seconds = time.perf_counter() - started
    if args.plot is not None:
        plot_walk(records[0], args.plot)
    recorded = [_recorded_gpas(recording, args.ctx, record.gva) for record in records]
    verified = [record.gpa in gpas for record, gpas in zip(records, recorded, strict=True)]
    # the tables of a dyn phase move on: an address recorded later proves nothing about its start
    wrong = [recording.phase == "static" and bool(gpas) and record.status == Status.OK and not right
             for record, gpas, right in zip(records, recorded, verified, strict=True)]
    if args.json:
        faults: dict[str, int] = {}
        for record in records:
            if record.status:
                kind = error_code_text(record.error_code) if record.status == Status.PAGE_FAULT else Status(record.status).name
                faults[kind] = faults.get(kind, 0) + 1
        walks = [record.to_dict() | {"recorded_gpa": [hex(gpa) for gpa in gpas]}
                 for record, gpas in zip(records, recorded, strict=True)]
        print(json.dumps({"accesses": len(records), "verified": sum(verified), "faults": faults, "mismatches": sum(wrong),
                          "seconds": seconds, "walks": walks}))
    else:
        for record, gpas, right in zip(records, recorded, verified, strict=True):
            print(record)
            if gpas:
                print(f"  recorded: gpa {' then '.join(hex(gpa) for gpa in gpas)}{' - as walked' if right else ''}")
    return 1 if any(wrong) else 0


def _spt(args: argparse.Namespace) -> int:
    recording = _open(args)
    vm = touched_machine(recording, tdp=args.tdp, backing=args.backing, nx_huge_pages=args.nx_huge_pages)
    if args.json:
        print(json.dumps({"stats": vm.stats, "sptes": [run.__dict__ for run in spte_runs(vm)]}))
    else:
        print(spte_text(vm))
        print("  ".join(f"{name} {count}" for name, count in vm.stats.items() if count))
    return 0


def _recorded_gpas(recording: Recording, ctx: int, gva: int) -> list[int]:
    """Physical addresses that the trace recorded for a linear address in this context, in order of first use."""
    rows = (recording.pages_gva == np.uint64(gva & ~_PAGE)) & (recording.pages_ctx == ctx)
    return [gpa + (gva & _PAGE) for gpa in recording.pages_gpa[rows].tolist()]


if __name__ == "__main__":
    sys.exit(main())
