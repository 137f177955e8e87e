# SPDX-License-Identifier: Apache-2.0
"""Machines for large batches: images of dense tables, rows with locality, and the same rows walked one by one.

The tables of `builders.py` have few entries. Here every index of every table leads somewhere, most entries are alike and
some are odd, so that a batch meets whole blocks that pass, blocks with a few odd rows, and blocks with many.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from builders import LEVELS, PAGE, mode_regs, random_tables
from machines import ACCESSES, NXE, PKE, SMAP, SMEP, WP, snapshot

from kvmmu import CpuModel, Ept, GeneralProtection, GuestMemory, Npt, Regs, Translation, Vcpu

COLUMNS = ("gpa", "status", "error_code", "level", "pte", "pte_gpa", "pte_access", "refs", "ngpa", "fault_gpa",
           "exit_qualification")
SCALAR_ROWS = 7                         # so few rows are walked one by one, in order
EPT_AD, EPT_LEAF = 0x300, 0x37          # rights, and write-back
GUEST_FRAMES = 1024                     # that a second stage maps, each to itself unless it is odd
LAST = (1 << 32) - 1


def row_by_row(walk, gva, access, *, regs=None, ctx=None, fields, set_ad, order=None):
    """The scalar walk of every row, in order: batches too small for anything else."""
    out = Translation.empty(gva.size, fields)
    order = np.arange(gva.size) if order is None else order
    for start in range(0, gva.size, SCALAR_ROWS):
        rows = order[start:start + SCALAR_ROWS]
        t = walk.translate(gva[rows], access if np.ndim(access) == 0 else access[rows], regs=regs,
                           ctx=None if ctx is None else ctx[rows], fields=fields, set_ad=set_ad)
        for name in fields:
            getattr(out, name)[rows] = getattr(t, name)
    return out


@dataclass
class Image:
    """Pages by frame number, and which of them the guest cannot write; `machine()` makes a fresh memory of them."""

    pages: dict = field(default_factory=dict)
    readonly: frozenset = frozenset()
    slots: str = "pages"                # "pages", "runs" of neighbours, or one slot for "each"

    def memory(self):
        frames = sorted(self.pages)
        if self.slots == "pages" and not self.readonly:
            return GuestMemory.from_pages(np.array(frames, np.uint64) << np.uint64(12), np.array([self.pages[f] for f in frames]))
        runs = []
        for frame in frames:
            alike = runs and self.slots != "each" and frame == runs[-1][-1] + 1
            if alike and (frame in self.readonly) == (runs[-1][-1] in self.readonly):
                runs[-1].append(frame)
            else:
                runs.append([frame])
        mem = GuestMemory(PAGE)         # frame 0 holds no table
        for run in runs:
            data = np.concatenate([self.pages[frame] for frame in run]).view(np.uint8)
            mem.add_slot(run[0] * PAGE, data.copy(), readonly=run[0] in self.readonly)
        return mem


def chosen(rng, n, probability):
    return np.flatnonzero(rng.random(n) < probability)


def mutated(rng, words, level, mode, tables, maxphyaddr, odd):
    """Each entry is odd, in one of many ways, with a probability."""
    narrow = mode == "32"
    for at in chosen(rng, words.size, odd):
        kind, word = int(rng.integers(14)), int(words[at])
        if kind == 0:
            word = int(rng.integers(1 << 32)) << (0 if narrow else 31) & ~1
        elif kind < 4:
            word &= ~(1 << kind)                                        # W, U, PWT
        elif kind == 4:
            word &= ~0x60
        elif kind == 5:
            word &= ~0x40
        elif kind == 6:
            word |= 1 << (8 if narrow else 63)
        elif kind == 7:
            word |= 0 if narrow else int(rng.integers(16)) << 59
        elif kind == 8:
            word |= 1 << int(rng.integers(13, 22)) | 0x80
        elif kind == 9:
            word |= 0 if narrow else 1 << int(rng.integers(min(maxphyaddr, 51), 63))
        elif kind in (10, 11):
            size = 1 << ((10 if narrow else 9) * (level - 1) + 12)
            word = word & 0xFFF | int(rng.integers(1 << 18)) * PAGE & ~(size - 1) | 0x80      # a large page; PAT at level 1
        elif kind == 12:
            word = word & 0xFFF | int(rng.integers(1 << 19)) * PAGE                            # most likely a hole
        else:
            word = word & 0xFFF | int(rng.choice(tables)) * PAGE
        words[at] = word & (LAST if narrow else (1 << 64) - 1)


def dense_tables(rng, mode, *, base=0x10, odd=0.02, upper_odd=0.02, cold=0.0, leaves=6, frames=GUEST_FRAMES, maxphyaddr=40):
    """(pages, root frame) of tables from frame `base` on. Those of one level share the tables of the next."""
    levels = LEVELS[mode]
    counts = {level: (leaves, 4, 2, 2, 1)[level - 1] for level in range(1, levels)} | {levels: 1}
    by_level, frame = {}, base
    for level in range(levels, 0, -1):
        by_level[level] = np.arange(frame, frame + counts[level])
        frame += counts[level]
    tables, pages = np.arange(base, frame), {}
    for level, members in by_level.items():
        for table in members.tolist():
            if mode == "pae" and level == 3:
                page = np.zeros(512, np.uint64)
                page[:4] = rng.choice(by_level[2], 4).astype(np.uint64) << np.uint64(12) | np.uint64(1)
                pages[table] = page
                continue
            n = 1024 if mode == "32" else 512
            targets = rng.integers(0, frames, n) if level == 1 else rng.choice(by_level[level - 1], n)
            words = targets.astype(np.uint64) << np.uint64(12) | np.uint64(0x67)
            words[chosen(rng, n, cold)] &= ~np.uint64(0x60)
            mutated(rng, words, level, mode, tables, maxphyaddr, odd if level == 1 else upper_odd)
            pages[table] = words.astype(np.uint32).view(np.uint64) if mode == "32" else words
    return pages, base


def ept_mutated(rng, words, tables, odd):
    for at in chosen(rng, words.size, odd):
        kind, word = int(rng.integers(10)), int(words[at])
        if kind < 4:
            word = word & ~0x407 | int(rng.integers(8)) | int(rng.integers(2)) << 10
        elif kind == 4:
            word = word & ~0x38 | int(rng.integers(8)) << 3
        elif kind == 5:
            word |= 1 << int(rng.integers(40, 52))
        elif kind == 6:
            word &= ~EPT_AD
        elif kind == 7:
            word &= ~0x200
        elif kind == 8:
            word |= 0x80
        else:
            word = word & ~(0xFFFFFFFF << 12) | int(rng.choice([int(rng.choice(tables)), int(rng.integers(1 << 19))])) << 12
        words[at] = word


def second_tables(rng, kind, *, base=0x60, odd=0.0, upper_odd=0.0, cold=0.0, maxphyaddr=40):
    """(pages, root frame) that map GUEST_FRAMES frames, each to itself; kind: "ept4", "ept5", or a mode, for NPT."""
    ept = kind.startswith("ept")
    levels = int(kind[3]) if ept else LEVELS[kind]
    n = 1024 if kind == "32" else 512
    leaf, table = (EPT_LEAF | EPT_AD, 7 | 0x100) if ept else (0x67, 0x67)
    large = leaf | 0x80
    leaves = GUEST_FRAMES // n
    pages, below, tables = {}, list(range(base, base + leaves)), np.arange(base, base + leaves + levels)
    for number, frame in enumerate(below):
        words = np.arange(number * n, (number + 1) * n, dtype=np.uint64) << np.uint64(12) | np.uint64(leaf)
        pages[frame] = words
    for level in range(2, levels + 1):
        words = np.zeros(n, np.uint64)
        for number, frame in enumerate(below):
            words[number] = frame << 12 | (1 if kind == "pae" and level == 3 else table)
        if level == 2 and kind != "32":         # what lies above is one large page each
            words[len(below):64] = np.arange(len(below), 64, dtype=np.uint64) << np.uint64(21) | np.uint64(large)
        frame = base + leaves + level - 2
        pages[frame], below = words, [frame]
    for frame, words in pages.items():
        some = chosen(rng, n, cold)
        if not (kind == "pae" and frame == below[0]):
            words[some] &= ~np.uint64(EPT_AD if ept else 0x60)
            p = odd if frame < base + leaves else upper_odd
            if ept:
                ept_mutated(rng, words, tables, p)
            else:
                mutated(rng, words, 1 if frame < base + leaves else 2, kind, tables, maxphyaddr, p)
    if kind == "32":
        pages = {frame: words.astype(np.uint32).view(np.uint64) for frame, words in pages.items()}
    return pages, below[0]


def dense_ept(rng, odd, upper_odd, cold):
    """(pages, root frame) of an EPT in which every index leads somewhere, as in dense_tables()."""
    pages, root = dense_tables(rng, "4l", odd=0, upper_odd=0)
    tables = np.array(list(pages))
    lowest = tables[-6:].tolist()
    for frame, words in pages.items():
        words &= ~np.uint64(0xFFF)
        words |= np.uint64(EPT_LEAF | EPT_AD if frame in lowest else 7 | 0x100)
        words[chosen(rng, words.size, cold)] &= ~np.uint64(EPT_AD)
        ept_mutated(rng, words, tables, odd if frame in lowest else upper_odd)
    return pages, root


def rows_of_many_tables(rng, n, bits):
    """n addresses, each most likely with a last table of its own, in few regions of 1 GiB. IN bits: of an address"""
    regions = rng.integers(0, 1 << (bits - 30), 90, np.uint64) << np.uint64(30)
    return rng.choice(regions, n) | rng.integers(0, 1 << 30, n, np.uint64)


def stage_of(rng, kind, root, **more):
    """An Ept or Npt over `second_tables`, its options at random."""
    bit = rng.integers(0, 2, 4).tolist()
    if kind.startswith("ept"):
        options = {"mbec": bool(bit[0]), "execonly": bool(bit[1]), "advanced_info": bool(bit[2])} | more
        ad = options.pop("ad", bool(bit[3]))
        return Ept(root << 12 | 6 | (int(kind[3]) - 1) << 3 | ad << 6, **options)
    cr4 = {"32": 0x10, "pae": 0x20, "4l": 0x20, "5l": 0x1020}[kind]
    return Npt(root << 12, cr4=cr4 | bit[1] << 20, efer=(0x500 if kind in ("4l", "5l") else 0) | bit[2] << 11,
               gmet=more.get("gmet", bool(bit[0])))


def sign_extended(gva, mode):
    """Canonical addresses of the mode, as an array."""
    if mode in ("32", "pae", "off"):
        return gva & np.uint64(LAST)
    shift = 7 if mode == "5l" else 16
    return ((gva << np.uint64(shift)).view(np.int64) >> shift).view(np.uint64)


def random_rows(rng, n, mode, *, pages=60, stray=0.01, regions=4):
    """n addresses on so many pages of a few regions, many neighbours alike, a few of them astray or not canonical."""
    wide = rng.integers(0, 1 << 63, max(regions, 1), np.uint64) << np.uint64(1)
    near = rng.choice(wide, pages) & ~np.uint64((1 << 21) - 1) | rng.integers(0, 512, pages, np.uint64) << np.uint64(12)
    pick = rng.integers(0, pages, n)
    stay = rng.random(n) < 0.4
    last = np.maximum.accumulate(np.where(stay, 0, np.arange(n)))
    gva = sign_extended(near, mode)[pick[last]] & ~np.uint64(0xFFF) | rng.integers(0, PAGE, n, np.uint64)
    some = chosen(rng, n, stray)
    gva[some] ^= np.uint64(1) << rng.integers(12, 64, some.size, np.uint64)
    return gva


def random_access(rng, n, style=None):
    """One value, mostly one value, or anything."""
    values = np.array(ACCESSES, np.uint8)
    style = rng.choice(["one", "mostly", "two", "any"]) if style is None else style
    if style == "one":
        return int(rng.choice(values))
    if style == "any":
        return rng.choice(values, n)
    access = np.full(n, rng.choice(values[:4]), np.uint8)
    some = chosen(rng, n, 0.03 if style == "mostly" else 0.5)
    access[some] = rng.choice(values, some.size)
    return access


def random_controls(rng, mode, root, pages=None):
    """Regs of the mode with every control at random; PDPTEs as they lie in `pages`."""
    if mode == "off":
        return Regs(cr0=1, cr3=root << 12, cr4=int(rng.integers(2)) << 5, efer=0)
    regs = mode_regs(mode, root << 12)
    bit = (rng.random(6) < (0.2, 0.3, 0.3, 0.4, 0.3, 0.2)).tolist()
    regs["cr0"] ^= WP * bit[0]
    regs["cr4"] ^= SMEP * bit[1] | SMAP * bit[2] | (PKE * bit[3] if mode in ("4l", "5l") else 0) | (1 << 4) * bit[4]
    regs["efer"] ^= NXE * bit[5]
    pdptrs = tuple(int(word) for word in pages[root][:4]) if mode == "pae" else None
    return Regs(**regs, pkru=int(rng.integers(1 << 32)) if rng.random() < 0.7 else 0, pdptrs=pdptrs)


@dataclass
class Machine:
    """A fresh memory each time: `start()` gives a walk, and what its translate() wants beside rows."""

    image: Image
    cpu: CpuModel
    sets: list                          # of (Regs, stage or None)
    nested: bool = False                # ngpa_walk of the only set

    def start(self):
        vcpu = Vcpu(self.image.memory(), cpu=self.cpu)
        if self.nested:
            regs, stage = self.sets[0]
            vcpu.enter_nested(stage, cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs)
            return vcpu.ngpa_walk, None
        return vcpu.gva_walk, vcpu.gva_walk.prepare(self.sets)


def same(expected, actual, fields, cold):
    """Names of columns that differ; cold: A/D bits of entries depend on the order of rows."""
    wrong = []
    for name in fields:
        a, b = getattr(expected, name), getattr(actual, name)
        if name == "pte" and cold:
            a, b = a & ~np.uint64(0x360), b & ~np.uint64(0x360)
        if not np.array_equal(a, b):
            wrong.append(name)
    return wrong


def compare(machine, gva, access, ctx=None, *, fields=COLUMNS[:4], set_ad=True, threads=1, why="", any_order=False):
    """One batch against the rows one by one: columns, memory afterwards, and the same again in the memory so left.

    With `any_order`, rows that change tables which others read may come in any order: a difference counts only if the
    rows one by one give the same in two orders. Returns whether the answers were the same.
    """
    results = []
    for fast in (False, True):
        walk, regs = machine.start()
        c = ctx if regs is not None and len(regs) > 1 else None
        answers = []
        for _ in range(2 if set_ad else 1):
            if fast:
                answers.append(walk.translate(gva, access, regs=regs, ctx=c, fields=fields, set_ad=set_ad, threads=threads))
            else:
                answers.append(row_by_row(walk, gva, access, regs=regs, ctx=c, fields=fields, set_ad=set_ad))
            answers.append(snapshot(walk.mem))
        results.append(answers)
    (expected, image, *again), (actual, other, *warm) = results
    wrong = same(expected, actual, fields, set_ad) + (["memory"] if image != other else [])
    if set_ad:
        wrong += ["warm " + name for name in same(again[0], warm[0], fields, any_order)]
        wrong += ["warm memory"] if again[1] != warm[1] else []
    if wrong and set_ad and any_order:
        walk, regs = machine.start()
        c = ctx if regs is not None and len(regs) > 1 else None
        back = row_by_row(walk, gva, access, regs=regs, ctx=c, fields=fields, set_ad=True, order=np.arange(gva.size)[::-1].copy())
        if same(expected, back, fields, True) or snapshot(walk.mem) != image:
            return False
    if wrong:
        raise AssertionError(f"{why}: {describe(wrong, results, fields, gva, access, ctx)}")
    return True


def describe(wrong, results, fields, gva, access, ctx):
    (expected, *_), (actual, *_) = results
    lines = [", ".join(wrong)]
    for name in fields:
        rows = np.flatnonzero(getattr(expected, name) != getattr(actual, name))
        if rows.size:
            row = int(rows[0])
            a = access if np.ndim(access) == 0 else access[row]
            lines.append(f"{name} in {rows.size} of {gva.size} rows; row {row}: gva {int(gva[row]):#x} access {int(a):#x} "
                         f"ctx {None if ctx is None else int(ctx[row])}: want {int(getattr(expected, name)[row]):#x}, "
                         f"got {int(getattr(actual, name)[row]):#x}")
    return "\n".join(lines)


@lru_cache
def random_case(seed, mode):
    """(pages, registers, addresses, accesses) of random tables that can be loaded."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, mode, gvas=3000)
    try:
        Vcpu(GuestMemory.from_pages(*tables.pages()), cpu=CpuModel(maxphyaddr=40)).set_regs(**tables.regs())
    except GeneralProtection:
        return random_case(seed + 1000, mode)
    access = rng.choice(np.array(ACCESSES, np.uint8), len(tables.gvas))
    return tables.pages(), tables.regs(), np.array(tables.gvas, np.uint64), access


def random_machine(seed, mode, **cpu):
    """A fresh vCPU over random tables, with addresses and an access for each. Mode "pae npt": its PDPTEs are in memory."""
    pages, regs, gva, access = random_case(seed, mode.split()[0])
    vcpu = Vcpu(GuestMemory.from_pages(*pages), cpu=CpuModel(maxphyaddr=40, **cpu), tdp="npt" if "npt" in mode else "ept")
    vcpu.set_regs(**regs)
    return vcpu, gva, access
