"""Files that cannot be mapped, such as /proc/kcore: read where somebody looks."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.images._file import ImageError, ImageFile, Range
from kvmmu.memory._memory import GuestMemory

__all__ = ["UnmappedFile", "open_file"]

_PAGE = int(PAGE_SIZE)
_READ_MAX = 1 << 30
_OFFSET_MAX = (1 << 63) - 1


class UnmappedFile:
    """A file that is read by pieces; to be used as an `ImageFile` is.

    Attributes
    ----------
    path : str
    size : int
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open(path, "rb", buffering=0)      # noqa: SIM115    # as long as there is memory of it
        self.size = os.fstat(self._file.fileno()).st_size

    def fail(self, reason: str, offset: int | None = None) -> ImageError:
        """Return the error that says what is wrong with the file."""
        return ImageError(self.path, reason, offset)

    def bytes(self, offset: int, n: int, what: str) -> bytes:
        """Return n bytes; ImageError if the file ends before."""
        if offset < 0 or n > _READ_MAX:
            raise self.fail(f"{what} has {n:#x} bytes; {_READ_MAX:#x} are read at most", offset)
        if offset > _OFFSET_MAX - n:
            raise self.fail(f"{what} would lie where no file has bytes", offset)
        found = b""
        while len(found) < n:
            part = os.pread(self._file.fileno(), n - len(found), offset + len(found))
            if not part:
                raise self.fail(f"the file ends within {what}: {n:#x} bytes are wanted", offset)
            found += part
        return found

    def array(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """Return a copy of `count` items at an offset."""
        return np.frombuffer(self.bytes(offset, count * dtype.itemsize, what), dtype)

    def item(self, dtype: np.dtype[Any], offset: int, what: str) -> Any:
        """Return one item at an offset."""
        return self.array(dtype, offset, 1, what)[0]

    def memory(self, ranges: list[Range]) -> GuestMemory:
        """Return guest memory over ranges of whole pages, which do not overlap, ascending; a page that cannot be read is zero."""
        starts = np.array([each.gpa for each in ranges], np.uint64)

        def read(gpas: NDArray[np.uint64]) -> NDArray[np.uint8]:
            pages = np.zeros((gpas.size, _PAGE), np.uint8)
            for i, place in enumerate((np.searchsorted(starts, gpas, "right") - 1).tolist()):
                gpa, offset, size = ranges[place] if place >= 0 else Range(0, 0, 0)
                at = int(gpas[i]) - gpa
                if at < size:
                    data = os.pread(self._file.fileno(), min(_PAGE, size - at), offset + at)
                    pages[i, :len(data)] = np.frombuffer(data, np.uint8)
            return pages

        if not ranges:
            raise self.fail("there is no memory in it")
        return GuestMemory.from_callbacks(read, size=-(-(ranges[-1].gpa + ranges[-1].size) // _PAGE) * _PAGE)


def open_file(path: str | os.PathLike[str]) -> ImageFile | UnmappedFile:
    """Map a file, or open it if it cannot be mapped."""
    try:
        return ImageFile(path)
    except (OSError, ValueError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ImageError)):
            raise
        return UnmappedFile(path)
