"""Images of AVML, version 2: ranges of memory behind a header of 32 bytes each, compressed as frames of snappy.

The frames of a range are blocks of at most 64 KiB, each compressed for itself, so that they can be read in any order; behind them
stand 8 bytes. Version 1 is LiME's format.
"""

from collections import OrderedDict
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.images._file import ImageError, ImageFile
from kvmmu.images.image import Image
from kvmmu.images.kdump import unsnap
from kvmmu.images.lime import HEADER
from kvmmu.memory._memory import GuestMemory

__all__ = ["FORMAT"]

_MAGIC = 0x4C4D5641
_PAGE = int(PAGE_SIZE)
_BLOCK_MAX = 1 << 16
_TRAILER = 8
_CRC = 4
_COMPRESSED, _PLAIN, _FIRST_SKIPPED, _STREAM = 0, 1, 0x80, 0xFF
_KEPT = 64                                  # blocks that stay unpacked
_BLOCK = np.dtype([("begin", np.uint64), ("gpa", np.uint64), ("offset", np.uint64), ("packed", np.uint32), ("size", np.uint32),
                   ("plain", np.bool_)])


class _Avml:
    """Reader of AVML images."""

    name = "avml"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        return 90 if head.startswith(_MAGIC.to_bytes(4, "little")) else 0

    def open(self, path: str | PathLike[str]) -> Image:
        file = ImageFile(path)
        blocks = _Blocks(file)
        if not blocks.blocks.size:
            raise file.fail("there is no memory in it" + (f": {blocks.damage[0]}" if blocks.damage else ""))
        size = -(-int((blocks.blocks["gpa"] + blocks.blocks["size"]).max()) // _PAGE) * _PAGE
        return Image(file.path, self.name, GuestMemory.from_callbacks(blocks.read, size=size), damage=blocks.damage,
                     details={"ranges": blocks.ranges})


class _Blocks:
    """The blocks of an image, unpacked when they are asked for."""

    def __init__(self, file: ImageFile) -> None:
        self.file = file
        self.ranges = 0
        self.damage: list[str] = []
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        found: list[tuple[int, int, int, int, bool]] = []
        extents: list[tuple[int, int, int]] = []            # of ranges: first address, end, blocks of all up to this one
        at = 0
        while at < file.size:
            if file.size - at < HEADER.itemsize:
                self.damage.append(f"at offset {at:#x}: {file.size - at} bytes are no header")
                break
            header = file.item(HEADER, at, "a header")
            start, end = int(header["start"]), int(header["end"])
            if header["magic"] != _MAGIC or header["version"] != 2 or not start <= end < GPA_LIMIT:
                wrong = (f"magic {header['magic']:#x}, version {header['version']}, range {start:#x} to {end:#x}: want "
                         f"{_MAGIC:#x}, 2, and a range within 52 bits")
                if not self.ranges:
                    raise file.fail(wrong, at)
                self.damage.append(f"at offset {at:#x}: {wrong}; what follows is left out")
                break
            self.ranges += 1
            before = len(found)
            at = self._frames(found, at + HEADER.itemsize, start, end + 1)
            if len(found) > before:
                extents.append((start, found[-1][0] + found[-1][3], len(found)))
            if at < 0:
                break
            at += _TRAILER
        self.blocks = self._parts_that_count(found, extents)

    def _parts_that_count(self, found: list[tuple[int, int, int, int, bool]], extents: list[tuple[int, int, int]]) -> Any:
        """Return the blocks, ascending, each from `begin` on: where ranges overlap the one that begins first counts."""
        begin, covered, overlaps = np.zeros(len(extents), np.uint64), 0, 0
        for number in sorted(range(len(extents)), key=lambda n: extents[n][0]):
            start, end, _ = extents[number]
            begin[number] = max(start, covered)
            if start < covered:
                overlaps += 1
                if overlaps == 1:
                    self.damage.append(f"the range at gpa {start:#x} overlaps one that begins before it, which counts")
            covered = max(covered, end)
        if overlaps > 1:
            self.damage.append(f"{overlaps} ranges overlap others")
        counts = np.array([last for _, _, last in extents], np.int64)
        counts[1:] -= counts[:-1].copy()
        blocks = np.array([(0, *block) for block in found], _BLOCK)
        blocks["begin"] = np.maximum(blocks["gpa"], np.repeat(begin, counts))
        blocks = blocks[blocks["begin"] < blocks["gpa"] + blocks["size"]]
        return blocks[np.argsort(blocks["begin"], kind="stable")]

    def _frames(self, found: list[tuple[int, int, int, int, bool]], at: int, gpa: int, stop: int) -> int:
        """Add the blocks of a range; returns where they end, -1 if that cannot be told."""
        file = self.file
        while gpa < stop:
            if file.size - at < 4:
                self.damage.append(f"at offset {at:#x}: the file ends within the range that goes to {stop:#x}, at gpa {gpa:#x}")
                return -1
            word = int.from_bytes(file.bytes(at, 4, "a frame"), "little")
            kind, size = word & 0xFF, word >> 8
            at += 4
            if kind in (_COMPRESSED, _PLAIN):
                packed = size - _CRC
                block = packed if kind == _PLAIN else _varint(file.data[at + _CRC:at + _CRC + 5].tobytes())
                if size > file.size - at or packed < 0 or not 0 < block <= min(_BLOCK_MAX, stop - gpa):
                    self.damage.append(f"at offset {at:#x}: a block of {block:#x} bytes, {packed:#x} in the file, at gpa "
                                       f"{gpa:#x}; what follows is left out")
                    return -1
                found.append((gpa, at + _CRC, packed, block, kind == _PLAIN))
                gpa += block
            elif kind < _FIRST_SKIPPED:
                self.damage.append(f"at offset {at - 4:#x}: a frame of kind {kind:#x}; what follows is left out")
                return -1
            at += size
        return at

    def read(self, gpas: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return pages; what no range has is zero."""
        pages = np.zeros((gpas.size, _PAGE), np.uint8)
        begins = self.blocks["begin"]
        for i, gpa in enumerate(gpas.tolist()):
            place = max(int(np.searchsorted(begins, np.uint64(gpa), "right")) - 1, 0)
            while place < self.blocks.size and int(begins[place]) < gpa + _PAGE:
                first = int(self.blocks["gpa"][place])
                begin, end = max(gpa, int(begins[place])), min(gpa + _PAGE, first + int(self.blocks["size"][place]))
                if begin < end:
                    data = self._unpack(place)
                    pages[i, begin - gpa:end - gpa] = np.frombuffer(data, np.uint8)[begin - first:end - first]
                place += 1
        return pages

    def _unpack(self, place: int) -> bytes:
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        block = self.blocks[place]
        offset, size = int(block["offset"]), int(block["size"])
        data = self.file.bytes(offset, int(block["packed"]), "a block")
        if not block["plain"]:
            try:
                data = unsnap(data, _BLOCK_MAX)
            except ImportError:
                raise
            except Exception as error:      # of the library
                raise ImageError(self.file.path, f"the block of gpa {int(block['gpa']):#x} cannot be unpacked: {error}",
                                 offset) from error
        if len(data) != size:
            raise self.file.fail(f"the block of gpa {int(block['gpa']):#x} has {len(data)} bytes; want {size}", offset)
        self._kept[place] = data
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return data


def _varint(data: bytes) -> int:
    """Return the number that a block begins with: its size when it is unpacked; 0 if it is cut."""
    value = 0
    for i, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value
    return 0


FORMAT = _Avml()
