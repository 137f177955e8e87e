# SPDX-License-Identifier: Apache-2.0
"""Accesses of a guest to memory, by its own instructions and by those that KVM emulates."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import INVALID_GPA, PAGE_SIZE, RFLAGS_AC, Access, RetPf, Status
from kvmmu.arch.arguments import check_bool, check_int, check_word
from kvmmu.arch.faults import fault_of, nested_fault_of
from kvmmu.arch.registers import Regs
from kvmmu.machine._machine import Machine
from kvmmu.memory._memory import GuestMemory
from kvmmu.vm.locked import PartOfMachine, as_bytes, locked
from kvmmu.walk.record import WalkRecord
from kvmmu.walk.results import Accesses, check_one_access

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LINEAR = 1 << 64                       # addresses go round
_READ_MAX = 1 << 32

_B = TypeVar("_B", bytes, memoryview)


class GuestAccesses(PartOfMachine, ABC):
    """What a `Vcpu` does with memory. The vCPU says on which machine, and tells the walk behind a fault."""

    rip: int
    _regs: Regs

    @property
    @abstractmethod
    def mem(self) -> GuestMemory:
        """The memory of the address space in force."""

    @abstractmethod
    def _machine(self) -> Machine:
        """Return this vCPU on its host."""

    def access(self, gva: "int | NDArray[np.uint64]", access: Any = 0, *, out: Accesses | None = None) -> Accesses:
        """Access memory as the guest does: TLB, the processor's walk, exits, KVM's answers, and all that follows from them.

        Parameters
        ----------
        gva : int, or ndarray of uint64, shape (n,), C-contiguous
            Linear addresses (bytes), one after the other.
        access : Access, or ndarray of uint8, shape (n,)
            EFLAGS.AC of the vCPU is added to a single access; arrays say `Access.AC`.
        out : Accesses, optional
            Columns to reuse, n rows each; for arrays.

        Returns
        -------
        Accesses
            Columns of n rows; of a single access integers.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
            A single access faults in the guest. In arrays that is data.
        KeyboardInterrupt
            Ctrl-C ends a long array between two rows: those before it have happened, and `out` has them.

        Notes
        -----
        What a write writes is not known here (see `store()`): where KVM has to carry it out, it is an aligned write of
        what is there already, of 8 bytes, or 4 with CR4.PAE clear.
        """
        if isinstance(gva, np.ndarray):
            columns = Accesses.empty(gva.size) if out is None else out.check(gva.size)
            with self._lock:
                self._machine().access(gva, access, columns.arrays())
            return columns
        if out is not None:
            raise ValueError("out: is for arrays")
        return self._access(gva, self._with_ac(access), None, True)

    def _with_ac(self, access: int) -> int:
        return check_one_access(access) | Access.AC if self._regs.rflags & RFLAGS_AC else access

    def _access(self, gva: int, access: int, data: bytes | None, page_table_writing: bool) -> Accesses:
        with self._lock:
            machine = self._machine()
            machine.set_rip(self.rip)
            *columns, fault_gpa, qualification = machine.access_one(gva, access, data, page_table_writing)
            result = Accesses(*columns)
            if result.status:
                self._raise_fault(gva, access, result.status, result.error_code, fault_gpa, qualification)
            return result

    @locked
    def store(self, gva: int, data: "Buffer", access: int = 0, *, page_table_writing: bool = True) -> Accesses:
        """Write memory as the guest does, with the bytes.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        data : bytes, or another buffer
            A page boundary in it is crossed as by one instruction: all or nothing, but where KVM has to carry it out, as
            `write_guest()`. Empty: only to see where a byte would go.
        access : Access
            USER, AC or IMPLICIT; WRITE is added.
        page_table_writing : bool
            The instruction is of a kind that KVM expects to write page tables (MOV, XCHG, CMPXCHG, AND, OR, BTS, ...); others
            (ADD, SUB, INC, MOVNTI, ...) it has repeated without shadow pages of the frame, rather than emulate them.

        Returns
        -------
        Accesses
            Integers, of the first byte. MMIO takes no bytes: its `hpa` is INVALID_GPA.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
            Nothing was written.
        """
        gva, access = check_word("gva", gva), self._with_ac(check_one_access(access) | Access.WRITE)
        page_table_writing = check_bool("page_table_writing", page_table_writing)
        data = as_bytes(data)
        parts = _pages_of(gva, data)
        if len(parts) > 1:
            for address, _ in parts:
                probe = self._access(address, access, b"", page_table_writing)
                if probe.ret == RetPf.EMULATE:          # KVM carries out all of it
                    self.write_guest(gva, data, access)
                    return probe
        results = [self._access(address, access, part, page_table_writing) for address, part in parts]
        return results[0]

    @abstractmethod
    def _walk_behind(self, gva: int, access: int, status: int) -> WalkRecord:
        """The walk that ended so."""

    def _raise_fault(self, gva: int, access: int, status: int, error_code: int, fault_gpa: int = INVALID_GPA,
                     qualification: int = 0) -> None:
        if status == Status.OK:
            return
        gva, access = int(gva), int(access)
        record = self._walk_behind(gva, access, status)
        step = record.steps[-1] if record.steps else None
        entry, entry_gpa = (step.entry, step.gpa) if step else (0, None)
        if status in (Status.PAGE_FAULT, Status.NON_CANONICAL):
            raise fault_of(status, address=gva, access=Access(access), error_code=error_code, level=record.level, entry=entry,
                           entry_gpa=entry_gpa, rule=record.rule or "")
        raise nested_fault_of(status, address=gva, access=Access(access), error_code=error_code, level=record.level, entry=entry,
                              entry_gpa=entry_gpa, rule=record.rule or "", fault_gpa=fault_gpa, exit_qualification=qualification)

    @locked
    def write_guest(self, gva: int, data: "Buffer", access: int = 0) -> int:
        """Write memory as an instruction that KVM emulates: by KVM's own walk of the guest's tables, not through the host's.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        data : bytes, or another buffer
        access : Access
            USER, AC or IMPLICIT; WRITE is added.

        Returns
        -------
        int
            How many bytes reached memory; the others are MMIO: a hole, or a read-only slot.

        Raises
        ------
        PageFault, GeneralProtection
            The bytes before the page that faults were written.
        """
        gva, access = check_word("gva", gva), self._with_ac(check_one_access(access) | Access.WRITE)
        reached = 0
        for address, part in _pages_of(gva, as_bytes(data)):
            _, hpa = self._emulate(address, access, part)
            reached += len(part) if hpa != INVALID_GPA else 0
        return reached

    @locked
    def read_guest(self, gva: int, n: int, access: int = 0) -> bytes:
        """Read memory as an instruction that KVM emulates, as `write_guest()` writes it.

        Parameters
        ----------
        gva : int
            Linear address (bytes) of the first byte.
        n : int
            How many bytes, 0 to 2**32; MMIO reads as zero.
        access : Access
            USER, AC, FETCH or IMPLICIT.

        Raises
        ------
        PageFault, GeneralProtection, NestedFault
        """
        gva, n = check_word("gva", gva), check_int("n", n, 0, _READ_MAX)
        access = self._with_ac(check_one_access(access))
        data = bytearray(n)
        for address, part in _pages_of(gva, memoryview(data)):
            gpa, hpa = self._emulate(address, access, None)
            if hpa != INVALID_GPA:
                part[:] = self.mem.read(gpa, len(part))
        return bytes(data)

    def _emulate(self, gva: int, access: int, data: bytes | None) -> tuple[int, int]:
        gpa, hpa, status, error_code, fault_gpa, qualification = self._machine().emulate(gva, access, data)
        self._raise_fault(gva, access, status, error_code, fault_gpa, qualification)
        return gpa, hpa


def _pages_of(gva: int, data: _B) -> list[tuple[int, _B]]:
    """(address, bytes) of each page that data at gva touches."""
    if not len(data):
        return [(gva, data)]
    parts, at = [], 0
    while at < len(data):
        size = min(len(data) - at, PAGE_SIZE - (gva + at) % PAGE_SIZE)
        parts.append(((gva + at) % _LINEAR, data[at:at + size]))
        at += size
    return parts
