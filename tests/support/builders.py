# SPDX-License-Identifier: Apache-2.0
"""Guest page tables for tests and benchmarks, written by hand from the formats of the SDM's chapter "Paging".

`PageTables` builds sane tables one mapping at a time; `random_tables` makes adversarial ones.  Nothing of the package
is used.  The modes are "32" (two levels of 4-byte entries), "pae", "4l" and "5l".
"""

from dataclasses import dataclass

import numpy as np

PAGE = 0x1000
FLAGS = {
    "p": 1 << 0,
    "w": 1 << 1,
    "u": 1 << 2,
    "pwt": 1 << 3,
    "pcd": 1 << 4,
    "a": 1 << 5,
    "d": 1 << 6,
    "ps": 1 << 7,
    "g": 1 << 8,
    "nx": 1 << 63,
}
LEVELS = {"32": 2, "pae": 3, "4l": 4, "5l": 5}

CR0_PE = 1 << 0
CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11


def flag_bits(names):
    """The entry bits of a string such as "p w u nx"."""
    value = 0
    for name in names.split():
        value |= FLAGS[name]
    return value


def mode_regs(mode, cr3):
    """Registers that select `mode`: WP on, NXE on where entries have an XD bit, PSE on in 32-bit paging."""
    cr0 = CR0_PE | CR0_WP | CR0_PG
    if mode == "32":
        return {"cr0": cr0, "cr3": cr3, "cr4": CR4_PSE, "efer": 0}
    if mode == "pae":
        return {"cr0": cr0, "cr3": cr3, "cr4": CR4_PAE, "efer": EFER_NXE}
    cr4 = CR4_PAE | CR4_LA57 if mode == "5l" else CR4_PAE
    return {"cr0": cr0, "cr3": cr3, "cr4": cr4, "efer": EFER_LME | EFER_LMA | EFER_NXE}


def sign_extend(gva, mode):
    """The canonical address with the low 48 or 57 bits of `gva`; 32 bits outside long mode."""
    if mode in ("32", "pae"):
        return gva & 0xFFFFFFFF
    width = 57 if mode == "5l" else 48
    gva &= (1 << width) - 1
    return gva | ((1 << 64) - (1 << width) if gva >> (width - 1) else 0)


def index_of(gva, level, mode):
    """Index of the entry for `gva` in a table of `level`."""
    if mode == "32":
        return gva >> (22 if level == 2 else 12) & 0x3FF
    if mode == "pae" and level == 3:
        return gva >> 30 & 3
    return gva >> (9 * level + 3) & 0x1FF


def words_to_pages(words, extra=()):
    """(gpas, pages): every page that holds a word, or is listed in `extra`, as uint64[n] and uint64[n, 512]."""
    gpas = sorted({gpa & ~(PAGE - 1) for gpa in words} | set(extra))
    row = {gpa: number for number, gpa in enumerate(gpas)}
    pages = np.zeros((len(gpas), 512), np.uint64)
    for gpa, value in words.items():
        pages[row[gpa & ~(PAGE - 1)], gpa >> 3 & 0x1FF] = value
    return np.array(gpas, np.uint64), pages


class PageTables:
    """Tables of one address space, allocated page by page from `base` upwards; the root is at `base`."""

    def __init__(self, mode="4l", base=0x100000):
        if mode not in LEVELS:
            raise ValueError(f"no such mode: {mode!r}")
        self.mode = mode
        self.cr3 = base
        self.entry_size = 4 if mode == "32" else 8
        self._words = {}
        self._tables = {base}
        self._next = base + PAGE

    def map(self, gva, gpa, flags="p w u", level=1, pkey=0, raw=0, upper="p w u"):
        """Map the page of `level` at `gva` to `gpa`; returns the leaf entry's address.

        `raw` is ORed into the leaf.  Tables that are missing on the way get allocated, with entries of the flags
        `upper` (a PAE PDPTE takes only "p"); entries already there stay as they are.  A leaf above level 1 gets PS; in
        mode "32" bits 39:32 of `gpa` go to the PDE's bits 20:13 (PSE-36).
        """
        table = self.cr3
        for above in range(LEVELS[self.mode], level, -1):
            entry_gpa = table + self.entry_size * index_of(gva, above, self.mode)
            entry = self.read(entry_gpa)
            if entry == 0:
                entry = self._allocate() | flag_bits("p" if self.mode == "pae" and above == 3 else upper)
                self.write(entry_gpa, entry)
            table = self._table_of(entry)
            if table not in self._tables:
                raise ValueError(f"{gva:#x} is mapped above level {level} already")
        entry_gpa = table + self.entry_size * index_of(gva, level, self.mode)
        self.write(entry_gpa, self._leaf(gpa, level) | flag_bits(flags) | pkey << 59 | raw)
        return entry_gpa

    def entry_gpa(self, gva, level):
        """Address of the entry of `level` for `gva`; KeyError if no table is there."""
        table = self.cr3
        for above in range(LEVELS[self.mode], level, -1):
            entry = self.read(table + self.entry_size * index_of(gva, above, self.mode))
            table = self._table_of(entry)
            if table not in self._tables:
                raise KeyError(f"no level {above - 1} table for {gva:#x}")
        return table + self.entry_size * index_of(gva, level, self.mode)

    def entry(self, gva, level):
        """Value of the entry of `level` for `gva`."""
        return self.read(self.entry_gpa(gva, level))

    def set_bits(self, gva, level, mask):
        gpa = self.entry_gpa(gva, level)
        self.write(gpa, self.read(gpa) | mask)

    def clear_bits(self, gva, level, mask):
        gpa = self.entry_gpa(gva, level)
        self.write(gpa, self.read(gpa) & ~mask)

    def read(self, gpa):
        """The entry at `gpa`, in this mode's size."""
        word = self._words.get(gpa & ~7, 0)
        if self.entry_size == 8:
            return word
        return word >> 8 * (gpa & 4) & 0xFFFFFFFF

    def write(self, gpa, value):
        """Set the entry at `gpa`, in this mode's size."""
        if value >> 8 * self.entry_size:
            raise ValueError(f"entry {value:#x} does not fit {self.entry_size} bytes")
        if self.entry_size == 8:
            self._words[gpa] = value
        else:
            shift = 8 * (gpa & 4)
            kept = self._words.get(gpa & ~7, 0) & ~(0xFFFFFFFF << shift)
            self._words[gpa & ~7] = kept | value << shift

    def words(self):
        """{gpa: u64} of the words written so far."""
        return dict(self._words)

    def tables(self):
        """Addresses of the table pages, the root first."""
        return sorted(self._tables)

    def pages(self):
        """(gpas, pages) of all table pages as uint64[n] and uint64[n, 512]."""
        return words_to_pages(self._words, self._tables)

    def regs(self):
        """dict(cr0, cr3, cr4, efer) for these tables; see `mode_regs`."""
        return mode_regs(self.mode, self.cr3)

    def pdptrs(self):
        """The four PDPTEs of a PAE root."""
        return tuple(self.read(self.cr3 + 8 * index) for index in range(4))

    def _allocate(self):
        gpa = self._next
        self._next += PAGE
        self._tables.add(gpa)
        return gpa

    def _table_of(self, entry):
        return entry & (0xFFFFF000 if self.mode == "32" else 0x000FFFFFFFFFF000)

    def _leaf(self, gpa, level):
        if level == 1:
            return gpa
        if self.mode == "32":
            return gpa & 0xFFC00000 | (gpa >> 32 & 0xFF) << 13 | FLAGS["ps"]
        return gpa | FLAGS["ps"]


@dataclass
class RandomTables:
    """What `random_tables` made; `gvas` are worth translating, `cr3` is the root."""

    mode: str
    words: dict
    gvas: list
    cr3: int

    def pages(self):
        return words_to_pages(self.words)

    def regs(self):
        return mode_regs(self.mode, self.cr3)


def random_tables(rng, mode, *, tables=16, slots=6, gvas=200, base=0x100000, maxphyaddr=40, memsize=1 << 30, holes=()):
    """Adversarial tables: sane entries mixed with everything a walker may trip over.

    `rng` is a numpy Generator.  `tables` pages from `base` up are spread over the levels; each gets random entries in
    `slots` indices common to all tables, so that walks meet entries at every level.  An entry is with decreasing
    probability a pointer to a table of the next level, a leaf or large page, a pointer to any table (itself included:
    self references and shared tables), an entry with a reserved bit, not present but full of garbage, a pointer past
    `memsize` or into one of `holes` (half-open ranges), or random bits.  PDPTEs of a PAE root are nearly always valid,
    as a bad one makes loading CR3 fail.  The addresses are combinations of the indices, a few of them neighbours,
    random or not canonical.
    """
    levels = LEVELS[mode]
    pages = [base + PAGE * number for number in range(max(tables, levels))]
    by_level = {level: [] for level in range(1, levels + 1)}
    by_level[levels].append(pages[0])
    for number, gpa in enumerate(pages[1:]):
        by_level[levels - 1 - number % (levels - 1)].append(gpa)
    top = 1024 if mode == "32" else 512
    indices = [0, top - 1] + [int(slot) for slot in rng.integers(0, top, max(slots - 2, 1))]

    words = {}
    make = _EntryMaker(rng, mode, by_level, pages, maxphyaddr, memsize, holes)
    size = 4 if mode == "32" else 8
    for level, level_pages in by_level.items():
        for page in level_pages:
            pae_root = mode == "pae" and level == 3
            for index in range(4) if pae_root else sorted(set(indices)):
                value = make.pdpte() if pae_root else make.entry(level, page)
                gpa = page + size * index
                shift = 8 * (gpa & 7)
                words[gpa & ~7] = words.get(gpa & ~7, 0) | value << shift
    addresses = [_interesting_gva(rng, mode, indices) for _ in range(gvas)]
    return RandomTables(mode, words, addresses, pages[0])


class _EntryMaker:
    """Random entries for `random_tables`."""

    KINDS = ("table", "leaf", "any", "reserved", "garbage", "away", "random")
    WEIGHTS = (0.46, 0.18, 0.10, 0.10, 0.06, 0.06, 0.04)

    def __init__(self, rng, mode, by_level, pages, maxphyaddr, memsize, holes):
        self.rng = rng
        self.mode = mode
        self.by_level = by_level
        self.pages = pages
        self.memsize = memsize
        self.holes = list(holes)
        self.address_bits = 32 if mode == "32" else min(maxphyaddr, 52)

    def pdpte(self):
        chance = self.rng.random()
        if chance < 0.02:
            return self._pick(self.pages) | 1 << int(self.rng.integers(5, 9)) | 1
        if chance < 0.10:
            return self._number(64) & ~1
        return self._pick(self.by_level[2] if chance < 0.9 else self.pages) | 1

    def entry(self, level, page):
        kind = self.rng.choice(self.KINDS, p=self.WEIGHTS)
        if kind == "garbage":
            return self._number(32 if self.mode == "32" else 64) & ~1
        if kind == "random":
            return self._number(32 if self.mode == "32" else 64) | 1
        value = self._rights()
        if kind == "away":
            return value | self._away()
        if kind == "any":
            return value | (page if self.rng.random() < 0.5 else self._pick(self.pages))
        if kind == "reserved":
            value |= self._reserved(level)
        if level == 1 or (kind == "leaf" and level <= 3):
            return value | self._leaf(level)
        return value | self._pick(self.by_level[level - 1])

    def _rights(self):
        """Present, each right with a chance of 7/8, other low bits now and then; XD and a key in 8-byte entries."""
        value = 1
        for bit in (1, 2):
            if self.rng.random() < 0.875:
                value |= 1 << bit
        for bit in (3, 4, 5, 6, 8, 9, 10, 11):
            if self.rng.random() < 0.25:
                value |= 1 << bit
        if self.mode != "32" and self.rng.random() < 0.125:
            value |= 1 << 63
        if self.mode in ("4l", "5l") and self.rng.random() < 0.25:
            value |= self._number(4) << 59
        return value

    def _reserved(self, level):
        """A bit that is reserved in some entries of this level; the rest of the entry may make it a legal one."""
        if self.mode == "32":
            return 1 << 7 | 1 << int(self.rng.integers(13, 22))
        choices = [1 << int(self.rng.integers(13, 21)) | 1 << 7, 1 << 63, 1 << int(self.rng.integers(52, 63))]
        if self.address_bits < 52:
            choices.append(1 << int(self.rng.integers(self.address_bits, 52)))
        if level >= 3:
            choices += [1 << 7, 1 << 8]
        return self._pick(choices)

    def _leaf(self, level):
        address = self._number(self.address_bits) & ~(PAGE - 1)
        if level == 1:
            return address | (self._number(1) << 7)
        if self.mode == "32":
            return address & 0xFFC00000 | self._number(4) << 13 | 1 << 7
        return address & ~((1 << (9 * level + 3)) - 1) | 1 << 7

    def _away(self):
        if self.holes and self.rng.random() < 0.5:
            start, end = self._pick(self.holes)
            return int(self.rng.integers(start, end)) & ~(PAGE - 1)
        limit = 1 << self.address_bits
        return int(self.rng.integers(min(self.memsize, limit - PAGE), limit)) & ~(PAGE - 1)

    def _pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def _number(self, width):
        return int(self.rng.integers(0, 1 << width, dtype=np.uint64, endpoint=False)) if width < 64 else self._u64()

    def _u64(self):
        return self._number(32) << 32 | self._number(32)


def _interesting_gva(rng, mode, indices):
    chance = rng.random()
    if chance < 0.03:
        return int(rng.integers(0, 1 << 32)) << 32 | int(rng.integers(0, 1 << 32))
    gva = 0
    for level in range(1, LEVELS[mode] + 1):
        index = indices[int(rng.integers(len(indices)))]
        gva |= index << (9 * level + 3 if mode != "32" else 10 * level + 2)
    gva |= int(rng.integers(0, PAGE))
    if chance < 0.08:
        gva ^= 1 << int(rng.integers(12, 9 * LEVELS[mode] + 12))
    gva = sign_extend(gva, mode)
    if chance > 0.97:
        gva ^= 1 << 63
    return gva
