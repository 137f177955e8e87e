# SPDX-License-Identifier: Apache-2.0
"""Roles: which bits of the registers make them, when a walk is built anew, and CpuRole as a value."""

import copy
import pickle

import numpy as np
import pytest
from builders import PageTables, mode_regs
from machines import NXE, PE, PG, PKE, SMAP, SMEP, WP, one, vcpu_over

from kvmmu import Access, CpuRole, Status, calc_cpu_roles

PSE, PAE, LA57 = 1 << 4, 1 << 5, 1 << 12
LME, LMA = 1 << 8, 1 << 10
FLAGS = ("has_4_byte_gpte", "direct", "invalid", "efer_nx", "cr0_wp", "smap_andnot_wp", "ad_disabled", "guest_mode",
         "passthrough", "is_mirror", "cr4_smep", "valid", "execonly", "cr4_pse", "cr4_pke", "cr4_smap", "cr4_la57",
         "efer_lma", "has_pferr_fetch")


def expected_role(cr0, cr4, efer, smm=False, guest_mode=False):
    """(flags that are set, level): calc_cpu_role() of the semantics, section 2.6, in words of its own."""
    flags = {"valid"}
    if guest_mode:
        flags.add("guest_mode")
    if not cr0 & PG:
        return flags | {"direct"}, 0
    for name, register, bit in (("efer_nx", efer, NXE), ("cr0_wp", cr0, WP), ("cr4_smep", cr4, SMEP),
                                ("cr4_smap", cr4, SMAP), ("cr4_pse", cr4, PSE), ("efer_lma", efer, LMA)):
        if register & bit:
            flags.add(name)
    if cr4 & SMAP and not cr0 & WP:
        flags.add("smap_andnot_wp")
    if not cr4 & PAE:
        flags.add("has_4_byte_gpte")
    if efer & NXE or cr4 & SMEP:
        flags.add("has_pferr_fetch")
    if efer & LMA:
        if cr4 & PKE:
            flags.add("cr4_pke")
        if cr4 & LA57:
            flags.add("cr4_la57")
    level = (5 if cr4 & LA57 else 4) if efer & LMA else 3 if cr4 & PAE else 2
    return flags, level


def all_registers():
    """Every combination of the bits that count, with LMA only where CR0.PG and PAE are set."""
    sets = []
    for number in range(1 << 10):
        bit = [number >> i & 1 for i in range(10)]
        cr0 = PE | PG * bit[0] | WP * bit[1]
        cr4 = PSE * bit[2] | PAE * bit[3] | LA57 * bit[4] | SMEP * bit[5] | SMAP * bit[6] | PKE * bit[7]
        efer = NXE * bit[8] | (LME | LMA) * (bit[9] & bit[0] & bit[3])
        sets.append((cr0, cr4, efer))
    return sets


@pytest.mark.parametrize("smm", [False, True])
@pytest.mark.parametrize("guest_mode", [False, True])
def test_roles_of_all_registers(smm, guest_mode):
    """1,024 register combinations: each flag, the level, access = ALL; arrays equal scalars."""
    sets = all_registers()
    words = calc_cpu_roles(*np.array(sets, np.uint64).T, smm=smm, guest_mode=guest_mode)
    assert np.uint64 == words.dtype
    for registers, word in zip(sets, words.tolist(), strict=True):
        role = CpuRole(word)
        flags, level = expected_role(*registers, guest_mode=guest_mode)
        assert flags == {name for name in FLAGS if getattr(role, name)}, f"{registers}"
        assert (level, 0, 15, int(smm)) == (role.level, role.quadrant, role.access, role.smm)
        assert word == int(calc_cpu_roles(*registers, smm=smm, guest_mode=guest_mode))
        assert role == CpuRole.from_regs(*registers, smm=smm, guest_mode=guest_mode)


def test_bits_that_do_not_count_do_not_change_a_role():
    """Other bits of CR0, CR4 and EFER are not paging's; PKE and LA57 only count in long mode."""
    base = calc_cpu_roles(PE | PG, PAE, NXE)
    assert base == calc_cpu_roles(PE | PG | 1 << 4 | 1 << 30, PAE | 1 << 7 | 1 << 17, NXE | 1)
    assert base == calc_cpu_roles(PE | PG, PAE | PKE | LA57, NXE)


def test_roles_broadcast():
    """Scalars and arrays of any shape mix."""
    words = calc_cpu_roles(np.array([[PE], [PE | PG]], np.uint64), np.array([0, PAE, PSE], np.uint64), 0)
    assert (2, 3) == words.shape
    assert int(words[1, 2]) == int(calc_cpu_roles(PE | PG, PSE, 0))
    assert 0 == calc_cpu_roles(np.empty(0, np.uint64), 0, 0).size


BASE_BITS = {"has_4_byte_gpte": 4, "direct": 7, "invalid": 12, "efer_nx": 13, "cr0_wp": 14, "smap_andnot_wp": 15,
             "ad_disabled": 16, "guest_mode": 17, "passthrough": 18, "is_mirror": 19, "cr4_smep": 20}


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_alone(name):
    """One bit each, no two the same; page-role bits where KVM has them."""
    bits = [bit for bit in range(64) if getattr(CpuRole(1 << bit), name)]
    assert 1 == len(bits)
    assert bits[0] == BASE_BITS.get(name, bits[0])
    assert (bits[0] >= 32) == (name not in BASE_BITS)
    assert [name] == [other for other in FLAGS if getattr(CpuRole(1 << bits[0]), other)]


def test_numbers_and_halves():
    """level 3:0, quadrant 6:5, access 11:8, smm 31:24; base and ext are the halves."""
    role = CpuRole(0x12345678_FF000F65)
    assert (5, 3, 15, 0xFF) == (role.level, role.quadrant, role.access, role.smm)
    assert (0xFF000F65, 0x12345678) == (role.base, role.ext)


def test_invalid_role_equals_nothing():
    """A role whose ext.valid is clear differs from every role, itself included: it forces a new initialisation."""
    invalid, valid = CpuRole(0x4), CpuRole.from_regs(PE, 0, 0)
    assert invalid != invalid
    assert invalid != CpuRole(0x4)
    assert invalid != valid
    assert valid == CpuRole(valid.word)
    assert valid != valid.word


def test_a_role_is_frozen_hashable_and_can_be_pickled():
    """A role is a value."""
    role = CpuRole.from_regs(PE | PG, PAE, LMA | LME)
    with pytest.raises(AttributeError, match="word"):
        role.word = 1
    with pytest.raises(AttributeError, match="level"):
        role.level = 1
    with pytest.raises(AttributeError):
        del role.word
    with pytest.raises(AttributeError, match="no_such"):
        role.no_such  # noqa: B018
    assert {role: 1}[CpuRole(role.word)] == 1
    assert role == pickle.loads(pickle.dumps(role)) == copy.deepcopy(role)
    assert "level 4" in repr(role)
    assert "efer_lma" in repr(role)
    assert {"level", "cr0_wp", "word"} <= set(dir(role))


@pytest.mark.parametrize("word", [-1, 1 << 64])
def test_a_role_word_has_64_bits(word):
    """ValueError naming the value."""
    with pytest.raises(ValueError, match=f"word: .* got {word if word < 0 else hex(word)}"):
        CpuRole(word)


def test_unchanged_role_does_no_work():
    """Registers that do not change the role do not rebuild the walk; those that do rebuild it once."""
    vcpu = vcpu_over(PageTables("4l"))
    before = vcpu.gva_walk.init_count
    role = vcpu.gva_walk.cpu_role

    vcpu.set_regs(cr3=0x200000)
    vcpu.set_regs(pkru=5, rflags=1 << 18)
    vcpu.set_regs(**mode_regs("4l", 0x100000))
    vcpu.set_regs(cr4=vcpu.regs.cr4 | 1 << 7)                          # PGE is not the role's
    assert (before, role) == (vcpu.gva_walk.init_count, vcpu.gva_walk.cpu_role)

    vcpu.set_regs(cr4=vcpu.regs.cr4 | SMEP)
    assert before + 1 == vcpu.gva_walk.init_count
    vcpu.set_regs(cr4=vcpu.regs.cr4)
    assert before + 1 == vcpu.gva_walk.init_count


def test_walks_and_translations_do_not_rebuild():
    """Neither batches with registers of their own nor scalar walks touch the walk's role."""
    vcpu = vcpu_over(PageTables("4l"))
    before = vcpu.gva_walk.init_count, vcpu.gva_walk.cpu_role
    one(vcpu.gva_walk, 0, regs=[vcpu.regs])
    vcpu.gva_walk.walk_record(0)
    assert before == (vcpu.gva_walk.init_count, vcpu.gva_walk.cpu_role)


def test_wp_toggle_is_honoured_at_the_next_access():
    """CR0.WP = 0 lets a supervisor write to a read-only page; the format follows the register (corner case 1)."""
    tables = PageTables("4l")
    tables.map(0x5000, 0x9000, "p u")
    vcpu = vcpu_over(tables)
    wp_on = vcpu.regs.cr0
    for _ in range(2):
        assert Status.PAGE_FAULT == one(vcpu.gva_walk, 0x5000, Access.WRITE)["status"]
        assert vcpu.gva_walk.cpu_role.cr0_wp
        assert vcpu.gva_walk.fmt.is_fault(5, Access.WRITE)
        vcpu.set_regs(cr0=wp_on & ~WP)
        assert 0x9000 == vcpu.gva_walk.gva_to_gpa(0x5000, Access.WRITE)
        assert not vcpu.gva_walk.cpu_role.cr0_wp
        assert not vcpu.gva_walk.fmt.is_fault(5, Access.WRITE)
        vcpu.set_regs(cr0=wp_on)


def test_paging_on_after_off_rebuilds():
    """With paging off the format is stale; switching paging on recomputes it (corner case 56)."""
    tables = PageTables("4l")
    tables.map(0x5000, 0x9000)
    vcpu = vcpu_over(tables)
    registers = tables.regs()
    vcpu.set_regs(cr0=PE, efer=0)
    assert (True, 0) == (vcpu.gva_walk.cpu_role.direct, vcpu.gva_walk.cpu_role.level)
    assert 0x5000 == vcpu.gva_walk.gva_to_gpa(0x5000)
    vcpu.set_regs(**{**registers, "efer": registers["efer"] & ~NXE})
    assert int(vcpu.gva_walk.fmt.rsvd_bits_mask[0, 0]) >> 63
    assert 0x9000 == vcpu.gva_walk.gva_to_gpa(0x5000)
