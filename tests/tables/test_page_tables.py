# SPDX-License-Identifier: Apache-2.0
"""PageTables, PageTables.for_addresses() and Pager: what they map is what the oracle and the walks find."""

import threading

import numpy as np
import oracle
import oracle_nested
import pytest

from kvmmu import Access, CpuModel, Ept, GuestMemory, Host, Npt, Pager, PageTables, Status, Vcpu, Vm
from kvmmu.tables import FreeFrames, PageSet

PAGE = 4096
SIZES = {"32": (PAGE, 4 << 20), "pae": (PAGE, 2 << 20), "4l": (PAGE, 2 << 20, 1 << 30), "5l": (PAGE, 2 << 20, 1 << 30),
         "ept": (PAGE, 2 << 20, 1 << 30), "ept5": (PAGE, 2 << 20, 1 << 30)}
LEGACY = ("32", "pae", "4l", "5l")
BASES = {"32": 0xC0000000, "pae": 0xC0000000, "4l": 0xFFFF800000000000, "5l": 0xFF10000000000000, "ept": 0x7F0000000000,
         "ept5": 0xF000000000000}


def words_of(tables):
    """The table pages in memory, as words for the oracle."""
    words = {}
    for frame in tables.table_frames:
        data = np.frombuffer(tables.mem.read(frame, PAGE), "<u8")
        words |= {frame + 8 * int(i): int(data[i]) for i in np.flatnonzero(data)}
    return words


def reachable(tables):
    """Frames of tables that the root leads to, counted entry by entry."""
    found = set()

    def visit(frame, level):
        found.add(frame)
        if level == 1:
            return
        width = 4 if tables.mode == "32" else 8
        data = np.frombuffer(tables.mem.read(frame, PAGE), f"<u{width}")
        for entry in data[np.flatnonzero(data)].tolist():
            if level > 3 or level == 3 and tables.mode == "pae" or not entry >> 7 & 1:
                visit(entry & 0xFFFFFFFFFF000, level - 1)

    visit(tables.root & ~0xFFF, {"32": 2, "pae": 3, "5l": 5, "ept5": 5}.get(tables.mode, 4))
    return found


class Model:
    """What should be mapped: for each 4K page its address and rights."""

    def __init__(self):
        self.pages = {}

    def map(self, gva, gpa, size, rights):
        for offset in range(0, size, PAGE):
            self.pages[gva + offset] = (gpa + offset, rights)

    def unmap(self, gva, size):
        for offset in range(0, size, PAGE):
            self.pages.pop(gva + offset, None)


def random_operations(tables, rng, steps):
    """Change tables and a model in the same way; returns the model and the addresses worth a look."""
    model, seen = Model(), set()
    sizes = SIZES[tables.mode][:2]                              # 1G pages have a test of their own: the model is by 4K pages
    for _ in range(steps):
        size = int(rng.choice(sizes, p=(0.8, 0.2)))
        count = int(rng.integers(1, 4))
        region = BASES[tables.mode] + int(rng.integers(3)) * (4 << 20)
        places = (4 << 20) // size if size > PAGE else 16
        gvas = [region + int(i) * size for i in rng.choice(places, min(count, places), replace=False)]
        gpas = [int(g) * size for g in rng.integers(0, (1 << 30) // size, len(gvas))]
        rights = {name: bool(rng.integers(2)) for name in ("write", "user", "exec")}
        if tables.mode == "32":
            rights["exec"] = True
        kind = rng.integers(4)
        seen |= {g + int(o) * PAGE for g in gvas for o in (0, size // PAGE - 1)}
        if kind < 2:
            tables.map(np.array(gvas, np.uint64), np.array(gpas, np.uint64), size, **rights)
            for gva, gpa in zip(gvas, gpas, strict=True):
                model.map(gva, gpa, size, rights)
        elif kind == 2:
            tables.unmap(gvas, size)
            for gva in gvas:
                model.unmap(gva, size)
        else:
            whole = [gva for gva in gvas if gva in model.pages]
            if whole and size == PAGE:
                tables.protect(whole, **rights)
                for gva in whole:
                    model.pages[gva] = (model.pages[gva][0], rights)
    return model, sorted(seen)


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("mode", LEGACY)
@pytest.mark.parametrize("seed", range(4))
def test_random_changes_walk_to_the_right_page_with_the_right_rights(mode, conformance, seed):
    """After map, unmap and protect at random, oracle and walk find each page and each right as the model has them."""
    tables = PageTables(GuestMemory(16 << 20), mode)
    model, seen = random_operations(tables, np.random.default_rng(seed), 60)
    assert reachable(tables) == set(tables.table_frames)
    cpu = CpuModel(maxphyaddr=46, conformance=conformance)
    vcpu = Vcpu(tables.mem, cpu=cpu)
    vcpu.set_regs(tables.regs())
    memory = oracle.Memory(words_of(tables))
    judge = oracle.Cpu(maxphyaddr=46, conformance=conformance)
    regs = {name: getattr(vcpu.regs, name) for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")}
    for access in (Access.READ, Access.WRITE | Access.USER, Access.FETCH | Access.USER):
        walked = vcpu.gva_walk.translate(np.array(seen, np.uint64), access, set_ad=False)
        for gva, gpa, status in zip(seen, walked.gpa.tolist(), walked.status.tolist(), strict=True):
            target, rights = model.pages.get(gva, (None, {}))
            allowed = target is not None and (not access & Access.USER or rights["user"]) and (
                not access & Access.WRITE or rights["write"]) and (not access & Access.FETCH or rights["exec"])
            judged = oracle.translate(memory, judge, oracle.Regs(**regs), gva, write=bool(access & 2), user=bool(access & 4),
                                      fetch=bool(access & 16), set_ad=False)
            assert (judged.status == "ok", judged.gpa) == (allowed, target if allowed else None), hex(gva)
            assert (status == Status.OK, gpa) == (allowed, target if allowed else 2**64 - 1), hex(gva)


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("mode", SIZES)
def test_second_stages_of_every_mode(mode, conformance):
    """Tables of every mode as EPT or NPT: guests with paging off reach the page, or exit."""
    tables = PageTables(GuestMemory(16 << 20), mode)
    model, seen = random_operations(tables, np.random.default_rng(7), 60)
    cpu = CpuModel(maxphyaddr=52, conformance=conformance)
    stage = tables.second_stage()
    assert isinstance(stage, Ept if mode.startswith("ept") else Npt)
    vcpu = Vcpu(tables.mem, cpu=cpu, tdp="ept" if mode.startswith("ept") else "npt")
    vcpu.set_regs(cr0=1)
    vcpu.enter_nested(stage, cr0=1)
    low = [gva for gva in seen if gva < 1 << 32]
    walked = vcpu.ngpa_walk.translate(np.array(seen, np.uint64), Access.USER, set_ad=False)
    for gva, gpa in zip(seen, walked.gpa.tolist(), strict=True):
        target, rights = model.pages.get(gva, (None, {}))
        if target is not None and not mode.startswith("ept") and not rights["user"]:
            target = None
        if mode in ("4l", "5l"):                                # a second stage translates the low bits alone
            continue
        assert gpa == (2**64 - 1 if target is None else target), hex(gva)
    judge = oracle.Cpu(maxphyaddr=52, conformance=conformance)
    fields = {name: getattr(stage, name) for name in ("eptp", "ncr3", "cr4", "efer") if hasattr(stage, name)}
    theirs = (oracle_nested.Ept if mode.startswith("ept") else oracle_nested.Npt)(**fields)
    for gva in low:
        judged = oracle_nested.translate_nested(oracle.Memory(words_of(tables)), judge, oracle.Regs(1, 0, 0, 0), theirs, gva)
        walked = vcpu.gva_walk.translate(np.array([gva], np.uint64), set_ad=False)
        assert walked.gpa[0] == (2**64 - 1 if judged.gpa is None else judged.gpa), hex(gva)


@pytest.mark.parametrize("mode", ["4l", "5l", "ept", "ept5"])
def test_1g_pages_are_split_and_replaced(mode):
    """A 1G page split for a 4K page keeps the rest; mapped again, it releases the tables below."""
    tables = PageTables(GuestMemory(16 << 20), mode)
    base = BASES[mode] & ~((1 << 30) - 1)
    tables.map(base, 3 << 30, 1 << 30)
    before = tables.table_frames
    tables.map(base + (5 << 21) + PAGE, 0x7000)
    assert len(tables.table_frames) == len(before) + 2
    vcpu = Vcpu(tables.mem, CpuModel(maxphyaddr=52), tdp="ept")
    walk = vcpu.gva_walk
    if mode.startswith("ept"):
        vcpu.set_regs(cr0=1)
        vcpu.enter_nested(tables.second_stage(), cr0=1)
        walk = vcpu.ngpa_walk
    else:
        vcpu.set_regs(tables.regs())
    gva = np.array([base, base + (5 << 21), base + (5 << 21) + PAGE, base + (1 << 30) - PAGE], np.uint64)
    walked = walk.translate(gva, Access.USER, fields=("gpa", "status", "level"))
    assert [3 << 30, (3 << 30) + (5 << 21), 0x7000, (4 << 30) - PAGE] == walked.gpa.tolist()
    if not mode.startswith("ept"):
        assert [2, 1, 1, 2] == walked.level.tolist()
    tables.map(base, 3 << 30, 1 << 30)
    assert before == tables.table_frames
    tables.unmap(base, 1 << 30)
    assert len(tables.table_frames) == 1


def test_flags_keys_and_arrays_of_rights():
    """Flags of the entry, protection keys and rights row by row."""
    tables = PageTables(GuestMemory(1 << 20))
    gva = np.arange(4, dtype=np.uint64) * PAGE
    tables.map(gva, gva, write=np.array([True, False, True, False]), exec=np.array([True, True, False, False]),
               pkey=np.array([0, 1, 2, 15]), global_=True, accessed=True, dirty=np.array([True, False, False, True]))
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    pte = vcpu.gva_walk.translate(gva, fields=("pte",), set_ad=False).pte.tolist()
    assert [entry & 0x1FF for entry in pte] == [0x167, 0x125, 0x127, 0x165]
    assert [entry >> 59 & 15 for entry in pte] == [0, 1, 2, 15]
    assert [entry >> 63 for entry in pte] == [0, 0, 1, 1]
    tables.protect(gva, pkey=3, global_=False, dirty=True)
    pte = vcpu.gva_walk.translate(gva, fields=("pte",), set_ad=False).pte.tolist()
    assert [entry & 0x1FF for entry in pte] == [0x67, 0x65, 0x67, 0x65]
    assert [entry >> 59 & 15 for entry in pte] == [3] * 4


def test_pse36():
    """4M pages above 4 GiB, which cannot be split."""
    tables = PageTables(GuestMemory(1 << 20), "32")
    tables.map(0x400000, 0xAB_0040_0000, 4 << 20)
    vcpu = Vcpu(tables.mem, CpuModel(maxphyaddr=40))
    vcpu.set_regs(tables.regs())
    assert vcpu.gva_walk.gva_to_gpa(0x400123) == 0xAB_0040_0123
    with pytest.raises(ValueError, match="4M page above 4 GiB"):
        tables.map(0x401000, 0x1000)
    with pytest.raises(ValueError, match=r"gpa: 0x100000000 \(row 0\) is not an address of 32 bits"):
        tables.map(0x800000, 1 << 32)


WRONG = {
    "unaligned gva": (ValueError, "gva: 0x1234", lambda t: t.map(0x1234, 0)),
    "unaligned gpa": (ValueError, "gpa: 0x10 ", lambda t: t.map(0, 0x10)),
    "not canonical": (ValueError, "gva: 0x800000000000", lambda t: t.map(1 << 47, 0)),
    "wide gpa": (ValueError, "gpa: 0x10000000000000", lambda t: t.map(0, 1 << 52)),
    "no such size": (ValueError, "size: 0x400000", lambda t: t.map(0, 0, 4 << 20)),
    "float": (TypeError, "gva: want an integer", lambda t: t.map(1.0, 0)),
    "negative": (ValueError, "gva: want 0 to", lambda t: t.map(-4096, 0)),
    "lengths": (ValueError, "gpa: 3 rows, gva has 2", lambda t: t.map([0, 4096], [0, 0, 0])),
    "flag": (TypeError, "write: want True or False", lambda t: t.map(0, 0, write="yes")),
    "key": (ValueError, "pkey: want 0 to 15, got 16", lambda t: t.map(0, 0, pkey=16)),
    "not mapped": (ValueError, "0x5000: is not mapped; 1 rows are done",
                   lambda t: (t.map(0, 0), t.protect([0, 0x5000], write=False))),
    "smaller pages": (ValueError, "0x0: is mapped by smaller pages",
                      lambda t: (t.map(0, 0), t.protect(0, 2 << 20, write=False))),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_named(name):
    """Each error names the argument, its value and what is allowed."""
    error, text, call = WRONG[name]
    with pytest.raises(error) as caught:
        call(PageTables(GuestMemory(1 << 20)))
    assert text in str(caught.value)


def test_modes_refuse_what_their_entries_cannot_say():
    """XD in 2-level entries, keys outside long mode, global pages in EPT."""
    with pytest.raises(ValueError, match="exec: entries of mode '32'"):
        PageTables(GuestMemory(1 << 20), "32").map(0, 0, exec=False)
    with pytest.raises(ValueError, match="pkey: entries of mode 'pae'"):
        PageTables(GuestMemory(1 << 20), "pae").map(0, 0, pkey=1)
    with pytest.raises(ValueError, match="global_: entries of EPT"):
        PageTables(GuestMemory(1 << 20), "ept").map(0, 0, global_=True)
    with pytest.raises(ValueError, match="mode: want '32'"):
        PageTables(GuestMemory(1 << 20), "6l")
    with pytest.raises(ValueError, match="second stage"):
        PageTables(GuestMemory(1 << 20), "ept").regs()


@pytest.mark.parametrize("frames", [range(0x8000, 0x10000, PAGE), [0x9000, 0xB000, 0x8000, 0xC000],
                                    np.array([0xF000, 0xE000, 0xD000, 0x3000])])
def test_frames_of_a_list_in_its_order(frames):
    """Table frames come from where the caller says, in that order, and run out with an error that tells how far it came."""
    tables = PageTables(GuestMemory(1 << 20), frames=frames)
    assert tables.root == int(frames[0])
    tables.map(0, 0)
    assert tables.table_frames == sorted(int(frame) for frame in frames[:4])
    if len(frames) == 4:
        with pytest.raises(MemoryError, match="1 of 2 rows are done, 0x40000000 is not"):
            tables.map([0x1000, 1 << 30], [0, 0])
        tables.unmap(0)
        tables.unmap(0x1000)
        tables.map(1 << 30, 0)                                  # released frames are used again


@pytest.mark.parametrize(("frames", "text"), [([0x8001], "0x8001"), ([1 << 52], "0x10000000000000"), ([0x1000, 0x1000], "twice"),
                                              (range(0, 0x4000, 0x800), "step of 0x800"), ([1 << 40], "no slot")])
def test_frames_that_hold_no_table_are_refused(frames, text):
    with pytest.raises(ValueError, match=text):
        PageTables(GuestMemory(1 << 20), frames=frames)


def test_free_frames_pass_over_data_and_what_is_kept():
    """Frames with data, kept ranges and read-only slots are not taken."""
    mem = GuestMemory(0x8000)
    mem.add_slot(0x100000, bytes(0x4000))
    mem.write(0x6000, b"data")
    free = FreeFrames(mem, keep=[(0x3000, 0x5800)])
    assert free.take(2) == [0x7000, 0x2000]
    assert free.take(9) == [0x1000, 0]
    assert free.take(1) == []
    free.give([0x2000])
    assert free.take(2) == [0x2000]


def test_writes_of_the_guest_are_tracked_by_shadow_paging():
    """With writer="guest" the entries of shadowed tables change by the guest's own stores; "vmm" goes behind KVM's back."""
    mem = GuestMemory(4 << 20)
    vm = Vm(mem, host=Host(tdp=None), backing="4k")
    vcpu = vm.create_vcpu()
    tables = PageTables(mem, frames=range(0x100000, 0x200000, PAGE))
    tables.map(np.arange(0, 4 << 20, PAGE, dtype=np.uint64), np.arange(0, 4 << 20, PAGE, dtype=np.uint64))
    vcpu.set_regs(tables.regs())
    assert vcpu.access(0x300000, Access.USER).gpa == 0x300000
    own = PageTables(mem, frames=range(0x210000, 0x220000, PAGE), writer="guest", vcpu=vcpu)
    own.map(0x40000000, 0x300000)
    assert own.root == 0x210000
    vcpu.mov_cr(3, own.root)
    with pytest.raises(Exception, match="#PF"):
        vcpu.access(0x300000)                                   # its stores are not mapped there
    assert vcpu.access(0x40000000, Access.USER).gpa == 0x300000
    assert vm.audit(True) == []
    vmm = PageTables(mem, frames=range(0x220000, 0x230000, PAGE), writer="vmm", vm=vm)
    vmm.map(0x40000000, 0x301000)
    vcpu.mov_cr(3, vmm.root)
    assert vcpu.access(0x40000000, Access.USER).gpa == 0x301000
    for wrong in ({"writer": "guest"}, {"writer": "vmm", "vm": 5}):
        with pytest.raises(TypeError, match="needs a V"):
            PageTables(mem, **wrong)
    with pytest.raises(ValueError, match="writer: want"):
        PageTables(mem, writer="me")


@pytest.mark.parametrize("writer", ["host", "vmm", "guest"])
@pytest.mark.parametrize("mode", LEGACY)
def test_every_hand_writes_the_same(mode, writer):
    """The tables do not depend on whose stores they are."""
    def made(writer):
        mem = GuestMemory(8 << 20)
        vm = Vm(mem, backing="4k")
        vcpu = vm.create_vcpu()
        vcpu.set_regs(cr0=1)
        mem.write(0x7F0000, b"\xff" * 0x8000)                   # frames are cleared by the same hand
        tables = PageTables(mem, mode, frames=range(0x700000, 0x800000, PAGE), writer=writer, vm=vm, vcpu=vcpu)
        random_operations(tables, np.random.default_rng(3), 40)
        return tables.root, words_of(tables)
    assert made(writer) == made("host")


# ---- for a trace -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", ["linear", "random"])
@pytest.mark.parametrize("page", ["4k", "2m", "1g", "thp"])
@pytest.mark.parametrize("mode", LEGACY)
@pytest.mark.parametrize("given", [False, True])
def test_tables_for_addresses(mode, page, frames, given):
    """Every address has a page of the right size, and no two pages a byte in common."""
    if page == "1g" and mode in ("32", "pae"):
        with pytest.raises(ValueError, match="no 1G pages"):
            PageTables.for_addresses(None, [0], page, mode=mode)
        return
    if given and page == "1g":
        with pytest.raises(ValueError, match="the largest has"):
            PageTables.for_addresses(GuestMemory(64 << 20), [0], page, mode=mode)
        return
    rng = np.random.default_rng(5)
    base = np.uint64(BASES[mode])
    gva = base + np.concatenate([rng.integers(0, 1 << 21, 3000), (3 << 22) + rng.integers(0, 40 * PAGE, 500)]).astype(np.uint64)
    mem = GuestMemory(64 << 20) if given else None
    tables = PageTables.for_addresses(mem, gva, page, frames, 11, mode=mode)
    assert reachable(tables) == set(tables.table_frames)
    words = words_of(tables)
    vcpu = Vcpu(tables.mem, CpuModel(maxphyaddr=46))
    vcpu.set_regs(tables.regs())
    walked = vcpu.gva_walk.translate(gva, Access.USER | Access.WRITE, fields=("gpa", "status", "level"))
    assert (walked.status == 0).all()
    assert ((walked.gpa ^ gva) & np.uint64(PAGE - 1) == 0).all()
    pairs = np.unique(np.stack([gva >> np.uint64(12), walked.gpa >> np.uint64(12)]), axis=1)
    assert np.unique(pairs[0]).size == np.unique(pairs[1]).size == pairs.shape[1]
    assert not set((pairs[1] << np.uint64(12)).tolist()) & set(tables.table_frames)
    levels = {"4k": {1}, "2m": {2}, "1g": {3}}.get(page, {1} if mode == "32" else {1, 2})
    assert set(walked.level.tolist()) == levels
    if frames == "linear" and page == "4k":
        assert (np.diff(pairs[1].astype(np.int64)) == 1).all()
    again = PageTables.for_addresses(GuestMemory(64 << 20) if given else None, gva, page, frames, 11, mode=mode)
    assert words_of(again) == words


def test_share_of_transparent_huge_pages():
    """A 2M region gets one page from the given share of its 4K pages on."""
    gva = np.arange(128, dtype=np.uint64) * PAGE
    for share, expected in ((0.25, 2), (0.26, 1)):
        tables = PageTables.for_addresses(None, gva, "thp", thp_share=share)
        vcpu = Vcpu(tables.mem)
        vcpu.set_regs(tables.regs())
        assert vcpu.gva_walk.translate(gva, fields=("level",)).level.tolist() == [expected] * 128


def test_page_set_counts_distinct_pages():
    """Against numpy.unique, over several calls and growth of the table."""
    rng = np.random.default_rng(1)
    pages, seen = PageSet(), np.zeros(0, np.uint64)
    for n in (1, 1000, 50_000):
        addr = rng.integers(0, 1 << 28, n).astype(np.uint64) ^ np.uint64(0xFFFFF00000000000 if n & 1 else 0)
        both = np.unique(np.concatenate([seen, addr >> np.uint64(12)]))
        assert pages.add(addr) == both.size - seen.size
        seen = both
        assert len(pages) == seen.size
        assert (pages.pages() == seen).all()


# ---- demand paging -----------------------------------------------------------------------------------------------------

class PlainPager:
    """Demand paging row by row, in plain Python."""

    def __init__(self, page, large, share):
        self.page, self.large, self.threshold = page, large, max(1, -int(-share * (large // PAGE) // 1))
        self.mapped, self.faults, self.promotions = {}, 0, 0

    def touch(self, gva):
        size = {"4k": PAGE, "thp": PAGE, "2m": self.large, "1g": 1 << 30}[self.page]
        if any(self.mapped.get(gva // each * each) == each for each in (PAGE, self.large, 1 << 30)):
            return
        self.faults += 1
        region = gva // self.large * self.large
        inside = [page for page in self.mapped if page // self.large * self.large == region] if self.page == "thp" else []
        if self.page == "thp" and len(inside) + 1 >= self.threshold:
            self.promotions += bool(inside)
            for page in inside:
                del self.mapped[page]
            self.mapped[region] = self.large
        else:
            self.mapped[gva // size * size] = size


@pytest.mark.parametrize("frames", ["linear", "random"])
@pytest.mark.parametrize("page", ["4k", "2m", "1g", "thp"])
@pytest.mark.parametrize("mode", LEGACY)
def test_pager_counts_as_the_plain_one(mode, page, frames):
    """Faults, pages and promotions are those of a page-fault handler in plain Python; afterwards every address walks."""
    if page == "1g" and mode in ("32", "pae"):
        with pytest.raises(ValueError, match="no 1G pages"):
            Pager(page, mode=mode)
        return
    rng = np.random.default_rng(9)
    gva = np.uint64(BASES[mode]) + rng.integers(0, 6 << 20, 2000).astype(np.uint64)
    pager = Pager(page, frames, mode=mode, thp_share=0.1)
    plain = PlainPager(page, 4 << 20 if mode == "32" else 2 << 20, 0.1)
    for part in np.array_split(gva, 7):
        before = plain.faults
        for addr in part.tolist():
            plain.touch(addr)
        assert pager.touch(part) == plain.faults - before
    assert (pager.faults, pager.pages, pager.promotions) == (plain.faults, len(plain.mapped), plain.promotions)
    assert pager.huge_pages == sum(size > PAGE for size in plain.mapped.values())
    assert pager.table_pages == len(reachable(pager))
    vcpu = Vcpu(pager.mem, CpuModel(maxphyaddr=46))
    vcpu.set_regs(pager.regs())
    walked = vcpu.gva_walk.translate(gva, Access.USER | Access.WRITE)
    assert (walked.status == 0).all()
    pairs = np.unique(np.stack([gva >> np.uint64(12), walked.gpa >> np.uint64(12)]), axis=1)
    assert np.unique(pairs[0]).size == np.unique(pairs[1]).size == pairs.shape[1]


def test_pager_touches_both_pages_of_an_access_that_crosses():
    """An access of 8 bytes at the last 4 of a page touches the next page too."""
    pager = Pager()
    assert pager.touch(np.array([0xFFC, 0x5FFC, 0x8000], np.uint64), np.array([8, 4, 8], np.uint8)) == 4
    assert pager.touch([0x1000, 0xFFFF800000000000, 1 << 47]) == 1             # the last one is not canonical


def test_pager_in_given_memory_says_when_it_is_full():
    """Pages from the beginning of the slot, tables from its end, and an error when they meet."""
    pager = Pager(mem=GuestMemory(64 * PAGE))
    with pytest.raises(MemoryError, match="after 60 faults"):
        pager.touch(np.arange(100, dtype=np.uint64) * PAGE)
    assert (pager.faults, pager.table_pages) == (60, 4)
    vm = Vm(pager.mem, backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(pager.regs())
    reached = vcpu.access(np.arange(60, dtype=np.uint64) * PAGE, Access.WRITE)
    assert (reached.status == 0).all()
    assert len({*reached.gpa.tolist(), *pager.table_frames}) == 64


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 64, 65, 66, 67])
def test_a_pager_whose_memory_is_full(frames):
    """Pages and tables do not take the last frames from each other for ever."""
    def fill():
        pager = Pager(mem=GuestMemory(frames * 4096))
        for page in range(1000):
            pager.touch([page << 30])

    with pytest.raises(MemoryError, match="no frames? (is|are) left"):
        fill()


# ---- threads ---------------------------------------------------------------------------------------------------------------

def in_threads(*bodies):
    """Run functions side by side; what they raise is raised."""
    errors = []

    def run(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(("page", "frames"), [("4k", "linear"), ("thp", "random"), ("2m", "linear")])
def test_a_pager_of_several_threads(page, frames):
    """The same pages as of one thread, whoever touches them."""
    gva = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint64)
    alone = Pager(page, frames)
    alone.touch(gva)
    for _ in range(3):
        pager, counts = Pager(page, frames), []
        in_threads(*[lambda pager=pager, counts=counts: counts.append(pager.touch(gva)) for _ in range(4)])
        assert (sum(counts), pager.faults, pager.pages) == (alone.faults, alone.faults, alone.pages)
        vcpu = Vcpu(pager.mem)
        vcpu.set_regs(pager.regs())
        assert (vcpu.gva_walk.translate(gva).status == Status.OK).all()


def test_page_tables_of_several_threads():
    """Each thread maps and unmaps pages of its own: what is left is what each of them left."""
    tables = PageTables(GuestMemory(64 << 20))

    def work(n):
        gva = (np.arange(20_000, dtype=np.uint64) * np.uint64(4) + np.uint64(n)) << np.uint64(12)
        for _ in range(3):
            tables.map(gva, gva)
            tables.unmap(gva[::2])

    in_threads(*[lambda n=n: work(n) for n in range(4)])
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    t = vcpu.gva_walk.translate(np.arange(80_000, dtype=np.uint64) << np.uint64(12))
    there = np.arange(80_000) // 4 % 2 == 1
    assert ((t.status == Status.OK) == there).all()
    assert (t.gpa[there] >> np.uint64(12) == np.flatnonzero(there)).all()


def test_a_page_set_of_several_threads():
    gva = np.random.default_rng(0).integers(0, 1 << 40, 200_000, np.uint64)
    pages = np.unique(gva >> np.uint64(12))
    for _ in range(3):
        found, counts = PageSet(), []
        in_threads(*[lambda found=found, counts=counts: counts.append(found.add(gva)) for _ in range(4)],
                   lambda found=found: [found.pages() for _ in range(20)])
        assert sum(counts) == len(found) == pages.size
        assert (found.pages() == pages).all()
