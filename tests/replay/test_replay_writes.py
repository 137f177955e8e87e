# SPDX-License-Identifier: Apache-2.0
"""Replay of accesses between which page tables are written: every access against a fresh scalar walk of the tables as they are.

Replay keeps what it remembers of a batch until a word that counts is written.  Here words of all levels, of both stages and of
nothing at all are written, among accesses that stay on the same pages.  KVMMU_EQUALITY_ROUNDS multiplies the number of traces.
"""

import os
from collections import Counter

import numpy as np
import pytest
from batch_machines import GUEST_FRAMES, Image, dense_tables, mutated, random_controls, random_rows, second_tables
from builders import LEVELS, index_of
from machines import ACCESSES, snapshot
from replay_counts import count_walk, op_of

import kvmmu
from kvmmu import CpuModel, Ept, Npt, Status, Vcpu
from kvmmu.traces import Header, Op, RegisterSet, Stage, Trace

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")

ROUNDS = int(os.environ.get("KVMMU_EQUALITY_ROUNDS", "1"))
MODES = ("32", "pae", "4l", "5l")
UNRELATED = 0xF0
CPU = {"maxphyaddr": 40}


class World:
    """Tables, registers of some vCPUs and contexts, and rows of a trace with what a scalar walk of each says."""

    def __init__(self, rng, kind, vcpus):
        self.rng, self.pages, self.sets, self.modes, self.guests = rng, {UNRELATED: np.zeros(512, np.uint64)}, [], [], []
        stage, self.host = None, {}
        if kind is not None:
            odd, cold = float(rng.choice([0, 0.01])), float(rng.choice([0, 0.2]))
            self.host, root = second_tables(rng, kind, base=0xC0, odd=odd, cold=cold)
            self.pages |= self.host
            stage = {"eptp": root << 12 | 0x5E | (0x40 if rng.integers(2) else 0), "mbec": bool(rng.integers(2))}
            if not kind.startswith("ept"):
                stage = {"ncr3": root << 12, "cr4": 0x20, "efer": 0xD00, "gmet": bool(rng.integers(2))}
        for number in range(3):
            mode = str(rng.choice(MODES))
            pages, root = dense_tables(rng, mode, base=0x10 + 0x20 * number, odd=0.01, upper_odd=0.005, leaves=4,
                                       cold=float(rng.choice([0, 0.3])), frames=GUEST_FRAMES)
            self.pages |= pages
            self.guests.append(pages)
            self.modes.append(mode)
            regs = random_controls(rng, mode, root, pages)
            self.sets.append((regs, stage if number != 1 else None))
        self.vcpus = vcpus
        self.current = [int(rng.integers(3)) for _ in range(vcpus)]
        self.start = list(self.current)
        self.machine = Vcpu(Image(self.pages).memory(), cpu=CpuModel(**CPU))
        self.walk = self.machine.gva_walk
        self.contexts = [self.walk.prepare([(regs, self.stage_of(given))]) for regs, given in self.sets]
        self.rows, self.sizes, self.faults = [], Counter(), Counter()
        self.writes = 0

    @staticmethod
    def stage_of(given):
        if given is None:
            return None
        return Ept(**given) if "eptp" in given else Npt(**given)

    def header(self):
        sets = tuple(RegisterSet(cr0=r.cr0, cr3=r.cr3, cr4=r.cr4, efer=r.efer, pkru=r.pkru, pdptrs=r.pdptrs,
                                 second_stage=None if given is None else Stage(**given)) for r, given in self.sets)
        return Header(registers=tuple(sets[number] for number in self.start), contexts=sets, cpu=CPU)

    def access(self, vcpu, gva, access):
        """A row, and what the scalar walk says."""
        t = self.walk.translate(np.array([gva], np.uint64), access, regs=self.contexts[self.current[vcpu]],
                                fields=("gpa", "status", "error_code", "level"))
        known = t.status[0] == Status.OK and self.rng.random() < 0.8
        self.rows.append((op_of(access), gva, access, 1, vcpu, 0, int(t.gpa[0]) if known else None))
        count_walk(t, self.sizes, self.faults)

    def write(self, gva):
        """Store into a table: most often an entry that a recent walk used or might have."""
        rng, choice = self.rng, self.rng.random()
        number = int(rng.integers(3))
        mode, pages = self.modes[number], self.guests[number]
        if choice < 0.2:
            frame, at, narrow = UNRELATED, int(rng.integers(512)), False
        elif choice < 0.45 and self.host:
            frame, at, narrow = int(rng.choice(list(self.host))), int(rng.integers(64)), False
        else:
            level = int(rng.integers(1, LEVELS[mode] + 1))
            frame, at, narrow = int(rng.choice(list(pages))), index_of(gva, level, mode), mode == "32"
            at >>= narrow
        words = np.frombuffer(self.walk.mem.read(frame << 12, 4096), np.uint32 if narrow else np.uint64)
        entry = words[at << narrow:(at << narrow) + 1].astype(np.uint64)
        if rng.random() < 0.5:
            entry[0] = words[int(rng.integers(words.size))]
        elif frame not in self.host:
            mutated(rng, entry, 2, mode, list(pages), 40, 0.9)
        else:
            entry ^= np.uint64(1) << np.uint64(rng.integers(0, 3))
        size = 4 if narrow else 8
        gpa, value = (frame << 12) + size * (at << narrow), int(entry[0])
        if rng.random() < 0.3:                      # a part of it
            size = int(rng.choice([1, 2, 4]))
            part = int(rng.integers(0, (4 if narrow else 8) // size))
            gpa, value = gpa + part * size, value >> 8 * part * size & (1 << 8 * size) - 1
        self.rows.append((Op.GUEST_WRITE, gpa, 0, size, 0, value, None))
        self.walk.mem.write(gpa, value.to_bytes(size, "little"))
        self.writes += 1

    def switch(self, vcpu):
        self.current[vcpu] = int(self.rng.integers(3))
        self.rows.append((Op.SET_REGS, 0, 0, 8, vcpu, self.current[vcpu], None))

    def chunks(self):
        names = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "vcpu": np.uint16, "value": np.uint64}
        columns = {name: np.array([row[i] for row in self.rows], dtype) for i, (name, dtype) in enumerate(names.items())}
        unknown = [row[6] is None for row in self.rows]
        columns["gpa"] = np.ma.masked_array(np.array([row[6] or 0 for row in self.rows], np.uint64), unknown)
        cuts = np.sort(self.rng.integers(0, len(self.rows), 3))
        return [dict(zip(columns, parts, strict=True))
                for parts in zip(*(np.split(column, cuts) for column in columns.values()), strict=True)]


@pytest.mark.parametrize("kind", [None, "ept4", "ept5", "4l"])
@pytest.mark.parametrize("often", [0.002, 0.02, 0.3])
def test_tables_written_between_accesses(kind, often):
    """Answers, counts and memory of the replay are those of the scalar walks."""
    for seed in range(ROUNDS):
        rng = np.random.default_rng((11, seed, int(often * 1000), 0 if kind is None else len(kind) + ord(kind[-1])))
        world = World(rng, kind, int(rng.choice([1, 2])))
        twin = Vcpu(Image(world.pages).memory(), cpu=CpuModel(**CPU))
        n = 2000
        pools = [random_rows(rng, n, mode, pages=int(rng.choice([2, 20, 150])), stray=0.005, regions=3) for mode in world.modes]
        accesses = rng.choice(np.array(ACCESSES[:16] if rng.integers(2) else ACCESSES[:1], np.uint8), n)
        vcpu = 0
        for row in range(n):
            if rng.random() < 0.02:
                vcpu = int(rng.integers(world.vcpus))
            gva = int(pools[world.current[vcpu]][row])
            if rng.random() < often:
                world.write(gva)
            elif rng.random() < often / 10:
                world.switch(vcpu)
            world.access(vcpu, gva, int(accesses[row]))
        report = kvmmu.replay(Trace(world.header(), world.chunks()), twin)
        assert (report.accesses, report.mismatches, report.examples) == (n, 0, []), f"seed {seed}"
        sizes = Counter({name.replace("4M", "2M"): count for name, count in report.page_sizes.items()})
        assert sizes == world.sizes, f"seed {seed}"
        assert {name.split()[0]: count for name, count in report.walk_faults.items()} == dict(world.faults), f"seed {seed}"
        assert report.table_writes == world.writes
        assert snapshot(twin.mem) == snapshot(world.walk.mem), f"seed {seed}"
