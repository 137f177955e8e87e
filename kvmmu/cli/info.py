"""kvmmu info: say what a file is and what is in it."""

import argparse
import json
from typing import Any

from kvmmu.cli.image_info import print_image
from kvmmu.cli.image_target import image_hint, image_of
from kvmmu.cli.output import BAD, OK
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import WHAT, add_format, format_options, path_of
from kvmmu.cli.synthetic import size_text
from kvmmu.images import Image, ImageError, image_formats, is_image
from kvmmu.images.raw import why_not_raw
from kvmmu.replay.terminal import printable, say, warn
from kvmmu.report.tables import Table, show_tables
from kvmmu.traces.opening import UnknownFormatError
from kvmmu.traces.source import describe_source

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    info = command(commands, "info", _info, "say what a trace or a memory image is, and what is in it",
                   "Say what a file is: of a trace the format, and how many accesses and pages it has; of a memory image the "
                   "format, the memory and the vCPUs in it. A trace is read to its end; exit status 2 if it is damaged, behind "
                   "what was read until then.",
                   "info bundled", "info dump.elf", "info bundled-lackey --json", "info trace.csv --columns addr=va,op=type")
    info.add_argument("recording", metavar="FILE", help=WHAT)
    add_format(info)
    add_phase(info)
    info.add_argument("--json", action="store_true", help="print one JSON object")


def _info(args: argparse.Namespace) -> int:
    path = path_of(args)
    image = _image(args)
    if image is not None:
        if args.columns is not None:
            raise ValueError(f"--columns {args.columns}: an image has no columns")
        print_image(image, args.json)
        return OK
    try:
        found = describe_source(path, phase=args.phase, **format_options(args, path))
    except UnknownFormatError as error:
        if image_hint(error) or path.is_dir():
            raise
        names = ", ".join(sorted(image_formats()))
        raise ValueError(f"{error}. Formats of memory images: {names}; {why_not_raw(path)}") from error
    if args.json:
        say(json.dumps(found))
    elif found["damage"] is None or found["accesses"] or found["events"] or found["skipped"]:   # a table of zeros tells nothing
        show_tables(_tables(found))
    if found["damage"] is not None:
        warn(f"kvmmu: {found['damage']}")
        return BAD
    return OK


def _image(args: argparse.Namespace) -> Image | None:
    """Open a file if it is a memory image; a file of no format that is known is left to the readers of traces."""
    if args.format is not None and args.format not in image_formats():
        return None
    try:
        return image_of(args)
    except ImageError:
        if args.format is None and not is_image(args.recording):
            return None
        raise


def _tables(found: dict[str, Any]) -> list[Table]:
    rows: list[tuple[str, ...]] = [("format", found["format"]), ("size of the file", size_text(found["bytes"]))]
    if found["compression"] != "none":
        rows.append(("compression", found["compression"]))
    if found["kind"] == "recording":
        rows += [("phase", f"{found['phase']} (there is {', '.join(found['phases'])})"), ("paging mode", found["mode"])]
    rows += [("accesses", f"{found['accesses']:,}")]
    rows += [(f"  {kind}", f"{number:,}") for kind, number in found["kinds"].items()]
    rows += [("events", f"{found['events']:,}"), ("pages touched, of 4K", f"{found['pages_touched']:,}"),
             ("processors or threads", f"{found['vcpus']:,}")]
    if found["lowest"] is not None:
        rows.append(("addresses", f"{found['lowest']:#x} to {found['highest']:#x}"))
    rows.append(("rows also tell", ", ".join(name for name, there in found["brings"].items() if there) or "nothing"))
    rows += [(f"passed over: {printable(kind)}", f"{number:,}") for kind, number in found["skipped"].items()]
    if found["damage"] is not None:
        rows.append(("damaged", "yes"))
    return [(printable(found["path"]), ("", ""), rows)]
