"""kvmmu: an x86 MMU emulation engine that models the KVM x86 MMU, with its hot paths in compiled Cython."""
# Order: arch, memory, _walk, walk, walker, tables, tlb, mmu, machine, vm, traces, images, replay, report,
#     comparison, spt, oracles, embed, cli

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import kvmmu.arch._bits  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "kvmmu.arch._bits":
        raise
    raise ImportError(f"{__path__[0]} is a source tree that is not built, and hides the installed kvmmu; run Python in another "
                      "folder, or as python -P") from None

from kvmmu.arch._bits import INVALID_GPA, Acc, Access, Cr0, Cr4, Efer, EptPte, EptQual, NpfInfo, Pferr, Pte, RetPf, Status
from kvmmu.arch._format import PageFormat
from kvmmu.arch._roles import CpuRole, calc_cpu_roles
from kvmmu.arch.control_blocks import ept_from_vmcs12, npt_from_vmcb, regs_from_vmcb
from kvmmu.arch.delivery import (
    ExceptionInjected,
    ExitToL1,
    SvmExit,
    SvmExitCode,
    VmxExit,
    VmxExitReason,
    deliver_nested_fault,
    deliver_page_fault,
)
from kvmmu.arch.faults import (
    EptMisconfig,
    EptViolation,
    GeneralProtection,
    GuestFault,
    InvalidOpcode,
    NestedFault,
    NestedPageFault,
    PageFault,
    PmlFull,
    SppEvent,
    VirtualizationException,
    VmFail,
)
from kvmmu.arch.registers import CpuModel, Regs
from kvmmu.arch.second_stages import Ept, Intercepts, Npt, Pml
from kvmmu.machine._mmus import ShadowMmu, TdpMmu
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.tables import Pager, PageTables
from kvmmu.tlb._tlb import Tlb
from kvmmu.vm.snapshot import Snapshot
from kvmmu.vm.tracepoints import TraceEvent, Tracepoints
from kvmmu.vm.vcpu import Vcpu, Vm
from kvmmu.walk._register_sets import RegisterSets
from kvmmu.walk.pagewalk import PageWalk
from kvmmu.walk.record import WalkRecord, WalkStep
from kvmmu.walk.results import Accesses, Span, Translation
from kvmmu.walker import Walker, get_include

Contexts = RegisterSets                 # the name of before

if TYPE_CHECKING:
    from kvmmu.comparison.compare import compare
    from kvmmu.comparison.comparison import Comparison
    from kvmmu.comparison.cost import CostModel
    from kvmmu.comparison.design import Design
    from kvmmu.images import open_image
    from kvmmu.replay.replay import replay
    from kvmmu.replay.result import ReplayInterrupted, Report
    from kvmmu.report.figure import plot_walk
    from kvmmu.tlb.counters import TlbDetails, TlbStats
    from kvmmu.tlb.hierarchy import TlbHierarchy, TlbLevel
    from kvmmu.traces import open_trace

__all__ = [
    "Acc", "Access", "Accesses", "Comparison", "Contexts", "CostModel", "CpuModel", "CpuRole", "Cr0", "Cr4", "Design", "Efer",
    "Ept", "EptMisconfig", "EptPte", "EptQual", "EptViolation", "ExceptionInjected", "ExitToL1", "GeneralProtection",
    "GuestFault", "GuestMemory", "Host", "INVALID_GPA", "Intercepts", "InvalidOpcode", "NestedFault", "NestedPageFault",
    "NpfInfo", "Npt", "PageFault", "PageFormat", "PageTables", "PageWalk", "Pager", "Pferr", "Pml", "PmlFull", "Pte",
    "RegisterSets", "Regs", "ReplayInterrupted", "Report", "RetPf", "ShadowMmu", "Snapshot", "Span", "SppEvent", "Status",
    "SvmExit", "SvmExitCode", "TdpMmu", "Tlb", "TlbDetails", "TlbHierarchy", "TlbLevel", "TlbStats", "TraceEvent",
    "Tracepoints", "Translation", "Vcpu", "VirtualizationException", "Vm", "VmFail", "VmxExit", "VmxExitReason", "WalkRecord",
    "WalkStep", "Walker", "calc_cpu_roles", "compare", "deliver_nested_fault", "deliver_page_fault", "ept_from_vmcs12",
    "get_include", "npt_from_vmcb", "open_image", "open_trace", "plot_walk", "regs_from_vmcb", "replay",
]
__version__ = "0.1.0"
# The modules of names that are loaded when they are first asked for. They take half as long to load as all the others.
_LOADED_LATER = {
    "Comparison": "comparison.comparison", "CostModel": "comparison.cost", "Design": "comparison.design",
    "ReplayInterrupted": "replay.result", "Report": "replay.result", "TlbDetails": "tlb.counters",
    "TlbHierarchy": "tlb.hierarchy", "TlbLevel": "tlb.hierarchy", "TlbStats": "tlb.counters", "compare": "comparison.compare",
    "open_image": "images", "open_trace": "traces", "plot_walk": "report.figure", "replay": "replay.replay",
}
# The first import of the package kvmmu.replay gives its name to the package. It is made here, so that the name is the function.
import_module("kvmmu.replay")
globals().pop("replay", None)


def __getattr__(name: str) -> Any:
    """Load a name of `_LOADED_LATER`."""
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"kvmmu.{_LOADED_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the names of the module, those of `_LOADED_LATER` among them."""
    return sorted({*globals(), *__all__})
