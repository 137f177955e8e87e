# SPDX-License-Identifier: Apache-2.0
"""Signals that end what a test runs, as Ctrl-C does."""

import contextlib
import signal


class Stop(BaseException):
    """The exception that an alarm raises."""


@contextlib.contextmanager
def alarms():
    """Let signal.setitimer(ITIMER_REAL) raise Stop in the block."""
    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
