"""kvmmu: an x86 MMU emulation engine that models the KVM x86 MMU, with its hot paths in compiled Cython."""

from kvmmu._bits import INVALID_GPA, Acc, Access, Cr0, Cr4, Efer, Pferr, Status
from kvmmu._contexts import Contexts
from kvmmu._format import PageFormat
from kvmmu._memory import GuestMemory
from kvmmu._pagewalk import PageWalk
from kvmmu._roles import CpuRole, calc_cpu_roles
from kvmmu.columns import Span, Translation
from kvmmu.faults import GeneralProtection, GuestFault, InvalidOpcode, PageFault
from kvmmu.record import WalkRecord, WalkStep
from kvmmu.registers import CpuModel, Regs
from kvmmu.replay import Report, replay
from kvmmu.vcpu import Vcpu

__all__ = [
    "INVALID_GPA",
    "Acc",
    "Access",
    "Contexts",
    "CpuModel",
    "CpuRole",
    "Cr0",
    "Cr4",
    "Efer",
    "GeneralProtection",
    "GuestFault",
    "GuestMemory",
    "InvalidOpcode",
    "PageFault",
    "PageFormat",
    "PageWalk",
    "Pferr",
    "Regs",
    "Report",
    "Span",
    "Status",
    "Translation",
    "Vcpu",
    "WalkRecord",
    "WalkStep",
    "calc_cpu_roles",
    "replay",
]
__version__ = "0.1.0"
