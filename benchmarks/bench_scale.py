# SPDX-License-Identifier: Apache-2.0
"""Measure the CPU time of an access in each task of a replay in parts, for docs/scale.md.

    python benchmarks/bench_scale.py [ROWS [WORKERS ...]]
    python benchmarks/bench_scale.py stream ROWS

With numbers of workers, the same replay on clusters of this computer as well, in seconds. The second form replays a stream of
accesses in one process, and tells the peak of its memory.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import kvmmu
from kvmmu import Pager, TlbHierarchy, TlbLevel
from kvmmu.replay import sharded
from kvmmu.replay.synthetic import TablesToOrder
from kvmmu.traces import Header, ParquetTrace, ParquetWriter

PAGES, GROUP = 200_000, 1 << 20
TLB = TlbHierarchy([TlbLevel("L1", 64, 4), TlbLevel("L2", 128, 12)], psc={2: TlbLevel("PDE", 1, 24)})


def write_trace(path, rows):
    """Accesses as programs make them: runs in a page, most of them in few pages."""
    rng = np.random.default_rng(1)
    with ParquetWriter(path, Header(registers=())) as writer:
        for start in range(0, rows, GROUP):
            count = min(GROUP, rows - start)
            runs = rng.zipf(1.2, count).astype(np.uint64) % np.uint64(PAGES)
            page = np.repeat(runs, rng.integers(1, 9, count))[:count]
            op = (rng.random(count) < 0.3).astype(np.uint8)
            writer.write(op=op, addr=(page << np.uint64(12)) + rng.integers(0, 4088, count, np.uint64),
                         access=np.where(op, 6, 4).astype(np.uint8), size=np.full(count, 8, np.uint8))


def stream(rows):
    """Replay a stream with demand paging and TLBs; tell the peak of memory as it goes on."""
    rng, made = np.random.default_rng(1), []
    for _ in range(16):
        page = np.repeat(rng.zipf(1.3, GROUP // 4).astype(np.uint64) % np.uint64(PAGES), 4)
        op = (rng.random(GROUP) < 0.3).astype(np.uint8)
        made.append({"op": op, "addr": (page << np.uint64(12)) + rng.integers(0, 4088, GROUP, np.uint64),
                     "access": np.where(op, 6, 4).astype(np.uint8), "size": np.full(GROUP, 8, np.uint8)})
    chunks = -(-rows // GROUP)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def some():
        for number in range(chunks):
            if number in (chunks // 100, chunks // 10, chunks // 2):
                print(f"{number * GROUP:,} accesses: peak {peak()} MiB", flush=True)
            yield made[number % len(made)]
    tlb = TlbHierarchy([TlbLevel("L1", 16, 4), TlbLevel("L2", 128, 12)])
    started = time.process_time()
    report = kvmmu.replay(some(), pager=Pager(), tlb=tlb)
    print(f"{report.accesses:,} accesses, {report.first_touch_faults:,} page faults, {int(report.tlb.walks.sum()):,} page walks: "
          f"{time.process_time() - started:.0f} s of CPU time, peak {peak()} MiB")


def timed(name, rows, function, *arguments):
    """Call a function and print its CPU time for a row."""
    started = time.process_time()
    found = function(*arguments)
    print(f"{name:44} {1e9 * (time.process_time() - started) / rows:8.2f} ns", flush=True)
    return found


def main(rows, workers):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        write_trace(path, rows)
        print(f"{rows:,} accesses, {path.stat().st_size / rows:.2f} bytes each in the file")
        order, name = TablesToOrder(), str(path)
        pages, _ = timed("pages touched", rows, sharded.touch_part, name, order, 0, rows)
        print(f"{pages.size:,} pages")
        sharded._tables_of.cache_clear()
        sharded.walk_part(name, order, 0, min(rows, GROUP), pages, None, 1, 1)          # makes the tables
        timed("walks alone", rows, sharded.walk_part, name, order, 0, rows, pages, None, 1, 1)
        shape, shards = sharded.Shape(TLB.levels, 0), sharded.shards_of(TLB.levels, ["load", "store"], ["4k"])
        part = timed(f"walks, dealt out to {shards} shards", rows, sharded.walk_part, name, order, 0, rows, pages, shape, shards,
                     shards)
        kept = sum(one.gva.size for one in part.shards)
        print(f"{kept / rows:.3f} of the accesses ask the TLBs of the shards; 18 bytes each")
        stepped = timed("TLBs of all shards", rows, lambda: [
            sharded.shard_step(shape, "4l", None, sharded.dealt_to(part, number)) for number in range(shards)])
        walked = [one for _, one in stepped]
        print(f"{sum(one.gva.size for one in walked) / rows:.4f} of the accesses take walks")
        timed("paging-structure caches", rows, sharded.caches_step, TLB.psc, 0, "4l", None, walked)
        single = timed("one process: replay(tlb=)", rows, lambda: kvmmu.replay(path, tlb=TLB))
        for count in workers:
            from distributed import LocalCluster

            with LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster:
                started = time.perf_counter()
                found = sharded.replay_parts(ParquetTrace(path), order, cluster.scheduler_address, TLB, 1 << 21)
                print(f"{count} workers: {time.perf_counter() - started:.2f} s")
                assert found.tlb.hits.tolist() == single.tlb.hits.tolist()
                assert found.tlb.guest_refs == single.tlb.guest_refs


if __name__ == "__main__":
    if sys.argv[1:2] == ["stream"]:
        stream(int(float(sys.argv[2])))
        sys.exit()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16 << 20, [int(argument) for argument in sys.argv[2:]])
