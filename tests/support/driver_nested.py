# SPDX-License-Identifier: Apache-2.0
"""L2 under L1's EPT or NPT, whose tables L1 and L2 change at random.

L2 runs without paging, so that its addresses are those that L1's tables translate, or with tables of its own that stay as they
are. Address spaces are roots of L1's tables here, and the model remembers for each root what it said since L1 flushed the page.
L1 runs without paging, too, and writes its tables through the tables of the host.
"""

import numpy as np
from builders import LEVELS, PageTables, flag_bits, mode_regs
from driver_shadow import ShadowDriver
from machine_driver import ACCESSES, HIGH, PAGE
from shared_tables import SPREAD, SPREAD_PAGES, SPREAD_STEP

from kvmmu import Access, CpuModel, Ept, EptViolation, Host, NestedFault, Npt, RetPf, Status, Vcpu, Vm

R, W, X, XU, PS = 1 << 0, 1 << 1, 1 << 2, 1 << 10, 1 << 7
WRITE_BACK = 6 << 3
L1_REGISTERS = {"cr0": 0x21, "cr3": 0, "cr4": 0, "efer": 0}
ADVANCED = 7 << 9                                       # of an exit qualification: from the hardware's alone
L2_TABLES, L2_FRAMES = 0xC0000000, 0x1C00000            # where L2 has its tables, and where they are in L1's memory
L2_TABLE_PAGES = 160

NESTED_CONFIGURATIONS = {
    "nested ept": (Host(tdp="ept", maxphyaddr=46), {}),
    "nested ept without ad": (Host(tdp="ept", maxphyaddr=46), {"ad": False, "mbec": True}),
    "nested ept, execute-only": (Host(tdp="ept", maxphyaddr=46, pml=True), {"execonly": True}),
    "nested ept, L2 paging": (Host(tdp="ept", maxphyaddr=46, mbec=False), {"l2": "4l"}),
    "nested ept, nx huge pages": (Host(tdp="ept", nx_huge_pages=True), {"mbec": True}),
    "nested ept, host without ad": (Host(tdp="ept", ad=False), {"ad": False}),
    "nested npt": (Host(tdp="npt", maxphyaddr=46), {}),
    "nested npt, gmet": (Host(tdp="npt", maxphyaddr=46, gmet=True), {"gmet": True}),
    "nested npt, L2 paging": (Host(tdp="npt", maxphyaddr=46), {"l2": "4l"}),
    "nested npt, five levels": (Host(tdp="npt", maxphyaddr=52), {"maxphyaddr": 52}),
}


class EptTables(PageTables):
    """EPT12 of 4 or 5 levels, built like other tables."""

    def __init__(self, mode="4l", base=0x100000):
        super().__init__(mode, base)

    def map(self, gva, gpa, flags="p w u", level=1, **more):
        bits = sum({"p": R | X | XU, "w": W, "u": 0}[flag] for flag in flags.split())
        entry = super().map(gva, gpa, "", level, raw=bits | WRITE_BACK, upper="p w u")
        for above in range(level + 1, LEVELS[self.mode] + 1):
            self.set_bits(gva, above, R | W | X | XU)
        return entry


class NestedDriver(ShadowDriver):
    """One machine with L1 and L2, and what both may see."""

    mmio_in_mind = False                # L2's pages are known by nGPA, which is no linear address

    def __init__(self, configuration, mode="4l", seed=0):
        host, options = configuration
        self.rng = np.random.default_rng(seed)
        self.host, self.mode, self.options = host, mode, options
        self.is_ept = host.tdp == "ept"
        if self.is_ept:
            self.accessed, self.dirtied = 1 << 8, 1 << 9
            self.bits = [R, W, X, XU, self.accessed, self.dirtied]
        else:
            self.accessed, self.dirtied = flag_bits("a"), flag_bits("d")
            self.bits = [flag_bits(name) for name in ("p", "w", "u", "nx", "a", "d") if mode != "32" or name != "nx"]
        self.build_tables()
        self.mem, self.high = self.make_memory()
        self.registers = dict(L1_REGISTERS)
        if "l2" in options:
            self.add_l2_tables(options["l2"])
        self.cpu = CpuModel(maxphyaddr=options.get("maxphyaddr", 40), conformance="kvm", vendor="intel" if self.is_ept else "amd")
        self.vm = Vm(self.mem, cpu=self.cpu, host=host, slot_zap_all=bool(self.rng.random() < 0.7))
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_regs(**L1_REGISTERS)
        self.stages = [self.stage(root) for root in self.roots]
        self.walkers = [Vcpu(self.mem, self.cpu, host.tdp) for _ in self.roots]
        for walker, stage in zip(self.walkers, self.stages, strict=True):
            walker.set_regs(**L1_REGISTERS)
            walker.enter_nested(stage, **self.registers)
        self.dirty, self.high_at = {}, HIGH
        self.rows = np.repeat(np.array(self.gva, np.uint64), len(ACCESSES))
        self.kinds = np.tile(np.array(ACCESSES, np.uint8), len(self.gva))
        self.log, self.steps = [], 0
        self.nested, self.root = False, 0
        self.used, self.seen, self.touched, self.now = {}, {}, {}, {}
        self.NAMES = self.choose_operations()
        self.enter()
        self.forget()

    def make_tables(self, base):
        return (EptTables if self.is_ept else PageTables)(self.mode, base=base)

    def stage(self, root):
        options = self.options
        if self.is_ept:
            eptp = root | 6 | (LEVELS[self.mode] - 1) << 3 | (1 << 6 if options.get("ad", True) else 0)
            return Ept(eptp, mbec=options.get("mbec", False), execonly=options.get("execonly", False))
        regs = mode_regs(self.mode, root)
        return Npt(root, cr4=regs["cr4"], efer=regs["efer"], gmet=options.get("gmet", False))

    def build_tables(self):
        super().build_tables()
        if self.mode == "pae":                              # KVM reads PDPTEs when it makes a root, and does not track them
            tops = {root & -PAGE for root in self.roots}
            self.entries = [gpa for gpa in self.entries if gpa & -PAGE not in tops]
            self.frames = [gpa for gpa in self.frames if gpa not in tops]
            self.windows = [gva for gva in self.windows if gva not in self.top_windows]
        if "l2" in self.options:
            self.map_l2_tables()

    def map_l2_tables(self):
        """L1 maps L2's tables in each of its own, by entries that stay: nobody flushes what lies behind L2's tables."""
        fixed = set()
        for tables in self.tables:
            for i in range(L2_TABLE_PAGES):
                gva = L2_TABLES + i * PAGE
                tables.map(gva, L2_FRAMES + i * PAGE, "p w u")
                tables.set_bits(gva, 1, self.accessed | self.dirtied)
            path = [tables.entry_gpa(L2_TABLES, level) for level in range(1, LEVELS[self.mode] + 1)]
            fixed |= {*path[1:], *range(path[0] & -PAGE, (path[0] & -PAGE) + PAGE, self.entry_size)}
            self.original |= tables.words()
        self.entries = [gpa for gpa in self.entries if gpa not in fixed]

    def add_l2_tables(self, mode):
        """L2's own tables: every page where it is."""
        tables = PageTables(mode, base=L2_TABLES)
        for gva in self.gva + [SPREAD + i * SPREAD_STEP for i in range(SPREAD_PAGES)]:
            tables.map(gva, gva, "p w u a d", upper="p w u a")
        assert max(tables.tables()) < L2_TABLES + L2_TABLE_PAGES * PAGE
        for gpa, value in tables.words().items():
            self.mem.write_u64(gpa - L2_TABLES + L2_FRAMES, value)
        self.registers = tables.regs()

    # ---- what L1 and L2 may see ------------------------------------------------------------------------------------------

    @property
    def paging(self):
        return self.nested

    @property
    def pcid(self):
        """Whose translations these are."""
        return self.root if self.nested else "L1"

    def outcomes(self, root=None):
        return super().outcomes(self.pcid if root is None else root)

    def visible(self, root):
        return (self.outcomes(root),)

    def translate_all(self, root):
        if root == "L1":
            return {gva: ((int(Status.OK), gva, 0),) * len(ACCESSES) for gva in self.gva}
        t = self.walkers[root].gva_walk.translate(self.rows, self.kinds, set_ad=False)
        columns = [(status, gpa, 0) for status, gpa in zip(t.status.tolist(), t.gpa.tolist(), strict=True)]
        n = len(ACCESSES)
        return {gva: tuple(columns[i * n:(i + 1) * n]) for i, gva in enumerate(self.gva)}

    def forget(self):
        self.used, self.touched, self.seen = {self.pcid: {self.pcid}}, {}, {}
        self.change()
        self.remember()

    def check_access(self, gva, i, got, ret, now=None):
        if "l2" in self.options and ret == RetPf.FIXED:
            ret = RetPf.SPURIOUS                            # the walk of now may have been that of one of L2's tables
        super().check_access(gva, i, (got[0], got[1], 0), ret, now)

    def check_ad(self, gva, access, walked):
        if self.is_ept and not self.stages[self.root].ad:
            return
        record = self.walkers[self.root].gva_walk.walk_record(gva, int(access))
        for step in record.final.steps:
            if step.level == 3 and self.mode == "pae":
                continue
            slot = self.slot_of(step.gpa)
            leaf = step is record.final.steps[-1]
            if slot is None or slot["readonly"] or not (walked or (leaf and step.gpa not in self.touched.get(self.pcid, ()))):
                continue
            entry = self.read_entry(step.gpa)
            assert entry & self.accessed, f"{gva:#x}: A is clear in {entry:#x} at {step.gpa:#x}, level {step.level}"
            if leaf and access & Access.WRITE:
                assert entry & self.dirtied, f"{gva:#x}: D is clear in {entry:#x} at {step.gpa:#x}"

    def check_fault(self, gva, now, error):
        """The exit to L1 is the one that KVM's walk of both stages finds."""
        assert isinstance(error, NestedFault), error
        assert now[0] not in (Status.OK, Status.PAGE_FAULT), f"{gva:#x}: {error!r}, and the tables say {now}"
        try:
            self.walkers[self.root].gva_walk.gva_to_gpa(error.address, error.access)
        except NestedFault as want:
            got = [(type(fault), fault.fault_gpa & -PAGE, fault.exit_qualification & ~ADVANCED) for fault in (error, want)]
            assert got[0] == got[1], f"{gva:#x}: {got}"
        else:
            raise AssertionError(f"{gva:#x}: {error!r}, and there is no fault")
        if isinstance(error, EptViolation) and error.exit_qualification >> 3 & 7:       # what denied it is remembered no more
            self.flush_pages(self.root, [error.fault_gpa & -PAGE] if error.fault_gpa & -PAGE in self.gva else [])

    # ---- operations ------------------------------------------------------------------------------------------------------

    def enter(self):
        """L2 runs, under one of the roots; or goes on under another."""
        self.root = int(self.rng.integers(len(self.roots)))
        if self.log:
            self.log[-1] += f" root {self.roots[self.root]:#x}"
        self.vcpu.enter_nested(self.stages[self.root], **self.registers)
        self.nested = True
        self.used.setdefault(self.root, {self.root})
        self.changed = True
        self.remember()

    def load_cr3(self):
        """Another root, and all pages flushed one by one."""
        self.enter()
        self.flush_all()

    def flush_all(self):
        if self.nested:
            for gva in self.gva:
                self.vcpu.invalidate_addr(self.vcpu.ngpa_walk, gva, "all")
            for root in self.used:
                if root != "L1":
                    self.flush_pages(root, self.gva)

    def leave(self):
        """L1 runs."""
        self.vcpu.leave_nested()
        self.nested = False
        self.used.setdefault("L1", {"L1"})
        self.changed = True
        self.remember()

    def leaf_entry(self, gva):
        if not self.nested:
            return None
        record = self.walkers[self.root].gva_walk.walk_record(gva, 0)
        return record.final.steps[-1].gpa if record.final is not None and record.final.steps else None

    def write_entry(self, gpa):
        if self.nested and self.rng.random() < 0.5:
            super().write_entry(gpa)
        else:
            self.l1_store(gpa)

    def l1_store(self, gpa=None):
        """L1 writes an entry of its tables by itself."""
        gpa = self.pick(self.entries) if gpa is None else gpa
        if not self.is_there(gpa):
            return
        was = self.nested
        if was:
            self.leave()
        value = self.new_value(gpa)
        self.log[-1] += f" {gpa:#x} = {value:#x}"
        r = self.vcpu.store(gpa, value.to_bytes(self.entry_size, "little"))
        assert r.gpa == gpa
        self.check_host(gpa, r.hpa, r.ret, True)
        assert self.read_entry(gpa) == value
        self.note(gpa, self.entry_size)
        if was:
            self.vcpu.enter_nested(self.stages[self.root], **self.registers)
            self.nested = True
            self.remember()

    def invlpg(self):
        """L1 flushes an address of L2's, under the present root or under all."""
        gva = self.pick(self.gva)
        if not self.nested:
            return
        roots = self.pick(["current", "all"])
        self.log[-1] += f" flush {gva:#x} {roots}"
        self.vcpu.invalidate_addr(self.vcpu.ngpa_walk, gva, roots)
        for root in [self.root] if roots == "current" else [root for root in self.used if root != "L1"]:
            self.flush_pages(root, [gva])

    def sweep(self):
        if self.root or not self.nested:
            return
        gva = np.uint64(SPREAD) + np.arange(SPREAD_PAGES, dtype=np.uint64) * np.uint64(SPREAD_STEP)
        now = self.walkers[0].gva_walk.translate(gva, int(Access.WRITE), set_ad=False)
        r = self.vcpu.access(gva, int(Access.WRITE))
        fresh = (r.ret == RetPf.FIXED) | (r.status != 0)
        assert ((r.gpa == now.gpa) & (r.status == now.status))[fresh].all()
        for gpa in r.gpa[r.status == 0].tolist():
            self.wrote(gpa, 1)

    OPERATIONS = (
        ("access", 40), ("many", 6), ("write_pte", 6), ("store", 8), ("grow_old", 12), ("l1_store", 4), ("write_guest", 3),
        ("flood", 1), ("repair", 8), ("enter", 8), ("flush_all", 2), ("leave", 2), ("invlpg", 6), ("limit", 1), ("sweep", 1),
        ("unmap", 2), ("move", 2), ("protect", 2), ("set_backing", 1), ("under_invalidation", 1), ("age", 2),
        ("dirty_log_on", 2), ("dirty_log_off", 1), ("dirty_log_get", 4), ("dirty_log_clear", 3), ("write_protect", 1),
        ("zap_all", 1), ("recover_nx", 1), ("recover", 1), ("split", 1), ("slot_change", 1), ("generations", 1))
    ALWAYS = ("access", "grow_old", "invlpg", "repair", "enter")
