"""Files: limits of their size, which of some are there, and those that ship inside the package."""

import os
from collections.abc import Iterable
from pathlib import Path

from kvmmu.arch.files import NewFile, StrPath, check_output, kind_of, no_such, open_regular

__all__ = ["BUNDLED", "NewFile", "StrPath", "all_there", "check_output", "kind_of", "limit_of", "no_such_trace", "open_regular"]

# Data inside the package by the names that the command has for it: the argument of `bundled()`
BUNDLED = {"bundled": "recording", "bundled-lackey": "lackey"}


def limit_of(variable: str, default: int) -> int:
    """Return a number of bytes from the environment, or `default` if it is not set there."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{variable}: is {text!r}; allowed is a number of bytes")
    return int(text)


def all_there(paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that name anything but a directory."""
    return [path for path in paths if path.exists() and not path.is_dir()]


def no_such_trace(path: StrPath, what: str) -> FileNotFoundError:
    """Return the error of a path where there is no trace; names that the command has are told. IN what: as `no_such()`."""
    name = BUNDLED.get(os.fspath(path))
    if name is None:
        return no_such(path, what)
    return FileNotFoundError(f"{os.fspath(path)}: no such {what}; the data that the command calls so is "
                             f"kvmmu.traces.bundled({name!r})")
