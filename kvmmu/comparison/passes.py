"""One pass of a trace over made tables of several page policies, through several TLB hierarchies each."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import INVALID_GPA, Cr4, Op
from kvmmu.arch.registers import Regs
from kvmmu.comparison.design import host_page_of
from kvmmu.comparison.first_touches import FirstTouches
from kvmmu.comparison.registers import NO_REGISTERS, Registers
from kvmmu.comparison.spaces import MadeSpaces
from kvmmu.replay._replay import AT_EVENT, RowLoop, new_row_loop
from kvmmu.replay.progress import PAGES_PASS, WALKS_PASS, tell_stage
from kvmmu.tables._page_set import PageSet
from kvmmu.tlb.counters import TlbStats
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Chunk, Trace

__all__ = ["MadePasses", "Progress"]

_REGISTER_EVENTS = (Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.SET_REGS, Op.VMENTER, Op.VMEXIT, Op.RESTART)
_FOLLOWED = (*_REGISTER_EVENTS, Op.INVLPG, Op.INVPCID, Op.PAGE_FAULT, Op.HOST_INVALIDATE)
# Rows that are left of a chunk: accesses, and events that TLBs and registers follow
_KEPT = np.zeros(256, bool)
_KEPT[:int(Op.MOV_CR3)] = True
_KEPT[[int(op) for op in _FOLLOWED]] = True
_TAGGING_CR4 = int(Cr4.PCIDE | Cr4.PGE | Cr4.SMEP)
_SHIFTS = (12, 12, 21, 30)                      # of pages, by level
Progress = Callable[[int, int], object]


class MadePasses:
    """The passes of a trace over tables that are made for it.

    Attributes
    ----------
    accesses : int
    kinds : dict of str to int
    events : Counter of Op
        Events that a host with shadow paging intercepts, among others.
    spaces : dict of str to MadeSpaces
        By page policy.
    stats : dict of str to list of TlbStats
        By page policy: one per hierarchy.
    first : FirstTouches
    fault_positions : list of ndarray of uint64
        Of the page faults that the trace tells: the number of the access that followed each.
    touched : dict of hashable to PageSet
        Pages by address space.
    complete : bool
        False until all passes are done, and if Ctrl-C ended them: counters of TLBs are of the accesses until then.
    """

    def __init__(self, trace: Callable[[], Trace], pages: Sequence[str], tlbs: Sequence[Any], two_stages: bool,
                 progress: Progress | None = None) -> None:
        self._trace, self._pages, self._tlbs, self._two_stages = trace, list(pages), list(tlbs), two_stages
        self._progress, self._started = progress, time.perf_counter()
        header = trace().header
        self._vcpus = header.vcpus if header.registers else 1
        self._has_registers = bool(header.registers)
        self.accesses = self._total = 0
        self.kinds: dict[str, int] = {}
        self.events: Counter[Op] = Counter()
        self.touched: dict[Hashable, PageSet] = {}
        self.first = FirstTouches()
        self.fault_positions: list[NDArray[np.uint64]] = []
        self.spaces: dict[str, MadeSpaces] = {}
        self._policies: list[_Policy] = []
        self.complete = False

    def run(self) -> None:
        """Read the trace for its pages, make the tables, and read it again for the walks; Ctrl-C ends that one early."""
        tell_stage(self._progress, PAGES_PASS)
        try:
            self._find_pages()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted while the trace was read for its pages (pass 1 of 2); "
                                    "no walk had begun") from None
        tell_stage(self._progress, WALKS_PASS)
        number = {space: i for i, space in enumerate(self.touched)}
        for page in self._pages:
            self.spaces[page] = MadeSpaces(self.touched, page)
            host_page = host_page_of(page) if self._two_stages else None
            tlbs = ProcessorTlbs([TlbOfHost(tlb, host_page) for tlb in self._tlbs], self._vcpus)
            self._policies.append(_Policy(self.spaces[page], tlbs, Registers(self._trace().header), number, self._vcpus))
        try:
            for chunk in self._chunks():
                for policy in self._policies:
                    policy.walk(chunk)
                self.accesses += int(np.count_nonzero(chunk.op < Op.MOV_CR3))
                self._tell()
            self.complete = True
        except KeyboardInterrupt:
            if not self.accesses:
                raise                                   # there is nothing to tell

    @property
    def stats(self) -> dict[str, list[TlbStats]]:
        return {page: [policy.tlbs.stats(i) for i in range(len(self._tlbs))]
                for page, policy in zip(self._pages, self._policies, strict=False)}

    def _tell(self) -> None:
        if self._progress:
            self._progress(self.accesses, self._total)

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def _chunks(self) -> Generator[Chunk]:
        """Yield the chunks without events of memory, without recorded addresses, with sizes."""
        with closing(self._trace().chunks()) as chunks:
            for chunk in chunks:
                yield _plain(chunk, self._has_registers)

    def _find_pages(self) -> None:
        registers, kinds = Registers(self._trace().header), np.zeros(3, np.int64)
        done = 0
        for chunk in self._chunks():
            accesses = chunk.op < Op.MOV_CR3
            kinds += np.bincount(chunk.op[accesses] & np.uint8(3), minlength=4)[:3]
            for start, stop, vcpu in _runs(chunk, registers, self.events):
                rows = slice(start, stop)
                chosen = slice(None) if vcpu is None else chunk.vcpu[rows] == vcpu      # type: ignore[index]
                addr, size = chunk.addr[rows][chosen], chunk.size[rows][chosen]         # type: ignore[index]
                space = registers.space(vcpu or 0)
                seen = self.touched.get(space)
                if seen is None:
                    seen = self.touched[space] = PageSet()
                seen.add(np.ascontiguousarray(addr), np.ascontiguousarray(size))
                self.first.take(np.ascontiguousarray(addr), chunk.access[rows][chosen], list(self.touched).index(space),
                                done + int(np.count_nonzero(accesses[:start])))
            if chunk.has_events:
                faults = np.flatnonzero(chunk.op == np.uint8(Op.PAGE_FAULT))
                self.fault_positions.append(np.uint64(done) + np.cumsum(accesses, dtype=np.uint64)[faults])
            done += int(np.count_nonzero(accesses))
        self._total = done
        self.kinds = dict(zip(("load", "store", "fetch"), kinds.tolist(), strict=True))
        if not self.touched:
            self.touched[registers.space(0)] = PageSet()


def _plain(chunk: Chunk, has_registers: bool) -> Chunk:
    """Return a chunk fit for made tables: what they do not follow is left out."""
    kept = _KEPT[chunk.op]
    if not kept.all():
        def some(column: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if column is None else column[kept]

        chunk = replace(chunk, op=chunk.op[kept], addr=chunk.addr[kept], access=chunk.access[kept], gpa=chunk.gpa[kept],
                        size=some(chunk.size), vcpu=some(chunk.vcpu), value=some(chunk.value), ip=some(chunk.ip))
    n = len(chunk)
    size = np.ones(n, np.uint8) if chunk.size is None else chunk.size
    value = np.zeros(n, np.uint64) if chunk.value is None else chunk.value
    vcpu = chunk.vcpu if has_registers else None
    return replace(chunk, size=size, value=value, gpa=np.full(n, INVALID_GPA, np.uint64), vcpu=vcpu,
                   vcpus=chunk.vcpus if has_registers else 1, all_known=False)


def _runs(chunk: Chunk, registers: Registers, events: Counter[Op]) -> Generator[tuple[int, int, int | None]]:
    """Yield (start, stop, vCPU) of accesses between events; the vCPU is None if all are of vCPU 0. Follows the registers."""
    at = np.flatnonzero(chunk.op >= Op.MOV_CR3).tolist() if chunk.has_events else []
    start = 0
    for stop in [*at, len(chunk)]:
        if start < stop:
            if chunk.vcpu is None or chunk.vcpus == 1:
                yield start, stop, None
            else:
                for vcpu in np.unique(chunk.vcpu[start:stop]).tolist():
                    yield start, stop, vcpu
        if stop < len(chunk):
            op, vcpu = Op(chunk.op[stop]), 0 if chunk.vcpu is None else int(chunk.vcpu[stop])
            before = registers.states[vcpu][0].cr3
            if op in _REGISTER_EVENTS:
                registers.event(op, vcpu, int(chunk.value[stop]))                       # type: ignore[index]
            events[Op.MOV_CR3 if op == Op.SET_REGS and registers.states[vcpu][0].cr3 != before else op] += 1
        start = stop + 1


class _Policy:
    """The walks of a trace on the tables of one page policy."""

    def __init__(self, spaces: MadeSpaces, tlbs: ProcessorTlbs, registers: Registers, number: dict[Hashable, int],
                 vcpus: int) -> None:
        self.spaces, self.tlbs, self.registers, self.number, self.vcpus = spaces, tlbs, registers, number, vcpus
        walk = spaces.vcpu().gva_walk
        self.loop: RowLoop = new_row_loop(walk, vcpus)
        self.sets = [self.loop.registers.add(walk.prepare([spaces.regs(i)])) for i in range(len(spaces.tables))]
        if vcpus == 1:
            self.loop.walk_both_pages(_SHIFTS)
        self.loop.feed(tlbs.stream)
        for vcpu in range(vcpus):
            self._use(vcpu)
            tlbs.follow(vcpu, self._tags(vcpu))

    def _use(self, vcpu: int) -> None:
        space = self.number.get(self.registers.space(vcpu), 0)      # a space without accesses has no tables, and needs none
        self.loop.registers.use(vcpu, self.sets[space])

    def _tags(self, vcpu: int) -> Any:
        """Return the registers as the TLBs see them: 4-level paging, with the trace's PCIDs."""
        regs, stage = self.registers.states[vcpu]
        seen: Regs = replace(NO_REGISTERS, cr3=regs.cr3, cr4=NO_REGISTERS.cr4 | regs.cr4 & _TAGGING_CR4)
        return seen if stage is None else (seen, stage)

    def walk(self, chunk: Chunk) -> None:
        """Walk the rows of a chunk, and carry out its events."""
        loop = self.loop
        loop.load(chunk)
        while loop.run() == AT_EVENT:
            _, number, vcpu, addr, value = loop.event
            op, before = Op(number), self._tags(vcpu)
            if op in _REGISTER_EVENTS:
                self.registers.event(op, vcpu, value)
                for one in range(self.vcpus) if op == Op.RESTART else (vcpu,):
                    self._use(one)
            self.tlbs.event(op, vcpu, addr, value, before, self._tags(vcpu))
            if op == Op.RESTART:
                for one in range(self.vcpus):
                    self.tlbs.follow(one, self._tags(one))
