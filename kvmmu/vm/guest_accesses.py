"""Accesses of a guest to bytes of memory, by its own instructions and by those that KVM emulates, page by page."""

from typing import TypeVar

from kvmmu.arch._bits import INVALID_GPA, PAGE_SIZE, RetPf
from kvmmu.machine._machine import Machine
from kvmmu.memory._memory import GuestMemory
from kvmmu.walk.results import OneAccess

__all__ = ["pages_of", "read_emulated", "store", "write_emulated"]

_LINEAR = 1 << 64                       # addresses wrap around

_B = TypeVar("_B", bytes, memoryview)


def store(machine: Machine, gva: int, data: bytes, access: int, rip: int, *, page_table_writing: bool) -> OneAccess:
    """Write as `Vcpu.store()` does, and return the access to the first byte."""
    parts = pages_of(gva, data)
    if len(parts) > 1:
        for address, _ in parts:
            probe = machine.access_one(address, access, rip, b"", page_table_writing)
            if probe.ret == RetPf.EMULATE:              # KVM carries out all of it
                write_emulated(machine, gva, data, access)
                return probe
    results = [machine.access_one(address, access, rip, part, page_table_writing) for address, part in parts]
    return results[0]


def write_emulated(machine: Machine, gva: int, data: bytes, access: int) -> int:
    """Write as `Vcpu.write_guest()` does, and return how many bytes reached memory."""
    reached = 0
    for address, part in pages_of(gva, data):
        _, hpa = machine.emulate(address, access, part)
        reached += len(part) if hpa != INVALID_GPA else 0
    return reached


def read_emulated(machine: Machine, mem: GuestMemory, gva: int, n: int, access: int) -> bytes:
    """Read as `Vcpu.read_guest()` does. `mem` is that of the address space in force."""
    data = bytearray(n)
    for address, part in pages_of(gva, memoryview(data)):
        gpa, hpa = machine.emulate(address, access)
        if hpa != INVALID_GPA:
            part[:] = mem.read(gpa, len(part))
    return bytes(data)


def pages_of(gva: int, data: _B) -> list[tuple[int, _B]]:
    """Return (address, bytes) of each page that data at gva touches."""
    if not len(data):
        return [(gva, data)]
    parts, at = [], 0
    while at < len(data):
        size = min(len(data) - at, PAGE_SIZE - (gva + at) % PAGE_SIZE)
        parts.append(((gva + at) % _LINEAR, data[at:at + size]))
        at += size
    return parts
