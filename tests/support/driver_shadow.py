# SPDX-License-Identifier: Apache-2.0
"""A guest under shadow paging that is driven at random, its page tables above all.

The guest has a few address spaces that share tables, windows onto all of its tables, tables in a read-only slot and in one that
comes and goes, and it writes tables in every way that there is. The model has for each PCID the roots that were in use with it
since it was flushed, and for each page what the tables under these roots said since. A page whose translation comes from KVM's
walk of now must come to what they say now. A and D bits are looked up where they must be set.
"""

import itertools

import numpy as np
from builders import flag_bits
from machine_driver import ACCESSES, HIGH, MB2, PAGE, PTE_BITS, ROM, Driver
from shared_tables import SPREAD, SPREAD_PAGES, SPREAD_STEP, TABLES, WINDOW, SharedTables

from kvmmu import Access, CpuModel, GeneralProtection, GuestFault, Host, PageFault, RetPf, Status, Vcpu, Vm

NOFLUSH, PCIDE, PGE, PG, WP, SMEP, SMAP, NXE, LMA = 1 << 63, 1 << 17, 1 << 7, 1 << 31, 1 << 16, 1 << 20, 1 << 21, 1 << 11, 1 << 10
A, D = flag_bits("a"), flag_bits("d")
INVALID = 2**64 - 1

SHADOW_CONFIGURATIONS = {
    "shadow": Host(tdp=None, maxphyaddr=46),
    "shadow, nx huge pages": Host(tdp=None, maxphyaddr=46, nx_huge_pages=True),
    "shadow, small pages": Host(tdp=None, maxphyaddr=46, max_page="4k"),
    "shadow without mmio caching": Host(tdp=None, maxphyaddr=52),
    "shadow, older roles": Host(tdp=None, maxphyaddr=46, kernel="6.18"),
}


class ShadowDriver(SharedTables, Driver):
    """One machine without two-dimensional paging, its guest, and what the guest may see."""

    mmio_in_mind = True                 # by its linear address
    was_mmio = frozenset()              # frames
    emulates_reads = True               # of memory where MMIO was: synchronization keeps such entries, whatever slots there are

    def __init__(self, host, mode="4l", seed=0):
        self.rng = np.random.default_rng(seed)
        self.host, self.mode = host, mode
        self.bits = [bit for bit in PTE_BITS if mode != "32" or bit < 1 << 32]
        self.build_tables()
        self.mem, self.high = self.make_memory()
        smm_mem = self.make_smm_memory()
        self.vm = Vm(self.mem, CpuModel(maxphyaddr=40), host, smm_mem=smm_mem, slot_zap_all=bool(self.rng.random() < 0.7))
        self.vcpu = self.vm.create_vcpu()
        # translations are those of KVM's walk, which knows 36 bits of address in a page of 4M
        walker_cpu = CpuModel(maxphyaddr=40, conformance="kvm")
        self.walkers = [Vcpu(self.mem, walker_cpu, smm_mem=smm_mem) for _ in self.roots]
        self.registers = self.random_registers()
        self.vcpu.set_regs(**self.registers)
        self.dirty, self.high_at = {}, HIGH
        self.rows = np.repeat(np.array(self.gva, np.uint64), len(ACCESSES))
        self.kinds = np.tile(np.array(ACCESSES, np.uint8), len(self.gva))
        self.nested, self.log, self.steps = False, [], 0
        self.root = 0                                       # of the address space in force
        self.used, self.seen, self.touched, self.now = {}, {}, {}, {}
        self.NAMES = self.choose_operations()
        self.forget()

    def make_smm_memory(self):
        """System-management mode has the same memory."""
        return None

    def random_registers(self):
        regs = self.tables[0].regs()
        cr4 = self.pick([0, 0, SMEP, SMAP, SMEP | SMAP]) | (self.pick([0, PCIDE]) if self.mode in ("4l", "5l") else 0)
        return regs | {"cr0": regs["cr0"] ^ self.pick([0, 0, WP]), "cr4": regs["cr4"] | cr4}

    # ---- what the guest may see ----------------------------------------------------------------------------------------

    @property
    def paging(self):
        return bool(self.vcpu.regs.cr0 & PG)

    @property
    def pcid(self):
        regs = self.vcpu.regs
        return regs.cr3 & 0xFFF if regs.cr4 & PCIDE else 0

    def walker(self, root, efer=0):
        """A vCPU for its walk alone, with the registers of now and a root. IN efer: bits to set besides."""
        regs = self.vcpu.regs
        walker = self.walkers[root]
        want = {"cr0": regs.cr0, "cr3": self.roots[root] if self.paging else regs.cr3, "cr4": regs.cr4, "efer": regs.efer | efer}
        if regs.pdptrs is not None:
            want["pdptrs"] = regs.pdptrs
        if any(getattr(walker.regs, name) != value for name, value in want.items()):
            walker.set_regs(**want)
        return walker.gva_walk

    def outcomes(self, root=None):
        """For each page (status, gpa, error code) per access, as the tables of an address space are now."""
        root = self.root if root is None else root
        if root not in self.now:                            # A and D, which accesses set, change nothing of it
            self.now[root] = self.translate_all(root)
        return self.now[root]

    def visible(self, root):
        """What tables may be seen to say now: KVM shadows alike with EFER.NX and without, and keeps entries that have XD set."""
        if self.mode == "32" or not self.paging or self.vcpu.regs.efer & NXE:
            return (self.outcomes(root),)
        if (root, NXE) not in self.now:
            self.now[root, NXE] = self.translate_all(root, NXE)
        return self.outcomes(root), self.now[root, NXE]

    def change(self):
        """What the tables say may be something else now."""
        self.now.clear()
        self.changed = True

    def translate_all(self, root, efer=0):
        t = self.walker(root, efer).translate(self.rows, self.kinds, set_ad=False)
        columns = list(zip(t.status.tolist(), t.gpa.tolist(), t.error_code.tolist(), strict=True))
        n = len(ACCESSES)
        return {gva: tuple(columns[i * n:(i + 1) * n]) for i, gva in enumerate(self.gva)}

    def forget(self):
        """Nothing is remembered of any address space: all was flushed, for every PCID."""
        self.used, self.touched = {self.pcid: {self.root}}, {}
        self.seen = {}
        self.change()
        self.remember()

    def flush(self, *pages):
        """The guest flushed these pages (all by default) of the PCID in force."""
        pcid = self.pcid
        if not pages:
            self.used[pcid] = {self.root}
            self.touched[pcid] = set()
        self.flush_pages(pcid, pages or self.gva)

    def page_of(self, gva):
        """All pages that an address stands for where the guest has a large page there."""
        level = self.walker(self.root).walk_record(gva, 0).level if self.paging else 0
        shift = (12, 12, 22 if self.mode == "32" else 21, 30)[level] if self.outcomes()[gva][0][0] == Status.OK else 12
        return [other for other in self.gva if other >> shift == gva >> shift]

    def flush_pages(self, pcid, pages):
        seen = self.seen.setdefault(pcid, {})
        for gva in pages:
            seen[gva] = set()
        for root in self.used.get(pcid, ()):
            for now in self.visible(root):
                for gva in pages:
                    seen[gva].add(now[gva])

    def remember(self):
        """What the tables say now may be seen from now on, under every root that its PCID was used with."""
        if not self.changed:
            return
        self.changed = False
        now = {root: self.visible(root) for root in set().union(*self.used.values())}
        for pcid, roots in self.used.items():
            seen = self.seen.setdefault(pcid, {})
            for outcomes in itertools.chain.from_iterable(now[root] for root in roots):
                for gva, outcome in outcomes.items():
                    seen.setdefault(gva, set()).add(outcome)

    # ---- accesses ------------------------------------------------------------------------------------------------------

    def access(self, gva=None):
        gva = self.pick_page() if gva is None else gva
        i = int(self.rng.integers(len(ACCESSES)))
        offset = int(self.rng.integers(PAGE))
        r = self.vcpu.access(np.array([gva + offset], np.uint64), int(ACCESSES[i]))
        status, gpa, error_code, ret = int(r.status[0]), int(r.gpa[0]), int(r.error_code[0]), int(r.ret[0])
        got = (status, gpa - offset if status == Status.OK else gpa, error_code)
        self.log[-1] += f" {gva + offset:#x} {int(ACCESSES[i])} -> {got} ret {ret} exits {int(r.exits[0])}"
        self.check_access(gva, i, got, ret)
        if status != Status.OK:
            assert int(r.hpa[0]) == INVALID
            return
        self.check_host(gpa, int(r.hpa[0]), ret, bool(ACCESSES[i] & Access.WRITE))

    def check_access(self, gva, i, got, ret, now=None):
        """A result against the tables, and the A and D bits that it must have left. now: what they said before they changed."""
        allowed = {outcomes[i] for outcomes in self.seen[self.pcid][gva]}
        assert got in allowed, f"{gva:#x} {ACCESSES[i]!r}: got {got}, the tables allow {allowed}"
        changed, now = now is not None, now or self.outcomes()[gva][i]
        if got[0] == Status.OK and ret == RetPf.EMULATE and self.is_known_as_mmio(got[1]):
            return                                                          # KVM keeps in mind what page was MMIO last
        if got[0] != Status.OK or ret in (RetPf.FIXED, RetPf.EMULATE):
            assert got == now, f"{gva:#x} {ACCESSES[i]!r}: a walk of now came to {got}, the tables say {now}"
        if got[0] != Status.OK:
            if got[0] == Status.PAGE_FAULT and got[2] & 9 == 1:             # what denied it is remembered no more
                self.flush_pages(self.pcid, self.page_of(gva))
        elif self.paging and got == now and not changed:
            self.check_ad(gva, ACCESSES[i], ret in (RetPf.FIXED, RetPf.EMULATE))

    def is_known_as_mmio(self, gpa):
        """There is no slot, or there was none: synchronization takes an MMIO entry for one of the slots of now."""
        return self.slot_of(gpa) is None or (self.mmio_in_mind and gpa >> 12 in self.was_mmio)

    def check_ad(self, gva, access, walked):
        """A is set in every entry, or at least in the leaf; D as well, if this was a write."""
        record = self.walker(self.root).walk_record(gva, int(access))
        for step in record.steps:
            if step.level == 3 and self.mode == "pae":
                continue
            slot = self.slot_of(step.gpa)
            leaf = step is record.steps[-1]
            if slot is None or slot["readonly"] or not (walked or (leaf and step.gpa not in self.touched.get(self.pcid, ()))):
                continue
            entry = self.read_entry(step.gpa)
            assert entry & A, f"{gva:#x}: A is clear in {entry:#x} at {step.gpa:#x}, level {step.level}"
            assert entry & D or not (leaf and access & Access.WRITE), f"{gva:#x}: D is clear in {entry:#x} at {step.gpa:#x}"

    def check_host(self, gpa, hpa, ret, write, moved=False):
        """The host page behind a frame. moved: the host may have given it another page since."""
        slot = self.slot_of(gpa)
        if slot is None or (slot["readonly"] and write):
            assert ret == RetPf.EMULATE
            assert hpa == INVALID, f"MMIO at {gpa:#x} reached {hpa:#x}"
            self.was_mmio |= {gpa >> 12}
            return
        if hpa == INVALID and ret == RetPf.EMULATE and self.is_known_as_mmio(gpa):
            return
        want = self.host_address(gpa)
        assert hpa == want or (moved and hpa != INVALID), f"{gpa:#x} reached {hpa:#x}, the host page is at {want:#x}"
        if write:
            self.wrote(gpa, 1)

    def many(self):
        """A batch in which nothing changes but A and D: each row is allowed."""
        rows = self.rng.integers(len(self.gva), size=40)
        kinds = self.rng.integers(len(ACCESSES), size=40)
        gva = np.array([self.gva[row] for row in rows], np.uint64)
        r = self.vcpu.access(gva, np.array([ACCESSES[kind] for kind in kinds], np.uint8))
        for i, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            got = (int(r.status[i]), int(r.gpa[i]), int(r.error_code[i]))
            self.check_access(self.gva[row], int(kind), got, int(r.ret[i]))
            if got[0] == Status.OK:
                self.check_host(got[1], int(r.hpa[i]), int(r.ret[i]), bool(ACCESSES[kind] & Access.WRITE), moved=True)

    # ---- writes --------------------------------------------------------------------------------------------------------

    def wrote(self, gpa, size):
        """Frames of the dirty log."""
        slot = self.slot_of(gpa)
        if slot is not None and slot["gpa"] in self.dirty and not slot["readonly"]:
            self.dirty[slot["gpa"]] |= {gpa >> 12, gpa + size - 1 >> 12}

    def note(self, gpa, size):
        """Bytes were written: A and D bits of entries there are the guest's doing until it flushes."""
        self.wrote(gpa, size)
        self.change()
        entries = range(gpa & -self.entry_size, gpa + size, self.entry_size)
        for pcid in self.used:
            self.touched.setdefault(pcid, set()).update(entries)

    def is_there(self, gpa):
        slot = self.slot_of(gpa)
        return slot is not None and not slot["readonly"]

    def write_pte(self):
        """KVM writes an entry for the guest; the guest flushes the page, or not."""
        gpa = self.pick(self.entries)
        if not self.is_there(gpa):
            return
        self.store_entry(gpa, self.new_value(gpa))
        self.log[-1] += f" {gpa:#x} = {self.read_entry(gpa):#x}"
        if self.rng.random() < 0.3:
            self.invlpg()

    def store_entry(self, gpa, value):
        self.vm.write_guest_physical(gpa, value.to_bytes(self.entry_size, "little"))
        self.note(gpa, self.entry_size)

    def store(self):
        """The guest writes through one of its windows: an entry, a part of one, or bytes of all sizes."""
        self.write_by(self.store_bytes)

    def store_bytes(self, gva, data, user):
        return self.vcpu.store(gva, data, user, page_table_writing=bool(self.rng.random() < 0.8))

    def grow_old(self):
        """A page is used, the guest writes its entry without a flush, and it is used again: as it was, or as it is."""
        gva = self.pick_page()
        self.access(gva)
        entry = self.leaf_entry(gva)
        if entry is not None and entry & -PAGE in self.frames:
            self.write_entry(entry)
            self.remember()
            if self.rng.random() < 0.4:                     # where the same tables hang on others, and all was flushed
                self.load_cr3()
                self.access(self.pick(self.gva[:12]))
            for _ in range(3):
                self.access(gva)

    def leaf_entry(self, gva):
        """Where the entry is that maps a page, if one does."""
        steps = self.walker(self.root).walk_record(gva, 0).steps if self.paging else ()
        return steps[-1].gpa if steps else None

    def write_entry(self, gpa):
        self.write_by(self.store_bytes, WINDOW + self.frames.index(gpa & -PAGE) * PAGE, gpa % PAGE)

    def write_guest(self):
        """As `store()`, by an instruction that KVM emulates."""
        self.write_by(self.vcpu.write_guest)

    def write_by(self, write, gva=None, offset=None):
        """A write by the guest, checked. IN gva, offset: the entry to write; by default anything."""
        anything = gva is None
        if anything:
            gva = self.pick(self.windows if self.rng.random() < 0.8 else self.gva)
            offset = int(self.rng.integers(PAGE // self.entry_size)) * self.entry_size
        user = self.pick([0, 0, Access.USER])
        i = ACCESSES.index(Access.WRITE | user)
        now = self.outcomes()[gva][i]
        if anything and self.rng.random() < 0.8 and now[0] == Status.OK:
            offset = self.pick([gpa % PAGE for gpa in self.entries if gpa & -PAGE == now[1]] or [offset])
        size = self.entry_size
        if now[0] == Status.OK and self.is_there(now[1]):
            data = self.new_value(now[1] + offset).to_bytes(size, "little")
        else:
            data = self.rng.bytes(size)
        if anything and self.rng.random() < 0.3:                            # less, or more
            offset += int(self.rng.integers(self.entry_size))
            size = min(int(self.pick([1, 2, 3, 4, 8, 16])), PAGE - offset)
            if self.entry_size == 8 and size == 4 and offset % 8 > 4:       # KVM would not see the second entry change
                size = 3
            data = (data * 4)[:size]
        self.log[-1] += f" {gva + offset:#x} {data.hex()}"
        try:
            reached = write(gva + offset, data, user)
        except GuestFault as error:
            self.check_fault(gva, now, error)
            return
        if isinstance(reached, int):                                        # KVM's own walk, but for MMIO that it has in mind
            if not reached and self.may_be_mmio(gva, i):
                return
            assert now[0] == Status.OK
            assert reached == (size if self.is_there(now[1]) else 0)
            gpa = now[1] + offset
        else:
            gpa = reached.gpa
            self.check_access(gva, i, (Status.OK, gpa - offset, 0), reached.ret, now)
            self.check_host(gpa, reached.hpa, reached.ret, True)
        if self.is_there(gpa) and (isinstance(reached, int) or reached.hpa != INVALID):
            assert self.mem.read(gpa, size) == data
            self.note(gpa, size)

    def may_be_mmio(self, gva, i):
        pages = [gpa for status, gpa, _ in (outcomes[i] for outcomes in self.seen[self.pcid][gva]) if status == Status.OK]
        return any(map(self.is_known_as_mmio, pages))

    def check_fault(self, gva, now, error):
        assert isinstance(error, PageFault), error
        assert now[0] == Status.PAGE_FAULT, f"{gva:#x}: a fault, and the tables say {now}"
        assert error.error_code == now[2]
        if error.error_code & 9 == 1:
            self.flush_pages(self.pcid, self.page_of(gva))

    # ---- registers and flushes -----------------------------------------------------------------------------------------

    def load_cr3(self):
        """Another address space, or the same; under PCIDs with a flush or without."""
        if not self.paging:
            return
        root = int(self.rng.integers(len(self.roots)))
        value, noflush = self.roots[root], False
        if self.vcpu.regs.cr4 & PCIDE:
            value |= int(self.rng.integers(4))
            noflush = bool(self.rng.random() < 0.6)
        self.log[-1] += f" {value:#x} noflush {noflush}"
        try:
            self.vcpu.mov_cr(3, value | (NOFLUSH if noflush else 0))
        except GeneralProtection:
            assert self.mode == "pae"
            return
        self.root = root
        if self.mode == "pae":
            self.change()
        if noflush:
            self.used.setdefault(self.pcid, set()).add(root)
            self.changed = True
            self.remember()
        else:
            self.flush()

    def registers_change(self, change):
        """Every register that roles are made of takes all roots along: nothing of before is left."""
        try:
            change()
        except GeneralProtection:
            assert self.mode == "pae"                       # the PDPTEs are loaded again, and no good now
            return
        self.forget()

    def toggle_cr0_wp(self):
        self.registers_change(lambda: self.vcpu.mov_cr(0, self.vcpu.regs.cr0 ^ WP))

    def toggle_cr4(self):
        self.registers_change(lambda: self.vcpu.mov_cr(4, self.vcpu.regs.cr4 ^ self.pick([SMEP, SMAP])))

    def toggle_pge(self):
        self.registers_change(lambda: self.vcpu.mov_cr(4, self.vcpu.regs.cr4 ^ PGE))

    def toggle_nxe(self):
        if self.mode != "32" and self.paging:
            self.registers_change(lambda: self.vcpu.wrmsr_efer(self.vcpu.regs.efer ^ NXE))

    def toggle_pcide(self):
        if self.mode in ("4l", "5l") and self.paging and self.pcid == 0:
            self.registers_change(lambda: self.vcpu.mov_cr(4, self.vcpu.regs.cr4 ^ PCIDE))

    def toggle_paging(self):
        """Off, or on again as at first."""
        if not self.paging:
            self.root = 0
            self.registers_change(lambda: self.vcpu.set_regs(**self.registers))
        elif self.rng.random() < 0.5:
            regs = self.vcpu.regs
            self.registers_change(lambda: self.vcpu.set_regs(cr0=regs.cr0 & ~PG, cr4=regs.cr4 & ~PCIDE, efer=regs.efer & ~LMA))

    def reload_all(self):
        """The registers that it has: nothing is flushed but where PDPTEs are loaded."""
        if self.mode == "pae" and self.paging:
            self.registers_change(lambda: self.vcpu.set_regs(cr3=self.vcpu.regs.cr3))
        else:
            self.vcpu.set_regs(cr3=self.vcpu.regs.cr3)

    def toggle_guest_mode(self):
        """L2 without nested paging and back."""
        if self.nested:
            self.vcpu.leave_nested()
            self.root = self.l1_root
        else:
            try:
                self.vcpu.enter_nested(None)
            except GeneralProtection:
                assert self.mode == "pae"
                return
            self.l1_root = self.root
        self.nested = not self.nested
        self.forget()

    def toggle_smm(self):
        self.vcpu.smm = not self.vcpu.smm
        self.forget()

    def invlpg(self):
        gva = self.pick(self.gva)
        self.log[-1] += f" invlpg {gva:#x}"
        if self.rng.random() < 0.7:
            self.vcpu.invlpg(gva + int(self.rng.integers(PAGE)))
        else:
            self.vcpu.invalidate_addr(self.vcpu.gva_walk, gva, self.pick(["current", "all"]))
        self.flush_pages(self.pcid, self.page_of(gva))

    def invpcid(self):
        kind, pcid, gva = int(self.rng.integers(4)), int(self.rng.integers(4)), self.pick(self.gva)
        if not self.vcpu.regs.cr4 & PCIDE:
            pcid = 0
        self.log[-1] += f" {kind} {pcid} {gva:#x}"
        self.vcpu.invpcid(kind, pcid, gva)
        if kind == 0 and pcid in self.used:
            self.flush_pages(pcid, self.page_of(gva) if pcid == self.pcid else [gva])
        elif kind == 1:
            if pcid == self.pcid:
                self.flush()
            else:
                self.used.pop(pcid, None)
                self.seen.pop(pcid, None)
        elif kind > 1:
            self.forget()

    def limit(self):
        self.vm.set_nr_mmu_pages(self.pick([64, 64, 80, 1000]))

    def sweep(self):
        """Many pages with a table each, which nobody changes: they come to their own frame, or nowhere."""
        if self.root:
            return
        gva = np.uint64(SPREAD) + np.arange(SPREAD_PAGES, dtype=np.uint64) * np.uint64(SPREAD_STEP)
        now = self.walker(0).translate(gva, int(Access.WRITE), set_ad=False)
        r = self.vcpu.access(gva, int(Access.WRITE))
        fresh = (r.ret == RetPf.FIXED) | (r.status != 0)
        assert ((r.gpa == now.gpa) & (r.status == now.status))[fresh].all()
        for gpa in r.gpa[r.status == 0].tolist():
            self.wrote(gpa, 1)

    def zap_all(self):
        super().zap_all()
        self.forget()

    def slot_change(self):
        if self.mode == "pae" and any(
                (self.slot_of(vcpu.regs.cr3) or {}).get("gpa") == self.high_at for vcpu in self.vm.vcpus):
            return                                      # without memory at the PDPT KVM lets a guest try for ever
        super().slot_change()
        self.change()

    def invalidate(self, how):
        gpa = self.pick([0x10000, 0x12000, MB2, MB2 + PAGE, 4 * MB2, 4 * MB2 + 37 * PAGE, 6 * MB2, ROM, self.high_at, TABLES,
                         *self.frames[:8]])
        size = self.pick([PAGE, 2 * PAGE, MB2, 4 * PAGE])
        gpa &= ~(MB2 - 1) if size == MB2 else ~0
        self.log[-1] += f" {gpa:#x} {size:#x}"
        self.vm.invalidate(gpa, size, how)

    # ---- the loop ------------------------------------------------------------------------------------------------------

    OPERATIONS = (
        ("access", 40), ("many", 6), ("write_pte", 8), ("store", 12), ("grow_old", 8), ("write_guest", 3), ("flood", 1),
        ("repair", 4), ("load_cr3", 8), ("invlpg", 5), ("invpcid", 4), ("toggle_cr0_wp", 1), ("toggle_cr4", 1),
        ("toggle_pge", 1), ("toggle_nxe", 1), ("toggle_pcide", 2), ("toggle_paging", 1), ("reload_all", 1), ("toggle_smm", 1),
        ("toggle_guest_mode", 1), ("limit", 1), ("sweep", 1), ("unmap", 2), ("move", 2), ("protect", 2), ("set_backing", 1),
        ("under_invalidation", 1), ("age", 2), ("dirty_log_on", 2), ("dirty_log_off", 1), ("dirty_log_get", 4),
        ("dirty_log_clear", 3), ("write_protect", 1), ("zap_all", 1), ("recover_nx", 1), ("recover", 1),
        ("slot_change", 1), ("generations", 1))
    ALWAYS = ("access", "store", "grow_old", "invlpg", "repair")

    def choose_operations(self):
        """Every machine has operations that it does often, seldom or never: else what one builds the other always takes down."""
        names = []
        for name, weight in self.OPERATIONS:
            factor = 2 if name in self.ALWAYS else self.pick([0, 0, 0.5, 0.5, 1, 4])
            names += [name] * int(np.ceil(weight * factor))
        return tuple(names)

    def audit(self):
        return self.vm.audit(guest_tables=True)

    def step(self, audit=True):
        super().step(audit)
        self.remember()
