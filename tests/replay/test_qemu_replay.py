# SPDX-License-Identifier: Apache-2.0
"""Traces of the plugin for QEMU on a guest's own page tables: written record by record, and of a Linux that QEMU ran."""

import json
import lzma

import format_files as files
import image_files
import numpy as np
import pytest
from paths import DATA

import kvmmu
from kvmmu import GuestMemory, PageTables, Vcpu
from kvmmu.cli import main
from kvmmu.traces import Op, RegisterSet, open_trace
from kvmmu.traces.on_memory import TraceOnMemory

GVA, TABLES = 0x40_0000, 0xFFFF_8000_0000_0000
SIZE = 1 << 20
CR0_KIND, CR4_KIND, EFER_KIND = 5, 6, 7
CR4_PAE, CR4_SMAP = 1 << 5, 1 << 21
AC = 1 << 18
ACCESSED, DIRTY = 1 << 5, 1 << 6


class Guest:
    """Two address spaces: GVA is at 0x8000 and at 0x9000, for users; their leaf tables are at TABLES, for supervisors."""

    def __init__(self):
        self.mem = GuestMemory(SIZE)
        self.spaces, self.leaves = [], []
        for start, gpa in ((0x10000, 0x8000), (0x20000, 0x9000)):
            tables = PageTables(self.mem, "4l", frames=range(start, start + 0x8000, 4096))
            tables.map(GVA, gpa)
            leaf = int(self.vcpu(tables).gva_walk.translate(np.array([GVA], np.uint64), fields=("pte_gpa",)).pte_gpa[0])
            tables.map(TABLES, leaf & ~0xFFF, user=False)
            self.spaces.append(tables)
            self.leaves.append(leaf)

    def vcpu(self, tables=None, **over):
        vcpu = Vcpu(self.mem)
        vcpu.set_regs((tables or self.spaces[0]).regs(**over))
        return vcpu

    def elf(self, path):
        regs = self.spaces[0].regs()
        state = image_files.qemu_state(regs.cr0, regs.cr3, regs.cr4)
        path.write_bytes(image_files.elf_core([(0, self.mem.read(0, SIZE))], image_files.note(b"QEMU", 0, state) * 2))
        return path


def store(gva, gpa, value, log=3):
    return [(gva, gpa, log, files.STORE, 0), (value, gpa, log, files.VALUE_KIND, 0)]


def moving_page(guest, first=True):
    """A supervisor moves GVA from 0x8000 to 0xA000 by a store to its leaf entry."""
    leaf = guest.leaves[0 if first else 1]
    return [(GVA, 0x8000 if first else 0x9000, 3, files.LOAD, 0),
            *store(TABLES + (leaf & 0xFFF), leaf, guest.mem.read_u64(leaf) & 0xFFF | 0xA000), (GVA + 8, 0xA008, 3, files.LOAD, 0)]


def trace_file(tmp_path, *blocks, **header):
    path = tmp_path / "a.qtrace"
    path.write_bytes(files.qemu_header(**header) + b"".join(files.qemu_block(vcpu, records) for vcpu, records in blocks))
    return path


def test_stores_change_the_tables(tmp_path):
    """A store with its value takes effect behind its access; a trace that is asked to bring none fails."""
    path = trace_file(tmp_path, (0, moving_page(Guest())), vcpus=1)
    for trace in (path, open_trace(path), open_trace(path, events=True)):
        report = kvmmu.replay(trace, Guest().vcpu())
        assert (3, 0, 1) == (report.verified, report.mismatches, report.table_writes)
        assert {} == report.skipped
    report = kvmmu.replay(open_trace(path, events=False), Guest().vcpu())
    assert (2, 1, 0) == (report.verified, report.mismatches, report.table_writes)
    assert {"values of stores": 1} == report.skipped


def test_bytes_of_an_entry(tmp_path):
    """A store that is not aligned writes the entry all the same."""
    guest = Guest()
    leaf = guest.leaves[0]
    records = [*store(TABLES + (leaf & 0xFFF) + 1, leaf + 1, 0xA0, log=2), (GVA, 0xA000, 0, files.LOAD, 0)]
    report = kvmmu.replay(trace_file(tmp_path, (0, records), vcpus=1), guest.vcpu())
    assert (2, 0, 4) == (report.verified, report.mismatches, report.table_writes)


def test_registers_of_each_processor(tmp_path):
    """CR3 is that of the vCPU that loads it; what the trace does not tell is as in the vCPU that is given."""
    guest = Guest()
    second = guest.spaces[1].root
    blocks = [(0, moving_page(guest)), (3, [(second, 0, 0, files.CR3_KIND, 0), (GVA, 0x9000, 3, files.LOAD, 0)]),
              (0, [(GVA, 0xA000, 3, files.LOAD, 0), (second, 0, 0, files.CR3_KIND, 0), (GVA, 0x9000, 3, files.LOAD, 0)]),
              (3, moving_page(guest, first=False))]
    report = kvmmu.replay(trace_file(tmp_path, *blocks), guest.vcpu())
    assert (9, 0, 2, 2) == (report.verified, report.mismatches, report.table_writes, report.contexts)
    # an older plugin tells no registers: its rows are of one processor
    guest = Guest()
    report = kvmmu.replay(trace_file(tmp_path, (3, moving_page(guest)), flags=7), guest.vcpu())
    assert (3, 0) == (report.verified, report.mismatches)


def test_paging_is_switched(tmp_path):
    """From real mode to long mode, as a boot does it: CR4, CR3, EFER and CR0 as they are loaded."""
    guest = Guest()
    regs = guest.spaces[0].regs()
    records = [(0, 0, 0, files.CPL_KIND, 0), (0x8000, 0x8000, 1, files.LOAD, 0),
               (CR4_PAE, 0, 0, CR4_KIND, 0), (regs.cr3, 0, 0, files.CR3_KIND, 0), (0x900, 0, 0, EFER_KIND, 0),
               (0x9000, 0x9000, 1, files.STORE, 0), (regs.cr0, 0, 0, CR0_KIND, 0), *moving_page(guest)]
    vcpu = Vcpu(guest.mem)
    vcpu.set_regs(cr0=0x10, cr3=0, cr4=0, efer=0)
    report = kvmmu.replay(trace_file(tmp_path, (0, records), vcpus=1), vcpu)
    assert (5, 0) == (report.verified, report.mismatches)
    assert {"paging off": 2, "4K": 3} == report.page_sizes


def test_smap(tmp_path):
    """Where CPL and AC are told, SMAP counts: a supervisor reaches a user's page with EFLAGS.AC alone."""
    load = (GVA, 0x8000, 3, files.LOAD, 0)
    for privilege, mismatches in ((0, 1), (AC, 0), (3, 0)):
        guest = Guest()
        path = trace_file(tmp_path, (0, [(privilege, 0, 0, files.CPL_KIND, 0), load]), vcpus=1)
        report = kvmmu.replay(path, guest.vcpu(cr4=CR4_PAE | CR4_SMAP))
        assert mismatches == report.mismatches, privilege


def test_stores_outside_of_the_memory(tmp_path):
    """A read-only slot, a hole, and behind the end: nothing is written, which is counted, and the replay goes on."""
    guest = Guest()
    guest.mem.add_slot(0x40_0000, 0x1000, readonly=True)
    guest.spaces[0].map(GVA + 0x1000, 0x40_0000)
    guest.spaces[0].map(GVA + 0x2000, 0x30_0000)
    records = [*store(GVA + 0x1000, 0x40_0000, 5), *store(GVA + 0x2008, 0x30_0008, 6), *moving_page(guest),
               *store(GVA + 0x2008, 0x30_0008, 7)]
    vcpu = guest.vcpu()
    report = kvmmu.replay(trace_file(tmp_path, (0, records), vcpus=1), vcpu)
    assert (6, 0, 1) == (report.verified, report.mismatches, report.table_writes)
    assert {"stores outside of the memory": 3} == report.skipped
    assert 0 == vcpu.mem.read_u64(0x40_0000)
    # nowhere to write at all
    regs = RegisterSet(vcpu.regs.cr0, vcpu.regs.cr3, vcpu.regs.cr4, vcpu.regs.efer)
    trace = TraceOnMemory(open_trace(tmp_path / "a.qtrace"), regs, [(0x40_0000, 0x1000, True)])
    assert not any((chunk.op == Op.GUEST_WRITE).any() for chunk in trace.chunks())
    assert {"stores outside of the memory": 4} == trace.notes.skipped


# ---- the command -------------------------------------------------------------------------------------------------------

def test_the_command(tmp_path, capsys):
    """`--image` walks the tables of an image; exit status 1 on a mismatch."""
    guest = Guest()
    image = str(guest.elf(tmp_path / "dump.elf"))
    path = str(trace_file(tmp_path, (0, moving_page(guest)), vcpus=1))
    assert 0 == main(["replay", path, "--image", image, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (3, 0, 1, {}) == (found["verified"], found["mismatches"], found["table_writes"], found["skipped"])
    assert 0 == main(["replay", path, "--image", image, "--vcpu", "1", "--image-format", "elf"])
    assert "mismatches" in capsys.readouterr().out
    assert 1 == main(["replay", path, "--image", image, "--cr3", hex(guest.spaces[1].root)])
    assert "MISMATCH access 0" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--cr3", "0x1000"], "--cr3: is about a memory image; allowed with --image FILE"),
    (["--image-format", "elf"], "--image-format: is about a memory image"),
    (["--image", "IMAGE", "--pager"], "--pager: page tables are those of --image IMAGE; allowed without --image"),
    (["--image", "IMAGE", "--vcpu", "2"], "--vcpu 2: the image has vCPUs 0 to 1"),
    (["--image", "IMAGE", "--image-format", "none"], "format: want"),
    (["--image", "nowhere"], "nowhere: no such image")])
def test_arguments_of_the_command(arguments, message, tmp_path, capsys):
    guest = Guest()
    image = str(guest.elf(tmp_path / "dump.elf"))
    path = str(trace_file(tmp_path, (0, moving_page(guest)), vcpus=1))
    assert 2 == main(["replay", path, *(image if word == "IMAGE" else word for word in arguments)])
    assert message.replace("IMAGE", image) in capsys.readouterr().err


def test_an_image_for_a_recording(tmp_path, capsys):
    assert 2 == main(["replay", "bundled", "--image", str(Guest().elf(tmp_path / "dump.elf"))])
    assert "is a recording, which brings its own memory; allowed with traces" in capsys.readouterr().err


# ---- a Linux -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def linux(tmp_path_factory):
    """The first moments of a trace of Linux 6.1 under QEMU 10.0.2, and the page tables of the image where it begins.

    It has 5-level paging, page-table isolation, SMEP and SMAP. A shell forks a child; user and kernel alternate.
    """
    folder = tmp_path_factory.mktemp("linux")
    for name in ("linux-l5.qtrace", "linux-l5.elf"):
        (folder / name).write_bytes(lzma.decompress((DATA / "formats" / f"{name}.xz").read_bytes()))
    return folder


def records_of(path):
    """The records of a trace, by plain Python and numpy: address, gpa, size, kind, device."""
    data = path.read_bytes()
    parts, at = [], 64
    while at < len(data):
        count = int.from_bytes(data[at + 8:at + 12], "little")
        parts.append(np.frombuffer(data, "<u8", 2 * count, at + 16).reshape(count, 2))
        at += 16 + 16 * count
    address, info = np.concatenate(parts).T
    return address, *((info >> np.uint64(shift)).astype(np.int64) & mask
                      for shift, mask in ((0, 2**52 - 1), (52, 15), (56, 15), (60, 1)))


def test_linux(linux):
    """Each physical address of a running Linux is that of the walk of its own tables, and what is counted is in the file."""
    address, gpa, size, kind, device = records_of(linux / "linux-l5.qtrace")
    image = kvmmu.open_image(linux / "linux-l5.elf")
    vcpu = image.vcpu(0)
    report = kvmmu.replay(linux / "linux-l5.qtrace", vcpu)
    loads, stores, fetches = (int(np.count_nonzero(kind == each)) for each in (0, 1, 2))
    assert (0, {}, True) == (report.mismatches, report.walk_faults, report.complete)
    assert {"load": loads, "store": stores, "fetch": fetches} == report.kinds
    assert (loads + stores, fetches) == (report.verified, report.unchecked) > (80_000, 100_000)
    assert np.count_nonzero(device) == report.mmio
    assert "5l" == report.mode
    assert {"4K", "2M"} == set(report.page_sizes)
    roots = address[kind == files.CR3_KIND]
    assert len(roots) > 30
    assert len(np.unique(roots)) + 1 == report.contexts == 4        # and those of the image, whose CR4 has fewer bits
    # the tables alone are in the image; stores to them, one by one, leave them as they are now, but for accessed and dirty bits
    before = kvmmu.open_image(linux / "linux-l5.elf")
    pages = {where: bytearray(before.memory.read(where, 4096)) for where in tables_of(before)}
    stored = np.flatnonzero(kind == files.VALUE_KIND)
    within = [row for row in stored.tolist() if int(gpa[row]) & ~0xFFF in pages]
    assert len(within) == report.table_writes > 500
    outside = sorted(set(stored.tolist()) - set(within))
    aligned = gpa[outside] & (1 << size[outside]) - 1 == 0
    lost = np.where(aligned, 1, np.minimum(1 << size[outside], 4096 - (gpa[outside] & 4095)))     # others are written by byte
    assert lost.sum() == report.skipped["stores outside of the memory"]
    for row in within:
        where, count = int(gpa[row]), 1 << int(size[row])
        pages[where & ~0xFFF][where & 0xFFF:(where & 0xFFF) + count] = int(address[row]).to_bytes(count, "little")
    for page, data in pages.items():
        wanted, there = np.frombuffer(data, "<u8"), np.frombuffer(vcpu.mem.read(page, 4096), "<u8")
        assert not ((wanted ^ there) & ~np.uint64(ACCESSED | DIRTY)).any(), hex(page)


def tables_of(image):
    return [gpa + page for gpa, size, _ in image.memory.slots for page in range(0, size, 4096)]


def test_linux_without_its_stores(linux):
    """The stores matter: without them hundreds of accesses end elsewhere, or nowhere."""
    trace = open_trace(linux / "linux-l5.qtrace", events=False)
    report = kvmmu.replay(trace, kvmmu.open_image(linux / "linux-l5.elf").vcpu(0))
    assert report.mismatches > 100


def test_linux_with_another_entry(linux):
    """An entry of the image that maps another frame is found out by the first access there."""
    vcpu = kvmmu.open_image(linux / "linux-l5.elf").vcpu(0)
    address, gpa, _, kind, _ = records_of(linux / "linux-l5.qtrace")
    first = np.flatnonzero(kind < files.FETCH)[0]
    walk = vcpu.gva_walk.translate(address[first:first + 1], fields=("gpa", "pte", "pte_gpa", "level"))
    assert gpa[first] == walk.gpa[0]
    page = 4096 if walk.level[0] == 1 else 2 << 20
    vcpu.mem.write_u64(int(walk.pte_gpa[0]), int(walk.pte[0]) ^ page)
    report = kvmmu.replay(linux / "linux-l5.qtrace", vcpu)
    assert 0 < report.mismatches
    assert report.examples[0].gva == address[first]
    assert f"reached gpa {int(gpa[first]):#x}" in report.examples[0].recorded


def test_linux_by_the_command(linux, capsys):
    """What docs/formats.md says to type."""
    assert 0 == main(["replay", str(linux / "linux-l5.qtrace"), "--image", str(linux / "linux-l5.elf")])
    out = capsys.readouterr().out
    assert "mode 5l" in out
    assert "passed over: stores outside of the memory" in out
