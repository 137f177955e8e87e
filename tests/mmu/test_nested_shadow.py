# SPDX-License-Identifier: Apache-2.0
"""The shadow MMU under L2: shadows of L1's EPT and NPT, in every format of theirs, and the faults that are L1's to handle."""

import numpy as np
import pytest
from shadow_guests import (
    DATA,
    EPT_A,
    EPT_D,
    EPT_R,
    EPT_W,
    EPT_WB,
    EPT_X,
    EPT_XU,
    GB1,
    GVA,
    INVALID,
    LEAF,
    MAP,
    MB2,
    MMU_PRESENT,
    NX,
    OTHER,
    PAGE,
    STAGE,
    TABLES,
    A,
    D,
    NestedGuest,
    P,
    U,
    W,
)

import kvmmu
from kvmmu import Access, CpuModel, CpuRole, Ept, EptMisconfig, EptViolation, Host, Npt, Pml, RetPf, Status

OK, PF, VIOLATION, MISCONFIG, NPF = (int(getattr(Status, name)) for name in (
    "OK", "PAGE_FAULT", "EPT_VIOLATION", "EPT_MISCONFIG", "NESTED_PAGE_FAULT"))
READ, WRITE, FETCH, USER = Access.READ, Access.WRITE, Access.FETCH, Access.USER
RW = EPT_R | EPT_W | EPT_WB | EPT_A | EPT_D
RWX = RW | EPT_X | EPT_XU
LMA, PAE, PSE, EFER_NX = 0xD00, 1 << 5, 1 << 4, 1 << 11
each_kind = pytest.mark.parametrize("kind", ["ept", "npt"])


# ---- from both kinds of tables to one ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
@each_kind
def test_l2_in_every_mode(kind, mode):
    """Its own tables are walked by the processor, through the shadow of L1's; that has the pages of L1's tables, and no other."""
    guest = NestedGuest(MAP, kind=kind, mode=mode, stage_maps=[(DATA, OTHER)])
    assert (OK, OTHER, 0) == guest.outcome(GVA, WRITE)
    assert 0 == int(guest.touch(GVA, access=WRITE).exits[0])
    assert {sp.gfn << 12 for sp in guest.sps()} <= {table for table in guest.stage.tables()}
    assert all(sp.role.guest_mode for sp in guest.sps())
    assert (PF, INVALID, W) == guest.outcome(GVA + PAGE, WRITE)


@each_kind
def test_l2_with_paging_off(kind):
    """Linear addresses are L2's physical ones."""
    guest = NestedGuest(kind=kind, stage_maps=[(DATA, OTHER)], enter=False)
    guest.enter(cr0=1, cr3=0, cr4=0, efer=0)
    assert (OK, OTHER + 5, 0) == guest.outcome(DATA + 5, WRITE)
    assert (VIOLATION if kind == "ept" else NPF) == guest.outcome(8 * MB2)[0]


@pytest.mark.parametrize(("kind", "mode"), [("ept", "4l"), ("ept", "32"), ("npt", "4l"), ("npt", "pae")])
def test_random_accesses_come_to_what_two_stage_walks_say(kind, mode):
    """4,000 accesses to pages with all rights in both stages; A and D are set in both, so that none is stale."""
    rng = np.random.default_rng(7)
    maps, stage_maps = [], []
    if kind == "ept":
        rights = (0, EPT_R, EPT_R | EPT_W, EPT_R | EPT_X | EPT_XU, EPT_X | EPT_XU, RWX, EPT_W, RWX)
    else:
        rights = (0, P | U, P | W | U, P | U | NX, P, P | W | U, P | W | U | 1 << 50, P | W | U)
    for i in range(64):
        flags = " ".join(["p a d", *(name for bit, name in enumerate(("w", "u")) if i >> bit & 1),
                          *(["nx"] if i >> 2 & 1 and mode != "32" else [])])
        maps.append((GVA + i * PAGE, DATA + i * PAGE, flags))
        raw = rights[i >> 3] | (EPT_WB | EPT_A | EPT_D if kind == "ept" else A | D)
        stage_maps.append((DATA + i * PAGE, OTHER + (63 - i) * PAGE, raw))
    guest = NestedGuest(*maps, kind=kind, mode=mode, stage_maps=stage_maps)
    gva = rng.choice(np.array([one[0] for one in maps], np.uint64), 4000)
    access = rng.choice(np.array([what | ring for what in (0, 2, 16) for ring in (0, 4)], np.uint8), 4000)
    expected = guest.vcpu.gva_walk.translate(gva, access)
    r = guest.vcpu.access(gva, access)
    for name in ("gpa", "status", "error_code"):
        np.testing.assert_array_equal(getattr(expected, name), getattr(r, name), name)
    assert set(r.status.tolist()) == ({OK, PF, VIOLATION, MISCONFIG} if kind == "ept" else {OK, PF, NPF})
    assert guest.vm.stats["bugs"] == 0


@each_kind
def test_l1s_huge_pages_over_small_host_pages_are_direct_pages(kind):
    guest = NestedGuest((GVA, 8 * MB2, LEAF), kind=kind, stage_maps=[(8 * MB2, 4 * MB2, None, 2)])
    assert (OK, 4 * MB2, 0) == guest.outcome(GVA, WRITE)
    assert [4 * MB2 >> 12] == [sp.gfn for sp in guest.sps(direct=True, level=1, guest_mode=True)]
    assert 1 == guest.spte(8 * MB2)[0]


@pytest.mark.parametrize(("ad", "mapped"), [(True, 8), (False, 1)])
def test_prefetch_into_direct_pages_needs_a_bits(ad, mapped):
    """Without them nobody could tell which of the pages L2 uses."""
    guest = NestedGuest((GVA, 8 * MB2, LEAF), kind="ept", ad=ad, stage_maps=[(8 * MB2, 4 * MB2, None, 2)])
    guest.touch(GVA)
    direct, = guest.sps(4 * MB2 >> 12, direct=True, level=1, guest_mode=True)
    assert mapped == sum(1 for spte in direct.sptes if spte & MMU_PRESENT)


@each_kind
def test_l2s_mmio_is_l0s_where_l1_maps_what_has_no_slot(kind):
    """Without a fault to L1; KVM walks both stages itself."""
    guest = NestedGuest(MAP, kind=kind, stage_maps=[(DATA, GB1)])
    r = guest.touch(GVA + 8, access=WRITE)
    assert (OK, GB1 + 8, INVALID, RetPf.EMULATE) == tuple(int(getattr(r, name)[0]) for name in ("status", "gpa", "hpa", "ret"))
    assert 1 == guest.vm.stats["mmio_exits"]


# ---- formats of L1's tables --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("maxphyaddr", "level", "passthrough"), [(46, 4, False), (50, 5, True)])
def test_a_processor_that_walks_five_levels_passes_through_a_root(maxphyaddr, level, passthrough):
    """Over 4-level NPT12: the root has no table behind it, and one entry."""
    guest = NestedGuest(MAP, kind="npt", cpu=CpuModel(maxphyaddr=maxphyaddr, vendor="amd"))
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    role = CpuRole(guest.vcpu.mmu.root_role)
    assert (level, passthrough) == (role.level, role.passthrough)
    assert [level, *range(level - 1, 0, -1)] == [at for at, _ in guest.path(DATA)]
    root = guest.sp(STAGE >> 12, level=level)
    assert 1 == sum(1 for spte in root.sptes if spte & MMU_PRESENT)
    assert not any(sp.role.passthrough for sp in guest.sps() if sp.role.level < level)


@pytest.mark.parametrize("maxphyaddr", [46, 50])
@pytest.mark.parametrize(("mode", "cr4", "efer"), [("pae", PAE, EFER_NX), ("32", PSE, 0)])
def test_nested_npt_of_a_32_bit_l1_under_wrapped_roots(mode, cr4, efer, maxphyaddr):
    """The processor walks four levels, or five, down to a root of four pages; 32-bit tables are two pages each."""
    guest = NestedGuest(MAP, (GVA + PAGE, GB1 + MB2, LEAF), kind="npt", stage_mode=mode, stage_maps=[(GB1 + MB2, OTHER)],
                        cpu=CpuModel(maxphyaddr=maxphyaddr, vendor="amd"), enter=False)
    guest.enter(Npt(guest.stage.cr3, cr4=cr4, efer=efer))
    assert [DATA, OTHER] == guest.touch(GVA, GVA + PAGE, access=WRITE).gpa.tolist()
    assert list(range(4 + (maxphyaddr > 48), 0, -1)) == [at for at, _ in guest.path(DATA)]
    role = CpuRole(guest.vcpu.mmu.root_role)
    assert (mode == "32", False) == (role.has_4_byte_gpte, role.passthrough)
    if mode == "32":
        assert {0, 1} == {sp.role.quadrant for sp in guest.sps(level=1)}
        assert {0, 1, 2, 3} == {sp.role.quadrant for sp in guest.sps(level=2)}


@pytest.mark.parametrize("stage_mode", ["4l", "5l"])
def test_nested_ept_has_the_levels_that_l1_says(stage_mode):
    guest = NestedGuest(MAP, kind="ept", stage_mode=stage_mode)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    assert int(stage_mode[0]) == guest.path(DATA)[0][0]


def test_mbec_of_l1_is_a_role_and_its_own_rights():
    """Toggled between entries: other pages, and whether a user page may be executed is bit 10's to say."""
    guest = NestedGuest((GVA, DATA, "p u a d"), (GVA + PAGE, OTHER, "p a d"), kind="ept",
                        stage_maps=[(DATA, DATA, RW | EPT_X), (OTHER, OTHER, RW | EPT_XU)], enter=False)
    outcomes, roots = [], []
    for mbec in (False, True, False):
        guest.enter(Ept(guest.eptp, mbec=mbec))
        outcomes.append([guest.outcome(gva, FETCH | ring)[0] for gva, ring in ((GVA, USER), (GVA + PAGE, 0))])
        roots.append(guest.vcpu.mmu.root_hpa)
        assert mbec == CpuRole(guest.vcpu.mmu.root_role).cr4_smep
    assert [[OK, VIOLATION], [VIOLATION, VIOLATION], [OK, VIOLATION]] == outcomes
    assert roots[0] == roots[2] != roots[1]
    assert {False, True} == {sp.role.cr4_smep for sp in guest.sps(STAGE >> 12)}


def test_gmet_of_l1_is_a_role_and_its_own_rights():
    """A supervisor's fetch from a user page of NPT12; what is a user's in NPT12 without GMET may be anybody's."""
    guest = NestedGuest((GVA, DATA, "p a d"), kind="npt", stage_maps=[(OTHER, OTHER, P | W | A | D)], enter=False)
    outcomes, roots = [], []
    for gmet in (False, True, False):
        guest.enter(Npt(guest.stage.cr3, gmet=gmet))
        outcomes.append([guest.outcome(GVA, access)[0] for access in (READ, FETCH)])
        roots.append(guest.vcpu.mmu.root_hpa)
        assert gmet == CpuRole(guest.vcpu.mmu.root_role).cr4_smep
    assert [[OK, OK], [OK, NPF], [OK, OK]] == outcomes
    assert roots[0] == roots[2] != roots[1]


def test_nx_of_l1_counts_in_npt12():
    """EFER.NX of L1 at VMRUN: bit 63 forbids fetches, or is reserved."""
    guest = NestedGuest(MAP, kind="npt", stage_maps=[(DATA, DATA, P | W | U | A | D | NX)], enter=False)
    guest.enter(Npt(guest.stage.cr3, efer=LMA))
    assert [OK, NPF] == [guest.outcome(GVA, access)[0] for access in (READ, FETCH)]
    guest.enter(Npt(guest.stage.cr3, efer=LMA & ~EFER_NX))
    with pytest.raises(kvmmu.NestedPageFault) as caught:
        guest.vcpu.access(GVA)
    assert caught.value.exit_qualification & 8                  # RSVD


# ---- accessed and dirty bits of L1's tables ----------------------------------------------------------------------------

@each_kind
def test_a_and_d_of_l1s_entries(kind):
    """A with the first access, D with the first write, which the shadow must not let through before."""
    leaf = EPT_R | EPT_W | EPT_X | EPT_WB if kind == "ept" else P | W | U
    a, d = (EPT_A, EPT_D) if kind == "ept" else (A, D)
    guest = NestedGuest(MAP, kind=kind, stage_maps=[(DATA, DATA, leaf)])
    entry = guest.stage_pte(DATA)
    guest.touch(GVA)
    assert a == guest.vm.mem.read_u64(entry) & (a | d)
    assert 0 == guest.spte(DATA)[1] & W
    assert 1 == int(guest.touch(GVA, access=WRITE).exits[0])
    assert a | d == guest.vm.mem.read_u64(entry) & (a | d)


def test_without_a_and_d_of_ept12_nothing_is_written_there():
    """EPTP bit 6 clear: the page is writable at once, and the role says so."""
    guest = NestedGuest(MAP, kind="ept", ad=False)
    before = guest.vm.mem.read(STAGE, 64 * PAGE)
    guest.touch(GVA)
    assert guest.spte(DATA)[1] & W
    assert 0 == int(guest.touch(GVA, access=WRITE).exits[0])
    assert before == guest.vm.mem.read(STAGE, 64 * PAGE)
    assert CpuRole(guest.vcpu.mmu.root_role).ad_disabled


def test_l1s_dirty_log_is_kept_for_it():
    """PML of L1: each D that is set in EPT12 logs the page; a full log is L1's exit, and nothing is written then."""
    log = 0x300000
    maps = [(GVA + i * PAGE, DATA + i * PAGE, LEAF) for i in range(4)]
    clean = [(DATA + i * PAGE, DATA + i * PAGE, EPT_R | EPT_W | EPT_WB | EPT_A) for i in range(4)]
    guest = NestedGuest(*maps, kind="ept", stage_maps=clean, pml=Pml(log, index=1))
    assert [OK, OK] == guest.touch(GVA, GVA + PAGE, access=WRITE).status.tolist()
    assert [DATA + PAGE, DATA] == [guest.vm.mem.read_u64(log + 8 * i) for i in range(2)]
    assert int(Status.PML_FULL) == guest.outcome(GVA + 2 * PAGE, WRITE)[0]
    assert 0 == guest.vm.mem.read_u64(guest.stage_pte(DATA + 2 * PAGE)) & EPT_D
    assert OK == guest.outcome(GVA, WRITE)[0]


def test_l2s_pages_are_logged_by_write_protection_where_the_processor_logs():
    """The host's own log would hold L2's addresses: these SPTEs are of the type that leaves it out."""
    guest = NestedGuest(MAP, kind="ept", host=Host(tdp="ept", pml=True, maxphyaddr=48))
    guest.vm.set_dirty_log(0)
    guest.touch(GVA)
    assert 2 == guest.spte(DATA)[1] >> 60 & 3
    guest.touch(GVA, access=WRITE)
    guest.vm.get_dirty_log(0)
    assert not guest.spte(DATA)[1] & W
    guest.touch(GVA, access=WRITE)
    assert DATA >> 12 in guest.vm.get_dirty_log(0).tolist()


# ---- faults that are L1's ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("raw", "access", "expected"), [
    (0, READ, EptViolation), (EPT_R | EPT_WB, WRITE, EptViolation), (RW, FETCH, EptViolation),
    (EPT_X | EPT_WB | EPT_A, READ, EptViolation), (EPT_W | EPT_WB, READ, EptMisconfig), (EPT_R | 2 << 3, READ, EptMisconfig),
    (EPT_R | EPT_WB | 1 << 46, READ, EptMisconfig)])
def test_faults_of_ept12_are_exits_to_l1(raw, access, expected):
    """As the two-stage walk has them, with the bits of the exit at hand; L2 sees nothing of it, and L1 may put it right."""
    guest = NestedGuest(MAP, kind="ept", stage_maps=[(DATA, DATA, raw)], advanced_info=False)
    with pytest.raises(expected) as caught:
        guest.vcpu.access(GVA + 8, access)
    with pytest.raises(expected) as walked:
        guest.vcpu.gva_walk.gva_to_gpa(GVA + 8, access)
    for name in ("fault_gpa", "exit_qualification"):
        assert getattr(walked.value, name) == getattr(caught.value, name), name
    assert 0 == guest.vm.stats["pf_guest"]
    event = guest.vcpu.inject(caught.value, caught.value.exit_qualification)
    assert event.guest_physical_address == DATA + 8
    guest.l1_writes(guest.stage_pte(DATA), DATA | RWX)
    guest.vcpu.invalidate_addr(guest.vcpu.ngpa_walk, DATA)
    assert (OK, DATA, 0) == guest.outcome(GVA, access)


def test_an_access_to_l2s_tables_is_told_from_one_to_its_page():
    """TRANSLATED is clear, the address is that of the table's entry; the walk wants to write there."""
    guest = NestedGuest(MAP, kind="ept", stage_maps=[(TABLES + 3 * PAGE, TABLES + 3 * PAGE, EPT_R | EPT_WB | EPT_A)])
    entry = guest.tables.entry_gpa(GVA, 1)
    assert entry & ~0xFFF == TABLES + 3 * PAGE
    with pytest.raises(EptViolation) as caught:
        guest.vcpu.access(GVA)
    assert (entry, 3, 0x80) == (caught.value.fault_gpa, caught.value.exit_qualification & 3,
                                caught.value.exit_qualification & 0x180)


@pytest.mark.parametrize(("raw", "access", "bits"), [
    (0, READ, 4), (0, WRITE, 6), (P | U, WRITE, 7), (P | W | U | NX, FETCH, 0x15), (P | W, READ, 5)])
def test_faults_of_npt12_are_exits_to_l1(raw, access, bits):
    """Every access is a user's there; the final page is told from a table by the stage bits."""
    guest = NestedGuest(MAP, kind="npt", stage_maps=[(DATA, DATA, raw)])
    with pytest.raises(kvmmu.NestedPageFault) as caught:
        guest.vcpu.access(GVA + 8, access)
    assert (DATA + 8, 1 << 32 | bits) == (caught.value.fault_gpa, caught.value.exit_qualification)
    assert 0 == guest.vm.stats["pf_guest"]


def test_l2s_own_faults_take_no_exit():
    guest = NestedGuest((GVA, DATA, "p u a d"), kind="ept")
    guest.touch(GVA)
    exits = guest.vm.stats["exits"]
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)
    assert exits == guest.vm.stats["exits"]
    with pytest.raises(kvmmu.PageFault) as caught:
        guest.vcpu.access(GVA, WRITE)
    assert "L2" == guest.vcpu.inject(caught.value).into


def test_a_fault_that_kvm_finds_itself_drops_the_stale_entry():
    """In the root in use and in those of the same tables that other EPTP bits or controls led to: L1 expects that of a violation.

    L1 takes W away and does not flush. The stale SPTE lets native writes through; an emulated one finds the violation.
    """
    guest = NestedGuest(MAP, kind="ept", enter=False)
    stages = [Ept(guest.eptp, mbec=mbec) for mbec in (False, True)]
    for stage in stages:
        guest.enter(stage)
        assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    guest.l1_writes(guest.stage_pte(DATA), DATA | RWX & ~EPT_W)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    with pytest.raises(EptViolation):
        guest.vcpu.write_guest(GVA, b"x")
    assert VIOLATION == guest.outcome(GVA, WRITE)[0]
    guest.enter(stages[0])
    assert VIOLATION == guest.outcome(GVA, WRITE)[0]


def test_a_nested_page_fault_that_kvm_finds_itself_drops_the_stale_entry():
    guest = NestedGuest(MAP, kind="npt")
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    guest.l1_writes(guest.stage_pte(DATA), DATA | P | U | A | D)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    with pytest.raises(kvmmu.NestedPageFault):
        guest.vcpu.write_guest(GVA, b"x")
    assert NPF == guest.outcome(GVA, WRITE)[0]


def test_a_fault_that_kvm_finds_itself_leaves_other_tables_alone():
    """Another EPTP: its shadow is L1's to flush."""
    guest = NestedGuest(MAP, kind="ept", enter=False)
    other = 0x300000
    guest.vm.mem.write(other, guest.vm.mem.read(STAGE, PAGE))
    stages = [Ept(guest.eptp - STAGE + root, mbec=mbec) for root, mbec in ((other, False), (STAGE, True))]
    for stage in stages:
        guest.enter(stage)
        assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    guest.l1_writes(guest.stage_pte(DATA), DATA | RWX & ~EPT_W)
    with pytest.raises(EptViolation):
        guest.vcpu.write_guest(GVA, b"x")
    guest.enter(stages[0])
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)


# ---- writes to L1's tables ---------------------------------------------------------------------------------------------

@each_kind
def test_l1s_writes_to_its_leaf_tables_are_seen_at_the_next_invalidation(kind):
    """The table goes unsync, as a guest's own would; entering L2 again is no flush."""
    guest = NestedGuest(MAP, kind=kind)
    guest.touch(GVA, access=WRITE)
    guest.l1_writes(guest.stage_pte(DATA), OTHER | guest.stage_leaf)
    assert 1 == guest.vm.stats["mmu_unsync"]
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vcpu.invalidate_addr(guest.vcpu.ngpa_walk, DATA)
    assert (OK, OTHER, 0) == guest.outcome(GVA)


@each_kind
def test_l1s_writes_to_upper_tables_are_carried_out_by_kvm(kind):
    """And the pages below that lost their last parent are gone, for nobody would find them again."""
    guest = NestedGuest(MAP, kind=kind)
    guest.touch(GVA, access=WRITE)
    below = guest.sps(guest.stage_pte(DATA) >> 12)
    assert below != []
    result = guest.l1_writes(guest.stage_pte(DATA, 2), 0)
    assert RetPf.EMULATE == result.ret
    assert (VIOLATION if kind == "ept" else NPF) == guest.outcome(GVA)[0]


@each_kind
def test_pages_of_l1s_tables_that_lose_their_last_parent_are_zapped(kind):
    guest = NestedGuest(MAP, kind=kind)
    guest.touch(GVA, access=WRITE)
    guest.vcpu.leave_nested()
    # flooding takes the directory, and what only it led to goes with it
    directory, table = guest.stage_pte(DATA, 2) >> 12, guest.stage_pte(DATA) >> 12
    for _ in range(3):
        guest.vcpu.write_guest(guest.stage_pte(DATA, 2) + 8 * 100, bytes(8))
    assert [] == guest.sps(directory)
    assert [] == guest.sps(table)


# ---- transitions -------------------------------------------------------------------------------------------------------

@each_kind
def test_l1_and_l2_keep_their_roots(kind):
    """Entering and leaving builds nothing anew, and takes no fault again."""
    guest = NestedGuest(MAP, kind=kind)
    seen = []
    for _ in range(3):
        assert (OK, DATA, 0) == guest.outcome(GVA)
        inside = guest.vcpu.mmu.root_hpa
        guest.vcpu.leave_nested()
        assert (OK, DATA, 0) == guest.outcome(DATA)
        seen.append((inside, guest.vcpu.mmu.root_hpa, guest.vm.stats["mmu_cache_miss"], guest.vm.stats["pf_taken"]))
        guest.enter()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] != seen[0][1]


@each_kind
def test_l1_switches_between_second_stages(kind):
    """The roots of four of them are kept."""
    guest = NestedGuest(MAP, kind=kind, enter=False)
    copies = [STAGE, *(0x300000 + i * PAGE for i in range(5))]
    for copy in copies[1:]:
        guest.vm.mem.write(copy, guest.vm.mem.read(STAGE, PAGE))

    def enter(root):
        guest.enter(Ept(guest.eptp - STAGE + root) if kind == "ept" else Npt(root))
        return guest.outcome(GVA)

    for root in copies[:4] * 2:
        assert (OK, DATA, 0) == enter(root)
    assert [root >> 12 for root in copies[2::-1]] == [pgd >> 12 for pgd, _ in guest.vcpu.mmu.prev_roots]
    events = guest.during("kvm_mmu_get_page", lambda: [enter(root) for root in copies[:4]])
    assert [] == events
    enter(copies[4])
    events = guest.during("kvm_mmu_get_page", lambda: enter(copies[0]))
    assert [copies[0] >> 12] == [event.fields["gfn"] for event in events]


@each_kind
def test_the_host_takes_a_page_of_l2s_away(kind):
    guest = NestedGuest(MAP, kind=kind)
    before = int(guest.touch(GVA, access=WRITE).hpa[0])
    guest.vm.invalidate(DATA, PAGE, "move")
    r = guest.touch(GVA, access=WRITE)
    assert (DATA, True) == (int(r.gpa[0]), int(r.hpa[0]) not in (before, INVALID))
    with guest.vm.invalidation(DATA, PAGE):
        assert RetPf.RETRY == int(guest.touch(GVA).ret[0])
    guest.vm.zap_all()
    assert (OK, DATA, 0) == guest.outcome(GVA)


def test_l2_without_a_second_stage_is_served_by_the_tdp_mmu():
    """No shadow page at all; a root of its own."""
    guest = NestedGuest(MAP, kind="ept", enter=False)
    guest.vcpu.enter_nested(None, **guest.tables.regs())
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    assert 0 == guest.vm.stats["mmu_cache_miss"]
    assert CpuRole(guest.vcpu.mmu.root_role).guest_mode
