# SPDX-License-Identifier: Apache-2.0
"""Memory images for tests, written byte by byte from their layouts, and the guest that is in them."""

import struct

import builders
import numpy as np

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
