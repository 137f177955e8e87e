"""The operations of scenarios, and the check of a scenario that somebody wrote. docs/scenarios.md tells of both."""

from collections.abc import Callable
from typing import Any

from kvmmu.oracles.guest_stub import INSTRUCTIONS

__all__ = ["HOST_OPERATIONS", "check_scenario"]

# Of the host: its arguments, those in brackets may be missing.
HOST_OPERATIONS = {
    "host_write": ("gpa", "val"), "host_touch": ("gpa",), "set_sregs": ("[cr0]", "[cr3]", "[cr4]", "[efer]"),
    "slot_delete": ("slot",), "slot_set": ("slot", "[gpa]", "[flags]"), "dirty_get": ("slot",),
    "dontneed": ("slot", "off", "len"), "mprotect": ("slot", "off", "len", "prot"), "nr_mmu_pages": ("n",),
}
_REGISTERS = ("cr0", "cr3", "cr4", "efer")
_SLOT_MAX = 1 << 30
_MISSING: Any = object()


def check_scenario(scenario: Any) -> None:
    """Raise ValueError that names what is wrong, unless a scenario and its operations have the form of the recordings."""
    _dict("scenario", scenario)
    for name in ("slots", "regs", "mem", "watch", "ops"):
        if name not in scenario:
            raise ValueError(f"scenario: {name!r} is missing; want slots, regs, mem, watch, ops")
    sizes: dict[int, int] = {}
    for i, slot in enumerate(_list("slots", scenario["slots"])):
        sizes |= _check_slot(f"slots[{i}]", slot)
    sizes |= _check_stub(scenario.get("stub"))
    for name, value in _dict("regs", scenario["regs"]).items():
        _choice("regs", name, _REGISTERS)
        _number(f"regs[{name!r}]", value)
    for i, row in enumerate(_list("mem", scenario["mem"])):
        _pair(f"mem[{i}]", row)
    for i, gpa in enumerate(_list("watch", scenario["watch"])):
        _number(f"watch[{i}]", gpa)
    for name in _dict("cpu", scenario.get("cpu", {})):
        _choice("cpu", name, ("vendor", "maxphyaddr"))
    for i, op in enumerate(_list("ops", scenario["ops"])):
        _check_operation(f"ops[{i}]", op, sizes)
    expect = scenario.get("expect")
    for i, record in enumerate(_list("expect", [] if expect is None else expect)):
        _check_record(f"expect[{i}]", record)


def _check_slot(where: str, slot: Any) -> dict[int, int]:
    """Return the size of a slot by its number."""
    _dict(where, slot)
    for name in ("slot", "gpa", "size"):
        _integer(f"{where}: {name}", slot.get(name, _MISSING))
    _integer(f"{where}: flags", slot.get("flags", 0))
    _choice(f"{where}: backing", slot.get("backing", "4k"), ("4k", "2m"))
    if not 0 < slot["size"] <= _SLOT_MAX or slot["size"] % 4096 or slot["gpa"] % 4096:
        raise ValueError(f"{where}: want whole pages, at most {_SLOT_MAX:#x} bytes, got {slot['size']:#x} at {slot['gpa']:#x}")
    return {slot["slot"]: slot["size"]}


def _check_stub(stub: Any) -> dict[int, int]:
    if stub is None:
        return {31: 1 << 16}
    _dict("stub", stub)
    _integer("stub: slot", stub.get("slot", _MISSING))
    for name in ("gpa", "size", "va", "user_code_va"):
        if name in stub or name in ("gpa", "size"):
            _text(f"stub: {name}", stub.get(name, _MISSING))
    for i, row in enumerate(_list("stub: mem", stub.get("mem", []))):
        _pair(f"stub: mem[{i}]", row)
        for value in row:
            _text(f"stub: mem[{i}]", value)
    size = int(stub["size"], 16)
    if not 0x10000 <= size <= _SLOT_MAX or size % 4096:
        raise ValueError(f"stub: size: want whole pages, 0x10000 to {_SLOT_MAX:#x} bytes, got {size:#x}")
    return {stub["slot"]: size}


def _check_operation(where: str, op: Any, sizes: dict[int, int]) -> None:
    name = _dict(where, op).get("op", _MISSING)
    if not isinstance(name, str):
        raise ValueError(f"{where}: op: want a name, got {_shown(name)}")
    if "cpl" in op:
        _choice(f"{where}: op of the guest", name, INSTRUCTIONS)
        if op["cpl"] not in (0, 3) or isinstance(op["cpl"], bool):
            raise ValueError(f"{where}: cpl: want 0 or 3, got {op['cpl']!r}")
        for argument in ("va", "val"):
            _number(f"{where}: {argument}", op.get(argument, 0))
        return
    _choice(f"{where}: op of the host (one of the guest has a cpl)", name, HOST_OPERATIONS)
    for argument in HOST_OPERATIONS[name]:
        key = argument.strip("[]")
        if key in op or key == argument:
            _number(f"{where}: {key}", op.get(key, _MISSING))
    if "slot" in HOST_OPERATIONS[name]:
        number = _integer(f"{where}: slot", op["slot"])
        if number not in sizes:
            raise ValueError(f"{where}: slot: there is no slot {number}; there are {', '.join(map(str, sorted(sizes)))}")
        if "flags" in op:
            _integer(f"{where}: flags", op["flags"])
        if "off" in op:
            start, size = _number("off", op["off"]), _number("len", op["len"])
            if start % 4096 or size % 4096 or not 0 < size <= sizes[number] - start:
                raise ValueError(f"{where}: off, len: want whole pages of the {sizes[number]:#x} bytes of slot {number}, got "
                                 f"{start:#x}, {size:#x}")


def _check_record(where: str, record: Any) -> None:
    if not _list(f"{where}: result", _dict(where, record).get("result", _MISSING)):
        raise ValueError(f"{where}: result: is empty")
    for name, value in _dict(f"{where}: delta", record.get("delta", _MISSING)).items():
        _integer(f"{where}: delta: {name}", value, negative=True)


# ---- kinds of values -------------------------------------------------------------------------------------------------------

def _kind(kind: type, words: str) -> Callable[[str, Any], Any]:
    def check(where: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"{where}: want {words}, got {_shown(value)}")
        return value
    return check


_dict = _kind(dict, "an object with names")
_list = _kind(list, "a list")


def _shown(value: Any) -> str:
    text = "nothing" if value is _MISSING else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _integer(where: str, value: Any, *, negative: bool = False) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not (negative or 0 <= value < 1 << 64):
        raise ValueError(f"{where}: want an integer{'' if negative else ' from 0 to 2**64 - 1'}, got {_shown(value)}")
    return value


def _number(where: str, value: Any) -> int:
    """Return an integer, or one in hexadecimal text."""
    return _text(where, value) if isinstance(value, str) else _integer(where, value)


def _text(where: str, value: Any) -> int:
    try:
        number = int(value, 16) if isinstance(value, str) else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{where}: want hexadecimal digits of at most 64 bits, got {_shown(value)}")
    return number


def _pair(where: str, row: Any) -> None:
    if len(_list(where, row)) != 2:
        raise ValueError(f"{where}: want [address, word], got {_shown(row)}")
    for value in row:
        _number(where, value)


def _choice(where: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{where}: want one of {', '.join(allowed)}, got {_shown(value)}")
