"""Files that are read: regular ones alone, which are opened at once."""

import os
import stat
from os import PathLike
from typing import Any, BinaryIO

__all__ = ["StrPath", "check_path", "kind_of", "open_regular", "read_regular"]

StrPath = str | PathLike[str]

_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"))


def kind_of(mode: int) -> str | None:
    """Return in words what `st_mode` says that a file is; None if it is a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")


def open_regular(path: StrPath, refusal: type[Exception]) -> BinaryIO:
    """Open a regular file for reading; a FIFO, a socket, a device or a directory is refused at once, with `refusal`."""
    _refuse_special(path, os.stat(path).st_mode, refusal)           # a socket cannot be opened, and a device may act on it
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_special(path, os.fstat(fd).st_mode, refusal)        # it may be another file now
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _refuse_special(path: StrPath, mode: int, refusal: type[Exception]) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise refusal(f"{os.fspath(path)}: is {kind}; allowed is a regular file")


def read_regular(path: Any) -> bytes:
    """Return the content of a regular file; anything else at `path` is a ValueError, and what is no path a TypeError."""
    with open_regular(check_path("path", path), ValueError) as file:
        return file.read()


def check_path(name: str, path: Any) -> str:
    """Return a path as a str; an integer, which would be a file descriptor, is a TypeError, an empty name a ValueError."""
    text = os.fspath(path) if isinstance(path, PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"{name}: want a path as str or path-like, got {type(path).__name__}; os.fsdecode() makes a str of bytes")
    if not text:
        raise ValueError(f"{name}: is empty; want the name of a file")
    return text
