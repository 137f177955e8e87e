# SPDX-License-Identifier: Apache-2.0
"""Large batches against the same rows walked one by one: columns and memory, bit for bit, for every instruction set.

A batch of more than a few rows remembers upper levels and translations, and judges 64 rows side by side; batches of fewer rows
are walked one by one by the scalar walk, which is what counts.  KVMMU_EQUALITY_ROUNDS multiplies the number of random
cases.
"""

import os
import threading

import numpy as np
import pytest
from batch_machines import (
    COLUMNS,
    EPT_AD,
    Image,
    Machine,
    compare,
    dense_ept,
    dense_tables,
    random_access,
    random_controls,
    random_rows,
    row_by_row,
    rows_of_many_tables,
    second_tables,
    sign_extended,
    stage_of,
)
from builders import LEVELS, PageTables, mode_regs, random_tables, words_to_pages
from machines import WP, A, D, snapshot
from random_guests import random_registers

from kvmmu import Access, CpuModel, GeneralProtection, GuestMemory, Pml, Regs, Status, Translation, Vcpu
from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

ROUNDS = int(os.environ.get("KVMMU_EQUALITY_ROUNDS", "1"))
MODES = ("32", "pae", "4l", "5l")
GUEST = 1024                            # frames that a second stage maps
HOSTS = ("ept4", "ept5", "4l", "5l", "pae", "32")
CONFORMANCE = ("sdm", "kvm")
ONE_STAGE = COLUMNS[:8]
FIELDS = (COLUMNS[:3], COLUMNS[:4], ("level",), ("gpa",), ("status",), ("error_code", "level"), COLUMNS,
          ("pte", "level"), ("pte_access", "refs"), ("gpa", "pte_gpa"), ("pte", "pte_access", "refs", "status"), ("ngpa", "gpa"))
SETS = instruction_sets()
pytestmark = pytest.mark.usefixtures("same_instruction_set")


def sizes(rng, many=False):
    """Rows of a batch: a few, some blocks, or many."""
    return int(rng.choice([rng.integers(1, 70), rng.integers(60, 301), 20_000 if many else 2500], p=(0.3, 0.4, 0.3)))


def columns_of(rng):
    return FIELDS[int(rng.choice(len(FIELDS), p=[0.25, 0.15] + [0.06] * 10))]


def layout(rng, pages, root=None):
    """An Image of pages, some of them read-only, some missing (seldom the root)."""
    pages, slots = dict(pages), str(rng.choice(["pages", "pages", "runs", "each"]))
    readonly = frozenset(frame for frame in pages if slots != "pages" and rng.random() < 0.2)
    if rng.random() < 0.4:
        gone = int(rng.choice(list(pages)))
        if gone != root or rng.random() < 0.1:
            del pages[gone]
    return Image(pages, readonly, slots)


def cpu_model(rng, conformance):
    return CpuModel(vendor=str(rng.choice(["intel", "amd"])), maxphyaddr=int(rng.choice([36, 40, 46, 52])),
                    gbpages=bool(rng.integers(4)), pse36=bool(rng.integers(2)), conformance=conformance)


def some_rows(rng, n, mode):
    return random_rows(rng, n, mode, pages=int(rng.choice([1, 5, 60, 1000])), stray=float(rng.choice([0, 0.002, 0.02, 0.3])),
                       regions=int(rng.choice([1, 4, 50])))


def rates(rng):
    """How many entries are odd: in last tables, and above."""
    return {"odd": float(rng.choice([0, 0.004, 0.03, 0.4])), "upper_odd": float(rng.choice([0, 0.02, 0.15])),
            "cold": float(rng.choice([0, 0, 0.05, 1]))}


def check(machine, rng, rows, ctx=None, *, why, any_order=False, **how):
    """compare() with an instruction set, columns, accesses and stores by chance."""
    name = str(rng.choice(SETS))
    use_instruction_set(name)
    fields, set_ad = columns_of(rng), bool(rng.integers(3))
    access = random_access(rng, rows.size)
    return compare(machine, rows, access, ctx, fields=fields, set_ad=set_ad, any_order=any_order,
                   why=f"{why}, {name}, set_ad={set_ad}, {fields}", **how)


# ---- one stage ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conformance", CONFORMANCE)
def test_dense_tables(mode, conformance):
    """Every index leads somewhere, entries are odd at every level, tables are shared; blocks pass, nearly pass, and fail."""
    for seed in range(8 * ROUNDS):
        rng = np.random.default_rng((1, seed, MODES.index(mode), CONFORMANCE.index(conformance)))
        pages, root = dense_tables(rng, mode, maxphyaddr=40, **rates(rng))
        image, regs = layout(rng, pages, root), random_controls(rng, mode, root, pages)
        machine = Machine(image, cpu_model(rng, conformance), [(regs, None)])
        rows = some_rows(rng, sizes(rng, many=seed == 0), mode)
        try:
            check(machine, rng, rows, why=f"{mode} seed {seed}")
        except GeneralProtection:               # a reserved bit of CR3 or a PDPTE on this processor
            continue


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conformance", CONFORMANCE)
def test_adversarial_tables(mode, conformance):
    """Self references, reserved bits, random words: the tables of the differential tests, with rows from hot to scattered."""
    walked = 0
    for seed in range(6 * ROUNDS):
        rng = np.random.default_rng((2, seed, MODES.index(mode), CONFORMANCE.index(conformance)))
        tables = random_tables(rng, mode, gvas=300)
        gpas, data = words_to_pages(tables.words)
        image = layout(rng, dict(zip((gpas >> np.uint64(12)).tolist(), data, strict=True)), tables.cr3 >> 12)
        machine = Machine(image, CpuModel(maxphyaddr=40, conformance=conformance,
                                          vendor=str(rng.choice(["intel", "amd"]))),
                          [(Regs(**random_registers(rng, mode, tables.cr3)), None)])
        n = sizes(rng)
        rows = rng.choice(np.array(tables.gvas, np.uint64)[:int(rng.choice([3, 30, 300]))], n)
        try:
            check(machine, rng, rows, why=f"{mode} seed {seed}")
            walked += 1
        except GeneralProtection:
            continue
    assert walked > ROUNDS


@pytest.mark.parametrize("mode", ["4l", "5l", "ept4"])
@pytest.mark.parametrize("name", SETS)
def test_more_tables_than_are_remembered(mode, name):
    """46,080 last tables, a few frames behind them: most are found again by the entry above."""
    use_instruction_set(name)
    for seed in range(3 * ROUNDS):
        rng = np.random.default_rng((12, seed, len(mode), MODES.index(mode) if mode in MODES else 9))
        odd = {"odd": 0.01, "upper_odd": (0.02, 0.15, 0.02)[seed % 3], "cold": (0, 0.4, 0.05)[seed % 3]}
        if mode == "ept4":
            pages, root = dense_ept(rng, **odd)
            regs, stage = Regs(cr0=1, cr3=0, cr4=0, efer=0), stage_of(rng, "ept4", root, ad=True, mbec=False)
            rows = rows_of_many_tables(rng, 90_000, 40)
        else:
            pages, root = dense_tables(rng, mode, maxphyaddr=40, **odd)
            regs, stage = random_controls(rng, mode, root), None
            rows = sign_extended(rows_of_many_tables(rng, 90_000, 57 if mode == "5l" else 48), mode)
        readonly = frozenset(pages) if seed % 3 == 1 else frozenset()
        machine = Machine(Image(pages, readonly, "runs"), CpuModel(maxphyaddr=40), [(regs, stage)], nested=stage is not None)
        compare(machine, rows, random_access(rng, rows.size), fields=COLUMNS[:4], set_ad=seed % 3 < 2, why=f"{mode} seed {seed}")


@pytest.mark.parametrize("name", SETS)
def test_a_table_of_entries_of_both_sizes(name):
    """Accessed and dirty bits of a 4-byte entry are address bits of the 8-byte entry around it: rows keep their order."""
    use_instruction_set(name)
    mem = GuestMemory(16 << 12)
    leaf, pml4, pdpt, directory, small = (frame << 12 for frame in range(1, 6))
    for table, below in ((pml4, pdpt), (pdpt, directory), (directory, leaf)):
        mem.write_u64(table, below | 0x67)
    mem.write_u64(small, leaf | 0x67)
    mem.write_u64(leaf, 7 << 32 | 0x9067)                               # the upper half: frame 0, neither accessed nor dirty
    long, short = Regs(**mode_regs("4l", pml4)), Regs(**mode_regs("32", small))
    walk = Vcpu(mem, cpu=CpuModel(maxphyaddr=46)).gva_walk
    ctx = np.zeros(300, np.uint32)
    ctx[[150, 155, 160]] = 1
    t = walk.translate(np.where(ctx == 1, np.uint64(0x1000), np.uint64(0)), np.where(ctx == 1, 2, 0).astype(np.uint8),
                       regs=[long, short], ctx=ctx)
    assert not t.status.any()
    assert np.array_equal(np.where(ctx == 1, 0, np.where(np.arange(300) < 150, 0x700009000, 0x6700009000)), t.gpa)


@pytest.mark.parametrize("mode", ["off", *MODES])
@pytest.mark.parametrize("name", SETS)
def test_every_number_of_rows(mode, name):
    """1 to 300 rows of sound tables with some odd entries, for each instruction set."""
    use_instruction_set(name)
    rng = np.random.default_rng((3, ["off", *MODES].index(mode)))
    pages, root = dense_tables(rng, "4l" if mode == "off" else mode, odd=0.03)
    machine = Machine(Image(pages), CpuModel(maxphyaddr=40), [(random_controls(rng, mode, root, pages), None)])
    walk, regs = machine.start()
    rows, access = random_rows(rng, 300, mode, pages=40), random_access(rng, 300, "mostly")
    want = row_by_row(walk, rows, access, regs=regs, fields=ONE_STAGE, set_ad=False)
    for n in [*range(1, 300, 1 if ROUNDS > 1 else 6), 300]:
        for fields in (ONE_STAGE[:3], ONE_STAGE):
            t = walk.translate(rows[:n], access[:n], regs=regs, fields=fields, set_ad=False)
            for column in fields:
                assert np.array_equal(getattr(want, column)[:n], getattr(t, column)), f"{n} rows: {column}"


@pytest.mark.parametrize("mode", ["4l", "5l"])
@pytest.mark.parametrize("name", SETS)
def test_addresses_that_differ_from_a_known_one_in_high_bits(mode, name):
    """A canonical address, and the same low bits with each high bit changed: not the translation remembered."""
    use_instruction_set(name)
    tables = PageTables(mode)
    low, high = 0x7FFF_1234_5000, (1 << 64) - 0x1000_0000
    for gva in (low, high):
        tables.map(gva, 0x5000, "p w u a d")
    gpas, data = tables.pages()
    machine = Machine(Image(dict(zip((gpas >> np.uint64(12)).tolist(), data, strict=True))), CpuModel(maxphyaddr=40),
                      [(Regs(**tables.regs()), None)])
    width = 57 if mode == "5l" else 48
    bad = [gva ^ 1 << bit for gva in (low, high) for bit in range(width - 1, 64)]
    bad += [gva ^ (1 << 64) - (1 << first) for gva in (low, high) for first in range(width - 1, 64)]
    rng = np.random.default_rng(4)
    for share in (0.002, 0.02, 0.5):
        rows = np.where(rng.random(3000) < share, rng.choice(np.array(bad, np.uint64), 3000),
                        rng.choice(np.array([low, high], np.uint64), 3000))
        for fields in (COLUMNS[:3], ONE_STAGE):
            compare(machine, rows, 4, fields=fields, why=f"{share}")
    walk, regs = machine.start()
    t = walk.translate(np.array([low, high] * 100 + bad * 20, np.uint64), 4, regs=regs)
    assert not t.status[:200].any()
    assert (t.status[200:] == Status.NON_CANONICAL).sum() >= 20 * (len(bad) - 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SETS)
def test_cold_entries_of_every_level(mode, name):
    """One cold page many times in a block, for reads and for writes, then warm; A and D where a walk sets them, nowhere else."""
    use_instruction_set(name)
    for n in (8, 64, 300):
        for access in (Access.READ, Access.WRITE, np.array([0] * (n - 1) + [2], np.uint8)):
            tables = PageTables(mode)
            gvas = [0x40201000, 0x40202000, 0x40600000, 0x80000000]
            for gva in gvas:
                tables.map(gva, 0x5000, "p w u")
            gpas, data = tables.pages()
            pdptrs = tables.pdptrs() if mode == "pae" else None
            image = Image(dict(zip((gpas >> np.uint64(12)).tolist(), data, strict=True)))
            machine = Machine(image, CpuModel(maxphyaddr=40), [(Regs(**tables.regs(), pdptrs=pdptrs), None)])
            rows = np.resize(np.array(gvas, np.uint64), n)
            for fields in (COLUMNS[:3], ONE_STAGE):
                compare(machine, rows, access, fields=fields, why=f"{n} rows")
    walk, regs = machine.start()
    walk.translate(rows, 2, regs=regs)
    for gva in gvas:
        for level in range(LEVELS[mode] - (mode == "pae"), 0, -1):
            assert tables.entry(gva, level) | A | (D if level == 1 else 0) == (
                walk.mem.read_u64(tables.entry_gpa(gva, level) & ~7) >> 8 * (tables.entry_gpa(gva, level) & 4)
                & (0xFFFFFFFF if mode == "32" else (1 << 64) - 1))


@pytest.mark.parametrize("mode", MODES)
def test_self_mapped_tables(mode):
    """Every level points to its own table now and then: exact without stores, the same memory with them."""
    for seed in range(4 * ROUNDS):
        rng = np.random.default_rng((5, seed, MODES.index(mode)))
        pages, root = dense_tables(rng, mode, cold=0.5, leaves=2)
        for frame, words in pages.items():
            if mode == "pae" and frame == root:
                continue
            entries = words.view(np.uint32) if mode == "32" else words
            entries[rng.random(entries.size) < 0.3] = frame << 12 | 7
        machine = Machine(Image(pages), CpuModel(maxphyaddr=40), [(random_controls(rng, mode, root, pages), None)])
        rows, access = random_rows(rng, 700, mode, regions=10), random_access(rng, 700)
        for name in SETS:
            use_instruction_set(name)
            compare(machine, rows, access, fields=ONE_STAGE, set_ad=False, why=f"seed {seed}, {name}")
            compare(machine, rows, access, fields=ONE_STAGE, why=f"seed {seed}, {name}")


# ---- register sets ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SETS)
def test_what_passes_one_register_set_may_not_pass_another(name):
    """Write-protected pages under WP=0, then, four register sets later, under WP=1: none of these writes passes."""
    use_instruction_set(name)
    tables = PageTables("4l")
    for page in range(32):
        tables.map(page << 12, 0x5000, "p a d", upper="p w a")
    gpas, data = tables.pages()
    regs = tables.regs()
    sets = [(Regs(**regs | {"cr0": regs["cr0"] & ~WP}), None)] * 4 + [(Regs(**regs), None)]
    machine = Machine(Image(dict(zip((gpas >> np.uint64(12)).tolist(), data, strict=True))), CpuModel(maxphyaddr=40), sets)
    absent, present = np.arange(32, 96, dtype=np.uint64) << np.uint64(12), np.arange(64, dtype=np.uint64) % 32 << np.uint64(12)
    rows = np.concatenate([absent, absent, absent, present, present, present, present])
    ctx = np.repeat(np.array([0, 0, 0, 1, 2, 3, 4], np.uint32), 64)
    compare(machine, rows, 2, ctx, why="WP")


def mixed_sets(rng, count, two_stages):
    """(pages, sets) of many register sets over tables of all modes; second stages that are shared, of their own, or none."""
    pages, roots, base = {}, {}, 0x100
    for mode in MODES:
        made, roots[mode] = dense_tables(rng, mode, base=base, odd=0.03, cold=0.1)
        pages |= made
        base += len(made)
    stages, regs = [None], {}
    if two_stages:
        for kind in rng.choice(HOSTS, 4):
            made, root = second_tables(rng, kind, base=base, odd=float(rng.choice([0, 0.02])), cold=float(rng.choice([0, 0.05])))
            pages |= made
            base += len(made)
            stages.append(stage_of(rng, kind, root))
    while len(regs) < count:
        mode = str(rng.choice(["off", *MODES], p=(0.1, 0.15, 0.15, 0.4, 0.2)))
        made = random_controls(rng, mode, roots.get(mode, 0), pages)
        regs[made, stages[int(rng.integers(len(stages)))], len(regs)] = None
    return pages, [(made, stage) for made, stage, _ in regs]


@pytest.mark.parametrize("count", [2, 8, 300])
@pytest.mark.parametrize("two_stages", [False, True])
@pytest.mark.parametrize("conformance", CONFORMANCE)
def test_a_register_set_for_each_row(count, two_stages, conformance):
    """In runs, alternating, and at random, with second stages that differ and that are shared."""
    for seed in range(2 * ROUNDS):
        rng = np.random.default_rng((6, seed, count, two_stages, CONFORMANCE.index(conformance)))
        pages, sets = mixed_sets(rng, count, two_stages)
        machine = Machine(layout(rng, pages), CpuModel(maxphyaddr=40, conformance=conformance), sets)
        n = sizes(rng) if seed else 4000
        ctx = rng.integers(0, count, n).astype(np.uint32)
        if rng.random() < 0.6:
            ctx = np.repeat(ctx, int(rng.choice([3, 20, 64, 100])))[:n]
        rows = random_rows(rng, n, str(rng.choice(["4l", "32", "5l"])), pages=int(rng.choice([3, 50])))
        check(machine, rng, rows, ctx, why=f"seed {seed}", any_order=two_stages)


# ---- two stages ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("conformance", CONFORMANCE)
def test_two_stages(kind, conformance):
    """Guests of every mode over EPT and NPT with odd entries and cold bits in both; and the second stage alone."""
    walked = in_order = 0
    for seed in range(8 * ROUNDS):
        rng = np.random.default_rng((7, seed, HOSTS.index(kind), CONFORMANCE.index(conformance)))
        mode = str(rng.choice(["off", *MODES], p=(0.1, 0.15, 0.15, 0.4, 0.2)))
        guest = rates(rng)
        pages, root = dense_tables(rng, "4l" if mode == "off" else mode, frames=int(rng.choice([GUEST, 2 * GUEST])), **guest)
        made, host = second_tables(rng, kind, **rates(rng) | {"upper_odd": float(rng.choice([0, 0.02]))})
        image = layout(rng, pages | made, host)
        cpu = CpuModel(vendor=str(rng.choice(["intel", "amd"])), maxphyaddr=int(rng.choice([40, 46])), conformance=conformance,
                       gbpages=bool(rng.integers(2)), pse36=bool(rng.integers(2)))
        machine = Machine(image, cpu, [(random_controls(rng, mode, root, pages), stage_of(rng, kind, host))],
                          nested=seed % 3 == 2)
        n = sizes(rng, many=seed == 0)
        if machine.nested:
            rows = rng.integers(0, 3 << 21, n, np.uint64)
            rows[rng.random(n) < 0.02] ^= np.uint64(1) << np.uint64(rng.integers(22, 64))
            rows = rng.choice(rows, n) if rng.integers(2) else rng.choice(rows[:20], n)
        else:
            rows = some_rows(rng, n, mode)
        try:
            in_order += not check(machine, rng, rows, why=f"{mode} on {kind}, seed {seed}", any_order=True)
            walked += 1
        except GeneralProtection:
            continue
    assert walked > 4 * ROUNDS
    assert in_order <= 1 + walked // 6      # tables that depend on the order of rows are few


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("mode", MODES)
def test_accessed_bits_in_pages_that_the_second_stage_may_not_write(mode, name):
    """EPT without accessed bits: tables are read, but each update of an entry is a write of its own."""
    use_instruction_set(name)
    refused = set_bits = 0
    for seed in range(4 * ROUNDS):
        rng = np.random.default_rng((9, seed, MODES.index(mode)))
        pages, root = dense_tables(rng, mode, odd=0, upper_odd=0, cold=0.3)
        made, host = second_tables(rng, "ept4")
        tables = np.array(list(pages))
        made[0x60][rng.choice(tables, tables.size // 2, replace=False)] &= ~np.uint64(2)
        stage = stage_of(rng, "ept4", host, ad=False)
        regs = random_controls(rng, mode, root, pages)
        machine = Machine(layout(rng, pages | made, host), CpuModel(maxphyaddr=40), [(regs, stage)])
        gva, access = some_rows(rng, 700, mode), random_access(rng, 700)
        try:
            assert compare(machine, gva, access, why=f"seed {seed}")
        except GeneralProtection:
            continue
        walk, regs = machine.start()
        before = snapshot(walk.mem)
        refused += (walk.translate(gva, access, regs=regs).status == Status.EPT_VIOLATION).sum()
        set_bits += before != snapshot(walk.mem)
    assert refused > ROUNDS
    assert set_bits > 0


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("room", [0, 1, 7, 40, 511])
def test_a_log_that_fills_up_in_the_middle_of_a_batch(name, room):
    """As many pages as there was room are logged, once each; whoever writes one of the others finds the log full."""
    use_instruction_set(name)
    rng = np.random.default_rng((8, room))
    pages, _ = dense_tables(rng, "4l", odd=0, upper_odd=0)
    made, host = second_tables(rng, "ept4")
    log, tables = 0x90, list(pages)
    for frame, words in made.items():
        if words[0] & np.uint64(0x200) and frame < 0x62:
            words &= ~np.uint64(EPT_AD)
    for frame in tables:                            # only pages of data are still clean
        made[0x60][frame] |= np.uint64(EPT_AD)
    image = Image(pages | made | {log: np.zeros(512, np.uint64)})
    index = room - 1 & 0xFFFF
    stage = stage_of(rng, "ept4", host, ad=True, mbec=False, pml=Pml(log << 12, index))
    machine = Machine(image, CpuModel(maxphyaddr=40), [(Regs(cr0=1, cr3=0, cr4=0, efer=0), stage)])
    rows = rng.integers(0x100, 0x140, 900, np.uint64) << np.uint64(12)
    access = rng.choice(np.array([0, 2], np.uint8), 900)
    for columns in (COLUMNS[:3], COLUMNS):
        walk, regs = machine.start()
        t = walk.translate(rows, access, regs=regs, fields=columns)
        words = np.frombuffer(walk.mem.read(log << 12, 4096), np.uint64)
        logged = words[words != 0]
        written = np.unique(rows[access == 2])
        assert np.unique(logged).size == logged.size == min(room, written.size)
        assert np.isin(logged, written).all()
        full = (access == 2) & ~np.isin(rows, logged)
        assert np.array_equal(full, t.status == Status.PML_FULL)
        assert not t.status[~full].any()
        want = row_by_row(walk, rows, access, regs=regs, fields=columns, set_ad=False)
        assert np.array_equal(want.status, t.status)
        assert np.array_equal(want.gpa, t.gpa)


# ---- threads ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("two_stages", [False, True])
def test_threads_share_a_batch(two_stages):
    """Two and three threads over cold tables: the answers and the memory of the rows one by one."""
    for seed in range(2 * ROUNDS):
        rng = np.random.default_rng((9, seed, two_stages))
        pages, root = dense_tables(rng, "4l", odd=0.02, cold=0.7)
        stage = None
        if two_stages:
            made, host = second_tables(rng, "ept4", cold=0.7, odd=0.01)
            pages, stage = pages | made, stage_of(rng, "ept4", host, ad=bool(seed % 2))
        machine = Machine(Image(pages), CpuModel(maxphyaddr=40), [(random_controls(rng, "4l", root, pages), stage)])
        rows, access = random_rows(rng, 6000, "4l", pages=300), random_access(rng, 6000, "any")
        for threads in (2, 3):
            compare(machine, rows, access, fields=COLUMNS[:4], threads=threads, why=f"seed {seed}")


def test_batches_of_two_threads_at_once():
    """Two calls over one memory, each with rows of its own: what each of them gives alone."""
    rng = np.random.default_rng(10)
    pages, root = dense_tables(rng, "5l", odd=0.02, cold=0.7)
    machine = Machine(Image(pages), CpuModel(maxphyaddr=40), [(random_controls(rng, "5l", root, pages), None)])
    parts = [(random_rows(rng, 5000, "5l", pages=200), random_access(rng, 5000, "any")) for _ in range(2)]
    walk, regs = machine.start()
    want = [row_by_row(walk, *part, regs=regs, fields=COLUMNS[:4], set_ad=True) for part in parts]
    image = snapshot(walk.mem)
    for _ in range(4 * ROUNDS):
        walk, regs = machine.start()
        got = [Translation.empty(5000, COLUMNS[:4]) for _ in parts]
        start = threading.Barrier(2)

        def run(number, walk=walk, regs=regs, got=got, start=start):
            start.wait()
            walk.translate(*parts[number], regs=regs, fields=COLUMNS[:4], out=got[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for expected, actual in zip(want, got, strict=True):
            for name in COLUMNS[:4]:
                assert np.array_equal(getattr(expected, name), getattr(actual, name)), name
        assert image == snapshot(walk.mem)
