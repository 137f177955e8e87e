"""kvmmu.replay() of a recording: every access walked in order between the table writes, and held against the recording."""

import numpy as np
import pytest
from bench_traces import recordings
from conftest import QUICK

import kvmmu
from kvmmu.traces import Recording


@pytest.mark.parametrize(("name", "path", "phase"), recordings()[:1 if QUICK else None])
def bench_replay(race, name, path, phase):
    """All of it, from the recording in memory to the report, against copying its columns."""
    recording = Recording.open(path, phase)
    columns = [recording.pidx, recording.off, recording.kind, recording.priv]
    copies = [np.empty_like(column) for column in columns]
    reports = []

    def replay():
        reports.append(kvmmu.replay(recording))

    def copy():
        for target, column in zip(copies, columns, strict=True):
            np.copyto(target, column)

    def check():
        assert reports[-1].mismatches == 0
        assert reports[-1].verified == len(recording)

    race("Replay", name, "copying the recorded columns", replay, copy, tuple, rows=len(recording), check=check,
         rounds=2 if QUICK else 3)
