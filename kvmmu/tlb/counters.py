"""Counters of TLB hierarchies, and what they tell of misses."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.arguments import check_int

__all__ = ["KINDS", "MISS_CLASSES", "MODES", "PAGES", "Kind", "PageSize", "TlbDetails", "TlbStats", "details_of", "miss_curve",
           "sum_of"]

Kind = Literal["load", "store", "fetch"]
PageSize = Literal["4k", "2m", "1g"]
KINDS: tuple[Kind, ...] = ("load", "store", "fetch")
PAGES: tuple[PageSize, ...] = ("4k", "2m", "1g")                      # "2m": pages of 4 MiB, too, in 32-bit paging
MISS_CLASSES = ("compulsory", "capacity", "conflict", "removed")
MODES = {"32": (2, 10, 22), "pae": (2, 9, 21), "4l": (4, 9, 21), "5l": (5, 9, 21)}     # root level, index bits, large shift
_LINEAR_BITS = {"4l": 48, "5l": 57}             # of the signed ones
_MOST_ROWS = 1 << 48
_PAGE_BITS = 45                                 # of a key; the size is above


@dataclass(frozen=True, eq=False, repr=False)
class TlbDetails:
    """The causes of the misses of a TLB hierarchy.

    A level is asked for a page and misses it. The miss is "compulsory" if the level was never asked for that page before,
    "removed" if an invalidation has dropped the page since, "capacity" if a fully associative LRU level of as many entries, asked
    for the same pages, misses it as well, and "conflict" if that one does not.

    Attributes
    ----------
    misses : ndarray of uint64, shape (levels, 4)
        By level and class: compulsory, capacity, conflict, removed.
    walks_by_refs : ndarray of uint64, shape (6,)
        Walks by the number of paging-structure entries that they read.
    pages : ndarray of uint64, shape (n, 3)
        A row per page that walks were for: its linear address, its size (0 4k, 1 2m, 2 1g), walks. The most walks first.
    ips : ndarray of uint64, shape (n, 2) or None
        A row per instruction whose accesses took walks: its address, walks. None without addresses of instructions.
    distances : ndarray of uint64 or None
        Accesses by their stack distance; None if it is not asked for.
    first_uses, after_removals : int
        Accesses that have no distance: to a page for the first time, or for the first time since an invalidation.
    """

    misses: NDArray[np.uint64]
    walks_by_refs: NDArray[np.uint64]
    pages: NDArray[np.uint64]
    ips: NDArray[np.uint64] | None
    distances: NDArray[np.uint64] | None = None
    first_uses: int = 0
    after_removals: int = 0

    def top_pages(self, count: int = 10) -> list[dict[str, Any]]:
        """Return the pages with the most walks: their address, page size and walks."""
        count = check_int("count", count, 0, _MOST_ROWS)
        return [{"gva": gva, "page": PAGES[size], "walks": walks} for gva, size, walks in self.pages[:count].tolist()]

    def top_ips(self, count: int = 10) -> list[dict[str, int]] | None:
        """Return the instructions with the most walks; None if the accesses have no addresses of instructions."""
        count = check_int("count", count, 0, _MOST_ROWS)
        return None if self.ips is None else [{"ip": ip, "walks": walks} for ip, walks in self.ips[:count].tolist()]

    def curve(self) -> NDArray[np.uint64]:
        """Return the misses of fully associative LRU TLBs of 0, 1, 2 ... entries, until more entries save none.

        Raises
        ------
        ValueError
            No stack distances were asked for.
        """
        if self.distances is None:
            raise ValueError("curve: the hierarchy has no stack distances; want one made with curve=True")
        return miss_curve(self.distances, self.first_uses + self.after_removals)


def miss_curve(distances: NDArray[np.uint64], always: int) -> NDArray[np.uint64]:
    """Return the misses by number of entries, from 0 on: accesses of a larger distance, and those that miss at any size."""
    counts = distances if distances.size else np.zeros(1, np.uint64)
    misses: NDArray[np.uint64] = np.uint64(always) + counts.sum() - np.cumsum(counts)
    return misses


@dataclass(frozen=True, eq=False, repr=False)
class TlbStats:
    """Counters of a TLB hierarchy.

    Attributes
    ----------
    names : tuple of str
        Of the levels.
    hits : ndarray of uint64, shape (levels, 3, 2, 3)
        Accesses that a level served: by kind (load, store, fetch), user mode (no, yes), page size (4k, 2m, 1g).
    walks : ndarray of uint64, shape (3, 2, 3)
        Accesses that no level served.
    guest_refs : int
        Paging-structure entries that the walks read.
    psc_hits : dict of int to int
        Walks that a paging-structure cache shortened, by the level of the cached entry (2: PDE ... 5: PML5E).
    replaced : tuple of int
        Entries that each level replaced.
    unmapped : int
        Rows without a page, which asked no level.
    cached_refs : int
        Paging-structure entries that the walks did not read because a paging-structure cache had what they lead to.
    details : TlbDetails or None
        None if the hierarchy keeps none.
    host_refs : int
        Entries of the host's tables that walks read, under two-dimensional paging.
    host_cached_refs : int
        Those that they did not read because of a paging-structure cache of the host's tables.
    host_hits : dict of str to int
        Translations of guest-physical addresses that a nested TLB served, by its name.
    host_walks : int
        Those that it did not.
    walks_by_all_refs : ndarray of uint64 or None
        Walks by the number of entries that they read in both stages; None with one stage.
    """

    names: tuple[str, ...]
    hits: NDArray[np.uint64]
    walks: NDArray[np.uint64]
    guest_refs: int
    psc_hits: dict[int, int] = field(default_factory=dict)
    replaced: tuple[int, ...] = ()
    unmapped: int = 0
    cached_refs: int = 0
    details: "TlbDetails | None" = None
    host_refs: int = 0
    host_cached_refs: int = 0
    host_hits: dict[str, int] = field(default_factory=dict)
    host_walks: int = 0
    walks_by_all_refs: NDArray[np.uint64] | None = None

    def under_host(self, host: "TlbStats", by_refs: NDArray[np.uint64]) -> "TlbStats":
        """Return these counters with those of the host's translations."""
        if not isinstance(host, TlbStats):
            raise TypeError(f"host: want a TlbStats, got {type(host).__name__}")
        if not isinstance(by_refs, np.ndarray):
            raise TypeError(f"by_refs: want an ndarray of uint64, got {type(by_refs).__name__}")
        hits = {name: int(hits.sum()) for name, hits in zip(host.names, host.hits, strict=True)}
        return replace(self, host_refs=host.guest_refs, host_cached_refs=host.cached_refs, host_hits=hits,
                       host_walks=int(host.walks.sum()), walks_by_all_refs=by_refs)

    @property
    def accesses(self) -> int:
        """Accesses to pages."""
        return int(self.hits.sum() + self.walks.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: levels (name, hits, replaced), walks, by kind, mode and size, and references."""
        def by(counts: NDArray[np.uint64]) -> dict[str, dict[str, int]]:
            return {"kinds": dict(zip(KINDS, counts.sum(axis=(1, 2)).tolist(), strict=True)),
                    "modes": dict(zip(("supervisor", "user"), counts.sum(axis=(0, 2)).tolist(), strict=True)),
                    "pages": dict(zip(PAGES, counts.sum(axis=(0, 1)).tolist(), strict=True))}

        levels = [{"name": name, "hits": int(hits.sum()), "replaced": replaced} | by(hits)
                  for name, hits, replaced in zip(self.names, self.hits, self.replaced, strict=True)]
        found = {"accesses": self.accesses, "levels": levels, "walks": int(self.walks.sum()), "walks_by": by(self.walks),
                 "guest_refs": self.guest_refs, "cached_refs": self.cached_refs,
                 "psc_hits": {str(level): hits for level, hits in self.psc_hits.items()}, "unmapped": self.unmapped}
        if self.walks_by_all_refs is not None:
            found |= {"host_refs": self.host_refs, "host_cached_refs": self.host_cached_refs, "host_hits": self.host_hits,
                      "host_walks": self.host_walks, "walks_by_all_refs": self.walks_by_all_refs.tolist()}
        if self.details is None:
            return found
        for level, misses in zip(levels, self.details.misses.tolist(), strict=True):
            level["misses"] = dict(zip(MISS_CLASSES, misses, strict=True))
        return found | {"walks_by_refs": self.details.walks_by_refs.tolist(), "top_pages": self.details.top_pages(),
                        "top_ips": self.details.top_ips()}

    def __repr__(self) -> str:
        hits = ", ".join(f"{name} {int(hits.sum())}" for name, hits in zip(self.names, self.hits, strict=True))
        return f"TlbStats({self.accesses} accesses: {hits}{', ' if hits else ''}walks {int(self.walks.sum())})"

    def __str__(self) -> str:
        accesses = max(self.accesses, 1)
        rows = [(name, int(hits.sum())) for name, hits in zip(self.names, self.hits, strict=True)]
        rows.append(("page walks", int(self.walks.sum())))
        width = max(len(name) for name, _ in rows)
        lines = [f"{self.accesses:,} accesses"]
        lines += [f"  {name:{width}}  {count:>16,}  {100 * count / accesses:6.2f}%" for name, count in rows]
        walks = rows[-1][1]
        lines.append(f"  {self.guest_refs:,} entries read" + (f", {self.guest_refs / walks:.2f} per walk" if walks else ""))
        if self.cached_refs:
            lines.append(f"  {self.cached_refs:,} entries served by paging-structure caches")
        return "\n".join(lines)


def details_of(found: dict[str, Any] | None, mode: str) -> TlbDetails | None:
    """Return the details that a core counted. IN mode: the paging mode in force, for the sizes of pages."""
    if found is None:
        return None
    ips = found["ips"]
    return TlbDetails(found["misses"], found["by_references"], _pages_of(found["pages"], mode),
                      None if ips is None else ips[np.lexsort((ips[:, 0], ~ips[:, 1]))], found["distances"], found["first_uses"],
                      found["after_removals"])


def _pages_of(counted: NDArray[np.uint64], mode: str) -> NDArray[np.uint64]:
    """Return (address, size, walks) for rows of (key, walks), the most walks first, then by address."""
    key, walks = counted[:, 0], counted[:, 1]
    size = key >> np.uint64(_PAGE_BITS)
    shifts = np.array((12, MODES[mode][2], 30), np.uint64)[size.astype(np.intp)]
    gva = (key & np.uint64((1 << _PAGE_BITS) - 1)) << shifts
    width = _LINEAR_BITS.get(mode)
    if width is not None:
        gva |= np.where(gva >> np.uint64(width - 1) & np.uint64(1), np.uint64((1 << 64) - (1 << width)), np.uint64(0))
    pages = np.column_stack((gva, size, walks))
    return pages[np.lexsort((size, gva, ~walks))]


def sum_of(stats: list[TlbStats]) -> TlbStats:
    """Return the sum of the counters of hierarchies of the same levels."""
    if len(stats) == 1:
        return stats[0]
    first = stats[0]
    details = [one.details for one in stats if one.details is not None]
    return TlbStats(
        first.names, sum((one.hits for one in stats), np.zeros_like(first.hits)),
        sum((one.walks for one in stats), np.zeros_like(first.walks)), sum(one.guest_refs for one in stats),
        {level: sum(one.psc_hits[level] for one in stats) for level in first.psc_hits},
        tuple(sum(counts) for counts in zip(*(one.replaced for one in stats), strict=True)), sum(one.unmapped for one in stats),
        sum(one.cached_refs for one in stats), _sum_of_details(details) if details else None)


def _sum_of_details(details: list[TlbDetails]) -> TlbDetails:
    counted = [one.distances for one in details if one.distances is not None]
    distances = np.zeros(max((one.size for one in counted), default=0), np.uint64)
    for one in counted:
        distances[:one.size] += one
    ips = [one.ips for one in details if one.ips is not None]
    return TlbDetails(
        np.sum([one.misses for one in details], axis=0, dtype=np.uint64),
        np.sum([one.walks_by_refs for one in details], axis=0, dtype=np.uint64), _merged([one.pages for one in details]),
        _merged(ips) if ips else None, distances if counted else None, sum(one.first_uses for one in details),
        sum(one.after_removals for one in details))


def _merged(tables: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return rows whose last column counts, each once with the sum of its counts, the largest first."""
    rows = np.concatenate(tables)
    keys, place = np.unique(rows[:, :-1], axis=0, return_inverse=True)
    counts = np.zeros(len(keys), np.uint64)
    np.add.at(counts, place.reshape(-1), rows[:, -1])
    return np.column_stack((keys, counts))[np.argsort(~counts, kind="stable")]
