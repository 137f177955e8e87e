"""Output of the command: text from files made harmless, in the encoding of the stream; a stream that fails is named."""

import sys
from typing import Any, TextIO

__all__ = ["StreamError", "printable", "say", "warn"]

_LONGEST = 2000                         # characters of a message


class StreamError(Exception):
    """Standard output is closed, full, or fails in another way; the message says which."""


def printable(text: str) -> str:
    """Return a text in one line: control characters, escapes, line ends and invisible characters as \\x1b or \\u202e."""
    return text if text.isprintable() else "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text)


def encodable(text: str, file: TextIO) -> str:
    """Return a text as the encoding of a stream can have it: other characters as \\xe9."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def has_boxes(file: Any) -> bool:
    """True if the encoding of a stream has the characters that tables are drawn with."""
    try:
        "\N{BOX DRAWINGS LIGHT HORIZONTAL}\N{HORIZONTAL ELLIPSIS}".encode(getattr(file, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say(text: str, file: TextIO | None = None) -> None:
    """Write a line to standard output, or another stream.

    Raises
    ------
    BrokenPipeError
        Its reader has left.
    StreamError
        It is closed or full.
    """
    write(f"{text}\n", file)


def write(text: str, file: TextIO | None = None) -> None:
    """Write as `say()` does, without an end of the line."""
    file = sys.stdout if file is None else file
    if file is None:
        raise StreamError("standard output is closed: there is nowhere to print to")
    try:
        file.write(encodable(text, file))
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise StreamError(f"standard output: {getattr(error, 'strerror', None) or error}") from error


def warn(text: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is None:
        return
    text = printable(text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    try:
        sys.stderr.write(encodable(text, sys.stderr) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass                            # nobody can be told
