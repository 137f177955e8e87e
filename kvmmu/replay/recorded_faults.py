"""Recorded page faults held against the walk, and register contexts of recordings and traces put in force."""

from typing import Any

import numpy as np

from kvmmu.arch._bits import CR3_PAE_PDPT, Access, NpfInfo, Status
from kvmmu.arch.faults import GeneralProtection, NestedFault, npf_info_text
from kvmmu.arch.registers import CpuModel, Regs, check_pdptrs
from kvmmu.arch.second_stages import Npt, Stage
from kvmmu.memory._memory import GuestMemory
from kvmmu.vm.vcpu import Vcpu
from kvmmu.walk._register_sets import RegisterSets
from kvmmu.walk.pagewalk import PageWalk

__all__ = ["Context", "FaultCounts", "npt_fault", "page_fault_access", "page_fault_reproduced", "pdptrs_at", "use_context"]

Context = Regs | tuple[Regs, Stage]       # inside a nested guest: with its second stage


class FaultCounts:
    """Recorded faults by error code and by what the walk said. Each is counted by one store, so that no Ctrl-C comes between."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, bool | None], int] = {}

    def add(self, code: str, reproduced: bool | None) -> None:
        """Count one; None is a fault that was not checked."""
        self._counts[code, reproduced] = self._counts.get((code, reproduced), 0) + 1

    def by_code(self, *verdicts: bool | None) -> dict[str, int]:
        """How many there are of each code, of those with one of these verdicts, or of all."""
        counts: dict[str, int] = {}
        for (code, reproduced), count in self._counts.items():
            if not verdicts or reproduced in verdicts:
                counts[code] = counts.get(code, 0) + count
        return counts

    @property
    def mismatches(self) -> int:
        """Faults that the walk does not reproduce."""
        return sum(count for (_, reproduced), count in self._counts.items() if reproduced is False)


def registers_of(regs: Regs) -> dict[str, Any]:
    """The registers that a context sets, by name."""
    return {name: getattr(regs, name) for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")}


def use_context(vcpu: Vcpu, context: Context) -> None:
    """Put a register context in force: a Regs, or (Regs, Npt or Ept) inside the nested guest."""
    vcpu.leave_nested()
    if isinstance(context, tuple):
        regs, stage = context
        vcpu.enter_nested(stage, **registers_of(regs))
    else:
        vcpu.set_regs(**registers_of(context))


def pdptrs_at(mem: GuestMemory, cpu: CpuModel, cr3: int, clear: int) -> tuple[int, ...]:
    """The PDPTEs at CR3 as the recorded CPU took them, without the bits `clear` that it ignored.

    None is present where there is no legal PDPT (yet): the recorded CPU loaded none then.
    """
    base = cr3 & CR3_PAE_PDPT
    pdptrs = tuple(mem.read_u64(base + 8 * i) & ~clear for i in range(4))
    try:
        check_pdptrs(cpu, pdptrs)
    except GeneralProtection:
        return (0, 0, 0, 0)
    return pdptrs


def page_fault_access(error_code: int) -> int:
    """The access that a page fault tells of, as far as its error code knows."""
    return error_code & (Access.WRITE | Access.USER | Access.FETCH)


def page_fault_reproduced(walk: PageWalk, contexts: RegisterSets, ctx: int, gva: int, error_code: int) -> bool:
    """Whether an access to gva, in the context number ctx, faults with this error code. Stores no accessed bits."""
    access = page_fault_access(error_code)
    # A supervisor's fault does not tell EFLAGS.AC: SMAP faults only with it clear, all others with it set too.
    for tried in (access,) if access & Access.USER else (access | Access.AC, access):
        t = walk.translate(
            np.array([gva], np.uint64), int(tried), regs=contexts, ctx=np.array([ctx], np.uint32), set_ad=False)
        if t.status[0] == Status.PAGE_FAULT and t.error_code[0] == error_code:
            return True
    return False


def npt_fault(vcpu: Vcpu, stage: Npt, gpa: int, info: int) -> tuple[int, int] | None:
    """(EXITINFO1, EXITINFO2) of the access that a #NPF with this EXITINFO1 tells of, or None if it succeeds."""
    vcpu.leave_nested()
    vcpu.enter_nested(stage, cr0=0x11, cr4=0, efer=0)
    try:
        vcpu.ngpa_walk._second_stage_gpa(
            gpa, info & (Access.WRITE | Access.USER | Access.FETCH), 15, final=bool(info & NpfInfo.GUEST_FINAL))
    except NestedFault as fault:
        return fault.exit_qualification, fault.fault_gpa
    return None


def npt_fault_text(walked: tuple[int, int] | None) -> str:
    """What `npt_fault()` found, in words."""
    return "no fault" if walked is None else f"{npf_info_text(walked[0])} at gpa {walked[1]:#x}"
