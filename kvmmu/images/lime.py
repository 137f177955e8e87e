"""Images of LiME: ranges of memory, each behind a header of 32 bytes."""

import struct
from os import PathLike

import numpy as np

from kvmmu.images._file import ImageFile, Range, joined, memory_of
from kvmmu.images.image import Image

__all__ = ["FORMAT"]

HEADER = np.dtype([("magic", "<u4"), ("version", "<u4"), ("start", "<u8"), ("end", "<u8"), ("reserved", "<u8")])
_WORDS = struct.Struct("<IIQQQ")             # of the header; quicker than a record of numpy
_MAGIC = 0x4C694D45


class _Lime:
    """Reader of LiME images."""

    name = "lime"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        return 90 if head.startswith(_MAGIC.to_bytes(4, "little")) else 0

    def open(self, path: str | PathLike[str]) -> Image:
        file = ImageFile(path)
        ranges, damage = _ranges(file)
        memory = memory_of(file, joined(ranges, damage), damage)
        return Image(file.path, self.name, memory, damage=damage, details={"ranges": len(ranges)})


def _ranges(file: ImageFile) -> tuple[list[Range], list[str]]:
    ranges: list[Range] = []
    damage: list[str] = []
    at, view = 0, memoryview(file.data)
    while at < file.size:
        if file.size - at < HEADER.itemsize:
            damage.append(f"at offset {at:#x}: {file.size - at} bytes are no header")
            break
        magic, version, start, end, _ = _WORDS.unpack_from(view, at)
        wrong = None
        if magic != _MAGIC or version != 1:
            wrong = f"magic {magic:#x}, version {version}: want {_MAGIC:#x}, 1"
        elif end < start:
            wrong = f"a range that ends at {end:#x} begins at {start:#x}"
        if wrong is not None:
            if not ranges:
                raise file.fail(wrong, at)
            damage.append(f"at offset {at:#x}: {wrong}; what follows is left out")
            break
        at += HEADER.itemsize
        size = end - start + 1
        if size > file.size - at:
            damage.append(f"at offset {at:#x}: the file has {file.size - at:#x} of {size:#x} bytes of the range at {start:#x}")
            size = file.size - at
        if size:
            ranges.append(Range(start, at, size))
        at += size
    return ranges, damage


FORMAT = _Lime()
