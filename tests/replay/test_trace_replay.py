# SPDX-License-Identifier: Apache-2.0
"""Traces of the package's own format, replayed: the report of the recording they came from, and no lie passed."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toy_recordings import NEEDS_ZSTD
from toy_traces import CLIPS, ENVIRONMENT, LONG_MODE, OTHER, ROOT, header, machine, memory_rows, rows_of, tables

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, ReplayInterrupted, Vcpu
from kvmmu.traces import Chunk, Header, Op, ParquetTrace, ParquetWriter, Recording, RegisterSet, Stage, Trace, TraceError, convert
from kvmmu.traces.conversion import recording_chunks, recording_header

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")

EVERY_CLIP = pytest.mark.parametrize("name", [
    pytest.param(name, marks=NEEDS_ZSTD if name == "p32" else ()) for name in ("l4", "l5", "pae", "p32", "ntoy", "ndyn", "nlin")])
TIMES = ("seconds", "rate", "waited")


def found(report):
    """A report without what differs from run to run."""
    return {name: value for name, value in report.to_dict().items() if name not in TIMES}


def times(report, n):
    """What a report says if everything happened n times."""
    counts = found(report)
    return {name: {key: n * count for key, count in value.items()} if isinstance(value, dict)
            else n * value if name in ("accesses", "verified", "table_writes", "mmio", "mismatches") else value
            for name, value in counts.items()}


# -- converted recordings -----------------------------------------------------------------------------------------------

@EVERY_CLIP
def test_a_converted_recording_gives_the_same_report(name, tmp_path):
    """Counts, faults, page sizes and contexts, equal one by one; every access verified."""
    recording = Recording.open(CLIPS / name)
    assert convert(recording, tmp_path / "out.parquet") == len(recording)
    expected = kvmmu.replay(recording)
    report = kvmmu.replay(tmp_path / "out.parquet")
    assert found(report) == found(expected)
    assert (report.verified, report.mismatches, report.complete) == (len(recording), 0, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("name", ["l4", "l5", "pae", "ndyn", "nlin"])
def test_a_repeated_recording_gives_the_report_so_many_times(name, tmp_path):
    """Tables and registers are those of the start each time: a dyn phase would fail on those of its end."""
    recording = Recording.open(CLIPS / name)
    convert(recording, tmp_path / "out.parquet", repeat=3)
    report = kvmmu.replay(tmp_path / "out.parquet")
    assert found(report) == times(kvmmu.replay(recording), 3)


def test_without_a_restart_the_second_round_of_a_dyn_phase_fails():
    """The test before can fail: the tables at the end of this clip are not those that its accesses need."""
    recording = Recording.open(CLIPS / "l5")
    chunks = [chunk for chunk in recording_chunks(recording, 2) if not (chunk["op"] == Op.RESTART).any()]
    report = kvmmu.replay(Trace(recording_header(recording), chunks))
    assert report.accesses == 2 * len(recording)
    assert report.mismatches > 0


@pytest.mark.parametrize("name", ["l4", "l5"])
@pytest.mark.parametrize("compression", ["lz4", "zstd", "snappy", "none"])
def test_every_compression(name, compression, tmp_path):
    recording = Recording.open(CLIPS / name)
    convert(recording, tmp_path / "out.parquet", compression=compression)
    assert kvmmu.replay(tmp_path / "out.parquet").verified == len(recording)


# -- traces that lie ----------------------------------------------------------------------------------------------------

def chunks_of(recording):
    """The chunks of a recording, with arrays that a test may spoil."""
    return [{name: column.copy() for name, column in chunk.items()} for chunk in recording_chunks(recording)]


def row_of(chunks, op, number=0):
    """(chunk, row) of an event or access."""
    for chunk in chunks:
        rows = np.flatnonzero(chunk["op"] == op)
        if number < rows.size:
            return chunk, int(rows[number])
        number -= rows.size
    raise AssertionError(f"no {op!r} number {number}")


@pytest.mark.parametrize("bit", [0, 12, 30, 51])
@pytest.mark.parametrize("position", [0, 1, 8191, 8192, 123_456, 199_999])
def test_a_flipped_bit_of_a_recorded_address_is_reported(position, bit):
    """That access and no other, with both addresses, at the edges of blocks and of the trace too."""
    recording = Recording.open(CLIPS / "l4")
    chunks = chunks_of(recording)
    rows = np.concatenate([np.stack([np.full(c["op"].size, i), np.arange(c["op"].size)])[:, c["op"] < 16]
                           for i, c in enumerate(chunks)], axis=1)
    i, row = rows[:, position]
    truth = int(chunks[i]["gpa"][row])
    chunks[i]["gpa"][row] ^= np.uint64(1 << bit)
    report = kvmmu.replay(Trace(recording_header(recording), chunks))
    assert (report.mismatches, report.verified, report.accesses) == (1, len(recording) - 1, len(recording))
    assert sum(report.page_sizes.values()) == len(recording) - 1
    example, = report.examples
    assert (example.position, example.gva) == (position, int(recording.columns(position, position + 1)["gva"][0]))
    assert f"{truth ^ 1 << bit:#x}" in example.recorded
    assert f"-> gpa {truth:#x} (" in example.walked


def test_many_mismatches_are_counted_and_the_first_explained():
    recording = Recording.open(CLIPS / "l5")
    chunks = chunks_of(recording)
    wrong = 0
    for chunk in chunks:
        accesses = chunk["op"] < 16
        chunk["gpa"][accesses] ^= np.uint64(1 << 40)
        wrong += int(accesses.sum())
    report = kvmmu.replay(Trace(recording_header(recording), chunks))
    assert (report.mismatches, report.verified, report.page_sizes) == (wrong, 0, {})
    assert [example.position for example in report.examples] == list(range(20))


@pytest.mark.parametrize(("op", "column", "mask", "word"), [
    (Op.PAGE_FAULT, "value", 1, "#PF"), (Op.PAGE_FAULT, "value", 8, "#PF"), (Op.MOV_CR3, "value", 1 << 13, "gpa"),
    (Op.GUEST_WRITE, "value", 1 << 12, "gpa")])
def test_a_flipped_bit_of_an_event_is_reported(op, column, mask, word):
    """An error code, a CR3, the frame in an entry that the guest wrote."""
    recording = Recording.open(CLIPS / "l5")
    for number in range(40):
        chunks = chunks_of(recording)
        chunk, row = row_of(chunks, op, number)
        chunk[column][row] ^= np.uint64(mask)
        report = kvmmu.replay(Trace(recording_header(recording), chunks))
        if report.mismatches:
            break                           # a table may be written again before it is used
    assert report.mismatches > 0
    assert word in report.examples[0].recorded


def test_a_flipped_npt_fault_is_reported():
    recording = Recording.open(CLIPS / "ndyn")
    chunks = chunks_of(recording)
    chunk, row = row_of(chunks, Op.NPT_FAULT, 7)
    chunk["value"][row] ^= np.uint64(1)                                  # present: of the table, which is not there
    report = kvmmu.replay(Trace(recording_header(recording), chunks))
    assert (report.mismatches, report.verified) == (1, len(recording))
    assert "#NPF" in report.examples[0].recorded


def test_a_flipped_word_of_the_memory_at_the_start_is_reported():
    """The memory that a trace brings is what is walked."""
    recording = Recording.open(CLIPS / "l4")
    chunks = chunks_of(recording)
    for chunk in chunks:
        words = chunk["op"] == Op.MEMORY_WORD
        chunk["value"][words] &= ~np.uint64(1)
    report = kvmmu.replay(Trace(recording_header(recording), chunks))
    assert (report.mismatches, report.verified) == (len(recording), 0)
    assert "not present" in report.examples[0].walked


# -- hand-made traces ---------------------------------------------------------------------------------------------------


def test_accesses_without_a_recorded_address_are_walked_and_counted():
    """No truth, no mismatch: what fails is counted by error code, what reaches memory by page size."""
    rows = rows_of((Op.LOAD, 0x123, 0, 0x100123), (Op.STORE, 0x1000, Access.WRITE, 0), (Op.LOAD, 0x200000, Access.USER, 0),
                   (Op.FETCH, 1 << 47, Access.FETCH, 0), (Op.STORE, 0x300000, Access.WRITE, 0))
    rows["gpa"] = np.ma.masked_equal(rows["gpa"], 0)
    report = kvmmu.replay(Trace(header(), [memory_rows(tables()), rows]))
    assert (report.accesses, report.verified, report.unchecked, report.mismatches) == (5, 1, 4, 0)
    assert report.page_sizes == {"4K": 2}
    assert report.walk_faults == {"0x4 (U)": 1, "0x2 (W)": 1, "NON_CANONICAL": 1}
    assert report.kinds == {"load": 2, "store": 2, "fetch": 1}


def test_each_vcpu_has_registers_of_its_own():
    """Rows of two vCPUs alternate; a MOV to CR3 on one leaves the other alone."""
    entries = tables() | tables(OTHER, 0x900)
    two = header(registers=(RegisterSet(cr3=ROOT, **LONG_MODE), RegisterSet(cr3=OTHER, **LONG_MODE)))
    on_1 = {"vcpu": 1}
    rows = rows_of((Op.LOAD, 0, 0, 0x100000), (Op.LOAD, 0x1000, 0, 0x901000, on_1), (Op.LOAD, 0x1008, 0, 0x101008),
                   (Op.LOAD, 0x2000, 0, 0x902000, on_1), (Op.MOV_CR3, 0, OTHER), (Op.LOAD, 0, 0, 0x900000),
                   (Op.LOAD, 0, 0, 0x900000, on_1), (Op.MOV_CR3, 0, ROOT, on_1), (Op.LOAD, 8, 0, 0x100008, on_1))
    report = kvmmu.replay(Trace(two, [memory_rows(entries), rows]))
    assert (report.verified, report.mismatches) == (7, 0), report.examples
    swapped = kvmmu.replay(Trace(two, [memory_rows(entries), rows | {"vcpu": 1 - rows["vcpu"]}]))
    assert (swapped.verified, swapped.mismatches) == (2, 5), "each is right only behind its own MOV to CR3"


@pytest.mark.parametrize(("rows", "reached"), [
    ([(Op.MOV_CR3, 0, OTHER)], 0x900000),
    ([(Op.MOV_CR3, 0, OTHER), (Op.RESTART, 0)], 0x100000),
    ([(Op.SET_REGS, 0, 1)], 0x900000),
    ([(Op.SET_REGS, 0, 1), (Op.SET_REGS, 0, 0)], 0x100000),
    ([(Op.MOV_CR4, 0, 0xA0)], 0x100000),
    ([(Op.WRMSR_EFER, 0, 0x501)], 0x100000),
    ([(Op.GUEST_WRITE, ROOT + 0x3000, 0x777007)], 0x777000),
    ([(Op.GUEST_WRITE, ROOT + 0x3001, 0x70, {"size": 1})], 0x107000),
    ([(Op.GUEST_WRITE, ROOT + 0x3002, 0x0055, {"size": 2})], 0x550000),
    ([(Op.GUEST_WRITE, ROOT + 0x3000, 0x00444007, {"size": 4})], 0x444000),
    ([(Op.GUEST_WRITE, ROOT + 0x3000, 0x777007), (Op.RESTART, 0)], 0x100000),
    ([(Op.INVLPG, 0), (Op.INVPCID, 0, 0x1232), (Op.HOST_INVALIDATE, 0x1000, 0x1000), (Op.SET_CPL_AC, 0, 1 << 18 | 3)], 0x100000)])
def test_what_events_do(rows, reached):
    """Each event, judged by where address 0 leads behind it."""
    contexts = (RegisterSet(cr3=ROOT, **LONG_MODE), RegisterSet(cr3=OTHER, **LONG_MODE))
    entries = tables() | tables(OTHER, 0x900)
    trace = rows_of((Op.LOAD, 0, 0, 0x100000), *rows, (Op.LOAD, 0, 0, reached))
    report = kvmmu.replay(Trace(header(contexts=contexts), [memory_rows(entries, ((0x1000, 0x10000),)), trace]))
    assert (report.verified, report.mismatches) == (2, 0), report.examples


def test_paging_goes_off_and_on():
    """MOV to CR0 and CR4 follow the rules of the guest's instructions, LMA included."""
    rows = rows_of((Op.LOAD, 0, 0, 0x100000), (Op.MOV_CR0, 0, 0x50033), (Op.LOAD, 0x1234, 0, 0x1234), (Op.MOV_CR0, 0, 0x80050033),
                   (Op.LOAD, 0, 0, 0x100000))
    report = kvmmu.replay(Trace(header(), [memory_rows(tables()), rows]))
    assert (report.verified, report.page_sizes, report.mode) == (3, {"4K": 2, "paging off": 1}, "4l")


def test_protection_keys_by_wrpkru():
    """A key that WRPKRU disables makes the next user access fail."""
    entries = tables() | {ROOT + 0x3000: 0x100007 | 5 << 59}
    regs = RegisterSet(cr3=ROOT, **LONG_MODE | {"cr4": 0x20 | 1 << 22})
    rows = rows_of((Op.LOAD, 0, Access.USER, 0x100000), (Op.WRPKRU, 0, 1 << 10), (Op.PAGE_FAULT, 0, 0x25),
                   (Op.LOAD, 0, Access.USER, 0x100000))
    report = kvmmu.replay(Trace(header(registers=(regs,)), [memory_rows(entries), rows]))
    assert (report.verified, report.mismatches, report.faults_reproduced) == (1, 1, {"0x25 (P U PK)": 1})
    assert report.examples[0].position == 1


def test_protection_keys_of_supervisor_pages():
    """IA32_PKRS at the start, by WRMSR, in a register set and in a nested guest's: which key is in force at each access."""
    entries = tables() | {ROOT + 0x3000: 0x100003 | 5 << 59} | {0x11000: 0x12007, 0x12000: 0x87}
    pks = LONG_MODE | {"cr4": 0x20 | 1 << 24}
    denied = RegisterSet(cr3=ROOT, **pks, pkrs=1 << 10)
    nested = RegisterSet(cr3=ROOT, **pks, pkrs=2 << 10, second_stage=Stage(eptp=0x1101E))
    contexts = (denied, RegisterSet(cr3=ROOT, **pks), nested)
    read, write = (Op.LOAD, 0, 0, 0x100000), (Op.STORE, 0, Access.WRITE, 0x100000)
    rows = rows_of((Op.PAGE_FAULT, 0, 0x21), (Op.WRMSR_PKRS, 0, 2 << 10), read, (Op.PAGE_FAULT, 0, 0x23), (Op.WRMSR_PKRS, 0, 0),
                   write, (Op.SET_REGS, 0, 0), (Op.PAGE_FAULT, 0, 0x21), (Op.SET_REGS, 0, 1), write, (Op.VMENTER, 0, 2), read,
                   (Op.PAGE_FAULT, 0, 0x23), (Op.WRMSR_PKRS, 0, 0), write, (Op.VMEXIT, 0, 0), (Op.PAGE_FAULT, 0, 0x21))
    first = header(registers=(denied,), contexts=contexts)
    report = kvmmu.replay(Trace(first, [memory_rows(entries, ((0x1000, 0x13000),)), rows]))
    assert (report.verified, report.mismatches) == (5, 0), report.examples
    assert report.faults_reproduced == {"0x21 (P PK)": 3, "0x23 (P W PK)": 2}
    again = Header.from_json(first.to_json())
    assert again == first
    assert (again.registers[0].pkrs, again.contexts[1].pkrs) == (1 << 10, 0)


def test_headers_of_before_have_no_pkrs():
    """The register is written where it counts alone, so that older readers take all other traces."""
    text = header().to_json()
    assert "pkrs" not in text
    assert Header.from_json(text).registers[0].pkrs == 0
    wrong = header(registers=(RegisterSet(cr3=ROOT, **LONG_MODE, pkrs=7),)).to_json().replace('"0x7"', '"0x100000000"')
    with pytest.raises(TraceError, match="pkrs"):
        Header.from_json(wrong)


def test_a_processor_without_pks_has_no_pkrs():
    for cpu in ({"pks": False}, {"conformance": "kvm"}):
        rows = rows_of((Op.WRMSR_PKRS, 0, 1), (Op.LOAD, 0, 0, 0x100000))
        with pytest.raises(TraceError, match="WRMSR_PKRS: #GP"):
            kvmmu.replay(Trace(header(cpu={"vendor": "intel", "maxphyaddr": 48} | cpu), [memory_rows(tables()), rows]))
    with pytest.raises(TraceError, match="value is 4294967296 .*32 bits for WRMSR_PKRS"):
        kvmmu.replay(Trace(header(), [memory_rows(tables()), rows_of((Op.WRMSR_PKRS, 0, 1 << 32))]))


def test_a_nested_guest_under_ept():
    """VMENTER and VMEXIT name register sets; L2 walks through the EPT of its set."""
    ept = {0x11000: 0x12007, 0x12000: 0x87}                             # 1G: identity
    l2 = RegisterSet(cr3=OTHER, **LONG_MODE, second_stage=Stage(eptp=0x1101E, mbec=False))
    contexts = (RegisterSet(cr3=ROOT, **LONG_MODE), l2)
    rows = rows_of((Op.LOAD, 0, 0, 0x100000), (Op.VMENTER, 0, 1), (Op.LOAD, 0, 0, 0x900000), (Op.VMEXIT, 0, 0),
                   (Op.LOAD, 0, 0, 0x100000))
    trace = Trace(header(contexts=contexts), [memory_rows(tables() | tables(OTHER, 0x900) | ept, ((0x1000, 0x12000),)), rows])
    report = kvmmu.replay(trace)
    assert (report.verified, report.mismatches) == (3, 0), report.examples
    assert report.contexts == 2


# -- chunks of somebody else's ------------------------------------------------------------------------------------------


def test_an_iterable_of_mappings_on_a_vcpu():
    """Columns that are left out have their defaults; the vCPU's memory is walked, its registers are those of the start."""
    addr = np.arange(0, 1 << 21, 8, dtype=np.uint64)
    chunks = ({"op": np.zeros(part.size, np.uint8), "addr": part, "access": np.zeros(part.size, np.uint8),
               "gpa": part + np.uint64(0x100000)} for part in np.array_split(addr, 7))
    report = kvmmu.replay(chunks, machine())
    assert (report.accesses, report.verified, report.page_sizes) == (addr.size, addr.size, {"4K": addr.size})


def test_an_iterable_of_arrow_batches_on_a_vcpu():
    """Record batches, with nulls where no address was recorded."""
    import pyarrow as pa

    batch = pa.record_batch({
        "op": pa.array([0, 1, 16], pa.uint8()), "addr": pa.array([0, 0x1000, 0], pa.uint64()),
        "access": pa.array([0, 2, 0], pa.uint8()),
        "value": pa.array([None, None, ROOT], pa.uint64()), "gpa": pa.array([0x100000, None, None], pa.uint64())})
    calls = []
    report = kvmmu.replay([batch, batch], machine(), progress=lambda done, total: calls.append((done, total)))
    assert (report.accesses, report.verified, report.unchecked, report.kinds["store"]) == (4, 2, 2, 2)
    assert calls == [(2, 0), (4, 0)]


def test_writes_of_a_trace_go_to_the_given_memory():
    vcpu = machine()
    kvmmu.replay([rows_of((Op.GUEST_WRITE, 0x8000, 0x1234), (Op.LOAD, 0, 0, 0x100000))], vcpu)
    assert vcpu.mem.read_u64(0x8000) == 0x1234
    assert vcpu.mem.read_u64(ROOT) & 0x20, "accessed"


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (([],), ValueError, "vm: .*want a Vcpu"), ((5,), TypeError, "trace: .*int"), (([], 5), TypeError, "vm: .*int"),
    ((CLIPS / "l4", machine()), ValueError, "vm: .*its own memory"),
    (([], machine(), {"tlb": 5}), TypeError, "tlb: .*int"), (([], machine(), {"phase": "dyn"}), ValueError, "phase: .*'dyn'"),
    (([5], machine()), TraceError, "chunk is a int"), (([memory_rows(tables())], machine()), TraceError, "MEMORY")])
def test_bad_arguments_of_replay(arguments, error, words):
    *arguments, named = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=words):
        kvmmu.replay(*arguments, **named)


@pytest.mark.parametrize(("rows", "words"), [
    ([(Op.GUEST_WRITE, 1 << 40, 1)], "row 516: GUEST_WRITE: goes to gpa 0x10000000000"),
    ([(Op.LOAD, 0, 0, 0x100000), (Op.MEMORY, 0x100000, 0x1000)], "row 517: MEMORY: .*behind"),
    ([(Op.MOV_CR0, 0, 1 << 31)], "row 516: MOV_CR0: #GP"), ([(Op.MOV_CR3, 0, 1 << 50)], "row 516: MOV_CR3: #GP"),
    ([(Op.WRPKRU, 0, 1)], "row 516: WRPKRU: #UD"), ([(Op.SET_REGS, 0, 0)], "row 516: value is 0 .*below 0"),
    ([(Op.NPT_FAULT, 0, 1)], "row 516: NPT_FAULT: no nested guest")])
def test_events_that_no_cpu_does(rows, words):
    """The row and the reason; what was done until then is in the error."""
    chunks = [memory_rows(tables()), rows_of(*rows)]
    with pytest.raises(TraceError, match=words) as caught:
        kvmmu.replay(Trace(header(), chunks))
    assert caught.value.report.complete is False


@pytest.mark.parametrize(("regions", "words", "text"), [
    (((0x1000, 0x8000), (0x8000, 0x1000)), {}, "overlap at gpa 0x8000"),
    (((0x1000, 0x1000),), {0x2000: 1}, "gpa 0x2000 is in no"), (((0x1000, 0x1000),), {0: 1}, "gpa 0x0 is in no"),
    (((0, 1 << 41),), {}, "more than 0x10000000000"), ((), {}, "brings no memory")])
def test_memory_that_makes_no_sense(regions, words, text):
    chunks = [memory_rows(words, regions), rows_of((Op.LOAD, 0, 0, 0))]
    with pytest.raises(TraceError, match=text):
        kvmmu.replay(Trace(header(), chunks))


# -- Ctrl-C, memory, the command ----------------------------------------------------------------------------------------

def test_an_interrupt_leaves_the_report_so_far():
    """KeyboardInterrupt out of replay(), for a trace and for a recording."""
    recording = Recording.open(CLIPS / "l5")

    def stop(done, total):
        raise KeyboardInterrupt
    for source in (recording, Trace(recording_header(recording), recording_chunks(recording))):
        with pytest.raises(ReplayInterrupted) as caught:
            kvmmu.replay(source, progress=stop)
        report = caught.value.report
        assert report.complete is False
        assert 0 < report.accesses == report.verified == sum(report.kinds.values()) < len(recording)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to one process")
def test_the_command_stops_on_sigint_with_its_report(tmp_path):
    """Exit status 130, the report on stdout, one line on stderr. The process waits for the signal behind some chunks."""
    out = tmp_path / "long.parquet"
    convert(Recording.open(CLIPS / "l4"), out, repeat=20)
    program = """if True:
        import sys, time
        from kvmmu import cli
        from kvmmu.replay import trace_replay
        walk, chunks = trace_replay.RowRun.chunk, []
        def chunk(run, rows):
            walk(run, rows)
            chunks.append(rows)
            if len(chunks) == 9:
                print("nine", file=sys.stderr, flush=True)
                time.sleep(60)
        trace_replay.RowRun.chunk = chunk
        sys.exit(cli.main(sys.argv[1:]))
    """
    process = subprocess.Popen([sys.executable, "-P", "-c", program, "replay", str(out), "--json"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stderr.readline() == "nine\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    report = json.loads(stdout)
    assert report["complete"] is False
    assert 0 < report["accesses"] == report["verified"] < 4_000_000
    assert stderr == f"kvmmu: interrupted after {report['accesses']:,} accesses\n"


@pytest.mark.skipif(sys.platform == "win32", reason="resource")
def test_memory_does_not_grow_with_the_trace(tmp_path):
    """Ten and sixty times the same accesses: peak RSS differs by less than what the rows of the difference would take."""
    recording = Recording.open(CLIPS / "l4")
    program = ("import resource, sys, kvmmu\nreport = kvmmu.replay(sys.argv[1])\nassert report.mismatches == 0\n"
               "print(report.accesses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for repeat in (10, 60):
        convert(recording, tmp_path / "out.parquet", repeat=repeat)
        done = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path / "out.parquet")], text=True, check=True,
                              capture_output=True, env=ENVIRONMENT)
        accesses, peak = map(int, done.stdout.split())
        assert accesses == repeat * len(recording)
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 50 * len(recording) * 18 / 1024 / 3


def test_chunks_that_were_checked_are_taken_as_they_are():
    rows = Chunk.checked(rows_of((Op.LOAD, 0, 0, 0x100000)), header())
    assert kvmmu.replay(Trace(header(), [memory_rows(tables()), rows])).verified == 1


def test_a_trace_file_of_hand_made_rows(tmp_path):
    """Written, read, replayed; the header comes back with its totals."""
    path = tmp_path / "hand.parquet"
    with ParquetWriter(path, header(name="hand")) as writer:
        writer.write(memory_rows(tables()))
        writer.write(rows_of((Op.LOAD, 0, 0, 0x100000), (Op.PAGE_FAULT, 1 << 21, 4), (Op.LOAD, 8, 0, 0x100008)))
    trace = ParquetTrace(path)
    assert trace.header == replace(header(name="hand"), accesses=2, rows=519)
    report = kvmmu.replay(trace)
    assert (report.name, report.verified, report.faults_reproduced) == ("hand", 2, {"0x4 (U)": 1})


# -- against the scalar walk --------------------------------------------------------------------------------------------

class Model:
    """A trace replayed row by row through gva_to_gpa(): the obvious way, which the loop must equal."""

    def __init__(self, entries, registers, contexts):
        self.entries, self.registers, self.contexts = entries, registers, contexts
        self.start()

    def start(self):
        self.mem = GuestMemory(0x10000)
        for gpa, entry in self.entries.items():
            self.mem.write_u64(gpa, entry)
        self.vcpu = Vcpu(self.mem, cpu=CpuModel(maxphyaddr=48))
        self.regs = [self.plain(regs) for regs in self.registers]

    @staticmethod
    def plain(regs):
        return {name: getattr(regs, name) for name in ("cr0", "cr3", "cr4", "efer")}

    def access(self, vcpu, gva, access):
        """(gpa or None, level or None, error code or status)."""
        self.vcpu.set_regs(**self.regs[vcpu])
        t = self.vcpu.gva_walk.translate(np.array([gva], np.uint64), access, fields=("gpa", "status", "error_code", "level"))
        if t.status[0] == kvmmu.Status.OK:
            assert self.vcpu.gva_walk.gva_to_gpa(gva, access) == int(t.gpa[0])
            return int(t.gpa[0]), int(t.level[0]), None
        return None, None, int(t.error_code[0]) if t.status[0] == kvmmu.Status.PAGE_FAULT else kvmmu.Status(t.status[0]).name

    def event(self, op, vcpu, addr, value, size):
        if op == Op.MOV_CR3:
            self.regs[vcpu]["cr3"] = value
        elif op == Op.SET_REGS:
            self.regs[vcpu] = self.plain(self.contexts[value])
        elif op == Op.GUEST_WRITE:
            self.mem.write(addr, value.to_bytes(size, "little"))
        elif op == Op.RESTART:
            self.start()


@pytest.mark.parametrize("seed", range(12))
def test_random_traces_as_the_scalar_walk_has_them(seed):
    """Accesses of two vCPUs, lies, nulls, table writes of every size and register loads, in chunks of any length."""
    rng = np.random.default_rng(seed)
    entries = tables() | tables(OTHER, 0x900)
    entries |= {OTHER + 0x2008: 0x87 | 0x200000, ROOT + 0x2008: 0x200083}           # a user's and a supervisor's 2M page
    registers = (RegisterSet(cr3=ROOT, **LONG_MODE), RegisterSet(cr3=OTHER, **LONG_MODE | {"cr0": 0x80040033}))
    contexts = (*registers, RegisterSet(cr3=ROOT, **LONG_MODE | {"cr0": 0x50033, "efer": 0}))
    model = Model(entries, registers, contexts)
    rows, wrong, sizes, faults, kinds = [], [], {}, {}, [0, 0, 0]
    accesses = unchecked = writes = 0
    dense = seed % 3                        # 0: hardly any event; 2: one in two rows
    for _ in range(1500 if dense else 4000):
        vcpu = int(rng.integers(2)) if seed % 2 else 0
        if rng.random() < (0.002, 0.05, 0.5)[dense]:
            op = Op(rng.choice([Op.MOV_CR3, Op.SET_REGS, Op.GUEST_WRITE, Op.GUEST_WRITE, Op.GUEST_WRITE, Op.RESTART, Op.INVLPG]))
            size = int(rng.choice([1, 2, 4, 8]))
            addr = int(rng.choice([ROOT, OTHER])) + 0x3000 + size * int(rng.integers(0x200 // size))
            value = {Op.MOV_CR3: int(rng.choice([ROOT, OTHER])), Op.SET_REGS: int(rng.integers(3)),
                     Op.GUEST_WRITE: int(rng.integers(0, 1 << 8 * size, dtype=np.uint64)) if size < 8
                     else int(rng.integers(0x200)) << 12 | int(rng.integers(8))}.get(op, 0)
            rows.append((op, addr, value, {"size": size, "vcpu": vcpu}))
            model.event(op, vcpu, addr, value, size)
            writes += op == Op.GUEST_WRITE
            continue
        kind = int(rng.integers(3))
        gva = int(rng.choice([rng.integers(0x40000), rng.integers(1 << 23), 1 << 47], p=[0.8, 0.19, 0.01]))
        access = (0, 2, 16)[kind] | int(rng.choice([0, 4, 8]))
        gpa, level, failure = model.access(vcpu, gva, access)
        draw = rng.random()
        truth = None if draw < 0.1 else (gpa if gpa is not None and draw < 0.95 else int(rng.integers(1 << 52)))
        rows.append((kind, gva, access, truth, {"vcpu": vcpu}))
        kinds[kind] += 1
        if truth is None:
            unchecked += 1
            if failure is not None:
                faults[failure] = faults.get(failure, 0) + 1
        elif truth != gpa:
            wrong.append(accesses)
        if gpa is not None and truth in (None, gpa):
            sizes[level] = sizes.get(level, 0) + 1
        accesses += 1
    columns = rows_of(*rows)
    columns["gpa"] = np.ma.masked_array(columns["gpa"], [row[0] < 16 and row[3] is None for row in rows])
    cuts = np.sort(rng.integers(0, len(rows), 5))
    chunks = [dict(zip(columns, parts, strict=True))
              for parts in zip(*(np.split(column, cuts) for column in columns.values()), strict=True)]
    report = kvmmu.replay(Trace(header(registers=registers, contexts=contexts), [memory_rows(entries, ((0, 0x10000),)), *chunks]))
    assert (report.accesses, report.unchecked, report.mismatches) == (accesses, unchecked, len(wrong))
    assert report.verified == accesses - unchecked - len(wrong)
    assert [example.position for example in report.examples] == wrong[:20]
    assert report.kinds == dict(zip(("load", "store", "fetch"), kinds, strict=True))
    assert report.table_writes == writes
    assert report.page_sizes == {("paging off", "4K", "2M", "1G")[level]: count for level, count in sizes.items()}
    assert {name.split()[0]: count for name, count in report.walk_faults.items()} == {
        hex(name) if isinstance(name, int) else name: count for name, count in faults.items()}


@pytest.mark.parametrize(("change", "words"), [
    ({"size": np.full(3, 255, np.uint8)}, "size is 255"), ({"op": np.full(3, 99, np.uint8)}, "op is 99"),
    ({"access": np.zeros(2, np.uint8)}, "'access' has 2 rows"), ({"addr": np.zeros(3)}, "'addr' is float64"),
    ({"vcpu": np.full(3, 7, np.uint16)}, "vcpu is 7"), ({"value": None}, "null")])
def test_a_chunk_that_somebody_changed_is_checked_again(change, words):
    """What dataclasses.replace() or the constructor make is not what `Chunk.checked()` saw."""
    rows = Chunk.checked(rows_of((Op.LOAD, 0, 0, 0x100000), (Op.GUEST_WRITE, 0x8000, 1), (Op.LOAD, 8, 0, 0x100008)), header())
    with pytest.raises(TraceError, match=words):
        kvmmu.replay(Trace(header(), [memory_rows(tables()), replace(rows, **change)]))


def test_a_chunk_that_says_that_all_addresses_are_known():
    """A walk that fails ends at 2**64 - 1, and a row without a recorded address has that: it is counted, not verified."""
    rows = Chunk.checked(rows_of((Op.LOAD, 1 << 21, 0, 0)) | {"gpa": np.array([2**64 - 1], np.uint64)}, header())
    report = kvmmu.replay(Trace(header(), [memory_rows(tables()), replace(rows, all_known=True, has_events=False)]))
    assert (report.verified, report.unchecked, report.walk_faults) == (0, 1, {"0x0": 1})


@pytest.mark.parametrize(("given", "words"), [
    ({"page": "x"}, "page: want '4k', '2m', '1g' or 'thp', got 'x'"), ({"page": 5}, "page: want .* got 5"),
    ({"frames": "x"}, "frames: want 'linear' or 'random', got 'x'"), ({"paging": "x"}, "paging: is 'x'; allowed is 32, pae"),
    ({"paging": "32", "page": "1g"}, "page: mode '32' has no 1G pages"), ({"pager": 1}, "pager: want a Pager or None, got int"),
    ({"mode": "x"}, "mode: want 'walk' or 'machine', got 'x'"), ({"host": "x"}, "host: is of mode 'machine'; want None, got 'x'"),
    ({"mode": "machine", "host": "x"}, "host: want 'ept', 'npt' or 'shadow', got 'x'"),
    ({"mode": "machine", "backing": "x"}, "backing: want '4k', '2m' or '1g', got 'x'"),
    ({"progress": 1}, "progress: want a bool or a callable, got int"),
    ({"checkpoint_every": -1}, "checkpoint_every: want a number"),
    ({"scheduler": "x"}, "scheduler: want 'threads' or 'processes', got 'x'"), ({"scheduler": 1}, "scheduler: want .* got int"),
    ({"tlb": 5}, "tlb: want"), ({"vm": 5}, "vm: want a Vm, a Vcpu or None, got int"),
])
def test_arguments_are_checked_before_the_trace(given, words):
    """A trace without tables that is read once would be refused for that."""
    once = Trace(Header(registers=()), iter([]))
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        kvmmu.replay(once, **given)
    with pytest.raises(ValueError, match="^(pager: the chunks of a Trace are read once|mode: 'machine' is for)"):
        kvmmu.replay(once, **{"mode": "machine"} if "mode" in given else {})


@pytest.mark.parametrize("seed", range(4))
def test_a_write_above_one_of_many_tables(seed):
    """More last tables than a walk remembers, then few pages again and again: a write above one counts for the next access."""
    rng, regions = np.random.default_rng(seed), 90
    mem = GuestMemory(128 << 12)
    pml4, pdpt, directories, leaves = 1 << 12, 2 << 12, 3 << 12, (3 + regions) << 12
    which = rng.integers(0, 6, 512 * regions)                           # leaf table of each entry of the directories
    pages = np.arange(6 * 512, dtype=np.uint64) + np.uint64(100)        # behind the leaf tables

    def entries(frames):
        return (np.asarray(frames, np.uint64) << np.uint64(12) | np.uint64(0x67)).tobytes()

    mem.write(pml4, entries([pdpt >> 12]))
    mem.write(pdpt, entries(np.arange(regions) + 3))
    mem.write(directories, entries(which + (leaves >> 12)))
    mem.write(leaves, entries(pages))
    vcpu = Vcpu(mem, cpu=CpuModel(maxphyaddr=40))
    vcpu.set_regs(**LONG_MODE | {"cr3": pml4})
    columns = {name: [] for name in ("op", "addr", "gpa", "value", "access", "size")}

    def access(gva):
        gva = np.asarray(gva, np.uint64)
        frame = pages[512 * which[gva >> np.uint64(21)] + (gva >> np.uint64(12) & np.uint64(511)).astype(int)]
        add(0, gva, frame << np.uint64(12) | gva & np.uint64(0xFFF), 0, 4, 1)

    def add(*row):
        for column, values in zip(columns.values(), row, strict=True):
            column.append(np.broadcast_to(np.asarray(values, np.uint64), np.shape(row[1])))

    access(rng.integers(0, regions << 30, 60_000))
    hot = rng.integers(0, regions << 18, 40, np.uint64) << np.uint64(12)
    access(hot[rng.integers(0, 40, 130_000)])
    for gva in hot:
        at = int(gva >> np.uint64(21))
        which[at] = (which[at] + 1) % 6
        add(Op.GUEST_WRITE, [directories + 8 * at], 0, int.from_bytes(entries([(leaves >> 12) + which[at]]), "little"), 0, 8)
        access([gva])
        access(hot)
    kinds = {"op": np.uint8, "access": np.uint8, "size": np.uint8}
    chunk = {name: np.concatenate(column).astype(kinds.get(name, np.uint64)) for name, column in columns.items()}
    report = kvmmu.replay([chunk], vcpu)
    assert (report.mismatches, report.verified) == (0, 190_000 + 40 * 41)
