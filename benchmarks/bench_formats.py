# SPDX-License-Identifier: Apache-2.0
"""Traces of other tools: how fast they become rows, beside how fast their decompressor makes bytes.

Run: pytest benchmarks/bench_formats.py --benchmark-columns=min,median,rounds
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import format_files as files

from kvmmu.traces.champsim import INSTRUCTION
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.drmemtrace import ENTRY
from kvmmu.traces.opening import open_trace

RECORDS = 1_000_000


def champsim_bytes():
    """Instructions of a loop over arrays: a mix of loads and stores, as compressible as real ones are."""
    rng = np.random.default_rng(1)
    records = np.zeros(RECORDS, INSTRUCTION)
    records["ip"] = 0x40_0000 + 4 * rng.integers(0, 5000, RECORDS // 10).repeat(10) + np.tile(np.arange(10), RECORDS // 10) * 4
    records["is_branch"] = np.tile(np.arange(10) == 9, RECORDS // 10)
    records["to_registers"] = rng.integers(0, 60, (RECORDS, 2))
    records["loads"][::3, 0] = 0x7F00_0000_0000 + 8 * rng.integers(0, 1 << 20, len(records[::3]))
    records["stores"][::7, 0] = 0x7F00_0000_0000 + 8 * rng.integers(0, 1 << 20, len(records[::7]))
    return records.tobytes()


def drmemtrace_bytes():
    rng = np.random.default_rng(2)
    entries = np.zeros(4 * RECORDS, ENTRY)
    entries["type"] = np.tile([files.ENCODING, files.INSTR, files.READ, files.INSTR], RECORDS)
    entries["size"] = np.tile([4, 4, 8, 5], RECORDS)
    entries["addr"] = 0x40_0000 + rng.integers(0, 1 << 14, 4 * RECORDS)
    entries["addr"][2::4] = 0x7F00_0000_0000 + 8 * rng.integers(0, 1 << 20, RECORDS)
    return files.drmemtrace_begin(1) + entries.tobytes() + files.entry(files.FOOTER, 0, 0)


def lackey_bytes():
    rng = np.random.default_rng(3)
    addresses = rng.integers(0x401_0000, 0x402_0000, RECORDS).tolist()
    return "".join(f"I  {a:08x},3\n" if i % 4 else f" L 1fff{a & 0xFFFF:06x},8\n" for i, a in enumerate(addresses)).encode()


SOURCES = {"champsim": champsim_bytes, "drmemtrace": drmemtrace_bytes, "lackey": lackey_bytes}


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    """Writes a file of a format once."""
    folder, made = tmp_path_factory.mktemp("formats"), {}

    def make(format, packing):
        if format not in made:
            made[format] = SOURCES[format]()
        path = folder / f"{format}{files.SUFFIXES[packing]}"
        if not path.exists():
            path.write_bytes(files.PACKERS[packing](made[format]))
        return path, len(made[format])
    return make


@pytest.mark.parametrize("packing", ["gzip", "zstd", "xz", "none"])
@pytest.mark.parametrize("format", SOURCES)
@pytest.mark.parametrize("what", ["bytes", "rows"])
def bench_reading(benchmark, trace_file, what, format, packing):
    """`bytes`: the decompressor alone. `rows`: the columns of all rows."""
    path, size = trace_file(format, packing)

    def read_bytes():
        with open_bytes(path) as stream:
            return sum(map(len, stream.blocks()))

    def read_rows():
        return sum(len(columns["op"]) for columns in open_trace(path, format).columns())

    benchmark.group = f"{format} {packing}"
    amount = benchmark(read_bytes if what == "bytes" else read_rows)
    assert amount == size if what == "bytes" else amount >= RECORDS
    benchmark.extra_info["MB/s"] = round(size / benchmark.stats.stats.min / 1e6)
