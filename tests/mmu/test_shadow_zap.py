# SPDX-License-Identifier: Apache-2.0
"""What makes pages of the shadow MMU go: zapping by generation, memslots, the limit on pages, mmu notifiers, the dirty log."""

import pytest
from shadow_guests import DATA, GB1, GVA, INVALID, LEAF, MAP, MB2, OTHER, PAGE, TABLES, A, D, P, ShadowGuest, U, W, group

from kvmmu import Access, RetPf, Status, Tracepoints

OK, PF = int(Status.OK), int(Status.PAGE_FAULT)
WRITE = Access.WRITE
ENTRY = P | W | U | A | D
OFF = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}


# ---- everything goes ---------------------------------------------------------------------------------------------------

def test_zap_all_flips_the_generation_and_leaves_nothing_of_the_one_before():
    """Twice gives the first generation again: nothing that was zapped under it may be found."""
    guest = ShadowGuest(*group())
    for generation in (1, 0, 1, 0):
        guest.touch(GVA)
        pages = {sp.number for sp in guest.sps()}
        guest.host_write_pte(GVA, (OTHER if generation else DATA) | ENTRY)
        events = guest.during("kvm_mmu_zap_all_fast kvm_mmu_get_page", lambda: (guest.vm.zap_all(), guest.touch(GVA)))
        assert ["kvm_mmu_zap_all_fast", *["kvm_mmu_get_page"] * 4] == [event.name for event in events]
        assert [1 - generation, *[generation] * 4] == [event.fields["mmu_valid_gen"] for event in events]
        assert {1} == {event.fields["created"] for event in events[1:]}
        assert (OK, OTHER if generation else DATA, 0) == guest.outcome(GVA)
        assert len(pages) == len(guest.sps()) == 4
    assert 8 == guest.vm.stats["pages_4k"]


@pytest.mark.parametrize("slot_zap_all", [True, False])
def test_deleting_a_slot(slot_zap_all):
    """All pages, or only what maps it and shadows tables in it: the quirk that KVM has, and a VMM may turn off."""
    guest = ShadowGuest(MAP, (GVA + (8 << 21), GB1, LEAF), slot_zap_all=slot_zap_all)
    guest.vm.add_slot(GB1, 2 * PAGE)
    guest.touch(GVA, GVA + (8 << 21))
    before = guest.vm.stats["mmu_cache_miss"]
    guest.vm.delete_slot(GB1)
    assert (OK, GB1, 0) == guest.outcome(GVA + (8 << 21))
    assert INVALID == int(guest.touch(GVA + (8 << 21)).hpa[0])
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert slot_zap_all == (guest.vm.stats["mmu_cache_miss"] > before)


@pytest.mark.parametrize("slot_zap_all", [True, False])
def test_deleting_the_slot_of_the_tables(slot_zap_all):
    """The guest has no tables any more; put back, it goes on."""
    guest = ShadowGuest(MAP, load=False, slot_zap_all=slot_zap_all)
    offset = GB1 - TABLES
    image = bytearray(guest.vm.mem.read(TABLES, 16 * PAGE))
    for at in range(0, len(image), 8):
        word = int.from_bytes(image[at:at + 8], "little")
        if word & P and not word & D:
            image[at:at + 8] = (word + offset).to_bytes(8, "little")
    guest.vm.add_slot(GB1, image)
    guest.vcpu.set_regs(**guest.tables.regs() | {"cr3": GB1})
    assert (OK, DATA, 0) == guest.outcome(GVA)
    data = guest.vm.delete_slot(GB1)
    assert (PF, INVALID, 0) == guest.outcome(GVA)
    guest.vm.add_slot(GB1, data)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vm.move_slot(GB1, 2 * GB1)
    assert (PF, INVALID, 0) == guest.outcome(GVA)


def test_a_slot_in_the_place_of_mmio():
    """MMIO entries are of a generation of slots: with any change they are stale, and 18 bits of it that wrap drop everything."""
    guest = ShadowGuest((GVA, GB1, LEAF))
    guest.touch(GVA)
    assert INVALID == int(guest.touch(GVA + 8).hpa[0])
    guest.vm.add_slot(2 * GB1, PAGE)
    assert INVALID == int(guest.touch(GVA + 8).hpa[0])
    assert 2 == guest.vm.stats["pf_mmio_spte_created"]
    guest.vm.trace = Tracepoints("kvm_mmu_zap_all_fast")
    guest.vm.kvm.advance_generation(1 << 18)
    assert 1 == len(guest.vm.trace.events())
    assert INVALID == int(guest.touch(GVA).hpa[0])
    guest.vm.add_slot(GB1, PAGE)
    assert INVALID != int(guest.touch(GVA).hpa[0])


# ---- the limit ---------------------------------------------------------------------------------------------------------

def many_tables(n=120):
    """A guest with n leaf tables of one page each."""
    return ShadowGuest(*((GVA + (i + 1 << 21), DATA + i % 64 * PAGE, LEAF) for i in range(n))), n


def test_the_limit_takes_the_oldest_pages_and_spares_roots():
    """The guest goes on with all of its pages, if not at the same time."""
    guest, n = many_tables()
    guest.vm.set_nr_mmu_pages(1)                            # 64 are always allowed
    root = None
    for _ in range(2):
        for i in range(n):
            assert (OK, DATA + i % 64 * PAGE, 0) == guest.outcome(GVA + (i + 1 << 21))
            assert len(guest.sps()) <= 64
            root = root or guest.vcpu.mmu.root_hpa
            assert root == guest.vcpu.mmu.root_hpa
    assert guest.vm.stats["mmu_recycled"] > 64
    newest = [sp.gfn for sp in guest.sps(level=1)]
    assert guest.pte(GVA + (n << 21)) >> 12 in newest
    assert guest.pte(GVA + (1 << 21)) >> 12 not in newest


def test_a_lower_limit_takes_pages_at_once():
    guest, n = many_tables()
    guest.touch(*(GVA + (i + 1 << 21) for i in range(n)))
    assert len(guest.sps()) > n
    guest.vm.set_nr_mmu_pages(70)
    assert 70 == len(guest.sps())
    with pytest.raises(ValueError, match="n: want 1 to 0xffffffff, got 0"):
        guest.vm.set_nr_mmu_pages(0)


def test_the_limit_follows_memory_until_a_vmm_sets_it():
    """Two percent of its pages, 64 at least: 8,192 pages are 163, and more memory is more."""
    cases = ((100, 0, None, False), (200, 0, None, True), (200, 4096, None, False), (200, 4096, 70, True))
    for n, slot, asked, recycles in cases:
        guest, _ = many_tables(n)
        if slot:
            guest.vm.add_slot(GB1, slot * PAGE)
        if asked:
            guest.vm.set_nr_mmu_pages(asked)
        guest.touch(*(GVA + (i + 1 << 21) for i in range(n)))
        assert recycles == (guest.vm.stats["mmu_recycled"] > 0), (n, slot, asked)


def test_a_page_that_is_mapped_too_often_is_unmapped_everywhere():
    """More than a thousand SPTEs of one page are too many to go through: all of them go, and come back as they are used."""
    gvas = [GVA + i * PAGE for i in range(1100)]
    guest = ShadowGuest(*((gva, DATA, LEAF) for gva in gvas))
    for _ in range(2):
        assert {DATA} == set(guest.touch(*gvas).gpa.tolist())
        assert guest.vm.stats["pages_4k"] <= 1000
    assert 1001 == guest.vm.stats["max_mmu_rmap_size"]


# ---- the host ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["unmap", "move", "protect"])
@pytest.mark.parametrize("paging", [True, False])
def test_notifier_takes_pages_away(how, paging):
    """Every SPTE of the page goes, wherever it is; the guest finds the page again, where the host has it then."""
    guest = ShadowGuest(MAP, (GVA + PAGE, DATA, LEAF), (DATA, DATA, LEAF))
    if not paging:
        guest.vcpu.set_regs(**OFF)
    addresses = [GVA, GVA + PAGE] if paging else [DATA]
    before = guest.touch(*addresses, access=WRITE).hpa.tolist()
    pages = guest.vm.stats["pages_4k"]
    guest.vm.invalidate(DATA, PAGE, how)
    assert pages - len(addresses) == guest.vm.stats["pages_4k"]
    assert [DATA] * len(addresses) == guest.touch(*addresses).gpa.tolist()
    assert all(not guest.spte(address)[1] & W for address in addresses) == (how != "move")
    after = guest.touch(*addresses, access=WRITE).hpa.tolist()
    assert before != after
    assert 1 == len(set(after))


def test_a_notifier_on_a_guests_table_changes_nothing():
    """KVM reads guest tables by host addresses: what shadows them stands until it is zapped."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    before = guest.sps()
    guest.vm.invalidate(guest.pte(GVA) & ~0xFFF, PAGE, "move")
    assert 0 == int(guest.touch(GVA).exits[0])
    assert [sp.number for sp in before] == [sp.number for sp in guest.sps()]


def test_under_an_invalidation_nothing_gets_through():
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    with guest.vm.invalidation(DATA, PAGE):
        r = guest.touch(GVA)
        assert (RetPf.RETRY, INVALID) == (int(r.ret[0]), int(r.hpa[0]))
        assert RetPf.RETRY == guest.vcpu.mmu.page_fault(GVA, 0)
    assert (OK, DATA, 0) == guest.outcome(GVA)


@pytest.mark.parametrize("paging", [True, False])
def test_aging(paging):
    """Shadow paging has A bits in any case: an old page is young after a walk, without a fault."""
    guest = ShadowGuest(MAP, (DATA, DATA, LEAF))
    gva = GVA
    if not paging:
        guest.vcpu.set_regs(**OFF)
        gva = DATA
    guest.touch(gva)
    assert guest.vm.age(DATA, PAGE)
    assert not guest.vm.test_age(DATA, PAGE)
    assert not guest.vm.age(DATA, PAGE)
    guest.vcpu.invlpg(gva)
    assert 0 == int(guest.touch(gva).exits[0])
    assert guest.vm.test_age(DATA, PAGE)


def test_dirty_log_off_lets_huge_pages_come_back():
    """What was mapped small for the log's sake is dropped; small pages of the guest's stay."""
    guest = ShadowGuest((2 * GB1, 2 * MB2, LEAF, 2), MAP, backing="2m")
    guest.vm.set_dirty_log(0)
    guest.touch(2 * GB1, GVA, access=WRITE)
    assert (1, 1) == (guest.spte(2 * GB1)[0], guest.spte(GVA)[0])
    guest.vm.set_dirty_log(0, False)
    assert 0 == int(guest.touch(GVA).exits[0])
    guest.touch(2 * GB1)
    assert 2 == guest.spte(2 * GB1)[0]
