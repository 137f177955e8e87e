"""Files: limits of their size, and which of some are there."""

import os
from collections.abc import Iterable
from pathlib import Path

from kvmmu.arch.files import NewFile, StrPath, check_output, kind_of, open_regular

__all__ = ["NewFile", "StrPath", "all_there", "check_output", "kind_of", "limit_of", "open_regular"]


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
