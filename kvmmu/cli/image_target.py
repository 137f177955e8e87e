"""The address space that a subcommand looks at: of a memory image, a recording or a trace that has page tables."""

import argparse
from pathlib import Path
from typing import Any

import kvmmu
from kvmmu.cli.parsing import add_phase, address
from kvmmu.cli.sources import open_with_tables
from kvmmu.images import Image, image_formats, is_image, open_image
from kvmmu.replay.replay import recording_vcpu, use_context
from kvmmu.replay.terminal import warn
from kvmmu.replay.trace_replay import trace_start
from kvmmu.traces import Recording, TraceError
from kvmmu.traces._files import StrPath
from kvmmu.traces.opening import find_format
from kvmmu.vm.vcpu import Vcpu

__all__ = ["add_image_options", "add_target", "image_of", "space_of", "target_vcpu"]

_REGISTERS = ("cr0", "cr3", "cr4", "efer")
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
    group.add_argument("--format", choices=sorted(image_formats()), help="format of the image (default: told by its content)")
    group.add_argument("--vcpu", type=int, metavar="N", help="whose registers (default: 0)")
    others = command.add_argument_group("registers")
    for name in _REGISTERS:
        others.add_argument(f"--{name}", type=address, metavar="X", help=f"{name.upper()} in the place of the vCPU's")


def image_of(args: argparse.Namespace) -> Image | None:
    """Open what the arguments name if it is an image; None for a recording or a trace. Damage is told on standard error."""
    path = args.recording
    if path is None or path == "bundled" or not Path(path).is_file():          # others say what it is
        return None
    if args.format is None and not is_image(path) and is_known(path):
        return None
    image = open_image(path, args.format)
    for damage in image.damage:
        warn(f"kvmmu: {path}: {damage}")
    return image


def given_registers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the registers that the arguments say."""
    return {name: getattr(args, name) for name in _REGISTERS if getattr(args, name) is not None}


def vcpu_number(args: argparse.Namespace, image: Image) -> int:
    """Return the number of the vCPU that the arguments say, which the image has."""
    number, count = args.vcpu or 0, max(len(image.vcpus), 1)
    if not 0 <= number < count:
        raise ValueError(f"--vcpu {number}: the image has {f'vCPUs 0 to {count - 1}' if count > 1 else 'vCPU 0 alone'}")
    if args.phase is not None:
        raise ValueError(f"--phase {args.phase}: an image has no phases")
    return int(number)


def refuse_vcpu(args: argparse.Namespace) -> None:
    """Raise ValueError if the arguments name a vCPU of what is no image."""
    if args.vcpu is not None:
        raise ValueError(f"--vcpu {args.vcpu}: only memory images have vCPUs; --ctx chooses a recording's registers for walk")


def is_known(path: StrPath) -> bool:
    """True if a file is a trace or a recording of a format that is known."""
    if str(path).endswith((".npz", ".npz.zst")):
        return True
    try:
        find_format(path)
    except TraceError:
        return False
    return True


def target_vcpu(args: argparse.Namespace) -> tuple[str, Vcpu, Image | None]:
    """Return a name for people, a vCPU with the registers that the arguments say, and the image if it is one."""
    given = given_registers(args)
    image = image_of(args)
    if image is not None:
        number = vcpu_number(args, image)
        if not image.vcpus and image.root is None and "cr3" not in given:
            raise ValueError(f"{image.path}: has no registers ({image.format}); say where its page tables begin by --cr3")
        return f"{image.path} ({image.format}), vCPU {number}", image.vcpu(number, **given), image
    source = open_with_tables(args)
    refuse_vcpu(args)
    if isinstance(source, Recording):
        vcpu, contexts = recording_vcpu(source)
        try:
            use_context(vcpu, contexts[0])
        except (kvmmu.GuestFault, ValueError) as error:
            raise ValueError(f"{source.path}: context 0: {error}") from error
    else:
        vcpu = trace_start(source).vcpu
    if given:
        vcpu.set_regs(**given)
    return str(source.path), vcpu, None


def space_of(vcpu: Vcpu) -> str:
    """Name the address space of a vCPU."""
    role = vcpu.gva_walk.cpu_role
    return f"{_MODES[role.level]} paging, CR3 {vcpu.regs.cr3:#x}" if role.level else "paging off"
