# SPDX-License-Identifier: Apache-2.0
"""Tables of others as traces: CSV and Parquet that PyArrow wrote, numpy arrays, plain numbers."""

import subprocess
import sys

import numpy as np
import pytest
from format_files import check, read, until_damage, write

from kvmmu.traces import Header, ParquetWriter, RegisterSet, TraceError
from kvmmu.traces.opening import describe_trace, open_trace

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = {"R": (0,), "W": (1,), "X": (2,), "M": (0, 1)}


@pytest.fixture(scope="module")
def table():
    """300,000 rows, more than a chunk."""
    rng = np.random.default_rng(7)
    n = 300_000
    return pa.table({
        "junk": rng.random(n), "va": rng.integers(0, 1 << 47, n, np.uint64) | (rng.integers(0, 2, n, np.uint64) << np.uint64(63)),
        "type": rng.choice(np.array(list(WORDS)), n), "core": rng.integers(0, 5, n, np.int32), "bytes": rng.integers(1, 9, n),
        "pc": rng.integers(1, 1 << 47, n, np.uint64), "phys": rng.integers(0, 1 << 40, n)})


def rows_of(table):
    """The rows of the table in plain Python."""
    rows = []
    for row in table.to_pylist():
        for op in WORDS[row["type"]]:
            rows.append({"op": op, "addr": row["va"], "access": (0, 2, 16)[op] | 4, "size": row["bytes"], "ip": row["pc"],
                         "vcpu": row["core"], "gpa": row["phys"]})
    return rows


def test_csv(table, tmp_path):
    """Columns under their usual names; those that nobody knows are left alone."""
    path = tmp_path / "trace.csv"
    csv.write_csv(table, path)
    check(read(path), rows_of(table))
    assert "csv" == describe_trace(path)["format"]


def test_csv_parts(tmp_path):
    """TSV, compression, hexadecimal numbers, no last line feed, carriage returns, empty lines, empty gpa."""
    import gzip

    text = "rip\taddress\trw\tgpa\r\n0x40\t0x7fff\tread\t16\r\n\r\n0X41\t0xffffffff81000000\tWRITE\t\r\n66\t12\t2\t0x1000"
    found = read(write(tmp_path, "a.tsv.gz", gzip.compress(text.encode())))
    assert ([0x7FFF, 0xFFFFFFFF81000000, 12], [0, 1, 2], [0x40, 0x41, 66], [16, 2**64 - 1, 4096]) == tuple(
        found[name].tolist() for name in ("addr", "op", "ip", "gpa"))


@pytest.mark.parametrize("columns", [{"addr": "where", "op": "what"}, "addr=where,op=what", {"addr": 1, "op": 2}, "addr=1,op=2"])
def test_columns_are_named(columns, tmp_path):
    path = write(tmp_path, "a.csv", b"va,where,what\n1,2,w\n3,4,r\n")
    found = read(path, columns=columns)
    assert ([2, 4], [1, 0]) == (found["addr"].tolist(), found["op"].tolist())


def test_csv_without_names(tmp_path):
    """One column of addresses; more columns by number; hexadecimal digits without 0x."""
    assert [16, 17] == read(write(tmp_path, "a", b"0x10\n17\n"))["addr"].tolist()
    path = write(tmp_path, "b.csv", b"ff;w\n10;r\n")
    found = read(path, "csv", columns="addr=0,op=1", base=16, header=False)
    assert ([255, 16], [1, 0]) == (found["addr"].tolist(), found["op"].tolist())


@pytest.mark.parametrize(("text", "options", "addresses"), [
    ("0x7f0000001000,R\n0x7f0000002000,W\n", {"columns": "addr=0,op=1"}, [0x7F0000001000, 0x7F0000002000]),
    ("R,0x10\nW,0x20\n", {"columns": {"addr": 1, "op": 0}}, [16, 32]),
    ("R;0x10\nW;0x20\n", {"columns": "addr=f1,op=f0"}, [16, 32]),
    ("00001000\n00002000\n", {}, [1000, 2000]), ("00001000,R\n00002000,W\n", {"columns": "addr=0"}, [1000, 2000]),
    ("16,va\n32,va\n", {"columns": "addr=0"}, [16, 32]), ("where,what\n16,R\n", {"columns": "addr=0,op=1"}, [16]),
    ("where,1\n16,2\n", {"columns": "addr=where"}, [16]), ("va,1\n16,2\n", {}, [16]), ("va\n16\n", {}, [16]),
    ("addr,rw\nff,R\n", {"base": 16}, [255]), ("ff,R\n10,W\n", {"base": 16, "columns": "addr=0,op=1"}, [255, 16]),
    ("place,rw\nff,R\n", {"base": 16, "columns": "addr=0,op=1"}, [255]),
    ("add,rw\nff,R\n", {"base": 16, "columns": "addr=0"}, [0xADD, 255]),
    ("add,rw\nff,R\n", {"base": 16, "columns": "addr=add"}, [255]),
    ("add,rw\nff,R\n", {"base": 16, "columns": "addr=0", "header": True}, [255]),
    ("ff\n10\n", {"base": 16}, [255, 16]), ("1,R\n2,R\n", {"columns": "addr=0", "header": True}, [2]),
])
def test_csv_first_line(text, options, addresses, tmp_path):
    """The first line is a row if its address is a number."""
    assert addresses == read(write(tmp_path, "a.csv", text.encode()), "csv", **options)["addr"].tolist()


@pytest.mark.parametrize(("text", "options", "message"), [
    ("0x1000,R\n", {}, "there are f0, f1, in the first line '0x1000', 'R'; if these are names, say header=yes"),
    ("7f0000001000,R\n", {"columns": "addr=0"}, "line 1: the address is '7f0000001000', no decimal number; say base=16"),
    ("ffff800000001000\n", {}, "line 1: the address is 'ffff800000001000', no decimal number; say base=16"),
    ("va,rw\nff80,R\n", {},
     "line 2: va is 'ff80'; allowed is a number of 64 bits; hexadecimal without 0x takes base=16 (--option base=16)"),
    ("10,R\nff80,R\n", {"columns": "addr=0"}, "line 2: f0 is 'ff80'; allowed is a number of 64 bits; hexadecimal without 0x"),
    (",R\n16,R\n", {"columns": "addr=0"}, "line 1: f0 is ''; allowed is a number of 64 bits"),
    ("1,R\n", {"columns": "addr=va"}, "addr shall be column 'va'; there are f0, f1, in the first line '1', 'R'"),
])
def test_csv_first_line_refused(text, options, message, tmp_path):
    assert message in until_damage(open_trace(write(tmp_path, "a.csv", text.encode()), "csv", **options))[1]


def test_csv_threads_are_numbered(tmp_path):
    found = read(write(tmp_path, "a.csv", b"addr,tid\n1,900\n2,7\n3,900\n4,100000\n"))
    assert [0, 1, 0, 2] == found["vcpu"].tolist()


@pytest.mark.parametrize(("line", "reason"), [
    ("0x12,Q,1", "type is 'Q'; allowed is one of 0, 1, 2"), ("zz,R,1", "va is 'zz'; allowed is a number of 64 bits"),
    ("1,R", "has 2 fields, the first line 3: '1,R'"), ("-1,R,1", "va is '-1'; allowed is a number of 64 bits"),
    ("1,R,70000", "size is 70000; allowed is 0 to 65535 bytes"), ("1,R,-3", "size is -3; allowed is 0 to 65535 bytes"),
    ("18446744073709551616,R,1", "va is '18446744073709551616'"), ("1,R,", "size is ''; allowed is a number of 63 bits"),
])
@pytest.mark.parametrize("before", [0, 5])
def test_csv_broken_lines(line, reason, before, tmp_path):
    """Every row before is delivered; the message has the line's number."""
    check_broken_line(tmp_path, line, reason, before)


@pytest.mark.parametrize(("line", "reason"), [("0x12,Q,1", "type is 'Q'"), ("1,R", "has 2 fields")])
def test_csv_broken_lines_behind_batches(line, reason, tmp_path):
    check_broken_line(tmp_path, line, reason, 200_000)


def check_broken_line(tmp_path, line, reason, before):
    lines = ["va,type,size"] + [f"{i},R,8" for i in range(before)]
    path = write(tmp_path, "a.csv", "\n".join([*lines, line, "1,R,1", ""]).encode())
    rows, message = until_damage(open_trace(path))
    assert list(range(before)) == rows
    assert f"line {before + 2}: {reason}" in message


def test_csv_refusals(tmp_path):
    path = write(tmp_path, "a.csv", b"x,y\n1,2\n")
    assert "no column is an address; there are x, y. Say which is: columns={'addr': NAME}" in until_damage(open_trace(path))[1]
    assert "addr shall be column 'z'; there are x, y" in until_damage(open_trace(path, columns="addr=z"))[1]
    assert "two of its columns have one name" in until_damage(open_trace(write(tmp_path, "b.csv", b"va,va\n1,2\n")))[1]
    with pytest.raises(ValueError, match="columns: 'a' is unknown; allowed are addr, op"):
        open_trace(path, columns="a=b")
    with pytest.raises(ValueError, match="columns: is 'addr'; allowed is NAME=COLUMN"):
        open_trace(path, columns="addr")
    with pytest.raises(ValueError, match="base: is 8; allowed for csv is 10 or 16"):
        open_trace(path, base=8)
    with pytest.raises(TypeError):
        open_trace(path, colour="red")


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet(compression, table, tmp_path):
    path = tmp_path / "trace.parquet"
    parquet.write_table(table, path, compression=compression, row_group_size=70_000)
    check(read(path), rows_of(table))
    assert "parquet" == describe_trace(path)["format"]


def test_parquet_types(tmp_path):
    """Integers of any width and sign, booleans, text, dictionaries, nulls where they mean something."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({
        "vaddr": pa.array([-1, 5], pa.int64()), "is_write": [True, False], "cpu": pa.array([1, 2], pa.uint8()),
        "gpa": pa.array([None, 7], pa.int32()), "ip": pa.array([None, 4], pa.uint64())}), path)
    found = read(path)
    assert ([2**64 - 1, 5], [1, 0], [1, 2], [2**64 - 1, 7], [0, 4]) == tuple(
        found[name].tolist() for name in ("addr", "op", "vcpu", "gpa", "ip"))
    parquet.write_table(pa.table({"va": pa.array(["0x10", "17"]).dictionary_encode(), "op": pa.array(["w", "r"])}), path)
    assert ([16, 17], [1, 0]) == tuple(read(path)[name].tolist() for name in ("addr", "op"))


@pytest.mark.parametrize(("columns", "reason"), [
    ({"va": [1.5]}, "column 'va' is double; allowed is an integer type or text"), ({"va": ["zz"]}, "va: ArrowInvalid"),
    ({"va": [True]}, "column 'va' is bool; allowed is an integer type or text"),
    ({"va": [1, None]}, "row 1: va is null; allowed are nulls in gpa and ip"),
    ({"x": [1]}, "no column is an address; there are x"),
    ({"va": [1], "vcpu": [70000]}, "row 0: vcpu is 70000; allowed is 0 to 65535"),
    ({"va": [1], "gpa": [1 << 52]}, "row 0: gpa is 4503599627370496; allowed is below 2**52"),
    ({"va": [1], "op": [9]}, "row 0: op is 9; allowed is one of"),
    ({"va": [1], "access": [1]}, "row 0: access is 1; allowed is a sum"),
])
def test_parquet_refusals(columns, reason, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    assert reason in until_damage(open_trace(path))[1]


def test_parquet_of_kvmmu(tmp_path):
    """A trace of kvmmu stays one, with its header."""
    header = Header((RegisterSet(0x11, 0, 0, 0),), source="a test")
    with ParquetWriter(tmp_path / "a.parquet", header) as writer:
        writer.write(op=np.array([0, 1], np.uint8), addr=np.array([1, 4095], np.uint64), access=np.array([4, 6], np.uint8),
                     size=np.array([1, 2], np.uint8))
    trace = open_trace(tmp_path / "a.parquet")
    assert "a test" == trace.header.source
    described = describe_trace(tmp_path / "a.parquet")
    assert ("kvmmu", 2, 2) == (described["format"], described["accesses"], described["pages_touched"])


def test_without_pyarrow(tmp_path):
    """The error names the extra; other formats do not need it."""
    write(tmp_path, "a.csv", b"va\n1\n")
    write(tmp_path, "a.lackey", b" L 10,4\n L 20,4\n")
    program = ("import sys; sys.modules['pyarrow'] = None\nfrom kvmmu.traces.opening import open_trace\n"
               "print(len(next(open_trace('a.lackey').columns())['op']))\n"
               "try: open_trace('a.csv')\nexcept ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-Pc", program], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert (f"2\nCSV and Parquet files need PyArrow, the extra kvmmu[arrow]: {sys.executable} -m pip install 'kvmmu[arrow]'\n"
            == done.stdout)


# ---- numpy -------------------------------------------------------------------------------------------------------------

ADDRESSES = np.random.default_rng(8).integers(0, 1 << 47, 300_000, np.uint64)


@pytest.mark.parametrize("dtype", ["<u8", ">u8", "<i8", ">i8"])
def test_npy_of_addresses(dtype, tmp_path):
    np.save(tmp_path / "a.npy", ADDRESSES.astype(dtype))
    found = read(tmp_path / "a.npy")
    assert np.array_equal(ADDRESSES, found["addr"])
    assert {0} == set(found["op"].tolist())


def test_npy_of_records(tmp_path):
    import gzip

    records = np.zeros(3, [("va", "<u8"), ("type", "S2"), ("tid", "<i4"), ("size", "u2"), ("pc", ">u8")])
    records["va"], records["type"], records["tid"], records["size"], records["pc"] = (
        [1, 2, 3], [b"R", b"W", b"M"], [9, 4, 9], [8, 0, 4], [7, 7, 7])
    np.save(tmp_path / "a.npy", records)
    found = read(write(tmp_path, "b.npy.gz", gzip.compress((tmp_path / "a.npy").read_bytes())))
    assert ([1, 2, 3, 3], [0, 1, 0, 1], [0, 1, 0, 0], [8, 1, 4, 4], [7] * 4) == tuple(
        found[name].tolist() for name in ("addr", "op", "vcpu", "size", "ip"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    writes = ADDRESSES % np.uint64(3) == 0
    save(tmp_path / "a.npz", where=ADDRESSES, is_write=writes, other=np.zeros(3))
    found = read(tmp_path / "a.npz", columns={"addr": "where"})
    assert np.array_equal(ADDRESSES, found["addr"])
    assert np.array_equal(writes, found["op"])


def test_plain_numbers(tmp_path):
    path = write(tmp_path, "a.u64", ADDRESSES.astype("<u8").tobytes())
    assert np.array_equal(ADDRESSES, read(path)["addr"])
    path = write(tmp_path, "a", ADDRESSES.astype(">u8").tobytes())
    assert np.array_equal(ADDRESSES, read(path, "u64", order="big")["addr"])
    rows, message = until_damage(open_trace(write(tmp_path, "b.u64", b"\1" * 20), "u64"))
    assert ([0x0101010101010101] * 2, True) == (rows, "ends at byte 20, inside an element of 8 bytes" in message)


def npy(shape, dtype="<u8", data=b""):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(("content", "reason"), [
    (npy((3, 3)), "has the shape (3, 3)"), (npy((1 << 62,)), "more than any file"), (npy((1,), "|O"), "pickled objects"),
    (npy((4,), data=b"\1" * 17), "ends at byte 145; 2 elements of 4 are missing"),
    (npy((1,), "<f8", b"\1" * 8), "'addr' is float64"), (npy((1,), "|b1", b"\1"), "'addr' is bool; allowed is an integer type"),
    (npy((1,), [("va", "<u8", (2,))], b"\1" * 16), "a.npy: 'va' has elements of the shape (2,) of uint64; allowed is one number"),
    (npy((1,), [("va", "<u8"), ("op", "S1", (2,))], b"\1" * 10), "a.npy: 'op' has elements of the shape (2,) of |S1; allowed is"),
    (npy((1,), [("va", "<u8"), ("size", "|b1")], b"\1" * 9), "a.npy: 'size' is bool; allowed is an integer type"),
    (npy((1,), data=b"\1" * 9), "goes on behind its 1 elements, at byte 136"), (npy((1 << 50,)), "elements of"),
    (b"\x93NUMPY\7\0abc", "npy version (7, 0)"), (b"\x93NUMPY\1\0\xff\xff{", "not a whole numpy array"),
])
def test_npy_refusals(content, reason, tmp_path):
    """What a header claims is not allocated."""
    assert reason in until_damage(open_trace(write(tmp_path, "a.npy", content)))[1]


def test_npz_refusals(tmp_path):
    np.savez(tmp_path / "a.npz", va=ADDRESSES, op=np.zeros(3, np.uint8))
    assert "its arrays have different lengths: va 300000, op 3" in until_damage(open_trace(tmp_path / "a.npz"))[1]
    np.savez(tmp_path / "a.npz", x=ADDRESSES)
    assert "no column is an address" in until_damage(open_trace(tmp_path / "a.npz"))[1]
    (tmp_path / "a.npz").write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(TraceError, match="not a whole numpy archive"):
        list(open_trace(tmp_path / "a.npz").chunks())


def test_npz_with_a_name_that_is_no_utf_8(tmp_path):
    """As a damaged directory: the flag says UTF-8, the byte is none."""
    path = tmp_path / "bad.npz"
    np.savez(path, addr=np.arange(5))
    content = bytearray(path.read_bytes())
    content[content.rfind(b"addr.npy")] = 0x8B
    content[content.rfind(b"PK\1\2") + 9] |= 8
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"bad\.npz: not a whole numpy archive \('utf-8' codec can't decode byte 0x8b"):
        list(open_trace(path).chunks())
