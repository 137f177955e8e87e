"""VirtualMachine: the memory and the host of one virtual machine, and the operations of the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.arch.arguments import check_bool, check_gpa, check_int, check_length, check_name, check_pages
from kvmmu.arch.registers import CpuModel
from kvmmu.memory._lock import MachineLock
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.audit._audit import audit
from kvmmu.mmu.host import Host
from kvmmu.mmu.kvm._inspect import clear_stats, pages, set_trace, stats
from kvmmu.mmu.kvm._state import Kvm
from kvmmu.vm.locked import PartOfMachine, as_bytes, locked
from kvmmu.vm.snapshot import Snapshot, load_into, take_snapshot
from kvmmu.vm.tracepoints import Tracepoints
from kvmmu.walk.results import check_array

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["VirtualMachine"]

PageSize = Literal["4k", "2m", "1g"]
_LEVELS = {"4k": 1, "2m": 2, "1g": 3}
_COUNT_MAX = (1 << 32) - 1              # KVM takes both counts as 32 bits


class VirtualMachine(PartOfMachine):
    """One virtual machine without a way to make vCPUs. `Vm`, which makes them, describes parameters and attributes."""

    def __init__(self, mem: GuestMemory, cpu: CpuModel | None = None, host: Host | None = None, *,
                 smm_mem: GuestMemory | None = None, backing: PageSize | None = None, slot_zap_all: bool = True) -> None:
        self._make(mem, cpu, host, smm_mem, backing=backing, slot_zap_all=slot_zap_all)

    def _make(self, mem: GuestMemory, cpu: CpuModel | None, host: Host | None, smm_mem: GuestMemory | None, *,
              backing: PageSize | None = None, slot_zap_all: bool = True, lock: MachineLock | None = None) -> None:
        for name, memory in (("mem", mem), ("smm_mem", mem if smm_mem is None else smm_mem)):
            if not isinstance(memory, GuestMemory):
                raise TypeError(f"{name}: want a GuestMemory, got {type(memory).__name__}")
        if not isinstance(host, Host | None):
            raise TypeError(f"host: want a Host, got {type(host).__name__}")
        if not isinstance(cpu, CpuModel | None):
            raise TypeError(f"cpu: want a CpuModel, got {type(cpu).__name__}")
        self.mem = mem
        self.smm_mem = mem if smm_mem is None else smm_mem
        self.cpu = CpuModel() if cpu is None else cpu
        self.host = Host() if host is None else host
        self.kvm = Kvm(self.host, mem, self.smm_mem, None if backing is None else _level("backing", backing),
                       check_bool("slot_zap_all", slot_zap_all), lock)
        self._lock = self.kvm.lock
        self.vcpus: list[Any] = []
        self._made_vcpus = 0
        self._joined: WeakSet[Any] = WeakSet()      # every vCPU that lives, those that were taken from `vcpus`, too
        self._trace: Tracepoints | None = None

    @locked
    def _join(self, vcpu: Any) -> int:
        """Take a vCPU; returns its number."""
        number, self._made_vcpus = self._made_vcpus, self._made_vcpus + 1
        self.vcpus.append(vcpu)
        self._joined.add(vcpu)
        return number

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the present state, all of it, for `restore()`.

        Memory with its slots, page tables of the host, vCPUs with their registers, nested guests and TLBs, statistics, dirty
        logs and tracepoints are in it. Page-table builders and replays that use the machine are not.

        Raises
        ------
        RuntimeError
            Within another call on the machine, or within `invalidation()`.
        ValueError
            A state in which the machine cannot run: the host cannot back the slots, or has no protection keys for the guest.

        Notes
        -----
        Takes a copy of the page tables and of the pages of memory that were written, as `GuestMemory.copy()` does.
        """
        with self._lock:
            self._lock.check_outermost("snapshot()")
            return take_snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot of this machine in force: it goes on exactly as it did then.

        vCPUs and MMUs are the same objects. A vCPU that was made since leaves `vcpus`; whoever holds it has it as if it had not
        run. The bytes of read-only buffers are their owners', and stay. An interrupted restore (Ctrl-C) has to be repeated.

        Raises
        ------
        TypeError
            No Snapshot.
        ValueError
            A snapshot of another machine.
        RuntimeError
            Within another call on the machine, or within `invalidation()`.

        Notes
        -----
        Costs a copy of the page tables, and a comparison of the pages of memory that were written before or since; those that
        differ are stored.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot: want a Snapshot, got {type(snapshot).__name__}")
        if snapshot.vm is not self:
            raise ValueError("snapshot: it is of another machine; restore() of that one takes it")
        with self._lock:
            self._lock.check_outermost("restore()")
            load_into(self, snapshot)

    # ---- inspection --------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, int]:
        """Counters by KVM's names, since the machine was made or `clear_stats()`; pages_* count what is mapped now."""
        return stats(self.kvm)

    def clear_stats(self) -> None:
        """Set the counters to zero, but those of present pages."""
        clear_stats(self.kvm)

    @property
    def trace(self) -> Tracepoints | None:
        """The tracepoints that are on; assign a `Tracepoints` to begin, None to end."""
        return self._trace

    @trace.setter
    @locked
    def trace(self, trace: Tracepoints | None) -> None:
        if not isinstance(trace, Tracepoints | None):
            raise TypeError(f"trace: want Tracepoints or None, got {type(trace).__name__}")
        if trace is None:
            set_trace(self.kvm, 0, 0)
        else:
            trace.attach(self.kvm)
        self._trace = trace

    @locked
    def audit(self, guest_tables: bool = False) -> list[str]:
        """Return the faults of the page tables and the TLBs: one line each, none if every invariant holds.

        Parameters
        ----------
        guest_tables : bool
            Compare shadow pages that are in sync with the guest's tables, too. That is right as long as nobody writes the tables
            without KVM, as `host_write()` does, or under PAE a write of four bytes over the edge
            of two entries.
        """
        logged = {page for vcpu in self.vcpus for page in vcpu._logged()}
        wrong = audit(self.kvm, check_bool("guest_tables", guest_tables), logged)
        for vcpu in self.vcpus:
            wrong += vcpu.audit_tlb()
        return wrong

    def sptes(self) -> dict[str, NDArray[np.uint64]]:
        """Return every page of SPTEs.

        Returns
        -------
        dict of str to ndarray of uint64
            One row per page: sp (its number), gfn, role (a word: `CpuRole`), root_count, nx (split by the NX mitigation),
            unsync, special (top of a root without a guest's table behind it). Of shape (n, 512): sptes, and translations,
            gfn << 12 | `Acc` of what leaf entries map in pages that shadow a guest's table.
        """
        return pages(self.kvm)

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> list[dict[str, Any]]:
        """The memslots: id, as_id, gpa, size, pfn, readonly, dirty_log."""
        return self.kvm.slots()

    @locked
    def add_slot(self, gpa: int, size_or_buffer: "int | Buffer | NDArray[Any]", readonly: bool = False,
                 dirty_log: bool = False) -> None:
        """Create a memslot; as `GuestMemory.add_slot()`.

        Raises
        ------
        ValueError
            As `GuestMemory.add_slot()`, or the host has too few physical addresses to back it; nothing changed.
        """
        gpa, dirty_log = check_pages("gpa", gpa, 0, GPA_LIMIT - PAGE_SIZE), check_bool("dirty_log", dirty_log)
        self.kvm.sync_slots()                           # whatever is wrong with the others is not this one's fault
        self.mem.add_slot(gpa, size_or_buffer, readonly)
        try:
            self.kvm.sync_slots()
            if dirty_log:
                self.kvm.set_dirty_log(gpa, True, created=True)
        except BaseException:
            self.mem.remove_slot(gpa)
            self.kvm.sync_slots()
            raise

    @locked
    def delete_slot(self, gpa: int) -> NDArray[np.uint8]:
        """Delete the memslot that begins at gpa, and the page tables that `slot_zap_all` says; returns its bytes."""
        data = self.mem.remove_slot(gpa)
        self.kvm.sync_slots()
        return data

    @locked
    def move_slot(self, gpa: int, to: int) -> None:
        """Move the memslot that begins at gpa: its bytes, its dirty log, and whether it is read-only go with it.

        Raises
        ------
        ValueError
            No slot begins there, it is the only one, or `to` is no place for it; the slot is where it was.
        """
        gpa, to = check_gpa("gpa", gpa), check_pages("to", to, 0, GPA_LIMIT - PAGE_SIZE)
        slot = next((slot for slot in self.slots if slot["gpa"] == gpa and slot["as_id"] == 0), None)
        spare = slot is not None and len(self.mem.slots) == 1
        if slot is None or spare:
            raise ValueError(f"gpa {gpa:#x}: " + ("the only slot cannot move" if spare else "no slot begins there"))
        dirty = self.kvm.dirty_log(gpa, False) - np.uint64(gpa // PAGE_SIZE) if slot["dirty_log"] else None
        data = self.mem.remove_slot(gpa)
        at, placed = to, False
        try:
            self.kvm.sync_slots()
            self.mem.add_slot(to, data, slot["readonly"])
            placed = True
            self.kvm.sync_slots()
        except BaseException:
            if placed:
                self.mem.remove_slot(to)
            self.mem.add_slot(gpa, data, slot["readonly"])
            at = gpa
            raise
        finally:
            self.kvm.sync_slots()
            if dirty is not None:
                self.kvm.set_dirty_log(at, True, created=True, dirty=dirty)

    @locked
    def write_guest_physical(self, gpa: int, data: "Buffer | NDArray[Any]") -> None:
        """Write guest memory as KVM does on behalf of the guest: the frames are dirty then.

        Raises
        ------
        ValueError
            Part of the range is a hole, or read-only to the guest; nothing is written.
        """
        gpa, data = check_gpa("gpa", gpa), as_bytes(data)
        size = check_length("data", len(data), gpa)
        readonly = self.kvm.readonly_slot(gpa, size)
        if readonly is not None:
            raise ValueError(f"the slot at gpa {readonly:#x} is read-only to the guest")
        self.mem.write(gpa, data)
        if size:
            self.kvm.note_write(gpa, size)
            self.kvm.track_write(gpa, size)

    @locked
    def host_write(self, gpa: int, data: "Buffer | NDArray[Any]") -> None:
        """Write guest memory as the VMM's own process does: KVM is notified only if the host has to give the page a copy.

        Raises
        ------
        ValueError
            Part of the range is a hole; nothing is written.
        """
        gpa, data = check_gpa("gpa", gpa), as_bytes(data)
        check_length("data", len(data), gpa)
        self.mem.write(gpa, data)
        if data:
            self.kvm.note_write(gpa, len(data), dirty=False)

    @locked
    def set_nr_mmu_pages(self, n: int) -> None:
        """Limit the number of shadow pages; the oldest go beyond it. 64 are always allowed.

        By default 2% of the pages of memory.
        """
        self.kvm.set_nr_mmu_pages(check_int("n", n, 1, _COUNT_MAX))

    @locked
    def set_dirty_log(self, gpa: int, on: bool = True, *, initially_set: bool = False) -> None:
        """Start or stop the dirty log of the slot that holds gpa.

        initially_set: it begins with every page, and nothing is protected or split until it is cleared
        (KVM_DIRTY_LOG_INITIALLY_SET).
        """
        gpa, on, initially_set = check_gpa("gpa", gpa), check_bool("on", on), check_bool("initially_set", initially_set)
        self._drain()
        self.kvm.set_dirty_log(gpa, on, full=initially_set)

    @locked
    def get_dirty_log(self, gpa: int, clear: bool = True) -> NDArray[np.uint64]:
        """Return the frames written since the log of the slot at gpa was cleared, ascending; `clear` protects them again."""
        gpa, clear = check_gpa("gpa", gpa), check_bool("clear", clear)
        self._drain()
        return self.kvm.dirty_log(gpa, clear)

    @locked
    def clear_dirty_log(self, gpa: int, size: int, pages: NDArray[np.uint64] | None = None) -> None:
        """Clear a part of a dirty log, and protect it again (KVM_CLEAR_DIRTY_LOG): what a VMM does as it sends pages.

        Parameters
        ----------
        gpa, size : int
            Bytes: whole pages of one slot. KVM's call begins at a multiple of 64 pages and takes a bitmap; this one takes any.
        pages : ndarray of uint64, optional
            Frames in that range, as of `get_dirty_log(gpa, clear=False)`; the others stay as they are.

        Raises
        ------
        ValueError
            The slot has no dirty log, or does not hold the range; a frame beyond the range.
        """
        gpa, size = check_pages("gpa", gpa, 0, GPA_LIMIT - PAGE_SIZE), check_pages("size", size)
        if pages is not None:
            pages = check_array("pages", pages, np.dtype(np.uint64))
        self._drain()
        self.kvm.clear_dirty_log(gpa, size, pages)

    def _drain(self) -> None:
        for vcpu in self.vcpus:
            vcpu.drain_pml()

    # ---- the host ----------------------------------------------------------------------------------------------------

    def set_backing(self, gpa: int, size: int, level: PageSize) -> None:
        """Let the host have pages of another size ("4k", "2m", "1g") behind [gpa, gpa + size)."""
        self.kvm.set_backing(*_range(gpa, size), _level("level", level))

    def invalidate(self, gpa: int, size: int, how: Literal["unmap", "move", "protect"] = "unmap") -> None:
        """Take pages away, as the host does, with a notification of KVM by its mmu notifier.

        Parameters
        ----------
        gpa, size : int
            Whole pages.
        how : {"unmap", "move", "protect"}
            "unmap": nothing is there until the next access, which finds the zero page or, writing, a page of its own;
            "move": other pages with the same contents; "protect": the same pages, read-only until a write copies them.
        """
        self.kvm.invalidate(*_range(gpa, size), check_name("how", how, ("unmap", "move", "protect")))

    @contextmanager
    def invalidation(self, gpa: int, size: int) -> Iterator[None]:
        """Run an mmu notifier around a block: within, faults on these pages return RetPf.RETRY, and no access succeeds."""
        self.kvm.begin_invalidation(*_range(gpa, size))
        try:
            yield
        finally:
            self.kvm.end_invalidation()

    def age(self, gpa: int, size: int) -> bool:
        """True if any of the pages was accessed since the last call; all are old then."""
        return self.kvm.age(*_range(gpa, size), True)

    def test_age(self, gpa: int, size: int) -> bool:
        """True if any of the pages was accessed since they were aged; changes nothing."""
        return self.kvm.age(*_range(gpa, size), False)

    # ---- page tables -------------------------------------------------------------------------------------------------

    def zap_all(self) -> None:
        """Zap all page tables of the host."""
        self.kvm.zap_all_fast()

    def recover_nx_huge_pages(self, ratio: int = 60) -> int:
        """Run one period of the recovery worker: zap the oldest 1/ratio of the tables of the NX mitigation; returns how many."""
        return self.kvm.recover_nx_huge_pages(check_int("ratio", ratio, 1, _COUNT_MAX))

    def split_huge_pages(self, gpa: int, size: int, level: PageSize = "4k") -> None:
        """Split huge mappings of [gpa, gpa + size) by the TdpMmu down to a level. Those of a shadow MMU stay."""
        self.kvm.split_huge_pages(*_range(gpa, size), _level("level", level))

    def recover_huge_pages(self) -> None:
        """Replace tables by huge mappings wherever slots and host allow it."""
        self.kvm.recover_huge_pages()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host} {len(self.vcpus)} vCPUs>"


def _level(name: str, value: str) -> int:
    return _LEVELS[check_name(name, value, _LEVELS)]


def _range(gpa: int, size: int) -> tuple[int, int]:
    """Return gpa and size, if they are whole pages within guest-physical memory."""
    gpa = check_pages("gpa", gpa, 0, GPA_LIMIT - PAGE_SIZE)
    return gpa, check_length("size", check_pages("size", size, PAGE_SIZE, GPA_LIMIT), gpa)
