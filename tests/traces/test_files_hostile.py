# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made to harm: damage at random places, bombs, special files. A refusal names the file and costs little.

`KVMMU_HOSTILE=1` reads 50 truncated and 500 corrupted copies of every sample file instead of a few (minutes).
"""

import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from paths import DATA, ROOT
from toy_recordings import NEEDS_ZSTD, npy, toy_tables, toy_trace, write_toy, zip_of
from toy_traces import memory_rows, rows_of, tables

import kvmmu
from kvmmu import cli
from kvmmu.traces import (
    Header,
    Op,
    ParquetTrace,
    ParquetWriter,
    Recording,
    RecordingError,
    RegisterSet,
    Trace,
    TraceError,
    open_npz,
    recording,
)

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and special files of POSIX")

SUPPORT = ROOT / "tests" / "support"
CLIPS = DATA / "linux"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(kvmmu.__file__).parents[1])}
WHOLE = os.environ.get("KVMMU_HOSTILE") == "1"
TRUNCATIONS, CORRUPTIONS = (50, 500) if WHOLE else (3, 9)
PEAK = 700                              # MiB that reading a damaged sample may take, Python and NumPy included
U8, U64 = np.uint8, np.uint64
FLAT = RegisterSet(cr0=1, cr3=0, cr4=0, efer=0)             # paging off
LONG_MODE = Header(registers=(RegisterSet(cr0=0x80050033, cr3=0x1000, cr4=0x20, efer=0xD01),), cpu={"maxphyaddr": 48})


# -- damage at random places --------------------------------------------------------------------------------------------

SAMPLES = sorted(path.relative_to(CLIPS).as_posix() for path in CLIPS.glob("*/*"))


def sample(folder, name):
    """A copy of the clip that a file is of; its own small trace for a .parquet."""
    clip = Path(shutil.copytree(CLIPS / name.split("/")[0], folder / "clip"))
    return clip, name.split("/")[1]


def small_trace(folder):
    folder.mkdir()
    with ParquetWriter(folder / "small.parquet", LONG_MODE) as writer:
        writer.write(memory_rows(tables()))
        writer.write(rows_of(*[(Op.LOAD, 8 * i, 0, 0x100000 + 8 * i) for i in range(2000)], (Op.PAGE_FAULT, 1 << 21, 4)))
    return folder, "small.parquet"


def sweep(folder, name, seed):
    """What tests/support/damage.py counts, in a process of its own."""
    done = subprocess.run([sys.executable, SUPPORT / "damage.py", folder, name, str(TRUNCATIONS), str(CORRUPTIONS), str(seed)],
                          text=True, capture_output=True, check=False, env=ENVIRONMENT, timeout=1800 if WHOLE else 300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["refused"] + counts["read"] == TRUNCATIONS + CORRUPTIONS
    assert counts["refused"] >= TRUNCATIONS, "a file that is cut short is whole"
    assert counts["peak"] < PEAK
    return counts


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS_ZSTD if name.endswith(".zst") else ()) for name in SAMPLES])
def test_a_damaged_sample_is_refused_or_read(name, tmp_path):
    """Never another exception, no hang, no heap of memory; of archives next to nothing gets past the checksums."""
    counts = sweep(*sample(tmp_path, name), seed=SAMPLES.index(name))
    if "npz" in name:
        assert counts["read"] <= 2 + CORRUPTIONS // 10


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_trace_is_refused_or_read(seed, tmp_path):
    sweep(*small_trace(tmp_path / "trace"), seed)


def test_random_values_in_a_header_never_raise_anything_but_trace_errors(tmp_path):
    """No checksum is in the way: a header with random numbers and words in random places, replayed."""
    rng = np.random.default_rng(7)
    plain = json.loads(Header(registers=(FLAT, FLAT), contexts=(FLAT, FLAT), cpu={"vendor": "intel", "maxphyaddr": 40}).to_json())
    plain["contexts"][1]["second_stage"] = {"ncr3": "0x1000", "cr4": "0x20", "efer": "0xd01"}
    values = [0, -1, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 300, 1.5, 1e308, True, None, "", "intel", "0x10", "-0x1", [],
              {}, [0] * 4, "\x1b[0m", "\ud800"]
    rows = rows_of((Op.LOAD, 0, 0, 0), (Op.SET_REGS, 0, 0), (Op.LOAD, 0, 0, 0), (Op.VMENTER, 0, 1), (Op.LOAD, 0, 0, 0))
    refused = 0
    for _ in range(1000 if WHOLE else 200):
        spoilt = json.loads(json.dumps(plain))
        target = spoilt
        while True:
            key = rng.choice(sorted(target)) if isinstance(target, dict) else int(rng.integers(len(target)))
            if isinstance(target[key], (dict, list)) and target[key] and rng.random() < 0.8:
                target = target[key]
                continue
            target[key] = values[int(rng.integers(len(values)))]
            break
        try:
            kvmmu.replay(Trace(Header.from_json(json.dumps(spoilt)), [memory_rows({}), rows]))
        except TraceError:
            refused += 1
    assert refused > 50


# -- bombs --------------------------------------------------------------------------------------------------------------

def in_limits(program, *args, megabytes=1500):
    """(what a program prints, its peak of memory in MiB, its seconds); with so much address space."""
    program = (f"import sys\nsys.path.insert(0, {str(SUPPORT)!r})\nimport kvmmu\nfrom damage import peak\n"
               f"from kvmmu.traces import *\n{program}\nprint(peak())")
    started = time.perf_counter()
    limit = None if megabytes is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2)
    done = subprocess.run([sys.executable, "-Pc", program, *map(str, args)], text=True, capture_output=True, check=False,
                          env=ENVIRONMENT, timeout=120, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    *text, peak = done.stdout.splitlines()
    return "\n".join(text), int(peak), time.perf_counter() - started


REFUSED = """
try:
    print(repr(kvmmu.replay(sys.argv[1])))
except (RecordingError, TraceError) as error:
    print(error)
"""


def zstd_of_zeros(path, size, beginning=b""):
    zstandard = pytest.importorskip("zstandard", reason="writes the test's zstd stream")
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        writer.write(beginning)
        for _ in range(size >> 20):
            writer.write(bytes(1 << 20))
    return path


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


def test_a_zstd_stream_that_is_no_archive_ends_at_its_beginning(toy):
    """A gigabyte of zeros in 40 kB: the first block tells."""
    (toy / "static_trace.npz").unlink()
    file = zstd_of_zeros(toy / "static_trace.npz.zst", 1 << 30)
    assert file.stat().st_size < 1 << 20
    text, peak, seconds = in_limits(REFUSED, toy)
    assert text == f"{file}: not a whole numpy archive (what is compressed is no zip file)"
    assert (peak < 300, seconds < 60) == (True, True)


@pytest.mark.parametrize("tool", [False, True], ids=["package", "tool"])
def test_a_zstd_stream_that_begins_like_an_archive_ends_at_the_limit(toy, tool):
    """The message names the limit and the variable that raises it; the reader and the tool stop there."""
    if tool and not shutil.which("zstd"):
        pytest.skip("no zstd command line tool")
    (toy / "static_trace.npz").unlink()
    file = zstd_of_zeros(toy / "static_trace.npz.zst", 1 << 30, b"PK\x03\x04")
    program = "import os\nos.environ['KVMMU_RECORDING_LIMIT'] = str(100 << 20)\n"
    program += "sys.modules['zstandard'] = None\n" if tool else ""
    text, peak, seconds = in_limits(program + REFUSED, toy)
    assert text.startswith(f"{file}: holds more than 104,857,600 bytes; allowed are 104,857,600")
    assert "KVMMU_RECORDING_LIMIT" in text
    assert (peak < 500, seconds < 60) == (True, True)


def test_arrays_beyond_the_limit_are_refused_by_their_directory(toy):
    """256 MiB of zeros in one array of the schema, in 1 MB: nothing is decompressed, within the limit neither."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (256 << 20,)})
    with zipfile.ZipFile(toy / "static_trace.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in toy_trace().items():
            if name != "kind":
                archive.writestr(f"{name}.npy", npy(array))
        with archive.open("kind.npy", "w", force_zip64=True) as member:
            member.write(head.getvalue())
            for _ in range(256):
                member.write(bytes(1 << 20))
    limited = "import os\nos.environ['KVMMU_RECORDING_LIMIT'] = str(256 << 20)\n" + REFUSED
    text, peak, _ = in_limits(limited, toy)
    assert "static_trace.npz: holds arrays of 268,43" in text
    assert "allowed are 268,435,456, a limit against hostile files. Set KVMMU_RECORDING_LIMIT" in text
    assert peak < 200
    text, peak, _ = in_limits(REFUSED, toy)
    assert text == f"{toy / 'static_trace.npz'}: kind: has shape ({256 << 20},); allowed is 6 (accesses) instead of {256 << 20}"
    assert peak < 200, "the header is checked before the data"


def test_an_array_that_no_schema_has_is_not_read(toy):
    """As large as it may say: its member is damaged, and nobody minds."""
    with zipfile.ZipFile(toy / "static_trace.npz", "a") as archive:
        archive.writestr("junk.npy", b"no array at all")
    assert len(Recording.open(toy)) == 6
    with pytest.raises(RecordingError, match="junk: not a whole numpy array"):
        open_npz(toy / "static_trace.npz")


@pytest.mark.parametrize("members", [2000, 20_000])
def test_an_archive_of_very_many_members_is_refused_by_its_directory(toy, members):
    with zipfile.ZipFile(toy / "static_trace.npz", "w") as archive:
        for number in range(members):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    text, peak, seconds = in_limits(REFUSED, toy)
    assert text.startswith(f"{toy / 'static_trace.npz'}: ")
    assert "allowed are 1024" in text or "directory is longer than 131072 bytes, which is all that is allowed" in text
    assert (peak < 150, seconds < 60) == (True, True)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_decompressors_give_little_at_a_time(tmp_path, method):
    """A member that says 192 bytes and holds 256 MiB of zeros: what is beyond those bytes is not made."""
    content = bytearray(zip_of([("pfn.npy", npy(np.zeros(1 << 25, U64)))], method))
    for signature, field in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.rindex(signature) + field
        content[at:at + 4] = (192).to_bytes(4, "little")
    (tmp_path / "bomb.npz").write_bytes(content)
    text, peak, _ = in_limits("try: open_npz(sys.argv[1])\nexcept RecordingError as error: print(error)", tmp_path / "bomb.npz")
    assert "bomb.npz: pfn: not a whole numpy array" in text
    assert peak < 200


def test_meta_of_any_length(toy):
    with (toy / "meta.json").open("ab") as file:
        file.truncate(1 << 40)                          # a hole: no disk is taken
    text, peak, _ = in_limits(REFUSED, toy)
    assert text == f"{toy / 'meta.json'}: is longer than 1048576 bytes, which is all that is allowed"
    assert peak < 150


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "\u0661"])
def test_a_limit_that_is_no_number(toy, monkeypatch, text):
    monkeypatch.setenv("KVMMU_RECORDING_LIMIT", text)
    with pytest.raises(ValueError, match="KVMMU_RECORDING_LIMIT: is .*; allowed is a number of bytes"):
        Recording.open(toy)


# -- memory of traces ---------------------------------------------------------------------------------------------------

def flat_trace(path, *rows, size=1 << 40):
    with ParquetWriter(path, Header(registers=(FLAT,))) as writer:
        writer.write(rows_of((Op.MEMORY, 0, size), *rows))
    return path


REPLAYED = "report = kvmmu.replay(sys.argv[1])\nprint(report.accesses, report.verified, report.mismatches)"


def test_memory_costs_what_is_written(tmp_path):
    """A file of 1.2 kB that declares 1 TiB, with words and writes at both ends."""
    top = (1 << 40) - 8
    file = flat_trace(tmp_path / "wide.parquet", (Op.MEMORY_WORD, top, 5), (Op.MEMORY_WORD, 8, 7), (Op.LOAD, 8, 0, 8),
                      (Op.GUEST_WRITE, top - 8, 1), (Op.RESTART, 0), (Op.LOAD, 0, 0, 0))
    assert file.stat().st_size < 4000
    text, peak, seconds = in_limits(REPLAYED, file, megabytes=None)
    assert text == "2 2 0"
    assert (peak < 200, seconds < 60) == (True, True)


def test_more_address_space_than_there_is(tmp_path):
    text, _, _ = in_limits(REFUSED, flat_trace(tmp_path / "wide.parquet", (Op.LOAD, 0, 0, 0)))
    assert text == f"{tmp_path / 'wide.parquet'}: MEMORY: 0x10000000000 bytes are more than this machine gives"


def test_words_and_writes_of_a_sparse_memory_come_back_on_restart():
    """Unwritten, written and filled pages, judged by the walk: what a guest wrote is gone, what was there is there."""
    far = 1 << 38                                       # a page table in the middle of nothing
    entries = tables() | {0x3008: far | 7}              # 2 MiB to 4 MiB
    rows = rows_of((Op.LOAD, 0, 0, 0x100000), (Op.GUEST_WRITE, 0x4000, 0x777007), (Op.LOAD, 0, 0, 0x777000),
                   (Op.PAGE_FAULT, 1 << 21, 0), (Op.GUEST_WRITE, far, 0x555007), (Op.LOAD, 1 << 21, 0, 0x555000),
                   (Op.RESTART, 0), (Op.LOAD, 0, 0, 0x100000), (Op.PAGE_FAULT, 1 << 21, 0))
    report = kvmmu.replay(Trace(LONG_MODE, [memory_rows(entries, ((0x1000, 0x4000), (1 << 38, 1 << 38))), rows]))
    assert (report.verified, report.mismatches, report.faults_reproduced) == (4, 0, {"0x0": 2})


@pytest.mark.parametrize("last", [False, True])
def test_of_the_words_of_one_address_the_last_counts(last):
    """However many there are between."""
    n = 3 << 20
    words = {"op": np.full(n, Op.MEMORY_WORD, U8), "addr": np.full(n, 0x4000, U64), "access": np.zeros(n, U8),
             "value": np.full(n, 0x999007, U64)}
    chunks = [memory_rows(tables()), words, rows_of((Op.MEMORY_WORD, 0x4000, 0x888007))]
    chunks = chunks if last else [chunks[0], chunks[2], chunks[1]]
    report = kvmmu.replay(Trace(LONG_MODE, [*chunks, rows_of((Op.LOAD, 0, 0, 0x888000 if last else 0x999000))]))
    assert (report.verified, report.mismatches) == (1, 0)


def test_words_of_zero_take_no_memory(tmp_path):
    """A word of 0 in each page of 512 MiB, of which one had another value before, and none after it."""
    size, step = 512 << 20, 1 << 14
    with ParquetWriter(tmp_path / "zeros.parquet", Header(registers=(FLAT,))) as writer:
        writer.write(rows_of((Op.MEMORY, 0, size), (Op.MEMORY_WORD, 0x5000, 0x77)))
        for first in range(0, size // 4096, step):
            addr = (U64(first) + np.arange(step, dtype=U64)) * U64(4096)
            writer.write({"op": np.full(step, Op.MEMORY_WORD, U8), "addr": addr, "access": np.zeros(step, U8),
                          "value": np.zeros(step, U64)})
        writer.write(rows_of((Op.MEMORY_WORD, 0x7008, 0x88), (Op.LOAD, 0x7008, 0, 0x7008)))
    code = ("from kvmmu.replay.recorded_machine import trace_start\n"
            "start = trace_start(kvmmu.open_trace(sys.argv[1]))\n"
            "print(start.memory.words, start.memory.guest.read_u64(0x5000), start.memory.guest.read_u64(0x7008))")
    text, peak, _ = in_limits(code, tmp_path / "zeros.parquet", megabytes=None)
    assert text == "(array([28680], dtype=uint64), array([136], dtype=uint64)) 0 136"
    assert peak < 300


def test_pages_of_zeros_take_no_memory(tmp_path):
    """512 MiB of an archive, and guest memory of them, with one byte that is not 0 in the middle and one at the end."""
    pages = np.zeros((1 << 17, 4096), U8)
    pages[70_000, 5], pages[-1, -1] = 7, 9
    gpas = np.arange(1 << 17, dtype=U64)[::-1] << U64(12)
    np.savez_compressed(tmp_path / "zeros.npz", pages=pages, gpas=gpas)
    code = ("from kvmmu.traces._npz import open_npz\n"
            "arrays = open_npz(sys.argv[1])\n"
            "mem = kvmmu.GuestMemory.from_pages(arrays['gpas'], arrays['pages'])\n"
            "import numpy as np\n"
            "place = int(arrays['gpas'][70_000]) + 5\n"
            "print(mem.read(place - 1, 3), mem.read(4095, 2), np.count_nonzero(arrays['pages']), mem.slots[0][1] >> 20)")
    text, peak, _ = in_limits(code, tmp_path / "zeros.npz", megabytes=None)
    assert text == "b'\\x00\\x07\\x00' b'\\t\\x00' 2 512"
    assert peak < 300


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("first", [False, True])
def test_words_beyond_all_regions(value, first):
    """Refused, whether they are zeros or not, and in whichever order; the lowest is named."""
    words = [(Op.MEMORY_WORD, 0x9010, value), (Op.MEMORY_WORD, 0x9008, value), (Op.MEMORY_WORD, 0xA000, 0),
             (Op.MEMORY_WORD, 0, 5)]
    rows = rows_of(*(words if first else []), (Op.MEMORY, 0, 0x8000), *([] if first else words), (Op.LOAD, 0, 0, 0))
    with pytest.raises(TraceError, match="MEMORY_WORD: gpa 0x9008 is in no MEMORY region"):
        kvmmu.replay(Trace(Header(registers=(FLAT,)), [rows]))


def test_setting_up_is_linear_in_the_number_of_regions(tmp_path):
    """Four times as many row groups take about four times as long, not sixteen times."""
    def regions(groups):
        for group in range(groups):
            first = U64(group * 50)
            yield {"op": np.full(50, Op.MEMORY, U8), "addr": (first + np.arange(50, dtype=U64)) * U64(8192),
                   "access": np.zeros(50, U8), "value": np.full(50, 4096, U64)}
        yield rows_of((Op.LOAD, 0, 0, 0))
    seconds = []
    for groups in (500, 2000):
        started = time.process_time()
        assert kvmmu.replay(Trace(Header(registers=(FLAT,)), regions(groups))).verified == 1
        seconds.append(time.process_time() - started)
    assert seconds[1] < 9 * seconds[0] + 0.5


def test_too_many_regions():
    n = 300_000
    rows = {"op": np.full(n, Op.MEMORY, U8), "addr": np.zeros(n, U64), "access": np.zeros(n, U8), "value": np.full(n, 4096, U64)}
    with pytest.raises(TraceError, match="MEMORY: more than 262,144 rows"):
        kvmmu.replay(Trace(Header(registers=(FLAT,)), [rows]))


@pytest.mark.parametrize(("op", "what"), [(Op.MEMORY_WORD, "MEMORY_WORD"), (Op.GUEST_WRITE, "GUEST_WRITE")])
def test_what_a_trace_writes_is_limited(op, what, monkeypatch):
    """A word or a write in each page; the message names the limit and the variable that raises it."""
    def chunks():
        yield rows_of((Op.MEMORY, 0, 1 << 36))
        for first in range(0, 1 << 14, 1 << 12):
            addr = (U64(first) + np.arange(1 << 12, dtype=U64)) * U64(4096)
            n = addr.size
            yield {"op": np.full(n, op, U8), "addr": addr, "access": np.zeros(n, U8), "size": np.full(n, 8, U8),
                   "value": np.ones(n, U64)}
        yield rows_of((Op.LOAD, 0, 0, 0))
    monkeypatch.setenv("KVMMU_TRACE_MEMORY_LIMIT", str(40 << 20))
    with pytest.raises(TraceError, match=f"{what} rows take .* bytes of memory; allowed are 41,943,040.*KVMMU_TRACE_MEMORY_L"):
        kvmmu.replay(Trace(Header(registers=(FLAT,)), chunks()))
    monkeypatch.setenv("KVMMU_TRACE_MEMORY_LIMIT", str(80 << 20))
    assert kvmmu.replay(Trace(Header(registers=(FLAT,)), chunks())).verified == 1


def test_a_column_that_is_larger_than_its_rows(tmp_path, monkeypatch):
    """The size that the footer states is held against the rows before anything is decoded."""
    from kvmmu.traces import parquet

    file = flat_trace(tmp_path / "x.parquet", *[(Op.LOAD, 8 * i, 0, 8 * i) for i in range(500)], size=4096)
    monkeypatch.setattr(parquet, "_BYTES_PER_ROW", 0)
    monkeypatch.setattr(parquet, "_BYTES_BESIDE", 100)
    with pytest.raises(TraceError, match="x.parquet: row group 0: column '.*' takes .* bytes for 501 rows; allowed are 100"):
        list(ParquetTrace(file).chunks())


def test_very_many_columns_of_their_own(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"op": pa.uint8(), "addr": pa.uint64(), "access": pa.uint8()}
    columns = {name: pa.array([0], kind) for name, kind in (names | {f"mine{i}": pa.uint8() for i in range(4000)}).items()}
    table = pa.table(columns).replace_schema_metadata({"kvmmu.trace": Header(registers=(FLAT,)).to_json()})
    pq.write_table(table, tmp_path / "many.parquet")
    started = time.process_time()
    assert ParquetTrace(tmp_path / "many.parquet").rows == 1
    assert time.process_time() - started < 5


# -- special files ------------------------------------------------------------------------------------------------------

def special(path, kind):
    """Make a FIFO, a socket, a directory, or a link to a device at a path."""
    path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)                       # a name of a socket is short
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    return path


@pytest.mark.parametrize("kind", ["a FIFO", "a character device", "a socket"])
@pytest.mark.parametrize("name", ["meta.json", "static_trace.npz", "tables.npz", "gva2gpa.npz"])
def test_special_files_are_no_parts_of_a_recording(toy, name, kind):
    special(toy / name, kind)
    with pytest.raises(RecordingError, match=f"{name}: is {kind}; allowed is a regular file"):
        Recording.open(toy, "static").gva2gpa()


@pytest.mark.parametrize("kind", ["a FIFO", "a character device", "a socket"])
@pytest.mark.parametrize("name", ["x.parquet", "trace", "static_trace.npz"])
@pytest.mark.parametrize("command", ["replay", "walk", "spt", "convert", "info"])
def test_special_files_are_no_traces(tmp_path, name, kind, command, capsys):
    """Refused at once by every command, which would otherwise wait for a writer or read for ever."""
    special(tmp_path / name, kind)
    more = {"walk": ["0x0"], "convert": [str(tmp_path / "out")]}.get(command, [])
    status = cli.main([command, str(tmp_path / name), *more])
    out, err = capsys.readouterr()
    if name == "static_trace.npz":
        assert f"{name}: is {kind}; allowed is" in err or "meta.json: missing" in err
    else:
        assert f"{name}: is {kind}; allowed is" in err
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["meta.json", "static_trace.npz", "tables.npz"])
def test_a_file_that_may_not_be_read_is_named(toy, name, capsys):
    (toy / name).chmod(0)
    assert cli.main(["replay", str(toy)]) == 2
    assert capsys.readouterr().err == f"kvmmu: {toy / name}: Permission denied\n"


def test_an_error_of_the_disk_is_named(toy, monkeypatch):
    """It is an OSError with the file, and not called damage."""
    class Failing(io.BytesIO):
        def read(self, n=-1):
            raise OSError(5, "Input/output error")
    monkeypatch.setattr("kvmmu.traces._npz.open_regular", lambda path, refusal: Failing())
    with pytest.raises(OSError, match="Input/output error") as caught:
        open_npz(toy / "tables.npz")
    assert caught.value.filename == str(toy / "tables.npz")


def test_files_of_a_recording(toy):
    """All that could be hit by an output; of a trace file those beside it."""
    names = {path.name for path in toy.iterdir()}
    assert {path.name for path in recording.recording_files(toy)} == names
    assert {path.name for path in recording.recording_files(toy / "dyn_trace.npz")} == names


def test_registers_and_tables_that_no_guest_has_name_the_recording():
    """A Recording that somebody changed: RecordingError, with its path."""
    whole = Recording.open(CLIPS / "l4")
    ctx = whole.ctx.copy()
    ctx[0, 3] ^= U64(1)                                 # PG without PE
    for bad in (replace(whole, ctx=ctx), replace(whole, table_pfn=whole.table_pfn[:0], table_data=whole.table_data[:0])):
        with pytest.raises(RecordingError, match=f"^{whole.path}: "):
            kvmmu.replay(bad)


def test_an_npt_fault_without_a_nested_guest_names_the_recording(toy):
    trace = toy_trace()
    events = {name: array[:0] for name, array in trace.items() if name.startswith("ev_")}
    np.savez(toy / "dyn_trace.npz", **trace | events)
    np.savez(toy / "dyn_tables.npz", **toy_tables())
    with pytest.raises(RecordingError, match=f"{toy}: before access 3: NPT_FAULT: no nested guest under an NPT has run"):
        kvmmu.replay(toy, phase="dyn")
