"""Scenarios on the machine here: the operations of a recorded guest, and records like those of the KVM that ran it.

A scenario's guest runs user mode natively and has its kernel mode emulated; its host pages no second stage. Each operation enters
the guest once. What that does to page tables besides the operation's own access is one fetch from the stub's code page, in user
mode only; all else that the stub does is emulated and leaves no trace.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from kvmmu import (
    INVALID_GPA,
    Access,
    CpuModel,
    GeneralProtection,
    GuestFault,
    GuestMemory,
    Host,
    PageFault,
    Pferr,
    RetPf,
    Status,
    Tracepoints,
    Vm,
)
from kvmmu.arch.arguments import check_bool, check_word
from kvmmu.oracles.events import event_text
from kvmmu.oracles.guest_stub import FATAL, SHUTDOWN, Stub
from kvmmu.oracles.vmm_memory import DIRTY_LOG_FLAG, HUGE_PAGE_SIZE, PAGE_SIZE, READONLY_FLAG, VmmSlot
from kvmmu.vm.guest_accesses import pages_of

__all__ = ["ScenarioMachine", "run_scenario"]

_STATE = ("slots", "regs", "mem", "watch")
EINVAL = 22
MIN_MMU_PAGES = 64
CANONICAL_BITS = 48
JMP_RDX, ADD_AL_TO_RAX = b"\xff\xe2", b"\0\0"
GP_VECTOR = 13
CR3_TABLE = (1 << 52) - PAGE_SIZE
CPU = CpuModel(vendor="amd", maxphyaddr=48, gbpages=False, la57=False, pcid=False, conformance="kvm")
CONTROL_REGISTERS = {"cr0": 0, "cr3": 3, "cr4": 4}
# What instructions make of the bytes in memory and their operand. All but MOV and MOVNTI read first.
UPDATES: dict[str, Callable[[int, int], int]] = {
    "xchg": lambda old, value: value,
    "cmpxchg": lambda old, value: old or value,
    "xadd": lambda old, value: old + value,
    "rmw": lambda old, value: old,
    "add": lambda old, value: old + value,
    "sub": lambda old, value: old - value,
    "or": lambda old, value: old | value,
    "and": lambda old, value: old & value,
    "not": lambda old, value: ~old,
    "inc": lambda old, value: old + 1,
    "btr": lambda old, value: old & ~(1 << value),
}
# KVM takes these for something else than a guest that writes its page tables.
NOT_PAGE_TABLE_WRITING = frozenset({"xadd", "add", "sub", "not", "inc", "btr", "movnti", "movups"})


class ScenarioMachine:
    """A machine in the initial state of a scenario.

    Parameters
    ----------
    scenario : dict
        `slots`, `regs`, `stub`, `mem`, `watch` and maybe `disable_quirk_slot_zap_all` and `cpu` (vendor, maxphyaddr, or
        both); numbers in strings are hexadecimal. A stub of None is where the recordings have theirs.
    trace : bool
        Whether records have the events of the page tables.

    Attributes
    ----------
    vm, vcpu : Vm, Vcpu
    """

    def __init__(self, scenario: dict[str, Any], *, trace: bool = True) -> None:
        _check_scenario(scenario, _STATE)
        trace = check_bool("trace", trace)
        self._stub = Stub(scenario.get("stub"), scenario.get("mode"))
        stub = {"slot": self._stub.slot, "gpa": self._stub.gpa, "size": self._stub.size}
        self._slots = {slot["slot"]: VmmSlot(slot) for slot in (*scenario["slots"], stub)}
        first = next((slot for slot in self._slots.values() if slot.gpa == 0), None)
        if first is None:
            raise ValueError("slots: want one at gpa 0")
        self.mem = GuestMemory(first.data)
        host = Host(tdp=None, kernel="6.18", maxphyaddr=52, max_page="2m")
        cpu = replace(CPU, **scenario.get("cpu", {}))
        self.vm = Vm(self.mem, cpu, host, backing="2m", slot_zap_all=not scenario.get("disable_quirk_slot_zap_all", False))
        for slot in self._slots.values():
            self._create_slot(slot, slot is first)
        for address, value in scenario["mem"]:
            self._poke(_number(address), _number(value).to_bytes(8, "little"))
        for address, data in self._stub.memory():
            self._poke(address, data)
        self.vcpu = self.vm.create_vcpu()
        registers: dict[str, Any] = {name: _number(value) for name, value in scenario["regs"].items()}
        self.vcpu.set_regs(**registers)
        self._watched = [_number(gpa) for gpa in scenario["watch"]]
        self._tables = {gpa: self._peek(gpa, PAGE_SIZE) for gpa in self._watched}
        self._trace = trace
        self._exits: list[Any] = []                     # of the operation under way, for MMIO
        self.vm.clear_stats()

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _create_slot(self, slot: VmmSlot, exists: bool = False) -> None:
        if not exists:
            flags = {"readonly": bool(slot.flags & READONLY_FLAG), "dirty_log": bool(slot.flags & DIRTY_LOG_FLAG)}
            self.vm.add_slot(slot.gpa, slot.data, **flags)
        elif slot.flags & DIRTY_LOG_FLAG:
            self.vm.set_dirty_log(slot.gpa, True)
        self._use_host_pages(slot)

    def _use_host_pages(self, slot: VmmSlot) -> None:
        """Put the host's pages behind a slot that has just appeared where it is."""
        if slot.backing != "2m":
            self.vm.set_backing(slot.gpa, slot.size, slot.backing)
        for offset in slot.split:
            self.vm.set_backing(slot.gpa + offset, HUGE_PAGE_SIZE, "4k")
        for offset, how in slot.states:
            self.vm.invalidate(slot.gpa + offset, PAGE_SIZE, how)
        slot.present, slot.states = True, []

    def _find(self, gpa: int) -> tuple[VmmSlot, int] | None:
        """The slot that holds gpa, or did before it was deleted, and the offset in it."""
        for slot in self._slots.values():
            if slot.gpa <= gpa < slot.gpa + slot.size:
                return slot, gpa - slot.gpa
        return None

    def _peek(self, gpa: int, size: int) -> bytes:
        found = self._find(gpa)
        return b"" if found is None else found[0].data[found[1]:found[1] + size].tobytes()

    def _poke(self, gpa: int, data: bytes) -> None:
        """Write before there is a guest."""
        found = self._find(gpa)
        if found is None:
            raise ValueError(f"gpa {gpa:#x}: in none of the slots")
        slot, offset = found
        slot.data[offset:offset + len(data)] = np.frombuffer(data, np.uint8)

    def _host_write(self, gpa: int, data: bytes) -> None:
        """The VMM writes the memory of the guest, and KVM is not told."""
        found = self._find(gpa)
        if found is None:
            raise ValueError(f"gpa {gpa:#x}: in none of the slots")
        slot, offset = found
        if slot.present:
            self.vm.host_write(gpa, data)
        else:
            slot.data[offset:offset + len(data)] = np.frombuffer(data, np.uint8)
            slot.states = [state for state in slot.states if state[0] != offset - offset % PAGE_SIZE]

    def _changes(self) -> list[list[str]]:
        """Entries of watched tables that differ from what they were."""
        changed = []
        for gpa in self._watched:
            old, new = self._tables[gpa], self._peek(gpa, PAGE_SIZE)
            if old != new and new:
                self._tables[gpa] = new
                changed += [[f"{gpa + at:x}", f"{int.from_bytes(new[at:at + 8], 'little'):x}"]
                            for at in range(0, PAGE_SIZE, 8) if old[at:at + 8] != new[at:at + 8]]
        return changed

    # ---- operations --------------------------------------------------------------------------------------------------

    def apply(self, op: dict[str, Any]) -> dict[str, Any]:
        """Do one operation; returns its record: result, val, delta, ptes, dirty_gfns, trace, those that are."""
        record: dict[str, Any] = {}
        before = self.vm.stats
        if self._trace:
            self.vm.trace = Tracepoints(capacity=1 << 14)
        self._exits.clear()
        record["result"] = self._guest(op, record) if "cpl" in op else self._host(op, record)
        after = self.vm.stats
        after["mmio_exits"] = before["mmio_exits"] + len({exit for exit in self._exits if exit in ("r", "w")})  # per instruction
        record["delta"] = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        ptes = self._changes()
        if ptes:
            record["ptes"] = ptes
        if self._trace:
            record["trace"] = [text for text in map(event_text, self._events()) if text]
        return record

    def _events(self) -> Iterable[Any]:
        return self.vm.trace or ()

    def _guest(self, op: dict[str, Any], record: dict[str, Any]) -> list[Any]:
        """One entry of the guest."""
        name, cpl = op["op"], op["cpl"]
        va, value = _number(op.get("va", 0)), _number(op.get("val", 0))
        size = self._stub.instruction(name)[1]
        if name == "btr":                                           # the bit may be in another word
            va = va + size * ((value ^ 1 << 63) - (1 << 63) >> 3 + size.bit_length() - 1) & 2**64 - 1
            value %= 8 * size
        self.vcpu.vm_enter()
        if not self._has_root():
            return list(SHUTDOWN)
        try:
            if cpl and self._stub.long_mode:
                self.vcpu.access(self._stub.code_va(name, cpl), Access.USER | Access.FETCH)
                result = self._native(name, size, va, value, record)
                if result[0] not in FATAL:              # a write may have taken the stub's mapping away
                    self.vcpu.vm_enter()
                    self.vcpu.access(self._stub.return_va(name, cpl), Access.USER | Access.FETCH)
            else:
                self._fetch_emulated(self._stub.code_va(name, cpl), cpl)
                result = self._emulated(name, size, va, value, Access.USER if cpl else 0, record)
            if result[0] not in FATAL and self._has_root():
                self._fetch_emulated(self._stub.return_va(name, cpl), cpl)
            result = self._exits + result
        except PageFault as fault:
            self.vcpu.vm_enter()                        # to deliver it
            result = self._delivered([*self._exits, "#PF", f"{fault.error_code:x}", f"{fault.address:x}"])
        except GeneralProtection:
            self.vcpu.vm_enter()
            result = self._delivered([*self._exits, "exc", GP_VECTOR, 0])
        if self.vcpu.mmu.root_hpa is None:              # the OUT is emulated, too, and KVM wants a root for that
            self.vcpu.vm_enter()
        return result if result[0] in FATAL or self._has_root() else list(SHUTDOWN)

    def _has_root(self) -> bool:
        """True if memory is behind CR3: this kernel does not enter a guest without, it shuts it down."""
        return not self._stub.long_mode or self.mem.is_backed(self.vcpu.regs.cr3 & CR3_TABLE, 1)

    def _fetch_emulated(self, va: int, cpl: int) -> None:
        """KVM fetches an instruction of the stub for its emulator; without a fault that leaves no trace."""
        access = Access.FETCH | (Access.USER if cpl else 0)
        if self._stub.long_mode and self.vcpu.gva_walk.walk_record(va, access).status != Status.OK:
            self.vcpu.read_guest(va, 1, access)

    def _delivered(self, result: list[Any]) -> list[Any]:
        """Return how an operation ends that raised an exception: as it says, if the guest's handler can be reached."""
        if not self._stub.long_mode:
            return result
        for va, writes in self._stub.delivery:
            if self.vcpu.gva_walk.walk_record(va, Access.IMPLICIT | (Access.WRITE if writes else 0)).status != Status.OK:
                return list(SHUTDOWN)
        return result

    def _native(self, name: str, size: int, va: int, value: int, record: dict[str, Any]) -> list[Any]:
        if len(pages_of(va, bytes(size))) > 1:
            return self._native_crossing(name, size, va, value, record)
        if name == "null":
            return ["ok"]
        if name == "fetch":
            found = self.vcpu.access(va, Access.USER | Access.FETCH)
            if found.hpa == INVALID_GPA:
                return ["internal", 1]
            if self.mem.read(found.gpa, size) == ADD_AL_TO_RAX:                 # RAX is 0
                self.vcpu.access(0, Access.USER | Access.WRITE)
            return self._fetched(self.mem.read(found.gpa, size))
        if name.startswith("load"):
            found = self.vcpu.access(va, Access.USER)
            if found.hpa == INVALID_GPA:
                return self._mmio_exit("r", found.gpa, size)
            record["val"] = f"{int.from_bytes(self.mem.read(found.gpa, size), 'little'):x}"
            return ["ok"]
        if name not in UPDATES and not name.startswith(("store", "mov")):
            raise ValueError(f"op: {name!r} does not run at CPL 3")
        kind = {"page_table_writing": name not in NOT_PAGE_TABLE_WRITING}
        if name not in UPDATES:
            data = _operand(name, size, value)
            found = self.vcpu.store(va, data, Access.USER, **kind)
            return ["ok"] if found.hpa != INVALID_GPA else self._mmio_exit("w", found.gpa, size, data)
        found = self.vcpu.store(va, b"", Access.USER, **kind)               # where it goes; then what it makes of what is there
        if not self.mem.is_backed(found.gpa, 1):
            self._mmio_exit("r", found.gpa, size)
            data = _update(name, bytes(size), value)
            self.vcpu.write_guest(va, data, Access.USER)                    # the second exit of the same instruction
            return self._mmio_exit("w", found.gpa, size, data)
        data = _update(name, self.mem.read(found.gpa, size), value)
        if found.hpa == INVALID_GPA:                                        # it reads, but may not be written
            return self._mmio_exit("w", found.gpa, size, data)
        if found.ret == RetPf.EMULATE:
            self.vm.write_guest_physical(found.gpa, data)
        else:
            self.vcpu.store(va, data, Access.USER, **kind)
        return ["ok"]

    def _native_crossing(self, name: str, size: int, va: int, value: int, record: dict[str, Any]) -> list[Any]:
        """Two pages: KVM carries out the whole instruction if it must for either."""
        kind = {"page_table_writing": name not in NOT_PAGE_TABLE_WRITING}
        if not name.startswith(("load", "store", "mov")) and name not in UPDATES:
            raise ValueError(f"op: {name!r} does not cross pages")
        data, again = b"", True
        while again:                                    # what one page has cost may be the mapping of the other, or the stub's
            data, again = b"", False
            for page, part in pages_of(va, bytes(size)):
                if name.startswith("load"):
                    found = self.vcpu.access(page, Access.USER)
                else:
                    found = self.vcpu.store(page, b"", Access.USER, **kind)
                self.vcpu.vm_enter()
                self.vcpu.access(self._stub.code_va(name, 3), Access.USER | Access.FETCH)
                if found.ret == RetPf.EMULATE:
                    return self._emulated(name, size, va, value, Access.USER, record)
                data += self.mem.read(found.gpa, len(part))
                again |= found.exits > 0
        if name.startswith("load"):
            record["val"] = f"{int.from_bytes(data, 'little'):x}"
        else:
            data = _update(name, data, value) if name in UPDATES else _operand(name, size, value)
            self.vcpu.store(va, data, Access.USER, **kind)
        return ["ok"]

    def _mmio_exit(self, way: str, gpa: int, size: int, data: bytes | None = None) -> list[Any]:
        """Remember an exit to the VMM; returns how the operation ends if nothing else happens."""
        self._exits += ["mmio", way, f"{gpa:x}", size, *([] if data is None else [data.hex()])]
        return ["ok"]

    @staticmethod
    def _fetched(code: bytes) -> list[Any]:
        """Return how a fetch ends that found these bytes."""
        return ["ok"] if code == JMP_RDX else ["code", code.hex(" ")]

    def _emulated(self, name: str, size: int, va: int, value: int, user: int, record: dict[str, Any]) -> list[Any]:
        if name == "null":
            return ["ok"]
        if name == "invlpg":
            if va >> CANONICAL_BITS - 1 in (0, (1 << 65 - CANONICAL_BITS) - 1):     # else the emulator does not even begin
                self.vcpu.invlpg(va)
        elif name in CONTROL_REGISTERS:
            self.vcpu.mov_cr(CONTROL_REGISTERS[name], value)
        elif name == "efer":
            self.vcpu.wrmsr_efer(value)
        elif name == "fetch":
            data = self._emulated_read(va, size, user | Access.FETCH)
            if self._exits:
                self._exits.clear()
                return ["internal", 1]
            if data == ADD_AL_TO_RAX:
                self._emulated_update(0, 1, user)
            return self._fetched(data)
        elif name.startswith("load"):
            data = self._emulated_read(va, size, user)
            if not self._exits:
                record["val"] = f"{int.from_bytes(data, 'little'):x}"
        else:
            data = _operand(name, size, value)
            if name in UPDATES:
                data = _update(name, self._emulated_update(va, size, user), value)
            self._emulated_write(va, data, user)
        return ["ok"]

    def _emulated_write(self, va: int, data: bytes, user: int) -> None:
        """Write as KVM does for the guest, page by page: memory is written even if the second page faults, exits are not made."""
        exits = len(self._exits)
        for page, part in pages_of(va, data):
            try:
                gpa, hpa = self.vcpu._machine().emulate(page, user | Access.WRITE, part)
            except PageFault:
                del self._exits[exits:]
                raise
            if hpa == INVALID_GPA:
                self._mmio_exit("w", gpa, len(part), part)

    def _emulated_read(self, va: int, size: int, access: int) -> bytes:
        """Read as KVM does for the guest; what is MMIO reads as zeros. There is no exit if the second page faults."""
        parts = [(len(part), *self.vcpu._machine().emulate(page, access)) for page, part in pages_of(va, bytes(size))]
        data = b""
        for length, gpa, hpa in parts:
            if hpa == INVALID_GPA:
                self._mmio_exit("r", gpa, length)
            data += bytes(length) if hpa == INVALID_GPA else self.mem.read(gpa, length)
        return data

    def _emulated_update(self, va: int, size: int, access: int) -> bytes:
        """Read as KVM does for an instruction that is going to write there: a fault says so."""
        try:
            return self._emulated_read(va, size, access)
        except PageFault as fault:
            fault.error_code |= Pferr.WRITE
            raise

    def _host(self, op: dict[str, Any], record: dict[str, Any]) -> list[Any]:
        """One operation of the VMM."""
        action = getattr(self, f"_op_{op['op']}", None)
        if action is None:
            raise ValueError(f"op: no host operation {op['op']!r}")
        return ["host", action(op, record) or 0]

    def _op_host_write(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        self._host_write(_number(op["gpa"]), _number(op["val"]).to_bytes(8, "little"))

    def _op_host_touch(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        self._host_write(_number(op["gpa"]), self._peek(_number(op["gpa"]), 8))

    def _op_set_sregs(self, op: dict[str, Any], record: dict[str, Any]) -> int | None:
        registers: dict[str, Any] = {name: _number(op[name]) for name in ("cr0", "cr3", "cr4", "efer") if name in op}
        try:
            self.vcpu.set_regs(**registers)
        except GuestFault:
            return -EINVAL
        return None

    def _op_slot_delete(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        slot = self._slots[op["slot"]]
        slot.states = slot.pages_not_plain(self.vm)
        self.vm.delete_slot(slot.gpa)
        slot.present = False

    def _op_slot_set(self, op: dict[str, Any], record: dict[str, Any]) -> int | None:
        slot = self._slots[op["slot"]]
        gpa, flags = _number(op.get("gpa", slot.gpa)), op.get("flags", slot.first_flags)
        if not slot.present:
            slot.gpa, slot.flags = gpa, flags
            self._create_slot(slot)
            return None
        if (flags ^ slot.flags) & READONLY_FLAG:
            return -EINVAL
        if gpa != slot.gpa:
            slot.states = slot.pages_not_plain(self.vm)
            self.vm.move_slot(slot.gpa, gpa)
            slot.gpa = gpa
            self._use_host_pages(slot)
            if (flags ^ slot.flags) & DIRTY_LOG_FLAG:
                self.vm.set_dirty_log(gpa, bool(flags & DIRTY_LOG_FLAG))
        elif (flags ^ slot.flags) & DIRTY_LOG_FLAG:
            self.vm.set_dirty_log(gpa, bool(flags & DIRTY_LOG_FLAG))
        slot.flags = flags
        return None

    def _op_dirty_get(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        record["dirty_gfns"] = [f"{gfn:x}" for gfn in self.vm.get_dirty_log(self._slots[op["slot"]].gpa).tolist()]

    def _op_dontneed(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        slot, offset, size = self._slots[op["slot"]], _number(op["off"]), _number(op["len"])
        slot.dontneed(self.vm, offset, size)

    def _op_mprotect(self, op: dict[str, Any], record: dict[str, Any]) -> None:
        slot, offset, size, prot = self._slots[op["slot"]], _number(op["off"]), _number(op["len"]), _number(op["prot"])
        slot.mprotect(self.vm, offset, size, prot)

    def _op_nr_mmu_pages(self, op: dict[str, Any], record: dict[str, Any]) -> int | None:
        if _number(op["n"]) < MIN_MMU_PAGES:
            return -EINVAL
        self.vm.set_nr_mmu_pages(_number(op["n"]))
        return None


def _check_scenario(scenario: dict[str, Any], needed: tuple[str, ...]) -> None:
    if not isinstance(scenario, dict):
        raise TypeError(f"scenario: want a dict, got {type(scenario).__name__}")
    for name in needed:
        if name not in scenario:
            raise ValueError(f"scenario: {name!r} is missing; want {', '.join(needed)}, got {', '.join(scenario) or 'none'}")


def _number(value: "int | str") -> int:
    return check_word("number", int(value, 16) if isinstance(value, str) else value)


def _operand(name: str, size: int, value: int) -> bytes:
    """Return what MOV writes."""
    return bytes(size) if name == "movups" else (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _update(name: str, old: bytes, value: int) -> bytes:
    """Return what an instruction that reads first writes."""
    new = UPDATES[name](int.from_bytes(old, "little"), value) & (1 << 8 * len(old)) - 1
    return new.to_bytes(len(old), "little")


def run_scenario(scenario: dict[str, Any], *, trace: bool = True) -> list[dict[str, Any]]:
    """Run a scenario on the machine here.

    Parameters
    ----------
    scenario : dict
        As of `ScenarioMachine`, and `ops`.
    trace : bool
        Whether records have the events of the page tables, in the form of the recordings.

    Returns
    -------
    list of dict
        A record per operation, as a live KVM would give; fewer if the guest came to an end. It does so here, with the result
        ["code", bytes], when a fetch finds other code than that which comes back: no instructions are carried out.
    """
    _check_scenario(scenario, (*_STATE, "ops"))
    machine, records = ScenarioMachine(scenario, trace=trace), []
    for op in scenario["ops"]:
        records.append(machine.apply(op))
        if records[-1]["result"][0] in (*FATAL, "code"):
            break
    return records
