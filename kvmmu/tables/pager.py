"""Pager: demand paging, as a guest kernel's page-fault handler does it."""

import math
from collections.abc import Callable
from threading import Lock
from typing import Any, NoReturn
from weakref import WeakSet

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch._bits import GPA_LIMIT, MAXPHYADDR_MAX, MAXPHYADDR_MIN, PAGE_SIZE, Pte
from kvmmu.arch.arguments import check_int, check_name
from kvmmu.memory._memory import GuestMemory
from kvmmu.tables._filler import BEFORE_PROMOTION, OUT_OF_LARGE_FRAMES, OUT_OF_SMALL_FRAMES, PageFiller
from kvmmu.tables.layout import SEED_MAX, Frames, Page, check_layout
from kvmmu.tables.modes import MODES, Mode
from kvmmu.tables.page_tables import PageTables
from kvmmu.tables.rows import Rows, as_words

__all__ = ["Pager"]

_FIRST_SLOT = 1 << 20                   # bytes; each further slot for tables is twice as large
_TRIES = 16                              # of one row; it takes a frame for each level and for the page
_PAGES_AT_ONCE = 1 << 16                # "random" shuffles so many
_LEVELS = {"4k": 1, "thp": 1, "2m": 2, "1g": 3}
_claims = Lock()                        # of slots by pagers
_claimants: "WeakSet[Pager]" = WeakSet()


class Pager(PageTables):
    """Page tables that fill as a trace touches pages.

    Parameters
    ----------
    page : {"4k", "2m", "1g", "thp"}
        What a fault maps. "thp": 4K pages, until `thp_share` of those of a 2M region are mapped; then one 2M page replaces them,
        and their frames are free again. Under mode "32" large pages are 4M.
    frames : {"linear", "random"}
        Frames are given out in order, or shuffled.
    mode : {"32", "pae", "4l", "5l"}
        Format of the tables.
    mem : GuestMemory, optional
        Its largest slot, all of it, gives frames: for pages from the beginning, for tables from the end. Two pagers, or a pager
        and other `PageTables`, cannot share a slot. By default a new memory that grows with the tables, from 2**`maxphyaddr`
        downwards; pages lie from 0 upwards, where it has no bytes.
    thp_share : float
        For "thp": more than 0, at most 1.
    seed : int
        For "random".
    maxphyaddr : int
        Width of physical addresses (bits), for the memory made by default.

    Attributes
    ----------
    page, frames : str
        As given.
    faults : int
        First touches.
    pages, huge_pages : int
        Pages mapped now, of all sizes, and those larger than 4K.
    promotions : int
        4K pages of a region replaced by one large page.
    table_pages : int
        Frames of page tables, the root among them.

    Notes
    -----
    Pages can be read, written and executed by user and supervisor. Copy-on-write, the page cache and NUMA are not modelled.
    Threads may touch pages of one pager, and replay traces with it: the pages are those of all, and so are the counters.

    Examples
    --------
    >>> pager = Pager(page="thp")
    >>> pager.touch([0x7F0000001000, 0x7F0000001008, 0x400000])
    2
    """

    def __init__(self, page: Page = "4k", frames: Frames = "linear", *, mode: Mode = "4l", mem: GuestMemory | None = None,
                 thp_share: float = 0.5, seed: int = 0, maxphyaddr: int = 46) -> None:
        shape = check_layout(page, frames, mode, thp_share)
        check_name("mode", mode, ("32", "pae", "4l", "5l"))
        self.page, self.frames = page, frames
        seed = check_int("seed", seed, 0, SEED_MAX)
        self._random = np.random.default_rng(seed) if frames == "random" else None
        self._level = _LEVELS[page]
        self._threshold = max(1, math.ceil(thp_share * (1 << shape.large_shift - 12))) if page == "thp" else 0
        self._small = next(size for size, level in shape.sizes.items() if level == self._level)
        self._large = 1 << shape.large_shift
        top = min(shape.below, 1 << check_int("maxphyaddr", maxphyaddr, MAXPHYADDR_MIN, MAXPHYADDR_MAX))
        self._edited = False            # by map(), unmap() or protect(), which the counters of pages do not follow
        if mem is None:
            self._region = _growing_region(top)
            super().__init__(self._region.mem, mode, frames=self._region)
            return
        with _claims:
            self._region = _region_of(mem)
            self._slot = tuple(self._region.place[:2])
            for other in _claimants:
                if other.mem is mem and other._slot[0] < self._slot[1] and self._slot[0] < other._slot[1]:
                    raise ValueError(f"mem: another Pager takes frames from its slot at {self._slot[0]:#x}; want that pager, or "
                                     "a memory without one")
            super().__init__(mem, mode, frames=self._region)
            _claimants.add(self)

    @classmethod
    def for_addresses(cls, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a pager maps addresses as they are touched."""
        raise TypeError("for_addresses: a Pager maps pages as they are touched; want PageTables.for_addresses(), or touch(gva)")

    def __repr__(self) -> str:
        return f"Pager({self.page!r}, {self.frames!r}, mode={self.mode!r}: {self.faults} faults, {self.pages} pages)"

    def _shape_and_state(self) -> dict[str, Any]:
        """Return what two pagers must have in common to go on alike, as plain data for JSON."""
        state = None if self._random is None else self._random.bit_generator.state
        return {"page": self.page, "frames": self.frames, "mode": self.mode, "threshold": self._threshold,
                "random": None if state is None else repr(state), "faults": self.faults, "pages": self.pages,
                "tables": self.table_pages, "root": self.root, "frame": self._region.place}

    def _make_builder(self, keeps_stores: bool) -> PageFiller:
        shape = MODES[self.mode]
        self._filler = PageFiller(
            self.mem, shape.format, shape.levels, max(shape.sizes.values()), shape.fixed_level, keeps_stores, self._level,
            self._threshold, shape.addr_bits, shape.signed, int(Pte.PRESENT | Pte.WRITABLE | Pte.USER))
        return self._filler

    @property
    def faults(self) -> int:
        return self._filler.faults

    @property
    def pages(self) -> int:
        return sum(self._page_counts())

    @property
    def huge_pages(self) -> int:
        return self._page_counts()[1]

    def _page_counts(self) -> tuple[int, int]:
        """Return how many 4K pages are mapped, and how many larger ones: counters, or what the tables say if they were edited."""
        if not self._edited:
            small, large = self._filler.small_pages, self._filler.large_pages
            return (small, large) if self._level == 1 else (0, small + large)
        with self._lock:
            entries, large = self._present_entries([self.root]), 0
            for level in range(self._shape.levels, 1, -1):
                pages = entries & np.uint64(Pte.PAGE_SIZE if level in self._shape.sizes.values() else 0) != 0
                large += int(np.count_nonzero(pages))
                entries = self._present_entries((entries[~pages] & np.uint64(GPA_LIMIT - PAGE_SIZE)).tolist())
            return entries.size, large

    def _present_entries(self, tables: list[int]) -> NDArray[np.uint64]:
        data = b"".join(self.mem.read(table, PAGE_SIZE) for table in tables)
        entries: NDArray[np.uint64] = np.frombuffer(data, "<u4" if self.mode == "32" else "<u8").astype(np.uint64)
        present: NDArray[np.uint64] = entries[entries & np.uint64(Pte.PRESENT) != 0]
        return present

    def _run(self, kernel: Callable[[int], tuple[int, int]], rows: Rows) -> None:
        self._edited = True
        super()._run(kernel, rows)

    @property
    def promotions(self) -> int:
        return self._filler.replaced

    @property
    def table_pages(self) -> int:
        return len(self._own)

    def touch(self, gva: ArrayLike, size: NDArray[np.uint8] | None = None) -> int:
        """Touch addresses, and map the pages that no page maps yet.

        Parameters
        ----------
        gva : array of integers, shape (n,)
            Linear addresses (bytes). Those that are not canonical are passed over; in modes "32" and "pae" they have 32 bits.
        size : ndarray of uint8, shape (n,), optional
            Bytes of each access; one that reaches into the next page touches both. By default 1.

        Returns
        -------
        int
            How many faults that took.

        Raises
        ------
        MemoryError
            No frames are left; the rows before are mapped.
        ValueError, TypeError
            A wider address, or sizes that are no such array. Nothing was mapped.
        """
        addr, bits = as_words("gva", gva), self._shape.addr_bits
        if not self._shape.signed and addr.size and int(addr.max()) >> bits:
            row = int(np.argmax(addr >> np.uint64(bits) != 0))
            raise ValueError(f"gva: {int(addr[row]):#x} (row {row}) is wider than the {bits} bits of mode {self.mode!r}")
        if size is not None:
            size = _checked_sizes(size, addr.size)
        with self._lock:
            before = self.faults
            self._touch(addr, size, 0, addr.size)
            return self.faults - before

    def _touch_until_promotion(self, addr: NDArray[np.uint64], size: NDArray[np.uint8] | None, start: int) -> int:
        """Touch addresses from row `start` on, up to one that makes a large page replace small ones.

        What rows before that one translate to is the same behind this call as when they were touched: faults add pages.

        Returns
        -------
        int
            The first row that was not touched. Row `start` always is, whatever it makes.
        """
        with self._lock:
            return self._touch(addr, size, start, start + 1)

    def _touch(self, addr: NDArray[np.uint64], size: NDArray[np.uint8] | None, done: int, pauses_from: int) -> int:
        before, tries = (-1, -1, -1), 0
        while True:
            done, status = self._settle(*self._filler.touch_rows(addr, size, done, pauses_from))
            if status == BEFORE_PROMOTION:
                return done
            now = done, self.faults, self._filler.made
            before, tries = now, tries + 1 if now == before else 0
            if tries > _TRIES:                          # pages and tables take the last frames from each other
                raise MemoryError(f"no frames are left for pages and page tables after {self.faults:,} faults")
            if status in (OUT_OF_SMALL_FRAMES, OUT_OF_LARGE_FRAMES):
                self._supply_pages(status == OUT_OF_LARGE_FRAMES)
            elif not self._wants_frames(status):
                break
            elif not self._supply():
                raise MemoryError(f"no frame is left for page tables after {self.faults:,} faults")
        self._finish(done, status, f"{int(addr[done]):#x}" if done < addr.size else "")
        return done

    def _supply(self) -> bool:
        return super()._supply() or self._reclaim() and super()._supply()

    def _supply_pages(self, large: bool) -> None:
        size = self._large if large else self._small
        frames = self._region.take_pages(_PAGES_AT_ONCE, size)
        if not frames.size and self._reclaim():
            frames = self._region.take_pages(1, size)
        if not frames.size:
            raise MemoryError(f"no frame is left for pages after {self.faults:,} faults")
        if self._random is not None:
            self._random.shuffle(frames)
        self._filler.supply_pages(np.ascontiguousarray(frames[::-1]), large)

    def _reclaim(self) -> bool:
        """Take unused frames back from both pools; from now on they are given out one by one. False: there are none."""
        unused = self._filler.take_pool()
        self._own.difference_update(unused)
        if self._small == PAGE_SIZE:
            unused += self._filler.take_pages()
        self._region.give(unused)
        self._at_once = 1
        return bool(unused)


class _Region:
    """Frames of a range of physical memory: for pages from the beginning, for tables from the end."""

    def __init__(self, mem: GuestMemory, low: int, high: int, backed: int) -> None:
        self.mem = mem
        self._low, self._high = low, high
        self._backed = backed           # memory has bytes from here up
        self._returned: list[int] = []

    @property
    def place(self) -> list[int]:
        """The place from which the next frames are taken."""
        return [self._low, self._high, self._backed]

    def take(self, n: int) -> list[int]:
        frames = [self._returned.pop() for _ in range(min(n, len(self._returned)))]
        while len(frames) < n and self._high - self._low >= PAGE_SIZE:
            self._high -= PAGE_SIZE
            if self._high < self._backed:
                size = min(2 * sum(slot[1] for slot in self.mem.slots), self._backed)
                self._backed -= size
                self.mem.add_slot(self._backed, size)
            frames.append(self._high)
        return frames

    def give(self, frames: list[int]) -> None:
        self._returned += frames

    def take_pages(self, n: int, size: int) -> NDArray[np.uint64]:
        """Up to n frames of a page size, ascending; of those that were returned only if no others are left."""
        first = -(-self._low // size) * size
        count = max(0, min(n, (self._high - first) // size))
        if not count and size == PAGE_SIZE and self._returned:
            return np.array([self._returned.pop()], np.uint64)
        self._low = first + count * size if count else self._low
        return np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(size)


def _checked_sizes(size: Any, n: int) -> NDArray[np.uint8]:
    if not isinstance(size, np.ndarray):
        raise TypeError(f"size: want an ndarray of uint8 or None, got {type(size).__name__}")
    if size.dtype != np.uint8 or size.shape != (n,):
        raise ValueError(f"size: want uint8 of shape ({n},), got {size.dtype} of shape {size.shape}")
    return np.ascontiguousarray(size)


def _growing_region(top: int) -> _Region:
    pages = np.arange(top - _FIRST_SLOT, top, PAGE_SIZE, dtype=np.uint64)
    return _Region(GuestMemory.from_pages(pages, np.zeros((pages.size, PAGE_SIZE), np.uint8)), 0, top, top - _FIRST_SLOT)


def _region_of(mem: GuestMemory) -> _Region:
    if not isinstance(mem, GuestMemory):
        raise TypeError(f"mem: want a GuestMemory or None, got {type(mem).__name__}")
    first, size, _ = max((slot for slot in mem.slots if not slot[2]), key=lambda slot: slot[1], default=(0, 0, True))
    return _Region(mem, first, first + size, first)
