# SPDX-License-Identifier: Apache-2.0
"""Roots of the shadow MMU: whose role is whose, which roots are kept, and what stands for a root where no memory is."""

import numpy as np
import pytest
from shadow_guests import DATA, GB1, GVA, INVALID, LEAF, MAP, MB2, MMU_PRESENT, OTHER, PAGE, TABLES, A, D, P, ShadowGuest, U, W

from kvmmu import Access, CpuModel, CpuRole, GuestMemory, Status

OK, PF = int(Status.OK), int(Status.PAGE_FAULT)
READ, WRITE, FETCH, USER = Access.READ, Access.WRITE, Access.FETCH, Access.USER
ENTRY = P | W | U | A | D
CR0_WP, CR4_PGE, CR4_PCIDE, CR4_SMEP, CR4_SMAP, EFER_NX = 1 << 16, 1 << 7, 1 << 17, 1 << 20, 1 << 21, 1 << 11
OFF = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}
ROOTS = 0x800000                    # copies of a root lie here


def guest_of_roots(n, **options):
    """A guest with n roots of the same tables; their addresses, the first one's included."""
    guest = ShadowGuest(MAP, **options)
    root = guest.tables.cr3
    for i in range(1, n):
        guest.vm.mem.write(ROOTS + i * PAGE, guest.vm.mem.read(root, PAGE))
    return guest, [root, *(ROOTS + i * PAGE for i in range(1, n))]


# ---- roles -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("registers", "new"), [
    ({"cr0": CR0_WP}, True), ({"cr4": CR4_SMEP}, True), ({"cr4": CR4_SMAP}, False), ({"efer": EFER_NX}, False),
    ({"cr4": CR4_PGE}, False), ({"cr0": CR0_WP, "cr4": CR4_SMAP}, True)])
def test_registers_that_are_part_of_a_role_have_pages_of_their_own(registers, new):
    """WP and SMEP; SMAP only where WP is clear; not NX, which shadow tables use in any case. Going back finds the old pages."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    pages, regs = guest.vm.stats["mmu_cache_miss"], guest.tables.regs()
    guest.vcpu.set_regs(**{name: regs[name] ^ registers.get(name, 0) for name in ("cr0", "cr4", "efer")})
    assert (OK, DATA, 0) == guest.outcome(GVA, USER)
    assert (4 if new else 0) == guest.vm.stats["mmu_cache_miss"] - pages
    assert (1 + new) == len(guest.sps(guest.tables.cr3 >> 12))
    pages = guest.vm.stats["mmu_cache_miss"]
    guest.vcpu.set_regs(**regs)
    assert (OK, DATA, 0) == guest.outcome(GVA, USER)
    assert pages == guest.vm.stats["mmu_cache_miss"]


def test_guest_mode_and_smm_have_pages_of_their_own():
    """L2 without nested paging and system-management mode, over the same tables; their roots are found again."""
    guest = ShadowGuest(MAP)
    vcpu, roots = guest.vcpu, []
    for _ in range(2):
        roots.append([])
        for nested, smm in ((False, False), (True, False), (False, True)):
            vcpu.smm = smm
            if nested:
                vcpu.enter_nested(None)
            assert (OK, DATA, 0) == guest.outcome(GVA)
            roots[-1].append(vcpu.mmu.root_hpa)
            role = CpuRole(vcpu.mmu.root_role)
            assert (nested, int(smm)) == (role.guest_mode, role.smm)
            vcpu.leave_nested()
        vcpu.smm = False
    assert 3 == len(set(roots[0]))
    assert roots[0] == roots[1]
    assert 12 == guest.vm.stats["mmu_cache_miss"]


def test_smm_has_memslots_of_its_own():
    """The same frame is another page there: its tables, its writes and its shadow are apart."""
    smm = GuestMemory(16 * MB2)
    guest = ShadowGuest(MAP, smm_mem=smm)
    smm.write(0, guest.vm.mem.read(0, 16 * MB2))
    outside = int(guest.touch(GVA).hpa[0])
    guest.vcpu.smm = True
    inside = int(guest.touch(GVA).hpa[0])
    assert outside != inside
    guest.emulated_write_pte(GVA, OTHER | ENTRY)
    assert (OK, OTHER, 0) == guest.outcome(GVA)
    guest.vcpu.smm = False
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert outside == int(guest.touch(GVA).hpa[0])


def test_a_child_of_another_role_is_replaced_and_not_reused():
    """The entry above loses W: the page below it is one with fewer rights, and comes back with them."""
    gva = 1 << 40 | GVA
    guest = ShadowGuest((gva, DATA, LEAF))
    guest.touch(gva)
    before = guest.read_pte(gva, 2)
    guest.emulated_write_pte(gva, before & ~W, 2)
    assert (PF, INVALID, P | W) == guest.outcome(gva, WRITE)
    guest.touch(gva)
    table = guest.pte(gva) >> 12
    assert [15, 13] == [sp.role.access for sp in guest.sps(table)]
    guest.emulated_write_pte(gva, before, 2)
    assert (OK, DATA, 0) == guest.outcome(gva, WRITE)
    assert [15, 13] == [sp.role.access for sp in guest.sps(table)]


def test_paging_off_and_on_again_uses_the_format_of_now():
    """The format of the walk is stale while paging is off; rights of before do not come back with CR0.PG."""
    guest = ShadowGuest((GVA, DATA, "p u"), (DATA, DATA, LEAF))
    on = guest.vcpu.regs
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)
    guest.vcpu.set_regs(**OFF)
    assert (OK, DATA, 0) == guest.outcome(DATA, WRITE)
    guest.vcpu.set_regs(cr0=on.cr0 & ~CR0_WP, cr3=on.cr3, cr4=on.cr4 | CR4_SMEP, efer=on.efer)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    assert (PF, INVALID, P | 16) == guest.outcome(GVA, FETCH)
    guest.vcpu.mov_cr(0, on.cr0)
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)


def test_another_processor_model_builds_everything_anew():
    """Equal registers, other reserved bits: what the old model allowed is not found again."""
    guest = ShadowGuest((GVA, 1 << 41, LEAF), cpu=CpuModel(maxphyaddr=46))
    assert OK == guest.outcome(GVA)[0]
    guest.vcpu.cpu = CpuModel(maxphyaddr=40)
    assert (PF, INVALID, P | 8) == guest.outcome(GVA)
    guest.vcpu.cpu = CpuModel(maxphyaddr=46)
    assert (OK, 1 << 41, 0) == guest.outcome(GVA)


@pytest.mark.parametrize(("change", "reset"), [
    (lambda v: v.mov_cr(0, v.regs.cr0 ^ CR0_WP), True), (lambda v: v.mov_cr(4, v.regs.cr4 ^ CR4_SMAP), True),
    (lambda v: v.mov_cr(4, v.regs.cr4 ^ CR4_PGE), False), (lambda v: v.mov_cr(0, v.regs.cr0 ^ 1 << 1), False),
    (lambda v: v.wrmsr_efer(v.regs.efer ^ EFER_NX), True), (lambda v: v.wrmsr_efer(v.regs.efer ^ 1), False),
    (lambda v: v.mov_cr(4, v.regs.cr4 | CR4_PCIDE), True)])
def test_which_registers_make_the_vcpu_leave_its_roots(change, reset):
    """Whatever roles are made of, even where the role of the root stays the same; CR4.PCIDE, for CR3 means more from now on."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    change(guest.vcpu)
    assert (guest.vcpu.mmu.root_hpa is None) == reset
    assert (OK, DATA, 0) == guest.outcome(GVA, USER)


def test_wp_does_not_matter_while_paging_is_off():
    guest = ShadowGuest(load=False)
    guest.vcpu.set_regs(**OFF)
    guest.touch(DATA)
    root = guest.vcpu.mmu.root_hpa
    guest.vcpu.mov_cr(0, 1 | CR0_WP)
    assert root == guest.vcpu.mmu.root_hpa
    assert 0 == int(guest.touch(DATA).exits[0])


def test_pages_of_two_vcpus_in_two_modes_stay_apart():
    """One machine, one vCPU with paging off, one in long mode, one in PAE paging over a directory that both use."""
    guest = ShadowGuest(MAP)
    off, other = guest.vm.create_vcpu(), guest.vm.create_vcpu()
    off.set_regs(**OFF)
    pdpt = 0x900000
    guest.vm.mem.write_u64(pdpt + 8, guest.pte(GVA, 2) & ~0xFFF | P)
    other.set_regs(cr0=0x80010001, cr3=pdpt, cr4=1 << 5, efer=1 << 11)
    rows = np.array([GVA], np.uint64)
    assert [DATA, DATA] == [int(vcpu.access(rows, int(WRITE)).gpa[0]) for vcpu in (guest.vcpu, other)]
    assert DATA == int(off.access(np.array([DATA], np.uint64), int(WRITE)).gpa[0])
    directory = guest.pte(GVA, 2) >> 12
    assert 1 == len(guest.sps(directory, level=2)), "the same role on the same level: one page"
    guest.emulated_write_pte(GVA, OTHER | ENTRY)
    assert [OTHER, OTHER] == [int(vcpu.access(rows).gpa[0]) for vcpu in (guest.vcpu, other)]
    assert all(spte & MMU_PRESENT for _, spte in guest.path(GVA))


# ---- previous roots ----------------------------------------------------------------------------------------------------

def test_the_last_four_roots_are_kept():
    """The present one and three before it, the last used first; a load of one of them allocates and finds nothing new."""
    guest, roots = guest_of_roots(6)
    for root in roots:
        guest.vcpu.mov_cr(3, root)
        assert (OK, DATA, 0) == guest.outcome(GVA)
    assert roots[-2:-5:-1] == [pgd for pgd, _ in guest.vcpu.mmu.prev_roots]
    for root in roots[-2:-5:-1]:
        events = guest.during("kvm_mmu_get_page", lambda root=root: (guest.vcpu.mov_cr(3, root), guest.touch(GVA)))
        assert [] == events
    events = guest.during("kvm_mmu_get_page", lambda: (guest.vcpu.mov_cr(3, roots[0]), guest.touch(GVA)))
    assert [(roots[0] >> 12, 0)] == [(event.fields["gfn"], event.fields["created"]) for event in events]


def test_the_least_recently_used_root_goes():
    guest, (a, b, c, d, e) = guest_of_roots(5)
    for root in (a, b, c, d, a, e):
        guest.vcpu.mov_cr(3, root)
        guest.touch(GVA)
    assert [a, d, c] == [pgd for pgd, _ in guest.vcpu.mmu.prev_roots]
    roots = {pgd: hpa for pgd, hpa in guest.vcpu.mmu.prev_roots}
    guest.vcpu.mov_cr(3, d)
    guest.vcpu.vm_enter()
    assert roots[d] == guest.vcpu.mmu.root_hpa
    assert [e, a, c] == [pgd for pgd, _ in guest.vcpu.mmu.prev_roots]


def test_a_kept_root_that_is_obsolete_is_not_taken():
    guest, (a, b) = guest_of_roots(2)
    for root in (a, b):
        guest.vcpu.mov_cr(3, root)
        guest.touch(GVA)
    guest.vm.zap_all()
    guest.host_write_pte(GVA, OTHER | ENTRY)
    guest.vcpu.mov_cr(3, a)
    assert (OK, OTHER, 0) == guest.outcome(GVA)
    assert [] == guest.vcpu.mmu.prev_roots
    assert {sp.role.invalid for sp in guest.sps()} == {False}


@pytest.mark.parametrize("mode", ["pae", "32"])
def test_roots_of_four_pages_are_not_kept(mode):
    """Their top page is the MMU's own, one for all."""
    guest = ShadowGuest(MAP, mode=mode)
    guest.vm.mem.write(ROOTS, guest.vm.mem.read(guest.tables.cr3, PAGE))
    guest.touch(GVA)
    for cr3 in (ROOTS, guest.tables.cr3):
        guest.vcpu.mov_cr(3, cr3)
        assert (OK, DATA, 0) == guest.outcome(GVA)
        assert [] == guest.vcpu.mmu.prev_roots


@pytest.mark.parametrize("others", [1, 5], ids=["kept", "found again"])
def test_coming_back_to_a_root_starts_its_count_of_writes_anew(others):
    """A guest that loads it uses it: writes before and after are no flood."""
    guest, roots = guest_of_roots(others + 1)
    guest.touch(GVA)
    spare = roots[0] + 8 * 300
    for _ in range(3):
        for _ in range(2):
            guest.vm.write_guest_physical(spare, bytes(8))
        for root in (*roots[1:], roots[0]):
            guest.vcpu.mov_cr(3, root)
            guest.vcpu.vm_enter()
    assert 0 == guest.vm.stats["mmu_flooded"]
    guest.vm.write_guest_physical(spare, bytes(8))
    guest.vm.write_guest_physical(spare, bytes(8))
    guest.vm.write_guest_physical(spare, bytes(8))
    assert 1 == guest.vm.stats["mmu_flooded"]


def test_pcids_tell_roots_of_one_table_apart():
    guest = ShadowGuest(MAP, regs={"cr4": 1 << 5 | CR4_PCIDE})
    root = guest.tables.cr3
    guest.touch(GVA)
    guest.vcpu.mov_cr(3, root | 7)
    guest.touch(GVA)
    assert [root] == [pgd for pgd, _ in guest.vcpu.mmu.prev_roots]
    assert 2 == guest.sp(root >> 12).root_count


# ---- roots where no memory is ------------------------------------------------------------------------------------------

def test_a_root_in_a_hole_is_the_dummy_root_until_memory_is_there():
    """The guest faults at its first access; with memory behind the root, the next fault loads it."""
    guest = ShadowGuest(MAP, load=False)
    image = guest.vm.mem.read(TABLES, PAGE)
    guest.vcpu.set_regs(**guest.tables.regs() | {"cr3": GB1})
    for access, code in ((READ, 0), (WRITE | USER, W | U)):
        assert (PF, INVALID, code) == guest.outcome(GVA, access)
    assert [] == guest.sps()
    guest.vm.add_slot(GB1, bytearray(image))
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert GB1 >> 12 in {sp.gfn for sp in guest.sps(level=4)}


def test_a_pdpte_whose_table_is_in_a_hole_has_no_root_until_memory_is_there():
    """The other three are as good as ever."""
    guest = ShadowGuest(MAP, mode="pae")
    directory = guest.vm.mem.read(guest.pte(GVA, 2) & ~0xFFF, PAGE)
    guest.vm.mem.write_u64(guest.tables.cr3 + 16, GB1 | P)
    guest.vcpu.mov_cr(3, guest.tables.cr3)
    assert [(OK, DATA, 0), (PF, INVALID, 0), (PF, INVALID, 0)] == [guest.outcome(GVA + i * GB1) for i in (0, 1, 2)]
    guest.vm.add_slot(GB1, bytearray(directory))
    assert (OK, DATA, 0) == guest.outcome(GVA + GB1)


def test_a_table_in_a_hole_is_not_present():
    guest = ShadowGuest(MAP)
    guest.vm.host_write(guest.pte(GVA, 3), (GB1 | ENTRY).to_bytes(8, "little"))
    assert (PF, INVALID, W) == guest.outcome(GVA, WRITE)
