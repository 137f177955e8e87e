"""Any memory image, opened by what is in it: the formats of kvmmu and those that other packages add."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from warnings import warn

from kvmmu.arch.arguments import check_name, check_path
from kvmmu.arch.files import no_such
from kvmmu.images._file import ImageError, StrPath
from kvmmu.images.image import Image
from kvmmu.images.raw import why_not_raw
from kvmmu.images.reader import PhysicalReader, open_reader

__all__ = ["GROUP", "Format", "find_image_format", "image_formats", "is_image", "open_image"]

GROUP = "kvmmu.images"                      # of entry points
_OWN = ("elfcore", "kdump", "lime", "avml", "windows", "vmware", "raw")
_HEAD_BYTES = 1 << 16
_SHOWN = 32                                 # bytes of an unknown file in the message
_COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}


class Format(Protocol):
    """A format of images, as an entry point names it: an object, or a class or function that returns one."""

    @property
    def name(self) -> str: ...

    def sniff(self, head: bytes, path: PathLike[str]) -> int:
        """Return how sure it is, 0 to 100, that a file with these first bytes has this format."""

    def open(self, path: StrPath, **options: Any) -> Image:
        """Open the file; ImageError if it is damaged where nothing of it can be read."""


def image_formats() -> dict[str, Format]:
    """Return the formats that can be read, by name."""
    return dict(_all_formats())


@cache
def _all_formats() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for module in _OWN:
        own = import_module(f"kvmmu.images.{module}").FORMAT
        found[own.name] = own
    from importlib.metadata import entry_points  # takes 10 ms

    for point in entry_points(group=GROUP):
        try:
            if point.name in found:
                raise TypeError(f"there is a format {point.name!r} already")
            loaded = point.load()
            is_format = hasattr(loaded, "sniff") and not isinstance(loaded, type)
            found[point.name] = loaded if is_format else loaded()
        except Exception as error:      # of another package, and no reason to read nothing
            warn(f"the image format {point.name!r} ({point.value}) cannot be used: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _head_of(path: Path) -> bytes:
    if not path.is_file():
        if not path.exists():
            raise no_such(path, "image")
        raise ImageError(path, "is no regular file")
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def find_image_format(path: StrPath) -> Format | None:
    """Return the format of a file, told by its content; None if it is none of those that are known."""
    check_path("path", path, "an image")
    known = _all_formats()
    head = _head_of(Path(path))
    scores = {name: format.sniff(head, Path(path)) for name, format in known.items()}
    best = max(scores, key=lambda name: scores[name])
    return known[best] if scores[best] > 0 else None


def is_image(path: StrPath) -> bool:
    """True if a path is a file in some image format but raw, which any file of whole pages may be."""
    if path == "":
        return False
    check_path("path", path, "an image")
    found = find_image_format(path) if Path(path).is_file() else None
    return found is not None and found.name != "raw"


def open_image(path: StrPath | PhysicalReader, format: str | None = None, **options: Any) -> Image:
    """Open a memory image.

    Parameters
    ----------
    path : str or path-like, or an object with read(gpa, n)
        A file; or what reads guest-physical memory, of which the options are `size` and `holes`: see `open_reader()`.
    format : str, optional
        Name of its format; told by its content otherwise.
    **options
        Of the format: see docs/images.md.

    Returns
    -------
    Image
        The file is mapped, not read, and what is compressed in it is unpacked when it is looked at: an image of any size opens
        at once. Nothing is ever written to it.

    Raises
    ------
    ImageError
        The file is in no format that is known, or damaged where nothing of it can be read. What else is wrong is in
        `Image.damage`.
    ValueError, TypeError
        There is no such format, or option.
    FileNotFoundError
        It is not there, or no name is given.
    ImportError
        An optional package is needed; the message names the extra.

    Notes
    -----
    The file must not become shorter while the image is in use (a second dump to the same name truncates it first): reading a
    part of a mapped file that is gone ends the process with SIGBUS.
    """
    if not isinstance(path, (str, bytes, PathLike)):
        if not callable(getattr(path, "read", None)):
            raise TypeError(f"path: want a path, or an object with read(gpa, n), got {type(path).__name__}")
        if format is not None:
            raise ValueError(f"format: an object with read(gpa, n) has none, got {format!r}")
        _check_options("an object with read(gpa, n)", open_reader, options)
        return open_reader(path, **options)
    check_path("path", path, "an image")
    known = _all_formats()
    if format is not None:
        check_name("format", format, tuple(sorted(known)))
        _head_of(Path(path))
        _check_options(f"format {format!r}", known[format].open, options)
        return known[format].open(path, **options)
    found = find_image_format(path)
    if found is None:
        raise ImageError(path, _unknown(path, _head_of(Path(path)), sorted(known)), 0)
    _check_options(f"format {found.name!r}", found.open, options)
    return found.open(path, **options)


def _check_options(what: str, function: Callable[..., Image], options: dict[str, Any]) -> None:
    """Raise TypeError if a function that opens images does not take one of the options."""
    parameters = signature(function).parameters.values()
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        return
    allowed = [each.name for each in parameters if each.kind is Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name}: is no option of {what}; allowed are {', '.join(allowed) or 'none'}")


def _unknown(path: StrPath, head: bytes, names: list[str]) -> str:
    for magic, compression in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed by {compression}; decompress it first: an image is mapped, not read"
    shown = f"it begins with {head[:_SHOWN].hex(' ')}" if head else "it is empty"
    return (f"is in no format that is known; {shown}. Formats that can be read: {', '.join(names)}; {why_not_raw(path)}. "
            "If it is one of them, name it: format=NAME, --format NAME")
