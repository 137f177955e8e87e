"""Page tables of the host as text: the tree of SPTEs, with runs of like entries on one line."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvmmu.arch._roles import CpuRole
from kvmmu.vm.vcpu import Vm
from kvmmu.walk.record import size_text

__all__ = ["SpteRun", "spte_runs", "spte_text"]

_PRESENT, _HUGE, _ADDRESS = 1 << 11, 1 << 7, 0xFFFFFFFFFF000
_EMPTY = 1 << 63


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
        size = 1 << 12 + 9 * (self.level - 1)
        where = f"{'  ' * self.depth}[{self.index:3}{f'-{self.index + self.count - 1:<3}' if self.count > 1 else '    '}]"
        gpa = self.gfn << 12
        span = f"{self.space} {gpa:#014x}-{gpa + self.count * size - 1:#014x}"
        if self.kind == "table":
            return f"{where} {span} table at hpa {self.hpa:#x}"
        what = f"{self.count} x {size_text(size)}" if self.count > 1 else size_text(size)
        target = "mmio" if self.kind == "mmio" else f"hpa {self.hpa:#014x}"
        return f"{where} {span} {target} {what} {self.flags}".rstrip()


def spte_runs(vm: Vm) -> Iterator[SpteRun]:
    """The trees of a machine from each root down, runs of like entries together.

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
    below = {_child(vm, spte) for spte in pages["sptes"][special].ravel().tolist() if spte & _PRESENT}
    for row, (sp, count) in enumerate(zip(pages["sp"].tolist(), pages["root_count"].tolist(), strict=True)):
        if (count or pages["special"][row]) and sp not in below:
            space = "gva" if vm.host.tdp is None else "gpa" if CpuRole(int(pages["role"][row])).direct else "ngpa"
            yield from _page(vm, pages, row_of, row, 0, 0, space)


def _child(vm: Vm, spte: int) -> int:
    return ((spte & _ADDRESS) - vm.kvm.arena_hpa) >> 12


def _page(vm: Vm, pages: dict[str, np.ndarray], row_of: dict[int, int], row: int, base: int, depth: int,
          space: str) -> Iterator[SpteRun]:
    sp, level = int(pages["sp"][row]), int(pages["role"][row]) & 15
    sptes = pages["sptes"][row].tolist()
    i = 0
    while i < 512:
        spte = sptes[i]
        if spte == _EMPTY:
            i += 1
            continue
        kind = "mmio" if not spte & _PRESENT else "leaf" if level == 1 or spte & _HUGE else "table"
        count = 1
        step = 1 << 12 + 9 * (level - 1)
        while kind != "table" and i + count < 512 and sptes[i + count] == spte + count * step:
            count += 1
        gfn = base + (i << 9 * (level - 1))
        flags = "" if kind == "table" else _flags(vm.host.tdp == "ept", spte) if kind == "leaf" else ""
        hpa = 0 if kind == "mmio" else spte & _ADDRESS
        yield SpteRun(depth, sp, level, i, count, gfn, spte, kind, hpa, flags, space)
        if kind == "table":
            yield from _page(vm, pages, row_of, row_of[_child(vm, spte)], gfn, depth + 1, space)
        i += count


def _flags(ept: bool, spte: int) -> str:
    if ept:
        rights = "".join(letter if spte >> bit & 1 else "-" for bit, letter in ((0, "r"), (1, "w"), (2, "x"), (10, "u")))
        names = ((8, "A"), (9, "D"), (53, "hostw"), (55, "mmuw"))
    else:
        rights = "".join(letter if spte >> bit & 1 else "-" for bit, letter in ((0, "r"), (1, "w")))
        rights += ("-" if spte >> 63 else "x") + ("u" if spte >> 2 & 1 else "-")
        names = ((5, "A"), (6, "D"), (9, "hostw"), (10, "mmuw"))
    state = [name for bit, name in names if spte >> bit & 1]
    kind = {1: "ad-off", 2: "wrprot-only"}.get(spte >> 60 & 3) if ept else None
    return " ".join([rights, *state, *([kind] if kind else [])])


def spte_text(vm: Vm) -> str:
    """The trees of a machine, a line per run of like entries."""
    lines = []
    pages = vm.sptes()
    roles = dict(zip(pages["sp"].tolist(), pages["role"].tolist(), strict=True))
    last = None
    for run in spte_runs(vm):
        if run.depth == 0 and run.sp != last:
            lines.append(f"root at hpa {vm.kvm.arena_hpa + (run.sp << 12):#x}: {CpuRole(roles[run.sp])!r}")
            last = run.sp
        lines.append(f"  {run}")
    return "\n".join(lines)
