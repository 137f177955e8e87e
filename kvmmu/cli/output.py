"""All subcommands write their output, and end, by these functions."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kvmmu.arch.files import NewFile, StrPath
from kvmmu.replay.terminal import StreamError
from kvmmu.report.figure import check_figure_path

__all__ = ["BAD", "BUG", "INTERRUPTED", "MISMATCH", "OK", "Deadly", "check_outputs", "cleaning_up", "drop_output", "flush",
           "stopping"]

OK, MISMATCH, BAD, BUG, INTERRUPTED = 0, 1, 2, 3, 130           # exit status
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


def flush() -> None:
    """Write what is still to be written to stdout, so that a failure is told here and not by Python at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise StreamError(f"standard output: {getattr(error, 'strerror', None) or error}") from error


def drop_output() -> None:
    """Let what Python still wants to flush at exit go nowhere."""
    with suppress(AttributeError, OSError, ValueError):             # no stdout, or none with a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[StrPath]) -> None:
    """Refuse files to write, by option, before any work: those that are read, those of two options, and what cannot be written.

    The option `--plot` also has to name a format of figures.
    """
    inputs, known = list(inputs), dict[str, str]()
    for option, path in outputs.items():
        if path is None:
            continue
        if not path:
            raise ValueError(f"{option}: is empty; want the name of a file")
        if option == "--plot":
            check_figure_path(option, path)
        target = os.path.realpath(path)
        if target in known:
            raise ValueError(f"{option} {path}: is the file of {known[target]}, too; want another file")
        known[target] = option
        with cleaning_up():
            NewFile(path, inputs).discard()             # its folder can be written


class Deadly(BaseException):
    """A signal that is to end the process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopping() -> Iterator[list[int]]:
    """SIGTERM stops the block by a KeyboardInterrupt, as Ctrl-C does, and its number is in the list then."""
    ended_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        ended_by.append(number)
        signal.signal(number, signal.SIG_DFL)           # a second one ends the process
        raise KeyboardInterrupt

    before = None
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        pass                                            # not in the main thread
    try:
        yield ended_by
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Signals that would end the process at once end the block by an exception first, which removes temporary files."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)        # until all is removed
        raise Deadly(number)

    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:
        pass                                            # not in the main thread
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
