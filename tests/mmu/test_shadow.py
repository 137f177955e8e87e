# SPDX-License-Identifier: Apache-2.0
"""The shadow MMU, rule by rule: what a fault builds from the guest's tables, in every guest mode.

What a guest with 4-level paging does to a live KVM is recorded, and replayed by test_scenarios.py; here is what the recording
machine could not show: other modes, native accesses of the supervisor, other hosts. Prefetch and memory that is not plain are in
test_shadow_leaves.py, unsync pages and writes to tables in test_shadow_unsync.py, roots in test_shadow_roots.py, zapping and
memslots in test_shadow_zap.py, L1's tables for L2 in test_nested_shadow.py.
"""

import numpy as np
import pytest
from builders import random_tables
from shadow_guests import (
    DATA,
    GB1,
    GVA,
    INVALID,
    LEAF,
    MAP,
    MB2,
    MB4,
    MMU_PRESENT,
    OTHER,
    PAGE,
    TABLES,
    A,
    D,
    F,
    P,
    ShadowGuest,
    U,
    W,
    group,
    rights,
)

import kvmmu
from kvmmu import Access, CpuModel, CpuRole, GuestMemory, Host, RetPf, Status, Tracepoints, Vm

OK, PF = int(Status.OK), int(Status.PAGE_FAULT)
READ, WRITE, FETCH, USER = Access.READ, Access.WRITE, Access.FETCH, Access.USER
CR4_SMEP, CR4_SMAP = 1 << 20, 1 << 21
LEVELS = {"32": 2, "pae": 3, "4l": 4, "5l": 5}
each_mode = pytest.mark.parametrize("mode", LEVELS)


# ---- from the guest's tables to shadow pages -------------------------------------------------------------------------------

@each_mode
def test_each_guest_table_on_the_way_gets_a_shadow_page(mode):
    """One page per table and level with the rights inherited from above; the second access finds all of it."""
    guest = ShadowGuest(MAP, mode=mode)
    r = guest.touch(GVA + 0x123, access=WRITE)
    assert (OK, DATA + 0x123, RetPf.FIXED, 1) == tuple(int(getattr(r, name)[0]) for name in ("status", "gpa", "ret", "exits"))
    tables = [guest.pte(GVA, level) >> 12 for level in range(min(LEVELS[mode], 4 if mode != "5l" else 5), 0, -1)]
    if mode == "pae":
        tables = tables[1:]                                 # the PDPT is registers
    assert [sp.gfn for sp in guest.sps() if sp.gfn in tables and (mode != "32" or sp.role.quadrant < 2)][-len(tables):] == tables
    slot = guest.vm.slots[0]
    assert int(r.hpa[0]) == (slot["pfn"] << 12) + DATA + 0x123
    assert (1, "rwux") == (guest.spte(GVA)[0], rights(guest.spte(GVA)[1]))
    assert 0 == int(guest.touch(GVA, access=WRITE).exits[0])


@each_mode
def test_faults_of_the_guest_are_found_by_kvms_walk(mode):
    """An exit that builds nothing: the error code is that of the guest's tables, not of the SPTEs that are not there."""
    guest = ShadowGuest((GVA, DATA, "p"), mode=mode)
    assert (PF, INVALID, USER) == guest.outcome(GVA + PAGE, USER)
    for access, code in ((WRITE, P | W), (USER, P | U), (USER | WRITE, P | U | W)):
        assert (PF, INVALID, code) == guest.outcome(GVA, access)
    stats = guest.vm.stats
    assert (4, 4, 0) == (stats["pf_taken"], stats["pf_guest"], stats["pf_fixed"])
    with pytest.raises(kvmmu.PageFault) as caught:
        guest.vcpu.access(GVA, WRITE)
    assert (P | W, GVA, 1) == (caught.value.error_code, caught.value.address, caught.value.level)


@each_mode
def test_random_accesses_come_to_what_the_walk_says(mode):
    """4,000 accesses to pages with all combinations of rights on two levels."""
    rng = np.random.default_rng(3)
    maps = []
    for i in range(64):
        flags = " ".join(["p", *(name for bit, name in enumerate(("w", "u", "a", "d")) if i >> bit & 1),
                          *(["nx"] if i >> 4 & 1 and mode != "32" else [])])
        upper = "p w u" if i < 32 else "p u" if i < 48 else "p w"
        maps.append((GB1 + (i // 16) * MB4 + i * PAGE, DATA + i * PAGE, flags, 1, 0, 0, upper))
    guest = ShadowGuest(*maps, mode=mode)
    gva = rng.choice(np.array([one[0] for one in maps], np.uint64), 4000)
    access = rng.choice(np.array([kind | ring for kind in (0, 2, 16) for ring in (0, 4)], np.uint8), 4000)
    expected = guest.vcpu.gva_walk.translate(gva, access, set_ad=False)
    r = guest.vcpu.access(gva, access)
    for name in ("gpa", "status", "error_code"):
        np.testing.assert_array_equal(getattr(expected, name), getattr(r, name), name)
    assert {OK, PF} == set(r.status.tolist())


def test_paging_off_is_shadowed_by_direct_pages():
    """Linear addresses are guest-physical ones; huge pages up to 2M."""
    guest = ShadowGuest(backing="1g", load=False)
    guest.vcpu.set_regs(cr0=1, cr3=0, cr4=0, efer=0)
    assert (OK, 0x123456, 0) == guest.outcome(0x123456, WRITE)
    assert 2 == guest.spte(0x123456)[0]
    assert (OK, GB1 + 8, 0) == guest.outcome(GB1 + 8)
    assert 1 == guest.vm.stats["mmio_exits"]
    assert all(sp.role.direct for sp in guest.sps())
    assert [0, 1 << 18, 2 << 18, 3 << 18] == sorted(sp.gfn for sp in guest.sps() if sp.role.level == 2)


def test_paging_off_has_no_pages_of_1g():
    """Under a root of four directories there is no room for one, whatever the host has."""
    vm = Vm(GuestMemory(2 * GB1), host=Host(tdp=None, maxphyaddr=48), backing="1g")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1, cr3=0, cr4=0, efer=0)
    assert GB1 + 0x123456 == vcpu.access(GB1 + 0x123456, WRITE).gpa
    assert (1, 0) == (vm.stats["pages_2m"], vm.stats["pages_1g"])


def test_registers_that_shadow_paging_cannot_serve():
    """KVM offers no protection keys without two-dimensional paging."""
    guest = ShadowGuest(MAP)
    guest.vcpu.set_regs(cr4=guest.vcpu.regs.cr4 | 1 << 22)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vcpu.wrpkru(3)
    with pytest.raises(ValueError, match=r"pkru 0x3: KVM has no protection keys.*CR4.PKE clear or PKRU 0"):
        guest.touch(GVA)


# ---- 32-bit tables ---------------------------------------------------------------------------------------------------------

def test_quadrants_of_32_bit_tables():
    """1,024 entries are two shadow pages, a directory of 4G four: each has its part of the table, and no other."""
    halves = [(GB1 * i + half * MB2, DATA + (2 * i + half) * PAGE, LEAF) for i in range(1, 4) for half in range(2)]
    guest = ShadowGuest(*halves, mode="32")
    for gva, gpa, _ in halves:
        assert (OK, gpa, 0) == guest.outcome(gva, WRITE)
    directory = guest.tables.cr3 >> 12
    assert [0, 1, 2, 3] == [sp.role.quadrant for sp in guest.sps(directory, level=2)]
    for i in range(1, 4):
        table = guest.pte(GB1 * i) >> 12
        assert [0, 1] == sorted(sp.role.quadrant for sp in guest.sps(table, level=1))
        for sp in guest.sps(table, level=1):
            assert [0] == [index for index, spte in enumerate(sp.sptes) if spte & MMU_PRESENT]
    assert all(sp.role.has_4_byte_gpte for sp in guest.sps())


def test_a_4m_page_is_two_2m_sptes_and_a_write_to_its_pde_takes_both():
    """Where the host has 2M pages; the entry next to it in another quadrant stays."""
    guest = ShadowGuest((GB1 - MB4, MB4, LEAF, 2), (GB1, 2 * MB4, LEAF, 2), mode="32", backing="2m")
    addresses = [GB1 - MB4, GB1 - MB2, GB1, GB1 + MB2]
    assert [MB4, MB4 + MB2, 2 * MB4, 2 * MB4 + MB2] == guest.touch(*addresses, access=WRITE).gpa.tolist()
    assert [2, 2, 2, 2] == [guest.spte(gva)[0] for gva in addresses]
    guest.emulated_write_pte(GB1 - MB4, 0, 2)
    assert [False, False, True, True] == [bool(guest.spte(gva)[1] & MMU_PRESENT) for gva in addresses]
    assert (PF, INVALID, 0) == guest.outcome(GB1 - MB2)


def test_a_write_to_an_entry_leaves_its_like_in_the_other_quadrants_alone():
    """The same index in the other half of the table, in another quarter of the directory."""
    others = [GVA + MB2, GVA + 2 * GB1]
    guest = ShadowGuest(MAP, *((gva, DATA + PAGE * i, LEAF) for i, gva in enumerate(others)), mode="32")
    guest.touch(GVA, *others)
    guest.emulated_write_pte(GVA, OTHER | P | W | U | A | D)
    assert [1, 0, 0] == guest.touch(GVA, *others).exits.tolist()
    guest.emulated_write_pte(GVA, guest.read_pte(GVA, 2), 2)
    assert [1, 1, 0] == guest.touch(GVA, *others).exits.tolist()


@each_mode
def test_a_write_whose_bytes_are_not_known_is_one_of_an_entry(mode):
    """And so is one by the VMM with the size of an entry: no shadow page goes for it."""
    guest = ShadowGuest(MAP, (GVA + PAGE, OTHER, LEAF), mode=mode)
    guest.touch(GVA, GVA + PAGE)
    directory = guest.pte(GVA, 2)
    assert RetPf.EMULATE == guest.touch(guest.gva_of(directory), access=WRITE).ret[0]
    guest.touch(GVA, GVA + PAGE)
    guest.vm.write_guest_physical(guest.pte(GVA), guest.entry(DATA | P | W | U | A | D))
    assert 0 == guest.vm.stats["mmu_flooded"] == guest.vm.stats["mmu_shadow_zapped"]
    assert [1, 0] == guest.touch(GVA, GVA + PAGE).exits.tolist()


def test_pse36_and_the_upper_half_of_a_4m_page():
    """Bits 39:32 of the frame come from bits 20:13 of the entry; where no slot is, that is MMIO."""
    guest = ShadowGuest((GVA & ~(MB4 - 1), 1 << 34 | MB4, LEAF, 2), mode="32")
    r = guest.touch(GVA)
    assert (1 << 34 | MB4 + PAGE, INVALID) == (int(r.gpa[0]), int(r.hpa[0]))


# ---- direct shadow pages ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "size"), [("32", MB4), ("pae", MB2), ("4l", MB2)])
def test_a_guests_huge_page_over_small_host_pages_is_direct_pages(mode, size):
    """Each 2M of it a direct page with the rights of the entry, linear from its frame; no guest table is shadowed by it."""
    guest = ShadowGuest((GB1, 2 * MB4, "p w u a d", 2), mode=mode)
    assert [2 * MB4 + offset for offset in range(0, size, MB2)] == guest.touch(*range(GB1, GB1 + size, MB2)).gpa.tolist()
    direct = [sp for sp in guest.sps() if sp.role.direct]
    assert [(2 * MB4 + offset) >> 12 for offset in range(0, size, MB2)] == sorted(sp.gfn for sp in direct)
    assert {15} == {sp.role.access for sp in direct}
    assert guest.vm.stats["pages_4k"] == 8 * size // MB2            # their neighbours, too


def test_a_direct_page_with_other_rights_is_replaced():
    """A huge page read while D is clear may not be written; the write sets D and needs a direct page of another role."""
    guest = ShadowGuest((GB1, 2 * MB4, "p w u a", 2))
    guest.touch(GB1)
    first, = (sp for sp in guest.sps() if sp.role.direct)
    assert "r-ux" == rights(guest.spte(GB1)[1])
    assert (OK, 2 * MB4, 0) == guest.outcome(GB1, WRITE)
    assert guest.read_pte(GB1, 2) & D
    second, = (sp for sp in guest.sps() if sp.role.direct and sp.number != first.number)
    assert (13, 15) == (first.role.access, second.role.access)
    assert "rwux" == rights(guest.spte(GB1)[1])
    table = [spte for level, spte in guest.path(GB1) if level == 2]
    assert [second.number] == [((spte & 0xFFFFFFFFFF000) - guest.vm.kvm.arena_hpa) >> 12 for spte in table]


def test_a_1g_page_of_the_guest_is_split_to_what_the_host_has():
    """Two levels of direct pages."""
    guest = ShadowGuest((2 * GB1, 0, LEAF, 3))
    assert (OK, MB2 + PAGE, 0) == guest.outcome(2 * GB1 + MB2 + PAGE)
    assert [1, 2] == sorted(sp.role.level for sp in guest.sps() if sp.role.direct)


@pytest.mark.parametrize(("backing", "level"), [("4k", 1), ("2m", 2)])
def test_the_page_is_no_larger_than_guest_and_host_have_it(backing, level):
    guest = ShadowGuest((GB1, MB4, LEAF, 2), (GVA + MB4, DATA, LEAF), backing=backing)
    guest.touch(GB1, GVA + MB4)
    assert (level, 1) == (guest.spte(GB1)[0], guest.spte(GVA + MB4)[0])


def test_a_huge_page_stays_small_where_a_shadowed_table_lies_in_it():
    """Its own tables are in the 2M that the guest maps: a huge SPTE would let them be written unseen."""
    guest = ShadowGuest((GB1, TABLES, LEAF, 2), (GB1 + MB2, MB4, LEAF, 2), backing="2m")
    guest.touch(GB1 + MB2, GB1 + MB2 - PAGE)
    assert (2, 1) == (guest.spte(GB1 + MB2)[0], guest.spte(GB1 + MB2 - PAGE)[0])


@pytest.mark.parametrize("paging", [True, False])
def test_nx_mitigation(paging):
    """No huge page is executable; a fetch gets a small one, and the recovery worker takes the split back."""
    guest = ShadowGuest((GB1, MB4, LEAF, 2), backing="2m", host=Host(tdp=None, maxphyaddr=48, nx_huge_pages=True))
    gva = GB1
    if not paging:
        guest.vcpu.set_regs(cr0=1, cr3=0, cr4=0, efer=0)
        gva = MB4
    guest.touch(gva, access=WRITE)
    assert (2, "rwu-") == (guest.spte(gva)[0], rights(guest.spte(gva)[1]))
    assert (OK, MB4, 0) == guest.outcome(gva, FETCH)
    assert (1, "rwux") == (guest.spte(gva)[0], rights(guest.spte(gva)[1]))
    assert guest.vm.stats["nx_lpage_splits"] == 1 == guest.vm.recover_nx_huge_pages(1)
    guest.touch(gva)
    assert (2, 0) == (guest.spte(gva)[0], guest.vm.stats["nx_lpage_splits"])


# ---- CR0.WP = 0 ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("smep", [False, True])
@pytest.mark.parametrize("flags", ["p u a d", "p a d"])
def test_wp_0_lets_a_supervisor_write_through_an_spte_that_no_user_may_use(flags, smep):
    """W, not U, and under SMEP not executable, for U=0 no longer stops a supervisor's fetch; a user's read turns it back."""
    guest = ShadowGuest((GVA, DATA, flags), regs={"cr0": 0x80000001, "cr4": 1 << 5 | (CR4_SMEP if smep else 0)})
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    assert "rw-" + ("-" if smep else "x") == rights(guest.spte(GVA)[1])
    fetch = guest.outcome(GVA, FETCH)
    assert (PF, INVALID, P | F) if smep and "u" in flags else (OK, DATA, 0) == fetch
    user = guest.outcome(GVA, USER)
    assert user == ((OK, DATA, 0) if "u" in flags else (PF, INVALID, P | U))
    if "u" in flags:
        assert "r-ux" == rights(guest.spte(GVA)[1])
        assert (PF, INVALID, P | U | W) == guest.outcome(GVA, USER | WRITE)
        assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
        assert "rw-" == rights(guest.spte(GVA)[1])[:3]


def test_wp_0_with_smap_is_a_role_of_its_own():
    """A supervisor's write to a user page: SMAP forbids it, AC allows it, and its shadow is not that of a guest without SMAP."""
    guest = ShadowGuest((GVA, DATA, "p u a d"), regs={"cr0": 0x80000001, "cr4": 1 << 5 | CR4_SMAP})
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE | Access.AC)
    assert "rw-x" == rights(guest.spte(GVA)[1])
    guest.vcpu.set_regs(cr4=1 << 5)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    table = guest.pte(GVA) >> 12
    assert [True, False] == [sp.role.smap_andnot_wp for sp in guest.sps(table)]


def test_wp_0_with_smap_user_pages_that_became_the_supervisors():
    """The SPTE is the supervisor's after such a write, so that the processor's SMAP does not look at it, in KVM as here.

    An explicit access without AC goes through until a user's access puts U back.
    """
    guest = ShadowGuest((GVA, DATA, "p u a d"), regs={"cr0": 0x80000001, "cr4": 1 << 5 | CR4_SMAP})
    guest.outcome(GVA, WRITE | Access.AC)
    assert (OK, DATA, 0) == guest.outcome(GVA, READ)
    assert (OK, DATA, 0) == guest.outcome(GVA, USER)
    assert (PF, INVALID, P) == guest.outcome(GVA, READ)


def test_with_wp_the_spte_is_as_the_guest_has_it():
    guest = ShadowGuest((GVA, DATA, "p u a d"))
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert "r-ux" == rights(guest.spte(GVA)[1])


# ---- accessed and dirty bits -----------------------------------------------------------------------------------------------

@each_mode
def test_a_page_with_d_clear_is_mapped_read_only_until_it_is_written(mode):
    guest = ShadowGuest((GVA, DATA, "p w u"), mode=mode)
    guest.touch(GVA)
    assert "r-u" == rights(guest.spte(GVA)[1])[:3]
    assert A == guest.read_pte(GVA) & (A | D)
    r = guest.touch(GVA, access=WRITE)
    assert (1, RetPf.FIXED) == (int(r.exits[0]), int(r.ret[0]))
    assert A | D == guest.read_pte(GVA) & (A | D)
    assert "rwu" == rights(guest.spte(GVA)[1])[:3]


def test_the_processor_sets_a_and_d_in_sptes():
    """In what prefetch has mapped as old, at the first use."""
    guest = ShadowGuest(*group())
    guest.touch(GVA)
    assert 0 == guest.spte(GVA + PAGE)[1] & A
    guest.touch(GVA + PAGE)
    assert A == guest.spte(GVA + PAGE)[1] & A


# ---- the guards ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("d", "faults"), [(0, 2), (D, 1)], ids=["clean", "dirty"])
@pytest.mark.parametrize("level", [2, 3, 4])
def test_an_entry_that_is_not_what_the_walk_has_seen_makes_the_fault_start_again(level, d, faults):
    """An upper table that is the page table, too, in which one entry serves twice: D is set in the leaf, and the second walk
    sees it above."""
    guest = ShadowGuest(MAP)
    tables = {4: guest.tables.cr3, 3: 0x800000, 2: 0x801000}
    indices = {at: 100 if at in (level, 1) else 101 for at in (4, 3, 2, 1)}
    for at in (4, 3, 2):
        below = tables.get(at - 1, tables[level])
        guest.vm.mem.write_u64(tables[at] + 8 * indices[at], below | P | W | U | A | (d if at == level else D))
    r = guest.touch(sum(indices[at] << 9 * at + 3 for at in indices), access=WRITE)
    assert (tables.get(level - 1, tables[level]), RetPf.EMULATE) == (int(r.gpa[0]), int(r.ret[0]))
    assert (faults, 1) == (guest.vm.stats["pf_taken"], guest.vm.stats["pf_emulate"])


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_an_entry_that_changed_is_read_by_the_next_fault(level):
    """Whatever hung below it stays in the hash, and is found again when the entry comes back."""
    gva = 1 << 40 | GVA
    guest = ShadowGuest((gva, DATA, LEAF))
    guest.touch(gva)
    entry, pages = guest.read_pte(gva, level), guest.vm.stats["mmu_cache_miss"]
    guest.emulated_write_pte(gva, 0, level)
    assert (PF, INVALID, 0) == guest.outcome(gva)
    guest.emulated_write_pte(gva, entry, level)
    assert (OK, DATA, 0) == guest.outcome(gva)
    assert pages == guest.vm.stats["mmu_cache_miss"]


# ---- another kernel's roles ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kernel", "new_pages", "letters"), [("7.3", True, "rwux"), ("6.18", False, "wux")])
def test_kernel_chooses_the_bits_of_roles(kernel, new_pages, letters):
    """SMEP with CR0.WP set is a role of its own in one, none in the other; so is how a trace prints rights."""
    guest = ShadowGuest(MAP, host=Host(tdp=None, maxphyaddr=48, kernel=kernel))
    guest.vm.trace = Tracepoints("kvm_mmu_get_page")
    guest.touch(GVA)
    assert f" {letters} " in str(guest.vm.trace.events()[-1])
    before = guest.vm.stats["mmu_cache_miss"]
    guest.vcpu.mov_cr(4, guest.vcpu.regs.cr4 | CR4_SMEP)
    assert (PF, INVALID, P | F) == guest.outcome(GVA, FETCH)
    guest.touch(GVA)
    assert new_pages == (guest.vm.stats["mmu_cache_miss"] > before)
    assert new_pages == CpuRole(guest.vcpu.mmu.root_role).cr4_smep


def test_two_vcpus_share_pages_of_one_role():
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    other = guest.vm.create_vcpu()
    other.set_regs(**guest.tables.regs())
    before = guest.vm.stats["mmu_cache_miss"]
    assert 0 == int(other.access(np.array([GVA], np.uint64)).exits[0])
    assert before == guest.vm.stats["mmu_cache_miss"]
    assert 2 == guest.sp(guest.tables.cr3 >> 12).root_count


@each_mode
def test_adversarial_tables_end_where_the_walk_ends(mode):
    """Loops, reserved bits, tables beyond memory, one page on several levels: answers are those of KVM's walk."""
    compared = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        tables = random_tables(rng, mode, maxphyaddr=40, memsize=16 * MB2)
        guest = ShadowGuest(load=False, cpu=CpuModel(maxphyaddr=40, conformance="kvm"))
        guest.load(tables)
        try:
            guest.vcpu.set_regs(**tables.regs())
        except kvmmu.GeneralProtection:
            continue
        for gva in tables.gvas:
            expected = guest.vcpu.gva_walk.translate(np.array([gva], np.uint64), int(USER), set_ad=False)
            r = guest.touch(gva, access=USER)
            for name in ("gpa", "status", "error_code"):
                assert int(getattr(expected, name)[0]) == int(getattr(r, name)[0]), f"seed {seed} {gva:#x}: {name}"
            compared += 1
        assert guest.vm.stats["bugs"] == 0
    assert compared > 4000
