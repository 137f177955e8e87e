# SPDX-License-Identifier: Apache-2.0
"""Replay of bursts of table writes, as a guest makes that fills a table or clears it: every access against a scalar walk of the
tables as they are, and the whole report against that of the same trace in pieces.

Each page has an entry of its own here, so that a write concerns one translation. The pieces come from an INVLPG, which changes
nothing, on both sides of each write. KVMMU_EQUALITY_ROUNDS multiplies the number of traces.
"""

import os
from collections import Counter

import numpy as np
import pytest
from batch_machines import Image, second_tables
from builders import PAGE, PageTables
from machines import snapshot
from replay_counts import count_walk, op_of

import kvmmu
from kvmmu import CpuModel, Ept, Npt, Regs, Status, Vcpu
from kvmmu.traces import Header, Op, RegisterSet, Stage, Trace, TraceError

ROUNDS = int(os.environ.get("KVMMU_EQUALITY_ROUNDS", "1"))
CPU = {"maxphyaddr": 40}
UNRELATED, SPARE, READONLY, HOLE = 0xF0000, 0xA0000, 0xF8000, 0x3000000
DATA = 0x200000                         # up to 4 MiB, which a second stage maps, each page to itself
ACCESSED, DIRTY = 1 << 5, 1 << 6
ACCESSES = (0, 0, 0, 2, 2, 4, 6, 16)
FIELDS = ("gpa", "status", "error_code", "level")
COLUMNS = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "value": np.uint64}


class Guest:
    """Tables of a few pages, rows of a trace, and what a scalar walk says of each row."""

    def __init__(self, rng, mode="4l", kind=None, wrong=0.0):
        self.rng, self.mode, self.wrong, self.rows = rng, mode, wrong, []
        self.tables = PageTables(mode, base=0x10000)
        self.span = 1 << (22 if mode == "32" else 21)
        self.gvas = [(0x40 + region) * self.span + int(page) * PAGE for region in range(3) for page in rng.permutation(64)[:16]]
        for gva in self.gvas:
            self.tables.map(gva, self.frame(), str(rng.choice(["p w u", "p w u a d", "p w u a d", "p u a", "p w"])),
                            upper=str(rng.choice(["p w u a", "p w u"])))
        self.large = [(0x50 + region) * self.span + page * PAGE for region, page in ((0, 3), (1, 5), (1, 6))]
        for gva in self.large:
            self.tables.map(gva, 0, "p w u a d", level=2)
        pages = {int(gpa) >> 12: page for gpa, page in zip(*self.tables.pages(), strict=True)}
        pages |= {frame >> 12: np.zeros(512, np.uint64) for frame in (UNRELATED, SPARE, READONLY)}
        self.given = stage = None
        if kind is not None:
            host, root = second_tables(rng, kind, base=0xC0, cold=float(rng.choice([0, 0.3])))
            pages |= host
            ept = kind.startswith("ept")
            self.given = {"eptp": root << 12 | 0x5E} if ept else {"ncr3": root << 12, "cr4": 0x20, "efer": 0xD00}
            stage = Ept(**self.given) if ept else Npt(**self.given)
        self.image = Image(pages, readonly=frozenset([READONLY >> 12]))
        self.regs = Regs(**self.tables.regs())
        self.walk = self.vcpu().gva_walk
        self.context = self.walk.prepare([(self.regs, stage)])
        self.leaf = {gva: self.tables.entry_gpa(gva, 1) for gva in self.gvas} | {
            gva: self.tables.entry_gpa(gva, 2) for gva in self.large}
        self.upper = sorted({self.tables.entry_gpa(gva, 2) for gva in self.gvas})
        self.word = self.tables.entry_size
        self.sizes, self.faults, self.mismatches = Counter(), Counter(), 0

    def vcpu(self):
        return Vcpu(self.image.memory(), cpu=CpuModel(**CPU))

    def frame(self):
        return DATA + PAGE * int(self.rng.integers(512))

    def access(self, gva, access=None):
        """A row, with the address that the scalar walk says, with another one, or with none."""
        rng = self.rng
        access = int(rng.choice(ACCESSES)) if access is None else access
        gva += int(rng.integers(PAGE))
        t = self.walk.translate(np.array([gva], np.uint64), access, regs=self.context, fields=FIELDS)
        reached = int(t.gpa[0]) if t.status[0] == Status.OK else None
        if rng.random() < self.wrong:
            reached = (reached or 0) ^ 0x5000
            self.mismatches += 1
        else:
            if rng.random() < 0.1:
                reached = None
            count_walk(t, self.sizes, self.faults)
        self.rows.append((op_of(access), gva, access, 1, 0, reached))

    def write(self, gpa, value, size=None):
        """A row that stores the low bytes of a value."""
        size = self.word if size is None else size
        value &= (1 << 8 * size) - 1
        self.rows.append((Op.GUEST_WRITE, gpa, 0, size, value, None))
        self.walk.mem.write(gpa, value.to_bytes(size, "little"))

    def read(self, gpa):
        return int.from_bytes(self.walk.mem.read(gpa, self.word), "little")

    def change(self, gpa, moves=True):
        """Store another entry in place of one, or a part of it: another page, none, without a right, with A or D clear."""
        rng, entry = self.rng, self.read(gpa)
        values = [entry ^ 1, entry ^ 2, entry & ~ACCESSED, entry & ~(ACCESSED | DIRTY)]
        if moves:
            values += [entry & 0xFFF | self.frame() | 1, entry & 0xFFF | self.frame() | 0x27]
        size = int(rng.choice([s for s in (1, 2, 4, 8) if s <= self.word])) if rng.random() < 0.3 else self.word
        self.write(gpa, values[int(rng.integers(len(values)))], size)

    def replace(self, gva):
        """Put a table in place of a large page, or another large page in place of either."""
        entry = int(self.rng.choice([self.tables.tables()[-1], SPARE, 0x80, self.span | 0x80]))
        self.write(self.leaf[gva], entry | 0x67)

    def burst(self, hot):
        """Fill a spare table between accesses, put it in place of another one, and clear that."""
        rng = self.rng
        store = int(rng.choice(hot))
        upper = int(rng.choice(self.upper))
        old = self.read(upper) & ~0xFFF
        spare = SPARE if old != SPARE else self.tables.tables()[-1]
        for at in range(64):
            self.access(store)
            self.write(spare + self.word * at, self.read(old + self.word * at))
        if rng.random() < 0.3:
            return
        self.access(int(rng.choice(hot)))
        self.write(upper, self.read(upper) & 0xFFF | spare)
        for at in range(int(rng.integers(64))):
            self.access(store)
            self.write(old + self.word * at, 0)

    def go(self, n):
        """Make n rows or some more."""
        rng = self.rng
        while len(self.rows) < n:
            hot = rng.choice(self.gvas + self.large, int(rng.choice([2, 8, 30])))
            often, upper = float(rng.choice([0.02, 0.2, 0.6])), float(rng.choice([0, 0.1]))
            for _ in range(int(rng.integers(150))):
                gva = int(rng.choice(hot))
                if rng.random() < often:
                    kind = rng.random()
                    if kind < upper:
                        self.change(int(rng.choice(self.upper)), moves=False)
                    elif kind < 0.6:
                        self.write(UNRELATED + 8 * int(rng.integers(512)), int(rng.integers(1 << 62)), 8)
                    elif gva in self.large and rng.random() < 0.7:
                        self.replace(gva)
                    else:
                        self.change(self.leaf[gva])
                    if rng.random() < 0.5:
                        self.access(gva)
                else:
                    self.access(gva)
            if rng.random() < 0.3:
                self.burst(hot)

    def trace(self, rows):
        stage = None if self.given is None else Stage(**self.given)
        registers = RegisterSet(cr0=self.regs.cr0, cr3=self.regs.cr3, cr4=self.regs.cr4, efer=self.regs.efer, second_stage=stage)
        columns = {name: np.array([row[i] for row in rows], dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
        columns["gpa"] = np.ma.masked_array(np.array([row[5] or 0 for row in rows], np.uint64), [row[5] is None for row in rows])
        return Trace(Header(registers=(registers,), contexts=(registers,), cpu=CPU), [columns])

    def replayed(self, rows):
        """(report, memory, error) of a replay."""
        vcpu, report, error = self.vcpu(), None, None
        try:
            report = kvmmu.replay(self.trace(rows), vcpu)
        except TraceError as raised:
            error = str(raised).partition(": ")[2]      # the number of the row is another one
        return report, snapshot(vcpu.mem), error


def in_pieces(rows):
    """The rows, with an event that changes nothing on both sides of each write."""
    nothing = (Op.INVLPG, 0, 0, 0, 0, None)
    return [row for given in rows for row in ((nothing, given, nothing) if given[0] == Op.GUEST_WRITE else (given,))]


def counts(report):
    return (report.accesses, report.verified, report.unchecked, report.mismatches, report.table_writes, report.page_sizes,
            report.walk_faults, [str(example) for example in report.examples])


@pytest.mark.parametrize("mode", ["4l", "32"])
@pytest.mark.parametrize("kind", [None, "ept4", "4l"])
def test_bursts_of_writes(mode, kind):
    """Answers, counts and memory are those of the scalar walks, and those of the replay in pieces."""
    for seed in range(4 * ROUNDS):
        guest = Guest(np.random.default_rng((12, seed, len(mode), len(kind or ""))), mode, kind)
        guest.go(2500)
        report, memory, _ = guest.replayed(guest.rows)
        assert (report.mismatches, report.examples) == (0, []), f"seed {seed}"
        sizes = Counter({name.replace("4M", "2M"): count for name, count in report.page_sizes.items()})
        assert sizes == guest.sizes, f"seed {seed}"
        assert {name.split()[0]: count for name, count in report.walk_faults.items()} == dict(guest.faults), f"seed {seed}"
        assert memory == snapshot(guest.walk.mem), f"seed {seed}"
        pieces, in_pieces_memory, _ = guest.replayed(in_pieces(guest.rows))
        assert counts(report) == counts(pieces), f"seed {seed}"
        assert memory == in_pieces_memory


@pytest.mark.parametrize("wrong", [0.001, 0.02, 0.5])
def test_mismatches_among_writes(wrong):
    """Each is explained by the tables as they were before the next write, up to the last that is explained."""
    for seed in range(4 * ROUNDS):
        guest = Guest(np.random.default_rng((13, seed, int(wrong * 1000))), wrong=wrong)
        guest.go(1500)
        report, memory, _ = guest.replayed(guest.rows)
        assert report.mismatches == guest.mismatches, f"seed {seed}"
        pieces, in_pieces_memory, _ = guest.replayed(in_pieces(guest.rows))
        assert counts(report) == counts(pieces), f"seed {seed}"
        assert memory == in_pieces_memory == snapshot(guest.walk.mem), f"seed {seed}"


@pytest.mark.parametrize("gpa", [HOLE, READONLY])
def test_write_that_cannot_be_among_writes(gpa):
    """The rows before it take effect, in the tables as well; those behind it do not."""
    for seed in range(8 * ROUNDS):
        guest = Guest(np.random.default_rng((14, seed, gpa)))
        guest.go(600)
        memory = snapshot(guest.walk.mem)
        before = len(guest.rows)
        guest.go(700)
        rows = [*guest.rows[:before], (Op.GUEST_WRITE, gpa, 0, 8, 1, None), *guest.rows[before:]]
        report, left, error = guest.replayed(rows)
        assert report is None
        assert error.startswith(f"GUEST_WRITE: goes to gpa {gpa:#x}")
        assert left == memory, f"seed {seed}"
        assert guest.replayed(in_pieces(rows)) == (None, memory, error)
