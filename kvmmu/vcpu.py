"""Vcpu: registers, the two walks, and the guest instructions that change them."""

from dataclasses import fields, replace
from typing import Any

from kvmmu._contexts import VcpuArch
from kvmmu._memory import GuestMemory
from kvmmu._pagewalk import PageWalk
from kvmmu.registers import CpuModel, Regs, admit, after_mov_cr, after_wrmsr_efer, after_wrpkru

__all__ = ["Vcpu"]

_TDP_KINDS = ("ept", "npt", None)
_RESET = Regs(cr0=0x60000010, cr3=0, cr4=0, efer=0)


class Vcpu:
    """One virtual processor.

    Parameters
    ----------
    mem : GuestMemory
        Guest-physical memory.
    cpu : CpuModel, optional
        The guest's processor.
    tdp : {"ept", "npt", None}
        Two-dimensional paging of the host, None for shadow paging.
    smm_mem : GuestMemory, optional
        The address space of system-management mode; by default that of `mem`.

    Attributes
    ----------
    gva_walk : PageWalk
        Linear address to guest-physical address, by the registers of whoever runs now.
    ngpa_walk : PageWalk
        The second stage under a nested guest. Not in use outside one.
    """

    def __init__(self, mem: GuestMemory, cpu: CpuModel | None = None, tdp: str | None = "ept", *,
                 smm_mem: GuestMemory | None = None) -> None:
        for name, memory in (("mem", mem), ("smm_mem", mem if smm_mem is None else smm_mem)):
            if not isinstance(memory, GuestMemory):
                raise TypeError(f"{name}: want a GuestMemory, got {type(memory).__name__}")
        if tdp not in _TDP_KINDS:
            raise ValueError(f"tdp: want 'ept', 'npt' or None, got {tdp!r}")
        self._spaces = (mem, mem if smm_mem is None else smm_mem)
        self._tdp = tdp
        self._cpu = CpuModel() if cpu is None else _check_cpu(cpu)
        self._smm = False
        self._regs = _RESET
        self._arch = VcpuArch()
        self.gva_walk = PageWalk(mem, self._arch, self._admit)
        self.ngpa_walk = PageWalk(mem, self._arch, self._admit)
        self._use_cpu()
        self._load(_RESET)

    def _admit(self, regs: Regs) -> Regs:
        return admit(self._cpu, regs, self.mem)

    def _load(self, regs: Regs) -> None:
        """Put legal registers in force."""
        self._regs = regs
        self._arch.load(regs)
        self.gva_walk.init(smm=self._smm)

    def _use_cpu(self) -> None:
        """Make both walks forget what they derived from another processor model."""
        self.gva_walk.set_cpu(self._cpu)
        self.ngpa_walk.set_cpu(self._cpu)

    @property
    def mem(self) -> GuestMemory:
        """The GuestMemory of the address space in force."""
        return self._spaces[self._smm]

    @property
    def tdp(self) -> str | None:
        """Two-dimensional paging of the host: "ept", "npt" or None."""
        return self._tdp

    @property
    def regs(self) -> Regs:
        """The registers in force (`Regs`); after power-up those of a reset, with paging off."""
        return self._regs

    @property
    def pdptrs(self) -> tuple[int, ...] | None:
        """The four PDPTE registers, stale until reloaded; None outside PAE paging."""
        return self._regs.pdptrs

    @property
    def cpu(self) -> CpuModel:
        """The processor model. Setting it builds every role and format anew.

        Raises
        ------
        GeneralProtection
            The registers in force are illegal on the new model; nothing changed.
        """
        return self._cpu

    @cpu.setter
    def cpu(self, cpu: CpuModel) -> None:
        regs = admit(_check_cpu(cpu), self._regs, self.mem)
        self._cpu = cpu
        self._use_cpu()
        self._load(regs)

    @property
    def smm(self) -> bool:
        """Whether the vCPU is in system-management mode: another address space, and a role of its own."""
        return self._smm

    @smm.setter
    def smm(self, smm: bool) -> None:
        self._smm = bool(smm)
        self.gva_walk.set_memory(self.mem)
        self.gva_walk.init(smm=self._smm)

    def set_regs(self, **registers: Any) -> None:
        """Load any of cr0, cr3, cr4, efer, pkru, rflags, pdptrs, as a VMM does: validated as a whole, all or nothing.

        No transition rules apply, and LMA is taken from `efer` as given. Under PAE paging the PDPTEs are those given, or are
        loaded from memory at CR3; they are checked either way.

        Raises
        ------
        GeneralProtection
            The resulting state is illegal; nothing changed.
        TypeError
            No such register.
        """
        known = {register.name for register in fields(Regs)}
        for name in registers:
            if name not in known:
                raise TypeError(f"set_regs() has no register {name!r}; it takes {', '.join(sorted(known))}")
        self._load(self._admit(replace(self._regs, **({"pdptrs": None} | registers))))

    def mov_cr(self, n: int, value: int) -> None:
        """MOV to CR0, CR3 or CR4 by the guest, with the rules of the transition.

        Setting CR0.PG under EFER.LME enters long mode, clearing it leaves it (from compatibility mode: CS.L is not
        modelled). The PDPTEs are loaded again where the manual says so. CR3 bit 63 under CR4.PCIDE is not stored.

        Raises
        ------
        GeneralProtection
            The transition is illegal; nothing changed.
        ValueError
            No such control register, or a value wider than the guest's operand.
        """
        if n not in (0, 3, 4):
            raise ValueError(f"mov_cr: want CR 0, 3 or 4, got {n!r}")
        self._load(after_mov_cr(self._cpu, self._regs, n, _check_bits("value", value, 64), self.mem))

    def wrmsr_efer(self, value: int) -> None:
        """WRMSR to IA32_EFER by the guest. LMA is read-only: what is written there is ignored.

        Raises
        ------
        GeneralProtection
            A reserved bit, or LME changed while paging; nothing changed.
        """
        self._load(after_wrmsr_efer(self._cpu, self._regs, _check_bits("value", value, 64)))

    def wrpkru(self, value: int) -> None:
        """WRPKRU by the guest.

        Raises
        ------
        InvalidOpcode
            CR4.PKE is clear.
        """
        self._load(after_wrpkru(self._regs, _check_bits("value", value, 32)))

    def __repr__(self) -> str:
        return f"<Vcpu {self.gva_walk.cpu_role!r}>"


def _check_cpu(cpu: CpuModel) -> CpuModel:
    if not isinstance(cpu, CpuModel):
        raise TypeError(f"cpu: want a CpuModel, got {type(cpu).__name__}")
    return cpu


def _check_bits(name: str, value: int, bits: int) -> int:
    value = int(value)
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: want {bits} bits, got {value:#x}")
    return value
