# SPDX-License-Identifier: Apache-2.0
"""A trace of another tool over the address space of each paging mode."""

from pathlib import Path

import numpy as np

from kvmmu.traces.foreign import Brings, ForeignTrace

MODES = {"32": (32, 2, {"4k": 12, "2m": 22}), "pae": (32, 2, {"4k": 12, "2m": 21}),        # address bits, references of a 4K page
         "4l": (48, 4, {"4k": 12, "2m": 21, "1g": 30}), "5l": (57, 5, {"4k": 12, "2m": 21, "1g": 30})}


def trace_of(addr, size=None, op=None, rows=64, **more):
    """A trace in memory that can be read again, in chunks of some rows."""
    addr = np.asarray(addr, np.uint64)
    columns = {"op": np.zeros(addr.size, np.uint8) if op is None else np.asarray(op, np.uint8), "addr": addr,
               "size": np.ones(addr.size, np.uint8) if size is None else np.asarray(size, np.uint8), **more}
    columns["access"] = np.array([4, 6, 20], np.uint8)[columns["op"] & 3]

    def read(notes):
        for start in range(0, addr.size, rows):
            yield {name: column[start:start + rows] for name, column in columns.items()}
    return ForeignTrace("test", Path("made"), read, Brings(size=True), vcpus=1)


def accesses_of(mode, n=3000, seed=5):
    """Addresses in a few clusters of a mode's address space, sizes up to 64, many at the ends of pages."""
    rng = np.random.default_rng(seed)
    bits = MODES[mode][0]
    bases = rng.integers(0, 1 << bits - 1, 6, dtype=np.uint64) & np.uint64(~0x3FFFFFFF & (1 << 64) - 1)
    if mode in ("4l", "5l"):
        bases[3:] |= np.uint64((1 << 64) - (1 << bits - 1))
    addr = rng.choice(bases, n) + rng.integers(0, 1 << 24, n, dtype=np.uint64)
    edge = rng.random(n) < 0.3
    addr[edge] = (addr[edge] | np.uint64(0xFFF)) - rng.integers(0, 8, edge.sum()).astype(np.uint64)
    large = rng.random(n) < 0.05
    addr[large] = (addr[large] | np.uint64(0x3FFFFF)) - np.uint64(1)
    addr[::50] |= np.uint64(0x3FFFFFFF)
    return addr, rng.integers(1, 65, n).astype(np.uint8), rng.integers(0, 3, n).astype(np.uint8)
