# SPDX-License-Identifier: Apache-2.0
"""Faults and TLB hits of the machine: first touches of 4K pages, hits in the TLB, and a plain copy beside them; processor time.

    python benchmarks/bench_machine.py [--rounds N] [WORD ...]          (only the cases whose names hold all WORDs)

First touches write to each page of a guest in turn whose tables map all of its memory. "cold" guests have the A and D bits of
their leaf entries clear (nested: those of L1's second stage), so that KVM maps no neighbours and every page is a fault of its
own; "warm" ones have them set, and a shadow MMU maps eight pages at a fault. Time is per handled fault, and per page.
"""

import argparse
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parent))
import builders
from conftest import QUICK

from kvmmu import Access, Accesses, CpuModel, Ept, GuestMemory, Host, Npt, Vm

PAGES = 1 << 17                     # 512 MiB of guest memory, touched page by page
HITS = 4_000_000
HOT = 512                           # pages of the hit run: within the TLB
COLD, WARM = 0x07, 0x67             # leaf entries: P, W, U, and with A and D
EPT_TABLE, EPT_LEAF, EPT_AD = 0x107, 0x37, 0x300                # R, W, X (and write-back); A and D


def all_of_memory(mode, pages, base, leaf=WARM, upper=WARM):
    """(root, image) of tables at base that map each of `pages` pages to itself; the low bits of leaf and upper entries."""
    tables = builders.PageTables(mode, base=base)
    for first in range(0, pages, 512):
        tables.map(first << 12, first << 12, upper="p w u a")
    words = {int(gpa): page.copy() for gpa, page in zip(*tables.pages(), strict=True)}
    if upper != WARM:
        for page in words.values():
            page[page != 0] = page[page != 0] & ~np.uint64(0xFFF) | np.uint64(upper)
    per_table = 4096 // tables.entry_size
    entries = (np.arange(pages, dtype=np.uint64) << np.uint64(12) | np.uint64(leaf)).astype(f"<u{tables.entry_size}")
    image = {gpa: page.tobytes() for gpa, page in words.items()}
    for first in range(0, pages, per_table):            # whole leaf tables at once
        image[tables.entry_gpa(first << 12, 1) & ~0xFFF] = entries[first:first + per_table].tobytes()
    return tables, image


def machine(host, mode="4l", pages=PAGES, leaf=WARM, nested=None):
    """(vm, vcpu, addresses of every page) of a guest whose tables map all of its memory; `nested`: L2, under tables of L1's."""
    at, room = pages * 4096, (pages // 512 + 16) * 4096
    tables, image = all_of_memory(mode, pages, at, WARM if nested else leaf)
    end = at + room
    if nested:
        end += room
        low = (EPT_LEAF | EPT_AD if leaf == WARM else EPT_LEAF, EPT_TABLE) if nested == "ept" else (leaf, WARM)
        second, more = all_of_memory("4l", end // 4096, at + room, *low)        # of both kinds of tables, too
        image |= more
    mem = GuestMemory(end)
    for gpa, page in image.items():
        mem.write(gpa, page)
    vm = Vm(mem, cpu=CpuModel(vendor="intel" if nested == "ept" else "amd"), host=host, backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**tables.regs())
    if nested == "ept":
        vcpu.enter_nested(Ept(second.cr3 | 0x5E))
    elif nested == "npt":
        vcpu.enter_nested(Npt(second.cr3))
    return vm, vcpu, np.arange(pages, dtype=np.uint64) << np.uint64(12)


def first_touch(host, **guest):
    """Seconds of one write to every page of a machine that has mapped nothing yet; the faults it took."""
    vm, vcpu, gva = machine(host, **guest)
    access = np.full(gva.size, Access.WRITE, np.uint8)
    out = Accesses(*(np.ones(gva.size, column.dtype) for column in (
        getattr(Accesses.empty(1), name) for name in ("gpa", "hpa", "status", "error_code", "ret", "exits"))))
    started = time.process_time()
    vcpu.access(gva, access, out=out)
    seconds = time.process_time() - started
    assert (out.gpa == gva).all()
    assert vm.stats["pages_4k"] >= PAGES
    return seconds, vm.stats["pf_fixed"]


def tlb_hits(host):
    """Seconds of HITS random reads of pages that the TLB holds; how many were hits."""
    _, vcpu, gva = machine(host, pages=4096)
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


EPT, NPT, SHADOW = (Host(tdp=tdp, maxphyaddr=48) for tdp in ("ept", "npt", None))
CASES = {
    "first touch, ept": partial(first_touch, EPT),
    "first touch, npt": partial(first_touch, NPT),
    **{f"first touch, shadow {mode} {name}": partial(first_touch, SHADOW, mode=mode, leaf=leaf)
       for mode in ("4l", "5l", "pae", "32") for name, leaf in (("cold", COLD), ("warm", WARM))},
    **{f"first touch, nested {tdp}12 {name}": partial(first_touch, host, nested=tdp, leaf=leaf)
       for tdp, host in (("ept", EPT), ("npt", NPT)) for name, leaf in (("cold", COLD), ("warm", WARM))},
    "TLB hit, ept": partial(tlb_hits, EPT),
    "TLB hit, npt": partial(tlb_hits, NPT),
    "TLB hit, shadow 4l": partial(tlb_hits, SHADOW),
    "numpy copy of two columns": copy,
}


# ---- make bench ----------------------------------------------------------------------------------------------------------

COPY = "copying the addresses into two columns"


def race_accesses(race, case, fresh, rows, bar):
    """Race an array of accesses. fresh() returns (vcpu, addresses, accesses, columns)."""
    copies = np.ones((2, rows), np.uint64)

    def check(vcpu, gva, access, out):
        assert (out.gpa == gva).all()
        vcpu.access(gva, access, out=out)
        assert (out.exits == 0).all()

    race("Machine", case, COPY, lambda vcpu, gva, access, out: vcpu.access(gva, access, out=out),
         lambda vcpu, gva, access, out: np.copyto(copies, gva), fresh, rows=rows, bars=[("rate", bar)], rounds=3 if QUICK else 7,
         check=check)


@pytest.mark.parametrize(("name", "guest"), [
    ("EPT", {"host": EPT}), ("NPT", {"host": NPT}), ("shadow, 4-level", {"host": SHADOW, "leaf": COLD}),
    ("shadow, 4-level, A bits set", {"host": SHADOW})])
def bench_first_touch(race, name, guest):
    """One write to every page of a machine that has mapped nothing yet."""
    def fresh():
        _, vcpu, gva = machine(**guest)
        return vcpu, gva, np.full(gva.size, Access.WRITE, np.uint8), Accesses.empty(gva.size)

    race_accesses(race, f"first touch, {name}", fresh, PAGES, 4)


@pytest.mark.parametrize(("name", "host"), [("EPT", EPT), ("NPT", NPT), ("shadow, 4-level", SHADOW)])
def bench_tlb_hits(race, rng, name, host):
    """Random reads of pages that the TLB holds."""
    rows = HITS // 4 if QUICK else HITS
    _, vcpu, gva = machine(host, pages=4096)
    out = Accesses.empty(rows)

    def fresh():
        return vcpu, gva[rng.integers(0, HOT, rows)] + rng.integers(0, 4096, rows, np.uint64), 0, out

    race_accesses(race, f"TLB hits, {name}", fresh, rows, 200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}")
    for name, run in CASES.items():
        if not all(word in name for word in options.words):
            continue
        samples = [run() for _ in range(options.rounds)]
        each = statistics.median(seconds / count for seconds, count in samples)
        line = f"{name:32} {each * 1e9:8.1f} ns  {1e-6 / each:8.2f} M/s  ({samples[0][1]:,} a round)"
        if name.startswith("first"):
            line += f"  {each * samples[0][1] / PAGES * 1e9:6.1f} ns a page"
        print(line)


if __name__ == "__main__":
    main()
