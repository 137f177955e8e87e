# SPDX-License-Identifier: Apache-2.0
"""Readers of other tools' traces: files of the tools themselves, and files written from the layouts."""

import gzip
import lzma
import re
import subprocess
import sys
import zipfile

import format_files as files
import numpy as np
import pytest
from format_files import FILES, INVALID_GPA, check, read, until_damage, write

from kvmmu.traces import TraceError
from kvmmu.traces.opening import describe_trace, formats, open_trace

# ---- lackey ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["walk.lackey.gz", "shellsort.lackey.zst", "true.lackey.xz"])
def test_lackey_of_real_programs(name, tmp_path):
    """Three programs under Valgrind 3.19: every row, against a regular expression."""
    if name.endswith("zst"):
        text = pytest.importorskip("zstandard").ZstdDecompressor().stream_reader((FILES / name).read_bytes()).read().decode()
    else:
        text = (lzma if name.endswith("xz") else gzip).decompress((FILES / name).read_bytes()).decode()
    check(read(FILES / name), files.lackey_rows(text))
    noise = len(re.findall(r"^==", text, re.MULTILINE))
    assert {"lines": noise} == describe_trace(FILES / name)["skipped"]


def test_lackey_a_modify_is_a_load_and_a_store(tmp_path):
    path = write(tmp_path, "a", b"I  0040,3\n M 1fff000ff8,8\n L 10,1\r\n")
    found = read(path)
    assert [2, 0, 1, 0] == found["op"].tolist()
    assert [0x40, 0x1FFF000FF8, 0x1FFF000FF8, 0x10] == found["addr"].tolist()
    assert [0x40] * 4 == found["ip"].tolist()
    assert [0, 1, 0] == read(path, fetch=False)["op"].tolist()


def test_lackey_passes_over_what_the_program_printed(tmp_path):
    path = write(tmp_path, "a", b"==1== Lackey\nI  0040,3\nhello, world\nLine\n S 10,4\n==1== \n")
    assert [2, 1] == read(path)["op"].tolist()
    assert 4 == describe_trace(path)["skipped"]["lines"]
    with pytest.raises(TraceError, match=r"line 3 \(byte 23\) is no row of this format: b'hello, world'"):
        read(path, "lackey", strict=True)


@pytest.mark.parametrize(("line", "is_valgrind"), [
    (b"==19857== Lackey", True), (b"--19857-- warning", True), (b"**19857** said by a client", True), (b"==1==", True),
    (b"==00:00:00:01.234 19857== HEAP", True), (b"== 1 ==", False), (b"==1=", False), (b"==1", False), (b"==", False),
    (b"=", False), (b"====", False), (b"==1--", False), (b"-1-", False), (b"", False)])
def test_lackey_strict(tmp_path, line, is_valgrind):
    """Valgrind writes lines of its own into every file; strict is about those of the program."""
    path = write(tmp_path, "a", b"I  0040,3\n S 10,4\n" + line + b"\n L 10,4\n")
    if is_valgrind:
        assert [2, 1, 0] == read(path, "lackey", strict=True)["op"].tolist()
        assert {"lines": 1} == describe_trace(path, strict=True)["skipped"]
    else:
        with pytest.raises(TraceError, match="line 3 .* is no row of this format"):
            read(path, "lackey", strict=True)


@pytest.mark.parametrize("line", [b" L xyz,4", b" L 10", b" L 10,", b" L 10,0", b" L 10,99999", b" L 12345678123456781,4",
                                  b" L 10,4x"])
def test_lackey_broken_lines(line, tmp_path):
    """The rows before are delivered; the message has line, offset and text."""
    path = write(tmp_path, "a", b"I  0040,3\n S 20,4\n" + line + b"\n L 30,8\n")
    reason = f"{path}: line 3 (byte 18) is no row of this format: {line!r}"
    assert ([0x40, 0x20], reason) == until_damage(open_trace(path, "lackey"))


def test_wide_accesses_touch_the_pages_that_they_touched(tmp_path):
    """Sizes are bytes of 8 bits in the trace format: 512 bytes are a row of 255, and one in the next page if they reach it."""
    path = write(tmp_path, "a", b" S 1000,512\n L 1e01,512\n L 1f00,256\n L 2f02,65535\n")
    found = read(path)
    assert [0x1000, 0x1E01, 0x2000, 0x1F00] == found["addr"].tolist()[:4]
    assert [255, 255, 1, 255] == found["size"].tolist()[:4]
    assert [0x2F02, *range(0x4000, 0x13000, 0x1000)] == found["addr"].tolist()[4:]
    assert 255 == found["size"][-1]
    assert set(range(1, 0x13)) == set((found["addr"] >> np.uint64(12)).tolist()) | {3}
    assert 0x12 == describe_trace(path)["pages_touched"]


def test_lackey_in_blocks(tmp_path, monkeypatch):
    """Lines that blocks cut are whole again."""
    from kvmmu.traces import compressed

    text = lzma.decompress((FILES / "true.lackey.xz").read_bytes())[:200_000].rsplit(b"\n", 1)[0]
    expected = files.lackey_rows(text.decode())
    real = compressed.ByteStream.blocks
    for size in (1000, 4097, 65536):
        monkeypatch.setattr(compressed.ByteStream, "blocks", lambda stream, size=size: real(stream, size))
        check(read(write(tmp_path, "a", text)), expected)
        check(read(write(tmp_path, "a.gz", files.PACKERS["gzip"](text))), expected)


# ---- ChampSim ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", files.PACKERS)
@pytest.mark.parametrize("cloudsuite", [False, True])
def test_champsim(cloudsuite, packing, tmp_path):
    data, rows = files.champsim_file(cloudsuite=cloudsuite)
    assert (96 if cloudsuite else 64) * 2000 == len(data)
    path = write(tmp_path, "trace" + files.SUFFIXES[packing], files.PACKERS[packing](data))
    check(read(path), rows)
    described = describe_trace(path)
    assert ("champsim", packing, len(rows)) == (described["format"], described["compression"], described["accesses"])
    check(read(path, fetch=False), [row for row in rows if row["op"] != files.FETCH])


def test_champsim_record_size_is_an_option(tmp_path):
    data, rows = files.champsim_file(3, cloudsuite=True)
    check(read(write(tmp_path, "a", data), "champsim", record=96), rows)
    with pytest.raises(ValueError, match="record: is 72; allowed for champsim is 64 or 96"):
        open_trace(tmp_path / "a", "champsim", record=72)


# ---- drmemtrace --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", files.PACKERS)
def test_drmemtrace_of_a_thread(packing, tmp_path):
    """Fetches, loads, stores; the frames of markers; prefetches and flushes are counted and no rows."""
    data, rows = files.drmemtrace_file()
    assert {None} < {row["gpa"] for row in rows}
    path = write(tmp_path, "app.trace" + files.SUFFIXES[packing], files.PACKERS[packing](data))
    check(read(path), rows)
    described = describe_trace(path)
    assert ("drmemtrace", packing) == (described["format"], described["compression"])
    assert {"gpa": True, "ip": True, "size": True, "tables": False} == described["brings"]
    skipped = data.count(files.entry(files.PREFETCH, 64, 0x1000))
    assert {"prefetches": skipped, "cache flushes": skipped} == described["skipped"]


def test_drmemtrace_archive(tmp_path):
    """Members of a zip in the order of their names, entries cut by none of them."""
    data, rows = files.drmemtrace_file()
    step = 12 * 400
    members = {f"chunk.{i:04d}": data[start:start + step] for i, start in enumerate(range(0, len(data), step))}
    assert len(members) > 10
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = write(tmp_path, "app.trace.zip", files.zip_of(dict(reversed(members.items())), compression))
        check(read(path), rows)
        assert "drmemtrace" == describe_trace(path)["format"]


@pytest.mark.parametrize("below", ["", "trace"])
def test_drmemtrace_folder(below, tmp_path):
    """A file for each thread, merged by their timestamps; other files are left alone."""
    folder = tmp_path / "drmemtrace.app.1.dir" / below
    folder.mkdir(parents=True)
    expected = []
    for place, tid in enumerate((7000, 50, 900)):
        data, rows = files.drmemtrace_file(tid, seed=tid, physical=False, times=lambda i, place=place: 10 * i + 3 * place)
        write(folder, f"drmemtrace.app.{place}.trace.gz", files.PACKERS["gzip"](data))
        expected += [row | {"vcpu": place} for row in rows]
    write(folder, "cpu_schedule.bin.zip", files.zip_of({"0": b"\0" * 100}))
    write(folder, "funclist.log", b"text")
    top = tmp_path / "drmemtrace.app.1.dir"
    check(read(top), sorted(expected, key=lambda row: row["time"]))
    described = describe_trace(top)
    assert (3, len(expected), "drmemtrace") == (described["vcpus"], described["accesses"], described["format"])


def test_drmemtrace_cores(tmp_path):
    """Files of what cores ran: the vCPU is the core, whatever threads it has."""
    for core in range(2):
        data = files.drmemtrace_begin(1, 0x40 | files.CORE_SHARDED)
        for tid in (1, 2, 3):
            data += files.marker(files.TIMESTAMP, 10 * core + tid) + files.entry(files.THREAD, 4, tid)
            data += files.entry(files.INSTR, 3, 0x1000 * tid) + files.entry(files.READ, 8, 0x5000 + core)
        write(tmp_path, f"drmemtrace.core.{core}.trace", data + files.entry(files.FOOTER, 0, 0))
    found = read(tmp_path)
    assert [0] * 6 + [1] * 6 == found["vcpu"].tolist()


def test_drmemtrace_threads_in_one_file(tmp_path):
    data = files.drmemtrace_begin(40)
    for tid in (40, 7, 40, 90):
        data += files.entry(files.THREAD, 4, tid) + files.entry(files.INSTR, 3, 0x1000)
    found = read(write(tmp_path, "a", data))
    assert [0, 1, 0, 2] == found["vcpu"].tolist()
    assert {"files without footer": 1} == describe_trace(tmp_path / "a")["skipped"]


def test_drmemtrace_bundles_and_pages(tmp_path):
    """A bundle is the instructions behind the last one; frames are of the page size that the trace tells; they can change."""
    data = files.drmemtrace_begin(1) + files.marker(files.PAGE_SIZE, 1 << 16)
    data += files.entry(files.INSTR, 5, 0x1000) + files.entry(files.BUNDLE, 3, int.from_bytes(b"\2\3\4\0\0\0\0\0", "little"))
    for frame in (0x40_0000, 0x50_0000):
        data += files.marker(files.PHYSICAL, frame) + files.marker(files.VIRTUAL, 0x7_0000) + files.entry(files.READ, 0, 0x7_8001)
    data += files.marker(files.NOT_AVAILABLE, 0x7_0000) + files.entry(files.WRITE_ENTRY, 8, 0x7_8001)
    found = read(write(tmp_path, "a", data))
    assert [0x1000, 0x1005, 0x1007, 0x100A, 0x7_8001, 0x7_8001, 0x7_8001] == found["addr"].tolist()
    assert [5, 2, 3, 4, 1, 1, 8] == found["size"].tolist()
    assert [INVALID_GPA] * 4 + [0x40_8001, 0x50_8001, INVALID_GPA] == found["gpa"].tolist()


def test_drmemtrace_of_a_32_bit_program(tmp_path):
    data = files.drmemtrace_begin(9, 0x20, narrow=True)
    data += files.entry(files.INSTR, 3, 0x8048000, True) * 3 + files.entry(files.READ, 4, 0xFFFF_0000, True)
    found = read(write(tmp_path, "a", data + files.entry(files.FOOTER, 0, 0, True)))
    assert [0x8048000] * 3 + [0xFFFF_0000] == found["addr"].tolist()


def test_drmemtrace_unknown_entry(tmp_path):
    data = files.drmemtrace_begin(1) + files.entry(files.INSTR, 3, 0x1000) * 100
    path = write(tmp_path, "a", data + files.entry(50, 0, 0) + files.entry(files.INSTR, 3, 0x1000))
    reason = f"{path}: the entry at byte {len(data)} has the type 50; the last that is known is 49"
    assert ([0x1000] * 100, reason) == until_damage(open_trace(path))


# ---- text --------------------------------------------------------------------------------------------------------------

TEXTS = {
    "pinatrace": files.pinatrace_file, "qemu-execlog": files.execlog_file, "perf-script": files.perf_file,
    "ftrace": files.ftrace_file,
}


@pytest.mark.parametrize("packing", ["none", "xz"])
@pytest.mark.parametrize("format", TEXTS)
def test_text_formats(format, packing, tmp_path):
    data, rows = TEXTS[format]()
    path = write(tmp_path, "a" + files.SUFFIXES[packing], files.PACKERS[packing](data))
    check(read(path), rows)
    assert format == describe_trace(path)["format"]


def test_pinatrace_variants(tmp_path):
    """(nil), no colon, tabs, a size without a value, a value without a size, no last line feed."""
    path = write(tmp_path, "a", b"(nil): R 0x10\n0x20 W 0x30\n0x40:\tR\t(nil)\n50: W 0x60 16\n0x70: R 0x80 0x1234\n\n# x\n"
                                b"0x90: W 0xa0")
    found = read(path)
    assert [0, 1, 0, 1, 0, 1] == found["op"].tolist()
    assert [0x10, 0x30, 0, 0x60, 0x80, 0xA0] == found["addr"].tolist()
    assert [0, 0x20, 0x40, 0x50, 0x70, 0x90] == found["ip"].tolist()
    assert [1, 1, 1, 16, 1, 1] == found["size"].tolist()


def test_execlog_of_a_system(tmp_path):
    """Addresses of data are physical, devices are not RAM; fetches, which are linear, only if asked for."""
    data, rows = files.execlog_file(system=True)
    path = write(tmp_path, "a", data)
    check(read(path), rows)
    assert 2000 == np.count_nonzero(read(path, fetch=True)["op"] == files.FETCH)


def test_execlog_with_registers(tmp_path):
    """Later versions write registers behind the accesses."""
    path = write(tmp_path, "a", b'0, 0x40, 0x1, "a", load, 0x10, rax -> 0x12, rbx -> 0x13\n'
                                b'1, 0x44, 0x1, "b", rax -> 0x1, store, 0x18, RAM\n')
    found = read(path, fetch=False)
    assert [0x10, 0x18] == found["addr"].tolist()
    assert [INVALID_GPA, 0x18] == found["gpa"].tolist()


@pytest.mark.parametrize(("name", "samples", "vcpus"), [("sort.perf.xz", 86, 1), ("machine.perf.xz", 110, 2)])
def test_perf_of_real_programs(name, samples, vcpus):
    """Page faults of sort, and of a machine: `perf record -e page-faults -d`, against a regular expression."""
    text = lzma.decompress((FILES / name).read_bytes()).decode()
    expected = re.findall(r"^.*?(\d+) +(?:\[(\d+)\] +)?[\d.]+: +page-faults: +(\w+) +(\w+)(?: +(\w+))?$", text, re.MULTILINE)
    assert samples == len(expected)
    found = read(FILES / name)
    rows = []
    for _, cpu, addr, ip, gpa in expected:
        addr, ip, gpa = int(addr, 16), int(ip, 16), int(gpa or "0", 16)
        rows.append(files.row(2 if addr == ip else 0, addr, 1, ip, vcpu=int(cpu or "0"), gpa=gpa or None))
    check(found, [row for row in rows if row["addr"]])


def test_perf_data_source_and_weight(tmp_path):
    """The words of a data source are between numbers; a weight is left out if it was asked for."""
    source = "|OP STORE|LVL L1 hit|SNP None|TLB L1 or L2 hit|LCK No|BLK  N/A"
    path = write(tmp_path, "a", f"sort 9/10 [2] 1.5: 1 cpu/mem/P: 1234 68100142 {source} 77 ffffffff81775dda 1c27f8\n".encode())
    found = read(path, "perf-script", fields="tid,cpu,time,period,event,addr,data_src,weight,ip,phys_addr")
    assert ([1], [0x1234], [0xFFFFFFFF81775DDA], [0x1C27F8], [2]) == tuple(
        found[name].tolist() for name in ("op", "addr", "ip", "gpa", "vcpu"))
    path = write(tmp_path, "b", b"sort 9 1.5: x: 1234 5678\nsort 12 1.5: x: 1234 5678\nsort 9 1.6: x: 0 5678\n")
    found = read(path, "perf-script", fields="tid,time,event,addr,phys_addr")
    assert ([0x5678, 0x5678], [0, 0], [0, 1]) == tuple(found[name].tolist() for name in ("gpa", "ip", "vcpu"))
    with pytest.raises(ValueError, match="fields: is 'ip'; allowed for perf-script is a list with addr"):
        open_trace(path, "perf-script", fields="ip")


def test_ftrace_events(tmp_path):
    """One of the events that tell of an access is read, or those that are asked for."""
    lines = [b"cpus=2", b" CPU 1/KVM-813 [000] 52.1: kvm_mmu_pagetable_walk: addr 7f001234 pferr 6 W|U",
             b" CPU 1/KVM-813 [001] 52.1: kvmmmu:fast_page_fault: vcpu 3 gva 7f0012340 error_code P|W|U sptep f old 0x1 new 3",
             b" CPU 1/KVM-813 [001] 52.2: handle_mmio_page_fault: addr:fee00020 gfn fee00 access 6",
             b" CPU 1/KVM-813 [000] 52.3: kvm_mmu_pagetable_walk: addr ffff888000001000 pferr 10 F", b""]
    path = write(tmp_path, "a", b"\n".join(lines))
    found = read(path)
    assert ([0x7F001234, 0xFFFF888000001000], [1, 2], [6, 16]) == tuple(found[name].tolist() for name in ("addr", "op", "access"))
    found = read(path, events=("fast_page_fault", "handle_mmio_page_fault"))
    assert ([0x7F0012340, 0xFEE00020], [1, 4], [INVALID_GPA, 0xFEE00020], [3, 3]) == tuple(
        found[name].tolist() for name in ("addr", "op", "gpa", "vcpu"))
    with pytest.raises(ValueError, match="events: is 'x'; allowed for ftrace is kvm_page_fault"):
        open_trace(path, events="x")


def test_strict_leaves_the_lines_of_a_tracer(tmp_path):
    """Comments of perf and ftrace, and what trace-cmd begins with, are not refused; other lines are."""
    sample, event = b"sort 9 1.5: x: 1234 5678\n", b"x-1 [0] 1.1: kvm_page_fault: vcpu 0 rip 0x1 address 0x7000 error_code 0x6\n"
    for format, header, row, address in [
            ("perf-script", b"# ========\n# captured on: today\n#\n", sample, 0x1234),
            ("ftrace", b"# tracer: nop\n#\n", event, 0x7000), ("ftrace", b"cpus=2\n", event, 0x7000)]:
        path = write(tmp_path, "a", header + row)
        options = {"fields": "tid,time,event,addr,ip"} if format == "perf-script" else {}
        assert [address] == read(path, format, strict=True, **options)["addr"].tolist()
        for other in (b"cpu=2\n", b"hello\n", b"\n"):
            with pytest.raises(TraceError, match="is no row of this format"):
                read(write(tmp_path, "b", header + row + other), format, strict=True, **options)


def test_ftrace_of_shadow_paging(tmp_path):
    """Addresses are linear: no gpa."""
    path = write(tmp_path, "a", b"x-1 [0] 1.1: kvm_page_fault: vcpu 0 rip 0x1 address 0x7000 error_code 0x6\n")
    assert [INVALID_GPA] == read(path, shadow=True)["gpa"].tolist()
    assert [0x7000] == read(path)["gpa"].tolist()


@pytest.mark.parametrize(("format", "line"), [
    ("pinatrace", b"0x1: X 0x2"), ("pinatrace", b"0x1: R"), ("pinatrace", b"hello"), ("pinatrace", b"0x1: R 0x2 70000"),
    ("qemu-execlog", b"0, 0x1"), ("qemu-execlog", b'0, 0x1, 0x2, "unfinished'), ("qemu-execlog", b'70000, 0x1, 0x2, "x"'),
    ("qemu-execlog", b'0, 0x1, 0x2, "x", load, 0xzz'), ("ftrace", b"x [0] kvm_page_fault: vcpu 0"),
])
def test_broken_lines(format, line, tmp_path):
    """The rows before are delivered; the message has the line's number and its text."""
    data, rows = TEXTS[format](20)
    lines = data.count(b"\n")
    path = write(tmp_path, "a", data + line + b"\n" + data)
    reason = f"{path}: line {lines + 1} (byte {len(data)}) is no row of this format: {line!r}"
    assert ([row["addr"] for row in rows], reason) == until_damage(open_trace(path, format))


@pytest.mark.parametrize("format", ["lackey", *TEXTS])
def test_text_with_a_nul(format, tmp_path):
    with pytest.raises(TraceError, match="line 1"):
        list(open_trace(write(tmp_path, "a", b"xyz\0abc\n"), format).columns())
    with pytest.raises(TraceError, match="a line from byte 0 on has more than 65536 bytes"):
        list(open_trace(write(tmp_path, "a", b"x" * 100_000), format).columns())


# ---- telling formats apart ---------------------------------------------------------------------------------------------

def test_unknown_files(tmp_path):
    """The error lists what can be read and shows the first bytes."""
    path = write(tmp_path, "a.gz", files.PACKERS["gzip"](b"\x7fELF\x02\x01\nabc"))
    with pytest.raises(TraceError, match=re.escape("begins with (decompressed gzip) 7f 45 4c 46 02 01 0a 61 62 63 |.ELF...abc|. "
                                                   "Formats that can be read: champsim, csv, drmemtrace,")):
        open_trace(path)
    with pytest.raises(TraceError, match="it is empty"):
        open_trace(write(tmp_path, "b", b""))
    with pytest.raises(TraceError, match="it is a directory of a.gz, b"):
        open_trace(tmp_path)
    with pytest.raises(ValueError, match="format: is 'vcd'; allowed is champsim, csv"):
        open_trace(path, "vcd")
    with pytest.raises(FileNotFoundError, match="no such trace"):
        open_trace(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such trace"):
        open_trace(tmp_path / "none", "lackey")
    with pytest.raises(TraceError, match=r"is compressed by lz4, which is not read here; decompress it first \(lz4 -d\)"):
        open_trace(write(tmp_path, "c", b"\x04\x22\x4d\x18" + b"\0" * 50))


def test_random_bytes_are_no_format(tmp_path):
    rng = np.random.default_rng(5)
    for size in (1, 63, 64, 4096, 100_000):
        for fill in (rng.integers(0, 256, size, np.uint8), np.zeros(size, np.uint8), rng.integers(32, 127, size, np.uint8)):
            with pytest.raises(TraceError, match="is in no format that is known"):
                open_trace(write(tmp_path, "a", fill.tobytes()))


PLUGIN = '''
from kvmmu.traces.foreign import Brings, ForeignTrace
import numpy as np

class Tens:
    """One address a byte."""
    name = "tens"
    def sniff(self, head, path):
        return 100 if head.startswith(b"TENS") else 0
    def open(self, path, *, step=10):
        def read(notes):
            data = np.frombuffer(path.read_bytes()[4:], np.uint8).astype(np.uint64) * np.uint64(step)
            yield {"op": np.zeros(data.size, np.uint8), "addr": data, "access": np.full(data.size, 4, np.uint8)}
        return ForeignTrace(self.name, path, read, Brings())

def broken():
    raise RuntimeError("not today")
'''


def test_entry_points(tmp_path):
    """Another package adds a format by an entry point; one that fails is told of and does no harm."""
    (tmp_path / "tens.py").write_text(PLUGIN)
    (tmp_path / "tens-1.dist-info").mkdir()
    (tmp_path / "tens-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tens\nVersion: 1\n")
    (tmp_path / "tens-1.dist-info" / "entry_points.txt").write_text(
        "[kvmmu.traces]\ntens = tens:Tens\nbad = tens:broken\nlackey = tens:Tens\n")
    (tmp_path / "x.tens").write_bytes(b"TENS\1\2\3")
    program = ("import sys; from kvmmu.traces.opening import open_trace\n"
               "print([int(a) for c in open_trace(sys.argv[1], step=100).columns() for a in c['addr']])")
    done = subprocess.run([sys.executable, "-Pc", program, tmp_path / "x.tens"], env={"PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, check=True)
    assert "[100, 200, 300]\n" == done.stdout
    assert "the trace format 'bad' (tens:broken) cannot be used: RuntimeError: not today" in done.stderr
    assert "there is a format 'lackey' already" in done.stderr


def test_formats_by_name():
    names = {"kvmmu", "lackey", "champsim", "drmemtrace", "pinatrace", "qemu-execlog", "qemu-plugin", "perf-script", "ftrace",
             "parquet", "csv", "numpy", "u64"}
    assert names <= set(formats())
    assert all(name == format.name for name, format in formats().items())
