"""The guest of a recorded scenario: a code page that does one access per entry, and the tables that a processor wants.

The eight pages lie in a memory slot of their own. Their order, and the page tables among them, are those of the recordings;
the code is written here. Every instruction sits in a slot of 16 bytes and is followed by OUT, which ends the operation; so does
every handler of an exception, with its vector in the port.

Registers on entry: RBX the linear address, RCX the operand, RDX where a fetched ``JMP RDX`` comes back to. With paging off the
guest runs in 32-bit protected mode, and accesses of 8 bytes become accesses of 4.
"""

import struct
from typing import Any

__all__ = [
    "FATAL", "INSTRUCTIONS", "PORT_OF_EXCEPTIONS", "PORT_OF_SUCCESS", "SELECTORS", "SHUTDOWN", "VECTORS_WITH_ERROR_CODE", "Stub"]

FATAL = ("internal", "exit")            # results after which the guest does not run again
SHUTDOWN = ("exit", 8)                  # KVM_EXIT_SHUTDOWN: an exception that cannot be delivered, nor a double fault
PORT_OF_SUCCESS = 0x10
PORT_OF_EXCEPTIONS = 0x20               # plus the vector
VECTORS = 32
VECTORS_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
SELECTORS = {0: (0x08, 0x10), 3: (0x1B, 0x23)}              # of code and stack, by CPL
TSS_SELECTOR = 0x28
TSS_OFFSET, TSS_LIMIT = 0x100, 0x67
PAGE_SIZE = 4096
CODE_SIZE = 16
_HANDLERS = 0x800
_OUT = 0xE6
_GDT = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF)
_SUPERVISOR, _USER, _IDT, _GDT_TSS, _STACK = range(5)       # pages

# Where the recordings have their stub.
_RECORDED: dict[str, Any] = {
    "slot": 31, "gpa": "0x30000000", "size": "0x10000", "va": "0x300000000000", "user_code_va": "0x300000001000",
    "mem": [["0x30005000", "0x30006067"], ["0x30006000", "0x30007067"], *(
        [f"{0x30007000 + 8 * page:#x}", f"{0x30000063 + PAGE_SIZE * page | (page == _USER) << 2:#x}"] for page in range(5))]}

# By name: the machine code, and the bytes that it moves.
INSTRUCTIONS: dict[str, tuple[bytes, int]] = {
    "null": (b"", 0),
    "load": (bytes.fromhex("488b03"), 8),
    "load4": (bytes.fromhex("8b03"), 4),
    "load1": (bytes.fromhex("8a03"), 1),
    "store": (bytes.fromhex("48890b"), 8),
    "store4": (bytes.fromhex("890b"), 4),
    "store2": (bytes.fromhex("66890b"), 2),
    "store1": (bytes.fromhex("880b"), 1),
    "xchg": (bytes.fromhex("48870b"), 8),
    "cmpxchg": (bytes.fromhex("f0480fb10b"), 8),
    "xadd": (bytes.fromhex("480fc10b"), 8),
    "rmw": (bytes.fromhex("48830b00"), 8),
    "add": (bytes.fromhex("48010b"), 8),
    "sub": (bytes.fromhex("48290b"), 8),
    "or": (bytes.fromhex("48090b"), 8),
    "and": (bytes.fromhex("48210b"), 8),
    "not": (bytes.fromhex("48f713"), 8),
    "inc": (bytes.fromhex("48ff03"), 8),
    "btr": (bytes.fromhex("480fb30b"), 8),
    "movnti": (bytes.fromhex("480fc30b"), 8),
    "movups": (bytes.fromhex("0f1103"), 16),
    "fetch": (bytes.fromhex("ffe3"), 2),
    "invlpg": (bytes.fromhex("0f013b"), 0),
    "cr0": (bytes.fromhex("0f22c1"), 0),
    "cr3": (bytes.fromhex("0f22d9"), 0),
    "cr4": (bytes.fromhex("0f22e1"), 0),
    "efer": (bytes.fromhex("0f30"), 0),
}
_REX_W = 0x48
_GDT_32 = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF)
_OFFSETS = {name: CODE_SIZE * i for i, name in enumerate(INSTRUCTIONS)}


class Stub:
    """The places of the parts of a scenario's stub, and their contents.

    Parameters
    ----------
    stub : dict or None
        The `stub` of a scenario. None: where the recordings have theirs.
    mode : str, optional
        The `mode` of a scenario: "nopg" for paging off, None for 4-level long mode.

    Attributes
    ----------
    gpa, size, va, user_code_va : int
        Of the whole; in long mode linear addresses are mapped by the tables in it.
    long_mode : bool
    """

    def __init__(self, stub: dict[str, Any] | None, mode: str | None = None) -> None:
        stub = _RECORDED if stub is None else stub
        if mode not in (None, "nopg"):
            raise ValueError(f"mode: want 'nopg' or none, got {mode!r}")
        self.long_mode = mode is None
        self.slot = int(stub["slot"])
        self.gpa, self.size = int(stub["gpa"], 16), int(stub["size"], 16)
        if self.long_mode:
            self.va, self.user_code_va = int(stub["va"], 16), int(stub["user_code_va"], 16)
        else:
            self.va, self.user_code_va = self.gpa, self._page(_USER)
        self.tables = [(int(gpa, 16), int(entry, 16)) for gpa, entry in stub.get("mem", ())]

    def instruction(self, name: str) -> tuple[bytes, int]:
        """Machine code, and the bytes that it moves."""
        if name not in INSTRUCTIONS:
            raise ValueError(f"op: want one of {', '.join(INSTRUCTIONS)}, got {name!r}")
        code, size = INSTRUCTIONS[name]
        if self.long_mode or _REX_W not in code[:2]:
            return code, size
        return code.replace(bytes((_REX_W,)), b"", 1), min(size, 4)

    def code_va(self, name: str, cpl: int) -> int:
        """Linear address of an instruction for a privilege level."""
        return (self.user_code_va if cpl else self.va) + _OFFSETS[name]

    def return_va(self, name: str, cpl: int) -> int:
        """Linear address of the OUT after an instruction."""
        return self.code_va(name, cpl) + len(self.instruction(name)[0])

    @property
    def delivery(self) -> list[tuple[int, bool]]:
        """Linear addresses that an exception of the guest needs, and whether it writes there."""
        return [(self.idt[0], False), (self.gdt[0], False), (self.va + _HANDLERS, False), (self.stack_va - 1, True)]

    @property
    def stack_va(self) -> int:
        """Top of the stack of CPL 0."""
        return self.va + (_STACK + 1) * PAGE_SIZE - 64

    @property
    def word(self) -> int:
        """Bytes of what an exception pushes."""
        return 8 if self.long_mode else 4

    @property
    def idt(self) -> tuple[int, int]:
        """Base and limit."""
        return self.va + _IDT * PAGE_SIZE, 2 * self.word * VECTORS - 1

    @property
    def gdt(self) -> tuple[int, int]:
        """Base and limit."""
        return self.va + _GDT_TSS * PAGE_SIZE, 8 * len(_GDT) + 16 - 1

    @property
    def tss(self) -> tuple[int, int]:
        """Base and limit."""
        return self.va + _GDT_TSS * PAGE_SIZE + TSS_OFFSET, TSS_LIMIT

    def memory(self) -> list[tuple[int, bytes]]:
        """Return what to write where: guest-physical addresses and bytes."""
        code = b"".join((self.instruction(name)[0] + bytes((_OUT, PORT_OF_SUCCESS))).ljust(CODE_SIZE, b"\x90")
                        for name in INSTRUCTIONS)
        handlers = b"".join(bytes((_OUT, PORT_OF_EXCEPTIONS + vector)).ljust(CODE_SIZE, b"\x90") for vector in range(VECTORS))
        gates = b"".join(self._gate(self.va + _HANDLERS + CODE_SIZE * vector) for vector in range(VECTORS))
        base, limit = self.tss
        tss_descriptor = (limit | (base & 0xFFFFFF) << 16 | 0x8B << 40 | (base >> 24 & 0xFF) << 56, base >> 32)
        gdt = struct.pack(f"<{len(_GDT) + 2}Q", *(_GDT if self.long_mode else _GDT_32), *tss_descriptor)
        tss = struct.pack("<IQ", 0, self.stack_va) if self.long_mode else struct.pack("<III", 0, self.stack_va, SELECTORS[0][1])
        return [
            (self._page(_SUPERVISOR), code), (self._page(_SUPERVISOR) + _HANDLERS, handlers), (self._page(_USER), code),
            (self._page(_IDT), gates), (self._page(_GDT_TSS), gdt),
            (self._page(_GDT_TSS) + TSS_OFFSET, tss.ljust(TSS_LIMIT + 1, b"\0")),
            *((gpa, entry.to_bytes(8, "little")) for gpa, entry in self.tables)]

    def _page(self, number: int) -> int:
        return self.gpa + number * PAGE_SIZE

    def _gate(self, handler: int) -> bytes:
        """An interrupt gate of CPL 0."""
        gate = struct.pack("<HHBBH", handler & 0xFFFF, SELECTORS[0][0], 0, 0x8E, handler >> 16 & 0xFFFF)
        return gate + struct.pack("<II", handler >> 32, 0) if self.long_mode else gate
