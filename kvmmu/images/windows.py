"""Crash dumps of Windows, 64 and 32 bits: full ones, and those with a bitmap of pages.

The header has 8192 bytes (4096 in 32 bits). A full dump has the runs of physical memory that the header lists one behind the
other; one with a bitmap has a second header, "SDMP" or "FDMP", "DUMP", with the offset of the first page, and then the pages
whose bits are set.
"""

from os import PathLike
from typing import Any

import numpy as np

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE, Cr0, Cr4, Efer
from kvmmu.arch.registers import Regs
from kvmmu.images._file import ImageFile, Range, joined, memory_of
from kvmmu.images.image import Image, VcpuState, long_mode_regs

__all__ = ["FORMAT"]

_PAGE = int(PAGE_SIZE)
_HEAD_64 = np.dtype({"names": ["dtb", "machine", "cpus", "bugcheck", "runs", "pages", "type"],
                     "formats": ["<u8", "<u4", "<u4", "<u4", "<u4", "<u8", "<u4"],
                     "offsets": [0x10, 0x30, 0x34, 0x38, 0x88, 0x90, 0xF98], "itemsize": 0x2000})
_HEAD_32 = np.dtype({"names": ["dtb", "machine", "cpus", "bugcheck", "pae", "runs", "pages", "type"],
                     "formats": ["<u4", "<u4", "<u4", "<u4", "u1", "<u4", "<u4", "<u4"],
                     "offsets": [0x10, 0x20, 0x24, 0x28, 0x5C, 0x64, 0x68, 0xF88], "itemsize": 0x1000})
# By bits: offset of the first run, dtype of a run, the most runs that a header has room for.
_RUNS = {64: (0x98, np.dtype([("first", "<u8"), ("count", "<u8")]), 42),
         32: (0x6C, np.dtype([("first", "<u4"), ("count", "<u4")]), 86)}
_BITMAP = np.dtype({"names": ["signature", "dump", "first", "present", "pages"], "formats": ["S4", "S4", "<u8", "<u8", "<u8"],
                    "offsets": [0, 4, 0x20, 0x28, 0x30], "itemsize": 0x38})
_CONTEXT_64 = 0x348
_PAGES_MAX = 1 << 30                        # 4 TiB
_REGISTERS_64 = {"cs": (0x38, 2), "rflags": (0x44, 4), "rax": (0x78, 8), "rcx": (0x80, 8), "rdx": (0x88, 8), "rbx": (0x90, 8),
                 "rsp": (0x98, 8), "rbp": (0xA0, 8), "rsi": (0xA8, 8), "rdi": (0xB0, 8), "rip": (0xF8, 8)}
_FULL, _KERNEL, _BITMAP_FULL, _BITMAP_KERNEL = 1, 2, 5, 6


class _Windows:
    """Reader of crash dumps of Windows."""

    name = "windows"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        return 90 if head.startswith((b"PAGEDU64", b"PAGEDUMP")) else 0

    def open(self, path: str | PathLike[str]) -> Image:
        file = ImageFile(path)
        bits = 64 if file.bytes(4, 4, "the header") == b"DU64" else 32
        head = file.item(_HEAD_64 if bits == 64 else _HEAD_32, 0, "the header")
        damage: list[str] = []
        kind = int(head["type"])
        if kind == _FULL:
            ranges = _runs(file, head, bits, damage)
        elif kind in (_KERNEL, _BITMAP_FULL, _BITMAP_KERNEL):
            ranges = _bitmap(file, head.dtype.itemsize)
        else:
            raise file.fail(f"dump type {kind}: want {_FULL} (full), or {_KERNEL}, {_BITMAP_FULL}, {_BITMAP_KERNEL} (with a "
                            "bitmap)", 0xF98 if bits == 64 else 0xF88)
        memory = memory_of(file, joined(ranges, damage), damage)
        state = _state(file, head, bits)
        return Image(file.path, self.name, memory, [state], damage=damage, root=state.regs,
                     details={"dump_type": kind, "cpus": int(head["cpus"]), "bugcheck": int(head["bugcheck"])})


def _runs(file: ImageFile, head: Any, bits: int, damage: list[str]) -> list[Range]:
    """Return the runs of a full dump."""
    at, dtype, most = _RUNS[bits]
    count = int(head["runs"])
    if count > most:
        raise file.fail(f"{count} runs of memory; the header has room for {most}", at - 16 if bits == 64 else at - 8)
    offset, found = head.dtype.itemsize, []
    for run in file.array(dtype, at, count, "the runs of memory"):
        first, pages = int(run["first"]), int(run["count"])
        if (first + pages) * _PAGE > GPA_LIMIT:
            damage.append(f"a run of {pages:#x} pages from page {first:#x} on ends beyond 52 bits; it and what follows are left "
                          "out")
            break
        found.append(Range(first * _PAGE, offset, pages * _PAGE))
        offset += pages * _PAGE
    return found


def _bitmap(file: ImageFile, at: int) -> list[Range]:
    """Return the runs of set bits."""
    head = file.item(_BITMAP, at, "the header of the bitmap")
    if head["signature"] not in (b"SDMP", b"FDMP") or head["dump"] != b"DUMP":
        raise file.fail(f"{head['signature']!r} {head['dump']!r}: want SDMP or FDMP, DUMP", at)
    pages, first = int(head["pages"]), int(head["first"])
    if pages > _PAGES_MAX:
        raise file.fail(f"{pages:#x} pages; want {_PAGES_MAX:#x} at most", at + 0x30)
    packed = file.array(np.dtype(np.uint8), at + _BITMAP.itemsize, -(-pages // 8), "the bitmap")
    bits = np.unpackbits(packed, bitorder="little")[:pages]
    edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0))).reshape(-1, 2)
    counts = edges[:, 1] - edges[:, 0]
    before = np.cumsum(counts) - counts
    return [Range(start * _PAGE, first + _PAGE * skip, count * _PAGE)
            for start, skip, count in zip(edges[:, 0].tolist(), before.tolist(), counts.tolist(), strict=True)]


def _state(file: ImageFile, head: Any, bits: int) -> VcpuState:
    """Return the processor that wrote the dump: its root, and in 64 bits its registers."""
    dtb = int(head["dtb"])
    if bits == 32:
        pae = bool(head["pae"] == 1)
        cr0 = int(Cr0.PE | Cr0.ET | Cr0.WP | Cr0.PG)
        regs = Regs(cr0=cr0, cr3=dtb, cr4=int(Cr4.PSE | (Cr4.PAE if pae else 0)), efer=int(Efer.NX) if pae else 0)
        return VcpuState(0, regs, {"cr3": dtb}, ("cr0", "cr4", "efer"))
    registers = {name: int.from_bytes(file.bytes(_CONTEXT_64 + at, size, "the context"), "little")
                 for name, (at, size) in _REGISTERS_64.items()}
    return VcpuState(0, long_mode_regs(dtb), registers | {"cr3": dtb}, ("cr0", "cr4", "efer"))


FORMAT = _Windows()
