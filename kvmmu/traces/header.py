"""The header of a trace: registers, processor, source; as JSON text and back, checked. `docs/trace-format.md` defines it."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Self

from kvmmu.arch._bits import Cr0, Cr4, Efer
from kvmmu.arch.arguments import check_bool, check_word, check_words
from kvmmu.arch.words import fields_text, flags_text, hex_text

__all__ = ["Header", "RegisterSet", "Stage", "TraceError"]

VERSION = 1
MAX_VCPUS = 1 << 16


class TraceError(ValueError):
    """A trace is damaged or not in the documented format: the message says where, which value, and what is allowed.

    Attributes
    ----------
    report : Report or None
        Of a replay that the damage ended: what was done until then.
    """

    report: Any = None


_STRINGS = ("name", "phase", "mode", "source", "tables_at")
_WORDS = ("ncr3", "cr4", "efer", "eptp")    # of a stage; its other parts are flags


_TEXTS: Mapping[str, Callable[[Any], str]] = dict.fromkeys(("cr3", "ncr3", "eptp", "pkru", "pkrs", "pdptrs"), hex_text) | {
    "cr0": partial(flags_text, kind=Cr0), "cr4": partial(flags_text, kind=Cr4), "efer": partial(flags_text, kind=Efer)}


def _check_word(name: str, value: Any, bits: int) -> int:
    try:
        return check_word(name, value, bits)
    except ValueError:
        raise TraceError(f"{name}: is {int(value):#x}; allowed is a number of {bits} bits") from None


@dataclass(frozen=True)
class Stage:
    """A second stage: NPT if `ncr3` is given, with L1's CR4 and EFER that choose its format, else EPT.

    Parameters
    ----------
    ncr3, cr4, efer, gmet
        Of an NPT.
    eptp, mbec, execonly, advanced_info, page_2m, page_1g
        Of an EPT.
    """

    ncr3: int | None = None
    cr4: int | None = None
    efer: int | None = None
    gmet: bool | None = None
    eptp: int | None = None
    mbec: bool | None = None
    execonly: bool | None = None
    advanced_info: bool | None = None
    page_2m: bool | None = None
    page_1g: bool | None = None

    def __post_init__(self) -> None:
        if (self.ncr3 is None) == (self.eptp is None):
            raise TraceError("second_stage: want either ncr3 (NPT) or eptp (EPT)")
        own = ("ncr3", "cr4", "efer", "gmet") if self.eptp is None else (
            "eptp", "mbec", "execonly", "advanced_info", "page_2m", "page_1g")
        for name, value in self.given().items():
            if name not in own:
                raise TraceError(f"second_stage: {name} does not go with {own[0]}; allowed is {', '.join(own)}")
            place = f"second_stage.{name}"
            object.__setattr__(self, name, _check_word(place, value, 64) if name in _WORDS else check_bool(place, value))

    def __repr__(self) -> str:
        return fields_text(self, _TEXTS)

    def given(self) -> dict[str, Any]:
        """Return by name what was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RegisterSet:
    """Registers of one vCPU.

    Parameters
    ----------
    cr0, cr3, cr4, efer, pkru : int
    pdptrs : tuple of 4 int, optional
        PAE: the PDPTE registers; None loads them from memory at CR3.
    second_stage : Stage, optional
        These are registers of a nested guest, which runs under it.
    pkrs : int
        IA32_PKRS.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int = 0
    pdptrs: tuple[int, ...] | None = None
    second_stage: Stage | None = None
    pkrs: int = 0

    def __repr__(self) -> str:
        return fields_text(self, _TEXTS)

    def __post_init__(self) -> None:
        for name, bits in (("cr0", 64), ("cr3", 64), ("cr4", 64), ("efer", 64), ("pkru", 32), ("pkrs", 32)):
            object.__setattr__(self, name, _check_word(name, getattr(self, name), bits))
        if self.pdptrs is not None:
            try:
                object.__setattr__(self, "pdptrs", check_words("pdptrs", self.pdptrs, 4))
            except ValueError as error:
                raise TraceError(f"{error}; allowed are four numbers of 64 bits") from None


def _check_sets(name: str, sets: Any) -> tuple[RegisterSet, ...]:
    if not isinstance(sets, (tuple, list)):
        raise TypeError(f"{name}: want a tuple of RegisterSets, got {type(sets).__name__}")
    for i, regs in enumerate(sets):
        if not isinstance(regs, RegisterSet):
            raise TypeError(f"{name}[{i}]: want a RegisterSet, got {type(regs).__name__}")
    return tuple(sets)


@dataclass(frozen=True)
class Header:
    """The header of a trace: what holds for all of it.

    Parameters
    ----------
    registers : tuple of RegisterSet
        At the start, one per vCPU. Empty: the trace knows neither registers nor page tables, only accesses.
    cpu : dict
        The processor: `vendor` "intel" or "amd", `maxphyaddr`, and any feature of `kvmmu.CpuModel` that is not as by default.
    contexts : tuple of RegisterSet
        Register sets that SET_REGS, VMENTER and VMEXIT name by their place.
    name, phase, mode, source : str
        What was recorded, which part of it, its paging mode, and by what.
    tables_at : {"start", "end"}
        When the memory that the trace begins with was taken. "end": first-touch faults cannot be reproduced.
    pdpte_clear : int
        Bits that the recorded CPU ignored in PAE PDPTEs, cleared when they are loaded.
    accesses, rows : int, optional
        In all.
    vcpus : int
        How many processors there are. With registers it is their number; without, by default as many as there can be.
    """

    registers: tuple[RegisterSet, ...]
    cpu: Mapping[str, Any] = field(default_factory=dict)
    contexts: tuple[RegisterSet, ...] = ()
    name: str = "trace"
    phase: str = ""
    mode: str = ""
    source: str = ""
    tables_at: str = "start"
    pdpte_clear: int = 0
    accesses: int | None = None
    rows: int | None = None
    vcpus: int = 0

    def __post_init__(self) -> None:
        for name in ("registers", "contexts"):
            object.__setattr__(self, name, _check_sets(name, getattr(self, name)))
        if not isinstance(self.cpu, Mapping):
            raise TypeError(f"cpu: want a mapping, got {type(self.cpu).__name__}")
        for name in _STRINGS:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: want a string, got {type(getattr(self, name)).__name__}")
        if len(self.registers) > MAX_VCPUS:
            raise TraceError(f"registers: of {len(self.registers)} vCPUs; allowed are at most {MAX_VCPUS}")
        if not self.registers and self.contexts:
            raise TraceError("contexts: there are no registers that they could replace; allowed is none")
        vcpus = _check_word("vcpus", self.vcpus, 63)
        if vcpus > MAX_VCPUS:
            raise TraceError(f"vcpus: is {vcpus}; allowed are at most {MAX_VCPUS}")
        object.__setattr__(self, "vcpus", len(self.registers) or vcpus or MAX_VCPUS)
        if self.tables_at not in ("start", "end"):
            raise TraceError(f"tables_at: is {self.tables_at!r}; allowed is 'start' or 'end'")
        object.__setattr__(self, "pdpte_clear", _check_word("pdpte_clear", self.pdpte_clear, 64))
        for name in ("accesses", "rows"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _check_word(name, getattr(self, name), 63))

    def to_json(self) -> str:
        """Return the header as text: registers and addresses are hexadecimal strings."""
        import json
        plain = {"version": VERSION, **{name: getattr(self, name) for name in _STRINGS},
                 "pdpte_clear": hex(self.pdpte_clear), "cpu": dict(self.cpu),
                 "registers": [_plain_registers(regs) for regs in self.registers],
                 "contexts": [_plain_registers(regs) for regs in self.contexts]}
        if not self.registers:
            plain["vcpus"] = self.vcpus
        return json.dumps(plain | {name: getattr(self, name) for name in ("accesses", "rows") if getattr(self, name) is not None})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read and check a header."""
        import json
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"header: not JSON ({error})") from error
        if not isinstance(plain, dict):
            raise TraceError(f"header: is a {type(plain).__name__}; allowed is an object")
        if plain.pop("version", None) != VERSION:
            raise TraceError(f"header: version: is missing or not {VERSION}, the one that is known")
        known = set(cls.__dataclass_fields__)
        values: dict[str, Any] = {name: value for name, value in plain.items() if name in known}    # others are of later versions
        for name in _STRINGS:
            if not isinstance(values.get(name, ""), str):
                raise TraceError(f"header: {name}: is {values[name]!r}; allowed is a string")
        if "registers" not in values:
            raise TraceError("header: registers: is missing; allowed is a list, empty if the trace knows no registers")
        for name in ("registers", "contexts"):
            rows = values.get(name, [])
            if not isinstance(rows, list):
                raise TraceError(f"header: {name}: is a {type(rows).__name__}; allowed is a list")
            values[name] = tuple(_registers_of(f"{name}[{i}]", row) for i, row in enumerate(rows))
        if not isinstance(values.setdefault("cpu", {}), dict):
            raise TraceError(f"header: cpu: is {values['cpu']!r}; allowed is an object")
        values["pdpte_clear"] = _number("pdpte_clear", values.get("pdpte_clear", 0))
        try:
            return cls(**values)
        except (TraceError, TypeError) as error:
            raise TraceError(f"header: {error}") from None


def _number(name: str, value: Any) -> int:
    """Return a number of 64 bits, as JSON number or hexadecimal string."""
    try:
        return _check_word(name, int(value, 16) if isinstance(value, str) else value, 64)
    except (TypeError, ValueError):
        raise TraceError(f"header: {name}: is {value!r}; allowed is a number of 64 bits or a hexadecimal string") from None


def _plain_registers(regs: RegisterSet) -> dict[str, Any]:
    plain: dict[str, Any] = {name: hex(getattr(regs, name)) for name in ("cr0", "cr3", "cr4", "efer", "pkru")}
    if regs.pkrs:                               # a reader of before does not know it
        plain["pkrs"] = hex(regs.pkrs)
    if regs.pdptrs is not None:
        plain["pdptrs"] = [hex(pdpte) for pdpte in regs.pdptrs]
    if regs.second_stage is not None:
        plain["second_stage"] = {name: value if isinstance(value, bool) else hex(value)
                                 for name, value in regs.second_stage.given().items()}
    return plain


def _part_of_stage(place: str, name: str, value: Any) -> Any:
    """Return a part of a second stage as JSON has it; null is the same as none."""
    if value is None:
        return None
    if name in _WORDS:
        return _number(place, value)
    if not isinstance(value, bool):
        raise TraceError(f"second_stage.{name}: is {value!r}; allowed is true or false")
    return value


def _registers_of(place: str, plain: Any) -> RegisterSet:
    if not isinstance(plain, dict):
        raise TraceError(f"header: {place}: is {plain!r}; allowed is an object")
    unknown = plain.keys() - set(RegisterSet.__dataclass_fields__)
    if unknown:
        raise TraceError(f"header: {place}: {sorted(unknown)[0]!r} is no register; "
                         f"allowed is {', '.join(RegisterSet.__dataclass_fields__)}")
    values: dict[str, Any] = {name: _number(f"{place}.{name}", plain.get(name)) for name in ("cr0", "cr3", "cr4", "efer")}
    values |= {name: _number(f"{place}.{name}", plain.get(name, 0)) for name in ("pkru", "pkrs")}
    pdptrs, stage = plain.get("pdptrs"), plain.get("second_stage")
    if pdptrs is not None:
        if not isinstance(pdptrs, list):
            raise TraceError(f"header: {place}.pdptrs: is {pdptrs!r}; allowed is a list of four")
        values["pdptrs"] = tuple(_number(f"{place}.pdptrs", pdpte) for pdpte in pdptrs)
    try:
        if stage is not None:
            if not isinstance(stage, dict) or stage.keys() - set(Stage.__dataclass_fields__):
                raise TraceError(f"second_stage: is {stage!r}; allowed is an object of {', '.join(Stage.__dataclass_fields__)}")
            values["second_stage"] = Stage(**{name: _part_of_stage(f"{place}.{name}", name, value)
                                              for name, value in stage.items()})
        return RegisterSet(**values)
    except TraceError as error:
        raise TraceError(f"header: {place}: {str(error).removeprefix('header: ')}") from None


def checksum(text: bytes) -> str:
    """Return the CRC-32 of a header's text."""
    return f"{zlib.crc32(text):08x}"


def with_totals(header: Header, accesses: int, rows: int, vcpus: int) -> Header:
    """Return the header of a trace that is complete. IN vcpus: one more than the highest that has rows."""
    return replace(header, accesses=accesses, rows=rows, vcpus=vcpus)
