"""kvmmu spt: print the host's page tables of a recorded guest."""

import argparse
import json

from kvmmu.cli.output import OK
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import open_with_tables
from kvmmu.replay.recorded_machine import touched_machine
from kvmmu.replay.terminal import say
from kvmmu.report.spte_tree import spte_runs, spte_text

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    spt = command(commands, "spt", _spt, "print the host's page tables of a recorded guest",
                  "Touch every page that a recording or trace touches, on a machine under two-dimensional paging whose guest "
                  "tables are those of the start, and print the tree of SPTEs that its host built.",
                  "spt bundled", "spt RECORDING --tdp npt --backing 1g", "spt l4.parquet --json")
    spt.add_argument("recording", metavar="RECORDING", help="as for replay; 'bundled' is the bundled one")
    add_phase(spt)
    spt.add_argument("--tdp", choices=("ept", "npt"), default="ept", help="kind of two-dimensional paging (default: ept)")
    spt.add_argument("--backing", choices=("4k", "2m", "1g"), default="2m", help="pages of the host (default: 2m)")
    spt.add_argument("--nx-huge-pages", action="store_true", help="with the mitigation: no huge page is executable")
    spt.add_argument("--json", action="store_true", help="print one JSON object")


def _spt(args: argparse.Namespace) -> int:
    vm = touched_machine(open_with_tables(args), tdp=args.tdp, backing=args.backing, nx_huge_pages=args.nx_huge_pages)
    if args.json:
        say(json.dumps({"stats": vm.stats, "sptes": [run.__dict__ for run in spte_runs(vm)]}))
    else:
        say(spte_text(vm))
        say("  ".join(f"{name} {count}" for name, count in vm.stats.items() if count))
    return OK
