"""kvmmu read: print bytes at a linear address."""

import argparse
import sys

from kvmmu.arch.arguments import check_int
from kvmmu.cli.image_target import add_target, image_of, target_vcpu
from kvmmu.cli.output import OK
from kvmmu.cli.parsing import Commands, address, command, size
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay.terminal import StreamError, say
from kvmmu.vm.vcpu import Vcpu

__all__ = ["add"]

_LINE = 16


def add(commands: Commands) -> None:
    """Add the subcommand to the parser."""
    read = command(commands, "read", _read, "print bytes at a linear address",
                   "Print bytes of a memory image, a recording or a trace, at a linear address or, with --physical, at a "
                   "guest-physical one. Rights do not count. A part that is not mapped, or of which the file has no bytes, is an "
                   "error, after the bytes before it. A recording or a trace has page tables alone: other memory of its guest is "
                   "such a part, or 0 where the file has memory around the tables.",
                   "read dump.elf 0xffffffff81000000 64", "read dump.elf 0x400000 0x1000 --raw > page")
    add_target(read)
    read.add_argument("gva", type=address, metavar="GVA", help="address, hexadecimal with 0x")
    read.add_argument("n", type=size, metavar="N", help="bytes, decimal or hexadecimal with 0x")
    read.add_argument("--physical", action="store_true", help="the address is a guest-physical one")
    read.add_argument("--raw", action="store_true", help="write the bytes themselves")


def _read(args: argparse.Namespace) -> int:
    check_int("N", args.n, 0, 1 << 32)
    check_int("GVA + N", args.gva + args.n, 0, 1 << 64)
    image = image_of(args)
    if args.physical:
        mem = image.memory if image is not None else target_vcpu(args, None)[1].mem
        data, trouble = read_present(mem, args.gva, args.n)
    else:
        data, trouble = read_mapped(target_vcpu(args, image)[1], args.gva, args.n)
    if args.raw:
        _write_bytes(data)
    else:
        for start in range(0, len(data), _LINE):
            line = data[start:start + _LINE]
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
            say(f"{args.gva + start:016x}  {line.hex(' '):47}  |{text}|")
    if trouble is not None:
        raise ValueError(f"{trouble}; {len(data):#x} of {args.n:#x} bytes are there")
    return OK


def read_mapped(vcpu: Vcpu, gva: int, n: int) -> tuple[bytes, str | None]:
    """Return the bytes from a linear address on, and why they end before n, or None."""
    pieces, at = [], gva
    for mapping in vcpu.gva_walk.mappings(gva, gva + n):
        if mapping.gva != at:
            break
        data, trouble = read_present(vcpu.mem, mapping.gpa, mapping.size)
        pieces.append(data)
        at += len(data)
        if trouble is not None:
            return b"".join(pieces), f"linear address {at:#x}: {trouble}"
    return b"".join(pieces), f"linear address {at:#x} is not mapped" if at < gva + n else None


def read_present(mem: GuestMemory, gpa: int, n: int) -> tuple[bytes, str | None]:
    """Return the bytes from a guest-physical address on, and why they end before n, or None."""
    at, stop = gpa, gpa + n
    for start, length, _ in mem.slots:
        if start <= at < start + length:
            at = min(stop, start + length)
    return mem.read(gpa, at - gpa), f"no memory at guest-physical address {at:#x}" if at < stop else None


def _write_bytes(data: bytes) -> None:
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise StreamError(f"standard output: {getattr(error, 'strerror', None) or error}") from error
