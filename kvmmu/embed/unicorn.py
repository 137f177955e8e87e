"""Unicorn runs the code of a guest, kvmmu is its MMU.

Unicorn's virtual TLB asks kvmmu for each page (UC_HOOK_TLB_FILL). A #PF, and any other exception, is delivered through the
guest's IDT as a processor in 64-bit mode does it, which Unicorn leaves to its users. Accessed and dirty bits are set in guest
memory. INVLPG, MOV to CR3 and everything else that flushes Unicorn's own TLB work as they are.

Source: SDM vol. 3, "Exception and Interrupt Handling in 64-bit Mode", "Error Code", "Task-State Segment in 64-bit Mode".
"""

import ctypes
import struct
from typing import Any, NamedTuple, cast

import numpy as np

from kvmmu import Access, CpuModel, GuestMemory, Status
from kvmmu.arch.arguments import check_int, check_word
from kvmmu.arch.extras import missing_extra
from kvmmu.embed._tlb_fill import new_tlb_fill
from kvmmu.embed.instructions import writes_what_it_reads

try:
    import unicorn as uc
    from unicorn import unicorn_const as consts
    from unicorn import x86_const as x86
    from unicorn.unicorn_py3.unicorn import uclib
except ImportError as error:
    raise missing_extra(f"kvmmu.embed.unicorn needs Unicorn 2.1 ({error})", "unicorn") from error

__all__ = ["Emulator", "Event"]

_PAGE = 4096
_DE, _DB, _BP, _OF, _UD, _DF, _TS, _NP, _SS, _GP, _PF, _AC, _CP = 0, 1, 3, 4, 6, 8, 10, 11, 12, 13, 14, 17, 21
_HAVE_ERROR_CODE = frozenset({_DF, _TS, _NP, _SS, _GP, _PF, _AC, _CP})
_CONTRIBUTORY = frozenset({_DE, _TS, _NP, _SS, _GP})
_TRAPS = frozenset({_DB, _BP, _OF})                         # RIP is behind the instruction
_INT, _INT3 = 0xCD, 0xCC
_EXTERNAL, _OF_IDT = 1, 2                                   # bits of an error code with a selector
_EFER = 0xC0000080
_IF, _TF, _NT, _RF, _VM = 1 << 9, 1 << 8, 1 << 14, 1 << 16, 1 << 17
_INTERRUPT_GATE, _TRAP_GATE = 0xE, 0xF
_CODE64, _RPL = 0x00AF9B000000FFFF, 3
_IMPLICIT = int(Access.IMPLICIT)
_NO_AD = 0x100                                              # KVMMU_ACCESS_NO_AD
_LONGEST_INSTRUCTION = 15

# The gate: a page of our own through which user code of the guest comes to CPL 0, since a register that is written from outside
# changes no privilege level. It lies at a linear address that is not canonical, where no guest has a page.
_GATE_GVA, _TRAP_GPA, _GATE_GPA = 0x0000_8000_0000_0000, 1 << 51, (1 << 51) + _PAGE
_CALL, _POINTER, _ARRIVAL, _DESCRIPTOR, _CALL_GATE, _GATE_TSS, _GATE_STACK = 0, 0x40, 0x80, 0x100, 0x110, 0x200, 0xF00
_REGISTERS = {"cr0": x86.UC_X86_REG_CR0, "cr3": x86.UC_X86_REG_CR3, "cr4": x86.UC_X86_REG_CR4, "msr": x86.UC_X86_REG_MSR,
              "eflags": x86.UC_X86_REG_EFLAGS, "ss": x86.UC_X86_REG_SS, "gdtr": x86.UC_X86_REG_GDTR,
              "idtr": x86.UC_X86_REG_IDTR, "tr": x86.UC_X86_REG_TR}
_FLUSH = consts.UC_CTL_IO_WRITE << 30 | consts.UC_CTL_TLB_FLUSH


class Event(NamedTuple):
    """An exception or interrupt that was delivered to the guest."""

    vector: int
    error_code: int | None
    cr2: int | None                                         # of a #PF
    rip: int


class _Fault(Exception):
    """An exception that the processor raises while it does something."""

    def __init__(self, vector: int, error_code: int = 0, cr2: int | None = None, *, from_hook: bool = False) -> None:
        super().__init__(vector, error_code, cr2)
        self.vector, self.error_code, self.cr2 = vector, error_code, cr2
        self.from_hook = from_hook                          # Unicorn told the vector alone


class Emulator:
    """One 64-bit guest processor: Unicorn's, with kvmmu as its MMU.

    Parameters
    ----------
    mem : GuestMemory
        Guest-physical memory, of writable slots. Slots that are added later do not count.
    cpu : CpuModel, optional
        For translation: physical-address width, vendor, features.
    model : int, optional
        Unicorn's processor model (UC_CPU_X86_*). CR4.SMAP and the like stick only with one that has the feature.

    Attributes
    ----------
    uc : unicorn.Uc
        For registers, and for hooks of your own, before or between runs.
    events : list of Event
        What was delivered so far. Clear it as you like.

    Raises
    ------
    ImportError
        Unicorn is not installed.

    Notes
    -----
    Unicorn does not tell the error codes of other exceptions than #PF: they are 0. It knows no PKRU; `set_pkru()` loads one.
    A guest that writes an INVLPG into code that it has run already, while it uses large pages, may keep parts of them.
    """

    def __init__(self, mem: GuestMemory, cpu: CpuModel | None = None, *, model: int | None = None) -> None:
        if not isinstance(mem, GuestMemory):
            raise TypeError(f"mem: want a GuestMemory, got {type(mem).__name__}")
        self.mem = mem
        self.events: list[Event] = []
        self.uc = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        if model is not None:
            self.uc.ctl_set_cpu_model(check_int("model", model, 0, 1000))
        self._gate_page = np.zeros(2 * _PAGE, np.uint8)[-_PAGE:]
        slots = _slots_of(mem)
        for gpa, data in slots:
            self.uc.mem_map_ptr(gpa, data.nbytes, uc.UC_PROT_ALL, data.ctypes.data)
        self.uc.mem_map(_GATE_GPA, _PAGE, uc.UC_PROT_ALL)
        self.uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        numbers = _REGISTERS | {"hook_code": uc.UC_HOOK_CODE, "flush": _FLUSH}
        self._fill = new_tlb_fill(slots, CpuModel() if cpu is None else cpu, _handle_of(self.uc), _address("uc_reg_read"),
                                  _address("uc_hook_add"), _address("uc_ctl"), numbers)
        self._add_hook(uc.UC_HOOK_TLB_FILL, self._fill.hook, self._fill.data)
        self._interrupt: int | None = None
        self._trap_address: int | None = None
        self.uc.hook_add(uc.UC_HOOK_INTR, self._on_interrupt)
        self.uc.hook_add(uc.UC_HOOK_INSN_INVALID, self._on_invalid)
        self.uc.hook_add(uc.UC_HOOK_MEM_UNMAPPED, self._on_unmapped)

    def _add_hook(self, kind: int, function: int, data: int) -> None:
        hook = ctypes.c_size_t()
        code = uclib.uc_hook_add(self.uc._uch, ctypes.byref(hook), kind, ctypes.c_void_p(function), ctypes.c_void_p(data),
                                 ctypes.c_uint64(1), ctypes.c_uint64(0))
        if code != uc.UC_ERR_OK:
            raise uc.UcError(code)

    # ---- registers -----------------------------------------------------------------------------------------------------

    def load(self, *, cr0: int, cr3: int, cr4: int, efer: int, **registers: int) -> None:
        """Load the control registers, and any other register by its name in Unicorn, in lower letters.

        Parameters
        ----------
        cr0, cr3, cr4, efer : int
            Of a guest in 64-bit mode with paging.
        **registers : int
            rip, rsp, rflags, rax ...
        """
        for name, value in (("cr4", cr4), ("cr3", cr3), ("cr0", cr0)):
            self.uc.reg_write(_REGISTERS[name], check_word(name, value))
        self.uc.reg_write(x86.UC_X86_REG_MSR, (_EFER, check_word("efer", efer)))
        for name, value in registers.items():
            self.uc.reg_write(_register(name), check_word(name, value))

    def load_tables(self, *, gdt: tuple[int, int], idt: tuple[int, int], tss: tuple[int, int] = (0, 0), tr: int = 0,
                    cs: int = 0x08, ss: int = 0x10) -> None:
        """Load descriptor tables, of each (base, limit), and selectors, as a boot loader leaves them at CPL 0.

        Parameters
        ----------
        gdt, idt, tss : (int, int)
        tr, cs, ss : int
            Selectors; the descriptors behind them are not read.
        """
        self.uc.reg_write(x86.UC_X86_REG_GDTR, (0, *gdt, 0))
        self.uc.reg_write(x86.UC_X86_REG_IDTR, (0, *idt, 0))
        self.uc.reg_write(x86.UC_X86_REG_TR, (tr, *tss, 0x8B00))
        self.uc.reg_write(x86.UC_X86_REG_CS, cs)
        self.uc.reg_write(x86.UC_X86_REG_SS, ss)

    def set_pkru(self, value: int) -> None:
        """Load PKRU for translation. WRPKRU by the guest has no effect on it."""
        self._fill.set_pkru(check_word("value", value, 32))
        self._flush()

    @property
    def fills(self) -> int:
        """The number of accesses for which Unicorn's TLB had no page."""
        return self._fill.fills

    # ---- running -------------------------------------------------------------------------------------------------------

    def run(self, begin: int | None = None, until: int = 0, *, timeout: float = 0) -> str:
        """Run the guest, and deliver its exceptions.

        Parameters
        ----------
        begin : int, optional
            RIP to begin at; by default where it is.
        until : int
            Stop before the instruction at this address; 0: at none.
        timeout : float
            Seconds between two exceptions, 0: any time.

        Returns
        -------
        str
            "until"; "halt": HLT, a hook that stopped it, or the time is up; "shutdown": a triple fault.

        Raises
        ------
        unicorn.UcError
            What Unicorn cannot go on from, as an access beyond guest memory.
        RuntimeError
            Another thread used the emulator before, and did not `release()` it; or registers that kvmmu refuses.
        """
        rip = self.uc.reg_read(x86.UC_X86_REG_RIP) if begin is None else check_word("begin", begin)
        while True:
            event = self._run_once(rip, until, timeout)
            rip = self.uc.reg_read(x86.UC_X86_REG_RIP)
            if event is None:
                return "until" if rip == until else "halt"
            if not self._deliver(event, rip):
                return "shutdown"
            rip = self.uc.reg_read(x86.UC_X86_REG_RIP)

    def release(self) -> None:
        """Let another thread run the emulator."""
        self._fill.release()

    def _run_once(self, rip: int, until: int, timeout: float) -> _Fault | None:
        """Run until the guest raises an exception, which is returned; None if it stopped for something else."""
        self._fill.begin()
        self._interrupt = None
        try:
            self.uc.emu_start(rip, until, timeout=int(timeout * 1e6))
        except uc.UcError:
            fault = self._fill.fault
            if fault is None:
                if self._interrupt is None:
                    raise
                return _Fault(self._interrupt, from_hook=True)
            return self._fault_of(*fault)
        return None if self._interrupt is None else _Fault(self._interrupt, from_hook=True)

    def _fault_of(self, page: int, kind: int, status: int, error_code: int) -> _Fault:
        """Return the exception of an access that failed: with the whole address, which Unicorn does not tell at once."""
        if status == Status.NON_CANONICAL:
            return _Fault(_GP)
        rip = self.uc.reg_read(x86.UC_X86_REG_RIP)
        if kind not in (uc.UC_MEM_READ, uc.UC_MEM_WRITE):
            return _Fault(_PF, error_code, rip if rip // _PAGE == page // _PAGE else page)
        address = page + self._offset_of_fault(rip, page)
        if kind == uc.UC_MEM_READ and writes_what_it_reads(self._code_at(rip)):
            user = int(Access.USER) if self.uc.reg_read(x86.UC_X86_REG_SS) & _RPL == _RPL else 0
            _, _, error_code = self._fill.translate(address, int(Access.WRITE) | user | _NO_AD)
        return _Fault(_PF, error_code, address)

    def _code_at(self, rip: int) -> bytes:
        """Return the bytes of the instruction at RIP, as far as they are mapped, and what follows it."""
        code = b""
        while len(code) < _LONGEST_INSTRUCTION:
            status, gpa, _ = self._fill.translate((rip + len(code)) & (2**64 - 1), _IMPLICIT | _NO_AD)
            if status != Status.OK:
                break
            code += self.mem.read(gpa, min(_LONGEST_INSTRUCTION - len(code), _PAGE - gpa % _PAGE))
        return code

    def _offset_of_fault(self, rip: int, page: int) -> int:
        """Run the instruction again, with the page where there is no memory: Unicorn tells the address then, and stops.

        A store across two pages may have written a part of the first one by then, which is put back.
        """
        before = self._end_of_page_before(page)
        context = self.uc.context_save()
        self._fill.begin(trapping=True, trap_gpa=_TRAP_GPA)
        self._trap_address = None
        try:
            self.uc.emu_start(rip, 0)
        except uc.UcError:
            pass
        finally:
            self._fill.begin()
            self.uc.context_restore(context)
            self._flush()
        if before is not None:
            self.mem.write(*before)
        return 0 if self._trap_address is None else self._trap_address - _TRAP_GPA

    def _end_of_page_before(self, page: int) -> tuple[int, bytes] | None:
        """Return (guest-physical address, bytes) of what a store across pages may have changed."""
        status, gpa, _ = self._fill.translate((page - 1) & ~(_PAGE - 1) & (2**64 - 1), _IMPLICIT | _NO_AD)
        if status != Status.OK:
            return None
        end = gpa + _PAGE - 64
        return (end, self.mem.read(end, 64)) if self.mem.is_backed(end, 64) else None

    def _flush(self) -> None:
        self.uc.ctl(consts.UC_CTL_TLB_FLUSH, consts.UC_CTL_IO_WRITE)
        self._fill.flushed()

    # ---- Unicorn's hooks -----------------------------------------------------------------------------------------------

    def _on_interrupt(self, engine: Any, vector: int, data: Any) -> None:
        self._interrupt = vector
        self.uc.emu_stop()

    def _on_invalid(self, engine: Any, data: Any) -> bool:
        self._interrupt = _UD
        return False

    def _on_unmapped(self, engine: Any, kind: int, address: int, size: int, value: int, data: Any) -> bool:
        if self._trap_address is None and address // _PAGE == _TRAP_GPA // _PAGE:
            self._trap_address = address
        return False

    # ---- exceptions ----------------------------------------------------------------------------------------------------

    def _deliver(self, event: _Fault, rip: int) -> bool:
        """Deliver an exception, or the one that its delivery raises. Returns False for a triple fault."""
        length = self._length_of_interrupt(event.vector, rip) if event.from_hook else 0
        while True:
            try:
                self._enter_handler(event, rip, length > 0)
                return True
            except _Fault as second:
                if event.vector == _DF:
                    return False
                rip, length = rip - length, 0
                event = second if _is_served_alone(event.vector, second.vector) else _Fault(_DF)

    def _length_of_interrupt(self, vector: int, rip: int) -> int:
        """Return the length of the INT n or INT3 before RIP that made an interrupt; 0 if an instruction at RIP made it."""
        before = self._code_at(rip - 2)[:2]
        if before == bytes((_INT, vector)):
            return 2
        return 1 if vector == _BP and before[1:] == bytes((_INT3,)) else 0

    def _enter_handler(self, event: _Fault, rip: int, software: bool) -> None:
        """Deliver an exception as a processor does: read the gate, switch stacks, push, jump. _Fault: it cannot."""
        read, vector = self.uc.reg_read, event.vector
        cpl = read(x86.UC_X86_REG_SS) & _RPL
        if event.cr2 is not None:
            self.uc.reg_write(x86.UC_X86_REG_CR2, event.cr2)
        selector, offset, stack, kind = self._gate_of(vector, cpl, software)
        new_cpl = self._level_of(selector, cpl)
        rsp, rflags = read(x86.UC_X86_REG_RSP), read(x86.UC_X86_REG_EFLAGS)
        top = self._read_word(self._tss(0x24 + 8 * (stack - 1) if stack else 4 + 8 * new_cpl)) if stack or new_cpl < cpl else rsp
        image = rflags if software or vector in _TRAPS else rflags | _RF
        frame = [read(x86.UC_X86_REG_SS), rsp, image, read(x86.UC_X86_REG_CS), rip]
        error_code = event.error_code if vector in _HAVE_ERROR_CODE and not software else None
        top = self._push(top & ~15 & (2**64 - 1), frame if error_code is None else [*frame, error_code], new_cpl)
        if new_cpl < cpl:
            self._enter_ring_0(selector)
        self.uc.reg_write(x86.UC_X86_REG_CS, selector & ~_RPL | new_cpl)
        self.uc.reg_write(x86.UC_X86_REG_RSP, top)
        self.uc.reg_write(x86.UC_X86_REG_EFLAGS, rflags & ~(_TF | _NT | _RF | _VM | (_IF if kind == _INTERRUPT_GATE else 0)))
        self.uc.reg_write(x86.UC_X86_REG_RIP, offset)
        self.events.append(Event(vector, error_code, event.cr2, rip))

    def _gate_of(self, vector: int, cpl: int, software: bool) -> tuple[int, int, int, int]:
        """Return (selector, offset, number of a stack in the TSS or 0, type) of a gate of the IDT."""
        _, base, limit, _ = self.uc.reg_read(x86.UC_X86_REG_IDTR)
        code = vector << 3 | _OF_IDT | (0 if software else _EXTERNAL)
        if 16 * vector + 15 > limit:
            raise _Fault(_GP, code)
        low, selector, stack, flags, middle, high = struct.unpack("<HHBBHI", self._read(base + 16 * vector, 12))
        kind = flags & 0x1F
        if kind not in (_INTERRUPT_GATE, _TRAP_GATE) or (software and flags >> 5 & _RPL < cpl):
            raise _Fault(_GP, code)
        if not flags >> 7:
            raise _Fault(_NP, code)
        return selector, low | middle << 16 | high << 32, stack & 7, kind

    def _level_of(self, selector: int, cpl: int) -> int:
        """Return the privilege level that a handler's code segment has."""
        code = selector & ~_RPL | _EXTERNAL
        _, base, limit, _ = self.uc.reg_read(x86.UC_X86_REG_GDTR)
        if selector < 4 or selector & 4 or (selector | 7) > limit:
            raise _Fault(_GP, code if selector >= 4 else _EXTERNAL)
        descriptor = int.from_bytes(self._read(base + (selector & ~7), 8), "little")
        level = descriptor >> 45 & _RPL
        if descriptor >> 43 & 3 != 3 or level > cpl or not descriptor >> 53 & 1:    # a code segment of 64-bit mode
            raise _Fault(_GP, code)
        if not descriptor >> 47 & 1:
            raise _Fault(_NP, code)
        return cpl if descriptor >> 42 & 1 else level                               # conforming

    def _tss(self, offset: int) -> int:
        """Return the linear address of a stack pointer in the TSS."""
        selector, base, limit, _ = self.uc.reg_read(x86.UC_X86_REG_TR)
        if offset + 7 > limit:
            raise _Fault(_TS, selector & ~_RPL | _EXTERNAL)
        return int(base) + offset

    def _enter_ring_0(self, selector: int) -> None:
        """Jump through a call gate of our own to a page where the processor halts at CPL 0, with SS null."""
        at = _GATE_GVA + _ARRIVAL
        base = _GATE_GVA + _DESCRIPTOR - (selector & ~7)
        gate = selector & ~7 | (_CALL_GATE - _DESCRIPTOR)
        parts = {
            _CALL: b"\xff\x1d" + struct.pack("<i", _POINTER - 6),                   # far call through the pointer
            _POINTER: struct.pack("<IH", 0, (selector & ~7) + _CALL_GATE - _DESCRIPTOR | _RPL),
            _ARRIVAL: b"\x0f\x01\x3d" + struct.pack("<i", -_ARRIVAL - 7) + b"\xf4",  # INVLPG of this page, HLT
            _DESCRIPTOR: struct.pack("<Q", _CODE64),
            _CALL_GATE: struct.pack("<HHBBHII", at & 0xFFFF, selector & ~_RPL, 0, 0xEC, at >> 16 & 0xFFFF, at >> 32, 0),
            _GATE_TSS: struct.pack("<IQ", 0, _GATE_GVA + _GATE_STACK)}
        assert gate >= 0
        for offset, data in parts.items():
            self.uc.mem_write(_GATE_GPA + offset, data)
        saved = {name: self.uc.reg_read(name) for name in (x86.UC_X86_REG_GDTR, x86.UC_X86_REG_TR)}
        self.uc.reg_write(x86.UC_X86_REG_GDTR, (0, base, 0xFFFF, 0))
        self.uc.reg_write(x86.UC_X86_REG_TR, (8, _GATE_GVA + _GATE_TSS, 0x67, 0x8B00))
        self._fill.open_gate(_GATE_GVA, _GATE_GPA)
        try:
            self.uc.emu_start(_GATE_GVA, 0)
        finally:
            self._fill.close_gate()
            for name, value in saved.items():
                self.uc.reg_write(name, value)

    # ---- accesses of the processor itself ------------------------------------------------------------------------------

    def _physical(self, gva: int, access: int) -> int:
        status, gpa, error_code = self._fill.translate(gva & (2**64 - 1), access)
        if status == Status.NON_CANONICAL:
            raise _Fault(_GP)
        if status != Status.OK:
            raise _Fault(_PF, error_code, gva)
        return gpa

    def _read(self, gva: int, n: int) -> bytes:
        """Return bytes that the processor reads whatever its privilege level is."""
        data = b""
        while len(data) < n:
            part = min(n - len(data), _PAGE - (gva + len(data)) % _PAGE)
            data += self.mem.read(self._physical(gva + len(data), _IMPLICIT), part)
        return data

    def _read_word(self, gva: int) -> int:
        return int.from_bytes(self._read(gva, 8), "little")

    def _push(self, top: int, words: list[int], level: int) -> int:
        """Push words; returns the stack pointer. Nothing is written unless all of it can be."""
        access = int(Access.WRITE) | (int(Access.USER) if level == _RPL else _IMPLICIT)
        places = [self._physical(top - 8 * (i + 1), access) for i in range(len(words))]
        for gpa, word in zip(places, words, strict=True):
            self.mem.write_u64(gpa, word)
        return (top - 8 * len(words)) & (2**64 - 1)

    def __repr__(self) -> str:
        return f"<Emulator at RIP {self.uc.reg_read(x86.UC_X86_REG_RIP):#x}, {len(self.events)} exceptions delivered>"


def _is_served_alone(first: int, second: int) -> bool:
    """True if an exception in the delivery of another one makes no #DF."""
    return first not in _CONTRIBUTORY and first != _PF or (first in _CONTRIBUTORY and second == _PF)


def _slots_of(mem: GuestMemory) -> list[tuple[int, Any]]:
    """Return the slots of a memory, as the arrays that it reads."""
    slots = []
    for gpa, size, readonly in mem.slots:
        (_, _, data), *more = cast(Any, mem)._pieces(gpa, size)
        if readonly or more or not data.flags.writeable:
            raise ValueError(f"mem: the slot at {gpa:#x} is read-only, and Unicorn maps memory that can be written to")
        slots.append((gpa, data))
    if not slots:
        raise ValueError("mem: there is no slot")
    return slots


def _register(name: str) -> int:
    number = getattr(x86, f"UC_X86_REG_{'EFLAGS' if name == 'rflags' else name.upper()}", None)
    if number is None:
        raise TypeError(f"{name}: no such register")
    return int(number)


def _address(name: str) -> int:
    """Return the address of a function of Unicorn's library."""
    return int(ctypes.cast(getattr(uclib, name), ctypes.c_void_p).value or 0)


def _handle_of(engine: Any) -> int:
    return int(ctypes.cast(engine._uch, ctypes.c_void_p).value or 0)
