"""Recorded traces in memory, translated as columns, against copying the same columns.

The recording that ships with kvmmu, in the longest stretch in which its guest writes no table; with KVMMU_LINUX_DATA (a
directory of recordings) the static phase of each of those too.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, ROUNDS

from kvmmu import Translation
from kvmmu.replay.replay import recording_vcpu
from kvmmu.traces import Recording
from kvmmu.traces.recording import bundled

FIELDS = ("gpa", "status")
ROWS = 1_000_000 if QUICK else 8_000_000


def recordings():
    """(name, directory, phase) of each recording."""
    found = [("the bundled recording", bundled(), "dyn")]
    data = os.environ.get("KVMMU_LINUX_DATA")
    if data:
        found += [(path.parent.name, path.parent, "static") for path in sorted(Path(data).glob("*/static_trace.npz*"))]
    return [pytest.param(*case, id=case[0]) for case in found]


def stretch(recording):
    """The first and the last row of the longest stretch without a write to a table."""
    edges = np.concatenate([[0], recording.writes.pos.astype(np.int64) + 1, [len(recording)]])
    longest = int(np.diff(edges).argmax())
    return int(edges[longest]), int(min(edges[longest + 1], edges[longest] + ROWS))


@pytest.mark.parametrize(("name", "path", "phase"), recordings())
def bench_trace(race, name, path, phase):
    """Columns gva, access and ctx in, gpa and status out; every address as recorded."""
    recording = Recording.open(path, phase)
    vcpu, regs = recording_vcpu(recording)
    vcpu.leave_nested()
    walk = vcpu.gva_walk
    contexts = walk.prepare(regs)
    start, stop = stretch(recording)
    past = recording.writes.pos < start
    for gpa, value in zip(recording.writes.gpa[past].tolist(), recording.writes.val[past].tolist(), strict=True):
        vcpu.mem.write_u64(gpa, value)
    columns = recording.columns(start, stop)
    gva, ctx, access = columns["gva"], columns["ctx"], recording.access_bytes(start, stop)
    out = Translation.empty(gva.size, FIELDS)
    copies = [np.empty_like(column) for column in (gva, access, ctx)]

    def translate():
        walk.translate(gva, access, regs=contexts, ctx=ctx, fields=FIELDS, out=out)

    def copy():
        for target, column in zip(copies, (gva, access, ctx), strict=True):
            np.copyto(target, column)

    def check():
        np.testing.assert_array_equal(columns["gpa"], out.gpa)
        assert not out.status.any()

    race("Traces", name, "copying the same columns", translate, copy, tuple, rows=gva.size, check=check,
         bars=[("at most", 3.0), ("rate", 400)], rounds=ROUNDS if gva.size < 2_000_000 else 3 if QUICK else 7)
