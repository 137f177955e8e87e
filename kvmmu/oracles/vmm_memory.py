"""Memory of a VMM behind the slots of a scenario: what the host does to it, and what its notifiers tell KVM of that."""

import mmap
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvmmu import Vm

__all__ = ["DIRTY_LOG_FLAG", "HUGE_PAGE_SIZE", "PAGE_SIZE", "READONLY_FLAG", "VmmSlot"]

PAGE_SIZE, HUGE_PAGE_SIZE = 4096, 2 << 20
DIRTY_LOG_FLAG, READONLY_FLAG = 1 << 0, 1 << 1
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

HostState = Literal["unmap", "protect"]


class VmmSlot:
    """A slot of the VMM: its memory outlives the slot of the machine."""

    def __init__(self, slot: dict[str, Any]) -> None:
        self.number, self.gpa, self.size = slot["slot"], slot["gpa"], slot["size"]
        self.flags = self.first_flags = slot.get("flags", 0)
        self.backing = slot.get("backing", "4k")
        self.data: NDArray[np.uint8] = np.zeros(self.size, np.uint8)
        self.present = False
        self.states: list[tuple[int, HostState]] = []   # offsets of host pages that are not plain ones, while it is not there
        self.split: set[int] = set()                    # offsets of huge host pages that are none any more
        self.areas = [(0, self.size, READ_WRITE)]       # of the VMM's memory, by protection: start, end, prot
        self.protected: set[int] = set()                # offsets of pages that are read-only for mprotect() alone
        self.unpopulated = bool(slot.get("unpopulated"))
        if self.unpopulated:
            self.states = [(offset, "unmap") for offset in range(0, self.size, PAGE_SIZE)]

    def pages_not_plain(self, vm: Vm) -> list[tuple[int, HostState]]:
        """Host pages that are not there, or are the zero page."""
        states: list[tuple[int, HostState]] = []
        for offset in range(0, self.size, PAGE_SIZE):
            _, _, unmapped, readonly = vm.kvm.host_page(self.gpa + offset)
            if unmapped or readonly:
                states.append((offset, "unmap" if unmapped else "protect"))
        return states

    def dontneed(self, vm: Vm, offset: int, size: int) -> None:
        """MADV_DONTNEED: the bytes are zeros, and nothing is behind the pages until the next access."""
        gone = range(offset, offset + size, PAGE_SIZE)
        self.data[offset:offset + size] = 0
        self.protected -= set(gone)
        if self.backing == "2m":
            self.split |= {at - at % HUGE_PAGE_SIZE for at in gone}
        if self.present:
            vm.invalidate(self.gpa + offset, size, "unmap")
            return
        self.states = [state for state in self.states if state[0] not in gone] + [(at, "unmap") for at in gone]

    def mprotect(self, vm: Vm, offset: int, size: int, prot: int) -> None:
        """mprotect(): PROT_READ, or with PROT_WRITE."""
        if prot not in (mmap.PROT_READ, READ_WRITE):
            raise ValueError(f"prot: want {mmap.PROT_READ} or {READ_WRITE}, got {prot}")
        areas: list[tuple[int, int, int]] = []
        for start, end, old in self.areas:
            first, last = max(start, offset), min(end, offset + size)
            if first >= last or old == prot:
                areas.append((start, end, old))
                continue
            if first > start:
                self._split_area(vm, first, start, end)
            if last < end:
                self._split_area(vm, last, first, end)
            self._protect(vm, first, last, prot)
            areas += [(start, first, old), (first, last, prot), (last, end, old)]
        self.areas = []
        for start, end, old in areas:                   # the host merges what is alike
            if start < end and self.areas and self.areas[-1][2] == old:
                start = self.areas.pop()[0]
            if start < end:
                self.areas.append((start, end, old))

    def _split_area(self, vm: Vm, edge: int, start: int, end: int) -> None:
        """An area of the VMM's memory gets an edge: the host splits what may be a huge page there, and its notifier says so."""
        block = edge - edge % HUGE_PAGE_SIZE
        if edge == block or block < start or block + HUGE_PAGE_SIZE > end:
            return
        if self.backing == "2m":
            self.split.add(block)
        if self.present and (not self.unpopulated or any(
                not vm.kvm.host_page(self.gpa + at)[2] for at in range(block, block + HUGE_PAGE_SIZE, PAGE_SIZE))):
            with vm.invalidation(self.gpa + block, HUGE_PAGE_SIZE):
                pass

    def _protect(self, vm: Vm, start: int, end: int, prot: int) -> None:
        """A whole area changes its protection. Pages that were read-only before, the zero page above all, stay it."""
        pages = range(start, end, PAGE_SIZE)
        if not self.present:
            known = {offset for offset, _ in self.states}
            if prot == mmap.PROT_READ:
                self.protected |= set(pages) - known
                self.states += [(at, "protect") for at in pages if at not in known]
            else:
                self.states = [state for state in self.states if state[0] not in pages or state[0] not in self.protected]
                self.protected -= set(pages)
            return
        with vm.invalidation(self.gpa + start, end - start):
            pass                                        # one notification for all
        if prot == mmap.PROT_READ:
            for at in pages:
                _, _, unmapped, readonly = vm.kvm.host_page(self.gpa + at)
                if not unmapped and not readonly:
                    self.protected.add(at)
            vm.kvm.invalidate(self.gpa + start, end - start, "readonly")
            return
        first = start
        while first < end:                              # whole runs: huge pages among them stay huge
            last = first
            while last < end and last in self.protected:
                last += PAGE_SIZE
            if last > first:
                vm.invalidate(self.gpa + first, last - first, "move")
            first = last + PAGE_SIZE
        self.protected -= set(pages)
