"""Cut a small sample out of a trace of the plugin for QEMU and the memory image that it begins with.

Kept are the first blocks of records, and those pages of the image that are page tables at the start, at a CR3 load or at the
end, as they were at the start. The rest of memory becomes holes: stores there are passed over by a replay, walks read zeros.

    python tools/cut_qemu_trace.py boot.qtrace dump.elf 200000 sample       writes sample.qtrace.xz, sample.elf.xz
"""

import argparse
import lzma
import struct
from pathlib import Path

import numpy as np

import kvmmu
from kvmmu.traces import Chunk, Op, RegisterSet, Trace
from kvmmu.traces.on_memory import TraceOnMemory
from kvmmu.traces.stream import COLUMNS

HEADER, UNIT, PAGE = 64, 16, 4096
PRESENT, LARGE, ADDRESS = 1, 1 << 7, (1 << 52) - PAGE
LEVELS = {True: 5, False: 4}
CR4_LA57 = 1 << 12
PT_LOAD, PT_NOTE = 1, 4


def cut_trace(path, records):
    """Return the header and the first blocks that have so many records together."""
    with open(path, "rb") as file:
        data, left = file.read(HEADER), records
        while left > 0 and (head := file.read(UNIT)):
            count = struct.unpack_from("<I", head, 8)[0]
            data += head + file.read(UNIT * count)
            left -= count
    return data


def add_tables(mem, root, levels, tables):
    """Add the pages of the tables under a root."""
    level_pages = {root & ADDRESS}
    for level in range(levels, 0, -1):
        tables |= level_pages
        if level == 1:
            break
        below = set()
        for gpa in level_pages:
            entries = np.frombuffer(mem.read(gpa, PAGE), "<u8")
            entries = entries[(entries & PRESENT != 0) & ((entries & LARGE == 0) | (level > 3))]
            below |= set((entries & np.uint64(ADDRESS)).tolist())
        level_pages = below


class Watched(Trace):
    """A trace that looks at the page tables at each CR3 load."""

    def __init__(self, trace, vcpu, tables):
        super().__init__(trace.header, ())
        self.trace, self.vcpu, self.tables = trace, vcpu, tables
        self.roots = {vcpu.regs.cr3}
        self.look()

    def look(self):
        for root in self.roots:
            add_tables(self.vcpu.mem, root, LEVELS[bool(self.vcpu.regs.cr4 & CR4_LA57)], self.tables)

    def chunks(self):
        for chunk in self.trace.chunks():
            stops = np.flatnonzero(chunk.op == Op.MOV_CR3).tolist()
            for start, stop in zip([0, *stops], [*stops, len(chunk)], strict=True):
                part = {name: getattr(chunk, name)[start:stop] for name in COLUMNS if getattr(chunk, name) is not None}
                if stop > start:
                    yield Chunk.checked(part, self.header)
                self.look()
                if stop < len(chunk):
                    self.roots.add(int(chunk.value[stop]))
        self.look()


def sparse_core(path, pages):
    """Return a core with the notes of another, and some of its pages."""
    with open(path, "rb") as file:
        head = file.read(64)
        phoff, phnum = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
        file.seek(phoff)
        segments = [struct.unpack("<IIQQQQQQ", file.read(56)) for _ in range(phnum)]
        note = next(segment for segment in segments if segment[0] == PT_NOTE)
        file.seek(note[2])
        notes = file.read(note[5])
    mem = kvmmu.open_image(path).memory
    runs = np.split(np.array(pages), np.flatnonzero(np.diff(pages) != PAGE) + 1)
    at = 64 + 56 * (len(runs) + 1)
    headers, data = struct.pack("<IIQQQQQQ", PT_NOTE, 0, at, 0, 0, len(notes), len(notes), 0), notes
    for run in runs:
        size = PAGE * len(run)
        headers += struct.pack("<IIQQQQQQ", PT_LOAD, 0, at + len(data), 0, int(run[0]), size, size, 0)
        data += mem.read(int(run[0]), size)
    return head[:32] + struct.pack("<QQ", 64, 0) + head[48:56] + struct.pack("<HHHH", len(runs) + 1, 0, 0, 0) + headers + data


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("records", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    trace = args.out.with_name(args.out.name + ".qtrace.xz")
    trace.write_bytes(lzma.compress(cut_trace(args.trace, args.records), preset=9 | lzma.PRESET_EXTREME))
    vcpu = kvmmu.open_image(args.image).vcpu(0)
    registers = RegisterSet(vcpu.regs.cr0, vcpu.regs.cr3, vcpu.regs.cr4, vcpu.regs.efer)
    tables = set()
    watched = Watched(TraceOnMemory(kvmmu.open_trace(trace), registers, vcpu.mem.slots), vcpu, tables)
    report = kvmmu.replay(watched, vcpu)
    there = [gpa for gpa in sorted(tables) if any(start <= gpa < start + size for start, size, _ in vcpu.mem.slots)]
    image = args.out.with_name(args.out.name + ".elf.xz")
    image.write_bytes(lzma.compress(sparse_core(args.image, there), preset=9 | lzma.PRESET_EXTREME))
    print(f"{report.accesses:,} accesses, {report.contexts} contexts, {report.mismatches} mismatches; "
          f"{len(there)} pages of tables; {trace.stat().st_size:,} and {image.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
