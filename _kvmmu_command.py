"""The kvmmu command up to its imports: outside the package, so that a Ctrl-C while that is imported ends without a traceback."""

import _signal  # type: ignore[import-not-found]        # not signal, which takes a while to import
import os

__all__ = ["main"]


def _stop(number: int, frame: object) -> None:
    """End at once: nothing has been begun. An exception could be caught by a module that is half imported."""
    try:
        os.write(2, b"kvmmu: interrupted\n")
    finally:
        os._exit(130)


def main() -> int:
    """Import the command and run it; returns its exit status."""
    awaited = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler      # not if a parent has it ignored
    if awaited:
        _signal.signal(_signal.SIGINT, _stop)
    from kvmmu.cli import main as command

    try:
        if awaited:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        return command()
    except KeyboardInterrupt:
        _stop(_signal.SIGINT, None)
    return 130
