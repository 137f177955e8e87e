"""Big page tables for the benchmarks, written with numpy: an address space of 4K pages, some of them absent, large or cold.

The tables of a guest lie in one numpy array, so that a competitor reads the very same words. The entries of each level lie
one after the other, leaf tables last; frames are a permutation, so that no two pages share one.
"""

from dataclasses import dataclass

import numpy as np

from kvmmu import Access, CpuModel, Ept, GuestMemory, Npt, Vcpu

PAGE = 0x1000
P, W, U, A, D, LARGE = 0x1, 0x2, 0x4, 0x20, 0x40, 0x80
FLAGS = P | W | U | A | D
EPT_RWX, EPT_WB = 0x7, 6 << 3
RESERVED = 1 << 51                                      # beyond MAXPHYADDR
MAXPHYADDR = 48
MODES = {                                               # levels, bits of index per level, registers without CR3
    "4-level": (4, 9, {"cr0": 0x80010033, "cr4": 0x7000A0, "efer": 0xD01}),
    "5-level": (5, 9, {"cr0": 0x80010033, "cr4": 0x7010A0, "efer": 0xD01}),
    "PAE": (3, 9, {"cr0": 0x80010033, "cr4": 0x3000A0, "efer": 0x800}),
    "2-level": (2, 10, {"cr0": 0x80010033, "cr4": 0x300090, "efer": 0}),
}


@dataclass(frozen=True)
class Mix:
    """Which part of the address space is absent (leaf entry not present), of large pages, and cold (A clear)."""

    absent: float = 0.01
    large: float = 0.05
    cold: float = 0.05


MIX = Mix()
WARM = Mix(absent=0, large=0, cold=0)


class Guest:
    """A vCPU over the tables of one address space.

    Parameters
    ----------
    pages : int
        Mapped 4K pages (large pages come on top of them); with `spread`, pages at all.
    mode : str
        A key of `MODES`.
    mix : Mix
    spread : bool
        One page in each leaf table, so that 32,768 of them extend over 64 GiB and neighbours share no upper level.
    leaf : {"4K", "2M", "1G"}
        "2M", "1G": every page is that large; `pages` counts them.
    change : callable, optional
        Takes (name, entries) for name "leaf" or "upper" (tables that point to leaf tables), and alters the entries in place.
    stage : tuple, optional
        ("ept" or "npt", "4K" or "2M"): all of it is L2's, over a second stage of such pages that is the identity.
    """

    def __init__(self, pages, mode="4-level", mix=MIX, *, spread=False, leaf="4K", change=None, stage=None, seed=1):
        self.mode, self.pages, self.mix = mode, pages, mix
        self.levels, self.bits, registers = MODES[mode]
        self.rng = np.random.default_rng(seed)
        self.spread, self.leaf_level = spread, {"4K": 1, "2M": 2, "1G": 3}[leaf]
        self.dtype = np.dtype(np.uint32 if mode == "2-level" else np.uint64)
        self.fan = 1 << self.bits
        self._lay_out()
        self._fill(change)
        self.cold = self._cold_words()
        memory = self.words.view(np.uint64)
        if stage is not None:
            memory = self._second_stage(memory, stage)
        self.memory = memory
        self.vcpu = Vcpu(GuestMemory(memory), cpu=CpuModel(maxphyaddr=MAXPHYADDR))
        self.root = PAGE
        own = {**registers, "cr3": self.root}
        if stage is None:
            self.vcpu.set_regs(**own)
        else:
            self.vcpu.set_regs(**MODES["4-level"][2], cr3=PAGE)
            self.vcpu.enter_nested(self.stage, **own)

    # ---- the tables ----------------------------------------------------------------------------------------------------

    def _lay_out(self):
        """How many entries each level has, and where its tables lie: upper levels first."""
        count = self.pages
        if self.leaf_level == 1 and not self.spread:
            count = -(-self.pages // self.fan)                                      # leaf tables
            directories = round(count / (1 - self.mix.large))
            self.is_large = np.zeros(directories, bool)
            self.is_large[self.rng.permutation(directories)[:directories - count]] = True
        elif self.leaf_level == 1:
            self.is_large = self.rng.random(self.pages) < self.mix.large
        else:
            self.is_large = np.ones(0, bool)
        entries = {self.leaf_level: count * self.fan if self.leaf_level == 1 else self.pages}
        if self.leaf_level == 1:
            entries[1] = int((~self.is_large).sum()) * self.fan
            entries[2] = self.is_large.size
        for level in range(max(self.leaf_level, 2 if self.leaf_level == 1 else 0) + 1, self.levels + 1):
            entries[level] = -(-entries[level - 1] // self.fan)
        assert entries[self.levels] <= (4 if self.mode == "PAE" else self.fan), "the pages exceed the address space"
        self.entries, self.base, at = entries, {}, PAGE
        for level in range(self.levels, self.leaf_level - 1, -1):
            self.base[level] = at
            at += -(-entries[level] // self.fan) * PAGE
        self.words = np.zeros(at // self.dtype.itemsize, self.dtype)

    def level(self, level):
        """The entries of a level, a view."""
        start = self.base[level] // self.dtype.itemsize
        return self.words[start:start + self.entries[level]]

    def _some(self, size, part):
        """Indices of a random part, without repetition."""
        return np.unique(self.rng.integers(0, size, round(-size * np.log1p(-part))))

    def _all_but(self, bit):
        return self.dtype.type(np.iinfo(self.dtype).max - bit)

    def _frames(self, count):
        """A permutation of 0 to the next power of two, cut to count: frames of different pages differ."""
        mask = np.uint64((1 << max(count - 1, 1).bit_length()) - 1)
        frames = np.arange(count, dtype=np.uint64)
        frames *= np.uint64(0x9E3779B1)
        frames &= mask
        return frames

    def _fill(self, change):
        for level in range(self.levels, self.leaf_level, -1):
            entries = self.level(level)
            tables = np.arange(entries.size, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(self.base[level - 1])
            flags = P if self.mode == "PAE" and level == 3 else FLAGS
            entries[:] = (tables | np.uint64(flags)).astype(self.dtype)
        if self.leaf_level > 1:
            shift = 12 + self.bits * (self.leaf_level - 1)
            self.level(self.leaf_level)[:] = self._frames(self.pages) << np.uint64(shift) | np.uint64(FLAGS | LARGE)
        else:
            upper = self.level(2)
            tables = np.cumsum(~self.is_large, dtype=np.uint64) - np.uint64(1)
            upper[:] = (tables * np.uint64(PAGE) + np.uint64(self.base[1]) | np.uint64(FLAGS)).astype(self.dtype)
            frames = self._frames(upper.size) << np.uint64(12 + self.bits)
            upper[self.is_large] = (frames | np.uint64(FLAGS | LARGE)).astype(self.dtype)[self.is_large]
            self._fill_leaves()
        if change is not None:
            change("leaf", self.level(self.leaf_level))
            if self.leaf_level < self.levels:
                change("upper", self.level(self.leaf_level + 1))

    def _fill_leaves(self):
        leaves = self.level(1)
        if not self.spread:
            frames = self._frames(leaves.size)
            frames <<= np.uint64(12)
            frames |= np.uint64(FLAGS)
            leaves[:] = frames
            self.used = None
        else:
            self.slot = self.rng.integers(0, self.fan, self.pages, np.int64)
            tables = np.cumsum(~self.is_large) - 1
            self.used = (tables * self.fan + self.slot)[~self.is_large]
            leaves[self.used] = (self._frames(self.used.size) << np.uint64(12) | np.uint64(FLAGS)).astype(self.dtype)
        if self.mix.absent:
            where = self.used if self.spread else None
            chosen = self._some(leaves.size if where is None else where.size, self.mix.absent)
            leaves[chosen if where is None else where[chosen]] &= self._all_but(P)

    def _cold_words(self):
        """Indices, in the level of the leaves, of the entries that are cold."""
        size = self.level(self.leaf_level).size
        if not self.mix.cold:
            return np.zeros(0, np.int64)
        if self.mix.cold == 1:
            return slice(None)
        if self.spread:
            return self.used[self._some(self.used.size, self.mix.cold)]
        return self._some(size, self.mix.cold)

    def chill(self):
        """Clear the A bits of the entries that are to be cold."""
        leaves = self.level(self.leaf_level)
        if isinstance(self.cold, slice):
            np.bitwise_and(leaves, self._all_but(A), out=leaves)
        elif self.cold.size:
            leaves[self.cold] &= self._all_but(A)

    # ---- the second stage ----------------------------------------------------------------------------------------------

    def _second_stage(self, memory, stage):
        """Tables for the identity behind the guest's own, which take part in one larger array."""
        kind, size = stage
        assert self.mode == "4-level"
        frames = 1 << 12 + self.bits + max(self.is_large.size - 1, 1).bit_length()
        span = max(memory.nbytes, 1 << 12 + max(self.level(1).size - 1, 1).bit_length(), frames)
        leaf, upper = (EPT_RWX | EPT_WB, EPT_RWX) if kind == "ept" else (FLAGS, FLAGS)
        entries = [-(-span // PAGE)] if size == "4K" else [-(-span // (PAGE << 9))]
        levels = [1] if size == "4K" else [2]
        while levels[-1] < 4:
            entries.append(-(-entries[-1] // 512))
            levels.append(levels[-1] + 1)
        start = at = memory.nbytes // PAGE * PAGE + PAGE * 512
        tables = {}
        for level, count in zip(reversed(levels), reversed(entries), strict=True):
            tables[level] = (at, count)
            at += -(-count // 512) * PAGE
        whole = np.zeros(at // 8, np.uint64)
        whole[:memory.size] = memory
        for level, (base, count) in tables.items():
            numbers = np.arange(count, dtype=np.uint64)
            if level == levels[0]:
                large = LARGE if level == 2 else 0
                words = numbers << np.uint64(12 if level == 1 else 21) | np.uint64(leaf | large)
            else:
                words = numbers * np.uint64(PAGE) + np.uint64(tables[level - 1][0]) | np.uint64(upper)
            whole[base // 8:base // 8 + count] = words
        self.words = whole[:memory.size].view(self.dtype)               # level() now looks into the larger array
        self.stage = Ept(start | 6 | 3 << 3) if kind == "ept" else Npt(start, cr4=0x20, efer=0xD00)
        return whole

    # ---- what to translate ---------------------------------------------------------------------------------------------

    @property
    def leaf_bytes(self):
        """Bytes of the tables that hold leaf entries, those of large pages aside."""
        return self.level(self.leaf_level).nbytes

    @property
    def span(self):
        """Bytes of linear address space."""
        shift = 12 + self.bits * (self.leaf_level - 1)
        return self.pages << shift if self.leaf_level > 1 else self.is_large.size << 12 + self.bits

    def addresses(self, rng, rows):
        """Random addresses, uint64 of shape (rows,)."""
        if not self.spread:
            return rng.integers(0, self.span, rows, np.uint64)
        number = rng.integers(0, self.pages, rows)
        page = (number << self.bits) + self.slot[number]
        return page.astype(np.uint64) << np.uint64(12) | rng.integers(0, PAGE, rows, np.uint64)

    def every_page(self, rng):
        """One address in each page, in random order."""
        shift = np.uint64(12 + self.bits * (self.leaf_level - 1))
        return rng.permutation(self.span >> int(shift)).astype(np.uint64) << shift

    def leaf_index(self, gva):
        """Index into `words` of the leaf entry of each address, for numpy.take."""
        page = (gva >> np.uint64(12)).astype(np.int64)
        if self.leaf_level > 1:
            return (page >> self.bits * (self.leaf_level - 1)) + self.base[self.leaf_level] // self.dtype.itemsize
        directory = page >> self.bits
        leaves = (np.cumsum(~self.is_large) - 1) * self.fan + self.base[1] // self.dtype.itemsize
        large = np.arange(self.is_large.size) + self.base[2] // self.dtype.itemsize
        first = np.where(self.is_large, large, leaves)
        return first[directory] + (page & self.fan - 1) * (~self.is_large)[directory]

    def expected(self, gva, taken):
        """What the taken entries say: the address, or all ones where they are not present."""
        taken = taken.astype(np.uint64)
        large = (taken & np.uint64(LARGE)) != 0
        shift = np.where(large, 12 + self.bits * max(self.leaf_level - 1, 1), 12).astype(np.uint64)
        offset = (np.uint64(1) << shift) - np.uint64(1)
        gpa = taken & ~np.uint64(PAGE - 1) & ~offset | gva & offset
        return np.where(taken & np.uint64(P), gpa, ~np.uint64(0))


def accesses(rng, rows):
    """Accesses of a user: reads, one in three a write, one in ten a fetch."""
    kinds = np.array([Access.USER] * 6 + [Access.USER | Access.WRITE] * 3 + [Access.USER | Access.FETCH], np.uint8)
    return kinds[rng.integers(0, kinds.size, rows, np.uint8)]
