"""Files: new ones that take their place when they are complete, and limits of their size."""

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvmmu.arch.files import StrPath, check_path, kind_of, open_regular

__all__ = ["NewFile", "StrPath", "check_output", "kind_of", "limit_of", "open_regular", "writing"]

_TRIES = 100                            # names for a temporary file, each of 64 random bits
_NEW_MODE = 0o666                       # less the umask
_ACCESS_MODE = 0o777


def limit_of(variable: str, default: int) -> int:
    """Return a number of bytes from the environment, or `default` if it is not set there."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{variable}: is {text!r}; allowed is a number of bytes")
    return int(text)


# ---- output ------------------------------------------------------------------------------------------------------------

def check_output(path: StrPath, inputs: Iterable[StrPath] = ()) -> os.stat_result | None:
    """Return the state of what is at `path`, links followed: a regular file, or None if there is nothing.

    Raises
    ------
    OSError
        It is anything else, or one of the inputs under this or another name.
    """
    name = os.fspath(path)
    try:
        there = os.stat(name)
    except FileNotFoundError:
        return None
    kind = kind_of(there.st_mode)
    if kind is not None:
        number = errno.EISDIR if stat.S_ISDIR(there.st_mode) else errno.EINVAL
        raise OSError(number, f"is {kind}; allowed is a new file, or a regular one to replace", name)
    for other in inputs:
        try:
            same = os.path.samestat(there, os.stat(other))
        except OSError:
            continue                    # not there
        if same:
            raise OSError(errno.EINVAL, f"is the same file as {os.fspath(other)}, which is read; allowed is another file", name)
    return there


def _discard(part: str, owner: int) -> None:
    """Remove a temporary file, unless this process is a fork of the one that made it."""
    if os.getpid() == owner:
        with suppress(OSError):         # its folder is gone, or it is in its place
            os.unlink(part)


class NewFile:
    """A file that is written beside its place under a name of its own, and takes its place when it is complete.

    A link at `path` stays, and its target is replaced; what is replaced leaves its mode to the new file. Without `finish()` the
    temporary file is removed: by `discard()`, with the object, or at the end of Python.

    Parameters
    ----------
    path : str or path-like
    inputs : iterable of str or path-like
        Files that `path` shall not be.

    Attributes
    ----------
    part : str
        The temporary file, empty.

    Raises
    ------
    OSError
        `path` is neither new nor a regular file, is one of the inputs, or its folder cannot be written.
    """

    def __init__(self, path: StrPath, inputs: Iterable[StrPath] = ()) -> None:
        self._path = os.fspath(path)
        there = check_output(path, inputs)
        self._mode = None if there is None else stat.S_IMODE(there.st_mode)
        self._target = os.path.realpath(self._path)
        self._make(os.path.dirname(self._target))

    def _make(self, folder: str) -> None:
        """Make the temporary file. It is to be removed from before it is there, so that no signal comes between."""
        mode = _NEW_MODE if self._mode is None else self._mode & _ACCESS_MODE | stat.S_IWUSR
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        for _ in range(_TRIES):
            self.part = os.path.join(folder, f".kvmmu-{os.urandom(8).hex()}.part")
            self._finalizer = weakref.finalize(self, _discard, self.part, os.getpid())
            try:
                os.close(os.open(self.part, flags, mode))
            except OSError as error:
                self._finalizer.detach()
                if not isinstance(error, FileExistsError):
                    raise OSError(error.errno, error.strerror, self._path) from None
            else:
                return
        raise FileExistsError(errno.EEXIST, "no free name for a temporary file beside it", self._path)

    def finish(self) -> None:
        """Put the file in its place."""
        try:
            check_output(self._target)
            if self._mode is not None:
                os.chmod(self.part, self._mode)
            os.replace(self.part, self._target)
        except OSError as error:
            self.discard()
            raise OSError(error.errno, error.strerror, self._path) from None
        self._finalizer.detach()

    def discard(self) -> None:
        """Remove the temporary file; harmless if it is gone or has got its name."""
        self._finalizer()


@contextmanager
def writing(path: Any, inputs: Iterable[StrPath] = ()) -> Iterator[str]:
    """Name a temporary file for the block to write, which takes its place at `path` behind it. After an error there is none.

    An OSError of the block without a name, or with that of the temporary file, gets the name `path`.
    """
    name = check_path("path", path)
    new = NewFile(name, inputs)
    try:
        yield new.part
        new.finish()
    except OSError as error:
        if error.errno is None or error.filename not in (None, new.part):
            raise
        raise OSError(error.errno, os.strerror(error.errno), name) from error
    finally:
        new.discard()


def all_there(paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that name anything but a directory."""
    return [path for path in paths if path.exists() and not path.is_dir()]
