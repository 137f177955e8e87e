# SPDX-License-Identifier: Apache-2.0
"""Two-stage translation in plain Python: the guest's tables of oracle.py under EPT or nested paging.

Sources are the section titles of the SDM's volume 3, chapter "VMX Support for Address Translation" ("The Extended
Page Table Mechanism (EPT)", "EPT Translation Mechanism", "EPT-Induced VM Exits", "Accessed and Dirty Flags for EPT",
"Sub-Page Write Permissions", "Convertible EPT Violations", "Virtualization-Exception Information"),
table "Exit Qualification for EPT Violations", and for AMD the APM's volume 2, section "Nested Paging" ("Nested versus
Guest Page Faults, Fault Ordering", "Guest Mode Execute Trap").  Nothing is shared with the package.

Words: a *table access* reads a guest paging-structure entry, the *final access* is to the page the guest's tables map.

Where conformance "kvm" differs from "sdm" (rows of the project's list of disagreements; D1 and D2 hold for the guest's
tables as in oracle.py):

* D1, D2: nested paging with a host in 32-bit paging reports fetches with NXE alone, and has 36-bit PSE-36 addresses.
* D10: with EPT A/D off a table access is a read that needs R, and W too only if an A or D flag of the guest is to be
  set; KVM asks for W, and reports a read and a write, for every table access.
* D15: KVM does not check the reserved bits of the PDPTEs of a host in PAE paging.
* D17: KVM loads PDPTEs by a table access, not by a plain read without linear address (EPT only).
* D18: KVM reports fault addresses without their page offset, except while the guest's paging is off.
* D19: KVM never reports the advanced information in bits 11:9 of the qualification.
* D20: KVM sets the guest's A and D after the final access has been translated, and so not if that fails.

Choices the manuals leave open, the same in both conformances:

* The nested tables' A and D are set as soon as one nested translation has succeeded, whatever comes after it.
* The guest's A and D are set root first; where that violates EPT, those above the violation stay set.
* An entry that lies where there is no memory reads as not present.
* Nested tables of n bits translate the low n bits of a guest-physical address and nothing checks the bits above, but
  for 4-level EPT: there the SDM, and not KVM, has an EPT violation, which no entry is behind (level 0, no rights).
"""

from dataclasses import dataclass

import oracle
from oracle import bits

EPT_R = 1 << 0
EPT_W = 1 << 1
EPT_X = 1 << 2
EPT_LARGE = 1 << 7
EPT_A = 1 << 8
EPT_D = 1 << 9
EPT_XU = 1 << 10
EPT_SHADOW_STACK = 1 << 60
EPT_SUB_PAGE = 1 << 61
EPT_SUPPRESS_VE = 1 << 63
EPTP_SHADOW_STACK = 1 << 7
EPT_RIGHTS = EPT_R | EPT_W | EPT_X | EPT_XU
EPTP_AD = 1 << 6
BAD_MEMORY_TYPES = (2, 3, 7)

QUAL_READ = 1 << 0
QUAL_WRITE = 1 << 1
QUAL_FETCH = 1 << 2
QUAL_LINEAR = 1 << 7
QUAL_FINAL = 1 << 8
QUAL_USER = 1 << 9
QUAL_WRITABLE = 1 << 10
QUAL_XD = 1 << 11
QUAL_SHADOW_STACK = 1 << 13
QUAL_SHADOW_STACK_PAGE = 1 << 14
SPP_MISS = 1 << 11
CR0_PE = 1

NPF_FINAL = 1 << 32
NPF_TABLE = 1 << 33


@dataclass(frozen=True)
class Ept:
    """EPTP and the controls and capabilities of EPT; `page_1g` None is what CPUID says of 1-GByte pages."""

    eptp: int
    mbec: bool = False
    execonly: bool = True
    advanced_info: bool = True
    page_2m: bool = True
    page_1g: bool | None = None
    spptp: int | None = None
    ve: int | None = None


@dataclass(frozen=True)
class Npt:
    """nCR3 and the host's CR4 and EFER, which give the format of the nested tables; `gmet`: guest mode execute trap."""

    ncr3: int
    cr4: int
    efer: int
    gmet: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one access.

    `status` is "ok", "page_fault", "non_canonical", "lass_violation", "ept_violation", "ept_misconfig", "spp_event",
    "virt_exception" or "nested_page_fault".  `gpa` is
    the end of both stages, `ngpa` the end of the guest's, `fault_gpa` the address whose nested translation failed; each
    is None where there is none.  `error_code` is that of a #PF; `exit_qualification` that of an EPT violation, or
    EXITINFO1.  `level` is the leaf's of the guest, or that of the failing entry of the stage that failed.  `refs`
    counts the entries read, `writes` are the A/D updates of both stages in order, as (host address, size, old, new).
    """

    status: str
    gpa: int | None
    ngpa: int | None
    error_code: int
    fault_gpa: int | None
    exit_qualification: int
    level: int
    refs: int
    writes: tuple


class StageFault(Exception):
    """The nested translation of `gpa` failed; ends the access."""

    def __init__(self, status, gpa, level, qualification, entry=None):
        super().__init__(status)
        self.entry = entry                  # of an EPT violation: where the walk ended, if that is an entry
        self.status = status
        self.gpa = gpa
        self.level = level
        self.qualification = qualification


class Stage:
    """What the two kinds of nested tables have in common; lives for one access."""

    def __init__(self, mem, cpu, stage, paging):
        self.mem = mem
        self.cpu = cpu
        self.stage = stage
        self.kvm = cpu.conformance == "kvm"
        self.paging = paging
        self.frame = bits(12, cpu.maxphyaddr - 1)
        self.refs = 0
        self.writes = []

    def read_entry(self, hpa, size):
        self.refs += 1
        return self.mem.read(hpa, size)

    def set_bits(self, hpa, size, mask):
        """Set A or D; memory that is read-only drops that silently."""
        old = self.mem.read(hpa, size)
        if old | mask != old and self.mem.writable(hpa):
            self.mem.write(hpa, old | mask, size)
            self.writes.append((hpa, size, old, old | mask))

    def reported(self, ngpa):
        """The fault address: all of it, in KVM without the page offset unless the guest's paging is off (row D18)."""
        return ngpa & ~0xFFF if self.kvm and self.paging else ngpa


class EptStage(Stage):
    """Section "EPT Translation Mechanism"."""

    def __init__(self, mem, cpu, stage, paging):
        super().__init__(mem, cpu, stage, paging)
        self.levels = (stage.eptp >> 3 & 7) + 1
        self.ad = bool(stage.eptp & EPTP_AD)
        self.present = EPT_RIGHTS if stage.mbec else EPT_R | EPT_W | EPT_X
        self.page_1g = cpu.gbpages if stage.page_1g is None else stage.page_1g
        self.tables = {}

    def table_access(self, ngpa):
        """"Accessed and Dirty Flags for EPT": while they are enabled, table accesses are writes; else reads (row D10)."""
        qualification = QUAL_LINEAR | QUAL_READ
        need = EPT_R
        if self.ad or self.kvm:
            qualification |= QUAL_WRITE
            need = EPT_W
        hpa, rights, leaf = self.translate(ngpa, need, self.ad, qualification)
        self.tables[ngpa] = (*rights, leaf)
        return hpa

    def table_update(self, ngpa):
        """Setting A or D in a guest entry needs W; with EPT A/D off nothing has asked for it so far (row D10)."""
        level, rights, leaf = self.tables[ngpa]
        if not rights & EPT_W:
            self.violation(ngpa, level, rights, QUAL_LINEAR | QUAL_READ | QUAL_WRITE | self.shadow_stack_page(leaf), leaf)

    def pdptes_access(self, ngpa):
        """Loading PDPTEs is a plain read without linear address; in KVM a table access (row D17)."""
        if self.kvm:
            return self.table_access(ngpa)
        return self.translate(ngpa, EPT_R, False, QUAL_READ)[0]

    def final_access(self, ngpa, access, user_page, writable, xd):
        """Mode-based execute control: fetches from user-mode addresses, by the guest's tables, need bit 10."""
        qualification = QUAL_LINEAR | QUAL_FINAL
        supervisor_shadow_stack = False
        if access.shadow_stack:
            qualification |= QUAL_SHADOW_STACK
            supervisor_shadow_stack = not access.user and bool(self.stage.eptp & EPTP_SHADOW_STACK)
        if access.write:
            qualification |= QUAL_WRITE
            need = EPT_W
        elif access.fetch:
            qualification |= QUAL_FETCH
            need = EPT_XU if self.stage.mbec and user_page else EPT_X
        else:
            qualification |= QUAL_READ
            need = EPT_R
        if self.stage.advanced_info and not self.kvm:
            if user_page:
                qualification |= QUAL_USER
            if writable:
                qualification |= QUAL_WRITABLE
            if xd:
                qualification |= QUAL_XD
        return self.translate(ngpa, need, access.write, qualification, True, supervisor_shadow_stack)[0]

    def translate(self, ngpa, need, write, qualification, final=False, supervisor_shadow_stack=False):
        """(host address, (leaf level, rights), leaf); A and D are set if EPT has them enabled."""
        if ngpa >> (9 * self.levels + 12) and not self.kvm:
            self.violation(ngpa, 0, 0, qualification, None)
        used = []
        rights = EPT_RIGHTS
        table = self.stage.eptp & self.frame
        for level in range(self.levels, 0, -1):
            shift = 9 * level + 3
            hpa = table + 8 * (ngpa >> shift & 0x1FF)
            entry = self.read_entry(hpa, 8)
            if not entry & self.present:
                self.violation(ngpa, level, 0, qualification, entry)
            leaf = level == 1 or (level <= 3 and entry & EPT_LARGE)
            if self.misconfigured(entry, level, leaf):
                raise StageFault("ept_misconfig", self.reported(ngpa), level, 0)
            rights &= entry
            used.append((hpa, entry))
            if leaf:
                break
            table = entry & self.frame
        qualification |= self.shadow_stack_page(entry)
        if supervisor_shadow_stack:
            above_writable = all(above & EPT_W for _, above in used[:-1])
            if not rights & EPT_R or not above_writable or not entry & EPT_SHADOW_STACK:
                self.violation(ngpa, level, rights, qualification, entry)
        elif not rights & need and not (final and self.sub_page_allows(ngpa, need, level, entry, rights)):
            self.violation(ngpa, level, rights, qualification, entry)
        if self.ad:
            for hpa, above in used[:-1]:
                if not above & EPT_A:
                    self.set_bits(hpa, 8, EPT_A)
            mask = EPT_A | EPT_D if write else EPT_A
            if entry & mask != mask:
                self.set_bits(used[-1][0], 8, mask)
        offset = (1 << shift) - 1
        return entry & self.frame & ~offset | ngpa & offset, (level, rights), entry

    def shadow_stack_page(self, leaf):
        """Bit 14 of the qualification is bit 60 of the leaf, while EPTP bit 7 is 1."""
        return QUAL_SHADOW_STACK_PAGE if self.stage.eptp & EPTP_SHADOW_STACK and leaf & EPT_SHADOW_STACK else 0

    def sub_page_allows(self, ngpa, need, level, leaf, rights):
        """"Sub-Page Write Permissions": a refused write to a readable 4-KByte page whose entry has bit 61."""
        if self.stage.spptp is None or need != EPT_W or level != 1 or not leaf & EPT_SUB_PAGE or not rights & EPT_R:
            return False
        table = self.stage.spptp
        for shift in (39, 30, 21):
            entry = self.mem.read(table + 8 * (ngpa >> shift & 0x1FF), 8)
            if not entry & 1:
                raise StageFault("spp_event", self.reported(ngpa), level, SPP_MISS)
            if entry & (bits(1, 11) | bits(self.cpu.maxphyaddr, 63)):
                raise StageFault("spp_event", self.reported(ngpa), level, 0)
            table = entry & bits(12, 51)
        vector = self.mem.read(table + 8 * (ngpa >> 12 & 0x1FF), 8)
        if any(vector >> odd & 1 for odd in range(1, 64, 2)):
            raise StageFault("spp_event", self.reported(ngpa), level, 0)
        return bool(vector >> 2 * (ngpa >> 7 & 31) & 1)

    def becomes_exception(self, fault, gva, cr0):
        """"Convertible EPT Violations": takes the information area, if the guest has left it free."""
        if self.stage.ve is None or fault.status != "ept_violation" or fault.entry is None or fault.entry & EPT_SUPPRESS_VE:
            return False
        if not cr0 & CR0_PE or self.mem.read(self.stage.ve + 4, 4):
            return False
        values = (48, 4), (0xFFFFFFFF, 4), (fault.qualification, 8), (gva, 8), (fault.gpa, 8), (0, 2)
        at = self.stage.ve
        for value, size in values:
            word = self.mem.read(at & ~7, 8)
            shift = 8 * (at & 7)
            self.mem.write(at & ~7, word & ~(((1 << 8 * size) - 1) << shift) | value << shift)
            at += size
        return True

    def misconfigured(self, entry, level, leaf):
        """"EPT Misconfigurations", for an entry that is present."""
        if not entry & EPT_R:
            if entry & EPT_W:
                return True
            executable = entry & EPT_X or (self.stage.mbec and entry & EPT_XU)
            if executable and not self.stage.execonly:
                return True
        if entry & bits(self.cpu.maxphyaddr, 51):
            return True
        if not leaf:
            return bool(entry & (bits(3, 7) if level >= 4 else bits(3, 6)))
        if (entry >> 3 & 7) in BAD_MEMORY_TYPES:
            return True
        if level == 2:
            return not self.stage.page_2m or bool(entry & bits(12, 20))
        if level == 3:
            return not self.page_1g or bool(entry & bits(12, 29))
        return False

    def violation(self, ngpa, level, rights, qualification, entry):
        """"Exit Qualification for EPT Violations": bits 5:3 are the rights of all levels, bit 6 is XU under MBEC."""
        qualification |= (rights & (EPT_R | EPT_W | EPT_X)) << 3
        if self.stage.mbec and rights & EPT_XU:
            qualification |= 1 << 6
        raise StageFault("ept_violation", self.reported(ngpa), level, qualification, entry)


class NptStage(Stage):
    """Section "Nested Paging": the host's paging mode, with CR0.WP = 1, and CR4.SMAP and CR4.PKE without effect."""

    def __init__(self, mem, cpu, stage, paging):
        super().__init__(mem, cpu, stage, paging)
        self.long_mode = bool(stage.efer & oracle.EFER_LMA)
        self.pae = bool(stage.cr4 & oracle.CR4_PAE)
        self.nxe = bool(stage.efer & oracle.EFER_NXE)

    def table_access(self, ngpa):
        """Table accesses are user writes."""
        return self.translate(ngpa, True, False, True, NPF_TABLE)

    def table_update(self, ngpa):
        """A table access was a write already."""

    def final_access(self, ngpa, access, user_page, writable, xd):
        """Every access is a user access; the guest mode execute trap lets CPL decide."""
        user = access.user if self.stage.gmet else True
        return self.translate(ngpa, access.write, access.fetch, user, NPF_FINAL)

    def translate(self, ngpa, write, fetch, user, where):
        code = where
        if write:
            code |= oracle.PF_WRITE
        if user:
            code |= oracle.PF_USER
        if fetch and self.reports_fetch():
            code |= oracle.PF_FETCH
        size, index_bits = (8, 9) if self.pae or self.long_mode else (4, 10)
        used = []
        rights = oracle.RW | oracle.US
        xd = 0
        level, table = self.root(ngpa, code)
        while True:
            shift = index_bits * (level - 1) + 12
            hpa = table + size * (ngpa >> shift & (1 << index_bits) - 1)
            entry = self.read_entry(hpa, size)
            if not entry & oracle.P:
                raise StageFault("nested_page_fault", self.reported(ngpa), level, code)
            large = self.maps_large_page(entry, level)
            if entry & self.reserved(level, large):
                self.fault(ngpa, level, code | oracle.PF_RESERVED)
            rights &= entry
            xd |= entry & oracle.XD
            used.append((hpa, entry))
            if large or level == 1:
                break
            table = entry & self.frame
            level -= 1
        self.check_rights(ngpa, level, code, (write, fetch, user), rights, xd)
        for hpa, above in used[:-1]:
            if not above & oracle.ACCESSED:
                self.set_bits(hpa, size, oracle.ACCESSED)
        mask = oracle.ACCESSED | oracle.DIRTY if write else oracle.ACCESSED
        if entry & mask != mask:
            self.set_bits(used[-1][0], size, mask)
        return self.page(entry, level) | ngpa & (1 << shift) - 1

    def root(self, ngpa, code):
        """(level, address) of the first table with rights; the PDPTEs of PAE paging are read from memory at nCR3.

        Their reserved bits are checked in the walk (row D15: not by KVM, which takes an address of 52 bits from them).
        """
        if self.long_mode:
            return 5 if self.stage.cr4 & oracle.CR4_LA57 else 4, self.stage.ncr3 & self.frame
        if not self.pae:
            return 2, self.stage.ncr3 & bits(12, 31)
        pdpte = self.read_entry((self.stage.ncr3 & bits(5, 31)) + 8 * (ngpa >> 30 & 3), 8)
        if not pdpte & oracle.P:
            raise StageFault("nested_page_fault", self.reported(ngpa), 3, code)
        if self.kvm:
            return 2, pdpte & bits(12, 51)
        if pdpte & (bits(1, 2) | bits(5, 8) | bits(self.cpu.maxphyaddr, 63)):
            self.fault(ngpa, 3, code | oracle.PF_RESERVED)
        return 2, pdpte & self.frame

    def maps_large_page(self, entry, level):
        if not entry & oracle.PS:
            return False
        if level == 2:
            return bool(self.long_mode or self.pae or self.stage.cr4 & oracle.CR4_PSE)
        return level == 3

    def reserved(self, level, large):
        """As in the one-stage formats of the same modes (APM, "Page Translation and Protection")."""
        if not (self.long_mode or self.pae):
            return bits(self.pse36_width() - 19, 21) if large else 0
        reserved = bits(self.cpu.maxphyaddr, 51 if self.long_mode else 62)
        if not self.nxe:
            reserved |= oracle.XD
        if level >= 4:
            return reserved | oracle.PS | (1 << 8 if self.cpu.vendor == "amd" else 0)
        if level == 3 and large:
            return reserved | (bits(13, 29) if self.cpu.gbpages else oracle.PS)
        if level == 2 and large:
            return reserved | bits(13, 20)
        return reserved

    def page(self, entry, level):
        if self.long_mode or self.pae:
            return entry & self.frame & ~bits(12, 9 * level + 2)
        if level == 1:
            return entry & bits(12, 31)
        return (entry & bits(13, self.pse36_width() - 20)) << 19 | entry & bits(22, 31)

    def pse36_width(self):
        """M of "32-Bit Paging" (row D2)."""
        if not self.cpu.pse36:
            return 32
        return 36 if self.kvm else min(40, self.cpu.maxphyaddr)

    def reports_fetch(self):
        """I/D is reported if the host has SMEP, or NXE in a mode with an XD bit (row D1: KVM, in any mode)."""
        return self.stage.cr4 & oracle.CR4_SMEP or (self.nxe and (self.pae or self.kvm))

    def check_rights(self, ngpa, level, code, access, rights, xd):
        """Without the trap U/S must be 1 throughout.  "Guest Mode Execute Trap": U/S only keeps CPL 0-2 from fetching."""
        write, fetch, user = access
        allowed = not (write and not rights & oracle.RW) and not (fetch and xd)
        if self.stage.gmet:
            allowed = allowed and not (fetch and not user and rights & oracle.US)
        else:
            allowed = allowed and rights & oracle.US
        if not allowed:
            self.fault(ngpa, level, code)

    def fault(self, ngpa, level, code):
        raise StageFault("nested_page_fault", self.reported(ngpa), level, code | oracle.PF_PRESENT)


class NestedWalk(oracle.Walk):
    """The guest's walk of oracle.py, its entries read through the nested tables."""

    def __init__(self, mem, cpu, regs, access, stage):
        super().__init__(mem, cpu, regs, access)
        self.stage = stage
        self.host = {}

    def read_table(self, gpa, size):
        hpa = self.stage.table_access(gpa)
        self.host[gpa] = hpa
        return self.stage.read_entry(hpa, size)

    def pdpte_in_memory(self, gva):
        """The exit for a table that is not mapped names the table's address, not the entry's: so the recorded answers."""
        if isinstance(self.stage, EptStage):
            raise ValueError("PAE paging under EPT needs Regs.pdptrs; see load_pdptrs_nested()")
        return self.stage.read_entry(self.stage.table_access(self.regs.cr3 & bits(5, 31)) + 8 * (gva >> 30), 8)

    def set_accessed_and_dirty(self):
        """Section "Accessed and Dirty Flags", for the guest's entries; every update is a write through the nested tables."""
        for step in self.steps:
            mask = oracle.ACCESSED
            if self.access.write and step is self.steps[-1]:
                mask |= oracle.DIRTY
            if step.entry & mask != mask:
                self.stage.table_update(step.gpa)
                self.stage.set_bits(self.host[step.gpa], step.size, mask)

    def final_access(self, ngpa):
        """With paging off every address is a user-mode address, writable and executable."""
        user_page = writable = True
        xd = False
        for step in self.steps:
            user_page = user_page and bool(step.entry & oracle.US)
            writable = writable and bool(step.entry & oracle.RW)
            xd = xd or bool(step.entry & oracle.XD)
        return self.stage.final_access(ngpa, self.access, user_page, writable, xd)


def make_stage(mem, cpu, regs, stage):
    kind = EptStage if isinstance(stage, Ept) else NptStage
    return kind(mem, cpu, stage, bool(regs.cr0 & oracle.CR0_PG))


def stage_fault(fault, ngpa, tables):
    """Result of a StageFault."""
    return Result(fault.status, None, ngpa, 0, fault.gpa, fault.qualification, fault.level, tables.refs, tuple(tables.writes))


def load_pdptrs_nested(mem, cpu, regs, stage):
    """The four PDPTEs CR3 locates, None for #GP ("PDPTE Registers"), or a Result if the nested translation fails. EPT only."""
    base = regs.cr3 & bits(5, 31)
    tables = make_stage(mem, cpu, regs, stage)
    try:
        hpa = tables.pdptes_access(base)
    except StageFault as fault:
        return stage_fault(fault, None, tables)
    reserved = bits(1, 2) | bits(5, 8) | bits(cpu.maxphyaddr, 63)
    pdptrs = tuple(mem.read(hpa + 8 * index) for index in range(4))
    return None if any(entry & oracle.P and entry & reserved for entry in pdptrs) else pdptrs


def translate_nested(
    mem, cpu, regs, stage, gva, *, write=False, fetch=False, user=False, ac=False, implicit=False, shadow_stack=False, set_ad=True
) -> Result:
    """Translate `gva` for one access through the guest's tables and `stage`, an Ept or Npt; see oracle.translate().

    `mem` is host-physical memory.  `set_ad` = False takes the A/D updates of both stages back.
    """
    access = oracle.Access(write=write, fetch=fetch, user=user and not implicit, ac=ac and not implicit,
                           shadow_stack=shadow_stack, implicit=implicit)
    gva = oracle.linear_address(regs, gva, access, cpu.conformance)
    if isinstance(gva, str):
        return Result(gva, None, None, 0, None, 0, 0, 0, ())
    tables = make_stage(mem, cpu, regs, stage)
    walk = NestedWalk(mem, cpu, regs, access, tables)
    result = both_stages(walk, tables, gva)
    if not set_ad:
        for hpa, size, old, _ in reversed(tables.writes):
            mem.write(hpa, old, size)
    return result


def both_stages(walk, tables, gva):
    """The guest's walk, its A and D and the final access, in the order of row D20."""
    ngpa = None
    try:
        ngpa = walk.physical_address(gva)
        if not tables.kvm:
            walk.set_accessed_and_dirty()
        gpa = walk.final_access(ngpa)
        if tables.kvm:
            walk.set_accessed_and_dirty()
    except StageFault as fault:
        if isinstance(tables, EptStage) and tables.becomes_exception(fault, gva, walk.regs.cr0):
            fault.status = "virt_exception"
        return stage_fault(fault, ngpa, tables)
    except oracle.Fault as fault:
        writes = tuple(tables.writes)
        return Result("page_fault", None, None, walk.error_code(fault), None, 0, fault.level, tables.refs, writes)
    level = walk.steps[-1].level if walk.steps else 0
    return Result("ok", gpa, ngpa, 0, None, 0, level, tables.refs, tuple(tables.writes))
