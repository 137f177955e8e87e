# SPDX-License-Identifier: Apache-2.0
"""Replays in parts, in threads and on a cluster of this computer: counters equal to those of one process."""

import json

import numpy as np
import pytest
from made_traces import accesses_of
from paths import DATA

import kvmmu
from kvmmu import Design, Pager, TlbHierarchy, TlbLevel
from kvmmu.cli.command import main
from kvmmu.replay.many import replay_each
from kvmmu.replay.sharded import TablesToOrder, replay_parts, shards_of
from kvmmu.traces import Header, ParquetTrace, ParquetWriter, Recording, Trace, TraceError, bundled

pytest.importorskip("dask")
PSC = {2: TlbLevel("PDE", 1, 6), 3: TlbLevel("PDPTE", 1, 3)}
HIERARCHIES = {
    "lru": TlbHierarchy([TlbLevel("I", 8, 2, kinds="fetch"), TlbLevel("D", 4, 3, kinds=("load", "store")), TlbLevel("S", 16, 4)],
                        psc=PSC),
    "policies": TlbHierarchy([TlbLevel("D", 6, 3, "plru"), TlbLevel("S", 12, 4, "fifo", inclusion="inclusive"),
                              TlbLevel("V", 3, 2, inclusion="exclusive")]),
    "random": TlbHierarchy([TlbLevel("D", 8, 2, "random")], psc=PSC, seed=3),
    "fetches-alone": TlbHierarchy([TlbLevel("I", 8, 2, kinds="fetch")], psc={2: TlbLevel("PDE", 2, 2, "fifo")}),
    "none": TlbHierarchy([], psc=PSC),
}


def trace_at(path, mode="4l", rows=9000, of_group=700):
    """A Parquet trace of accesses in clusters, some crossing pages, some to addresses that are not canonical."""
    addr, size, op = accesses_of(mode, rows)
    addr[::3] = addr[::3] & np.uint64(0xFFFFFFFFFFFC0FFF)           # pages that come again
    addr[1::7] = addr[::7][:addr[1::7].size]                        # repeats
    if mode in ("4l", "5l"):
        addr[5::500] = np.uint64(1 << 60)
    access = np.array([4, 2, 20], np.uint8)[op]
    with ParquetWriter(path, Header(registers=())) as writer:
        for at in range(0, rows, of_group):
            part = slice(at, at + of_group)
            writer.write(op=op[part], addr=addr[part], access=access[part], size=size[part])
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return trace_at(tmp_path_factory.mktemp("trace") / "trace.parquet")


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made.scheduler_address


def plain(report):
    """A report without times, and without the details that one process keeps."""
    found = report.to_dict()
    for name in ("seconds", "waited", "rate", "tlb"):
        found.pop(name, None)
    stats = report.tlb
    return found if stats is None else found | {
        "tlb": [stats.names, stats.hits.tolist(), stats.walks.tolist(), stats.guest_refs, stats.psc_hits, stats.replaced,
                stats.unmapped, stats.cached_refs]}


@pytest.mark.parametrize("part_rows", [1, 2000, 1 << 22])
@pytest.mark.parametrize("tlb", HIERARCHIES)
def test_parts_in_threads(trace, tlb, part_rows):
    wanted = kvmmu.replay(trace, tlb=HIERARCHIES[tlb])
    found = replay_parts(ParquetTrace(trace), TablesToOrder(), "threads", HIERARCHIES[tlb], part_rows)
    assert plain(found) == plain(wanted)
    assert wanted.tlb.unmapped > 0
    assert wanted.crossings > 100
    assert found.tlb.details is None


@pytest.mark.parametrize("page", ["4k", "2m", "thp"])
@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
def test_every_mode_and_page(mode, page, tmp_path):
    file = trace_at(tmp_path / "trace.parquet", mode, 4000)
    wanted = kvmmu.replay(file, tlb=HIERARCHIES["lru"], paging=mode, page=page, frames="random")
    found = replay_parts(ParquetTrace(file), TablesToOrder(mode, page, "random"), "threads", HIERARCHIES["lru"], 900)
    assert plain(found) == plain(wanted)


def test_on_a_cluster(trace, cluster):
    """Two workers, each a process of its own."""
    for tlb in ("lru", "policies"):
        assert plain(replay_parts(ParquetTrace(trace), TablesToOrder(), cluster, HIERARCHIES[tlb], 2000)) == plain(
            kvmmu.replay(trace, tlb=HIERARCHIES[tlb]))
    assert plain(kvmmu.replay(trace, scheduler=cluster, page="2m")) == plain(kvmmu.replay(trace, page="2m"))


def test_in_processes(trace):
    assert plain(kvmmu.replay(trace, scheduler="processes", tlb=HIERARCHIES["lru"])) == plain(
        kvmmu.replay(trace, tlb=HIERARCHIES["lru"]))


def test_a_virtual_machine_each(cluster):
    """Machines on two workers: the reports of one process, in order."""
    names = [DATA / "linux" / name for name in ("l5", "pae", "l4")]
    found = replay_each(names, scheduler=cluster, mode="machine", host="npt", backing="4k")
    wanted = [kvmmu.replay(name, mode="machine", host="npt", backing="4k") for name in names]
    for one, two in zip(found, wanted, strict=True):
        assert plain(one) == plain(two)
        assert one.exit_position.tolist() == two.exit_position.tolist()
    walked = replay_each(names[:1], scheduler="threads", tlb=HIERARCHIES["lru"])[0]
    assert plain(walked) == plain(kvmmu.replay(names[0], tlb=HIERARCHIES["lru"]))


@pytest.mark.parametrize(("levels", "kinds", "sizes", "shards"), [
    ([("a", 64, 4), ("b", 1536, 12)], "load", "4k", 64), ([("a", 16, 4), ("b", 24, 4)], "load", "4k", 8),
    ([("a", 1, 64), ("b", 1024, 8)], "load", "4k", 1), ([("a", 7, 1), ("b", 5, 1)], "load", "4k", 1),
    ([("a", 16, 4), ("b", 64, 4, "random")], "load", "4k", 1), ([], "load", "4k", 1)])
def test_number_of_shards(levels, kinds, sizes, shards):
    assert shards_of([TlbLevel(*level) for level in levels], [kinds], [sizes]) == shards


def test_levels_that_nobody_asks_do_not_count():
    levels = [TlbLevel("I", 1, 8, kinds="fetch"), TlbLevel("D1G", 1, 4, pages="1g"),
              TlbLevel("D", 16, 4, kinds=("load", "store"))]
    assert shards_of(levels, ["load", "store"], ["4k", "2m"]) == 16
    assert shards_of(levels, ["load", "fetch"], ["4k", "2m"]) == 1


def test_a_trace_without_rows(tmp_path):
    file = tmp_path / "none.parquet"
    with ParquetWriter(file, Header(registers=())):
        pass
    found = kvmmu.replay(file, scheduler="threads", tlb=HIERARCHIES["lru"])
    assert plain(found) == plain(kvmmu.replay(file, tlb=HIERARCHIES["lru"]))


def test_a_row_that_is_refused_is_named_as_in_one_process(tmp_path):
    file = tmp_path / "events.parquet"
    with ParquetWriter(file, Header(registers=())) as writer:
        for op in ([0] * 50, [0] * 20 + [20] + [0] * 29):
            writer.write(op=np.array(op, np.uint8), addr=np.arange(50, dtype=np.uint64) << np.uint64(12),
                         access=np.zeros(50, np.uint8), value=np.zeros(50, np.uint64))
    for scheduler in (None, "threads"):
        with pytest.raises(TraceError, match=f"{file}: row 70: "):
            kvmmu.replay(file, scheduler=scheduler)


def test_what_is_refused(trace, monkeypatch):
    for given, words in [({"scheduler": "slurm"}, "scheduler: .*threads.*slurm"), ({"pager": Pager()}, "pager: is of one"),
                         ({"checkpoint": "x"}, "checkpoint: is of one process"), ({"progress": print}, "progress: is of one"),
                         ({"mode": "machine"}, "scheduler: a machine runs in one process")]:
        with pytest.raises(ValueError, match=words):
            kvmmu.replay(trace, **{"scheduler": "threads"} | given)
    for other in (bundled(), bundled("lackey"), DATA / "linux" / "l5"):
        with pytest.raises(ValueError, match="want a Parquet trace of accesses alone"):
            kvmmu.replay(other, scheduler="threads")
    with pytest.raises(TypeError, match="scheduler: want 'threads', 'processes' or an address, got int"):
        kvmmu.replay(trace, scheduler=3)
    with pytest.raises(ValueError, match="pager: cannot go to another process"):
        replay_each([trace], pager=Pager())
    monkeypatch.setitem(__import__("sys").modules, "dask", None)
    with pytest.raises(ImportError, match=r"the extra kvmmu\[dask\]: .* -m pip install 'kvmmu\[dask\]'"):
        kvmmu.replay(trace, scheduler="threads")


def test_command(trace, capsys):
    def printed(*more):
        assert main(["replay", str(trace), "--tlb", "skylake", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return {name: value for name, value in found.items() if name not in ("seconds", "waited", "rate", "tlb")} | {
            "tlb": {name: value for name, value in found["tlb"].items() if name not in ("levels", "walks_by_refs", "top_pages",
                                                                                        "top_ips")},
            "hits": [level["hits"] for level in found["tlb"]["levels"]]}
    assert printed("--scheduler", "threads") == printed()


# ---- comparisons -------------------------------------------------------------------------------------------------------

def test_comparisons_on_a_cluster(trace, cluster):
    """Each page policy with each hierarchy is a task: the same comparison as by one process, also of a recording's own tables."""
    nested = TlbHierarchy([TlbLevel("L", 4, 4)], nested=TlbHierarchy([TlbLevel("n", 2, 2)]))
    designs = [Design(f"{host} {page} {number}", host=host, page=page, tlb=tlb)
               for page in ("4k", "thp") for number, tlb in enumerate((HIERARCHIES["lru"], nested)) for host in ("ept", "shadow")]
    for source, some in ((trace, designs), (ParquetTrace(trace), designs[:3]),
                         (Recording.open(DATA / "linux" / "l5"), [Design(host="npt", page="own"), Design(page="4k")])):
        one, two = kvmmu.compare(source, some, cost="estimate"), kvmmu.compare(source, some, cost="estimate", scheduler=cluster)
        assert without_times(one.to_dict()) == without_times(two.to_dict())
        assert {page: curve.tolist() for page, curve in one.curves.items()} == {
            page: curve.tolist() for page, curve in two.curves.items()}
        assert one.data()["faults_over_time"] == two.data()["faults_over_time"]
    with pytest.raises(ValueError, match="trace: a Trace cannot go to another process; want a path"):
        kvmmu.compare(Trace(Header(registers=()), []), [Design()], scheduler="threads")
    with pytest.raises(ValueError, match="progress: is of one process"):
        kvmmu.compare(trace, [Design()], scheduler="threads", progress=print)


def without_times(plain):
    return {name: value for name, value in plain.items() if name != "seconds"}


def test_command_compare(trace, capsys):
    for more in ([], ["--scheduler", "threads"]):
        assert main(["compare", str(trace), "--page", "4k,2m", "--json", *more]) == 0
    one, two = (without_times(json.loads(line)) for line in capsys.readouterr().out.splitlines())
    assert one == two
    assert main(["compare", str(trace), "--columns", "addr=a", "--format", "parquet", "--scheduler", "threads"]) == 2
