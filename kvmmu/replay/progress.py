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
def progress_bar(description: str, resumes: bool = False) -> Iterator[Callable[[int, int], object] | None]:
    """Yield a callable (done, total) that shows share, rate and time left on stderr if that is a terminal; None if it is not.

    A total of 0 is unknown: then only what was done and the rate are shown. IN resumes: what the first call tells was done
    before, and does not count for the rate.
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
        yield _Plain(description, resumes)
    else:
        columns = (rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(),
                   rich.progress.TaskProgressColumn(), rich.progress.TextColumn("{task.fields[rate]}"),
                   rich.progress.TimeRemainingColumn())
        pace = _Pace(resumes)
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None, rate="")

            def show(done: int, total: int) -> None:
                if pace.begins_at(done):
                    bar.reset(task, completed=done, total=total or None, rate="")
                bar.update(task, completed=done, total=total or None, rate=pace.rate_text(done, time.perf_counter()))
            yield show


class _Pace:
    """The rate since the beginning, or since the first call of a replay that resumes another."""

    def __init__(self, resumes: bool) -> None:
        self._waits = resumes
        self._done, self._started = 0, time.perf_counter()

    def begins_at(self, done: int) -> bool:
        """Tell what was done; True if the rate counts from here on."""
        if not self._waits:
            return False
        self._waits, self._done, self._started = False, done, time.perf_counter()
        return True

    def rate(self, done: int, now: float) -> float:
        """Return accesses per second; 0 if there is no time between."""
        return (done - self._done) / (now - self._started) if now > self._started else 0.0

    def rate_text(self, done: int, now: float) -> str:
        rate = self.rate(done, now)
        return f"{rate / 1e6:,.1f} M/s" if rate > 0 else ""


class _Plain:
    """One line that is written over and over."""

    def __init__(self, description: str, resumes: bool = False) -> None:
        self.description, self.pace = description, _Pace(resumes)
        self.shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        last = bool(total) and done >= total
        if now - self.shown < _PLAIN_SECONDS and not last:
            return
        self.shown = now
        self.pace.begins_at(done)
        rate = self.pace.rate_text(done, now)
        if not total:
            text = f"{done:,} {rate}"
        elif last:
            text = "100%"
        else:
            per_second = self.pace.rate(done, now)
            left = f", {(total - done) / per_second:.0f} s left" if per_second > 0 else ""
            text = f"{100 * done // total}% {rate}{left}"
        blank = f"\r{self.description}: {'':<{_PLAIN_WIDTH}}" if last else ""         # over what was longer
        print(f"{blank}\r{self.description}: {text if last else text.ljust(_PLAIN_WIDTH)}", end="\n" if last else "",
              file=sys.stderr, flush=True)
