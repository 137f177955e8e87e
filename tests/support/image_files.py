# SPDX-License-Identifier: Apache-2.0
"""Memory images for tests, written byte by byte from their layouts, and the guest that is in them."""

import struct
import zlib

import builders
import numpy as np
import pytest
from paths import DATA

PAGE = 0x1000
CR0 = 0x80050033
CR4 = 0x20                                  # PAE


class Guest:
    """A guest of a few pages: 4-level tables, what they map, and some data."""

    def __init__(self, base=0x10000, size=0x20000):
        tables = builders.PageTables("4l", base)
        self.mapped = {0x400000: 0x3000, 0x401000: 0x5000, 0x7FFF_0000_0000: 0x4000}
        for gva, gpa in self.mapped.items():
            tables.map(gva, gpa, "p w u a d")
        tables.map(0xFFFF_8000_0020_0000, 0x200000, "p w g nx", level=2)
        self.cr3 = base
        self.memory = np.zeros(size, np.uint8)
        for gpa, page in zip(*tables.pages(), strict=True):
            self.memory[int(gpa):int(gpa) + PAGE] = page.view(np.uint8)
        rng = np.random.default_rng(7)
        self.memory[0x3000:0x6000] = rng.integers(0, 256, 0x3000, np.uint8)

    def bytes(self, start, stop):
        return self.memory[start:stop].tobytes()


# ---- ELF ---------------------------------------------------------------------------------------------------------------

def note(owner, kind, desc):
    name = owner + b"\0"
    return struct.pack("<III", len(name), len(desc), kind) + name + b"\0" * (-len(name) % 4) + desc + b"\0" * (-len(desc) % 4)


def qemu_state(cr0, cr3, cr4, *, rip=0xFFFFFFFF81000000, cs_flags=0xAF9B00, cr2=0xDEAD, version=1):
    """The 440 bytes of QEMU's note."""
    desc = struct.pack("<II18Q", version, 440, *range(1, 17), rip, 0x246)
    for n in range(10):
        desc += struct.pack("<4IQ", n + 8, 0xFFFFFFFF, cs_flags if n == 0 else 0, 0, 0x1000 * n)
    desc += struct.pack("<5Q", cr0, 0, cr2, cr3, cr4)
    return desc + struct.pack("<Q", 0)


def elf_core(segments, notes=b"", *, machine=62, elf_class=2, extended=False, pad=0):
    """A core of (gpa, bytes) segments; `extended`: the number of segments in section 0; `pad`: bytes before the memory.

    A segment may be (gpa, bytes, file offset of another segment's bytes + n) as (gpa, size, (number, offset)).
    """
    phdrs = len(segments) + 1
    ehsize, phsize, shsize = (64, 56, 64) if elf_class == 2 else (52, 32, 40)
    sections = shsize if extended else 0
    phoff = ehsize + sections
    at = phoff + phsize * phdrs
    rows = [(4, at, 0, len(notes))]
    at += len(notes) + pad
    data, places = b"", []
    for segment in segments:
        if len(segment) == 2:
            places.append(at + len(data))
            rows.append((1, places[-1], segment[0], len(segment[1])))
            data += segment[1]
        else:
            places.append(None)
            number, offset = segment[2]
            rows.append((1, places[number] + offset, segment[0], segment[1]))
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    phnum = 0xFFFF if extended else phdrs
    shoff = ehsize if extended else 0
    if elf_class == 2:
        head = ident + struct.pack("<HHIQQQIHHHHHH", 4, machine, 1, 0, phoff, shoff, 0, 64, phsize, phnum, shsize, extended, 0)
        head += struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, phdrs, 0, 0) if extended else b""
        head += b"".join(struct.pack("<IIQQQQQQ", kind, 0, offset, 0, gpa, size, size, 0) for kind, offset, gpa, size in rows)
    else:
        head = ident + struct.pack("<HHIIIIIHHHHHH", 4, machine, 1, 0, phoff, shoff, 0, 52, phsize, phnum, shsize, extended, 0)
        head += struct.pack("<10I", 0, 0, 0, 0, 0, 0, 0, phdrs, 0, 0) if extended else b""
        head += b"".join(struct.pack("<8I", kind, offset, 0, gpa, size, size, 0, 0) for kind, offset, gpa, size in rows)
    return head + notes + bytes(pad) + data


def qemu_core(guest, **options):
    """A core as dump-guest-memory writes it: two vCPUs, of which the second has paging off."""
    notes = b""
    for cr0, cr3, cr4 in ((CR0, guest.cr3, CR4), (0x60000010, 0, 0)):
        notes += note(b"CORE", 1, bytes(336)) + note(b"QEMU", 0, qemu_state(cr0, cr3, cr4))
    half = len(guest.memory) // 2
    return elf_core([(0, guest.bytes(0, half)), (half, guest.bytes(half, None))], notes, **options)


# ---- LiME --------------------------------------------------------------------------------------------------------------

def lime(*ranges):
    """(start, bytes) each."""
    return b"".join(struct.pack("<IIQQQ", 0x4C694D45, 1, start, start + len(data) - 1, 0) + data for start, data in ranges)


# ---- AVML --------------------------------------------------------------------------------------------------------------

def avml(*ranges, block=1 << 16):
    """(start, bytes) each; every third block is stored as it is."""
    import cramjam

    out = b""
    for start, data in ranges:
        frames = b"\xff\x06\x00\x00sNaPpY" + b"\xfe\x03\x00\x00abc"
        for number, at in enumerate(range(0, len(data), block)):
            part = data[at:at + block]
            packed = part if number % 3 == 2 else bytes(cramjam.snappy.compress_raw(part))
            frames += bytes([number % 3 == 2]) + (len(packed) + 4).to_bytes(3, "little") + b"crc!" + packed
        out += struct.pack("<IIQQQ", 0x4C4D5641, 2, start, start + len(data) - 1, 0) + frames + len(frames).to_bytes(8, "little")
    return out


# ---- kdump -------------------------------------------------------------------------------------------------------------

def pack_page(page, kind):
    """A page as the file has it, and its flags."""
    if kind == "zlib":
        return zlib.compress(page), 1
    if kind == "snappy":
        import cramjam

        return bytes(cramjam.snappy.compress_raw(page)), 4
    if kind == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(page), 0x20
    return page, 0


def kdump(guest, kinds=("zlib", "plain"), notes=b"", vmcoreinfo=b"", holes=()):
    """A dump of all pages but `holes`, packed by turns in several ways."""
    count = len(guest.memory) // PAGE
    numbers = [n for n in range(count) if n not in holes]
    bitmap = bytearray(PAGE)
    for n in numbers:
        bitmap[n // 8] |= 1 << n % 8
    note_at = PAGE + 0x68
    info_at = note_at + len(notes)
    places = info_at if vmcoreinfo else 0, len(vmcoreinfo), note_at, len(notes)
    sub = struct.pack("<qII11Q", 0, 1, 0, 0, 0, *places, 0, 0, 0, 0, count)
    sub = (sub + notes + vmcoreinfo).ljust(PAGE, b"\0")
    header = b"KDUMP   " + struct.pack("<i", 6) + (b"Linux".ljust(65 * 4, b"\0") + b"x86_64").ljust(390, b"\0") + bytes(6)
    header += struct.pack("<QQ10I", 0, 0, 0, PAGE, len(sub) // PAGE, 2, count, 0, 0, 0, 0, 1)
    out = header.ljust(PAGE, b"\0") + sub + bytes(bitmap) * 2
    at = len(out) + 24 * len(numbers)
    descs, data = b"", b""
    for place, n in enumerate(numbers):
        packed, flags = pack_page(guest.bytes(n * PAGE, (n + 1) * PAGE), kinds[place % len(kinds)])
        descs += struct.pack("<QIIQ", at + len(data), len(packed), flags, 0)
        data += packed
    return out + descs + data


def flattened(data, piece=5000, seed=1):
    """A file as it goes through a pipe: its pieces in another order, of which one is written twice."""
    rng = np.random.default_rng(seed)
    starts = list(range(0, len(data), piece))
    out = (b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)).ljust(4096, b"\0")
    out += struct.pack(">qq", 100, 300) + b"?" * 300
    for i in rng.permutation(len(starts)).tolist():
        part = data[starts[i]:starts[i] + piece]
        out += struct.pack(">qq", starts[i], len(part)) + part
    return out + struct.pack(">qq", -1, -1)


# ---- Windows -----------------------------------------------------------------------------------------------------------

def windows_dump(guest, kind=1, holes=(), bits=64):
    """A crash dump: full, in two runs, or with a bitmap."""
    head = bytearray(b"PAGE" + b"\xff" * (0x2000 - 4 if bits == 64 else 0x1000 - 4))
    pages = len(guest.memory) // PAGE

    def put(at, form, *values):
        struct.pack_into(form, head, at, *values)

    if bits == 64:
        put(4, "<4s", b"DU64")
        put(0x10, "<Q", guest.cr3)
        put(0x30, "<III", 0x8664, 2, 0xDEAD)
        put(0x88, "<IIQ", 2, 0, pages)
        put(0x98, "<4Q", 0, 8, 8, pages - 8)
        put(0x348 + 0x44, "<I", 0x246)
        put(0x348 + 0xF8, "<Q", 0xFFFFF80000001000)
        put(0xF98, "<I", kind)
    else:
        put(4, "<4s", b"DUMP")
        put(0x10, "<I", guest.cr3)
        put(0x20, "<III", 0x14C, 2, 0xDEAD)
        put(0x5C, "<B", 1)
        put(0x64, "<II", 1, pages)
        put(0x6C, "<II", 0, pages)
        put(0xF88, "<I", kind)
    if kind == 1:
        return bytes(head) + guest.memory.tobytes()
    numbers = [n for n in range(pages) if n not in holes]
    bitmap = bytearray(-(-pages // 8))
    for n in numbers:
        bitmap[n // 8] |= 1 << n % 8
    first = len(head) + 0x1000
    summary = bytearray(0x38)
    struct.pack_into("<4s4s", summary, 0, b"SDMP", b"DUMP")
    struct.pack_into("<QQQ", summary, 0x20, first, len(numbers), pages)
    data = b"".join(guest.bytes(n * PAGE, (n + 1) * PAGE) for n in numbers)
    return bytes(head) + bytes(summary + bitmap).ljust(0x1000, b"\0") + data


# ---- VMware ------------------------------------------------------------------------------------------------------------

def vmware_state(regions, version=3, vcpus=(), block=False):
    """A .vmss whose group "memory" has (gpa, offset, size) regions, behind a tag of data that is long and padded.

    vcpus: dicts of control registers (cr0 to cr4) and others, for the group "cpu"; block: control registers are in one block.
    """
    wide = "<I" if version == 0 else "<Q"

    def tag(name, value, *indices, size=4):
        data = value.to_bytes(size, "little")
        return bytes([len(indices) << 6 | size, len(name)]) + name + struct.pack(f"<{len(indices)}I", *indices) + data

    def long(name, data, *indices, pad=0):
        head = bytes([len(indices) << 6 | 63, len(name)]) + name + struct.pack(f"<{len(indices)}I", *indices)
        return head + struct.pack(wide, len(data)) * 2 + struct.pack("<H", pad) + b"-" * pad + data

    tags = long(b"long", b"?" * 50, pad=7) + tag(b"regionsCount", len(regions))
    for n, (gpa, offset, size) in enumerate(regions):
        tags += tag(b"regionPPN", gpa // PAGE, n) + tag(b"regionPageNum", offset // PAGE, n) + tag(b"regionSize", size // PAGE, n)
    cpu = tag(b"cpu:numVCPUs", len(vcpus))
    for n, registers in enumerate(vcpus):
        control = [registers.get(f"cr{i}", 0) for i in range(9)]
        if block:
            cpu += long(b"CR64", struct.pack("<9Q", *control), n)
        else:
            cpu += b"".join(tag(b"CR64", control[i], n, i, size=8) for i in range(5))
        cpu += b"".join(tag(name.encode(), value, n, size=4 if name == "eflags" else 8)
                        for name, value in registers.items() if not name.startswith("cr"))
    groups = [(b"memory", 12 + 80 * 2), (b"cpu", 12 + 80 * 2 + len(tags) + 2)]
    out = bytes([0xD0 | version, 0xBE if version in (0, 2, 3) else 0xBA, 0xD0 | (2 if version == 0 else version),
                 0xBE if version != 1 else 0xBA]) + struct.pack("<II", 8, len(groups))
    out += b"".join(name.ljust(64, b"\0") + struct.pack("<QQ", at, 0) for name, at in groups)
    return out + tags + b"\0\0" + cpu + b"\0\0"


IMAGES = DATA / "images"


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
