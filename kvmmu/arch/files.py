"""Files: regular ones opened for reading, and new ones that take their place when they are complete."""

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import Any, BinaryIO

__all__ = ["NewFile", "StrPath", "check_output", "check_path", "kind_of", "no_such", "open_regular", "read_regular", "writing"]

StrPath = str | PathLike[str]

_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"))
_TRIES = 100                            # names for a temporary file, each of 64 random bits
_NEW_MODE = 0o666                       # less the umask
_ACCESS_MODE = 0o777


def kind_of(mode: int) -> str | None:
    """Return in words what `st_mode` says that a file is; None if it is a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")


def no_such(path: StrPath, what: str) -> FileNotFoundError:
    """Return the error of a path where there is nothing. IN what: should be there."""
    if os.fspath(path) == "-":
        return FileNotFoundError(f"-: standard input is not read; want the path of a {what}, a file that can be read more than "
                                 "once. Write what comes from a pipe to a file first")
    return FileNotFoundError(f"{os.fspath(path)}: no such {what}")


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
