"""Guest faults as exceptions of the scalar calls: the only mapping from status to exception."""

from typing import Any

from kvmmu.arch._bits import Access, NpfInfo, Pferr, Status

__all__ = [
    "EptMisconfig", "EptViolation", "GeneralProtection", "GuestFault", "InvalidOpcode", "NestedFault", "NestedPageFault",
    "PageFault", "PmlFull", "SppEvent", "VirtualizationException", "VmFail", "fault_of", "nested_fault_of",
]


class GuestFault(Exception):
    """A fault of the guest.

    Attributes
    ----------
    address : int or None
        The linear address (bytes) that faulted, as CR2 would hold it.
    access : Access
        The access that was tried.
    error_code : int
        The error code that the CPU pushes.
    level : int
        Level of the entry that failed; 0 without one.
    entry : int
        That entry.
    entry_gpa : int or None
        Where it lies; None for a register (PDPTE) or none.
    rule : str
        The rule that failed, as one word.
    """

    def __init__(self, message: str, *, address: int | None = None, access: Access = Access.READ, error_code: int = 0,
                 level: int = 0, entry: int = 0, entry_gpa: int | None = None, rule: str = "") -> None:
        super().__init__(message)
        self.address = address
        self.access = access
        self.error_code = error_code
        self.level = level
        self.entry = entry
        self.entry_gpa = entry_gpa
        self.rule = rule


class PageFault(GuestFault):
    """#PF. `rule` is not-present, hole, reserved, read, write, user, nx, smep, smap, shadow-stack or pkey."""


class GeneralProtection(GuestFault):
    """#GP: a non-canonical address, one that LASS refuses, or an illegal value for a register."""


class NestedFault(GuestFault):
    """A fault of the second stage: an exit to L1. `level` and `entry` are the second stage's.

    Attributes
    ----------
    fault_gpa : int
        The guest-physical address (bytes) that could not be translated.
    exit_qualification : int
        The exit qualification of an EPT violation, or EXITINFO1 of a nested page fault.
    """

    def __init__(self, message: str, *, fault_gpa: int, exit_qualification: int = 0, **details: Any) -> None:
        super().__init__(message, **details)
        self.fault_gpa = fault_gpa
        self.exit_qualification = exit_qualification


class EptViolation(NestedFault):
    """EPT violation: not present, or a right is missing."""


class EptMisconfig(NestedFault):
    """EPT misconfiguration: a reserved bit, a bad memory type or combination of rights."""


class NestedPageFault(NestedFault):
    """#NPF."""


class PmlFull(NestedFault):
    """L1's page-modification log is full."""


class SppEvent(NestedFault):
    """SPP-related event: the sub-page permission table has no entry for the page, or a reserved bit is set there."""


class VirtualizationException(NestedFault):
    """#VE: an EPT violation that the guest takes itself. The information area holds what an exit would tell L1."""


class VmFail(GuestFault):
    """VMfail: a VMX instruction of L1's that fails without an exception.

    Attributes
    ----------
    number : int
        The VM-instruction error.
    """

    def __init__(self, message: str, *, number: int, **details: Any) -> None:
        super().__init__(message, **details)
        self.number = number


class InvalidOpcode(GuestFault):
    """#UD: an instruction that the registers do not allow."""


_RULES = {
    "not-present": "the entry is not present",
    "hole": "the table lies in a hole of guest memory, where entries read as not present",
    "reserved": "the entry has a reserved bit set",
    "read": "reading is not allowed",
    "write": "the page is read-only",
    "user": "the page is a supervisor page",
    "nx": "the page is execute-disabled",
    "smep": "SMEP: a supervisor cannot fetch from a user page",
    "smap": "SMAP: a supervisor cannot access a user page",
    "pkey": "the protection key forbids it",
    "shadow-stack": "the page is no shadow-stack page of this privilege",
    "non-canonical": "the address is not canonical",
    "lass": "LASS: the address is in the half of the address space that this privilege has not",
    "misconfig": "the entry is misconfigured",
    "pml-full": "the page-modification log is full",
    "sppt-miss": "the sub-page permission table has no valid entry for the page",
    "sppt-misconfig": "the sub-page permission table has a reserved bit set",
    "": "the tables have changed since",
}
# Plain integers: operators of flags are Python methods, and take longer than all else of a fault.
_ERROR_BITS = tuple((int(flag), name) for flag, name in (
    (Pferr.PRESENT, "P"), (Pferr.WRITE, "W"), (Pferr.USER, "U"), (Pferr.RSVD, "RSVD"), (Pferr.FETCH, "F"), (Pferr.PK, "PK"),
    (Pferr.SS, "SS")))
_WRITE, _USER, _FETCH, _IMPLICIT, _SHADOW_STACK, _PROBE = map(int, (
    Access.WRITE, Access.USER, Access.FETCH, Access.IMPLICIT, Access.SHADOW_STACK, Access.PROBE))
_ENTRY_NAMES = {1: "PTE", 2: "PDE", 3: "PDPTE", 4: "PML4E", 5: "PML5E"}


def entry_name(level: int) -> str:
    """PTE, PDE, PDPTE, PML4E or PML5E."""
    return _ENTRY_NAMES[level]


def rule_text(rule: str) -> str:
    """Return the sentence behind the word of a rule."""
    return _RULES[rule]


def access_text(access: int) -> str:
    """Return an access in words: "user write", "implicit supervisor read"."""
    bits = int(access)
    if bits & _PROBE:
        return "probe"
    kind = "fetch" if bits & _FETCH else "write" if bits & _WRITE else "read"
    if bits & _SHADOW_STACK:
        kind = f"shadow-stack {kind}"
    if bits & _IMPLICIT:
        return f"implicit supervisor {kind}"
    return f"{'user' if bits & _USER else 'supervisor'} {kind}"


def error_code_text(error_code: int) -> str:
    """Return an error code with its bits named: 0x3 (P W)."""
    names = " ".join(name for flag, name in _ERROR_BITS if error_code & flag)
    return f"{error_code:#x}" + (f" ({names})" if names else "")


def npf_info_text(info: int) -> str:
    """Return an EXITINFO1 with its bits named: 0x100000006 (W U final)."""
    stages = (" final" if info & NpfInfo.GUEST_FINAL else "") + (" table" if info & NpfInfo.GUEST_PAGE else "")
    return f"{info:#x} ({' '.join(name for flag, name in _ERROR_BITS if info & flag)}{stages})"


def fault_of(status: int, *, address: int, access: Access, error_code: int, level: int, entry: int, entry_gpa: int | None,
             rule: str) -> GuestFault:
    """Return the exception for a status other than OK, not raised."""
    details: dict[str, Any] = {"address": address, "access": access, "error_code": error_code, "level": level, "entry": entry,
                               "entry_gpa": entry_gpa, "rule": rule}
    what = f"{access_text(access)} of {address:#x}"
    if status in (Status.NON_CANONICAL, Status.LASS_VIOLATION):
        return GeneralProtection(f"#GP: {what}: {rule_text(rule)}", **details)
    place = f"{entry_name(level)} {entry:#x}" + (f" at gpa {entry_gpa:#x}" if entry_gpa is not None else "")
    return PageFault(f"#PF {error_code_text(error_code)}: {what}: {rule_text(rule)} ({place})", **details)


_NESTED: dict[int, tuple[type[NestedFault], str]] = {
    Status.EPT_VIOLATION: (EptViolation, "EPT violation"), Status.EPT_MISCONFIG: (EptMisconfig, "EPT misconfiguration"),
    Status.NESTED_PAGE_FAULT: (NestedPageFault, "#NPF"), Status.PML_FULL: (PmlFull, "PML full"),
    Status.SPP_EVENT: (SppEvent, "SPP-related event"), Status.VIRT_EXCEPTION: (VirtualizationException, "#VE")}


def nested_title(status: int) -> str:
    """Return the name of a second-stage exit."""
    return _NESTED[status][1]


def nested_fault_of(status: int, *, fault_gpa: int, exit_qualification: int, **details: Any) -> GuestFault:
    """Return the exception for a status of the second stage, not raised."""
    kind, title = _NESTED[status]
    address, access, rule = details["address"], details["access"], details["rule"]
    what = "load of the PDPTEs" if address is None else f"{access_text(access)} of {address:#x}"
    why = f": {rule_text(rule)}" if rule else ""
    place = f"level {details['level']} entry {details['entry']:#x}"
    return kind(f"{title} at gpa {fault_gpa:#x} ({exit_qualification:#x}): {what}{why} ({place})",
                fault_gpa=fault_gpa, exit_qualification=exit_qualification, **details)
