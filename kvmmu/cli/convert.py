"""kvmmu convert: write a trace as a Parquet trace."""

import argparse
import os

from kvmmu.cli.output import OK, cleaning_up
from kvmmu.cli.parsing import Commands, add_phase, command, count
from kvmmu.cli.sources import open_recording
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.terminal import printable, say
from kvmmu.traces import bundled, convert
from kvmmu.traces._files import check_output
from kvmmu.traces.parquet import COMPRESSIONS
from kvmmu.traces.recording import recording_files

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    conversion = command(commands, "convert", _convert, "write a recording as a Parquet trace",
                         "Write a recording as a Parquet trace that holds all it takes to replay it.",
                         "convert bundled l4.parquet", "convert RECORDING long.parquet --repeat 100 --compression zstd")
    conversion.add_argument("recording", metavar="RECORDING",
                            help="directory of a recording, or a trace file in it; 'bundled' is the bundled one")
    conversion.add_argument("out", metavar="OUT.parquet",
                            help="the file to write, new or a regular one to replace, but none of the recording's; it appears "
                                 "when it is complete")
    add_phase(conversion)
    conversion.add_argument("--repeat", type=count, default=1, metavar="N",
                            help="write the accesses N times, each time from the same registers and, in a dyn phase, memory")
    conversion.add_argument("--compression", choices=COMPRESSIONS, default="lz4",
                            help="lz4 (default) decodes two to three times as fast as zstd, which takes half the space")


def _convert(args: argparse.Namespace) -> int:
    check_output(args.out, recording_files(bundled() if args.recording == "bundled" else args.recording))
    recording = open_recording(args)
    with cleaning_up(), progress_bar(f"converting {recording.name} {recording.phase}") as progress:
        accesses = convert(recording, args.out, repeat=args.repeat, compression=args.compression, progress=progress)
    say(f"{printable(args.out)}: {accesses:,} accesses, {os.path.getsize(args.out):,} bytes")
    return OK
