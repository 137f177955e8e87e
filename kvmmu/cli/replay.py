"""kvmmu replay: walk every access of a trace and check each physical address."""

import argparse
import json

from kvmmu.cli.output import MISMATCH, OK
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import open_any
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.replay import replay
from kvmmu.replay.result import ReplayInterrupted, Report
from kvmmu.replay.terminal import say
from kvmmu.report.tables import replay_tables, show_tables
from kvmmu.traces import Recording, TraceError

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    run = command(commands, "replay", _replay, "walk every access of a recording or trace and check each physical address",
                  "Walk every access of a recording or trace and hold each against the recorded physical address. Exit status "
                  "1 on a mismatch; Ctrl-C reports what was done so far.",
                  "replay", "replay RECORDING --phase dyn", "replay l4.parquet --json")
    run.add_argument("recording", nargs="?", metavar="RECORDING",
                     help="directory of a recording, a trace file in it (.npz or .npz.zst), or a Parquet trace; default: the "
                          "bundled recording")
    add_phase(run)
    run.add_argument("--json", action="store_true", help="print one JSON object")


def _replay(args: argparse.Namespace) -> int:
    source = open_any(args)
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
    return MISMATCH if report.mismatches else OK


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        say(json.dumps(report.to_dict()))
        return
    show_tables(replay_tables(report))
    for example in report.examples:
        say(f"MISMATCH {example}")
    if report.mismatches > len(report.examples):
        say(f"... and {report.mismatches - len(report.examples):,} more")
