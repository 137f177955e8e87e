"""The record of one walk: every entry that was read, what rights it gives, and the rule that failed."""

from dataclasses import dataclass
from typing import Any

from kvmmu._bits import Acc, Access, Status
from kvmmu.faults import access_text, entry_name, error_code_text, rule_text

__all__ = ["WalkRecord", "WalkStep"]

_FLAG_BITS = ((5, "A"), (6, "D"), (8, "G"))
_BIT7 = {1: "PAT"}


def rights_text(acc: int) -> str:
    """Rights as four letters, a dash where one is missing: rwxu."""
    letters = ((Acc.READ, "r"), (Acc.WRITE, "w"), (Acc.EXEC, "x"), (Acc.USER, "u"))
    return "".join(letter if acc & right else "-" for right, letter in letters)


def _size_text(size: int | None) -> str:
    """Bytes of a page in words; None is no paging."""
    if size is None:
        return "paging off"
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size >> shift:
            return f"{size >> shift}{unit} page"
    raise ValueError(f"no page has {size} bytes")


@dataclass(frozen=True)
class WalkStep:
    """One entry of a walk.

    Attributes
    ----------
    level : int
        1 PTE, 2 PDE, 3 PDPTE, 4 PML4E, 5 PML5E.
    index : int
        Of the entry in its table.
    gpa : int or None
        Where the entry lies; None for a PDPTE register.
    entry : int
        The entry as it was read.
    access : int
        Rights (`Acc`) of this entry alone.
    pte_access : int
        Rights down to and including it.
    """

    level: int
    index: int
    gpa: int | None
    entry: int
    access: int
    pte_access: int

    @property
    def name(self) -> str:
        return entry_name(self.level)

    def __str__(self) -> str:
        place = "register    " if self.gpa is None else f"{self.gpa:#014x}"
        flags = " ".join(name for bit, name in (*_FLAG_BITS, (7, _BIT7.get(self.level, "PS"))) if self.entry >> bit & 1)
        return f"{self.name:<5} [{self.index:4}] at {place}: {self.entry:#018x} {rights_text(self.pte_access)} {flags}".rstrip()


@dataclass(frozen=True)
class WalkRecord:
    """A whole walk, as data; a fault of the guest is part of it.

    Attributes
    ----------
    gva : int
        The linear address (bytes).
    access : Access
        The access that was tried.
    steps : tuple of WalkStep
        Root first; empty with paging off or a non-canonical address.
    mode_bits : int
        Width of an entry: 32 in 2-level paging, else 64.
    status : Status
    gpa : int or None
        Where it ends; None on a fault.
    error_code : int
        Of the page fault, else 0.
    level : int
        Of the leaf, or of the entry that failed.
    rule : str or None
        The rule that failed, as one word.
    """

    gva: int
    access: Access
    status: Status
    gpa: int | None
    error_code: int
    level: int
    rule: str | None
    steps: tuple[WalkStep, ...] = ()
    mode_bits: int = 64

    @property
    def page_size(self) -> int | None:
        """Bytes of the page, None on a fault or with paging off."""
        if self.status or not self.steps:
            return None
        bits = 10 if self.mode_bits == 32 else 9
        return 1 << (12 + bits * (self.level - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; addresses and entries as hexadecimal text."""
        return {
            "gva": hex(self.gva), "access": access_text(self.access), "status": self.status.name,
            "gpa": None if self.gpa is None else hex(self.gpa), "error_code": self.error_code, "level": self.level,
            "rule": self.rule,
            "steps": [{"name": step.name, "level": step.level, "index": step.index,
                       "gpa": None if step.gpa is None else hex(step.gpa), "entry": hex(step.entry),
                       "rights": rights_text(step.access), "rights_so_far": rights_text(step.pte_access)}
                      for step in self.steps],
        }

    def __str__(self) -> str:
        lines = [f"{access_text(self.access)} of {self.gva:#x}"]
        lines += [f"  {step}" for step in self.steps]
        if self.status == Status.OK:
            size = _size_text(self.page_size)
            lines.append(f"  -> gpa {self.gpa:#x} ({size})")
        elif self.status == Status.NON_CANONICAL:
            lines.append(f"  -> #GP: {rule_text(str(self.rule))}")
        else:
            lines.append(f"  -> #PF {error_code_text(self.error_code)}: {rule_text(str(self.rule))}")
        return "\n".join(lines)
