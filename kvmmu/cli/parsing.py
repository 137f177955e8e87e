"""Arguments that several subcommands take."""

import argparse
import sys
import textwrap
from contextlib import suppress
from typing import Any, TypeAlias

from kvmmu.arch._bits import Access
from kvmmu.replay.terminal import encodable, write

__all__ = ["Commands", "Parser", "access_of", "add_phase", "address", "command", "count", "epilog", "size"]

_ACCESS_LETTERS = {"r": Access.READ, "w": Access.WRITE, "x": Access.FETCH, "u": Access.USER, "a": Access.AC, "i": Access.IMPLICIT}
_EXIT_STATUS = "Exit status: 0; 1 a mismatch; 2 bad arguments, input or output; 3 a bug of kvmmu; 130 Ctrl-C."

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Does not pass over a failure to print its help."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is not None and file is sys.stdout:
            write(message)
        elif message and sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stderr.write(encodable(message, sys.stderr))


def epilog(*examples: str) -> str:
    return "\n".join(["Examples:", *(f"  kvmmu {example}" for example in examples), "", _EXIT_STATUS])


def command(commands: Commands, name: str, run: Any, summary: str, description: str,
            *examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, epilog=epilog(*examples), description=textwrap.fill(description, 78),
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def add_phase(command: argparse.ArgumentParser) -> None:
    command.add_argument("--phase", choices=("static", "dyn"), help="phase of the recording (default: static if there is one)")


def address(text: str) -> int:
    """An address, hexadecimal with 0x. A number without it is refused unless it is the same in both bases."""
    digits = text.removeprefix("-").lower()
    if not digits.startswith("0x") and len(digits) > 1:
        both = [f"0x{digits}"] if _is_number(digits, 16) else []
        both += [f"{int(digits):#x} (decimal {digits})"] if _is_number(digits, 10) else []
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address; want hexadecimal with 0x" + (f": {' or '.join(both)}" if both else ""))
    try:
        value = int(text, 16)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address; want hexadecimal with 0x") from None
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is not within 64 bits")
    return value


def _is_number(text: str, base: int) -> bool:
    return len(text) <= 20 and text.isascii() and all(character in "0123456789abcdef"[:base] for character in text)


def size(text: str) -> int:
    """Return a number of bytes, decimal or hexadecimal with 0x."""
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; want decimal, or hexadecimal with 0x") from None


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; want 1 or more")
    return int(text)


def access_of(text: str) -> Access:
    access = Access.READ
    for letter in text:
        if letter not in _ACCESS_LETTERS:
            raise argparse.ArgumentTypeError(f"{letter!r} is none of the letters {' '.join(_ACCESS_LETTERS)}")
        access |= _ACCESS_LETTERS[letter]
    if access & Access.WRITE and access & Access.FETCH:
        raise argparse.ArgumentTypeError(f"{text!r} both writes and fetches")
    return access
