"""Image: guest memory from a file, and the registers that came with it.

`regs_of()` infers EFER where a file does not have it; `Image.vcpu()` does so again for registers that its caller changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvmmu.arch._bits import CR3_LAM_U48, CR3_LAM_U57, CR3_PAE_PDPT, Cr0, Cr4, Efer
from kvmmu.arch.arguments import check_int
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.memory._memory import GuestMemory
from kvmmu.vm.vcpu import Vcpu

__all__ = ["Image", "VcpuState", "long_mode_regs", "regs_of"]

_REGISTERS = ("cr0", "cr3", "cr4", "efer", "pkru", "rflags", "pdptrs", "pkrs")
_CR3_ADDRESS = (1 << 52) - 1
_CR3_LAM = CR3_LAM_U48 | CR3_LAM_U57
_TCG_ACCESSED = 1 << 5
_WIDEST = 52
_CR4_KNOWN = 0
for _bit in Cr4:
    _CR4_KNOWN |= int(_bit)


@dataclass(frozen=True)
class VcpuState:
    """The state of one vCPU, as an image has it.

    Attributes
    ----------
    number : int
    regs : Regs
        Registers that translation depends on.
    registers : mapping of str to int
        All registers in the image, by name.
    inferred : tuple of str
        Registers of `regs` that are not in the image.
    """

    number: int
    regs: Regs
    registers: Mapping[str, int] = field(default_factory=dict)
    inferred: tuple[str, ...] = ()


def regs_of(cr0: int, cr3: int, cr4: int, *, long_mode: bool, rflags: int = 2) -> Regs:
    """Return registers with EFER inferred: NXE wherever entries can have an XD bit, LME and LMA in long mode."""
    efer = 0
    if cr0 & Cr0.PG and cr4 & Cr4.PAE:
        efer = int(Efer.NX | Efer.SCE | Efer.LME | Efer.LMA) if long_mode else int(Efer.NX)
    return Regs(cr0=cr0 & 0xFFFFFFFF, cr3=cr3, cr4=cr4 & _CR4_KNOWN, efer=efer, rflags=rflags & ((1 << 64) - 1))


def long_mode_regs(cr3: int, *, five_levels: bool = False) -> Regs:
    """Return registers of a 64-bit guest of which the page-table root alone is known."""
    cr4 = Cr4.PAE | Cr4.PSE | Cr4.PGE | (Cr4.LA57 if five_levels else 0)
    return regs_of(int(Cr0.PE | Cr0.ET | Cr0.WP | Cr0.PG), cr3, int(cr4), long_mode=True)


class Image:
    """A memory image. Made by `open_image()`.

    Attributes
    ----------
    path : str
        The file; "" for an object with `read()`.
    format : str
    memory : GuestMemory
        The guest-physical memory. Stores, also of accessed and dirty bits, stay in this process.
    vcpus : tuple of VcpuState
        The vCPUs whose registers are in the image; empty if there are none.
    damage : tuple of str
        What is wrong with the file, as far as it could be read all the same.
    root : Regs or None
        Registers of the kernel's own address space, where the image tells them.
    details : dict
        What else the format tells.
    """

    def __init__(self, path: str, format: str, memory: GuestMemory, vcpus: Sequence[VcpuState] = (), *,
                 damage: Sequence[str] = (), root: Regs | None = None, details: Mapping[str, Any] | None = None) -> None:
        self.path, self.format, self.memory = path, format, memory
        self.vcpus, self.damage, self.root = tuple(vcpus), tuple(damage), root
        self.details = dict(details or {})

    def vcpu(self, i: int = 0, *, cpu: CpuModel | None = None, **registers: Any) -> Vcpu:
        """Return a vCPU over the memory, with the registers of vCPU i of the image.

        Parameters
        ----------
        i : int
            An image without registers has a vCPU 0: with those of the kernel if the image tells its root, else of a 64-bit guest
            with `cr3`, which then has to be given.
        cpu : CpuModel, optional
            By default one that has every feature and 52 physical-address bits.
        **registers
            Any of cr0, cr3, cr4, efer, pkru, rflags, pdptrs, pkrs, in the place of those of the image. Where `efer` is not given
            it is inferred anew from cr0 and cr4 if one of these is. A cr4 with LA57 has five levels, one without PAE is 32-bit.

        Raises
        ------
        ValueError
            There is no such vCPU, or no cr3.
        GeneralProtection
            No processor can be in this state.
        """
        for name in registers:
            if name not in _REGISTERS:
                raise TypeError(f"{name}: is no register that counts; allowed are {', '.join(_REGISTERS)}")
        i = check_int("i", i, 0, max(len(self.vcpus), 1) - 1)
        if self.vcpus:
            regs = self.vcpus[i].regs
        elif self.root is not None:
            regs = self.root
        elif "cr3" in registers:
            regs = long_mode_regs(int(registers["cr3"]))
        else:
            raise ValueError(f"cr3: the image ({self.format}) has no registers, so that cr3 has to be given")
        vcpu = Vcpu(self.memory, CpuModel(maxphyaddr=_WIDEST) if cpu is None else cpu)
        regs = replace(regs, cr3=regs.cr3 & (_CR3_ADDRESS | (_CR3_LAM if vcpu.cpu.lam else 0)))
        if registers.keys() & {"cr0", "cr4"} and "efer" not in registers:
            changed = replace(regs, **{name: registers[name] for name in ("cr0", "cr4") if name in registers})
            registers["efer"] = regs_of(changed.cr0, changed.cr3, changed.cr4, long_mode=_is_long(regs, registers)).efer
        regs = replace(regs, **registers)
        if regs.is_pae_paging and regs.pdptrs is None:
            regs = replace(regs, pdptrs=self._pdptrs(regs.cr3))
        vcpu.set_regs(regs)
        return vcpu

    def _pdptrs(self, cr3: int) -> tuple[int, ...]:
        """Return the PDPTEs at CR3 without bit 5, which is reserved and which QEMU's TCG sets as it walks."""
        base = cr3 & CR3_PAE_PDPT
        return tuple(self.memory.read_u64(base + 8 * n) & ~_TCG_ACCESSED for n in range(4))

    def __repr__(self) -> str:
        return f"<Image {self.path!r} {self.format}, {len(self.vcpus)} vCPUs, {self.memory!r}>"


def _is_long(regs: Regs, registers: Mapping[str, Any]) -> bool:
    """Return whether a guest whose CR0 or CR4 is replaced runs in long mode: as before, or by a CR4 that only long mode has."""
    return regs.is_long_mode or not regs.cr0 & Cr0.PG or bool(int(registers.get("cr4", 0)) & (Cr4.LA57 | Cr4.PCIDE))
