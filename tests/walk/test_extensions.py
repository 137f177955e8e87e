# SPDX-License-Identifier: Apache-2.0
"""Vectors to check by hand of LAM, shadow stacks, protection keys, LASS, UAI, the encryption bit, and extensions of EPT.

Sources: SDM vol. 3, "Linear-Address Masking (LAM)", "Determination of Access Rights", "Shadow Stacks", "Protection Keys",
"Linear-Address-Space Separation (LASS)", "The Extended Page-Table Mechanism (EPT)", "EPT Violations", "Sub-Page Write
Permissions", "Convertible EPT Violations"; APM vol. 2, "Upper Address Ignore", "Guest Mode Execute Trap", "Secure Memory
Encryption".
"""

from functools import partial

import numpy as np
import pytest

from kvmmu import (
    Access,
    CpuModel,
    Ept,
    EptMisconfig,
    EptViolation,
    GeneralProtection,
    GuestMemory,
    NestedPageFault,
    Npt,
    PageFault,
    Regs,
    SppEvent,
    Status,
    Vcpu,
    VirtualizationException,
)
from kvmmu.arch.delivery import ExceptionInjected, VmxExit
from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

P, W, U, A, D, NX = 1, 2, 4, 0x20, 0x40, 1 << 63
R, EW, X, BIT60, BIT61, BIT63 = 1, 2, 4, 1 << 60, 1 << 61, 1 << 63
PG, PAE, LA57, SMEP, SMAP, PKE = 0x80000033, 0x20, 1 << 12, 1 << 20, 1 << 21, 1 << 22
CET, PKS, LASS, LAM_SUP = 1 << 23, 1 << 24, 1 << 27, 1 << 28
WP, U57, U48, UAIE, LONG = 1 << 16, 1 << 61, 1 << 62, 1 << 20, 0xD00
GVA, DATA = 0xABC, 0x400000
KEY5 = 5 << 59
AD, WD = 1 << 10, 1 << 11                               # of key 5


def entry(text):
    """An entry: P W U A D NX, rights of EPT as RWX, "bit n"; whatever is not named is 0."""
    value = 0
    words = text.replace(",", "").split()
    for number, word in enumerate(words):
        if word == "bit":
            value |= 1 << int(words[number + 1])
        elif word in ("P", "W", "U", "A", "D", "NX"):
            value |= {"P": P, "W": W, "U": U, "A": A, "D": D, "NX": NX}[word]
    return value


def guest_memory(pde=P | W | U | A, pte=P | W | U | A, root=0x1000, size=0x10000):
    """4-level tables that map GVA by this PDE and PTE."""
    mem = GuestMemory(size)
    for gpa, value in ((root, 0x2000 | P | W | U | A), (0x2000, 0x3000 | P | W | U | A), (0x3000, 0x4000 | pde),
    (0x4000, DATA | pte)):
        mem.write_u64(gpa, value)
    return mem


def run(vcpu, gva, access):
    """The outcome of one access in three ways, which agree: "ok", "#GP", or the error code and CR2."""
    record = vcpu.gva_walk.walk_record(gva, access)
    column = vcpu.gva_walk.translate(np.full(70, gva, np.uint64), int(access), set_ad=False)
    assert len(set(zip(column.status.tolist(), column.error_code.tolist(), column.gpa.tolist(), strict=True))) == 1
    try:
        gpa = vcpu.gva_walk.gva_to_gpa(gva, access)
        found = "ok"
        assert column.gpa[0] == gpa == record.gpa
    except PageFault as fault:
        found = fault.error_code
        assert (column.status[0], column.error_code[0]) == (Status.PAGE_FAULT, fault.error_code)
        assert (record.error_code, record.rule, record.gva) == (fault.error_code, fault.rule, fault.address)
    except GeneralProtection as fault:
        found = "#GP"
        assert column.status[0] == (Status.LASS_VIOLATION if fault.rule == "lass" else Status.NON_CANONICAL)
        assert record.status == column.status[0]
        assert record.rule == fault.rule
    return found


def vcpu_of(mem, *, cpu=None, cr0=PG | WP, cr3=0x1000, cr4=PAE, efer=LONG, **registers):
    vcpu = Vcpu(mem, cpu or CpuModel(maxphyaddr=46))
    vcpu.set_regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, **registers)
    return vcpu


# ---- linear-address masking ---------------------------------------------------------------------------------------------

LAM = [
    (0, 0, "read", 0x0001_1234_5678_9ABC, None), (0, U48, "read", 0x7ABC_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
    (0, U48, "write", 0x0000_9234_5678_9ABC, None), (0, U57, "read", 0x7E00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
    (0, U57, "read", 0x0100_1234_5678_9ABC, None), (0, U57, "read", 0x0001_1234_5678_9ABC, None),
    (0, U48 | U57, "read", 0x0001_1234_5678_9ABC, None), (0, U48, "fetch", 0x4000_1234_5678_9ABC, None),
    (0, U48, "implicit", 0x4000_1234_5678_9ABC, None), (0, LAM_SUP, "read", 0x8000_9234_5678_9ABC, 0xFFFF_9234_5678_9ABC),
    (0, LAM_SUP, "read", 0x4000_1234_5678_9ABC, None), (0, U48, "read", 0x8000_9234_5678_9ABC, None),
    (1, LAM_SUP, "read", 0x8155_1234_5678_9ABC, 0xFF55_1234_5678_9ABC), (1, LAM_SUP, "read", 0x8055_9234_5678_9ABC, None),
    (1, U48, "read", 0x7F55_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
    (1, U57, "read", 0x7E55_1234_5678_9ABC, 0x0055_1234_5678_9ABC),
    (1, U57, "read", 0x0155_1234_5678_9ABC, None), (0, LAM_SUP, "user", 0x8000_9234_5678_9ABC, 0xFFFF_9234_5678_9ABC),
]
KINDS = {"read": Access.READ, "write": Access.WRITE, "fetch": Access.FETCH, "implicit": Access.IMPLICIT, "user": Access.USER,
         "SS read": Access.SHADOW_STACK, "SS write": Access.SHADOW_STACK | Access.WRITE}


@pytest.mark.parametrize(("la57", "lam", "kind", "gva", "cr2"), LAM)
def test_1_linear_address_masking(la57, lam, kind, gva, cr2):
    """Nothing is mapped: a #PF shows the address without its tag."""
    vcpu = vcpu_of(GuestMemory(0x10000), cr3=0x1000 | lam & ~LAM_SUP, cr4=PAE | LA57 * la57 | lam & LAM_SUP)
    access = KINDS[kind]
    if cr2 is None:
        assert run(vcpu, gva, access) == "#GP"
        return
    assert run(vcpu, gva, access) == {"write": 2, "user": 4}.get(kind, 0)
    with pytest.raises(PageFault) as fault:
        vcpu.gva_walk.gva_to_gpa(gva, access)
    assert fault.value.address == cr2
    span = vcpu.gva_walk.translate_span(np.array([gva], np.uint64), 8, int(access))
    assert span.address[0] == cr2


def test_1_masking_in_the_fast_paths_and_in_spans():
    """A tagged pointer leads where the pointer without its tag does: scalar, in batches of every size, across pages."""
    mem = guest_memory()
    mem.write_u64(0x4008, DATA + 0x1000 | P | W | U | A)
    vcpu = vcpu_of(mem, cr3=0x1000 | U57)
    tagged = 0x7E00_0000_0000_0000
    walk = vcpu.gva_walk
    assert walk.gva_to_gpa(tagged | GVA, Access.USER) == DATA | GVA
    assert walk.lookup(tagged | GVA, Access.USER).gpa == DATA | GVA
    assert walk.span(tagged | 0xFFC, 8, Access.USER) == [(DATA | 0xFFC, 4), (DATA + 0x1000, 4)]
    for n in (1, 7, 64, 1000, 5000):
        gva = np.arange(n, dtype=np.uint64) * np.uint64(8) % np.uint64(0x2000) | np.uint64(tagged)
        for fields in (("gpa", "status"), ("gpa", "status", "pte")):
            t = walk.translate(gva, int(Access.USER), fields=fields)
            assert not t.status.any()
            assert np.array_equal(t.gpa, gva - np.uint64(tagged) + np.uint64(DATA))
    mixed = np.resize(np.array([Access.USER, Access.USER | Access.FETCH, Access.IMPLICIT], np.uint8), 999)
    for _ in range(2):
        t = walk.translate(np.full(999, tagged | GVA, np.uint64), mixed)
        assert np.array_equal(t.status != 0, mixed != Access.USER)


@pytest.mark.usefixtures("same_instruction_set")
@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("registers", [(LA57 * la57, lam, uai) for la57 in (0, 1) for lam, uai in (
    (U48, 0), (U57, 0), (LAM_SUP, 0), (LAM_SUP | U48, 0), (LAM_SUP | U57, 0), (0, UAIE))])
def test_1_masking_in_blocks(registers, kernels):
    """Blocks of data alone and blocks with fetches, of tagged addresses in either half, are answered as scalar calls are."""
    la57, lam, uai = registers
    use_instruction_set(kernels)
    mem = guest_memory()
    for table, below in ((0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x5000, 0x1000)):
        for index in (0, 511):
            mem.write_u64(table + 8 * index, below | P | W | U | A)
    mem.write_u64(0x4000 + 8 * 511, DATA + 0x1000 | P | W | U | A)
    vcpu = vcpu_of(mem, cr3=(0x5000 if la57 else 0x1000) | lam & ~LAM_SUP, cr4=PAE | la57 | lam & LAM_SUP, efer=LONG | uai)
    rng = np.random.default_rng(lam & 7 | la57)
    gva = np.where(rng.random(1024) < 0.5, np.uint64(0x123), np.uint64(2**64 - 0x123))
    above = np.uint64(57 if la57 else 48)
    gva ^= np.where(rng.random(1024) < 0.7, rng.integers(0, 1 << 15, 1024, np.uint64) << np.uint64(48), np.uint64(0))
    gva ^= np.where(rng.random(1024) < 0.1, np.uint64(1) << (above - np.uint64(1)), np.uint64(0))
    fetches = np.where(np.arange(1024) >= 512, rng.choice(np.array([0, 16, 32, 64, 128], np.uint8), 1024), 0).astype(np.uint8)
    t = vcpu.gva_walk.translate(gva, fetches, set_ad=False)
    again = vcpu.gva_walk.translate(gva, fetches, set_ad=False, fields=("gpa", "status", "pte"))
    assert np.array_equal(t.gpa, again.gpa)
    for row, (address, access) in enumerate(zip(gva.tolist(), fetches.tolist(), strict=True)):
        try:
            assert vcpu.gva_walk.gva_to_gpa(address, access) == t.gpa[row]
            assert t.status[row] == Status.OK
        except PageFault as fault:
            assert (Status.PAGE_FAULT, fault.error_code) == (t.status[row], t.error_code[row])
        except GeneralProtection:
            assert t.status[row] == Status.NON_CANONICAL
    assert len(set(t.status[:512].tolist())) > 1


def test_1_what_has_no_tag():
    """PROBE, and the addresses of INVLPG and INVPCID, are taken as they are."""
    vcpu = vcpu_of(guest_memory(), cr3=0x1000 | U48)
    tagged = 0x1234_0000_0000_0ABC
    assert vcpu.gva_walk.gva_to_gpa(tagged, Access.USER) == DATA | GVA
    assert run(vcpu, tagged, Access.PROBE) == "#GP"
    vcpu.invlpg(tagged)
    with pytest.raises(GeneralProtection):
        vcpu.invpcid(0, 0, tagged)


def test_1_conformance_kvm_takes_addresses_without_tags():
    vcpu = vcpu_of(guest_memory(), cpu=CpuModel(conformance="kvm"), cr3=0x1000 | U48)
    assert run(vcpu, 0x1234_0000_0000_0ABC, Access.USER) == "#GP"
    assert run(vcpu, GVA, Access.USER) == "ok"


def test_1_the_lam_bits_follow_cr3():
    """MOV to CR3 turns masking on and off."""
    vcpu = vcpu_of(guest_memory())
    tagged = 0x1234_0000_0000_0ABC
    for lam in (0, U48, 0, U48 | U57, U48):
        vcpu.mov_cr(3, 0x1000 | lam)
        assert run(vcpu, tagged, Access.USER) == ("ok" if lam == U48 else "#GP")


# ---- shadow stacks ------------------------------------------------------------------------------------------------------

SHADOW_STACKS = [
    ("P W U A", "P U A D", "SS write", 3, 1, 1, "ok"), ("P W U A", "P U A D", "SS read", 3, 1, 1, "ok"),
    ("P W U A", "P W U A D", "SS write", 3, 1, 1, 0x47), ("P W U A", "P U A", "SS write", 3, 1, 1, 0x47),
    ("P U A", "P U A D", "SS read", 3, 1, 1, 0x45), ("P W U A", "P U A D", "SS write", 0, 1, 1, 0x43),
    ("P W U A", "P A D", "SS write", 0, 1, 1, "ok"), ("P W U A", "P A D", "SS read", 3, 1, 1, 0x45),
    ("P W A", "P U A D", "SS write", 0, 1, 1, "ok"), ("P W U A", "P U A D", "write", 3, 1, 1, 0x7),
    ("P W U A", "P U A D", "read", 3, 1, 1, "ok"), ("P W U A", "P A D", "write", 0, 1, 1, 0x3),
    ("P W U A", "P A D", "write", 0, 0, 0, "ok"), ("P W U A", "0", "SS write", 3, 1, 1, 0x46),
    ("P W U A", "P U A D bit 46", "SS write", 3, 1, 1, 0x4F), ("P W U A", "P U D", "SS write", 3, 1, 1, "ok"),
    ("P W U A", "P U A D NX", "SS write", 3, 1, 1, "ok"), ("P W U A", "P U A D", "fetch", 3, 1, 1, "ok"),
]


@pytest.mark.parametrize(("pde", "pte", "kind", "cpl", "wp", "cet", "result"), SHADOW_STACKS)
def test_2_shadow_stacks(pde, pte, kind, cpl, wp, cet, result):
    mem = guest_memory(entry(pde), entry(pte))
    vcpu = vcpu_of(mem, cr0=PG | WP * wp, cr4=PAE | CET * cet)
    assert run(vcpu, GVA, KINDS[kind] | Access.USER * (cpl == 3)) == result
    if result == "ok":
        assert mem.read_u64(0x4000) & A
        assert not kind.startswith("SS") or mem.read_u64(0x4000) == DATA | entry(pte) | A


def test_2_the_rule_that_fails():
    mem = guest_memory(P | W | U | A, P | A | D)
    walk = vcpu_of(mem, cr4=PAE | CET).gva_walk
    assert walk.walk_record(GVA, Access.SHADOW_STACK | Access.USER).rule == "user"
    mem.write_u64(0x4000, DATA | P | U | A | D)
    record = walk.walk_record(GVA, Access.SHADOW_STACK | Access.WRITE)
    assert record.rule == "shadow-stack"
    assert "shadow-stack write" in str(record)


def test_2_conformance_kvm_knows_no_shadow_stack_accesses():
    """They are judged as reads and writes."""
    vcpu = vcpu_of(guest_memory(), cpu=CpuModel(conformance="kvm"), cr4=PAE | CET)
    assert run(vcpu, GVA, Access.SHADOW_STACK | Access.WRITE | Access.USER) == "ok"
    vcpu.mem.write_u64(0x4000, DATA | P | U | A | D)
    assert run(vcpu, GVA, Access.SHADOW_STACK | Access.WRITE | Access.USER) == 7


# ---- protection keys ------------------------------------------------------------------------------------------------------

KEYS = [
    ("P W U A", "read", 0, 1, AD, None, 0x21), ("P W U A", "read", 0, 1, None, AD, "ok"), ("P W A", "read", 0, 1, None, AD, 0x21),
    ("P W A", "read", 0, 1, None, WD, "ok"), ("P W A", "write", 0, 1, None, WD, 0x23), ("P W A", "write", 0, 0, None, WD, "ok"),
    ("P W A", "write", 0, 0, None, AD, 0x23), ("P W A", "write", 0, 1, None, None, "ok"),
    ("P W A", "fetch", 0, 1, None, AD | WD, "ok"), ("P W A", "read", 0, 1, AD | WD, None, "ok"),
    ("P W U A", "write", 3, 0, WD, None, 0x27), ("P W U A", "write", 0, 0, WD, None, "ok"),
    ("P A", "write", 0, 1, None, WD, 0x23), ("P W A", "read", 3, 1, None, AD, 0x25),
    ("P A D", "SS write", 0, 1, None, WD, 0x63), ("P A D", "SS read", 0, 1, None, WD, "ok"),
]


@pytest.mark.parametrize(("pte", "kind", "cpl", "wp", "pkru", "pkrs", "result"), KEYS)
def test_3_protection_keys(pte, kind, cpl, wp, pkru, pkrs, result):
    """None: the control bit of the register is clear, and the register denies everything."""
    vcpu = vcpu_of(guest_memory(pte=entry(pte) | KEY5), cr0=PG | WP * wp,
                   cr4=PAE | (PKE if pkru is not None else 0) | (PKS if pkrs is not None else 0) | CET * wp,
                   pkru=0xFFFFFFFF if pkru is None else pkru, pkrs=0xFFFFFFFF if pkrs is None else pkrs)
    assert run(vcpu, GVA, KINDS[kind] | Access.USER * (cpl == 3)) == result


def test_3_wrmsr_pkrs():
    vcpu = vcpu_of(guest_memory(pte=P | W | A | KEY5), cr4=PAE | PKS)
    assert run(vcpu, GVA, Access.READ) == "ok"
    vcpu.wrmsr_pkrs(AD)
    assert vcpu.regs.pkrs == AD
    assert run(vcpu, GVA, Access.READ) == 0x21
    with pytest.raises(GeneralProtection, match="32"):
        vcpu.wrmsr_pkrs(1 << 32)
    vcpu.set_regs(pkrs=WD)
    assert run(vcpu, GVA, Access.WRITE) == 0x23
    assert vcpu.gva_walk.permission_fault(3, 5, Access.WRITE) == 0x21
    assert vcpu.gva_walk.permission_fault(7, 5, Access.WRITE) == 0
    with pytest.raises(GeneralProtection, match="IA32_PKRS"):
        Vcpu(GuestMemory(4096), CpuModel(pks=False)).wrmsr_pkrs(0)


# ---- linear-address-space separation ---------------------------------------------------------------------------------------

SEPARATION = [
    (0, "P W U A", "read", 3, 0, 0, 0, "ok"), (1, "P W U A", "read", 3, 0, 0, 0, "#GP"),
    (1, "P W U A", "fetch", 3, 0, 0, 0, "#GP"),
    (0, "P W U A", "read", 0, 0, 0, 0, "ok"), (0, "P W U A", "read", 0, 1, 0, 0, "#GP"), (0, "P W U A", "read", 0, 1, 1, 0, "ok"),
    (0, "P W U A", "implicit", 0, 1, 1, 0, "#GP"), (0, "P W U A", "implicit", 0, 0, 0, 0, "ok"),
    (0, "P W U A", "write", 0, 1, 0, 0, "#GP"), (0, "P W U A", "fetch", 0, 0, 0, 0, "#GP"),
    (0, "P W A", "fetch", 0, 0, 1, 0, "#GP"),
    (1, "P W U A", "fetch", 0, 0, 0, 0, "ok"), (1, "P W U A", "fetch", 0, 0, 0, 1, 0x11), (0, "P W A", "read", 0, 1, 0, 0, "#GP"),
    (1, "P W U A", "read", 0, 1, 0, 0, 0x1),
]


@pytest.mark.parametrize(("upper", "pte", "kind", "cpl", "smap", "ac", "smep", "result"), SEPARATION)
def test_4_linear_address_space_separation(upper, pte, kind, cpl, smap, ac, smep, result):
    mem = guest_memory(pte=entry(pte))
    mem.write_u64(0x1000 + 8 * 256, 0x2000 | P | W | U | A)
    vcpu = vcpu_of(mem, cr4=PAE | LASS | SMAP * smap | SMEP * smep)
    access = KINDS[kind] | Access.USER * (cpl == 3) | Access.AC * ac
    gva = GVA | 0xFFFF_8000_0000_0000 * upper
    assert run(vcpu, gva, access) == result
    if result == "#GP":
        assert vcpu.gva_walk.walk_record(gva, access).status == Status.LASS_VIOLATION
        assert vcpu.gva_walk.walk_record(gva, Access.PROBE).status == Status.OK


# ---- upper address ignore --------------------------------------------------------------------------------------------------

UPPER_ADDRESS_IGNORE = [
    (0, 0, "read", 0x0200_1234_5678_9ABC, None), (0, 1, "read", 0xFE00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
    (0, 1, "read", 0x0100_1234_5678_9ABC, None), (0, 1, "read", 0x0001_1234_5678_9ABC, None),
    (0, 1, "read", 0x01FF_9234_5678_9ABC, 0xFFFF_9234_5678_9ABC), (0, 1, "fetch", 0x0200_1234_5678_9ABC, None),
    (0, 1, "implicit", 0x0200_1234_5678_9ABC, None), (1, 1, "read", 0xAA55_1234_5678_9ABC, 0x0055_1234_5678_9ABC),
    (1, 1, "read", 0x0155_1234_5678_9ABC, 0xFF55_1234_5678_9ABC), (1, 1, "fetch", 0xAA55_1234_5678_9ABC, None),
    (0, 1, "write", 0xAA00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
]


@pytest.mark.parametrize(("la57", "uaie", "kind", "gva", "address"), UPPER_ADDRESS_IGNORE)
def test_5_upper_address_ignore(la57, uaie, kind, gva, address):
    vcpu = vcpu_of(GuestMemory(0x10000), cpu=CpuModel(vendor="amd"), cr4=PAE | LA57 * la57, efer=LONG | UAIE * uaie)
    assert run(vcpu, gva, KINDS[kind]) == ("#GP" if address is None else 2 * (kind == "write"))
    if address is not None:
        assert vcpu.gva_walk.walk_record(gva, KINDS[kind]).gva == address


# ---- the encryption bit ----------------------------------------------------------------------------------------------------

ENCRYPTION = [
    (43, 0, "P W U A", "P W U A", "read", "ok"), (43, 1, "P W U A", "P W U A", "read", "ok"),
    (43, 0, "P W U A bit 47", "P W U A", "read", "ok"), (43, 0, "P W U A", "P W U A bit 47", "read", "ok"),
    (43, 1, "P W U A bit 47", "P W U A bit 47", "write", "ok"), (43, 0, "P W U A", "P W U A bit 43", "read", 0xD),
    (43, 0, "P W U A", "P W U A bit 46", "read", 0xD), (43, 0, "P W U A bit 48", "P W U A", "write", 0xF),
    (43, 0, "P W U A", "P U A bit 47", "write", 0x7), (43, 0, "P W U A bit 47", "W U bit 47", "read", 0x4),
    (48, 0, "P W U A", "P W U A bit 48", "read", 0xD),
]


@pytest.mark.parametrize(("width", "in_cr3", "pde", "pte", "kind", "result"), ENCRYPTION)
def test_8_the_encryption_bit(width, in_cr3, pde, pte, kind, result):
    mem = guest_memory(entry(pde), entry(pte))
    vcpu = vcpu_of(mem, cpu=CpuModel(vendor="amd", maxphyaddr=width, c_bit=47), cr3=0x1000 | in_cr3 << 47)
    assert run(vcpu, GVA, KINDS[kind] | Access.USER) == result
    if result == "ok":
        assert vcpu.gva_walk.gva_to_gpa(GVA) == DATA | GVA
        assert vcpu.gva_walk.lookup(GVA).gpa == DATA | GVA
        mapped = vcpu.gva_walk.mappings()
        assert mapped.gpa.tolist() == [DATA]


# ---- probes ---------------------------------------------------------------------------------------------------------------

def test_a_probe_needs_no_rights_and_sets_no_bits():
    """In every form; not present and reserved bits end it."""
    mem = guest_memory(P | A, P | KEY5 | NX)
    vcpu = vcpu_of(mem, cr4=PAE | SMAP | SMEP | PKE | PKS, pkru=0xFFFFFFFF, pkrs=0xFFFFFFFF)
    for access in (Access.PROBE, Access.PROBE | Access.USER, Access.PROBE | Access.WRITE | Access.USER):
        assert run(vcpu, GVA, access) == "ok"
        for n in (1, 64, 3000):
            mixed = np.resize(np.array([access, Access.USER | Access.WRITE], np.uint8), n)
            t = vcpu.gva_walk.translate(np.full(n, GVA, np.uint64), mixed)
            assert np.array_equal(t.status, np.resize(np.array([0, 1], np.uint8), n))
    assert mem.read_u64(0x4000) == DATA | P | KEY5 | NX
    mem.write_u64(0x4000, 0)
    assert run(vcpu, GVA, Access.PROBE) == 0
    mem.write_u64(0x4000, DATA | P | 1 << 50)
    assert run(vcpu, GVA, Access.PROBE | Access.USER) == 0xD


def test_a_probe_through_two_stages():
    """Neither stage needs rights, and neither sets bits."""
    vcpu, mem = nested(pte="X")
    assert vcpu.gva_walk.gva_to_gpa(GVA, Access.PROBE) == DATA | GVA
    with pytest.raises(EptViolation):
        vcpu.gva_walk.gva_to_gpa(GVA, Access.READ)
    vcpu, mem = nested(pte="RWX", eptp_bits=1 << 6)
    before = mem.read(0, 0x20000)
    assert vcpu.gva_walk.gva_to_gpa(GVA, Access.PROBE | Access.WRITE) == DATA | GVA
    t = vcpu.gva_walk.translate(np.full(200, GVA, np.uint64), int(Access.PROBE | Access.WRITE))
    assert not t.status.any()
    assert mem.read(0, 0x20000) == before


# ---- extended page tables ----------------------------------------------------------------------------------------------------

def ept_entry(text, address=0):
    value = address
    for word in text.split():
        if set(word) <= set("RWX"):
            value |= sum({"R": R, "W": EW, "X": X}[letter] for letter in word)
    return value | entry(text) & (BIT60 | BIT61 | BIT63)


MEMORY_TYPE = 6 << 3
HOST_DATA = DATA


def nested(pde="RWX", pte="RWX", guest_pte="P W U A D", eptp_bits=0, *, guest_cr4=PAE | CET, maxphyaddr=52, **stage):
    """L2 with 4-level tables at 0x1000 under an EPT at 0x8000 whose PDE of the data page, and PTE, are these."""
    mem = guest_memory(pte=entry(guest_pte), size=0x20000)
    rwx = R | EW | X
    for gpa, value in ((0x8000, 0x9000 | rwx), (0x9000, 0xA000 | rwx), (0xA000, 0xB000 | rwx),
                       (0xA000 + 8 * (DATA >> 21), ept_entry(pde, 0xC000) if pde != "0" else 0)):
        mem.write_u64(gpa, value)
    for page in range(16):
        mem.write_u64(0xB000 + 8 * page, page << 12 | rwx | MEMORY_TYPE)
    value = ept_entry(pte, DATA | MEMORY_TYPE) if ept_entry(pte) & 7 else ept_entry(pte)
    mem.write_u64(0xC000 + 8 * (DATA >> 12 & 511), value)
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=maxphyaddr))
    vcpu.enter_nested(Ept(0x8000 | 6 | 3 << 3 | eptp_bits, **stage), cr0=PG | WP, cr3=0x1000, cr4=guest_cr4, efer=LONG)
    return vcpu, mem


def outcome(vcpu, access):
    """"ok", or what ends the access; the record and the batch agree."""
    record = vcpu.gva_walk.walk_record(GVA, access)
    t = vcpu.gva_walk.translate(np.full(70, GVA, np.uint64), int(access), set_ad=False,
                                fields=("status", "exit_qualification", "gpa"))
    plain = vcpu.gva_walk.translate(np.full(70, GVA, np.uint64), int(access), set_ad=False)
    assert np.array_equal(t.status, plain.status)
    assert len(set(t.status.tolist())) == len(set(t.exit_qualification.tolist())) == 1
    try:
        gpa = vcpu.gva_walk.gva_to_gpa(GVA, access)
        found = "ok"
        assert gpa == DATA | GVA == t.gpa[0]
    except EptMisconfig:
        found = "misconfig"
    except VirtualizationException as fault:
        found = ("#VE", fault.exit_qualification)
    except SppEvent as fault:
        found = ("SPP", fault.exit_qualification)
    except EptViolation as fault:
        found = fault.exit_qualification
    status = {"ok": Status.OK, "misconfig": Status.EPT_MISCONFIG}.get(found) if isinstance(found, str) else (
        Status.EPT_VIOLATION if isinstance(found, int) else {"#VE": Status.VIRT_EXCEPTION, "SPP": Status.SPP_EVENT}[found[0]])
    assert t.status[0] == status == record.status
    if found not in ("ok", "misconfig"):
        assert t.exit_qualification[0] == record.exit_qualification == (found if isinstance(found, int) else found[1])
        str(record)
    return found


FIVE_LEVELS = [
    (5, 38, "RWX", "read", 52, "ok"), (5, 50, "RWX", "read", 52, "ok"), (4, 38, "RWX", "read", 52, "ok"),
    (5, 50, "0", "read", 52, 0x781), (5, 50, "RX", "write", 52, 0x7AA), (5, 50, "R", "fetch", 52, 0x78C),
    (5, 50, "W", "read", 52, "misconfig"), (5, 50, "RWX bit 7", "read", 52, "misconfig"),
    (5, 50, "RWX bit 6", "read", 52, "misconfig"), (5, 45, "RWX bit 46", "read", 46, "misconfig"),
]


@pytest.mark.parametrize(("levels", "bit", "top", "kind", "width", "result"), FIVE_LEVELS)
def test_7_1_walk_length_5(levels, bit, top, kind, width, result):
    """The data page of the guest is at the guest-physical address 2**bit, under a top entry of its own."""
    mem = guest_memory(size=0x40000)
    mem.write_u64(0x4000, 1 << bit | P | W | U | A | D)
    rwx = R | EW | X
    low, root, table = [0x9000, 0xA000, 0xB000], 0x10000, 0x11000
    for level, gpa in zip((4, 3, 2), (0x8000, 0x9000, 0xA000), strict=True):
        mem.write_u64(gpa, gpa + 0x1000 | rwx)
        assert gpa + 0x1000 in low, level
    for page in range(16):
        mem.write_u64(0xB000 + 8 * page, page << 12 | rwx | MEMORY_TYPE)
    root = 0x8000
    if levels == 5:
        root = 0x10000
        mem.write_u64(root, 0x8000 | rwx)
    special = (int(top.split("bit ")[1]),) if "bit" in top else ()
    at = root
    for level in range(levels, 0, -1):
        shift = 9 * level + 3
        slot = at + 8 * (1 << bit >> shift & 511)
        is_first_of_its_own = 1 << bit >> shift & 511 and at == (root if levels == 5 and bit >= 48 else at)
        if level == 1:
            mem.write_u64(slot, DATA | rwx | MEMORY_TYPE)
            break
        if mem.read_u64(slot) & 7 and not is_first_of_its_own:
            at = mem.read_u64(slot) & ~0xFFF & (1 << 52) - 1
            continue
        value = rwx | table
        if at == root or (levels == 5 and bit < 48 and at == 0x8000):
            value = sum({"R": R, "W": EW, "X": X}.get(letter, 0) for letter in top.split()[0]) | table
            value |= sum(1 << number for number in special)
            value = 0 if top == "0" else value
        mem.write_u64(slot, value)
        at, table = table, table + 0x1000
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=width))
    vcpu.enter_nested(Ept(root | 6 | (levels - 1) << 3), cr0=PG | WP, cr3=0x1000, cr4=PAE, efer=LONG)
    assert outcome(vcpu, KINDS[kind] | Access.USER) == result


SUPERVISOR_SHADOW_STACKS = [
    (1, "RWX", "RX bit 60", "P A D", "SS write", 0, "ok"), (1, "RWX", "RX", "P A D", "SS write", 0, 0x21AA),
    (1, "RX", "RX bit 60", "P A D", "SS write", 0, 0x61AA), (1, "RWX", "RWX bit 60", "P A D", "SS write", 0, "ok"),
    (1, "RWX", "X bit 60", "P A D", "SS read", 0, 0x61A1), (1, "RX", "RX bit 60", "P A D", "SS read", 0, 0x61A9),
    (1, "RWX", "RWX", "P A D", "SS read", 0, 0x21B9), (0, "RWX", "RX bit 60", "P A D", "SS write", 0, 0x21AA),
    (0, "RWX", "RWX", "P A D", "SS write", 0, "ok"), (1, "RWX", "RWX", "P U A D", "SS write", 3, "ok"),
    (1, "RWX", "RX bit 60", "P U A D", "SS write", 3, 0x63AA), (1, "RWX", "RX bit 60", "P W U A D", "write", 0, 0x47AA),
    (1, "RWX bit 60", "RX", "P A D", "SS write", 0, 0x21AA),
]


@pytest.mark.parametrize(("control", "pde", "pte", "guest", "kind", "cpl", "result"), SUPERVISOR_SHADOW_STACKS)
def test_7_2_supervisor_shadow_stack_control(control, pde, pte, guest, kind, cpl, result):
    vcpu, _ = nested(pde, pte, guest, control << 7)
    assert outcome(vcpu, KINDS[kind] | Access.USER * (cpl == 3)) == result


SUB_PAGES = [
    (1, "RWX", "RX bit 61", (1, 1, 1), 1 << 42, "write", "ok"),
    (1, "RWX", "RX bit 61", (1, 1, 1), 0x5555515555555555, "write", 0x7AA),
    (1, "RWX", "RX bit 61", (1, 1, 1), 1 << 42, "read", "ok"), (1, "RWX", "RX", (1, 1, 1), 1 << 42, "write", 0x7AA),
    (0, "RWX", "RX bit 61", (1, 1, 1), 1 << 42, "write", 0x7AA), (1, "RWX", "X bit 61", (1, 1, 1), 1 << 42, "write", 0x7A2),
    (1, "RX", "RWX bit 61", (1, 1, 1), 1 << 42, "write", "ok"),
    (1, "RWX", "RX bit 61", (1, 0, 1), 1 << 42, "write", ("SPP", 0x800)),
    (1, "RWX", "RX bit 61", (1, 3, 1), 1 << 42, "write", ("SPP", 0)),
    (1, "RWX", "RX bit 61", (1, 1, 1), 3 << 42, "write", ("SPP", 0)),
    (1, "RWX", "RWX bit 61", (1, 1, 1), 0, "write", "ok"), (1, "RWX", "RX bit 61", (0, 2, 1), 1 << 42, "write", ("SPP", 0x800)),
]


@pytest.mark.parametrize(("control", "pde", "pte", "upper", "vector", "kind", "result"), SUB_PAGES)
def test_7_3_sub_page_write_permissions(control, pde, pte, upper, vector, kind, result):
    vcpu, mem = nested(pde, pte, spptp=0xD000 if control else None)
    for gpa, index, flags in zip((0xD000, 0xE000, 0xF000), (0, 0, DATA >> 21), upper, strict=True):
        mem.write_u64(gpa + 8 * index, gpa + 0x1000 | flags)
    mem.write_u64(0x10000 + 8 * (DATA >> 12 & 511), vector)
    assert outcome(vcpu, KINDS[kind] | Access.USER) == result


def test_7_3_a_sub_page_write_sets_accessed_and_dirty_bits():
    vcpu, mem = nested("RWX", "RX bit 61", eptp_bits=1 << 6, spptp=0xD000)
    for gpa, index in ((0xD000, 0), (0xE000, 0), (0xF000, DATA >> 21)):
        mem.write_u64(gpa + 8 * index, gpa + 0x1000 | 1)
    mem.write_u64(0x10000 + 8 * (DATA >> 12 & 511), 1 << 42)
    assert vcpu.gva_walk.gva_to_gpa(GVA, Access.WRITE | Access.USER) == DATA | GVA
    assert mem.read_u64(0xC000 + 8 * (DATA >> 12 & 511)) & 0x300 == 0x300
    both = vcpu.ngpa_walk.translate(np.array([DATA | GVA, DATA], np.uint64), int(Access.WRITE | Access.USER))
    assert both.status.tolist() == [Status.OK, Status.EPT_VIOLATION]


VIRTUALIZATION_EXCEPTIONS = [
    (1, "RWX", "RX", 0, "write", ("#VE", 0x7AA)), (1, "RWX", "RX bit 63", 0, "write", 0x7AA), (0, "RWX", "RX", 0, "write", 0x7AA),
    (1, "RWX", "RX", 1 << 32, "write", 0x7AA), (1, "RWX", "RX", 7, "write", ("#VE", 0x7AA)),
    (1, "RWX", "0", 0, "read", ("#VE", 0x781)),
    (1, "RWX", "bit 63", 0, "read", 0x781), (1, "RWX bit 63", "RX", 0, "write", ("#VE", 0x7AA)),
    (1, "bit 63", "RWX", 0, "read", 0x781), (1, "RWX", "W", 0, "write", "misconfig"),
    (1, "RX", "RWX", 0, "write", ("#VE", 0x7AA)),
]


@pytest.mark.parametrize(("control", "pde", "pte", "area", "kind", "result"), VIRTUALIZATION_EXCEPTIONS)
def test_7_4_virtualization_exceptions(control, pde, pte, area, kind, result):
    vcpu, mem = nested(pde, pte, ve=0xD000 if control else None)
    mem.write_u64(0xD000, area)
    mem.write_u64(0xD020, 0xFFFF_FFFF)
    assert outcome(vcpu, KINDS[kind] | Access.USER) == result
    if not isinstance(result, tuple):
        assert mem.read_u64(0xD000) == area
        return
    fields = [mem.read_u64(0xD000 + offset) for offset in (0, 8, 16, 24, 32)]
    assert fields == [0xFFFF_FFFF_0000_0030, result[1], GVA, DATA | GVA, 0xFFFF_0000]
    assert outcome(vcpu, KINDS[kind] | Access.USER) == result[1], "the area is taken until the guest clears it"


def test_7_3_delivery_of_sub_page_events():
    """SppEvent becomes an exit with reason 66; a sub-page that is refused, and a misconfiguration, are exits of EPT's own."""
    asked = Access.WRITE | Access.USER
    for upper, vector, kind, expected in (
            (0, 1 << 42, SppEvent, VmxExit(66, 0x800, DATA | GVA, GVA)), (3, 1 << 42, SppEvent, VmxExit(66, 0, DATA | GVA, GVA)),
            (1, 2 << 42, SppEvent, VmxExit(66, 0, DATA | GVA, GVA)),
            (1, 0, EptViolation, VmxExit(48, 0x7AA, DATA | GVA, GVA))):
        vcpu, mem = nested("RWX", "RX bit 61", spptp=0xD000)
        for gpa, index, flags in ((0xD000, 0, 1), (0xE000, 0, upper), (0xF000, DATA >> 21, 1)):
            mem.write_u64(gpa + 8 * index, gpa + 0x1000 | flags)
        mem.write_u64(0x10000 + 8 * (DATA >> 12 & 511), vector)
        before = mem.read(0, 0x20000)
        for call in (vcpu.gva_walk.gva_to_gpa, vcpu.gva_walk.lookup, partial(vcpu.gva_walk.span, size=1)):
            with pytest.raises(kind) as raised:
                call(GVA, access=asked)
            fault = raised.value
            assert (fault.address, fault.fault_gpa, fault.exit_qualification) == (GVA, DATA | GVA, expected.exit_qualification)
            assert vcpu.inject(fault) == vcpu.ngpa_walk.inject_page_fault(fault) == expected
        nmi = 1 << 12
        assert vcpu.inject(fault, nmi).exit_qualification & nmi == nmi
        assert vcpu.cr2 == 0
        assert mem.read(0, 0x20000) == before
    vcpu, _ = nested("RWX", "W bit 61", spptp=0xD000)
    with pytest.raises(EptMisconfig) as raised:
        vcpu.gva_walk.gva_to_gpa(GVA, asked)
    assert vcpu.inject(raised.value) == VmxExit(49, 0, DATA | GVA)


def test_7_4_delivery_of_virtualization_exceptions():
    """Vector 20 without error code and CR2; the area tells what an exit would, and has to be freed before the next one."""
    vcpu, mem = nested("RWX", "RX", ve=0x10000)
    asked = Access.WRITE | Access.USER
    exit_of_it = VmxExit(48, 0x7AA, DATA | GVA, GVA)
    vcpu.gva_walk.walk_record(GVA, asked)
    vcpu.gva_walk.translate(np.array([GVA], np.uint64), int(asked), set_ad=False)
    assert mem.read(0x10000, 40) == bytes(40)               # neither is an access
    for _ in range(2):
        with pytest.raises(VirtualizationException) as raised:
            vcpu.gva_walk.gva_to_gpa(GVA, asked)
        assert vcpu.inject(raised.value) == ExceptionInjected(0, None, "L2", 20)
        assert vcpu.cr2 == 0
        area = np.frombuffer(mem.read(0x10000, 40), "<u4").tolist()
        assert area == [48, 0xFFFFFFFF, 0x7AA, 0, GVA, 0, DATA | GVA, 0, 0, 0]
        mem.write(0x10008, bytes(32))
        for call in (vcpu.gva_walk.gva_to_gpa, vcpu.gva_walk.lookup):
            with pytest.raises(EptViolation) as raised:     # the busy word
                call(GVA, access=asked)
            assert vcpu.inject(raised.value) == exit_of_it
        assert mem.read(0x10008, 32) == bytes(32)
        mem.write(0x10004, bytes(4))                        # as the handler does
    assert vcpu.gva_walk.walk_record(GVA, asked).status == Status.VIRT_EXCEPTION
    mem.write_u64(0xC000 + 8 * (DATA >> 12 & 511), ept_entry("RX bit 63", DATA | MEMORY_TYPE))
    with pytest.raises(EptViolation) as raised:
        vcpu.gva_walk.gva_to_gpa(GVA, asked)
    assert vcpu.inject(raised.value) == exit_of_it
    assert mem.read(0x10004, 36) == bytes(36)
    mem.write_u64(0xC000 + 8 * (DATA >> 12 & 511), ept_entry("RX", DATA | MEMORY_TYPE))
    vcpu.enter_nested(Ept(0x8000 | 6 | 3 << 3, ve=0x10000), cr0=0x10, cr4=0, efer=0)        # real mode has no vector 20
    with pytest.raises(EptViolation):
        vcpu.gva_walk.gva_to_gpa(DATA | GVA, Access.WRITE)
    assert mem.read(0x10004, 36) == bytes(36)


def test_7_4_a_virtualization_exception_of_a_guest_table():
    """A table that EPT does not map: the qualification and the address are the table's, and the linear address is told."""
    vcpu, mem = nested("RWX", "RWX", ve=0x10000)
    mem.write_u64(0xB000 + 8 * 4, 0)
    with pytest.raises(VirtualizationException) as raised:
        vcpu.gva_walk.gva_to_gpa(GVA, Access.USER)
    assert vcpu.inject(raised.value).vector == 20
    assert raised.value.fault_gpa & ~0xFFF == 0x4000
    area = np.frombuffer(mem.read(0x10000, 40), "<u8").tolist()
    assert area[1:4] == [raised.value.exit_qualification, GVA, raised.value.fault_gpa]


def test_7_4_the_first_rows_of_a_batch_take_the_area():
    """Rows keep their order where an information area tells it."""
    vcpu, _ = nested("RWX", "RX", ve=0xD000)
    t = vcpu.gva_walk.translate(np.full(300, GVA, np.uint64), int(Access.WRITE | Access.USER))
    assert t.status[0] == Status.VIRT_EXCEPTION
    assert set(t.status[1:].tolist()) == {int(Status.EPT_VIOLATION)}


GMET = [
    (1, "P W U A", "P W U A", "P W U A D", "fetch", 0, 0x100000011), (1, "P W U A", "P W A", "P W U A D", "fetch", 0, "ok"),
    (1, "P W A", "P W U A", "P W U A D", "fetch", 0, "ok"), (1, "P W U A", "P W U A", "P W U A D", "fetch", 3, "ok"),
    (1, "P W U A", "P W A", "P W U A D", "fetch", 3, "ok"), (1, "P W U A", "P W A NX", "P W U A D", "fetch", 0, 0x100000011),
    (1, "P W U A", "P W A", "P W U A D", "read", 3, "ok"), (1, "P W U A", "P W A", "P W U A D", "write", 0, "ok"),
    (1, "P W U A", "P U A", "P W U A D", "write", 0, 0x100000003), (1, "P W U A", "0", "P W U A D", "read", 3, 0x100000004),
    (0, "P W U A", "P W A", "P W U A D", "read", 0, 0x100000005), (0, "P W U A", "P W U A", "P W U A D", "fetch", 0, "ok"),
    (1, "P W U A", "P W U A", "P W A D", "fetch", 0, 0x100000011),
]


@pytest.mark.parametrize(("gmet", "pde", "pte", "guest", "kind", "cpl", "result"), GMET)
def test_6_guest_mode_execute_trap(gmet, pde, pte, guest, kind, cpl, result):
    mem = guest_memory(pte=entry(guest), size=0x20000)
    for gpa, value in ((0x8000, 0x9000 | P | W | U | A), (0x9000, 0xA000 | P | W | U | A), (0xA000, 0xB000 | P | W | U | A),
                       (0xA000 + 8 * (DATA >> 21), 0xC000 | entry(pde))):
        mem.write_u64(gpa, value)
    for page in range(16):
        mem.write_u64(0xB000 + 8 * page, page << 12 | P | W | U | A | D)
    mem.write_u64(0xC000 + 8 * (DATA >> 12 & 511), DATA | entry(pte) if pte != "0" else 0)
    vcpu = Vcpu(mem, CpuModel(vendor="amd"), tdp="npt")
    vcpu.enter_nested(Npt(0x8000, cr4=PAE, efer=0xD00, gmet=bool(gmet)), cr0=PG | WP, cr3=0x1000, cr4=PAE, efer=LONG)
    access = KINDS[kind] | Access.USER * (cpl == 3)
    try:
        assert vcpu.gva_walk.gva_to_gpa(GVA, access) == DATA | GVA
        found = "ok"
    except NestedPageFault as fault:
        found = fault.exit_qualification
    assert found == result


# ---- registers -------------------------------------------------------------------------------------------------------------

CONTROLS = [("lam", "cr4", LAM_SUP), ("lam", "cr3", U48), ("lam", "cr3", U57), ("shstk", "cr4", CET), ("pks", "cr4", PKS),
            ("lass", "cr4", LASS), ("uai", "efer", UAIE)]


@pytest.mark.parametrize(("feature", "register", "bit"), CONTROLS)
def test_0_control_bits_need_their_feature(feature, register, bit):
    """#GP on a processor without it, by instruction and by a VMM; under "kvm" where KVM does not offer it."""
    legal = {"cr0": PG | WP, "cr3": 0x1000, "cr4": PAE, "efer": LONG}
    for cpu, has in ((CpuModel(), True), (CpuModel(**{feature: False}), False),
                     (CpuModel(conformance="kvm"), feature not in ("pks", "lass", "uai"))):
        vcpu = Vcpu(guest_memory(), cpu)
        vcpu.set_regs(**legal)
        value = legal[register] | bit
        instruction = {"cr3": partial(vcpu.mov_cr, 3), "cr4": partial(vcpu.mov_cr, 4), "efer": vcpu.wrmsr_efer}[register]
        for call in (instruction, None):
            def load(value, vcpu=vcpu, call=call):
                return vcpu.set_regs(**{register: value}) if call is None else call(value)
            if has:
                load(value)
                assert getattr(vcpu.regs, register) == value
                assert vcpu.gva_walk.gva_to_gpa(GVA, Access.USER) == DATA | GVA
                continue
            with pytest.raises(GeneralProtection) as fault:
                load(value)
            assert fault.value.rule == f"{register}-reserved"
            assert getattr(vcpu.regs, register) == legal[register]


def test_0_cet_needs_write_protection():
    vcpu = vcpu_of(guest_memory(), cr0=PG)
    with pytest.raises(GeneralProtection, match="WP"):
        vcpu.mov_cr(4, PAE | CET)
    vcpu.mov_cr(0, PG | WP)
    vcpu.mov_cr(4, PAE | CET)
    with pytest.raises(GeneralProtection, match="WP"):
        vcpu.mov_cr(0, PG)
    with pytest.raises(GeneralProtection, match="WP"):
        vcpu.set_regs(cr0=PG)


@pytest.mark.parametrize("wrong", [{"c_bit": 31}, {"c_bit": 52}, {"lam": 1.5}, {"pks": "yes"}])
def test_wrong_models_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        CpuModel(**wrong)


@pytest.mark.parametrize("wrong", [{"spptp": 0x123}, {"ve": 1 << 52}, {"ve": 8}])
def test_wrong_second_stages_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Ept(0x8000 | 6 | 3 << 3, **wrong)
    with pytest.raises(ValueError, match="11:8"):
        Ept(0x8000 | 6 | 3 << 3 | 1 << 8)
    with pytest.raises(ValueError, match="pkrs"):
        Regs(0, 0, 0, 0, pkrs=1 << 32)


@pytest.mark.parametrize("stage", [{"eptp": 1 << 7}, {"spptp": 0xD000}, {"ve": 0xD000}])
def test_7_conformance_kvm_has_no_extensions_of_ept(stage):
    """KVM offers them to no L1."""
    vcpu = Vcpu(guest_memory(size=0x20000), CpuModel(conformance="kvm"))
    ept = Ept(0x8000 | 6 | 3 << 3 | stage.pop("eptp", 0), **stage)
    with pytest.raises(ValueError, match="stage: KVM offers L1 no"):
        vcpu.enter_nested(ept, cr0=PG | WP, cr3=0x1000, cr4=PAE, efer=LONG)
