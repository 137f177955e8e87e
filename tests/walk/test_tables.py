# SPDX-License-Identifier: Apache-2.0
"""Walks over odd tables: accessed and dirty bits, tables in holes, read-only or pointing to themselves; the record."""

import json

import numpy as np
import pytest
from builders import LEVELS, PageTables, words_to_pages
from machines import ACCESSES, ALL_FIELDS, NXE, SMAP, SMEP, A, D, fault_of, one, snapshot, vcpu_over

from kvmmu import INVALID_GPA, Acc, Access, GuestMemory, Status, Vcpu, WalkRecord

WRITE, FETCH, USER = Access.WRITE, Access.FETCH, Access.USER
MODES = ("32", "pae", "4l", "5l")
GVA, GPA = 0x40201000, 0x7654000
each_mode = pytest.mark.parametrize("mode", MODES)


def walked_levels(mode):
    """Levels whose entries lie in memory, root first."""
    return range(2 if mode == "pae" else LEVELS[mode], 0, -1)


def entries(tables, vcpu, gva=GVA, leaf=1):
    """The entries of a walk as they are in memory now, root first."""
    gpas = [tables.entry_gpa(gva, level) for level in walked_levels(tables.mode) if level >= leaf]
    return [int.from_bytes(vcpu.mem.read(gpa, tables.entry_size), "little") for gpa in gpas]


def simple(mode, flags="p w u", **more):
    tables = PageTables(mode)
    tables.map(GVA, GPA, flags)
    return tables, vcpu_over(tables, **more)


# ---- accessed and dirty bits ----------------------------------------------------------------------------------------

@each_mode
@pytest.mark.parametrize("scalar", [False, True])
def test_reads_set_accessed_writes_dirty(mode, scalar):
    """A at every level, D on the leaf only and for writes only (pitfall 8, corner case 24)."""
    tables, vcpu = simple(mode)
    before = entries(tables, vcpu)
    access = (lambda a: vcpu.gva_walk.gva_to_gpa(GVA, a)) if scalar else (lambda a: one(vcpu.gva_walk, GVA, a))
    for kind in (Access.READ, FETCH):
        access(kind | USER)
        assert [entry | A for entry in before] == entries(tables, vcpu)
    access(WRITE)
    assert [entry | A for entry in before[:-1]] + [before[-1] | A | D] == entries(tables, vcpu)


@each_mode
def test_stores_touch_nothing_else(mode):
    """An A/D update changes one bit of one byte of each entry."""
    tables, vcpu = simple(mode)
    image = snapshot(vcpu.mem)
    vcpu.gva_walk.gva_to_gpa(GVA, WRITE)
    after = snapshot(vcpu.mem)
    changed = [(gpa + i, old ^ new) for gpa in image
               for i, (old, new) in enumerate(zip(image[gpa], after[gpa], strict=True)) if old != new]
    expected = [(tables.entry_gpa(GVA, level), A | D if level == 1 else A) for level in walked_levels(mode)]
    assert sorted(expected) == changed


@pytest.mark.parametrize("odd", [False, True])
def test_each_half_of_a_32_bit_pair(odd):
    """4-byte entries are updated in place (pitfall 8)."""
    gva = 0x00401000 if odd else 0x00800000
    tables = PageTables("32")
    tables.map(gva, GPA)
    neighbour = tables.entry_gpa(gva, 1) ^ 4
    tables.write(neighbour, 0x12345000)
    vcpu = vcpu_over(tables)
    vcpu.gva_walk.gva_to_gpa(gva, WRITE)
    assert GPA | 7 | A | D == entries(tables, vcpu, gva)[-1]
    assert 0x12345000 == int.from_bytes(vcpu.mem.read(neighbour, 4), "little")


@pytest.mark.parametrize(("mode", "level"), [("32", 2), ("pae", 2), ("4l", 2), ("4l", 3), ("5l", 3)])
def test_dirty_bit_of_large_pages(mode, level):
    """The leaf is the entry with PS."""
    tables = PageTables(mode)
    tables.map(GVA, 1 << 30, level=level)
    vcpu = vcpu_over(tables)
    before = entries(tables, vcpu, leaf=level)
    vcpu.gva_walk.gva_to_gpa(GVA, WRITE)
    assert [entry | A for entry in before[:-1]] + [before[-1] | A | D] == entries(tables, vcpu, leaf=level)


@each_mode
@pytest.mark.parametrize(("flags", "access"), [("p u", WRITE), ("p w", USER), ("w u", WRITE), ("p w u", FETCH)])
def test_faults_set_nothing(mode, flags, access):
    """Neither at the entry that fails nor above it (row D6, corner case 24)."""
    _tables, vcpu = simple(mode, flags, on={"cr4": SMEP})
    before = snapshot(vcpu.mem)
    fault_of(vcpu.gva_walk, GVA, access)
    assert Status.PAGE_FAULT == one(vcpu.gva_walk, GVA, access)["status"]
    assert before == snapshot(vcpu.mem)


@each_mode
def test_supervisor_write_without_wp_sets_dirty(mode):
    """D also where CR0.WP = 0 overrides R/W (pitfall 8)."""
    tables, vcpu = simple(mode, "p u", off={"cr0": 1 << 16})
    vcpu.gva_walk.gva_to_gpa(GVA, WRITE)
    assert entries(tables, vcpu)[-1] & D


@each_mode
def test_set_ad_false_suppresses_the_stores_only(mode):
    """The answers are the same, the memory is untouched; walk_record() never stores."""
    _, vcpu = simple(mode)
    before = snapshot(vcpu.mem)
    dry = one(vcpu.gva_walk, GVA, WRITE, set_ad=False)
    record = vcpu.gva_walk.walk_record(GVA, WRITE)
    assert before == snapshot(vcpu.mem)
    assert (GPA, GPA) == (dry["gpa"], record.gpa)
    wet = one(vcpu.gva_walk, GVA, WRITE)
    assert before != snapshot(vcpu.mem)
    assert {**dry, "pte": 0} == {**wet, "pte": 0}


@each_mode
def test_walks_are_idempotent_once_bits_are_set(mode):
    """A second walk gives the same and writes nothing."""
    _, vcpu = simple(mode)
    for access in (Access.READ, WRITE):
        first = one(vcpu.gva_walk, GVA, access)
        image = snapshot(vcpu.mem)
        second = one(vcpu.gva_walk, GVA, access)
        assert image == snapshot(vcpu.mem)
        assert {**first, "pte": 0} == {**second, "pte": 0}


@each_mode
def test_tables_in_read_only_slots(mode):
    """A/D updates are skipped there, silently, and done at the other levels (corner case 25)."""
    for rom_level in walked_levels(mode):
        tables = PageTables(mode)
        tables.map(GVA, GPA)
        rom_page = tables.entry_gpa(GVA, rom_level) & ~0xFFF
        mem = GuestMemory(0x1000)
        for gpa, page in zip(*(array.tolist() for array in tables.pages()), strict=True):
            mem.add_slot(gpa, np.array(page, np.uint64), readonly=gpa == rom_page)
        vcpu = Vcpu(mem)
        vcpu.set_regs(**tables.regs())
        before = entries(tables, vcpu)
        assert GPA == vcpu.gva_walk.gva_to_gpa(GVA, WRITE) == one(vcpu.gva_walk, GVA, WRITE)["gpa"]
        expected = [entry | (0 if level == rom_level else A | D if level == 1 else A)
                    for level, entry in zip(walked_levels(mode), before, strict=True)]
        assert expected == entries(tables, vcpu)


# ---- where tables may lie -------------------------------------------------------------------------------------------

@each_mode
def test_tables_in_holes(mode):
    """A table that is nowhere reads as not present: W, U and F bits only (corner case 23)."""
    for level in walked_levels(mode):
        tables = PageTables(mode)
        tables.map(GVA, GPA)
        missing = tables.entry_gpa(GVA, level)
        gpas, pages = tables.pages()
        there = gpas != missing & ~0xFFF
        vcpu = Vcpu(GuestMemory.from_pages(gpas[there], pages[there]) if there.any() else GuestMemory(0x1000))
        vcpu.set_regs(**tables.regs())
        image = snapshot(vcpu.mem)
        fault = fault_of(vcpu.gva_walk, GVA, WRITE | USER)
        assert (6, level, "hole", missing, 0) == (
            fault.error_code, fault.level, fault.rule, fault.entry_gpa, fault.entry)
        assert image == snapshot(vcpu.mem)


@pytest.mark.parametrize("mode", ["pae", "4l", "5l"])
def test_tables_past_the_end(mode):
    """An entry that points above all slots, up to the last page of 52 bits."""
    for target in (0x200000, (1 << 52) - 0x1000):
        tables, _ = simple(mode)
        tables.write(tables.entry_gpa(GVA, 2), target | 7)
        vcpu = vcpu_over(tables, maxphyaddr=52)
        assert "hole" == fault_of(vcpu.gva_walk, GVA).rule
        assert target + 8 == one(vcpu.gva_walk, GVA)["pte_gpa"]


@pytest.mark.parametrize("mode", ["32", "4l", "5l"])
def test_root_out_of_range(mode):
    """CR3 past the end of memory: every access faults at the root; in PAE mode the load is a #GP (test_walk.py)."""
    vcpu = Vcpu(GuestMemory(0x2000))
    vcpu.set_regs(**{**PageTables(mode).regs(), "cr3": 0xFFFFF000})
    fault = fault_of(vcpu.gva_walk, GVA)
    assert (LEVELS[mode], "hole", 0) == (fault.level, fault.rule, fault.error_code)


@each_mode
def test_last_page_of_memory(mode):
    """A table in the last page: its last entry is read, nothing beyond."""
    tables = PageTables(mode, base=0x1000)
    tables.map(0xFFFFF000 if mode in ("32", "pae") else 2**64 - 0x1000, GPA)
    top = tables.tables()[-1] + 0x1000
    buffer = np.zeros(top // 8, np.uint64)
    for gpa, value in tables.words().items():
        buffer[gpa // 8] = value
    vcpu = Vcpu(GuestMemory(buffer))
    vcpu.set_regs(**tables.regs())
    gva = 0xFFFFFFFF if mode in ("32", "pae") else 2**64 - 1
    assert GPA + 0xFFF == vcpu.gva_walk.gva_to_gpa(gva, WRITE)
    assert top - tables.entry_size == one(vcpu.gva_walk, gva)["pte_gpa"]


@pytest.mark.parametrize("mode", ["32", "4l", "5l"])
@pytest.mark.parametrize("access", [Access.READ, WRITE])
def test_self_pointing_table(mode, access):
    """An entry used at every level gets A and D once, and the walk ends."""
    tables = PageTables(mode, base=0x5000)
    index = 1
    gva = sum(index << (12 + (10 if mode == "32" else 9) * level) for level in range(LEVELS[mode]))
    at = 0x5000 + tables.entry_size * index
    tables.write(at, 0x5000 | 7)
    vcpu = vcpu_over(tables)
    assert 0x5123 == vcpu.gva_walk.gva_to_gpa(gva | 0x123, access)
    expected = 0x5007 | A | (D if access else 0)
    assert expected == int.from_bytes(vcpu.mem.read(at, tables.entry_size), "little")
    assert LEVELS[mode] == one(vcpu.gva_walk, gva, access)["refs"]


def test_self_pointing_page_directory_of_pae():
    """The same one level down."""
    words = {0x5000: 0x6001, 0x6008: 0x6007}
    vcpu = Vcpu(GuestMemory.from_pages(*words_to_pages(words)))
    vcpu.set_regs(**{**PageTables("pae").regs(), "cr3": 0x5000})
    assert 0x6000 == vcpu.gva_walk.gva_to_gpa(1 << 21 | 1 << 12, WRITE)
    assert 0x6007 | A | D == vcpu.mem.read_u64(0x6008)


def test_a_table_that_serves_as_its_own_pdpt():
    """A page that is PML4 and PDPT: the same entry once as table and once as 1G leaf cannot be: PS is reserved above."""
    vcpu = Vcpu(GuestMemory.from_pages(*words_to_pages({0x5000: 0x5087})))
    vcpu.set_regs(**{**PageTables("4l").regs(), "cr3": 0x5000})
    fault = fault_of(vcpu.gva_walk, 0)
    assert (4, "reserved") == (fault.level, fault.rule)


# ---- the same page in two sizes -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "level"), [("32", 2), ("pae", 2), ("4l", 2), ("4l", 3), ("5l", 3)])
def test_a_large_page_and_its_split_agree(mode, level):
    """Same gpa, same faults for every kind of access, whether mapped at once or by smaller pages."""
    bits = (10 if mode == "32" else 9) * (level - 1) + 12
    base, target = GVA >> bits << bits, 3 << bits
    for flags in ("p w u", "p u", "p w", "p w u nx"):
        if mode == "32" and "nx" in flags:
            continue
        large, split = PageTables(mode), PageTables(mode)
        large.map(base, target, flags, level=level)
        small = 1 << ((10 if mode == "32" else 9) * (level - 2) + 12)
        for offset in range(0, 1 << bits, small):
            split.map(base + offset, target + offset, flags, level=level - 1)
        rng = np.random.default_rng(3)
        gva = np.uint64(base) + rng.integers(0, 1 << bits, 500).astype(np.uint64)
        for access in ACCESSES:
            one_page, many = (vcpu_over(tables, on={"cr4": SMEP | SMAP}).gva_walk.translate(gva, access)
                              for tables in (large, split))
            for name in ("gpa", "status", "error_code"):
                assert np.array_equal(getattr(one_page, name), getattr(many, name)), f"{flags} {access!r} {name}"


@each_mode
def test_more_rights_never_add_a_fault(mode):
    """Setting W or clearing XD only allows more; setting U may deny (SMEP, SMAP)."""
    for controls in ({}, {"cr4": SMEP | SMAP}):
        for user in ("", " u"):
            walks = {flags: simple(mode, f"p {flags}{user}", on=controls)[1].gva_walk
                     for flags in ("", "w", *(() if mode == "32" else ("nx", "w nx")))}
            for access in ACCESSES:
                faults = {flags: one(walk, GVA, access)["status"] for flags, walk in walks.items()}
                assert faults["w"] <= faults[""]
                if mode != "32":
                    assert faults[""] <= faults["nx"]
                    assert faults["w"] <= faults["w nx"] <= faults["nx"]


# ---- the record -----------------------------------------------------------------------------------------------------

@each_mode
def test_record_of_a_walk(mode):
    """Every entry, root first, with its place, value and rights; the end agrees with translate()."""
    tables, vcpu = simple(mode, "p u")
    record = vcpu.gva_walk.walk_record(GVA + 4, USER)
    levels = list(range(LEVELS[mode], 0, -1))
    assert isinstance(record, WalkRecord)
    assert levels == [step.level for step in record.steps]
    assert (GVA + 4, GPA + 4, Status.OK, 0, 1, None, 4096) == (
        record.gva, record.gpa, record.status, record.error_code, record.level, record.rule, record.page_size)
    for step in record.steps:
        in_register = mode == "pae" and step.level == 3
        assert (None if in_register else tables.entry_gpa(GVA, step.level)) == step.gpa
        assert tables.entry(GVA, step.level) == step.entry
        assert step.index == (GVA >> (12 + (10 if mode == "32" else 9) * (step.level - 1))) & (0x3FF if mode == "32" else 0x1FF)
    everything = Acc.READ | Acc.WRITE | Acc.USER | Acc.EXEC
    assert [everything] * (len(levels) - 1) + [everything & ~Acc.WRITE] == [step.pte_access for step in record.steps]


@each_mode
def test_record_text_and_dict(mode):
    """Levels by name, the end or the fault in words; to_dict() is plain JSON."""
    _, vcpu = simple(mode, "p u")
    good, bad = vcpu.gva_walk.walk_record(GVA), vcpu.gva_walk.walk_record(GVA, WRITE | USER)
    text = str(good)
    names = ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"][5 - LEVELS[mode]:]
    for line, name in zip(text.splitlines()[1:-1], names, strict=True):
        assert line.strip().startswith(name)
    assert f"{GVA:#x}" in text.splitlines()[0]
    assert f"gpa {GPA:#x} (4K page)" in text.splitlines()[-1]
    assert "#PF" in str(bad).splitlines()[-1]
    assert "read-only" in str(bad).splitlines()[-1]
    assert ("write", 7, None) == (bad.rule, bad.error_code, bad.gpa)
    plain = json.loads(json.dumps(bad.to_dict()))
    assert ("PAGE_FAULT", 7, "write", LEVELS[mode]) == (
        plain["status"], plain["error_code"], plain["rule"], len(plain["steps"]))


@pytest.mark.parametrize(("mode", "level", "text"), [("32", 2, "4M"), ("pae", 2, "2M"), ("4l", 2, "2M"), ("5l", 3, "1G")])
def test_record_names_large_pages(mode, level, text):
    """The size is part of the text."""
    tables = PageTables(mode)
    tables.map(GVA, 1 << 30, level=level)
    assert f"({text} page)" in str(vcpu_over(tables).gva_walk.walk_record(GVA))


def test_record_without_a_walk():
    """Paging off, and an address that is not canonical."""
    _, vcpu = simple("4l")
    record = vcpu.gva_walk.walk_record(1 << 60)
    assert (Status.NON_CANONICAL, "non-canonical", (), 0) == (record.status, record.rule, record.steps, record.level)
    assert "#GP" in str(record)
    vcpu.set_regs(cr0=1, efer=NXE)
    assert "paging off" in str(vcpu.gva_walk.walk_record(0x1000))


@each_mode
def test_columns_on_request(mode):
    """level, pte, pte_gpa, pte_access, refs of a success and of a fault."""
    tables, vcpu = simple(mode, "p u")
    leaf = tables.entry_gpa(GVA, 1)
    refs = len(walked_levels(mode))
    expected = {"gpa": GPA, "status": 0, "error_code": 0, "level": 1, "pte": GPA | 5, "pte_gpa": leaf,
                "pte_access": Acc.READ | Acc.USER | Acc.EXEC, "refs": refs}
    assert set(expected) == set(ALL_FIELDS)
    assert expected == one(vcpu.gva_walk, GVA, set_ad=False)
    assert {**expected, "gpa": INVALID_GPA, "status": 1, "error_code": 3} == one(vcpu.gva_walk, GVA, WRITE)
