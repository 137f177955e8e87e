# SPDX-License-Identifier: Apache-2.0
"""Traces of the plugin for QEMU in examples/: written byte by byte, and of a program that QEMU ran."""

import lzma
import re
import struct

import format_files as files
import numpy as np
import pytest
from paths import ROOT
from test_formats import FILES, check, read, until_damage, write

from kvmmu.traces import TraceError
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
    assert {"values of stores", "changes of CR3"} == set(described["skipped"])
    assert 4 == open_trace(path).header.vcpus


def test_events(tmp_path):
    """Values of stores are GUEST_WRITE rows behind the store, CR3 is a MOV_CR3 row."""
    data, rows = files.qemu_file(events=True)
    path = write(tmp_path, "a", data)
    trace = open_trace(path, events=True)
    found = list(trace.columns())
    for name in ("op", "addr", "access", "size", "value", "vcpu"):
        assert [row[name] for row in rows] == np.concatenate([columns[name] for columns in found]).tolist(), name
    assert any(chunk.has_events for chunk in trace.chunks())
    assert {} == trace.notes.skipped


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda data: data[:-16], "ends at byte 128, inside a block: 1 records are missing"),
    (lambda data: data[:-1], "ends at byte 79, inside a record of 16 bytes"),
    (lambda data: data + b"\0" * 16, "what is at byte 144 is not the header of a block"),
    (lambda data: data[:-1] + b"\xff", "what is at byte 128 is a record of a kind or size that is not known"),
    (lambda data: data[:-1] + b"\x05", "what is at byte 128 is a record of a kind or size that is not known"),
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
    assert "enum kind { LOAD, STORE, FETCH, VALUE, CR3 };" in source
    assert 64 == struct.calcsize("<8sIIII16s24x") == len(files.qemu_header())
    assert re.search(r"char magic\[8\];.*uint32_t bytes;.*uint32_t flags;.*uint32_t vcpus;.*uint32_t api;.*char target\[16\];"
                     r".*char zero\[24\];", source, re.DOTALL)
    assert lzma.decompress((FILES / "walk.qtrace.xz").read_bytes()).startswith(b"kvmmuQT1\x40\0\0\0")
