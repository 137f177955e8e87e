# SPDX-License-Identifier: Apache-2.0
"""Replay of traces that bring no page tables, on tables made for them: counts against plain Python, walks against translate()."""

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_traces import MODES, accesses_of, trace_of
from paths import DATA

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, Pager, PageTables, Vcpu, cli
from kvmmu.replay import synthetic
from kvmmu.replay.checkpoint import Checkpoints
from kvmmu.replay.result import ReplayInterrupted, SyntheticReport
from kvmmu.tables import PageSet
from kvmmu.traces import Header, Op, ParquetTrace, ParquetWriter, RegisterSet, Trace, TraceError, bundled, convert, open_trace
from kvmmu.traces.foreign import Brings, ForeignTrace

L4 = DATA / "linux" / "l4"
CASES = [(mode, page) for mode, (_, _, pages) in MODES.items() for page in pages]
NAMES = {12: "4K", 21: "2M", 22: "4M", 30: "1G"}


def pages_of(addr, size, shift):
    """Page numbers, in plain Python."""
    found = set()
    for first, count in zip(addr.tolist(), size.tolist(), strict=True):
        found |= {first >> shift, (first + count - 1) % (1 << 64) >> shift}
    return found


def lackey_rows(text):
    """(kind, address, size) of the accesses of a lackey trace, an M as a load and a store."""
    for line in text.splitlines():
        if line[:3] in ("I  ", " L ", " S ", " M "):
            where, count = line[3:].split(",")
            for kind in {"I": ("fetch",), "L": ("load",), "S": ("store",), "M": ("load", "store")}[line[:2].strip()]:
                yield kind, int(where, 16), int(count)


@pytest.fixture(scope="module")
def sample():
    """The bundled trace, read by plain Python."""
    return list(lackey_rows(lzma.decompress(bundled("lackey").read_bytes()).decode()))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("page", ["4k", "2m", "1g"])
def test_the_bundled_trace_of_a_program(sample, page, paged):
    """Accesses, kinds, pages and references of the file, counted by hand."""
    shift = MODES["4l"][2][page]
    addr, size = (np.array(column, np.uint64) for column in list(zip(*sample, strict=True))[1:])
    report = kvmmu.replay(bundled("lackey"), pager=Pager(page)) if paged else kvmmu.replay(bundled("lackey"), page=page)
    pages = pages_of(addr, size, shift)
    crossings = int(np.count_nonzero(addr >> np.uint64(shift) != addr + size - np.uint64(1) >> np.uint64(shift)))
    assert isinstance(report, SyntheticReport)
    assert report.accesses == len(sample) > 800_000
    assert report.kinds == {kind: sum(row[0] == kind for row in sample) for kind in ("load", "store", "fetch")}
    assert (report.pages_touched, report.mapped_bytes) == (len(pages), len(pages) << shift)
    assert report.mapped == {NAMES[shift]: len(pages)}
    assert report.touched_bytes == 4096 * len(pages_of(addr, size, 12))
    assert (report.crossings, report.walks) == (crossings, len(sample) + crossings)
    assert report.refs == report.walks * {"4k": 4, "2m": 3, "1g": 2}[page]
    assert report.page_sizes == {NAMES[shift]: len(sample)}
    assert report.first_touch_faults == (len(pages) if paged else None)
    assert report.walk_faults == {}
    assert report.skipped == {"lines": 25}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("frames", ["linear", "random"])
@pytest.mark.parametrize(("mode", "page"), CASES)
def test_every_mode_and_page(mode, page, frames, paged):
    """Pages, walks and references: by plain Python, and by translate() on tables for the same addresses."""
    addr, size, op = accesses_of(mode)
    shift = MODES[mode][2][page]
    given = {"pager": Pager(page, frames, mode=mode)} if paged else {"paging": mode, "page": page, "frames": frames}
    report = kvmmu.replay(trace_of(addr, size, op), **given)
    pages = pages_of(addr, size, shift)
    after = addr + size.astype(np.uint64) - np.uint64(1)
    crosses = addr >> np.uint64(shift) != after >> np.uint64(shift)
    assert crosses.sum() > 10
    assert (report.accesses, report.walk_faults, report.pages_touched) == (addr.size, {}, len(pages))
    assert (report.crossings, report.page_sizes) == (crosses.sum(), {NAMES[shift]: addr.size})
    assert report.kinds == dict(zip(("load", "store", "fetch"), np.bincount(op, minlength=3).tolist(), strict=True))
    assert report.first_touch_faults == (len(pages) if paged else None)
    tables = PageTables.for_addresses(None, np.concatenate([addr, after]), page, frames, mode=mode)
    vcpu = Vcpu(tables.mem, cpu=CpuModel(maxphyaddr=52), tdp="ept")
    vcpu.set_regs(tables.regs())
    t = vcpu.gva_walk.translate(np.concatenate([addr, after[crosses]]), fields=("status", "refs"))
    assert not t.status.any()
    assert (report.walks, report.refs) == (t.refs.size, int(t.refs.sum()))
    assert report.table_pages == len(tables.table_frames)
    assert report.to_dict()["refs"] == {"total": report.refs, "per_walk": report.refs / report.walks}
    assert (report.mode, report.page, report.frames) == (mode, page, frames)


def test_transparent_huge_pages():
    """2M where half of the 4K pages are touched; a crossing inside a 2M page is one walk, one between 4K pages is two."""
    dense = 0x7F0000000000 + 4096 * np.arange(256)
    sparse = 0x7F0000400000 + 4096 * np.arange(255)
    addr = np.concatenate([dense, sparse, [0x7F0000000FFF, 0x7F0000400FFF]])
    report = kvmmu.replay(trace_of(addr, np.full(addr.size, 2)), page="thp")
    assert (report.mapped, report.page_sizes) == ({"4K": 255, "2M": 1}, {"4K": 256, "2M": 257})
    assert (report.crossings, report.walks, report.refs) == (1, 514, 257 * 3 + 257 * 4)
    assert (report.pages_touched, report.mapped_bytes, report.touched_bytes) == (256, 255 * 4096 + (1 << 21), 511 * 4096)


@pytest.mark.parametrize("rows", [1, 7, 200, 4096])
def test_a_huge_page_replaces_small_ones_between_two_accesses(rows):
    """Walks before the promotion end in 4K pages, those behind it in a 2M page, wherever chunks are cut."""
    addr = np.concatenate([0x200000 * region + 4096 * np.arange(300) for region in range(1, 9)])
    pager = Pager("thp")
    report = kvmmu.replay(trace_of(addr, rows=rows), pager=pager)
    assert report.page_sizes == {"4K": 8 * 255, "2M": 8 * 45}
    assert report.refs == 8 * (255 * 4 + 45 * 3)
    assert (report.first_touch_faults, report.mapped, pager.promotions) == (8 * 256, {"2M": 8}, 8)


def test_promotions_and_frames_that_run_out_in_one_chunk():
    """The kernel asks for frames in the middle of rows, in front of a row that promotes."""
    rng = np.random.default_rng(11)
    addr = np.uint64(0x10000000) + rng.integers(0, 1 << 29, 200_000).astype(np.uint64)
    reports = [kvmmu.replay(trace_of(addr, rows=rows), pager=Pager("thp", thp_share=0.1)) for rows in (1 << 18, 999)]
    assert reports[0].page_sizes == reports[1].page_sizes
    assert reports[0].refs == reports[1].refs
    assert min(reports[0].page_sizes.values()) > 1000


def test_addresses_that_are_not_canonical():
    """They fault; an access that runs into them fails, too, and counts once. They are no pages."""
    for given in ({}, {"pager": Pager()}):
        report = kvmmu.replay(trace_of([0x1000, 0x800000000000, 0x7FFFFFFFFFFE, 0xFFFF7FFFFFFFFFFF, 0xFFFF800000000000],
                                       [1, 8, 8, 8, 1]), **given)
        assert report.walk_faults == {"NON_CANONICAL": 3}
        assert (report.accesses, report.page_sizes, report.pages_touched) == (5, {"4K": 2}, 3)
        assert (report.walks, report.refs, report.touched_bytes) == (3, 12, 3 * 4096)


@pytest.mark.parametrize(("mode", "last"), [("32", 0xFFFFFFFE), ("pae", 0xFFFFFFFE), ("4l", 2**64 - 2), ("5l", 2**64 - 2)])
def test_the_last_page_is_followed_by_the_first(mode, last):
    for given in ({"paging": mode}, {"pager": Pager(mode=mode)}):
        report = kvmmu.replay(trace_of([last], [4]), **given)
        assert (report.walks, report.pages_touched, report.walk_faults, report.crossings) == (2, 2, {}, 1)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("mode", ["32", "pae"])
def test_addresses_that_a_mode_does_not_have(mode, paged):
    given = {"pager": Pager(mode=mode)} if paged else {"paging": mode}
    with pytest.raises(ValueError, match=f"mode '{mode}' has addresses of 32 bits, and row 65 of the trace accesses 0x1"):
        kvmmu.replay(trace_of([*range(65), 1 << 32]), **given)


def test_page_set_counts_both_pages():
    """The last address decides whether the same page is looked up again; a crossing changes it."""
    addr = np.array([0x1FFF, 0x1000, 0x2000, 0xFFF, 2**64 - 1], np.uint64)
    pages = PageSet()
    assert pages.add(addr, np.array([2, 1, 1, 1, 2], np.uint8)) == 4
    assert pages.pages().tolist() == [0, 1, 2, (1 << 52) - 1]
    assert pages.add(addr) == 0
    with pytest.raises(ValueError, match="size: 1 rows, addr has 5"):
        pages.add(addr, np.ones(1, np.uint8))


# ---- sources -----------------------------------------------------------------------------------------------------------

def test_a_converted_trace_gives_the_same_report(tmp_path, sample):
    """Sizes, ip and kinds survive; the header has no registers and one vCPU."""
    path = tmp_path / "sort.parquet"
    assert convert(open_trace(bundled("lackey")), path) == len(sample)
    trace = ParquetTrace(path, lean=False)
    assert (trace.header.registers, trace.header.vcpus, trace.header.source) == ((), 1, "lackey")
    chunk, columns = next(trace.chunks()), next(open_trace(bundled("lackey")).columns())
    n = min(len(chunk), len(columns["op"]))
    for name in ("op", "addr", "access", "size", "ip"):
        np.testing.assert_array_equal(getattr(chunk, name)[:n], columns[name][:n])
    assert chunk.ip[0] == chunk.addr[0] == sample[0][1]
    texts, parquets = (kvmmu.replay(source, page="2m").to_dict() for source in (bundled("lackey"), path))
    for name in texts.keys() - {"name", "seconds", "waited", "rate", "skipped"}:
        assert texts[name] == parquets[name]
    again = tmp_path / "again.parquet"
    assert convert(ParquetTrace(path), again, compression="zstd") == len(sample)
    assert kvmmu.replay(again).crossings == kvmmu.replay(path).crossings > 0
    assert next(ParquetTrace(again, lean=False).chunks()).ip[0] == sample[0][1]


def test_ip_that_is_not_known_is_null(tmp_path):
    with ParquetWriter(tmp_path / "t.parquet", Header(registers=())) as writer:
        writer.write(op=np.zeros(3, np.uint8), addr=np.arange(3, dtype=np.uint64), access=np.zeros(3, np.uint8),
                     ip=np.array([5, 0, 7], np.uint64), vcpu=np.array([0, 2, 0], np.uint16))
        writer.write(op=np.zeros(1, np.uint8), addr=np.zeros(1, np.uint64), access=np.zeros(1, np.uint8))
    trace = ParquetTrace(tmp_path / "t.parquet", lean=False)
    assert [chunk.ip.tolist() for chunk in trace.chunks()] == [[5, 0, 7], [0]]
    assert trace.header.vcpus == 3
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["ip"].to_pylist() == [5, None, 7, None]


def test_chunks_of_a_program_with_a_pager():
    """They are read once, so tables for all addresses cannot be made first."""
    columns = {"op": np.zeros(2, np.uint8), "addr": np.array([0, 0x5000], np.uint64), "access": np.zeros(2, np.uint8)}
    report = kvmmu.replay(iter([columns, columns]), pager=Pager())
    assert (report.accesses, report.first_touch_faults, report.source) == (4, 2, "")
    with pytest.raises(ValueError, match="vm: .*or a pager"):
        kvmmu.replay(iter([columns]))
    with pytest.raises(ValueError, match="vm: .*or a pager"):
        kvmmu.replay(iter([columns]), page="2m")
    with pytest.raises(ValueError, match="pager: the chunks of a Trace are read once"):
        kvmmu.replay(Trace(Header(registers=()), iter([columns])))


def test_on_a_vcpu():
    """With its registers and memory; recorded physical addresses are checked there, and nowhere else."""
    tables = PageTables(GuestMemory(1 << 20))
    tables.map(0x400000, 0x5000)
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    gpa = np.array([0x5123, 0x5FFF, 0x6000], np.uint64)
    trace = trace_of([0x400123, 0x400FFF, 0x400004], gpa=gpa, vcpu=np.zeros(3, np.uint16))
    report = kvmmu.replay(trace, vcpu)
    assert (report.verified, report.mismatches, report.name) == (2, 1, "made")
    assert kvmmu.replay(trace).unchecked == 3
    with pytest.raises(ValueError, match="vm: tables are made"):
        kvmmu.replay(trace, vcpu, page="4k")


@pytest.mark.parametrize(("given", "error", "words"), [
    ({"page": "8k"}, ValueError, "page: want"), ({"paging": "ept"}, ValueError, "paging: is 'ept'; allowed is 32, pae, 4l, 5l"),
    ({"frames": "any"}, ValueError, "frames: want"), ({"paging": "pae", "page": "1g"}, ValueError, "page: mode 'pae' has no 1G"),
    ({"pager": "4k"}, TypeError, "pager: want a Pager or None, got str"),
    ({"pager": True}, TypeError, "pager: want a Pager or None, got bool"),
    ({"pager": Pager(), "page": "4k"}, ValueError, "page: the pager says it; want None, got '4k'")])
def test_what_the_caller_may_ask_for(given, error, words):
    with pytest.raises(error, match=words):
        kvmmu.replay(bundled("lackey"), **given)


def test_a_trace_with_tables_of_its_own():
    header = Header(registers=(RegisterSet(0x11, 0, 0, 0),))
    for source in (L4, Trace(header, [])):
        with pytest.raises(ValueError, match="paging, page, frames, pager: the trace brings registers"):
            kvmmu.replay(source, pager=Pager())


def test_events_need_registers():
    op = np.array([0, Op.MOV_CR3], np.uint8)
    columns = {"op": op, "addr": np.zeros(2, np.uint64), "access": np.zeros(2, np.uint8), "value": np.zeros(2, np.uint64)}
    with pytest.raises(TraceError, match="row 3: MOV_CR3: the trace has events but no registers"):
        kvmmu.replay([columns | {"op": np.zeros(2, np.uint8)}, columns], pager=Pager())


@pytest.mark.parametrize("paged", [False, True])
def test_a_trace_that_takes_too_many_tables(monkeypatch, paged):
    monkeypatch.setenv("KVMMU_TRACE_MEMORY_LIMIT", "100000")
    spread = trace_of(np.arange(64, dtype=np.uint64) << np.uint64(39))
    with pytest.raises(TraceError, match=r"made: its page tables take [\d,]+ bytes; allowed are 100,000 .*_MEMORY_LIMIT"):
        kvmmu.replay(spread, pager=Pager() if paged else None)
    assert kvmmu.replay(trace_of(range(64))).accesses == 64


@pytest.mark.parametrize("paged", [False, True])
def test_a_damaged_trace_is_replayed_up_to_the_damage(tmp_path, paged):
    """The error has the report of the rows before, those that plain Python finds in the whole lines."""
    text = lzma.decompress(bundled("lackey").read_bytes())
    for share in (0.01, 0.3, 0.77):
        whole = text[:int(share * len(text))].rsplit(b"\n", 1)[0] + b"\n"
        (tmp_path / "cut.lackey").write_bytes(whole + b" L 1ff")
        with pytest.raises(TraceError, match=r"cut.lackey: line \d+ \(byte \d+\) is no row") as stop:
            kvmmu.replay(tmp_path / "cut.lackey", pager=Pager() if paged else None)
        rows = list(lackey_rows(whole.decode()))
        report = stop.value.report
        pages = pages_of(*(np.array(column, np.uint64) for column in list(zip(*rows, strict=True))[1:]), 12)
        assert (report.accesses, report.complete, report.pages_touched) == (len(rows), False, len(pages))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("reading", [1, 2])
def test_interrupted(monkeypatch, reading, paged):
    """Ctrl-C while the trace is read for its pages: no access is walked yet. Later: those that were."""
    begun = [0]

    def read(notes):
        begun[0] += 1
        for start in range(0, 5000, 1000):
            if start == 3000 and begun[0] == reading:
                raise KeyboardInterrupt
            yield {"op": np.zeros(1000, np.uint8), "addr": np.arange(start, start + 1000, dtype=np.uint64) << np.uint64(12),
                   "access": np.zeros(1000, np.uint8)}
    trace = ForeignTrace("test", Path("made"), read, Brings())
    if paged and reading == 2:
        assert kvmmu.replay(trace, pager=Pager()).accesses == 5000
        return
    with pytest.raises(ReplayInterrupted) as stop:
        kvmmu.replay(trace, pager=Pager() if paged else None)
    report = stop.value.report
    assert (report.complete, report.accesses) == (False, 3000 if paged or reading == 2 else 0)


def test_progress():
    calls = []
    kvmmu.replay(trace_of(range(300), rows=100), progress=lambda *call: calls.append(call))
    assert calls == [(100, 0), (200, 0), (300, 0), (100, 300), (200, 300), (300, 300)]


def test_supervisors_and_fetches_reach_every_page():
    """Tables grant every right, so that no access of a trace fails for one."""
    access = np.array([int(Access.FETCH), 0, int(Access.WRITE), int(Access.USER | Access.FETCH)], np.uint8)
    columns = {"op": np.array([2, 0, 1, 2], np.uint8), "addr": np.array([0x1000] * 4, np.uint64), "access": access}
    report = kvmmu.replay([columns], pager=Pager())
    assert (report.walk_faults, report.page_sizes) == ({}, {"4K": 4})


def test_rows_walk_in_both_pages_only_of_one_vcpu():
    """What the loop itself refuses."""
    trace = trace_of([0])
    run = synthetic.SyntheticRun(trace, synthetic.TablesToOrder(), None, None, Checkpoints(trace, {}))
    run._begin(PageTables.for_addresses(None, [0]))
    chunk = next(run._chunks(0))
    for bad in (replace(chunk, size=None), replace(chunk, all_known=True)):
        with pytest.raises(ValueError, match="walked in both pages"):
            run.loop.load(bad)
    for shifts in ([12] * 3, [12, 12, 21, 64], [12, 11, 21, 30]):
        with pytest.raises(ValueError, match="shifts"):
            run.loop.walk_both_pages(shifts)


# ---- the command -------------------------------------------------------------------------------------------------------

def run(capsys, *args):
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as leave:
        status = leave.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def test_the_command_replays_any_trace(capsys, sample):
    status, out, err = run(capsys, "replay", "bundled-lackey", "--page", "2m", "--pager", "--frames", "random", "--json")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert result.keys() >= {"accesses", "kinds", "pages_touched", "page_sizes", "first_touch_faults", "refs", "seconds",
                             "footprint"}
    assert (result["accesses"], result["page"], result["frames"]) == (len(sample), "2m", "random")
    assert result["first_touch_faults"] == result["pages_touched"] == result["footprint"]["mapped"]["2M"]
    status, out, err = run(capsys, "replay", "bundled-lackey", "--mode", "5l")
    assert (status, err) == (0, "")
    assert f"{5 * kvmmu.replay(bundled('lackey')).walks:,} in all" in out
    assert "5-level paging, 4k pages, linear frames" in out


def test_the_command_takes_columns_and_formats(capsys, tmp_path):
    pytest.importorskip("pyarrow")
    table = tmp_path / "t.csv"
    table.write_text("va,type\n0x1000,R\n0x2000,W\n")
    for more in (("--columns", "addr=va,op=type"), ("--format", "csv", "--columns", "addr=0"), ()):
        status, out, _ = run(capsys, "replay", table, *more, "--json")
        assert (status, json.loads(out)["accesses"]) == (0, 2)
    status, out, _ = run(capsys, "convert", table, tmp_path / "t.parquet", "--json")
    assert (status, json.loads(out)) == (0, {"path": str(tmp_path / "t.parquet"), "accesses": 2,
                                             "bytes": (tmp_path / "t.parquet").stat().st_size})
    status, out, _ = run(capsys, "info", tmp_path / "t.parquet", "--json")
    found = json.loads(out)
    assert (status, found["kind"], found["format"], found["kinds"]) == (0, "trace", "kvmmu", {"load": 1, "store": 1, "fetch": 0})


def test_info_of_a_recording(capsys):
    status, out, _ = run(capsys, "info", L4, "--json")
    found, recording = json.loads(out), kvmmu.traces.Recording.open(L4)
    columns = recording.columns()
    assert (status, found["kind"], found["accesses"]) == (0, "recording", len(recording))
    assert found["pages_touched"] == len(pages_of(columns["gva"], columns["size"], 12))
    assert found["kinds"] == dict(zip(("load", "store", "fetch"), np.bincount(recording.kind).tolist(), strict=True))
    assert (found["brings"]["tables"], found["mode"], found["phase"]) == (True, "4l", "static")
    status, out, _ = run(capsys, "info", L4)
    assert (status, "200,000" in out) == (0, True)


@pytest.mark.parametrize("gpas", [True, False])
def test_recorded_physical_addresses_are_not_checked(capsys, tmp_path, gpas):
    """The tables are made for the trace: the report says that addresses which the trace tells are not looked at."""
    path = tmp_path / "g.csv"
    path.write_text("where,k,frame\n" + "".join(f"{4096 * i},R,{i << 13 if gpas else ''}\n" for i in range(1, 50)))
    status, out, _ = run(capsys, "replay", path, "--columns", "addr=where,op=k,gpa=frame")
    assert (status, "recorded physical addresses" in out, "not checked" in out) == (0, gpas, gpas)
    status, out, _ = run(capsys, "replay", path, "--columns", "addr=where,op=k,gpa=frame", "--json")
    assert (status, json.loads(out)["unchecked_gpas"]) == (0, gpas)
    status, out, _ = run(capsys, "replay", path, "--columns", "addr=where,op=k", "--pager", "--json")
    assert (status, json.loads(out)["unchecked_gpas"]) == (0, False)
    convert(open_trace(path, columns="addr=where,op=k,gpa=frame"), tmp_path / "g.parquet")
    for options in ({}, {"scheduler": "threads"}):
        assert gpas == kvmmu.replay(tmp_path / "g.parquet", **options).unchecked_gpas


def test_info_of_a_damaged_file(capsys, tmp_path):
    (tmp_path / "cut.xz").write_bytes(bundled("lackey").read_bytes()[:50_000])
    status, out, err = run(capsys, "info", tmp_path / "cut.xz")
    assert (status, "damaged" in out) == (2, True)
    assert err.startswith(f"kvmmu: {tmp_path}/cut.xz: is damaged behind byte ")
    status, out, err = run(capsys, "replay", tmp_path / "cut.xz", "--json")
    assert (status, json.loads(out)["complete"], "cut.xz: is damaged" in err) == (2, False, True)


@pytest.mark.parametrize(("args", "words"), [
    (("replay", "lost"), ["lost: no such recording or trace"]),
    (("info", "lost"), ["lost: no such recording, trace or memory image"]),
    (("replay", "empty"), ["empty: is in no format that is known; it is empty", "lackey", "static_trace.npz"]),
    (("info", "garbage"), ["garbage: is in no format", "begins with fe ed fa", "champsim", "--format NAME"]),
    (("convert", "garbage", "out"), ["garbage: is in no format"]),
    (("replay", "folder"), ["folder: is in no format that is known; it is a directory of note", "drmemtrace"]),
    (("replay", "fifo"), ["fifo: is a FIFO"]), (("info", "fifo"), ["fifo: is a FIFO"]),
    (("replay", "/dev/zero"), ["character device"]),
    (("replay", "fifo", "--format", "lackey"), ["fifo: is a FIFO"]),
    (("replay", "x.lackey", "--mode", "32"), ["mode '32' has addresses of 32 bits", "0x1fff000748"]),
    (("replay", "x.lackey", "--mode", "pae", "--page", "1g"), ["mode 'pae' has no 1G pages"]),
    (("replay", "x.lackey", "--mode", "pae", "--page", "1g", "--pager"), ["mode 'pae' has no 1G pages"]),
    (("replay", "x.lackey", "--page", "8k"), ["'8k'"]), (("replay", "x.lackey", "--format", "foo"), ["--format foo", "lackey"]),
    (("replay", "x.lackey", "--format", "csv"), ["x.lackey"]),
    (("replay", "x.lackey", "--columns", "addr=va"), ["--columns: x.lackey has the format lackey", "csv"]),
    (("replay", "x.lackey", "--phase", "dyn"), ["--phase dyn: a trace has one phase"]),
    (("replay", "bundled", "--pager", "--mode", "5l"), ["--mode, --pager: ", "brings page tables of its own"]),
    (("replay", "bundled", "--columns", "addr=va"), ["--columns: ", "is a recording"]),
    (("convert", "x.lackey", "out", "--repeat", "2"), ["--repeat 2: only the accesses of a recording"]),
    (("convert", "x.lackey", "x.lackey"), ["is the same file as x.lackey"]),
    (("walk", "x.lackey", "0x1"), ["x.lackey: a trace without page tables"]),
    (("spt", "x.lackey"), ["x.lackey: a trace without page tables"]),
    (("replay", "text", "--format", "lackey"), ["text: has no accesses", "lackey", "2 lines"])])
def test_what_cannot_be_done_is_said_in_one_line(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    import os

    os.mkfifo("fifo")
    Path("empty").touch()
    Path("garbage").write_bytes(b"\xfe\xed\xfa" + bytes(range(256)) * 9)
    Path("text").write_text("hello\nworld\n")
    Path("folder").mkdir()
    Path("folder/note").touch()
    Path("x.lackey").write_text("I  0401ab70,3\nI  0401ab73,5\n S 1fff000748,8\n")
    status, _, err = run(capsys, *args)
    last = err.splitlines()[-1]
    assert (status, last.startswith("kvmmu")) == (2, True)
    assert [word for word in words if word not in last] == []
    assert not Path("out").exists()
