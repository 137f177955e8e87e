# SPDX-License-Identifier: Apache-2.0
"""open_image(): each format byte by byte, and QEMU's own dumps of Linux guests."""

import mmap
from itertools import pairwise
from pathlib import Path

import image_files
import numpy as np
import pytest
from image_files import CR0, CR4, PAGE, Guest

import kvmmu
from kvmmu.images import Image, ImageError, image_formats, is_image, open_image
from kvmmu.images._file import Range, join_ranges

IMAGES = Path(__file__).parent / "data" / "images"
LMA = int(kvmmu.Efer.LME | kvmmu.Efer.LMA)


def written(tmp_path, data, name="image"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def unpacked(tmp_path, name):
    """A sample, decompressed, with its zero pages as holes of the file."""
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (extra zstd)")
    path = tmp_path / name.removesuffix(".zst")
    with (IMAGES / name).open("rb") as packed, path.open("wb") as out:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        while chunk := reader.read(1 << 20):
            if any(chunk):
                out.write(chunk)
            else:
                out.seek(len(chunk), 1)
        out.truncate()
    return path


@pytest.fixture
def guest():
    return Guest()


def check_guest(image, guest, *, cr3=None):
    """The image has the memory, and its vCPU translates what the guest maps."""
    assert image.damage == ()
    assert image.memory.read(0, guest.memory.size) == guest.memory.tobytes()
    vcpu = image.vcpu(0) if cr3 is None else image.vcpu(cr3=cr3)
    for gva, gpa in guest.mapped.items():
        assert vcpu.gva_walk.gva_to_gpa(gva + 5, kvmmu.Access.USER) == gpa + 5
    assert vcpu.gva_walk.gva_to_gpa(0xFFFF_8000_0020_1234) == 0x201234
    with pytest.raises(kvmmu.PageFault):
        vcpu.gva_walk.gva_to_gpa(0x402000)


# ---- ELF ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"extended": True}, {"pad": 4}, {"pad": 3}, {"elf_class": 1}], ids=str)
def test_a_core_of_qemu(tmp_path, guest, options):
    """Memory, and registers of two vCPUs, wherever in the file the bytes lie."""
    image = open_image(written(tmp_path, image_files.qemu_core(guest, **options)))
    assert (image.format, len(image.vcpus)) == ("elf", 2)
    check_guest(image, guest)
    first, second = image.vcpus
    assert first.registers["rip"] == 0xFFFFFFFF81000000
    assert first.registers["rax"] == 1
    assert first.registers["r15"] == 16
    assert first.registers["cs"] == 8
    assert first.registers["idt_base"] == 0x9000
    assert first.registers["cr2"] == 0xDEAD
    assert (first.regs.cr0, first.regs.cr3, first.regs.cr4) == (CR0, guest.cr3, CR4)
    assert first.regs.efer & LMA == LMA
    assert first.inferred == ("efer",)
    assert second.regs.efer == 0
    assert image.vcpu(1).gva_walk.gva_to_gpa(0x1234) == 0x1234


def test_efer_by_the_machine_and_by_cs(tmp_path, guest):
    """EM_386 is a guest outside long mode, unless CS.L says otherwise."""
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, 0, CR4, cs_flags=0))
    image = open_image(written(tmp_path, image_files.elf_core([(0, guest.bytes(0, None))], notes, machine=3)))
    assert image.vcpus[0].regs.efer == int(kvmmu.Efer.NX)
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, guest.cr3, CR4))
    image = open_image(written(tmp_path, image_files.elf_core([(0, guest.bytes(0, None))], notes, machine=3), "second"))
    assert image.vcpus[0].regs.efer & LMA == LMA


def test_registers_given_by_hand(tmp_path, guest):
    """They replace those of the image; EFER is taken as given."""
    image = open_image(written(tmp_path, image_files.qemu_core(guest)))
    assert image.vcpu(0, efer=LMA).regs.efer == LMA
    assert image.vcpu(1, cr0=CR0, cr3=guest.cr3, cr4=CR4).gva_walk.gva_to_gpa(0x400000) == 0x3000
    assert image.vcpu(0, cr4=0x10, efer=0, cr3=0).regs.cr4 == 0x10
    with pytest.raises(ValueError, match="i: want 0 to 1"):
        image.vcpu(2)
    with pytest.raises(TypeError, match="cr8: is no register"):
        image.vcpu(cr8=0)


def test_stores_never_reach_the_file(tmp_path, guest):
    """Neither A/D bits nor writes."""
    path = written(tmp_path, image_files.qemu_core(guest))
    before = path.read_bytes()
    image = open_image(path)
    image.vcpu(0).gva_walk.translate(np.array([0xFFFF_8000_0020_0000], np.uint64), kvmmu.Access.WRITE)
    record = image.vcpu(0).gva_walk.walk_record(0xFFFF_8000_0020_0000)
    assert record.steps[-1].entry & 0x60 == 0x60
    image.memory.write(0x3000, b"changed")
    assert image.memory.read(0x3000, 7) == b"changed"
    assert path.read_bytes() == before


def test_words_that_are_not_aligned_are_read_only(tmp_path, guest):
    """A/D bits cannot be set atomically there."""
    image = open_image(written(tmp_path, image_files.qemu_core(guest, pad=3)))
    assert all(readonly for _, _, readonly in image.memory.slots)
    check_guest(image, guest)


def test_segments_that_overlap(tmp_path, guest):
    """As dump-guest-memory writes them with paging=true: parts of memory again and again, at the same place of the file."""
    size = guest.memory.size
    segments = [(0, guest.bytes(0, None)), *((n * PAGE, PAGE, (0, n * PAGE)) for n in (3, 5, 3, 4)),
                (2 * PAGE, 0x10000, (0, 2 * PAGE)), (size - PAGE, PAGE, (0, size - PAGE))]
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, guest.cr3, CR4))
    image = open_image(written(tmp_path, image_files.elf_core(segments, notes, pad=4)))
    assert image.memory.slots == [(0, size, False)]
    check_guest(image, guest)


def test_join_ranges_against_a_plain_loop():
    """What begins first counts, page by page."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        n = int(rng.integers(0, 12))
        gpa, offset, size = (rng.integers(0, 20, n).astype(np.uint64) for _ in range(3))
        offset = np.where(rng.random(n) < 0.5, gpa + np.uint64(100), offset + np.uint64(200))
        expected = {}
        for g, o, s in sorted(zip(gpa.tolist(), offset.tolist(), size.tolist(), strict=True), key=lambda row: row[0]):
            end = max((at + 1 for at in expected), default=0)       # of all that began before
            for at in range(max(g, end), g + s):
                expected[at] = o + at - g
        found = join_ranges(gpa, offset, size)
        assert {r.gpa + i: r.offset + i for r in found for i in range(r.size)} == expected
        assert all(a.gpa + a.size <= b.gpa for a, b in pairwise(found))
        assert not any(a.gpa + a.size == b.gpa and a.offset + a.size == b.offset for a, b in pairwise(found))
    assert join_ranges(*[np.empty(0, np.uint64)] * 3) == []
    assert join_ranges(*[np.array([4], np.uint64)] * 3) == [Range(4, 4, 4)]


def test_a_core_of_a_kernel(tmp_path, guest):
    """The root of the kernel's tables from VMCOREINFO; segments of /proc/kcore that are no memory are left out."""
    root = 0xFFFFFFFF80000000 + guest.cr3 + 4096
    text = f"OSRELEASE=6.1.0\nNUMBER(phys_base)=-4096\nSYMBOL(swapper_pg_dir)={root:x}\n".encode()
    notes = image_files.note(b"CORE", 1, bytes(336)) + image_files.note(b"VMCOREINFO", 0, text)
    core = image_files.elf_core([((1 << 64) - 1, bytes(PAGE)), (0, guest.bytes(0, None))], notes)
    image = open_image(written(tmp_path, core))
    assert image.vcpus == ()
    assert image.root.cr3 == guest.cr3
    assert image.details["vmcoreinfo"]["OSRELEASE"] == "6.1.0"
    check_guest(image, guest)


@pytest.mark.parametrize("name", ["linux-l4.ptonly.elf.zst", "linux-l4.paging.ptonly.elf.zst", "linux-pae.ptonly.elf.zst"])
def test_dumps_of_linux(tmp_path, name):
    """Every answer of QEMU's gva2gpa, from the file alone: registers, EFER, PDPTEs."""
    path = unpacked(tmp_path, name)
    answers = np.load(IMAGES / f"{name.split('.')[0]}.gva2gpa.npz")
    image = open_image(path)
    assert image.damage == ()
    assert len(image.memory.slots) <= 2
    vcpu = image.vcpu(0)
    assert vcpu.regs.efer == (0xD01 if "l4" in name else 0x800)
    t = vcpu.gva_walk.translate(answers["gva"], kvmmu.Access.AC, set_ad=False)
    mapped = answers["mapped"] == 1
    assert mapped.any()
    assert ((t.status == kvmmu.Status.OK) == mapped).all()
    assert (t.gpa[mapped] == answers["gpa"][mapped]).all()


# ---- raw, LiME ---------------------------------------------------------------------------------------------------------

def test_raw(tmp_path, guest):
    """The offset is the address; registers come from the caller."""
    path = written(tmp_path, guest.memory.tobytes())
    image = open_image(path)
    assert (image.format, image.vcpus) == ("raw", ())
    check_guest(image, guest, cr3=guest.cr3)
    with pytest.raises(ValueError, match="cr3: a raw image has no registers"):
        image.vcpu()
    assert not is_image(path)


@pytest.mark.parametrize(("layout", "size", "low"), [("pc", 0xE0000000, 0xC0000000), ("pc", 0xDFFFF000, 0xDFFFF000),
                                                     ("q35", 0xB0000000, 0x80000000), ("q35", 0xAFFFF000, 0xAFFFF000),
                                                     ("microvm", 0x1_00000000, 0xC0000000), ("flat", 0x1_40000000, 0x1_40000000)])
def test_raw_ram_of_a_machine(tmp_path, layout, size, low):
    """RAM that does not fit below the hole begins at 4 GiB."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 8)
        file.write(b"the last")
    image = open_image(path, "raw", layout=layout)
    assert image.memory.slots == [(0, low, False)] + ([(1 << 32, size - low, False)] if size > low else [])
    assert image.memory.read(size - 8 if size == low else (1 << 32) + size - low - 8, 8) == b"the last"


def test_raw_with_ram_below_4g(tmp_path, guest):
    """max-ram-below-4g."""
    image = open_image(written(tmp_path, guest.memory.tobytes()), "raw", below_4g=0x8000)
    assert image.memory.slots == [(0, 0x8000, False), (1 << 32, 0x18000, False)]
    with pytest.raises(ValueError, match="layout: want 'flat', 'pc'"):
        open_image(image.path, "raw", layout="vax")


def test_lime(tmp_path, guest):
    """Ranges in any order; the last page of one may be partial."""
    last = bytes(range(1, 101))
    image = open_image(written(tmp_path, image_files.lime(
        (0x8000, guest.bytes(0x8000, None)), (0, guest.bytes(0, 0x8000)), (0x9_0000_0000, last))))
    assert image.format == "lime"
    check_guest(image, guest, cr3=guest.cr3)
    assert image.memory.read(0x9_0000_0000, 200) == last + bytes(100)


def test_lime_with_many_ranges(tmp_path):
    """Sixteen thousand of them, each of which ends within a page."""
    rng = np.random.default_rng(5)
    ranges = [(0x10000 * int(n), bytes([n & 255]) * 5000) for n in rng.permutation(16000)]
    image = open_image(written(tmp_path, image_files.lime(*ranges)))
    assert sum(size for _, size, _ in image.memory.slots) == 16000 * 2 * PAGE
    for start, data in ranges[:50]:
        assert image.memory.read(start, 5001) == data + b"\0"


def test_lime_that_begins_and_ends_within_one_page(tmp_path):
    """Two ranges share a page."""
    image = open_image(written(tmp_path, image_files.lime((0x1010, b"a" * 16), (0x1800, b"b" * 0x1000))))
    assert image.memory.slots == [(0x1000, PAGE, False), (0x2000, PAGE, False)]
    assert image.memory.read(0x1000, 0x30) == bytes(16) + b"a" * 16 + bytes(16)
    assert image.memory.read(0x17FE, 0x1004) == bytes(2) + b"b" * 0x1000 + bytes(2)


# ---- damage, and what is no image --------------------------------------------------------------------------------------

def test_a_cut_file_is_read_up_to_the_damage(tmp_path, guest):
    """The message names the offset and what is missing."""
    core = image_files.qemu_core(guest)
    image = open_image(written(tmp_path, core[:-0x5800]))
    assert len(image.damage) == 1
    assert f"the file ends at {len(core) - 0x5800:#x}, within the memory at gpa 0x0" in image.damage[0]
    assert image.memory.read(0x3000, 8) == guest.bytes(0x3000, 0x3008)
    assert image.memory.is_backed(0x1A000, 0x800)
    assert not image.memory.is_backed(0x1B000)
    cut = image_files.lime((0, bytes(0x2000)), (0x4000, bytes(0x2000)))[:-0x1001]
    image = open_image(written(tmp_path, cut, "lime"))
    assert "at offset 0x2040: the file has 0xfff of 0x2000 bytes of the range at 0x4000" in image.damage[0]


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "is empty"),
    (b"hello, world", "is in no format that is known; it begins with 68 65 6c"),
    (b"\x28\xb5\x2f\xfd" + bytes(9000), "is compressed by zstd; decompress it first"),
    (b"\x7fELF", "the file ends within the ELF header"),
    (b"\x7fELF\x02\x02\x01" + bytes(100), "little endian"),
    (b"\x7fELF\x02\x01\x01" + bytes(100), "want a core file"),
    (image_files.elf_core([(0, bytes(PAGE))], machine=40), "ELF machine 40: want x86"),
    (image_files.elf_core([]), "there is no memory in it"),
    (b"EMiL" + bytes(60), "version 0: want 0x4c694d45, 1"),
], ids=range(9))
def test_no_image(tmp_path, data, reason):
    path = written(tmp_path, data)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert reason.split(";")[0][:10] in caught.value.reason


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"):
        open_image(tmp_path / "nothing")
    with pytest.raises(ImageError, match="is no regular file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="format: want 'elf'"):
        open_image(tmp_path, "tape")


def test_formats_of_other_packages(tmp_path, monkeypatch):
    """Entry points kvmmu.images; a broken one is warned about and left out."""
    import importlib.metadata

    from kvmmu.images import opening

    class Tape:
        name = "tape"

        def sniff(self, head, path):
            return 50 if head.startswith(b"TAPE") else 0

        def open(self, path, **options):
            return Image(str(path), self.name, kvmmu.GuestMemory(PAGE))

    class Point:
        group, value = "kvmmu.images", "tape:Tape"

        def __init__(self, name, loaded):
            self.name, self.load = name, loaded

    points = [Point("tape", lambda: Tape), Point("broken", lambda: 1 // 0), Point("elf", lambda: Tape)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "kvmmu.images" else [])
    opening._all_formats.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be used") as warned:
            assert open_image(written(tmp_path, b"TAPE")).format == "tape"
        assert len(warned) == 2
        assert "tape" in image_formats()
    finally:
        opening._all_formats.cache_clear()


def test_a_huge_file_opens_at_once(tmp_path):
    """100 GB of address space, none of memory."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        try:
            file.truncate(100 << 30)
        except OSError:
            pytest.skip("the file system has no such files")
    image = open_image(path, "raw")
    assert image.memory.slots == [(0, 100 << 30, False)]
    assert image.memory.read((100 << 30) - 8, 8) == bytes(8)
    image.memory.write(0, b"x")
    assert mmap.PAGESIZE <= PAGE


@pytest.mark.parametrize("make", [image_files.qemu_core, lambda guest: image_files.qemu_core(guest, extended=True),
                                  lambda guest: image_files.lime((0, guest.bytes(0, None)), (0x30000, b"x" * 5000))],
                         ids=["elf", "elf-extended", "lime"])
def test_every_damage_is_refused_or_read_around(tmp_path, make, guest):
    """Cut at 50 places, and changed at 500: an ImageError, or an image that can be used."""
    data = make(guest)
    rng = np.random.default_rng(11)
    heads = rng.integers(0, min(1500, len(data)), 250)
    places = [(int(at), int(value)) for at, value in zip(
        np.concatenate((heads, rng.integers(0, len(data), 250))), rng.integers(0, 256, 500), strict=True)]
    cuts = np.concatenate((rng.integers(0, min(1500, len(data)), 25), rng.integers(0, len(data), 25))).tolist()
    path = tmp_path / "image"
    opened = 0
    for cut, change in [(cut, None) for cut in cuts] + [(None, place) for place in places]:
        damaged = bytearray(data[:cut])
        if change is not None:
            damaged[change[0]] = change[1]
        path.write_bytes(damaged)
        try:
            image = open_image(path)
            image.memory.read(0, 0x20000)
            for i in range(len(image.vcpus)):
                image.vcpu(i).gva_walk.translate(np.array([0x400000, 0, 1 << 63], np.uint64), kvmmu.Access.WRITE)
        except (ImageError, kvmmu.GeneralProtection) as error:
            assert str(error)
            continue
        opened += 1
        del image                               # a look at the mapping of a file that is cut would end the process
    assert opened > 250
