"""GuestState: the registers of one vCPU, and the walks that they make."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from kvmmu.arch._bits import Cr0, Cr4, Efer
from kvmmu.arch.faults import GuestFault
from kvmmu.arch.registers import CpuModel, Regs, TableSpace, admit, with_registers
from kvmmu.arch.second_stages import Ept, Npt, Stage
from kvmmu.memory._memory import GuestMemory
from kvmmu.walk._second_stage import SecondStage
from kvmmu.walk._vcpu_arch import new_arch
from kvmmu.walk.pagewalk import PageWalk, new_walk

_PG, _WP = int(Cr0.PG), int(Cr0.WP)
_ROLE_CR4 = int(Cr4.PSE | Cr4.PAE | Cr4.LA57 | Cr4.SMEP | Cr4.SMAP | Cr4.PKE)
_NO_CR4, _NO_EFER = int(Cr4.PKS | Cr4.LASS), int(Efer.UAIE)      # that KVM offers no guest
_REGISTERS = frozenset(register.name for register in fields(Regs))
_RESET = Regs(cr0=0x60000010, cr3=0, cr4=0, efer=0)


@dataclass(frozen=True)
class SavedGuest:
    """The registers of a vCPU and its walks at one moment."""

    cpu: CpuModel
    regs: Regs
    l1_regs: Regs | None
    smm: bool
    second: SecondStage | None
    pml_index: int | None
    init_counts: tuple[int, int]


class GuestState:
    """The registers of the guest that runs on a vCPU, those of L1 while L2 runs, and the two walks. The caller holds the lock.

    Parameters
    ----------
    mem, smm_mem : GuestMemory
        Memory of the two address spaces.
    cpu : CpuModel
    tdp : {"ept", "npt", None}

    Attributes
    ----------
    regs : Regs
        Of whoever runs.
    l1_regs : Regs or None
        L1's, to be in force again when L2 is left; None while L1 runs.
    smm : bool
    arch : VcpuArch
        `regs` as the walks read them.
    gva_walk, ngpa_walk : PageWalk
    """

    def __init__(self, mem: GuestMemory, smm_mem: GuestMemory, cpu: CpuModel, tdp: Literal["ept", "npt"] | None) -> None:
        self.spaces = (mem, smm_mem)
        self.cpu, self.tdp = cpu, tdp
        self.smm = False
        self.l1_regs: Regs | None = None
        self.regs = _RESET
        self.arch = new_arch()
        self.gva_walk = new_walk(mem, self.arch, self.admit)
        self.ngpa_walk = new_walk(mem, self.arch, self.admit)
        self._use_cpu()
        self.load(_RESET)

    @property
    def mem(self) -> GuestMemory:
        """The memory of the address space in force."""
        return self.spaces[self.smm]

    @property
    def second(self) -> SecondStage | None:
        """The second stage of L1's that L2 runs under."""
        return self.gva_walk.second

    @property
    def guest_mode(self) -> bool:
        """True if L2 runs."""
        return self.l1_regs is not None

    def admit(self, regs: Regs, second: SecondStage | None) -> Regs:
        """Return legal registers, with PDPTEs loaded through a second stage if there is one."""
        return admit(self.cpu, regs, self.table_space(second))

    def table_space(self, second: SecondStage | None) -> TableSpace | None:
        """Return where PDPTE registers are loaded from; None under nested paging of SVM, which has none."""
        if second is None:
            return None if self.tdp == "npt" else self.mem
        return None if isinstance(second.stage, Npt) else _NestedSpace(self.mem, second)

    def load(self, regs: Regs) -> None:
        """Put legal registers in force."""
        self.regs = regs
        self.arch.load(regs)
        self.gva_walk._init(smm=self.smm, guest_mode=self.guest_mode)

    def set_cpu(self, cpu: CpuModel) -> None:
        """Take another processor model, if the registers are legal on it."""
        regs = admit(cpu, self.regs, self.table_space(self.second))
        self.cpu = cpu
        self._use_cpu()
        self.load(regs)

    def _use_cpu(self) -> None:
        """Give both walks the processor model; they derive all else from it anew."""
        second = self.second
        self.gva_walk._set_cpu(self.cpu, npt_host=self.tdp == "npt")
        self.ngpa_walk._set_cpu(self.cpu)
        if second is None:
            return
        stage = second.stage
        if isinstance(stage, Ept) and stage.pml is not None and second.pml_index is not None:
            stage = replace(stage, pml=replace(stage.pml, index=second.pml_index))      # the log goes on where it is
        self.gva_walk._set_second_stage(self.ngpa_walk._enter(stage))

    def set_smm(self, smm: bool) -> bool:
        """Enter or leave system-management mode; returns True if that is a change."""
        changed, self.smm = self.smm != smm, smm
        self.gva_walk._set_memory(self.mem)
        self.ngpa_walk._set_memory(self.mem)
        self.gva_walk._init(smm=self.smm, guest_mode=self.guest_mode)
        return changed

    def enter_nested(self, stage: Stage | None, registers: Mapping[str, Any], *, on_machine: bool) -> None:
        """Run L2 under a second stage, or without one; on an error nothing has changed. IN on_machine: as `check_offered()`."""
        l1_regs = self.regs if self.l1_regs is None else self.l1_regs
        l2_regs = with_registers(l1_regs, **{"pdptrs": None, **known_registers(registers)})
        before = self.second
        second = None
        if stage is not None:
            second = self.ngpa_walk._enter(stage)
        try:
            if second is None:
                admit(self.cpu, l2_regs, self.mem)
            regs = self.admit(l2_regs, second)
            if on_machine:
                check_offered(self.regs, regs)
        except (GuestFault, ValueError):
            self._use_second(before)
            raise
        self.l1_regs = l1_regs
        self._use_second(second)
        self.load(regs)

    def leave_nested(self) -> bool:
        """Run L1 again, with the registers it had; returns True if L2 ran."""
        if self.l1_regs is None:
            return False
        regs, self.l1_regs = self.l1_regs, None
        self._use_second(None)
        self.load(regs)
        return True

    def _use_second(self, second: SecondStage | None) -> None:
        if second is None:
            self.ngpa_walk._leave()
        else:
            second = self.ngpa_walk._enter(second.stage)
        self.gva_walk._set_second_stage(second)

    def save(self) -> SavedGuest:
        """Return the present state."""
        second = self.second
        return SavedGuest(self.cpu, self.regs, self.l1_regs, self.smm, second, None if second is None else second.pml_index,
                          (self.gva_walk.init_count, self.ngpa_walk.init_count))

    def put(self, saved: SavedGuest, *, own: bool) -> None:
        """Put a state of this vCPU (own) or of another one in force. It was legal when it was saved."""
        self.cpu, self.smm, self.l1_regs = saved.cpu, saved.smm, saved.l1_regs
        self._use_second(None)
        for walk in (self.gva_walk, self.ngpa_walk):
            walk._set_memory(self.mem)
        self.gva_walk._set_cpu(self.cpu, npt_host=self.tdp == "npt")
        self.ngpa_walk._set_cpu(self.cpu)
        if saved.second is not None:
            second = self.ngpa_walk._enter(saved.second if own else saved.second.stage)
            second.pml_index = saved.pml_index
            self.gva_walk._set_second_stage(second)
        self.load(saved.regs)
        self.gva_walk.init_count, self.ngpa_walk.init_count = saved.init_counts

    def check_walk(self, walk: PageWalk) -> None:
        """Raise ValueError unless the walk is one of the two."""
        if walk is not self.gva_walk and walk is not self.ngpa_walk:
            raise ValueError("walk: want gva_walk or ngpa_walk of this vCPU")


class _NestedSpace:
    """L2's physical memory, for a load of the PDPTE registers."""

    def __init__(self, mem: GuestMemory, second: SecondStage) -> None:
        self.mem, self.second = mem, second
        self.base = self.gpa = 0

    def is_backed(self, gpa: int, n: int) -> bool:
        self.base, self.gpa = gpa, self.second.pdpt_gpa(self.mem, gpa)
        return self.mem.is_backed(self.gpa, n)

    def read_u64(self, gpa: int) -> int:
        return self.mem.read_u64(self.gpa + gpa - self.base)


def changes_roles(before: Regs, after: Regs) -> bool:
    """Return True if a MOV to CR0 or CR4 changes what roles are made of; CR0.WP counts for nothing while paging is off."""
    cr0 = before.cr0 ^ after.cr0
    return bool(cr0 & _PG or (cr0 & _WP and after.cr0 & _PG) or (before.cr4 ^ after.cr4) & _ROLE_CR4)


def check_offered(before: Regs, after: Regs) -> None:
    """Raise if registers turn on what KVM offers no guest. Walks have it, so only a vCPU that runs on a machine is checked."""
    if cr4 := after.cr4 & ~before.cr4 & _NO_CR4:
        raise ValueError(f"cr4 {after.cr4:#x}: KVM offers no guest PKS and LASS; want {cr4:#x} clear")
    if after.efer & ~before.efer & _NO_EFER:
        raise ValueError(f"efer {after.efer:#x}: KVM offers no guest upper address ignore; want UAIE clear")


def known_registers(registers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return registers, if all of them are names of registers."""
    for name in registers:
        if name not in _REGISTERS:
            raise TypeError(f"no register {name!r}; want some of {', '.join(sorted(_REGISTERS))}")
    return registers
