"""A live KVM as an oracle for whole machines: it runs the operations of a scenario and records what KVM did.

A scenario is the initial memory and registers of a guest and a list of operations on it; `run_live()` answers with one record per
operation: what the guest saw, which entries of its page tables changed, and by how much KVM's own counters moved. The form is
that of `kvmmu.oracles.run_scenario()`, which runs the same scenario here.

Operations at CPL 3 run natively, one entry of the guest each. What runs at CPL 0 is emulated by the KVM of a host whose guests
have no kernel mode of their own, and runs natively elsewhere: `unavailable()` tells such hosts apart.
"""

import ctypes
import mmap
import os
import platform
import struct
from typing import Any

from kvmmu.oracles.guest_stub import (
    FATAL,
    PORT_OF_EXCEPTIONS,
    PORT_OF_SUCCESS,
    SELECTORS,
    TSS_SELECTOR,
    VECTORS_WITH_ERROR_CODE,
    Stub,
)
from kvmmu.oracles.ioctls import (
    DescriptorTable,
    DirtyLog,
    EnableCap,
    FileDescriptors,
    GeneralRegs,
    MemoryRegion,
    RunHeader,
    Segment,
    Sregs,
    StatsDescriptor,
    StatsHeader,
    ioctl,
    load_cpuid,
    open_device,
)

__all__ = ["COUNTERS", "CannotRun", "LiveMachine", "run_live", "unavailable"]

COUNTERS = (
    "mmu_cache_miss", "mmu_shadow_zapped", "mmu_recycled", "mmu_flooded", "mmu_pde_zapped", "mmu_unsync", "mmu_pte_write",
    "pages_4k", "pages_2m", "pages_1g", "pf_taken", "pf_fixed", "pf_spurious", "pf_emulate", "pf_guest", "pf_fast", "invlpg",
    "remote_tlb_flush_requests", "remote_tlb_flush", "tlb_flush", "max_mmu_rmap_size", "mmio_exits", "insn_emulation",
    "insn_emulation_fail", "pf_mmio_spte_created", "nx_lpage_splits")
PAGE_SIZE, HUGE_PAGE_SIZE = 4096, 2 << 20
EXIT_IO, EXIT_MMIO, EXIT_INTERNAL_ERROR = 2, 6, 17
CAP_DISABLE_QUIRKS2, QUIRK_SLOT_ZAP_ALL = 213, 1 << 7
DIRTY_LOG_FLAG = 1 << 0
RFLAGS_IOPL_3, RFLAGS_FIXED = 3 << 12, 1 << 1
EFER_MSR = 0xC0000080
PAGE_FAULT = 14
PAGEMAP_PRESENT_BIT = 63


class CannotRun(Exception):
    """This machine, or this driver, cannot run the scenario; the text says why."""


class _Stats:
    """The counters behind one binary statistics file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        header = StatsHeader.from_buffer_copy(os.pread(fd, ctypes.sizeof(StatsHeader), 0))
        step = ctypes.sizeof(StatsDescriptor) + header.name_size
        table = os.pread(fd, step * header.num_desc, header.desc_offset)
        self.offset, self.places = header.data_offset, []
        end = 0
        for at in range(0, len(table), step):
            entry = StatsDescriptor.from_buffer_copy(table, at)
            name = table[at + ctypes.sizeof(StatsDescriptor):at + step].split(b"\0")[0].decode()
            end = max(end, entry.offset + 8 * entry.size)
            if name in COUNTERS and entry.size == 1:
                self.places.append((name, entry.offset))
        self.size = end

    def read(self) -> dict[str, int]:
        data = os.pread(self.fd, self.size, self.offset)
        return {name: struct.unpack_from("<q", data, at)[0] for name, at in self.places}


class _Backing:
    """The host memory behind a slot. IN pagemap: an open file descriptor."""

    def __init__(self, slot: dict[str, Any], pagemap: int) -> None:
        size, self.pagemap = slot["size"], pagemap
        self.size, self.kind = size, slot.get("backing", "4k")
        self.protected: list[tuple[int, int]] = []
        self.map = mmap.mmap(-1, size + HUGE_PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.at = -start % HUGE_PAGE_SIZE
        self.address = start + self.at
        if self.kind not in ("4k", "2m"):
            raise CannotRun(f"slot {slot['slot']}: backing {self.kind!r}; 4k and 2m are known")
        self.map.madvise(mmap.MADV_HUGEPAGE if self.kind == "2m" else mmap.MADV_NOHUGEPAGE, self.at, size)
        if not slot.get("unpopulated"):
            for at in range(self.at, self.at + size, PAGE_SIZE):
                self.map[at] = 0
        if self.kind == "2m" and self._huge_bytes() < size:
            raise CannotRun(f"slot {slot['slot']}: the host gave no 2M pages")
        self.map.madvise(mmap.MADV_NOHUGEPAGE, self.at, size)       # what goes or splits does not become huge again

    def _huge_bytes(self) -> int:
        """Return how much of it the host has in huge pages."""
        found, inside = 0, False
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                first = line.split(maxsplit=1)[0]
                if "-" in first and not first.endswith(":"):
                    low, high = (int(end, 16) for end in first.split("-"))
                    inside = low < self.address + self.size and self.address < high
                elif inside and first == "AnonHugePages:":
                    found += int(line.split()[1]) << 10
        return found

    def peek(self, offset: int) -> bytes:
        """A page. To read one that the host has not mapped would map it: a guest that writes there later would fault twice."""
        entry = os.pread(self.pagemap, 8, (self.address + offset) // PAGE_SIZE * 8)
        present = int.from_bytes(entry, "little") >> PAGEMAP_PRESENT_BIT & 1
        return self.read(offset, PAGE_SIZE) if present else bytes(PAGE_SIZE)

    def read(self, offset: int, size: int) -> bytes:
        return self.map[self.at + offset:self.at + offset + size]

    def write(self, offset: int, data: bytes) -> None:
        if any(start < offset + len(data) and offset < end for start, end in self.protected):
            raise ValueError(f"offset {offset:#x}: the host made that read-only")
        self.map[self.at + offset:self.at + offset + len(data)] = data

    def dontneed(self, offset: int, size: int) -> None:
        self.map.madvise(mmap.MADV_DONTNEED, self.at + offset, size)

    def protect(self, offset: int, size: int, prot: int) -> None:
        """PROT_READ, or with PROT_WRITE."""
        if not prot & mmap.PROT_READ:
            raise ValueError(f"prot: want {mmap.PROT_READ} or {mmap.PROT_READ | mmap.PROT_WRITE}, got {prot}")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), prot):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.protected = [part for part in self.protected if not offset <= part[0] < offset + size]
        if not prot & mmap.PROT_WRITE:
            self.protected.append((offset, offset + size))


class LiveMachine(FileDescriptors):
    """One VM with one vCPU that runs a scenario; a context manager.

    Parameters
    ----------
    scenario : dict
        `slots`, `regs`, `stub`, `mem`, `watch` and maybe `disable_quirk_slot_zap_all` and `cpu` (vendor, maxphyaddr, or
        both); numbers in strings are hexadecimal. A stub of None is where the recordings have theirs.

    Raises
    ------
    OSError
        A step fails; the message names it.
    CannotRun
        The scenario needs what this machine does not have.
    """

    def __init__(self, scenario: dict[str, Any]) -> None:
        super().__init__()
        self._slots: dict[int, dict[str, Any]] = {slot["slot"]: dict(slot) for slot in scenario["slots"]}
        self._stub = Stub(scenario.get("stub"), scenario.get("mode"))
        self._cpl: int | None = None
        try:
            self._create(bool(scenario.get("disable_quirk_slot_zap_all")), scenario.get("cpu", {}))
            self._fill(scenario)
            self._load(scenario["regs"])
        except BaseException:
            self.close()
            raise
        self._watched = [_number(gpa) for gpa in scenario["watch"]]
        self._tables = {gpa: self._peek(gpa) for gpa in self._watched}

    # ---- making it ---------------------------------------------------------------------------------------------------

    def _create(self, disable_quirk: bool, cpu: dict[str, Any]) -> None:
        device = self._keep(open_device())
        self._vm = self._keep(ioctl(device, "KVM_CREATE_VM"))
        if disable_quirk:
            cap = EnableCap(cap=CAP_DISABLE_QUIRKS2)
            cap.args[0] = QUIRK_SLOT_ZAP_ALL
            ioctl(self._vm, "KVM_ENABLE_CAP", cap)
        self._vcpu = self._keep(ioctl(self._vm, "KVM_CREATE_VCPU"))
        load_cpuid(device, self._vcpu, **cpu)
        self._run_map = mmap.mmap(self._vcpu, ioctl(device, "KVM_GET_VCPU_MMAP_SIZE"))
        self._run = RunHeader.from_buffer(self._run_map)
        self._stats = [_Stats(self._keep(ioctl(fd, "KVM_GET_STATS_FD"))) for fd in (self._vm, self._vcpu)]

    def _fill(self, scenario: dict[str, Any]) -> None:
        """Make the slots and write the initial memory."""
        stub = {"slot": self._stub.slot, "gpa": self._stub.gpa, "size": self._stub.size}
        pagemap = self._keep(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        self._backings = {slot["slot"]: _Backing(slot, pagemap) for slot in (*self._slots.values(), stub)}
        self._slots[self._stub.slot] = stub
        self._present: dict[int, tuple[int, int]] = {}
        for number, slot in self._slots.items():
            self._set_slot(number, slot["gpa"], slot.get("flags", 0), slot["size"])
        for gpa, value in scenario["mem"]:
            self._write(_number(gpa), _number(value).to_bytes(8, "little"))
        for address, data in self._stub.memory():
            self._write(address, data)

    def _set_slot(self, number: int, gpa: int, flags: int, size: int) -> None:
        region = MemoryRegion(slot=number, flags=flags, guest_phys_addr=gpa, memory_size=size,
                              userspace_addr=self._backings[number].address)
        ioctl(self._vm, "KVM_SET_USER_MEMORY_REGION", region)
        self._present.pop(number, None)
        if size:
            self._present[number] = gpa, flags

    def _find(self, gpa: int) -> tuple[_Backing, int]:
        """The backing of an address, and the offset in it; a deleted slot is where it was."""
        for number, slot in self._slots.items():
            start = self._present.get(number, (slot["gpa"], 0))[0]
            if start <= gpa < start + slot["size"]:
                return self._backings[number], gpa - start
        raise ValueError(f"gpa {gpa:#x}: in none of the slots")

    def _read(self, gpa: int, size: int) -> bytes:
        backing, offset = self._find(gpa)
        return backing.read(offset, size)

    def _peek(self, gpa: int) -> bytes:
        backing, offset = self._find(gpa)
        return backing.peek(offset)

    def _write(self, gpa: int, data: bytes) -> None:
        backing, offset = self._find(gpa)
        backing.write(offset, data)

    def _load(self, regs: dict[str, str]) -> None:
        """Load control registers and everything that exceptions need."""
        sregs = self._sregs = Sregs()
        ioctl(self._vcpu, "KVM_GET_SREGS", sregs)
        for name, value in regs.items():
            setattr(sregs, name, _number(value))
        for name, (base, limit) in (("gdt", self._stub.gdt), ("idt", self._stub.idt)):
            setattr(sregs, name, DescriptorTable(base=base, limit=limit))
        base, limit = self._stub.tss
        sregs.tr = Segment(base=base, limit=limit, selector=TSS_SELECTOR, type=11, present=1)
        sregs.ldt = Segment(unusable=1)
        self._use_cpl(0)
        got = Sregs()
        ioctl(self._vcpu, "KVM_GET_SREGS", got)
        for name, value in regs.items():
            if getattr(got, name) != _number(value):
                raise CannotRun(f"{name} {value}: KVM keeps {getattr(got, name):#x}")

    def _use_cpl(self, cpl: int) -> None:
        """Put the vCPU into a privilege level; `self._sregs` are its registers."""
        code, data = SELECTORS[cpl]
        common = {"limit": 0xFFFFFFFF, "present": 1, "dpl": cpl, "s": 1, "g": 1}
        mode = {"l": 1} if self._stub.long_mode else {"db": 1}
        self._sregs.cs = Segment(selector=code, type=11, **mode, **common)
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(self._sregs, name, Segment(selector=data, type=3, db=1, **common))
        ioctl(self._vcpu, "KVM_SET_SREGS", self._sregs)
        self._cpl = cpl

    # ---- operations --------------------------------------------------------------------------------------------------

    def apply(self, op: dict[str, Any]) -> dict[str, Any]:
        """Do one operation; returns its record: result, val, delta, ptes, dirty_gfns, those that are."""
        record: dict[str, Any] = {}
        before = self._counters()
        if "cpl" in op:
            record["result"] = self._guest(op, record)
        else:
            record["result"] = self._host(op, record)
        after = self._counters()
        if "cpl" in op and record["result"][0] not in FATAL:
            after["insn_emulation"] -= 1                    # the OUT that ends it
        record["delta"] = {name: after[name] - before[name] for name in COUNTERS if after[name] != before[name]}
        ptes = self._changes()
        if ptes:
            record["ptes"] = ptes
        return record

    def _counters(self) -> dict[str, int]:
        values = dict.fromkeys(COUNTERS, 0)
        for stats in self._stats:
            values.update(stats.read())
        return values

    def _changes(self) -> list[list[str]]:
        """Entries of watched tables that differ from what they were."""
        changed = []
        for gpa in self._watched:
            try:
                old, new = self._tables[gpa], self._peek(gpa)
            except ValueError:
                continue                                    # its slot has moved
            if old != new:
                self._tables[gpa] = new
                changed += [[f"{gpa + at:x}", f"{int.from_bytes(new[at:at + 8], 'little'):x}"]
                            for at in range(0, PAGE_SIZE, 8) if old[at:at + 8] != new[at:at + 8]]
        return changed

    def _guest(self, op: dict[str, Any], record: dict[str, Any]) -> list[Any]:
        """One entry of the guest."""
        name, cpl = op["op"], op["cpl"]
        back = self._stub.return_va(name, cpl)
        if cpl != self._cpl:
            ioctl(self._vcpu, "KVM_GET_SREGS", self._sregs)
            self._use_cpl(cpl)
        value = _number(op.get("val", 0))
        regs = GeneralRegs(
            rbx=_number(op.get("va", 0)), rcx=value, rdx=back, rsp=self._stub.stack_va,
            rip=self._stub.code_va(name, cpl), rflags=RFLAGS_FIXED | RFLAGS_IOPL_3)
        if name == "efer":
            regs.rcx, regs.rax, regs.rdx = EFER_MSR, value & 0xFFFFFFFF, value >> 32
        ioctl(self._vcpu, "KVM_SET_REGS", regs)
        result = self._enter()
        if name.startswith("load") and result == ["ok"]:
            ioctl(self._vcpu, "KVM_GET_REGS", regs)
            record["val"] = f"{regs.rax:x}"
        return result

    def _enter(self) -> list[Any]:
        """Run until the guest says that it is done; what happened."""
        mmio: list[Any] = []
        while True:
            ioctl(self._vcpu, "KVM_RUN")
            reason, exit = self._run.exit_reason, self._run.exit
            if reason == EXIT_MMIO:
                access = exit.mmio
                data = [bytes(access.data[:access.len]).hex()] if access.is_write else []
                mmio += ["mmio", "w" if access.is_write else "r", f"{access.phys_addr:x}", access.len, *data]
                ctypes.memset(ctypes.byref(access.data), 0, 8)
            elif reason == EXIT_IO and exit.io.port == PORT_OF_SUCCESS:
                return [*mmio, "ok"]
            elif reason == EXIT_IO:
                return mmio + self._exception(exit.io.port - PORT_OF_EXCEPTIONS)
            else:
                self._cpl = None
                return ["internal", exit.internal.suberror] if reason == EXIT_INTERNAL_ERROR else ["exit", reason]

    def _exception(self, vector: int) -> list[Any]:
        self._cpl = None
        error = None
        if vector in VECTORS_WITH_ERROR_CODE:
            regs = GeneralRegs()
            ioctl(self._vcpu, "KVM_GET_REGS", regs)
            error = int.from_bytes(self._read(self._stub.gpa + regs.rsp - self._stub.va, self._stub.word), "little")
        if vector == PAGE_FAULT:
            sregs = Sregs()
            ioctl(self._vcpu, "KVM_GET_SREGS", sregs)
            return ["#PF", f"{error:x}", f"{sregs.cr2:x}"]
        return ["exc", vector, error]

    def _host(self, op: dict[str, Any], record: dict[str, Any]) -> list[Any]:
        """One operation of the VMM."""
        action = getattr(self, f"_op_{op['op']}", None)
        if action is None:
            raise ValueError(f"op: no host operation {op['op']!r}")
        try:
            result = action(op)
        except OSError as error:
            return ["host", -(error.errno or 0)]
        if result is not None:
            record["dirty_gfns"] = result
        return ["host", 0]

    def _op_host_write(self, op: dict[str, Any]) -> None:
        self._write(_number(op["gpa"]), _number(op["val"]).to_bytes(8, "little"))

    def _op_host_touch(self, op: dict[str, Any]) -> None:
        self._write(_number(op["gpa"]), self._read(_number(op["gpa"]), 8))

    def _op_set_sregs(self, op: dict[str, Any]) -> None:
        ioctl(self._vcpu, "KVM_GET_SREGS", self._sregs)
        for name in ("cr0", "cr3", "cr4", "efer"):
            if name in op:
                setattr(self._sregs, name, _number(op[name]))
        ioctl(self._vcpu, "KVM_SET_SREGS", self._sregs)

    def _op_slot_delete(self, op: dict[str, Any]) -> None:
        number = op["slot"]
        gpa, flags = self._present[number]
        self._set_slot(number, gpa, flags, 0)
        self._slots[number]["gpa"] = gpa

    def _op_slot_set(self, op: dict[str, Any]) -> None:
        number = op["slot"]
        slot = self._slots[number]
        gpa = _number(op["gpa"]) if "gpa" in op else self._present.get(number, (slot["gpa"], 0))[0]
        flags = op["flags"] if "flags" in op else slot.get("flags", 0)
        self._set_slot(number, gpa, flags, slot["size"])
        slot["gpa"] = gpa

    def _op_dirty_get(self, op: dict[str, Any]) -> list[str]:
        gpa = self._present[op["slot"]][0]
        bits = (ctypes.c_uint8 * (-(-self._slots[op["slot"]]["size"] // PAGE_SIZE // 64) * 8))()
        ioctl(self._vm, "KVM_GET_DIRTY_LOG", DirtyLog(slot=op["slot"], dirty_bitmap=ctypes.addressof(bits)))
        bitmap = int.from_bytes(bytes(bits), "little")
        return [f"{gpa // PAGE_SIZE + bit:x}" for bit in range(bitmap.bit_length()) if bitmap >> bit & 1]

    def _op_dontneed(self, op: dict[str, Any]) -> None:
        self._backings[op["slot"]].dontneed(_number(op["off"]), _number(op["len"]))

    def _op_mprotect(self, op: dict[str, Any]) -> None:
        self._backings[op["slot"]].protect(_number(op["off"]), _number(op["len"]), _number(op["prot"]))

    def _op_nr_mmu_pages(self, op: dict[str, Any]) -> None:
        ioctl(self._vm, "KVM_SET_NR_MMU_PAGES", _number(op["n"]))


def _number(value: "int | str") -> int:
    return int(value, 16) if isinstance(value, str) else value


def unavailable() -> str | None:
    """Say why scenarios cannot run here; None if they can, as they did where they were recorded.

    Returns
    -------
    str or None
    """
    if platform.machine() != "x86_64":
        return f"the driver knows the structures of x86_64 only, this machine is {platform.machine()}"
    stub = {"slot": 1, "gpa": "0x10000", "size": "0x10000", "va": "0x0", "user_code_va": "0x1000", "mem": [
        ["0x15000", "0x16067"], ["0x16000", "0x17067"],
        *([f"{0x17000 + 8 * page:#x}", f"{0x10063 + 0x1000 * page | (page == 1) << 2:#x}"] for page in range(5))]}
    scenario = {
        "slots": [{"slot": 0, "gpa": 0, "size": PAGE_SIZE}], "mem": [["0x0", "0x15027"]], "watch": [], "stub": stub,
        "regs": {"cr0": "0x80050033", "cr3": "0x0", "cr4": "0x20", "efer": "0xd01"},
        "ops": [{"op": "null", "cpl": 0}, {"op": "load", "cpl": 0, "va": "0x4000"}]}
    try:
        records = run_live(scenario)
    except (OSError, CannotRun) as error:
        return str(error)
    if [record["result"] for record in records] != [["ok"], ["ok"]] or records[0]["delta"].get("mmu_cache_miss", 0) == 0:
        return f"its KVM does not shadow the page tables of guests, or does not run them: {records}"
    if records[1]["delta"].get("pf_taken", 0) or not records[1]["delta"].get("insn_emulation"):
        return "its KVM runs the guest's kernel mode natively, the recordings emulate it"
    return None


def run_live(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a scenario on the KVM of this machine.

    Parameters
    ----------
    scenario : dict
        As of `LiveMachine`, and `ops`.

    Returns
    -------
    list of dict
        A record per operation; fewer if the guest came to an end.

    Raises
    ------
    OSError
        There is no KVM, or it refuses a step.
    CannotRun
        The scenario needs what this machine does not have.
    """
    records = []
    with LiveMachine(scenario) as machine:
        for op in scenario["ops"]:
            records.append(machine.apply(op))
            if records[-1]["result"][0] in FATAL:
                break
    return records
