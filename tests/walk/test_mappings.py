# SPDX-License-Identifier: Apache-2.0
"""walk.mappings(): what whole tables map, held to the walk of single addresses (to QEMU's `info tlb`: test_replay.py)."""

import signal
import time
from itertools import pairwise

import builders
import numpy as np
import pytest
from alarms import Stop, alarms

import kvmmu
from kvmmu import Acc, Access, CpuModel, Ept, GuestMemory, Npt, PageTables, Status, Vcpu

MODES = ("32", "pae", "4l", "5l")
ACCESSES = [Access(bits) for bits in (0, 2, 4, 6, 8, 10, 16, 20)]
ALL = int(Acc.READ | Acc.WRITE | Acc.USER | Acc.EXEC)
SIZE = 1 << 30


def guest(mode, seed, **options):
    """A vCPU over adversarial tables, and addresses of interest."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        tables = builders.random_tables(rng, mode, tables=14, gvas=300, memsize=SIZE, **options)
        vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()), CpuModel(maxphyaddr=40))
        try:
            vcpu.set_regs(**tables.regs())
            return vcpu, tables
        except kvmmu.GeneralProtection:             # a PDPTE with a reserved bit
            continue
    raise AssertionError("no legal tables")


def interesting(mappings, tables, rng):
    """Addresses: those of the tables, and both ends of mappings and their neighbours."""
    some = rng.permutation(len(mappings))[:400]
    first, size = mappings.gva[some], mappings.size[some]
    end = first + (size - np.uint64(1))
    width = np.uint64((1 << 32) - 1 if tables.mode in ("32", "pae") else (1 << 64) - 1)
    named = np.array(tables.gvas, np.uint64)
    return np.unique(np.concatenate((named, first, end, end + np.uint64(1), first - np.uint64(1))) & width)


def check(walk, mappings, addresses, second_allows=lambda row, access: True):
    """Each address, by each access, against the rows."""
    row = np.searchsorted(mappings.gva, addresses, "right").astype(np.int64) - 1
    assert len(mappings)
    known = {}
    inside = (row >= 0) & (addresses - mappings.gva[row] < mappings.size[row])
    for access in ACCESSES:
        t = walk.translate(addresses, access, set_ad=False, fields=("gpa", "status", "pte_access", "level", "pte"))
        ok = t.status == Status.OK
        assert not (ok & ~inside).any(), f"{access!r} goes through to what is not mapped"
        for i in np.flatnonzero(inside).tolist():
            m = row[i]
            key = int(mappings.pte_access[m]), int(mappings.pkey[m]), access
            allowed = known.get(key)
            if allowed is None:
                allowed = known[key] = walk.permission_fault(*key) == 0
            assert ok[i] == (allowed and second_allows(m, access)), f"{addresses[i]:#x} {access!r}: {mappings[int(m)]}"
            if ok[i]:
                assert t.gpa[i] == mappings.gpa[m] + (addresses[i] - mappings.gva[m])
                assert (t.level[i], t.pte_access[i]) == (mappings.level[m], mappings.pte_access[m])


def check_shape(mappings):
    """Rows ascend, do not overlap, and neighbours that could be joined are."""
    assert (np.diff(mappings.gva.astype(object)) > 0).all()
    for a, b in pairwise(mappings):
        assert a.gva + a.size <= b.gva
        same = a[5:] == b[5:] and (a.gva + a.size, a.gpa + a.size, a.ngpa + a.size) == (b.gva, b.gpa, b.ngpa)
        assert not same, f"{a} and {b} are one"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_random_tables(mode, seed):
    """Loops, shared tables, reserved bits, holes, large pages: what is mapped is what some access can reach."""
    vcpu, tables = guest(mode, seed)
    vcpu.set_regs(pkru=0x0000_00C4)
    before = [vcpu.mem.read(gpa, size) for gpa, size, _ in vcpu.mem.slots]
    merged, single = vcpu.gva_walk.mappings(), vcpu.gva_walk.mappings(merge=False)
    assert before == [vcpu.mem.read(gpa, size) for gpa, size, _ in vcpu.mem.slots]
    check_shape(merged)
    assert int(merged.size.sum()) == int(single.size.sum())
    page = {1: 1 << 12, 2: 1 << (22 if mode == "32" else 21), 3: 1 << 30}
    assert single.size.tolist() == [page[level] for level in single.level.tolist()]
    rng = np.random.default_rng(seed)
    check(vcpu.gva_walk, merged, interesting(merged, tables, rng))
    check(vcpu.gva_walk, single, interesting(single, tables, rng))
    assert len(merged)


@pytest.mark.parametrize("mode", MODES)
def test_columns_are_those_of_the_leaf(mode):
    """A, D, G, the protection key, and where the entry lies."""
    vcpu, _ = guest(mode, 31)
    single = vcpu.gva_walk.mappings(merge=False)
    size = 4 if mode == "32" else 8
    for m in list(single)[:300]:
        entry = int.from_bytes(vcpu.mem.read(m.pte_gpa, size), "little")
        assert (m.accessed, m.dirty, m.global_) == (bool(entry & 0x20), bool(entry & 0x40), bool(entry & 0x100))
        assert m.pkey == (entry >> 59 & 15 if mode in ("4l", "5l") else 0)
        assert m.ngpa == m.gpa
        assert m.second_access == ALL


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_the_address_space(mode, seed):
    """start and stop cut the rows of the whole."""
    vcpu, tables = guest(mode, seed + 50)
    whole = vcpu.gva_walk.mappings(merge=False)
    rng = np.random.default_rng(seed)
    for _ in range(30):
        start, stop = sorted(int(rng.choice(tables.gvas)) for _ in range(2))
        expected = [(max(m.gva, start), min(m.gva + m.size, stop) - max(m.gva, start)) for m in whole
                    if m.gva < stop and m.gva + m.size > start]
        part = vcpu.gva_walk.mappings(start, stop, merge=False)
        assert list(zip(part.gva.tolist(), part.size.tolist(), strict=True)) == expected
        for m in part:
            assert len(vcpu.gva_walk.mappings(m.gva, m.gva + 1)) == 1
    assert len(vcpu.gva_walk.mappings(0x1000, 0x1000)) == 0
    assert vcpu.gva_walk.mappings(0, 1 << 64, merge=False).gva.tolist() == whole.gva.tolist()


@pytest.mark.parametrize("kind", ["ept", "ept5", "npt"])
@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l", "off"])
def test_two_stages(mode, kind):
    """A mapping ends where a page of either stage does, has the rights of both, and tables lie where the second stage says."""
    rng = np.random.default_rng([MODES.index(mode) if mode in MODES else 9, len(kind)])
    tables = builders.random_tables(rng, "4l" if mode == "off" else mode, tables=14, gvas=200, memsize=SIZE, maxphyaddr=32)
    mem = GuestMemory(64 << 20)
    where = 32 << 20                                # tables of the guest lie elsewhere than it says
    for gpa, page in zip(*tables.pages(), strict=True):
        for i in np.flatnonzero(page).tolist():     # accessed, so that nothing has to be written to a table
            page[i] |= np.uint64(0x2000000020 if mode == "32" else 0x20) if not (mode == "pae" and gpa == tables.cr3) else 0
        mem.write(int(gpa) + where, page.tobytes())
    stage = kvmmu.PageTables(mem, "4l" if kind == "npt" else kind, frames=range(0, 16 << 20, 4096))
    for gpa in tables.pages()[0].tolist():
        stage.map(gpa, gpa + where, accessed=True, dirty=True)
    used = set(tables.pages()[0].tolist())
    for _ in range(300):
        gpa = int(rng.integers(0, 1 << 20)) << 12
        large = gpa >> 21 not in {page >> 21 for page in used} and rng.random() < 0.5
        size = 1 << 21 if large else 4096
        gpa &= -size
        if any((gpa + n) in used for n in range(0, size, 4096)):
            continue
        used |= {gpa + n for n in range(0, size, 4096)}
        stage.map(gpa, int(rng.integers(0, 1 << 18)) * size & (1 << 40) - 1, size, write=bool(rng.random() < 0.7),
                  exec=bool(rng.random() < 0.7), accessed=True, dirty=True)
    second = stage.second_stage()
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=40), tdp="npt" if kind == "npt" else "ept")
    vcpu.set_regs(cr0=0x80010033, cr3=stage.root, cr4=0x20, efer=0xD00)
    regs = tables.regs() if mode != "off" else {"cr0": 0x11, "cr3": 0, "cr4": 0, "efer": 0}
    try:
        vcpu.enter_nested(second, **regs)
    except (kvmmu.GeneralProtection, kvmmu.NestedFault):
        pytest.skip("the PDPTEs of this seed are illegal")
    assert isinstance(second, Npt if kind == "npt" else Ept)
    walk = vcpu.gva_walk
    merged, single = walk.mappings(), walk.mappings(merge=False)
    check_shape(merged)
    assert int(merged.size.sum()) == int(single.size.sum())
    assert len(single)
    fmt = vcpu.ngpa_walk.fmt

    def second_allows(row, access):
        seen = int(access) & 0x16
        seen = seen | 4 if kind == "npt" else seen & ~4
        return not fmt.is_fault(int(merged.second_access[row]), seen)

    if mode == "off":
        for m in single:
            assert walk.translate(np.array([m.gva], np.uint64), 0, set_ad=False).gpa[0] == m.gpa
            assert m.ngpa == m.gva
    else:
        check(walk, merged, interesting(merged, tables, rng), second_allows)
    below = vcpu.ngpa_walk.mappings(merge=False)
    assert len(below) == len(stage_rows := {(m.gva, m.gpa) for m in below})
    for m in list(below)[:200]:
        t = vcpu.ngpa_walk.translate(np.array([m.gva + m.size - 1], np.uint64), Access.USER, set_ad=False)
        assert t.gpa[0] == m.gpa + m.size - 1
        assert (m.gva, m.gpa) in stage_rows
    for m in list(single)[:200]:
        assert vcpu.ngpa_walk.mappings(m.ngpa, m.ngpa + m.size, merge=False).gpa.tolist() == [m.gpa]


def test_paging_off():
    """All of 32 bits, by identity."""
    vcpu = Vcpu(GuestMemory(4096))
    m, = vcpu.gva_walk.mappings()
    assert (m.gva, m.gpa, m.size, m.level, m.rights) == (0, 0, 1 << 32, 0, "rwxu")
    assert len(vcpu.gva_walk.mappings(1 << 33)) == 0
    with pytest.raises(RuntimeError, match="not in use"):
        vcpu.ngpa_walk.mappings()


def linear(mem, regs):
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=40))
    vcpu.set_regs(**regs)
    return vcpu.gva_walk


def test_tables_that_point_to_themselves():
    """A root all of whose entries point to it maps 2**36 pages: more than anybody wants, said at once. Below nothing is quick."""
    entries = np.full(512, 0x1000 | 0x27, np.uint64)
    walk = linear(GuestMemory.from_pages([0x1000], entries[None]), builders.mode_regs("4l", 0x1000))
    with pytest.raises(ValueError, match="limit: the tables map more than 1000 ranges"):
        walk.mappings(limit=1000)
    pages = walk.mappings(0, 16 << 12)
    assert pages.gpa.tolist() == [0x1000] * 16
    # the same, with nothing at the bottom: three tables, the lowest empty
    tables = np.zeros((4, 512), np.uint64)
    for n in range(3):
        tables[n] = 0x1000 * (n + 2) | 0x27
    walk = linear(GuestMemory.from_pages([0x1000, 0x2000, 0x3000, 0x4000], tables), builders.mode_regs("4l", 0x1000))
    assert len(walk.mappings()) == 0
    tables[3, 511] = 0x5000 | 0x27
    walk = linear(GuestMemory.from_pages([0x1000, 0x2000, 0x3000, 0x4000], tables), builders.mode_regs("4l", 0x1000))
    assert walk.mappings(0, 1 << 30, merge=False).gva.tolist() == [(n << 21) + 511 * 4096 for n in range(512)]


def test_leaves_that_the_second_stage_does_not_map_are_limited():
    """Endless leaves of the first stage without memory behind them."""
    mem = GuestMemory(1 << 20)
    mem.write(0x1000, np.full(512, 0x1000 | 0x27, np.uint64).tobytes())
    mem.write(0x2000, np.full(512, 0x9_0000_0027, np.uint64).tobytes())
    for i in range(511):
        mem.write_u64(0x1000 + 8 * i, 0x2000 | 0x27 if i == 0 else 0x1000 | 0x27)
    stage = kvmmu.PageTables(mem, "ept", frames=range(0x10000, 0x20000, 4096))
    stage.map(0, 0, 1 << 12)
    stage.map(0x1000, 0x1000)
    stage.map(0x2000, 0x2000)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80010033, cr3=0x1000, cr4=0x20, efer=0xD00)
    vcpu.enter_nested(stage.second_stage(), **builders.mode_regs("4l", 0x1000))
    with pytest.raises(ValueError, match="limit"):
        vcpu.gva_walk.mappings(limit=10_000)


def test_who_maps():
    """Every alias of a page, cut to what was asked for."""
    tables = builders.PageTables("4l", 0x10000)
    tables.map(0x40_0000, 0x80_0000, "p w u", level=2)
    tables.map(0x7000_0000, 0x81_2000, "p")
    tables.map(0x7000_1000, 0x90_0000, "p w")
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs())
    found = vcpu.gva_walk.who_maps(0x81_2345)
    assert list(zip(found.gva.tolist(), found.gpa.tolist(), found.size.tolist(), strict=True)) == [
        (0x41_2345, 0x81_2345, 1), (0x7000_0345, 0x81_2345, 1)]
    assert found.rights.tolist() == ["rwxu", "r-x-"]
    found = vcpu.gva_walk.who_maps(0x81_1000, 0x2000)
    assert list(zip(found.gva.tolist(), found.size.tolist(), strict=True)) == [(0x41_1000, 0x2000), (0x7000_0000, 0x1000)]
    assert len(vcpu.gva_walk.who_maps(0xA1_0000)) == 0
    with pytest.raises(ValueError, match="gpa"):
        vcpu.gva_walk.who_maps(1 << 52)


def test_filters():
    """Rights of both stages, and the size of the page."""
    tables = builders.PageTables("4l", 0x10000)
    tables.map(0x40_0000, 0x80_0000, "p w u", level=2)
    tables.map(0x7000_0000, 0x81_2000, "p")
    tables.map(0x7000_2000, 0x90_0000, "p w nx")
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs())
    found = vcpu.gva_walk.mappings()
    assert found.where(writable=True, executable=True).gva.tolist() == [0x40_0000]
    assert found.where(user=False).gva.tolist() == [0x7000_0000, 0x7000_2000]
    assert found.where(size=4096, executable=False).gva.tolist() == [0x7000_2000]
    assert found.where(size=1 << 21).rights.tolist() == ["rwxu"]
    assert found[-1].rights == "rw--"
    assert [m.gva for m in found] == found.gva.tolist()
    assert repr(found) == "<Mappings: 3 rows, 0x202000 bytes>"
    with pytest.raises(ValueError, match="size: want 4096"):
        found.where(size=5)


# ---- one address -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_lookup(mode):
    """Where each address leads to; with PROBE whatever the rights, and no bit is set."""
    vcpu, tables = guest(mode, 71)
    walk = vcpu.gva_walk
    before = [vcpu.mem.read(gpa, size) for gpa, size, _ in vcpu.mem.slots]
    single = walk.mappings(merge=False)
    mask = (1 << 32) - 1 if mode in ("32", "pae") else (1 << 64) - 1
    rows = list(single)
    some = [(row.gva + row.size // 2, row) for row in rows[:200]]
    for gva, row in some:
        found = walk.lookup(gva, Access.PROBE)
        assert found == (row.gpa + row.size // 2, row.size, row.pte_access, row.accessed, row.dirty, row.global_, row.pkey)
        assert isinstance(found.pte_access, Acc)
    for gva in tables.gvas:
        row = next((row for row in rows if row.gva <= gva & mask < row.gva + row.size), None)
        if row is None:
            record = walk.walk_record(gva)
            with pytest.raises(kvmmu.GuestFault) as caught:
                walk.lookup(gva, Access.PROBE)
            assert caught.value.rule == record.rule
    assert before == [vcpu.mem.read(gpa, size) for gpa, size, _ in vcpu.mem.slots]


def test_lookup_as_an_access():
    """Rights count, and the bits are set."""
    tables = builders.PageTables("4l", 0x10000)
    tables.map(0x40_0000, 0x80_0000, "p w u", level=2)
    tables.map(0x7000_0000, 0x81_2000, "p u")
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs())
    assert vcpu.gva_walk.lookup(0x40_0123, Access.WRITE | Access.USER) == (
        0x80_0123, 1 << 21, Acc.READ | Acc.WRITE | Acc.USER | Acc.EXEC, True, True, False, 0)
    with pytest.raises(kvmmu.PageFault) as caught:
        vcpu.gva_walk.lookup(0x7000_0000, Access.WRITE | Access.USER)
    assert caught.value.rule == "write"
    assert vcpu.gva_walk.lookup(0x7000_0000, Access.PROBE).accessed is False
    before = vcpu.gva_walk.lookup(0x7000_0000, Access.PROBE | Access.WRITE)
    assert vcpu.gva_walk.gva_to_gpa(0x7000_0000, Access.PROBE) == before.gpa
    assert vcpu.gva_walk.translate(np.full(1, 0x7000_0000, np.uint64), int(Access.PROBE)).gpa[0] == before.gpa
    assert vcpu.gva_walk.lookup(0x7000_0000, Access.PROBE) == before
    with pytest.raises(ValueError, match="access: "):
        vcpu.gva_walk.lookup(0, Access.PROBE | 1)


def test_lookup_over_two_stages():
    """The page is the smaller one of both, the rights those of both."""
    mem = GuestMemory(64 << 20)
    first = kvmmu.PageTables(mem, "4l", frames=range(1 << 20, 2 << 20, 4096))
    first.map(0x4000_0000, 8 << 20, 1 << 21, accessed=True)
    stage = kvmmu.PageTables(mem, "ept", frames=range(2 << 20, 3 << 20, 4096))
    stage.map(0, 0, 1 << 21)
    stage.map(8 << 20, 32 << 20, write=False)
    for gpa in range(1 << 21, 4 << 20, 1 << 21):
        stage.map(gpa, gpa, 1 << 21)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80010033, cr3=0x1000, cr4=0x20, efer=0xD00)
    vcpu.enter_nested(stage.second_stage(), **builders.mode_regs("4l", first.root))
    found = vcpu.gva_walk.lookup(0x4000_0123, Access.PROBE)
    assert (found.gpa, found.size) == ((32 << 20) + 0x123, 4096)
    assert found.pte_access == Acc.READ | Acc.USER | Acc.EXEC
    with pytest.raises(kvmmu.EptViolation):
        vcpu.gva_walk.lookup(0x4000_1000, Access.PROBE)


@pytest.mark.parametrize("kind", ["ept", "npt"])
def test_tables_that_the_second_stage_protects_are_read(kind):
    """A hypervisor that write-protects a guest's tables faults its walks; what they map is told by mappings and probes."""
    mem = GuestMemory(64 << 20)
    first = kvmmu.PageTables(mem, "4l", frames=range(1 << 20, 2 << 20, 4096))
    first.map(0x4000_0000, 8 << 20)
    stage = kvmmu.PageTables(mem, kind if kind == "ept" else "4l", frames=range(2 << 20, 3 << 20, 4096))
    for gpa in range(1 << 20, 2 << 20, 4096):
        stage.map(gpa, gpa, write=False)
    stage.map(8 << 20, 32 << 20)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80010033, cr3=0x1000, cr4=0x20, efer=0xD00)
    root = Ept(stage.root | 0x5E) if kind == "ept" else Npt(stage.root)
    vcpu.enter_nested(root, **builders.mode_regs("4l", first.root))
    walk = vcpu.gva_walk
    with pytest.raises(kvmmu.NestedFault):
        walk.gva_to_gpa(0x4000_0123)
    assert walk.gva_to_gpa(0x4000_0123, Access.PROBE) == walk.lookup(0x4000_0123, Access.PROBE).gpa == (32 << 20) + 0x123
    (row,) = walk.mappings()
    assert (row.gva, row.gpa, row.size) == (0x4000_0000, 32 << 20, 4096)
    record = walk.walk_record(0x4000_0123, Access.PROBE)
    assert [step.nested.status for step in record.steps] == [kvmmu.Status.OK] * 4
    assert walk.walk_record(0x4000_0123).steps[0].nested.rule == "write"


def nested_over_empty_tables():
    """A vCPU whose 2**18 leaves of 1G lie, but for the first page, where its second stage has tables with nothing in them."""
    mem = GuestMemory(1 << 20)
    for table, entry in ((0x10000, 0), (0x11000, 0x13007), (0x12000, 0), (0x13000, 0x14007), (0x14000, 0), (0x1000, 0x2007),
                         (0x2000, 0x400000E7)):
        mem.write(table, np.full(512, entry, np.uint64).tobytes())
    mem.write_u64(0x10000, 0x11007)
    mem.write_u64(0x11000, 0x12007)
    mem.write_u64(0x12000, 7 | 0x80 | 6 << 3)
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=40))
    registers = {"cr0": 0x80010033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
    vcpu.set_regs(**registers)
    vcpu.enter_nested(Ept(0x1001E), **registers)
    return vcpu


def test_empty_tables_of_the_second_stage_are_scanned_once():
    start = time.monotonic()
    assert len(nested_over_empty_tables().gva_walk.mappings()) == 0
    assert time.monotonic() - start < 30                # a minute and more, if each leaf goes through them


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer()")
def test_a_scan_can_be_interrupted():
    """A signal handler that raises ends it."""
    def scan_often():
        for _ in range(1000):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            walk.mappings()

    walk = nested_over_empty_tables().gva_walk
    with alarms(), pytest.raises(Stop):
        scan_often()
    assert len(walk.mappings(0, 1 << 30)) == 0


def mappings_of(mode, *pages):
    """The mappings of tables that map some pages."""
    tables = PageTables(GuestMemory(1 << 20), mode)
    tables.map(*pages)
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    return vcpu.gva_walk.mappings()


def test_pages_of_4m_are_no_pages_of_2m():
    found = mappings_of("4l", 0x40000000, 0, 1 << 21)
    assert [len(found.where(size=size)) for size in (1 << 12, 1 << 21, 1 << 22, 1 << 30)] == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="size: want 4096"):
        found.where(size=5)
    with pytest.raises(ValueError, match="gpa: want"):
        found.of_memory(-1, 5)


def test_pages_of_4m():
    found = mappings_of("32", 0x400000, 0, 1 << 22)
    assert [len(found.where(size=size)) for size in (1 << 12, 1 << 21, 1 << 22)] == [0, 0, 1]


def test_a_row_begins_with_address_target_and_size():
    """In the order of the columns."""
    found = mappings_of("4l", [0x5000, 0x6000], [0x9000, 0xA000], 4096)
    row, = found
    assert tuple(row)[:4] == (0x5000, 0x9000, 0x2000, 1)
    assert row == found[0]
    assert list(found.to_dict())[:4] == ["gva", "gpa", "size", "level"]
