"""The flattened variant of a dump, which goes through pipes: pieces of a file, each with its place in it."""

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.images._file import ImageError, ImageFile, Range

__all__ = ["FLAT_SIGNATURE", "FlatFile", "is_flat"]

FLAT_SIGNATURE = b"makedumpfile"
_HEADER = np.dtype([("signature", "S16"), ("type", ">i8"), ("version", ">i8")])
_PIECE = np.dtype([("offset", ">i8"), ("size", ">i8")])
_FIRST_PIECE = 4096
_END = -1
_HOLES_MAX = 1 << 28


def is_flat(file: ImageFile) -> bool:
    """True if a file is a flattened one."""
    return file.data[:len(FLAT_SIGNATURE)].tobytes() == FLAT_SIGNATURE


class FlatFile:
    """A flattened file, put together from its pieces; it is read as an `ImageFile` is.

    Attributes
    ----------
    path : str
    size : int
        Of the file that they make up, in bytes.
    damage : list of str
    """

    def __init__(self, file: ImageFile) -> None:
        self.file, self.path = file, file.path
        header = file.item(_HEADER, 0, "the header of a flattened file")
        if header["type"] != 1 or header["version"] != 1:
            raise file.fail(f"a flattened file of type {header['type']}, version {header['version']}; want 1, 1", 16)
        self.damage: list[str] = []
        pieces = np.array(self._pieces(), np.uint64).reshape(-1, 3)     # place, where it lies, size
        order = np.argsort(pieces[:, 0], kind="stable")
        self._number = order                        # of pieces that overlap the later one counts
        self._place, self._at, self._length = pieces[order].T.copy()
        ends = self._place + self._length
        self._covered = np.maximum.accumulate(ends) if ends.size else ends
        self.size = int(self._covered[-1]) if ends.size else 0
        self._most = max(int(self._length.sum()), _HOLES_MAX)           # what is read at once, with holes between pieces

    def in_file(self, ranges: Iterable[Range], damage: list[str]) -> list[Range]:
        """Return where ranges of what the pieces make up lie in the file itself. OUT damage: what no piece has."""
        starts, at, ends = self._without_overlap()
        found: list[Range] = []
        for gpa, offset, size in ranges:
            stop, have = offset + size, 0
            first = int(np.searchsorted(ends, np.uint64(offset), "right"))
            last = int(np.searchsorted(starts, np.uint64(stop)))
            for i in range(first, last):
                begin, end = max(offset, int(starts[i])), min(stop, int(ends[i]))
                found.append(Range(gpa + begin - offset, int(at[i]) + begin - int(starts[i]), end - begin))
                have += end - begin
            if have < size:
                damage.append(f"the pieces of the file have {have:#x} of {size:#x} bytes of the memory at gpa {gpa:#x}; what is "
                              "missing is a hole")
        return found

    def _without_overlap(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Return start, place in the file, and end of parts of pieces: of pieces that overlap the later one counts."""
        place, ends = self._place, self._place + self._length
        if not (place[1:] < self._covered[:-1]).any():
            return place, self._at, ends
        rows: list[tuple[int, int, int]] = []
        active: list[tuple[int, int]] = []              # (- number, row), the later ones first
        borders = np.unique(np.concatenate((place, ends)))
        after = np.searchsorted(place, borders, "right").tolist()
        begun = 0
        for start, end, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), after[:-1], strict=True):
            for row in range(begun, stop):
                heappush(active, (-int(self._number[row]), row))
            begun = stop
            while active and int(ends[active[0][1]]) <= start:
                heappop(active)
            if active:
                top = active[0][1]
                rows.append((start, int(self._at[top]) + start - int(place[top]), end))
        table = np.array(rows, np.uint64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Return the pieces of the file in its order."""
        file, at = self.file, _FIRST_PIECE
        found: list[tuple[int, int, int]] = []
        while True:
            if file.size - at < _PIECE.itemsize:
                self.damage.append(f"at offset {at:#x}: the file ends without a mark of its end")
                return found
            place, size = (int(word) for word in file.item(_PIECE, at, "a piece"))
            if place == _END:
                return found
            at += _PIECE.itemsize
            if place < 0 or size <= 0 or place + size >= 1 << 62:
                self.damage.append(f"at offset {at - _PIECE.itemsize:#x}: a piece of {size:#x} bytes at {place:#x}; what follows "
                                   "is left out")
                return found
            if size > file.size - at:
                self.damage.append(f"at offset {at:#x}: the file has {file.size - at:#x} of {size:#x} bytes of a piece")
                size = file.size - at
            if size:
                found.append((place, at, size))
            at += size

    def fail(self, reason: str, offset: int | None = None) -> ImageError:
        """Return the error that says what is wrong; the offset is that in the file that the pieces make up."""
        return ImageError(self.path, reason + (" (of what the flattened file makes up)" if offset is not None else ""), offset)

    def bytes(self, offset: int, n: int, what: str) -> bytes:
        """Return n bytes; ImageError if they end beyond the last piece. What no piece has is zero."""
        if n > self._most:
            raise self.fail(f"{what} has {n:#x} bytes, more than all pieces", offset)
        if offset < 0 or offset > self.size or n > self.size - offset:
            raise self.fail(f"the file ends within {what}: {n:#x} bytes are wanted, and it has {self.size:#x}", offset)
        out = np.zeros(n, np.uint8)
        first = int(np.searchsorted(self._covered, np.uint64(offset), "right"))
        stop = int(np.searchsorted(self._place, np.uint64(offset + n)))
        for i in sorted(range(first, stop), key=lambda i: int(self._number[i])):
            place, at, length = int(self._place[i]), int(self._at[i]), int(self._length[i])
            start, end = max(offset, place), min(offset + n, place + length)
            if start < end:
                out[start - offset:end - offset] = self.file.data[at + start - place:at + end - place]
        return out.tobytes()

    def array(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """Return a copy of `count` items at an offset."""
        return np.frombuffer(self.bytes(offset, count * dtype.itemsize, what), dtype)

    def item(self, dtype: np.dtype[Any], offset: int, what: str) -> Any:
        """Return one item at an offset."""
        return self.array(dtype, offset, 1, what)[0]
