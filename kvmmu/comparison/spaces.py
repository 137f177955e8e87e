"""Page tables made for the address spaces of a trace, all in one guest memory."""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GVA_BITS_4_LEVEL, PAGE_SHIFT, PAGE_SIZE
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.memory._memory import GuestMemory
from kvmmu.replay.trace_memory import memory_limit, reserve
from kvmmu.tables._page_set import PageSet
from kvmmu.tables.layout import check_layout, layout_pages, tables_needed
from kvmmu.tables.modes import MODES
from kvmmu.tables.page_tables import PageTables
from kvmmu.traces import TraceError
from kvmmu.vm.vcpu import Vcpu

__all__ = ["MadeSpaces", "canonical_pages"]

_THP_SHARE = 0.5
_MEMORY_LIMIT = 1 << 44                     # of guest-physical addresses
_UNIT = 1 << 21                             # a slot that ends between large pages has small ones there


class _Plan(NamedTuple):
    """Pages of one space by size: their addresses, and the tables that they take."""

    pages: dict[int, NDArray[np.uint64]]
    tables: int


def canonical_pages(touched: PageSet) -> NDArray[np.uint64]:
    """Return the numbers of the touched pages whose addresses are canonical under 4-level paging, ascending."""
    pages, bits = touched.pages(), GVA_BITS_4_LEVEL - PAGE_SHIFT
    upper = pages >> np.uint64(bits - 1)
    canonical: NDArray[np.uint64] = pages[(upper == 0) | (upper == np.uint64((1 << 64 - PAGE_SHIFT - bits + 1) - 1))]
    return canonical


class MadeSpaces:
    """4-level tables for every address space of a trace, with pages by one policy; each space has frames of its own.

    Parameters
    ----------
    touched : dict of hashable to PageSet
        The pages that are touched in each space.
    page : {"4k", "2m", "1g", "thp"}

    Attributes
    ----------
    mem : GuestMemory
    tables : list of PageTables
        By the number of the space, in the order of `touched`.
    page_count : dict of int to int
        Pages by size (bytes).

    Raises
    ------
    TraceError
        They take more memory than is allowed.
    """

    def __init__(self, touched: dict[Hashable, PageSet], page: str) -> None:
        self.page = page
        shape = check_layout(page, "linear", "4l", _THP_SHARE)
        plans = []
        for pages in touched.values():
            layout = layout_pages(canonical_pages(pages), page, _THP_SHARE, shape.large_shift)
            plans.append(_Plan(layout, tables_needed(layout, MODES["4l"].table_shifts) + shape.fixed_tables))
        table_bytes = sum(plan.tables for plan in plans) * PAGE_SIZE
        if table_bytes > memory_limit():
            raise TraceError(f"its page tables take {table_bytes:,} bytes; allowed are {memory_limit():,}")
        sizes = sorted({size for plan in plans for size in plan.pages}, reverse=True)
        first, at = {}, PAGE_SIZE * 512 * -(-table_bytes // (PAGE_SIZE * 512))
        for size in sizes:
            at = -(-at // size) * size
            first[size] = at
            at += size * sum(plan.pages[size].size for plan in plans if size in plan.pages)
        if at > _MEMORY_LIMIT:
            raise TraceError(f"its pages take {at:#x} bytes of guest memory; allowed are {_MEMORY_LIMIT:#x}")
        # Behind them is room for a second stage that maps all of it by 4K pages
        self._second_stage = -(-max(at, _UNIT) // _UNIT) * _UNIT
        mapped = table_bytes // PAGE_SIZE + at // PAGE_SIZE
        self.size = self._second_stage + -(-(mapped // 256 + 4096) * PAGE_SIZE // _UNIT) * _UNIT
        block, self._mapping = reserve(self.size)
        self.mem = GuestMemory(block)
        self.page_count = {size: sum(plan.pages[size].size for plan in plans if size in plan.pages) for size in sizes}
        self.frames: dict[int, tuple[int, int]] = {size: (first[size], self.page_count[size]) for size in sizes}
        self.table_bytes = table_bytes
        self.tables, next_table, next_page = [], 0, dict(first)
        for plan in plans:
            stop = next_table + plan.tables * PAGE_SIZE
            tables = PageTables(self.mem, "4l", frames=range(next_table, stop, PAGE_SIZE))
            for size, addr in plan.pages.items():
                frames = np.uint64(next_page[size]) + np.arange(addr.size, dtype=np.uint64) * np.uint64(size)
                tables.map(addr, frames, size)
                next_page[size] += size * addr.size
            next_table = stop
            self.tables.append(tables)
        self._clean = self.mem.read(0, self.table_bytes) if self.table_bytes else b""

    def vcpu(self) -> Vcpu:
        """Return a vCPU over the memory, with the registers of the first space."""
        vcpu = Vcpu(self.mem, cpu=CpuModel(maxphyaddr=46), tdp="ept")
        vcpu.set_regs(self.regs(0))
        return vcpu

    def regs(self, space: int) -> Regs:
        """Return the registers that walk the tables of a space."""
        return self.tables[space].regs()

    def second_stage_room(self, pages: int) -> range:
        """Return frames for the tables of a second stage of so many pages; they are zero."""
        stop = min(self._second_stage + (pages // 256 + 4096) * PAGE_SIZE, self.size)
        room = range(self._second_stage, stop, PAGE_SIZE)
        for start in range(self._second_stage, stop, _UNIT):
            self.mem.write(start, bytes(min(_UNIT, stop - start)))
        return room

    def level_of(self, gva: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the level of the page that maps each address in the first space that has one; 0 without."""
        found = np.zeros(gva.size, np.uint64)
        walk = self.vcpu().gva_walk
        for space in range(len(self.tables)):
            walked = walk.translate(gva, 0, regs=[self.regs(space)], fields=("status", "level"), set_ad=False)
            level = np.where(walked.status == 0, walked.level, 0).astype(np.uint64)
            found = np.where(found == 0, level, found)
        return found

    def clean(self) -> None:
        """Set the tables to what they were when they were made: no accessed and dirty bits."""
        if self._clean:
            self.mem.write(0, self._clean)
