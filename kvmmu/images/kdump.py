"""kdump-compressed dumps, as makedumpfile and QEMU's dump-guest-memory write them: each page compressed for itself.

Block 0: the header; block 1: the sub-header; then two bitmaps of pages, of which the second one says which are in the file; then
a descriptor of 24 bytes for each of those, in order: offset u64, size u32, flags u32 (1 zlib, 2 LZO, 4 snappy, 0x20 zstd),
page flags u64. QEMU's bitmaps have one block of their number each. The flattened variant, which is all that QEMU writes
before version 8.2, is that of `_flat.py`; an ELF core in it, of makedumpfile -E -F, is opened as one.
"""

import zlib
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.arch.extras import missing_extra
from kvmmu.images._file import ImageError, ImageFile
from kvmmu.images._flat import FLAT_SIGNATURE, FlatFile, is_flat
from kvmmu.images._vmcoreinfo import kernel_root, parse_vmcoreinfo
from kvmmu.images.elfcore import ELF_SIGNATURE, open_elf, qemu_vcpus
from kvmmu.images.image import Image, long_mode_regs
from kvmmu.memory._memory import GuestMemory

__all__ = ["FORMAT"]

_PAGE = int(PAGE_SIZE)
_SIGNATURE = b"KDUMP   "
# The structures of the header differ between machines in what lies behind utsname, which has 390 bytes.
_HEADER = np.dtype([("signature", "S8"), ("version", "<i4"), ("utsname", "V390"), ("pad", "V6"), ("timestamp", "<u8", (2,)),
                    ("status", "<u4"), ("block_size", "<u4"), ("sub_hdr_size", "<u4"), ("bitmap_blocks", "<u4"),
                    ("max_mapnr", "<u4"), ("total_ram_blocks", "<u4"), ("device_blocks", "<u4"), ("written_blocks", "<u4"),
                    ("current_cpu", "<u4"), ("nr_cpus", "<u4")])
_SUB_HEADER = np.dtype([("phys_base", "<i8"), ("dump_level", "<u4"), ("split", "<u4"), ("start_pfn", "<u8"), ("end_pfn", "<u8"),
                        ("offset_vmcoreinfo", "<u8"), ("size_vmcoreinfo", "<u8"), ("offset_note", "<u8"), ("size_note", "<u8"),
                        ("offset_eraseinfo", "<u8"), ("size_eraseinfo", "<u8"), ("start_pfn_64", "<u8"), ("end_pfn_64", "<u8"),
                        ("max_mapnr_64", "<u8")])
_DESC = np.dtype([("offset", "<u8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
_ZLIB, _LZO, _SNAPPY, _ZSTD = 1, 2, 4, 0x20
_VERSION_64 = 6                             # from this one on the sub-header has max_mapnr_64
_INFO_MAX = 1 << 20
_BITS_AT_ONCE = 1 << 22                     # bytes of a bitmap
_File = ImageFile | FlatFile


class _Kdump:
    """Reader of kdump-compressed dumps."""

    name = "kdump"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        return 90 if head.startswith((_SIGNATURE, FLAT_SIGNATURE)) else 0

    def open(self, path: str | PathLike[str]) -> Image:
        mapped = ImageFile(path)
        file: _File = mapped
        damage: list[str] = []
        if is_flat(mapped):
            file = FlatFile(mapped)
            if file.bytes(0, min(file.size, len(ELF_SIGNATURE)), "the header") == ELF_SIGNATURE:
                return open_elf(file)
            damage += file.damage
        header = file.item(_HEADER, 0, "the header")
        if not header["signature"].startswith(b"KDUMP"):
            raise file.fail("what the flattened file makes up is neither a kdump-compressed dump nor an ELF core", 0)
        block = int(header["block_size"])
        if block != _PAGE:
            raise file.fail(f"blocks of {block} bytes; want {_PAGE}", 428)
        sub = file.item(_SUB_HEADER, block, "the sub-header")
        pages = int(sub["max_mapnr_64"]) if header["version"] >= _VERSION_64 else int(header["max_mapnr"])
        if not 0 < pages <= GPA_LIMIT // _PAGE:
            raise file.fail(f"{pages:#x} pages; want 1 to {GPA_LIMIT // _PAGE:#x}", block)
        source = _Pages(file, header, pages, damage)
        info = _vmcoreinfo(file, sub, damage)
        root = kernel_root(info)
        notes = (int(sub["offset_note"]), int(sub["size_note"])) if header["version"] >= 4 else (0, 0)
        vcpus = qemu_vcpus(file, *notes, is_x86_64=b"x86_64" in header["utsname"].tobytes(), damage=damage)
        memory = GuestMemory.from_callbacks(source.read, size=pages * _PAGE)
        return Image(file.path, self.name, memory, vcpus, damage=damage, details={"pages": source.numbers.size}
                     | ({"vmcoreinfo": info} if info else {}),
                     root=None if root is None else long_mode_regs(root[0], five_levels=root[1]))


def _vmcoreinfo(file: _File, sub: Any, damage: list[str]) -> dict[str, str]:
    offset, size = int(sub["offset_vmcoreinfo"]), int(sub["size_vmcoreinfo"])
    if not offset or not size:
        return {}
    try:
        return parse_vmcoreinfo(file.bytes(offset, min(size, _INFO_MAX), "VMCOREINFO"))
    except ImageError as error:
        damage.append(str(error.reason))
        return {}


class _Pages:
    """The pages of a dump, unpacked when they are asked for."""

    def __init__(self, file: _File, header: Any, pages: int, damage: list[str]) -> None:
        self.file = file
        first = (1 + int(header["sub_hdr_size"])) * _PAGE
        size = int(header["bitmap_blocks"]) * _PAGE
        if size // 2 * 8 < pages:
            raise file.fail(f"bitmaps of {size:#x} bytes for {pages:#x} pages", first)
        bits = file.array(np.dtype(np.uint8), first + size // 2, -(-pages // 8), "the bitmap of pages")
        self.numbers = _set_bits(bits, pages)
        at = first + size
        there = max(0, file.size - at) // _DESC.itemsize
        if there < self.numbers.size:
            damage.append(f"at offset {at:#x}: the file has the places of {there} of {self.numbers.size} pages")
            self.numbers = self.numbers[:there]
        self.descs = file.array(_DESC, at, self.numbers.size, "the places of pages")
        beyond = self.descs["offset"] + self.descs["size"] > file.size
        if beyond.any():
            damage.append(f"at offset {at:#x}: {int(beyond.sum())} pages lie beyond the end of the file, at {file.size:#x}; the "
                          f"first is that of gpa {int(self.numbers[np.argmax(beyond)]) * _PAGE:#x}")

    def read(self, gpas: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return pages; those that are not in the dump are zero."""
        pages = np.zeros((gpas.size, _PAGE), np.uint8)
        wanted = gpas // np.uint64(_PAGE)
        places = np.searchsorted(self.numbers, wanted)
        for i, place in enumerate(places.tolist()):
            if place < self.numbers.size and self.numbers[place] == wanted[i]:
                pages[i] = self._unpack(place, int(gpas[i]))
        return pages

    def _unpack(self, place: int, gpa: int) -> NDArray[np.uint8]:
        desc = self.descs[place]
        offset, size, flags = int(desc["offset"]), int(desc["size"]), int(desc["flags"])
        if size > 2 * _PAGE:
            raise self.file.fail(f"the page of gpa {gpa:#x} has {size:#x} bytes", offset)
        packed = self.file.bytes(offset, size, f"the page of gpa {gpa:#x}")
        unpack = _unpacker(flags)
        try:
            data = packed if unpack is None else unpack(packed)
        except ImportError:
            raise
        except Exception as error:          # of whatever library it is
            raise self.file.fail(f"the page of gpa {gpa:#x} cannot be unpacked: {error}", offset) from error
        if len(data) != _PAGE:
            raise self.file.fail(f"the page of gpa {gpa:#x} has {len(data)} bytes when it is unpacked; want {_PAGE}", offset)
        return np.frombuffer(data, np.uint8)


def _set_bits(bits: NDArray[np.uint8], count: int) -> NDArray[np.uint64]:
    """Return the numbers of the bits that are set, of `count` ones."""
    found = []
    for start in range(0, bits.size, _BITS_AT_ONCE):
        part = bits[start:start + _BITS_AT_ONCE]
        where = np.flatnonzero(part)
        rows, columns = np.nonzero(np.unpackbits(part[where, None], axis=1, bitorder="little"))
        found.append(((start + where[rows]) * 8 + columns).astype(np.uint64))
    numbers = np.concatenate(found)
    return numbers[numbers < count]


def _unpacker(flags: int) -> Callable[[bytes], bytes] | None:
    """Return the function that unpacks a page; None for one that is stored as it is."""
    if flags & _ZLIB:
        return _unzip
    if flags & _SNAPPY:
        return unsnap
    if flags & _ZSTD:
        return _unzstd
    if flags & _LZO:
        try:
            import lzo  # type: ignore[import-not-found]
        except ImportError:
            raise missing_extra("pages packed by LZO need python-lzo", "lzo") from None
        return lambda packed: bytes(lzo.decompress(packed, False, _PAGE))
    return None


def _unzip(packed: bytes) -> bytes:
    return zlib.decompressobj().decompress(packed, _PAGE + 1)


def unsnap(packed: bytes, limit: int = _PAGE) -> bytes:
    """Return what a raw snappy block holds, if that is not more than `limit` bytes."""
    try:
        import cramjam
    except ImportError:
        raise missing_extra("pages packed by snappy need cramjam", "images") from None
    length = shift = 0
    for byte in packed[:5]:                     # of what is unpacked, seven bits a byte
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if length > limit:
        raise ValueError(f"it says that it has {length:#x} bytes")
    return bytes(cramjam.snappy.decompress_raw(packed))


def _unzstd(packed: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise missing_extra("pages packed by zstd need zstandard", "images") from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 20).decompress(packed, max_output_size=_PAGE)


FORMAT = _Kdump()
