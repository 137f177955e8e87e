"""The kvmmu command: its parser, and the exit status of what goes wrong."""

import argparse
import gc
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import kvmmu
from kvmmu.cli import compare, convert, diff, info, pt, read, replay, scenario, spt, walk
from kvmmu.cli.added_formats import raised_by_format
from kvmmu.cli.image_target import image_hint
from kvmmu.cli.output import BAD, BUG, INTERRUPTED, OK, Deadly, drop_output, flush
from kvmmu.cli.parsing import Parser, epilog
from kvmmu.replay.terminal import StreamError, warn
from kvmmu.traces.opening import UnknownFormatError

__all__ = ["main"]

_COMMANDS = (replay, compare, convert, info, pt, walk, read, diff, spt, scenario)       # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    That is 0, 1 on a mismatch, 2 on bad arguments, input or output, 3 on a bug, 130 on Ctrl-C. Help, and arguments that argparse
    refuses, leave by SystemExit with 0 or 2.
    """
    deadly = 0
    try:
        return _run(argv)
    except KeyboardInterrupt as stop:
        warn(f"kvmmu: {stop}" if str(stop) else "kvmmu: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()                                  # the reader of stdout closed it, which is no mismatch
        return OK
    except StreamError as error:
        drop_output()
        warn(f"kvmmu: {error}")
    except Deadly as stop:
        deadly = stop.number
    except MemoryError as error:
        warn(f"kvmmu: out of memory{f': {error}' if str(error) else ''}")
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        warn(f"kvmmu: {os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {error.strerror}"
             if named else f"kvmmu: {error}")
    except UnknownFormatError as error:
        warn(f"kvmmu: {image_hint(error) or error}")
    except (ImportError, kvmmu.GuestFault) as error:
        warn(f"kvmmu: {error}")
    except Exception as error:  # exit status 1 would say that there is a mismatch
        if not isinstance(error, ValueError) and not raised_by_format(error):
            warn("kvmmu: a bug; please report it with what follows")
            traceback.print_exc()
            return BUG
        warn(f"kvmmu: {raised_by_format(error) or error}")
    if deadly:
        gc.collect()                                    # temporary files go with what the exception held, which is gone now
        os.kill(os.getpid(), deadly)                    # as if nobody had caught it
        return 128 + deadly
    return BAD


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit:
        flush()
        raise
    if sys.stdout is None:
        raise StreamError("standard output is closed: there is nowhere to print to")
    args.command_line = shlex.join(["kvmmu", *(sys.argv[1:] if argv is None else argv)])
    status = int(args.run(args))
    flush()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kvmmu", description="Replay and inspect page walks of memory traces and recorded x86 guests.",
                     epilog=epilog("replay", "replay bundled-lackey --page thp --pager", "info bundled-lackey",
                                   "walk bundled 0x401000", "spt bundled --backing 4k", "convert bundled l4.parquet",
                                   "replay --help"),
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"kvmmu {kvmmu.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
