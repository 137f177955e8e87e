"""Choose the pages that the addresses of a trace need, and the frames that those pages get."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch._bits import PAGE_SIZE
from kvmmu.arch.arguments import check_int, check_name
from kvmmu.memory._memory import GuestMemory
from kvmmu.tables._page_set import PageSet
from kvmmu.tables.frames import FreeFrames
from kvmmu.tables.modes import MODES, ModeShape
from kvmmu.tables.rows import Rows, as_words

__all__ = ["Frames", "Page", "Plan", "check_layout", "plan_tables"]

Page = Literal["4k", "2m", "1g", "thp"]
Frames = Literal["linear", "random"]
PageLayout = dict[int, NDArray[np.uint64]]      # page size in bytes: addresses of such pages, ascending

_SHIFTS = {"4k": 12, "2m": 21, "1g": 30}
_2M_SHIFT = 21
SEED_MAX = (1 << 64) - 1


def layout_pages(pages: NDArray[np.uint64], page: str, thp_share: float, large_shift: int = _2M_SHIFT) -> PageLayout:
    """Choose the pages that map the 4K pages of a trace.

    Parameters
    ----------
    pages : ndarray of uint64
        Numbers of the 4K pages that are touched, ascending, each once.
    page : {"4k", "2m", "1g", "thp"}
        Pages of one size, or 2M pages where enough of their 4K pages are touched, and 4K pages elsewhere.
    thp_share : float
        For "thp": the least share of the 4K pages of a 2M region.
    large_shift : int
        22 where pages of 2M are 4M.
    """
    addr = pages << np.uint64(12)
    if page != "thp":
        shift = np.uint64(large_shift if page == "2m" else _SHIFTS[page])
        return {1 << int(shift): np.unique(addr >> shift) << shift}
    region, first, touched = np.unique(addr >> np.uint64(large_shift), return_inverse=True, return_counts=True)
    large = touched >= thp_share * (1 << large_shift - 12)
    return {1 << large_shift: region[large] << np.uint64(large_shift), PAGE_SIZE: addr[~large[first]]}


def layout_frames(layout: PageLayout, base: int, frames: str, seed: int) -> PageLayout:
    """Choose frames for pages: from base upwards, the largest pages first, and within a size ascending or in random order.

    Returns
    -------
    dict of int to ndarray of uint64
        Guest-physical addresses by page size, in the order of the layout's pages.
    """
    rng = np.random.default_rng(check_int("seed", seed, 0, SEED_MAX))
    placed: PageLayout = {}
    at = base
    for size in sorted(layout, reverse=True):
        n = layout[size].size
        at = -(-at // size) * size
        order = rng.permutation(n) if frames == "random" else np.arange(n)
        placed[size] = np.uint64(at) + order.astype(np.uint64) * np.uint64(size)
        at += n * size
    return placed


def frames_end(layout: PageLayout, base: int) -> int:
    """The address behind the last frame that `layout_frames()` gives out."""
    at = base
    for size in sorted(layout, reverse=True):
        at = -(-at // size) * size + layout[size].size * size
    return at


def tables_needed(layout: PageLayout, table_shifts: list[int]) -> int:
    """Count the tables that map a layout.

    Parameters
    ----------
    layout : dict of int to ndarray
    table_shifts : list of int
        For each level above the root's, from the lowest: the shift of the address range that one table of it covers.
    """
    total = 1
    for shift in table_shifts:
        regions = [addr >> np.uint64(shift) for size, addr in layout.items() if size < 1 << shift]
        total += np.unique(np.concatenate(regions)).size if regions else 0
    return total


def check_layout(page: str, frames: str, mode: str, thp_share: float) -> ModeShape:
    """Refuse a choice of pages that there is not."""
    check_name("mode", mode, MODES)
    shape = MODES[mode]
    check_name("page", page, ("4k", "2m", "1g", "thp"))
    if page == "1g" and 3 not in shape.sizes.values():
        raise ValueError(f"page: mode {mode!r} has no 1G pages")
    check_name("frames", frames, ("linear", "random"))
    if isinstance(thp_share, bool) or not isinstance(thp_share, (int, float)):
        raise TypeError(f"thp_share: want a number, got {thp_share!r}")
    if not 0 < thp_share <= 1:
        raise ValueError(f"thp_share: want more than 0 and at most 1, got {thp_share!r}")
    return shape


class Plan(NamedTuple):
    """The places of the pages of a trace and of their tables.

    Attributes
    ----------
    mem : GuestMemory
    source : FreeFrames
        Frames for tables.
    pages, frames : dict of int to ndarray of uint64
        Linear addresses of the pages, and the frames that they get, by page size (bytes).
    """

    mem: GuestMemory
    source: FreeFrames
    pages: PageLayout
    frames: PageLayout


def plan_tables(mem: GuestMemory | None, gva: ArrayLike | PageSet, page: str, frames: str, seed: int, mode: str,
                thp_share: float) -> Plan:
    """Plan the tables of `PageTables.for_addresses()`, which documents the parameters."""
    if mem is not None and not isinstance(mem, GuestMemory):
        raise TypeError(f"mem: want a GuestMemory or None, got {type(mem).__name__}")
    shape = check_layout(page, frames, mode, thp_share)
    if isinstance(gva, PageSet):
        touched = gva
    else:
        touched = PageSet()
        touched.add(as_words("gva", gva))
    layout = layout_pages(touched.pages(), page, thp_share, shape.large_shift)
    for size, addr in layout.items():
        Rows(shape, addr, size)                 # refuses addresses that the mode has not
    tables = tables_needed(layout, shape.table_shifts) + shape.fixed_tables - 1
    if mem is None:
        mem = GuestMemory(tables * PAGE_SIZE)
        base = tables * PAGE_SIZE
        source = FreeFrames(mem)
    else:
        base, room, _ = max((slot for slot in mem.slots if not slot[2]), key=lambda slot: slot[1], default=(0, 0, True))
        need = frames_end(layout, base) + tables * PAGE_SIZE - base
        if need > room:
            raise ValueError(f"mem: the pages and their {tables:,} tables take {need:#x} bytes of one slot that can be written, "
                             f"the largest has {room:#x}")
        source = FreeFrames(mem, keep=[(base, frames_end(layout, base))], below=shape.below)
    if frames_end(layout, base) > shape.below:
        raise ValueError(f"mode: the pages of the trace end at {frames_end(layout, base):#x}; entries of mode {mode!r} reach "
                         f"{shape.below:#x}")
    return Plan(mem, source, layout, layout_frames(layout, base, frames, seed))
