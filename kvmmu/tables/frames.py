"""Sources of the frames of page tables."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.memory._memory import GuestMemory

__all__ = ["FrameList", "FrameSource", "FreeFrames", "ListedFrames", "frame_source"]

FrameList = range | Sequence[int] | NDArray[np.integer]

_ZERO_PAGE = bytes(PAGE_SIZE)


@runtime_checkable
class FrameSource(Protocol):
    """An allocator of page frames. Frames are guest-physical addresses in bytes."""

    def take(self, n: int) -> list[int]:
        """Return up to n frames, in the order in which they are to be used; fewer if no more are left."""

    def give(self, frames: list[int]) -> None:
        """Take frames back."""


class FreeFrames:
    """Frames of a memory that hold zeros, from the last one downwards.

    Parameters
    ----------
    mem : GuestMemory
    keep : iterable of (int, int)
        Ranges (first address, address behind the last byte) that are not taken.
    below : int
        Frames from this address up are not taken.

    Notes
    -----
    Read-only slots are passed over. A frame is looked at when it is taken: what holds data by then is not taken.
    """

    def __init__(self, mem: GuestMemory, keep: Iterable[tuple[int, int]] = (),
                 below: int = GPA_LIMIT) -> None:
        self._mem = mem
        self._keep = sorted(keep)
        self._returned: list[int] = []
        self._next = below                      # what lies from here up was looked at

    def take(self, n: int) -> list[int]:
        frames = [self._returned.pop() for _ in range(min(n, len(self._returned)))]
        for first, size, readonly in reversed(self._mem.slots):
            if len(frames) == n:
                break
            if not readonly and first < self._next:
                self._scan(first, min(first + size, self._next), n, frames)
        return frames

    def _scan(self, first: int, end: int, n: int, frames: list[int]) -> None:
        """Take free frames of [first, end), from its end."""
        while end > first and len(frames) < n:
            end -= PAGE_SIZE
            self._next = end
            kept = next((low for low, high in self._keep if low < end + PAGE_SIZE and end < high), None)
            if kept is not None:
                end = max(first, kept // PAGE_SIZE * PAGE_SIZE)
                self._next = end
            elif self._mem.read(end, PAGE_SIZE) == _ZERO_PAGE:
                frames.append(end)

    def give(self, frames: list[int]) -> None:
        self._returned += frames


class ListedFrames:
    """Frames of a list, in its order.

    Parameters
    ----------
    frames : range, sequence or array of int
        Page-aligned guest-physical addresses (bytes), each once.

    Raises
    ------
    ValueError
        An address that is unaligned, beyond 52 bits or listed twice.
    """

    def __init__(self, frames: FrameList) -> None:
        listed = frames if isinstance(frames, range) else _checked_list(frames)
        if isinstance(listed, range):
            if len(listed) > 1 and listed.step % PAGE_SIZE:
                raise ValueError(f"frames: {listed} has a step of {listed.step:#x}, want a multiple of {PAGE_SIZE:#x}")
            _check_frames(np.array([*listed[:1], *listed[-1:]], np.int64))
        self._listed = listed
        self._used = 0
        self._returned: list[int] = []

    def take(self, n: int) -> list[int]:
        frames = [self._returned.pop() for _ in range(min(n, len(self._returned)))]
        more = self._listed[self._used:self._used + n - len(frames)]
        self._used += len(more)
        return frames + [int(frame) for frame in more]

    def give(self, frames: list[int]) -> None:
        self._returned += frames


def _checked_list(frames: FrameList) -> NDArray[np.int64]:
    listed = np.asarray(frames)
    if listed.ndim != 1 or listed.dtype.kind not in "ui" and listed.size:
        raise TypeError(f"frames: want a range, a sequence of addresses or an object with take() and give(), got {frames!r}")
    _check_frames(listed)
    if np.unique(listed).size != listed.size:
        raise ValueError("frames: an address is listed twice")
    return listed.astype(np.int64)


def _check_frames(frames: NDArray[np.integer]) -> None:
    bad = (frames < 0) | (frames >= GPA_LIMIT) | (frames % PAGE_SIZE != 0)
    if bad.any():
        raise ValueError(f"frames: {int(frames[np.argmax(bad)]):#x} is no page-aligned address of 52 bits")


def frame_source(frames: FrameSource | FrameList | None, mem: GuestMemory, below: int) -> FrameSource:
    """Make an allocator of what a caller gave for `frames`; None takes the free frames of the memory below an address."""
    if frames is None:
        return FreeFrames(mem, below=below)
    if isinstance(frames, FrameSource):
        return frames
    return ListedFrames(frames)
