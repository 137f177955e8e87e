"""kvmmu replay: walk every access of a trace; check physical addresses, or make the page tables that it lacks."""

import argparse
import json
from typing import Any

from kvmmu.cli.image_target import add_registers, image_files, image_vcpu
from kvmmu.cli.output import MISMATCH, OK, Deadly, check_outputs, flush, stopping
from kvmmu.cli.parsing import Commands, add_phase, command
from kvmmu.cli.sources import WHAT, add_format, files_of, open_any, path_of, toml_files
from kvmmu.cli.synthetic import synthetic_tables
from kvmmu.images import open_image
from kvmmu.mmu.host import Host
from kvmmu.replay.machine_replay import MachineReport
from kvmmu.replay.machine_start import TDP_OF
from kvmmu.replay.progress import progress_bar
from kvmmu.replay.replay import replay
from kvmmu.replay.result import ReplayInterrupted, Report, SyntheticReport
from kvmmu.replay.terminal import printable, say, warn
from kvmmu.report.machine import machine_tables
from kvmmu.report.tables import replay_tables, show_tables
from kvmmu.report.tlb import tlb_tables
from kvmmu.tables.pager import Pager
from kvmmu.tlb.hierarchy import TlbHierarchy
from kvmmu.traces import Recording, TraceError
from kvmmu.vm.vcpu import Vcpu, Vm

__all__ = ["add"]

_OF_IMAGES = ("image_format", "vcpu", "cr0", "cr3", "cr4", "efer", "pkru", "pkrs")


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    run = command(commands, "replay", _replay, "walk every access of a trace, on its own page tables or on some made for it",
                  "Walk every access of a recording or trace. Where it brings page tables, hold each access against the recorded "
                  "physical address; exit status 1 on a mismatch. Where it brings none, as the traces of other tools, make "
                  "tables for it and tell footprint, faults, page sizes and references; or walk it on the tables of a memory "
                  "image. Ctrl-C and SIGTERM report what was done so far.",
                  "replay", "replay RECORDING --phase dyn", "replay l4.parquet --json", "replay sort.lackey.xz",
                  "replay sort.lackey.xz --page thp --pager", "replay bundled --tlb skylake",
                  "replay trace.csv --columns addr=va,op=type --page 2m --frames random",
                  "replay boot.qtrace --image dump.elf",
                  "replay sort.lackey.xz --tlb zen3 --checkpoint sort.state")
    run.add_argument("recording", nargs="?", metavar="TRACE", help=f"{WHAT}; default: the bundled recording")
    add_format(run)
    tables = run.add_argument_group("page tables for a trace that brings none")
    tables.add_argument("--mode", choices=("32", "pae", "4l", "5l"), help="paging mode (default: 4l)")
    tables.add_argument("--page", choices=("4k", "2m", "1g", "thp"),
                        help="pages (default: 4k; in mode 32 large ones are 4M); thp: 2M where half of the 4K pages are touched")
    tables.add_argument("--frames", choices=("linear", "random"), help="order of the frames that pages get (default: linear)")
    tables.add_argument("--pager", action="store_true", help="demand paging: map pages as they are touched, and count the faults")
    run.add_argument("--tlb", metavar="PRESET|FILE.toml", help="let the accesses go through a TLB hierarchy (docs/tlb.md); "
                     f"presets: {', '.join(TlbHierarchy.presets())}")
    image = run.add_argument_group("page tables of a memory image, for a trace that brings none")
    image.add_argument("--image", metavar="FILE", help="memory as it was when the trace began; its page tables are walked, and "
                                                       "stores and register loads that the trace tells are carried out")
    image.add_argument("--image-format", metavar="F", help="format of the image (default: told by its content)")
    add_registers(run, image)
    run.add_argument("--machine", choices=("ept", "npt", "shadow"), help="run a trace with page tables, or on those of an "
                     "image, on a whole machine with this host, and tell exits and what the host builds")
    run.add_argument("--backing", choices=("4k", "2m", "1g"), help="with --machine: pages of the host (default: 2m)")
    keep = run.add_argument_group("a long replay")
    keep.add_argument("--checkpoint", metavar="FILE", help="write the state to a file every so often, and at Ctrl-C or SIGTERM")
    keep.add_argument("--checkpoint-every", type=float, metavar="SECONDS", help="how often (default: 60)")
    keep.add_argument("--resume", metavar="FILE", help="go on from a checkpoint of the same trace and options")
    run.add_argument("--scheduler", metavar="ADDRESS", help="replay a Parquet trace of accesses alone in parts, by Dask "
                     "(extra dask): threads, processes, or the address of a scheduler (docs/scale.md)")
    add_phase(run)
    run.add_argument("--json", action="store_true", help="print one JSON object")


def _replay(args: argparse.Namespace) -> int:
    if args.checkpoint_every is not None and args.checkpoint is None:
        raise ValueError(f"--checkpoint-every {args.checkpoint_every:g}: no checkpoints are written; allowed with --checkpoint "
                         "FILE")
    every = 60.0 if args.checkpoint_every is None else args.checkpoint_every
    check_outputs({"--checkpoint": args.checkpoint},        # which may be that of --resume
                  [*files_of(path_of(args)), *image_files(args.image or ""), *toml_files(args.tlb)])
    source = open_any(args)
    if args.image is not None and isinstance(source, Recording):
        raise ValueError(f"--image {args.image}: {path_of(args)} is a recording, which brings its own memory; "
                         "allowed with traces")
    has_tables = isinstance(source, Recording) or bool(source.header.registers)
    _check_combination(args, has_tables)
    order = _order(args, has_tables)
    titled = source if isinstance(source, Recording) else source.header
    with stopping() as ended_by:
        try:
            with progress_bar(f"replaying {' '.join(filter(None, (titled.name, titled.phase)))}",
                              args.resume is not None) as progress:
                report = replay(source, progress=_progress(progress, args), tlb=args.tlb, checkpoint=args.checkpoint,
                                checkpoint_every=every, resume=args.resume, scheduler=args.scheduler, **order,
                                **_machine(args))
        except (ReplayInterrupted, TraceError) as stop:
            if stop.report is not None and stop.report.accesses:
                _show(stop.report, args.json, path_of(args).name)
            if ended_by:
                warn(f"kvmmu: {stop}")
                flush()
                raise Deadly(ended_by[0]) from None
            raise
    if isinstance(report, SyntheticReport) and not report.accesses and report.skipped:
        passed_over = ", ".join(f"{count:,} {kind}" for kind, count in report.skipped.items())
        raise TraceError(f"{path_of(args)}: has no accesses in the format {report.source}; passed over: {passed_over}")
    _show(report, args.json, path_of(args).name)
    return MISMATCH if report.mismatches else OK


def _check_combination(args: argparse.Namespace, has_tables: bool) -> None:
    """Refuse options that do not go together, by their names on the command line."""
    of_tables = [f"--{name}" for name in ("mode", "page", "frames", "pager") if getattr(args, name)]
    kept = [f"--{name}" for name in ("checkpoint", "resume") if getattr(args, name) is not None]
    if args.machine is None:
        if kept and args.image is not None:
            raise ValueError(f"{kept[0]}: the memory of an image is not kept in a file; allowed without --image")
        return
    if of_tables and args.image is None:
        raise ValueError(f"{', '.join(of_tables)}: a machine runs on the page tables that there are; allowed without --machine")
    if not has_tables and args.image is None:
        raise ValueError(f"--machine {args.machine}: {path_of(args)} brings no registers and page tables; want --image FILE, "
                         "too, or no --machine; kvmmu compare runs such a trace under several hosts")
    if kept:
        raise ValueError(f"{kept[0]}: the state of a whole machine is not kept in a file; allowed without --machine")
    if args.scheduler is not None:
        raise ValueError(f"--scheduler {args.scheduler}: a machine runs in one process; allowed without --machine")


def _progress(progress: Any, args: argparse.Namespace) -> Any:
    """The bar to show, if there is one; work elsewhere has none."""
    return progress if progress and args.scheduler is None else False


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine that the arguments ask for, as `replay()` takes it."""
    if args.machine is None:
        if args.backing is not None:
            raise ValueError("--backing: is of a machine; want --machine, too")
        return {}
    return {"mode": "machine"} | ({} if args.image is not None else {"host": args.machine, "backing": args.backing})


def _order(args: argparse.Namespace, has_tables: bool) -> dict[str, Any]:
    """The tables that the arguments ask for, or the vCPU whose tables they are, as `replay()` takes them."""
    given = [f"--{name}" for name in ("mode", "page", "frames", "pager") if getattr(args, name)]
    if args.image is not None:
        if given:
            raise ValueError(f"{', '.join(given)}: page tables are those of --image {args.image}; allowed without --image")
        vcpu = _vcpu_of_image(args)
        return {"vm": vcpu if args.machine is None else _machine_of(vcpu, args)}
    for name in _OF_IMAGES:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: is about a memory image; allowed with --image FILE")
    if has_tables and given:
        raise ValueError(f"{', '.join(given)}: {path_of(args)} brings page tables of its own; allowed are traces that bring none")
    if not args.pager:
        return {"paging": args.mode, "page": args.page, "frames": args.frames}
    return {"pager": Pager(args.page or "4k", args.frames or "linear", mode=args.mode or "4l")}


def _machine_of(vcpu: Vcpu, args: argparse.Namespace) -> Vm:
    """The machine that the arguments ask for, with the memory and the registers of a vCPU."""
    vm = Vm(vcpu.mem, vcpu.cpu, Host(tdp=TDP_OF[args.machine]), backing=args.backing or "2m")
    vm.create_vcpu().set_regs(vcpu.regs)
    return vm


def _vcpu_of_image(args: argparse.Namespace) -> Vcpu:
    """The vCPU of the image that the arguments name. Damage is told on standard error."""
    image = open_image(args.image, args.image_format)
    for damage in image.damage:
        warn(f"kvmmu: {args.image}: {damage}")
    return image_vcpu(args, image)[1]


def _show(report: Report, as_json: bool, file: str) -> None:
    """Print a report. IN file: name of the file, which may be a conversion of what the report names."""
    if as_json:
        say(json.dumps(report.to_dict()))
        return
    tables = synthetic_tables(report) if isinstance(report, SyntheticReport) else replay_tables(report)
    if file != report.name and file.endswith(".parquet"):
        tables[0] = (f"{printable(file)}: {tables[0][0]}", *tables[0][1:])
    if isinstance(report, MachineReport):
        tables += machine_tables(report)
    show_tables(tables if report.tlb is None else tables + tlb_tables(report.tlb))
    for example in report.examples:
        say(f"MISMATCH {example}")
    if report.mismatches > len(report.examples):
        say(f"... and {report.mismatches - len(report.examples):,} more")
