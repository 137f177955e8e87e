# SPDX-License-Identifier: Apache-2.0
"""The nested matrix: random accesses through two stages, thousands in one memory image.

    batch = generate(rng, n, cpu)     a Batch of n Cases; `rng` is a numpy Generator, `cpu` an oracle.Cpu
    answers = expected(batch)         Answers: one array per field, from oracle_nested.py, and the final image

A case is sound tables of both stages in which at most one nested entry and at most one guest entry are odd.  What is
drawn: the guest's mode and the nested format; the level and rights of the guest's page; the size of every nested page;
for the odd nested entry which translation it belongs to (of each guest table, or of the page), its level and its rights
R/W/X/XU or P/W/U/NX, or a memory type or reserved bit instead; A and D of every entry; and all controls.

Every case has entries of its own, so that the cases of an image may run in any order, but shares the pages of tables
with others: at each level it owns the entries of TRANSLATIONS indices, one for each of its guest-physical addresses.
Guest tables of many cases lie in one host page, at guest-physical addresses that differ from case to case.  Nothing
odd may lead to the entries of another case: no table pointer changes, and no page becomes a table.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import oracle
import oracle_nested
from builders import mode_regs
from oracle import bits

ACCESS_WRITE = 2
ACCESS_USER = 4
ACCESS_AC = 8
ACCESS_FETCH = 16
ACCESS_IMPLICIT = 32
INVALID = 2**64 - 1
STATUS = ("ok", "page_fault", "non_canonical", "ept_violation", "ept_misconfig", "nested_page_fault")
STATUS_CODE = {name: code for code, name in enumerate(STATUS)}

PAGE = 0x1000
TRANSLATIONS = 8
FINAL = 7
EFER_LME = 1 << 8
GUEST_LEVELS = {"off": 0, "32": 2, "pae": 3, "4l": 4, "5l": 5}
GUEST_MODES = ("4l", "4l", "4l", "5l", "pae", "32", "4l", "off")
HOSTS = ("ept4", "ept4", "ept4", "ept5", "npt4", "npt5", "nptpae", "npt32")
HOST_LEVELS = {"ept4": 4, "ept5": 5, "npt4": 4, "npt5": 5, "nptpae": 3, "npt32": 2}
BASES = (0x100000, 0x3FE00000, 0xC0001000)
MEMORY_TYPES = (0, 1, 4, 5, 6, 6, 6, 6)

# Which entry of its slots an address uses differs from level to level: index = slot * odd + offset.
SCATTER = ((0, 0), (5, 3), (11, 77), (37, 130), (173, 9), (91, 300))


@dataclass(frozen=True, slots=True)
class Case:
    """One access; `access` has the bits ACCESS_*, `guest` and `host` name the formats."""

    regs: oracle.Regs
    stage: oracle_nested.Ept | oracle_nested.Npt
    gva: int
    access: int
    guest: str
    host: str

    def keywords(self):
        """The access as translate_nested() takes it."""
        return {
            "write": bool(self.access & ACCESS_WRITE),
            "fetch": bool(self.access & ACCESS_FETCH),
            "user": bool(self.access & ACCESS_USER),
            "ac": bool(self.access & ACCESS_AC),
            "implicit": bool(self.access & ACCESS_IMPLICIT),
        }


@dataclass
class Batch:
    """Cases over one image: `words` by host address, all within the contiguous pages gpas[0] .. gpas[-1]."""

    cpu: oracle.Cpu
    cases: list
    words: dict
    gpas: np.ndarray

    def pages(self):
        return image(self.words, self.gpas)

    def gva(self):
        return np.array([case.gva for case in self.cases], np.uint64)

    def access(self):
        return np.array([case.access for case in self.cases], np.uint8)


@dataclass
class Answers:
    """One array of n per field, with INVALID for an address that does not exist, and the image after all cases."""

    status: np.ndarray
    gpa: np.ndarray
    ngpa: np.ndarray
    error_code: np.ndarray
    fault_gpa: np.ndarray
    exit_qualification: np.ndarray
    refs: np.ndarray
    level: np.ndarray
    pages: np.ndarray


def image(words, gpas):
    """uint64[n, 512] of words by address; `gpas` are contiguous."""
    pages = np.zeros(len(gpas) * 512, np.uint64)
    at = np.fromiter(words.keys(), np.uint64, len(words)) - gpas[0] >> np.uint64(3)
    pages[at] = np.fromiter(words.values(), np.uint64, len(words))
    return pages.reshape(-1, 512)


def generate(rng, n, cpu):
    """A Batch of n random cases."""
    maker = Maker(random.Random(int(rng.integers(1 << 62))), cpu)
    cases = [maker.case() for _ in range(n)]
    return Batch(cpu, cases, maker.words, np.arange(maker.base, maker.next, PAGE, dtype=np.uint64))


def expected(batch):
    """Answers of oracle_nested, case after case on one memory."""
    memory = oracle.Memory(dict(batch.words))
    rows = []
    for case in batch.cases:
        r = oracle_nested.translate_nested(memory, batch.cpu, case.regs, case.stage, case.gva, **case.keywords())
        addresses = [INVALID if address is None else address for address in (r.gpa, r.ngpa, r.fault_gpa)]
        rows.append((STATUS_CODE[r.status], *addresses, r.error_code, r.exit_qualification, r.refs, r.level))
    status, gpa, ngpa, fault_gpa, code, qualification, refs, level = zip(*rows, strict=True)
    return Answers(
        np.array(status, np.uint8), np.array(gpa, np.uint64), np.array(ngpa, np.uint64), np.array(code, np.uint32),
        np.array(fault_gpa, np.uint64), np.array(qualification, np.uint64), np.array(refs, np.uint8),
        np.array(level, np.uint8), image(memory.words, batch.gpas))


@dataclass(frozen=True)
class Level:
    """How the tables of one level are shared: `cases` cases a page, `slots` entries that addresses can reach."""

    shift: int
    slots: int
    cases: int

    def index(self, level, number, which):
        """Index of translation `which` of case `number`."""
        slot = number % self.cases * TRANSLATIONS + which if self.cases > 1 else 3 * number + which
        odd, offset = SCATTER[level]
        return slot * odd + offset & self.slots - 1


@cache
def nested_levels(host, limit):
    """Level by level (from 1; 0 is unused) for guest-physical addresses of `limit` bits."""
    width = 10 if host == "npt32" else 9
    made = [None]
    for level in range(1, HOST_LEVELS[host] + 1):
        shift = 12 + width * (level - 1)
        slots = 1 << min(width, max(0, limit - shift))
        made.append(Level(shift, slots, max(1, slots // TRANSLATIONS)))
    return made


class Maker:
    """Makes cases one after the other, into one image."""

    def __init__(self, source, cpu):
        self.draw = source.getrandbits
        self.below = source.randrange
        self.cpu = cpu
        self.frame = bits(12, cpu.maxphyaddr - 1)
        self.words = {}
        self.base = self.next = BASES[self.below(len(BASES))]
        self.tables = {}
        self.numbers = {}

    def page(self, *key):
        """Host address of the page of tables of that name."""
        hpa = self.tables.get(key)
        if hpa is None:
            if self.next & 0x1FE000 == 0:           # with PS set, a pointer to it would map a large page of the image
                self.next = (self.next | PAGE) + PAGE
            hpa = self.tables[key] = self.next
            self.next += PAGE
        return hpa

    def number(self, *key):
        """Running number within a kind of case."""
        number = self.numbers.get(key, 0)
        self.numbers[key] = number + 1
        return number

    def write(self, hpa, value, size):
        """Write an entry, unless this case has been here before: its addresses may share entries near the root."""
        if size == 8:
            self.words.setdefault(hpa, value)
            return
        word = self.words.get(hpa & ~7, 0)
        shift = 8 * (hpa & 4)
        if not word >> shift & 0xFFFFFFFF:
            self.words[hpa & ~7] = word | value << shift

    def case(self):
        guest = GUEST_MODES[self.draw(3)]
        host = HOSTS[self.draw(3)]
        nested = NestedTables(self, host, guest)
        access = self.access()
        if guest == "off":
            return Case(self.regs(guest), nested.stage, nested.map_page(), access, guest, host)
        tables = GuestTables(self, guest, nested)
        regs = self.regs(guest, tables.root, tables.pdptrs, tables.leaf > 1)
        return Case(regs, nested.stage, tables.gva, access, guest, host)

    def access(self):
        kind = (0, ACCESS_WRITE, ACCESS_FETCH)[self.below(3)]
        access = kind | (self.draw(1) and ACCESS_USER) | (self.draw(1) and ACCESS_AC)
        if kind != ACCESS_FETCH and not self.draw(3):
            access |= ACCESS_IMPLICIT
        return access

    def regs(self, guest, root=0, pdptrs=None, large=False):
        """PG and the mode; WP, SMEP, SMAP, PKE, NXE and PKRU at random; PSE if a large page may need it."""
        controls = self.draw(16)
        cr0 = 1 | (controls & 1 and oracle.CR0_WP) | (guest != "off" and oracle.CR0_PG)
        cr4 = oracle.CR4_PSE if large or controls >> 1 & 1 else 0
        if guest in ("pae", "4l", "5l"):
            cr4 |= oracle.CR4_PAE | (oracle.CR4_LA57 if guest == "5l" else 0)
        if not controls >> 5 & 3:
            cr4 |= oracle.CR4_SMEP
        if not controls >> 7 & 3:
            cr4 |= oracle.CR4_SMAP
        if not controls >> 9 & 7:
            cr4 |= oracle.CR4_PKE
        efer = oracle.EFER_NXE if controls >> 12 & 7 else 0
        if guest in ("4l", "5l"):
            efer |= EFER_LME | oracle.EFER_LMA
        pkru = self.draw(32) & self.draw(32) if cr4 & oracle.CR4_PKE else 0
        return oracle.Regs(cr0, root | self.draw(2) << 3, cr4, efer, pkru, pdptrs)


class NestedTables:
    """The nested tables of one case."""

    def __init__(self, maker, host, guest):
        self.maker = maker
        self.draw = maker.draw
        self.host = host
        self.ept = host.startswith("ept")
        self.levels = HOST_LEVELS[host]
        self.size = 4 if host == "npt32" else 8
        limit = min(maker.cpu.maxphyaddr, 9 * self.levels + 12)
        if guest in ("off", "32") or host in ("nptpae", "npt32") or (guest == "pae" and not self.ept):
            limit = 32
        self.limit = limit
        self.layout = nested_levels(host, limit)
        self.case_number = maker.number(host, limit)
        self.healthy_user = oracle.US
        self.stage = self.ept_stage() if self.ept else self.npt_stage()
        guest_tables = max(GUEST_LEVELS[guest] - (guest == "pae" and self.ept), 0)
        self.odd = None
        if self.draw(3):
            self.odd = FINAL if not self.draw(2) else maker.below(guest_tables + 1) or FINAL
        self.odd_draw = self.draw(16)

    def ept_stage(self):
        root = self.table(self.levels)
        flags = self.draw(12)
        page_1g = (None, True, True, False if flags & 0x200 else None)[flags & 3]
        eptp = root | (flags & 4 and 6) | (self.levels - 1) << 3 | (flags & 8 and oracle_nested.EPTP_AD)
        page_2m = bool(flags & 0x580)               # no processor has 1-GByte pages alone
        return oracle_nested.Ept(
            eptp, mbec=bool(flags & 16), execonly=bool(flags & 32), advanced_info=bool(flags & 64),
            page_2m=page_2m, page_1g=page_1g if page_2m else False)

    def npt_stage(self):
        flags = self.draw(12)
        cr4 = (flags & 1 and oracle.CR4_SMEP) | (flags & 2 and oracle.CR4_SMAP) | (flags & 4 and oracle.CR4_PKE)
        cr4 |= oracle.CR4_PSE if flags & 0x18 else 0
        efer = oracle.EFER_NXE if flags & 0x60 else 0
        if self.host != "npt32":
            cr4 |= oracle.CR4_PAE | (oracle.CR4_LA57 if self.host == "npt5" else 0)
        if self.host in ("npt4", "npt5"):
            efer |= EFER_LME | oracle.EFER_LMA
        gmet = bool(flags & 0x80)
        if gmet and flags & 0x100:
            self.healthy_user = 0
        self.nxe = bool(efer & oracle.EFER_NXE)
        return oracle_nested.Npt(self.table(self.levels), cr4, efer, gmet)

    def table(self, level):
        """Host address of the table of `level`; a PDPT of PAE paging has 32 bytes."""
        if self.host == "nptpae" and level == 3:
            return self.maker.page(self.host, 3, self.case_number // 128) + 32 * (self.case_number % 128)
        return self.maker.page(self.host, self.limit, level, self.case_number // self.layout[level].cases)

    def leaf_level(self):
        """Mostly 4-KByte pages, else 2 MBytes (4 in 32-bit paging) or 1 GByte."""
        chance = self.draw(4)
        if chance < 10 or (self.host == "npt32" and not self.stage.cr4 & oracle.CR4_PSE):
            return 1
        return 3 if chance == 15 and self.levels > 3 else 2

    def map_table(self, which, hpa):
        """Map the host page of a guest table; returns its guest-physical address."""
        leaf = self.leaf_level()
        return self.map(which, leaf, hpa, hpa & (1 << self.layout[leaf].shift) - 1)

    def map_page(self):
        """Map the page the guest's tables lead to, which needs no memory; a random byte of it, in guest addresses."""
        leaf = self.leaf_level()
        hpa = self.draw(52) & self.maker.frame & (bits(0, 31) if self.host == "npt32" else -1)
        return self.map(FINAL, leaf, hpa, self.draw(self.layout[leaf].shift))

    def map(self, which, leaf, hpa, offset):
        """Entries of every level for translation `which` to `hpa`; the guest-physical address is up to the layout."""
        gpa = offset
        rights = self.ept_rights if self.ept else self.npt_rights
        odd_level = leaf + self.odd_draw % (self.levels - leaf + 1) if which == self.odd else None
        for level in range(self.levels, leaf - 1, -1):
            layout = self.layout[level]
            index = layout.index(level, self.case_number, which)
            gpa |= index << layout.shift
            entry = self.table(level - 1) if level > leaf else hpa & ~((1 << layout.shift) - 1)
            entry |= rights(level, leaf, level == odd_level)
            self.maker.write(self.table(level) + self.size * index, entry, self.size)
        return gpa

    def ept_rights(self, level, leaf, odd):
        """Everything of an EPT entry but the address."""
        ignored = self.draw(16)
        value = 0x407 | (ignored & 3) << 8 | (ignored & 4) << 9 | (ignored >> 4) << 52
        if level == leaf:
            value |= MEMORY_TYPES[self.draw(3)] << 3 | (ignored & 8) << 3
            value |= oracle_nested.EPT_LARGE if level > 1 or self.draw(1) else 0
        if not odd:
            return value
        kind = self.draw(4)
        if kind < 11:
            return value & ~0x407 | self.draw(3) | self.draw(1) << 10
        if kind == 11:
            return value & ~0x78 | self.draw(4) << 3
        if kind == 12:
            return value | self.address_bit()
        if kind == 13:
            return value | self.low_address_bit(level) if level == leaf > 1 else value & ~0x405
        return value | 0x80 if kind == 14 else value & ~0xF7F | self.draw(12)

    def npt_rights(self, level, leaf, odd):
        """Everything of a nested entry in a format of one-stage paging but the address; PAE's PDPTEs have no rights."""
        ignored = self.draw(16)
        if self.host == "nptpae" and level == 3:
            value = 1 | (ignored & 3) << 3 | (ignored & 7) << 9
        else:
            value = 3 | self.healthy_user | (ignored & 15) << 3 | (ignored >> 4 & 7) << 9
            if self.host in ("npt4", "npt5"):
                value |= (ignored >> 5) << 52 & bits(52, 62)
        if level == leaf:
            value |= (ignored >> 7 & 1) << 8 | (oracle.PS if level > 1 or self.draw(1) else 0)
        if odd:
            value = self.odd_npt_rights(value, level, leaf)
        return value & 0xFFFFFFFF if self.size == 4 else value

    def odd_npt_rights(self, value, level, leaf):
        kind = self.draw(4)
        if kind < 9:
            xd = oracle.XD if self.nxe and self.draw(1) else 0
            return value & ~7 | (self.draw(2) and 1) | self.draw(2) << 1 | xd
        if kind == 9:
            return value | oracle.XD
        if kind == 10:
            return value | self.address_bit()
        if kind == 11:
            return value | 1 << 52 + self.maker.below(11)
        if kind == 12:
            return value | self.low_address_bit(level) if level == leaf > 1 else value & ~1
        if kind == 13:
            return value | 1 << 8
        return value | oracle.PS if kind == 14 else value & ~0xF7F | self.draw(12)

    def low_address_bit(self, level):
        """A bit that is reserved in large pages: half the time bit 12, which is PAT in all formats but EPT."""
        return 1 << 12 + (self.draw(1) and self.maker.below(self.layout[level].shift - 12))

    def address_bit(self):
        """A physical-address bit the processor does not have, or none."""
        width = self.maker.cpu.maxphyaddr
        return 1 << width + self.maker.below(52 - width) if width < 52 else 0


class GuestTables:
    """The guest's tables of one case, from the page upwards; `root`, `pdptrs` and `gva` lead to it."""

    def __init__(self, maker, guest, nested):
        self.maker = maker
        self.draw = maker.draw
        self.nested = nested
        self.width = 10 if guest == "32" else 9
        self.size = 4 if guest == "32" else 8
        self.long_mode = guest in ("4l", "5l")
        self.number = maker.number("guest", guest)
        top = 2 if guest in ("32", "pae") else GUEST_LEVELS[guest]
        self.leaf = self.leaf_level()
        self.odd_level = maker.below(top) + 1 if not self.draw(2) else None
        shift = self.shift(self.leaf)
        page = nested.map_page()
        self.gva = page & (1 << shift) - 1
        address = page & ~((1 << shift) - 1)
        for level in range(self.leaf, top + 1):
            table = maker.page("guest", guest, level, self.number >> self.width)
            index = self.index(level)
            self.gva |= index << self.shift(level)
            maker.write(table + self.size * index, address | self.rights(level), self.size)
            address = nested.map_table(level % FINAL, table)
        self.root, self.pdptrs = address, None
        if guest == "pae":
            (self.add_pdpte if nested.ept else self.add_pdpt)(address)
        if self.long_mode and self.gva >> (self.shift(top + 1) - 1):
            self.gva |= bits(self.shift(top + 1), 63)

    def shift(self, level):
        return 12 + self.width * (level - 1)

    def index(self, level):
        odd, offset = SCATTER[-level]
        return self.number * odd + offset & (1 << self.width) - 1

    def leaf_level(self):
        chance = self.draw(4)
        if chance < 11:
            return 1
        return 3 if chance > 13 and self.long_mode else 2

    def add_pdpte(self, address):
        """PDPTE registers: present ones legal, the others with whatever they hold."""
        index = self.draw(2)
        self.gva |= index << 30
        pdptrs = [self.draw(64) & ~1 for _ in range(4)]
        pdptrs[index] = address | (self.draw(5) and 1) | self.draw(2) << 3 | self.draw(3) << 9
        self.root = self.draw(27) << 5
        self.pdptrs = tuple(pdptrs)

    def add_pdpt(self, address):
        """PDPTEs in memory: a legal one that leads on, at times not present or with any bit more, beside whatever there is."""
        index = self.draw(2)
        self.gva |= index << 30
        pdptes = [self.draw(64) for _ in range(4)]
        pdptes[index] = address | 1 | self.draw(2) << 3 | self.draw(3) << 9
        if not self.draw(2):
            pdptes[index] ^= 1 << (0, 1, 2, *range(5, 9), *range(self.maker.cpu.maxphyaddr, 64))[self.maker.below(
                7 + 64 - self.maker.cpu.maxphyaddr)]
        pdpt = self.maker.page("guest", "pae", 3, self.number // 128) + 32 * (self.number % 128)
        for i, pdpte in enumerate(pdptes):
            self.maker.write(pdpt + 8 * i, pdpte, 8)
        self.root = self.nested.map_table(3, pdpt & ~(PAGE - 1)) | pdpt & (PAGE - 1)

    def rights(self, level):
        """Everything of an entry but the address: the page's rights at random, full rights above it."""
        flags = self.draw(16)
        value = 7 | (flags & 15) << 3 & 0x78 | (flags >> 4 & 7) << 9
        if level == self.leaf:
            value &= ~(oracle.RW if not flags >> 7 & 3 else 0) & ~(oracle.US if not flags >> 9 & 1 else 0)
            value |= oracle.PS if level > 1 else 0
            if self.size == 8 and not flags >> 10 & 7:
                value |= oracle.XD
        if self.long_mode:
            value |= self.draw(11) << 52 & bits(52, 62)
        if level == self.odd_level:
            value = self.odd_rights(value, level)
        return value if self.size == 8 else value & 0xFFFFFFFF

    def odd_rights(self, value, level):
        kind = self.draw(3)
        if kind == 0:
            return value & ~1
        if kind < 4:
            return value & ~6 | self.draw(2) << 1
        if kind == 4:
            return value | oracle.XD
        if kind == 5:
            return value | 1 << 52 + self.maker.below(12)
        if kind == 6 and level == self.leaf > 1:
            return value | 1 << 13
        if kind == 6 and (self.maker.cpu.maxphyaddr < 52 or self.nested.levels < 5):
            return value | 1 << 51
        return value | oracle.PS if level in (1, 4, 5) else value & ~oracle.US


def random_controls(rng, mode, cr3):
    """The mode's registers with WP, SMEP, SMAP, PKE and PKRU at random."""
    registers = mode_regs(mode, cr3)
    bit = rng.integers(0, 2, 4).tolist()
    registers["cr0"] ^= oracle.CR0_WP * bit[0]
    registers["cr4"] |= oracle.CR4_SMEP * bit[1] | oracle.CR4_SMAP * bit[2] | oracle.CR4_PKE * bit[3]
    registers["pkru"] = int(rng.integers(0, 1 << 32))
    return registers
