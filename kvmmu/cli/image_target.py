"""The address space that a subcommand looks at: of a memory image, a recording or a trace that has page tables."""

import argparse
from pathlib import Path
from typing import Any

import kvmmu
from kvmmu.arch.faults import rule_text
from kvmmu.arch.files import no_such
from kvmmu.cli.parsing import add_phase, address
from kvmmu.cli.sources import files_of, open_with_tables, path_of
from kvmmu.images import Image, image_formats, is_image, open_image
from kvmmu.replay.recorded_machine import trace_start
from kvmmu.replay.register_events import use_context
from kvmmu.replay.terminal import warn
from kvmmu.replay.trace_replay import recording_vcpu
from kvmmu.traces import ParquetTrace, Recording, TraceError
from kvmmu.traces.opening import UnknownFormatError, find_format
from kvmmu.traces.source import is_recording
from kvmmu.vm.vcpu import Vcpu

__all__ = ["add_image_options", "add_registers", "add_target", "image_files", "image_hint", "image_of", "image_vcpu",
           "source_vcpu", "space_of", "target_files", "target_vcpu"]

_REGISTERS = ("cr0", "cr3", "cr4", "efer", "pkru", "pkrs")
_VMWARE = (".vmem", ".vmss", ".vmsn")      # files of an image that lie beside each other
_MODES = {2: "32-bit", 3: "PAE", 4: "4-level", 5: "5-level"}


def add_target(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to look at."""
    command.add_argument("recording", metavar="IMAGE", help="memory image, or a recording or trace that has page tables, as for "
                                                            "replay; 'bundled' is the bundled recording")
    add_phase(command)
    add_image_options(command)


def add_image_options(command: argparse.ArgumentParser) -> None:
    """Add the options of images."""
    group = command.add_argument_group("of memory images")
    group.add_argument("--format", metavar="F", help="format of the image (default: told by its content)")
    add_registers(command, group)


def add_registers(command: argparse.ArgumentParser, group: Any) -> None:
    """Add the options that say which registers an image is looked at with. IN group: of arguments, takes --vcpu."""
    group.add_argument("--vcpu", type=int, metavar="N", help="whose registers (default: 0)")
    others = command.add_argument_group("registers")
    for name in _REGISTERS:
        others.add_argument(f"--{name}", type=address, metavar="X", help=f"{name.upper()} in the place of the vCPU's")


def image_of(args: argparse.Namespace) -> Image | None:
    """Open what the arguments name if it is an image; None for a recording or a trace. Damage is told on standard error."""
    path = args.recording
    if not Path(path).is_file():                        # others say what it is
        there = path_of(args)
        if not there.exists() and not is_recording(there):
            raise no_such(path, "recording, trace or memory image")
        return None
    if args.format is None and not is_image(path) and _is_trace(path):
        return None
    image = open_image(path, args.format)
    if args.phase is not None:
        raise ValueError(f"--phase {args.phase}: an image has no phases")
    for damage in image.damage:
        warn(f"kvmmu: {path}: {damage}")
    return image


def image_files(path: str | Path) -> list[Path]:
    """Return the files that an image may be read from."""
    path = Path(path)
    return [path.with_suffix(suffix) for suffix in _VMWARE] if path.suffix in _VMWARE else [path]


def target_files(args: argparse.Namespace) -> list[Path]:
    """Return the files that what the arguments name may be read from."""
    path = path_of(args)
    return [*files_of(path), *image_files(path)]


def _is_trace(path: str) -> bool:
    """True if a file is a trace of a format that is known, or belongs to a recording."""
    if is_recording(path):
        return True
    try:
        find_format(path)
    except TraceError:
        return False
    return True


def image_hint(error: UnknownFormatError) -> str:
    """Return what to do with a file that is no trace but a memory image, compressed or not; else an empty string."""
    scores = {name: format.sniff(error.head, error.path) for name, format in image_formats().items() if name != "raw"}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        return ""
    if is_image(error.path):
        return (f"{error.path}: is a memory image ({best}), no trace: kvmmu pt shows its page tables, kvmmu replay TRACE "
                "--image FILE walks a trace on them")
    return (f"{error.path}: is a memory image ({best}) that is compressed, no trace; decompress it first: an image is mapped, "
            "not read. kvmmu pt then shows its page tables, kvmmu replay TRACE --image FILE walks a trace on them")


def _given_registers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the registers that the arguments say."""
    return {name: getattr(args, name) for name in _REGISTERS if getattr(args, name) is not None}


def image_vcpu(args: argparse.Namespace, image: Image) -> tuple[str, Vcpu]:
    """Return a name for people, and a vCPU of an image with the registers that the arguments say."""
    given = _given_registers(args)
    number, count = args.vcpu or 0, max(len(image.vcpus), 1)
    if not 0 <= number < count:
        raise ValueError(f"--vcpu {number}: the image has {f'vCPUs 0 to {count - 1}' if count > 1 else 'vCPU 0 alone'}")
    if not image.vcpus and image.root is None and "cr3" not in given:
        raise ValueError(f"{image.path}: has no registers ({image.format}); say where its page tables begin by --cr3")
    return f"{image.path} ({image.format}), vCPU {number}", image.vcpu(number, **given)


def source_vcpu(args: argparse.Namespace, source: Recording | ParquetTrace, ctx: int | None = None) -> tuple[Vcpu, int]:
    """Return a vCPU with the registers of a context, or those that the arguments say, and the number of the context.

    Without ctx it is context 0 of a recording, and what a trace starts with, whose number is -1. So is that of other registers.
    """
    if args.vcpu is not None:
        raise ValueError(f"--vcpu {args.vcpu}: only memory images have vCPUs; --ctx chooses a recording's registers for walk")
    if isinstance(source, Recording):
        vcpu, contexts = recording_vcpu(source)
        what, number = "recording", ctx or 0
    else:
        start = trace_start(source)
        vcpu, contexts = start.vcpu, start.contexts
        what, number = "trace", -1 if ctx is None else ctx
    if isinstance(source, Recording) or ctx is not None:
        if not 0 <= number < len(contexts):
            there = f"contexts 0 to {len(contexts) - 1}" if contexts else "no contexts"
            raise ValueError(f"--ctx {number}: the {what} has {there}")
        try:
            use_context(vcpu, contexts[number])
        except (kvmmu.GuestFault, ValueError) as error:
            raise ValueError(f"{source.path}: context {number}: {error}") from error
    if given := _given_registers(args):
        vcpu.set_regs(**given)
        number = -1
    return vcpu, number


def target_vcpu(args: argparse.Namespace, image: Image | None) -> tuple[str, Vcpu]:
    """Return a name for people, and a vCPU with the registers that the arguments say. IN image: what `image_of()` returned.

    Page tables that do not lie in memory are told on standard error.
    """
    if image is not None:
        name, vcpu = image_vcpu(args, image)
    else:
        source = open_with_tables(args)
        name, vcpu = str(source.path), source_vcpu(args, source)[0]
    record = vcpu.gva_walk.walk_record(0)
    if record.rule == "hole" and len(record.steps) == 1:            # every address has this table
        warn(f"kvmmu: {name}: CR3 {vcpu.regs.cr3:#x}: {rule_text('hole')}")
    return name, vcpu


def space_of(vcpu: Vcpu) -> str:
    """Name the address space of a vCPU."""
    role = vcpu.gva_walk.cpu_role
    return f"{_MODES[role.level]} paging, CR3 {vcpu.regs.cr3:#x}" if role.level else "paging off"
