"""Compare what the two conformances answer for the page tables of a vCPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import Access, Status
from kvmmu.arch.faults import access_text, error_code_text
from kvmmu.vm.vcpu import Vcpu

__all__ = ["ConformanceDifference", "differences"]

# Every access that the rules of rights tell apart.
_ACCESSES = tuple(kind | who for kind in (Access.READ, Access.WRITE, Access.FETCH)
                  for who in (Access.READ, Access.USER, Access.AC, Access.IMPLICIT)
                  if not (kind == Access.FETCH and who in (Access.AC, Access.IMPLICIT)))
_FIELDS = ("status", "gpa", "error_code")
_EXAMPLES = 8
_PARTS = 1 << 20                            # addresses that are asked for at once


@dataclass(frozen=True)
class ConformanceDifference:
    """One way in which the answers to an access differ.

    Attributes
    ----------
    access : Access
    sdm, kvm : str
        The two answers, of the addresses that translate without the address itself.
    count : int
        How many of the addresses that were asked for differ so.
    examples : tuple of (int, int or None, int or None)
        The first ones: linear address, and where it leads to by "sdm" and by "kvm".
    """

    access: Access
    sdm: str
    kvm: str
    count: int
    examples: tuple[tuple[int, int | None, int | None], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON; addresses are numbers."""
        return {"access": _words(self.access), "sdm": self.sdm, "kvm": self.kvm, "count": self.count,
                "examples": [{"gva": gva, "sdm_gpa": sdm, "kvm_gpa": kvm} for gva, sdm, kvm in self.examples]}

    def __str__(self) -> str:
        gva, sdm, kvm = self.examples[0]
        ends = [answer if gpa is None else f"{answer} at {gpa:#x}" for answer, gpa in ((self.sdm, sdm), (self.kvm, kvm))]
        more = f", and {self.count - 1:,} more" if self.count > 1 else ""
        return f"{_words(self.access)} of {gva:#x}: sdm {ends[0]}, kvm {ends[1]}{more}"


def differences(vcpu: Vcpu, accesses: Sequence[Access] = _ACCESSES) -> list[ConformanceDifference]:
    """Find where the conformances answer differently: for every page that either maps and one address in each gap between.

    Parameters
    ----------
    vcpu : Vcpu
        Outside a nested guest. Its memory and registers are used, nothing is stored.
    accesses : sequence of Access

    Returns
    -------
    list of ConformanceDifference
    """
    if vcpu.mmu_is_nested:
        raise ValueError("vcpu: it runs a nested guest; want one outside")
    walks = {}
    for name in ("sdm", "kvm"):
        other = Vcpu(vcpu.mem, replace(vcpu.cpu, conformance=name), vcpu.tdp)
        other.set_regs(vcpu.regs)
        walks[name] = other.gva_walk
    found = []
    gvas = _addresses(walks.values())
    for access in accesses:
        found += _of_access(walks, gvas, access)
    return found


def _addresses(walks: Any) -> NDArray[np.uint64]:
    """Return the first address of every page that a walk maps, and of every gap."""
    starts, ends = [np.zeros(1, np.uint64)], []
    for walk in walks:
        found = walk.mappings(merge=False)
        starts.append(found.gva)
        ends.append(found.gva + found.size)                 # 0 behind the end of the address space
    return np.unique(np.concatenate(starts + ends))


def _of_access(walks: dict[str, Any], gvas: NDArray[np.uint64], access: Access) -> list[ConformanceDifference]:
    kinds: dict[tuple[str, str], tuple[int, list[tuple[int, int | None, int | None]]]] = {}
    for start in range(0, gvas.size, _PARTS):
        part = gvas[start:start + _PARTS]
        sdm, kvm = (walks[name].translate(part, int(access), fields=_FIELDS, set_ad=False) for name in ("sdm", "kvm"))
        wrong = np.flatnonzero((sdm.status != kvm.status) | (sdm.gpa != kvm.gpa) | (sdm.error_code != kvm.error_code))
        codes = np.stack([column[wrong].astype(np.uint64) for t in (sdm, kvm) for column in (t.status, t.error_code)], axis=1)
        for row in np.unique(codes, axis=0):
            rows = wrong[(codes == row).all(axis=1)]
            kind = (_answer(int(row[0]), int(row[1])), _answer(int(row[2]), int(row[3])))
            count, examples = kinds.get(kind, (0, []))
            for i in rows[:_EXAMPLES - len(examples)].tolist():
                ends = [None if t.status[i] else int(t.gpa[i]) for t in (sdm, kvm)]
                examples.append((int(part[i]), ends[0], ends[1]))
            kinds[kind] = count + rows.size, examples
    return [ConformanceDifference(access, *kind, count, tuple(examples)) for kind, (count, examples) in kinds.items()]


def _words(access: Access) -> str:
    return access_text(access) + (" with EFLAGS.AC" if access & Access.AC else "")


def _answer(status: int, error_code: int) -> str:
    if status == Status.OK:
        return "a page"
    return f"#PF {error_code_text(error_code)}" if status == Status.PAGE_FAULT else Status(status).name
