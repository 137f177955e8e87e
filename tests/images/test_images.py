# SPDX-License-Identifier: Apache-2.0
"""open_image(): each format byte by byte, and QEMU's own dumps of Linux guests."""

import mmap
import struct
from itertools import pairwise

import image_files
import numpy as np
import pytest
from children import outcome
from image_files import CR0, CR4, IMAGES, PAGE, Guest, unpacked

import kvmmu
from kvmmu.images import Image, ImageError, elfcore, image_formats, is_image, open_image
from kvmmu.images._file import Range, join_ranges
from kvmmu.images._unmapped import UnmappedFile

LMA = int(kvmmu.Efer.LME | kvmmu.Efer.LMA)


def written(tmp_path, data, name="image"):
    path = tmp_path / name
    path.write_bytes(data)
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


def test_key_registers_are_given_by_hand(tmp_path, guest):
    """No note has them."""
    core = image_files.qemu_core(guest)
    image = open_image(written(tmp_path, core))
    assert (image.vcpu().regs.pkru, image.vcpu().regs.pkrs) == (0, 0)
    for name, bit, key_of in (("pkru", 1 << 22, 0), ("pkrs", 1 << 24, 0)):
        vcpu = image.vcpu(cr4=CR4 | bit, **{name: 1 << 2 * key_of})
        assert getattr(vcpu.regs, name) == 1
    gva, gpa = next(iter(guest.mapped.items()))
    with pytest.raises(kvmmu.PageFault) as fault:
        image.vcpu(cr4=CR4 | 1 << 22, pkru=1).gva_walk.gva_to_gpa(gva, kvmmu.Access.USER)
    assert fault.value.error_code == 0x25
    assert image.vcpu(cr4=CR4 | 1 << 24, pkrs=1).gva_walk.gva_to_gpa(gva, kvmmu.Access.USER) == gpa      # the pages are users'
    with pytest.raises(kvmmu.PageFault) as fault:
        image.vcpu(cr4=CR4 | 1 << 24, pkrs=1).gva_walk.gva_to_gpa(0xFFFF_8000_0020_1234)
    assert fault.value.error_code == 0x21


def test_a_guest_that_masks_linear_addresses(tmp_path, guest):
    """Its tagged pointers are translated; a model without LAM takes the address in CR3 alone, as of bit 63."""
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, guest.cr3 | 3 << 62, CR4))
    image = open_image(written(tmp_path, image_files.elf_core([(0, guest.bytes(0, None))], notes)))
    gva, gpa = next(iter(guest.mapped.items()))
    assert image.vcpu().regs.cr3 == guest.cr3 | 1 << 62
    assert image.vcpu().gva_walk.gva_to_gpa(gva | 0x1234 << 48, kvmmu.Access.USER) == gpa
    plain = image.vcpu(cpu=kvmmu.CpuModel(lam=False))
    assert plain.regs.cr3 == guest.cr3
    assert plain.gva_walk.gva_to_gpa(gva, kvmmu.Access.USER) == gpa
    with pytest.raises(kvmmu.GeneralProtection):
        plain.gva_walk.gva_to_gpa(gva | 0x1234 << 48, kvmmu.Access.USER)


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


def test_a_file_that_cannot_be_mapped(tmp_path, guest, monkeypatch):
    """As /proc/kcore: it is read where somebody looks."""
    def refuse(*args, **options):
        raise OSError(19, "No such device")

    path = written(tmp_path, image_files.qemu_core(guest))
    monkeypatch.setattr("kvmmu.images._file.PrivateFile", refuse)
    image = open_image(path)
    assert "callbacks" in repr(image.memory)
    check_guest(image, guest)
    assert len(image.vcpus) == 2
    with pytest.raises(ImageError, match="the file ends within the ELF header"):
        open_image(written(tmp_path, b"\x7fELF\2\1\1", "cut"))
    with pytest.raises(ImageError, match="there is no memory in it"):
        open_image(written(tmp_path, image_files.elf_core([]), "empty"))


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
    with pytest.raises(ValueError, match="has no registers, so that cr3 has to be given"):
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


# ---- compressed ones ---------------------------------------------------------------------------------------------------

def test_avml(tmp_path, guest):
    """Blocks are unpacked when they are looked at; the last page of a range may be partial."""
    pytest.importorskip("cramjam", reason="cramjam is not installed (extra images)")
    last = bytes(range(1, 101))
    path = written(tmp_path, image_files.avml((0, guest.bytes(0, 0x8000)), (0x8000, guest.bytes(0x8000, None)), (0x40000, last),
                                              block=0x3000))
    image = open_image(path)
    assert (image.format, image.details) == ("avml", {"ranges": 3})
    check_guest(image, guest, cr3=guest.cr3)
    assert image.memory.read(0x40000, 200) == last + bytes(100)
    assert image.memory.read(0x30000, 8) == bytes(8)


@pytest.mark.parametrize("kinds", [("zlib",), ("zlib", "plain"), ("snappy", "zlib"), ("zstd", "plain", "snappy")], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_kdump(tmp_path, guest, kinds, flat):
    """Each page by itself; registers from QEMU's notes; the flattened variant."""
    for kind, library in (("snappy", "cramjam"), ("zstd", "zstandard")):
        if kind in kinds:
            pytest.importorskip(library, reason=f"{library} is not installed (extra images)")
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, guest.cr3, CR4))
    data = image_files.kdump(guest, kinds, notes, b"OSRELEASE=6.1\n")
    image = open_image(written(tmp_path, image_files.flattened(data) if flat else data))
    assert (image.format, len(image.vcpus)) == ("kdump", 1)
    assert image.details["vmcoreinfo"] == {"OSRELEASE": "6.1"}
    check_guest(image, guest)


@pytest.mark.parametrize("piece", [512, 1000, PAGE, 5000, 1 << 22])
def test_a_flattened_elf_core(tmp_path, guest, piece):
    """As makedumpfile -E -F writes it: memory lies in pieces of the file, of which later ones count."""
    core = image_files.qemu_core(guest)
    path = written(tmp_path, image_files.flattened(core, piece))
    for image in (open_image(path), open_image(path, "elf"), open_image(path, "kdump")):
        assert (image.format, len(image.vcpus)) == ("elf", 2)
        check_guest(image, guest)


def test_pieces_of_a_flattened_elf_core_that_overlap(tmp_path, guest):
    """Of bytes that several pieces have those of the last one count, whichever begins first; bytes of none are a hole."""
    core = image_files.elf_core([(0, guest.bytes(0, None))])
    start, size = len(core) - len(guest.memory), len(guest.memory)
    put = [(0, core), (start + 0x1800, b"a" * 0x1000), (start + 0x1000, b"b" * 0x1000), (start + 0x2400, b"c" * 16),
           (start + 0x1400, b"d" * 8)]
    head = (b"makedumpfile".ljust(16, b"\0") + (1).to_bytes(8, "big") * 2).ljust(PAGE, b"\0")

    def flat(pieces):
        return head + b"".join(at.to_bytes(8, "big") + len(data).to_bytes(8, "big") + data for at, data in pieces) + b"\xff" * 16

    expected = bytearray(guest.memory.tobytes())
    for at, data in put[1:]:
        expected[at - start:at - start + len(data)] = data
    image = open_image(written(tmp_path, flat(put)))
    assert image.memory.read(0, size) == bytes(expected)
    assert image.damage == ()
    image.memory.write(0x5000, b"changed")      # in this process alone
    assert image.memory.read(0x5000, 7) == b"changed"
    assert (tmp_path / "image").read_bytes() == flat(put)
    image = open_image(written(tmp_path, flat([(0, core[:start + 0x2000]), (start + 0x3000, core[start + 0x3000:])])))
    assert image.memory.slots == [(0, 0x2000, False), (0x3000, size - 0x3000, False)]
    (line,) = image.damage
    assert f"the pieces of the file have {size - 0x1000:#x} of {size:#x} bytes of the memory at gpa 0x0" in line
    with pytest.raises(ImageError, match="neither a kdump-compressed dump nor an ELF core"):
        open_image(written(tmp_path, flat([(0, b"?" * 1000)])))


def test_a_kdump_that_says_more_than_it_has(tmp_path, guest):
    """Sizes are checked before there is memory for them."""
    data = bytearray(image_files.kdump(guest))
    sub = PAGE + 0x60                           # max_mapnr_64
    for pages, reason in ((1 << 41, "0x20000000000 pages; want 1 to"), (0, "0x0 pages; want 1 to"),
                          (1 << 39, "bitmaps of 0x2000 bytes for 0x8000000000 pages")):
        data[sub:sub + 8] = pages.to_bytes(8, "little")
        with pytest.raises(ImageError, match=reason):
            open_image(written(tmp_path, data))
    data[sub:sub + 8] = (1 << 39).to_bytes(8, "little")
    at = 8 + 4 + 390 + 6 + 16 + 4 + 4 + 4
    data[at:at + 4] = (1 << 25).to_bytes(4, "little")
    piece = (1 << 60).to_bytes(8, "big") + (1).to_bytes(8, "big") + b"x"
    flat = image_files.flattened(bytes(data))
    with pytest.raises(ImageError, match="the bitmap of pages has 0x1000000000 bytes, more than all pieces"):
        open_image(written(tmp_path, flat[:-16] + piece + flat[-16:]))


def test_pages_that_a_kdump_leaves_out(tmp_path, guest):
    """They read as zero."""
    image = open_image(written(tmp_path, image_files.kdump(guest, holes=(3, 9))))
    assert image.memory.read(0x3000, PAGE) == bytes(PAGE)
    assert image.memory.read(0x4000, PAGE) == guest.bytes(0x4000, 0x5000)


def test_a_kdump_page_that_is_damaged(tmp_path, guest):
    """The others are read; the error names the page and the place."""
    data = bytearray(image_files.kdump(guest, ("zlib",)))
    desc = 4 * PAGE + 24 * 4
    at = int.from_bytes(data[desc:desc + 8], "little")
    data[at:at + 20] = b"?" * 20
    image = open_image(written(tmp_path, data))
    assert image.memory.read(0x3000, PAGE) == guest.bytes(0x3000, 0x4000)
    with pytest.raises(ImageError, match=f"at offset {at:#x}: the page of gpa 0x4000 cannot be unpacked"):
        image.memory.read(0x4000, 1)


def test_a_cut_kdump(tmp_path, guest):
    data = image_files.kdump(guest, ("plain",))
    image = open_image(written(tmp_path, data[:-PAGE - 5]))
    assert "2 pages lie beyond the end of the file" in image.damage[0]
    assert image.memory.read(0x3000, 8) == guest.bytes(0x3000, 0x3008)
    with pytest.raises(ImageError, match="the page of gpa 0x1f000"):
        image.memory.read(0x1F000, 1)


def test_lzo_names_its_extra(tmp_path, guest, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lzo", None)
    data = bytearray(image_files.kdump(guest, ("plain",)))
    data[4 * PAGE + 12] = 2
    with pytest.raises(ImportError, match=r"-m pip install 'kvmmu\[lzo\]"):
        open_image(written(tmp_path, data)).memory.read(0, 1)


# ---- Windows, VMware, objects ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [1, 2, 5, 6])
def test_windows(tmp_path, guest, kind):
    """Runs, or a bitmap; the root is in the header."""
    image = open_image(written(tmp_path, image_files.windows_dump(guest, kind, holes=(7, 8, 30) if kind > 1 else ())))
    assert (image.format, image.details["dump_type"]) == ("windows", kind)
    for n in (7, 8, 30) if kind > 1 else ():
        assert not image.memory.is_backed(n * PAGE)
        guest.memory[n * PAGE:(n + 1) * PAGE] = 0
    check_guest(image, guest)
    assert image.vcpus[0].registers["rip"] == 0xFFFFF80000001000
    assert image.vcpus[0].inferred == ("cr0", "cr4", "efer")


def test_windows_of_32_bits(tmp_path, guest):
    image = open_image(written(tmp_path, image_files.windows_dump(guest, bits=32)))
    assert image.memory.read(0, guest.memory.size) == guest.memory.tobytes()
    assert (image.vcpus[0].regs.cr3, image.vcpus[0].regs.is_pae_paging) == (guest.cr3, True)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("opened", ["vmem", "vmss"])
def test_vmware(tmp_path, guest, version, opened):
    """Regions by the state file, whichever of the two is opened."""
    written(tmp_path, guest.bytes(0x8000, None) + guest.bytes(0, 0x8000), "vm.vmem")
    written(tmp_path, image_files.vmware_state([(0, 0x18000, 0x8000), (0x8000, 0, 0x18000)], version), "vm.vmss")
    image = open_image(tmp_path / f"vm.{opened}")
    assert (image.format, image.details["regions"]) == ("vmware", 2)
    check_guest(image, guest, cr3=guest.cr3)


@pytest.mark.parametrize("block", [False, True])
def test_registers_of_vmware(tmp_path, guest, block):
    """Of each vCPU, one by one or in a block; EFER is inferred."""
    first = {"cr0": 0x80050033, "cr2": 0xDEAD, "cr3": guest.cr3, "cr4": 0x6B0, "rip": 0xFFFFFFFF81000000, "eflags": 0x246}
    pae = {"cr0": 0x80000011, "cr3": guest.cr3 | 0x20, "cr4": 0x20, "rip": 0xC0100000}
    flat = {"cr0": 0x11, "cr3": 0, "cr4": 0}
    written(tmp_path, guest.memory.tobytes(), "vm.vmem")
    written(tmp_path, image_files.vmware_state([], vcpus=[first, pae, flat], block=block), "vm.vmss")
    image = open_image(tmp_path / "vm.vmss")
    assert [vcpu.number for vcpu in image.vcpus] == [0, 1, 2]
    assert image.vcpus[0].registers["rip"] == first["rip"]
    assert (image.vcpus[0].registers["cr2"], image.vcpus[0].regs.rflags) == (0xDEAD, 0x246)
    assert [vcpu.regs.is_long_mode for vcpu in image.vcpus] == [True, False, False]
    assert image.vcpus[1].regs.is_pae_paging
    assert all(vcpu.inferred == ("efer",) for vcpu in image.vcpus)
    check_guest(image, guest)


def test_a_vmware_vcpu_without_control_registers(tmp_path, guest):
    written(tmp_path, guest.memory.tobytes(), "vm.vmem")
    state = image_files.vmware_state([], vcpus=[{"cr0": 1, "cr3": 0, "cr4": 0}]).replace(b"numVCPUs", b"numVCPUx")
    written(tmp_path, state, "vm.vmss")
    assert open_image(tmp_path / "vm.vmss").vcpus == ()
    state = image_files.vmware_state([], vcpus=[{"cr0": 1, "cr3": 0, "cr4": 0}] * 2).replace(b"CR64", b"CR65")
    written(tmp_path, state, "vm.vmss")
    image = open_image(tmp_path / "vm.vmss")
    assert (image.vcpus, image.damage) == ((), ("vCPU 0 has no control registers; it is left out",))


def test_vmware_without_regions(tmp_path, guest):
    """One region, or no state file: the offset is the address."""
    path = written(tmp_path, guest.memory.tobytes(), "vm.vmem")
    check_guest(open_image(path), guest, cr3=guest.cr3)
    written(tmp_path, image_files.vmware_state([]), "vm.vmsn")
    check_guest(open_image(path), guest, cr3=guest.cr3)
    path.unlink()
    with pytest.raises(ImageError, match=r"the memory is in vm\.vmem, which is not there"):
        open_image(tmp_path / "vm.vmsn")


def test_an_object_that_reads(guest):
    """Neighbouring pages by one call; short answers and holes are zero."""
    calls = []

    class Reader:
        def read(self, gpa, n):
            calls.append((gpa, n))
            if gpa < 0x2000 < gpa + n or gpa == 0x2000:
                raise LookupError("a hole")
            return guest.bytes(gpa, gpa + n)

    image = open_image(Reader(), holes=LookupError)
    assert image.memory.read(0x8000, 0x4000) == guest.bytes(0x8000, 0xC000)
    assert calls == [(0x8000, 0x4000)]
    assert image.memory.read(0x1000, 0x3000) == guest.bytes(0x1000, 0x2000) + bytes(PAGE) + guest.bytes(0x3000, 0x4000)
    vcpu = image.vcpu(cr3=guest.cr3)
    assert vcpu.gva_walk.gva_to_gpa(0x400005) == 0x3005
    with pytest.raises(LookupError):
        open_image(Reader()).memory.read(0x2000, 1)
    with pytest.raises(TypeError, match="path: want a path, or an object with read"):
        open_image(5)


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


def test_notes_that_many_headers_share(tmp_path):
    """The work is bounded by the file, not by headers times notes."""
    notes = image_files.note(b"A", 1, b"") * 16384                      # 256 KiB
    core = bytearray(image_files.elf_core([(0, bytes(PAGE))] + [(0, b"")] * 2000, notes))
    note_header = core[64:64 + 56]
    for n in range(2, 2002):
        core[64 + 56 * n:64 + 56 * (n + 1)] = note_header
    path = written(tmp_path, core)
    assert outcome(lambda: open_image(path), seconds=5) == (0, "ok Image")      # 32 million notes took minutes
    image = open_image(path)
    assert image.memory.read(0, PAGE) == bytes(PAGE)
    assert any("all notes have more than" in line for line in image.damage)
    assert len(image.damage) < 10


def test_more_notes_than_any_machine_has(tmp_path, guest, monkeypatch):
    """Those up to the limit are read, and the rest is told."""
    monkeypatch.setattr(elfcore, "_NOTES_MAX", 3)
    notes = image_files.note(b"QEMU", 0, image_files.qemu_state(CR0, guest.cr3, CR4))
    core = bytearray(image_files.elf_core([(0, guest.memory.tobytes()), (0, b"")], notes * 3))
    image = open_image(written(tmp_path, core))
    assert (len(image.vcpus), image.damage) == (3, ())
    core[64 + 2 * 56:64 + 3 * 56] = core[64:64 + 56]
    image = open_image(written(tmp_path, core, "more"))
    assert len(image.vcpus) == 3
    assert "or are more than 3" in image.damage[0]


def test_avml_with_ranges_that_overlap(tmp_path):
    """The range that begins first counts, whatever blocks it has, as LiME's do."""
    pytest.importorskip("cramjam", reason="cramjam is not installed (extra images)")
    image = open_image(written(tmp_path, image_files.avml((0, b"a" * 0x10000), (0x1000, b"b" * PAGE))))
    assert image.memory.read(0x3000, 1) == image.memory.read(0x1000, 1) == b"a"
    assert image.memory.read(0, 0x11000) == b"a" * 0x10000 + bytes(PAGE)
    assert image.damage == ("the range at gpa 0x1000 overlaps one that begins before it, which counts",)
    rng = np.random.default_rng(9)
    for _ in range(20):
        ranges = [(int(rng.integers(0, 64)) * 0x800, bytes([65 + n]) * (int(rng.integers(1, 40)) * 0x700)) for n in range(5)]
        packed = open_image(written(tmp_path, image_files.avml(*ranges, block=0x3000))).memory
        plain = open_image(written(tmp_path, image_files.lime(*ranges), "plain")).memory
        assert packed.read(0, 0x40000) == plain.read(0, 0x40000)


def hostile_windows(guest):
    dump = bytearray(image_files.windows_dump(guest, kind=5, holes=(4,)))
    dump[0x2020:0x2028] = b"\xff" * 8
    return dump


def hostile_lime(guest):
    last = struct.pack("<IIQQQ", 0x4C694D45, 1, (1 << 64) - PAGE, (1 << 64) - 1, 0) + bytes(PAGE)
    return image_files.lime((0, bytes(PAGE))) + last


def hostile_elf(guest):
    core = bytearray(image_files.qemu_core(guest))
    core[64 + 56 + 8:64 + 56 + 16] = struct.pack("<Q", (1 << 64) - (1 << 20))
    core[64 + 8:64 + 16] = struct.pack("<Q", (1 << 64) - 8)
    return core


@pytest.mark.parametrize(("make", "usable"), [(hostile_windows, False), (hostile_lime, True), (hostile_elf, True)])
def test_offsets_beyond_all_files(tmp_path, guest, make, usable):
    """Memory at such an offset or address is left out, and told."""
    path = written(tmp_path, make(guest))
    if usable:
        image = open_image(path)
        assert any("beyond 52 bits" in line or "left out" in line for line in image.damage)
        assert all(gpa + size <= 1 << 52 for gpa, size, _ in image.memory.slots)
    else:
        with pytest.raises(ImageError, match="where no file has bytes"):
            open_image(path)


def test_a_region_of_vmware_beyond_all_files(tmp_path, guest):
    """The other one is there."""
    written(tmp_path, guest.memory.tobytes(), "vm.vmem")
    state = bytearray(image_files.vmware_state([(0, 0, 0x8000), (0x8000, 0x8000, 0x18000)], 3))
    old = bytes([1 << 6 | 4, 13]) + b"regionPageNum" + struct.pack("<II", 1, 8)
    assert state.count(old) == 1
    state = state.replace(old, bytes([1 << 6 | 8, 13]) + b"regionPageNum" + struct.pack("<IQ", 1, 1 << 60))
    written(tmp_path, state, "vm.vmss")
    image = open_image(tmp_path / "vm.vmem")
    assert image.memory.slots == [(0, 0x8000, False)]
    assert "where no file has bytes" in image.damage[0]


def test_an_unmapped_file_with_memory_everywhere(tmp_path, guest, monkeypatch):
    """Addresses and offsets beyond all limits are left out there, too."""
    core = bytearray(image_files.qemu_core(guest))
    core[64 + 56 * 2 + 24:64 + 56 * 2 + 32] = struct.pack("<Q", (1 << 52) - PAGE)
    path = written(tmp_path, core)
    monkeypatch.setattr(elfcore, "open_file", UnmappedFile)
    image = open_image(path)
    assert image.memory.slots == [(0, 1 << 52, True)]
    assert image.memory.read((1 << 52) - PAGE, PAGE) == guest.bytes(len(guest.memory) // 2, len(guest.memory) // 2 + PAGE)
    with pytest.raises(ImageError, match="where no file has bytes"):
        UnmappedFile(path).bytes((1 << 64) - 1, 4, "a thing")


def test_lime_with_a_byte_in_each_of_many_pages(tmp_path):
    """The memory that they take is bounded by the size of the file."""
    header = struct.Struct("<IIQQQ")
    path = written(tmp_path, b"".join(header.pack(0x4C694D45, 1, n << 12, n << 12, 0) + b"x" for n in range(20_000)))
    image = open_image(path)
    assert sum(size for _, size, _ in image.memory.slots) <= 4 * path.stat().st_size + (16 << 20)
    assert image.memory.read(0, 2) == b"x\0"
    assert any("are left out" in line for line in image.damage)


class Answers:
    """A reader that returns one thing."""

    def __init__(self, answer):
        self.answer = answer

    def read(self, gpa, n):
        return self.answer


@pytest.mark.parametrize("holes", [5, (LookupError, 5), "LookupError", int, LookupError()], ids=str)
def test_holes_that_are_no_exceptions(holes):
    with pytest.raises(TypeError, match="holes: want an exception class, or a tuple of them, got "):
        open_image(Answers(b""), holes=holes)


@pytest.mark.parametrize("answer", [None, "text", 5, [1, 2], np.zeros((4, 4), np.uint8).T[:, ::2]], ids=range(5))
def test_answers_that_are_no_bytes(answer):
    """Told even where `holes` has the class of the error."""
    for holes in ((), TypeError):
        image = open_image(Answers(answer), size=1 << 20, holes=holes)
        with pytest.raises(TypeError, match=r"read: read\(gpa, n\) of an object has to return bytes or a contiguous buffer, got"):
            image.memory.read(0, 8)


def test_arguments_of_open_image(tmp_path, guest):
    """The message names the argument, and what is allowed."""
    for call in (open_image, is_image):
        with pytest.raises(TypeError, match="path: want a path as str or path-like, got bytes"):
            call(b"path")
    path = written(tmp_path, image_files.lime((0, guest.memory.tobytes())))
    for options, words in (
            ({"layout": "pc"}, "layout: is no option of format 'lime'; allowed are none"),
            ({"format": "raw", "colour": 1}, "colour: is no option of format 'raw'; allowed are layout, below_4g")):
        with pytest.raises(TypeError, match=words):
            open_image(path, **options)
    with pytest.raises(TypeError, match=r"colour: is no option of an object with read\(gpa, n\); allowed are size, holes"):
        open_image(Answers(b""), colour=1)
    with pytest.raises(ValueError, match="format: an object with read"):
        open_image(Answers(b""), format="raw")
    with pytest.raises(ValueError, match="size: 0x5 is not a multiple"):
        open_image(Answers(b""), size=5)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"):
        open_image(tmp_path / "nothing")
    with pytest.raises(ImageError, match="is no regular file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="format: want 'avml'"):
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
                                  lambda guest: image_files.lime((0, guest.bytes(0, None)), (0x30000, b"x" * 5000)),
                                  image_files.kdump, lambda guest: image_files.flattened(image_files.kdump(guest)),
                                  lambda guest: image_files.flattened(image_files.qemu_core(guest)),
                                  lambda guest: image_files.avml((0, guest.bytes(0, None)), (0x30000, b"x" * 5000), block=0x4000),
                                  image_files.windows_dump, lambda guest: image_files.windows_dump(guest, 5, (7,)),
                                  lambda guest: image_files.windows_dump(guest, bits=32),
                                  lambda guest: image_files.qemu_core(guest, elf_class=1),
                                  lambda guest: image_files.kdump(guest, ("snappy", "zstd", "plain")),
                                  lambda guest: image_files.kdump(guest, vmcoreinfo=b"OSRELEASE=6.1.0\n", notes=bytes(20)),
                                  "vmware", "vmware-block", "raw", "unmapped"],
                         ids=["elf", "elf-extended", "lime", "kdump", "flat", "flat-elf", "avml", "windows", "windows-bitmap",
                              "windows-32", "elf-32", "kdump-packed", "kdump-notes", "vmware", "vmware-block", "raw", "unmapped"])
def test_every_damage_is_refused_or_read_around(tmp_path, make, guest, monkeypatch):
    """Cut at 50 places, and changed at 500: an ImageError, or an image that can be used."""
    name = "image"
    if make in ("vmware", "vmware-block"):
        vcpus = [{"cr0": 0x80050033, "cr3": guest.cr3, "cr4": 0x6B0, "rip": 1 << 40}] * 2
        data = image_files.vmware_state([(0, 0x18000, 0x8000), (0x8000, 0, 0x18000)], vcpus=vcpus, block=make != "vmware")
        written(tmp_path, guest.memory.tobytes(), "image.vmem")
        name = "image.vmss"
    elif make == "raw":
        data, name = guest.memory.tobytes(), "image.raw"
    elif make == "unmapped":                    # as /proc/kcore
        data = image_files.qemu_core(guest)

        def refuse(fd):
            raise OSError(19, "No such device")

        monkeypatch.setattr("kvmmu.images._file.PrivateFile", refuse)
    else:
        data = make(guest)
    rng = np.random.default_rng(11)
    heads = rng.integers(0, min(1500, len(data)), 250)
    places = [(int(at), int(value)) for at, value in zip(
        np.concatenate((heads, rng.integers(0, len(data), 250))), rng.integers(0, 256, 500), strict=True)]
    cuts = np.concatenate((rng.integers(0, min(1500, len(data)), 25), rng.integers(0, len(data), 25))).tolist()
    path = tmp_path / name
    opened = 0
    for cut, change in [(cut, None) for cut in cuts] + [(None, place) for place in places]:
        damaged = bytearray(data[:cut])
        if change is not None:
            damaged[change[0]] = change[1]
        path.write_bytes(damaged)
        try:
            image = open_image(path)
            image.memory.read(0, 0x20000)
            opened += 1
            for i in range(len(image.vcpus)):
                image.vcpu(i).gva_walk.translate(np.array([0x400000, 0, 1 << 63], np.uint64), kvmmu.Access.WRITE)
        except (ImageError, kvmmu.GeneralProtection) as error:
            assert str(error)
        image = None                                 # a look at the mapping of a file that is cut would end the process
    assert opened > 50


@pytest.mark.parametrize("name", ["linux-l4.ptonly.elf.zst", "linux-pae.ptonly.elf.zst"])
def test_pyelftools_reads_the_same(tmp_path, name):
    """Segments and notes by a reader of somebody else's."""
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed (extra test)")
    path = unpacked(tmp_path, name)
    image = open_image(path)
    with path.open("rb") as file:
        segments = list(elffile.ELFFile(file).iter_segments())
        load = [segment for segment in segments if segment["p_type"] == "PT_LOAD"]
        assert [(s["p_paddr"], s["p_filesz"]) for s in load] == [(gpa, size) for gpa, size, _ in image.memory.slots]
        assert all(image.memory.read(s["p_paddr"], 4096) == s.data()[:4096] for s in load)
        note, = [note for note in next(s for s in segments if s["p_type"] == "PT_NOTE").iter_notes() if note["n_name"] == "QEMU"]
    desc = note["n_desc"]
    desc = desc.encode("latin-1") if isinstance(desc, str) else bytes(desc)
    cr = np.frombuffer(desc, np.uint64, 5, 392).tolist()
    assert [cr[0], cr[2], cr[3], cr[4]] == [image.vcpus[0].registers[name] for name in ("cr0", "cr2", "cr3", "cr4")]


def test_a_small_raw_image_by_its_name(tmp_path):
    for name, known in (("image.raw", True), ("image.xyz", False)):
        path = tmp_path / name
        path.write_bytes(b"\1" * 0x8000)
        if known:
            assert open_image(path).format == "raw"
        else:
            with pytest.raises(ImageError, match="no format that is known"):
                open_image(path)
