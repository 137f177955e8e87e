"""Delivery of translation faults, as data: a #PF into the guest that runs, or an exit to L1, by the walk that failed.

Sources: SDM vol. 3, "Information for VM Exits Due to Vectored Events", "Exit Qualification for EPT Violations", "Guest-Physical
Address", "Page-Modification Logging"; APM vol. 2, "Nested versus Guest Page Faults, Fault Ordering", "Exception Intercepts".
"""

import warnings
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from kvmmu.arch._bits import EptQual, NpfInfo, Pferr
from kvmmu.arch.arguments import check_bool, check_name, check_word
from kvmmu.arch.faults import (
    EptMisconfig,
    EptViolation,
    NestedFault,
    NestedPageFault,
    PageFault,
    PmlFull,
    SppEvent,
    VirtualizationException,
    error_code_text,
    npf_info_text,
)
from kvmmu.arch.second_stages import Ept, Intercepts, Npt, Stage
from kvmmu.arch.words import fields_text, hex_text, name_text

__all__ = ["ExceptionInjected", "ExitToL1", "SvmExit", "SvmExitCode", "VmxExit", "VmxExitReason", "deliver_nested_fault",
           "deliver_page_fault"]

PF_VECTOR = 14
VE_VECTOR = 20
# Valid, with an error code, a hardware exception (type 3), vector 14.
_PF_INTERRUPTION_INFO = 1 << 31 | 1 << 11 | 3 << 8 | PF_VECTOR
_STAGES = NpfInfo.GUEST_FINAL | NpfInfo.GUEST_PAGE
_LINEAR = EptQual.GVA_VALID | EptQual.GVA_TRANSLATED
_ADVANCED = EptQual.GVA_USER | EptQual.GVA_WRITABLE | EptQual.GVA_NX
_KINDS: dict[type, tuple[type[NestedFault], ...]] = {
    Ept: (EptViolation, EptMisconfig, PmlFull, SppEvent, VirtualizationException), Npt: (NestedPageFault,)}


class VmxExitReason(IntEnum):
    """Basic exit reasons. SDM vol. 3, appendix "VMX Basic Exit Reasons"."""

    EXCEPTION_OR_NMI = 0
    EPT_VIOLATION = 48
    EPT_MISCONFIG = 49
    PML_FULL = 62
    SPP_EVENT = 66


class SvmExitCode(IntEnum):
    """Exit codes. APM vol. 2, appendix "SVM Intercept Exit Codes"."""

    PF_EXCEPTION = 0x4E
    NPF = 0x400


@dataclass(frozen=True)
class ExceptionInjected:
    """A #PF or #VE that the guest takes through its own IDT. SDM vol. 3, "Page-Fault Exceptions", "Virtualization Exceptions".

    Attributes
    ----------
    error_code : int
        What the CPU pushes; 0 of a #VE, which has none.
    cr2 : int or None
        The linear address that CR2 then holds; None of a #VE, which leaves it alone.
    into : {"L1", "L2"}
        The guest that runs.
    vector : int
        14, of a #VE 20.
    """

    error_code: int
    cr2: int | None
    into: str
    vector: int = PF_VECTOR

    def __repr__(self) -> str:
        return fields_text(self, {"error_code": error_code_text, "cr2": hex_text})


@dataclass(frozen=True)
class ExitToL1:
    """An exit that L1 sees: a `VmxExit` or an `SvmExit`.

    Attributes
    ----------
    reason : int
        `VmxExitReason` or `SvmExitCode`.
    """

    reason: int


@dataclass(frozen=True)
class VmxExit(ExitToL1):
    """The VM-exit information fields of L1's VMCS. SDM vol. 3, "VM-Exit Information Fields".

    Attributes
    ----------
    exit_qualification : int
        Of an EPT violation as in "Exit Qualification for EPT Violations"; of a page fault the linear address; of a full log only
        NMI unblocking; of an SPP-related event bit 11 where the table has no entry, and NMI unblocking; of a misconfiguration 0.
    guest_physical_address : int or None
        The address without translation; None for a page fault.
    guest_linear_address : int or None
        Of an EPT violation whose qualification says that it is valid, and of an SPP-related event; else None.
    interruption_info, interruption_error_code : int or None
        Of a page fault, as in "Information for VM Exits Due to Vectored Events"; else None.
    """

    exit_qualification: int
    guest_physical_address: int | None = None
    guest_linear_address: int | None = None
    interruption_info: int | None = None
    interruption_error_code: int | None = None

    def __repr__(self) -> str:
        return fields_text(self, dict.fromkeys(
            ("exit_qualification", "guest_physical_address", "guest_linear_address", "interruption_info",
             "interruption_error_code"), hex_text) | {"reason": partial(name_text, kind=VmxExitReason)})


@dataclass(frozen=True)
class SvmExit(ExitToL1):
    """The exit fields of L1's VMCB. APM vol. 2, "#VMEXIT".

    Attributes
    ----------
    exit_info_1 : int
        EXITINFO1: the error code; of a nested page fault with one of the stage bits 32 and 33.
    exit_info_2 : int
        EXITINFO2: the guest-physical address of a nested page fault, the linear address of a page fault.
    """

    exit_info_1: int
    exit_info_2: int

    def __repr__(self) -> str:
        return fields_text(self, {"reason": partial(name_text, kind=SvmExitCode), "exit_info_1": npf_info_text,
                                  "exit_info_2": hex_text})


def deliver_page_fault(fault: PageFault, stage: Stage | None, in_l2: bool, *, intercepts: Intercepts | None = None,
                       vendor: str = "intel") -> ExceptionInjected | ExitToL1:
    """Deliver a #PF of the guest that runs: to itself, or from L2 to L1 if L1 intercepts it.

    Parameters
    ----------
    fault : PageFault
    stage : Ept, Npt or None
        L2's second stage; None without nested paging.
    in_l2 : bool
        Whether L2 runs.
    intercepts : Intercepts, optional
        What L1 intercepts; by default that of `stage`, without a stage nothing. SVM has the exception bitmap alone.
    vendor : {"intel", "amd"}
        Whose exit it is if there is no stage to say so.

    Raises
    ------
    TypeError
        Not a PageFault.
    ValueError
        It has no linear address.

    Notes
    -----
    An intercepted fault leaves CR2 alone.
    """
    if not isinstance(fault, PageFault):
        raise TypeError(f"fault: want a PageFault, got {type(fault).__name__}")
    if fault.address is None:
        raise ValueError("fault: a PageFault needs an address")
    address, error_code = check_word("fault.address", fault.address), check_word("fault.error_code", fault.error_code, 32)
    _check_stage(stage)
    in_l2 = check_bool("in_l2", in_l2)
    check_name("vendor", vendor, ("intel", "amd"))
    if not isinstance(intercepts, Intercepts | None):
        raise TypeError(f"intercepts: want Intercepts or None, got {type(intercepts).__name__}")
    if intercepts is None:
        intercepts = Intercepts() if stage is None else stage.intercepts
    svm = vendor == "amd" if stage is None else isinstance(stage, Npt)
    if svm:
        intercepts = Intercepts(intercepts.exception_bitmap)
    if not (in_l2 and intercepts.wants_page_fault(error_code)):
        return ExceptionInjected(error_code, address, "L2" if in_l2 else "L1")
    if svm:
        return SvmExit(SvmExitCode.PF_EXCEPTION, error_code, address)
    return VmxExit(VmxExitReason.EXCEPTION_OR_NMI, address, interruption_info=_PF_INTERRUPTION_INFO,
                   interruption_error_code=error_code)


def deliver_nested_fault(fault: NestedFault, stage: Stage | None,
                         from_hardware: int | None = None) -> ExceptionInjected | ExitToL1:
    """Deliver a fault of the second stage: as an exit to L1, but for a #VE, which L2 takes.

    Parameters
    ----------
    fault : NestedFault
        Of a kind that `stage` has.
    stage : Ept or Npt
    from_hardware : int, optional
        Exit qualification or EXITINFO1 of the exit that is being handled, if the fault derives from one: what software cannot
        know is taken from it. EPT: bits 7, 8, 12, and 11:9 with `advanced_info`. NPT: the stage bits 32 and 33.

    Raises
    ------
    TypeError
        A fault that this stage does not have.
    ValueError
        No second stage, or `from_hardware` is not 64 bits wide.

    Warns
    -----
    RuntimeWarning
        Not exactly one stage bit in a nested page fault; GUEST_FINAL it is then.
    """
    if from_hardware is not None:
        from_hardware = check_word("from_hardware", from_hardware)
    if stage is None:
        raise ValueError("stage: no second stage is in force, so that L1 can have no exit for it")
    _check_stage(stage)
    kinds = _KINDS[type(stage)]
    if not isinstance(fault, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"fault: want {wanted} under {type(stage).__name__}, got {type(fault).__name__}")
    for name in ("fault_gpa", "exit_qualification", "error_code"):      # a fault may be made by hand
        check_word(f"fault.{name}", getattr(fault, name))
    if isinstance(fault, VirtualizationException):
        return ExceptionInjected(0, None, "L2", VE_VECTOR)
    if isinstance(stage, Ept):
        return _ept_exit(fault, stage, from_hardware)
    return _nested_page_fault_exit(fault, from_hardware)


def _check_stage(stage: object) -> None:
    if not isinstance(stage, Ept | Npt | None):
        raise TypeError(f"stage: want an Ept, an Npt or None, got {type(stage).__name__}")


def _ept_exit(fault: NestedFault, stage: Ept, from_hardware: int | None) -> VmxExit:
    if isinstance(fault, PmlFull):
        return VmxExit(VmxExitReason.PML_FULL, int((from_hardware or 0) & EptQual.NMI_UNBLOCKING), fault.fault_gpa)
    if isinstance(fault, SppEvent):
        kept = int((from_hardware or 0) & EptQual.NMI_UNBLOCKING)
        return VmxExit(VmxExitReason.SPP_EVENT, fault.exit_qualification | kept, fault.fault_gpa, fault.address)
    if isinstance(fault, EptMisconfig) or fault.error_code & Pferr.RSVD:
        return VmxExit(VmxExitReason.EPT_MISCONFIG, 0, fault.fault_gpa)
    qualification = fault.exit_qualification
    if from_hardware is not None:
        kept = int(_LINEAR | EptQual.NMI_UNBLOCKING | (_ADVANCED if stage.advanced_info else 0))
        qualification = qualification & ~kept | from_hardware & kept
    linear = fault.address if qualification & EptQual.GVA_VALID else None
    return VmxExit(VmxExitReason.EPT_VIOLATION, qualification, fault.fault_gpa, linear)


def _nested_page_fault_exit(fault: NestedFault, from_hardware: int | None) -> SvmExit:
    stage = int(_STAGES) & (fault.exit_qualification if from_hardware is None else from_hardware)
    if stage.bit_count() != 1:
        warnings.warn(f"a nested page fault has one of the stage bits 32 and 33, this one {'both' if stage else 'none'}: "
                      "taken for GUEST_FINAL", RuntimeWarning, stacklevel=2)
        stage = int(NpfInfo.GUEST_FINAL)
    return SvmExit(SvmExitCode.NPF, fault.exit_qualification & ~int(_STAGES) | stage, fault.fault_gpa)
