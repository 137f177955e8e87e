"""kvmmu info: say what a file is and what is in it."""

import argparse
import json
from pathlib import Path
from typing import Any

from kvmmu.cli.image_info import print_image
from kvmmu.cli.image_target import is_known
from kvmmu.cli.output import BAD, OK
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import WHAT, add_format, format_options, path_of
from kvmmu.cli.synthetic import size_text
from kvmmu.images import Image, ImageError, image_formats, is_image, open_image
from kvmmu.replay.terminal import printable, say, warn
from kvmmu.report.tables import Table, show_tables
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
    image = _image(path, args.format)
    if image is not None:
        if args.phase is not None:
            raise ValueError(f"--phase {args.phase}: an image has no phases")
        if args.columns is not None:
            raise ValueError(f"--columns {args.columns}: an image has no columns")
        for damage in image.damage:
            warn(f"kvmmu: {path}: {damage}")
        print_image(image, args.json)
        return OK
    found = describe_source(path, phase=args.phase, **format_options(args, path))
    if args.json:
        say(json.dumps(found))
    else:
        show_tables(_tables(found))
    if found["damage"] is not None:
        warn(f"kvmmu: {found['damage']}")
        return BAD
    return OK


def _image(path: Path, format: str | None) -> Image | None:
    """Open a file if it is a memory image: by its format or content, or raw memory as long as it is nothing else."""
    if format in image_formats() or format is None and path.is_file() and is_image(path):
        return open_image(path, format)
    if format is not None or not path.is_file() or is_known(path):
        return None
    try:
        return open_image(path)
    except ImageError:
        return None                                     # neither, which the readers of traces say


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
