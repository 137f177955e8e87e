"""Functions that open the recording or trace that a subcommand names."""

import argparse
from pathlib import Path
from typing import Any

from kvmmu.cli.format_options import option_of, options_of
from kvmmu.traces import ParquetTrace, Recording, Trace, bundled, is_parquet
from kvmmu.traces._files import BUNDLED
from kvmmu.traces.opening import find_format, formats
from kvmmu.traces.recording import recording_files
from kvmmu.traces.source import is_recording, open_source

__all__ = ["WHAT", "add_format", "files_of", "format_options", "open_any", "open_with_tables", "path_of",
           "toml_files"]

WHAT = ("directory of a recording, a trace file in it, or a trace of any format (docs/formats.md), compressed or not; 'bundled' "
        "is the bundled recording, 'bundled-lackey' the bundled trace of a program")


def add_format(command: argparse.ArgumentParser) -> None:
    """Add the options that say how a trace is to be read."""
    command.add_argument("--format", metavar="F", help="format of the trace (default: told by its first bytes)")
    command.add_argument("--columns", metavar="NAME=COLUMN,...",
                         help="of CSV, Parquet and numpy: which columns are addr, op, size, ip, vcpu, gpa, access; for example "
                              "addr=va,op=type")
    command.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], dest="options",
                         help="an option of the format (docs/formats.md), for example base=16 of CSV, or fetch=no of lackey; may "
                              "be given more than once")


def path_of(args: argparse.Namespace) -> Path:
    """The path that the argument names."""
    name = "bundled" if args.recording is None else args.recording
    if name in BUNDLED and not Path(name).exists():
        return bundled(BUNDLED[name])
    if not name:
        raise ValueError("the name of the recording or trace is empty")
    return Path(name)


def files_of(path: Path) -> list[Path]:
    """The files behind a path, which may be a recording."""
    if is_recording(path):
        return recording_files(path)
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] if path.exists() else []


def toml_files(*names: str | None) -> list[Path]:
    """Return the files among the names of presets and TOML files."""
    return [Path(name) for name in names if name is not None and name.endswith(".toml")]


def format_options(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The options of `open_trace()` that the arguments give; those that do not go with the file are refused."""
    format, columns, given = getattr(args, "format", None), getattr(args, "columns", None), getattr(args, "options", [])
    if format is not None and format not in formats():
        raise ValueError(f"--format {format}: there is no such format; allowed is {', '.join(sorted(formats()))}")
    if (columns is None and not given) or not path.exists():        # a path of nothing is refused by who opens it
        return {"format": format}
    if format is None and is_recording(path):
        what = "--columns" if columns is not None else f"--option {given[0]}"
        raise ValueError(f"{what}: {path} is a recording, whose columns are known")
    found = find_format(path, format)
    if columns is not None and "columns" not in options_of(found):
        raise ValueError(f"--columns: {path} has the format {found.name}, whose columns have no names; allowed with "
                         "csv, parquet and numpy")
    options = {} if columns is None else {"columns": columns}
    return {"format": format} | options | dict(option_of(text, found) for text in given)


def open_any(args: argparse.Namespace) -> Recording | Trace:
    """Open what the arguments name."""
    path = path_of(args)
    phase = getattr(args, "phase", None)
    if phase is not None and not is_recording(path) and (path.is_file() or is_parquet(path)):
        raise ValueError(f"--phase {phase}: a trace has one phase")
    return open_source(path, phase=phase, **format_options(args, path))


def open_with_tables(args: argparse.Namespace) -> Recording | ParquetTrace:
    """Open a recording or a trace that brings page tables."""
    source = open_any(args)
    if not isinstance(source, (Recording, ParquetTrace)) or isinstance(source, ParquetTrace) and not source.header.registers:
        raise ValueError(f"{path_of(args)}: a trace without page tables, so there is nothing to walk; kvmmu replay makes tables "
                         "for it")
    return source
