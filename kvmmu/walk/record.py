"""The record of one walk: every entry that was read, what rights it gives, and the rule that failed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvmmu.arch._bits import PAGE_SIZE, PT32_INDEX_BITS, PT64_INDEX_BITS, Access, EptPte, Pte, Status
from kvmmu.arch.faults import access_text, entry_name, error_code_text, nested_title, rule_text
from kvmmu.arch.words import rights_text
from kvmmu.walk.html import table_html

__all__ = ["WalkRecord", "WalkStep", "in_host"]

_FLAGS = ((Pte.ACCESSED, "A"), (Pte.DIRTY, "D"), (Pte.GLOBAL, "G"))
_EPT_FLAGS = ((EptPte.ACCESSED, "A"), (EptPte.DIRTY, "D"))
_BIT7 = {1: "PAT"}                      # of a PTE, in the place of PS


def size_text(size: int | None) -> str:
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
    nested : WalkRecord or None
        The second stage of `gpa`, which is then the address in L2's physical space.
    ept : bool
        The entry has the form of EPT, with other bits for its flags.
    """

    level: int
    index: int
    gpa: int | None
    entry: int
    access: int
    pte_access: int
    nested: "WalkRecord | None" = None
    ept: bool = False

    @property
    def name(self) -> str:
        return entry_name(self.level)

    @property
    def flags(self) -> str:
        """Return the names of the entry's flags that are set, as A D PS."""
        flags = (*(_EPT_FLAGS if self.ept else _FLAGS), (Pte.PAGE_SIZE, _BIT7.get(self.level, "PS")))
        return " ".join(name for flag, name in flags if self.entry & flag and not (self.ept and name == "PAT"))

    def __str__(self) -> str:
        place = "register    " if self.gpa is None else f"{self.gpa:#014x}"
        rights = f"{rights_text(self.pte_access)} {self.flags}".rstrip()
        return f"{self.name:<5} [{self.index:4}] at {place}: {self.entry:#018x} {rights}"

    def __repr__(self) -> str:
        return f"<WalkStep {' '.join(str(self).split())}>"


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
    refs : int
        Paging-structure entries read, in both stages.
    final : WalkRecord or None
        The second stage of the address after the first one.
    ngpa : int or None
        That address, under a second stage.
    exit_qualification : int
        Of a fault of the second stage: the exit qualification, or EXITINFO1.
    host : bool
        It is the processor's walk on its host: `gpa` is a host-physical address, and `ngpa` a guest-physical one.
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
    refs: int = 0
    final: "WalkRecord | None" = None
    ngpa: int | None = None
    exit_qualification: int = 0
    host: bool = False

    @property
    def space(self) -> str:
        """The space of `gpa`, and of where entries of this stage lie: "gpa" or "hpa"."""
        return "hpa" if self.host else "gpa"

    @property
    def first_space(self) -> str:
        """The space of what the second stage translates: "nGPA" or "GPA"."""
        return "GPA" if self.host else "nGPA"

    @property
    def page_size(self) -> int | None:
        """Bytes of the page, None on a fault or with paging off."""
        if self.status or not self.steps:
            return None
        bits = PT32_INDEX_BITS if self.mode_bits == 32 else PT64_INDEX_BITS
        return PAGE_SIZE << bits * (self.level - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; addresses and entries are numbers."""
        plain: dict[str, Any] = {
            "gva": self.gva, "access": access_text(self.access), "status": self.status.name,
            "gpa": self.gpa, "error_code": self.error_code, "level": self.level,
            "rule": self.rule, "refs": self.refs, "steps": [_step_dict(step) for step in self.steps],
        }
        if self.final is not None and self.ngpa is not None:
            plain |= {"ngpa": self.ngpa, "final": self.final.to_dict()}
        if self.host:
            plain["host"] = True
        if self.exit_qualification:
            plain["exit_qualification"] = self.exit_qualification
        return plain

    def outcome(self) -> str:
        """Return the last line: where the walk ends, or why it does not."""
        if self.status == Status.OK:
            return f"-> {self.space} {self.gpa:#x} ({size_text(self.page_size)})"
        if self.status in (Status.NON_CANONICAL, Status.LASS_VIOLATION):
            return f"-> #GP: {rule_text(str(self.rule))}"
        if self.status == Status.PAGE_FAULT:
            return f"-> #PF {error_code_text(self.error_code)}: {rule_text(str(self.rule))}"
        return f"-> {nested_title(self.status)} {self.exit_qualification:#x}: {rule_text(str(self.rule))}"

    def lines(self, indent: str = "") -> Iterator[str]:
        """Return the walk as text lines; each second-stage walk is indented under the address that it translates."""
        for step in self.steps:
            if step.nested is not None:
                yield f"{indent}    {self.first_space} {step.gpa:#x}, {access_text(step.nested.access)} of a table"
                yield from step.nested.lines(indent + "      ")
                yield f"{indent}      {step.nested.outcome()}"
                if step.nested.status:
                    return
            yield f"{indent}  {step}"
        if self.final is not None:
            yield f"{indent}    {self.first_space} {self.ngpa:#x}, final {access_text(self.final.access)}"
            yield from self.final.lines(indent + "      ")

    def __str__(self) -> str:
        return "\n".join([f"{access_text(self.access)} of {self.gva:#x}", *self.lines(), f"  {self.outcome()}"])

    def __repr__(self) -> str:
        return f"<WalkRecord: {access_text(self.access)} of {self.gva:#x}, {len(self.steps)} steps {self.outcome()}>"

    def _repr_html_(self) -> str:
        return table_html(f"{access_text(self.access)} of {self.gva:#x} {self.outcome()}",
                          ("entry", "index", "at gpa", "value", "rights", "rights so far", "flags"), self._html_rows())

    def _html_rows(self, indent: str = "") -> Iterator[tuple[str, ...]]:
        """Yield a row for each entry, those of a second stage indented before the entry that they lead to."""
        for step in self.steps:
            if step.nested is not None:
                yield from step.nested._html_rows(f"{indent}  ")
                if step.nested.status:
                    yield _html_outcome(step.nested, indent)
                    return
            place = "register" if step.gpa is None else f"{step.gpa:#x}"
            yield (f"{indent}{step.name}", str(step.index), place, f"{step.entry:#018x}", rights_text(step.access),
                   rights_text(step.pte_access), step.flags)
        if self.final is not None:
            yield from self.final._html_rows(f"{indent}  ")
            yield _html_outcome(self.final, indent)


def _html_outcome(record: WalkRecord, indent: str) -> tuple[str, ...]:
    """Return the row in which a walk of the second stage ends."""
    return (f"{indent}  {record.first_space} {record.gva:#x}", "", record.outcome(), "", "", "", "")


def in_host(record: WalkRecord) -> WalkRecord:
    """Return a record, with all records in it, as one of the processor's walk on its host."""
    steps = tuple(step if step.nested is None else replace(step, nested=in_host(step.nested)) for step in record.steps)
    return replace(record, steps=steps, final=None if record.final is None else in_host(record.final), host=True)


def _step_dict(step: WalkStep) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": step.name, "level": step.level, "index": step.index, "gpa": step.gpa,
        "entry": step.entry, "rights": rights_text(step.access), "rights_so_far": rights_text(step.pte_access)}
    return plain if step.nested is None else plain | {"nested": step.nested.to_dict()}
