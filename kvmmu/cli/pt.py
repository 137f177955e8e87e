"""kvmmu pt: print what page tables map."""

import argparse
import json
from collections.abc import Iterator

from kvmmu.arch.files import writing
from kvmmu.cli.image_target import add_target, image_of, space_of, target_files, target_vcpu
from kvmmu.cli.output import OK, check_outputs, cleaning_up
from kvmmu.cli.parsing import Commands, address, command
from kvmmu.replay.terminal import printable, say, write
from kvmmu.report.address_space import mapping_lines, plot_mappings, summary
from kvmmu.traces._arrow import pyarrow
from kvmmu.walk.mapped import Mappings

__all__ = ["add"]

_COLUMNS = ("gva", "gpa", "size", "rights", "level", "accessed", "dirty", "global_", "pkey", "pte_gpa")
_SIZES = {None: None, "4k": 1 << 12, "2m": 1 << 21, "4m": 1 << 22, "1g": 1 << 30}
_LINES = 4096                           # that are written at once


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    pt = command(commands, "pt", _pt, "print what page tables map",
                 "Print every range that the page tables of a memory image, a recording or a trace map: where it leads to, its "
                 "pages, rights (r w x u), accessed, dirty and global bits, protection key.",
                 "pt dump.elf", "pt dump.elf --vcpu 1 --wx", "pt ram.lime --cr3 0x1234000 --maps 0x7f000",
                 "pt dump.elf --user --json")
    add_target(pt)
    pt.add_argument("--wx", action="store_true", help="only what is writable and executable")
    pt.add_argument("--user", action="store_true", help="only what user mode may access")
    pt.add_argument("--size", choices=("4k", "2m", "4m", "1g"), help="only pages of this size")
    pt.add_argument("--maps", type=address, metavar="GPA", help="only what maps this guest-physical address")
    pt.add_argument("--start", type=address, default=0, metavar="GVA", help="from this linear address on")
    pt.add_argument("--stop", type=address, metavar="GVA", help="up to this linear address")
    pt.add_argument("--single", action="store_true", help="page by page: neighbours are not joined")
    form = pt.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    form.add_argument("--parquet", metavar="FILE", help="write a Parquet file (extra arrow)")
    pt.add_argument("--plot", metavar="FILE", help="save a picture of the address space (.png, .svg, .pdf; extra plot), and "
                                                   "print a summary alone")


def _pt(args: argparse.Namespace) -> int:
    check_outputs({"--parquet": args.parquet, "--plot": args.plot}, target_files(args))
    name, vcpu = target_vcpu(args, image_of(args))
    if args.stop is not None and args.stop < args.start:
        raise ValueError(f"--stop {args.stop:#x}: lies below --start {args.start:#x}")
    found = vcpu.gva_walk.mappings(args.start, args.stop, merge=not args.single)
    any_mapped = len(found) > 0
    if args.maps is not None:
        found = found.of_memory(args.maps, 1)
    only = True if args.wx else None
    found = found.where(writable=only, executable=only, user=True if args.user else None, size=_SIZES[args.size])
    if args.plot is not None:
        with cleaning_up():
            plot_mappings(found, args.plot, title=printable(f"{name}: {space_of(vcpu)}"))
    if args.json:
        rows = [dict(zip(_names(), row, strict=True)) for row in _rows(found)]
        regs = {name: getattr(vcpu.regs, name) for name in ("cr0", "cr3", "cr4", "efer")}
        say(json.dumps({"source": str(args.recording), "registers": regs, "mappings": rows}))
    elif args.csv:
        _write_lines([",".join(_names()), *(",".join(_csv(value) for value in row) for row in _rows(found))])
    elif args.parquet is not None:
        _write_parquet(found, args.parquet)
    elif args.plot is not None:
        say(f"{name}: {space_of(vcpu)}")
        say(f"{printable(args.plot)}: {summary(found)}")
    else:
        lines = list(mapping_lines(found, vcpu.gva_walk.cpu_role.level))
        if any_mapped and not len(found):
            lines = ["nothing that is mapped is of the kind that was asked for"]
        _write_lines([f"{name}: {space_of(vcpu)}", *lines])
    return OK


def _names() -> list[str]:
    return [column.rstrip("_") for column in _COLUMNS]


def _rows(found: Mappings) -> Iterator[tuple[object, ...]]:
    columns = found.to_dict()
    yield from zip(*(columns[name].tolist() for name in _COLUMNS), strict=True)


def _csv(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _write_lines(lines: list[str]) -> None:
    for start in range(0, len(lines), _LINES):
        write("\n".join(lines[start:start + _LINES]) + "\n")


def _write_parquet(found: Mappings, path: str) -> None:
    arrow, columns = pyarrow(), found.to_dict()
    table = arrow.table({name: columns[column] for name, column in zip(_names(), _COLUMNS, strict=True)})
    with cleaning_up(), writing(path) as part:
        arrow.parquet.write_table(table, part)
    say(f"{printable(path)}: {len(found):,} ranges")
