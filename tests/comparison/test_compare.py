# SPDX-License-Identifier: Apache-2.0
"""Comparisons: each design gives what it gives alone, exits are those of the whole trace, references those of a plain model."""

import csv
import io
import json
import os
from itertools import pairwise

import numpy as np
import pytest
from paths import DATA
from tlb_model import Model

import kvmmu
from kvmmu import Access, CostModel, Design, Host, TlbHierarchy, TlbLevel, Vm
from kvmmu.cli.command import main
from kvmmu.comparison.first_touches import FirstTouches, kind_of
from kvmmu.comparison.passes import MadePasses
from kvmmu.traces import Header, Op, Recording, RegisterSet, Trace

SMALL = TlbHierarchy([TlbLevel("L1", 2, 2), TlbLevel("L2", 4, 3)], psc={2: TlbLevel("PDE", 1, 2)},
                     nested=TlbHierarchy([TlbLevel("nTLB", 1, 3)], psc={2: TlbLevel("nPDE", 1, 2)}))
OTHER = TlbHierarchy([TlbLevel("only", 1, 5, "fifo")])
ACCESS = np.array([Access.READ, Access.WRITE, Access.FETCH], np.uint8)


def some_trace(seed, rows=4000, pages=60):
    """Accesses to pages in three regions, some of them into the next page."""
    rng = np.random.default_rng(seed)
    base = np.array([0x400000, 0x7F00_0000_0000, 0xFFFF_8000_0000_0000], np.uint64)
    op = rng.integers(0, 3, rows).astype(np.uint8)
    page = (rng.zipf(1.4, rows) % pages).astype(np.uint64)
    addr = base[rng.integers(0, 3, rows)] + (page << np.uint64(12)) + rng.choice(np.array([0, 64, 4092], np.uint64), rows)
    return Trace(Header(registers=(), name="some"), [{
        "op": op, "addr": addr, "access": ACCESS[op] | rng.choice(np.array([0, 4], np.uint8), rows),
        "size": rng.choice(np.array([1, 4, 8], np.uint8), rows)}])


def designs(hosts=("native", "ept", "npt", "shadow", "nested-ept", "nested-npt"), pages=("4k", "2m", "thp"), tlbs=None):
    tlbs = {"small": SMALL, "other": OTHER} if tlbs is None else tlbs
    return [Design(f"{host} {page} {name}", host=host, page=page, tlb=tlb) for page in pages for name, tlb in tlbs.items()
            for host in hosts]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_design_is_what_it_is_alone(seed):
    """TLB counters of 36 designs in one pass: those of a replay on tables of that page size through that hierarchy."""
    found = kvmmu.compare(some_trace(seed), designs())
    for result in found.results:
        tlb = result.design.hierarchy._another(details=True)
        alone = kvmmu.replay(some_trace_path(seed), page=result.design.page, tlb=tlb).tlb
        assert alone.hits.tolist() == result.stats.hits.tolist()
        assert alone.walks.tolist() == result.stats.walks.tolist()
        assert (alone.guest_refs, alone.cached_refs) == (result.stats.guest_refs, result.stats.cached_refs)
        assert alone.details.misses.tolist() == result.stats.details.misses.tolist()
        assert alone.details.pages.tolist() == result.stats.details.pages.tolist()


def some_trace_path(seed):
    """The same trace for `replay()`, which takes no list of chunks without a pager: a trace that can be read again."""
    class Again(Trace):
        def chunks(self):
            return some_trace(seed).chunks()

    return Again(some_trace(seed).header, ())


class HostModel:
    """Nested levels in plain Python: an address is looked up as a page of the host's size."""

    def __init__(self, nested, page):
        self.model, self.page = Model(nested.levels, nested.psc), page

    def refs(self, gpa):
        return self.model.access(gpa, "load", False, self.page, False)[1]


@pytest.mark.parametrize(("page", "host_page"), [("4k", "4k"), ("2m", "2m"), ("thp", "2m")])
def test_host_references(page, host_page):
    """Every page walk translates the entries that it reads, from the cached one down, and the address of the access."""
    passes = MadePasses(lambda: some_trace(5, 1500), [page], [SMALL], True)
    passes.run()
    spaces = passes.spaces[page]
    vcpu = spaces.vcpu()
    model, host = Model(SMALL.levels, SMALL.psc), HostModel(SMALL.nested, host_page)
    guest_refs, host_refs, totals = 0, 0, {}
    chunk, = some_trace(5, 1500).chunks()
    for op, addr, access, size in zip(chunk.op.tolist(), chunk.addr.tolist(), chunk.access.tolist(), chunk.size.tolist(),
                                      strict=True):
        record = vcpu.gva_walk.walk_record(addr, access)
        mask = {1: 0xFFF, 2: 0x1FFFFF}[record.steps[-1].level]
        both = [addr] if (addr & mask) + size <= mask + 1 else [addr, (addr | mask) + 1 & 2**64 - 1]
        for gva in both:
            record = vcpu.gva_walk.walk_record(gva, access)
            leaf = record.steps[-1].level
            level, read = model.access(gva, ("load", "store", "fetch")[op], bool(access & 4), ("4k", "2m")[leaf - 1], False)
            if level is not None:
                continue
            below = sum(host.refs(gpa) for gpa in [step.gpa for step in record.steps[-read:]] + [record.gpa])
            guest_refs, host_refs = guest_refs + read, host_refs + below
            totals[read + below] = totals.get(read + below, 0) + 1
    stats = passes.stats[page][0]
    assert (stats.guest_refs, stats.host_refs) == (guest_refs, host_refs)
    assert {refs: count for refs, count in enumerate(stats.walks_by_all_refs.tolist()) if count} == totals


@pytest.mark.parametrize("host", ["ept", "npt", "shadow"])
@pytest.mark.parametrize("page", ["4k", "2m"])
def test_first_touches_take_all_exits(host, page):
    """The whole trace on the machine takes exits at the same accesses, as many as its first touches alone."""
    passes = MadePasses(lambda: some_trace(8), [page], [OTHER], False)
    passes.run()
    found = kvmmu.compare(some_trace(8), [Design(host=host, page=page, tlb=OTHER)]).results[0].host
    spaces = passes.spaces[page]
    spaces.clean()
    vm = Vm(spaces.mem, kvmmu.CpuModel(maxphyaddr=46), Host(tdp=None if host == "shadow" else host, maxphyaddr=46), backing=page)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(spaces.regs(0))
    chunk, = some_trace(8).chunks()
    rows = vcpu.access(chunk.addr, chunk.access)
    took = np.flatnonzero(rows.exits)
    assert found.position.tolist() == took.tolist()
    assert found.count.tolist() == rows.exits[took].tolist()
    assert found.total == rows.exits.sum() > 0
    assert sum(found.by_ret.values()) == took.size


def test_first_touches():
    """Each page and kind of access once, at its first row, whatever the chunks."""
    rng = np.random.default_rng(3)
    gva = rng.integers(0, 50, 3000, np.uint64) << np.uint64(12)
    access = rng.choice(np.array([0, 2, 4, 6, 16, 20], np.uint8), 3000)
    space = rng.integers(0, 2, 3000)
    wanted, seen = [], set()
    for row in range(3000):
        key = int(gva[row]), int(access[row]), int(space[row])
        if key not in seen:
            seen.add(key)
            wanted.append((row, *key))
    first = FirstTouches()
    cuts = [0, *sorted(rng.choice(np.arange(1, 3000), 40, replace=False).tolist()), 3000]
    for start, stop in pairwise(cuts):
        for one in (0, 1):
            for row in range(start, stop):
                if space[row] == one:
                    first.take(gva[row:row + 1], access[row:row + 1], one, row)
    position, gvas, bits, spaces = first.columns()
    assert sorted(wanted) == sorted(zip(position.tolist(), gvas.tolist(), bits.tolist(), spaces.tolist(), strict=True))
    whole = FirstTouches()
    whole.take(gva, access, 0, 7)
    keys = {}
    for row in range(3000):
        keys.setdefault((int(gva[row]), int(access[row])), row + 7)
    assert sorted(keys.values()) == whole.columns()[0].tolist()
    assert kind_of(np.array([0, 2, 16, 4, 6, 20], np.uint8)).tolist() == [0, 1, 2, 4, 5, 6]


# ---- traces with registers ---------------------------------------------------------------------------------------------

def trace_of_spaces():
    """Two address spaces with PCIDs, by hand: MOV to CR3 with and without bit 63."""
    keep = 1 << 63
    rows = [  # op, addr, value
        (Op.LOAD, 0x1000, 0), (Op.LOAD, 0x2000, 0), (Op.MOV_CR3, 0, 0x8002 | keep), (Op.LOAD, 0x1000, 0), (Op.LOAD, 0x1000, 0),
        (Op.MOV_CR3, 0, 0x4001 | keep), (Op.LOAD, 0x1000, 0), (Op.LOAD, 0x2000, 0), (Op.MOV_CR3, 0, 0x4001), (Op.LOAD, 0x1000, 0),
        (Op.INVLPG, 0x1000, 0), (Op.LOAD, 0x1000, 0), (Op.PAGE_FAULT, 0x1000, 6), (Op.LOAD, 0x1000, 0), (Op.STORE, 0x1000, 0)]
    op, addr, value = (np.array(column, dtype) for column, dtype in zip(
        zip(*((int(op), addr, value) for op, addr, value in rows), strict=True), (np.uint8, np.uint64, np.uint64), strict=True))
    registers = RegisterSet(cr0=0x80000011, cr3=0x4001, cr4=0x20020, efer=0xD00)
    return Trace(Header(registers=(registers,), name="spaces"), [{
        "op": op, "addr": addr, "value": value, "access": np.where(op == 1, 2, 0).astype(np.uint8),
        "size": np.ones(op.size, np.uint8)}])


def test_address_spaces():
    """Tables are made for each CR3, entries are tagged with the PCID, and events drop what they drop; by hand."""
    tlb = TlbHierarchy([TlbLevel("L1", 1, 8)])
    found = kvmmu.compare(trace_of_spaces(), [Design(host=host, tlb=tlb) for host in ("native", "ept", "shadow")])
    # walks: 1 and 2 of the first space; 1 of the second; 1 behind the MOV without bit 63; behind INVLPG; behind the #PF
    assert [result.walks for result in found.results] == [6, 6, 6]
    assert found.results[0].stats.details.misses.tolist() == [[3, 0, 0, 3]]
    assert found.accesses == 10
    assert found.mapped == {"4k": {"4K": 3}}
    assert found.results[2].host.exits["MOV to CR3"] == 3
    assert found.results[2].host.exits["INVLPG"] == 1
    assert found.results[2].host.exits["guest page faults"] == 1
    assert set(found.results[1].host.exits) == {"EPT violations"}
    assert {name: positions.tolist() for name, positions in found.faults.items()} == {
        "first touches of 4K pages": [0, 1, 2], "page faults of the trace": [8]}
    assert found.data()["faults_over_time"]["first touches of 4K pages"] == [[0, 1], [1, 2], [2, 3]]


def test_next_pages_of_another_space():
    """An access that reaches into the next page is walked there in its own address space."""
    op = np.array([0, Op.MOV_CR3, 0], np.uint8)
    trace = Trace(trace_of_spaces().header, [{
        "op": op, "addr": np.array([0x1000, 0, 0x1FFC], np.uint64), "value": np.array([0, 0x8002, 0], np.uint64),
        "access": np.zeros(3, np.uint8), "size": np.array([8, 1, 8], np.uint8)}])
    found = kvmmu.compare(trace, [Design(host="native", tlb=TlbHierarchy([TlbLevel("L1", 1, 8)]))]).results[0]
    assert (found.walks, found.stats.accesses, found.stats.unmapped) == (3, 3, 0)


@pytest.mark.parametrize("name", ["l4", "p32", "ndyn"])
def test_recordings(name):
    """Recordings on made tables: every access asks the TLBs, and native walks are those of two stages."""
    if name == "p32":
        pytest.importorskip("zstandard", reason="zstandard is not installed (extra zstd)")
    recording = Recording.open(DATA / "linux" / name)
    found = kvmmu.compare(recording, [Design(host=host, page=page) for page in ("4k", "thp") for host in ("native", "npt")])
    for result in found.results:
        assert result.accesses == len(recording)
        assert result.stats.accesses >= len(recording)
        assert result.stats.unmapped == 0
    assert found.results[0].guest_refs == found.results[1].guest_refs
    assert found.results[0].host_refs == 0 < found.results[1].host_refs


def test_own_tables():
    """Page "own" walks the tables of the trace: the TLB counters of a replay, the exits of a machine replay."""
    recording = Recording.open(DATA / "linux" / "l5")
    found = kvmmu.compare(recording, [Design(host=host, page="own") for host in ("native", "ept", "shadow")])
    alone = kvmmu.replay(recording, tlb="skylake").tlb
    for result in found.results:
        assert alone.hits.tolist() == result.stats.hits.tolist()
        assert alone.details.misses.tolist() == result.stats.details.misses.tolist()
    native, ept, shadow = found.results
    assert (native.host.total, native.host_refs) == (0, 0)
    assert ept.host.exits["EPT violations"] == ept.host.stats["pages_2m"] + ept.host.stats["pages_4k"]
    assert shadow.host_refs == native.guest_refs
    assert shadow.guest_refs == 0


# ---- what comes out ----------------------------------------------------------------------------------------------------

def test_data(tmp_path):
    """JSON as documented; CSV and Parquet have the same figures; cycles are the sum that the model says."""
    cost = CostModel("mine", second_level_hit=3, walk=5, guest_ref=7, host_ref=11, exit=13, source="made up")
    found = kvmmu.compare(some_trace(4), designs(hosts=("ept", "shadow"), pages=("4k",)), cost=cost)
    data = json.loads(json.dumps(found.to_dict()))
    assert {"designs", "accesses", "miss_curves", "mapped", "cost"} <= set(data)
    for design, result in zip(data["designs"], found.results, strict=True):
        assert {"name", "page", "host", "accesses", "tlb", "guest_refs", "host_refs", "exits"} <= set(design)
        assert sum(level["hits"] for level in design["tlb"]["levels"]) + design["tlb"]["walks"] == design["tlb"]["lookups"]
        assert design["exits"] == sum(design["exits_by"].values())
        assert sum(design["walks_by_refs"]) == design["tlb"]["walks"]
        refs = sum(refs * count for refs, count in enumerate(design["walks_by_refs"]))
        assert refs == design["guest_refs"] + design["host_refs"]
        wanted = 3 * result.later_hits + 5 * result.walks + 7 * result.guest_refs + 11 * result.host_refs + 13 * design["exits"]
        assert design["cycles"] == wanted
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [int(row["walks"]) for row in rows] == [design["tlb"]["walks"] for design in data["designs"]]
    assert [row["name"] for row in rows] == [design["name"] for design in data["designs"]]
    for row in rows:
        assert int(row["first_level_hits"]) + int(row["later_hits"]) + int(row["walks"]) == data["designs"][0]["tlb"]["lookups"]
    parquet = pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed (extra arrow)")
    found.to_parquet(tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet").to_pydict() == found.columns()
    assert str(found) == found.table()
    assert "cycles by 'mine': made up" in found.table()
    assert "cycles by 'estimate': Intel" in kvmmu.compare(some_trace(4), [Design()], cost="estimate").table()


def test_curve():
    """The misses of all sizes: those of hierarchies of one fully associative level."""
    sizes = (1, 2, 3, 7, 20, 64)
    tlbs = {size: TlbHierarchy([TlbLevel("only", 1, size)]) for size in sizes}
    found = kvmmu.compare(some_trace(6), [Design(f"{size}", host="native", tlb=tlb) for size, tlb in tlbs.items()])
    assert [int(found.curves["4k"][size]) for size in sizes] == [result.walks for result in found.results]
    assert found.to_dict()["miss_curves"]["4k"][0] == [0, found.results[0].stats.accesses]


def test_regions():
    """The map of the address space: touched ranges with the size of their pages and the kinds of accesses."""
    chunk = {"op": np.array([0, 1, 2, 0], np.uint8), "addr": np.array([0x1000, 0x2000, 0x3000, 0x9000], np.uint64),
             "access": np.array([0, 2, 16, 0], np.uint8)}
    found = kvmmu.compare(Trace(Header(registers=()), [chunk]), [Design(page=page) for page in ("4k", "2m")])
    assert found.regions["4k"].tolist() == [[0x1000, 0x1000, 1, 1], [0x2000, 0x1000, 1, 2], [0x3000, 0x1000, 1, 4],
                                            [0x9000, 0x1000, 1, 1]]
    assert found.regions["2m"].tolist() == [[0x1000, 0x1000, 2, 1], [0x2000, 0x1000, 2, 2], [0x3000, 0x1000, 2, 4],
                                            [0x9000, 0x1000, 2, 1]]


def test_no_accesses():
    """A trace without accesses gives zeros."""
    empty = {"op": np.empty(0, np.uint8), "addr": np.empty(0, np.uint64), "access": np.empty(0, np.uint8)}
    found = kvmmu.compare(Trace(Header(registers=()), [empty]), designs(), cost="estimate")
    assert {(result.walks, result.guest_refs, result.host_refs, result.host.total) for result in found.results} == {(0, 0, 0, 0)}
    assert found.to_html()
    assert found.table()


# ---- arguments, and the command ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: Design(host="xen"), ValueError, "host: "), (lambda: Design(page="8k"), ValueError, "page: "),
    (lambda: Design(tlb="atom"), ValueError, "tlb: want a path"), (lambda: Design(tlb=3), TypeError, "tlb: "),
    (lambda: Design(name=3), TypeError, "name: want a str"), (lambda: CostModel(exit=-1), ValueError, "exit: want cycles"),
    (lambda: CostModel(walk=True), ValueError, "walk: want cycles"),
    (lambda: kvmmu.compare(some_trace(1), []), ValueError, "designs: want one or more"),
    (lambda: kvmmu.compare(some_trace(1), Design()), TypeError, "designs: want a list"),
    (lambda: kvmmu.compare(some_trace(1), ["ept"]), TypeError, "designs: want Designs"),
    (lambda: kvmmu.compare(some_trace(1), [Design(), Design()]), ValueError, "2 have the name 'ept 4k skylake'"),
    (lambda: kvmmu.compare(some_trace(1), [Design(page="own")]), ValueError, "page: the trace brings no page tables"),
    (lambda: kvmmu.compare("bundled", [Design(page="own", host="nested-ept")]), ValueError, "page 'own' and host 'nested-ept'"),
    (lambda: kvmmu.compare(3, [Design()]), TypeError, "trace: want a path"),
    (lambda: kvmmu.compare(some_trace(1), [Design()], cost="free"), ValueError, "cost: want a path"),
    (lambda: kvmmu.compare(some_trace(1), [Design()], phase="dyn"), ValueError, "phase: "),
    (lambda: kvmmu.compare(Trace(Header(registers=()), iter(())), [Design()]), ValueError, "chunks can be read once"),
    (lambda: CostModel.preset("mine"), ValueError, "name: "),
])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_cost_files(tmp_path):
    file = tmp_path / "cost.toml"
    file.write_text('exit = 5\nsource = "mine"\n')
    assert CostModel.from_toml(file).exit == 5
    file.write_text("speed = 5\n")
    with pytest.raises(ValueError, match="key"):
        CostModel.from_toml(file)
    file.write_text("exit = ")
    with pytest.raises(ValueError, match="not TOML"):
        CostModel.from_toml(file)
    assert "estimate" in CostModel.preset("estimate").source


def test_command(tmp_path, capsys):
    """kvmmu compare: JSON, CSV, text, files."""
    trace = tmp_path / "one.csv"
    trace.write_text("addr,op,size\n" + "".join(f"{4096 * (i % 7):#x},load,4\n" for i in range(70)))
    toml = tmp_path / "mine.toml"
    toml.write_text('[[level]]\nname = "L1"\nsets = 1\nways = 4\n')
    args = ["compare", str(trace), "--host", "ept,shadow,native", "--page", "4k,2m", "--tlb", f"{toml},zen3"]
    assert main([*args, "--json", "--html", str(tmp_path / "a.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [design["name"] for design in found["designs"]] == [
        f"{host} {page} {tlb}" for page in ("4k", "2m") for tlb in ("mine", "zen3") for host in ("ept", "shadow", "native")]
    first = found["designs"][0]
    assert (first["accesses"], first["tlb"]["levels"][0]["hits"], first["tlb"]["walks"], first["guest_refs"]) == (70, 0, 70, 280)
    assert first["host_refs"] == 70 * 20
    assert found["designs"][3]["tlb"]["walks"] == 7
    assert "</html>" in (tmp_path / "a.html").read_text()
    assert main([*args, "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    assert main([*args, "--cost", "estimate"]) == 0
    assert "ept 2m mine" in capsys.readouterr().out
    for bad, message in ((["--host", "xen"], "'xen' is none of"), (["--page", ","], "--page: is empty"),
                         (["--tlb", "atom"], "tlb: want a path"), (["--page", "own", "--host", "nested-ept"], "--page own"),
                         (["--page", "own"], "brings no page tables")):
        assert main(["compare", str(trace), *bad]) == 2
        assert message in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys):
    """Ctrl-C between two chunks leaves the counters of the accesses until then; before the walks there is nothing to tell."""
    chunk = {"op": np.zeros(100, np.uint8), "addr": np.arange(100, dtype=np.uint64) % np.uint64(7) << np.uint64(12),
             "access": np.zeros(100, np.uint8)}
    calls = []

    def stop_at(number):
        def progress(done, total):
            calls.append((done, total))
            if len(calls) == number:
                raise KeyboardInterrupt
        return progress

    trace = Trace(Header(registers=()), [chunk] * 5)
    found = kvmmu.compare(trace, [Design(host="ept"), Design(host="native")], progress=stop_at(2))
    assert calls == [(100, 500), (200, 500)]
    assert (found.complete, found.accesses, found.results[0].stats.accesses) == (False, 200, 200)
    assert found.to_dict()["complete"] is False
    assert "stopped early" in found.table()
    assert "Stopped early" in found.to_html()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(MadePasses, "_find_pages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvmmu.compare(trace, [Design()])
    assert main(["compare", "bundled-lackey"]) == 130
    assert capsys.readouterr().out == ""


def test_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    figure = kvmmu.compare(some_trace(2), designs(), cost="estimate").plot(tmp_path / "out.svg")
    titles = [axes.get_title() for axes in figure.axes]
    for wanted in ("References of page walks", "Misses over TLB size", "References per walk", "Exits over time",
                   "Faults over time"):
        assert wanted in titles
    legend = figure.axes[titles.index("References per walk")].get_legend()
    names = " ".join(text.get_text().replace("\n", " ") for text in legend.get_texts())
    assert " more" not in names
    assert legend.get_title().get_text() == "not drawn: 1 more, which the HTML page names"
    assert all(axes.get_xlabel() for axes in figure.axes[:6])
    assert (tmp_path / "out.svg").stat().st_size > 10_000
    assert main(["compare", "bundled-lackey", "--plot", "out.bmp"]) == 2
    assert "--plot: out.bmp ends in .bmp; want .png, .svg or .pdf" in capsys.readouterr().err


def test_pages_of_1g():
    """Pages of 1G, at the addresses of the trace, natively and under nested paging."""
    chunk = {"op": np.zeros(3, np.uint8), "addr": np.arange(3, dtype=np.uint64) << np.uint64(30), "access": np.zeros(3, np.uint8)}
    found = kvmmu.compare(Trace(Header(registers=()), [chunk]), [Design(page="1g"), Design(host="nested-npt", page="1g")])
    assert [result.walks for result in found.results] == [3, 3]


@pytest.mark.parametrize("text", ["", 'name = "mine"\nsource = "a guess"'])
def test_costs_of_a_file_without_cycles(tmp_path, text):
    """They would make every design free."""
    file = tmp_path / "cost.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"cost\.toml: has no cycles; want one or more of second_level_hit, walk, guest_ref"):
        CostModel.from_toml(file)
    file.write_text("walk = 0")
    assert CostModel.from_toml(file).walk == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_costs_are_read_from_regular_files(tmp_path):
    os.mkfifo(tmp_path / "f.toml")
    with pytest.raises(ValueError, match=r"f\.toml: is a FIFO; allowed is a regular file"):
        CostModel.from_toml(tmp_path / "f.toml")
    with pytest.raises(TypeError, match="path: want a path as str or path-like, got int"):
        CostModel.from_toml(0)
