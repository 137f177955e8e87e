"""Replay of a Parquet trace in parts, whose results are put together: the counters are those of one process.

The pages that a trace touches are a union, and counters of walks are sums. A set of a TLB depends on its own accesses alone:
pages are dealt out to shards by their number modulo a divisor of the numbers of sets of all levels, and each shard takes its
accesses part by part, in order. Page walks of all shards, in their order, then ask the paging-structure caches.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import Access, Status
from kvmmu.arch.arguments import check_int
from kvmmu.replay.checkpoint import Checkpoints
from kvmmu.replay.result import SyntheticReport
from kvmmu.replay.scheduling import computing, dask
from kvmmu.replay.synthetic import SyntheticRun, TablesToOrder
from kvmmu.replay.trace_replay import with_file
from kvmmu.tlb.counters import KINDS, PAGES, TlbStats
from kvmmu.tlb.hierarchy import TlbHierarchy, TlbLevel
from kvmmu.traces import Header, ParquetTrace, Trace, TraceError

__all__ = ["replay_parts", "shards_of"]

_PART_ROWS = 1 << 22
_MOST_PARTS = 1 << 16
_MOST_SHARDS = 64
_CLASSES = 18                   # kind, user, size
_LINEAR = np.uint64((1 << 57) - 1)
_WALK = 255
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]


class Rows(NamedTuple):
    """Accesses that ask a TLB, in order. `position` is twice the number of the row, and one more for its next page."""

    position: U64
    gva: U64
    access: U8
    leaf: U8


class Part(NamedTuple):
    """The counters of the rows from `start` to `stop` of a trace."""

    counts: U64
    unmapped: int
    shards: list[Rows]
    repeats: list[U64]                  # by shard: accesses to the page of the one before, by kind, user, size


class Shape(NamedTuple):
    """A hierarchy without paging-structure caches, as tasks take it along."""

    levels: tuple[TlbLevel, ...]
    seed: int


class _Slice(Trace):
    """Some row groups of a trace."""

    def __init__(self, path: str, start: int, stop: int) -> None:
        self._trace, self._start, self._stop = ParquetTrace(path), start, stop
        super().__init__(replace(self._trace.header, accesses=None, rows=None), ())
        self.path = self._trace.path

    def chunks(self) -> Any:
        """The chunks, checked."""
        return self._trace._chunks_from(self._start, self._stop)


# ---- tasks -------------------------------------------------------------------------------------------------------------

def touch_part(path: str, order: TablesToOrder, start: int, stop: int) -> tuple[U64, U64]:
    """Return the numbers of the pages that rows touch, and the accesses by kind."""
    run = _run_of(path, order, start, stop)
    kinds = np.zeros(len(KINDS), np.uint64)
    for chunk in run._chunks(0):
        run._add_pages(chunk)
        kinds += np.bincount(chunk.op & np.uint8(3), minlength=4)[:3].astype(np.uint64)
        run.done += len(chunk)
    return run.touched.pages(), kinds


def walk_part(path: str, order: TablesToOrder, start: int, stop: int, pages: U64, tlb: Shape | None, modulus: int,
              shards: int) -> Part:
    """Walk rows on tables for all pages of the trace; deal those that ask TLBs out to shards."""
    run = _run_of(path, order, start, stop, pages)
    loop = run.loop
    assert loop is not None
    dealt: list[list[Rows]] = [[] for _ in range(shards)]
    repeats, unmapped, position = np.zeros((shards, _CLASSES), np.uint64), 0, start
    asks = None if tlb is None else _first_levels(tlb.levels) >= 0
    for chunk in run._chunks(0):
        run._walk(chunk)
        if asks is not None:
            rows = _asking(run, chunk, position)
            mapped = rows.leaf != 0
            if not mapped.all():
                unmapped += int(np.count_nonzero(~mapped))
                rows = _chosen(rows, mapped)
            for pieces, piece in zip(dealt, _dealt(run, rows, asks, modulus, repeats), strict=True):
                pieces.append(piece)
        position += len(chunk)
        run.done += len(chunk)
    return Part(loop.counts(), unmapped, [_joined(pieces) for pieces in dealt], list(repeats))


def shard_step(tlb: Shape, paging: str, state: Any, dealt: tuple[Rows, U64]) -> tuple[Any, Rows]:
    """Let the accesses of a part go through a shard. Returns its state behind them, and those that took page walks."""
    hierarchy = TlbHierarchy(tlb.levels, seed=tlb.seed)
    rows, repeats = dealt[0], dealt[1].copy()
    if state is not None:
        hierarchy._restore(*state[0])
        repeats += state[1]
    hierarchy.use(mode=paging)
    level = np.empty(rows.gva.size, np.uint8)
    if rows.gva.size:
        hierarchy.access(rows.gva, rows.access, rows.leaf, out={"level": level})
    walked = level == _WALK
    return (hierarchy._saved(), repeats), _chosen(rows, walked)


def caches_step(psc: dict[int, TlbLevel], seed: int, paging: str, state: Any, walked: Sequence[Rows]) -> Any:
    """Let the page walks of a part ask the paging-structure caches, in the order of their accesses."""
    caches = TlbHierarchy([], psc=psc, seed=seed)
    if state is not None:
        caches._restore(*state)
    caches.use(mode=paging)
    rows = _joined(walked)
    order = np.argsort(rows.position, kind="stable")
    if order.size:
        caches.access(rows.gva[order], rows.access[order], rows.leaf[order])
    return caches._saved()


def dealt_to(part: Part, number: int) -> tuple[Rows, U64]:
    """Return what a part has for a shard, so that nothing else of it moves."""
    return part.shards[number], part.repeats[number]


def one_of(stepped: tuple[Any, Rows], place: int) -> Any:
    """Return the state of a shard behind a step (0), or the accesses that took page walks (1)."""
    return stepped[place]


# ---- rows --------------------------------------------------------------------------------------------------------------

def _run_of(path: str, order: TablesToOrder, start: int, stop: int, pages: U64 | None = None) -> SyntheticRun:
    trace = _Slice(path, start, stop)
    run = SyntheticRun(trace, order, None, None, Checkpoints(trace, {}))
    run.first_row = start
    if pages is not None:
        run._begin(_tables_of(order, sha256(pages.tobytes()).hexdigest(), _Pages(pages)))
    return run


class _Pages:
    """Page numbers, as an argument that caches do not compare."""

    def __init__(self, pages: U64) -> None:
        self.pages = pages

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pages)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=2)
def _tables_of(order: TablesToOrder, digest: str, pages: _Pages) -> Any:
    """Return page tables, the same ones for the same pages. Walks store nothing in them but accessed and dirty bits."""
    trace = Trace(Header(registers=()), ())
    run = SyntheticRun(trace, order, None, None, Checkpoints(trace, {}))
    run.touched.add(pages.pages << np.uint64(12))
    return run._make_tables()


def _asking(run: SyntheticRun, chunk: Any, first: int) -> Rows:
    """Return the rows of a chunk as TLBs are asked for them: one that reaches into the next page asks for both."""
    assert run.vcpu is not None
    walk, access, gva = run.vcpu.gva_walk, np.ascontiguousarray(chunk.access), np.ascontiguousarray(chunk.addr)
    found = walk.translate(gva, access, fields=("status", "level"))
    leaf = np.where(found.status == Status.OK, found.level, 0).astype(np.uint8)
    last = (np.uint64(1) << np.array(run.shifts, np.uint64)[leaf]) - np.uint64(1)
    crosses = np.flatnonzero((leaf != 0) & ((gva & last) + chunk.size > last + np.uint64(1)))
    position = np.arange(first, first + len(chunk), dtype=np.uint64) << np.uint64(1)
    if not crosses.size:
        return Rows(position, gva, access, leaf)
    following = (gva[crosses] | last[crosses]) + np.uint64(1)
    found = walk.translate(following, access[crosses], fields=("status", "level"))
    behind = crosses + 1
    return Rows(np.insert(position, behind, position[crosses] + np.uint64(1)), np.insert(gva, behind, following),
                np.insert(access, behind, access[crosses]),
                np.insert(leaf, behind, np.where(found.status == Status.OK, found.level, 0).astype(np.uint8)))


def _page_numbers(run: SyntheticRun, rows: Rows) -> U64:
    """Return page numbers, each in pages of its own size."""
    numbers: U64 = (rows.gva & _LINEAR) >> np.array(run.shifts, np.uint64)[rows.leaf]
    return numbers


def _classes(rows: Rows) -> NDArray[np.intp]:
    """Return kind, user and size of rows as a number."""
    kind = np.where(rows.access & np.uint8(Access.FETCH), 2, (rows.access & np.uint8(Access.WRITE)) != 0)
    user = rows.access & np.uint8(Access.USER) != 0
    numbers: NDArray[np.intp] = ((kind * 2 + user) * len(PAGES) + rows.leaf - 1).astype(np.intp)
    return numbers


def _chosen(rows: Rows, which: Any) -> Rows:
    return Rows(rows.position[which], rows.gva[which], rows.access[which], rows.leaf[which])


def _joined(pieces: Sequence[Rows]) -> Rows:
    none: list[Any] = [np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty(0, np.uint8)]
    columns = [list(column) for column in zip(*pieces, strict=True)]
    return Rows(*(map(np.concatenate, columns) if columns else none))


def _first_levels(levels: Sequence[TlbLevel]) -> NDArray[np.intp]:
    """Return the number of the level that accesses ask first, by kind, user, size; -1: none."""
    first = np.full((len(KINDS), 2, len(PAGES)), -1, np.intp)
    for kind, name in enumerate(KINDS):
        for size, page in enumerate(PAGES):
            first[kind, :, size] = next((number for number, level in enumerate(levels)
                                         if name in level.kinds and page in level.pages), -1)
    return first.reshape(-1)


def _dealt(run: SyntheticRun, rows: Rows, asks: NDArray[np.bool_], modulus: int, repeats: U64) -> list[Rows]:
    """Deal rows out to shards, without those of the same class and page as the one before, which hit and change nothing.

    Parameters
    ----------
    asks : ndarray of bool
        By class: there is a level that such an access asks.
    repeats : ndarray of uint64, shape (shards, classes)
        Those that are left out are added to it.
    """
    shards = len(repeats)
    page, classes = _page_numbers(run, rows), _classes(rows)
    shard = (page % np.uint64(modulus) % np.uint64(shards)).astype(np.uint8)
    for sorts in (False, True):                         # most repeat the row before, others the one before in their shard
        if sorts:
            order = np.argsort(shard, kind="stable")
            rows, page, classes, shard = _chosen(rows, order), page[order], classes[order], shard[order]
        new = np.ones(page.size, bool)
        new[1:] = (page[1:] != page[:-1]) | (classes[1:] != classes[:-1]) | ~asks[classes[1:]]
        again = shard[~new].astype(np.intp) * _CLASSES + classes[~new]
        repeats += np.bincount(again, minlength=repeats.size).astype(np.uint64).reshape(repeats.shape)
        rows, page, classes, shard = _chosen(rows, new), page[new], classes[new], shard[new]
    stops = np.cumsum(np.bincount(shard, minlength=shards)).tolist()
    return [_chosen(rows, slice(begin, stop)) for begin, stop in pairwise([0, *stops])]


# ---- the whole ---------------------------------------------------------------------------------------------------------

def shards_of(levels: Sequence[TlbLevel], kinds: Sequence[str], sizes: Sequence[str]) -> int:
    """Return how many shards pages can be dealt out to: the greatest common divisor of the sets of all levels that are asked.

    IN kinds, sizes: of the accesses. A level with random replacement has one generator for all sets, and allows one shard.
    """
    asked = [level for level in levels if set(level.kinds) & set(kinds) and set(level.pages) & set(sizes)]
    if any(level.policy == "random" for level in asked):
        return 1
    return math.gcd(*(level.sets for level in asked)) or 1


def replay_parts(trace: ParquetTrace, order: TablesToOrder, scheduler: str, tlb: TlbHierarchy | None = None,
                 part_rows: int | None = None) -> SyntheticReport:
    """Walk every access of a trace on tables that map all its pages, in parts.

    Parameters
    ----------
    trace : ParquetTrace
        Without registers. Every worker can open its file under its path.
    order : TablesToOrder
        Without a pager.
    scheduler : str
        As `check_scheduler()` has it.
    tlb : TlbHierarchy, optional
        Its details are not kept: they depend on all accesses in their order.
    part_rows : int, optional
        Rows of a part, rounded up to whole row groups; by default 4 Mi, or more if that makes more than 65,536 parts.

    Raises
    ------
    TraceError
        The trace is damaged, has events, or takes too much memory for tables.
    """
    started = time.perf_counter()
    if part_rows is None:
        part_rows = max(_PART_ROWS, trace.rows // _MOST_PARTS)
    part_rows = check_int("part_rows", part_rows, 1, 1 << 62)
    try:
        run, found = _computed(trace, order, scheduler, tlb, part_rows)
    except TraceError as error:
        raise with_file(error, trace) from None
    loop = run.loop
    assert loop is not None
    counts, unmapped = np.zeros_like(loop.counts()), 0
    for part_counts, part_unmapped in found[0]:
        counts += part_counts
        unmapped += part_unmapped
    loop.restore_counts(counts, 0)
    run.started = started
    report = run.report(complete=True)
    if tlb is not None:
        report.tlb = _stats(tlb, order.paging, found[1], found[2], unmapped)
    return report


def _computed(trace: ParquetTrace, order: TablesToOrder, scheduler: str, tlb: TlbHierarchy | None, part_rows: int
              ) -> tuple[SyntheticRun, tuple[list[Any], list[Any], list[Any]]]:
    """Return a replay with the tables, and the results of the parts, of the shards, and of the paging-structure caches."""
    path, cuts = str(Path(trace.path).resolve()), _cuts(trace, part_rows)
    delayed = dask().delayed
    with computing(scheduler) as elsewhere:
        touched = elsewhere.all([delayed(touch_part)(path, order, start, stop) for start, stop in pairwise(cuts)])
        run = SyntheticRun(trace, order, None, None, Checkpoints(trace, {}))
        pages = np.unique(np.concatenate([pages for pages, _ in touched])) if touched else np.empty(0, np.uint64)
        run.touched.add(pages << np.uint64(12))
        run._begin(run._make_tables())
        modulus, shape = 1, None
        if tlb is not None:
            kinds = [name for number, name in enumerate(KINDS) if any(counts[number] for _, counts in touched)]
            sizes = [PAGES[run.shifts.index(size.bit_length() - 1, 1) - 1] for size, addr in run.layout.items() if addr.size]
            modulus, shape = shards_of(tlb.levels, kinds, sizes), Shape(tlb.levels, tlb._seed)
        shards, held = min(modulus, _MOST_SHARDS), delayed(pages)
        parts = [delayed(walk_part)(path, order, start, stop, held, shape, modulus, shards) for start, stop in pairwise(cuts)]
        states, caches = _chains(delayed, parts, tlb, order.paging, shards)
        found = elsewhere.all([*[delayed(_sums)(part) for part in parts], *states, *caches])
    return run, (found[:len(parts)], found[len(parts):len(parts) + len(states)], found[len(parts) + len(states):])


def _sums(part: Part) -> tuple[U64, int]:
    return part.counts, part.unmapped


def _cuts(trace: ParquetTrace, part_rows: int) -> list[int]:
    """Return the first rows of the parts, and the end of the trace."""
    cuts = [0]
    for start in trace._starts[1:]:
        if start - cuts[-1] >= part_rows:
            cuts.append(start)
    return cuts if cuts[-1] == trace.rows else [*cuts, trace.rows]


def _chains(delayed: Any, parts: list[Any], tlb: TlbHierarchy | None, paging: str, shards: int) -> tuple[list[Any], list[Any]]:
    """Return the last states of the shards, and that of the paging-structure caches if there are any, as delayed calls."""
    if tlb is None:
        return [], []
    shape = Shape(tlb.levels, tlb._seed)
    states: list[Any] = [None] * shards
    caches: Any = None
    for part in parts:
        stepped = [delayed(shard_step)(shape, paging, state, delayed(dealt_to)(part, number))
                   for number, state in enumerate(states)]
        states = [delayed(one_of)(step, 0) for step in stepped]
        if tlb.psc:
            caches = delayed(caches_step)(tlb.psc, tlb._seed, paging, caches, [delayed(one_of)(step, 1) for step in stepped])
    return states, [caches] if tlb.psc else []


def _stats(tlb: TlbHierarchy, paging: str, states: list[Any], caches: list[Any], unmapped: int) -> TlbStats:
    """Return the counters of all shards."""
    if None in states:                                  # the trace has no rows
        return replace(tlb._another(details=False, curve=False).stats(), unmapped=unmapped)
    shape, first = (len(tlb.levels), len(KINDS), 2, len(PAGES)), _first_levels(tlb.levels)
    hits, walks, references = np.zeros(shape, np.uint64), np.zeros(shape[1:], np.uint64), 0
    replaced = [0] * len(tlb.levels)
    for saved, repeats in states:
        one = TlbHierarchy(tlb.levels, seed=tlb._seed)
        one._restore(*saved)
        one.use(mode=paging)
        stats = one.stats()
        hits += stats.hits
        walks += stats.walks
        references += stats.guest_refs
        replaced = [first + second for first, second in zip(replaced, stats.replaced, strict=True)]
        for one_class in np.flatnonzero(repeats).tolist():
            hits.reshape(len(tlb.levels), -1)[first[one_class], one_class] += repeats[one_class]
    found = TlbStats(tuple(level.name for level in tlb.levels), hits, walks, references, {}, tuple(replaced), unmapped)
    if not caches:
        return found
    cached = TlbHierarchy([], psc=tlb.psc, seed=tlb._seed)
    cached._restore(*caches[0])
    stats = cached.stats()
    return replace(found, guest_refs=stats.guest_refs, psc_hits=stats.psc_hits, cached_refs=stats.cached_refs)

