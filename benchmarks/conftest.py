"""The race: two sides in turn in one process, with fresh input each round, and the median of their ratios."""

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata

import numpy as np
import pytest
from compiled import Missing, compiler

import kvmmu

QUICK = os.environ.get("BENCH_QUICK") == "1"
ROWS = 500_000 if QUICK else 2_000_000
ROUNDS = 5 if QUICK else 11
_SKIPPED = []
_LOAD = os.getloadavg()[1] if hasattr(os, "getloadavg") else None       # what others do, before the run


@pytest.fixture
def rng():
    return np.random.default_rng(2)


@pytest.fixture
def race(benchmark):
    """Race two callables and leave the outcome in the `extra_info` of the benchmark.

    Called with (group, case, against): names of the table; ours, theirs: callables of the arguments that `fresh()` returns
    as a tuple; rows: translations of one call; between: called before each of the two, not timed (cold bits, for example);
    bars: ("at most" or "at least", ratio) or ("rate", millions a second), any number of them; gain=True: the ratio is theirs to
    ours, else ours to theirs; check: called once with the arguments, asserts that the results are right; x: where the row stands
    in a plot; theirs_rows: where the other side translates fewer. Both sides take turns at going first. Time is CPU time of
    the process, or with wall=True the clock on the wall.
    """
    def run(group, case, against, ours, theirs, fresh, *, rows, bars=(), between=lambda: None, rounds=None, gain=False,
            wall=False, check=None, x=None, theirs_rows=None):
        clock = time.perf_counter if wall else time.process_time
        rounds = rounds or ROUNDS
        times = {"ours": [], "theirs": []}

        def timed(side, call, arguments):
            between()
            started = clock()
            call(*arguments)
            times[side].append(clock() - started)

        def setup():
            arguments = fresh()
            if len(times["ours"]) % 2:
                timed("theirs", theirs, arguments)
            between()
            return arguments, {}

        def once(*arguments):
            started = clock()
            ours(*arguments)
            times["ours"].append(clock() - started)

        def teardown(*arguments):
            if len(times["theirs"]) < len(times["ours"]):
                timed("theirs", theirs, arguments)
            if check is not None and len(times["ours"]) == 1:
                check(*arguments)

        benchmark.group = group
        benchmark.pedantic(once, setup=setup, teardown=teardown, rounds=rounds, warmup_rounds=1)
        mine = np.array(times["ours"][1:]) / rows                       # without the warm-up
        other = np.array(times["theirs"][1:]) / (theirs_rows or rows)
        ratios = other / mine if gain else mine / other
        low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
        benchmark.extra_info.update(
            group=group, case=case, against=against, ratio=median, low=low, high=high, gain=gain, rows=rows, rounds=rounds,
            ours_ns=float(np.median(mine)) * 1e9, theirs_ns=float(np.median(other)) * 1e9, bars=bars, x=x)

    return run


@pytest.fixture
def skipped():
    """Skip a row of the table, with the reason."""
    def skip(group, case, against, reason):
        _SKIPPED.append({"group": group, "case": case, "against": against, "reason": reason})
        pytest.skip(f"{group}: {case} against {against}: {reason}")

    return skip


def versions():
    """What the numbers depend on, by name."""
    found = {"kvmmu": kvmmu.__version__, "Python": platform.python_version()}
    for name in ("numpy", "Cython", "unicorn", "volatility3"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with contextlib.suppress(Missing):
        done = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True)
        found["compiler"] = done.stdout.partition("\n")[0]
    return found


def pytest_benchmark_update_json(output_json):
    """Leave what was skipped, and how the run was made, beside the results."""
    output_json["skipped"] = _SKIPPED
    output_json["run"] = {"quick": QUICK, "rows": ROWS, "rounds": ROUNDS, "versions": versions(),
                          "load": _LOAD,
                          "linux_data": bool(os.environ.get("KVMMU_LINUX_DATA"))}
