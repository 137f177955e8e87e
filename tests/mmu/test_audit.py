# SPDX-License-Identifier: Apache-2.0
"""The audit finds damage: one thing of a machine's shadow pages is broken at a time, and the audit names it."""

import numpy as np
import pytest
import scenarios
from builders import PageTables, flag_bits
from internals import damage
from shadow_guests import shadow_pages

from kvmmu import Access, GuestMemory, Host, Vm
from kvmmu.oracles.scenario import ScenarioMachine

PAGE, MB2 = 0x1000, 0x200000
SIZE = 16 * MB2
DATA, TABLE, HUGE, CODE, MMIO = 0x400000, 0x410000, 0x800000, 0xA00000, 0xC00000
HOLE = 0x50000000
P, A = flag_bits("p"), flag_bits("a")


class Broken:
    """A guest under shadow paging with pages of every kind, and the means to break one."""

    def __init__(self):
        self.tables = PageTables("4l", base=SIZE - MB2)
        for i in range(4):
            self.tables.map(DATA + i * PAGE, 0x10000 + i * PAGE)
        self.tables.map(HUGE, 4 * MB2, level=2)
        self.tables.map(CODE, 5 * MB2, level=2)
        self.tables.map(MMIO, HOLE)
        self.leaf_table = self.tables.entry_gpa(DATA, 1) & -PAGE
        self.mmio_table = self.tables.entry_gpa(MMIO, 1) & -PAGE
        self.tables.map(TABLE, self.leaf_table)
        self.tables.map(TABLE + PAGE, self.mmio_table)
        self.mem = GuestMemory(SIZE)
        for gpa, page in zip(*self.tables.pages(), strict=True):
            self.mem.write(int(gpa), page.tobytes())
        self.vm = Vm(self.mem, host=Host(tdp=None, maxphyaddr=46, nx_huge_pages=True))
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_regs(**self.tables.regs())
        self.touch(DATA, DATA + PAGE, HUGE, MMIO)
        self.touch(CODE, access=Access.FETCH)
        assert self.vm.audit(guest_tables=True) == []

    def touch(self, *gvas, access=Access.WRITE):
        self.vcpu.access(np.array(gvas, np.uint64), access)

    def make_unsync(self):
        """The guest writes its own leaf table."""
        self.touch(TABLE)
        assert self.page(gpa=self.leaf_table)["unsync"]
        assert self.vm.audit(guest_tables=True) == []

    def page(self, *, gpa=None, level=None, direct=False, **more):
        found = [page for page in shadow_pages(self.vm) if page["direct"] == direct and not page["special"]
                 and (gpa is None or page["gfn"] == gpa >> 12) and (level is None or page["level"] == level)
                 and all(page[name] == value for name, value in more.items())]
        assert len(found) == 1, found
        return found[0]

    def damage(self, what, page, index=0, value=0):
        damage(self.vm.kvm, what, page["sp"], index, value)
        return self.vm.audit(guest_tables=True)

    def index(self, gva, level=1):
        return gva >> 12 + 9 * (level - 1) & 511


@pytest.fixture
def guest():
    return Broken()


def assert_names(wrong, *texts):
    """One line of the audit has all of these texts."""
    assert any(all(text in line for text in texts) for line in wrong), wrong


def test_a_leaf_that_left_the_reverse_map(guest):
    page = guest.page(gpa=guest.leaf_table)
    assert_names(guest.damage("rmap loses an entry", page, guest.index(DATA)), f"page {page['sp']} ", "not in the reverse map")


def test_a_leaf_that_is_in_the_reverse_map_twice(guest):
    page = guest.page(gpa=guest.leaf_table)
    assert_names(guest.damage("rmap has an entry twice", page, guest.index(DATA)), "more than once in the reverse map")


def test_a_reverse_map_with_an_entry_that_maps_another_frame(guest):
    wrong = guest.damage("rmap has a foreign entry", guest.page(gpa=guest.leaf_table), guest.index(DATA), 0x300)
    assert_names(wrong, "gfn 0x300 level 1", "which maps gfn 0x10")


def test_a_reverse_map_with_an_entry_that_is_gone(guest):
    wrong = guest.damage("spte", guest.page(gpa=guest.leaf_table), guest.index(DATA), 1 << 63)
    assert_names(wrong, "the reverse map holds", "which is no leaf")
    assert_names(wrong, "pages_4k")


def test_a_parent_that_is_not_known(guest):
    page = guest.page(level=3)
    wrong = guest.damage("parent is forgotten", page, guest.index(DATA, 3))
    assert_names(wrong, "1 entries point here, and 0 are called parents")


def test_a_parent_that_points_elsewhere(guest):
    wrong = guest.damage("parent is made up", guest.page(level=2, gpa=guest.tables.entry_gpa(DATA, 2)), 0,
                         guest.page(level=3)["sp"] * 512 + 7)
    assert_names(wrong, "entry 7 of page", "is called a parent, and points elsewhere")


def test_a_page_that_the_hash_lost(guest):
    wrong = guest.damage("hash loses a page", guest.page(gpa=guest.leaf_table))
    assert_names(wrong, "in the list of active pages, and not in the hash")


def test_a_page_in_the_wrong_bucket(guest):
    page = guest.page(gpa=guest.leaf_table)
    wrong = guest.damage("gfn", page, 0, page["gfn"] + 1)
    assert_names(wrong, f"shadow page {page['sp']} ", "is in hash bucket")


def test_two_pages_alike(guest):
    one, other = guest.page(gpa=guest.leaf_table), guest.page(gpa=guest.mmio_table)
    damage(guest.vm.kvm, "gfn", other["sp"], 0, one["gfn"])
    assert_names(guest.damage("role", other, 0, one["role"]), "is the same")


def test_a_page_that_is_valid_and_not_listed(guest):
    assert_names(guest.damage("active list loses a page", guest.page(level=3)), "is not in the list of active pages")


@pytest.mark.parametrize("what", ["invalid", "generation"])
def test_an_obsolete_page_that_is_listed(guest, what):
    assert_names(guest.damage(what, guest.page(gpa=guest.leaf_table)), "is in the list of active pages, and obsolete")


@pytest.mark.parametrize("count", [0, 2])
def test_references_to_a_root(guest, count):
    assert_names(guest.damage("root_count", guest.page(level=4), 0, count), f"is a root {count} times, and 1 vCPUs have it")


@pytest.mark.parametrize("bit", [12, 13, 14, 15, 16, 20, 4])
def test_a_child_of_another_role(guest, bit):
    page = guest.page(level=3)
    assert_names(guest.damage("role", page, 0, page["role"] ^ 1 << bit), "points to page")


def test_a_child_with_more_rights_than_its_parent(guest):
    page = guest.page(level=3)
    assert_names(guest.damage("role", page, 0, page["role"] & ~(2 << 8)), "with rights beyond its own")


def test_an_unsync_page_that_nobody_above_knows(guest):
    wrong = guest.damage("unsync", guest.page(gpa=guest.leaf_table), 0, True)
    assert_names(wrong, "is unsync, or has unsync children, and its parent does not know")
    assert_names(wrong, "mmu_unsync: 0 counted, 1 there")


def test_an_upper_table_that_is_unsync(guest):
    assert_names(guest.damage("unsync", guest.page(level=3), 0, True), "is unsync, and no leaf table")


def test_a_count_of_unsync_children(guest):
    guest.make_unsync()
    wrong = guest.damage("unsync_children", guest.page(level=3), 0, 5)
    assert_names(wrong, "5 unsync children counted, 1 marked")


def test_a_mark_of_an_unsync_child_that_is_missing(guest):
    guest.make_unsync()
    page = guest.page(level=2, gpa=guest.tables.entry_gpa(DATA, 2))
    damage(guest.vm.kvm, "unsync_children", page["sp"], 0, 0)
    wrong = guest.damage("unsync bit", page, guest.index(DATA, 2))
    assert_names(wrong, "its parent does not know")


def test_a_table_in_sync_that_may_be_written(guest):
    """Either the leaf is not protected, or the page is not marked unsync."""
    guest.make_unsync()
    wrong = guest.damage("unsync", guest.page(gpa=guest.leaf_table), 0, False)
    assert_names(wrong, "writable, and the table in the frame is shadowed and in sync")


def test_a_writable_leaf_over_an_upper_table(guest):
    guest.make_unsync()
    upper = guest.tables.entry_gpa(DATA, 2) & -PAGE
    page = guest.page(gpa=guest.leaf_table)
    index = guest.index(TABLE)
    spte = page["entries"][index][0]
    damage(guest.vm.kvm, "rmap loses an entry", page["sp"], index)
    damage(guest.vm.kvm, "translation", page["sp"], index, upper | 15)
    damage(guest.vm.kvm, "rmap has a foreign entry", page["sp"], index, upper >> 12)
    wrong = guest.damage("spte", page, index, spte - guest.leaf_table + upper)
    assert_names(wrong, "writable, and writes are tracked")
    assert_names(wrong, "writable, and the table in the frame is shadowed and in sync")


def test_write_tracking_of_too_many(guest):
    assert_names(guest.damage("write_track", guest.page(level=3), 0, 1), "shadowed upper tables: 2 counted, 1 there")


def test_write_tracking_of_too_few(guest):
    wrong = guest.damage("write_track", guest.page(level=3), 0, 0xFFFF)
    assert_names(wrong, "holds shadowed upper tables, and writes are not tracked")


def test_reasons_against_huge_pages(guest):
    wrong = guest.damage("disallow_lpage", guest.page(gpa=guest.leaf_table))
    assert_names(wrong, "reasons against a page of level 2")
    assert_names(wrong, "reasons against a page of level 3")


@pytest.mark.parametrize(("what", "text"), [("used", "shadow pages in use"), ("indirect_shadow_pages", "indirect_shadow_pages")])
def test_counters(guest, what, text):
    assert_names(guest.damage(what, guest.page(level=3)), text)


def test_the_list_of_the_nx_mitigation(guest):
    page = guest.page(level=1, direct=True)
    assert_names(guest.damage("nx", page), "nx_lpage_splits")
    other = Broken()
    assert_names(other.damage("nx", other.page(gpa=other.leaf_table)), "was not made for it")


def test_a_leaf_of_another_host_page(guest):
    page = guest.page(gpa=guest.leaf_table)
    spte = page["entries"][guest.index(DATA)][0]
    assert_names(guest.damage("spte", page, guest.index(DATA), spte + PAGE), "the frame is backed by")


def test_a_leaf_with_more_rights_than_the_guest_gives(guest):
    page = guest.page(gpa=guest.leaf_table)
    gfn = page["entries"][guest.index(DATA)][1]
    wrong = guest.damage("translation", page, guest.index(DATA), gfn << 12 | 13)
    assert_names(wrong, "rights 15 beyond those of the role or of the guest's tables, 13")


def test_mmio_of_another_frame(guest):
    page = guest.page(gpa=guest.mmio_table)
    spte = page["entries"][guest.index(MMIO)][0]
    assert_names(guest.damage("spte", page, guest.index(MMIO), spte + PAGE), "MMIO entry of gfn 0x50001")


# ---- the TLB -------------------------------------------------------------------------------------------------------------

def test_a_translation_to_another_host_page(guest):
    guest.touch(DATA)
    hpa, level = guest.vcpu.tlb.lookup(DATA)
    guest.vcpu.tlb.fill(DATA, hpa + PAGE, level)
    assert_names(guest.vm.audit(), "TLB of vCPU 0", "gfn 0x10 is backed by")
    guest.vcpu.tlb.flush()
    assert guest.vm.audit() == []


def test_a_translation_that_writes_a_table_in_sync(guest):
    guest.make_unsync()
    wrong = guest.damage("unsync", guest.page(gpa=guest.leaf_table), 0, False)
    assert_names(wrong, "TLB of vCPU 0", "be written, and the table in the frame is shadowed and in sync")


def test_a_translation_that_writes_an_upper_table(guest):
    guest.make_unsync()
    upper = guest.page(level=3)
    damage(guest.vm.kvm, "gfn", upper["sp"], 0, 0x10)
    assert_names(guest.damage("write_track", upper, 0, 1), "TLB of vCPU 0", "lets gfn 0x10 be written, and writes are tracked")


# ---- the guest's tables --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("level", "change", "text"), [
    (1, lambda pte: pte & ~P, "is not present"), (1, lambda pte: pte & ~A, "was not accessed"),
    (1, lambda pte: pte & ~2, "rights 15, and the guest's entry"), (1, lambda pte: pte + PAGE, "has frame 0x11"),
    (1, lambda pte: pte & ~(1 << 6), "rights 15, and the guest's entry"),
    (2, lambda pte: pte + PAGE, "has frame"), (2, lambda pte: pte | 1 << 7, "is a page"),
    (3, lambda pte: pte & ~4, "rights 15, and the guest's entry"), (4, lambda pte: pte & ~P, "is not present")])
def test_what_the_guests_entry_says(guest, level, change, text):
    """A page in sync says it too; only a write behind KVM's back makes that untrue."""
    gpa = guest.tables.entry_gpa(DATA, level)
    guest.vm.host_write(gpa, change(guest.mem.read_u64(gpa)).to_bytes(8, "little"))
    assert_names(guest.vm.audit(guest_tables=True), f"at {gpa:#x}", text)
    assert guest.vm.audit() == []


def test_an_entry_that_is_a_table_now(guest):
    gpa = guest.tables.entry_gpa(HUGE, 2)
    guest.vm.host_write(gpa, (guest.mem.read_u64(gpa) & ~(1 << 7)).to_bytes(8, "little"))
    assert_names(guest.vm.audit(guest_tables=True), "is a table")


def test_shadow_pages_agree_with_the_guests_tables():
    """After every operation of the recorded scenarios, until somebody writes a table behind KVM's back."""
    checked = 0
    for name, scenario in scenarios.recordings().items():
        machine = ScenarioMachine(scenario, trace=False)
        for i, op in enumerate(scenario["ops"]):
            machine.apply(op)
            if op["op"] in ("dontneed", "host_write") or (op["op"] == "store4" and int(op["va"], 0) % 8 > 4):
                break
            assert machine.vm.audit(guest_tables=True) == [], f"{name}: operation {i} {op}"
            checked += 1
    assert checked > 1000
