"""Options of a format as the command line gives them: text, made into the type that the reader of the format declares."""

import re
from inspect import Parameter, signature
from typing import Any

from kvmmu.traces.foreign import Format

__all__ = ["option_of", "options_of"]

_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False}
_TYPES = ("bool", "int", "float", "str")


def options_of(format: Format) -> dict[str, Parameter]:
    """Return the options of a format by name: what its `open()` takes behind the path."""
    parameters = list(signature(format.open).parameters.values())[1:]
    return {each.name: each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}


def option_of(text: str, format: Format) -> tuple[str, Any]:
    """Return the name and the value of an `--option`."""
    name, equals, value = text.partition("=")
    known = options_of(format)
    if not equals or name not in known:
        raise ValueError(f"--option {text}: want NAME=VALUE; the options of the format {format.name} are "
                         f"{', '.join(sorted(known)) or 'none'}")
    types = _types_of(known[name])
    if "bool" in types:
        if value not in _BOOLEANS:
            raise ValueError(f"--option {text}: {name} is one of {', '.join(_BOOLEANS)}")
        return name, _BOOLEANS[value]
    try:
        if "str" not in types and "int" in types:
            return name, int(value, 0)
        if "str" not in types and "float" in types:
            return name, float(value)
    except ValueError:
        raise ValueError(f"--option {text}: {name} is a number, 8 or 0x8" if "int" in types else
                         f"--option {text}: {name} is a number, 0.5 or 8") from None
    if not types:
        raise ValueError(f"--option {text}: {name} is a {type(known[name].default).__name__}, which has no form as text; give it "
                         "to open_trace() in Python")
    return name, value


def _types_of(option: Parameter) -> set[str]:
    """Return the names of the types in `_TYPES` that an option may have, by its annotation or else by its default.

    What neither of them tells may be text.
    """
    if option.annotation is not option.empty:
        found = set(re.findall(r"\w+", str(option.annotation))).intersection(_TYPES)
        if found:
            return found
    if option.default is None or option.default is option.empty:
        return {"str"}
    return {type(option.default).__name__}.intersection(_TYPES)
