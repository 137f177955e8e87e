"""TLB hierarchies against a plain simulator in C, on seven streams; the same walks on both sides."""

import ctypes

import numpy as np
import pytest
from compiled import Missing, plain_tlb
from conftest import QUICK

from kvmmu import TlbHierarchy, TlbLevel

GROUP = "TLB hierarchy"
ACCESSES = 2_000_000 if QUICK else 10_000_000
PAGES = 262_144


def zipf(rng, runs=1):
    """Pages by Zipf's law with exponent 0.99, each used so many times in turn."""
    weights = 1 / np.arange(1, PAGES + 1) ** 0.99
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(ACCESSES // runs))
    return np.repeat(rng.permutation(PAGES + 1)[ranks] * 4096, runs)


STREAMS = {
    "48 hot pages": lambda rng: rng.integers(0, 48, ACCESSES) * 4096,
    "random, 1,024 pages": lambda rng: rng.integers(0, 1024, ACCESSES) * 4096,
    "random, 65,536 pages": lambda rng: rng.integers(0, 65536, ACCESSES) * 4096,
    "Zipf 0.99, 262,144 pages": zipf,
    "the same in runs of 8": lambda rng: zipf(rng, 8),
    "8-byte stride": lambda rng: np.arange(ACCESSES) * 8,
    "4K stride": lambda rng: np.arange(ACCESSES) * 4096,
}


@pytest.mark.parametrize("stream", STREAMS)
def bench_streams(race, skipped, rng, stream):
    """64 entries in 4 ways before 1536 in 12, LRU, 4K pages."""
    try:
        plain = plain_tlb()
    except Missing as missing:
        skipped(GROUP, stream, "a plain simulator in C", str(missing))
    gva = STREAMS[stream](rng).astype(np.uint64)
    tlb = TlbHierarchy([TlbLevel("L1", 16, 4), TlbLevel("L2", 128, 12)])
    state = ctypes.create_string_buffer(plain.plain_tlb_size())
    rows = len(gva)
    tlb.access(gva)
    plain.plain_tlb_run(state, gva.ctypes.data, rows)
    assert int(tlb.stats().walks.sum()) == np.frombuffer(state.raw, np.uint64)[-1]

    race(GROUP, stream, "a plain simulator in C", lambda: tlb.access(gva),
         lambda: plain.plain_tlb_run(state, gva.ctypes.data, rows), lambda: (), rows=rows, gain=True, bars=[("at least", 1.0)])
