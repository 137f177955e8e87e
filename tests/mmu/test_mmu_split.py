# SPDX-License-Identifier: Apache-2.0
"""The split into tdp_mmu and shadow_mmu that the discussion of the series asked for: a test for each way in which they differ."""

import pytest
from shadow_guests import (
    DATA,
    GVA,
    LEAF,
    MAP,
    MB2,
    OTHER,
    PAGE,
    SHADOW,
    TABLES,
    A,
    D,
    NestedGuest,
    P,
    ShadowGuest,
    U,
    W,
    outcome,
    touch,
)

from kvmmu import Access, CpuRole, Ept, Host, Status
from kvmmu.machine._mmus import ShadowMmu, TdpMmu

OFF = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}
HOSTS = {"ept": Host(tdp="ept", maxphyaddr=48), "npt": Host(tdp="npt", maxphyaddr=48), "shadow": SHADOW}
each_tdp = pytest.mark.parametrize("kind", ["ept", "npt"])
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
SHADOW_EVENTS = "kvm_mmu_get_page kvm_mmu_sync_page kvm_mmu_unsync_page kvm_mmu_prepare_zap_page"


# ---- used when ---------------------------------------------------------------------------------------------------------

@each_tdp
def test_used_when_two_dimensional_paging_is_on(kind):
    """tdp_mmu for L1, paging or not, in SMM, and for L2 without nested paging; shadow_mmu for L2 under L1's tables alone."""
    guest = NestedGuest(MAP, kind=kind, enter=False)
    vcpu = guest.vcpu
    uses = []

    def use():
        uses.append(type(vcpu.mmu))
        assert (Status.OK, DATA, 0) == outcome(vcpu, GVA if vcpu.mmu_is_nested else DATA)

    use()
    vcpu.set_regs(**OFF)
    use()
    vcpu.smm = True
    use()
    vcpu.smm = False
    vcpu.enter_nested(None)
    use()
    guest.enter()
    use()
    vcpu.leave_nested()
    use()
    assert [TdpMmu, TdpMmu, TdpMmu, TdpMmu, ShadowMmu, TdpMmu] == uses


def test_used_when_two_dimensional_paging_is_off():
    """shadow_mmu for everything, paging off included, and there is no other."""
    guest = ShadowGuest(MAP)
    vcpu = guest.vcpu
    assert vcpu.tdp_mmu is None
    assert (Status.OK, DATA, 0) == guest.outcome(GVA)
    vcpu.enter_nested(None)
    assert vcpu.mmu is vcpu.shadow_mmu
    assert (Status.OK, DATA, 0) == guest.outcome(GVA)
    vcpu.leave_nested()
    vcpu.set_regs(**OFF)
    assert vcpu.mmu is vcpu.shadow_mmu
    assert (Status.OK, DATA, 0) == guest.outcome(DATA)
    with pytest.raises(ValueError, match="without two-dimensional paging"):
        vcpu.enter_nested(Ept(0x101E))


# ---- w -----------------------------------------------------------------------------------------------------------------

@each_host
def test_w_is_none_or_the_walk_that_is_shadowed(host):
    """A fault of the TDP MMU needs no look at guest tables: one of a page whose tables are nonsense is handled like any."""
    guest = ShadowGuest(MAP, host=host)
    vcpu = guest.vcpu
    assert vcpu.shadow_mmu.w is (vcpu.gva_walk if host.tdp is None else vcpu.ngpa_walk)
    if host.tdp is not None:
        assert vcpu.tdp_mmu.w is None
    vcpu.set_regs(cr3=0x100000)                             # no tables there
    events = guest.during("kvm_mmu_pagetable_walk", lambda: vcpu.mmu.page_fault(DATA, U))
    assert bool(events) == (host.tdp is None)
    assert guest.vm.stats["pf_fixed"] == (host.tdp is not None)


# ---- root kinds --------------------------------------------------------------------------------------------------------

@each_tdp
def test_root_kinds_of_the_tdp_mmu_are_by_role(kind):
    """L1, L2 without nested paging, and SMM have a root each, which vCPUs share; a page of L1's tables is none."""
    vm_of = ShadowGuest(MAP, host=HOSTS[kind])
    a, b = vm_of.vcpu, vm_of.vm.create_vcpu()
    b.set_regs(**OFF)
    roots = {}
    for vcpu in (a, b):
        for name, smm, nested in (("L1", False, False), ("SMM", True, False), ("L2", False, True)):
            vcpu.smm = smm
            if nested:
                vcpu.enter_nested(None)
            touch(vcpu, DATA)
            roots.setdefault(name, set()).add(vcpu.mmu.root_hpa)
            vcpu.leave_nested()
            vcpu.smm = False
    assert [1, 1, 1] == [len(hpas) for hpas in roots.values()]
    assert 3 == len(set().union(*roots.values()))
    assert all(sp.role.direct for sp in vm_of.sps())


@pytest.mark.parametrize(("mode", "roots"), [
    ("off", [(0, 2, 0), (0x40000, 2, 0), (0x80000, 2, 0), (0xC0000, 2, 0)]), ("4l", [(TABLES >> 12, 4, 0)]),
    ("32", [(TABLES >> 12, 2, 0), (TABLES >> 12, 2, 1), (TABLES >> 12, 2, 2), (TABLES >> 12, 2, 3)]),
    ("5l", [(TABLES >> 12, 5, 0)])])
def test_root_kinds_of_the_shadow_mmu(mode, roots):
    """A page of the hash; four under a PAE root, one for each gigabyte of linear addresses; direct ones with paging off."""
    guest = ShadowGuest(MAP, mode="4l" if mode == "off" else mode, load=False)
    guest.vcpu.set_regs(**OFF if mode == "off" else guest.tables.regs())
    guest.vcpu.vm_enter()
    assert roots == [(sp.gfn, sp.role.level, sp.role.quadrant) for sp in guest.sps()]
    assert {mode == "off"} == {sp.role.direct for sp in guest.sps()}
    assert {1} == {sp.root_count for sp in guest.sps()}


def test_root_kinds_of_the_shadow_mmu_dummy_root():
    """A root where no memory is: the guest faults, and nothing breaks."""
    guest = ShadowGuest(MAP, load=False)
    guest.vcpu.set_regs(**guest.tables.regs() | {"cr3": 1 << 40})
    assert (Status.PAGE_FAULT, W) == (guest.outcome(GVA, Access.WRITE)[0], guest.outcome(GVA, Access.WRITE)[2])
    assert [] == guest.sps()


# ---- sync_spte, unsync, prefetch, write flooding -----------------------------------------------------------------------

@each_host
def test_sync_spte_unsync_prefetch_and_write_flooding(host):
    """What a guest does to its tables matters to a shadow MMU alone; the TDP MMU does not even see it."""
    guest = ShadowGuest(*((GVA + i * PAGE, DATA + i * PAGE, LEAF) for i in range(-1, 7)), host=host)
    shadowed = host.tdp is None

    def work():
        guest.touch(GVA)                                    # maps its neighbours
        guest.write_pte(GVA, OTHER | P | W | U | A | D)     # unsync
        guest.vcpu.invlpg(GVA)                              # sync_spte
        assert (Status.OK, OTHER, 0) == guest.outcome(GVA)
        for value in (1, 2, 3):                             # flooding
            guest.emulated_write_pte(GVA, guest.read_pte(GVA, 2) | value << 9, 2)

    events = guest.during(SHADOW_EVENTS, work)
    stats = guest.vm.stats
    assert bool(events) == shadowed
    assert bool(stats["mmu_pte_write"]) == shadowed == bool(stats["mmu_flooded"])
    assert (stats["pages_4k"] >= 8) == shadowed
    if not shadowed:
        assert 0 == stats["mmu_unsync"] == stats["mmu_cache_miss"]


# ---- fast_page_fault ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("host", "paging", "fast"), [
    ("ept", True, 1), ("npt", False, 1), ("shadow", False, 1), ("shadow", True, 0)])
def test_fast_page_fault(host, paging, fast):
    """Where the tables are direct: the TDP MMU's, and those of a guest with paging off. Never where guest tables stand behind."""
    guest = ShadowGuest((DATA, DATA, LEAF), host=HOSTS[host])
    if not paging:
        guest.vcpu.set_regs(**OFF)
    guest.touch(DATA, access=Access.WRITE)
    guest.vm.set_dirty_log(0)
    guest.touch(DATA)
    changed = guest.changes(lambda: guest.touch(DATA, access=Access.WRITE))
    assert (fast, 1) == (changed.get("pf_fast", 0), changed["pf_taken"])
    assert DATA >> 12 in guest.vm.get_dirty_log(0).tolist()


# ---- legacy direct path ------------------------------------------------------------------------------------------------

@each_tdp
def test_legacy_direct_path_is_for_paging_off_alone(kind):
    """Under two-dimensional paging no shadow page is direct but those that split L1's huge pages: the TDP MMU has the rest."""
    guest = ShadowGuest((DATA, DATA, LEAF), host=HOSTS[kind])
    for regs in (OFF, guest.tables.regs()):
        guest.vcpu.set_regs(**regs)
        assert [] == guest.during("kvm_mmu_get_page", lambda: guest.touch(DATA))
    assert guest.vm.stats["mmu_cache_miss"] == 0


# ---- gfn root match ----------------------------------------------------------------------------------------------------

@each_host
def test_gfn_root_match(host):
    """A load of CR3 leaves a TDP root alone, and chooses another shadow root; with paging off it does not matter either."""
    guest = ShadowGuest(MAP, host=host)
    guest.vm.mem.write(0x200000, guest.vm.mem.read(TABLES, PAGE))           # another root, the same tables below
    guest.touch(GVA)
    root = guest.vcpu.mmu.root_hpa
    guest.vcpu.mov_cr(3, 0x200000)
    assert (Status.OK, DATA, 0) == guest.outcome(GVA)
    assert (root == guest.vcpu.mmu.root_hpa) == (host.tdp is not None)
    guest.vcpu.mov_cr(3, TABLES)
    guest.vcpu.vm_enter()
    assert root == guest.vcpu.mmu.root_hpa
    guest.vcpu.set_regs(**OFF)
    guest.touch(DATA)
    root = guest.vcpu.mmu.root_hpa
    guest.vcpu.mov_cr(3, 0x200000)
    guest.touch(DATA)
    assert root == guest.vcpu.mmu.root_hpa


# ---- the rename map ----------------------------------------------------------------------------------------------------

def test_root_mmu_and_guest_mmu_are_aliases():
    """For readers who come from KVM: root_mmu is half the one, half the other; guest_mmu is never L2's without nested paging."""
    nested, shadow = NestedGuest(MAP, kind="ept").vcpu, ShadowGuest(MAP).vcpu
    assert (nested.root_mmu, nested.guest_mmu) == (nested.tdp_mmu, nested.shadow_mmu)
    assert (shadow.root_mmu, shadow.guest_mmu) == (shadow.shadow_mmu, None)
    for vcpu in (nested, shadow):
        for name in ("root_mmu", "guest_mmu", "mmu", "tdp_mmu", "shadow_mmu"):
            with pytest.raises(AttributeError):
                setattr(vcpu, name, None)
    nested.leave_nested()
    nested.enter_nested(None)
    assert nested.mmu is nested.root_mmu is not nested.guest_mmu


@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_mmu_is_nested_is_tdp_enabled_and_the_shadow_mmu(tdp):
    """The predicate in the words of the split, in each state that there is."""
    guest = ShadowGuest(MAP) if tdp is None else NestedGuest(MAP, kind=tdp, enter=False)
    vcpu = guest.vcpu
    states = [lambda: None, lambda: vcpu.enter_nested(None), vcpu.leave_nested]
    if tdp is not None:
        states += [guest.enter, vcpu.leave_nested]
    seen = set()
    for change in states:
        change()
        assert vcpu.mmu_is_nested == (tdp is not None and vcpu.mmu is vcpu.shadow_mmu)
        seen.add(vcpu.mmu_is_nested)
    assert seen == ({False} if tdp is None else {False, True})


def test_direct_is_a_bad_word_for_either():
    """With paging off a shadow root is direct, and so are pages below a huge page of the guest: all of them shadow_mmu's."""
    guest = ShadowGuest((2 * MB2, MB2, LEAF, 2))
    guest.touch(2 * MB2)
    direct = [sp for sp in guest.sps() if sp.role.direct]
    assert [MB2 >> 12] == [sp.gfn for sp in direct]
    assert not CpuRole(guest.vcpu.shadow_mmu.root_role).direct
    guest.vcpu.set_regs(**OFF)
    assert CpuRole(guest.vcpu.shadow_mmu.root_role).direct
