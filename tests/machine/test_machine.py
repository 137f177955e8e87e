# SPDX-License-Identifier: Apache-2.0
"""The machine, rule by rule: faults of the host's tables, huge pages, dirty log, aging, MMIO, NX mitigation, TLB, tracepoints."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from builders import PageTables
from internals import hit_rights

import kvmmu
from kvmmu import Access, Accesses, CpuModel, GuestMemory, Host, PageFormat, RetPf, Status, Tlb, Tracepoints, Vcpu, Vm

PAGE, MB2, GB1 = 0x1000, 0x200000, 0x40000000
INVALID = 2**64 - 1
P, W, U, RSVD, F = 1, 2, 4, 8, 16
FINAL, TABLE = 1 << 32, 1 << 33
ACCESSES = ("gpa", "hpa", "status", "error_code", "ret", "exits")
EPT = Host(tdp="ept", maxphyaddr=46)
NPT = Host(tdp="npt", maxphyaddr=48)
each_tdp = pytest.mark.parametrize("host", [EPT, NPT], ids=["ept", "npt"])


def machine(host=EPT, size=16 * MB2, backing=None, cpu=None, mode="4l", maps=(), **vm):
    """(vm, vcpu) of a guest with paging off, or with `maps` of (gva, gpa, ...) in tables at its end."""
    mem = GuestMemory(size)
    machine = Vm(mem, cpu=cpu, host=host, backing=backing, **vm)
    vcpu = machine.create_vcpu()
    if maps:
        tables = PageTables(mode, base=size - MB2)
        for one in maps:
            tables.map(*one)
        for gpa, page in zip(*tables.pages(), strict=True):
            mem.write(int(gpa), page.tobytes())
        vcpu.set_regs(**tables.regs())
        vcpu.tables = tables
    else:
        vcpu.set_regs(cr0=1, cr3=0, cr4=0, efer=0)
    return machine, vcpu


def touch(vcpu, *gpas, access=0):
    return vcpu.access(np.array(gpas, np.uint64), access)


def leaves(vm):
    """{gfn: (level, spte)} of the leaf entries."""
    pages = vm.sptes()
    found = {}
    for gfn, role, sptes in zip(pages["gfn"].tolist(), pages["role"].tolist(), pages["sptes"], strict=True):
        level = role & 15
        for i in np.flatnonzero(sptes & np.uint64(1 << 11)):
            if level == 1 or int(sptes[i]) >> 7 & 1:
                found[gfn + (int(i) << 9 * (level - 1))] = (level, int(sptes[i]))
    return found


# ---- first touches -------------------------------------------------------------------------------------------------------

@each_tdp
@pytest.mark.parametrize(("backing", "size"), [("4k", PAGE), ("2m", MB2), ("1g", GB1)])
def test_first_touches_are_one_fault_per_page_of_the_host(host, backing, size):
    """Every page is mapped once, at the level of its backing, and found again without an exit."""
    vm, vcpu = machine(host, size=4 * GB1 if backing == "1g" else 16 * MB2, backing=backing)
    gva = np.random.default_rng(1).integers(0, min(vm.mem.slots[0][1], 1 << 32), 5000, np.uint64)
    touched = len({int(a) // size for a in gva})
    r = vcpu.access(gva, Access.WRITE)
    assert (r.gpa == gva).all()
    assert touched == int(r.exits.sum()) == vm.stats["pf_taken"] == vm.stats["pf_fixed"]
    assert touched == vm.stats[f"pages_{backing}"]
    slot = vm.slots[0]
    np.testing.assert_array_equal(r.hpa, gva + np.uint64(slot["pfn"] << 12))
    assert vm.audit() == []
    again = vcpu.access(gva, Access.WRITE)
    assert int(again.exits.sum()) == 0


def test_slot_edges_take_small_pages():
    """Half a 2M page at each end of a slot is mapped by 4K pages."""
    vm, vcpu = machine(size=MB2 + MB2 // 2, backing="2m")
    touch(vcpu, 0x1000, MB2 + 0x1000)
    assert {0: 2, (MB2 + PAGE) // PAGE: 1} == {gfn: level for gfn, (level, _) in leaves(vm).items()}


@pytest.mark.parametrize(("maxphyaddr", "level"), [(40, 4), (48, 4), (49, 5), (52, 5)])
def test_depth_follows_the_guests_addresses(maxphyaddr, level):
    """Five levels only where a guest-physical address may have more than 48 bits."""
    vm, vcpu = machine(cpu=CpuModel(maxphyaddr=maxphyaddr))
    touch(vcpu, 0)
    assert level == vcpu.mmu.root_role & 15
    assert level == len({int(role) & 15 for role in vm.sptes()["role"]} | {3, 2, 1})


@each_tdp
def test_roots_have_the_role_of_the_guest(host):
    """SMM and L2 without nested paging have roots of their own; coming back finds the old one."""
    vm, vcpu = machine(host)
    touch(vcpu, 0)
    first = vcpu.mmu.root_hpa
    vcpu.smm = True
    touch(vcpu, 0)
    assert vcpu.mmu.root_hpa != first
    assert vcpu.mmu.root_role >> 24 == 1
    vcpu.smm = False
    touch(vcpu, 0)
    assert vcpu.mmu.root_hpa == first
    vcpu.enter_nested(None)
    touch(vcpu, 0)
    assert vcpu.mmu.root_role >> 17 & 1
    vcpu.leave_nested()
    assert 3 == vm.stats["pf_fixed"]
    touch(vcpu, 0)
    assert vcpu.mmu.root_hpa == first
    assert vm.audit() == []


def test_two_vcpus_share_a_root():
    vm, a = machine()
    b = vm.create_vcpu()
    b.set_regs(cr0=1)
    touch(a, 0)
    assert 0 == int(touch(b, 0).exits[0])
    assert a.mmu.root_hpa == b.mmu.root_hpa


def test_tdp_mmu_has_no_walk():
    _, vcpu = machine()
    assert vcpu.mmu.w is None
    assert vcpu.mmu is vcpu.tdp_mmu is vcpu.root_mmu
    assert isinstance(vcpu.mmu.fmt, PageFormat)


# ---- return codes --------------------------------------------------------------------------------------------------------

def test_return_codes_of_page_fault():
    """Fixed, then spurious; a read-only slot and a hole are emulated; an invalidation under way retries."""
    vm, vcpu = machine()
    vm.add_slot(8 * GB1, PAGE, readonly=True)
    mmu = vcpu.mmu
    assert RetPf.FIXED == mmu.page_fault(0x3000, FINAL)
    assert RetPf.SPURIOUS == mmu.page_fault(0x3000, FINAL | W | P)
    assert RetPf.SPURIOUS == mmu.page_fault(0x3000, FINAL)
    assert RetPf.EMULATE == mmu.page_fault(8 * GB1, FINAL | W)
    assert RetPf.FIXED == mmu.page_fault(8 * GB1, FINAL)
    assert RetPf.EMULATE == mmu.page_fault(12 * GB1, FINAL | W)
    with vm.invalidation(0x3000, PAGE):
        assert RetPf.RETRY == mmu.page_fault(0x3000, FINAL)
    stats = vm.stats
    assert (7, 2, 2, 2) == tuple(stats[name] for name in ("pf_taken", "pf_fixed", "pf_spurious", "pf_emulate"))


@pytest.mark.parametrize(("host", "error_code", "ret"), [
    (Host(tdp="ept"), F, RetPf.SPURIOUS), (Host(tdp="ept"), F | U, RetPf.SPURIOUS),
    (Host(tdp="npt", gmet=True, maxphyaddr=48), F, RetPf.SPURIOUS),
    (Host(tdp="npt", gmet=True, maxphyaddr=48), F | U, RetPf.SPURIOUS)])
def test_spurious_is_decided_by_the_formats_own_rights(host, error_code, ret):
    """A fault of an access that the entry grants is spurious."""
    _, vcpu = machine(host, backing="2m")
    assert RetPf.FIXED == vcpu.mmu.page_fault(0x3000, FINAL | W)
    assert ret == vcpu.mmu.page_fault(0x3000, FINAL | P | error_code)


def test_a_fetch_from_a_huge_page_under_the_mitigation_splits_it():
    """The parts are executable at once, so that nothing is left to map: the fault counts as spurious."""
    vm, vcpu = machine(Host(tdp="ept", nx_huge_pages=True), backing="2m")
    vcpu.mmu.page_fault(0x3000, FINAL | W)
    assert not leaves(vm)[0][1] & 4
    assert RetPf.SPURIOUS == vcpu.mmu.page_fault(0x3000, FINAL | P | F)
    assert 512 == len(leaves(vm))
    assert all(spte & 4 for _, spte in leaves(vm).values())
    assert 1 == vm.stats["nx_lpage_splits"]


def test_gmet_pages_of_the_host_are_supervisor_pages():
    """U=0, so that supervisors may fetch; users may all the same."""
    vm, vcpu = machine(Host(tdp="npt", maxphyaddr=48, gmet=True), maps=((0x1000, 0x3000, "p w u"), (0x2000, 0x4000, "p w")))
    assert (touch(vcpu, 0x1000, access=Access.FETCH | Access.USER).status == 0).all()
    assert (touch(vcpu, 0x2000, access=Access.FETCH).status == 0).all()
    assert all(not spte & U for _, spte in leaves(vm).values())


# ---- MMIO ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", [EPT, NPT, Host(tdp="npt", maxphyaddr=52), Host(tdp="ept", maxphyaddr=44, l1tf=True)],
                         ids=["ept", "npt", "npt without mmio entries", "ept with l1tf"])
def test_mmio(host):
    """A hole is emulated; where entries can mark it, the second access no longer takes the slow path."""
    vm, vcpu = machine(host)
    cached = host.tdp == "ept" or host.maxphyaddr < 52
    for _ in range(3):
        r = touch(vcpu, GB1 + 0x123)
        assert (GB1 + 0x123, INVALID, Status.OK, RetPf.EMULATE) == tuple(
            int(getattr(r, name)[0]) for name in ("gpa", "hpa", "status", "ret"))
    stats = vm.stats
    assert 3 == stats["mmio_exits"]
    assert (1 if cached else 3) == stats["pf_taken"]
    assert (1 if cached else 0) == stats["pf_mmio_spte_created"]
    assert vm.audit() == []


def test_mmio_entries_grow_stale_with_each_change_of_slots():
    """A slot in the place of a hole: the old entry is not believed."""
    vm, vcpu = machine()
    touch(vcpu, GB1)
    vm.trace = Tracepoints("check_mmio_spte")
    vm.add_slot(GB1, PAGE)
    r = touch(vcpu, GB1)
    assert int(r.hpa[0]) != INVALID
    assert RetPf.FIXED == int(r.ret[0])
    event, = vm.trace.events()
    assert event.fields["kvm_gen"] != event.fields["spte_gen"]
    assert "valid 0" in str(event)


def test_mmio_generation_wraps_by_dropping_everything():
    """18 bits: before an old generation could look new, all page tables go."""
    vm, vcpu = machine()
    touch(vcpu, GB1, 0)
    root = vcpu.mmu.root_hpa
    vm.kvm.advance_generation((1 << 18) - 2 - vm.kvm.generation)
    touch(vcpu, GB1)
    assert root == vcpu.mmu.root_hpa
    taken = vm.stats["pf_taken"]
    vm.trace = Tracepoints("kvm_mmu_zap_all_fast")
    vm.kvm.advance_generation(2)
    assert 1 == len(vm.trace.events())
    assert vcpu.mmu.root_hpa is None or vm.stats["pages_4k"] == 0
    touch(vcpu, GB1)
    assert taken + 1 == vm.stats["pf_taken"]
    assert vm.audit() == []


def test_writes_to_a_read_only_slot_are_mmio():
    vm, vcpu = machine()
    vm.add_slot(GB1, PAGE, readonly=True)
    assert int(touch(vcpu, GB1).hpa[0]) != INVALID
    r = touch(vcpu, GB1, access=Access.WRITE)
    assert (RetPf.EMULATE, INVALID) == (int(r.ret[0]), int(r.hpa[0]))
    (_, spte), = leaves(vm).values()
    assert not spte & (W | 1 << 53 | 1 << 55)


@each_tdp
def test_guest_tables_in_a_read_only_slot_can_be_walked(host):
    """The processor's own accesses to them are writes that cannot be: KVM walks instead, and sets no A and D."""
    vm, vcpu = machine(host)
    tables = PageTables("4l", base=GB1)
    tables.map(0x1000, 0x3000)
    gpas, pages = tables.pages()
    vm.add_slot(GB1, pages.copy().view(np.uint8).reshape(-1), readonly=True)
    assert (np.diff(gpas.astype(np.int64)) == PAGE).all()
    before = vm.mem.read(GB1, len(gpas) * PAGE)
    vcpu.set_regs(**tables.regs())
    r = touch(vcpu, 0x1234, access=Access.WRITE)
    assert (0x3234, RetPf.EMULATE) == (int(r.gpa[0]), int(r.ret[0]))
    assert int(r.hpa[0]) == (vm.kvm.host_page(0x3000)[0] << 12) + 0x234
    assert before == vm.mem.read(GB1, len(gpas) * PAGE)


# ---- the guest's own faults ------------------------------------------------------------------------------------------------

@each_tdp
def test_faults_of_the_guest_take_no_exit(host):
    vm, vcpu = machine(host, maps=((0x1000, 0x3000, "p"),))
    touch(vcpu, 0x1000)
    exits = vm.stats["exits"]
    r = touch(vcpu, 0x1000, access=Access.WRITE | Access.USER)
    assert (Status.PAGE_FAULT, P | W | U, INVALID) == (int(r.status[0]), int(r.error_code[0]), int(r.hpa[0]))
    with pytest.raises(kvmmu.PageFault) as caught:
        vcpu.access(0x1000, Access.WRITE | Access.USER)
    assert (P | W | U, 0x1000) == (caught.value.error_code, caught.value.address)
    with pytest.raises(kvmmu.GeneralProtection):
        vcpu.access(1 << 60)
    assert exits == vm.stats["exits"]
    assert 0x3000 == vcpu.access(0x1000).gpa


@each_tdp
def test_the_processor_walks_by_the_manuals_and_kvm_by_its_own_rules(host):
    """2-level paging with NXE, without SMEP: KVM reports a fetch, a processor does not. `conformance` is of translate() alone."""
    for conformance in ("sdm", "kvm"):
        vm, vcpu = machine(host, mode="32", maps=((0x1000, 0x3000), (0x2000, GB1)), cpu=CpuModel(conformance=conformance))
        vcpu.set_regs(efer=1 << 11)
        t = vcpu.gva_walk.translate(np.array([0x9000], np.uint64), Access.FETCH)
        assert (F if conformance == "kvm" else 0) == int(t.error_code[0])
        assert 0 == int(touch(vcpu, 0x9000, access=Access.FETCH).error_code[0])
        with pytest.raises(kvmmu.PageFault) as caught:
            vcpu.write_guest(0x9000, b"x")
        assert W == caught.value.error_code
        assert Status.OK == int(touch(vcpu, 0x2000).status[0])          # MMIO: KVM's own walk
        assert vm.audit() == []


@each_tdp
def test_guest_a_and_d_are_those_of_a_walk(host):
    """A on every level, D on the leaf of a write: the same bytes as one-stage walks leave."""
    _, vcpu = machine(host, maps=((0x1000, 0x3000), (0x2000, 0x4000), (0x400000, 8 * MB2, "p w u", 2)))
    _, other = machine(host, maps=((0x1000, 0x3000), (0x2000, 0x4000), (0x400000, 8 * MB2, "p w u", 2)))
    for gva, access in ((0x1000, 0), (0x2000, Access.WRITE), (0x400123, 0), (0x1000, Access.WRITE)):
        touch(vcpu, gva, access=access)
        other.gva_walk.gva_to_gpa(gva, access)
        assert vcpu.mem.read(0, 16 * MB2) == other.mem.read(0, 16 * MB2)


# ---- the host ------------------------------------------------------------------------------------------------------------

@each_tdp
def test_notifier_takes_pages_away(host):
    """After the host moved a page the guest finds the new one; the rest of a huge page is mapped small."""
    vm, vcpu = machine(host, backing="2m")
    before = int(touch(vcpu, 0x3000).hpa[0])
    vm.invalidate(0x3000, PAGE, "move")
    after = int(touch(vcpu, 0x3000).hpa[0])
    assert after not in (before, INVALID)
    assert {3: 1} == {gfn: level for gfn, (level, _) in leaves(vm).items()}
    assert int(touch(vcpu, 0x4000).hpa[0]) == before + PAGE
    assert vm.audit() == []


def test_zero_page_and_copy_on_write():
    """What was unmapped reads as a read-only page; the first write faults twice: once to copy it, once to map the copy."""
    vm, vcpu = machine(backing="4k")
    touch(vcpu, 0x3000, access=Access.WRITE)
    vm.invalidate(0x3000, PAGE)
    assert vm.stats["pages_4k"] == 0
    zero = int(touch(vcpu, 0x3000).hpa[0])
    (_, spte), = leaves(vm).values()
    assert not spte & (W | 1 << 53)
    vm.clear_stats()
    r = touch(vcpu, 0x3000, access=Access.WRITE)
    assert int(r.hpa[0]) != zero
    assert (2, 1) == (vm.stats["pf_taken"], vm.stats["pf_fixed"])
    assert 2 == int(r.exits[0])


def test_under_an_invalidation_nothing_gets_through():
    vm, vcpu = machine()
    touch(vcpu, 0x3000)
    with vm.invalidation(0x3000, PAGE):
        r = touch(vcpu, 0x3000)
        assert (RetPf.RETRY, INVALID, INVALID) == (int(r.ret[0]), int(r.hpa[0]), int(r.gpa[0]))
    assert int(touch(vcpu, 0x3000).hpa[0]) != INVALID


@pytest.mark.parametrize("host", [EPT, NPT, Host(tdp="ept", ad=False)], ids=["ept", "npt", "ept without ad"])
def test_aging(host):
    """An aged page is old until the next walk; without A/D bits the next access takes a fast page fault."""
    vm, vcpu = machine(host, backing="4k")
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert vm.test_age(0, MB2)
    assert vm.age(0, MB2)
    assert not vm.age(0, MB2)
    if not host.ad:
        assert 1 << 52 & leaves(vm)[3][1]                   # R is saved
        assert not leaves(vm)[3][1] & 7
    vcpu.tlb.flush()
    vcpu.set_regs(cr3=0)
    vm.clear_stats()
    touch(vcpu, 0x3000)
    if not host.ad:
        assert 1 == vm.stats["pf_fast"] == vm.stats["pf_taken"]
        assert leaves(vm)[3][1] & 7 == 5                    # W comes back by a write alone
        touch(vcpu, 0x3000, access=Access.WRITE)
        assert leaves(vm)[3][1] & 7 == 7
        assert 2 == vm.stats["pf_fast"]
    assert vm.audit() == []


# ---- dirty log -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", [EPT, NPT, Host(tdp="ept", ad=False), Host(tdp="ept", pml=True),
                                  Host(tdp="ept", eager_split=False)],
                         ids=["ept", "npt", "ept without ad", "pml", "lazy split"])
def test_dirty_log_cycles(host):
    """Each cycle finds what was written in it, over huge pages too, and the pages are huge again when it ends."""
    vm, vcpu = machine(host, size=64 * MB2, backing="2m")
    rng = np.random.default_rng(3)
    touch(vcpu, *range(0, 64 * MB2, MB2), access=Access.WRITE)
    assert 64 == vm.stats["pages_2m"]
    vm.set_dirty_log(0)
    assert (0 if host.eager_split else 64) == vm.stats["pages_2m"]
    assert vm.get_dirty_log(0).tolist() == []
    for _ in range(3):
        frames = np.unique(rng.integers(0, 64 * 512, 700)).astype(np.uint64)
        vcpu.access(frames << np.uint64(12), Access.WRITE)
        assert frames.tolist() == vm.get_dirty_log(0, clear=False).tolist()
        assert frames.tolist() == vm.get_dirty_log(0).tolist()
        assert vm.audit() == []
    assert (host.pml and vm.stats["pml_full"] > 0) or not host.pml
    if not host.pml and host.eager_split:
        assert vm.stats["pf_fast"] > 0
    vm.set_dirty_log(0, False)
    assert vm.stats["pages_2m"] == 64 if host.eager_split else vm.stats["pages_2m"] > 0
    assert vm.audit() == []


def test_a_page_that_the_processor_has_logged_is_as_good_as_in_the_dirty_log():
    vm, vcpu = machine(Host(tdp="ept", pml=True), backing="4k")
    vm.set_dirty_log(0)
    touch(vcpu, 0x5000)
    vm.get_dirty_log(0)                                 # clears the dirty bit
    touch(vcpu, 0x5000, access=Access.WRITE)            # sets it, without an exit
    assert vm.audit() == []
    assert vm.get_dirty_log(0).tolist() == [5]


@pytest.mark.parametrize("began", [False, True])
def test_an_aged_page_may_be_writable_in_the_tlb_alone(began):
    """Without A/D bits aging takes W from the entry and flushes nothing: the dirty log must flush all the same."""
    vm, vcpu = machine(Host(tdp="ept", ad=False), backing="4k")
    if began:
        vm.set_dirty_log(0)
    touch(vcpu, 0x3000, access=Access.WRITE)
    vm.age(0, MB2)
    if began:
        assert [3] == vm.get_dirty_log(0).tolist()
    else:
        vm.set_dirty_log(0)
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert [3] == vm.get_dirty_log(0).tolist()


def test_fast_page_fault_sets_w_and_marks_dirty():
    """A write-protected page of the dirty log: one exit, no new entry, W back, in the log."""
    vm, vcpu = machine(backing="4k")
    vm.set_dirty_log(0)
    touch(vcpu, 0x3000, access=Access.WRITE)
    vm.get_dirty_log(0)
    assert not leaves(vm)[3][1] & W
    vm.trace = Tracepoints("fast_page_fault", "kvm_mmu_set_spte")
    vm.clear_stats()
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert ["fast_page_fault"] == [event.name for event in vm.trace]
    assert "spurious 0 fixed 1" in vm.trace.text()
    assert leaves(vm)[3][1] & W
    assert [3] == vm.get_dirty_log(0).tolist()
    assert (1, 1) == (vm.stats["pf_fast"], vm.stats["pf_fixed"])


def test_fast_page_fault_refuses_what_is_protected_for_good():
    """MMU-writable is clear: the write takes the slow path."""
    vm, vcpu = machine(backing="4k")
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert vm.kvm.write_protect_gfn(3)
    assert not leaves(vm)[3][1] & (W | 1 << 55)
    vm.clear_stats()
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert (0, 1) == (vm.stats["pf_fast"], vm.stats["pf_fixed"])


def test_huge_pages_are_not_made_writable_by_a_fast_page_fault():
    """Under the dirty log a write to a huge page splits it."""
    vm, vcpu = machine(Host(tdp="ept", eager_split=False), backing="2m")
    touch(vcpu, 0x3000, access=Access.WRITE)
    vm.set_dirty_log(0)
    vm.trace = Tracepoints("kvm_mmu_split_huge_page")
    touch(vcpu, 0x3000, access=Access.WRITE)
    assert 1 == len(vm.trace.events())
    assert [3] == vm.get_dirty_log(0).tolist()
    assert vm.stats["pf_fast"] == 0


def test_emulated_writes_are_in_the_dirty_log():
    vm, vcpu = machine(maps=((0x1000, 0x3000), (0x2000, GB1)))
    vm.set_dirty_log(0)
    assert 4 == vcpu.write_guest(0x1FFC, b"\x01" * 4)
    vm.write_guest_physical(0x9000, b"x")
    frames = set(vm.get_dirty_log(0).tolist())
    assert {3, 9} <= frames
    assert frames - {3, 9} <= {gpa >> 12 for gpa in vcpu.tables.tables()}       # A and D of its walk
    assert b"\x01" * 4 == vm.mem.read(0x3FFC, 4)
    assert 0 == vcpu.write_guest(0x2000, b"mmio")
    assert vm.stats["mmio_exits"] == 1
    with pytest.raises(kvmmu.PageFault):
        vcpu.write_guest(0x9000, b"x")
    with pytest.raises(ValueError, match="hole"):
        vm.write_guest_physical(GB1, b"x")


def test_emulated_writes_go_page_by_page():
    """What lies before the page that faults has reached memory, as KVM's emulator leaves it; a native store writes nothing."""
    vm, vcpu = machine(Host(tdp=None), maps=((0x1000, 0x3000),))
    with pytest.raises(kvmmu.PageFault):
        vcpu.store(0x1FFE, b"no..")
    assert bytes(2) == vm.mem.read(0x3FFE, 2)
    with pytest.raises(kvmmu.PageFault):
        vcpu.write_guest(0x1FFE, b"ab..")
    assert b"ab" == vm.mem.read(0x3FFE, 2)


# ---- NX mitigation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tdp", ["ept", "npt"])
def test_nx_mitigation(tdp):
    """No huge page is executable; a fetch splits one; recovery makes it huge again."""
    vm, vcpu = machine(Host(tdp=tdp, maxphyaddr=46, nx_huge_pages=True), backing="2m")
    touch(vcpu, 0x3000, MB2)
    assert 2 == vm.stats["pages_2m"]
    touch(vcpu, 0x3000, access=Access.FETCH)
    assert (1, 1) == (vm.stats["pages_2m"], vm.stats["nx_lpage_splits"])
    touch(vcpu, 0x4000)                                      # the others stay small
    levels = {gfn: level for gfn, (level, _) in leaves(vm).items()}
    assert 2 == levels[512]
    assert levels[3] == 1
    assert vm.audit() == []
    assert 1 == vm.recover_nx_huge_pages(60)
    assert 0 == vm.recover_nx_huge_pages(60)
    touch(vcpu, 0x3000)
    assert (2, 0) == (vm.stats["pages_2m"], vm.stats["nx_lpage_splits"])
    assert vm.audit() == []


def test_recovery_takes_the_oldest_first_and_leaves_logged_slots():
    vm, vcpu = machine(Host(tdp="ept", nx_huge_pages=True), size=64 * MB2, backing="2m")
    touch(vcpu, *range(0, 20 * MB2, MB2), access=Access.FETCH)
    assert 20 == vm.stats["nx_lpage_splits"]
    assert 5 == vm.recover_nx_huge_pages(4)
    left = {gfn // 512 for gfn in leaves(vm)}
    assert set(range(5, 20)) == left
    vm.set_dirty_log(0)
    assert 0 == vm.recover_nx_huge_pages(1)
    assert 15 == vm.stats["nx_lpage_splits"]


# ---- memslots --------------------------------------------------------------------------------------------------------------

def test_slots_come_go_and_move():
    """Page tables go with a slot; its bytes come back elsewhere."""
    vm, vcpu = machine()
    vm.add_slot(GB1, 4 * PAGE)
    vm.mem.write(GB1, b"moved")
    touch(vcpu, GB1, 0)
    root = vcpu.mmu.root_hpa
    vm.move_slot(GB1, 2 * GB1)
    assert b"moved" == vm.mem.read(2 * GB1, 5)
    assert 0 == vm.stats["pages_4k"] == vm.stats["pages_2m"]
    assert int(touch(vcpu, GB1).hpa[0]) == INVALID
    assert int(touch(vcpu, 2 * GB1).hpa[0]) != INVALID
    assert vcpu.mmu.root_hpa != root or vm.stats["tlb_flush"] > 1
    data = vm.delete_slot(2 * GB1)
    assert bytes(data[:5]) == b"moved"
    assert int(touch(vcpu, 2 * GB1).hpa[0]) == INVALID
    assert [0] == [slot["gpa"] for slot in vm.slots]
    with pytest.raises(ValueError, match="no slot begins"):
        vm.delete_slot(GB1)
    with pytest.raises(ValueError, match="the only slot"):
        vm.move_slot(0, GB1)
    assert vm.audit() == []


def test_a_dirty_log_moves_with_its_slot():
    vm, vcpu = machine()
    vm.add_slot(GB1, 4 * PAGE, dirty_log=True)
    touch(vcpu, GB1 + 2 * PAGE, access=Access.WRITE)
    vm.move_slot(GB1, 2 * GB1)
    assert [(2 * GB1 >> 12) + 2] == vm.get_dirty_log(2 * GB1).tolist()
    touch(vcpu, 2 * GB1 + PAGE, access=Access.WRITE)
    assert [(2 * GB1 >> 12) + 1] == vm.get_dirty_log(2 * GB1).tolist()
    vm.add_slot(GB1, PAGE)
    with pytest.raises(ValueError, match="overlap"):
        vm.move_slot(2 * GB1, GB1)
    assert [] == vm.get_dirty_log(2 * GB1).tolist()


def test_memory_too_large_for_the_host():
    with pytest.raises(ValueError, match="36 bits of host-physical address are too few"):
        Vm(GuestMemory(16 * GB1), host=Host(maxphyaddr=36))


def test_smm_has_its_own_memory():
    """Another address space, other memslots, another root."""
    smm = GuestMemory(PAGE)
    smm.write(0, b"smm")
    vm, vcpu = machine(smm_mem=smm)
    outside = int(touch(vcpu, 0x800).hpa[0])
    vcpu.smm = True
    inside = touch(vcpu, 0x800, 0x1800)
    assert int(inside.hpa[0]) not in (outside, INVALID)
    assert int(inside.hpa[1]) == INVALID
    assert vm.audit() == []


# ---- the TLB -------------------------------------------------------------------------------------------------------------

def test_stale_translations_live_until_they_are_flushed():
    """A changed entry is not seen before INVLPG; one that grants more is seen at once, because a denial walks again."""
    vm, vcpu = machine(maps=((0x1000, 0x3000), (0x2000, 0x4000, "p")))
    touch(vcpu, 0x1000, 0x2000)
    entry = vcpu.tables.entry_gpa(0x1000, 1)
    vm.mem.write_u64(entry, 0)
    assert 0x3000 == int(touch(vcpu, 0x1000).gpa[0])
    vcpu.invlpg(0x1FFF)
    assert Status.PAGE_FAULT == int(touch(vcpu, 0x1000).status[0])
    other = vcpu.tables.entry_gpa(0x2000, 1)
    vm.mem.write_u64(other, vm.mem.read_u64(other) | W)
    assert Status.OK == int(touch(vcpu, 0x2000, access=Access.WRITE).status[0])


@pytest.mark.parametrize("host", [EPT, NPT, Host(tdp=None, maxphyaddr=46)])
def test_invalidations_in_smm_count_outside_of_it(host):
    """INVLPG is for every root of the host's that the processor has translations by, one that it comes back to as well."""
    vm, vcpu = machine(host, maps=((0x1000, 0x3000),))
    touch(vcpu, 0x1000)
    vcpu.smm = True
    vm.write_guest_physical(vcpu.tables.entry_gpa(0x1000, 1), (0x4000 | 3).to_bytes(8, "little"))
    vcpu.invlpg(0x1000)
    vcpu.smm = False
    assert 0x4000 == int(touch(vcpu, 0x1000).gpa[0])


def test_global_translations_and_pcids():
    """MOV to CR3 spares global entries and other PCIDs; bit 63 spares all; CR4.PGE takes them too."""
    _, vcpu = machine(maps=((0x1000, 0x3000, "p w u g"), (0x2000, 0x4000)))
    cr3 = vcpu.regs.cr3
    vcpu.mov_cr(4, vcpu.regs.cr4 | 1 << 7 | 1 << 17)
    touch(vcpu, 0x1000, 0x2000)

    def held():
        before = vcpu.tlb.hits
        first = touch(vcpu, 0x1000)
        middle = vcpu.tlb.hits
        second = touch(vcpu, 0x2000)
        assert (int(first.gpa[0]), int(second.gpa[0])) == (0x3000, 0x4000)
        return bool(middle - before), bool(vcpu.tlb.hits - middle)

    assert (True, True) == held()
    vcpu.mov_cr(3, cr3)
    assert (True, False) == held()
    vcpu.mov_cr(3, cr3 | 1 << 63)
    assert (True, True) == held()
    vcpu.mov_cr(3, cr3 | 5 | 1 << 63)
    assert (True, False) == held()
    vcpu.mov_cr(3, cr3 | 1 << 63)
    assert (True, True) == held()
    vcpu.invpcid(1, 5)
    vcpu.mov_cr(3, cr3 | 5 | 1 << 63)
    assert (True, False) == held()
    vcpu.invpcid(0, 5, 0x2000)
    assert (True, False) == held()
    vcpu.invpcid(3)
    assert (True, False) == held()
    vcpu.invpcid(2)
    assert (False, False) == held()
    vcpu.mov_cr(4, vcpu.regs.cr4 & ~(1 << 7))
    assert (False, False) == held()
    with pytest.raises(kvmmu.GeneralProtection):
        vcpu.invpcid(4)
    with pytest.raises(kvmmu.GeneralProtection):
        vcpu.invpcid(0, 0, 1 << 60)


def test_invalidate_addr_of_gva_walk_flushes_the_tlb_and_builds_nothing():
    """Under two-dimensional paging no page table of the host knows linear addresses."""
    vm, vcpu = machine(maps=((0x1000, 0x3000),))
    touch(vcpu, 0x1000)
    vm.mem.write_u64(vcpu.tables.entry_gpa(0x1000, 1), 0)
    before = vm.stats
    vcpu.invalidate_addr(vcpu.gva_walk, 1 << 60)
    assert Status.OK == int(touch(vcpu, 0x1000).status[0])
    vcpu.invalidate_addr(vcpu.gva_walk, 0x1000, "all")
    assert Status.PAGE_FAULT == int(touch(vcpu, 0x1000).status[0])
    assert before == vm.stats
    vcpu.invalidate_addr(vcpu.ngpa_walk, 0)                 # not in use
    assert before == vm.stats
    with pytest.raises(ValueError, match="roots"):
        vcpu.invalidate_addr(vcpu.gva_walk, 0, "some")


def test_paging_off_and_on_again_uses_the_format_of_now():
    """The format of a walk is stale while paging is off; rights of before do not come back with CR0.PG."""
    vm, vcpu = machine(maps=((0x1000, 0x1000, "p u"),))
    on = vcpu.regs
    assert Status.PAGE_FAULT == int(touch(vcpu, 0x1000, access=Access.WRITE).status[0])
    vcpu.set_regs(cr0=1, efer=0x900 & ~0x500, cr4=0)
    assert Status.OK == int(touch(vcpu, 0x1000, access=Access.WRITE).status[0])
    vcpu.set_regs(cr0=on.cr0 & ~(1 << 16), cr4=on.cr4, efer=on.efer)
    assert Status.OK == int(touch(vcpu, 0x1000, access=Access.WRITE).status[0])
    vcpu.set_regs(cr0=on.cr0, cr4=on.cr4 | 1 << 20)
    for access, code in ((Access.WRITE, P | W), (Access.FETCH, P | F)):
        r = touch(vcpu, 0x1000, access=access)
        assert (Status.PAGE_FAULT, code) == (int(r.status[0]), int(r.error_code[0]))
    assert vm.audit() == []


@pytest.mark.parametrize("host", [EPT, NPT, Host(tdp="npt", maxphyaddr=48, gmet=True)], ids=["ept", "npt", "gmet"])
def test_tables_of_a_hit_are_the_rules(host):
    """Every combination of rights of both stages, protection key and access, under several registers."""
    _, vcpu = machine(host, maps=((0x1000, 0x3000),))
    on = vcpu.regs
    for cr0, cr4, efer, pkru in ((0, 0, 0, 0), (0, 3 << 20, 0, 0), (1 << 16, 3 << 20, 0, 0), (0, 1 << 22, 0, 0x5A6C3924),
                                 (1 << 16, 1 << 22, 0, 0x5A6C3924), (1 << 31, 0, 0x500, 0)):
        off = 1 << 5 if cr0 >> 31 else 0
        vcpu.set_regs(cr0=on.cr0 ^ cr0, cr4=(on.cr4 | cr4) & ~off, efer=on.efer & ~efer, pkru=pkru)
        tables, rules = hit_rights(vcpu._machine())
        np.testing.assert_array_equal(rules, tables)
        assert rules.any()
        assert not rules.all()


def test_a_fault_of_kvms_own_rules_is_told_without_a_second_vcpu(monkeypatch):
    """Bits 20:13 of a 4M entry are address bits of PSE-36, which KVM takes for reserved: the model's own walk succeeds."""
    mem = GuestMemory(1 << 20)
    mem.write(0x1000, (0x2D0F7).to_bytes(4, "little"))
    vm = Vm(mem, cpu=CpuModel(maxphyaddr=46), host=Host(tdp=None, maxphyaddr=46))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x10, efer=0)
    assert vcpu.gva_walk.walk_record(0x1234).status == Status.OK
    monkeypatch.setattr(type(vcpu), "__init__", None)
    with pytest.raises(kvmmu.PageFault) as caught:
        vcpu.access(0x1234, Access.WRITE)
    fault = caught.value
    assert (fault.rule, fault.level, fault.entry, fault.entry_gpa) == ("reserved", 2, 0x2D0F7, 0x1000)
    assert (fault.address, fault.access, fault.error_code) == (0x1234, Access.WRITE, P | W | 8)


def test_each_change_of_registers_is_seen_by_the_next_access():
    """The machine takes registers, memory and tags anew only where they changed, and misses no change."""
    vm, vcpu = machine(EPT, maps=((0x1000, 0x3000, "p w u"), (0x2000, 0x4000, "p")))
    assert vcpu.access(0x1000).gpa == 0x3000
    with pytest.raises(kvmmu.PageFault):
        vcpu.access(0x2000, Access.WRITE)                   # CR0.WP
    vcpu.set_regs(cr0=vcpu.regs.cr0 & ~(1 << 16))
    assert vcpu.access(0x2000, Access.WRITE).gpa == 0x4000
    vcpu.mov_cr(4, vcpu.regs.cr4 | 1 << 22)
    vcpu.wrpkru(0xFFFFFFFF)
    with pytest.raises(kvmmu.PageFault) as caught:
        vcpu.access(0x1000, Access.USER)
    assert caught.value.rule == "pkey"
    vcpu.wrpkru(0)
    assert vcpu.access(0x1000, Access.USER).gpa == 0x3000
    vcpu.tlb.use(space=9)                                   # somebody else's tag
    assert vcpu.access(0x1000, Access.USER).gpa == 0x3000
    vm.add_slot(1 << 32, 0x1000)
    assert vcpu.access(0x1000, Access.USER).gpa == 0x3000
    assert vm.audit(True) == []


def test_tlb_by_itself():
    """Least recently used goes first; spaces are apart; huge entries serve all of their pages."""
    tlb = Tlb(((1, 2), (1, 1), (1, 1)))
    tlb.fill(0x1000, 0xA000)
    tlb.fill(0x2000, 0xB000)
    assert (0xA000, 1) == tlb.lookup(0x1FFF)
    tlb.fill(0x3000, 0xC000)
    assert tlb.lookup(0x2000) is None
    assert (0xA000, 1) == tlb.lookup(0x1000)
    assert 1 == tlb.evictions
    tlb.fill(MB2, 0x40000000, level=2)
    assert (0x40000000, 2) == tlb.lookup(2 * MB2 - 1)
    tlb.use(space=7)
    assert tlb.lookup(0x1000) is None
    tlb.use(space=0, pcid=3)
    assert tlb.lookup(0x1000) is None
    tlb.use()
    assert (0xA000, 1) == tlb.lookup(0x1000)
    for space in range(200):                                # more spaces than it has names for
        tlb.use(space)
        tlb.fill(0x5000, space << 12)
        assert (space << 12, 1) == tlb.lookup(0x5000)
    with pytest.raises(ValueError, match="power of two"):
        Tlb(((3, 1), (1, 1), (1, 1)))


def test_a_tlb_with_one_entry_changes_no_answer():
    maps = tuple((0x1000 * i, 0x1000 * (i % 7 + 1)) for i in range(1, 60))
    gva = np.random.default_rng(5).integers(0, 0x40000, 4000, np.uint64)
    access = np.random.default_rng(6).choice(np.array([0, 2, 4, 6, 16, 20], np.uint8), 4000)
    results = []
    for geometry in (((1, 1), (1, 1), (1, 1)), ((64, 4), (8, 4), (1, 1))):
        vm, vcpu = machine(maps=maps)
        vcpu = vm.create_vcpu(tlb=geometry)
        vcpu.set_regs(**PageTables("4l", base=15 * MB2).regs())
        r = vcpu.access(gva, access)
        results.append((r.gpa.tolist(), r.hpa.tolist(), r.status.tolist(), r.error_code.tolist(), vm.mem.read(15 * MB2, MB2)))
    assert results[0] == results[1]


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_rows_of_an_array_are_single_accesses(n):
    """Hits, faults and exits in any order, implicit accesses among them: the columns, and what the TLB and KVM count."""
    maps = tuple((0x1000 * i, 0x1000 * (i % 7 + 1), "p w u" if i % 3 else "p") for i in range(1, 60))
    rng = np.random.default_rng(n)
    gva = rng.integers(0, 0x40000, n, np.uint64)
    access = rng.choice(np.array([0, 2, 4, 6, 16, 20, 32, 34, 36], np.uint8), n)
    (vm, vcpu), (other_vm, other) = (machine(maps=maps) for _ in range(2))
    out = Accesses(*(np.full(n, 77, column.dtype) for column in (getattr(Accesses.empty(1), name) for name in ACCESSES)))

    vcpu.access(gva, access, out=out)

    for i in range(n):
        one = other.access(gva[i:i + 1], access[i:i + 1])
        assert [getattr(one, name)[0] for name in ACCESSES] == [getattr(out, name)[i] for name in ACCESSES], f"row {i}"
    assert (vcpu.tlb.hits, vcpu.tlb.misses, vm.stats) == (other.tlb.hits, other.tlb.misses, other_vm.stats)


@pytest.mark.parametrize("column", ["status", "ret", "exits"])
def test_columns_that_share_memory_with_the_accesses(column):
    """An access is read before its row is written."""
    _, vcpu = machine(maps=((0x1000, 0x2000), (0x3000, 0x4000, "p")))
    gva = np.resize(np.array([0x1000, 0x3000], np.uint64), 600)
    access = np.resize(np.array([0, 2, 4, 6, 16], np.uint8), 600)
    expected, out = vcpu.access(gva, access), Accesses.empty(600)
    setattr(out, column, access)
    vcpu.access(gva, access, out=out)
    for name in ("gpa", "hpa", "status", "error_code"):
        if name != column:
            np.testing.assert_array_equal(getattr(expected, name), getattr(out, name))
    out.error_code = gva.view(np.uint32)[600:]
    rows, second = gva.copy(), Accesses.empty(600)
    vcpu.access(rows, 4, out=second)
    vcpu.access(gva, 4, out=out)
    np.testing.assert_array_equal(second.gpa, out.gpa)


@pytest.mark.parametrize("column", ["gpa", "hpa"])
@pytest.mark.parametrize("rows_on", [-1, 0, 1])
def test_columns_that_share_memory_with_the_addresses(column, rows_on):
    """An address is read before an earlier row is written where it stands."""
    _, vcpu = machine(maps=((0x1000, 0x3000), (0x3000, 0x4000, "p"), (0x4000, 0x1000)))
    gva = np.resize(np.array([0x1000, 0x3000, 0x4000], np.uint64), 600)
    expected, out, room = vcpu.access(gva), Accesses.empty(600), np.zeros(602, np.uint64)
    room[1:601] = gva
    setattr(out, column, room[1 + rows_on:601 + rows_on])
    vcpu.access(room[1:601], out=out)
    for name in ("gpa", "hpa", "status"):
        np.testing.assert_array_equal(getattr(expected, name), getattr(out, name))


@pytest.mark.parametrize(("one", "other"), [("gpa", "hpa"), ("status", "ret"), ("ret", "exits")])
def test_columns_that_share_memory_with_each_other(one, other):
    _, vcpu = machine()
    out = Accesses.empty(3)
    setattr(out, other, getattr(out, one))
    with pytest.raises(ValueError, match=f"out.{one} and out.{other} share memory"):
        vcpu.access(np.array([0x1000, 0x2000, 0x3000], np.uint64), out=out)


# ---- tracepoints and refusals --------------------------------------------------------------------------------------------

def test_tracepoints_tell_the_fault_in_order():
    """ftrace text with KVM's names: the request, each change from the root down, the leaf."""
    vm, vcpu = machine(backing="4k")
    vm.trace = Tracepoints()
    touch(vcpu, 0x3000)
    names = [event.name for event in vm.trace]
    assert ["kvm_mmu_spte_requested", *["kvm_tdp_mmu_spte_changed"] * 4, "kvm_mmu_set_spte"] == names
    assert [4, 3, 2, 1] == [event.fields["level"] for event in vm.trace.events("kvm_tdp_mmu_spte_changed")]
    last = vm.trace.events()[-1]
    assert last.fields["gfn"] == 3
    assert f"kvm_mmu_set_spte: gfn 3 spte {leaves(vm)[3][1]:x} (rwx) level 1 at " in str(last)
    assert 6 == len(vm.trace.text().splitlines())
    vm.trace = Tracepoints(capacity=2)
    touch(vcpu, 0x5000, 0x6000)
    assert 2 == len(list(vm.trace))
    assert 4 == vm.trace.lost
    vm.trace = None
    with pytest.raises(ValueError, match="no tracepoint"):
        Tracepoints("kvm_mmu_nothing")


def test_emulation_traces_its_walk():
    vm, vcpu = machine(maps=((0x1000, GB1),))
    vm.trace = Tracepoints("kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "mark_mmio_spte",
                           "handle_mmio_page_fault")
    touch(vcpu, 0x1000)
    assert "kvm_mmu_pagetable_walk: addr 1000 pferr 0 0x0" in vm.trace.text()
    assert 4 == len(vm.trace.events("kvm_mmu_paging_element"))
    assert 1 == len(vm.trace.events("mark_mmio_spte"))


def test_what_a_machine_refuses():
    vcpu = Vcpu(GuestMemory(PAGE))
    vcpu.set_regs(cr0=1)
    assert 0 == vcpu.access(0).gpa
    assert vcpu.vm.stats["pf_fixed"] == 1
    with pytest.raises(ValueError, match="gva"):
        vcpu.access(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="out.error_code"):
        vcpu.access(np.zeros(3, np.uint64), out=kvmmu.Accesses.empty(2))
    with pytest.raises(TypeError, match="GuestMemory"):
        Vm(PAGE)
    with pytest.raises(ValueError, match="no memory slot"):
        vcpu.vm.set_dirty_log(GB1)
    with pytest.raises(ValueError, match="has no dirty log"):
        vcpu.vm.get_dirty_log(0)
    with pytest.raises(ValueError, match="gpa: 0x123 is not a multiple of 0x1000"):
        vcpu.vm.invalidate(0x123, PAGE)


def test_registers_are_those_of_each_vcpu():
    """Two vCPUs with paging in different modes on one machine."""
    vm, a = machine(maps=((0x1000, 0x3000),))
    b = vm.create_vcpu()
    b.set_regs(cr0=1)
    assert (0x3000, 0x1000) == (a.access(0x1000).gpa, b.access(0x1000).gpa)
    assert a.access(0x1000).hpa != b.access(0x1000).hpa


def test_two_threads_take_turns():
    """Two vCPUs of one machine in two threads: each gets its own answers, and the tables stay whole."""
    vm, a = machine(size=64 * MB2, backing="4k")
    b = vm.create_vcpu()
    b.set_regs(cr0=1)
    gva = np.random.default_rng(8).integers(0, 64 * MB2, 20_000, np.uint64)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(vcpu.access, rows, access) for vcpu, access in ((a, Access.WRITE), (b, 0))
                for rows in np.array_split(gva, 8)]
        zaps = [pool.submit(vm.zap_all) for _ in range(5)]
        results = [run.result() for run in runs]
        for zap in zaps:
            zap.result()
    for half in (results[:8], results[8:]):
        np.testing.assert_array_equal(gva, np.concatenate([r.gpa for r in half]))
    assert vm.audit() == []


def test_columns_are_reused():
    _, vcpu = machine()
    out = kvmmu.Accesses.empty(3)
    rows = np.array([0x1000, 0x2000, GB1], np.uint64)
    assert vcpu.access(rows, out=out) is out
    assert rows.tolist() == out.gpa.tolist()
    assert "3 rows" in repr(out)
    assert "gpa=0x1000" in repr(vcpu.access(0x1000))
    with pytest.raises(ValueError, match="out"):
        vcpu.access(0, out=out)
    assert 0 == vcpu.access(np.empty(0, np.uint64)).gpa.size
