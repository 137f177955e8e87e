# SPDX-License-Identifier: Apache-2.0
"""Traces of the plugin for QEMU in examples/: written byte by byte, and of a program that QEMU ran."""

import lzma
import re
import struct

import format_files as files
import numpy as np
import pytest
from format_files import FILES, check, read, until_damage, write
from paths import ROOT

from kvmmu import Access
from kvmmu.traces import Op, TraceError
from kvmmu.traces.opening import describe_trace, open_trace

SOURCE = ROOT / "examples" / "qemu-plugin" / "kvmmu_trace.c"


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_records(packing, tmp_path):
    """Accesses with linear and physical addresses; devices; what the plugin tells besides is counted."""
    data, rows = files.qemu_file()
    path = write(tmp_path, "a" + files.SUFFIXES[packing], files.PACKERS[packing](data))
    check(read(path), rows)
    check(read(path, fetch=False), [row for row in rows if row["op"] != files.FETCH])
    described = describe_trace(path)
    assert ("qemu-plugin", 4, True) == (described["format"], described["vcpus"], described["brings"]["gpa"])
    assert {"values of stores", "changes of registers"} == set(described["skipped"])
    assert 4 == open_trace(path).header.vcpus


def test_events(tmp_path):
    """Values of stores are GUEST_WRITE rows behind the store, CR0, CR3, CR4 and EFER rows of their loads."""
    data, rows = files.qemu_file(events=True)
    path = write(tmp_path, "a", data)
    trace = open_trace(path, events=True)
    found = list(trace.columns())
    for name in ("op", "addr", "access", "size", "value", "vcpu"):
        assert [row[name] for row in rows] == np.concatenate([columns[name] for columns in found]).tolist(), name
    assert any(chunk.has_events for chunk in trace.chunks())
    assert {} == trace.notes.skipped


def columns_of(path, *names, **options):
    found = [tuple(columns[name].tolist() for name in names) for columns in open_trace(path, **options).columns()]
    return [row for columns in found for row in zip(*columns, strict=True)]


def test_values_that_are_not_aligned(tmp_path):
    """They are written byte by byte, up to the end of the page: what is beyond goes to an address that nobody tells."""
    records = [(0x1000, 0x5001, 2, files.STORE, 0), (0x44332211, 0x5001, 2, files.VALUE_KIND, 0),
               (0x1FFE, 0x5FFE, 3, files.STORE, 0), (0x8877665544332211, 0x5FFE, 3, files.VALUE_KIND, 0),
               (0x1000, 0x5008, 3, files.STORE, 0), (7, 0x5008, 3, files.VALUE_KIND, 0)]
    path = write(tmp_path, "a", files.qemu_header() + files.qemu_block(0, records))
    writes = [row[1:] for row in columns_of(path, "op", "addr", "size", "value", events=True) if row[0] == Op.GUEST_WRITE]
    assert [(0x5001, 1, 0x11), (0x5002, 1, 0x22), (0x5003, 1, 0x33), (0x5004, 1, 0x44), (0x5FFE, 1, 0x11), (0x5FFF, 1, 0x22),
            (0x5008, 8, 7)] == writes
    assert {"values of stores, what of them is in the next page": 1} == describe_trace(path, events=True)["skipped"]


def test_privilege(tmp_path):
    """Where the plugin tells CPL and EFLAGS.AC, they decide how an access is made, by vCPU."""
    user, kernel = 0x40_0000, files.KERNEL
    # Before CPL is told the instruction decides. A user that loads a descriptor reads the upper half as a supervisor.
    records = [(user, None, 3, files.FETCH, 0), (user, None, 3, files.LOAD, 0),
               (0, 0, 0, files.CPL_KIND, 0), (user, None, 3, files.FETCH, 0), (user, None, 3, files.STORE, 0),
               (1 << 18, 0, 0, files.CPL_KIND, 0), (user, None, 3, files.LOAD, 0), (kernel, None, 3, files.STORE, 0),
               (3, 0, 0, files.CPL_KIND, 0), (user, None, 3, files.LOAD, 0), (kernel, None, 3, files.LOAD, 0),
               (3 | 1 << 18, 0, 0, files.CPL_KIND, 0), (user, None, 3, files.FETCH, 0)]
    path = write(tmp_path, "a", files.qemu_header() + files.qemu_block(1, records) + files.qemu_block(2, records[1:2]))
    write_, fetch, user_, ac = (int(getattr(Access, name)) for name in ("WRITE", "FETCH", "USER", "AC"))
    expected = [fetch | user_, user_, fetch, write_, ac, write_ | ac, user_, ac, fetch | user_, user_]
    for events in (False, True):
        assert expected == [row[0] for row in columns_of(path, "access", events=events)]


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda data: data[:-16], "ends at byte 128, inside a block: 1 records are missing"),
    (lambda data: data[:-1], "ends at byte 79, inside a record of 16 bytes"),
    (lambda data: data + b"\0" * 16, "what is at byte 144 is not the header of a block"),
    (lambda data: data[:-1] + b"\xff", "what is at byte 128 is a record of a kind or size that is not known"),
    (lambda data: data[:-1] + b"\x09", "what is at byte 128 is a record of a kind or size that is not known"),
    (lambda data: data[:-16] + struct.pack("<QQ", 4, files.CPL_KIND << 56), "what is at byte 128 is a record of a kind or size"),
])
def test_damage(damage, reason, tmp_path):
    data = files.qemu_header() + files.qemu_block(0, [(i, None, 0, files.LOAD, 0) for i in range(4)])
    rows, message = until_damage(open_trace(write(tmp_path, "a", damage(data))))
    assert list(range(len(rows))) == rows
    assert len(rows) >= 3
    assert reason in message


def test_headers(tmp_path):
    for data, reason in ((b"kvmmuQT1", "has no header of 64 bytes"),
                         (files.qemu_header(vcpus=70000), "its header tells 70000 vCPUs; allowed are up to 65536"),
                         (files.qemu_header().replace(b"\x40\0", b"\x41\0", 1), "its header has 65 bytes; allowed are 64")):
        with pytest.raises(TraceError, match=reason):
            open_trace(write(tmp_path, "a", data))


def test_a_real_program():
    """QEMU 7.2 ran the program of walk.lackey.gz: it made the accesses that Valgrind saw, 1,000 loads and 2,025 stores."""
    of_qemu, of_valgrind = read(FILES / "walk.qtrace.xz"), read(FILES / "walk.lackey.gz")
    for op in (files.LOAD, files.STORE, files.FETCH):
        assert np.array_equal(of_qemu["addr"][of_qemu["op"] == op], of_valgrind["addr"][of_valgrind["op"] == op])
        assert np.array_equal(of_qemu["size"][of_qemu["op"] == op], of_valgrind["size"][of_valgrind["op"] == op])


def test_the_layout_in_the_source():
    """The plugin's structures have the sizes and kinds that the reader expects."""
    source = SOURCE.read_text()
    assert "enum kind { LOAD, STORE, FETCH, VALUE, CR3, CR0, CR4, EFER, CPL };" in source
    assert 64 == struct.calcsize("<8sIIII16s24x") == len(files.qemu_header())
    assert re.search(r"char magic\[8\];.*uint32_t bytes;.*uint32_t flags;.*uint32_t vcpus;.*uint32_t api;.*char target\[16\];"
                     r".*char zero\[24\];", source, re.DOTALL)
    assert lzma.decompress((FILES / "walk.qtrace.xz").read_bytes()).startswith(b"kvmmuQT1\x40\0\0\0")
