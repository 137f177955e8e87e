# SPDX-License-Identifier: Apache-2.0
"""The arrays that readers fill: those that nobody holds are filled again, others never."""

import weakref

import format_files as files
import numpy as np
import pytest

from kvmmu.traces._binary import Drmemtrace, Threads, champsim
from kvmmu.traces._sink import Sink
from kvmmu.traces.opening import open_trace

RECORDS = 60_000                    # of instructions: two chunks of each reading of a block


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sink") / "a.champsimtrace"
    path.write_bytes(files.champsim_file(RECORDS // 10)[0] * 100)
    return path


def holders():
    """Ways to hold a column, and how to look at what is held."""
    return {"array": lambda a: a, "view": lambda a: a[5:9], "view of a view": lambda a: a[3:].view(np.uint8)[::7],
            "memoryview": memoryview, "reshaped": lambda a: a[:100].reshape(10, 10)}


@pytest.mark.parametrize("how", holders())
@pytest.mark.parametrize("column", ["op", "addr", "access", "ip"])
def test_what_is_held_stays(path, column, how):
    """Whoever holds any part of a column, in whatever way, has it unchanged at the end."""
    held = []
    for columns in open_trace(path, "champsim").columns():
        part = holders()[how](columns[column])
        held.append((part, np.array(part)))
    assert len(held) > 5
    assert all(np.array_equal(part, copy) for part, copy in held)


def test_arrays_are_filled_again(path):
    """A reading that drops its chunks takes a few sets of arrays, however many chunks there are."""
    chunks = open_trace(path, "champsim").columns()
    bases = [weakref.ref(columns["addr"].base) for columns, _ in zip(chunks, range(8), strict=False)]
    assert 8 == len(bases)
    assert all(base() is not None for base in bases)
    assert len({id(base()) for base in bases}) < 5
    chunks.close()


def test_a_sink_alone():
    """Rows that are taken one sink's chunk after the other, all of them held: as many sets of arrays as there are chunks."""
    data, rows = files.champsim_file(300)
    sink, taken, position = Sink(size=False, rows=100), [], 0
    while position < len(data):
        position = champsim(data, position, sink)
        taken.append(sink.take())
    assert len(taken) > 4
    assert [row["addr"] for row in rows] == np.concatenate([columns["addr"] for columns in taken]).tolist()
    assert len({columns["addr"].ctypes.data for columns in taken}) == len(taken)


@pytest.mark.parametrize("columns", [{}, {"vcpu": True}, {"gpa": True}, {"vcpu": True, "gpa": True, "value": True}])
def test_drmemtrace_into_any_columns(columns):
    """Columns that a sink does not have are left out."""
    data, rows = files.drmemtrace_file(instructions=200)
    sink = Sink(**columns)
    position, _, reason = Drmemtrace(Threads()).run(data, 0, sink)
    assert (len(data), None) == (position, reason)
    found = sink.take()
    for name in ("op", "addr", "size", "access"):
        assert [row[name] for row in rows] == found[name].tolist(), name
