# SPDX-License-Identifier: Apache-2.0
"""Faults and TLB hits of the machine: first touches of 4K pages, hits in the TLB, and a plain copy beside them; processor time.

    python benchmarks/bench_machine.py [--rounds N]
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import builders

from kvmmu import Access, Accesses, GuestMemory, Host, Vm

PAGES = 1 << 17                     # 512 MiB of guest memory, touched page by page
HITS = 4_000_000
HOT = 512                           # pages of the hit run: within the TLB


def machine(tdp, pages=PAGES):
    """(vm, vcpu, addresses of every page) of a guest whose tables map all of its memory."""
    tables_at = pages * 4096
    mem = GuestMemory(tables_at + (pages // 512 + 8) * 4096)
    tables = builders.PageTables("4l", base=tables_at)
    mapped = np.arange(pages, dtype=np.uint64) << np.uint64(12)
    for first in range(0, pages, 512):
        tables.map(first << 12, first << 12, flags="p w u a d", upper="p w u a")
    gpas, data = tables.pages()
    for gpa, page in zip(gpas.tolist(), data, strict=True):
        mem.write(gpa, page.tobytes())
    for first in range(0, pages, 512):      # whole leaf tables at once
        leaf = tables.entry_gpa(first << 12, 1) & ~0xFFF
        mem.write(leaf, (mapped[first:first + 512] | np.uint64(0x67)).tobytes())
    vm = Vm(mem, host=Host(tdp=tdp, maxphyaddr=48), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**tables.regs())
    return vm, vcpu, mapped


def first_touch(tdp):
    """Seconds of one write to every page of a machine that has mapped nothing yet; the faults it took."""
    vm, vcpu, gva = machine(tdp)
    access = np.full(gva.size, Access.WRITE, np.uint8)
    out = Accesses(*(np.ones(gva.size, column.dtype) for column in (
        getattr(Accesses.empty(1), name) for name in ("gpa", "hpa", "status", "error_code", "ret", "exits"))))
    started = time.process_time()
    vcpu.access(gva, access, out=out)
    seconds = time.process_time() - started
    assert (out.gpa == gva).all()
    assert vm.stats["pages_4k"] >= PAGES
    return seconds, vm.stats["pf_fixed"]


def tlb_hits(tdp):
    """Seconds of HITS random reads of pages that the TLB holds; how many were hits."""
    _, vcpu, gva = machine(tdp, pages=4096)
    rng = np.random.default_rng(1)
    rows = gva[rng.integers(0, HOT, HITS)] + rng.integers(0, 4096, HITS, np.uint64)
    out = Accesses.empty(HITS)
    vcpu.access(rows, 0, out=out)
    before = vcpu.tlb.hits
    started = time.process_time()
    vcpu.access(rows, 0, out=out)
    seconds = time.process_time() - started
    assert (out.gpa == rows).all()
    return seconds, vcpu.tlb.hits - before


def copy():
    """Seconds of copying as many addresses into two columns."""
    source, out = np.ones(HITS, np.uint64), np.ones((2, HITS), np.uint64)
    started = time.process_time()
    out[:] = source
    return time.process_time() - started, HITS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}")
    for name, run in (("first touch, ept", lambda: first_touch("ept")), ("first touch, npt", lambda: first_touch("npt")),
                      ("TLB hit, ept", lambda: tlb_hits("ept")), ("TLB hit, npt", lambda: tlb_hits("npt")),
                      ("numpy copy of two columns", copy)):
        samples = [run() for _ in range(rounds)]
        each = statistics.median(seconds / count for seconds, count in samples)
        print(f"{name:26} {each * 1e9:8.1f} ns  {1e-6 / each:8.2f} M/s  ({samples[0][1]:,} a round)")


if __name__ == "__main__":
    main()
