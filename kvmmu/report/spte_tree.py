"""Page tables of the host as text: the tree of SPTEs, with runs of like entries on one line."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvmmu.arch._bits import (
    EPT_SPTE_HOST_WRITABLE,
    EPT_SPTE_MMU_WRITABLE,
    LEGACY_SPTE_HOST_WRITABLE,
    LEGACY_SPTE_MMU_WRITABLE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PT64_INDEX_BITS,
    SHADOW_NONPRESENT,
    SPTE_BASE_ADDR,
    SPTE_ENT_PER_PAGE,
    SPTE_MMU_PRESENT,
    SPTE_TDP_AD,
    SPTE_TDP_AD_DISABLED,
    SPTE_TDP_AD_WRPROT_ONLY,
    EptPte,
    Pte,
)
from kvmmu.arch._roles import CpuRole
from kvmmu.vm.vcpu import Vm
from kvmmu.walk.record import size_text

__all__ = ["SpteRun", "spte_runs", "spte_text"]

_EPT_RIGHTS = ((EptPte.READABLE, "r"), (EptPte.WRITABLE, "w"), (EptPte.EXECUTABLE, "x"), (EptPte.USER_EXECUTABLE, "u"))
_EPT_STATES = ((EptPte.ACCESSED, "A"), (EptPte.DIRTY, "D"), (EPT_SPTE_HOST_WRITABLE, "hostw"), (EPT_SPTE_MMU_WRITABLE, "mmuw"))
_STATES = ((Pte.ACCESSED, "A"), (Pte.DIRTY, "D"), (LEGACY_SPTE_HOST_WRITABLE, "hostw"), (LEGACY_SPTE_MMU_WRITABLE, "mmuw"))
_AD_KINDS = {SPTE_TDP_AD_DISABLED: "ad-off", SPTE_TDP_AD_WRPROT_ONLY: "wrprot-only"}


def _frames(level: int) -> int:
    """Return the frames that an SPTE of a level maps."""
    return 1 << PT64_INDEX_BITS * (level - 1)


@dataclass(frozen=True)
class SpteRun:
    """Entries of one page that follow each other and differ by their address alone.

    Attributes
    ----------
    depth : int
        0 in a root.
    sp : int
        Number of the page that they are in.
    level : int
    index, count : int
        The first entry, and how many.
    gfn : int
        First frame of the addresses that the entries translate.
    spte : int
        The first entry.
    kind : str
        "table", "leaf" or "mmio".
    hpa : int
        Host-physical address (bytes) of the first page or table; 0 for MMIO.
    flags : str
        Rights and state, as "rwx A D hostw mmuw".
    space : {"gpa", "ngpa", "gva"}
        Which addresses these are: a guest's, those of a nested guest, linear ones in shadow paging.
    """

    depth: int
    sp: int
    level: int
    index: int
    count: int
    gfn: int
    spte: int
    kind: str
    hpa: int
    flags: str
    space: str = "gpa"

    def __str__(self) -> str:
        size = PAGE_SIZE * _frames(self.level)
        where = f"{'  ' * self.depth}[{self.index:3}{f'-{self.index + self.count - 1:<3}' if self.count > 1 else '    '}]"
        gpa = self.gfn << PAGE_SHIFT
        span = f"{self.space} {gpa:#014x}-{gpa + self.count * size - 1:#014x}"
        if self.kind == "table":
            return f"{where} {span} table at hpa {self.hpa:#x}"
        what = f"{self.count} x {size_text(size)}" if self.count > 1 else size_text(size)
        target = "mmio" if self.kind == "mmio" else f"hpa {self.hpa:#014x}"
        return f"{where} {span} {target} {what} {self.flags}".rstrip()


def spte_runs(vm: Vm) -> Iterator[SpteRun]:
    """Yield the trees of a machine from each root down, runs of like entries together.

    Parameters
    ----------
    vm : Vm

    Yields
    ------
    SpteRun
    """
    pages = vm.sptes()
    row_of = {sp: row for row, sp in enumerate(pages["sp"].tolist())}
    special = np.flatnonzero(pages["special"])
    below = {_child(vm, spte) for spte in pages["sptes"][special].ravel().tolist() if spte & SPTE_MMU_PRESENT}
    for row, (sp, count) in enumerate(zip(pages["sp"].tolist(), pages["root_count"].tolist(), strict=True)):
        if (count or pages["special"][row]) and sp not in below:
            space = "gva" if vm.host.tdp is None else "gpa" if CpuRole(int(pages["role"][row])).direct else "ngpa"
            yield from _page(vm, pages, row_of, row, 0, 0, space)


def _child(vm: Vm, spte: int) -> int:
    return ((spte & SPTE_BASE_ADDR) - vm.kvm.arena_hpa) >> PAGE_SHIFT


def _page(vm: Vm, pages: dict[str, np.ndarray], row_of: dict[int, int], row: int, base: int, depth: int,
          space: str) -> Iterator[SpteRun]:
    sp, level = int(pages["sp"][row]), int(pages["role"][row]) & 15
    sptes = pages["sptes"][row].tolist()
    i = 0
    while i < SPTE_ENT_PER_PAGE:
        spte = sptes[i]
        if spte == SHADOW_NONPRESENT:
            i += 1
            continue
        kind = "mmio" if not spte & SPTE_MMU_PRESENT else "leaf" if level == 1 or spte & Pte.PAGE_SIZE else "table"
        count = 1
        step = PAGE_SIZE * _frames(level)
        while kind != "table" and i + count < SPTE_ENT_PER_PAGE and sptes[i + count] == spte + count * step:
            count += 1
        gfn = base + i * _frames(level)
        flags = "" if kind == "table" else _flags(vm.host.tdp == "ept", spte) if kind == "leaf" else ""
        hpa = 0 if kind == "mmio" else spte & SPTE_BASE_ADDR
        yield SpteRun(depth, sp, level, i, count, gfn, spte, kind, hpa, flags, space)
        if kind == "table":
            yield from _page(vm, pages, row_of, row_of[_child(vm, spte)], gfn, depth + 1, space)
        i += count


def _flags(ept: bool, spte: int) -> str:
    if ept:
        rights = "".join(letter if spte & bit else "-" for bit, letter in _EPT_RIGHTS)
    else:
        rights = "".join(letter if spte & bit else "-" for bit, letter in ((Pte.PRESENT, "r"), (Pte.WRITABLE, "w")))
        rights += ("-" if spte & Pte.NX else "x") + ("u" if spte & Pte.USER else "-")
    state = [name for bit, name in (_EPT_STATES if ept else _STATES) if spte & bit]
    kind = _AD_KINDS.get(spte & SPTE_TDP_AD) if ept else None
    return " ".join([rights, *state, *([kind] if kind else [])])


def spte_text(vm: Vm) -> str:
    """Return the trees of a machine as text, a line per run of like entries."""
    lines = []
    pages = vm.sptes()
    roles = dict(zip(pages["sp"].tolist(), pages["role"].tolist(), strict=True))
    last = None
    for run in spte_runs(vm):
        if run.depth == 0 and run.sp != last:
            lines.append(f"root at hpa {vm.kvm.arena_hpa + (run.sp << PAGE_SHIFT):#x}: {CpuRole(roles[run.sp])!r}")
            last = run.sp
        lines.append(f"  {run}")
    return "\n".join(lines)
