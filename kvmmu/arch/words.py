"""Texts of values for `repr()`: addresses and registers in hexadecimal, flags and enums by their names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from enum import Enum, Flag
from typing import Any

from kvmmu.arch._bits import Acc

__all__ = ["fields_text", "flags_text", "hex_text", "name_text", "rights_text"]


def flags_text(value: int, kind: type[Flag]) -> str:
    """Return a word with the names of its flags: 0x80010001 (PE WP PG). Bits without a name are in the number alone."""
    names = " ".join(str(flag.name) for flag in sorted(kind, key=lambda flag: flag.value) if value & flag.value)
    return f"{value:#x} ({names})" if names else f"{value:#x}"


def hex_text(value: Any) -> str:
    """Return an integer, or a sequence of integers, in hexadecimal; anything else as repr() does."""
    if isinstance(value, tuple):
        return f"({', '.join(map(hex_text, value))}{',' if len(value) == 1 else ''})"
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def name_text(value: int, kind: type[Enum]) -> str:
    """Return the name of a member of an enum, or the number if it has none."""
    try:
        return kind(value).name
    except ValueError:
        return str(value)


def rights_text(acc: int) -> str:
    """Return rights (`Acc`) as four letters, a dash where one is missing: rwxu."""
    letters = ((Acc.READ, "r"), (Acc.WRITE, "w"), (Acc.EXEC, "x"), (Acc.USER, "u"))
    return "".join(letter if acc & right else "-" for right, letter in letters)


def fields_text(value: Any, texts: Mapping[str, Callable[[Any], str]], always: Collection[str] = ()) -> str:
    """Return the repr() of a dataclass: only the fields that are not as by default, and those in `always`.

    texts: how to write fields, by their names; the others as repr() does.
    """
    parts = []
    for each in fields(value):
        item = getattr(value, each.name)
        if each.repr and (each.name in always or each.default is MISSING or item != each.default):
            parts.append(f"{each.name}={texts.get(each.name, repr)(item)}")
    return f"{type(value).__name__}({', '.join(parts)})"
