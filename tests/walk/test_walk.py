# SPDX-License-Identifier: Apache-2.0
"""The walk of guest tables, rule by rule: what is allowed, what is denied, and what a fault tells."""

import numpy as np
import pytest
from builders import LEVELS, PageTables
from machines import NXE, PKE, SMAP, SMEP, WP, changed, fault_of, one, vcpu_over

from kvmmu import INVALID_GPA, Access, CpuModel, GeneralProtection, GuestMemory, PageFault, Regs, Status, Vcpu

READ, WRITE, FETCH, USER, AC, IMPLICIT = (getattr(Access, name) for name in
                                          ("READ", "WRITE", "FETCH", "USER", "AC", "IMPLICIT"))
P, W, U, RSVD, F, PK = (1 << i for i in range(6))
MODES = ("32", "pae", "4l", "5l")
PAGED_64 = ("pae", "4l", "5l")
LONG = ("4l", "5l")
GVA, GPA = 0x40201000, 0x7654000
LEAF_SIZE = {("32", 2): 1 << 22, ("pae", 2): 1 << 21, ("4l", 2): 1 << 21, ("5l", 2): 1 << 21, ("4l", 3): 1 << 30,
             ("5l", 3): 1 << 30}
each_mode = pytest.mark.parametrize("mode", MODES)


def mapped(mode, flags="p w u", *, upper="p w u", pkey=0, raw=0, level=1, gpa=GPA, **more):
    """A vCPU with one page at GVA."""
    tables = PageTables(mode)
    tables.map(GVA, gpa, flags, level=level, pkey=pkey, raw=raw, upper=upper)
    return vcpu_over(tables, **more)


def verdict(walk, access, gva=GVA):
    """The error code of a fault and its rule, or (0, None)."""
    try:
        walk.gva_to_gpa(gva, access)
    except PageFault as fault:
        return fault.error_code, fault.rule
    return 0, None


# ---- rights: one allow and one deny of each rule --------------------------------------------------------------------

@each_mode
@pytest.mark.parametrize("access", [READ, WRITE, FETCH, READ | USER, WRITE | USER, FETCH | USER])
def test_a_user_page_with_all_rights_allows_everything(mode, access):
    """Without SMEP and SMAP."""
    assert GPA + 0x123 == mapped(mode).gva_walk.gva_to_gpa(GVA + 0x123, access)


RIGHTS = [
    # flags, access, on, off, error code, rule
    ("p u", WRITE, {}, {}, P | W, "write"),
    ("p u", WRITE, {}, {"cr0": WP}, 0, None),
    ("p u", WRITE | USER, {}, {"cr0": WP}, P | W | U, "write"),
    ("p u", READ, {}, {}, 0, None),
    ("p w", READ | USER, {}, {}, P | U, "user"),
    ("p w", WRITE | USER, {}, {"cr0": WP}, P | W | U, "user"),
    ("p w", WRITE, {}, {}, 0, None),
    ("p w u", READ, {"cr4": SMAP}, {}, P, "smap"),
    ("p w u", WRITE, {"cr4": SMAP}, {}, P | W, "smap"),
    ("p w u", WRITE, {"cr4": SMAP}, {"cr0": WP}, P | W, "smap"),
    ("p w u", READ | AC, {"cr4": SMAP}, {}, 0, None),
    ("p w u", READ | USER, {"cr4": SMAP}, {}, 0, None),
    ("p w u", FETCH, {"cr4": SMAP}, {}, 0, None),
    ("p w", READ, {"cr4": SMAP}, {}, 0, None),
    ("p w u", READ | AC | IMPLICIT, {"cr4": SMAP}, {}, P, "smap"),
    ("p w u", READ | USER | AC | IMPLICIT, {"cr4": SMAP}, {}, P, "smap"),
    ("p w u", READ | USER | IMPLICIT, {}, {}, 0, None),
    ("p w", WRITE | USER | IMPLICIT, {"cr4": SMAP}, {}, 0, None),
    ("p w u", FETCH, {"cr4": SMEP}, {}, P | F, "smep"),
    ("p w u", FETCH | AC, {"cr4": SMEP}, {}, P | F, "smep"),
    ("p w u", FETCH | USER, {"cr4": SMEP}, {}, 0, None),
    ("p w u", READ, {"cr4": SMEP}, {}, 0, None),
    ("p w u", WRITE, {"cr4": SMEP}, {}, 0, None),
    ("p w", FETCH, {"cr4": SMEP}, {}, 0, None),
    ("p w", FETCH | USER, {"cr4": SMEP}, {}, P | U | F, "user"),
]


@each_mode
@pytest.mark.parametrize(("flags", "access", "on", "off", "error_code", "rule"), RIGHTS)
def test_rights(mode, flags, access, on, off, error_code, rule):
    """R/W and WP, U/S, SMAP with AC and implicit accesses, SMEP; the error code tells CPL, not the page."""
    walk = mapped(mode, flags, on=on, off=off).gva_walk
    assert (error_code, rule) == verdict(walk, access)
    assert error_code == one(walk, GVA, access)["error_code"]


@pytest.mark.parametrize("mode", PAGED_64)
@pytest.mark.parametrize("access", [FETCH, FETCH | USER])
def test_execute_disable(mode, access):
    """XD forbids fetches and nothing else; with NXE = 0 it is reserved, even for reads (pitfall 3)."""
    user = access & USER
    walk = mapped(mode, "p w u nx").gva_walk
    assert (P | F | (U if user else 0), "nx") == verdict(walk, access)
    assert (0, None) == verdict(walk, READ | user)
    walk = mapped(mode, "p w u nx", off={"efer": NXE}).gva_walk
    assert (P | RSVD | (U if user else 0), "reserved") == verdict(walk, access)
    assert (P | RSVD | (U if user else 0), "reserved") == verdict(walk, READ | user)


@each_mode
@pytest.mark.parametrize(("right", "access", "rule"), [("w", WRITE | USER, "write"), ("u", READ | USER, "user")])
def test_rights_are_anded_over_all_levels(mode, right, access, rule):
    """A right missing at any one level is missing (corner case 15); PAE PDPTEs have none."""
    for level in range(1, LEVELS[mode] + 1):
        if mode == "pae" and level == 3:
            continue
        tables = PageTables(mode)
        tables.map(GVA, GPA)
        assert (0, None) == verdict(vcpu_over(tables).gva_walk, access)
        tables.clear_bits(GVA, level, {"w": 2, "u": 4}[right])
        fault = fault_of(vcpu_over(tables).gva_walk, GVA, access)
        assert (rule, 1) == (fault.rule, fault.level)
    if mode != "32":
        tables.set_bits(GVA, 2, 1 << 63)
        assert "nx" == fault_of(vcpu_over(tables).gva_walk, GVA, FETCH).rule


@pytest.mark.parametrize(("mode", "conformance", "smep", "nxe", "reported"), [
    ("32", "sdm", 0, 0, 0), ("32", "sdm", 1, 0, 1), ("32", "sdm", 0, 1, 0), ("32", "kvm", 0, 1, 1), ("32", "kvm", 0, 0, 0),
    ("pae", "sdm", 0, 0, 0), ("pae", "sdm", 0, 1, 1), ("pae", "sdm", 1, 0, 1), ("4l", "sdm", 0, 0, 0),
    ("4l", "sdm", 0, 1, 1), ("4l", "kvm", 1, 0, 1), ("5l", "kvm", 0, 0, 0)])
def test_when_the_error_code_tells_a_fetch(mode, conformance, smep, nxe, reported):
    """I/D only with SMEP, or NXE and PAE; KVM: NXE or SMEP (row D1, corner case 7)."""
    walk = mapped(mode, "w u", off={"efer": NXE}, on={"efer": NXE * nxe, "cr4": SMEP * smep},
                  conformance=conformance).gva_walk
    assert (U | F * reported, "not-present") == verdict(walk, FETCH | USER)
    assert (U, "not-present") == verdict(walk, READ | USER)


# ---- protection keys (long mode only) -------------------------------------------------------------------------------

AD_5, WD_5 = 1 << 10, 1 << 11


@pytest.mark.parametrize("mode", LONG)
@pytest.mark.parametrize(("flags", "pkru", "access", "wp", "error_code", "rule"), [
    ("p w u", AD_5, READ, 1, P | PK, "pkey"),
    ("p w u", AD_5, READ | USER, 1, P | U | PK, "pkey"),
    ("p w u", AD_5, READ | USER | IMPLICIT, 1, P | PK, "pkey"),
    ("p w u", AD_5, FETCH | USER, 1, 0, None),
    ("p w", AD_5, READ, 1, 0, None),
    ("p w", AD_5, READ | USER, 1, P | U, "user"),
    ("p u", AD_5, WRITE | USER, 1, P | W | U | PK, "write"),
    ("p w u", WD_5, READ | USER, 1, 0, None),
    ("p w u", WD_5, WRITE | USER, 0, P | W | U | PK, "pkey"),
    ("p w u", WD_5, WRITE, 1, P | W | PK, "pkey"),
    ("p w u", WD_5, WRITE, 0, 0, None),
    ("p w u", AD_5, WRITE, 0, P | W | PK, "pkey"),
    ("p w u nx", AD_5, FETCH | USER, 1, P | U | F, "nx"),
    ("p w u", ~(AD_5 | WD_5) & 0xFFFFFFFF, WRITE | USER, 1, 0, None)])
def test_protection_keys(mode, flags, pkru, access, wp, error_code, rule):
    """Data accesses to user pages; PK also where another right is missing (pitfall 1, corner case 8)."""
    walk = mapped(mode, flags, pkey=5, on={"cr4": PKE, "pkru": pkru}, off={} if wp else {"cr0": WP}).gva_walk
    assert (error_code, rule) == verdict(walk, access)


@pytest.mark.parametrize("mode", LONG)
def test_keys_of_supervisor_tables_and_without_pke(mode):
    """A page is a user page only if U is set at every level (row D9); without CR4.PKE keys are ignored."""
    everything = {"cr4": PKE, "pkru": 0xFFFFFFFF}
    assert (0, None) == verdict(mapped(mode, pkey=5, upper="p w", on=everything).gva_walk, WRITE)
    assert (0, None) == verdict(mapped(mode, pkey=5, on={"pkru": 0xFFFFFFFF}).gva_walk, WRITE | USER)


def test_keys_outside_long_mode():
    """PAE: bits 62:59 are reserved, and PKRU is irrelevant."""
    everything = {"cr4": PKE, "pkru": 0xFFFFFFFF}
    assert (0, None) == verdict(mapped("pae", on=everything).gva_walk, WRITE | USER)
    assert (P | RSVD, "reserved") == verdict(mapped("pae", pkey=5, on=everything).gva_walk, READ)


# ---- presence and reserved bits -------------------------------------------------------------------------------------

@each_mode
def test_not_present_beats_reserved_at_every_level(mode):
    """P = 0 is P = 0 whatever else is set; a reserved bit above hides what is below (pitfall 1, corner case 16)."""
    for level in range(1, LEVELS[mode] + (mode != "pae")):
        tables = PageTables(mode)
        tables.map(GVA, GPA)
        gpa = tables.entry_gpa(GVA, level)
        tables.write(gpa, tables.read(gpa) & ~1 | ((1 << 51) if mode != "32" else 1 << 21 | 1 << 7))
        fault = fault_of(vcpu_over(tables, maxphyaddr=40).gva_walk, GVA, WRITE | USER)
        assert (W | U, level, "not-present", gpa) == (fault.error_code, fault.level, fault.rule, fault.entry_gpa)
        if mode != "32" or level == 2:
            tables.write(gpa, tables.read(gpa) | 1)
            fault = fault_of(vcpu_over(tables, maxphyaddr=40).gva_walk, GVA, WRITE | USER)
            assert (P | RSVD | W | U, level, "reserved") == (fault.error_code, fault.level, fault.rule)


@pytest.mark.parametrize("mode", LONG)
def test_page_size_and_vendor_bits_of_upper_entries(mode):
    """PS of a PML4E or PML5E is reserved; bit 8 on AMD only; PS of a PDPTE without 1G pages (corner case 19)."""
    for level in range(4, LEVELS[mode] + 1):
        for bit, vendor, bad in ((7, "intel", True), (7, "amd", True), (8, "amd", True), (8, "intel", False)):
            tables = PageTables(mode)
            tables.map(GVA, GPA)
            tables.set_bits(GVA, level, 1 << bit)
            assert bad == bool(verdict(vcpu_over(tables, vendor=vendor).gva_walk, READ)[0])
    assert (P | RSVD, "reserved") == verdict(mapped(mode, level=3, gpa=1 << 30, gbpages=False).gva_walk, READ)
    assert (0, None) == verdict(mapped(mode, level=3, gpa=1 << 30).gva_walk, READ)


@pytest.mark.parametrize("maxphyaddr", [32, 36, 40, 46, 51, 52])
@pytest.mark.parametrize("mode", PAGED_64)
def test_physical_address_width(mode, maxphyaddr):
    """Address bits from MAXPHYADDR up are reserved, the one below is not (corner case 20)."""
    top = 1 << (maxphyaddr - 1)
    assert top == mapped(mode, gpa=top, maxphyaddr=maxphyaddr).gva_walk.gva_to_gpa(GVA)
    if maxphyaddr < 52:
        assert (P | RSVD, "reserved") == verdict(mapped(mode, gpa=2 * top, maxphyaddr=maxphyaddr).gva_walk, READ)
    bit_52 = mapped(mode, raw=1 << 52, maxphyaddr=maxphyaddr).gva_walk
    assert (P | RSVD if mode == "pae" else 0) == verdict(bit_52, READ)[0]


def test_pse():
    """32-bit paging: bit 7 of a PDE counts with CR4.PSE only (corner case 18)."""
    tables = PageTables("32", base=0x400000)
    tables.map(GVA, GPA)
    tables.set_bits(GVA, 2, 1 << 7)                                     # the table is the frame of the 4M page
    assert GPA == vcpu_over(tables, off={"cr4": 1 << 4}).gva_walk.gva_to_gpa(GVA)
    assert 0x400000 | GVA & 0x3FFFFF == vcpu_over(tables).gva_walk.gva_to_gpa(GVA)


@pytest.mark.parametrize(("maxphyaddr", "pse36", "conformance", "width"), [
    (40, True, "sdm", 40), (52, True, "sdm", 40), (36, True, "sdm", 36), (32, True, "sdm", 32), (40, False, "sdm", 32),
    (40, True, "kvm", 36), (32, True, "kvm", 36), (40, False, "kvm", 32)])
def test_pse36(maxphyaddr, pse36, conformance, width):
    """A 4M page lies anywhere below 2^M, M = min(40, MAXPHYADDR); KVM: 36 (row D2). Bits 21:(M-19) are reserved."""
    for bit in range(13, 22):
        walk = mapped("32", level=2, gpa=0, raw=1 << bit, maxphyaddr=maxphyaddr, pse36=pse36,
                      conformance=conformance).gva_walk
        if bit < width - 19:
            assert (1 << (bit + 19)) + (GVA & 0x3FFFFF) == walk.gva_to_gpa(GVA)
        else:
            assert (P | RSVD, "reserved") == verdict(walk, READ)


@pytest.mark.parametrize(("mode", "level"), LEAF_SIZE)
def test_large_pages(mode, level):
    """Every offset bit is the address's; bit 12 is PAT, not reserved; the bits above it up to the frame are."""
    size = LEAF_SIZE[mode, level]
    walk = mapped(mode, level=level, gpa=3 * size, raw=1 << 12).gva_walk
    assert 3 * size + (GVA & (size - 1)) == walk.gva_to_gpa(GVA)
    last = (GVA & ~(size - 1)) + size - 1
    assert 4 * size - 1 == walk.gva_to_gpa(last)
    assert (level, LEVELS[mode] - level + 1 - (mode == "pae")) == tuple(
        one(walk, GVA)[name] for name in ("level", "refs"))
    if mode != "32":
        assert (P | RSVD, "reserved") == verdict(mapped(mode, level=level, gpa=0, raw=size >> 1).gva_walk, READ)


@each_mode
def test_pat_bit_of_a_pte_is_ignored(mode):
    """Bit 7 of a PTE is PAT (pitfall 5)."""
    assert GPA == mapped(mode, raw=1 << 7).gva_walk.gva_to_gpa(GVA)


# ---- addresses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "width"), [("4l", 48), ("5l", 57)])
def test_canonical_bounds(mode, width):
    """The last address of the lower half and the first of the upper one are canonical, their neighbours are not."""
    top = 1 << (width - 1)
    tables = PageTables(mode)
    tables.map(top - 0x1000, 0x10000)
    tables.map(2**64 - top, 0x20000)
    walk = vcpu_over(tables).gva_walk
    assert (0x10FFF, 0x20000) == (walk.gva_to_gpa(top - 1), walk.gva_to_gpa(2**64 - top))
    for gva in (top, 2**64 - top - 1, 1 << 63, 2**63 - 1):
        fault = fault_of(walk, gva, WRITE)
        assert (GeneralProtection, "non-canonical", gva, 0) == (type(fault), fault.rule, fault.address, fault.level)
        expected = {"gpa": INVALID_GPA, "status": Status.NON_CANONICAL, "error_code": 0, "level": 0, "refs": 0}
        actual = one(walk, gva)
        assert expected == {name: actual[name] for name in expected}


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_addresses_outside_long_mode_have_32_bits(mode):
    """The upper half is cut off, in CR2 too (pitfall 7)."""
    walk = mapped(mode).gva_walk
    assert GPA == walk.gva_to_gpa(GVA | 0xFFFFFFFF << 32) == one(walk, GVA | 1 << 63)["gpa"]
    assert 0x1000 == fault_of(walk, 0xABC00001000).address


def test_paging_off():
    """The linear address is the physical one: 32 bits, no faults, no tables, level 0."""
    vcpu = Vcpu(GuestMemory(0x1000))
    assert 0xFFFFFFFF == vcpu.gva_walk.gva_to_gpa(0xFFFFFFFF, WRITE | USER)
    assert 0x12345678 == vcpu.gva_walk.gva_to_gpa(0xA_12345678, FETCH | USER)
    row = one(vcpu.gva_walk, 0x5000)
    assert (0x5000, Status.OK, 0, 0) == tuple(row[name] for name in ("gpa", "status", "level", "refs"))
    assert vcpu.gva_walk.walk_record(0x5000).steps == ()


@each_mode
def test_final_page_may_be_anywhere(mode):
    """A page without a slot translates: MMIO (corner case 23)."""
    assert 0xFEE00000 == mapped(mode, gpa=0xFEE00000).gva_walk.gva_to_gpa(GVA)


# ---- what a fault tells ---------------------------------------------------------------------------------------------

def test_exception_fields():
    """address, access, error_code, level, entry, entry_gpa and rule; the message has them as text."""
    tables = PageTables("4l")
    leaf = tables.map(GVA, GPA, "p u")
    fault = fault_of(vcpu_over(tables).gva_walk, GVA + 5, WRITE | USER)
    assert isinstance(fault, PageFault)
    assert (GVA + 5, WRITE | USER, P | W | U, 1, GPA | 5, leaf, "write") == (
        fault.address, fault.access, fault.error_code, fault.level, fault.entry, fault.entry_gpa, fault.rule)
    for text in (f"{GVA + 5:#x}", f"{GPA | 5:#x}", f"{leaf:#x}", "PTE", "read-only"):
        assert text in str(fault)


@pytest.mark.parametrize("gva", [-1, 1 << 64, 0.5, "0", None])
def test_bad_addresses_of_scalar_calls(gva):
    """ValueError or TypeError, naming the value."""
    walk = mapped("4l").gva_walk
    for call in (walk.gva_to_gpa, walk.walk_record):
        with pytest.raises((ValueError, TypeError), match="gva"):
            call(gva)


@pytest.mark.parametrize("access", [1, 65, 129, 256, -1, 1 << 70])
def test_bad_accesses_of_scalar_calls(access):
    """Bits that are none."""
    walk = mapped("4l").gva_walk
    for call in (walk.gva_to_gpa, walk.walk_record):
        with pytest.raises(ValueError, match="access"):
            call(GVA, access)


def test_scalar_calls_add_rflags_ac_and_arrays_do_not():
    """EFLAGS.AC of the vCPU counts for gva_to_gpa and walk_record only."""
    vcpu = mapped("4l", on={"cr4": SMAP})
    assert (P, "smap") == verdict(vcpu.gva_walk, READ)
    vcpu.set_regs(rflags=1 << 18 | 2)
    assert (0, None) == verdict(vcpu.gva_walk, READ)
    assert Status.OK == vcpu.gva_walk.walk_record(GVA).status
    assert P == one(vcpu.gva_walk, GVA)["error_code"]
    assert (P, "smap") == verdict(vcpu.gva_walk, READ | IMPLICIT)


def test_cr3_is_physical():
    """Bits 4:3 are ignored; bits from MAXPHYADDR up are #GP, whatever canonical means; PAE takes bits 31:5."""
    tables = PageTables("4l")
    tables.map(GVA, GPA)
    vcpu = vcpu_over(tables, maxphyaddr=40)
    vcpu.set_regs(cr3=tables.cr3 | 0x18)
    assert GPA == vcpu.gva_walk.gva_to_gpa(GVA)
    before = vcpu.regs
    with pytest.raises(GeneralProtection, match="0x10000000000"):
        vcpu.set_regs(cr3=tables.cr3 | 1 << 40)
    assert before == vcpu.regs
    assert GPA == vcpu.gva_walk.gva_to_gpa(GVA)


# ---- PAE PDPTE registers --------------------------------------------------------------------------------------------

def test_pdptes_are_registers():
    """Loaded with CR3, stale until reloaded, anywhere on 32 bytes; not present is a level-3 fault (corner case 17)."""
    tables = PageTables("pae")
    tables.map(GVA, GPA)
    vcpu = vcpu_over(tables)
    pdpte = vcpu.gva_walk.get_pdptr(1)
    vcpu.mem.write_u64(tables.cr3 + 8, 0)
    assert GPA == vcpu.gva_walk.gva_to_gpa(GVA)
    assert pdpte == vcpu.gva_walk.get_pdptr(1)
    fault = fault_of(vcpu.gva_walk, 0xC0000000, WRITE)
    assert (W, 3, "not-present", None) == (fault.error_code, fault.level, fault.rule, fault.entry_gpa)
    vcpu.mem.write_u64(tables.cr3 + 0x7E8, pdpte)
    vcpu.set_regs(cr3=tables.cr3 + 0x7E0 + 0x1F)
    assert GPA == vcpu.gva_walk.gva_to_gpa(GVA)
    vcpu.set_regs(cr3=tables.cr3)
    assert 3 == fault_of(vcpu.gva_walk, GVA).level


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63])
@pytest.mark.parametrize("index", range(4))
def test_reserved_bits_of_pdptes(bit, index):
    """All four are checked at the load, even unused ones, and only if present (pitfall 6)."""
    tables = PageTables("pae")
    tables.map(GVA, GPA)
    vcpu = vcpu_over(tables, maxphyaddr=40)
    before = vcpu.regs
    old = vcpu.mem.read_u64(tables.cr3 + 8 * index)
    vcpu.mem.write_u64(tables.cr3 + 8 * index, old | 1 | 1 << bit)
    with pytest.raises(GeneralProtection, match=f"PDPTE {index}"):
        vcpu.set_regs(cr3=tables.cr3)
    assert before == vcpu.regs
    vcpu.mem.write_u64(tables.cr3 + 8 * index, 1 << bit)
    vcpu.set_regs(cr3=tables.cr3)
    assert 1 << bit == vcpu.gva_walk.get_pdptr(index)


def test_pdptes_in_a_hole():
    """PDPTEs that cannot be read make the load of CR3 fail with #GP (semantics 4.2)."""
    vcpu = Vcpu(GuestMemory(0x1000), cpu=CpuModel())
    registers = changed(PageTables("pae").regs())
    with pytest.raises(GeneralProtection, match="PDPTE"):
        vcpu.set_regs(**registers)
    with pytest.raises(GeneralProtection, match="PDPTE"):
        vcpu.gva_walk.prepare([Regs(**registers)])


def test_get_pdptr_has_four():
    """ValueError naming the index."""
    for index in (-1, 4):
        with pytest.raises(ValueError, match=str(index)):
            mapped("pae").gva_walk.get_pdptr(index)
    assert 0x100000 == mapped("pae").gva_walk.get_guest_pgd()


def test_integers_of_numpy_are_taken():
    """Scalars of numpy are taken like Python's."""
    walk = mapped("4l").gva_walk
    assert GPA == walk.gva_to_gpa(np.uint64(GVA), np.uint8(2)) == walk.walk_record(np.uint64(GVA)).gpa


@pytest.mark.parametrize(("gva", "access", "error", "words"), [
    (-1, 0, ValueError, "gva: want 0 to 0xffffffffffffffff, got -1"), (1 << 64, 0, ValueError, "got 0x10000000000000000"),
    ("1", 0, TypeError, "gva: want an integer, got '1'"), (1.0, 0, TypeError, "gva: want an integer, got 1.0"),
    (0, 1, ValueError, "0x1 is no Access bit"), (0, 65, ValueError, "0x1 is no Access bit"),
    (0, 256, ValueError, "access: want 0 to 255, got 256"),
    (0, -1, ValueError, "access: want 0 to 255, got -1"), (0, 1 << 64, ValueError, "access: want 0 to 255, got 0x10{16}"),
    (0, 1.0, TypeError, "access: want an integer, got 1.0"), (0, True, TypeError, "access: want an integer, got True"),
    (True, 0, TypeError, "gva: want an integer, got True"),
    (0, np.array([2], np.uint8), TypeError, "access: want an integer, got ndarray")])
def test_scalar_arguments_that_are_none(gva, access, error, words):
    """The error names the value and what is wanted."""
    with pytest.raises(error, match=words):
        mapped("4l").gva_walk.gva_to_gpa(gva, access)


def test_the_last_address_is_an_address():
    """2**64 - 1 is no error."""
    assert 0xFFFFFFFF == Vcpu(GuestMemory(4096)).gva_walk.gva_to_gpa(2**64 - 1)
