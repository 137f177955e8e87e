# SPDX-License-Identifier: Apache-2.0
"""The command on memory images: pt, read, walk, info."""

import csv
import gzip
import io
import json
import re

import image_files
import numpy as np
import pytest
from image_files import PAGE, Guest, unpacked
from paths import DATA

from kvmmu.cli import main

CLIPS = DATA / "linux"


def run(capsys, *args, status=0):
    """The output of a command."""
    assert main([str(arg) for arg in args]) == status
    return capsys.readouterr().out


@pytest.fixture
def dump(tmp_path):
    guest = Guest()
    path = tmp_path / "dump.elf"
    path.write_bytes(image_files.qemu_core(guest))
    return path, guest


def test_pt_for_people(capsys, dump):
    """A line for each part of the address space, and the ranges in it."""
    lines = run(capsys, "pt", dump[0]).splitlines()
    assert lines[0].endswith("dump.elf (elf), vCPU 0: 4-level paging, CR3 0x10000")
    assert lines[1] == "0x0000000000000000  2 ranges, 8K"
    assert lines[2] == "  0x0000000000400000-0x0000000000400fff      4K  4K rwxu AD-  -> 0x3000"
    assert lines[-2] == "0xffff800000000000  1 range, 2M" or lines[-2].startswith("0x0000800000000000")
    assert lines[-1] == "  0xffff800000200000-0xffff8000003fffff      2M  2M rw-- --G  -> 0x200000"


def test_pt_filters(capsys, dump):
    path, guest = dump

    def found(*args):
        return [int(m["gva"]) for m in json.loads(run(capsys, "pt", path, "--json", *args))["mappings"]]

    assert found() == [*sorted(guest.mapped), 0xFFFF_8000_0020_0000]
    assert found("--wx") == found("--user") == sorted(guest.mapped)
    assert found("--size", "2m") == [0xFFFF_8000_0020_0000]
    assert found("--maps", "0x5010") == [0x401010]
    assert found("--start", "0x401000", "--stop", "0x402000") == [0x401000]
    assert found("--size", "1g") == []
    assert "nothing that is mapped is of the kind" in run(capsys, "pt", path, "--size", "1g")


def test_pt_as_json_csv_and_parquet(capsys, dump, tmp_path):
    """The same rows in each."""
    path, guest = dump
    found = json.loads(run(capsys, "pt", path, "--json"))
    assert found["registers"]["cr3"] == guest.cr3
    first = found["mappings"][0]
    assert {name: first[name] for name in ("gva", "gpa", "size", "rights", "level")} == {
        "gva": 0x400000, "gpa": 0x3000, "size": PAGE, "rights": "rwxu", "level": 1}
    assert (first["accessed"], first["dirty"], first["global"], first["pkey"]) == (True, True, False, 0)
    rows = list(csv.DictReader(io.StringIO(run(capsys, "pt", path, "--csv"))))
    assert [{name: str(int(value) if isinstance(value, bool) else value) for name, value in row.items()}
            for row in found["mappings"]] == rows
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra arrow)")
    run(capsys, "pt", path, "--parquet", tmp_path / "pt.parquet")
    assert parquet.read_table(tmp_path / "pt.parquet").to_pylist() == found["mappings"]


def test_pt_picture(capsys, dump, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    out = run(capsys, "pt", dump[0], "--plot", tmp_path / "space.svg")
    lines = out.splitlines()
    assert len(lines) == 2                                  # a summary, not a line for each range
    assert lines[1].startswith(f"{tmp_path / 'space.svg'}: ")
    assert re.search(r": \d+ ranges, [\d.]+[KMGT]: .*\brwxu \d", lines[1])
    picture = (tmp_path / "space.svg").read_text()
    rows = json.loads(run(capsys, "pt", dump[0], "--plot", tmp_path / "again.svg", "--json"))["mappings"]
    assert f"{len(rows)} ranges" in lines[1]
    assert len(picture) == len((tmp_path / "again.svg").read_text())
    assert "0xffff800000200000, 2M" in (tmp_path / "space.svg").read_text() or (tmp_path / "space.svg").stat().st_size > 5000


def test_pt_equals_info_tlb(capsys, tmp_path):
    """Line by line what QEMU's monitor listed at the stop of the dump."""
    tlb = np.load(CLIPS / "pae" / "info_tlb.npz")
    path = unpacked(tmp_path, "linux-pae.ptonly.elf.zst")
    rows = list(csv.DictReader(io.StringIO(run(capsys, "pt", path, "--single", "--csv"))))
    assert [int(row["gva"]) for row in rows] == tlb["gva"].tolist()
    assert [int(row["gpa"]) for row in rows] == tlb["gpa"].tolist()
    assert [(int(row["global"]), int(row["dirty"]), int(row["accessed"])) for row in rows] == [
        (flags >> 1 & 1, flags >> 3 & 1, flags >> 4 & 1) for flags in tlb["flags"].tolist()]


@pytest.mark.parametrize("command", [["replay"], ["spt"], ["compare"], ["convert"]])
def test_an_image_in_the_place_of_a_trace(command, capsys, dump, tmp_path):
    """The message says what it is, and which command takes it."""
    path, _ = dump
    after = [tmp_path / "out.parquet"] if command == ["convert"] else []
    packed = tmp_path / "dump.elf.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file, words in ((path, "is a memory image (elf), no trace: kvmmu pt shows its page tables, kvmmu replay TRACE --image"),
                        (packed, "is a memory image (elf) that is compressed, no trace; decompress it first")):
        assert main([*command, str(file), *map(str, after)]) == 2
        err = capsys.readouterr().err
        assert f"kvmmu: {file}: {words}" in err
        assert "Formats that can be read" not in err


def test_info_of_a_compressed_image(capsys):
    pytest.importorskip("zstandard", reason="zstandard is not installed (extra zstd)")
    assert main(["info", str(DATA / "images" / "linux-l4.ptonly.elf.zst")]) == 2
    assert "is a memory image (elf) that is compressed, no trace; decompress it first" in capsys.readouterr().err


def test_no_image_and_no_trace(capsys, tmp_path):
    (tmp_path / "a").write_bytes(b"\x01\x02\x03")
    assert main(["info", str(tmp_path / "a")]) == 2
    assert "is in no format that is known; it begins with 01 02 03" in capsys.readouterr().err


def test_pt_of_a_recording(capsys):
    """Recordings have tables, too."""
    assert "4-level paging" in run(capsys, "pt", "bundled", "--wx").splitlines()[0]
    found = json.loads(run(capsys, "pt", "bundled", "--start", "0x401000", "--stop", "0x402000", "--json"))
    assert [m["gva"] for m in found["mappings"]] == [0x401000]


def test_read(capsys, dump):
    path, guest = dump
    out = run(capsys, "read", path, "0x400ff8", "16").splitlines()
    expected = guest.bytes(0x3FF8, 0x4000) + guest.bytes(0x5000, 0x5008)
    assert len(out) == 1
    assert out[0].startswith(f"0000000000400ff8  {expected.hex(' ')}  |")
    out = run(capsys, "read", path, "0x3000", "4", "--physical")
    assert out.startswith(f"0000000000003000  {guest.bytes(0x3000, 0x3004).hex(' ')} ")


def test_read_of_a_recording(capsys):
    """As the help says: page tables are there, data are not."""
    with pytest.raises(SystemExit):
        main(["read", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A recording or a trace has page tables alone: other memory of its guest is such a part, or 0 where" in text
    assert main(["read", "bundled", "0x401000", "16"]) == 2
    assert "linear address 0x401000: no memory at guest-physical address 0x13c2f000; 0x0 of 0x10" in capsys.readouterr().err
    assert bytes(16) != bytes.fromhex(run(capsys, "read", "bundled", "0x26b4000", "16", "--physical").split("  ")[1])
    assert run(capsys, "read", "bundled", "0x1000000", "16", "--physical").split("  ")[1] == bytes(16).hex(" ")


def test_read_raw(capfdbinary, dump):
    path, guest = dump
    assert main(["read", str(path), "0x400000", "0x2000", "--raw"]) == 0
    assert capfdbinary.readouterr().out == guest.bytes(0x3000, 0x4000) + guest.bytes(0x5000, 0x6000)


def test_read_of_what_is_not_mapped(capsys, dump):
    """What is mapped comes first; the message names the first address that is not."""
    assert main(["read", str(dump[0]), "0x401ff0", "0x20"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("0000000000401ff0  ")
    assert "linear address 0x402000 is not mapped; 0x10 of 0x20 bytes are" in err


def test_walk(capsys, dump):
    path, guest = dump
    out = run(capsys, "walk", path, "0x400000", "--access", "wu")
    assert out.splitlines()[-1] == "  -> gpa 0x3000 (4K page)"
    out = run(capsys, "walk", path, "0x400000", "--vcpu", "1", "--cr0", "0x80000011", "--cr3", hex(guest.cr3), "--cr4", "0x20",
              "--efer", "0x500")
    assert "-> gpa 0x3000" in out
    assert "-> gpa 0x400000" in run(capsys, "walk", path, "0x400000", "--vcpu", "1")
    for bit, key, access, code in ((22, "--pkru", "u", "0x25 (P U PK)"), (24, "--pkrs", "r", "0x21 (P PK)")):
        gva = "0x400000" if access == "u" else "0xffff800000201000"
        assert "-> gpa" in run(capsys, "walk", path, gva, "--access", access, "--cr4", hex(0x6B0 | 1 << bit))
        out = run(capsys, "walk", path, gva, "--access", access, "--cr4", hex(0x6B0 | 1 << bit), key, "1")
        assert f"#PF {code}" in out
    walks = json.loads(run(capsys, "walk", path, "0x402000", "--json"))["walks"]
    assert walks[0]["status"] == "PAGE_FAULT"


def test_info(capsys, dump, tmp_path):
    path, guest = dump
    out = run(capsys, "info", path)
    assert f"{path}: elf, " in out
    assert "0x000000000000-0x00000001ffff" in out
    assert f"vCPU 0: rip 0xffffffff81000000, rsp 0x7, cr0 0x80050033, cr2 0xdead, cr3 {guest.cr3:#x}" in out
    facts = json.loads(run(capsys, "info", path, "--json"))
    assert (facts["format"], len(facts["vcpus"]), facts["damage"]) == ("elf", 2, [])
    assert facts["vcpus"][0]["cr3"] == guest.cr3
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[:-100])
    assert main(["info", str(cut)]) == 0
    out, err = capsys.readouterr()
    assert "damage: the file ends at" in out
    assert "the file ends at" in err


def test_raw_needs_registers(capsys, tmp_path, dump):
    raw = tmp_path / "ram"
    raw.write_bytes(dump[1].memory.tobytes())
    assert main(["pt", str(raw)]) == 2
    assert "has no registers (raw); say where its page tables begin by --cr3" in capsys.readouterr().err
    assert "-> 0x3000" in run(capsys, "pt", raw, "--cr3", hex(dump[1].cr3))


def test_what_is_no_image(capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text("no image")
    assert main(["pt", str(path)]) == 2
    assert "is in no format that is known" in capsys.readouterr().err


def test_walk_goes_by_the_registers_that_are_given(capsys):
    """Also of a recording, whose own addresses are then no measure."""
    out = run(capsys, "walk", "bundled", "0x401000", "--cr3", "0x1000")
    assert "at 0x000000001000" in out
    assert "recorded" not in out


@pytest.mark.parametrize(("args", "words"), [
    (("walk", "bundled", "0x401000", "--vcpu", "1"), "--vcpu 1: only memory images have vCPUs"),
    (("pt", "bundled", "--vcpu", "1"), "--vcpu 1: only memory images"),
    (("pt", "DUMP", "--vcpu", "2"), "the image has vCPUs 0 to 1"),
    (("walk", "DUMP", "0x400000", "--ctx", "1"), "--ctx 1: a memory image has no contexts"),
    (("pt", "DUMP", "--phase", "dyn"), "--phase dyn: an image has no phases"), (("info", "DUMP", "--phase", "dyn"), "no phases"),
    (("pt", "DUMP", "--start", "0x2000", "--stop", "0x1000"), "--stop 0x1000: lies below --start 0x2000"),
    (("read", "DUMP", "0xfffffff0", "32", "--physical"), "no memory at guest-physical address 0xfffffff0; 0x0 of 0x20 bytes"),
    (("convert", "bundled-lackey", "x.csv"), "x.csv: what is written is a Parquet trace")])
def test_what_cannot_be_asked_for(capsys, dump, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    assert main([str(dump[0]) if arg == "DUMP" else arg for arg in args]) == 2
    assert words in capsys.readouterr().err


def test_physical_bytes_of_an_image_without_registers(capsys, tmp_path):
    """They need no page tables."""
    path = tmp_path / "a.ram"
    path.write_bytes(bytes(range(256)) * 256)
    assert run(capsys, "read", path, "0x10", "4", "--physical") == (
        "0000000000000010  10 11 12 13                                      |....|\n")
    assert "raw, 65,536 bytes" in run(capsys, "info", path)


@pytest.mark.parametrize("command", ["info", "pt", "walk", "read"])
def test_damage_is_told_once(capsys, dump, command):
    path, _ = dump
    path.write_bytes(path.read_bytes()[:-100])
    more = {"walk": ["0x400000"], "read": ["0x400000", "4"]}.get(command, [])
    assert main([command, str(path), *more]) == 0
    assert capsys.readouterr().err.count("the file ends at") == 1


def test_a_format_that_there_is_not(capsys, dump):
    assert main(["pt", str(dump[0]), "--format", "foo"]) == 2
    assert "kdump" in capsys.readouterr().err


def test_parquet_over_the_image_is_refused(capsys, dump):
    """Its memory is mapped, and it may be all that there is of it."""
    pytest.importorskip("pyarrow")
    path, _ = dump
    before = path.read_bytes()
    assert main(["pt", str(path), "--parquet", str(path)]) == 2
    assert "is the same file as" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", [("pt",), ("pt", "--json"), ("diff",), ("read", "0x1000", "0")])
def test_page_tables_outside_the_image(capsys, tmp_path, command):
    """CR3 leads where the image has no memory: told on standard error, in the words of `kvmmu walk`."""
    path = tmp_path / "guest.ram"
    path.write_bytes(bytes(16 * PAGE))
    registers = ("--format", "raw", "--cr0", "0x80000001", "--cr4", "0x20", "--efer", "0x500", "--cr3")
    assert main([command[0], str(path), *command[1:], *registers, "0x99999000"]) == 0
    assert (f"kvmmu: {path} (raw), vCPU 0: CR3 0x99999000: the table lies in a hole of guest memory, where entries read as not "
            "present\n") == capsys.readouterr().err
    assert main([command[0], str(path), *command[1:], *registers, "0x1000"]) == 0
    assert "" == capsys.readouterr().err


@pytest.mark.parametrize(("name", "size", "reason"), [
    ("odd.raw", 5000, "raw is a file of whole pages of 4,096 bytes, and this one has 5,000 bytes"),
    ("small.xyz", 8192, "a raw file of fewer than 65,536 bytes is known by its name alone: .raw, .mem, "),
    ("empty", 0, "raw is a file of whole pages that are not all 0")])
def test_a_file_of_no_known_format(capsys, tmp_path, name, size, reason):
    """The message has the formats of images, why it is not raw, and the option by name; `info` has those of traces, too."""
    (tmp_path / name).write_bytes(np.random.default_rng(7).bytes(size))
    for command in ("pt", "info", "diff"):
        assert main([command, str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert "" == out
        assert "avml, elf, kdump, lime, raw, vmware, windows; " + reason in err
        assert "format=NAME, --format NAME" in err
        assert (command == "info") == ("champsim, csv, drmemtrace" in err)


def test_a_raw_file_that_ends_inside_a_page(capsys, tmp_path):
    path = tmp_path / "odd.raw"
    path.write_bytes(b"\x01" * 5000)
    for command, *more in (("info",), ("pt", "--cr3", "0x1000"), ("read", "0x1380", "16", "--physical")):
        assert main([command, str(path), *more, "--format", "raw"]) == 0
        out, err = capsys.readouterr()
        assert f"kvmmu: {path}: its 5,000 bytes are no whole pages: the rest of the last page reads as 0\n" in err
    assert out.startswith("0000000000001380  01 01 01 01 01 01 01 01 00 00 ")
    path.write_bytes(b"\x01" * 8192)
    assert main(["info", str(path), "--format", "raw"]) == 0
    assert "" == capsys.readouterr().err


@pytest.mark.parametrize("options", [("--columns", "addr=nowhere,op=kind"), ()])
def test_info_of_a_trace_of_which_nothing_is_read(capsys, tmp_path, options):
    """The message alone: a table of zeros says nothing. As JSON it has the message."""
    path = tmp_path / ("t.csv" if options else "t.npy")
    if options:
        path.write_text("addr,op\n4096,R\n")
    else:
        np.save(path, np.zeros((3, 3), np.uint64))
    message = ("addr shall be column 'nowhere'; there are addr, op" if options
               else "has the shape (3, 3) of uint64; allowed is one dimension")
    assert main(["info", str(path), *options]) == 2
    assert ("", f"kvmmu: {path}: {message}\n") == tuple(capsys.readouterr())
    assert main(["info", str(path), *options, "--json"]) == 2
    assert f"{path}: {message}" == json.loads(capsys.readouterr().out)["damage"]
