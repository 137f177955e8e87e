"""kvmmu convert: write a trace as a Parquet trace."""

import argparse
import json
import os
from pathlib import Path

from kvmmu.cli.output import OK, check_outputs, cleaning_up
from kvmmu.cli.parsing import Commands, add_phase, command, count
from kvmmu.cli.sources import WHAT, add_format, files_of, open_any, path_of
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.terminal import printable, say
from kvmmu.traces import Recording, convert
from kvmmu.traces.parquet import COMPRESSIONS, LAYOUTS

__all__ = ["add"]

_OTHER_FORMATS = (".csv", ".tsv", ".json", ".txt", ".npz", ".npy")


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    conversion = command(commands, "convert", _convert, "write a recording or a trace of any format as a Parquet trace",
                         "Write a recording, or a trace of any format that can be read, as a Parquet trace. That of a recording "
                         "holds all it takes to replay it.",
                         "convert bundled l4.parquet", "convert RECORDING long.parquet --repeat 100 --compression zstd",
                         "convert sort.lackey.xz sort.parquet")
    conversion.add_argument("recording", metavar="TRACE", help=WHAT)
    conversion.add_argument("out", metavar="OUT.parquet",
                            help="the file to write, new or a regular one to replace, but none of those that are read; it "
                                 "appears when it is complete")
    add_format(conversion)
    add_phase(conversion)
    conversion.add_argument("--repeat", type=count, default=1, metavar="N",
                            help="of a recording: write the accesses N times, each time from the same registers and, in a dyn "
                                 "phase, memory")
    conversion.add_argument("--layout", choices=LAYOUTS, default="places",
                            help="places: replayed faster; plain: the columns op, addr, access and gpa, for other tools; "
                                 "default: places")
    conversion.add_argument("--compression", choices=COMPRESSIONS, default="lz4",
                            help="lz4 (default) decodes two to three times as fast as zstd, which takes two thirds of the space")
    conversion.add_argument("--json", action="store_true", help="print one JSON object")


def _convert(args: argparse.Namespace) -> int:
    check_outputs({"OUT.parquet": args.out}, files_of(path_of(args)))
    if Path(args.out).suffix.lower() in _OTHER_FORMATS:
        raise ValueError(f"{args.out}: what is written is a Parquet trace; give it a name that ends in .parquet")
    source = open_any(args)
    if args.repeat != 1 and not isinstance(source, Recording):
        raise ValueError(f"--repeat {args.repeat}: only the accesses of a recording are repeated")
    titled = source if isinstance(source, Recording) else source.header
    name = " ".join(filter(None, (titled.name, titled.phase)))
    with cleaning_up(), progress_bar(f"converting {name}") as progress:
        accesses = convert(source, args.out, repeat=args.repeat, compression=args.compression, layout=args.layout,
                           progress=progress)
    size = os.path.getsize(args.out)
    if args.json:
        say(json.dumps({"path": args.out, "accesses": accesses, "bytes": size}))
    else:
        say(f"{printable(args.out)}: {accesses:,} accesses, {size:,} bytes")
    return OK
