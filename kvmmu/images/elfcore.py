"""ELF cores: of QEMU's dump-guest-memory, with the registers of every vCPU, of a kernel (kdump), and /proc/kcore or its copies.

Layout of QEMU's note of a vCPU (owner QEMU, type 0, version 1): u32 version, u32 size, 16 general registers, RIP, RFLAGS, ten
segments of 24 bytes (selector, limit, flags, padding: u32; base u64) in the order cs ds es fs gs ss ldt tr gdt idt, CR0 to CR4.
It has no EFER: a processor in long mode is told by the machine of the file, EM_X86_64, and by CS.L.
"""

import struct
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np

from kvmmu.arch._bits import Cr0, Cr4
from kvmmu.images._file import ImageError, ImageFile, Range, joined, memory_of
from kvmmu.images._flat import FlatFile, is_flat
from kvmmu.images._unmapped import UnmappedFile, open_file
from kvmmu.images._vmcoreinfo import kernel_root, parse_vmcoreinfo
from kvmmu.images.image import Image, VcpuState, long_mode_regs, regs_of
from kvmmu.memory._memory import GuestMemory

__all__ = ["ELF_SIGNATURE", "FORMAT", "open_elf", "qemu_vcpus"]

ELF_SIGNATURE = b"\x7fELF"

_EHDR = {1: np.dtype([("ident", "V16"), ("type", "<u2"), ("machine", "<u2"), ("version", "<u4"), ("entry", "<u4"),
                      ("phoff", "<u4"), ("shoff", "<u4"), ("flags", "<u4"), ("ehsize", "<u2"), ("phentsize", "<u2"),
                      ("phnum", "<u2")]),
         2: np.dtype([("ident", "V16"), ("type", "<u2"), ("machine", "<u2"), ("version", "<u4"), ("entry", "<u8"),
                      ("phoff", "<u8"), ("shoff", "<u8"), ("flags", "<u4"), ("ehsize", "<u2"), ("phentsize", "<u2"),
                      ("phnum", "<u2")])}
_PHDR = {1: np.dtype([("type", "<u4"), ("offset", "<u4"), ("vaddr", "<u4"), ("paddr", "<u4"), ("filesz", "<u4"), ("memsz", "<u4"),
                      ("flags", "<u4"), ("align", "<u4")]),
         2: np.dtype([("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("vaddr", "<u8"), ("paddr", "<u8"), ("filesz", "<u8"),
                      ("memsz", "<u8"), ("align", "<u8")])}
_SH_INFO = {1: (28, "<u4"), 2: (44, "<u4")}             # where sh_info lies in a section header
_NHDR = struct.Struct("<III")                           # bytes of the name, bytes of the rest, type
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")
_SEGMENT = np.dtype([("selector", "<u4"), ("limit", "<u4"), ("flags", "<u4"), ("pad", "<u4"), ("base", "<u8")])
_QEMU_STATE = np.dtype([("version", "<u4"), ("size", "<u4"), ("general", "<u8", (18,)), ("segments", _SEGMENT, (10,)),
                        ("cr", "<u8", (5,))])

_ET_CORE, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 1, 4, 0xFFFF
_EM_386, _EM_X86_64 = 3, 62
_CS_L = 1 << 21                                         # of the flags of a segment, as QEMU keeps them
_NAME_MAX = 256
_File = ImageFile | FlatFile | UnmappedFile
_NOTE_BYTES_MAX, _NOTES_MAX = 1 << 26, 1 << 16          # of all segments that are looked at
_NO_PADDR = (1 << 64) - 1                               # of segments of /proc/kcore that are no memory


class _Elf:
    """Reader of an ELF core."""

    name = "elf"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        return 90 if head.startswith(ELF_SIGNATURE) else 0

    def open(self, path: str | PathLike[str]) -> Image:
        file = open_file(path)
        return open_elf(FlatFile(file) if isinstance(file, ImageFile) and is_flat(file) else file)


def open_elf(file: _File) -> Image:
    """Return the image of an ELF core."""
    elf_class, header = _header(file)
    damage: list[str] = list(file.damage) if isinstance(file, FlatFile) else []
    phdrs = _program_headers(file, elf_class, header, damage)
    vcpus, info = _notes(file, phdrs[phdrs["type"] == _PT_NOTE], int(header["machine"]) == _EM_X86_64, damage)
    load = phdrs[(phdrs["type"] == _PT_LOAD) & (phdrs["filesz"] != 0)]
    offset, gpa, size = (load[name].astype(np.uint64) for name in ("offset", "paddr", "filesz"))
    fits = (gpa != np.uint64(_NO_PADDR)) & (gpa + size > gpa) & (offset + size > offset)
    if not fits.all():
        bad = np.flatnonzero(~fits & (gpa != np.uint64(_NO_PADDR)))
        damage += [f"segment {int(n)} (gpa {int(gpa[n]):#x}, {int(size[n]):#x} bytes) wraps around and is left out"
                   for n in bad[:4]]
    ranges = joined((Range(*row) for row in zip(gpa[fits].tolist(), offset[fits].tolist(), size[fits].tolist(), strict=True)),
                    damage)
    root = kernel_root(info)
    return Image(file.path, FORMAT.name, _memory(file, ranges, damage), vcpus, damage=damage,
                 root=None if root is None else long_mode_regs(root[0], five_levels=root[1]),
                 details={"segments": int(load.size)} | ({"vmcoreinfo": info} if info else {}))


def _memory(file: _File, ranges: list[Range], damage: list[str]) -> GuestMemory:
    if isinstance(file, UnmappedFile):
        return file.memory(ranges)
    if isinstance(file, FlatFile):
        return memory_of(file.file, file.in_file(ranges, damage), damage)
    return memory_of(file, ranges, damage)


def _header(file: _File) -> tuple[int, Any]:
    ident = file.bytes(0, 16, "the ELF header")
    elf_class = ident[4]
    if elf_class not in _EHDR or ident[5] != 1:
        raise file.fail(f"class {elf_class} and byte order {ident[5]}: want an ELF file of 32 or 64 bits, little endian", 4)
    header = file.item(_EHDR[elf_class], 0, "the ELF header")
    if header["type"] != _ET_CORE:
        raise file.fail(f"ELF type {header['type']}: want a core file ({_ET_CORE})", 16)
    if header["machine"] not in (_EM_386, _EM_X86_64):
        raise file.fail(f"ELF machine {header['machine']}: want x86 ({_EM_386} or {_EM_X86_64})", 18)
    if header["phentsize"] != _PHDR[elf_class].itemsize:
        raise file.fail(f"program headers of {header['phentsize']} bytes, want {_PHDR[elf_class].itemsize}")
    return elf_class, header


def _program_headers(file: _File, elf_class: int, header: Any, damage: list[str]) -> Any:
    count, start, itemsize = int(header["phnum"]), int(header["phoff"]), _PHDR[elf_class].itemsize
    if count == _PN_XNUM:
        at, kind = _SH_INFO[elf_class]
        count = int(file.item(np.dtype(kind), int(header["shoff"]) + at, "the section header with the number of segments"))
    there = max(0, file.size - start) // itemsize
    if there < count:
        damage.append(f"at offset {start:#x}: the file has {there} of {count} program headers")
    return file.array(_PHDR[elf_class], start, min(count, there), "the program headers")


def _notes(file: _File, segments: Any, is_x86_64: bool,
           damage: list[str]) -> tuple[list[VcpuState], dict[str, str]]:
    """Return the vCPUs, and what the kernel tells."""
    vcpus: list[VcpuState] = []
    info: dict[str, str] = {}
    bytes_left, notes_left = min(_NOTE_BYTES_MAX, file.size), _NOTES_MAX
    for segment in segments:
        start, size = int(segment["offset"]), int(segment["filesz"])
        if start + size > file.size:
            damage.append(f"at offset {start:#x}: the file ends within the notes")
            size = max(0, file.size - start)
        if size > bytes_left or not notes_left:
            damage.append(f"at offset {start:#x}: all notes have more than {min(_NOTE_BYTES_MAX, file.size):#x} bytes, or are "
                          f"more than {_NOTES_MAX}; what follows is left out")
            size = min(size, bytes_left) if notes_left else 0
        if not size:
            if not bytes_left or not notes_left:
                break
            continue
        bytes_left -= size
        data = file.bytes(start, size, "the notes")
        for owner, kind, at, length in _each_note(data, start, damage):
            if not notes_left:
                break
            notes_left -= 1
            if owner == b"QEMU" and kind == 0:
                try:
                    vcpus.append(_vcpu(file, start + at, data[at:at + length], len(vcpus), is_x86_64))
                except ImageError as error:
                    damage.append(f"vCPU {len(vcpus)}: {error.reason}")
            elif owner == b"VMCOREINFO":
                info = parse_vmcoreinfo(data[at:at + length])
    return vcpus, info


def qemu_vcpus(file: _File, offset: int, size: int, *, is_x86_64: bool, damage: list[str]) -> list[VcpuState]:
    """Return the vCPUs of the notes in a part of a file."""
    segments = np.zeros(1, _PHDR[2])
    segments["offset"], segments["filesz"] = offset, size
    return _notes(file, segments, is_x86_64, damage)[0] if size else []


def _each_note(data: bytes, offset: int, damage: list[str]) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield owner, type, place and size of each note in the data of a segment, which lies at an offset of the file."""
    start = 0
    while start + _NHDR.size <= len(data):
        namesz, descsz, kind = _NHDR.unpack_from(data, start)
        at = start + _NHDR.size + -(-namesz // 4) * 4
        if namesz > _NAME_MAX or at + descsz > len(data):
            damage.append(f"at offset {offset + start:#x}: a note of {namesz:#x} and {descsz:#x} bytes ends beyond the notes")
            return
        yield data[start + _NHDR.size:start + _NHDR.size + namesz].rstrip(b"\0"), kind, at, descsz
        start = at + -(-descsz // 4) * 4


def _vcpu(file: _File, at: int, desc: bytes, number: int, is_x86_64: bool) -> VcpuState:
    if len(desc) < _QEMU_STATE.itemsize:
        raise file.fail(f"at offset {at:#x}: its note has {len(desc)} bytes, want {_QEMU_STATE.itemsize}", at)
    state: Any = np.frombuffer(desc, _QEMU_STATE, 1)[0]
    if state["version"] != 1:
        raise file.fail(f"at offset {at:#x}: its note is of version {state['version']}, want 1", at)
    registers = dict(zip(_GENERAL, state["general"].tolist(), strict=True))
    for name, segment in zip(_SEGMENTS, state["segments"], strict=True):
        registers[name], registers[f"{name}_base"] = int(segment["selector"]), int(segment["base"])
    cr = [int(value) for value in state["cr"]]
    registers |= {f"cr{n}": cr[n] for n in (0, 2, 3, 4)}
    paging = bool(cr[0] & Cr0.PG and cr[4] & Cr4.PAE)
    long_mode = paging and (is_x86_64 or bool(int(state["segments"][0]["flags"]) & _CS_L))
    return VcpuState(number, regs_of(cr[0], cr[3], cr[4], long_mode=long_mode, rflags=registers["rflags"]), registers, ("efer",))


FORMAT = _Elf()
