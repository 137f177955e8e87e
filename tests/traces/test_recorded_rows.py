# SPDX-License-Identifier: Apache-2.0
"""Recordings as rows of a trace: random small ones against a model that writes the rows one by one."""

from dataclasses import replace

import numpy as np
import pytest
from paths import DATA

from kvmmu.traces import Events, Faults, NptFaults, Op, Recording, Writes
from kvmmu.traces._recorded_rows import RecordedRows

NAMES = ("op", "addr", "access", "gpa", "size", "value")
LOADS = {1: (Op.MOV_CR3, 1), 2: (Op.MOV_CR4, 4), 4: (Op.MOV_CR0, 3)}        # code of a recorded load: event, column of ctx
INVLPG, WORLD_SWITCH = 3, 7
PGE = 1 << 7


class Model:
    """The rows of a recording, in order. Each number of an access is looked up in the columns by itself."""

    def __init__(self, recording):
        self.recording, self.rows = recording, []
        self.ctx = [tuple(row) for row in recording.ctx.tolist()]
        self.ctx_of = recording.pages_ctx[recording.pidx].tolist()
        self.regs = list(self.ctx[self.ctx_of[0] if self.ctx_of else 0])
        self.last = [next((number for number, ctx in enumerate(self.ctx) if ctx[0] == guest), None) for guest in (0, 1)]
        columns, access = recording.columns(), recording.access_bytes()
        for pos in range(len(recording) + 1):
            self.writes(pos)
            self.events(pos)
            if pos < len(recording):
                row = {name: int(column[pos]) for name, column in columns.items()}
                self.rows.append((row["kind"] | row["io"] << 2, row["gva"], int(access[pos]), row["gpa"], row["size"], 0))

    def at(self, columns, pos):
        """What these columns have at a position, without the position."""
        return [tuple(int(column[row]) for column in columns[1:]) for row in np.flatnonzero(columns[0] == pos)]

    def writes(self, pos):
        """A store takes effect behind its access."""
        for gpa, value in self.at(self.recording.writes, pos - 1):
            self.event(Op.GUEST_WRITE, gpa, value)

    def event(self, op, addr, value):
        self.rows.append((int(op), addr, 0, 0, 8, value))

    def events(self, pos):
        recording = self.recording
        following = self.ctx_of[pos] if pos < len(self.ctx_of) else None
        npt_faults = self.at(recording.npt_faults, pos)
        events = self.at(recording.events, pos)
        switches = [event for event in events if event[0] == WORLD_SWITCH] if pos else []
        for code, value, aux in events:
            if code == INVLPG:
                self.event(Op.INVLPG, value, 0)
            elif pos and code == WORLD_SWITCH:
                switches = switches[1:]
                if not switches and not value:              # a #NPF of L2 is taken before its #VMEXIT
                    npt_faults = self.npt_faults(npt_faults)
                self.switch(value, aux, following)
            elif pos and not any(event[0] == WORLD_SWITCH for event in events):
                op, column = LOADS[code]
                self.event(op, 0, value)
                self.regs[column] = value
        self.npt_faults(npt_faults)
        for cr2, error_code, ctx in self.at(recording.faults, pos):
            self.force(ctx)
            self.event(Op.PAGE_FAULT, cr2, error_code)
        if following is not None:
            self.force(following)

    def npt_faults(self, faults):
        for gpa, info in faults:
            self.event(Op.NPT_FAULT, gpa, info)
        return []

    def switch(self, enters, ncr3, following):
        """To the registers of the next access if they are of that side, else to those of last time."""
        number = self.last[bool(enters)]
        if following is not None and self.ctx[following][0] == enters:
            number = following
        elif enters:
            number = next((number for number, ctx in enumerate(self.ctx) if ctx[0] and ctx[2] == ncr3), number)
        if number is not None:
            self.event(Op.VMENTER if enters else Op.VMEXIT, 0, number)
            self.in_force(number)

    def force(self, number):
        mine, wanted = ([*regs[:4], regs[4] & ~PGE, regs[5]] for regs in (self.regs, self.ctx[number]))
        if mine != wanted:
            self.event(Op.SET_REGS, 0, number)
        self.in_force(number)

    def in_force(self, number):
        self.regs = list(self.ctx[number])
        self.last[self.ctx[number][0]] = number


def random_recording(rng, base):
    """A few accesses of a few pages, with events anywhere among them, before the first and behind the last."""
    n, pages = int(rng.choice([0, 1, 5, 40, 700])), int(rng.integers(1, 6))
    counts = [int(rng.integers(0, rng.choice([1, 3, 12, 40]))) for _ in range(4)]
    if not n:
        counts[1] = counts[3] = 0

    def places(count, last):
        return np.sort(rng.integers(0, max(last, 0) + 1, count)).astype(np.uint64)

    def words(count, top):
        return rng.integers(0, top, count).astype(np.uint64)
    pidx = rng.integers(0, pages, n)
    if rng.integers(2):
        pidx = np.sort(pidx)                            # few changes of the context
    events, faults, npt_faults, writes = counts
    return replace(
        base, pidx=pidx.astype(rng.choice([np.uint16, np.uint32])), off=rng.integers(0, 4096, n).astype(np.uint16),
        kind=rng.integers(0, 3, n).astype(np.uint8), size=rng.integers(1, 255, n).astype(np.uint8),
        priv=rng.integers(0, 3, n).astype(np.uint8), pages_gva=words(pages, 1 << 40) << np.uint64(12),
        pages_gpa=words(pages, 1 << 28) << np.uint64(12), pages_ctx=rng.integers(0, len(base.ctx), pages).astype(np.uint32),
        pages_io=rng.integers(0, 2, pages).astype(np.uint8),
        events=Events(places(events, n), rng.choice(np.array([1, 2, 3, 4, 7], np.uint8), events),
                      rng.choice(np.array([0, 1, 1, 0x1000, 0x80050033], np.uint64), events), rng.choice(base.ctx[:, 2], events)),
        faults=Faults(places(faults, n - 1), words(faults, 1 << 40), rng.integers(0, 32, faults).astype(np.uint32),
                      rng.integers(0, len(base.ctx), faults).astype(np.uint32)),
        npt_faults=NptFaults(places(npt_faults, n), words(npt_faults, 1 << 40), words(npt_faults, 32)),
        writes=Writes(places(writes, n - 1), words(writes, 1 << 20) << np.uint64(3), words(writes, 1 << 60)))


def rows_of(recording, most):
    """The rows as tuples, taken in pieces of so many."""
    rows, source = [], RecordedRows(recording, sizes=True)
    while (columns := source.columns(most)) is not None:
        assert 0 < len(columns["op"]) <= most
        value = columns.get("value", np.zeros(len(columns["op"]), np.uint64))
        rows += zip(*(columns.get(name, value).tolist() for name in NAMES), strict=True)
    return rows, source


@pytest.mark.parametrize("name", ["l4", "l5", "ndyn"])
@pytest.mark.parametrize("most", [1, 3, 256, 1 << 18])
def test_rows_are_those_of_the_model(name, most):
    base = Recording.open(DATA / "linux" / name)
    rng = np.random.default_rng((most, *name.encode()))
    for _ in range(40):
        recording = random_recording(rng, base)
        model = Model(recording)
        rows, source = rows_of(recording, most)
        assert rows == model.rows
        start = int(recording.pages_ctx[recording.pidx[0]]) if len(recording) else 0
        assert source.ends_elsewhere == (model.regs != list(model.ctx[start]))


@pytest.mark.parametrize(("change", "words"), [
    ({"off": np.zeros(1, np.uint16)}, r"off: want shape"), ({"kind": np.zeros(200_000, np.int8)}, "kind: is int8"),
    ({"pidx": np.zeros(200_000, np.int64)}, "pidx: is int64"), ({"pages_gpa": np.zeros(1, np.uint64)}, "pages_gpa: want shape"),
    ({"pages_ctx": 7}, "pages_ctx: 7 is beyond the last, 0"), ({"ctx": np.zeros((0, 6), np.uint64)}, "ctx: .* at least"),
    ({"ctx": np.zeros((1, 5), np.uint64)}, "ctx: .*6"), ({"priv": None}, "priv: is object")])
def test_columns_that_do_not_fit(change, words):
    """Whoever made the recording: no column is read beyond its end, or as another type."""
    base = Recording.open(DATA / "linux" / "l4")
    columns = {name: np.full_like(getattr(base, name), value) if isinstance(value, int) else value
               for name, value in change.items()}
    with pytest.raises(ValueError, match=words):
        RecordedRows(replace(base, **columns), sizes=True)


def test_numbers_beyond_their_range_stay_in_memory():
    """Pages and kinds that there are not, in columns that nobody checked: the rows are wrong, and rows all the same."""
    base = Recording.open(DATA / "linux" / "l4")
    events = [row[0] for row in rows_of(base, len(base))[0] if row[0] >= Op.MOV_CR3]
    for dtype in (np.uint16, np.uint32):
        wild = replace(base, pidx=np.full(len(base), np.iinfo(dtype).max, dtype), kind=np.full(len(base), 255, np.uint8),
                       priv=np.full(len(base), 255, np.uint8))
        columns = RecordedRows(wild).columns(len(base) + len(events))
        assert columns["op"][columns["op"] >= Op.MOV_CR3].tolist() == events
        assert len(columns["op"]) == len(base) + len(events)
        assert (columns["access"] & ~np.uint8(2 | 16 | 4 | 8) == 0).all()
