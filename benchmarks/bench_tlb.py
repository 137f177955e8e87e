"""TLB hierarchies against a plain simulator in C, on seven streams and recorded guests; the same walks on both sides."""

import ctypes

import numpy as np
import pytest
from bench_traces import recordings
from compiled import Missing, plain_tlb
from conftest import QUICK

from kvmmu import TlbHierarchy, TlbLevel
from kvmmu.traces import Recording

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
    race_plain(race, skipped, stream, STREAMS[stream](rng).astype(np.uint64), [("at least", 1.0)])


@pytest.mark.parametrize(("name", "path", "phase"), recordings()[:1 if QUICK else None])
def bench_recorded(race, skipped, name, path, phase):
    """All accesses of a recorded guest, one address space after the other as they ran."""
    recording = Recording.open(path, phase)
    gva = recording.pages_gva[recording.pidx].astype(np.uint64) + recording.off.astype(np.uint64)
    race_plain(race, skipped, f"accesses of {name}", gva, [("rate", 250)])


def race_plain(race, skipped, case, gva, bars):
    try:
        plain = plain_tlb()
    except Missing as missing:
        skipped(GROUP, case, "a plain simulator in C", str(missing))
    tlb = TlbHierarchy([TlbLevel("L1", 16, 4), TlbLevel("L2", 128, 12)])
    state = ctypes.create_string_buffer(plain.plain_tlb_size())
    rows = len(gva)
    tlb.access(gva)
    plain.plain_tlb_run(state, gva.ctypes.data, rows)
    assert int(tlb.stats().walks.sum()) == np.frombuffer(state.raw, np.uint64)[-1]

    race(GROUP, case, "a plain simulator in C", lambda: tlb.access(gva),
         lambda: plain.plain_tlb_run(state, gva.ctypes.data, rows), lambda: (), rows=rows, gain=True, bars=bars)
