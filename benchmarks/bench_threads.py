"""Threads that share one batch of 8 million rows, by the clock on the wall."""

import os

import pytest
from cases import BIG, NAMES, Batch, guest
from conftest import QUICK, ROWS

MANY = ROWS if QUICK else 4 * ROWS


@pytest.mark.parametrize("threads", [2, 4, 8])
def bench_threads(race, skipped, rng, threads):
    """The gain over one thread."""
    case = f"{threads} threads, {NAMES[BIG]}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < threads:
        skipped("Threads", case, "one thread", f"this machine has {cores} CPUs")
    many, one = Batch(guest(BIG), rng, MANY, threads=threads), Batch(guest(BIG), rng, MANY)
    race("Threads", case, "one thread", many.translate, one.translate, many.fresh, rows=MANY, between=many.tables.chill,
         check=many.check, gain=True, wall=True, x=threads, bars=[("at least", 1.8)] if threads == 2 else None)
