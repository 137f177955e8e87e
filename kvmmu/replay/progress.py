"""Progress on the terminal: with rich where it is installed (extra `cli`), in plain text without it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmmu.replay.terminal import encodable, has_boxes, printable

__all__ = ["progress_bar"]

_PLAIN_SECONDS = 0.2                    # between two texts
_PLAIN_WIDTH = 32


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], object] | None]:
    """Yield a callable (done, total) that shows share, rate and time left on stderr if that is a terminal; None if it is not.

    A total of 0 is unknown: then only what was done and the rate are shown.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    description = encodable(printable(description), sys.stderr)
    try:
        import rich.console
        import rich.progress
        wants_bar = has_boxes(sys.stderr)
    except ImportError:
        wants_bar = False
    if not wants_bar:
        yield _Plain(description)
    else:
        columns = (rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(),
                   rich.progress.TaskProgressColumn(), rich.progress.TextColumn("{task.fields[rate]}"),
                   rich.progress.TimeRemainingColumn())
        started = time.perf_counter()
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None, rate="")
            yield lambda done, total: bar.update(
                task, completed=done, total=total or None, rate=_rate_text(done, time.perf_counter() - started))


def _rate_text(done: int, seconds: float) -> str:
    return f"{done / seconds / 1e6:,.1f} M/s" if seconds > 0 else ""


class _Plain:
    """One line that is written over and over."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.started = time.perf_counter()
        self.shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        last = bool(total) and done >= total
        if now - self.shown < _PLAIN_SECONDS and not last:
            return
        self.shown = now
        rate = _rate_text(done, now - self.started)
        if not total:
            text = f"{done:,} {rate}"
        elif last:
            text = "100%"
        else:
            left = (now - self.started) * (total - done) / done if done else 0.0
            text = f"{100 * done // total}% {rate}, {left:.0f} s left"
        blank = f"\r{self.description}: {'':<{_PLAIN_WIDTH}}" if last else ""         # over what was longer
        print(f"{blank}\r{self.description}: {text if last else text.ljust(_PLAIN_WIDTH)}", end="\n" if last else "",
              file=sys.stderr, flush=True)
