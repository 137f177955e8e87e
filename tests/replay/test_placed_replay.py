# SPDX-License-Identifier: Apache-2.0
"""Row groups that are replayed as their places: the same reports, whatever the layout, and rows that are judged one by one."""

import re
from dataclasses import replace

import numpy as np
import pytest
from toy_traces import LONG_MODE, OTHER, ROOT, header, memory_rows, rows_of, tables

import kvmmu
from kvmmu.tlb.hierarchy import TlbHierarchy, TlbLevel
from kvmmu.traces import Op, ParquetTrace, ParquetWriter, RegisterSet, Trace, TraceError
from kvmmu.traces._places import PlacedRows, find_places
from kvmmu.traces.parquet import LAYOUTS
from kvmmu.traces.stream import PlacedChunk

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")
from old_places import write_old_places

PAGES, TABLE = 64, ROOT + 0x3000
KINDS = np.array([[0, 0], [0, 4], [1, 2], [1, 6], [2, 16], [4, 0], [5, 2]], np.uint8)
HEADER = header(registers=tuple(RegisterSet(cr3=root, **LONG_MODE) for root in (ROOT, OTHER)),
                contexts=(RegisterSet(cr3=OTHER, **LONG_MODE), RegisterSet(cr3=ROOT, **LONG_MODE)))


def random_rows(rng, n, events):
    """Rows of two vCPUs on two sets of tables that writes change; some recorded addresses are wrong."""
    frames = {root: 0x100 + (root == OTHER) * 0x400 + np.arange(512) for root in (ROOT, OTHER)}
    current, rows = [ROOT, OTHER], []
    kinds, pages, offsets = rng.integers(0, len(KINDS), n), rng.integers(0, PAGES, n), rng.integers(0, 4096, n)
    vcpus, wrong = rng.integers(0, 2, n), rng.random(n) < 0.001
    at = set(rng.choice(n, events, replace=False).tolist())
    for row in range(n):
        vcpu = int(vcpus[row])
        if row in at and row % 3 == 0:
            number = int(rng.integers(0, 2))
            current[vcpu] = (OTHER, ROOT)[number]
            rows.append((Op.SET_REGS, 0, number, {"vcpu": vcpu}))
        elif row in at:
            page, frame = int(pages[row]), int(rng.integers(0x100, 0x900))
            frames[ROOT][page] = frame
            rows.append((Op.GUEST_WRITE, TABLE + 8 * page, frame << 12 | 7, {"vcpu": vcpu}))
        else:
            op, access = KINDS[kinds[row]].tolist()
            page, offset = int(pages[row]), int(offsets[row])
            gpa = (int(frames[current[vcpu]][page]) << 12) + offset
            rows.append((op, page << 12 | offset, access, gpa ^ 0x1000 * int(wrong[row]), {"vcpu": vcpu, "size": 1 + row % 8}))
    return rows_of(*rows)


def parts():
    """The set-up, groups of more rows than are walked at a time, without events and with them, and one of events of all kinds."""
    rng = np.random.default_rng(8)
    entries = tables() | tables(OTHER, 0x500)
    yield memory_rows(entries, regions=((0x1000, 0x20000),))
    for n, events in ((20_000, 0), (17_001, 40), (1, 0), (8_192, 3)):
        yield random_rows(rng, n, events)
        yield rows_of((Op.RESTART, 0))
    yield rows_of((Op.MOV_CR3, 0, ROOT), (Op.INVLPG, 0x3000), (Op.PAGE_FAULT, 1 << 40, 4), (Op.HOST_INVALIDATE, 0, 4096))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The trace in every layout, by name."""
    folder = tmp_path_factory.mktemp("placed")
    for layout in LAYOUTS:
        with ParquetWriter(folder / layout, HEADER, layout=layout) as writer:
            for part in parts():
                writer.write(part)
    (folder / "old").write_bytes((folder / "places").read_bytes())
    write_old_places(folder / "old")
    return {path.name: path for path in folder.iterdir()}


def found(report):
    """A report without what differs from run to run, with its examples."""
    told = {name: value for name, value in report.to_dict().items() if name not in ("seconds", "rate", "waited", "name")}
    return told | {"examples": [replace(example) for example in report.examples]}


@pytest.mark.parametrize("name", ["places", "plain", "old"])
def test_every_layout_gives_the_report_of_the_rows(files, name):
    """Counters, mismatches with their places, and those of TLBs."""
    expected = kvmmu.replay(Trace(HEADER, parts()))
    assert expected.mismatches > 20
    assert expected.table_writes > 20
    assert found(kvmmu.replay(files[name])) == found(expected)
    tlb = TlbHierarchy([TlbLevel("L1", 8, 2), TlbLevel("L2", 16, 2)])
    counted, wanted = kvmmu.replay(files[name], tlb=tlb), kvmmu.replay(Trace(HEADER, parts()), tlb=tlb)
    assert found(counted) == found(wanted)
    assert counted.tlb.hits.tolist() == wanted.tlb.hits.tolist()
    assert counted.tlb.walks.tolist() == wanted.tlb.walks.tolist()


def test_which_row_groups_stay_places(files):
    """All, with their events; not those of other layouts. Their columns are those of the chunks that others get."""
    trace = ParquetTrace(files["places"])
    chunks = list(trace._chunks_from(0, placed=True))
    assert all(type(chunk) is PlacedChunk for chunk in chunks)
    assert not any(type(chunk) is PlacedChunk for name in ("plain", "old")
                   for chunk in ParquetTrace(files[name])._chunks_from(0, placed=True))
    for chunk, plain in zip(chunks, trace.chunks(), strict=True):
        assert (len(chunk), chunk.has_events, chunk.vcpus) == (len(plain), plain.has_events, plain.vcpus)
        for column in ("op", "addr", "access", "gpa", "vcpu", "size", "value"):
            here, there = getattr(chunk, column), getattr(plain, column)
            assert (here is None) == (there is None)
            assert here is None or (here == there).all()
        with pytest.raises(AttributeError, match="a PlacedChunk has no 'weather'"):
            chunk.weather  # noqa: B018


@pytest.mark.parametrize(("rows", "words"), [
    ({"op": 24, "value": 5, "size": 3}, "row 5: size is 3 (0x3); allowed is 1, 2, 4 or 8 bytes for a GUEST_WRITE"),
    ({"op": 25, "value": 2}, "row 5: value is 2 (0x2); allowed is below 2"),
    ({"op": 16, "value": 0, "access": 4}, "row 5: access is 4 (0x4); allowed is 0 in an event"),
    ({"op": 3}, "row 5: op is 3"), ({"access": 2}, "row 5: access is 2"), ({"gpa": 1 << 52}, "row 5: gpa is 4503599627370496"),
    ({"vcpu": 2}, "row 5: vcpu is 2 (0x2); allowed is below 2")])
def test_rows_that_break_the_format_are_told_by_number(rows, words, tmp_path, monkeypatch):
    """In a row group that is replayed, as in one that is read."""
    from kvmmu.traces import stream

    columns = rows_of(*[(Op.LOAD, 0x1000 * row, 0, 0x2000) for row in range(9)])
    for name, value in rows.items():
        columns[name][5] = value
    with monkeypatch.context() as lenient:              # written by somebody who does not check
        lenient.setattr(stream._RowCheck, "refuse", lambda *arguments: None)
        lenient.setattr(stream._RowCheck, "_judge_rows", lambda *arguments: None)
        with ParquetWriter(tmp_path / "bad.parquet", HEADER) as writer:
            writer.write(columns)
    for read in (lambda: list(ParquetTrace(tmp_path / "bad.parquet").chunks()), lambda: kvmmu.replay(tmp_path / "bad.parquet")):
        with pytest.raises(TraceError, match=re.escape(f"row group 0: {words}")):
            read()


def test_accesses_without_a_recorded_address_are_not_left_as_places(tmp_path):
    rows = rows_of(*[(Op.LOAD, 0x1000 * row, 0, 0x100000 + 0x1000 * row) for row in range(9)])
    rows["gpa"][4] = kvmmu.INVALID_GPA
    with ParquetWriter(tmp_path / "some.parquet", HEADER) as writer:
        writer.write(memory_rows(tables() | tables(OTHER), regions=((0x1000, 0x20000),)))
        writer.write(rows)
    report = kvmmu.replay(tmp_path / "some.parquet")
    assert (report.verified, report.unchecked, report.mismatches) == (8, 1, 0)


def test_placed_rows():
    """Rows come back from their places, and arrays that do not fit are refused."""
    rng, n = np.random.default_rng(2), 5000
    op, access = rng.integers(0, 34, n, np.uint8), rng.integers(0, 256, n, np.uint8)
    addr, gpa = rng.integers(0, 1 << 16, n, np.uint64), rng.integers(0, 1 << 16, n, np.uint64)
    gpa[rng.random(n) < 0.01] = kvmmu.INVALID_GPA
    place, *uses = find_places(op, addr, access, gpa)
    rows = PlacedRows(place, *uses)
    assert (len(rows), rows.all_known, rows.has_events, rows.legal) == (n, False, True, False)
    made = {"op": np.empty(n, np.uint8), "addr": np.empty(n, np.uint64), "access": np.empty(n, np.uint8),
            "gpa": np.empty(n, np.uint64)}
    rows.put(**made)
    for name, column in {"op": op, "addr": addr, "access": access, "gpa": gpa}.items():
        assert (made[name] == column).all()
    numbers, of_events, addr_of_events = rows.events()
    assert numbers.tolist() == np.flatnonzero(op >= 16).tolist()
    assert of_events.tolist() == op[op >= 16].tolist()
    assert addr_of_events.tolist() == addr[op >= 16].tolist()
    with pytest.raises(ValueError, match="gpa: want 5000 rows, got 4999"):
        rows.put(**made | {"gpa": made["gpa"][1:]})
    with pytest.raises(ValueError, match=f"page_access: want {uses[0].size} rows, got {uses[0].size - 1}"):
        PlacedRows(place, *uses[:3], uses[3][1:])
    with pytest.raises(ValueError, match=rf"of page {uses[0].size - 1}; allowed is one of the {uses[0].size - 1} pages"):
        PlacedRows(place, *(column[:-1] for column in uses))
    with pytest.raises(ValueError, match="op: want as many rows as addr has"):
        find_places(op[1:], addr, access, gpa)
