# SPDX-License-Identifier: Apache-2.0
"""An x86 MMU in plain Python, written from the manuals: the judge the package is compared with.

Sources are the section titles of the SDM's volume 3, chapter "Paging" ("32-Bit Paging", "PAE Paging", "4-Level Paging
and 5-Level Paging", "Access Rights", "Page-Fault Exceptions", "Accessed and Dirty Flags", "Protection Keys",
"Linear-Address Pre-Processing", "Shadow Stacks") and, for AMD, the APM's volume 2 chapter "Page Translation and
Protection", with "Upper Address Ignore" and "Secure Memory Encryption".  Nothing is shared with the package: every constant
is defined here and every rule is spelled out as a branch.

Two conformances exist.  "sdm" is the manuals' answer.  "kvm" is what KVM's software walker answers; in one-stage
translation it differs in the I/D bit of the error code (row D1 of the project's list of disagreements), in the width
of PSE-36 addresses (row D2), in that its addresses have no tags, and in that it knows no shadow-stack accesses.

Choices the manuals leave open, the same in both conformances:

* A and D are written once, after the whole access has succeeded.
* An entry that lies where there is no memory reads as not present; loading PDPTEs from there is a #GP.
* An A/D update of an entry in read-only memory is dropped silently and the access succeeds.
"""

from dataclasses import dataclass
from functools import cache

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
CR4_PKE = 1 << 22
CR4_PKS = 1 << 24
CR4_LASS = 1 << 27
CR4_LAM_SUP = 1 << 28
CR3_LAM_U57 = 1 << 61
CR3_LAM_U48 = 1 << 62
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
EFER_UAIE = 1 << 20

P = 1 << 0
RW = 1 << 1
US = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
PS = 1 << 7
XD = 1 << 63

PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4
PF_PKEY = 1 << 5
PF_SHADOW_STACK = 1 << 6


@cache
def bits(low, high):
    """Mask of the bits low to high, both included; empty if high < low."""
    return ((1 << (high + 1)) - 1) & ~((1 << low) - 1) if high >= low else 0


def inside(ranges, gpa):
    """Whether one of the half-open ranges holds `gpa`."""
    for start, end in ranges:       # noqa: SIM110  (a generator takes three times as long)
        if start <= gpa < end:
            return True
    return False


class Memory:
    """Sparse physical memory: 8-byte words by 8-aligned address, little endian, everything else zero.

    `readonly` and `holes` are lists of half-open ranges (start, end); addresses from `size` on are a hole as well.
    Holes read as zero.  Writes to read-only memory or holes are dropped.
    """

    def __init__(self, words=None, readonly=(), holes=None, size=None):
        self.words = {} if words is None else words
        self.readonly = list(readonly)
        self.holes = list(holes or ())
        self.size = size

    def exists(self, gpa):
        if self.size is not None and gpa >= self.size:
            return False
        return not inside(self.holes, gpa)

    def writable(self, gpa):
        return self.exists(gpa) and not inside(self.readonly, gpa)

    def read(self, gpa, size=8):
        if not self.exists(gpa):
            return 0
        word = self.words.get(gpa & ~7, 0)
        if size == 8:
            return word
        return (word >> 32 if gpa & 4 else word) & 0xFFFFFFFF

    def write(self, gpa, value, size=8):
        if not self.writable(gpa):
            return
        aligned = gpa & ~7
        if size == 8:
            self.words[aligned] = value
        elif gpa & 4:
            self.words[aligned] = (self.words.get(aligned, 0) & 0xFFFFFFFF) | value << 32
        else:
            self.words[aligned] = (self.words.get(aligned, 0) & ~0xFFFFFFFF) | value


@dataclass(frozen=True)
class Cpu:
    """What CPUID says; `conformance` is "sdm" or "kvm"."""

    vendor: str = "intel"
    maxphyaddr: int = 40
    gbpages: bool = True
    pse36: bool = True
    conformance: str = "sdm"
    c_bit: int | None = None

    @property
    def encryption(self):
        """The encryption bit, which is no address bit and not reserved."""
        return 0 if self.c_bit is None else 1 << self.c_bit


@dataclass(frozen=True)
class Regs:
    """The registers paging looks at; `pdptrs` are the four PDPTE registers of PAE paging.

    None: there are no such registers, as under nested paging of SVM.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int = 0
    pdptrs: tuple | None = None
    pkrs: int = 0


@dataclass(frozen=True)
class Result:
    """Outcome of one access.

    `level` is the leaf's level, or the failing entry's, or 0 if no entry was involved.  `rule` names why an access
    faulted; where several access rights forbid it, the first of user, write, nx, smep, smap, pkey; a shadow-stack access
    is forbidden by user, where a user accesses a supervisor's shadow stack, or shadow-stack.  `writes` are the
    A/D updates as (gpa, size, old, new), root first.
    """

    status: str
    gpa: int | None
    error_code: int
    level: int
    rule: str | None
    writes: tuple


@dataclass(frozen=True)
class Access:
    """One access to a linear address ("Access Rights", "Determination of Access Mode")."""

    write: bool
    fetch: bool
    user: bool
    ac: bool
    shadow_stack: bool = False
    implicit: bool = False


@dataclass(frozen=True)
class Step:
    """An entry a walk used: where it lies, its size in bytes and its value."""

    gpa: int
    size: int
    entry: int
    level: int


class Fault(Exception):
    """Ends a walk; `bits` are the P, RSVD and PK bits of the error code."""

    def __init__(self, level, rule, bits):
        super().__init__(rule)
        self.level = level
        self.rule = rule
        self.bits = bits


def load_pdptrs(mem, cpu, regs):
    """The four PDPTEs CR3 locates, or None for #GP ("PAE Paging", "PDPTE Registers").

    A present PDPTE must have bits 2:1, 8:5 and 63:MAXPHYADDR clear; all four are checked.
    """
    base = regs.cr3 & bits(5, 31)
    reserved = (bits(1, 2) | bits(5, 8) | bits(cpu.maxphyaddr, 63)) & ~cpu.encryption
    pdptrs = []
    for index in range(4):
        gpa = base + 8 * index
        if not mem.exists(gpa):
            return None
        entry = mem.read(gpa, 8)
        if entry & P and entry & reserved:
            return None
        pdptrs.append(entry)
    return tuple(pdptrs)


class Walk:
    """The translation of one linear address for one access."""

    def __init__(self, mem, cpu, regs, access):
        self.mem = mem
        self.cpu = cpu
        self.regs = regs
        self.access = access
        self.steps = []
        self.frame = bits(12, cpu.maxphyaddr - 1) & ~cpu.encryption

    def read_table(self, gpa, size):
        """Every read of a paging-structure entry comes through here."""
        return self.mem.read(gpa, size)

    # Walks by paging mode.  Each returns the physical address or raises Fault.

    def physical_address(self, gva):
        """`gva`, canonical and of its mode's width, in the mode in force ("Paging Modes and Control Bits")."""
        if not self.regs.cr0 & CR0_PG:
            return self.paging_off(gva)
        if self.regs.efer & EFER_LMA:
            return self.five_level(gva) if self.regs.cr4 & CR4_LA57 else self.four_level(gva)
        if self.regs.cr4 & CR4_PAE:
            return self.pae(gva)
        return self.two_level(gva)

    def paging_off(self, gva):
        """CR0.PG = 0: linear addresses are physical addresses ("Paging Modes and Control Bits")."""
        return gva

    def two_level(self, gva):
        """Section "32-Bit Paging": 4-byte entries, 4-KByte pages and, with CR4.PSE, 4-MByte pages."""
        pde = self.step((self.regs.cr3 & bits(12, 31)) + 4 * (gva >> 22), 4, 2)
        self.require_present(pde)
        if pde.entry & PS and self.regs.cr4 & CR4_PSE:
            self.require_clear(pde, self.reserved_in_4m_page())
            self.check_rights()
            return self.address_of_4m_page(pde.entry) | gva & bits(0, 21)
        pte = self.step((pde.entry & bits(12, 31)) + 4 * (gva >> 12 & 0x3FF), 4, 1)
        self.require_present(pte)
        self.check_rights()
        return pte.entry & bits(12, 31) | gva & 0xFFF

    def pae(self, gva):
        """Section "PAE Paging": PDPTE registers without rights, then 8-byte PDEs and PTEs, 2-MByte pages."""
        pdpte = self.pdpte_in_memory(gva) if self.regs.pdptrs is None else self.regs.pdptrs[gva >> 30]
        if not pdpte & P:
            raise Fault(3, "not-present", 0)
        reserved = (bits(1, 2) | bits(5, 8) | bits(self.cpu.maxphyaddr, 63)) & ~self.cpu.encryption
        if self.regs.pdptrs is None and pdpte & reserved:
            raise Fault(3, "reserved", PF_PRESENT | PF_RESERVED)
        frame = self.frame
        reserved = bits(self.cpu.maxphyaddr, 62) & ~self.cpu.encryption
        if not self.regs.efer & EFER_NXE:
            reserved |= XD
        pde = self.step((pdpte & frame) + 8 * (gva >> 21 & 0x1FF), 8, 2)
        self.require_present(pde)
        if pde.entry & PS:
            self.require_clear(pde, reserved | bits(13, 20))
            self.check_rights()
            return pde.entry & frame & ~bits(12, 20) | gva & bits(0, 20)
        self.require_clear(pde, reserved)
        pte = self.step((pde.entry & frame) + 8 * (gva >> 12 & 0x1FF), 8, 1)
        self.require_present(pte)
        self.require_clear(pte, reserved)
        self.check_rights()
        return pte.entry & frame | gva & 0xFFF

    def pdpte_in_memory(self, gva):
        """APM, "Nested Paging", on guests in legacy PAE mode: the walk reads the PDPTE, and checks it."""
        return self.read_table((self.regs.cr3 & bits(5, 31)) + 8 * (gva >> 30), 8)

    def four_level(self, gva):
        """Section "4-Level Paging and 5-Level Paging": from the PML4 table CR3 locates."""
        return self.from_pml4(self.regs.cr3 & self.frame, gva)

    def five_level(self, gva):
        """Section "4-Level Paging and 5-Level Paging": a PML5 table above the PML4 tables."""
        frame = self.frame
        pml5e = self.step((self.regs.cr3 & frame) + 8 * (gva >> 48 & 0x1FF), 8, 5)
        self.require_present(pml5e)
        self.require_clear(pml5e, self.reserved_above_pdpte())
        return self.from_pml4(pml5e.entry & frame, gva)

    def from_pml4(self, table, gva):
        frame = self.frame
        reserved = self.reserved_in_long_mode()

        pml4e = self.step(table + 8 * (gva >> 39 & 0x1FF), 8, 4)
        self.require_present(pml4e)
        self.require_clear(pml4e, self.reserved_above_pdpte())

        pdpte = self.step((pml4e.entry & frame) + 8 * (gva >> 30 & 0x1FF), 8, 3)
        self.require_present(pdpte)
        if pdpte.entry & PS:
            if self.cpu.gbpages:
                self.require_clear(pdpte, reserved | bits(13, 29))
            else:
                self.require_clear(pdpte, reserved | PS)
            self.check_rights(key=pdpte.entry >> 59 & 15)
            return pdpte.entry & frame & ~bits(12, 29) | gva & bits(0, 29)
        self.require_clear(pdpte, reserved)

        pde = self.step((pdpte.entry & frame) + 8 * (gva >> 21 & 0x1FF), 8, 2)
        self.require_present(pde)
        if pde.entry & PS:
            self.require_clear(pde, reserved | bits(13, 20))
            self.check_rights(key=pde.entry >> 59 & 15)
            return pde.entry & frame & ~bits(12, 20) | gva & bits(0, 20)
        self.require_clear(pde, reserved)

        pte = self.step((pde.entry & frame) + 8 * (gva >> 12 & 0x1FF), 8, 1)
        self.require_present(pte)
        self.require_clear(pte, reserved)
        self.check_rights(key=pte.entry >> 59 & 15)
        return pte.entry & frame | gva & 0xFFF

    # Reserved bits.

    def reserved_in_long_mode(self):
        """Bits 51:MAXPHYADDR of every entry, and XD while IA32_EFER.NXE = 0; bits 62:52 are ignored or the key."""
        reserved = bits(self.cpu.maxphyaddr, 51) & ~self.cpu.encryption
        if not self.regs.efer & EFER_NXE:
            reserved |= XD
        return reserved

    def reserved_above_pdpte(self):
        """PML4E and PML5E: PS must be 0; AMD (APM, "4-Kbyte Page Translation") also wants bit 8 to be 0."""
        reserved = self.reserved_in_long_mode() | PS
        if self.cpu.vendor == "amd":
            reserved |= 1 << 8
        return reserved

    def pse36_width(self):
        """M of "32-Bit Paging": a 4-MByte page's address has M bits, those from 32 up in the PDE's bits from 13 up.

        Without PSE-36 M is 32; else the smaller of 40 and MAXPHYADDR.  KVM has 36 whatever MAXPHYADDR is (row D2).
        """
        if not self.cpu.pse36:
            return 32
        if self.cpu.conformance == "kvm":
            return 36
        return min(40, self.cpu.maxphyaddr)

    def reserved_in_4m_page(self):
        """Bits 21:(M-19) of a PDE that maps a 4-MByte page."""
        return bits(self.pse36_width() - 19, 21)

    def address_of_4m_page(self, pde):
        high = (pde & bits(13, self.pse36_width() - 20)) >> 13
        return high << 32 | pde & bits(22, 31)

    # Entries.

    def step(self, gpa, size, level):
        step = Step(gpa, size, self.read_table(gpa, size), level)
        self.steps.append(step)
        return step

    def require_present(self, step):
        """P = 0 ends the walk whatever else the entry holds ("Page-Fault Exceptions")."""
        if not step.entry & P:
            raise Fault(step.level, "not-present", 0)

    def require_clear(self, step, reserved):
        """A present entry with a reserved bit set: P and RSVD in the error code."""
        if step.entry & reserved:
            raise Fault(step.level, "reserved", PF_PRESENT | PF_RESERVED)

    # Rights.

    def check_rights(self, key=0):
        """Section "Access Rights": R/W and U/S count if 1 in every entry used, XD in any entry forbids fetches."""
        user_page = all(step.entry & US for step in self.steps)
        writable = all(step.entry & RW for step in self.steps)
        executable = not any(step.entry & XD for step in self.steps)
        broken = []
        if self.access.shadow_stack and self.cpu.conformance == "sdm":
            if not self.is_shadow_stack():
                broken.append("shadow-stack")
            elif self.access.user != user_page:
                broken.append("user" if self.access.user else "shadow-stack")
            executable = True
            smap = smep = False
        else:
            smap, smep = self.regs.cr4 & CR4_SMAP, self.regs.cr4 & CR4_SMEP
            broken += self.ordinary_rights(user_page, writable)
        if self.access.fetch and not executable:
            broken.append("nx")
        if not self.access.user and user_page:
            if self.access.fetch and smep:
                broken.append("smep")
            if not self.access.fetch and smap and not self.access.ac:
                broken.append("smap")
        key_forbids = self.key_forbids(key, user_page)
        if key_forbids:
            broken.append("pkey")
        if broken:
            raise Fault(self.steps[-1].level, broken[0], PF_PRESENT | (PF_PKEY if key_forbids else 0))

    def is_shadow_stack(self):
        """"Shadow Stacks": R/W is 0 and D is 1 in the leaf, R/W is 1 in every entry above it."""
        leaf = self.steps[-1].entry
        return not leaf & RW and leaf & DIRTY and all(step.entry & RW for step in self.steps[:-1])

    def ordinary_rights(self, user_page, writable):
        """U/S and R/W, for accesses that are none to shadow stacks."""
        broken = []
        if self.access.user and not user_page:
            broken.append("user")
        if self.access.write and not writable and (self.access.user or self.regs.cr0 & CR0_WP):
            broken.append("write")
        return broken

    def key_forbids(self, key, user_page):
        """Section "Protection Keys": data accesses in long mode, to user-mode addresses with CR4.PKE = 1 by PKRU, to
        supervisor-mode addresses with CR4.PKS = 1 by IA32_PKRS.

        ADi forbids every data access; WDi forbids writes while CR0.WP = 1, in PKRU user writes in any case.
        """
        if not self.regs.efer & EFER_LMA or self.access.fetch:
            return False
        if not self.regs.cr4 & (CR4_PKE if user_page else CR4_PKS):
            return False
        register = self.regs.pkru if user_page else self.regs.pkrs
        access_disable = register >> (2 * key) & 1
        write_disable = register >> (2 * key + 1) & 1
        if access_disable:
            return True
        if not write_disable or not self.access.write:
            return False
        return bool(self.regs.cr0 & CR0_WP or (user_page and self.access.user))

    # Outcome.

    def error_code(self, fault):
        """Section "Page-Fault Exceptions": I/D only if CR4.SMEP = 1, or CR4.PAE = 1 and IA32_EFER.NXE = 1.

        KVM reports I/D with NXE = 1 in 32-bit paging too (row D1).
        """
        code = fault.bits
        if self.access.write:
            code |= PF_WRITE
        if self.access.user:
            code |= PF_USER
        nx_possible = self.regs.cr4 & CR4_PAE or self.cpu.conformance == "kvm"
        if self.access.fetch and (self.regs.cr4 & CR4_SMEP or (self.regs.efer & EFER_NXE and nx_possible)):
            code |= PF_FETCH
        if self.access.shadow_stack and self.cpu.conformance == "sdm":
            code |= PF_SHADOW_STACK
        return code

    def accessed_and_dirty(self):
        """Section "Accessed and Dirty Flags": A in every entry used, D in the one that maps the page if it is written.

        PAE PDPTEs have neither and are no steps.  One entry may serve as several steps (a table that maps itself).
        """
        writes = []
        current = {step.gpa: step.entry for step in self.steps}
        for step in self.steps:
            old = current[step.gpa]
            new = old | ACCESSED
            if self.access.write and step is self.steps[-1]:
                new |= DIRTY
            if new != old and self.mem.writable(step.gpa):
                writes.append((step.gpa, step.size, old, new))
                current[step.gpa] = new
        return tuple(writes)


def canonical(gva, width):
    """Bits 63:(width-1) are all equal ("Canonical Addressing")."""
    top = gva >> (width - 1)
    return top == 0 or top == bits(0, 64 - width)


def without_tag(regs, gva):
    """"Linear-Address Masking (LAM)": bits 62:W become copies of bit W-1; APM, "Upper Address Ignore": bits 63:57 of bit 56."""
    if regs.efer & EFER_UAIE:
        return gva & bits(0, 56) | (bits(57, 63) if gva & 1 << 56 else 0)
    width = None
    if gva >> 63:
        if regs.cr4 & CR4_LAM_SUP:
            width = 57 if regs.cr4 & CR4_LA57 else 48
    elif regs.cr3 & CR3_LAM_U57:
        width = 57
    elif regs.cr3 & CR3_LAM_U48:
        width = 48
    if width is None:
        return gva
    kept = gva & (1 << 63 | bits(0, width - 1))
    return kept | (bits(width, 62) if gva & 1 << (width - 1) else 0)


def violates_lass(regs, gva, access):
    """"Linear-Address-Space Separation (LASS)": users have the lower half of the address space, supervisors the upper one."""
    if not regs.cr4 & CR4_LASS:
        return False
    upper = bool(gva >> 63)
    if access.user:
        return upper
    if access.fetch:
        return not upper
    return not upper and bool(regs.cr4 & CR4_SMAP) and not access.ac


def linear_address(regs, gva, access=None, conformance="sdm"):
    """`gva` as the mode in force sees it: 32 bits outside long mode; a text instead of it where it is refused."""
    if not regs.efer & EFER_LMA or not regs.cr0 & CR0_PG:
        return gva & 0xFFFFFFFF
    if access is not None and conformance == "sdm":
        if violates_lass(regs, gva, access):
            return "lass_violation"
        data = not access.fetch and not access.implicit
        if data and not (access.shadow_stack and regs.efer & EFER_UAIE):        # a shadow stack is reached through no segment
            gva = without_tag(regs, gva)
    return gva if canonical(gva, 57 if regs.cr4 & CR4_LA57 else 48) else "non_canonical"


def translate(
    mem, cpu, regs, gva, *, write=False, fetch=False, user=False, ac=False, implicit=False, shadow_stack=False, set_ad=True
) -> Result:
    """Translate `gva` for one access, a read unless `write` or `fetch`.

    `user`: CPL is 3; `ac`: EFLAGS.AC; `implicit`: an implicit supervisor-mode access, to which CPL and AC do not
    apply; `shadow_stack`: a read or write of a shadow stack.  `set_ad` writes the A/D updates to `mem`; they are listed
    in the result either way.
    """
    access = Access(write=write, fetch=fetch, user=user and not implicit, ac=ac and not implicit,
                    shadow_stack=shadow_stack, implicit=implicit)
    walk = Walk(mem, cpu, regs, access)
    gva = linear_address(regs, gva, access, cpu.conformance)
    if isinstance(gva, str):
        return Result(gva, None, 0, 0, None, ())
    try:
        gpa = walk.physical_address(gva)
    except Fault as fault:
        return Result("page_fault", None, walk.error_code(fault), fault.level, fault.rule, ())
    writes = walk.accessed_and_dirty()
    if set_ad:
        for address, size, _, new in writes:
            mem.write(address, new, size)
    return Result("ok", gpa, 0, walk.steps[-1].level if walk.steps else 0, None, writes)
