# SPDX-License-Identifier: Apache-2.0
"""Guests for tests of the shadow MMU: under shadow paging, and L2 under tables of L1's, with handles on both kinds of tables."""

import numpy as np
from builders import PageTables, sign_extend

from kvmmu import CpuModel, CpuRole, Ept, GuestMemory, Host, Npt, Tracepoints, Vm

PAGE, MB2, MB4, GB1 = 0x1000, 0x200000, 0x400000, 0x40000000
SIZE = 16 * MB2
TABLES = 14 * MB2                   # where guest tables lie
STAGE = 12 * MB2                    # and those of L1's second stage
ALIAS = 0x7000_0000                 # linear addresses at which a guest reaches its own tables
ALIASED = 32                        # pages of them
INVALID = 2**64 - 1
GVA, DATA, OTHER = GB1 + PAGE, 0x3000, 0x5000       # an address, a page for it, and another one
SHADOW = Host(tdp=None, maxphyaddr=48)
P, W, U, A, D, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 63
RSVD, F = 8, 16
LEAF = "p w u a d"                  # of an entry that KVM maps at once for whatever it allows
MAP = (GVA, DATA, LEAF)
MMU_PRESENT, HOST_WRITABLE, MMU_WRITABLE = 1 << 11, 1 << 9, 1 << 10     # of legacy SPTEs
EMPTY = 1 << 63                     # an SPTE that is nothing
EPT_R, EPT_W, EPT_X, EPT_XU, EPT_WB, EPT_A, EPT_D = 1, 2, 4, 1 << 10, 6 << 3, 1 << 8, 1 << 9


def rights(spte):
    """r, w, u and x of a legacy SPTE."""
    return "".join(letter if flag else "-" for letter, flag in (
        ("r", spte & P), ("w", spte & W), ("u", spte & U), ("x", not spte & NX)))


def group(n=8, flags=LEAF, first=GVA - PAGE):
    """Mappings of a group of neighbours, which lie apart in guest memory."""
    return [(first + i * PAGE, DATA + 2 * i * PAGE, flags) for i in range(n)]


def touch(vcpu, *gvas, access=0):
    """Accesses of addresses as rows: faults are data."""
    return vcpu.access(np.array(gvas, np.uint64), int(access))


def outcome(vcpu, gva, access=0):
    """(status, gpa, error_code) of one access."""
    r = touch(vcpu, gva, access=access)
    return int(r.status[0]), int(r.gpa[0]), int(r.error_code[0])


MADE = []                           # the machines of these guests, for the audit after each test


def shadow_pages(vm):
    """All pages as dicts: sp, gfn, role, level, direct, special, unsync, root_count, and entries, those that are not empty, by
    index: (spte, and of a leaf that shadows a guest's entry its gfn)."""
    pages, rows = vm.sptes(), []
    for row, role in enumerate(pages["role"].tolist()):
        sptes, known = pages["sptes"][row].tolist(), pages["translations"][row].tolist()
        rows.append({name: int(pages[name][row]) for name in ("sp", "gfn", "root_count", "unsync", "special")} | {
            "role": role, "level": role & 15, "direct": CpuRole(role).direct,
            "entries": {i: (spte, known[i] >> 12) for i, spte in enumerate(sptes) if spte != EMPTY}})
    return rows


class Sp:
    """A page of SPTEs as `Vm.sptes()` shows it."""

    def __init__(self, pages, row):
        self.number, self.gfn, self.root_count = (int(pages[name][row]) for name in ("sp", "gfn", "root_count"))
        self.unsync, self.special = bool(pages["unsync"][row]), bool(pages["special"][row])
        self.word = int(pages["role"][row])
        self.role = CpuRole(self.word)
        self.sptes = pages["sptes"][row].tolist()

    def __repr__(self):
        return f"<Sp {self.number} gfn {self.gfn:#x} {self.role!r}{' unsync' if self.unsync else ''}>"


class Machine:
    """What both kinds of guests have."""

    vm, vcpu = None, None

    def load(self, tables):
        """Put tables of the builders into memory; entries that are there already stay."""
        for gpa, page in zip(*tables.pages(), strict=True):
            self.vm.mem.write(int(gpa), page.tobytes())

    def sps(self, gfn=None, **role):
        """The pages of SPTEs of a frame, special ones excepted, whose roles have these values."""
        pages = self.vm.sptes()
        found = [Sp(pages, row) for row in range(len(pages["sp"]))]
        return [sp for sp in found if not sp.special and (gfn is None or sp.gfn == gfn)
                and all(getattr(sp.role, name) == value for name, value in role.items())]

    def sp(self, gfn, **role):
        """The one page of a frame with such a role."""
        sp, = self.sps(gfn, **role)
        return sp

    def path(self, addr):
        """[(level, SPTE)] of an address from the present root down to what is not a table."""
        pages = self.vm.sptes()
        row_of = {sp: row for row, sp in enumerate(pages["sp"].tolist())}
        hpa, steps = self.vcpu.mmu.root_hpa, []
        while hpa is not None:
            row = row_of[(hpa - self.vm.kvm.arena_hpa) >> 12]
            level = int(pages["role"][row]) & 15
            spte = int(pages["sptes"][row][addr >> 12 + 9 * (level - 1) & 511])
            steps.append((level, spte))
            if not spte & MMU_PRESENT or level == 1 or spte >> 7 & 1:
                return steps
            hpa = spte & 0xFFFFFFFFFF000
        return steps

    def spte(self, addr):
        """(level, SPTE) at the end of the way to an address."""
        return self.path(addr)[-1]

    def during(self, names, call):
        """The events of tracepoints (names, space between them) that a call causes."""
        self.vm.trace = Tracepoints(*names.split())
        call()
        events = self.vm.trace.events()
        self.vm.trace = None
        return events

    def changes(self, call):
        """{counter: change} of what a call does, without those that do not change."""
        before = self.vm.stats
        call()
        after = self.vm.stats
        return {name: after[name] - before[name] for name in after if after[name] != before[name]}


class ShadowGuest(Machine):
    """A guest under shadow paging, that reaches its tables at ALIAS (gva_of)."""

    def __init__(self, *maps, mode="4l", host=SHADOW, cpu=None, backing="4k", regs=(), load=True, **vm):
        self.mode = mode
        self.vm = Vm(GuestMemory(SIZE), cpu=CpuModel(maxphyaddr=46) if cpu is None else cpu, host=host, backing=backing, **vm)
        MADE.append(self.vm)
        self.tables = PageTables(mode, base=TABLES)
        for one in maps:
            self.tables.map(*one)
        for page in range(ALIASED):
            self.tables.map(ALIAS + page * PAGE, TABLES + page * PAGE, "p w a d", upper="p w u a")
        self.load(self.tables)
        self.vcpu = self.vm.create_vcpu()
        if load:
            self.vcpu.set_regs(**self.tables.regs() | dict(regs))

    def touch(self, *gvas, access=0):
        return touch(self.vcpu, *gvas, access=access)

    def outcome(self, gva, access=0):
        return outcome(self.vcpu, gva, access)

    def pte(self, gva, level=1):
        """Guest-physical address of the guest's entry."""
        return self.tables.entry_gpa(gva, level)

    def read_pte(self, gva, level=1):
        size = self.tables.entry_size
        return int.from_bytes(self.vm.mem.read(self.pte(gva, level), size), "little")

    def gva_of(self, gpa):
        """The linear address at which the guest reaches its own tables."""
        return ALIAS + gpa - TABLES

    def entry(self, value):
        """An entry's bytes."""
        return value.to_bytes(self.tables.entry_size, "little")

    def write_pte(self, gva, value, level=1):
        """The guest writes its own entry: natively, at CPL 0."""
        return self.vcpu.store(self.gva_of(self.pte(gva, level)), self.entry(value))

    def emulated_write_pte(self, gva, value, level=1):
        """The same by an instruction that KVM emulates."""
        return self.vcpu.write_guest(self.gva_of(self.pte(gva, level)), self.entry(value))

    def host_write_pte(self, gva, value, level=1):
        """The VMM writes it; KVM is not told."""
        self.vm.host_write(self.pte(gva, level), self.entry(value))

    def canonical(self, gva):
        return sign_extend(gva, self.mode)


class NestedGuest(Machine):
    """L1 with an identity of large pages, and L2 with tables of its own, under a second stage of L1's.

    The second stage maps the first 4M and L2's tables to themselves, with 4K pages; `stage_maps` come on top.
    """

    def __init__(self, *maps, kind="ept", stage_maps=(), host=None, cpu=None, mode="4l", ad=True, enter=True, stage_mode="4l",
                 leaf=None, **stage):
        self.kind = kind
        host = Host(tdp=kind, maxphyaddr=48) if host is None else host
        cpu = CpuModel(maxphyaddr=46, vendor="intel" if kind == "ept" else "amd") if cpu is None else cpu
        self.vm = Vm(GuestMemory(SIZE), cpu=cpu, host=host, backing="4k")
        MADE.append(self.vm)
        self.vcpu = self.vm.create_vcpu()
        self.l1 = PageTables("4l", base=SIZE - 8 * PAGE)
        for gpa in range(0, SIZE, MB2):
            self.l1.map(gpa, gpa, "p w a d", level=2, upper="p w a")
        self.tables = PageTables(mode, base=TABLES)
        for one in maps:
            self.tables.map(*one)
        self.stage = PageTables(stage_mode, base=STAGE)
        self.stage_leaf = (EPT_R | EPT_W | EPT_X | EPT_XU | EPT_WB | (EPT_A | EPT_D if ad else 0) if kind == "ept"
                           else P | W | U | A | D) if leaf is None else leaf
        for gpa in [*range(0, 2 * MB2, PAGE), *range(TABLES, TABLES + ALIASED * PAGE, PAGE)]:
            self.map_stage(gpa, gpa)
        for one in stage_maps:
            self.map_stage(*one)
        for tables in (self.l1, self.tables, self.stage):
            self.load(tables)
        self.options = stage
        self.eptp = self.stage.cr3 | 6 | (4 if stage_mode == "5l" else 3) << 3 | (0x40 if ad else 0)
        self.vcpu.set_regs(**self.l1.regs())
        if enter:
            self.enter()

    def map_stage(self, ngpa, gpa, raw=None, level=1):
        """L1 maps nGPA to GPA in its tables, with these low bits."""
        self.stage.map(ngpa, gpa, "", level=level, raw=self.stage_leaf if raw is None else raw,
                       upper="p w u" if self.kind == "ept" else "p w u a")

    def enter(self, stage=None, **regs):
        """Run L2."""
        if stage is None:
            stage = Ept(self.eptp, **self.options) if self.kind == "ept" else Npt(self.stage.cr3, **self.options)
        self.vcpu.enter_nested(stage, **self.tables.regs() | regs)

    def touch(self, *gvas, access=0):
        return touch(self.vcpu, *gvas, access=access)

    def outcome(self, gva, access=0):
        return outcome(self.vcpu, gva, access)

    def stage_pte(self, ngpa, level=1):
        """Guest-physical address of L1's entry."""
        return self.stage.entry_gpa(ngpa, level)

    def l1_writes(self, gpa, value, size=8):
        """L1 writes its memory, natively; L2 runs on afterwards."""
        regs, stage = self.vcpu.regs, self.vcpu.gva_walk.second.stage
        self.vcpu.leave_nested()
        result = self.vcpu.store(gpa, value.to_bytes(size, "little"))
        self.vcpu.enter_nested(stage, cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer)
        return result
