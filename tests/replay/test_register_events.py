# SPDX-License-Identifier: Apache-2.0
"""Register events of a trace: what each does the first time, and that the loop does the same by itself from then on."""

import numpy as np
import pytest
from toy_traces import LONG_MODE, OTHER, ROOT, header, memory_rows, rows_of, tables

import kvmmu
from kvmmu import GuestMemory, Regs, Vcpu
from kvmmu.replay._replay import new_row_loop
from kvmmu.traces import Header, Op, RegisterSet, Stage, Trace

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")

PAE = {"cr0": 0x80050033, "cr4": 0x20, "efer": 0}
PCIDE = 1 << 17


def pae_tables(pdpt, directory, frame):
    """{gpa: entry}: a PDPT whose first entry leads to a directory, of which the first 2M page is frame."""
    return {pdpt: directory | 1, directory: frame | 0x87}


@pytest.mark.parametrize("event", ["mov", "set"])
def test_a_load_of_cr3_takes_the_pdptes_of_the_moment(event):
    """PDPTEs are written again and again; a write counts from the next load on, however often the same load was made."""
    rng = np.random.default_rng(1)
    entries = pae_tables(0x1000, 0x2000, 0x200000) | {0x3000: 0x400087} | pae_tables(0x1020, 0x4000, 0x600000)
    registers = (RegisterSet(cr3=0x1000, **PAE), RegisterSet(cr3=0x1020, **PAE))
    rows, frames, loaded, pdpte = [], {0x2001: 0x200000, 0x3001: 0x400000}, 0x2001, 0x2001
    root = 0
    for _ in range(400):
        choice = rng.integers(4)
        if choice == 0:
            pdpte = int(rng.choice([0x2001, 0x3001, 0]))
            rows.append((Op.GUEST_WRITE, 0x1000, pdpte))
        elif choice < 3:
            before, root = root, int(rng.integers(2)) if event == "set" else root
            cr3 = 0x1000 + 0x20 * root
            rows.append((Op.MOV_CR3, 0, cr3) if event == "mov" else (Op.SET_REGS, 0, root))
            if not root and (event == "mov" or before):      # SET_REGS to the same CR3 leaves the PDPTEs that are loaded
                loaded = pdpte
        reached = 0x600000 if root else frames.get(loaded)
        if reached is None:
            rows.append((Op.PAGE_FAULT, 0x123, 0))
        else:
            rows.append((Op.LOAD, 0x123, 0, reached | 0x123))
    report = kvmmu.replay(Trace(
        Header(registers=registers[:1], contexts=registers), [memory_rows(entries, ((0x1000, 0x5000),)), rows_of(*rows)]))
    assert report.mismatches == 0, report.examples[0]
    assert report.verified == sum(row[0] == Op.LOAD for row in rows)
    assert report.faults_reproduced == {"0x0": len(rows) - report.verified - sum(row[0] >= 16 and row[0] != Op.PAGE_FAULT
                                                                                for row in rows)}


def test_more_register_sets_than_are_kept():
    """Thousands of PCIDs on two vCPUs, twice over: dropping register sets changes no answer, and none of the other vCPU's."""
    entries = tables() | tables(OTHER, 0x900)
    on = {"cr0": LONG_MODE["cr0"], "cr4": LONG_MODE["cr4"] | PCIDE, "efer": LONG_MODE["efer"]}
    two = header(registers=(RegisterSet(cr3=ROOT, **on), RegisterSet(cr3=OTHER, **on)))
    frames = {ROOT: 0x100000, OTHER: 0x900000}
    rng = np.random.default_rng(2)
    current, rows = [ROOT, OTHER], []
    for number in range(5000):
        vcpu = int(rng.integers(2))
        current[vcpu] = root = int(rng.choice([ROOT, OTHER]))
        rows.append((Op.MOV_CR3, 0, root | number % 2500 | (1 << 63 if number % 3 else 0), {"vcpu": vcpu}))
        for other in (0, 1):
            page = 0x1000 * int(rng.integers(512))
            rows.append((Op.LOAD, page, 0, frames[current[other]] + page, {"vcpu": other}))
    report = kvmmu.replay(Trace(two, [memory_rows(entries, ((0x1000, 0x8000),)), rows_of(*rows)]))
    assert (report.mismatches, report.verified) == (0, 10_000), report.examples[:1]
    assert report.contexts == 1024, "counted up to there"


def test_loads_that_change_back_and_forth():
    """Each register by its own event; the same event twice from different registers leads to different ones."""
    keyed = tables() | {ROOT + 0x3000: 0x100007 | 1 << 59}
    regs = RegisterSet(cr3=ROOT, cr0=0x80050033, cr4=0x20 | 1 << 22, efer=0xD01)
    user, write = kvmmu.Access.USER, kvmmu.Access.WRITE
    rows = []
    for _ in range(3):
        rows += [(Op.LOAD, 0, user, 0x100000), (Op.WRPKRU, 0, 4), (Op.PAGE_FAULT, 0, 0x25),
                 (Op.MOV_CR4, 0, 0x20), (Op.LOAD, 0, user, 0x100000), (Op.MOV_CR4, 0, 0x20 | 1 << 22), (Op.PAGE_FAULT, 0, 0x25),
                 (Op.WRPKRU, 0, 8), (Op.LOAD, 0, user, 0x100000), (Op.PAGE_FAULT, 0, 0x27), (Op.MOV_CR0, 0, 0x80040033),
                 (Op.STORE, 0, write, 0x100000), (Op.MOV_CR0, 0, 0x80050033), (Op.WRPKRU, 0, 0), (Op.WRMSR_EFER, 0, 0x501),
                 (Op.STORE, 0, write | user, 0x100000), (Op.WRMSR_EFER, 0, 0xD01)]
    report = kvmmu.replay(Trace(header(registers=(regs,)), [memory_rows(keyed), rows_of(*rows)]))
    assert report.mismatches == 0, report.examples[0]
    assert report.faults_reproduced == {"0x25 (P U PK)": 6, "0x27 (P W U PK)": 3}
    assert report.verified == 15


def test_a_nested_guest_under_pae_loads_its_pdptes_at_each_entry():
    """VMENTER reads them through the second stage as they are then, though its register set is the same."""
    ept = {0x11000: 0x12007, 0x12000: 0x87}                             # 1G: identity
    entries = pae_tables(0x1000, 0x2000, 0x200000) | {0x3000: 0x400087} | ept
    l2 = RegisterSet(cr3=0x1000, **PAE, second_stage=Stage(eptp=0x1101E, mbec=False))
    off = RegisterSet(cr0=0x11, cr3=0, cr4=0, efer=0)
    rows = []
    for pdpte, reached in ((0x2001, 0x200000), (0x3001, 0x400000), (0x2001, 0x200000)):
        rows += [(Op.GUEST_WRITE, 0x1000, pdpte), (Op.VMENTER, 0, 1), (Op.LOAD, 8, 0, reached + 8),
                 (Op.GUEST_WRITE, 0x1000, 0), (Op.LOAD, 16, 0, reached + 16), (Op.VMEXIT, 0, 0), (Op.LOAD, 0x77, 0, 0x77)]
    report = kvmmu.replay(Trace(Header(registers=(off,), contexts=(off, l2)),
                                [memory_rows(entries, ((0x1000, 0x12000),)), rows_of(*rows)]))
    assert (report.mismatches, report.verified) == (0, 9), report.examples[:1]


@pytest.mark.parametrize(("call", "words"), [
    (lambda registers, sets: registers.add(sets(2)), "one register set, got 2"),
    (lambda registers, sets: registers.use(1, 0), "vcpu: want 0 to 0, got 1"),
    (lambda registers, sets: registers.use(0, 1), "number"), (lambda registers, sets: registers.in_force(-1), "vcpu"),
    (lambda registers, sets: registers.nested_last(1), "vcpu"), (lambda registers, sets: registers.remember(0, 0, 0, 0), "op"),
    (lambda registers, sets: registers.remember(0, 16, 0, 1), "after"),
    (lambda registers, sets: registers.remember(1, 16, 0, 0), "before"),
    (lambda registers, sets: registers.remember(0, 16, 0, 0, 8), "pdpt: want a multiple of 32, got 0x8")])
def test_numbers_that_are_none(call, words):
    vcpu = Vcpu(GuestMemory(0x1000))
    vcpu.set_regs(cr0=1)

    def sets(count):
        return vcpu.gva_walk.prepare([Regs(cr0=1, cr3=0, cr4=0, efer=0)] * count)
    registers = new_row_loop(vcpu.gva_walk, 1).registers
    assert (registers.in_force(0), registers.nested_last(0), registers.add(sets(1)), registers.count) == (None, None, 0, 1)
    with pytest.raises(ValueError, match=words):
        call(registers, sets)


def test_a_loop_whose_register_sets_were_dropped():
    """It walks nothing until each vCPU has registers again."""
    vcpu = Vcpu(GuestMemory(0x1000))
    vcpu.set_regs(cr0=1)
    prepared = vcpu.gva_walk.prepare([Regs(cr0=1, cr3=0, cr4=0, efer=0)])
    loop = new_row_loop(vcpu.gva_walk, 1)
    loop.use(0, prepared)
    chunk = next(Trace(Header(registers=(RegisterSet(cr0=1, cr3=0, cr4=0, efer=0),)), [rows_of((Op.LOAD, 5, 0, 5))]).chunks())
    loop.load(chunk)
    loop.registers.drop_all()
    with pytest.raises(ValueError, match="registers of 0"):
        loop.run()
    loop.use(0, prepared)
    loop.run()
    assert (loop.verified, loop.mismatches) == (1, 0)
