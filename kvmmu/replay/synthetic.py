"""Replay of a trace that brings no page tables: on tables made for its addresses, or filled by demand paging as it goes."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_BITS, INVALID_GPA, PAGE_SHIFT, PAGE_SIZE, Op, Pte
from kvmmu.arch.arguments import check_bool, check_int
from kvmmu.arch.registers import CpuModel
from kvmmu.replay._replay import RowLoop, new_row_loop
from kvmmu.replay.checkpoint import CheckpointError, Checkpoints, Saved, fingerprint, restoring
from kvmmu.replay.progress import PAGES_PASS, WALKS_PASS, tell_stage
from kvmmu.replay.result import SyntheticReport, take_counts
from kvmmu.replay.trace_memory import LIMIT_VARIABLE, check_pages, memory_limit, pages_at, put_pages
from kvmmu.replay.trace_replay import with_file
from kvmmu.tables._page_set import PageSet
from kvmmu.tables.layout import Frames, Page, PageLayout, check_layout, layout_pages, tables_needed
from kvmmu.tables.modes import Mode, ModeShape
from kvmmu.tables.page_tables import PageTables
from kvmmu.tables.pager import Pager
from kvmmu.tlb.processor import ProcessorTlbs
from kvmmu.traces import Chunk, ParquetTrace, Trace, TraceError
from kvmmu.traces.foreign import ForeignTrace
from kvmmu.vm.vcpu import Vcpu

__all__ = ["SyntheticRun", "TablesToOrder", "replay_synthetic"]

_THP_SHARE = 0.5
_1G_SHIFT = 30
_MOST_ROWS = 1 << 62
_SIZE_NAMES = {PAGE_SHIFT: "4K", 21: "2M", 22: "4M", _1G_SHIFT: "1G"}
_GUEST_MODES = ("32", "pae", "4l", "5l")
Progress = Callable[[int, int], object]


class TablesToOrder(NamedTuple):
    """The page tables that a trace is walked on.

    Attributes
    ----------
    paging : {"32", "pae", "4l", "5l"}
    page : {"4k", "2m", "1g", "thp"}
    frames : {"linear", "random"}
    pager : Pager or None
        Fills its own tables at the first touch of each page; the others are those that it was made with.
    """

    paging: Mode = "4l"
    page: Page = "4k"
    frames: Frames = "linear"
    pager: Pager | None = None


def check_order(order: TablesToOrder) -> ModeShape:
    """Return the shape of the tables that are asked for; raises ValueError or TypeError if there are none such."""
    if order.paging not in _GUEST_MODES:
        raise ValueError(f"paging: is {order.paging!r}; allowed is {', '.join(_GUEST_MODES)}")
    return check_layout(order.page, order.frames, order.paging, _THP_SHARE)


def replay_synthetic(trace: Trace, order: TablesToOrder, progress: Progress | None = None,
                     tlbs: Callable[[int], ProcessorTlbs] | None = None, checkpoints: Checkpoints | None = None
                     ) -> SyntheticReport:
    """Walk every access of a trace on tables that map all its pages.

    Parameters
    ----------
    trace : Trace
        Its header has no registers. Recorded physical addresses are not looked at. Without a pager it is read twice.
    order : TablesToOrder
    progress : callable, optional
        Called with (accesses done, accesses in all or 0) after each chunk.
    tlbs : callable, optional
        Called with the number of vCPUs, 1; makes the TLBs that the accesses go through.
    checkpoints : Checkpoints, optional

    Raises
    ------
    CheckpointError
        The state to go on from does not fit.
    TraceError
        The trace is damaged, has events, or takes too much memory for tables; its `report` is what was done until then.
    ValueError
        There are no such tables, or an address that they cannot map.
    ReplayInterrupted
        Ctrl-C; its `report` likewise.
    """
    keeper = checkpoints or Checkpoints(trace, {})
    run = SyntheticRun(trace, order, progress, tlbs, keeper)
    try:
        with keeper:
            run.all_chunks()
        return run.report(complete=True)
    except KeyboardInterrupt:
        done = f"after {run.done:,} rows were read for their pages (pass 1 of 2); no walk had begun" if run.reading else ""
        raise keeper.interruption(run.state, run.report(complete=False), done) from None
    except TraceError as error:
        named = with_file(error, trace)
        named.report = run.report(complete=False)
        raise named from error.__cause__


def _tells_gpas(chunk: Chunk) -> bool:
    return len(chunk) > 0 and (chunk.all_known or bool((chunk.gpa != np.uint64(INVALID_GPA)).any()))


class SyntheticRun:
    """One replay under way."""

    def __init__(self, trace: Trace, order: TablesToOrder, progress: Progress | None,
                 tlbs: Callable[[int], ProcessorTlbs] | None, keeper: Checkpoints) -> None:
        self.tlbs = None if tlbs is None else tlbs(1)
        self.trace, self.order, self.progress = trace, order, progress
        self.shape = check_order(order)
        level_shifts = {level: size.bit_length() - 1 for size, level in self.shape.sizes.items()}
        self.shifts = [PAGE_SHIFT, *(level_shifts.get(level, PAGE_SHIFT) for level in (1, 2, 3))]
        self.started = time.perf_counter()
        self.waited = 0.0
        self.touched = PageSet()
        self.rows = 0
        self.layout: PageLayout = {}
        self.table_pages = 0
        self.faults_before = order.pager.faults if order.pager else 0
        self.loop: RowLoop | None = None
        self.vcpu: Vcpu | None = None
        self.first_row = 0                              # of the trace, where these are not all of its rows
        self.unknown: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.keeper = keeper
        self.tables: PageTables | None = None
        self.done = 0                                   # rows of this reading
        self.reading = order.pager is None              # for the pages alone, not walked
        self.first_rows: list[int] = []
        self.tells_gpas: bool | None = None             # the first chunk does; None before it
        self.skipped = 0                                # rows of this reading that the state to go on from knows
        self.saved: Saved | None = None                 # that state, until the walks of it are taken up
        if keeper.saved is not None:
            with restoring():
                self._take_up(keeper.saved)

    def all_chunks(self) -> None:
        pager = self.order.pager
        if pager is not None:
            self._begin(pager)
            for chunk in self._chunks(0):
                with self.keeper.busy():
                    self._take_paged(pager, chunk)
                self.keeper.tick(self.state)
            self._restore_walks()                       # of all rows
            return
        if self.reading:
            tell_stage(self.progress, PAGES_PASS)
        damage = self._all_pages() if self.reading else None
        tell_stage(self.progress, WALKS_PASS)
        with self.keeper.busy():
            self._begin(self._make_tables())
            self._restore_walks()
        try:
            for chunk in self._chunks(self.rows):
                with self.keeper.busy():
                    self._walk(chunk)
                    self.done += len(chunk)
                self.keeper.tick(self.state)
        except TraceError as error:
            raise damage or error from None
        if damage is not None:
            raise damage

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def _chunks(self, total: int) -> Generator[Chunk]:
        """Yield the chunks, fit to be walked: with sizes, of one vCPU, without recorded addresses. A pager has to see all of
        them."""
        self.done = 0
        with closing(self._read_chunks()) as chunks:
            while True:
                started = time.perf_counter()
                chunk = next(chunks, None)
                self.waited += time.perf_counter() - started
                if chunk is None:
                    break
                self._check_first(chunk)
                if self.done < self.skipped < self.done + len(chunk):
                    raise CheckpointError(f"the trace comes in other chunks than before: one has rows {self.done} to "
                                          f"{self.done + len(chunk)}, the checkpoint is of row {self.skipped}")
                if self.done < self.skipped and self.order.pager is None:
                    self.done += len(chunk)
                    continue
                if chunk.has_events:
                    self._refuse_event(chunk, self.first_row + self.done)
                self._check_width(chunk, self.first_row + self.done)
                yield self._plain(chunk)
                if self.progress:
                    self.progress(self.done, total or self.trace.header.accesses or 0)
        if self.done < self.skipped:
            raise CheckpointError(f"the trace ends at row {self.done}, before the row {self.skipped} of the checkpoint")
        self.skipped = 0

    def _read_chunks(self) -> Generator[Chunk]:
        """Return the chunks, without row groups that need not be seen again."""
        if isinstance(self.trace, ParquetTrace) and self.skipped and self.order.pager is None:
            self.done = self.trace._group_start(self.skipped)
            return self.trace._chunks_from(self.done)
        return self.trace.chunks()

    def _check_first(self, chunk: Chunk) -> None:
        """Note the first rows; those of another reading of the trace must be the same."""
        if self.done:
            return
        found = fingerprint(chunk)
        if self.first_rows and found != self.first_rows:
            raise CheckpointError("the first rows of the trace are not those of the checkpoint: want the same options of its "
                                  "reader")
        self.first_rows, self.tells_gpas = found, _tells_gpas(chunk)

    def _plain(self, chunk: Chunk) -> Chunk:
        if self.unknown.size < len(chunk):
            self.unknown = np.full(len(chunk), INVALID_GPA, np.uint64)
        size = np.ones(len(chunk), np.uint8) if chunk.size is None else chunk.size
        return replace(chunk, size=size, gpa=self.unknown[:len(chunk)], vcpu=None, vcpus=1, all_known=False)

    @staticmethod
    def _refuse_event(chunk: Chunk, first: int) -> None:
        row = int(np.argmax(chunk.op >= Op.MOV_CR3))
        raise TraceError(f"row {first + row}: {Op(chunk.op[row]).name}: the trace has events but no registers that they could "
                         "change; allowed are accesses alone, or replay it on a vCPU")

    def _check_width(self, chunk: Chunk, first: int) -> None:
        bits = self.shape.addr_bits
        if self.shape.signed or not len(chunk) or int(chunk.addr.max()) >> bits == 0:
            return                                  # addresses that are not canonical fault, as on a CPU
        row = int(np.argmax(chunk.addr >> np.uint64(bits) != 0))
        raise ValueError(f"paging: mode {self.order.paging!r} has addresses of {bits} bits, and row {first + row} of the trace "
                         f"accesses {int(chunk.addr[row]):#x}; want '4l' or '5l'")

    def _add_pages(self, chunk: Chunk) -> None:
        self.touched.add(np.ascontiguousarray(chunk.addr), np.ascontiguousarray(chunk.size))

    def _all_pages(self) -> TraceError | None:
        """Read the trace once for the pages that it touches, up to its damage, which is returned."""
        try:
            for chunk in self._chunks(0):
                with self.keeper.busy():
                    self._add_pages(chunk)
                    self.rows = self.done = self.done + len(chunk)
                self.keeper.tick(self.state)
        except TraceError as error:
            return error
        return None

    # ---- tables --------------------------------------------------------------------------------------------------------

    def _pages(self) -> NDArray[np.uint64]:
        """Return numbers of the 4K pages that are touched and can be mapped, ascending."""
        pages, bits = self.touched.pages(), self.shape.addr_bits - PAGE_SHIFT
        if not self.shape.signed:
            return np.unique(pages & np.uint64((1 << bits) - 1))            # the last page is followed by the first
        upper = pages >> np.uint64(bits - 1)
        canonical: NDArray[np.uint64] = pages[(upper == 0) | (upper == np.uint64((1 << 64 - PAGE_SHIFT - bits + 1) - 1))]
        return canonical

    def _make_tables(self) -> PageTables:
        paging, page, frames, _ = self.order
        pages = self._pages()
        self.layout = layout_pages(pages, page, _THP_SHARE, self.shape.large_shift)
        needed = tables_needed(self.layout, self.shape.table_shifts) + self.shape.fixed_tables - 1
        self._check_room(needed)
        tables = PageTables.for_addresses(None, pages << np.uint64(PAGE_SHIFT), page, frames, mode=paging, thp_share=_THP_SHARE)
        self.table_pages = len(tables.table_frames)
        return tables

    @staticmethod
    def _check_room(table_pages: int) -> None:
        limit = memory_limit()
        if table_pages * PAGE_SIZE > limit:
            raise TraceError(f"its page tables take {table_pages * PAGE_SIZE:,} bytes; allowed are {limit:,} "
                             f"(the environment variable {LIMIT_VARIABLE})")

    def _begin(self, tables: PageTables) -> None:
        self.tables, self.reading = tables, False
        self.vcpu = vcpu = Vcpu(tables.mem, cpu=CpuModel(maxphyaddr=GPA_BITS), tdp="ept")      # PDPTEs are registers
        vcpu.set_regs(tables.regs())
        self.loop = new_row_loop(vcpu.gva_walk, 1)
        self.loop.walk_both_pages(self.shifts)
        self.loop.use(0, vcpu.gva_walk.prepare([vcpu.regs]))
        if self.tlbs is not None:
            self.regs = vcpu.regs
            self.tlbs.follow(0, self.regs)
            self.loop.feed(self.tlbs.stream)

    # ---- walks ---------------------------------------------------------------------------------------------------------

    def _walk(self, chunk: Chunk) -> None:
        assert self.loop is not None
        self.loop.load(chunk)
        self.loop.run()

    def _take_paged(self, pager: Pager, chunk: Chunk) -> None:
        """Touch the pages of a chunk and walk it, unless the state to go on from knows its walks."""
        walks = self.done >= self.skipped
        if walks:
            self._restore_walks()
        self._add_pages(chunk)
        self._walk_paged(pager, chunk, walks)
        self._check_room(pager.table_pages)
        self.done += len(chunk)

    def _walk_paged(self, pager: Pager, chunk: Chunk, walks: bool) -> None:
        """Walk a chunk, each row behind its page faults, and before a 2M page of a later row replaces small ones."""
        loop = self.loop
        assert loop is not None
        if walks:
            loop.load(chunk)
        addr, size = np.ascontiguousarray(chunk.addr), np.ascontiguousarray(chunk.size)
        row = 0
        while row < len(chunk):
            before = pager.faults
            stop = pager._touch_until_promotion(addr, size, row)
            if pager.faults != before:
                loop.forget()
            if walks:
                loop.run(stop)
            row = stop

    # ---- a state to go on from -----------------------------------------------------------------------------------------

    def state(self) -> Saved | None:
        """Return all that the rows so far have led to; None before those of the state to go on from are passed over."""
        if self.done < self.skipped or self.saved is not None:
            return None
        plain: dict[str, Any] = {
            "reading": self.reading, "done": self.done, "rows": self.rows, "first_rows": self.first_rows, "waited": self.waited,
            "tells_gpas": bool(self.tells_gpas),
            "seconds": time.perf_counter() - self.started}
        arrays: dict[str, NDArray[Any]] = {}
        if self.order.pager is None:
            arrays["touched"] = self.touched.pages()
        if self.loop is not None and self.tables is not None:
            arrays["counts"] = self.loop.counts()
            arrays["pages_gpa"] = np.array(self.tables.table_frames, np.uint64)
            arrays["pages_data"] = pages_at(self.tables.mem, arrays["pages_gpa"])
            if self.tlbs is not None:
                plain["tlbs"], found = self.tlbs.saved()
                arrays |= found
        return Saved(plain, arrays)

    def _take_up(self, saved: Saved) -> None:
        """Take up a state but for its walks."""
        plain, touched = saved.plain, saved.arrays.get("touched")
        self.first_rows, self.skipped = plain["first_rows"], check_int("done", plain["done"], 0, _MOST_ROWS)
        self.rows, self.started = check_int("rows", plain["rows"], 0, _MOST_ROWS), self.started - float(plain["seconds"])
        self.waited += float(plain["waited"])
        if "tells_gpas" in plain:                       # checkpoints of before have none
            self.tells_gpas = check_bool("tells_gpas", plain["tells_gpas"])
        if self.order.pager is None:
            if touched is None or touched.dtype != np.uint64 or touched.ndim != 1:
                raise ValueError("touched: want page numbers")
            self.touched.add(touched << np.uint64(PAGE_SHIFT))
            self.reading = check_bool("reading", plain["reading"])
        self.saved = None if self.reading else saved

    def _restore_walks(self) -> None:
        """Take up what the walks of the state to go on from have led to, once the tables are as they were then."""
        if self.saved is None:
            return
        with restoring():
            plain, arrays = self.saved
            gpa, data = arrays["pages_gpa"], arrays["pages_data"]
            check_pages(gpa, data)
            assert self.tables is not None
            if gpa.tolist() != self.tables.table_frames:
                raise ValueError("page tables at other addresses")
            dtype = np.uint32 if self.order.paging == "32" else np.uint64
            others = (pages_at(self.tables.mem, gpa) ^ data).view(dtype) & ~dtype(Pte.ACCESSED | Pte.DIRTY)
            if others.any():
                raise ValueError("page tables with other entries")
            put_pages(self.tables.mem, gpa, data)
            assert self.loop is not None
            self.loop.forget()
            self.loop.restore_counts(arrays["counts"], 0)
            if self.tlbs is not None:
                self.tlbs.restore(plain["tlbs"], arrays, [])
                self.tlbs.follow(0, self.regs)
        self.saved = None

    # ---- what was found ------------------------------------------------------------------------------------------------

    def report(self, complete: bool) -> SyntheticReport:
        header, order, pager = self.trace.header, self.order, self.order.pager
        report = SyntheticReport(
            name=header.name, phase="", mode=order.paging, accesses=0, complete=complete, source=header.source, page=order.page,
            frames=order.frames, waited=self.waited)
        pages = {size.bit_length() - 1: addr.size for size, addr in self.layout.items()}
        if pager is not None:
            report.first_touch_faults = pager.faults - self.faults_before
            pages = {PAGE_SHIFT: pager.pages - pager.huge_pages,
                     _1G_SHIFT if order.page == "1g" else self.shape.large_shift: pager.huge_pages}
            self.table_pages = pager.table_pages
        report.mapped = {_SIZE_NAMES[shift]: count for shift, count in sorted(pages.items()) if count}
        report.mapped_bytes = sum(count << shift for shift, count in pages.items())
        report.pages_touched = sum(pages.values())
        report.touched_bytes = len(self._pages()) * PAGE_SIZE
        report.table_pages = self.table_pages
        if isinstance(self.trace, ForeignTrace):
            report.skipped = dict(self.trace.notes.skipped)
        report.unchecked_gpas = self._has_gpas()
        if self.loop is not None:
            self._count(report, self.loop)
        report.tlb = None if self.tlbs is None else self.tlbs.stats()
        report.seconds = time.perf_counter() - self.started
        return report

    def _has_gpas(self) -> bool:
        """True if the first chunk tells guest-physical addresses. It is read here if this run began behind it."""
        if self.tells_gpas is None and isinstance(self.trace, ParquetTrace):
            with closing(self.trace.chunks()) as chunks:
                self.tells_gpas = any(_tells_gpas(chunk) for chunk in islice(chunks, 1))
        return bool(self.tells_gpas)

    def _count(self, report: SyntheticReport, loop: RowLoop) -> None:
        take_counts(report, loop, [_SIZE_NAMES[shift] for shift in self.shifts])
        report.crossings = loop.crossings
        # PDPTEs of PAE paging are registers; a walk to a leaf of level n reads the entries from the top level down to n
        top = 2 if self.order.paging == "pae" else self.shape.levels
        walks = [first + second for first, second in zip(loop.page_sizes, loop.next_page_sizes, strict=True)]
        report.walks = sum(walks)
        report.refs = sum(count * (top + 1 - level) for level, count in enumerate(walks) if level)
