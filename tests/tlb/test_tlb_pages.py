# SPDX-License-Identifier: Apache-2.0
"""Invalidations of one address: every TLB entry of the guest's page goes, whatever it was split into, and no other one.

Sources: SDM vol. 3, "Details of TLB Use", "Operations that Invalidate TLBs and Paging-Structure Caches"; vol. 2, "INVLPG",
"INVPCID".
"""

from functools import cache

import numpy as np
import pytest
from builders import PageTables, flag_bits, mode_regs
from driver_nested import EptTables
from internals import damage

from kvmmu import Access, CpuModel, Ept, GuestMemory, Host, Npt, Status, Tlb, Vm

MB, GB, PAGE, PGE = 1 << 20, 1 << 30, 0x1000, 1 << 7
TABLES, STAGE = 0x10000, 13 * MB
SIZES = {"4k": (1, PAGE), "2m": (2, 2 * MB), "4m": (2, 4 * MB), "1g": (3, GB)}
PAGES = [("4l", "4k"), ("4l", "2m"), ("4l", "1g"), ("5l", "2m"), ("pae", "4k"), ("pae", "2m"), ("32", "4k"), ("32", "4m")]
GUESTS = [(tdp, None) for tdp in ("ept", "npt", None)] + [(tdp, level) for tdp in ("ept", "npt") for level in (1, 2)]


def frames(size):
    """Two frames of a page, and addresses in it that have memory in both."""
    if size == GB:
        return (0, GB), [0x200000, 0x201000, 0x400000, 0x5FF000]
    old, new = (0x800000, 0xC00000) if size == 4 * MB else (0x400000, 0x600000)
    return (old, new), sorted({0, PAGE % size, size // 2 & -PAGE, size - PAGE})


@cache
def identity(tdp, level, more=0):
    """Pages of an EPT12 or NPT12 that maps all memory to itself."""
    tables = (EptTables if tdp == "ept" else PageTables)("4l", base=STAGE)
    for start in (0, GB):
        for gpa in range(start, start + 16 * MB, (PAGE, 2 * MB)[level - 1]):
            tables.map(gpa, gpa, level=level)
            tables.set_bits(gpa, level, more)
    return tables.pages()


class Guest:
    """A page of the guest's, and a second one of the same size beside it.

    mode, size : of the guest's tables and page
    tdp, level : the host's two-dimensional paging, and L1's page size if the guest is L2
    """

    def __init__(self, mode, size, tdp, level, backing, flags="p w u a d", dirty_log=False):
        self.page_level, self.size = SIZES[size]
        (self.old, self.new), self.offsets = frames(self.size)
        self.mem = GuestMemory(16 * MB)
        self.mem.add_slot(GB, 16 * MB)
        self.gva = 2 * self.size
        self.tables = PageTables(mode, base=TABLES)
        for gva in (self.gva, self.gva + self.size):
            self.entry = self.tables.map(gva, self.old, flags, self.page_level)
        self.entry = self.tables.entry_gpa(self.gva, self.page_level)
        self.write_tables(self.tables.pages())
        self.vm = Vm(self.mem, CpuModel(conformance="sdm"), Host(tdp=tdp), backing=backing)
        self.vcpu = self.vm.create_vcpu(tlb=((512, 16), (64, 16), (4, 16)))
        regs = mode_regs(mode, TABLES)
        regs["cr4"] |= PGE
        if level is None:
            self.vcpu.set_regs(**regs)
        else:
            self.vcpu.set_regs(cr0=1)
            self.vcpu.enter_nested(self.stage(tdp, level), **regs)
        if dirty_log:
            self.vm.set_dirty_log(0)

    def write_tables(self, pages):
        for gpa, page in zip(*pages, strict=True):
            self.mem.write(int(gpa), page.tobytes())

    def stage(self, tdp, level):
        self.write_tables(identity(tdp, level))
        return Ept(STAGE | 0x5E) if tdp == "ept" else Npt(STAGE, cr4=1 << 5, efer=0xD00)

    def read(self, gva=None):
        gva = self.gva if gva is None else gva
        r = self.vcpu.access(np.array([gva + offset for offset in self.offsets], np.uint64))
        return r.gpa.tolist()

    def at(self, frame):
        return [frame + offset for offset in self.offsets]

    def move(self):
        """The guest gives its page another frame, and flushes nothing yet."""
        size = self.tables.entry_size
        value = int.from_bytes(self.mem.read(self.entry, size), "little") - self.old + self.new
        self.vm.write_guest_physical(self.entry, value.to_bytes(size, "little"))


def flush(guest, how, address):
    if how == "invlpg":
        guest.vcpu.invlpg(address)
    elif how == "invpcid":
        guest.vcpu.invpcid(0, 0, address)
    else:
        r = guest.vcpu.access(np.array([address], np.uint64), int(Access.WRITE))
        assert (r.status[0], r.error_code[0]) == (Status.PAGE_FAULT, 3)


@pytest.mark.parametrize("how", ["invlpg", "invpcid", "fault"])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize(("mode", "size"), PAGES)
@pytest.mark.parametrize(("tdp", "level"), GUESTS)
def test_all_of_the_page_goes(tdp, level, mode, size, backing, is_global, how):
    """Guest's page x host's page x L1's page x global or not x way; any address of the page does, and other pages stay."""
    flags = "p u a d" + (" g" if is_global else "") + (" w" if how != "fault" else "")
    for address in (0, frames(SIZES[size][1])[1][-1] + PAGE - 1):
        guest = Guest(mode, size, tdp, level, backing, flags)
        beside = guest.gva + guest.size
        assert guest.read() == guest.read(beside) == guest.at(guest.old)
        guest.move()
        if tdp is not None:                                 # KVM that shadows the table has dropped and flushed it by now
            assert guest.read() == guest.at(guest.old), "stale until flushed"
        flush(guest, how, guest.gva + address)
        kept = is_global and how == "invpcid" and tdp is not None
        assert guest.read() == guest.at(guest.old if kept else guest.new)
        if tdp is not None:
            hits = guest.vcpu.tlb.hits
            assert guest.read(beside) == guest.at(guest.old)
            assert guest.vcpu.tlb.hits == hits + len(guest.offsets)


@pytest.mark.parametrize(("tdp", "level"), GUESTS)
@pytest.mark.parametrize("how", ["invlpg", "invpcid", "fault"])
def test_pages_that_the_dirty_log_split(tdp, level, how):
    """A page of 2M on both sides, which the host maps by 4K pages while it logs."""
    guest = Guest("4l", "2m", tdp, level, "2m", "p u a d" if how == "fault" else "p w u a d", dirty_log=True)
    assert guest.read() == guest.at(guest.old)
    assert len(guest.vcpu.tlb) == len(guest.offsets)
    guest.move()
    flush(guest, how, guest.gva + 0x123456)
    assert guest.read() == guest.at(guest.new)


@pytest.mark.parametrize("tdp", ["ept", "npt"])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_invpcid_of_more_than_an_address(tdp, kind):
    """A PCID and all but global translations leave those; all translations does not. Pieces go like whole pages."""
    for is_global in (False, True):
        guest = Guest("4l", "2m", tdp, None, "4k", "p w u a d" + (" g" if is_global else ""))
        guest.read()
        guest.move()
        guest.vcpu.invpcid(kind, 0, 0)
        assert guest.read() == guest.at(guest.old if is_global and kind != 2 else guest.new)


def test_a_translation_of_another_size_is_another_page():
    """What a TLB has of the table that stood where the large page is now is dropped address by address."""
    guest = Guest("4l", "2m", "ept", None, "4k")
    table = 0x80000
    for i in (0, 1):
        guest.mem.write_u64(table + 8 * i, 0x200000 + i * PAGE | 0x67)
    entry = guest.mem.read_u64(guest.entry)
    guest.vm.write_guest_physical(guest.entry, (table | 0x67).to_bytes(8, "little"))
    assert [guest.vcpu.access(guest.gva + i * PAGE).gpa for i in (0, 1)] == [0x200000, 0x201000]
    guest.vm.write_guest_physical(guest.entry, entry.to_bytes(8, "little"))
    assert guest.vcpu.access(guest.gva + 2 * PAGE).gpa == guest.old + 2 * PAGE
    guest.vcpu.invlpg(guest.gva)
    assert [guest.vcpu.access(guest.gva + i * PAGE).gpa for i in (0, 1)] == [guest.old, 0x201000]


# ---- what a TLB may let be written ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ad", "dirty", "hit"), [(True, True, True), (True, False, False), (False, False, True)])
def test_a_write_after_a_read_hits_where_no_dirty_bit_is_to_be_set(ad, dirty, hit):
    """Entries of a shadow of an EPT12 without A/D bits have none either: they are written as they are."""
    guest = Guest("4l", "4k", "ept", None, "4k")
    guest.write_tables(identity("ept", 1, 0x200 if dirty else 0))
    guest.vcpu.set_regs(cr0=1, efer=0)
    guest.vcpu.enter_nested(Ept(STAGE | 0x1E | (0x40 if ad else 0)), cr0=1)
    assert guest.vcpu.access(0x5000).gpa == 0x5000
    if not ad:                                              # whatever stands in the place of D: nobody sets it
        pages = guest.vm.sptes()
        sp, index = next((row, i) for row, i in zip(*np.nonzero(pages["sptes"]), strict=True)
                         if pages["role"][row] & 15 == 1 and pages["sptes"][row, i] & 7)
        damage(guest.vm.kvm, "spte", int(pages["sp"][sp]), int(index), int(pages["sptes"][sp, index]) & ~0x200)
        guest.vcpu.tlb.flush()
        assert guest.vcpu.access(0x5000).gpa == 0x5000
    hits, stats = guest.vcpu.tlb.hits, guest.vm.stats["exits"]
    assert guest.vcpu.access(0x5000, Access.WRITE).gpa == 0x5000
    assert (guest.vcpu.tlb.hits == hits + 1, guest.vm.stats["exits"] == stats) == (hit, hit)


def test_a_write_after_a_read_sets_the_guest_s_dirty_bit():
    """The guest's own D is looked at as well: the first write walks."""
    guest = Guest("4l", "4k", "ept", None, "4k", "p w u a")
    guest.read()
    hits = guest.vcpu.tlb.hits
    guest.vcpu.access(guest.gva, Access.WRITE)
    assert guest.vcpu.tlb.hits == hits
    assert guest.mem.read_u64(guest.entry) & flag_bits("d")


# ---- the TLB by itself ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [21, 22, 30])
@pytest.mark.parametrize("level", [1, 2])
def test_pieces_by_themselves(shift, level):
    """Entries with the size of a page go with any address of it; neighbours and other PCIDs stay, also where hashes are equal."""
    if shift == 21 and level == 2:
        return
    rng = np.random.default_rng([shift, level])
    step = PAGE if level == 1 else 2 * MB
    for is_global in (False, True):
        tlb = Tlb(((1024, 8), (256, 8), (4, 4)))
        base = 5 << 40
        inside = sorted({base + int(i) * step for i in rng.integers(0, (1 << shift) // step, 20)})
        outside = [base + (1 << shift), base - step, base + (64 << shift), base + (4096 << shift), base ^ 1 << 47]
        for gva in inside + outside:
            tlb.fill(gva, 0x1000, level, is_global, page_shift=shift)
        tlb.use(0, 7)
        tlb.fill(base, 0x7000, level, page_shift=shift)
        tlb.use(0, 0)
        tlb.invpcid(0, 0, base + 123)
        assert all((tlb.lookup(gva) is not None) == is_global for gva in inside)
        tlb.invlpg(base + (1 << shift) - 1)
        assert not any(tlb.lookup(gva) for gva in inside)
        assert all(tlb.lookup(gva) for gva in outside)
        assert len(tlb) == len(outside) + 1
        tlb.use(0, 7)
        assert tlb.lookup(base) == (0x7000, level)


@pytest.mark.parametrize(("level", "shift"), [(1, 13), (2, 12), (3, 21), (1, 31), (1, 0)])
def test_sizes_that_no_page_has(level, shift):
    with pytest.raises(ValueError, match="page_shift: want"):
        Tlb().fill(0, 0, level, page_shift=shift)
