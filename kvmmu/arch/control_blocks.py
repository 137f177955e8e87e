"""Second stages from where a hypervisor keeps them: a VMCB (SVM), or the nested VMCS of KVM (VMX).

A VMCB's layout is architectural. A VMCS's is not: each processor lays its fields out as it likes, and software knows them by
encodings only. What a guest hypervisor of KVM keeps is however KVM's own, a VMCS that KVM emulates, whose offsets are part of
its save/restore format and do not change; its first word tells it from others.

Sources: APM vol. 2, "Layout of VMCB"; SDM vol. 3, "VM-Execution Control Fields"; the offsets of Linux's struct vmcs12.
"""

from typing import Protocol

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE
from kvmmu.arch.arguments import check_pages
from kvmmu.arch.registers import Regs
from kvmmu.arch.second_stages import Ept, Intercepts, Npt, Pml

__all__ = ["ept_from_vmcs12", "npt_from_vmcb", "regs_from_vmcb"]

# VMCB: the control area, and the state-save area from 0x400 on
_VMCB_EXCEPTIONS = 0x008
_VMCB_NESTED = 0x090
_VMCB_NCR3 = 0x0B0
_VMCB_EFER = 0x4D0
_VMCB_CR4 = 0x548
_VMCB_CR3 = 0x550
_VMCB_CR0 = 0x558
_VMCB_RFLAGS = 0x570
_NP_ENABLE = 1 << 0
_SEV_ES = 1 << 2
_GMET = 1 << 3

# KVM's VMCS
_VMCS12_REVISION = 0x11E57ED0
_VMCS_SHADOW = 1 << 31
_VMCS12_EPTP = 120
_VMCS12_PML_ADDRESS = 312
_VMCS12_PRIMARY = 748
_VMCS12_EXCEPTIONS = 752
_VMCS12_PFEC_MASK = 756
_VMCS12_PFEC_MATCH = 760
_VMCS12_SECONDARY = 804
_VMCS12_PML_INDEX = 996
_SECONDARY_IN_USE = 1 << 31
_ENABLE_EPT = 1 << 1
_ENABLE_PML = 1 << 17
_MBEC = 1 << 22


class Memory(Protocol):
    """Guest-physical memory of L1, such as a GuestMemory."""

    def is_backed(self, gpa: int, n: int) -> bool: ...

    def read(self, gpa: int, n: int) -> bytes: ...


class _Block:
    """The page of one control block."""

    def __init__(self, mem: Memory, gpa: int, name: str) -> None:
        if not (hasattr(mem, "is_backed") and hasattr(mem, "read")):
            raise TypeError(f"mem: want a GuestMemory or another object with is_backed() and read(), got {type(mem).__name__}")
        gpa = check_pages(f"{name.lower()}_gpa", gpa, 0, GPA_LIMIT - 1)
        if not mem.is_backed(gpa, PAGE_SIZE):
            raise ValueError(f"{name}: no memory at {gpa:#x}")
        self.where = f"{name} at {gpa:#x}"
        self.page = mem.read(gpa, PAGE_SIZE)

    def word(self, offset: int, size: int = 8) -> int:
        return int.from_bytes(self.page[offset:offset + size], "little")


def npt_from_vmcb(mem: Memory, vmcb_gpa: int, *, cr4: int, efer: int) -> Npt:
    """Return the second stage that a VMCB describes: N_CR3, guest-mode execute trap, and whether L1 intercepts #PF.

    Parameters
    ----------
    mem : GuestMemory
        L1's physical memory, or any object with its `read` and `is_backed`.
    vmcb_gpa : int
        Where the VMCB lies, as VMRUN takes it (page-aligned).
    cr4, efer : int
        L1's own, which choose the format of its nested tables; the VMCB has L2's.

    Returns
    -------
    Npt

    Raises
    ------
    ValueError
        The address is unaligned or in a hole, or the VMCB does not enable nested paging.
    """
    vmcb = _Block(mem, vmcb_gpa, "VMCB")
    control = vmcb.word(_VMCB_NESTED)
    if not control & _NP_ENABLE:
        raise ValueError(f"{vmcb.where}: NP_ENABLE is clear, L2 has no nested paging")
    return Npt(vmcb.word(_VMCB_NCR3), cr4=cr4, efer=efer, gmet=bool(control & _GMET),
               intercepts=Intercepts(vmcb.word(_VMCB_EXCEPTIONS, 4)))


def regs_from_vmcb(mem: Memory, vmcb_gpa: int) -> Regs:
    """L2's registers as a VMCB holds them: CR0, CR3, CR4, EFER and RFLAGS. A VMCB has no PKRU; it is 0.

    Parameters
    ----------
    mem : GuestMemory
        L1's physical memory, or any object with its `read` and `is_backed`.
    vmcb_gpa : int
        Where the VMCB lies (page-aligned).

    Returns
    -------
    Regs
        EFER has the SVME bit that VMRUN demands, which L2 itself may not see.

    Raises
    ------
    ValueError
        The address is unaligned or in a hole, or SEV-ES keeps the registers encrypted elsewhere.
    """
    vmcb = _Block(mem, vmcb_gpa, "VMCB")
    if vmcb.word(_VMCB_NESTED) & _SEV_ES:
        raise ValueError(f"{vmcb.where}: under SEV-ES the registers lie elsewhere, encrypted")
    return Regs(cr0=vmcb.word(_VMCB_CR0), cr3=vmcb.word(_VMCB_CR3), cr4=vmcb.word(_VMCB_CR4), efer=vmcb.word(_VMCB_EFER),
                rflags=vmcb.word(_VMCB_RFLAGS))


def ept_from_vmcs12(mem: Memory, vmcs_gpa: int) -> Ept:
    """Return the second stage of a VMCS that a guest hypervisor keeps under KVM: EPTP, MBEC, PML, and which #PF L1 intercepts.

    KVM works on a copy of the VMCS that is current. Memory has what L1 wrote once L1 loaded another VMCS or did VMCLEAR.

    Parameters
    ----------
    mem : GuestMemory
        L1's physical memory, or any object with its `read` and `is_backed`.
    vmcs_gpa : int
        Where the VMCS lies, as VMPTRLD takes it (page-aligned).

    Returns
    -------
    Ept
        Capabilities (execute-only, page sizes, advanced exit information) are not in a VMCS; they are the defaults of `Ept`.

    Raises
    ------
    ValueError
        The address is unaligned or in a hole, the VMCS is not one of KVM's, or it does not enable EPT or has a bad EPT pointer.
    """
    vmcs = _Block(mem, vmcs_gpa, "VMCS")
    header = vmcs.word(0, 4)
    if header & ~_VMCS_SHADOW != _VMCS12_REVISION:
        raise ValueError(f"{vmcs.where}: revision {header & ~_VMCS_SHADOW:#x} is not KVM's ({_VMCS12_REVISION:#x}); "
                         "other layouts are not known")
    if header & _VMCS_SHADOW:
        raise ValueError(f"{vmcs.where}: a shadow VMCS runs no guest")
    controls = vmcs.word(_VMCS12_SECONDARY, 4) if vmcs.word(_VMCS12_PRIMARY, 4) & _SECONDARY_IN_USE else 0
    if not controls & _ENABLE_EPT:
        raise ValueError(f"{vmcs.where}: EPT is not enabled")
    intercepts = Intercepts(*(vmcs.word(offset, 4) for offset in (_VMCS12_EXCEPTIONS, _VMCS12_PFEC_MASK, _VMCS12_PFEC_MATCH)))
    pml = Pml(vmcs.word(_VMCS12_PML_ADDRESS), vmcs.word(_VMCS12_PML_INDEX, 2)) if controls & _ENABLE_PML else None
    try:
        return Ept(vmcs.word(_VMCS12_EPTP), mbec=bool(controls & _MBEC), pml=pml, intercepts=intercepts)
    except ValueError as error:
        raise ValueError(f"{vmcs.where}: {error}") from None
