# SPDX-License-Identifier: Apache-2.0
"""Batches in which nearly every row passes, and one thing is odd here and there: what goes straight through must notice it.

Each case is compared with the same rows walked one by one: columns, and memory afterwards.
"""

import ctypes
import mmap

import numpy as np
import pytest
from batch_machines import (
    COLUMNS,
    EPT_AD,
    Image,
    Machine,
    compare,
    dense_tables,
    random_access,
    random_rows,
    second_tables,
    sign_extended,
)
from builders import PAGE, mode_regs
from children import outcome
from machines import ACCESSES, PKE, SMAP, SMEP

from kvmmu import CpuModel, Ept, GuestMemory, Npt, Regs, Translation, Vcpu
from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

ROWS, LEAVES, UPPERS = 2500, 6, 4           # tables of level 1 and 2
CPU = CpuModel(maxphyaddr=40)
SETS = instruction_sets()
pytestmark = pytest.mark.usefixtures("same_instruction_set")
LARGE, NX, PKEY = 0x80, 1 << 63, 5 << 59
OFFSETS_2M = 0x1FF000

# name: (level of the entries, what is done to one)
ODD = {
    "leaf not present": (1, lambda word: word & ~1),
    "leaf read-only": (1, lambda word: word & ~2),
    "leaf of the supervisor": (1, lambda word: word & ~4),
    "leaf cold": (1, lambda word: word & ~0x60),
    "leaf clean": (1, lambda word: word & ~0x40),
    "leaf without execute": (1, lambda word: word | NX),
    "leaf with a key": (1, lambda word: word | PKEY),
    "leaf with a reserved bit": (1, lambda word: word | 1 << 45),
    "leaf with PAT": (1, lambda word: word | LARGE),
    "2M page": (2, lambda word: word & ~OFFSETS_2M | LARGE),
    "2M page, cold": (2, lambda word: word & ~OFFSETS_2M & ~0x60 | LARGE),
    "2M page with address bits that are reserved, or PSE-36": (2, lambda word: word & ~OFFSETS_2M | LARGE | 1 << 14),
    "2M page with a key": (2, lambda word: word & ~OFFSETS_2M | LARGE | PKEY),
    "2M page without execute": (2, lambda word: word & ~OFFSETS_2M | LARGE | NX),
    "table not present": (2, lambda word: word & ~1),
    "table read-only": (2, lambda word: word & ~2),
    "table of the supervisor": (2, lambda word: word & ~4),
    "table cold": (2, lambda word: word & ~0x20),
    "table without execute": (2, lambda word: word | NX),
}


def with_odd(rng, pages, mode, level, change, share):
    """Some entries of a level changed."""
    frames = sorted(pages)
    frames = frames[-LEAVES:] if level == 1 else frames[-LEAVES - UPPERS:-LEAVES]
    for frame in frames:
        words = pages[frame].view(np.uint32) if mode == "32" else pages[frame]
        for at in np.flatnonzero(rng.random(words.size) < share).tolist():
            words[at] = change(int(words[at])) & (0xFFFFFFFF if mode == "32" else (1 << 64) - 1)


def machine_of(rng, mode, pages, root, stage=None, cpu=CPU):
    regs = mode_regs(mode, root << 12)
    regs["cr4"] |= SMEP | SMAP | (PKE if mode in ("4l", "5l") else 0)
    pdptrs = tuple(int(word) for word in pages[root][:4]) if mode == "pae" else None
    # key 0 denies nothing, the others everything
    return Machine(Image(pages), cpu, [(Regs(**regs, pkru=0xFFFFFFFC if mode in ("4l", "5l") else 0, pdptrs=pdptrs), stage)])


def check(rng, machine, rows, why):
    for name in SETS:
        use_instruction_set(name)
        for access in (4, random_access(rng, rows.size, "any"), rng.choice(np.array(ACCESSES[:4], np.uint8), rows.size)):
            compare(machine, rows, access, fields=COLUMNS[:4], why=f"{why}, {name}")


@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
@pytest.mark.parametrize("what", ODD)
def test_one_odd_thing(mode, what):
    """One in 40 entries."""
    rng = np.random.default_rng((list(ODD).index(what), len(mode), mode == "5l"))
    pages, root = dense_tables(rng, mode, odd=0, upper_odd=0)
    with_odd(rng, pages, mode, *ODD[what], 0.025)
    check(rng, machine_of(rng, mode, pages, root), random_rows(rng, ROWS, mode, pages=900, stray=0.002, regions=200), what)


@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_tables_among_large_pages(mode, share):
    """Most entries of level 2 are large pages, the others lead to tables; and the other way round, over much address space."""
    rng = np.random.default_rng((7, len(mode), mode == "5l", int(share * 100)))
    base = 0x400 - {"32": 1, "pae": 5, "4l": 7, "5l": 9}[mode]  # the first table of level 1 lies where a large page may lie
    for shares in (1 - share, share):
        pages, root = dense_tables(rng, mode, base=base, odd=0, upper_odd=0)
        with_odd(rng, pages, mode, *ODD["2M page"], shares)
        machine = machine_of(rng, mode, pages, root)
        check(rng, machine, random_rows(rng, ROWS, mode, pages=2000, stray=0.001, regions=2000), f"{shares}")
        # all of one gigabyte, so that tables of level 2 are remembered whole, and addresses beside it
        near = rng.integers(0, 1 << 30, ROWS, np.uint64) | np.uint64(1 << 30)
        near[rng.random(ROWS) < 0.01] ^= np.uint64(1 << (31 if mode in ("32", "pae") else 47))
        check(rng, machine, sign_extended(near, "32") if mode in ("32", "pae") else near, f"near, {shares}")


@pytest.mark.parametrize("mode", ["4l", "5l"])
@pytest.mark.parametrize("gbpages", [False, True])
def test_pages_of_1g(mode, gbpages):
    """All entries of level 3 are leaves, on a processor that has such pages, and on one where their bit is reserved."""
    rng = np.random.default_rng((8, mode == "5l", gbpages))
    pages, root = dense_tables(rng, mode, odd=0, upper_odd=0)
    for frame in sorted(pages)[-LEAVES - UPPERS - 2:-LEAVES - UPPERS]:
        pages[frame][:] = np.arange(512, dtype=np.uint64) % np.uint64(512) << np.uint64(30) | np.uint64(0xE7)
    machine = machine_of(rng, mode, pages, root, cpu=CpuModel(maxphyaddr=40, gbpages=gbpages))
    check(rng, machine, random_rows(rng, ROWS, mode, pages=2000, stray=0.001, regions=2000), f"{gbpages}")


EPT_ODD = {
    "leaf without read": (1, lambda word: word & ~1),
    "leaf without write": (1, lambda word: word & ~2),
    "leaf without execute": (1, lambda word: word & ~4),
    "leaf of another memory type": (1, lambda word: word & ~0x38),
    "all leaves of a bad memory type": (1, lambda word: word & ~0x38 | 2 << 3),
    "leaf of a memory type that is reserved": (1, lambda word: word & ~0x38 | 3 << 3),
    "leaf cold": (1, lambda word: word & ~EPT_AD),
    "leaf clean": (1, lambda word: word & ~0x200),
    "leaf with a reserved bit": (1, lambda word: word | 1 << 45),
    "leaf not present": (1, lambda _: 0),
    "table without write": (2, lambda word: word & ~2),
}


def in_npt(what):
    """What comes nearest to it in an entry of NPT."""
    for name, bits in (("not present", 1), ("cold", 0x60), ("clean", 0x40)):
        if name in what:
            return lambda word: word & ~bits
    return lambda word: word & ~2


@pytest.mark.parametrize("kind", ["ept4", "4l", "pae", "32"])
@pytest.mark.parametrize("what", EPT_ODD)
@pytest.mark.parametrize("mode", ["4l", "32"])
def test_one_odd_thing_in_the_second_stage(kind, mode, what):
    """The same below a guest whose tables are sound."""
    rng = np.random.default_rng((11, list(EPT_ODD).index(what), len(kind), len(mode)))
    level, change = EPT_ODD[what]
    if kind != "ept4":
        change = in_npt(what)
    pages, root = dense_tables(rng, mode, odd=0, upper_odd=0)
    second, start = second_tables(rng, kind)
    share = 1 if "bad" in what else 0.02
    n = 1024 if kind == "32" else 512
    words = second[sorted(second)[0 if level == 1 else 1024 // n]]
    words = words.view(np.uint32) if kind == "32" else words
    first = 0x60 if level == 1 else 0                       # the frames of the guest's own tables are left alone
    for at in range(first, n if level == 1 else 2):
        if rng.random() < (share if level == 1 else 0.5) and words[at]:
            words[at] = change(int(words[at]))
    stage = Ept(start << 12 | 6 | 3 << 3 | 1 << 6) if kind == "ept4" else Npt(
        start << 12, cr4={"32": 0x10}.get(kind, 0x20), efer=0x500 if kind == "4l" else 0)
    machine = machine_of(rng, mode, {**pages, **second}, root, stage)
    check(rng, machine, random_rows(rng, ROWS, mode, pages=900, stray=0.001, regions=60), f"{kind}, {what}")


def test_contexts_that_change_from_row_to_row():
    """Rows wait for others of their context: more contexts than can wait, of two modes, some of them seldom."""
    rng = np.random.default_rng(13)
    pages, root = dense_tables(rng, "4l", odd=0.01, upper_odd=0)
    other, second_root = dense_tables(rng, "32", base=0x40, odd=0.01, upper_odd=0)
    sets = []
    for number in range(150):
        if number % 3:
            regs = mode_regs("4l", root << 12)
            sets.append((Regs(**regs | {"cr4": regs["cr4"] | SMEP * (number % 2) | SMAP * (number % 5 == 0)}), None))
        else:
            sets.append((Regs(**mode_regs("32", second_root << 12)), None))
    machine = Machine(Image({**pages, **other}), CPU, sets)
    rows = random_rows(rng, 6000, "4l", pages=900, stray=0.002, regions=20)
    for few in (2, 7, 70, 150):
        for run in (1, 5, 30):
            ctx = np.repeat(rng.integers(0, few, rows.size, np.uint32), run)[:rows.size].copy()
            ctx[rng.random(rows.size) < 0.01] = rng.integers(0, 150)
            for name in SETS:
                use_instruction_set(name)
                access = random_access(rng, rows.size, "mostly")
                compare(machine, rows, access, ctx, fields=COLUMNS[:4], why=f"{few}, {run}, {name}", any_order=True)


@pytest.mark.parametrize("mode", ["4l", "5l", "32", "pae"])
@pytest.mark.parametrize("what", ODD)
def test_contexts_that_read_the_same_tables(mode, what):
    """Blocks of several contexts: what passes in one of them and not in another, by WP, SMEP, SMAP, NXE and keys."""
    rng = np.random.default_rng(17)
    level, change = ODD[what]
    pages, root = dense_tables(rng, mode, odd=0, upper_odd=0)
    with_odd(rng, pages, mode, level, change, 0.02)
    regs = mode_regs(mode, root << 12)
    pdptrs = tuple(int(word) for word in pages[root][:4]) if mode == "pae" else None
    sets = []
    for number in range(40):
        off = {"cr0": regs["cr0"] & ~(0x10000 * (number & 1)), "efer": regs["efer"] & ~(0x800 * (number % 20 == 7)),
               "cr3": regs["cr3"] | 8 * (number >> 1 & 1),
               "cr4": regs["cr4"] | SMEP * (number >> 2 & 1) | SMAP * (number >> 3 & 1) | PKE * (number >> 4 & 1)}
        pkru = 0xFFFFFFFF if number == 30 else int(rng.integers(1 << 30)) << 2      # key 0 denies nothing, but in one of them
        sets.append((Regs(**regs | off, pkru=pkru, pdptrs=pdptrs), None))
    sets.append((Regs(cr0=0x11, cr3=0, cr4=0, efer=0), None))
    machine = Machine(Image(pages), CPU, sets)
    rows = random_rows(rng, ROWS, mode, pages=900, stray=0.002, regions=20)
    ctx = rng.integers(0, 41, ROWS, np.uint32)
    ctx[ROWS // 2:] = rng.integers(0, 2, ROWS - ROWS // 2, np.uint32)               # an end that nearly always passes
    for name in SETS:
        use_instruction_set(name)
        for access in (4, random_access(rng, ROWS, "any"), rng.choice(np.array(ACCESSES[:4], np.uint8), ROWS)):
            compare(machine, rows, access, ctx, fields=COLUMNS[:4], why=f"{what}, {name}", any_order=True)


def test_nothing_is_read_behind_a_column_of_cold_rows():
    """Uniform blocks of two stages whose rows all lack their accessed bit in the first one, before a page that cannot be read."""
    rows = 128
    mem, frames = GuestMemory(4 << 20), np.arange(512, dtype=np.uint64) << np.uint64(12)
    for table, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x100000, 0x101107), (0x101000, 0x102107),
                         (0x102000, 0x103107)):
        mem.write_u64(table, entry)
    mem.write(0x4000, np.where(frames < 64 * PAGE, 0, frames | np.uint64(7)).tobytes())     # a block not present, then cold ones
    mem.write(0x103000, (frames | np.uint64(EPT_AD | 0x37)).tobytes())
    vcpu = Vcpu(mem, cpu=CPU)
    vcpu.enter_nested(Ept(0x10005E), **mode_regs("4l", 0x1000))
    area = mmap.mmap(-1, 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    out = Translation(gpa=np.frombuffer(area, np.uint64, rows, PAGE - 8 * rows), status=np.zeros(rows, np.uint8))

    def translate():
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + PAGE), PAGE, 0) == 0
        vcpu.gva_walk.translate(frames[:rows], 0, fields=("gpa", "status"), out=out)
        assert out.status.tolist() == [1] * 64 + [0] * 64
        assert np.array_equal(out.gpa[64:], frames[64:rows])

    assert outcome(translate) == (0, "ok NoneType")
