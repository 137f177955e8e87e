"""A machine (`Vm`) that runs the guest of a recording or a trace."""

from typing import Literal

import numpy as np

from kvmmu.arch._bits import CR3_PAE_PDPT, Access
from kvmmu.arch.registers import Regs
from kvmmu.memory._memory import GuestMemory
from kvmmu.mmu.host import Host
from kvmmu.replay.recorded_faults import Context, use_context
from kvmmu.replay.replay import recording_vcpu
from kvmmu.replay.trace_memory import reserve
from kvmmu.replay.trace_replay import trace_start
from kvmmu.traces import ParquetTrace, Recording, RecordingError, TraceError
from kvmmu.vm.vcpu import Vm

__all__ = ["touched_machine"]

_MEMORY_UNIT = 1 << 21                      # a slot that ends between large pages has small ones there
_MEMORY_LIMIT = 1 << 40
_HOST_MAXPHYADDR = 46


def touched_machine(source: Recording | ParquetTrace, *, tdp: Literal["ept", "npt"] | None = "ept",
                    backing: Literal["4k", "2m", "1g"] = "2m", nx_huge_pages: bool = False) -> Vm:
    """A machine whose guest has read every page that a recording or a trace touches, each once.

    Parameters
    ----------
    source : Recording or ParquetTrace
    tdp, backing, nx_huge_pages
        Of its `Host` and `Vm`.

    Returns
    -------
    Vm
        Its memory reaches to the last page touched, and is that of the start. Contexts inside a nested guest are left out.

    Raises
    ------
    RecordingError, TraceError
        Memory beyond 1 TiB, or what `replay()` refuses.
    """
    touched: list[tuple[Context, np.ndarray]]
    if isinstance(source, Recording):
        vcpu, contexts = recording_vcpu(source)
        real = source.pages_gpa[source.pages_io == 0]
        end = max(int(real.max(initial=0)), int(source.table_pfn.max(initial=0)) << 12) + 1
        touched = [(context, source.pages_gva[source.pages_ctx == number]) for number, context in enumerate(contexts)]
        error: type[ValueError] = RecordingError
    else:
        start = trace_start(source, touched=True)
        vcpu, end, error = start.vcpu, start.end, TraceError
        touched = [(context, np.array(sorted(pages), np.uint64)) for context, pages in start.touched.items()]
    if end > _MEMORY_LIMIT:
        raise error(f"{source.path}: its memory reaches to gpa {end - 1:#x}; allowed here is below {_MEMORY_LIMIT:#x}")
    block, _ = reserve(-(-end // _MEMORY_UNIT) * _MEMORY_UNIT)
    if isinstance(source, Recording):
        pages = block.reshape(-1, 4096)
        for pfn, page in zip(source.table_pfn.tolist(), source.table_data, strict=True):
            pages[pfn] = page
    else:
        addr, values = start.memory.words
        block.view("<u8")[addr >> np.uint64(3)] = values
    host = Host(tdp=tdp, maxphyaddr=_HOST_MAXPHYADDR, nx_huge_pages=nx_huge_pages)
    vm = Vm(GuestMemory(block), vcpu.cpu, host, backing=backing)
    guest = vm.create_vcpu()
    for context, gva in touched:
        if isinstance(context, Regs):
            for i, pdpte in enumerate(context.pdptrs or ()):    # as the recorded CPU took them: an NPT host has no others
                vm.mem.write_u64((context.cr3 & CR3_PAE_PDPT) + 8 * i, pdpte)
            use_context(guest, context)
            guest.access(np.ascontiguousarray(gva), Access.AC)
    return vm
