"""The TLBs of the processors of a trace: they follow its registers and its events, and are asked for its accesses."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from kvmmu.arch._bits import CR3_NOFLUSH, CR3_PCID, Cr0, Cr4, Op
from kvmmu.arch.registers import Regs, paging_mode
from kvmmu.arch.second_stages import Stage
from kvmmu.tlb._stream import TlbStream
from kvmmu.tlb.counters import TlbStats, sum_of
from kvmmu.tlb.hierarchy import PAGE_LEVELS, TlbHierarchy

__all__ = ["ProcessorTlbs", "TlbOfHost", "invpcid_operands"]

_INVPCID_TYPE, _INVPCID_PCID_SHIFT = 0xF, 4
Context = Regs | tuple[Regs, Stage]


class TlbOfHost:
    """A hierarchy, and the pages that the host maps guest memory with; None: one stage, no host."""

    def __init__(self, hierarchy: TlbHierarchy, host_page: str | None = None) -> None:
        self.hierarchy, self.host_page = hierarchy, host_page


class ProcessorTlbs:
    """Hierarchies that the same accesses go through, each once per vCPU.

    Invalidations are those of the SDM, vol. 3, "Operations that Invalidate TLBs and Paging-Structure Caches". Nested guests have
    a VPID (ASID) for each second stage, and entry and exit drop nothing. A register load that the trace does not tell as an
    event (SET_REGS) drops what MOV to CR3, CR4 and CR0 to the same values would.

    Parameters
    ----------
    designs : sequence of TlbOfHost
    vcpus : int

    Attributes
    ----------
    stream : TlbStream
        For the loop of a replay.
    """

    def __init__(self, designs: Sequence[TlbOfHost], vcpus: int = 1) -> None:
        self._designs = list(designs)
        self._tlbs = [[design.hierarchy._another() for _ in range(vcpus)] for design in self._designs]
        self._hosts = [None if design.host_page is None else
                       [design.hierarchy._nested_or_none()._another() for _ in range(vcpus)] for design in self._designs]
        self._of_vcpu = [[tlbs[vcpu] for tlbs in self._tlbs] for vcpu in range(vcpus)]
        self._spaces: dict[Stage, int] = {}
        self.stream = TlbStream([
            ([tlb._core for tlb in tlbs], None if hosts is None else [host._core for host in hosts],
             PAGE_LEVELS[design.host_page or "4k"])
            for design, tlbs, hosts in zip(self._designs, self._tlbs, self._hosts, strict=True)], vcpus)

    # ---- registers and events --------------------------------------------------------------------------------------------

    def follow(self, vcpu: int, context: Context) -> None:
        """Put registers in force on a vCPU; nothing is dropped."""
        regs, stage = context if isinstance(context, tuple) else (context, None)
        space = 0 if stage is None else self._spaces.setdefault(stage, len(self._spaces) + 1)
        for tlb in self._of_vcpu[vcpu]:
            tlb.use(space, _pcid_of(regs), _mode_of(regs))
        self.stream.use_global(vcpu, bool(regs.cr4 & Cr4.PGE))

    def event(self, op: Op, vcpu: int, addr: int, value: int, before: Context, after: Context) -> None:
        """Carry out an event of the trace. IN before, after: the registers of the vCPU."""
        tlbs = self._of_vcpu[vcpu]
        if op == Op.INVLPG:
            for tlb in tlbs:
                tlb.invlpg(addr)
        elif op == Op.INVPCID:
            kind, pcid = invpcid_operands(value)
            if kind <= 3:
                for tlb in tlbs:
                    tlb.invpcid(kind, pcid, addr)
        elif op == Op.PAGE_FAULT:
            for tlb in tlbs:
                tlb.page_fault(addr)
        elif op in (Op.HOST_INVALIDATE, Op.RESTART):
            self.flush()
        elif after is not before or op == Op.MOV_CR3:
            self._load(op, vcpu, value, before, after)

    def flush(self) -> None:
        """Drop everything on all vCPUs."""
        for tlbs in (*self._tlbs, *(hosts for hosts in self._hosts if hosts is not None)):
            for tlb in tlbs:
                tlb.flush()

    def _load(self, op: Op, vcpu: int, value: int, before: Context, after: Context) -> None:
        self.follow(vcpu, after)
        if op in (Op.VMENTER, Op.VMEXIT) or isinstance(before, tuple) != isinstance(after, tuple):
            return
        old, new = (context[0] if isinstance(context, tuple) else context for context in (before, after))
        cr4 = old.cr4 ^ new.cr4
        for tlb in self._of_vcpu[vcpu]:
            if old.cr0 & ~new.cr0 & Cr0.PG or cr4 & Cr4.PGE or old.cr4 & ~new.cr4 & Cr4.PCIDE:
                tlb.flush_in_force()
            elif cr4 & Cr4.PAE or new.cr4 & ~old.cr4 & Cr4.SMEP or (op == Op.SET_REGS and old.cr3 != new.cr3):
                tlb.mov_cr3(_pcid_of(new))
            elif op == Op.MOV_CR3:
                tlb.mov_cr3(_pcid_of(new), keep=bool(new.cr4 & Cr4.PCIDE and value & CR3_NOFLUSH))

    # ---- a state that is kept --------------------------------------------------------------------------------------------

    @property
    def spaces(self) -> list[Stage]:
        """Second stages by the number of their address space, from 1 on."""
        return list(self._spaces)

    def shape(self) -> list[Any]:
        """Return what makes two of these behave alike, as plain data for JSON."""
        return [design.hierarchy._shape() for design in self._designs]

    def saved(self) -> tuple[list[Any], dict[str, NDArray[Any]]]:
        """Return what the hierarchies hold and have counted, but for `spaces`: plain data for JSON, and arrays."""
        plain: list[Any] = []
        arrays: dict[str, NDArray[Any]] = {}
        for vcpu, tlbs in enumerate(self._of_vcpu):
            for number, tlb in enumerate(tlbs):
                tags, found = tlb._saved()
                plain.append(tags)
                arrays |= {f"tlb{vcpu}.{number}.{name}": array for name, array in found.items()}
        return plain, arrays

    def restore(self, plain: Sequence[Any], arrays: Mapping[str, NDArray[Any]], spaces: Sequence[Stage]) -> None:
        """Go on from what `saved()` returned; `follow()` is to be called behind it for each vCPU.

        Raises
        ------
        ValueError
            It is of hierarchies of other shapes.
        """
        if len(plain) != sum(map(len, self._of_vcpu)):
            raise ValueError(f"{len(plain)} hierarchies")
        tags = iter(plain)
        for vcpu, tlbs in enumerate(self._of_vcpu):
            for number, tlb in enumerate(tlbs):
                prefix = f"tlb{vcpu}.{number}."
                tlb._restore(next(tags), {name.removeprefix(prefix): array for name, array in arrays.items()
                                          if name.startswith(prefix)})
        self._spaces = {stage: number for number, stage in enumerate(spaces, 1)}

    # ---- what was counted ------------------------------------------------------------------------------------------------

    def stats(self, design: int = 0) -> TlbStats:
        """Return the counters of a hierarchy, of all vCPUs together, with those of the host's translations."""
        stats = sum_of([tlb.stats() for tlb in self._tlbs[design]])
        hosts = self._hosts[design]
        if hosts is None:
            return stats
        return stats.under_host(sum_of([host.stats() for host in hosts]), self.stream.walks_by_refs(design))


def invpcid_operands(value: int) -> tuple[int, int]:
    """Return the type and the PCID of an INVPCID, which are one value in a trace."""
    return value & _INVPCID_TYPE, value >> _INVPCID_PCID_SHIFT & CR3_PCID


def _pcid_of(regs: Regs) -> int:
    return regs.cr3 & CR3_PCID if regs.cr4 & Cr4.PCIDE else 0


def _mode_of(regs: Regs) -> str:
    """Return the paging mode, that of 4 levels with paging off: no access is to a page then."""
    mode = paging_mode(regs.cr0, regs.cr4, regs.efer)
    return "4l" if mode == "off" else mode
