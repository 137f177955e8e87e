# SPDX-License-Identifier: Apache-2.0
"""Every combination of the bits of a leaf, the access, the level, the format and the registers that decide over it.

"May this leaf be used" is decided by the scalar walk (`kvmmu/_walk.pyx`). Faster forms of that decision exist: kernels for
each instruction set, uniform blocks, blocks, remembered translations, and the fast path of scalar calls. Each of them is
held to the scalar walk here: columns, and the accessed and dirty bits in memory.

Each row of a test has a leaf of its own. A batch with the column pte_gpa is walked row by row by the scalar walk, as one of
fewer than eight rows is; `test_the_reference_is_the_scalar_walk` holds the one to the other.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
from batch_machines import row_by_row
from builders import LEVELS, PAGE, mode_regs
from machines import PKE, SMAP, SMEP, WP

from kvmmu import CpuModel, Ept, GuestFault, GuestMemory, Npt, Regs, Translation, Vcpu
from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

COLUMNS = ("gpa", "status", "error_code", "level")
MORE = ("pte", "pte_access", "refs")                    # columns that make the batch check every leaf by the whole rule
SETS = instruction_sets()
pytestmark = pytest.mark.usefixtures("same_instruction_set")

P, W, U, A, D, BIT7, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
R, X, XU, EPT_A, EPT_D = 1, 4, 1 << 10, 0x100, 0x200
BIT60, LASS, LAM_SUP, PKS = 1 << 60, 1 << 27, 1 << 28, 1 << 24
LAM_U57, UAIE = 1 << 61, 1 << 20
BEYOND, LOW = 1 << 45, 1 << 13                          # reserved: beyond MAXPHYADDR; below the address of a large page
NXE = 1 << 11
KEYS = 4                                                # used of the 16
MEMORY_TYPES = (0, 2, 6, 7)                             # of EPT: UC, bad, WB, bad
# W U AC F IMPLICIT, the senseless ones too; to shadow stacks; probes
ACCESSES = np.array([*(a for a in range(64) if not a & 1), 0x40, 0x42, 0x44, 0x46, 0x48, 0x60, 0x80, 0x86], np.uint8)
FILLERS = 256                                           # leaves that pass every access of the filler rows
SPARSE = 12                                             # rows of a test among 64, at most, for uniform blocks to take them
LEAD = 4                                                # blocks after which a batch stops remembering, if nothing comes again
REST = 124                                              # blocks that follow without remembering
WORDS = {"32": np.uint32}


def subsets(*bits):
    """The OR of each subset of bits."""
    return [sum(chosen) for chosen in product(*((0, bit) for bit in bits))]


def leaves_of(mode, level):
    """Leaves of a mode and level without their addresses: every combination of bits that matter; without a key first."""
    if mode == "32":
        others = (0,) if level == 1 else (0, 1 << 13, 1 << 20, 1 << 21)
        words = [bits | other for other in others for bits in subsets(P, W, U, A, D, BIT7)]
    elif mode.startswith("ept"):
        others = (0, BEYOND, BIT60) if level == 1 else (0, BEYOND, LOW, BIT60)
        words = [bits | other | kind << 3 for other in others for kind in MEMORY_TYPES
                 for bits in subsets(R, W, X, XU, EPT_A, EPT_D, BIT7)]
    else:
        others = (0, BEYOND) if level == 1 else (0, BEYOND, LOW, 1 << 62)
        words = [bits | other for other in others for bits in subsets(P, W, U, A, D, BIT7, NX)]
        words += [bits | key << 59 for key in range(1, KEYS) for bits in subsets(P, W, U, A, D, NX, 0 if level == 1 else BIT7)
                  if level == 1 or bits & BIT7]
    return np.array(sorted(set(words), key=words.index), np.uint64)


@dataclass
class Space:
    """One root: leaves of one level, one for each row, and after them, in tables of their own if there is room, the fillers."""

    root: int
    rows: np.ndarray                    # leaf * accesses + access of each of its rows
    fillers: np.ndarray                 # their entries
    gva: np.ndarray                     # of each entry
    access: np.ndarray
    parents: np.ndarray                 # addresses of the entries that lead to the tables of the leaves


class Guest:
    """All leaves of a mode and level times all accesses in one memory, in as many spaces as it takes."""

    def __init__(self, mode, level):
        self.mode, self.level = mode, level
        self.width = 4 if mode == "32" else 8
        self.index_bits = 10 if mode == "32" else 9
        self.root_level = int(mode[3]) if mode.startswith("ept") else LEVELS[mode]
        self.leaves = leaves_of(mode, level)
        self.entries = np.zeros(0, np.uint64)
        self.tables, self.frames = {}, 1
        count = self.leaves.size * ACCESSES.size
        top = {"32": 32, "pae": 32}.get(mode, 47)
        most = min(1 << top - self.shift(level), 1 << 17) - FILLERS
        most -= most % ACCESSES.size                    # a leaf with all its accesses lies in one space
        self.spaces = [self.space(np.arange(first, min(first + most, count))) for first in range(0, count, most)]
        self.image = np.zeros(self.frames * PAGE, np.uint8)
        for frame, words in self.tables.items():
            self.image[frame * PAGE:(frame + 1) * PAGE] = words.view(np.uint8)
        self.buffer = self.image.copy()
        self.memory = GuestMemory(self.buffer)

    def shift(self, level):
        return 12 + self.index_bits * (level - 1)

    def table(self):
        frame, self.frames = self.frames, self.frames + 1
        self.tables[frame] = np.zeros(PAGE // self.width, WORDS.get(self.mode, np.uint64))
        return frame

    def upper(self, level):
        """An entry that grants everything, without the address."""
        if self.mode.startswith("ept"):
            return R | W | X | XU | EPT_A
        return P if self.mode == "pae" and level == 3 else P | W | U | A

    def good(self):
        """A leaf that passes."""
        bits = R | W | X | XU | EPT_A | EPT_D | 6 << 3 if self.mode.startswith("ept") else P | W | U | A | D
        return bits | (BIT7 if self.level > 1 else 0)

    def path(self, root, at):
        """The table of entry number `at` of this level, and the address of the entry that leads to it (0: the root)."""
        frame, parent = root, 0
        for level in range(self.root_level, self.level, -1):
            index = at >> self.index_bits * (level - self.level) & (1 << self.index_bits) - 1
            words, parent = self.tables[frame], frame * PAGE + self.width * index
            if not words[index]:
                words[index] = self.table() * PAGE | self.upper(level)
            frame = int(words[index]) >> 12
        return frame, parent

    def space(self, rows):
        """Leaves map frames of their size, from 32 GiB (2-level paging: 1 GiB) on, where there is no memory."""
        root = self.table()
        size = 1 << self.shift(self.level)
        base = 1 << (30 if self.mode == "32" else 35)
        leaf = rows // ACCESSES.size
        n, parents = 1 << self.index_bits, []
        fillers = rows.size + (-rows.size % n if self.level == 1 else 0) + np.arange(FILLERS)
        words = np.zeros(fillers[-1] + 1, np.uint64)
        words[:rows.size] = self.leaves[leaf] | (base + leaf % 32 * size).astype(np.uint64)
        words[fillers] = self.good() | base
        for first in range(0, words.size, n):
            frame, parent = self.path(root, first)
            self.tables[frame][:words[first:first + n].size] = words[first:first + n]
            parents += [parent] if parent and first < rows.size else []
        gva = np.arange(words.size, dtype=np.uint64) * np.uint64(size) | np.uint64(0x678)
        access = np.full(words.size, U, np.uint8)
        access[:rows.size] = ACCESSES[rows % ACCESSES.size]
        return Space(root * PAGE, rows, fillers, gva, access, np.array(parents, np.int64))

    def reset(self, upper=None):
        """The memory as it was made; with other upper entries if `upper` says which bits to take away and which to add."""
        self.buffer[:] = self.image
        if upper is not None:
            without, extra = upper
            words = self.buffer.view(WORDS.get(self.mode, np.uint64))
            for space in self.spaces:
                at = space.parents // self.width
                words[at] = words[at] & ~words.dtype.type(without) | words.dtype.type(extra)


@cache
def guest_of(mode, level):
    return Guest(mode, level)


# ---- arrangements: which entries of a space a batch asks for, and with the accesses of which of its rows ------------------

def dense(space, chosen):
    """One batch of the rows as they come."""
    return [(chosen, chosen)]


def sparse(space, chosen):
    """Batches of at most 12 such rows among 64, all others fillers; before them fillers alone, so that none is remembered."""
    fillers = space.fillers
    places = np.sort(np.random.default_rng(5).permutation(63)[:SPARSE]) + 1
    batches = []
    for first in range(0, chosen.size, SPARSE * REST):
        rows = chosen[first:first + SPARSE * REST]
        blocks = np.resize(fillers, (-(-rows.size // SPARSE) + LEAD, 64))
        blocks[LEAD:, places] = np.resize(np.append(rows, fillers), (blocks.shape[0] - LEAD, SPARSE))
        if rows.size % SPARSE:
            blocks[-1, places] = np.append(rows[-(rows.size % SPARSE):], fillers)[:SPARSE]
        batches.append((blocks.ravel(), blocks.ravel()))
    return batches


def hot(space, chosen):
    """One batch of 12 such rows among 64, the others few fillers, each block four times, the third time with the next access of
    the same leaf: translations are remembered, by page and access."""
    fillers = space.fillers[:8]
    count = -(-chosen.size // SPARSE)
    blocks = np.resize(fillers, (count, 64))
    blocks[:, 1:SPARSE + 1] = np.append(chosen, np.resize(fillers, SPARSE))[:count * SPARSE].reshape(count, SPARSE)
    following = blocks - blocks % ACCESSES.size + (blocks + 1) % ACCESSES.size
    # a supervisor's write without CR0.WP makes a shadow stack of a leaf: no access to one follows another kind of access
    makes_one = (ACCESSES[following % ACCESSES.size] & ~ACCESSES[blocks % ACCESSES.size] & 0x40) != 0
    following = np.where(np.isin(following, chosen) & np.isin(blocks, chosen) & ~makes_one, following, blocks)
    return [(np.repeat(blocks, 4, axis=0).ravel(), np.stack([blocks, blocks, following, blocks], axis=1).ravel())]


# ---- runs ---------------------------------------------------------------------------------------------------------------

class Run:
    """One guest, one set of registers, with or without stores: what the scalar walk says of each row, and checks of others."""

    def __init__(self, guest, cpu, regs, stage=None, *, set_ad=True, upper=None, rows=None, tag=0, why=""):
        self.tag = np.uint64(tag)
        self.guest, self.cpu, self.regs, self.stage = guest, cpu, regs, stage
        self.set_ad, self.upper, self.why = set_ad, upper, f"{guest.mode} level {guest.level}, {why}, set_ad={set_ad}"
        self.walks = [self.walk(space) for space in guest.spaces]
        self.chosen = [np.arange(space.rows.size) if rows is None else np.flatnonzero(rows[space.rows]) for space in guest.spaces]
        guest.reset(upper)
        self.expected = [self.reference(number, chosen) for number, chosen in enumerate(self.chosen)]
        self.memory = guest.buffer.copy()
        self.passed = [chosen[(answer.status == 0)[chosen]] for answer, chosen in zip(self.expected, self.chosen, strict=True)]

    def walk(self, space):
        """(walk, contexts) of a space."""
        vcpu = Vcpu(self.guest.memory, cpu=self.cpu)
        if self.stage is not None:
            vcpu.enter_nested(self.stage(space.root), cr0=1, cr3=0, cr4=0, efer=0)
            return vcpu.ngpa_walk, None
        regs = Regs(**self.regs | {"cr3": space.root | self.regs["cr3"] & LAM_U57})
        return vcpu.gva_walk, vcpu.gva_walk.prepare([regs, regs])

    def translate(self, number, entries, rows, fields, alternate=False):
        (walk, contexts), space = self.walks[number], self.guest.spaces[number]
        ctx = None
        if contexts is not None:
            ctx = np.zeros(rows.size, np.uint32)
            ctx[1::2] = alternate
        gva = space.gva[entries] | self.tag
        return walk.translate(gva, space.access[rows], regs=contexts, ctx=ctx, fields=fields, set_ad=self.set_ad)

    def reference(self, number, chosen):
        """Columns of all entries of a space as the scalar walk fills them, where they are rows of this run or fillers."""
        space = self.guest.spaces[number]
        answer = Translation.empty(space.gva.size, COLUMNS + MORE)
        for rows in (chosen, space.fillers):
            found = self.translate(number, rows, rows, (*COLUMNS, *MORE, "pte_gpa"))
            for column in COLUMNS + MORE:
                getattr(answer, column)[rows] = getattr(found, column)
        return answer

    def check(self, arrange, fields=COLUMNS, *, alternate=False, chosen=None, form=""):
        """Hold one arrangement of the rows to the reference, for each instruction set. IN chosen: with all that pass."""
        chosen = self.chosen if chosen is None else chosen
        for name in SETS:
            use_instruction_set(name)
            self.guest.reset(self.upper)
            for number, space in enumerate(self.guest.spaces):
                for entries, rows in arrange(space, chosen[number]):
                    actual = self.translate(number, entries, rows, fields, alternate)
                    for column in fields:
                        self.same(column, getattr(self.expected[number], column)[rows], getattr(actual, column), space, rows,
                                  f"{form}, {name}")
            same = np.array_equal(self.memory.view(np.uint64), self.guest.buffer.view(np.uint64))
            assert same or arrange is hot, f"{self.why}: {form}, {name}: accessed and dirty bits"

    def same(self, column, expected, actual, space, rows, form):
        if column == "pte" and self.set_ad:         # before or after this row's update, by the form
            ad = ~np.uint64((EPT_A | EPT_D) if self.guest.mode.startswith("ept") else A | D)
            expected, actual = expected & ad, actual & ad
        if not np.array_equal(expected, actual):
            at = int(np.flatnonzero(expected != actual)[0])
            row = int(rows[at])
            leaf = self.guest.leaves[space.rows[row] // ACCESSES.size] if row < space.rows.size else 0
            raise AssertionError(f"{self.why}: {form}: {column} of leaf {leaf:#x}, access {space.access[row]:#x}: "
                                 f"want {expected[at]:#x}, got {actual[at]:#x}")

    def check_all(self):
        self.check(dense, COLUMNS + MORE, form="blocks, whole rule")
        self.check(dense, form="dense")
        self.check(dense, chosen=self.passed, form="rows that pass")
        self.check(sparse, form="uniform blocks")
        self.check(hot, form="remembered")
        if self.walks[0][1] is not None:
            self.check(sparse, alternate=True, form="blocks of rows that waited")

    def check_fast(self, step=1):
        """The fast path of scalar calls: Vcpu.gva_walk.gva_to_gpa()."""
        self.guest.reset(self.upper)
        for number, space in enumerate(self.guest.spaces):
            vcpu = Vcpu(self.guest.memory, cpu=self.cpu)
            vcpu.set_regs(**self.regs | {"cr3": space.root | self.regs["cr3"] & LAM_U57})
            gva_to_gpa, answer = vcpu.gva_walk.gva_to_gpa, self.expected[number]
            rows = self.chosen[number][::step].tolist()
            for row, gva, access, gpa in zip(rows, (space.gva[rows] | self.tag).tolist(), space.access[rows].tolist(),
                                             answer.gpa[rows].tolist(), strict=True):
                try:
                    actual = gva_to_gpa(gva, access)
                except GuestFault as fault:
                    assert fault.error_code == answer.error_code[row], (self.why, hex(gva), access)
                    assert answer.status[row]
                else:
                    assert actual == gpa, (self.why, hex(int(answer.pte[row])), access)
        if step == 1:
            assert np.array_equal(self.memory, self.guest.buffer), f"{self.why}: accessed and dirty bits"


def registers(mode, bits, pke=False, pkru=0):
    """Regs of a mode with WP, SMEP, SMAP and NXE as the bits of a number; in 2-level paging CR4.PSE in the place of NXE."""
    regs = mode_regs(mode, 0)
    regs["cr0"] = regs["cr0"] & ~WP | (WP if bits & 1 else 0)
    regs["cr4"] |= (SMEP if bits & 2 else 0) | (SMAP if bits & 4 else 0) | (PKE if pke else 0)
    if mode == "32":
        regs["cr4"] = regs["cr4"] & ~0x10 | (0x10 if bits & 8 else 0)
    else:
        regs["efer"] = regs["efer"] & ~NXE | (NXE if bits & 8 else 0)
    return regs | {"pkru": pkru}


def rows_with_keys(guest, keys):
    """Mask over rows: leaves with a key, or that differ from one with a key in nothing else; or all leaves without one."""
    key = guest.leaves >> np.uint64(59) & np.uint64(15)
    if not keys:
        leaves = (key == 0) | (guest.leaves & np.uint64(1 << 62) != 0)
    else:
        leaves = (guest.leaves & np.uint64(BEYOND | LOW | (1 << 62) | (BIT7 if guest.level == 1 else 0)) == 0)
    return np.repeat(leaves, ACCESSES.size)


CPU = CpuModel(maxphyaddr=36)
ONE_STAGE = [(mode, level) for mode in ("32", "pae", "4l", "5l") for level in range(1, min(LEVELS[mode], 4))
             if (mode, level) != ("pae", 3)]


def configurations(mode):
    """Numbers of register sets: all, but of 5-level paging, whose leaves are those of 4-level paging, a few."""
    return (0, 15) if mode == "5l" else range(16)


@pytest.mark.parametrize(("mode", "level"), ONE_STAGE)
def test_one_stage(mode, level):
    """Rights, reserved bits, accessed and dirty bits: WP, SMEP, SMAP, NXE (2-level paging: PSE) and stores or not."""
    guest = guest_of(mode, level)
    rows = rows_with_keys(guest, False)
    for bits in configurations(mode):
        for set_ad in (True, False) if bits in (0, 15) else (True,):
            Run(guest, CPU, registers(mode, bits), set_ad=set_ad, rows=rows, why=f"WP SMEP SMAP NXE {bits:04b}").check_all()


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("pkru", [0, 0b11100100, 0b00011011, 0b00011010])
def test_protection_keys(level, pkru):
    """Four keys with every combination of access and write disable; key 0 denies nothing, all, or writes."""
    guest = guest_of("4l", level)
    rows = rows_with_keys(guest, True)
    for bits in range(8, 16):
        Run(guest, CPU, registers("4l", bits, True, pkru), rows=rows, why=f"PKRU {pkru:08b}, {bits:04b}").check_all()


@pytest.mark.parametrize("pkrs", [0, 0b11100100, 0b00011011])
def test_supervisor_protection_keys(pkrs):
    """The same of IA32_PKRS, alone and beside PKRU."""
    guest = guest_of("4l", 1)
    rows = rows_with_keys(guest, True)
    for bits, pke in product((8, 13), (False, True)):
        regs = registers("4l", bits, pke, 0b00011010) | {"pkrs": pkrs}
        regs["cr4"] |= PKS
        Run(guest, CPU, regs, rows=rows, why=f"PKRS {pkrs:08b}, PKE {pke}, {bits:04b}").check_all()


@pytest.mark.parametrize(("what", "cr4", "cr3", "efer", "tag"), [
    ("LAM, tagged", 0, LAM_U57, 0, 0x7E << 56), ("LAM, not tagged", LAM_SUP, LAM_U57, 0, 0), ("LASS", LASS, 0, 0, 0),
    ("LAM and LASS", LASS | LAM_SUP, LAM_U57, 0, 0x2A << 57), ("UAI", 0, 0, UAIE, 0xFE << 56),
    ("too high a tag", 0, LAM_U57, 0, 1 << 56)])
def test_pre_processed_addresses(what, cr4, cr3, efer, tag):
    """Tags are gone, and halves kept apart, before the leaf is looked at."""
    guest = guest_of("4l", 1)
    rows = rows_with_keys(guest, False)
    for bits in (8, 15):
        regs = registers("4l", bits)
        regs |= {"cr4": regs["cr4"] | cr4, "cr3": cr3, "efer": regs["efer"] | efer}
        run = Run(guest, CPU, regs, rows=rows, tag=tag, why=f"{what}, {bits:04b}")
        run.check_all()
        run.check_fast(29)


@pytest.mark.parametrize("level", [1, 2])
def test_the_encryption_bit(level):
    """Bit 45, which is reserved in the other tests, is no address bit."""
    guest = guest_of("4l", level)
    Run(guest, CpuModel(maxphyaddr=36, c_bit=45), registers("4l", 15), rows=rows_with_keys(guest, False), why="c_bit").check_all()


@pytest.mark.parametrize("level", [1, 2])
def test_ept_with_supervisor_shadow_stacks(level):
    """Bit 60 of a leaf decides over supervisor shadow-stack accesses."""
    guest = guest_of("ept4", level)
    for ad, mbec in product((False, True), repeat=2):
        Run(guest, CPU, None, lambda root, a=ad, m=mbec: Ept(root | 6 | 3 << 3 | a << 6 | 1 << 7, mbec=m),
            why=f"ad={ad} mbec={mbec}").check_all()


@pytest.mark.parametrize("mode", ["32", "pae", "4l"])
def test_upper_entries(mode):
    """The rights of upper entries count as those of the leaf; an accessed bit that is clear there leaves the row to the walk."""
    guest = guest_of(mode, 1)
    rows = rows_with_keys(guest, False)
    changes = {"read-only": (W, 0), "supervisor": (U, 0), "accessed bit clear": (A, 0)}
    if mode != "32":
        changes["execute-disable"] = (0, NX)
    for what, change in changes.items():
        for bits in (8, 15):
            Run(guest, CPU, registers(mode, bits), rows=rows, upper=change, why=f"{what}, {bits:04b}").check_all()


@pytest.mark.parametrize(("mode", "level"), [("32", 2), ("4l", 1), ("4l", 3)])
def test_conformance_kvm(mode, level):
    """The same where KVM's software walker has its say, on a processor without pages of 1G."""
    guest = guest_of(mode, level)
    for bits in (7, 15):
        Run(guest, CpuModel(maxphyaddr=36, gbpages=False, conformance="kvm"), registers(mode, bits),
            rows=rows_with_keys(guest, False), why=f"kvm {bits:04b}").check_all()


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("mbec", [False, True])
def test_ept(level, mbec):
    """Leaves of EPT: rights, memory type, reserved bits, accessed and dirty bits; execute-only, MBEC, EPTP's A/D bit."""
    guest = guest_of("ept4", level)
    for execonly, ad in product((False, True), repeat=2):
        Run(guest, CPU, None, lambda root, e=execonly, a=ad: Ept(root | 6 | 3 << 3 | a << 6, mbec=mbec, execonly=e),
            why=f"execonly={execonly} ad={ad} mbec={mbec}").check_all()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_npt(level):
    """Leaves of nested tables of SVM: every access is a user's, but under GMET."""
    guest = guest_of("4l", level)
    for gmet, nx in product((False, True), repeat=2):
        Run(guest, CPU, None, lambda root, g=gmet, n=nx: Npt(root, cr4=0x20, efer=0x500 | n << 11, gmet=g),
            rows=rows_with_keys(guest, False), why=f"gmet={gmet} nx={nx}").check_all()


@pytest.mark.parametrize(("mode", "level"), ONE_STAGE)
def test_the_fast_path_of_scalar_calls(mode, level):
    """`gva_to_gpa()` answers as the scalar walk does, and sets the same bits."""
    guest = guest_of(mode, level)
    for number, bits in enumerate((0, 15, 9, 14)):
        run = Run(guest, CPU, registers(mode, bits), rows=rows_with_keys(guest, False), why=f"{bits:04b}")
        run.check_fast(1 if number == 1 and mode != "5l" else 7)
    if mode == "4l":
        Run(guest, CPU, registers(mode, 15, True, 0b00011011), rows=rows_with_keys(guest, True), why="keys").check_fast(7)


@pytest.mark.parametrize(("mode", "level"), ONE_STAGE)
def test_the_reference_is_the_scalar_walk(mode, level):
    """Batches of fewer than eight rows are walked row by row."""
    guest = guest_of(mode, level)
    run = Run(guest, CPU, registers(mode, 15))
    rng = np.random.default_rng(3)
    guest.reset()
    for number, space in enumerate(guest.spaces[:2]):
        rows = rng.choice(space.rows.size, 400, replace=False)
        walk, contexts = run.walks[number]
        actual = row_by_row(walk, space.gva[rows], space.access[rows], regs=contexts, ctx=np.zeros(rows.size, np.uint32),
                            fields=COLUMNS + MORE, set_ad=True)
        for column in COLUMNS + MORE:
            run.same(column, getattr(run.expected[number], column)[rows], getattr(actual, column), space, rows, "row by row")


def test_every_answer_occurs():
    """The rows of one test pass and fail in every way that there is; else it would show nothing."""
    guest = guest_of("4l", 1)
    run = Run(guest, CPU, registers("4l", 15, True, 0b00011011))
    codes = set(np.unique(run.expected[0].error_code).tolist())
    assert {0, 0x4, 0x7, 0xD, 0x15, 0x25} <= codes                  # none, not present, rights, reserved, fetch, key
    assert 0.01 < np.mean(run.expected[0].status == 0) < 0.5
