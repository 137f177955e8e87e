"""The Report of a replay, its mismatches, and how a replay ends early."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from kvmmu.arch._bits import PAGE_SIZE, Status
from kvmmu.arch.faults import error_code_text
from kvmmu.replay._replay import RowLoop
from kvmmu.tlb.counters import TlbStats
from kvmmu.walk.html import table_html

__all__ = ["EXPLAINED", "Mismatch", "Report", "ReplayInterrupted", "SyntheticReport", "failed_walks", "take_counts"]

EXPLAINED = 20


@dataclass(frozen=True)
class Mismatch:
    """An access or a page fault of the recording that the walk does not reproduce.

    Attributes
    ----------
    position : int
        Number of the access; for a page fault, of the access that followed it.
    gva : int
        Linear address (bytes).
    recorded : str
        What the recording says.
    walked : str
        What the walk says, level by level.
    """

    position: int
    gva: int
    recorded: str
    walked: str

    def __repr__(self) -> str:
        return f"<Mismatch: {str(self).replace(chr(10), ' ')}>"

    def __str__(self) -> str:
        return f"access {self.position}: recorded {self.recorded}\n  walked: {self.walked}"


@dataclass(repr=False)
class Report:
    """The result of a replay.

    Attributes
    ----------
    name, phase, mode : str
        Of the recording.
    accesses, verified : int
        Replayed, and walked to the recorded physical address.
    kinds : dict of str to int
        Accesses by load, store and fetch.
    page_sizes : dict of str to int
        Accesses that reached memory (as recorded, if that is known) by the size of the page they hit. Not counted in mode
        "machine".
    faults, faults_reproduced : dict of str to int
        Recorded page faults by error code, and those that the walk reproduces with the same error code.
    faults_checked : bool
        False in a static phase, whose tables are those of its end: the pages of its faults are mapped in them.
    mismatches : int
        Accesses and faults that were not reproduced.
    examples : list of Mismatch
        The first of them, explained.
    table_writes, contexts, mmio : int
        Page-table writes applied, register contexts, and accesses to MMIO pages.
    seconds : float
        Time for walking and checking. Of a trace file, that of the whole replay: decoding runs beside the walk.
    unchecked : int
        Accesses without a recorded physical address.
    walk_faults : dict of str to int
        Unchecked accesses whose walk fails, by error code or status.
    waited : float
        Of `seconds`, those in which the walk had to wait for decoded rows.
    complete : bool
        False if the replay stopped before the end of the trace.
    tlb : TlbStats or None
        Counters of the TLB hierarchy, if one was asked for.
    skipped : dict of str to int
        What the reader of a trace of another tool passed over, by kind.
    """

    name: str
    phase: str
    mode: str
    accesses: int
    verified: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    page_sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    faults_reproduced: dict[str, int] = field(default_factory=dict)
    faults_checked: bool = True
    mismatches: int = 0
    examples: list[Mismatch] = field(default_factory=list)
    table_writes: int = 0
    contexts: int = 0
    mmio: int = 0
    seconds: float = 0.0
    unchecked: int = 0
    walk_faults: dict[str, int] = field(default_factory=dict)
    waited: float = 0.0
    complete: bool = True
    tlb: TlbStats | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Accesses per second."""
        return self.accesses / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        plain = dict(self.__dict__)
        plain["examples"] = [example.__dict__ for example in self.examples]
        del plain["tlb"]
        return plain | {"rate": self.rate} | ({} if self.tlb is None else {"tlb": self.tlb.to_dict()})

    def _title(self) -> str:
        stopped = "" if self.complete else ", stopped early"
        return f"{', '.join(filter(None, (self.name, self.phase)))} (mode {self.mode}): {self.accesses:,} accesses{stopped}"

    def _checked(self) -> str:
        return f"{self.verified:,} verified, {self.mismatches:,} mismatches"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._title()}, {self._checked()}>"

    def _repr_html_(self) -> str:
        """Return the title with the numbers of `to_dict()`, and a table for each of its counts by kind, that is not empty."""
        plain = self.to_dict()
        counts = {name: value for name, value in plain.items() if isinstance(value, dict) and value}
        rows = [(_words(name), _value_text(value)) for name, value in plain.items()
                if value is not None and not isinstance(value, (dict, list, str, bool))]
        tables = [table_html(self._title(), (), rows)]
        tables += [table_html(_words(name), (), [(_words(key), _value_text(value)) for key, value in found.items()])
                   for name, found in counts.items()]
        if self.examples:
            tables.append(table_html("mismatches, the first of them", (), [(str(example),) for example in self.examples]))
        return "".join(tables)


def failed_walks(error_codes: Mapping[int, int], statuses: Sequence[int]) -> dict[str, int]:
    """Return failed walks for people: page faults by error code, others by their status. IN statuses: how often each was."""
    return {error_code_text(code): count for code, count in error_codes.items()} | {
        Status(status).name: count for status, count in enumerate(statuses)
        if count and status not in (Status.OK, Status.PAGE_FAULT)}


def take_counts(report: Report, loop: RowLoop, sizes: Sequence[str]) -> None:
    """Note in a report what a loop of rows has counted. IN sizes: the names of pages by the level of their leaf."""
    report.kinds = dict(zip(("load", "store", "fetch"), loop.kinds, strict=True))
    report.accesses, report.mmio, report.table_writes = loop.accesses, loop.mmio, loop.writes
    report.verified, report.unchecked, report.mismatches = loop.verified, loop.unchecked, loop.mismatches
    report.page_sizes = {size: count for size, count in zip(sizes, loop.page_sizes, strict=True) if count}
    report.walk_faults = failed_walks(loop.error_codes, loop.statuses)


@dataclass(repr=False)
class SyntheticReport(Report):
    """The result of a replay of a trace without page tables, on tables that were made for it.

    Attributes
    ----------
    mode : str
        Paging mode of the tables: "32", "pae", "4l" or "5l".
    page_sizes : dict of str to int
        Accesses whose walk succeeds, by the size of the page that their first byte lies in.
    walk_faults : dict of str to int
        Accesses whose walk fails, by error code or status: addresses that are not canonical.
    source : str
        Format of the trace.
    page, frames : str
        What the tables were made of: "4k", "2m", "1g" or "thp"; "linear" or "random".
    pages_touched : int
        Distinct pages that accesses touch, of the sizes that the tables have at the end.
    crossings : int
        Accesses that reach into the next page. They touch both, and are walked in both.
    walks, refs : int
        Walks that succeed, and the paging-structure entries that they read. Walks that end in a first-touch fault are not
        counted.
    first_touch_faults : int or None
        Page faults of demand paging; None without a pager.
    touched_bytes : int
        4096 for each distinct 4K page that is touched.
    mapped : dict of str to int
        Pages in the tables by size.
    mapped_bytes : int
        Memory that those pages take.
    table_pages : int
        Page tables, of 4096 bytes each.
    unchecked_gpas : bool
        The trace tells guest-physical addresses (its first chunk does). They are not checked: the tables are not those of its
        guest.
    """

    source: str = ""
    page: str = "4k"
    frames: str = "linear"
    pages_touched: int = 0
    crossings: int = 0
    walks: int = 0
    refs: int = 0
    first_touch_faults: int | None = None
    touched_bytes: int = 0
    mapped: dict[str, int] = field(default_factory=dict)
    mapped_bytes: int = 0
    table_pages: int = 0
    unchecked_gpas: bool = False

    def _checked(self) -> str:
        faults = "" if self.first_touch_faults is None else f", {self.first_touch_faults:,} first-touch faults"
        return f"{self.pages_touched:,} pages touched, {self.refs_per_walk:.3f} references per walk{faults}"

    @property
    def refs_per_walk(self) -> float:
        return self.refs / self.walks if self.walks else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        names = ("name", "source", "mode", "page", "frames", "complete", "accesses", "kinds", "mmio", "crossings",
                 "pages_touched", "page_sizes", "first_touch_faults", "walk_faults", "walks", "skipped", "seconds", "waited",
                 "rate", "unchecked_gpas")
        return {name: getattr(self, name) for name in names} | {
            "refs": {"total": self.refs, "per_walk": self.refs_per_walk},
            "footprint": {"touched_bytes": self.touched_bytes, "mapped_bytes": self.mapped_bytes, "mapped": self.mapped,
                          "table_pages": self.table_pages, "table_bytes": self.table_pages * PAGE_SIZE}
        } | ({} if self.tlb is None else {"tlb": self.tlb.to_dict()})


class ReplayInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a replay.

    Attributes
    ----------
    report : Report
        What was done until then.
    checkpoint : str or path-like, or None
        The checkpoint from which another run can go on.
    """

    def __init__(self, report: Report, checkpoint: str | PathLike[str] | None = None, note: str = "", done: str = "") -> None:
        super().__init__(f"interrupted {done or f'after {report.accesses:,} accesses'}{note}")
        self.report, self.checkpoint = report, checkpoint


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value_text(value: object) -> str:
    """Return a number with separators, of a mapping its items in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value_text(count)}" for key, count in value.items())
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
