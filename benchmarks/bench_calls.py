"""Calls around the walk: what Python programs make one at a time, and checks over arrays."""

import numpy as np
import pytest
from compiled import Missing, scalar_loops
from conftest import QUICK
from tables import WARM, Guest

from kvmmu import Access, CpuModel, GeneralProtection, GuestMemory, Host, PageFault, Vm, open_trace, replay
from kvmmu.arch._bits import Op
from kvmmu.traces import Header, RegisterSet
from kvmmu.traces.parquet import ParquetWriter

ELEMENTS = 200_000 if QUICK else 1_000_000
CALLS = 2_000 if QUICK else 20_000
ABSENT = 0x7F00_0000_0000
ZEROS = 512 << 20
FLAT = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}            # paging off
# microseconds that a call may take
CALL_BARS = {"set_regs(cr3)": 4, "mov_cr(3)": 4, "a fault as exception": 6, "walk_record": 10, "access, TLB hit": 0.7,
             "access, fault": 8}


@pytest.mark.parametrize("check", ["is_fault", "is_rsvd_bits_set", "permission_fault"])
def bench_checks_of_arrays(race, rng, check):
    """Checks of a page-table format over columns of bytes, and of entries."""
    walk = Guest(512, mix=WARM).vcpu.gva_walk
    call = {"is_fault": walk.fmt.is_fault, "is_rsvd_bits_set": walk.fmt.is_rsvd_bits_set,
            "permission_fault": walk.permission_fault}[check]
    out = np.empty(ELEMENTS, np.uint64)

    def fresh():
        if check == "is_rsvd_bits_set":
            return rng.integers(0, 1 << 63, ELEMENTS, np.uint64), rng.integers(1, 5, ELEMENTS, np.uint8)
        rights, keys = rng.integers(0, 16, (2, ELEMENTS), np.uint8)
        access = rng.choice(np.array([0, 2, 4, 6, 16, 20, 12], np.uint8), ELEMENTS)
        return (rights, access) if check == "is_fault" else (rights, keys, access)

    race("Calls", f"{check}() of arrays, each element", "filling 8 bytes", call, lambda *_: out.fill(1), fresh, rows=ELEMENTS,
         bars=[("rate", 500)])


def python_calls():
    """The calls of CALL_BARS by name; each takes a number that differs from call to call."""
    tables = Guest(512, mix=WARM)
    vcpu, regs = tables.vcpu, tables.vcpu.regs
    vm = Vm(GuestMemory(1 << 24), cpu=CpuModel(maxphyaddr=40), host=Host(tdp="ept", maxphyaddr=46))
    flat, paged = vm.create_vcpu(), Vm(vcpu.mem, cpu=vcpu.cpu, host=Host(tdp="ept", maxphyaddr=48)).create_vcpu()
    flat.set_regs(**FLAT)
    paged.set_regs(regs)

    def refused(call):
        def fault(_):
            try:
                call(ABSENT, Access.USER)
            except (PageFault, GeneralProtection):
                return
            raise AssertionError("no fault")
        return fault

    return {"set_regs(cr3)": lambda i: vcpu.set_regs(cr3=regs.cr3 | (i & 1) << 3),
            "mov_cr(3)": lambda i: vcpu.mov_cr(3, regs.cr3 | (i & 1) << 3),
            "a fault as exception": refused(vcpu.gva_walk.gva_to_gpa),
            "walk_record": lambda i: vcpu.gva_walk.walk_record((i & 255) << 12, Access.USER),
            "access, TLB hit": lambda i: flat.access((i & 255) << 12, Access.READ),
            "access, fault": refused(paged.access)}


@pytest.mark.parametrize("name", CALL_BARS)
def bench_calls_from_python(race, skipped, name):
    """One call at a time, the loop included on both sides."""
    try:
        empty = scalar_loops().Empty()
    except Missing as missing:
        skipped("Calls", name, "an empty Cython method", str(missing))
    call = python_calls()[name]

    def ours():
        for i in range(CALLS):
            call(i)

    def theirs():
        for i in range(CALLS):
            empty.gva_to_gpa(i)

    race("Calls", name, "an empty Cython method", ours, theirs, lambda: (), rows=CALLS, bars=[("rate", 1 / CALL_BARS[name])])


def rows_of(op, addr, value=None):
    addr = np.asarray(addr, np.uint64)
    return {"op": np.full(addr.size, op, np.uint8), "addr": addr, "access": np.zeros(addr.size, np.uint8),
            "value": np.zeros(addr.size, np.uint64) if value is None else np.asarray(value, np.uint64)}


def bench_trace_of_zeros(race, tmp_path):
    """A trace that brings a word of 0 in each page of 512 MiB, against one that brings as much memory and no words."""
    pytest.importorskip("pyarrow")
    pages = np.arange(ZEROS >> 12, dtype=np.uint64) << np.uint64(12)
    for name, words in (("zeros", pages), ("none", pages[:0])):
        with ParquetWriter(tmp_path / f"{name}.parquet", Header(registers=(RegisterSet(**FLAT),))) as writer:
            writer.write(rows_of(Op.MEMORY, [0], [ZEROS]))
            writer.write(rows_of(Op.MEMORY_WORD, words))
            writer.write(rows_of(Op.LOAD, [0]))

    def replay_of(name):
        return lambda: replay(open_trace(tmp_path / f"{name}.parquet"))

    race("Traces", "a trace that brings 512 MiB of zeros, each page", "one that brings no words", replay_of("zeros"),
         replay_of("none"), lambda: (), rows=pages.size, bars=[("rate", pages.size / 0.1 / 1e6)])
