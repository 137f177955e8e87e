# SPDX-License-Identifier: Apache-2.0
"""Address spaces that share tables, and windows onto all of them: what the random drivers of shadow MMUs begin with."""

import numpy as np
from builders import PageTables, flag_bits
from machine_driver import HIGH, HOLE, MB2, PAGE, RAM, ROM

from kvmmu import GuestMemory

DATA, LARGE, LARGE_RO, NONE, WINDOW, IN_ROM = 0x400000, 0x800000, 0xC00000, 0x1000000, 0x1400000, 0x1800000
TABLES = 8 * MB2                                        # where the address spaces have theirs
EACH = 0x80000                                          # room for the tables of one
DATA_HIGH = 0x600000                                    # the upper half of a table of 4-byte entries
SPREAD, SPREAD_STEP, SPREAD_PAGES = 0x40000000, 0x600000, 64        # pages with a table each


class SharedTables:
    """Tables of several address spaces in a `mode`.

    Attributes
    ----------
    roots : addresses of the top tables
    gva : addresses that are worth an access
    entries : addresses of the entries that may change
    original : every 8 bytes of the tables in the beginning, by address
    frames : of tables that have a window
    windows, top_windows : addresses through which leaf tables, and top tables, can be written
    """

    def make_memory(self):
        """(memory with the tables in it, the bytes of its highest slot)."""
        mem = GuestMemory(RAM)
        mem.add_slot(ROM, 4 * PAGE, readonly=True)
        high = np.zeros(8 * PAGE, np.uint8)
        mem.add_slot(HIGH, high)
        for gpa, value in self.original.items():
            mem.write(gpa, value.to_bytes(8, "little"))
        return mem, high

    def make_tables(self, base):
        return PageTables(self.mode, base=base)

    def build_tables(self):
        """Address spaces over the same addresses: 0 has all, the others some tables of their own and some of its."""
        self.targets = [0x10000, 0x11000, 0x12000, 0x13000, MB2, MB2 + PAGE, 3 * MB2, ROM, ROM + PAGE, HOLE, HIGH,
                        HIGH + 5 * PAGE]
        count = 5 if self.mode in ("4l", "5l") else 3
        self.tables = [self.make_tables(TABLES + i * EACH) for i in range(count - 1)]
        self.tables.append(self.make_tables(HIGH))                # comes and goes with its slot
        self.roots = [tables.cr3 for tables in self.tables]
        data = [(DATA if i < 8 else DATA_HIGH) + i * PAGE for i in range(len(self.targets))]
        for number, tables in enumerate(self.tables):
            for i, gva in enumerate(data if number < count - 1 else data[:3]):
                tables.map(gva, self.targets[(i + number) % len(self.targets)], "p u" if i % 4 == 3 else "p w u")
            if number % 2 == 0 and number < count - 1:
                tables.map(LARGE, 4 * MB2, level=2)
                tables.map(LARGE_RO, 6 * MB2, flags="p u", level=2)
        first = self.tables[0]
        first.map(IN_ROM, 0x10000)
        first.map(WINDOW, 0)                                # the windows are in a table of their own, which gets one, too
        in_rom = first.entry_gpa(IN_ROM, 1) & -PAGE
        frames = sorted({gpa for tables in self.tables for gpa in tables.tables()} - {in_rom})[:32]
        spread = set()
        for i in range(SPREAD_PAGES):
            spread.add(first.map(SPREAD + i * SPREAD_STEP, 0x100000 + i * PAGE) & -PAGE)
        for i, gpa in enumerate(frames):
            first.map(WINDOW + i * PAGE, gpa)
        self.gva = data
        self.gva += [LARGE, LARGE + 37 * PAGE, LARGE + MB2 - PAGE, LARGE_RO, NONE, IN_ROM]
        self.gva += [WINDOW + i * PAGE for i in range(len(frames))]
        leaf_tables = {first.entry_gpa(gva, 1) & -PAGE for gva in (DATA, DATA_HIGH, WINDOW)} | {
            tables.entry_gpa(DATA, 1) & -PAGE for tables in self.tables}
        self.windows = [WINDOW + i * PAGE for i, gpa in enumerate(frames) if gpa in leaf_tables]
        self.top_windows = [WINDOW + i * PAGE for i, gpa in enumerate(frames) if gpa in self.roots]
        if self.mode == "32":                               # entries there stand for two of the host's
            self.windows += self.top_windows
        words = {}
        for tables in self.tables:
            words |= tables.words()
        pde = first.entry_gpa(IN_ROM, 2)                    # one leaf table lies in the read-only slot
        first.write(pde, first.read(pde) - in_rom + ROM + 3 * PAGE)
        words |= first.words()
        words |= {ROM + 3 * PAGE + (gpa - in_rom): value for gpa, value in words.items() if gpa & -PAGE == in_rom}
        for number in range(1, count - 1):                  # shared: windows; in 1 the data, too; in 3 a whole upper table
            for gva, level in {1: ((WINDOW, 2), (DATA, 2)), 2: ((WINDOW, 2),), 3: ((WINDOW, 3),)}[number]:
                entry = self.tables[number].entry_gpa(gva, level)
                self.tables[number].write(entry, first.entry(gva, level))
            words |= self.tables[number].words()
        self.original = words
        self.entry_size = first.entry_size
        self.frames = frames
        fixed = spread | {in_rom}
        self.entries = sorted(gpa + part for gpa in words for part in range(0, 8, self.entry_size) if gpa & -PAGE not in fixed)

    def pick_page(self):
        """Data in half of the cases, else anything."""
        return self.pick(self.gva[:18] if self.rng.random() < 0.5 else self.gva)

    def new_value(self, gpa):
        """Another value for an entry: a bit turned over, another frame, what it was at first, or that of another entry."""
        old = self.read_entry(gpa)
        chance = self.rng.random()
        if chance < 0.4:
            return self.original_entry(gpa)
        if chance < 0.6:
            return (old & 0xFFF) | self.pick(self.targets + self.frames)
        if chance < 0.65:
            return self.read_entry(self.pick(self.entries))
        if chance < 0.67:
            return old ^ flag_bits("ps")
        return old ^ self.pick(self.bits)

    def original_entry(self, gpa):
        return self.original.get(gpa & -8, 0) >> 8 * (gpa & 7) & ((1 << 8 * self.entry_size) - 1)

    def flood(self):
        """One entry of an upper table again and again."""
        gpa = self.pick(self.entries)
        if self.is_there(gpa):
            for _ in range(4):
                self.store_entry(gpa, self.read_entry(gpa))

    def repair(self):
        """Some entries, or all, as they were in the beginning."""
        some = self.entries if self.rng.random() < 0.3 else [self.pick(self.entries) for _ in range(20)]
        for gpa in some:
            if self.is_there(gpa) and self.read_entry(gpa) != self.original_entry(gpa):
                self.store_entry(gpa, self.original_entry(gpa))
