"""Progress on the terminal: with rich where it is installed (extra `cli`), in plain text without it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvmmu.replay.terminal import encodable, has_boxes, printable

__all__ = ["PAGES_PASS", "WALKS_PASS", "progress_bar", "tell_stage"]

# Stages of what reads a trace twice
PAGES_PASS, WALKS_PASS = "pass 1 of 2, pages", "pass 2 of 2, walks"

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
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            yield _Rich(bar, description, resumes)


def tell_stage(progress: Callable[[int, int], object] | None, stage: str) -> None:
    """Show a stage from here on, if this is what `progress_bar()` yields; numbers begin again."""
    if isinstance(progress, _Bar):
        progress.begin(stage)


class _Pace:
    """The rate since the beginning, or since the first call of a replay that resumes another."""

    def __init__(self, resumes: bool) -> None:
        self._waits = resumes
        self._done, self._started = 0, time.perf_counter()

    def restart(self) -> None:
        """Let the rate count from the next call on."""
        self._waits = True

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


class _Bar:
    """The bar of `progress_bar()` on a terminal."""

    def __init__(self, description: str, resumes: bool) -> None:
        self.title = self.description = description
        self.pace = _Pace(resumes)

    def begin(self, stage: str) -> None:
        """Begin a stage, whose numbers are not those of the one before."""
        self.description = f"{self.title}, {stage}"
        self.pace.restart()


class _Rich(_Bar):
    """A bar of rich. IN bar: a rich.progress.Progress."""

    def __init__(self, bar: Any, description: str, resumes: bool) -> None:
        super().__init__(description, resumes)
        self._bar, self._task = bar, bar.add_task(description, total=None, rate="")

    def begin(self, stage: str) -> None:
        super().begin(stage)
        self._bar.reset(self._task, total=None, description=self.description, rate="")

    def __call__(self, done: int, total: int) -> None:
        if self.pace.begins_at(done):
            self._bar.reset(self._task, completed=done, total=total or None, rate="")
        rate = self.pace.rate_text(done, time.perf_counter())
        self._bar.update(self._task, completed=done, total=total or None, rate=rate)


class _Plain(_Bar):
    """One line that is written over and over."""

    def __init__(self, description: str, resumes: bool = False) -> None:
        super().__init__(description, resumes)
        self.shown = 0.0

    def begin(self, stage: str) -> None:
        super().begin(stage)
        print(f"\r{self.description}: {'':<{_PLAIN_WIDTH}}", end="", file=sys.stderr, flush=True)

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
