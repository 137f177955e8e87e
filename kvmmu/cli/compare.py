"""kvmmu compare: what a trace would cost under other MMUs."""

import argparse
import json
from itertools import product
from typing import Any

from kvmmu.cli.output import INTERRUPTED, OK, check_outputs, cleaning_up
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import WHAT, add_format, files_of, open_any, path_of, toml_files
from kvmmu.comparison.compare import compare
from kvmmu.comparison.comparison import Comparison
from kvmmu.comparison.cost import CostModel
from kvmmu.comparison.design import HOSTS, PAGE_POLICIES, Design
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.terminal import say
from kvmmu.tlb.hierarchy import TlbHierarchy
from kvmmu.traces import Recording

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    run = command(commands, "compare", _compare, "tell what a trace would cost under other MMU designs",
                  "Run one trace under every combination of hosts, pages and TLBs, and tell TLB hits, page walks, the references "
                  "that they take in both stages, and VM exits. Page tables are made for the addresses of the trace; --page own "
                  "walks those that it brings.",
                  "compare bundled-lackey --host ept,npt,shadow --page 4k,2m,thp --tlb skylake,zen3",
                  "compare bundled --page own --host ept,shadow --cost estimate --html compare.html",
                  "compare trace.csv --tlb my.toml,zen4 --json")
    run.add_argument("recording", nargs="?", metavar="TRACE", help=f"{WHAT}; default: the bundled recording")
    add_format(run)
    add_phase(run)
    run.add_argument("--host", default="ept", metavar="HOST,...", help=f"any of {', '.join(HOSTS)} (default: ept)")
    run.add_argument("--page", default="4k", metavar="PAGE,...", help=f"any of {', '.join(PAGE_POLICIES)} (default: 4k)")
    run.add_argument("--tlb", default="skylake", metavar="TLB,...", help="presets or TOML files (default: skylake); presets: "
                     + ", ".join(TlbHierarchy.presets()))
    run.add_argument("--cost", metavar="PRESET|FILE.toml", help="add cycles by a cost model; presets: "
                     + ", ".join(CostModel.presets()))
    run.add_argument("--scheduler", metavar="ADDRESS", help="compare in tasks, by Dask (extra dask): threads, processes, or the "
                     "address of a scheduler (docs/scale.md)")
    form = run.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print one line per design")
    run.add_argument("--parquet", metavar="FILE", help="write the designs as Parquet, too")
    run.add_argument("--html", metavar="FILE", help="write a page with tables and pictures, too")
    run.add_argument("--plot", metavar="FILE", help="write a figure, too: .png, .svg or .pdf")


def _compare(args: argparse.Namespace) -> int:
    tlbs: dict[str, Any] = {name: name for name in _some("tlb", args.tlb, None)}
    check_outputs({"--parquet": args.parquet, "--html": args.html, "--plot": args.plot},
                  [*files_of(path_of(args)), *toml_files(*tlbs, args.cost)])
    designs = _designs(_some("host", args.host, HOSTS), _some("page", args.page, PAGE_POLICIES), tlbs)
    source = open_any(args)
    title = source.name if isinstance(source, Recording) else source.header.name
    if args.scheduler is not None:
        for option, given in (("format", args.format), ("columns", args.columns), ("option", args.options)):
            if given:
                raise ValueError(f"--{option}: tasks elsewhere open the trace by its path alone; want none, or no --scheduler")
        found = compare(path_of(args), designs, cost=args.cost, phase=args.phase, scheduler=args.scheduler)
    else:
        with progress_bar(f"comparing {title or path_of(args).name}") as progress:
            found = compare(source, designs, cost=args.cost, progress=progress)
    with cleaning_up():
        _write(found, args)
    if args.json:
        say(json.dumps(found.to_dict()))
    elif args.csv:
        say(found.to_csv().removesuffix("\n"))
    else:
        say(found.table().rstrip())
    return OK if found.complete else INTERRUPTED


def _some(name: str, text: str, allowed: tuple[str, ...] | None) -> list[str]:
    """Return the names of a list with commas, each once."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ValueError(f"--{name}: is empty; want names with commas between them")
    for one in names:
        if allowed is not None and one not in allowed:
            raise ValueError(f"--{name}: {one!r} is none of {', '.join(allowed)}")
    return names


def _designs(hosts: list[str], pages: list[str], tlbs: dict[str, Any]) -> list[Design]:
    """Return a design for each combination; those of one TLB share its hierarchy."""
    shared: dict[str, Design] = {}
    designs = []
    for page, name, host in product(pages, tlbs, hosts):
        if page == "own" and host.startswith("nested"):
            raise ValueError(f"--page own: the tables of a trace are not those of a guest under {host}; want another of them")
        first = shared.setdefault(name, Design(host=host, page=page, tlb=tlbs[name]))
        label = f"{host} {page} {first.tlb_name}"
        designs.append(Design(label, host=host, page=page, tlb=first.hierarchy, tlb_name=first.tlb_name))
    return designs


def _write(found: Comparison, args: argparse.Namespace) -> None:
    if args.parquet is not None:
        found.to_parquet(args.parquet)
    if args.html is not None:
        found.to_html(args.html, command=args.command_line)
    if args.plot is not None:
        found.plot(args.plot)
