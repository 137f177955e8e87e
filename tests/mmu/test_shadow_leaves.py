# SPDX-License-Identifier: Apache-2.0
"""Leaf entries of the shadow MMU: what is mapped before the guest asks for it, and what of memory that is not plain."""

import pytest
from shadow_guests import (
    DATA,
    GB1,
    GVA,
    HOST_WRITABLE,
    INVALID,
    LEAF,
    MAP,
    MB2,
    MMU_PRESENT,
    MMU_WRITABLE,
    OTHER,
    PAGE,
    TABLES,
    A,
    D,
    P,
    ShadowGuest,
    U,
    W,
    group,
    rights,
)

from kvmmu import Access, Host, RetPf, Status

OK = int(Status.OK)
READ, WRITE, FETCH, USER = Access.READ, Access.WRITE, Access.FETCH, Access.USER
LEVELS = {"32": 2, "pae": 3, "4l": 4, "5l": 5}
each_mode = pytest.mark.parametrize("mode", LEVELS)


# ---- prefetch --------------------------------------------------------------------------------------------------------------

@each_mode
def test_prefetch_maps_the_aligned_group(mode):
    """Seven neighbours, old and with rights of their own; eight entries are aligned to eight."""
    guest = ShadowGuest(*group(16), mode=mode)
    guest.touch(GVA + 2 * PAGE)
    sp, = (sp for sp in guest.sps(guest.pte(GVA) >> 12, level=1) if any(spte & MMU_PRESENT for spte in sp.sptes))
    assert list(range(8)) == [i for i, spte in enumerate(sp.sptes) if spte & MMU_PRESENT]
    assert [A * (i == 3) for i in range(8)] == [spte & A for spte in sp.sptes[:8]]
    assert 8 == guest.vm.stats["pages_4k"]
    r = guest.touch(*(gva for gva, *_ in group()))
    assert [gpa for _, gpa, _ in group()] == r.gpa.tolist()
    assert 0 == int(r.exits.sum())


def test_prefetch_in_the_second_half_of_a_32_bit_table():
    """The group's entries are 4 bytes each, from the middle of the table on."""
    guest = ShadowGuest(*group(8, first=GB1 + MB2), mode="32")
    guest.touch(GB1 + MB2 + 3 * PAGE)
    r = guest.touch(*(GB1 + MB2 + i * PAGE for i in range(8)))
    assert [DATA + 2 * i * PAGE for i in range(8)] == r.gpa.tolist()
    assert 0 == int(r.exits.sum())


@pytest.mark.parametrize(("odd_one", "mapped"), [
    ({"flags": "p w u"}, 2), ({"flags": "w u a d"}, 2), ({"gpa": GB1}, 2), ({"raw": 1 << 47}, 2), ({"flags": "p a"}, 8),
    ({"flags": "p w u a"}, 8), ({"flags": "p w u a d nx"}, 8)],
    ids=["never accessed", "not present", "in a hole", "reserved", "supervisor", "clean", "nx"])
def test_prefetch_stops_at_what_it_cannot_map(odd_one, mapped):
    """The second entry of the group is odd: if it cannot be mapped, nothing behind it is, but for the one that faulted."""
    guest = ShadowGuest()
    for i, (gva, gpa, flags) in enumerate(group()):
        guest.tables.map(gva, **{"gpa": gpa, "flags": flags} | (odd_one if i == 1 else {}))
    guest.load(guest.tables)
    guest.touch(GVA + 3 * PAGE)
    assert mapped == guest.vm.stats["pages_4k"]


def test_prefetch_does_not_dirty_a_logged_slot():
    """A writable neighbour would count as written: none is mapped; a read-only one may be."""
    guest = ShadowGuest(*group(4), *((gva, gpa, "p u a d") for gva, gpa, _ in group(8)[4:]))
    guest.vm.set_dirty_log(0)
    guest.touch(GVA + 5 * PAGE)
    assert 1 == guest.vm.stats["pages_4k"]                  # the group begins with writable ones
    assert [] == [gfn for gfn in guest.vm.get_dirty_log(0).tolist() if gfn < 0x100]


@pytest.mark.parametrize("how", ["unmap", "protect"])
def test_prefetch_asks_nothing_of_the_host(how):
    """A neighbour that the host would have to map, or to copy for a write, is left for its own fault."""
    guest = ShadowGuest(*group(4))
    guest.vm.invalidate(DATA + 4 * PAGE, PAGE, how)
    guest.touch(GVA)
    assert 2 == guest.vm.stats["pages_4k"]                  # the first of the group, and the one that faulted
    assert (OK, DATA + 4 * PAGE, 0) == guest.outcome(GVA + PAGE)


def test_prefetch_of_nothing_during_an_invalidation():
    """Of other pages: the fault is handled, its neighbours may be on their way out."""
    guest = ShadowGuest(*group())
    with guest.vm.invalidation(0x100000, PAGE):
        assert (OK, DATA + 4 * PAGE, 0) == guest.outcome(GVA + PAGE)
    assert 1 == guest.vm.stats["pages_4k"]


# ---- memory that is not plain ----------------------------------------------------------------------------------------------

@each_mode
def test_a_read_only_slot_is_read_and_executed_and_its_writes_are_mmio(mode):
    guest = ShadowGuest((GVA, GB1, LEAF), mode=mode)
    guest.vm.add_slot(GB1, PAGE, readonly=True)
    assert [OK, OK] == [guest.outcome(GVA, access)[0] for access in (READ, FETCH)]
    assert "r-u" == rights(guest.spte(GVA)[1])[:3]
    assert not guest.spte(GVA)[1] & (HOST_WRITABLE | MMU_WRITABLE)
    r = guest.touch(GVA, access=WRITE)
    assert (RetPf.EMULATE, INVALID, GB1) == (int(r.ret[0]), int(r.hpa[0]), int(r.gpa[0]))
    assert 1 == guest.vm.stats["mmio_exits"]


def test_tables_in_a_read_only_slot_keep_their_a_and_d_clear():
    """The walk succeeds all the same, and the shadow pages of such tables are as good as others."""
    guest = ShadowGuest(MAP, load=False)
    image = guest.vm.mem.read(TABLES, 16 * PAGE)
    high = bytearray(image)
    for at in range(0, len(image), 8):                      # tables that name each other where they will lie
        word = int.from_bytes(image[at:at + 8], "little")
        if TABLES <= (word & 0xFFFFFFFFFF000) < TABLES + 16 * PAGE and not word & D:
            high[at:at + 8] = (word - TABLES + GB1).to_bytes(8, "little")
    guest.vm.add_slot(GB1, high, readonly=True)
    guest.vcpu.set_regs(**guest.tables.regs() | {"cr3": GB1})
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    assert bytes(high) == guest.vm.mem.read(GB1, len(high))
    assert [4, 3, 2, 1] == [sp.role.level for sp in guest.sps() if sp.gfn >= GB1 >> 12]


@pytest.mark.parametrize(("maxphyaddr", "cached"), [(48, True), (52, False)])
def test_mmio_of_shadow_paging(maxphyaddr, cached):
    """A reserved bit marks it where there is one; the vCPU remembers the last one by its linear address."""
    guest = ShadowGuest((GVA, GB1, LEAF), (GVA + PAGE, GB1 + PAGE, LEAF), host=Host(tdp=None, maxphyaddr=maxphyaddr))
    for _ in range(3):
        r = guest.touch(GVA + 8, access=USER)
        assert (GB1 + 8, INVALID, OK, RetPf.EMULATE) == tuple(
            int(getattr(r, name)[0]) for name in ("gpa", "hpa", "status", "ret"))
    assert (int(cached), 1 if cached else 3) == (guest.vm.stats["pf_mmio_spte_created"], guest.vm.stats["pf_taken"])
    guest.vm.add_slot(GB1, PAGE)
    assert INVALID != int(guest.touch(GVA).hpa[0])


def test_mmio_entries_follow_the_guests_tables():
    """One whose page moved is dropped when the entry is synchronized."""
    guest = ShadowGuest((GVA, GB1, LEAF))
    guest.touch(GVA)
    guest.write_pte(GVA, DATA | P | W | U | A | D)
    guest.vcpu.invlpg(GVA)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert INVALID != int(guest.touch(GVA).hpa[0])


def test_synchronization_takes_an_mmio_entry_for_one_of_the_slots_of_now():
    """A slot came in its place meanwhile: accesses go on as MMIO until the entry is dropped, reads by KVM itself as well."""
    guest = ShadowGuest((GVA, GB1, LEAF), (GVA + PAGE, DATA, LEAF))
    guest.touch(GVA, GVA + PAGE)
    guest.write_pte(GVA + PAGE, OTHER | P | W | U | A | D)              # the table is not synchronized now
    guest.vm.add_slot(GB1, PAGE)
    guest.vcpu.mov_cr(3, guest.vcpu.regs.cr3)
    for _ in range(2):
        reached = guest.touch(GVA)
        assert (RetPf.EMULATE, INVALID) == (int(reached.ret[0]), int(reached.hpa[0]))
    guest.write_pte(GVA, DATA | P | W | U | A | D)
    guest.write_pte(GVA, GB1 | P | W | U | A | D)
    guest.vcpu.invlpg(GVA)
    guest.vm.add_slot(2 * GB1, PAGE)
    assert INVALID != int(guest.touch(GVA).hpa[0])


def test_write_protection_of_the_dirty_log_comes_back_by_the_slow_path():
    """Shadow paging has no fast page fault but with paging off."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA, access=WRITE)
    guest.vm.set_dirty_log(0)
    assert "r-ux" == rights(guest.spte(GVA)[1])
    guest.vm.get_dirty_log(0)
    guest.touch(GVA, access=WRITE)
    assert DATA >> 12 in guest.vm.get_dirty_log(0).tolist()
    assert 0 == guest.vm.stats["pf_fast"]
