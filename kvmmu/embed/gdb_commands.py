"""Commands for GDB that walk the page tables of a remote target: QEMU's gdbstub, or any target whose memory is physical.

    (gdb) source PATH                       the path: python3 -c "import kvmmu.embed; print(kvmmu.embed.gdb_path())"
    (gdb) target remote :1234
    (gdb) kvmmu walk $rip x                 every entry of one walk; letters: r w x, u for user mode
    (gdb) kvmmu pt                          all that is mapped; kvmmu pt START STOP, -wx, -user, -single
    (gdb) print/x $kvmmu_gpa($rsp)          a guest-physical address, or -1
    (gdb) kvmmu memory direct               addresses of the target are guest-physical already

The registers are those of the thread that is chosen, which is a vCPU; `kvmmu walk ADDRESS cr3=VALUE` takes others. Nothing is
written to the target.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gdb

try:
    import kvmmu
except ImportError:                         # GDB's Python does not know where this file lies
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import kvmmu
import numpy as np

from kvmmu import Access
from kvmmu.report.address_space import mapping_lines

__all__ = ["Commands"]

_PAGE = 4096
_NAMES = ("cr0", "cr3", "cr4", "efer")
_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.FETCH, "u": Access.USER, "a": Access.AC, "i": Access.IMPLICIT}
_EFER_LME_LMA = 0x500
_PG, _PAE = 1 << 31, 1 << 5


class Memory:
    """The way in which guest-physical memory is read.

    Attributes
    ----------
    mode : str
        "auto": "qemu" if the target knows QEMU's packet, else an error; "qemu": by that packet; "direct": as it is.
    """

    def __init__(self) -> None:
        self.mode = "auto"

    @contextlib.contextmanager
    def physical(self) -> Iterator[None]:
        """Make the target take addresses for guest-physical ones, in the block."""
        if self.mode == "direct":
            yield
            return
        if not _packet("Qqemu.PhyMemMode:1"):
            raise gdb.GdbError("kvmmu: this target has no physical memory mode (QEMU has one since 4.1); if its addresses are "
                               "guest-physical, say 'kvmmu memory direct'")
        try:
            yield
        finally:
            _packet("Qqemu.PhyMemMode:0")

    def read(self, gpas: Any) -> Any:
        """Return pages at guest-physical addresses; what the target cannot read is zero."""
        pages = np.zeros((gpas.size, _PAGE), np.uint8)
        inferior = gdb.selected_inferior()
        with self.physical():
            for row, gpa in enumerate(gpas.tolist()):
                with contextlib.suppress(gdb.MemoryError):
                    pages[row] = np.frombuffer(inferior.read_memory(gpa, _PAGE), np.uint8)
        return pages


def _packet(text: str) -> bool:
    """Send a packet to the remote target; True if it says OK."""
    try:
        return '"OK"' in gdb.execute(f"maintenance packet {text}", to_string=True)
    except gdb.error:
        return False


MEMORY = Memory()


def _register(name: str) -> int:
    """Return a control register of the vCPU; EFER of a target that does not tell it follows from the mode."""
    try:
        return int(gdb.parse_and_eval(f"(unsigned long long)${name}"))
    except gdb.error:
        if name != "efer":
            raise gdb.GdbError(f"kvmmu: the target has no ${name}; give it: {name}=VALUE") from None
    pae = _register("cr0") & _PG and _register("cr4") & _PAE
    pointer = gdb.selected_frame().architecture().name().startswith("i386:x86-64")
    return _EFER_LME_LMA | 0x800 if pae and pointer else 0


def target_vcpu(given: dict[str, int]) -> kvmmu.Vcpu:
    """Return a vCPU with the registers and the memory of the target, as they are now."""
    vcpu = kvmmu.Vcpu(kvmmu.GuestMemory.from_callbacks(MEMORY.read), kvmmu.CpuModel(maxphyaddr=52))
    cr0, cr3, cr4, efer = (given[name] if name in given else _register(name) for name in _NAMES)
    vcpu.set_regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)
    return vcpu


def _parse(text: str) -> tuple[list[str], dict[str, int]]:
    """Return the words of a command, and registers among them."""
    words, given = [], {}
    for word in gdb.string_to_argv(text):
        name, equals, value = word.partition("=")
        if equals and name in _NAMES:
            given[name] = _number(value)
        else:
            words.append(word)
    return words, given


def _number(text: str) -> int:
    return int(gdb.parse_and_eval(text)) & (2**64 - 1)


def _walk(text: str) -> None:
    """kvmmu walk ADDRESS [LETTERS] [cr3=VALUE ...]: print the walk of a linear address, entry by entry.

Letters: r w x, u for user mode, a for EFLAGS.AC, i for an implicit access. By default ra."""
    words, given = _parse(text)
    if not 1 <= len(words) <= 2 or any(letter not in _LETTERS for letter in "".join(words[1:])):
        raise gdb.GdbError(f"kvmmu walk ADDRESS [{''.join(_LETTERS)}] [cr3=VALUE ...]")
    access = Access(0)
    for letter in words[1] if len(words) == 2 else "ra":
        access |= _LETTERS[letter]
    gdb.write(f"{target_vcpu(given).gva_walk.walk_record(_number(words[0]), access)}\n")


def _pt(text: str) -> None:
    """kvmmu pt [START [STOP]] [-wx] [-user] [-single] [cr3=VALUE ...]: print what the page tables map.

-wx: only what is writable and executable; -user: only what user mode may access; -single: page by page."""
    words, given = _parse(text)
    options = {word for word in words if word.startswith("-")}
    bounds = [_number(word) for word in words if not word.startswith("-")]
    if options - {"-wx", "-user", "-single"} or len(bounds) > 2:
        raise gdb.GdbError("kvmmu pt [START [STOP]] [-wx] [-user] [-single] [cr3=VALUE ...]")
    vcpu = target_vcpu(given)
    found = vcpu.gva_walk.mappings(*bounds, merge="-single" not in options)
    only = True if "-wx" in options else None
    found = found.where(writable=only, executable=only, user=True if "-user" in options else None)
    for line in mapping_lines(found, vcpu.gva_walk.cpu_role.level):
        gdb.write(f"{line}\n")


def _memory(text: str) -> None:
    """kvmmu memory auto|qemu|direct: choose how guest-physical memory is read."""
    if text not in ("auto", "qemu", "direct"):
        raise gdb.GdbError(f"kvmmu memory auto|qemu|direct: got {text!r}")
    MEMORY.mode = text


class Commands(gdb.Command):  # type: ignore[misc]
    """Commands of kvmmu: walk, pt, memory."""

    def __init__(self, name: str, act: Callable[[str], None] | None = None) -> None:
        self.__doc__ = act.__doc__ if act is not None else type(self).__doc__
        self._act = act
        super().__init__(name, gdb.COMMAND_DATA, gdb.COMPLETE_EXPRESSION, act is None)

    def invoke(self, argument: str, from_tty: bool) -> None:
        if self._act is None:
            raise gdb.GdbError("kvmmu walk ADDRESS, kvmmu pt, kvmmu memory MODE; 'help kvmmu' has more")
        try:
            self._act(argument)
        except (kvmmu.GeneralProtection, ValueError, RuntimeError) as error:
            raise gdb.GdbError(f"kvmmu: {error}") from None


class PhysicalAddress(gdb.Function):  # type: ignore[misc]
    """$kvmmu_gpa(ADDRESS): where a linear address leads to, or -1."""

    def __init__(self) -> None:
        super().__init__("kvmmu_gpa")

    def invoke(self, address: Any) -> int:
        try:
            return int(target_vcpu({}).gva_walk.lookup(int(address) & (2**64 - 1), Access.PROBE).gpa)
        except kvmmu.GuestFault:
            return -1


Commands("kvmmu")
for _name, _act in (("walk", _walk), ("pt", _pt), ("memory", _memory)):
    Commands(f"kvmmu {_name}", _act)
PhysicalAddress()
