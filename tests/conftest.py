# SPDX-License-Identifier: Apache-2.0
"""What holds after every test."""

import os
import signal

import pytest
import shadow_guests

from kvmmu.walk.batch._job import set_rows_of_thread
from kvmmu.walk.batch._kernels import default_instruction_set, use_instruction_set


def pytest_configure():
    """Signals work in tests and in the processes that they start, also where the run has them ignored (nohup, a job)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def threads_in_small_batches():
    """Threads share batches of a few blocks, too, which one thread would do alone."""
    set_rows_of_thread(1)
    yield
    set_rows_of_thread()


@pytest.fixture(autouse=True)
def audited():
    """No test of the shadow MMU leaves page tables behind that break an invariant."""
    shadow_guests.MADE.clear()
    yield
    for vm in shadow_guests.MADE:
        assert vm.audit() == []


@pytest.fixture
def same_instruction_set():
    """The instruction set that batches used before."""
    yield
    use_instruction_set(os.environ.get("KVMMU_INSTRUCTION_SET") or default_instruction_set())
