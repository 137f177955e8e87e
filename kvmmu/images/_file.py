"""Bytes of an image file, mapped copy-on-write, and guest memory made from ranges of them."""

import os
import stat
from collections.abc import Iterable
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.memory._mapping import PrivateFile
from kvmmu.memory._memory import GuestMemory

__all__ = ["ImageError", "ImageFile", "Range", "StrPath", "join_ranges", "joined", "memory_of"]

StrPath = str | PathLike[str]

_PAGE = int(PAGE_SIZE)
_ALIGNMENT = 8                              # of entries that walks update
_OFFSET_LIMIT = (1 << 63) - 1               # of files
_DAMAGE_MAX = 1000                          # lines
_PARTIAL_MIN, _PARTIAL_PER_BYTE = 1 << 24, 4        # memory for pages that are in a file by parts: at least, and per byte of it


class ImageError(ValueError):
    """A file is no image, or one that is damaged.

    Attributes
    ----------
    path : str
    offset : int or None
        Where in the file, in bytes.
    reason : str
    """

    def __init__(self, path: StrPath, reason: str, offset: int | None = None) -> None:
        self.path, self.reason, self.offset = os.fspath(path), reason, offset
        super().__init__(f"{self.path}: " + (f"at offset {offset:#x}: " if offset is not None else "") + reason)


class Range(NamedTuple):
    """Guest-physical memory at gpa that lies in the file at offset; bytes."""

    gpa: int
    offset: int
    size: int


class ImageFile:
    """A file mapped copy-on-write: what is written to the mapping never reaches the file.

    Attributes
    ----------
    path : str
    size : int
    data : ndarray of uint8
        The whole file. Nothing of it is read before somebody looks at it.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(path, "is no regular file")
            self.size = status.st_size
            if not self.size:
                raise ImageError(path, "is empty", 0)
            self.data: NDArray[np.uint8] = np.frombuffer(PrivateFile(file.fileno()).map(), np.uint8)

    def fail(self, reason: str, offset: int | None = None) -> ImageError:
        """Return the error that says what is wrong with the file."""
        return ImageError(self.path, reason, offset)

    def bytes(self, offset: int, n: int, what: str) -> bytes:
        """Return n bytes; ImageError if the file ends before."""
        return self.array(np.dtype(np.uint8), offset, n, what).tobytes()

    def array(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """Return `count` items at an offset, without a copy; ImageError if the file ends before."""
        size = count * dtype.itemsize
        if offset < 0 or offset > self.size or size > self.size - offset:
            raise self.fail(f"the file ends within {what}: {size:#x} bytes are wanted, and the file has {self.size:#x}", offset)
        return self.data[offset:offset + size].view(dtype)

    def item(self, dtype: np.dtype[Any], offset: int, what: str) -> Any:
        """Return one item at an offset."""
        return self.array(dtype, offset, 1, what)[0]


def join_ranges(gpa: NDArray[np.uint64], offset: NDArray[np.uint64], size: NDArray[np.uint64]) -> list[Range]:
    """Return ranges that do not overlap, ascending by gpa, neighbours joined.

    Of ranges that overlap the one that begins first counts, of those that begin together the first one. None may wrap around.
    """
    order = np.argsort(gpa, kind="stable")
    order = order[size[order] != 0]
    if not order.size:
        return []
    gpa, offset, size = gpa[order], offset[order], size[order]
    end = gpa + size
    covered = np.maximum.accumulate(np.concatenate((np.zeros(1, np.uint64), end[:-1])))
    skip = np.where(covered > gpa, covered - gpa, np.uint64(0))
    kept = skip < size
    gpa, offset, end = gpa[kept] + skip[kept], offset[kept] + skip[kept], end[kept]
    first = np.ones(gpa.size, bool)
    first[1:] = (gpa[1:] != end[:-1]) | (offset[1:] - offset[:-1] != gpa[1:] - gpa[:-1])
    starts = np.flatnonzero(first)
    last = np.append(starts[1:], gpa.size) - 1
    return [Range(*row) for row in zip(gpa[starts].tolist(), offset[starts].tolist(), (end[last] - gpa[starts]).tolist(),
                                       strict=True)]


def _tell(damage: list[str], text: str) -> None:
    """Add a line to the damage, of which there are not many."""
    if len(damage) < _DAMAGE_MAX:
        damage.append(text)
    elif len(damage) == _DAMAGE_MAX:
        damage.append("there is more damage, which is not listed")


def joined(ranges: Iterable[Range], damage: list[str]) -> list[Range]:
    """Return ranges as a file tells them, clipped to 52 bits, as `join_ranges()` does. OUT damage: those that are left out."""
    found = []
    for gpa, offset, size in ranges:
        if offset + size > _OFFSET_LIMIT:
            _tell(damage, f"memory at {gpa:#x}, {size:#x} bytes at offset {offset:#x}, ends where no file has bytes; left out")
            continue
        if gpa + size > GPA_LIMIT:
            _tell(damage, f"memory at {gpa:#x} ends beyond 52 bits; what lies beyond is left out")
            size = max(0, int(GPA_LIMIT) - gpa)
        if size:
            found.append(Range(gpa, offset, size))
    columns = np.array(found, np.uint64).reshape(-1, 3)
    return join_ranges(columns[:, 0], columns[:, 1], columns[:, 2])


def _clipped(file: ImageFile, ranges: Iterable[Range], damage: list[str]) -> list[Range]:
    """Return the parts of ranges that the file has and a guest can address."""
    found = []
    for gpa, offset, size in ranges:
        if gpa + size > GPA_LIMIT:
            _tell(damage, f"memory at {gpa:#x} ends beyond 52 bits; what lies beyond is left out")
            size = max(0, int(GPA_LIMIT) - gpa)
        if offset + size > file.size:
            _tell(damage, f"the file ends at {file.size:#x}, within the memory at gpa {gpa:#x} (offset {offset:#x}, {size:#x} "
                          "bytes); what is missing is a hole")
            size = max(0, file.size - offset)
        if size:
            found.append(Range(gpa, offset, size))
    return found


def memory_of(file: ImageFile, ranges: Iterable[Range], damage: list[str]) -> GuestMemory:
    """Return guest memory over ranges of the mapped file, which do not overlap; ImageError if the file has none of them.

    Pages of which the file has a part are copied, the rest of them is zero; they take four times the size of the file at most, or
    16 MiB, and those beyond are left out. Memory whose words do not lie at multiples of 8 bytes
    in the file is read-only. OUT damage: what is missing.
    """
    parts: dict[int, NDArray[np.uint8]] = {}
    slots: list[tuple[int, Any]] = []
    most = max(_PARTIAL_MIN, _PARTIAL_PER_BYTE * file.size) // _PAGE
    left_out = 0
    for gpa, offset, size in _clipped(file, ranges, damage):
        first, end = -(-gpa // _PAGE) * _PAGE, (gpa + size) // _PAGE * _PAGE
        edges = [(gpa, min(first, gpa + size))] if first != gpa else []
        if end < gpa + size and end >= first:
            edges.append((end, gpa + size))
        for start, stop in edges:
            page = parts.get(start // _PAGE * _PAGE)
            if page is None:
                if len(parts) >= most:
                    left_out += 1
                    continue
                page = parts[start // _PAGE * _PAGE] = np.zeros(_PAGE, np.uint8)
            page[start % _PAGE:start % _PAGE + stop - start] = file.data[offset + start - gpa:offset + stop - gpa]
        if first < end:
            data = file.data[offset + first - gpa:offset + end - gpa]
            slots.append((first, data if (offset + first - gpa) % _ALIGNMENT == 0 else memoryview(data).toreadonly()))
    if left_out:
        damage.append(f"the file has parts of more than {most} pages, too many for its size; {left_out} parts are left out")
    slots += parts.items()
    if not slots:
        raise file.fail("there is no memory in it" + (f": {damage[0]}" if damage else ""))
    return GuestMemory.from_slots(slots)
