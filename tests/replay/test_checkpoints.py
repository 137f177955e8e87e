# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a replay that is stopped anywhere and goes on from its checkpoint ends as one that was never stopped.

KVMMU_CHECKPOINT_STOPS=N stops each trace at N places instead of 3.
"""

import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import fields
from hashlib import sha256

import numpy as np
import pytest
from made_traces import accesses_of, trace_of
from paths import DATA
from tlb_guests import LEVELS, PSC, Guest, some_rows
from toy_traces import header, memory_rows, rows_of, tables

import kvmmu
from kvmmu import Pager, ReplayInterrupted, TlbHierarchy, TlbLevel
from kvmmu.cli.command import main
from kvmmu.replay import row_run, synthetic
from kvmmu.replay.checkpoint import CheckpointError, _first_difference, read_file, write_file
from kvmmu.tlb._saved import restore_levels, save_levels
from kvmmu.traces import Header, Op, ParquetWriter, Recording, Trace, bundled, open_trace

STOPS = int(os.environ.get("KVMMU_CHECKPOINT_STOPS", "3"))
TLB = TlbHierarchy([*LEVELS, TlbLevel("R", 4, 3, "random"), TlbLevel("V", 1, 4, pages="4k", inclusion="exclusive")], psc=PSC,
                   seed=5, details=True, curve=True)
TIMES = ("seconds", "waited")


def plain(value):
    """A value with its arrays, as something that == compares."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name not in TIMES}
    return value


@pytest.fixture
def runs(monkeypatch):
    """The replays that have told a report, the last one last."""
    made = []
    for kind in (row_run.RowRun, synthetic.SyntheticRun):
        def report(self, complete, before=kind.report):
            made.append(self)
            return before(self, complete)
        monkeypatch.setattr(kind, "report", report)
    return made


def everything(report, run):
    """All that a replay has led to: its report, guest memory (with accessed and dirty bits), what its TLBs hold."""
    if isinstance(run, row_run.RowRun):
        mem = run.vcpu.mem
        pages = [at for gpa, size, _ in mem.slots for at in range(gpa, gpa + size, 4096)]
    else:
        mem, pages = run.tables.mem, run.tables.table_frames        # frames of tables that are gone hold anything
    memory = sha256(b"".join(bytes(mem.read(at, 4096)) for at in pages)).hexdigest()
    levels = [] if run.tlbs is None else [plain([tlb._saved()[0], save_levels(tlb._core)])
                                          for tlbs in run.tlbs._of_vcpu for tlb in tlbs]
    for level in levels:
        for name, value in level[1].items():
            if name in ("pages", "ips"):                # hash tables: in any order
                level[1][name] = sorted(np.frombuffer(value[2], np.uint64).reshape(-1, 2).tolist())
    pager = run.order.pager if isinstance(run, synthetic.SyntheticRun) else None
    return [plain(report), memory, levels, None if pager is None else pager._shape_and_state()]


def stop_and_go_on(make, where, tmp_path, runs, every=1e9):
    """Stop a replay behind its n-th call of progress for each n of `where`, and go on from there each time.

    Returns what the last one has led to. IN make: returns the trace and the arguments anew.
    """
    file, resume = tmp_path / "state.npz", None
    for stop in [*where, None]:
        calls = 0

        def progress(done, total):
            nonlocal calls
            calls += 1
            if stop is not None and calls > stop:               # noqa: B023
                raise KeyboardInterrupt
        trace, arguments = make()
        try:
            report = kvmmu.replay(trace, progress=progress, checkpoint=file, checkpoint_every=every, resume=resume, **arguments)
            assert report.complete
            return everything(report, runs[-1])
        except ReplayInterrupted as stopped:
            assert not stopped.report.complete
            if stopped.checkpoint is not None:
                resume = file
    raise AssertionError


def whole(make, runs):
    trace, arguments = make()
    calls = []
    report = kvmmu.replay(trace, progress=lambda done, total: calls.append(done), **arguments)
    return everything(report, runs[-1]), len(calls)


def check(make, tmp_path, runs, seed=0):
    """Any places to stop at, one or several of them."""
    wanted, calls = whole(make, runs)
    rng = random.Random(seed)
    for _ in range(STOPS):
        where = [rng.randrange(calls) for _ in range(rng.choice([1, 1, 3]))]
        assert stop_and_go_on(make, where, tmp_path, runs, rng.choice([0.0, 1e9])) == wanted
        (tmp_path / "state.npz").unlink(missing_ok=True)


# ---- the same end ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["l4", "ndyn", "pae", "l5"])
def test_recordings(name, tmp_path, runs, monkeypatch):
    """Page-table writes, register loads, faults, mismatches (of a recorded address that is changed), TLBs."""
    monkeypatch.setattr(row_run, "_STRETCH", 19_997)
    recording = Recording.open(DATA / "linux" / name)
    recording.pages_gpa[3] ^= np.uint64(0x5000)
    check(lambda: (recording, {"tlb": TLB}), tmp_path, runs)


@pytest.mark.parametrize("seed", range(3))
def test_traces_with_events_of_two_vcpus(seed, tmp_path, runs):
    """CR3 and CR4 loads, PCIDs, invalidations, table writes and a restart, in chunks of any size."""
    guest = Guest(seed)
    rows = some_rows(guest, 900)
    leaf = guest.mem.read_u64(guest.mem.read_u64(guest.mem.read_u64(guest.spaces[0].root & ~0xFFF) & ~0xFFF) & ~0xFFF) & ~0xFFF
    for place in (200, 500, 700):
        rows.insert(place, {"op": Op.GUEST_WRITE, "addr": leaf + 8 * (place % 24), "value": (place << 12) | 0x67, "size": 8,
                            "vcpu": 0})
    rows.insert(600, {"op": Op.RESTART, "addr": 0, "vcpu": 0})
    trace = guest.trace(rows)
    first, second = trace._chunks
    columns = {name: np.concatenate([first[name], second[name]]) for name in first}
    cuts = sorted(random.Random(seed).sample(range(len(columns["op"])), 40))
    chunks = [{name: column[start:stop] for name, column in columns.items()}
              for start, stop in zip([0, *cuts], [*cuts, None], strict=True)]
    check(lambda: (Trace(trace.header, chunks), {"tlb": TLB}), tmp_path, runs, seed)


@pytest.mark.parametrize("page", ["4k", "2m", "thp"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("mode", ["32", "4l"])
def test_traces_without_tables(mode, page, paged, tmp_path, runs):
    """Tables made for the addresses, in both readings; and demand paging with promotions and shuffled frames."""
    addr, size, op = accesses_of(mode)

    def make():
        given = {"pager": Pager(page, "random", mode=mode, thp_share=0.01)} if paged else {"paging": mode, "page": page}
        return trace_of(addr, size, op, rows=150, ip=addr >> np.uint64(3)), given | {"tlb": TLB}
    check(make, tmp_path, runs)


def test_other_formats(tmp_path, runs):
    """A text trace of a program: what its reader passes over is counted once."""
    check(lambda: (open_trace(bundled("lackey")), {"tlb": TLB}), tmp_path, runs)


def test_parquet_row_groups_that_are_done_are_not_read_again(tmp_path, runs, monkeypatch):
    addr, size, _ = accesses_of("4l", 40_000)
    file = tmp_path / "trace.parquet"
    with ParquetWriter(file, Header(registers=())) as writer:
        for start in range(0, 40_000, 4000):
            writer.write(op=np.zeros(4000, np.uint8), addr=addr[start:start + 4000], access=np.zeros(4000, np.uint8),
                         size=size[start:start + 4000])

    def make():
        return str(file), {"tlb": TLB}
    wanted, calls = whole(make, runs)
    assert calls == 20                                  # ten groups, read twice
    assert stop_and_go_on(make, [17], tmp_path, runs) == wanted
    starts = []
    before = kvmmu.traces.ParquetTrace._chunks_from

    def chunks(self, start):
        starts.append(start)
        return before(self, start)
    monkeypatch.setattr(kvmmu.traces.ParquetTrace, "_chunks_from", chunks)
    assert stop_and_go_on(make, [17], tmp_path, runs) == wanted
    assert starts == [0, 0, 32_000]


def test_parquet_with_tables(tmp_path, runs):
    file = tmp_path / "trace.parquet"
    rows = rows_of(*[(Op.LOAD, 0x1000 * (i % 5), 4, (0x100 + i % 5) << 12) for i in range(3000)])
    with ParquetWriter(file, header()) as writer:
        for part in (memory_rows(tables()), *[{name: column[at:at + 300] for name, column in rows.items()}
                                              for at in range(0, 3000, 300)]):
            writer.write(**part)
    check(lambda: (str(file), {"tlb": TLB}), tmp_path, runs)


# ---- levels of TLBs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_levels_go_on_from_their_state(seed):
    """Any accesses and invalidations behind it give the same counters, distances and contents."""
    rng = np.random.default_rng(seed)
    one, two = TLB._another(), TLB._another()

    def some(tlbs, rng):
        for _ in range(30):
            gva = rng.integers(0, 400, 200, np.uint64) << np.uint64(12)
            access, level = rng.choice(np.array([0, 2, 16, 4], np.uint8), 200), rng.integers(1, 4, 200).astype(np.uint8)
            page, what = int(gva[0]), rng.integers(0, 5)
            for tlb in tlbs:
                tlb.access(gva, access, level, ip=gva >> np.uint64(13))
                if what == 0:
                    tlb.invlpg(page)
                elif what == 1:
                    tlb.mov_cr3(page >> 12 & 3)
                elif what == 2 and page & 0x7000 == 0:
                    tlb.flush()
    some([one], rng)
    two._restore(*one._saved())
    two.use(one._space, one._pcid, one._mode)
    assert plain(two.stats()) == plain(one.stats())
    some([one, two], rng)
    assert plain(two.stats()) == plain(one.stats())
    for number in range(len(TLB.levels)):
        assert two._core.keys(number).tolist() == one._core.keys(number).tolist()


@pytest.mark.parametrize(("change", "words"), [
    (lambda state: state.pop("hits"), "hits: want uint64"),
    (lambda state: state.update(hits=state["hits"][:1]), "hits: want uint64 of shape"),
    (lambda state: state.update(hits=state["hits"].astype(np.float64)), "hits: want uint64"),
    (lambda state: state.update(other=state["hits"]), "other: levels of this shape have no such part"),
    (lambda state: state["level0.keys"].fill(3 << 45 | 1 << 63), "level0.keys: a key that is no page"),
    (lambda state: state["level0.keys"].fill(1), "level0.keys: a key that is no page"),
    (lambda state: state["asked1.keys"].fill(1 << 63), "asked1: not the keys and the stack"),
    (lambda state: state["asked1.keys"].__setitem__(0, 0), "asked1: not the keys and the stack"),
    (lambda state: state["asked1.stack"].fill(1), "asked1: not the keys and the stack"),
    (lambda state: state["asked1.stack"].__setitem__(0, 1 << 31), "asked1: not the keys and the stack"),
    (lambda state: state["asked1.stack"].fill(2**32 - 1), "asked1: not the keys and the stack"),
    (lambda state: state["all.last"].fill(1 << 63 | 12345), "all: not the keys and the stack"),
    (lambda state: state["pages"].fill(3 << 45), "pages: a key that is no page"),
    (lambda state: state.update(distances=state["distances"][:1]), "distances: 1 rows"),
])
def test_levels_refuse_what_is_no_state(change, words):
    tlb = TLB._another()
    tlb.access(np.arange(100, dtype=np.uint64) << np.uint64(12))
    tlb.access(np.arange(100, dtype=np.uint64) << np.uint64(12))
    state = save_levels(tlb._core)
    change(state)
    with pytest.raises(ValueError, match=words):
        restore_levels(TLB._another()._core, state)


# ---- signals -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_chunk(number, tmp_path, runs, monkeypatch):
    """It comes while rows are walked: the replay stops behind them, with a report and a checkpoint."""
    addr, size, op = accesses_of("4l")
    before, file = synthetic.SyntheticRun._walk, tmp_path / "state.npz"
    walked = []

    def walk(self, chunk):
        if len(walked) == 4:
            os.kill(os.getpid(), number)
            os.getpid()                                 # the handler has run by now
        before(self, chunk)
        walked.append(len(chunk))
    monkeypatch.setattr(synthetic.SyntheticRun, "_walk", walk)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ReplayInterrupted, match="interrupted after 750 accesses; .*state.npz is a checkpoint to") as found:
        kvmmu.replay(trace_of(addr, size, op, rows=150), tlb=TLB, checkpoint=file)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (found.value.report.accesses, found.value.report.complete, found.value.checkpoint) == (750, False, file)
    report = kvmmu.replay(trace_of(addr, size, op, rows=150), tlb=TLB, resume=file)
    resumed = everything(report, runs[-1])
    monkeypatch.setattr(synthetic.SyntheticRun, "_walk", before)
    assert resumed == whole(lambda: (trace_of(addr, size, op, rows=150), {"tlb": TLB}), runs)[0]


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    """The state is not whole then: the last checkpoint stays, if there is one."""
    addr, size, op = accesses_of("4l")

    def walk(self, chunk):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError
    monkeypatch.setattr(synthetic.SyntheticRun, "_walk", walk)
    with pytest.raises(ReplayInterrupted) as found:
        kvmmu.replay(trace_of(addr, size, op), checkpoint=tmp_path / "state.npz")
    assert found.value.checkpoint is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("keeps", [False, True])
def test_the_command_stops_with_its_report(number, status, keeps, tmp_path):
    """SIGINT and SIGTERM print the report so far; `--resume` ends as a run that was never stopped."""
    addr, size, op = accesses_of("4l", 200_000)
    file, state = tmp_path / "trace.npz", tmp_path / "state.npz"
    np.savez(file, addr=addr, size=size, op=op)
    script = ("import os, sys; from kvmmu.replay import synthetic as s; from kvmmu.cli.command import main\n"
              "before = s.SyntheticRun._walk; n = []\n"
              "def walk(self, chunk):\n    before(self, chunk); n.append(1)\n"
              f"    if len(n) == 2: os.kill(os.getpid(), {int(number)})\n"
              "s.SyntheticRun._walk = walk; sys.exit(main(sys.argv[1:]))")
    arguments = ["replay", str(file), "--tlb", "zen3", "--json"]
    keeping = ["--checkpoint", str(state)] if keeps else []
    done = subprocess.run([sys.executable, "-Pc", script, *arguments, *keeping], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    report = json.loads(done.stdout)
    assert not report["complete"]
    assert 0 < report["accesses"] < 200_000
    if keeps:
        assert "is a checkpoint to resume from" in done.stderr
        resumed, single = (json.loads(subprocess.run([sys.executable, "-Pm", "kvmmu", *arguments, *more], capture_output=True,
                                                     text=True, check=True).stdout) for more in (["--resume", str(state)], []))
        for one in (resumed, single):
            for name in (*TIMES, "rate"):
                del one[name]
        assert resumed == single
        assert resumed["complete"]


# ---- the file ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A trace, the checkpoint of its replay, and the report of a whole one."""
    addr, size, op = accesses_of("4l", 1500)
    file = tmp_path_factory.mktemp("stopped") / "state.npz"

    def make():
        return trace_of(addr, size, op, rows=100)
    calls = iter(range(100))

    def progress(done, total):
        if next(calls) == 20:
            raise KeyboardInterrupt
    with pytest.raises(ReplayInterrupted):
        kvmmu.replay(make(), tlb=TLB, checkpoint=file, progress=progress)
    return make, file, plain(kvmmu.replay(make(), tlb=TLB))


def damaged(content, rng):
    """A file with some bytes changed, left out or put in."""
    changed, place = bytearray(content), rng.randrange(len(content))
    count = rng.choice([1, 1, 1, 8, 300])
    what = rng.randrange(4)
    changed[place:place + (0 if what == 0 else count)] = b"" if what == 1 else rng.randbytes(count)
    return bytes(changed)


def refused_or_equal(make, file, wanted):
    """Resume from a file; True if it is refused. What it is not refused with is the right report."""
    try:
        report = kvmmu.replay(make(), tlb=TLB, resume=file)
    except CheckpointError:
        return True
    assert plain(report) == wanted
    return False


def test_files_that_are_cut_off(stopped, tmp_path):
    make, file, wanted = stopped
    content, part = file.read_bytes(), tmp_path / "part.npz"
    for place in range(50):
        part.write_bytes(content[:len(content) * place // 50])
        assert refused_or_equal(make, part, wanted)


def test_files_that_are_damaged(stopped, tmp_path):
    make, file, wanted = stopped
    part, rng = tmp_path / "part.npz", random.Random(3)
    refused = 0
    for _ in range(500):
        part.write_bytes(damaged(file.read_bytes(), rng))
        refused += refused_or_equal(make, part, wanted)
    assert refused > 400


def test_states_that_were_made_up(stopped, tmp_path):
    """Whole files whose numbers are not those of a replay: refused, or other numbers in the report; nothing else happens."""
    make, file, _ = stopped
    part, rng = tmp_path / "part.npz", np.random.default_rng(3)
    state, arrays = read_file(file)
    for name in [*arrays, *state["state"]] * 2:
        changed, plain_state = dict(arrays), dict(state["state"])
        if name in arrays:
            array = arrays[name].copy()
            bytes_ = array.reshape(-1).view(np.uint8)
            if bytes_.size:
                bytes_[rng.integers(0, bytes_.size, 8)] = rng.integers(0, 256, 8)
            changed[name] = [array, array, array.reshape(-1)[:array.size // 2], array.astype(np.float32)][rng.integers(0, 4)]
        else:
            plain_state[name] = [None, -1, 1 << 70, "x", [], {"a": 1}][rng.integers(0, 6)]
        write_file(part, state | {"state": plain_state}, changed)
        with suppress(CheckpointError):
            kvmmu.replay(make(), tlb=TLB, resume=part)


def test_no_pickle_is_read(stopped, tmp_path):
    make, file, _ = stopped
    part = tmp_path / "part.npz"
    state, arrays = read_file(file)
    write_file(part, state, arrays)
    with zipfile.ZipFile(part, "a") as archive, archive.open("more.npy", "w") as member:
        np.lib.format.write_array(member, np.array([print], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="pickled objects"):
        kvmmu.replay(make(), tlb=TLB, resume=part)


def test_a_checkpoint_of_something_else(stopped, tmp_path):
    make, file, _ = stopped
    addr, size, op = accesses_of("4l", 1500, seed=6)
    with pytest.raises(CheckpointError, match="first rows of the trace are not those"):
        kvmmu.replay(trace_of(addr, size, op, rows=100), tlb=TLB, resume=file)
    with pytest.raises(CheckpointError, match=r": tlb\[0\].levels\[0\]\[0\]: .* with 'I', asked for is 'L1 ITLB'; want the same"):
        kvmmu.replay(make(), tlb="zen3", resume=file)
    with pytest.raises(CheckpointError, match=r"tables\[1\]: the checkpoint was made with '4k', asked for is '2m'"):
        kvmmu.replay(make(), tlb=TLB, page="2m", resume=file)
    with pytest.raises(CheckpointError, match="pager: the checkpoint was made with None"):
        kvmmu.replay(make(), tlb=TLB, pager=Pager(), resume=file)
    with pytest.raises(CheckpointError, match=r"another trace.*\(header, name, phase, sha256 of the trace differ\)"):
        kvmmu.replay(bundled(), tlb=TLB, resume=file)
    with pytest.raises(CheckpointError, match="not a whole numpy archive"):
        kvmmu.replay(make(), tlb=TLB, resume=__file__)
    with pytest.raises(FileNotFoundError):
        kvmmu.replay(make(), tlb=TLB, resume=tmp_path / "none.npz")
    other = tmp_path / "other.npz"
    np.savez(other, a=np.zeros(3))
    with pytest.raises(CheckpointError, match="no checkpoint: it has no header"):
        kvmmu.replay(make(), tlb=TLB, resume=other)
    state, arrays = read_file(file)
    write_file(other, state | {"version": 2}, arrays)
    with pytest.raises(CheckpointError, match="a checkpoint of version 2; known is 1"):
        kvmmu.replay(make(), tlb=TLB, resume=other)


def stopped_file(tmp_path, **arguments):
    """The accesses of a trace, its file, and a checkpoint of a replay of it that was stopped."""
    addr, size, op = accesses_of("4l")
    file, state = tmp_path / "trace.npz", tmp_path / "state.npz"
    np.savez(file, addr=addr, size=size, op=op)

    def stop(done, total):
        raise KeyboardInterrupt
    with pytest.raises(ReplayInterrupted):
        kvmmu.replay(file, checkpoint=state, progress=stop, **arguments)
    return (addr, size, op), file, state


def test_a_trace_file_that_was_changed(tmp_path):
    (addr, size, op), file, state = stopped_file(tmp_path)
    addr[-1] ^= np.uint64(0x1000)
    np.savez(file, addr=addr, size=size, op=op)
    with pytest.raises(CheckpointError, match="a checkpoint of another trace, or of this one before it was changed"):
        kvmmu.replay(file, resume=state)


@pytest.mark.parametrize(("was", "now", "found"), [
    ({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 3}]}, ("x.b[1].c", 2, 3)), ([1, 2], [1], ("x[1]", 2, None)),
    ({}, {"a": [1]}, ("x.a", None, [1])), ([1, 2], [3], ("x[0]", 1, 3)), ("a", "b", ("x", "a", "b")),
])
def test_first_difference(was, now, found):
    assert found == _first_difference("x", was, now)


def test_a_trace_file_that_was_renamed(tmp_path):
    """The name is not what tells a trace from others; two processors with like beginnings are told apart where they differ."""
    (addr, _, _), file, state = stopped_file(tmp_path, tlb="zen3")
    file = file.rename(tmp_path / "renamed.npz")
    once, resumed = kvmmu.replay(file, tlb="zen3"), kvmmu.replay(file, resume=state, tlb="zen3")
    assert once.accesses == len(addr)
    assert plain(once.tlb) == plain(resumed.tlb)
    assert once.pages_touched == resumed.pages_touched
    with pytest.raises(CheckpointError, match=r": tlb\[0\].levels\[1\]\[2\]: the checkpoint was made with 64, asked for is 72"):
        kvmmu.replay(file, resume=state, tlb="zen4")


def test_what_is_refused(tmp_path):
    for given, words in [({"mode": "machine"}, "checkpoint: the state of a whole machine cannot be kept in a file"),
                         ({"vm": kvmmu.Vcpu(kvmmu.GuestMemory(1 << 20))}, "checkpoint: the memory of a vm is not kept in a file"),
                         ({"checkpoint_every": -1}, "checkpoint_every: want a number of seconds, 0 or more, got -1"),
                         ({"checkpoint_every": float("nan")}, "checkpoint_every: want a number of seconds")]:
        trace = bundled("lackey") if "vm" in given else bundled()
        with pytest.raises(ValueError, match=words):
            kvmmu.replay(trace, checkpoint=tmp_path / "state.npz", **given)
    with pytest.raises(FileNotFoundError):
        kvmmu.replay(bundled("lackey"), checkpoint=tmp_path / "none" / "state.npz")


def test_the_trace_is_not_written_over(tmp_path):
    addr, size, op = accesses_of("4l")
    file = tmp_path / "trace.npz"
    np.savez(file, addr=addr, size=size, op=op)
    (tmp_path / "link").symlink_to(file)
    content = file.read_bytes()
    for name in (file, tmp_path / "link"):
        with pytest.raises(OSError, match="is the same file as .*trace.npz, which is read"):
            kvmmu.replay(file, checkpoint=name)
    assert file.read_bytes() == content


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    file = tmp_path / "state.npz"
    file.write_bytes(b"PK\x03\x04 nothing")
    assert main(["replay", "bundled-lackey", "--resume", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"kvmmu: {file}: not a whole numpy archive")
    assert main(["replay", "bundled", "--machine", "ept", "--checkpoint", str(file)]) == 2
    assert "whole machine" in capsys.readouterr().err
