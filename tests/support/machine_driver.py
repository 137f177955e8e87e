# SPDX-License-Identifier: Apache-2.0
"""A guest on a machine that is driven at random, and what it may see by the architecture.

`Driver` has one guest with a small universe of pages in one address space, and operations that guest, VMM and host may do.
Beside the machine stands a model: for each page of the universe every translation that the guest's tables had since the guest
last flushed it. A TLB hit must come to one of these, under the rights of now, anything else to what the tables say now, and
both to the host page that is behind the frame now. The guest flushes by one instruction, never more: an address on a large
page is enough for all of that page. The model's own side is the walk of `translate()`, which other tests hold against the
manuals, and slots and host pages as it set them up.
"""

from dataclasses import dataclass

import numpy as np
from builders import PageTables, flag_bits

from kvmmu import Access, CpuModel, GuestMemory, Host, RetPf, Status, Vm

PAGE, MB2, GB1 = 0x1000, 0x200000, 0x40000000
RAM = 16 * MB2
ROM, HOLE, HIGH = 0x40000000, 0x50000000, 0x60000000
ACCESSES = [kind | ring for kind in (Access.READ, Access.WRITE, Access.FETCH) for ring in (0, Access.USER)]
PTE_BITS = [flag_bits(name) for name in ("p", "w", "u", "nx", "a", "d")]
G, PS, PGE, ANY_READ = flag_bits("g"), flag_bits("ps"), 1 << 7, Access.AC
LARGE, LARGE_RO, NONE, SWITCHED, HUGE = 0x800000, 0xC00000, 0x1000000, 0x1800000, 2 * GB1

CONFIGURATIONS = {
    "ept": Host(tdp="ept", maxphyaddr=46),
    "ept without ad": Host(tdp="ept", ad=False),
    "ept with pml": Host(tdp="ept", pml=True),
    "ept, nx huge pages": Host(tdp="ept", nx_huge_pages=True, mbec=False),
    "ept, lazy split": Host(tdp="ept", eager_split=False, max_page="2m"),
    "npt": Host(tdp="npt", maxphyaddr=48),
    "npt without mmio caching": Host(tdp="npt", maxphyaddr=52),
    "npt, gmet": Host(tdp="npt", maxphyaddr=48, gmet=True),
    "npt, nx huge pages": Host(tdp="npt", maxphyaddr=40, nx_huge_pages=True),
}


@dataclass(frozen=True, slots=True)
class Translation:
    """What a TLB may hold of a page: its frame, the rights of the tables, whether it is global, and 2**shift bytes."""

    gpa: int
    acc: int
    is_global: bool
    shift: int

    def is_of_page(self, gva, addr):
        """Whether it is dropped with addr, if it is a translation of gva."""
        return gva >> self.shift == addr >> self.shift


class Driver:
    """One machine, its guest, and what the guest may see. `step()` does one random operation and checks it."""

    emulates_reads = False

    def __init__(self, host, mode="4l", seed=0):
        self.rng = np.random.default_rng(seed)
        self.host, self.mode = host, mode
        self.mem = GuestMemory(RAM)
        self.mem.add_slot(ROM, 4 * PAGE, readonly=True)
        self.high = np.zeros(8 * PAGE, np.uint8)
        self.mem.add_slot(HIGH, self.high)
        tables = PageTables(mode, base=4 * MB2)
        targets = [0x10000, 0x11000, 0x12000, 0x13000, MB2, MB2 + PAGE, 3 * MB2, ROM, ROM + PAGE, HOLE, HIGH, HIGH + 5 * PAGE]
        self.gva = [0x400000 + i * PAGE for i in range(len(targets))]
        for gva, gpa in zip(self.gva, targets, strict=True):
            tables.map(gva, gpa, "p w u g" if gva & PAGE else "p w u")
        self.map_large_pages(tables)
        self.upper = [tables.entry_gpa(self.gva[0], 2)]
        self.entry_size = tables.entry_size
        self.targets = targets
        for gpa, page in zip(*tables.pages(), strict=True):
            self.mem.write(int(gpa), page.tobytes())
        self.vm = Vm(self.mem, cpu=CpuModel(maxphyaddr=40), host=host)
        self.vcpu = self.vm.create_vcpu()
        self.cr3 = tables.regs()["cr3"]
        self.begin(tables.regs() | {"cr4": tables.regs()["cr4"] | PGE})
        self.dirty = {}                                     # slot gpa: frames written since the log was cleared
        self.high_at = HIGH
        self.rows = np.repeat(np.array(self.gva, np.uint64), len(ACCESSES))
        self.kinds = np.tile(np.array(ACCESSES, np.uint8), len(self.gva))
        self.nested = False
        self.log = []
        self.steps = 0
        self.seen = {}
        self.flush()

    def map_large_pages(self, tables):
        """Large pages of every size, one that is a table of small ones at times, and the entries that the guest changes."""
        size = 2 * MB2 if self.mode == "32" else MB2
        self.gva += [LARGE, LARGE + 37 * PAGE, LARGE + size - PAGE, LARGE_RO, LARGE_RO + size // 2, NONE]
        tables.map(LARGE, 8 * MB2, flags="p w u g", level=2)
        tables.map(LARGE_RO, 10 * MB2, flags="p u", level=2)
        self.ptes = [tables.entry_gpa(gva, 1) for gva in self.gva[:12]]
        self.ptes += [tables.entry_gpa(gva, 2) for gva in (LARGE, LARGE_RO)]
        offsets = [0, 5 * PAGE, size // 2 + PAGE]
        for i, offset in enumerate(offsets):
            self.ptes.append(tables.map(SWITCHED + offset, 0x14000 + i * PAGE))
        self.switch = tables.entry_gpa(SWITCHED, 2)
        self.switch_values = (tables.read(self.switch), 12 * MB2 | PS | flag_bits("p w u"))
        self.gva += [SWITCHED + offset for offset in offsets]
        if self.mode in ("4l", "5l"):
            self.ptes.append(tables.map(HUGE, 0, level=3))
            self.gva += [HUGE + gpa for gpa in (0x10000, MB2 + PAGE, 8 * MB2, 10 * MB2 + 3 * PAGE)]

    def begin(self, registers):
        """The guest runs."""
        self.vcpu.set_regs(**registers)

    # ---- what the guest may see ----------------------------------------------------------------------------------------

    def translations(self):
        """For each page the Translation that a TLB may make of the tables as they are now, or None."""
        t = self.vcpu.gva_walk.translate(np.array(self.gva, np.uint64), int(ANY_READ), set_ad=False,
                                         fields=("status", "gpa", "pte", "pte_access", "level"))
        shifts, is_global = (0, 12, 22 if self.mode == "32" else 21, 30), self.vcpu.regs.cr4 & PGE
        return {gva: Translation(gpa, acc, bool(is_global and pte & G), shifts[level]) if status == Status.OK else None
                for gva, status, gpa, pte, acc, level in zip(
                    self.gva, t.status.tolist(), t.gpa.tolist(), t.pte.tolist(), t.pte_access.tolist(), t.level.tolist(),
                    strict=True)}

    def outcomes(self):
        """For each page (status, gpa, error code) per access, as the tables are now."""
        t = self.vcpu.gva_walk.translate(self.rows, self.kinds, set_ad=False)
        columns = list(zip(t.status.tolist(), t.gpa.tolist(), t.error_code.tolist(), strict=True))
        n = len(ACCESSES)
        return {gva: tuple(columns[i * n:(i + 1) * n]) for i, gva in enumerate(self.gva)}

    def outcome(self, gva):
        return self.outcomes()[gva]

    def flush(self):
        """The guest flushed all: only what the tables say now counts."""
        self.seen = {gva: {now} for gva, now in self.translations().items()}

    def flush_address(self, addr, globals_too=True):
        """The guest flushed one address: translations of the page around it, large or small, are no more."""
        self.drop(lambda gva, old: old.is_of_page(gva, addr) and (globals_too or not old.is_global))

    def flush_but_global(self):
        self.drop(lambda gva, old: not old.is_global)

    def drop(self, is_dropped):
        for gva, now in self.translations().items():
            self.seen[gva] = {old for old in self.seen[gva] if old is not None and not is_dropped(gva, old)} | {now}

    def remember(self):
        """The tables may have changed: what they say now may be seen, and what they said since the last flush."""
        for gva, now in self.translations().items():
            self.seen[gva].add(now)

    def check_outcome(self, gva, i, got, hit=None):
        """What an access came to: a walk of now, or one of the translations remembered (hit True), or either (None)."""
        remembered = got[0] == Status.OK and any(
            old is not None and old.gpa == got[1] and not self.vcpu.gva_walk.permission_fault(old.acc, 0, ACCESSES[i])
            for old in self.seen[gva])
        if hit is not True and got == self.outcome(gva)[i]:
            return
        why = f"{gva:#x} {ACCESSES[i]!r}: got {got} (TLB hit: {hit}), the tables say {self.outcome(gva)[i]}"
        assert hit is not False, why
        assert remembered, f"{why}, and {self.seen[gva]}"

    def slot_of(self, gpa):
        for slot in self.vm.slots:
            if slot["gpa"] <= gpa < slot["gpa"] + slot["size"]:
                return slot
        return None

    # ---- operations ----------------------------------------------------------------------------------------------------

    def access(self, gva=None):
        gva = self.pick(self.gva) if gva is None else gva
        i = int(self.rng.integers(len(ACCESSES)))
        offset = int(self.rng.integers(PAGE))
        before = self.vcpu.tlb.hits
        r = self.vcpu.access(np.array([gva + offset], np.uint64), int(ACCESSES[i]))
        status, gpa, error_code = int(r.status[0]), int(r.gpa[0]), int(r.error_code[0])
        got = (status, gpa - offset if status == Status.OK else gpa, error_code)
        self.check_outcome(gva, i, got, self.vcpu.tlb.hits > before)
        if status == Status.PAGE_FAULT:                     # drops what is remembered, as INVLPG does
            self.flush_address(gva)
        self.log[-1] += f" {gva + offset:#x} {int(ACCESSES[i])} -> {got} ret {int(r.ret[0])} exits {int(r.exits[0])}"
        if status != Status.OK:
            assert int(r.hpa[0]) == 2**64 - 1
            return
        self.check_host(gpa, int(r.hpa[0]), int(r.ret[0]), bool(ACCESSES[i] & Access.WRITE))

    def check_host(self, gpa, hpa, ret, write):
        slot = self.slot_of(gpa)
        if slot is None or (slot["readonly"] and write):
            assert ret == RetPf.EMULATE
            assert hpa == 2**64 - 1, f"MMIO at {gpa:#x} reached {hpa:#x}"
            return
        assert hpa != 2**64 - 1
        assert ret != RetPf.EMULATE, f"memory at {gpa:#x} was emulated"
        assert hpa == self.host_address(gpa), f"{gpa:#x} reached {hpa:#x}, the host page is at {self.host_address(gpa):#x}"
        if write and slot["gpa"] in self.dirty:
            self.dirty[slot["gpa"]].add(gpa >> 12)

    def host_address(self, gpa):
        return self.vm.kvm.host_page(gpa)[0] * PAGE + gpa % PAGE

    def many(self):
        """A batch in which nothing changes but A and D: each row is allowed."""
        rows = self.rng.integers(len(self.gva), size=40)
        kinds = self.rng.integers(len(ACCESSES), size=40)
        gva = np.array([self.gva[row] for row in rows], np.uint64)
        r = self.vcpu.access(gva, np.array([ACCESSES[kind] for kind in kinds], np.uint8))
        for i, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            got = (int(r.status[i]), int(r.gpa[i]), int(r.error_code[i]))
            self.check_outcome(self.gva[row], kind, got)
            if got[0] == Status.OK and ACCESSES[kind] & Access.WRITE:
                slot = self.slot_of(got[1])
                if slot is not None and not slot["readonly"] and slot["gpa"] in self.dirty:
                    self.dirty[slot["gpa"]].add(got[1] >> 12)
            if got[0] == Status.PAGE_FAULT:
                self.flush_address(self.gva[row])

    def write_pte(self):
        """The guest changes an entry, of a large page in half of the cases, and flushes it or not."""
        i = int(self.rng.integers(len(self.ptes)))
        if self.rng.random() < 0.4:
            i = self.pick((12, 13, len(self.ptes) - 1 if self.mode in ("4l", "5l") else 13))
        old = self.read_entry(self.ptes[i])
        bit = self.pick([bit for bit in (*PTE_BITS, G, G) if self.entry_size == 8 or bit < 1 << 32])
        new = old ^ bit
        if self.rng.random() < 0.4 and i < 12:
            new = (old & 0xFFF) | self.pick(self.targets)
        elif self.rng.random() < 0.6 and i in (12, 13):
            new = old ^ 2 * MB2                             # another frame for a large page
        self.write_and_flush(self.ptes[i], new)

    def switch_page_size(self):
        """A large page becomes a table of small ones, or the other way round."""
        self.write_and_flush(self.switch, self.pick(self.switch_values))

    def write_and_flush(self, gpa, value):
        """An entry changes, and one address of it is flushed, or none. Most times all that it maps is used before and after."""
        seen, old = self.translations(), self.read_entry(gpa)
        self.store_entry(gpa, value)
        now = self.translations()
        changed = [gva for gva in self.gva if seen[gva] != now[gva]]
        self.store_entry(gpa, old)
        used = changed if self.rng.random() < 0.7 else []
        for gva in used:
            self.access(gva)
        self.store_entry(gpa, self.read_entry(gpa) ^ old ^ value)           # A and D as they are now
        self.remember()
        if self.rng.random() < 0.7:
            self.flush_one(self.pick(changed or self.gva))
        for gva in used:
            self.access(gva)

    def flush_one(self, gva):
        """Flush one address of the page that a gva is on, by INVLPG, INVPCID, or a #PF there."""
        translation = self.translations()[gva]
        size = PAGE if translation is None else 1 << translation.shift
        addr = (gva & -size) + int(self.rng.integers(size))
        how = self.pick(("invlpg", "invlpg", "invpcid", "fault"))
        self.log[-1] += f" {how} {addr:#x}"
        if how == "invlpg":
            self.vcpu.invlpg(addr)
            self.flush_address(addr)
        elif how == "invpcid":
            self.vcpu.invpcid(0, 0, addr)
            self.flush_address(addr, globals_too=False)
        else:
            r = self.vcpu.access(np.array([addr], np.uint64), int(self.pick((Access.WRITE, Access.WRITE | Access.USER))))
            if r.status[0] == Status.PAGE_FAULT:
                self.flush_address(addr)
            elif r.status[0] == Status.OK:
                slot = self.slot_of(int(r.gpa[0]))
                if slot is not None and not slot["readonly"] and slot["gpa"] in self.dirty:
                    self.dirty[slot["gpa"]].add(int(r.gpa[0]) >> 12)

    def invalidate_addresses(self):
        """INVLPG or INVPCID of an address, though nothing has changed."""
        self.flush_one(self.pick(self.gva))

    def invpcid(self):
        """INVPCID of a PCID, of all, of all but global translations."""
        kind = self.pick((1, 2, 3))
        self.vcpu.invpcid(kind, 0, 0)
        self.flush() if kind == 2 else self.flush_but_global()

    def toggle_pge(self):
        self.vcpu.mov_cr(4, self.vcpu.regs.cr4 ^ PGE)
        self.flush()

    def read_entry(self, gpa):
        return int.from_bytes(self.mem.read(gpa, self.entry_size), "little")

    def store_entry(self, gpa, value):
        self.vm.write_guest_physical(gpa, value.to_bytes(self.entry_size, "little"))
        slot = self.slot_of(gpa)
        if slot["gpa"] in self.dirty:
            self.dirty[slot["gpa"]].add(gpa >> 12)

    def load_cr3(self):
        """What is global stays."""
        self.vcpu.mov_cr(3, self.cr3)
        self.flush_but_global()

    def toggle_cr0_wp(self):
        """Nothing is flushed: the entries of the past are checked by the registers of now."""
        self.vcpu.mov_cr(0, self.vcpu.regs.cr0 ^ 1 << 16)

    def toggle_cr4(self):
        """SMAP flushes nothing, SMEP where it is set."""
        bit = self.pick([1 << 20, 1 << 21])
        self.vcpu.mov_cr(4, self.vcpu.regs.cr4 ^ bit)
        if bit == 1 << 20 and self.vcpu.regs.cr4 & bit:
            self.flush()

    def reload_all(self):
        """The registers that it has: nothing is flushed but where PDPTEs are loaded."""
        self.vcpu.set_regs(cr3=self.cr3)
        if self.vcpu.regs.pdptrs is not None:
            self.flush()

    def unmap(self):
        self.invalidate("unmap")

    def move(self):
        self.invalidate("move")

    def protect(self):
        self.invalidate("protect")

    def invalidate(self, how):
        gpa = self.pick([0x10000, 0x12000, MB2, MB2 + PAGE, 8 * MB2, 8 * MB2 + 37 * PAGE, 10 * MB2, 12 * MB2, ROM, self.high_at,
                         4 * MB2])
        size = self.pick([PAGE, 2 * PAGE, MB2, 4 * PAGE])
        gpa &= ~(MB2 - 1) if size == MB2 else ~0
        self.log[-1] += f" {gpa:#x} {size:#x}"
        self.vm.invalidate(gpa, size, how)

    def set_backing(self):
        level, size = self.pick([("4k", MB2), ("2m", MB2)])
        if {"4k": 1, "2m": 2}[level] > self.host.max_huge_page_level:
            return
        gpa = self.pick([0, MB2, 8 * MB2, 10 * MB2, 12 * MB2])
        self.vm.set_backing(gpa, size, level)

    def under_invalidation(self):
        """No access gets through, whatever it finds, unless the TLB still has it: the notifier flushed what it zapped."""
        gva = self.pick(self.gva)
        outcome = self.outcome(gva)[0]
        if outcome[0] != Status.OK or self.slot_of(outcome[1]) is None:
            return
        gpa = outcome[1] & ~(PAGE - 1)
        with self.vm.invalidation(gpa, PAGE):
            r = self.vcpu.access(np.array([gva], np.uint64), 0)
            if int(r.gpa[0]) == outcome[1] and not (self.emulates_reads and r.ret[0] == RetPf.EMULATE):
                raise AssertionError(f"{gva:#x} reached {gpa:#x} under its invalidation")
            assert self.vm.audit() == []

    def age(self):
        gpa = self.pick([0, MB2, 8 * MB2, 10 * MB2])
        young = self.vm.test_age(gpa, MB2)
        assert young == self.vm.age(gpa, MB2)
        assert not self.vm.test_age(gpa, MB2)

    def dirty_log_on(self):
        gpa = self.pick([0, self.high_at])
        if gpa not in self.dirty and self.slot_of(gpa) is not None:
            self.vm.set_dirty_log(gpa, initially_set=bool(self.rng.random() < 0.3))
            self.dirty[gpa] = set()

    def dirty_log_off(self):
        if self.dirty:
            gpa = self.pick(sorted(self.dirty))
            del self.dirty[gpa]
            self.vm.set_dirty_log(gpa, False)

    def dirty_log_get(self):
        """Whatever was written since the last time is in the log."""
        if self.dirty:
            gpa = self.pick(sorted(self.dirty))
            clear = bool(self.rng.random() < 0.8)
            got = set(self.vm.get_dirty_log(gpa, clear).tolist())
            missing = self.dirty[gpa] - got
            assert not missing, f"written, not in the log: {sorted(map(hex, missing))}"
            if clear:
                self.dirty[gpa] = set()

    def dirty_log_clear(self):
        """A range, or some pages of it, is clean: what is written there from now on is in the log again."""
        if self.dirty:
            gpa = self.pick(sorted(self.dirty))
            pages = self.slot_of(gpa)["size"] // PAGE
            first = int(self.rng.integers(pages))
            last = int(self.rng.integers(first, min(pages, first + self.pick((1, 100, pages)))))
            some = np.array([frame for frame in self.vm.get_dirty_log(gpa, clear=False).tolist()
                             if first <= frame - gpa // PAGE <= last and self.rng.random() < 0.5], np.uint64)
            all_of_it = self.rng.random() < 0.5
            self.vm.clear_dirty_log(gpa + first * PAGE, (last + 1 - first) * PAGE, None if all_of_it else some)
            frames = range(gpa // PAGE + first, gpa // PAGE + last + 1) if all_of_it else some.tolist()
            self.dirty[gpa] -= set(frames)

    def write_protect(self):
        """As a shadow MMU would protect a table: W does not come back by a fast page fault."""
        outcome = self.outcome(self.pick(self.gva))[0]
        if outcome[0] == Status.OK and self.slot_of(outcome[1]) is not None:
            self.vm.kvm.write_protect_gfn(outcome[1] >> 12)

    def toggle_smm(self):
        """Another root, over the same memory."""
        self.vcpu.smm = not self.vcpu.smm

    def toggle_guest_mode(self):
        """L2 without nested paging and back: another root; the registers of L1 come back."""
        if self.nested:
            self.vcpu.leave_nested()
        else:
            self.vcpu.enter_nested(None)
        self.nested = not self.nested
        self.flush()

    def zap_all(self):
        self.vm.zap_all()

    def recover_nx(self):
        before = self.vm.stats["nx_lpage_splits"]
        self.vm.recover_nx_huge_pages(self.pick([1, 2, 60]))
        assert self.vm.stats["nx_lpage_splits"] <= before

    def split(self):
        self.vm.split_huge_pages(self.pick([0, 8 * MB2]), 4 * MB2, self.pick(["4k", "2m"]))

    def recover(self):
        self.vm.recover_huge_pages()

    def slot_change(self):
        """The high slot goes, moves, or comes back."""
        if self.high_at in self.dirty:
            del self.dirty[self.high_at]
        if self.slot_of(self.high_at) is None:
            self.vm.add_slot(self.high_at, self.high)
        elif self.rng.random() < 0.5:
            self.vm.delete_slot(self.high_at)
        else:
            to = HIGH + PAGE * int(self.rng.integers(4)) if self.high_at == HIGH else HIGH
            if to != self.high_at:
                self.vm.move_slot(self.high_at, to)
                self.high_at = to

    def generations(self):
        self.vm.kvm.advance_generation(self.pick([1, 100, (1 << 18) - 1]))

    def write_guest(self):
        gva, user = self.pick(self.gva), self.pick([0, Access.USER])
        outcome = self.outcome(gva)[2 + (user != 0)]
        data = self.rng.bytes(16)
        try:
            reached = self.vcpu.write_guest(gva, data, user)
        except Exception as error:
            assert outcome[0] != Status.OK, f"write_guest({gva:#x}) raised {error!r}, the walk says {outcome}"
            assert error.error_code == outcome[2]
            self.flush_address(gva)
            return
        assert outcome[0] == Status.OK
        slot = self.slot_of(outcome[1])
        assert reached == (16 if slot is not None and not slot["readonly"] else 0)
        if reached:
            assert self.mem.read(outcome[1], 16) == data
            if slot["gpa"] in self.dirty:
                self.dirty[slot["gpa"]].add(outcome[1] >> 12)
            self.remember()                                 # it may have hit a table

    # ---- the loop ------------------------------------------------------------------------------------------------------

    OPERATIONS = (
        ("access", 40), ("many", 6), ("write_pte", 18), ("switch_page_size", 3), ("invalidate_addresses", 2), ("invpcid", 1),
        ("toggle_pge", 1), ("load_cr3", 2), ("toggle_cr0_wp", 1), ("toggle_cr4", 1),
        ("reload_all", 1), ("unmap", 3), ("move", 3), ("protect", 3), ("set_backing", 2), ("under_invalidation", 2), ("age", 3),
        ("dirty_log_on", 2), ("dirty_log_off", 1), ("write_protect", 2), ("toggle_smm", 1), ("toggle_guest_mode", 1),
        ("dirty_log_get", 4), ("dirty_log_clear", 3), ("zap_all", 1), ("recover_nx", 2), ("split", 1),
        ("recover", 1), ("slot_change", 2), ("generations", 1), ("write_guest", 3))
    NAMES = tuple(name for name, weight in OPERATIONS for _ in range(weight))

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def step(self, audit=True):
        name = self.pick(self.NAMES)
        self.log.append(name)
        del self.log[:-30]
        getattr(self, name)()
        self.steps += 1
        if audit:
            wrong = self.audit()
            assert wrong == [], f"after {name}: {wrong[:5]}"

    def audit(self):
        return self.vm.audit()
