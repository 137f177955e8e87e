# SPDX-License-Identifier: Apache-2.0
"""The trace format: what is written is read, and nothing but a whole and legal trace passes."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from toy_traces import CLIPS, header, machine, memory_rows, rows_of, tables

import kvmmu
from kvmmu import INVALID_GPA, Access, cli
from kvmmu.traces import Chunk, Header, Op, ParquetTrace, ParquetWriter, Recording, RegisterSet, Stage, Trace, TraceError, convert
from kvmmu.traces.header import checksum
from kvmmu.traces.parquet import LAYOUTS

pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")
pq = pytest.importorskip("pyarrow.parquet")
from old_places import write_old_places  # noqa: E402

DOCUMENT = ROOT / "docs" / "trace-format.md"
DTYPES = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "vcpu": np.uint16, "value": np.uint64,
          "gpa": np.uint64}
REGS = RegisterSet(cr0=0x80050033, cr3=0x1000, cr4=0x20, efer=0xD01)
WORDS = st.integers(0, 2**64 - 1)


# -- round trips --------------------------------------------------------------------------------------------------------

ASKED = {0: 0, 1: int(Access.WRITE), 2: int(Access.FETCH)}
ACCESS_ROWS = st.builds(
    lambda op, mmio, addr, extra, size, vcpu, gpa: {
        "op": op | mmio << 2, "addr": addr, "access": ASKED[op] | extra, "size": size, "vcpu": vcpu, "value": None, "gpa": gpa},
    st.integers(0, 2), st.integers(0, 1), WORDS, st.sampled_from([0, 4, 8, 32, 44]), st.integers(1, 255), st.integers(0, 2),
    st.one_of(st.none(), st.integers(0, 2**52 - 1)))


def event(op, addr=0, value=0, size=8):
    return {"op": int(op), "addr": addr, "access": 0, "size": size, "vcpu": 0, "value": value, "gpa": None}


EVENT_ROWS = st.one_of(
    st.builds(lambda op, value: event(op, 0, value),
              st.sampled_from([Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER]), WORDS),
    st.builds(lambda op, addr: event(op, addr), st.sampled_from([Op.INVLPG, Op.RESTART]), WORDS),
    st.builds(lambda size, slot, value: event(Op.GUEST_WRITE, slot * size, value & (1 << 8 * size) - 1, size),
              st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**40), WORDS),
    st.builds(lambda op, row: event(op, 0, row), st.sampled_from([Op.SET_REGS, Op.VMENTER, Op.VMEXIT]), st.integers(0, 1)),
    st.builds(lambda addr, code: event(Op.PAGE_FAULT, addr, code), WORDS, st.integers(0, 2**32 - 1)),
    st.builds(lambda op, value: event(op, 0, value), st.sampled_from([Op.WRPKRU, Op.WRMSR_PKRS]), st.integers(0, 2**32 - 1)),
    st.builds(lambda addr, info: event(Op.NPT_FAULT, addr, info), WORDS, WORDS),
    st.builds(lambda op, page, pages: event(op, page << 12, pages << 12), st.sampled_from([Op.MEMORY, Op.HOST_INVALIDATE]),
              st.integers(0, 2**39), st.integers(1, 2**39)),
    st.builds(lambda slot, value: event(Op.MEMORY_WORD, slot << 3, value), st.integers(0, 2**49 - 1), WORDS))


def columns_of(rows):
    """Columns of rows that say every one of them."""
    columns = {}
    for name, dtype in DTYPES.items():
        values = [row[name] for row in rows]
        column = np.array([0 if value is None else value for value in values], dtype)
        columns[name] = np.ma.masked_array(column, [value is None for value in values]) if name in ("value", "gpa") else column
    return columns


def many():
    """A header with three vCPUs and two register sets."""
    return Header(registers=(REGS,) * 3, contexts=(REGS, REGS))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(ACCESS_ROWS, EVENT_ROWS), max_size=40), st.integers(1, 40), st.sampled_from(["lz4", "zstd", "none"]),
       st.sampled_from([*LAYOUTS, "old places"]))
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows, part, compression, layout):
    """Every column of every kind of row, nulls included, in any division into writes; lean or not."""
    path = tmp_path_factory.mktemp("round") / "trace.parquet"
    with ParquetWriter(path, many(), compression=compression, layout=layout.removeprefix("old ")) as writer:
        for start in range(0, len(rows), part):
            writer.write(columns_of(rows[start:start + part]))
    if layout == "old places":
        write_old_places(path)
    for lean in (False, True):
        trace = ParquetTrace(path, lean=lean)
        chunks = list(trace.chunks())
        assert trace.rows == sum(map(len, chunks)) == len(rows)
        assert trace.header == replace(many(), accesses=sum(row["op"] < 16 for row in rows), rows=len(rows))
        at = 0
        for chunk in chunks:
            for row in range(len(chunk)):
                expected = rows[at]
                got = {name: int(getattr(chunk, name)[row]) for name in ("op", "addr", "access")}
                assert got == {name: expected[name] for name in got}
                is_event = expected["op"] >= 16
                if not is_event:
                    assert int(chunk.gpa[row]) == (INVALID_GPA if expected["gpa"] is None else expected["gpa"])
                if expected["op"] == Op.GUEST_WRITE or not lean:            # nothing depends on that of other events
                    assert int(chunk.size[row]) == expected["size"]
                if is_event:
                    assert int(chunk.value[row]) == expected["value"]
                assert int(chunk.vcpu[row]) == expected["vcpu"]
                at += 1
            assert chunk.all_known or any(row["gpa"] is None for row in rows)
            assert chunk.has_events == any(op >= 16 for op in chunk.op.tolist())


def written(path, addr, gpa, layout="places"):
    """A file of loads."""
    with ParquetWriter(path, Header(registers=(REGS,)), layout=layout) as writer:
        for first in range(0, len(addr), 1_000_000):
            part = slice(first, first + 1_000_000)
            writer.write(op=np.zeros(len(addr[part]), np.uint8), addr=addr[part], access=np.zeros(len(addr[part]), np.uint8),
                         gpa=gpa[part])
    return path


@pytest.mark.parametrize("pages", [1, 3000, 1 << 20, 1 << 30])
def test_addresses_in_either_layout(pages, tmp_path):
    """Few and many pages, more than one row group; pages with several frames, other offsets, none at all."""
    rng, n = np.random.default_rng(pages), 700_000
    addr = rng.integers(0, pages, n, np.uint64) << np.uint64(12) | rng.integers(0, 4096, n, np.uint64)
    gpa = (addr * np.uint64(77) & np.uint64((1 << 51) - 4096)) + (addr & np.uint64(4095))
    odd = rng.random(n)
    gpa[odd < 0.01] ^= np.uint64(1 << 51)
    gpa[odd < 0.001] ^= np.uint64(0xFFF)
    gpa[odd < 0.0001] = INVALID_GPA
    addr[:3], gpa[:3] = [5, 4095, 2**64 - 1], [4, 4094, 0]          # 1 less than the offset, or less than it by far
    for layout in LAYOUTS:
        chunks = list(ParquetTrace(written(tmp_path / layout, addr, gpa, layout)).chunks())
        assert (np.concatenate([chunk.addr for chunk in chunks]) == addr).all()
        assert (np.concatenate([chunk.gpa for chunk in chunks]) == gpa).all()
        assert not all(chunk.all_known for chunk in chunks)


OLD_PLACES = ROOT / "tests" / "data" / "formats" / "old-places.parquet"


def test_a_file_of_an_earlier_version():
    """As it was written when places were of the addresses alone: 1,000 loads, 200 stores, and two writes of tables."""
    table = pq.read_table(OLD_PLACES)
    assert table.schema.names == ["op", "place", "page", "frame", "access", "size", "vcpu", "value", "ip"]
    report = kvmmu.replay(OLD_PLACES)
    assert (report.accesses, report.table_writes, report.verified, report.complete) == (1200, 2, 1200, True)


def test_places_are_what_the_document_says(tmp_path):
    """Read by PyArrow and NumPy alone."""
    rng = np.random.default_rng(1)
    addr, op = rng.integers(0, 1 << 20, 10_000, np.uint64), rng.integers(0, 3, 10_000, np.uint8)
    access = np.array([4, 6, 20], np.uint8)[op] ^ rng.choice(np.array([0, 4], np.uint8), op.size)
    with ParquetWriter(tmp_path / "places", Header(registers=(REGS,))) as writer:
        writer.write(op=op, addr=addr, access=access, gpa=addr ^ np.uint64(1 << 30))
    table = pq.read_table(tmp_path / "places")
    assert table.schema.names == ["place", "page", "frame", "page_op", "page_access", "size", "vcpu", "value", "ip"]
    place, page, frame, page_op, page_access = (column.to_numpy() for column in table.columns[:5])
    assert (page[place >> 12] + (place & 4095) == addr).all()
    assert (frame[place >> 12] + (place & 4095) == addr ^ np.uint64(1 << 30)).all()
    assert (page_op[place >> 12] == op).all()
    assert (page_access[place >> 12] == access).all()
    plain = pq.read_table(written(tmp_path / "plain", addr, addr, "plain"))
    assert plain.schema.names == [*DTYPES, "ip"]
    assert (plain["addr"].to_numpy() == addr).all()
    with pytest.raises(ValueError, match="layout: want one of places, plain, got 'other'"):
        ParquetWriter(tmp_path / "x", many(), layout="other")


def changed(table, name, values):
    """A table with other values in a column; None: nulls."""
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), pa.field(name, field.type), pa.array(values, field.type))


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: changed(t, "place", np.full(len(t), 0xFFFFF000, np.uint32)),
     "row 0: place is 0xfffff000, of page 1048575; allowed is one of the 100 pages"),
    (lambda t: t.set_column(0, "place", pa.array(np.zeros(len(t), np.uint64))), "column 'place' is uint64; allowed is uint32"),
    (lambda t: changed(t, "place", [None] * len(t)), "100 nulls"),
    (lambda t: changed(t, "page", [None] * len(t)), "100 nulls"),
    (lambda t: changed(t, "page_access", [None] * len(t)), "100 nulls"),
    (lambda t: t.drop_columns(["frame"]), "column 'frame' is missing"),
    (lambda t: t.drop_columns(["page_op"]), "column 'page_op' is missing"),
    (lambda t: t.drop_columns(["page_access"]), "column 'page_access' is missing"),
    (lambda t: t.append_column("gpa", pa.array(np.zeros(len(t), np.uint64))), "column 'gpa' is there beside places"),
    (lambda t: t.append_column("op", pa.array(np.zeros(len(t), np.uint8))), "column 'op' is there beside places"),
    # what a use of a page says is judged in the rows that have it
    (lambda t: changed(t, "page_op", [0] * 7 + [3] * 93), "row group 0: row 7: op is 3"),
    (lambda t: changed(t, "page_op", [0] * 9 + [1] * 91), "row group 0: row 9: access is 0 (0x0); allowed is WRITE"),
    (lambda t: changed(t, "page_access", [0] * 5 + [64] * 95), "row group 0: row 5: access is 64"),
    (lambda t: changed(t, "page_op", [0] * 4 + [16] * 96), "row group 0: row 4: access is 4 (0x4); allowed is 0 in an event"),
    (lambda t: changed(t, "frame", [0] * 8 + [(1 << 52) - 4095] * 92), "row group 0: row 8: gpa is 4503599627370496"),
    (lambda t: changed(t, "size", [1] * 3 + [0] * 97), "row group 0: row 3: size is 0")])
def test_places_that_are_refused(change, words, tmp_path):
    addr = (np.arange(100, dtype=np.uint64) << np.uint64(12)) + np.uint64(4095)
    access = np.zeros(100, np.uint8)
    if "in an event" in words:
        access[:] = 4
    with ParquetWriter(tmp_path / "whole", Header(registers=(REGS,))) as writer:
        writer.write(op=np.zeros(100, np.uint8), addr=addr, access=access, gpa=np.full(100, 4095, np.uint64))
    table = pq.read_table(tmp_path / "whole")
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), tmp_path / "changed.parquet")
    with pytest.raises(TraceError, match=re.escape(words)):
        list(ParquetTrace(tmp_path / "changed.parquet", lean=False).chunks())


def test_uses_of_pages_that_no_row_has(tmp_path):
    """They are not judged: they may be nulls, no op, no address."""
    addr = np.arange(100, dtype=np.uint64) << np.uint64(12)
    table = pq.read_table(written(tmp_path / "whole", addr, addr))
    rows = np.arange(100)
    table = changed(table, "place", np.where(rows % 9 == 4, 30, rows % 9) << 12)
    table = changed(table, "page_op", np.where(rows == 4, 255, 0))
    table = changed(table, "page_access", [value if row < 31 else None for row, value in enumerate(np.where(rows == 4, 255, 0))])
    table = changed(table, "frame", np.where(rows == 4, np.uint64(INVALID_GPA), addr))
    pq.write_table(table, tmp_path / "other.parquet")
    chunk, = ParquetTrace(tmp_path / "other.parquet").chunks()
    assert (chunk.gpa >> np.uint64(12)).tolist() == np.where(rows % 9 == 4, 30, rows % 9).tolist()
    assert (chunk.has_events, chunk.all_known, chunk.op.any(), chunk.access.any()) == (False, True, False, False)


def test_row_groups_without_rows(tmp_path):
    """Those before the first row are passed over."""
    table = pq.read_table(written(tmp_path / "whole", np.arange(5, dtype=np.uint64), np.arange(5, dtype=np.uint64)))
    with pq.ParquetWriter(tmp_path / "gaps.parquet", table.schema) as writer:
        for part in (table[:0], table, table[:0]):
            writer.write_table(part)
    assert pq.ParquetFile(tmp_path / "gaps.parquet").num_row_groups == 3
    assert [len(chunk) for chunk in ParquetTrace(tmp_path / "gaps.parquet").chunks()] == [5, 0]


def test_a_row_group_too_large_for_places(tmp_path):
    n = (1 << 20) + 1
    table = pq.read_table(written(tmp_path / "whole", np.zeros(n, np.uint64), np.zeros(n, np.uint64)))
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=n)
    with pytest.raises(TraceError, match="row group 0: has 1,048,577 rows; allowed with places are 1,048,576"):
        list(ParquetTrace(tmp_path / "large.parquet").chunks())


REGISTER_SETS = st.builds(
    RegisterSet, cr0=WORDS, cr3=WORDS, cr4=WORDS, efer=WORDS, pkru=st.integers(0, 2**32 - 1),
    pkrs=st.integers(0, 2**32 - 1), pdptrs=st.one_of(st.none(), st.tuples(WORDS, WORDS, WORDS, WORDS)),
    second_stage=st.one_of(
        st.none(),
        st.builds(Stage, ncr3=WORDS, cr4=st.one_of(st.none(), WORDS), efer=st.none(), gmet=st.one_of(st.none(), st.booleans())),
        st.builds(Stage, eptp=WORDS, mbec=st.one_of(st.none(), st.booleans()), page_1g=st.one_of(st.none(), st.booleans()))))
HEADERS = st.builds(
    Header, registers=st.lists(REGISTER_SETS, min_size=1, max_size=3).map(tuple),
    contexts=st.lists(REGISTER_SETS, max_size=3).map(tuple),
    cpu=st.dictionaries(st.sampled_from(["vendor", "maxphyaddr", "gbpages"]), st.one_of(st.integers(), st.text(), st.booleans())),
    name=st.text(), phase=st.text(), mode=st.text(), source=st.text(), tables_at=st.sampled_from(["start", "end"]),
    pdpte_clear=WORDS,
    accesses=st.one_of(st.none(), st.integers(0, 2**63 - 1)), rows=st.one_of(st.none(), st.integers(0, 2**63 - 1)))


@given(HEADERS)
def test_headers_come_back_as_they_were_written(written):
    assert Header.from_json(written.to_json()) == written


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
                    max_leaves=10)


@given(HEADERS, st.data())
def test_a_header_with_anything_in_it_is_read_or_refused(written, data):
    """Any value in any place: a Header, or a TraceError that says so; never another exception."""
    plain = json.loads(written.to_json())
    target = plain
    while True:
        key = data.draw(st.sampled_from(sorted(target, key=str) if isinstance(target, dict) else list(range(len(target)))))
        if isinstance(target[key], (dict, list)) and target[key] and data.draw(st.booleans()):
            target = target[key]
            continue
        target[key] = data.draw(JSON)
        break
    try:
        Header.from_json(json.dumps(plain))
    except TraceError as error:
        assert str(error).startswith("header: ")


@pytest.mark.parametrize(("change", "words"), [
    ({"version": 2}, "version"), ({"version": None}, "version"), ({"registers": []}, "contexts: there are no registers"),
    ({"registers": None}, "registers: is a NoneType"), ({"registers": [], "contexts": [], "vcpus": 65537}, "vcpus: is 65537"),
    ({"registers": [], "contexts": [], "vcpus": "x"}, "vcpus"), ({"registers": [], "contexts": [], "vcpus": -1}, "vcpus"),
    ({"registers": [{}]}, r"registers\[0\].cr0"), ({"registers": 5}, "registers: is a int"), ({"tables_at": "now"}, "'now'"),
    ({"name": 7}, "name: is 7"), ({"cpu": []}, "cpu"), ({"pdpte_clear": -1}, "pdpte_clear"), ({"rows": -1}, "rows"),
    ({"contexts": [{"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0, "cr8": 0}]}, "'cr8' is no register"),
    ({"contexts": [{"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0, "second_stage": {}}]}, "either ncr3"),
    ({"contexts": [{"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0, "second_stage": {"ncr3": 0, "mbec": True}}]}, "mbec does not go"),
    ({"contexts": [{"cr0": "0x1g", "cr3": 0, "cr4": 0, "efer": 0}]}, "'0x1g'")])
def test_headers_that_are_refused(change, words):
    with pytest.raises(TraceError, match=words):
        Header.from_json(json.dumps(json.loads(many().to_json()) | change))


def test_headers_without_registers():
    """The key shall be there; how many processors there are is told beside it, or as many as there can be."""
    with pytest.raises(TraceError, match="header: registers: is missing"):
        Header.from_json('{"version": 1}')
    assert Header.from_json('{"version": 1, "registers": []}').vcpus == 65536
    made = Header(registers=(), vcpus=3)
    assert (Header.from_json(made.to_json()), json.loads(made.to_json())["vcpus"]) == (made, 3)
    assert "vcpus" not in json.loads(many().to_json())
    assert Header(registers=many().registers, vcpus=1).vcpus == len(many().registers) == 3


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_text_that_is_no_header(text):
    with pytest.raises(TraceError, match="header"):
        Header.from_json(text)


def test_what_a_later_version_adds_is_passed_over():
    assert Header.from_json(json.dumps(json.loads(many().to_json()) | {"weather": "fine"})) == many()


# -- rows that are refused ----------------------------------------------------------------------------------------------

def one_of(**row):
    """A trace of three rows whose middle one is `row`, on top of a load."""
    load = {"op": 0, "addr": 0x1000, "access": 0, "size": 8, "vcpu": 0, "value": None, "gpa": 0x2000}
    return [load, load | row, load]


@pytest.mark.parametrize(("row", "words"), [
    ({"op": 3}, "op is 3"), ({"op": 7}, "op is 7"), ({"op": 8}, "op is 8"), ({"op": 15}, "op is 15"),
    ({"op": 35, "value": 0}, "op is 35"), ({"op": 255, "value": 0}, "op is 255"),
    ({"access": 1}, "access is 1"), ({"access": 2}, "access is 2 .*stores alone"), ({"access": 16}, "access is 16"),
    ({"access": 64}, "access is 64"), ({"access": 128}, "access is 128"), ({"op": 1}, "access is 0"), ({"op": 2}, "access is 0"),
    ({"op": 1, "access": 18}, "access is 18"), ({"op": 6, "access": 2}, "access is 2"),
    ({"size": 0}, "size is 0"), ({"vcpu": 3}, "vcpu is 3 .*below 3"), ({"gpa": 1 << 52}, "gpa is .*2\\*\\*52"),
    ({"op": 16, "value": 0, "access": 4}, "access is 4 .*0 in an event"), ({"op": 16}, "op is 16 .*null"),
    ({"op": 24}, "op is 24 .*null"),
    ({"op": 24, "value": 0, "size": 3}, "size is 3"), ({"op": 24, "value": 0, "size": 16}, "size is 16"),
    ({"op": 24, "value": 0, "addr": 4}, "addr is 4 .*multiple"), ({"op": 24, "value": 256, "size": 1}, "value is 256"),
    ({"op": 25, "value": 2}, "value is 2 .*below 2"), ({"op": 26, "value": 1 << 63}, "value"),
    ({"op": 30, "value": 9}, "value is 9"),
    ({"op": 20, "value": 1 << 32}, "value"), ({"op": 34, "value": 1 << 32}, "value"), ({"op": 34}, "op is 34 .*null"),
    ({"op": 21, "value": 4}, "value is 4"), ({"op": 23, "value": 4}, "value is 4"),
    ({"op": 23, "value": 1 << 16}, "value"), ({"op": 27, "value": 1}, "value is 1 .*4096"),
    ({"op": 28, "value": 1 << 32}, "value"),
    ({"op": 32, "value": 0}, "value is 0 .*MEMORY"), ({"op": 32, "value": 4096, "addr": 8}, "addr is 8"),
    ({"op": 32, "value": 4096, "addr": 1 << 52}, "addr"), ({"op": 32, "value": 1 << 52, "addr": 4096}, "addr is 4096"),
    ({"op": 33, "value": 0, "addr": 4}, "addr is 4")])
def test_rows_that_are_refused(row, words, tmp_path):
    """By the checker, by the writer, which leaves no file, and by the reader: row, column, value and what is allowed."""
    columns = columns_of(one_of(**row))
    with pytest.raises(TraceError, match=f"row 101: {words}"):
        Chunk.checked(columns, many(), 100)
    with pytest.raises(TraceError, match="row 1: "), ParquetWriter(tmp_path / "bad.parquet", many()) as writer:
        writer.write(columns)
    assert list(tmp_path.iterdir()) == []
    write_raw(tmp_path / "raw.parquet", table_of(columns))
    with pytest.raises(TraceError, match=f"raw.parquet: row group 0: row 1: {words}"):
        list(ParquetTrace(tmp_path / "raw.parquet", lean=False).chunks())


def table_of(columns):
    """An Arrow table of columns, as others may write it."""
    arrays = {name: pa.array(np.asarray(column), mask=np.ma.getmaskarray(column)) for name, column in columns.items()}
    return pa.table(arrays)


def write_raw(path, table, text=None, **metadata):
    """A Parquet file by PyArrow itself, with a header of the format."""
    text = many().to_json() if text is None else text
    table = table.replace_schema_metadata({"kvmmu.trace": text} | metadata)
    pq.write_table(table, path)
    return path


PLAIN = {name: np.zeros(3, DTYPES[name]) for name in ("op", "addr", "access", "gpa")}


def test_a_file_of_somebody_else(tmp_path):
    """By PyArrow alone: columns in any order, some left out, one of their own; no totals, no checksum, one big row group."""
    zeros = pa.array([0] * 3, pa.uint8())
    table = pa.table({"mine": pa.array(["a", "b", "c"]), "gpa": pa.array([5, None, 7], pa.uint64()), "access": zeros,
                      "addr": pa.array([1, 2, 3], pa.uint64()), "op": zeros})
    chunk, = ParquetTrace(write_raw(tmp_path / "other.parquet", table)).chunks()
    assert (chunk.addr.tolist(), chunk.gpa.tolist(), chunk.all_known) == ([1, 2, 3], [5, INVALID_GPA, 7], False)


@pytest.mark.parametrize(("change", "words"), [
    ({"op": None}, "'op' is missing"), ({"addr": None}, "'addr' is missing"), ({"access": None}, "'access' is missing"),
    ({"addr": np.zeros(3, np.int64)}, "'addr' is int64; allowed is uint64"), ({"op": np.zeros(3)}, "'op' is double"),
    ({"gpa": np.zeros(3, np.uint32)}, "'gpa' is uint32"), ({"value": np.zeros(3, np.uint8)}, "'value' is uint8"),
    ({"op": np.ma.masked_array(np.zeros(3, np.uint8), [0, 1, 0])}, "'op' has 1 nulls"),
    ({"addr": np.ma.masked_array(np.zeros(3, np.uint64), [1, 1, 1])}, "'addr' has 3 nulls")])
def test_columns_that_are_refused(change, words, tmp_path):
    """In a file; the same columns as arrays and as Arrow batches too."""
    columns = {name: column for name, column in (PLAIN | change).items() if column is not None}
    with pytest.raises(TraceError, match=f"bad.parquet: .*{words}"):
        list(ParquetTrace(write_raw(tmp_path / "bad.parquet", table_of(columns))).chunks())
    for source in (columns, table_of(columns).to_batches()[0]):
        with pytest.raises(TraceError, match="column|is null"):
            kvmmu.replay([source], machine())


@pytest.mark.parametrize(("columns", "words"), [
    (PLAIN | {"addr": np.zeros(2, np.uint64)}, "2 rows, others have 3"), (PLAIN | {"addr": [0, 0, 0]}, "is list"),
    (PLAIN | {"addr": np.zeros((3, 1), np.uint64)}, r"\(3, 1\)"), (PLAIN | {"more": np.zeros(3, np.uint64)}, "'more' is unknown"),
    (PLAIN | {"addr": None}, "column 'addr' is None; allowed is a one-dimensional array of uint64"),
    ({}, "'op' is missing")])
def test_arrays_that_are_refused(columns, words):
    with pytest.raises(TraceError, match=words):
        Chunk.checked(columns, many())


@pytest.mark.parametrize("name", ["op", "addr", "access"])
def test_a_trace_without_a_column_is_refused_by_all_that_read_it(name):
    for source in ([PLAIN | {name: None}], [replace(Chunk.checked(PLAIN, many()), **{name: None})]):
        trace = Trace(Header(registers=()), source)
        for run in (lambda trace: kvmmu.replay(trace, pager=kvmmu.Pager()),
                    lambda trace: kvmmu.compare(trace, [kvmmu.Design(tlb="zen3")])):
            with pytest.raises(TraceError, match=f"column '{name}' is (None|missing); "):
                run(trace)


@pytest.mark.parametrize(("given", "words"), [
    ({"registers": 5}, "registers: want a tuple of RegisterSets, got int"), ({"registers": REGS}, "registers: .* RegisterSet"),
    ({"registers": (REGS, 5)}, r"registers\[1\]: want a RegisterSet, got int"),
    ({"registers": (REGS,), "contexts": 5}, "contexts: want a tuple of RegisterSets, got int"),
    ({"registers": (REGS,), "contexts": (None,)}, r"contexts\[0\]: want a RegisterSet, got NoneType"),
    ({"registers": (), "cpu": 5}, "cpu: want a mapping, got int"), ({"registers": (), "name": 5}, "name: want a string, got int"),
    ({"registers": (), "source": None}, "source: want a string, got NoneType"),
])
def test_headers_of_other_types(given, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        Header(**given)


def test_what_is_no_header(tmp_path):
    for make in (lambda: ParquetWriter(tmp_path / "a.parquet", 5), lambda: Trace(5, [])):
        with pytest.raises(TypeError, match="^header: want a Header, got int$"):
            make()
    assert list(tmp_path.iterdir()) == []
    assert Header(registers=[REGS]) == Header(registers=(REGS,))


def test_events_without_their_column_are_refused():
    """A value that is not there is null."""
    columns = {name: column for name, column in columns_of(one_of(op=16, value=0)).items() if name != "value"}
    with pytest.raises(TraceError, match="row 1: op is 16 .*null"):
        Chunk.checked(columns, many())


def test_strided_columns_are_taken():
    """A view with gaps is copied, not misread."""
    wide = np.arange(6, dtype=np.uint64)
    assert Chunk.checked(PLAIN | {"addr": wide[::2]}, many()).addr.tolist() == [0, 2, 4]


# -- files that are damaged ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small trace with events: three row groups."""
    path = tmp_path_factory.mktemp("whole") / "whole.parquet"
    addr = np.random.default_rng(1).integers(0, 1 << 21, 3000, np.uint64)
    with ParquetWriter(path, header()) as writer:
        writer.write(memory_rows(tables()))
        for part in np.array_split(addr, 2):
            zeros = np.zeros(part.size, np.uint8)
            writer.write(op=zeros, addr=part, access=zeros, gpa=part + np.uint64(0x100000))
    assert kvmmu.replay(path).verified == 3000
    return path.read_bytes()


def outcome(path):
    """(report, error) of a replay; anything but a Report or a TraceError is a failure of the test."""
    try:
        return kvmmu.replay(path), None
    except TraceError as error:
        assert str(error).startswith(str(path)) or "row " in str(error)
        return error.report, error


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(whole, share, tmp_path):
    """Parquet's directory is at the end; what is cut off has none, and nothing is half read."""
    path = tmp_path / "cut.parquet"
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(TraceError, match="not a whole Parquet file"):
        ParquetTrace(path)


def footer_at(content):
    """Where the footer of a Parquet file begins."""
    return len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_bit_of_the_data_is_found(whole, seed, tmp_path):
    """Page checksums: a flipped bit of a page is an error that names the row group; rows before it are in the report."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "flip.parquet"
    found = 0
    for _ in range(25):
        content = bytearray(whole)
        at = int(rng.integers(4, footer_at(whole)))
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        report, error = outcome(path)
        if error is None:                   # in the header of a page: a statistic, or a name of an encoding
            assert (report.verified, report.mismatches) == (3000, 0)
            continue
        found += 1
        assert "row group" in str(error)
        assert report is None or (report.verified in (0, 1500, 3000) and report.mismatches == 0)
    assert found > 15


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_footer_never_gets_past_as_something_else(whole, seed, tmp_path):
    """Bits, bytes and runs of the footer: refused, or replayed without a lie; never a crash or another exception."""
    rng = np.random.default_rng(100 + seed)
    path = tmp_path / "flip.parquet"
    refused = 0
    for _ in range(25):
        content = bytearray(whole)
        at = int(rng.integers(footer_at(whole), len(whole)))
        length = int(rng.choice([1, 1, 4, 64]))
        content[at:at + length] = rng.integers(0, 256, len(content[at:at + length]), np.uint8).tobytes()
        path.write_bytes(content)
        report, error = outcome(path)
        refused += error is not None
        assert error is not None or (report.verified, report.mismatches) == (3000, 0)
    assert refused > 3


def test_rows_before_the_damage_are_not_lost(whole, tmp_path, capsys):
    """The third row group is damaged: the report is about the second, and the command prints it before the message."""
    path = tmp_path / "late.parquet"
    content = bytearray(whole)
    offset = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(2).column(1)
    content[offset.data_page_offset + offset.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)
    report, error = outcome(path)
    assert (report.verified, report.accesses, report.complete) == (1500, 1500, False)
    assert "row group 2 (rows 2016 to 3516) is damaged" in str(error)
    status = cli.main(["replay", str(path), "--json"])
    out, err = capsys.readouterr()
    assert (status, json.loads(out)["verified"], err.startswith(f"kvmmu: {path}: row group 2")) == (2, 1500, True)


def test_the_checksum_of_the_header(tmp_path):
    """If it is there it must be right; it need not be there."""
    text = many().to_json()
    table = table_of(PLAIN)
    ParquetTrace(write_raw(tmp_path / "good.parquet", table, text, **{"kvmmu.trace.crc32": checksum(text.encode())}))
    with pytest.raises(TraceError, match="header is damaged"):
        ParquetTrace(write_raw(tmp_path / "bad.parquet", table, text, **{"kvmmu.trace.crc32": "00000000"}))


@pytest.mark.parametrize(("content", "words"), [(b"", "not a whole"), (b"PAR1", "not a whole"), (b"PAR1" * 9, "not a whole"),
                                                (b"x" * 4096, "not a whole")])
def test_files_that_are_no_parquet(content, words, tmp_path):
    (tmp_path / "no.parquet").write_bytes(content)
    with pytest.raises(TraceError, match=f"no.parquet: {words}"):
        ParquetTrace(tmp_path / "no.parquet")


def test_a_parquet_file_that_is_no_trace(tmp_path):
    pq.write_table(table_of(PLAIN), tmp_path / "other.parquet")
    with pytest.raises(TraceError, match=r"no trace: it has no metadata 'kvmmu.trace'"):
        ParquetTrace(tmp_path / "other.parquet")
    assert kvmmu.replay(tmp_path / "other.parquet").source == "parquet"


def test_a_header_that_counts_other_rows(tmp_path):
    write_raw(tmp_path / "short.parquet", table_of(PLAIN), replace(many(), rows=4).to_json())
    with pytest.raises(TraceError, match="has 3 rows, its header says 4"):
        ParquetTrace(tmp_path / "short.parquet")


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """A file of one row group: the same rows, in batches, with events and their columns."""
    from kvmmu.traces import parquet

    monkeypatch.setattr(parquet, "_WHOLE_GROUP", 100)
    monkeypatch.setattr(parquet, "ROW_GROUP", 64)
    loads = rows_of(*[(Op.LOAD, 8 * i, 0, 0x100000 + 8 * i) for i in range(1000)])
    columns = {name: np.concatenate([column, loads[name]]) for name, column in memory_rows(tables()).items()}
    write_raw(tmp_path / "one.parquet", table_of(columns), header().to_json())
    trace = ParquetTrace(tmp_path / "one.parquet")
    sizes = [len(chunk) for chunk in trace.chunks()]
    assert (sum(sizes), max(sizes)) == (1516, 64)
    assert kvmmu.replay(tmp_path / "one.parquet").verified == 1000


# -- the writer, the command, the document ------------------------------------------------------------------------------

def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    """The file is replaced when it is complete, not before."""
    path = tmp_path / "out.parquet"
    path.write_bytes(b"before")

    def stopped(done, total):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        convert(Recording.open(CLIPS / "l4"), path, progress=stopped)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.parquet", b"before")]
    with pytest.raises(ValueError, match="compression: .*'gzip'"):
        ParquetWriter(path, many(), compression="gzip")
    with pytest.raises(ValueError, match="repeat: want 1 to 0x100000000, got 0"):
        convert(Recording.open(CLIPS / "l4"), path, repeat=0)


def test_progress_of_a_conversion(tmp_path):
    calls = []
    convert(Recording.open(CLIPS / "l5"), tmp_path / "out.parquet", repeat=2, progress=lambda *call: calls.append(call))
    assert calls[-1] == (3_000_000, 3_000_000)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_convert_and_replay_by_the_command(tmp_path, capsys):
    out = tmp_path / "l4.parquet"
    assert cli.main(["convert", str(CLIPS / "l4"), str(out), "--repeat", "2", "--compression", "zstd"]) == 0
    text = capsys.readouterr().out
    assert text == f"{out}: 400,000 accesses, {out.stat().st_size:,} bytes\n"
    assert cli.main(["replay", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["mismatches"], report["phase"]) == (400_000, 0, "static")
    assert cli.main(["replay", str(out)]) == 0
    assert capsys.readouterr().out.startswith("l4.parquet: l4, static phase, mode 4l")


@pytest.mark.parametrize(("args", "words"), [
    (("convert",), "TRACE"), (("convert", "lost", "out.parquet"), "lost: no such recording"),
    (("convert", str(CLIPS / "l4"), "/lost/out.parquet"), "/lost/"),
    (("convert", str(CLIPS / "l4"), "o", "--repeat", "0"), "'0'"), (("convert", str(CLIPS / "l4"), "o", "--repeat", "x"), "'x'"),
    (("convert", str(CLIPS / "l4"), "o", "--compression", "gz"), "'gz'"),
    (("convert", str(CLIPS / "l4"), "o", "--phase", "dyn"), "no phase 'dyn'"),
    (("replay", "lost.parquet"), "lost.parquet: no such trace"),
    (("replay", "lost.parquet", "--phase", "dyn"), "--phase dyn")])
def test_bad_arguments_of_the_command(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(list(args))
    except SystemExit as leave:
        status = leave.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_extra_is_named(tmp_path):
    """The package and its command work; only Parquet files ask for the extra."""
    program = "import sys; sys.modules['pyarrow'] = None; from kvmmu.cli import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "x.parquet").write_bytes(b"PAR1")

    def command(*args):
        return subprocess.run([sys.executable, "-P", "-c", program, *args], text=True, capture_output=True, check=False,
                              env={"PYTHONPATH": str(Path(kvmmu.__file__).parents[1])})
    assert command("replay", str(CLIPS / "l4"), "--json").returncode == 0
    for args in (("replay", str(tmp_path / "x.parquet")), ("convert", str(CLIPS / "l4"), str(tmp_path / "y.parquet"))):
        done = command(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert "kvmmu[arrow]" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_the_document_has_every_op_and_every_column():
    """Numbers, names and types of docs/trace-format.md are those of the code."""
    text = DOCUMENT.read_text()
    numbered = [line for line in text.splitlines() if line.startswith("| ") and line[2:4].strip().isdigit()]
    rows = dict(line.strip("| ").split(" | ")[1::-1] for line in numbered)
    assert {name.strip("`"): int(number) for name, number in rows.items()} == {op.name: int(op) for op in Op}
    for name, dtype in DTYPES.items():
        assert f"| `{name}` | {np.dtype(dtype).name} |" in text


def test_a_trace_of_chunks_is_taken_once():
    """The header's checks hold for chunks of a program as well."""
    with pytest.raises(TraceError, match="vcpu is 1 .*below 1"):
        kvmmu.replay(Trace(header(), [memory_rows(tables()), rows_of((Op.LOAD, 0, 0, 0x100000, {"vcpu": 1}))]))


def test_checking_leaves_the_callers_arrays_alone():
    """Masks, values and their order; a masked gpa may come before op."""
    columns = columns_of([*one_of(op=16, value=1), *one_of(gpa=None)])
    columns = {name: columns[name] for name in reversed(columns)}
    before = {name: (np.ma.getmaskarray(column).copy(), np.asarray(column).copy()) for name, column in columns.items()}
    chunk = Chunk.checked(columns, many())
    assert chunk.gpa.tolist()[3:] == [0x2000, INVALID_GPA, 0x2000]
    for name, (mask, values) in before.items():
        np.testing.assert_array_equal(np.ma.getmaskarray(columns[name]), mask)
        np.testing.assert_array_equal(np.asarray(columns[name]), values)


def test_slices_of_arrow_arrays():
    """A record batch that begins inside its buffers: bits and values from there on."""
    table = table_of(columns_of([row for number in range(30) for row in one_of(addr=number, gpa=number if number % 3 else None)]))
    whole_batch = table.to_batches()[0]
    for start in (0, 1, 7, 8, 13, 40):
        chunk = next(Trace(many(), [whole_batch.slice(start, 37)]).chunks())
        assert chunk.addr.tolist() == table["addr"].to_pylist()[start:start + 37]
        assert chunk.gpa.tolist() == [INVALID_GPA if gpa is None else gpa for gpa in table["gpa"].to_pylist()[start:start + 37]]
