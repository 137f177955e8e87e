# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every format: cut off and corrupted at many places, they are refused or read up to the damage."""

import gzip
import io
import lzma
import random
import tracemalloc
import zlib

import format_files as files
import numpy as np
import pytest
from paths import DATA

from kvmmu.traces import TraceError
from kvmmu.traces.compressed import BLOCK_BYTES, ByteStream, open_bytes
from kvmmu.traces.opening import describe_trace, open_trace

FILES = DATA / "formats"
CUTS, CORRUPTIONS = 50, 500


def table(kind):
    """A small table as CSV, Parquet, npy and npz."""
    rng = np.random.default_rng(9)
    n = 400
    columns = {"va": rng.integers(0, 1 << 47, n, np.uint64), "is_write": rng.integers(0, 2, n, np.uint8),
               "cpu": rng.integers(0, 4, n, np.uint16)}
    out = io.BytesIO()
    if kind in ("npy", "npz"):
        if kind == "npz":
            np.savez_compressed(out, **columns)
        else:
            np.save(out, columns["va"])
        return out.getvalue()
    pa = pytest.importorskip("pyarrow")
    if kind in ("csv", "tsv"):
        csv = pytest.importorskip("pyarrow.csv")
        csv.write_csv(pa.table(columns), out, csv.WriteOptions(delimiter="," if kind == "csv" else "\t"))
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), out, row_group_size=100, write_page_checksum=True)
    return out.getvalue()


def small_lackey():
    return lzma.decompress((FILES / "true.lackey.xz").read_bytes())[:20_000].rsplit(b"\n", 1)[0] + b"\n"


def small_drmemtrace():
    return files.drmemtrace_file(instructions=300)[0]


SAMPLES = {
    "lackey": ("lackey", small_lackey),
    "champsim": ("champsim", lambda: files.champsim_file(200)[0]),
    "cloudsuite": ("champsim", lambda: files.champsim_file(200, cloudsuite=True)[0]),
    "drmemtrace": ("drmemtrace", small_drmemtrace),
    "drmemtrace-zip": ("drmemtrace", lambda: files.zip_of({"chunk.0000": small_drmemtrace()[:6000],
                                                           "chunk.0001": small_drmemtrace()[6000:]})),
    "drmemtrace-plain": ("drmemtrace", lambda: files.drmemtrace_file(instructions=300, physical=False)[0]),
    "qemu-plugin": ("qemu-plugin", lambda: files.qemu_file(15)[0]),
    "qemu-plugin-events": ("qemu-plugin", lambda: files.qemu_file(15)[0]),
    "pinatrace": ("pinatrace", lambda: files.pinatrace_file(400)[0]),
    "execlog": ("qemu-execlog", lambda: files.execlog_file(300, system=True)[0]),
    "perf": ("perf-script", lambda: files.perf_file(200)[0]),
    "ftrace": ("ftrace", lambda: files.ftrace_file(150)[0]),
    "csv": ("csv", lambda: table("csv")), "tsv": ("csv", lambda: table("tsv")), "parquet": ("parquet", lambda: table("parquet")),
    "npy": ("numpy", lambda: table("npy")), "npz": ("numpy", lambda: table("npz")),
    "u64": ("u64", lambda: np.arange(500, dtype="<u8").tobytes()),
    **{f"champsim-{packing}": ("champsim", lambda packing=packing: files.PACKERS[packing](files.champsim_file(300)[0]))
       for packing in files.PACKERS if packing != "none"},
    **{f"lackey-{packing}": ("lackey", lambda packing=packing: files.PACKERS[packing](small_lackey()))
       for packing in files.PACKERS if packing != "none"},
}


OPTIONS = {"qemu-plugin-events": {"events": True}}


def rows_of(path, format, **options):
    """The addresses of the rows that are delivered, and the error that ended them, or None."""
    rows = []
    try:
        for chunk in open_trace(path, format, **options).chunks():
            rows += chunk.addr.tolist()
    except TraceError as error:
        assert str(path) in str(error) or "row" in str(error), error
        return rows, error
    return rows, None


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_off(name, tmp_path):
    """What is delivered is the beginning of what was there, and only at an end of a record or line there is no error."""
    format, make = SAMPLES[name]
    data, path, options = make(), tmp_path / "a", OPTIONS.get(name, {})
    path.write_bytes(data)
    whole, error = rows_of(path, format, **options)
    assert error is None
    assert len(whole) > 100
    some = 0
    for cut in np.linspace(0, len(data) - 1, CUTS).astype(int).tolist():
        path.write_bytes(data[:cut])
        rows, error = rows_of(path, format, **options)
        if error is None or format not in ("lackey", "pinatrace", "qemu-execlog", "perf-script", "ftrace"):
            assert whole[:len(rows)] == rows or rows[:-1] == whole[:len(rows) - 1], cut     # the last number may be cut
        some += len(rows) > 0
        if name.split("-")[-1] in ("gzip", "xz", "bzip2", "zstd", "zip", "parquet", "npy", "npz"):
            assert error is not None or cut == 0, cut
    if name not in ("parquet", "npz", "drmemtrace-zip", "lackey-bzip2", "lackey-zstd", "champsim-bzip2", "champsim-zstd"):
        assert some > CUTS // 2                             # these have their directory at the end, or are one block


@pytest.mark.parametrize("name", SAMPLES)
def test_corrupted(name, tmp_path):
    """One byte is another: refused, read up to it, or read as something else that is no more than the file can have."""
    format, make = SAMPLES[name]
    data, path, rng, options = make(), tmp_path / "a", random.Random(name), OPTIONS.get(name, {})
    path.write_bytes(data)
    # a byte of a bzip2 block can make it 50 times as long, which its checksum tells behind it
    most = 8 * len(rows_of(path, format, **options)[0]) + (10_000_000 if name.endswith("bzip2") else 1000)
    errors = 0
    for _ in range(CORRUPTIONS):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        rows, error = rows_of(path, format, **options)
        assert len(rows) <= most
        errors += error is not None
    if name.split("-")[-1] in ("gzip", "xz", "bzip2", "zstd", "zip", "parquet", "npz"):
        assert errors > 0.8 * CORRUPTIONS                   # they have checksums


@pytest.mark.parametrize("name", SAMPLES)
def test_corrupted_and_told_by_content(name, tmp_path):
    """Telling the format of a damaged file, and describing it, raises nothing else either."""
    data, path, rng = SAMPLES[name][1](), tmp_path / "a", random.Random(name)
    for i in range(40):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(min(len(data), 200 if i % 2 else len(data)))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            describe_trace(path)
        except TraceError as error:
            assert str(path) in str(error)


def test_damage_behind_rows(tmp_path):
    """Blocks before the damage are delivered; file, offset and reason are in the message."""
    data = files.champsim_file(30_000)[0] * 6               # 11 MiB, three blocks
    packed = bytearray(gzip.compress(data, 1))
    packed[len(packed) * 3 // 4] ^= 0xFF
    path = tmp_path / "a.gz"
    path.write_bytes(packed)
    rows, error = rows_of(path, "champsim")
    whole = [row["addr"] for row in files.champsim_file(30_000)[1]] * 6
    assert whole[:len(whole) * 7 // 10] == rows[:len(whole) * 7 // 10]
    assert f"{path}: is damaged behind byte " in str(error)
    assert "of its decompressed gzip data (error: Error -3" in str(error)


@pytest.mark.parametrize("packing", ["gzip", "xz", "bzip2", "zstd"])
def test_every_byte_before_damage_is_delivered(packing, tmp_path):
    """A decoder drops what it made in the call that fails: the bytes are asked for again in short steps."""
    parts = [files.PACKERS[packing](random.Random(i).randbytes(5000)) for i in range(3)]
    path = tmp_path / "a"
    path.write_bytes(parts[0] + parts[1] + b"\xff" * 100 + parts[2])
    with open_bytes(path) as stream:
        assert b"".join(random.Random(i).randbytes(5000) for i in range(2)) == bytes(stream.read(1 << 20))
        with pytest.raises(TraceError, match="is damaged behind byte 10000 of its decompressed"):
            stream.read(1)


@pytest.mark.parametrize("packing", ["gzip", "xz", "bzip2", "zstd"])
def test_streams_one_after_the_other(packing, tmp_path):
    """Files that were appended to are one; what is behind them that is not compressed is damage."""
    parts = [bytes([i]) * (1000 * i) for i in range(1, 6)]
    path = tmp_path / "a"
    path.write_bytes(b"".join(map(files.PACKERS[packing], parts)))
    with open_bytes(path) as stream:
        assert b"".join(parts) == bytes(stream.read(1 << 20))
        assert b"" == stream.read(1)
        assert packing == stream.compression
    path.write_bytes(path.read_bytes() + b"garbage that is no stream")
    with open_bytes(path) as stream:
        assert b"".join(parts) == bytes(stream.read(1 << 20))
        with pytest.raises(TraceError, match="is damaged behind byte 15000"):
            stream.read(1)


def test_padding_of_zeros(tmp_path):
    """gzip and xz files may be padded."""
    for packing in ("gzip", "xz"):
        path = tmp_path / packing
        path.write_bytes(files.PACKERS[packing](b"abc") + b"\0" * 512 + files.PACKERS[packing](b"def") + b"\0" * 8)
        with open_bytes(path) as stream:
            assert b"abcdef" == bytes(stream.read(100))
            assert b"" == stream.read(1)


def test_zstd_frames(tmp_path):
    """Skippable frames, frames without checksum or size, of raw and of repeated bytes; cut everywhere."""
    zstandard = pytest.importorskip("zstandard")
    noise = random.Random(1).randbytes(300_000)
    content = [b"", b"x", b"\0" * 300_000, noise]
    data = b"\x53\x2a\x4d\x18\5\0\0\0hello"
    for part in content:
        for options in ({"write_checksum": True}, {"write_content_size": False}):
            compressor = zstandard.ZstdCompressor(**options).compressobj()
            data += compressor.compress(part) + compressor.flush()
            data += zstandard.ZstdCompressor(**options).compress(part)
    whole = b"".join(part * 4 for part in content)
    path = tmp_path / "a"
    path.write_bytes(data)
    with open_bytes(path) as stream:
        assert "zstd" == stream.compression
        assert whole == bytes(stream.read(4 << 20))
        assert b"" == stream.read(1)
    refused = 0
    for cut in np.linspace(5, len(data) - 1, 200).astype(int).tolist():
        path.write_bytes(data[:cut])
        with open_bytes(path) as stream:
            try:
                assert whole.startswith(bytes(stream.read(4 << 20)))
                assert b"" == stream.read(1)
            except TraceError:
                refused += 1
    assert refused > 195


def test_a_bomb_takes_no_memory(tmp_path):
    """64 MiB of zeros in 64 kB: a block at a time."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(64)) + compressor.flush()
    path = tmp_path / "a.gz"
    path.write_bytes(packed)
    assert len(packed) < 70_000
    tracemalloc.start()
    try:
        accesses = sum(len(columns["op"]) for columns in open_trace(path, "champsim").columns())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (64 << 20) // 64 == accesses
    assert peak < 12 * BLOCK_BYTES


def test_memory_of_a_dictionary_is_limited(tmp_path):
    """An xz file that asks for a dictionary of 1.5 GiB is refused."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(b"x" * 1000, filters=filters, check=lzma.CHECK_NONE))
    at = data.index(b"\x21\x01") + 2                        # the filter's properties: 40 is 4 GiB - 1
    data[at] = 39
    data[20:24] = zlib.crc32(bytes(data[12:20])).to_bytes(4, "little")
    path = tmp_path / "a.xz"
    path.write_bytes(data)
    with open_bytes(path) as stream, pytest.raises(TraceError, match="Memory usage limit"):
        stream.read(10)


def test_without_zstandard(tmp_path, monkeypatch):
    """The error names the extra."""
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = tmp_path / "a.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 20)
    with pytest.raises(ImportError, match=r"zstandard, the extra kvmmu\[zstd\]: .* -m pip install 'kvmmu\[zstd\]'"):
        open_trace(path)


def test_closing_early(tmp_path):
    """A reading that is given up closes its file and ends its thread."""
    import threading

    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(files.champsim_file(30_000)[0] * 8, 1))
    chunks = open_trace(path).chunks()
    next(chunks)
    assert any(thread.name.startswith("kvmmu-decompress") for thread in threading.enumerate())
    chunks.close()
    assert not any(thread.name.startswith("kvmmu-decompress") for thread in threading.enumerate())


def test_a_reading_does_not_end_another(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(files.champsim_file(500)[0])
    trace = open_trace(path)
    first = [column["addr"].tolist() for column in trace.columns()]
    assert first == [column["addr"].tolist() for column in trace.columns()]
    assert isinstance(open_bytes(path), ByteStream)
