"""Raw images: physical memory byte by byte, as it is, or as the RAM of a QEMU machine, without the hole below 4 GiB."""

import os
from os import PathLike
from pathlib import Path

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.arch.arguments import check_name, check_pages
from kvmmu.images._file import ImageFile, Range, memory_of
from kvmmu.images.image import Image

__all__ = ["FORMAT", "why_not_raw"]

_FOUR_GIB = 1 << 32
# RAM of this size and more is cut: (from this size on, bytes that stay below 4 GiB).
_LAYOUTS = {"pc": (0xE0000000, 0xC0000000), "q35": (0xB0000000, 0x80000000), "microvm": (0xC0000000, 0xC0000000)}
_LEAST = 1 << 16
_SUFFIXES = (".raw", ".mem", ".ram", ".bin", ".img", ".dd", ".dump")


class _Raw:
    """Reader of raw memory."""

    name = "raw"

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        """Return how sure it is: a file of whole pages that is nothing else, small ones by their names alone."""
        size = os.path.getsize(path)
        if size == 0 or size % int(PAGE_SIZE) or size < _LEAST and Path(path).suffix.lower() not in _SUFFIXES:
            return 0
        return 1 if any(head) or size > len(head) else 0

    def open(self, path: str | PathLike[str], *, layout: str = "flat", below_4g: int | None = None) -> Image:
        """Open an image.

        layout: "flat", the offset is the address; "pc" (i440FX), "q35" or "microvm", RAM of such a machine, as its memory backend
        has it: what does not fit below the hole begins at 4 GiB. below_4g: bytes below the hole, where max-ram-below-4g set them.
        """
        check_name("layout", layout, ("flat", *_LAYOUTS))
        file = ImageFile(path)
        low = file.size
        if below_4g is not None:
            low = min(low, check_pages("below_4g", below_4g, int(PAGE_SIZE), _FOUR_GIB))
        elif layout != "flat" and file.size >= _LAYOUTS[layout][0]:
            low = _LAYOUTS[layout][1]
        damage = [f"its {file.size:,} bytes are no whole pages: the rest of the last page reads as 0"] \
            if file.size % int(PAGE_SIZE) else []
        memory = memory_of(file, [Range(0, 0, low), Range(_FOUR_GIB, low, file.size - low)], damage)
        return Image(file.path, self.name, memory, damage=damage, details={"layout": layout, "below_4g": low})


def why_not_raw(path: str | PathLike[str]) -> str:
    """Return what keeps a file from being told to be raw."""
    size, page = os.path.getsize(path), int(PAGE_SIZE)
    if size % page:
        return f"raw is a file of whole pages of {page:,} bytes, and this one has {size:,} bytes"
    if 0 < size < _LEAST:
        return f"a raw file of fewer than {_LEAST:,} bytes is known by its name alone: {', '.join(_SUFFIXES)}"
    return "raw is a file of whole pages that are not all 0"


FORMAT = _Raw()
