"""Comparison: what one trace met under several designs; as a table, data, pictures and a page."""

from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.files import writing
from kvmmu.comparison.cost import CostModel
from kvmmu.comparison.design import Design
from kvmmu.comparison.machines import HostRun
from kvmmu.report.tables import Table, plain_text
from kvmmu.tlb.counters import MISS_CLASSES, TlbStats
from kvmmu.traces._arrow import pyarrow

__all__ = ["Comparison", "DesignResult"]

_CURVE_POINTS = 400


@dataclass(frozen=True, eq=False)
class DesignResult:
    """The results of a trace under one design.

    Attributes
    ----------
    design : Design
    accesses : int
        Of the trace.
    stats : TlbStats
        Of the TLB hierarchy.
    host : HostRun
        Exits.
    """

    design: Design
    accesses: int
    stats: TlbStats
    host: HostRun

    @property
    def walks(self) -> int:
        """Page walks."""
        return int(self.stats.walks.sum())

    @property
    def guest_refs(self) -> int:
        """Entries of the guest's tables that walks read; under shadow paging the processor reads none."""
        return 0 if self.design.host == "shadow" else self.stats.guest_refs

    @property
    def host_refs(self) -> int:
        """Entries of the host's tables that walks read."""
        if self.design.host == "shadow":
            return self.stats.guest_refs
        return self.stats.host_refs if self.design.two_stages else 0

    @property
    def walks_by_refs(self) -> NDArray[np.uint64] | None:
        """Walks by the number of entries that they read in all."""
        if self.design.two_stages:
            return self.stats.walks_by_all_refs
        return None if self.stats.details is None else self.stats.details.walks_by_refs

    @property
    def later_hits(self) -> int:
        """Hits in levels behind the first one that an access asks."""
        hits = 0
        levels = self.design.hierarchy.levels
        for number, level in enumerate(levels):
            for k, kind in enumerate(("load", "store", "fetch")):
                for p, page in enumerate(("4k", "2m", "1g")):
                    if kind in level.kinds and page in level.pages and any(
                            kind in other.kinds and page in other.pages for other in levels[:number]):
                        hits += int(self.stats.hits[number, k, :, p].sum())
        return hits

    def cycles(self, cost: CostModel) -> float:
        """Return the cycles by a cost model."""
        return (cost.second_level_hit * self.later_hits + cost.walk * self.walks + cost.guest_ref * self.guest_refs
                + cost.host_ref * self.host_refs + cost.exit * self.host.total)

    def to_dict(self, cost: CostModel | None = None) -> dict[str, Any]:
        """Return plain data for JSON."""
        stats, details = self.stats, self.stats.details
        levels: list[dict[str, Any]] = [{"name": name, "hits": int(hits.sum())}
                                        for name, hits in zip(stats.names, stats.hits, strict=True)]
        if details is not None:
            for level, misses in zip(levels, details.misses.tolist(), strict=True):
                level["misses"] = dict(zip(MISS_CLASSES, misses, strict=True))
        refs = self.walks_by_refs
        found: dict[str, Any] = {
            "name": self.design.name, "page": self.design.page, "host": self.design.host, "accesses": self.accesses,
            "tlb": {"name": self.design.tlb_name, "levels": levels, "walks": self.walks, "lookups": stats.accesses,
                    "unmapped": stats.unmapped},
            "guest_refs": self.guest_refs, "host_refs": self.host_refs,
            "cached_refs": stats.cached_refs + (stats.host_cached_refs if self.design.two_stages else 0),
            "exits": self.host.total, "exits_by": self.host.exits,
            "walks_by_refs": [] if refs is None else refs.tolist()}
        if cost is not None:
            found["cycles"] = self.cycles(cost)
            found["cycles_per_access"] = self.cycles(cost) / self.accesses if self.accesses else 0.0
        return found


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results of one trace under several designs.

    Attributes
    ----------
    name : str
        Of the trace.
    accesses : int
    kinds : dict of str to int
        Accesses by load, store and fetch.
    results : tuple of DesignResult
        In the order of the designs.
    curves : dict of str to ndarray
        By page policy: misses of fully associative LRU TLBs of 0, 1, 2 ... entries.
    mapped : dict of str to dict of str to int
        By page policy: pages by size.
    regions : dict of str to ndarray, shape (n, 4)
        By page policy: start, size in bytes, level of the pages, and how they are accessed: 1 loads, 2 stores, 4 fetches.
    cost : CostModel or None
    seconds : float
    complete : bool
        False if Ctrl-C ended the comparison early: counters of TLBs are of the accesses until then; exits, `kinds` and regions
        are of the whole trace, and designs with pages "own" are left out.
    faults : dict of str to ndarray of uint64
        Numbers of accesses, ascending: "first touches of 4K pages", which are the faults of demand paging with such pages, and
        "page faults of the trace". Empty with pages "own" alone.
    """

    name: str
    accesses: int
    kinds: dict[str, int]
    results: tuple[DesignResult, ...]
    curves: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    mapped: dict[str, dict[str, int]] = field(default_factory=dict)
    regions: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    cost: CostModel | None = None
    seconds: float = 0.0
    complete: bool = True
    faults: dict[str, NDArray[np.uint64]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: `designs`, and what is common to them."""
        found: dict[str, Any] = {
            "name": self.name, "accesses": self.accesses, "kinds": self.kinds, "complete": self.complete,
            "seconds": self.seconds, "designs": [result.to_dict(self.cost) for result in self.results],
            "mapped": self.mapped, "miss_curves": {page: curve_points(curve) for page, curve in self.curves.items()}}
        if self.cost is not None:
            found["cost"] = dict(self.cost.__dict__)
        return found

    def columns(self) -> dict[str, list[Any]]:
        """Return the designs as columns, one row each: for CSV and Parquet."""
        rows = []
        for result in self.results:
            row = {"name": result.design.name, "page": result.design.page, "host": result.design.host,
                   "tlb": result.design.tlb_name, "accesses": result.accesses,
                   "first_level_hits": int(result.stats.hits.sum()) - result.later_hits, "later_hits": result.later_hits,
                   "walks": result.walks, "guest_refs": result.guest_refs, "host_refs": result.host_refs,
                   "exits": result.host.total}
            if self.cost is not None:
                row["cycles"] = result.cycles(self.cost)
            rows.append(row)
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}

    def tables(self) -> list[Table]:
        """Return the comparison as tables: a list of (title, column names, rows of text)."""
        names = ["design", "later TLB hits", "page walks", "walks per 1,000", "guest refs", "host refs", "refs per walk", "exits"]
        rows = []
        for result in self.results:
            walks, refs = result.walks, result.guest_refs + result.host_refs
            row = [result.design.name, f"{result.later_hits:,}", f"{walks:,}",
                   f"{1000 * walks / result.accesses if result.accesses else 0:.3f}", f"{result.guest_refs:,}",
                   f"{result.host_refs:,}", f"{refs / walks if walks else 0:.2f}", f"{result.host.total:,}"]
            if self.cost is not None:
                row.append(f"{result.cycles(self.cost) / max(result.accesses, 1):.3f}")
            rows.append(tuple(row))
        if self.cost is not None:
            names.append("cycles per access")
        title = f"{self.name}: {self.accesses:,} accesses under {len(self.results)} designs"
        title += "" if self.complete else " (stopped early)"
        if self.cost is not None:
            title += f"\ncycles by {self.cost.name!r}: {self.cost.source or 'no source is given'}"
        return [(title, tuple(names), rows)]

    def table(self) -> str:
        """Return the comparison as text."""
        return plain_text(self.tables())

    def __str__(self) -> str:
        return self.table()

    def to_csv(self) -> str:
        """Return the designs as CSV, a line each."""
        import csv
        import io

        text, columns = io.StringIO(), self.columns()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Write the designs as a Parquet file, a row each: whole, or not at all.

        Raises
        ------
        ImportError
            PyArrow is missing.
        OSError
            The file cannot be written, or there is something else than a regular file.
        """
        arrow = pyarrow()
        table = arrow.table(_encodable(self.columns()))
        with writing(path) as part:
            arrow.parquet.write_table(table, part)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the comparison: misses over TLB size, references, walks by references, exits over time, the address space.

        Parameters
        ----------
        path : str or path-like, optional
            Save the figure there; the suffix chooses the format (.png, .svg, .pdf).

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            matplotlib is missing.
        ValueError, OSError
            `path` has another suffix, or cannot be written.
        """
        from kvmmu.report.comparison_figure import plot_comparison

        return plot_comparison(self.data(), path)

    def to_html(self, path: str | PathLike[str] | None = None, *, command: str = "") -> str:
        """Return the comparison as one HTML page that needs no network; save it if there is a path: whole, or not at all.

        Parameters
        ----------
        path : str or path-like, optional
        command : str
            The command line that made it, which the page shows beside kvmmu's version and the date.
        """
        from datetime import UTC, datetime

        from kvmmu import __version__
        from kvmmu.report.comparison_page import comparison_page

        made_by = f"Made by kvmmu {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{f': {command}' if command else '.'}"
        text = comparison_page(self.data() | {"made_by": _encodable(made_by)})
        if path is not None:
            with writing(path) as part, open(part, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        from kvmmu.report.comparison_page import table_of

        return table_of(self.tables())

    def data(self) -> dict[str, Any]:
        """Return what the pictures are drawn from: `to_dict()`, exits and faults over time, and regions of the address space."""
        found: dict[str, Any] = _encodable(self.to_dict())
        return found | {
            "tables": _encodable(self.tables()), "regions": {page: rows.tolist() for page, rows in self.regions.items()},
            "exits_over_time": {_encodable(result.design.name): _over_time(result.host.position, result.host.count)
                                for result in self.results if result.host.position.size},
            "tlbs": {_encodable(result.design.tlb_name): repr(result.design.hierarchy).partition("(")[2].removesuffix(")")
                     for result in self.results},
            "faults_over_time": {name: _over_time(positions, np.ones(positions.size, np.uint64))
                                 for name, positions in self.faults.items() if positions.size}}


def _encodable(value: Any) -> Any:
    """Return plain data whose texts have no lone surrogates, as a file name that is no UTF-8 has: they are \\udcff there."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, (list, tuple)) else value


def curve_points(curve: NDArray[np.uint64]) -> list[list[int]]:
    """Return [entries, misses] of a miss curve: all sizes of a short one, of a long one some, and each doubling."""
    sizes = np.arange(curve.size)
    if curve.size > _CURVE_POINTS:
        sizes = np.unique(np.geomspace(1, curve.size - 1, _CURVE_POINTS).astype(np.int64))
        doublings = 1 << np.arange(int(curve.size - 1).bit_length())
        sizes = np.unique(np.concatenate(([0], sizes, doublings)))
    return [[int(size), int(curve[size])] for size in sizes.tolist()]


def _over_time(position: NDArray[np.uint64], count: NDArray[np.uint64]) -> list[list[int]]:
    """Return [number of the access, sum of the counts until then] at some of the accesses, the last one among them."""
    total = np.cumsum(count)
    at = np.unique(np.linspace(0, total.size - 1, min(total.size, _CURVE_POINTS)).astype(np.int64))
    return [[int(position[i]), int(total[i])] for i in at.tolist()]
