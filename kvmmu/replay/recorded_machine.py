"""The guest of a trace or a recording without its replay: a vCPU at its start, and a machine (`Vm`) that runs it."""

from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvmmu.arch._bits import INVALID_GPA, PAGE_SHIFT, PAGE_SIZE, Access, Op
from kvmmu.arch.registers import Regs, pdpte_gpas
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.replay.register_events import REGISTER_EVENTS, Context, context_of, use_context
from kvmmu.replay.row_run import RowRun
from kvmmu.replay.trace_memory import TraceMemory, reserve
from kvmmu.replay.trace_replay import recording_vcpu, with_file
from kvmmu.traces import Chunk, Header, ParquetTrace, Recording, RecordingError, Trace, TraceError
from kvmmu.vm.vcpu import Vcpu, Vm
from kvmmu.vm.virtual_machine import PageSize

__all__ = ["TraceStart", "touched_machine", "trace_start"]

_MEMORY_UNIT = 1 << 21                      # a slot that ends between large pages has small ones there
_MEMORY_LIMIT = 1 << 40
_HOST_MAXPHYADDR = 46
_TOUCHED_LIMIT = 1 << 22                    # pages
_STOPS = (*REGISTER_EVENTS, Op.RESTART)


def touched_machine(source: Recording | ParquetTrace, *, tdp: Literal["ept", "npt"] | None = "ept",
                    backing: PageSize = "2m", nx_huge_pages: bool = False) -> Vm:
    """Return a machine whose guest has read every page that a recording or a trace touches, each once.

    Parameters
    ----------
    source : Recording or ParquetTrace
    tdp, backing, nx_huge_pages
        Of its `Host` and `Vm`.

    Returns
    -------
    Vm
        Its memory reaches to the last page touched, and is that of the start. Contexts inside a nested guest are left out.

    Raises
    ------
    RecordingError, TraceError
        Memory beyond 1 TiB, or what `replay()` refuses.
    """
    touched: list[tuple[Context, np.ndarray]]
    if isinstance(source, Recording):
        vcpu, contexts = recording_vcpu(source)
        real = source.pages_gpa[source.pages_io == 0]
        end = max(int(real.max(initial=0)), int(source.table_pfn.max(initial=0)) << PAGE_SHIFT) + 1
        touched = [(context, source.pages_gva[source.pages_ctx == number]) for number, context in enumerate(contexts)]
        error: type[ValueError] = RecordingError
    else:
        start = trace_start(source, touched=True)
        vcpu, end, error = start.vcpu, start.end, TraceError
        touched = [(context, np.array(sorted(pages), np.uint64)) for context, pages in start.touched.items()]
    if end > _MEMORY_LIMIT:
        raise error(f"{source.path}: its memory reaches to gpa {end - 1:#x}; allowed here is below {_MEMORY_LIMIT:#x}")
    block, _ = reserve(-(-end // _MEMORY_UNIT) * _MEMORY_UNIT)
    if isinstance(source, Recording):
        pages = block.reshape(-1, PAGE_SIZE)
        for pfn, page in zip(source.table_pfn.tolist(), source.table_data, strict=True):
            pages[pfn] = page
    else:
        addr, values = start.memory.words
        block.view("<u8")[addr >> np.uint64(3)] = values
    host = Host(tdp=tdp, maxphyaddr=_HOST_MAXPHYADDR, nx_huge_pages=nx_huge_pages)
    vm = Vm(GuestMemory(block), vcpu.cpu, host, backing=backing)
    guest = vm.create_vcpu()
    for context, gva in touched:
        if isinstance(context, Regs):
            if context.pdptrs is not None:              # as the recorded CPU took them: an NPT host has no others
                for gpa, pdpte in zip(pdpte_gpas(context.cr3), context.pdptrs, strict=True):
                    vm.mem.write_u64(gpa, pdpte)
            use_context(guest, context)
            guest.access(np.ascontiguousarray(gva), Access.AC)
    return vm


@dataclass(frozen=True)
class TraceStart:
    """A trace at its start, and which pages it touches later.

    Attributes
    ----------
    vcpu : Vcpu
        Has the memory that the trace brings, and the registers of its first vCPU.
    contexts : list of Context
        The register sets of the header.
    memory : TraceMemory
    touched : dict of Context to set of int
        Linear addresses of pages, by the registers under which they were accessed.
    end : int
        Behind the last byte of memory, brought or accessed.
    """

    vcpu: Vcpu
    contexts: list[Context]
    memory: TraceMemory
    touched: dict[Context, set[int]]
    end: int


def trace_start(trace: Trace, touched: bool = False) -> TraceStart:
    """Read a trace up to the end of its set-up; with `touched` to its end, for the pages that it touches.

    Raises
    ------
    TraceError
        The trace is damaged, brings no memory, or touches too many pages.
    """
    run = _TouchRun(trace.header)
    try:
        with closing(trace.chunks()) as chunks:
            for chunk in chunks:
                run.touch(chunk)
                if run.set_up is None and not touched:
                    break
        return run.start()
    except TraceError as error:
        raise with_file(error, trace) from error.__cause__


class _TouchRun(RowRun):
    """Registers followed through a trace, and pages noted. Nothing is walked, and writes are passed over."""

    def __init__(self, header: Header) -> None:
        super().__init__(header, None, alone=True)
        self.touched: dict[Context, set[int]] = {}
        self.pages = self.end = 0

    def touch(self, chunk: Chunk) -> None:
        row = self.set_up_rows(chunk)
        if self.set_up is None:
            stops = np.flatnonzero(np.isin(chunk.op, _STOPS)).tolist() if chunk.has_events else []
            for stop in [*stops, len(chunk)]:
                if row < stop:
                    self._note(chunk, slice(row, stop))
                if stop < len(chunk):
                    assert chunk.value is not None
                    vcpu = 0 if chunk.vcpu is None else int(chunk.vcpu[stop])
                    self.carry_out(stop, int(chunk.op[stop]), vcpu, 0, int(chunk.value[stop]))
                row = stop + 1
        self.rows += len(chunk)

    def _note(self, chunk: Chunk, rows: slice) -> None:
        op, addr, gpa = chunk.op[rows], chunk.addr[rows], chunk.gpa[rows]
        accesses = op < Op.MOV_CR3
        memory = gpa[accesses & (op & np.uint8(Op.LOAD_MMIO) == 0) & (gpa != np.uint64(INVALID_GPA))]
        self.end = max(self.end, int(memory.max(initial=0)) + 1)
        vcpus = [0] if chunk.vcpu is None else np.unique(chunk.vcpu[rows]).tolist()
        for vcpu in vcpus:
            here = accesses if chunk.vcpu is None else accesses & (chunk.vcpu[rows] == vcpu)
            pages = self.touched.setdefault(self.registers.context(vcpu), set())
            self.pages -= len(pages)
            pages.update(np.unique(addr[here] & ~np.uint64(PAGE_SIZE - 1)).tolist())
            self.pages += len(pages)
        if self.pages > _TOUCHED_LIMIT:
            raise TraceError(f"touches more than {_TOUCHED_LIMIT:,} pages, which is all that is allowed here")

    def start(self) -> TraceStart:
        if self.set_up is not None:
            self.begin(brings_memory=True)
        assert self.own_memory is not None
        end = max(gpa + size for gpa, size, _ in self.own_memory.guest.slots)
        registers = self.registers
        use_context(self.vcpu, registers.with_pdptrs(context_of(self.header.registers[0])))
        return TraceStart(self.vcpu, [registers.with_pdptrs(context) for context in registers.sets], self.own_memory,
                          self.touched, max(self.end, end))
