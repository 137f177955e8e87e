"""A machine (`Vm`) that runs the guest of a recording."""

import numpy as np

from kvmmu._bits import CR3_PAE_PDPT, Access
from kvmmu._memory import GuestMemory
from kvmmu.host import Host
from kvmmu.recorded_faults import use_context
from kvmmu.registers import Regs
from kvmmu.replay import recording_vcpu
from kvmmu.traces import Recording
from kvmmu.vm import Vm

__all__ = ["touched_machine"]

_MEMORY_UNIT = 1 << 21                      # a slot that ends between large pages has small ones there
_HOST_MAXPHYADDR = 46


def touched_machine(recording: Recording, *, tdp: str = "ept", backing: str = "2m", nx_huge_pages: bool = False) -> Vm:
    """A machine whose guest has read every page that a recording touches, each once.

    Parameters
    ----------
    recording : Recording
    tdp, backing, nx_huge_pages
        Of its `Host` and `Vm`.

    Returns
    -------
    Vm
        Its memory reaches to the last page touched. Contexts inside a nested guest are left out.
    """
    plain, contexts = recording_vcpu(recording)
    real = recording.pages_gpa[recording.pages_io == 0]
    end = max(int(real.max(initial=0)), int(recording.table_pfn.max(initial=0)) << 12) + 1
    mem = GuestMemory(-(-end // _MEMORY_UNIT) * _MEMORY_UNIT)
    for pfn, page in zip(recording.table_pfn.tolist(), recording.table_data, strict=True):
        mem.write(pfn << 12, page.tobytes())
    vm = Vm(mem, plain.cpu, Host(tdp=tdp, maxphyaddr=_HOST_MAXPHYADDR, nx_huge_pages=nx_huge_pages), backing=backing)
    vcpu = vm.create_vcpu()
    for number, context in enumerate(contexts):
        if isinstance(context, Regs):
            for i, pdpte in enumerate(context.pdptrs or ()):    # as the recorded CPU took them: an NPT host has no others
                mem.write_u64((context.cr3 & CR3_PAE_PDPT) + 8 * i, pdpte)
            use_context(vcpu, context)
            vcpu.access(np.ascontiguousarray(recording.pages_gva[recording.pages_ctx == number]), Access.AC)
    return vm
