"""Memory of an object that has read(gpa, n): of a debugger, of another tool, of a live target."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.images.image import Image
from kvmmu.memory._memory import GuestMemory

__all__ = ["PhysicalReader", "open_reader"]

_PAGE = int(PAGE_SIZE)
_RUN = 1 << 10                              # pages that are read by one call


class PhysicalReader(Protocol):
    """Whatever reads guest-physical memory."""

    def read(self, gpa: int, n: int, /) -> Any:
        """Return n bytes at gpa; fewer if there are no more."""


def open_reader(reader: PhysicalReader, *, size: int | None = None,
                holes: type[BaseException] | tuple[type[BaseException], ...] = ()) -> Image:
    """Make an image of an object that reads guest-physical memory.

    Parameters
    ----------
    reader : object
        reader.read(gpa, n) returns n bytes, or fewer where memory ends.
    size : int, optional
        Bytes from 0 on that there are.
    holes : exception class, or tuple of them
        What it raises where there is no memory: such pages read as zero.
    """
    classes = holes if isinstance(holes, tuple) else (holes,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in classes):
        raise TypeError(f"holes: want an exception class, or a tuple of them, got {holes!r}")

    def read(gpas: NDArray[np.uint64]) -> NDArray[np.uint8]:
        pages = np.zeros((gpas.size, _PAGE), np.uint8)
        at = 0
        while at < gpas.size:
            stop = at + 1
            while stop < gpas.size and stop - at < _RUN and gpas[stop] - gpas[stop - 1] == _PAGE:
                stop += 1
            try:
                data = reader.read(int(gpas[at]), (stop - at) * _PAGE)
            except classes:
                for i in range(at, stop):
                    try:
                        data = reader.read(int(gpas[i]), _PAGE)
                    except classes:
                        continue
                    _fill(pages[i:i + 1], data)
            else:
                _fill(pages[at:stop], data)
            at = stop
        return pages

    return Image("", "reader", GuestMemory.from_callbacks(read, size=size))


def _fill(pages: NDArray[np.uint8], data: Any) -> None:
    try:
        got = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise TypeError(f"read: read(gpa, n) of an object has to return bytes or a contiguous buffer, got {type(data).__name__}"
                        ) from None
    if got.size > pages.size:
        raise ValueError(f"read: want {pages.size} bytes or fewer, got {got.size}")
    pages.reshape(-1)[:got.size] = got
