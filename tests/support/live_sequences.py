"""Random scenarios in the form of the recorded ones: a guest that maps, unmaps and aliases pages and its own page tables.

Six roots share tables. Every table is mapped as data by a window, so that CPL 3 can write it natively and CPL 0 by emulation.
A crowded guest has more tables than shadow pages that it may use. All randomness comes from the seed.
"""

import random

SLOT_0 = {"slot": 0, "gpa": 0, "size": 4 << 20}
SLOT_1_GPA, SLOT_1_ELSEWHERE = 0x40000000, 0x48000000
SLOT_2_GPA, SLOT_2_PAGES = 0x50003000, 5
SLOT_2_ELSEWHERE = SLOT_1_GPA + (4 << 20)               # where slot 1 ends
HOLE = 0x10000000
STUB_LINK = 0x30005027
STUB = {
    "slot": 31, "gpa": "0x30000000", "size": "0x10000", "va": "0x300000000000", "user_code_va": "0x300000001000",
    "mem": [["0x30005000", "0x30006067"], ["0x30006000", "0x30007067"], ["0x30007000", "0x30000063"],
            ["0x30007008", "0x30001067"], ["0x30007010", "0x30002063"], ["0x30007018", "0x30003063"],
            ["0x30007020", "0x30004063"]]}

ROOTS = (0x10000, 0x11000, 0x12000, 0x1d000, 0x1e000, 0x1f000)
PDPTS = (0x13000, 0x14000)
PDS = (0x15000, 0x16000)
PTS = (0x17000, 0x18000, 0x19000)
CODE_PT = 0x1a000
WINDOW_PD, WINDOW_PT = 0x1b000, 0x1c000
SLOT_1_PT = 0x3000                      # in slot 1
TABLES = (*ROOTS, *PDPTS, *PDS, *PTS, CODE_PT, WINDOW_PD, WINDOW_PT)
CROWD = tuple(range(0x200000, 0x250000, 0x1000))        # page tables of a crowded guest
CROWD_PDE = 16
DATA = tuple(range(0x100000, 0x110000, 0x1000))
CODE = DATA[-4:]                        # they keep JMP RDX at offset 0
WINDOW = 0x1000000000
UPPER_HALF = 0xFFFF960000000000
REGIONS = (0x40000000, 0x80000000)      # of the two page directories
CODE_PDE = 7
NX, RESERVED = 1 << 63, 1 << 50
NO_TABLE_BITS = 0x18                    # of CR3: they make it another root
NOT_CANONICAL = (1 << 47, 1 << 62, 0xFFFF7FFFFFFFF000)
IGNORED = (0,) * 8 + (0x100, 0xE00, 0x18, 1 << 55, 1 << 60)    # global, software bits, memory type, key

CR0, CR0_WP, CR0_PG = 0x80040033, 0x10000, 0x80000000
CR4_PAE, CR4_PGE, CR4_SMEP, CR4_SMAP, CR4_PKE = 0x20, 0x80, 0x100000, 0x200000, 0x400000
EFER, EFER_NX = 0x501, 0x800
LEAF_FLAGS = (0x67,) * 9 + (0x27, 0x07, 0x25, 0x05, 0x65, 0x63, 0x03, 0x23, 0x61)
TABLE_FLAGS = (0x07,) * 9 + (0x27, 0x67, 0x05, 0x03)
OPERATIONS = 200
UNPAGED = 8
WRITERS = ("xchg", "cmpxchg", "xadd", "rmw", "add", "sub", "or", "and", "not", "inc", "movnti", "btr")


class _Sequence:
    """A scenario under construction."""

    def __init__(self, seed, operations, paging):
        self.random = random.Random(seed)
        self.paging = paging
        pick = self.random.choice
        backing = pick(["4k", "4k", "2m", "2m", "unpopulated"])
        slot_1 = {"slot": 1, "gpa": SLOT_1_GPA, "size": 4 << 20}
        slot_1 |= {"unpopulated": True} if backing == "unpopulated" else {"backing": backing}
        if self.random.random() < 0.2 and backing != "unpopulated":
            slot_1["flags"] = 2
        slot_2 = {"slot": 2, "gpa": SLOT_2_GPA, "size": SLOT_2_PAGES << 12} | pick([{}, {}, {"flags": 2}, {"unpopulated": True}])
        self.crowded = paging and self.random.random() < 0.15
        slot_0 = dict(SLOT_0) | pick([{}, {}, {"backing": "2m"}])
        self.readonly = "flags" in slot_1
        self.cr3, self.cr0, self.cr4, self.efer = ROOTS[0], CR0 | CR0_WP, CR4_PAE, EFER | EFER_NX
        self.slot_1_at, self.slot_1_there, self.logging = SLOT_1_GPA, True, {0: 0, 1: 0}
        self.slot_2_at, self.slot_2_flags = SLOT_2_GPA, slot_2.get("flags", 0)
        self.stamp = 0
        self.ops = []
        self.scenario = {
            "format": 1, "name": f"sequence_{seed}", "slots": [slot_0, slot_1, slot_2], "stub": STUB,
            "regs": {"cr0": f"{self.cr0:#x}", "cr3": f"{self.cr3:#x}", "cr4": f"{self.cr4:#x}", "efer": f"{self.efer:#x}"},
            "mem": [[f"{gpa:#x}", f"{value:#x}"] for gpa, value in sorted(self._memory(backing != "unpopulated").items())],
            "watch": [f"{gpa:#x}" for gpa in (*TABLES, *DATA)], "ops": self.ops}
        if backing != "unpopulated":
            self.scenario["watch"].append(f"{SLOT_1_GPA + SLOT_1_PT:#x}")
        if self.random.random() < 0.3:
            self.scenario["disable_quirk_slot_zap_all"] = True
        if self.random.random() < 0.4:
            self.scenario["cpu"] = {
                "vendor": pick(["intel", "amd"]), "maxphyaddr": pick([36, 40, 48, 52])}
        if not paging:
            self.scenario |= {"mode": "nopg", "regs": {"cr0": "0x50033", "cr3": "0x0", "cr4": "0x20", "efer": "0x0"}}
            self.cr0, self.efer = CR0 & ~CR0_PG | CR0_WP, 0
        for cpl in (3, 0, 3):
            self._add("null", cpl)
        kinds, weights = zip(*self._kinds().items(), strict=True)
        while len(self.ops) < operations:
            self.random.choices(kinds, weights)[0]()
        if paging and self.random.random() < 0.3:
            self._come_to_an_end()

    def _kinds(self):
        if not self.paging:
            return {
                self._load: 20, self._store: 20, self._load_emulated: 5, self._store_emulated: 5, self._write_otherwise: 5,
                self._mov_cr3: 5, self._mov_cr0: 2, self._invlpg: 2, self._fetch: 2, self._change_slot: 5, self._log: 5,
                self._read_log: 8, self._drop_pages: 5, self._protect: 2, self._write_pte_silently: 2, self._limit_pages: 1}
        return {
            self._load: 80 if self.crowded else 24, self._store: 18,
            self._write_pte_natively: 12, self._write_pte_emulated: 9, self._write_oddly: 4,
            self._write_otherwise: 3, self._write_pte_silently: 4, self._invlpg: 7, self._mov_cr3: 5, self._mov_cr0: 2,
            self._mov_cr4: 1, self._set_efer: 1, self._set_sregs: 1, self._fetch: 5, self._load_emulated: 3,
            self._store_emulated: 2, self._change_slot: 1, self._change_small_slot: 1, self._log: 2,
            self._read_log: 2, self._drop_pages: 2,
            self._protect: 0.5, self._limit_pages: 2 if self.crowded else 0.2, self._load_oddly: 2, self._cross_pages: 3,
            self._break_rules: 0.5, self._move_mmio: 2}

    # ---- the guest's memory ------------------------------------------------------------------------------------------

    def _memory(self, slot_1):
        memory = {}

        def entry(table, index, value):
            memory[table + 8 * index] = value

        for i, root in enumerate(ROOTS):
            entry(root, 0, PDPTS[i % 3 // 2] | 7)
            entry(root, 1, root | self.random.choice((7, 7, 5, 0)))        # the tables, mapped by themselves
            entry(root, 96, STUB_LINK)
            entry(root, UPPER_HALF >> 39 & 511, PDPTS[0] | 7)
        for pdpt in PDPTS:
            entry(pdpt, 1, PDS[0] | 7)
            entry(pdpt, 2, PDS[1] | 7)
            entry(pdpt, WINDOW >> 30, WINDOW_PD | 7)
        entry(WINDOW_PD, 0, WINDOW_PT | 7)
        for table in TABLES:
            entry(WINDOW_PT, table >> 12, table | self.random.choice((7, 0x67)))
        for pd in PDS:
            for index in range(4):
                entry(pd, index, self._pde())
            entry(pd, CODE_PDE, CODE_PT | 7)
            if self.crowded:
                for index, pt in enumerate(CROWD):
                    entry(pd, CROWD_PDE + index, pt | 7)
        for pt in PTS:
            for index in range(16):
                entry(pt, index, self._pte())
        for pt in CROWD if self.crowded else ():
            for index in range(4):
                entry(pt, index, self._pte())
        for index in range(4):
            entry(CODE_PT, index, self._code_pte())
        if slot_1:
            for index in range(16):
                entry(SLOT_1_GPA + SLOT_1_PT, index, self._pte())
        for page in DATA:
            memory[page] = page << 16 | 0xE2FF
        return memory

    def _pde(self):
        kind = self.random.random()
        if kind < 0.62:
            return self.random.choice(PTS) | self.random.choice(TABLE_FLAGS) | self._nx(0.05) & ~0x100
        if kind < 0.72:
            return SLOT_1_GPA + SLOT_1_PT | 7
        if kind < 0.86:
            page = self.random.choice((SLOT_1_GPA, SLOT_1_GPA + 0x200000, SLOT_1_ELSEWHERE))
            return page | 0x80 | self.random.choice(LEAF_FLAGS) | self._nx(0.1)
        if kind < 0.9:
            return 0x80 | self.random.choice(LEAF_FLAGS)            # covers every table
        if kind < 0.92:
            return self.random.choice(PTS) | 7 | RESERVED
        if kind < 0.95:
            return self.random.choice(PDS) | 7                      # a table on two levels
        return self.random.choice((0, 0, HOLE | 7))

    def _pdpte(self):
        kind = self.random.random()
        if kind < 0.6:
            return self.random.choice(PDS) | 7
        if kind < 0.8:
            return self.random.choice((0, SLOT_1_GPA)) | 0x80 | self.random.choice(LEAF_FLAGS) | self._nx(0.1)
        return self.random.choice((*PTS, 0, 0, HOLE)) | 7

    def _pte(self):
        kind = self.random.random()
        flags = self.random.choice(LEAF_FLAGS) | self._nx(0.1)
        if kind < 0.62:
            return self.random.choice(DATA) | flags
        if kind < 0.76:
            return SLOT_1_GPA + 0x1000 * self.random.randrange(8) | flags
        if kind < 0.78:
            return SLOT_1_ELSEWHERE + 0x1000 * self.random.randrange(8) | flags
        if kind < 0.80:
            return self.random.choice((SLOT_2_GPA, SLOT_2_GPA, SLOT_2_ELSEWHERE)) + 0x1000 * self.random.randrange(
                -1, SLOT_2_PAGES + 1) | flags
        if kind < 0.87:
            return self.random.choice((*PDS, *PTS)) | flags
        if kind < 0.90:
            return HOLE + 0x1000 * self.random.randrange(2) | flags
        if kind < 0.92:
            return self.random.choice(DATA) | flags | RESERVED
        return 0

    def _code_pte(self):
        return self.random.choice((*CODE, 0)) | self.random.choice(LEAF_FLAGS) | self._nx(0.2)

    def _nx(self, probability):
        """Bits of a leaf that are no rights, and NX with a probability."""
        return self.random.choice(IGNORED) | (NX if self.random.random() < probability else 0)

    def _entry(self):
        """A table entry to write: its address, and a new value."""
        kind = self.random.random()
        if kind < 0.55:
            pt = self.random.choice((*PTS, *PTS, *PTS, SLOT_1_GPA + SLOT_1_PT))
            return pt + 8 * self.random.randrange(16), self._pte()
        if kind < 0.65:
            return CODE_PT + 8 * self.random.randrange(4), self._code_pte()
        if kind < 0.9:
            return self.random.choice(PDS) + 8 * self.random.randrange(4), self._pde()
        if kind < 0.95:
            return self.random.choice(PDPTS) + 8 * self.random.choice((1, 2)), self._pdpte()
        return self.random.choice(ROOTS), self.random.choice(PDPTS) | self.random.choice(TABLE_FLAGS)

    # ---- operations --------------------------------------------------------------------------------------------------

    def _add(self, op, cpl=None, **rest):
        self.ops.append({"op": op} | ({} if cpl is None else {"cpl": cpl}) | rest)

    def _settle(self):
        self._add("null", 3)

    def _va(self):
        if not self.paging:
            page = self.random.choice((*DATA, *TABLES, SLOT_1_GPA, SLOT_1_GPA + 0x1000, SLOT_1_ELSEWHERE, SLOT_2_GPA, HOLE))
            return page + self.random.choice((0, 8, 16))
        if self.random.random() < 0.08:
            return WINDOW + self.random.choice(TABLES) + 8 * self.random.randrange(16)
        if self.random.random() < 0.05:                             # tables by way of the root's entry for itself
            indices = (self.random.choice((0, 1, 1, 2, 64)) << shift for shift in (30, 21, 12))
            return 1 << 39 | sum(indices) | self.random.choice((0, 8))
        region = self.random.choice(REGIONS)
        if self.random.random() < 0.03:
            region |= UPPER_HALF
        if self.crowded and self.random.random() < 0.6:
            region += 0x200000 * CROWD_PDE + 0x200000 * self.random.randrange(len(CROWD) - 4)
            return region + 0x1000 * self.random.randrange(4) + self.random.choice((0, 8, 16))
        return region + 0x200000 * self.random.randrange(4) + 0x1000 * self.random.randrange(16) + self.random.choice((0, 8, 16))

    def _data_va(self):
        """Never where code is."""
        return self._va() & ~0xFFF | self.random.choice((8, 16, 0x808))

    def _value(self):
        self.stamp += 1
        return f"{0xABC000E2FF + (self.stamp << 16):#x}"

    def _window_va(self, gpa):
        """Where an entry is mapped for writing; a table in slot 1 has no window, but is reached through some PTE."""
        if not self.paging:
            return gpa
        if gpa < 4 << 20:
            return WINDOW + gpa
        return self.random.choice(REGIONS) + 0x200000 * self.random.randrange(4) + (gpa & 0xFFFF)

    def _load(self):
        self._add(self.random.choice(("load",) * 8 + ("load1", "load4")), 3, va=f"{self._va():#x}")

    def _store(self):
        op = self.random.choice(("store",) * 8 + ("store1", "store2", "store4"))
        self._add(op, 3, va=f"{self._data_va():#x}", val=self._value())

    def _write_pte_natively(self):
        gpa, value = self._entry()
        self._add("store", 3, va=f"{self._window_va(gpa):#x}", val=f"{value:#x}")

    def _write_pte_emulated(self):
        gpa, value = self._entry()
        self._add("store", 0, va=f"{self._window_va(gpa):#x}", val=f"{value:#x}")

    def _write_oddly(self):
        """Other sizes, and addresses that no entry begins at."""
        gpa, value = self._entry()
        op = self.random.choice(("store1", "store2", "store4", "store4", "store"))
        shift = self.random.choice((0, 0, 1, 2, 4, 6))
        self._add(op, self.random.choice((0, 3)), va=f"{self._window_va(gpa) + shift:#x}", val=f"{value & 0xFFFFFFFF:#x}")

    def _write_otherwise(self):
        """Instructions that read, too, and instructions that KVM does not take for writes of page tables."""
        gpa, value = self._entry()
        op = self.random.choice(WRITERS)
        if op in ("btr", "rmw", "inc", "not"):
            value = 5 if op == "btr" else 0
        if op in ("inc", "not", "add", "sub", "xadd"):
            gpa = gpa & ~0xFFF | 0x800 + 8 * self.random.randrange(16)              # where no walk goes
        self._add(op, self.random.choice((3, 3, 0)), va=f"{self._window_va(gpa):#x}", val=f"{value:#x}")

    def _write_pte_silently(self):
        gpa, value = self._entry()
        if gpa < 4 << 20 or self.slot_1_there and self.slot_1_at == SLOT_1_GPA:
            self._add("host_write", gpa=f"{gpa:#x}", val=f"{value:#x}")

    def _move_mmio(self):
        """MMIO, and then something else in its place that KVM was not told of: it may have the MMIO in mind."""
        page = self.random.randrange(16)
        va = f"{self.random.choice(REGIONS) + 0x200000 * self.random.randrange(4) + 0x1000 * page + 8:#x}"
        self._write_silently_to_all(page, HOLE | self.random.choice(LEAF_FLAGS))
        self._add("load", 3, va=va)
        for _ in range(self.random.randrange(3)):
            self.random.choice((
                self._invlpg, self._load, self._store, self._store_emulated, self._write_pte_emulated, self._mov_cr3,
                self._mov_cr4, self._set_sregs, self._change_small_slot, lambda: self._add("invlpg", 0, va=va),
                lambda: self._add("store", self.random.choice((0, 3)), va=va, val=self._value())))()
        self._write_silently_to_all(page, self._pte())
        if self.random.random() < 0.5:
            self._add("load", 0, va=va)
        else:
            self._add("store", 0, va=va, val=self._value())

    def _write_silently_to_all(self, page, value):
        for pt in PTS:
            self._add("host_write", gpa=f"{pt + 8 * page:#x}", val=f"{value:#x}")

    def _invlpg(self):
        self._add("invlpg", 0, va=f"{self._va() & ~0xFFF:#x}")

    def _mov_cr3(self):
        self.cr3 = self.random.choice((*ROOTS, *ROOTS, self.cr3, self.cr3 ^ NO_TABLE_BITS))
        self._add("cr3", 0, val=f"{self.cr3:#x}")
        self._settle()

    def _mov_cr0(self):
        self.cr0 ^= CR0_WP
        self._add("cr0", 0, val=f"{self.cr0:#x}")
        self._settle()

    def _mov_cr4(self):
        self.cr4 ^= self.random.choice((CR4_PGE, CR4_SMEP, CR4_SMAP))
        self._add("cr4", 0, val=f"{self.cr4:#x}")
        self._settle()

    def _set_efer(self):
        self.efer ^= EFER_NX
        self._add("efer", 0, val=f"{self.efer:#x}")
        self._settle()

    def _set_sregs(self):
        self.cr3 = self.random.choice(ROOTS)
        self.cr0 = CR0 | self.random.choice((0, CR0_WP, CR0_WP))
        self.cr4 = CR4_PAE | self.random.choice((0, 0, CR4_SMEP, CR4_SMAP, CR4_SMEP | CR4_SMAP))
        self.cr4 |= self.random.choice((0, 0, 0, CR4_PKE))
        self._add("set_sregs", cr0=f"{self.cr0:#x}", cr3=f"{self.cr3:#x}", cr4=f"{self.cr4:#x}")
        self._settle()

    def _fetch(self):
        va = self.random.choice(REGIONS) + 0x200000 * CODE_PDE + 0x1000 * self.random.randrange(4)
        if not self.paging:
            va = self.random.choice(CODE)
        # A KVM that emulates kernel mode may apply SMAP to fetches when SMEP is off.
        cpl = 3 if self.cr4 & CR4_SMAP else self.random.choice((3, 3, 3, 0))
        self._add("fetch", cpl, va=f"{va:#x}")

    def _load_emulated(self):
        self._add("load", 0, va=f"{self._va():#x}")

    def _store_emulated(self):
        self._add("store", 0, va=f"{self._data_va():#x}", val=self._value())

    def _change_slot(self):
        flags = {"flags": 2} if self.readonly else {}
        if not self.slot_1_there:
            self._add("slot_set", slot=1, **flags)
        elif self.random.random() < 0.5:
            self._add("slot_delete", slot=1)
        else:
            self.slot_1_at ^= SLOT_1_GPA ^ SLOT_1_ELSEWHERE
            self._add("slot_set", slot=1, gpa=f"{self.slot_1_at:#x}", **flags)
            self.logging[1] = 0
            self._settle()
            return
        self.slot_1_there = not self.slot_1_there
        self.logging[1] = 0
        self._settle()

    def _change_small_slot(self):
        """Away and back again, or to where slot 1 ends; its log goes on and off."""
        kind = self.random.random()
        if kind < 0.4:
            self._add("slot_delete", slot=2)
            self._settle()
        elif kind < 0.7:
            self.slot_2_at ^= SLOT_2_GPA ^ SLOT_2_ELSEWHERE
        else:
            self.slot_2_flags ^= 1
        self._add("slot_set", slot=2, gpa=f"{self.slot_2_at:#x}", flags=self.slot_2_flags)
        self._settle()
        if self.slot_2_flags & 1:
            self._load()
            self._add("dirty_get", slot=2)

    def _log(self):
        slot = self.random.choice((0, 1)) if self.slot_1_there else 0
        self.logging[slot] ^= 1
        self._add("slot_set", slot=slot, flags=self.logging[slot] | (2 if slot and self.readonly else 0))
        self._settle()

    def _read_log(self):
        slots = [slot for slot, on in self.logging.items() if on]
        if slots:
            self._add("dirty_get", slot=self.random.choice(slots))

    def _drop_pages(self):
        """Take pages from the guest: tables too, and huge ones and parts of them, which come back small. Code stays."""
        slot = self.random.choice((0, 0, 0, 1))
        if slot == 1 and not self.slot_1_there:
            return
        offset = self.random.choice((*range(0, 0x3000, 0x1000), 0x200000, 0x3FF000) if slot else (*DATA[:-4], *DATA[:-4], *PTS))
        size = self.random.choice((0x1000, 0x1000, 0x3000, 0x200000 if offset == 0x200000 else 0x1000))
        size = min(size, (4 << 20 if slot else CODE[0]) - offset)
        self._add("dontneed", slot=slot, off=f"{offset:#x}", len=f"{size:#x}")
        if self.random.random() < 0.4 and (slot == 0 or self.slot_1_at == SLOT_1_GPA):
            self._add("host_touch", gpa=f"{offset + (SLOT_1_GPA if slot else 0):#x}")

    def _protect(self):
        """Pages that nobody may write for some time; nobody does. To some edges the host zaps 2M around them."""
        if not self.slot_1_there:
            return
        whole = {"slot": 1, "off": "0x200000", "len": "0x200000"}
        for _ in range(self.random.randrange(1, 4)):
            if self.random.random() < 0.3:
                self._add("mprotect", **whole, prot=self.random.choice((1, 1, 3)))
            else:
                low = self.random.randrange(SLOT_1_PT // 0x1000 + 1, 1024)
                pages = self.random.choice((1, 1, 3, 1024)) if low >= 512 else self.random.choice((1, 700))
                size = min(pages, 1024 - low) << 12
                self._add("mprotect", slot=1, off=f"{low << 12:#x}", len=f"{size:#x}", prot=self.random.choice((1, 1, 3)))
            for _ in range(self.random.randrange(1, 5)):
                self._load()
        low = SLOT_1_PT + 0x1000
        self._add("mprotect", slot=1, off=f"{low:#x}", len=f"{(4 << 20) - low:#x}", prot=3)

    def _cross_pages(self):
        va = self._va() & ~0xFFF | 0x1000 - self.random.choice((1, 2, 3, 4, 7))
        cpl = self.random.choice((3, 3, 0))
        ops = ("load", "load", "store", "store", "load4", "store2", "xchg", "or", "cmpxchg")
        if cpl == 0:                    # what KVM has repeated rather than emulated may begin anew in the middle
            ops += ("add", "not")
        self._add(self.random.choice(ops), cpl, va=f"{va:#x}", val=self._value())

    def _load_oddly(self):
        """From where only the stub's tables lead, and from where nothing does."""
        va = self.random.choice((*NOT_CANONICAL, *(int(STUB["va"], 16) + 0x1000 * page + 0x800 for page in range(6))))
        self._add(self.random.choice(("load", "load", "load1", "store")), self.random.choice((0, 3)), va=f"{va:#x}", val="0x90")

    def _break_rules(self):
        """What the processor or KVM refuses."""
        self.random.choice((
            lambda: self._add("cr3", 0, val=f"{self.cr3 | 1 << 60:#x}"),
            lambda: self._add("cr4", 0, val=f"{self.cr4 | 1 << 30:#x}"),
            lambda: self._add("cr4", 0, val=f"{self.cr4 & ~CR4_PAE:#x}"), lambda: self._add("cr0", 0, val=f"{1 << 33:#x}"),
            lambda: self._add("efer", 0, val=f"{self.efer ^ 0x100:#x}"), lambda: self._add("nr_mmu_pages", n=20),
            lambda: self._add("invlpg", 0, va=f"{NOT_CANONICAL[0]:#x}")))()
        self._settle()

    def _come_to_an_end(self):
        """The guest loses its page tables, and with them the stub and its handlers: at the next entry, or when it faults."""
        nowhere, empty = 0x8000000, DATA[0]
        self.random.choice((
            lambda: self._add("set_sregs", cr3=f"{nowhere:#x}"), lambda: self._add("cr3", 0, val=f"{nowhere:#x}"),
            lambda: self._add("set_sregs", cr3=f"{empty:#x}"), lambda: self._add("cr3", 0, val=f"{empty:#x}"),
            lambda: self._add("slot_delete", slot=0)))()
        kind, cpl = self.random.choice((("null", 3), ("null", 0), ("load", 3), ("load", 0), ("store", 0)))
        self._add(kind, cpl, **({} if kind == "null" else {"va": f"{self._va() & ~0xFFF:#x}", "val": "0x90"}))

    def _limit_pages(self):
        self._add("nr_mmu_pages", n=self.random.choice((64, 64, 70, 80, 1000)))


def sequence(seed, operations=OPERATIONS):
    """A random scenario of about that many operations. Every eighth guest has paging off, and KVM emulates all that it does."""
    return _Sequence(seed, operations, paging=seed % UNPAGED != UNPAGED - 1).scenario
