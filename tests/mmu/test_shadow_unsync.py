# SPDX-License-Identifier: Apache-2.0
"""Writes to tables that a shadow MMU shadows: unsync pages, what brings them up to date, write tracking, flooding, repetition."""

import pytest
from shadow_guests import (
    ALIAS,
    DATA,
    GVA,
    INVALID,
    LEAF,
    MAP,
    MMU_PRESENT,
    OTHER,
    PAGE,
    A,
    D,
    P,
    ShadowGuest,
    U,
    W,
    group,
    rights,
)

import kvmmu
from kvmmu import Access, RetPf, Status

OK, PF = int(Status.OK), int(Status.PAGE_FAULT)
WRITE, USER = Access.WRITE, Access.USER
ENTRY = P | W | U | A | D
MODES = ("32", "pae", "4l", "5l")
each_mode = pytest.mark.parametrize("mode", MODES)
PCIDE, NOFLUSH = 1 << 17, 1 << 63


def unsync_guest(mode="4l", to=OTHER | ENTRY, maps=(MAP,), **options):
    """A guest that has written an entry of a table that is shadowed, and has not flushed it."""
    guest = ShadowGuest(*maps, mode=mode, **options)
    assert (OK, DATA, 0) == guest.outcome(GVA, USER)
    assert RetPf.FIXED == guest.write_pte(GVA, to).ret
    return guest


# ---- unsync ------------------------------------------------------------------------------------------------------------

@each_mode
def test_a_written_leaf_table_goes_unsync(mode):
    """It may be written from now on; what the guest has not flushed is stale, and INVLPG re-derives that entry."""
    guest = unsync_guest(mode)
    assert guest.vm.stats["mmu_unsync"] >= 1
    assert "rw-" == rights(guest.spte(guest.gva_of(guest.pte(GVA)))[1])[:3]
    assert 0 == guest.write_pte(GVA, OTHER | ENTRY).exits
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vcpu.invlpg(GVA)
    assert (OK, OTHER, 0) == guest.outcome(GVA)
    assert guest.vm.stats["mmu_unsync"] >= 1, "the page stays unsync"


@each_mode
@pytest.mark.parametrize(("entry", "expected"), [
    (0, (PF, INVALID, U | W)), (DATA | W | U | A | D, (PF, INVALID, U | W)),
    (DATA | P | U | A | D, (PF, INVALID, P | U | W)), (DATA | P | W | A | D, (PF, INVALID, P | U | W)),
    (DATA | P | W | U, (OK, DATA, 0)), (OTHER | P | W | U | A, (OK, OTHER, 0))],
    ids=["gone", "not present", "read-only", "supervisor", "A and D cleared", "moved and clean"])
def test_what_synchronization_makes_of_an_entry(mode, entry, expected):
    """As the guest's entry is now; without A there is no SPTE, without D none that may be written."""
    guest = unsync_guest(mode, to=entry)
    guest.vcpu.invlpg(GVA)
    assert expected == guest.outcome(GVA, USER | WRITE)
    if expected[0] == OK:
        assert A | D == guest.read_pte(GVA) & (A | D)


@each_mode
def test_an_entry_whose_a_bit_the_guest_clears_is_used_again_by_a_fault(mode):
    """Which sets it: the guest wants to know."""
    guest = unsync_guest(mode, to=DATA | P | W | U | D)
    assert 0 == int(guest.touch(GVA).exits[0])
    guest.vcpu.invlpg(GVA)
    assert not guest.spte(GVA)[1] & MMU_PRESENT
    assert 1 == int(guest.touch(GVA).exits[0])
    assert guest.read_pte(GVA) & A


def test_an_upper_table_never_goes_unsync():
    """A write to it is carried out by KVM, whose write takes the entry away at once."""
    guest = ShadowGuest((1 << 40 | GVA, DATA, LEAF))
    gva = 1 << 40 | GVA
    guest.touch(gva)
    assert RetPf.EMULATE == guest.write_pte(gva, guest.read_pte(gva, 2) & ~W, 2).ret
    assert (0, 1) == (guest.vm.stats["mmu_unsync"], guest.vm.stats["mmu_pte_write"])
    assert (PF, INVALID, P | W) == guest.outcome(gva, WRITE)
    assert (OK, DATA, 0) == guest.outcome(gva)


def test_every_shadow_of_the_table_goes_unsync_and_is_synchronized_by_itself():
    """One table below two entries of different rights: two pages."""
    guest = ShadowGuest(MAP)
    second = GVA + (8 << 21)
    guest.tables.write(guest.tables.entry_gpa(GVA, 2) + 8 * 8, guest.tables.entry(GVA, 2) & ~W | A)
    guest.load(guest.tables)
    guest.touch(GVA, second)
    table = guest.pte(GVA) >> 12
    assert [15, 13] == [sp.role.access for sp in guest.sps(table)]
    guest.write_pte(GVA, OTHER | ENTRY)
    assert [True, True] == [sp.unsync for sp in guest.sps(table)]
    guest.vcpu.invlpg(GVA)
    assert [OTHER, DATA] == guest.touch(GVA, second).gpa.tolist()
    guest.vcpu.invlpg(second)
    assert [OTHER, OTHER] == guest.touch(GVA, second).gpa.tolist()
    assert (PF, INVALID, P | W) == guest.outcome(second, WRITE)


def test_an_unsync_table_that_becomes_an_upper_one_is_zapped_and_stays_in_sync_then():
    """A page with two meanings: found as a level-2 table, its unsync level-1 page goes; later writes are carried out by KVM."""
    guest = unsync_guest()
    table = guest.pte(GVA) & ~0xFFF
    guest.vm.mem.write_u64(OTHER, DATA | ENTRY)             # as a page table, it maps one page
    entry = guest.pte(GVA, 3) + 8 * 9
    guest.vm.host_write(entry, (table | ENTRY).to_bytes(8, "little"))
    through = (GVA >> 30) + 9 << 30 | 1 << 21
    zapped = guest.during("kvm_mmu_prepare_zap_page", lambda: guest.touch(through))
    assert [table >> 12] == [event.fields["gfn"] for event in zapped]
    assert ({2}, 0) == ({sp.role.level for sp in guest.sps(table >> 12)}, guest.vm.stats["mmu_unsync"])
    assert (OK, OTHER, 0) == guest.outcome(GVA)
    assert {1, 2} == {sp.role.level for sp in guest.sps(table >> 12)}
    assert RetPf.EMULATE == guest.write_pte(GVA, DATA | ENTRY).ret
    assert (OK, DATA, 0) == guest.outcome(GVA), "and no flush was needed"


def test_prefetch_makes_nothing_unsync():
    """A writable neighbour that is a table: it is not mapped writable, and the write that comes decides."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    guest.touch(ALIAS + 7 * PAGE)                           # no table, but its neighbours are
    assert 0 == guest.vm.stats["mmu_unsync"]
    assert (MMU_PRESENT, 0) == (guest.spte(guest.gva_of(guest.pte(GVA)))[1] & MMU_PRESENT, guest.spte(ALIAS)[1] & W)
    assert (RetPf.FIXED, 1) == (guest.write_pte(GVA, OTHER | ENTRY).ret, guest.vm.stats["mmu_unsync"])


# ---- what brings it up to date -----------------------------------------------------------------------------------------

FLUSHES = {
    "invlpg": lambda vcpu: vcpu.invlpg(GVA + 5), "invalidate_addr": lambda vcpu: vcpu.invalidate_addr(vcpu.gva_walk, GVA),
    "mov cr3": lambda vcpu: vcpu.mov_cr(3, vcpu.regs.cr3), "mov cr4": lambda vcpu: vcpu.mov_cr(4, vcpu.regs.cr4 ^ 1 << 7),
    "invpcid of an address": lambda vcpu: vcpu.invpcid(0, 0, GVA), "invpcid of a pcid": lambda vcpu: vcpu.invpcid(1, 0),
    "invpcid of all": lambda vcpu: vcpu.invpcid(2), "invpcid of all but global": lambda vcpu: vcpu.invpcid(3),
    "set_regs": lambda vcpu: vcpu.set_regs(cr3=vcpu.regs.cr3 ^ 8), "cr0.wp": lambda vcpu: vcpu.mov_cr(0, vcpu.regs.cr0 ^ 1 << 16)}


@pytest.mark.parametrize("flush", FLUSHES.values(), ids=FLUSHES)
@each_mode
def test_flushes_of_the_guest_bring_it_up_to_date(mode, flush):
    guest = unsync_guest(mode)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    flush(guest.vcpu)
    assert (OK, OTHER, 0) == guest.outcome(GVA)


NO_FLUSHES = {
    "invlpg of another page": lambda vcpu: vcpu.invlpg(GVA + PAGE),
    "invlpg of no address": lambda vcpu: vcpu.invlpg(GVA | 1 << 60),
    "set_regs of the same registers": lambda vcpu: vcpu.set_regs(cr3=vcpu.regs.cr3),
    "invalidate_addr of ngpa_walk": lambda vcpu: vcpu.invalidate_addr(vcpu.ngpa_walk, GVA),
    "efer.sce": lambda vcpu: vcpu.wrmsr_efer(vcpu.regs.efer | 1), "cr4.osfxsr": lambda vcpu: vcpu.mov_cr(4, 1 << 9 | 1 << 5)}


@pytest.mark.parametrize("call", NO_FLUSHES.values(), ids=NO_FLUSHES)
def test_what_is_no_flush_leaves_it_stale(call):
    guest = unsync_guest()
    call(guest.vcpu)
    assert (OK, DATA, 0) == guest.outcome(GVA)


def test_a_visit_to_smm_brings_it_up_to_date_even_without_an_access():
    guest = unsync_guest()
    guest.vcpu.smm = True
    guest.vcpu.smm = False
    assert (OK, OTHER, 0) == guest.outcome(GVA)


def test_a_load_of_cr3_without_flush_keeps_what_is_stale():
    """CR3 bit 63 under CR4.PCIDE: neither the TLB nor unsync pages; without the bit, both."""
    guest = ShadowGuest(MAP, regs={"cr4": 1 << 5 | PCIDE})
    guest.touch(GVA)
    guest.write_pte(GVA, OTHER | ENTRY)
    cr3 = guest.vcpu.regs.cr3
    guest.vcpu.mov_cr(3, cr3 | NOFLUSH)
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vcpu.mov_cr(3, cr3)
    assert (OK, OTHER, 0) == guest.outcome(GVA)


def test_a_load_of_cr3_synchronizes_at_the_next_entry_and_protects_the_table_again():
    """Not at once: what is put off shows in the counters when the guest runs."""
    guest = unsync_guest()
    assert 1 == guest.vm.stats["mmu_unsync"]
    guest.vcpu.mov_cr(3, guest.vcpu.regs.cr3)
    assert 1 == guest.vm.stats["mmu_unsync"]
    events = guest.during("kvm_mmu_sync_page", guest.vcpu.vm_enter)
    assert [guest.pte(GVA) >> 12] == [event.fields["gfn"] for event in events]
    assert 0 == guest.vm.stats["mmu_unsync"]
    assert not guest.spte(guest.gva_of(guest.pte(GVA)))[1] & W


def test_a_new_root_that_leads_to_an_unsync_table_brings_it_up_to_date():
    """When it is linked: the load of CR3 could not know of it."""
    guest = unsync_guest()
    root = 0x200000
    guest.vm.mem.write(root, guest.vm.mem.read(guest.tables.cr3, PAGE))
    guest.vcpu.mov_cr(3, root)
    guest.vcpu.vm_enter()
    assert 1 == guest.vm.stats["mmu_unsync"]
    assert (OK, OTHER, 0) == guest.outcome(GVA)
    assert 0 == guest.vm.stats["mmu_unsync"]


def test_a_silent_write_to_a_table_in_sync_stays_unseen():
    """No INVLPG and no CR3 load looks at it: KVM was not told, and the page is not unsync. A new page is."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA)
    guest.host_write_pte(GVA, OTHER | ENTRY)
    for flush in FLUSHES:
        if flush != "cr0.wp":
            FLUSHES[flush](guest.vcpu)
            assert (OK, DATA, 0) == guest.outcome(GVA), flush
    FLUSHES["cr0.wp"](guest.vcpu)
    assert (OK, OTHER, 0) == guest.outcome(GVA)


def test_invpcid_of_an_address_is_of_one_pcid():
    """The present root, if that is the PCID in force; of the roots before it those with this PCID."""
    guest = ShadowGuest(MAP, regs={"cr4": 1 << 5 | PCIDE})
    root = guest.tables.cr3
    other_root = 0x200000
    guest.vm.mem.write(other_root, guest.vm.mem.read(root, PAGE))
    guest.touch(GVA)
    guest.vcpu.mov_cr(3, other_root | 1)
    guest.touch(GVA)
    assert [root] == [pgd for pgd, _ in guest.vcpu.mmu.prev_roots]
    guest.write_pte(GVA, OTHER | ENTRY)
    guest.vcpu.invpcid(0, 2, GVA)                           # of a PCID that has no root
    assert (OK, DATA, 0) == guest.outcome(GVA)
    guest.vcpu.invpcid(0, 0, GVA)                           # of the other root; tables are shared, the TLB is not
    guest.vcpu.mov_cr(3, root | NOFLUSH)
    assert (OK, OTHER, 0) == guest.outcome(GVA)


def test_invpcid_of_a_pcid_frees_the_roots_of_it():
    guest = ShadowGuest(MAP, regs={"cr4": 1 << 5 | PCIDE})
    root = guest.tables.cr3
    for pcid in (0, 1, 2):
        guest.vm.mem.write(0x200000 + pcid * PAGE, guest.vm.mem.read(root, PAGE))
        guest.vcpu.mov_cr(3, 0x200000 + pcid * PAGE | pcid)
        guest.touch(GVA)
    assert [1, 0] == [pgd & 0xFFF for pgd, _ in guest.vcpu.mmu.prev_roots][:2]
    guest.vcpu.invpcid(1, 1)
    assert 1 not in [pgd & 0xFFF for pgd, _ in guest.vcpu.mmu.prev_roots]
    assert (OK, DATA, 0) == guest.outcome(GVA)


def test_a_fault_that_kvm_finds_itself_drops_the_stale_entry():
    """An emulated write is refused by tables that took W away and were not flushed: native writes are, from then on."""
    guest = ShadowGuest(MAP)
    guest.touch(GVA, access=WRITE)
    guest.write_pte(GVA, DATA | P | U | A | D)
    assert (OK, DATA, 0) == guest.outcome(GVA, WRITE)
    with pytest.raises(kvmmu.PageFault):
        guest.vcpu.write_guest(GVA, b"x")
    assert (PF, INVALID, P | W) == guest.outcome(GVA, WRITE)
    assert 2 == guest.vm.stats["pf_guest"]


# ---- emulated writes ---------------------------------------------------------------------------------------------------

@each_mode
def test_an_emulated_write_drops_the_sptes_of_the_entry(mode):
    """And no other; the page stays in sync and protected."""
    guest = ShadowGuest(*group(), mode=mode)
    guest.touch(GVA)
    assert 8 == guest.vm.stats["pages_4k"]
    changed = guest.changes(lambda: guest.emulated_write_pte(GVA, OTHER | ENTRY))
    assert (-1, 1) == (changed["pages_4k"], changed["mmu_pte_write"])
    assert "mmu_unsync" not in changed
    assert (OK, OTHER, 0) == guest.outcome(GVA)


@pytest.mark.parametrize(("mode", "offset", "size", "zapped"), [
    ("4l", 0, 1, False), ("4l", 1, 1, True), ("4l", 0, 2, True), ("4l", 4, 2, True), ("4l", 0, 4, False), ("4l", 4, 4, False),
    ("4l", 0, 8, False), ("4l", 4, 8, True), ("4l", 0, 16, True), ("4l", 6, 4, False), ("pae", 0, 4, False), ("pae", 2, 2, True),
    ("32", 0, 1, False), ("32", 3, 1, True), ("32", 0, 2, True), ("32", 0, 4, False), ("32", 2, 4, True), ("32", 0, 8, True)])
def test_misaligned_writes_zap_the_page(mode, offset, size, zapped):
    """A write that is not one to one entry, but for one byte at its start; in long mode and PAE 4 bytes count as the entry."""
    guest = ShadowGuest(MAP, mode=mode)
    guest.touch(GVA)
    at = guest.pte(GVA) + offset
    data = guest.vm.mem.read(at, size)
    changed = guest.changes(lambda: guest.vcpu.write_guest(guest.gva_of(at), data))
    assert zapped == bool(changed.get("mmu_flooded"))
    assert zapped == (guest.sps(guest.pte(GVA) >> 12, level=1) == [])
    assert (OK, DATA, 0) == guest.outcome(GVA)


@each_mode
def test_three_writes_flood_an_upper_table(mode):
    """A guest that fills a table will not use it soon: its page goes, a root as soon as it is left. Leaf tables never flood."""
    guest = ShadowGuest(MAP, mode=mode)
    guest.touch(GVA)
    table, spare = guest.pte(GVA, 2) >> 12, guest.gva_of(guest.pte(GVA, 2) + 100 * guest.tables.entry_size)
    counts = []
    for _ in range(3):
        guest.vcpu.write_guest(spare, guest.entry(0))
        counts.append(guest.vm.stats["mmu_flooded"])
    assert [0, 0, 4 if mode == "32" else 1] == counts
    assert [sp for sp in guest.sps(table) if not sp.role.invalid] == []
    assert (OK, DATA, 0) == guest.outcome(GVA)
    assert [sp for sp in guest.sps(table) if sp.role.invalid] == []
    for _ in range(10):
        guest.emulated_write_pte(GVA, DATA | ENTRY)
    assert counts[-1] == guest.vm.stats["mmu_flooded"]


def test_a_fault_through_the_table_starts_the_count_anew():
    """A guest that uses what it fills is not flooding."""
    far = GVA + (4 << 21)
    guest = ShadowGuest(MAP, (far, OTHER, LEAF), *((far + i * PAGE, OTHER, "p w u") for i in range(1, 6)))
    guest.touch(GVA, far)
    spare = guest.pte(GVA, 2) + 8 * 100
    for i in range(1, 6):
        guest.vm.write_guest_physical(spare, guest.entry(0))
        guest.vm.write_guest_physical(spare, guest.entry(0))
        guest.touch(far + i * PAGE)                         # a fault, for A is clear
    assert 0 == guest.vm.stats["mmu_flooded"]


def test_without_shadowed_tables_no_write_is_looked_at():
    guest = ShadowGuest(MAP)
    guest.vm.write_guest_physical(guest.pte(GVA), guest.entry(DATA | ENTRY))
    assert 0 == guest.vm.stats["mmu_pte_write"]
    guest.touch(GVA)
    guest.vm.write_guest_physical(0x600000, b"12345678")
    assert 1 == guest.vm.stats["mmu_pte_write"], "of any page, once there are"


def test_pde_zapped_counts_values_that_are_not_zero():
    gva = 1 << 40 | GVA
    guest = ShadowGuest((gva, DATA, LEAF))
    guest.touch(gva)
    spare = guest.pte(gva, 2) + 8 * 100
    assert "mmu_pde_zapped" not in guest.changes(lambda: guest.vm.write_guest_physical(spare, bytes(8)))
    assert 1 == guest.changes(lambda: guest.vm.write_guest_physical(spare, b"\2" + bytes(7)))["mmu_pde_zapped"]


# ---- writes through a shadowed table to itself -------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["pae", "4l", "5l"])
def test_a_table_that_maps_itself_is_written_by_kvm(mode):
    """The write goes through the entry that it changes: carried out, and the old translation is gone."""
    guest = ShadowGuest(MAP, mode=mode)
    table = guest.pte(GVA) & ~0xFFF
    me = GVA + 16 * PAGE
    guest.tables.map(me, table, LEAF)
    guest.load(guest.tables)
    assert (OK, table, 0) == guest.outcome(me)
    entry = guest.pte(me) - table
    result = guest.vcpu.store(me + entry, guest.entry(DATA | ENTRY))
    assert result.hpa != INVALID
    assert DATA | ENTRY == guest.read_pte(me)
    guest.vcpu.invlpg(me)
    assert (OK, DATA, 0) == guest.outcome(me)


# ---- instructions that KVM does not expect to write tables -------------------------------------------------------------

def protected_guest():
    """A guest with a shadowed page directory, and the linear address of an unused entry of it."""
    gva = 1 << 40 | GVA
    guest = ShadowGuest((gva, DATA, LEAF))
    guest.touch(gva)
    at = guest.gva_of(guest.pte(gva, 2) + 8 * 100)
    guest.touch(at)
    return guest, gva, at


def test_other_instructions_are_repeated_without_the_shadow_pages():
    """ADD and its like: the frame's shadow pages go, the processor repeats, nothing is emulated for the table's sake."""
    guest, gva, at = protected_guest()
    guest.vcpu.rip = 0x1000
    changed = guest.changes(lambda: guest.vcpu.store(at, bytes(8), page_table_writing=False))
    assert (2, 1, 1, 1) == tuple(changed[name] for name in ("pf_taken", "pf_emulate", "pf_fixed", "mmu_shadow_zapped"))
    assert "mmu_pte_write" not in changed
    assert [] == guest.sps(guest.pte(gva, 2) >> 12)
    guest, gva, at = protected_guest()
    changed = guest.changes(lambda: guest.vcpu.store(at, bytes(8)))
    assert (1, 1, 1) == tuple(changed[name] for name in ("pf_taken", "pf_emulate", "mmu_pte_write"))
    assert guest.sps(guest.pte(gva, 2) >> 12) != []


def test_the_same_instruction_at_the_same_address_is_not_repeated_twice():
    """The second time it is carried out, for else it could go on for ever; another instruction may be repeated again."""
    guest, gva, at = protected_guest()

    def write(rip):
        guest.touch(gva)                                    # the table is shadowed again
        guest.touch(at)
        guest.vcpu.rip = rip
        changed = guest.changes(lambda: guest.vcpu.store(at, bytes(8), page_table_writing=False))
        return "repeated" if changed.get("mmu_shadow_zapped") else "emulated" if changed.get("mmu_pte_write") else changed

    assert ["repeated", "emulated", "emulated"] == [write(0x1000) for _ in range(3)]
    assert ["repeated", "repeated", "repeated"] == [write(rip) for rip in (0x2000, 0x1000, 0x3000)]


def test_an_instruction_that_writes_the_table_it_goes_through_is_repeated_once():
    """The repetition walks through the same table, and so shadows it again: then the write is carried out."""
    guest = ShadowGuest(MAP)
    me = GVA + 16 * PAGE
    guest.tables.map(me, guest.pte(GVA, 2) & ~0xFFF, LEAF)
    guest.load(guest.tables)
    guest.touch(me)
    changed = guest.changes(lambda: guest.vcpu.store(me + 8 * 100, guest.entry(0x123), page_table_writing=False))
    assert (2, 2, 1, 1) == tuple(changed[name] for name in ("pf_taken", "pf_emulate", "mmu_shadow_zapped", "mmu_pte_write"))
    assert 0x123 == guest.vm.mem.read_u64((guest.pte(GVA, 2) & ~0xFFF) + 8 * 100)


def test_an_instruction_of_l2_is_not_repeated():
    """What KVM would have to know to do so is L1's."""
    guest, gva, at = protected_guest()
    guest.vcpu.enter_nested(None)
    guest.touch(gva, at)
    changed = guest.changes(lambda: guest.vcpu.store(at, bytes(8), page_table_writing=False))
    assert changed["mmu_pte_write"] == 1
    assert "mmu_shadow_zapped" not in changed


def test_a_store_that_crosses_pages_is_all_or_nothing():
    """The second page cannot be written: the first is not either; both are checked as one instruction would."""
    guest = ShadowGuest(MAP, (GVA + PAGE, OTHER, "p u a d"))
    with pytest.raises(kvmmu.PageFault) as caught:
        guest.vcpu.store(GVA + PAGE - 4, b"12345678")
    assert GVA + PAGE == caught.value.address
    assert bytes(4) == guest.vm.mem.read(DATA + PAGE - 4, 4)
    guest.vcpu.store(GVA + PAGE - 4, b"1234")
    assert b"1234" == guest.vm.mem.read(DATA + PAGE - 4, 4)


def test_the_alias_of_a_table_is_write_protected_while_it_is_in_sync():
    """A page that is writable already loses W when it becomes a table, by its reverse map."""
    guest = ShadowGuest(MAP)
    at = guest.gva_of(guest.pte(GVA))
    guest.touch(at, access=WRITE)
    assert guest.spte(at)[1] & W
    guest.touch(GVA)
    assert not guest.spte(at)[1] & W
