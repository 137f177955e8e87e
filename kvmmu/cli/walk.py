"""kvmmu walk: print walks level by level."""

import argparse
import json
import time

import numpy as np

from kvmmu.arch._bits import Access, Status
from kvmmu.arch.faults import error_code_text
from kvmmu.cli.image_target import add_image_options, image_of, image_vcpu, source_vcpu, target_files
from kvmmu.cli.output import MISMATCH, OK, check_outputs, cleaning_up
from kvmmu.cli.parsing import Commands, access_of, add_phase, address, command
from kvmmu.cli.sources import open_with_tables
from kvmmu.replay.terminal import say
from kvmmu.report.figure import plot_walk
from kvmmu.traces import Recording

__all__ = ["add"]

_PAGE = 0xFFF


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    walk = command(commands, "walk", _walk, "print walks level by level",
                   "Walk linear addresses through the page tables of a recording or trace, as they are at the start of the "
                   "phase or trace, or of a memory image. Exit status 1 if a walk contradicts an address that the recording "
                   "has; a trace is not searched for addresses.",
                   "walk bundled 0x401000", "walk RECORDING 0xffffffff81000000 --access x --ctx 3",
                   "walk bundled 0x401000 --plot walk.png", "walk l4.parquet 0x401000 --json")
    walk.add_argument("recording", metavar="IMAGE", help="memory image, or a recording or trace that has page tables; 'bundled' "
                                                         "is the bundled recording")
    walk.add_argument("gva", nargs="+", type=address, metavar="GVA", help="linear address, hexadecimal with 0x")
    add_phase(walk)
    add_image_options(walk)
    walk.add_argument("--ctx", type=int, metavar="N",
                      help="row of the register contexts of the recording (default: 0) or of the trace's header (default: the "
                           "registers at the start)")
    walk.add_argument("--access", type=access_of, default=Access.AC, metavar="LETTERS",
                      help="r read, w write, x fetch; u user; a EFLAGS.AC set; i implicit (default: ra)")
    walk.add_argument("--json", action="store_true", help="print one JSON object")
    walk.add_argument("--plot", metavar="FILE", help="save a figure of the walk of a single GVA (.png, .svg, .pdf)")


def _walk(args: argparse.Namespace) -> int:
    if args.plot is not None and len(args.gva) > 1:
        raise ValueError(f"--plot: a figure shows one walk, got {len(args.gva)} addresses")
    check_outputs({"--plot": args.plot}, target_files(args))
    image, source = image_of(args), None
    if image is None:
        source = open_with_tables(args)
        vcpu, ctx = source_vcpu(args, source, args.ctx)
    elif args.ctx is not None:
        raise ValueError(f"--ctx {args.ctx}: a memory image has no contexts; --vcpu chooses its registers")
    else:
        vcpu, ctx = image_vcpu(args, image)[1], -1
    started = time.perf_counter()
    records = [vcpu.gva_walk.walk_record(gva, args.access) for gva in args.gva]
    seconds = time.perf_counter() - started
    if args.plot is not None:
        with cleaning_up():
            plot_walk(records[0], args.plot)
    recorded = [_recorded_gpas(source, ctx, record.gva) if isinstance(source, Recording) else [] for record in records]
    verified = [record.gpa in gpas for record, gpas in zip(records, recorded, strict=True)]
    # the tables of a dyn phase move on: an address recorded later proves nothing about its start
    is_static = isinstance(source, Recording) and source.phase == "static"
    wrong = [is_static and bool(gpas) and record.status == Status.OK and not right
             for record, gpas, right in zip(records, recorded, verified, strict=True)]
    if args.json:
        faults: dict[str, int] = {}
        for record in records:
            if record.status:
                kind = error_code_text(record.error_code) if record.status == Status.PAGE_FAULT else Status(record.status).name
                faults[kind] = faults.get(kind, 0) + 1
        walks = [record.to_dict() | {"recorded_gpa": list(gpas)}
                 for record, gpas in zip(records, recorded, strict=True)]
        say(json.dumps({"accesses": len(records), "verified": sum(verified), "faults": faults, "mismatches": sum(wrong),
                        "seconds": seconds, "walks": walks}))
    else:
        for record, gpas, right in zip(records, recorded, verified, strict=True):
            say(str(record))
            if gpas:
                later = "" if is_static or record.status else " - later in the phase, when the tables had changed"
                say(f"  recorded: gpa {' then '.join(hex(gpa) for gpa in gpas)}{' - as walked' if right else later}")
    return MISMATCH if any(wrong) else OK


def _recorded_gpas(recording: Recording, ctx: int, gva: int) -> list[int]:
    """Physical addresses that the trace recorded for a linear address in this context, in order of first use."""
    rows = (recording.pages_gva == np.uint64(gva & ~_PAGE)) & (recording.pages_ctx == ctx)
    return [gpa + (gva & _PAGE) for gpa in recording.pages_gpa[rows].tolist()]
