# SPDX-License-Identifier: Apache-2.0
"""The package against the oracle on adversarial random tables: status, error code, gpa, level, rule and memory.

Every case is run by the oracle, by a scalar call and in a batch, each on a memory of its own, in which A/D bits
accumulate.  KVMMU_DIFF_SEEDS sets the number of seeds per mode and processor model for longer runs.
"""

import os

import numpy as np
import oracle
import pytest
from builders import LEVELS, PageTables, index_of, random_tables, sign_extend, words_to_pages
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from machines import ACCESSES, NXE, PKE, SMAP, SMEP, WP, oracle_access, oracle_cpu, scalar
from random_guests import random_registers

from kvmmu import Access, CpuModel, GeneralProtection, GuestMemory, Regs, Status, Vcpu

SEEDS = int(os.environ.get("KVMMU_DIFF_SEEDS", "6"))
MODES = ("32", "pae", "4l", "5l")
STATUS = {"ok": Status.OK, "page_fault": Status.PAGE_FAULT, "non_canonical": Status.NON_CANONICAL,
          "lass_violation": Status.LASS_VIOLATION}
SHADOW_STACKS = tuple(Access.SHADOW_STACK | a for a in (0, Access.WRITE, Access.USER, Access.USER | Access.WRITE, Access.AC))
FIELDS = ("gpa", "status", "error_code", "level", "pte_access")
INVALID = 2**64 - 1


class Trio:
    """One set of tables three times: the oracle's memory, a vCPU for scalar calls, a vCPU for batches."""

    def __init__(self, words, pages, cpu, registers):
        self.cpu = cpu
        self.registers = registers
        gpas, data = words_to_pages(words, pages)
        self.gpas = gpas
        exists = {gpa >> 12 for gpa in gpas.tolist()}
        self.memory = oracle.Memory(dict(words))
        self.memory.exists = lambda gpa: gpa >> 12 in exists
        self.scalar, self.batch = (Vcpu(GuestMemory.from_pages(gpas, data), cpu=cpu) for _ in range(2))

    def load(self):
        """Load the registers everywhere; False if that is a #GP, which all three must agree on."""
        self.oracle_regs = oracle.Regs(**self.registers)
        legal = True
        if self.registers["cr4"] & 1 << 5 and not self.registers["efer"] & oracle.EFER_LMA:
            pdptrs = oracle.load_pdptrs(self.memory, oracle_cpu(self.cpu), self.oracle_regs)
            legal = pdptrs is not None
            self.oracle_regs = oracle.Regs(**self.registers, pdptrs=pdptrs)
        for vcpu in (self.scalar, self.batch):
            try:
                vcpu.set_regs(**self.registers)
                assert legal, "an illegal state was loaded"
            except GeneralProtection as fault:
                assert not legal, str(fault)
        return legal

    def compare(self, gvas, accesses, why):
        """Run all cases in all three ways."""
        t = self.batch.gva_walk.translate(np.array(gvas, np.uint64), np.array(accesses, np.uint8), fields=FIELDS)
        rows = zip(*(getattr(t, name).tolist() for name in FIELDS), strict=True)
        cpu = oracle_cpu(self.cpu)
        for gva, access, (gpa, status, error_code, level, rights) in zip(gvas, accesses, rows, strict=True):
            case = f"{why}: {Access(access)!r} of {gva:#x}"
            expected = oracle.translate(self.memory, cpu, self.oracle_regs, gva, **oracle_access(access))
            expected_gpa = INVALID if expected.gpa is None else expected.gpa
            assert (STATUS[expected.status], expected.error_code, expected_gpa, expected.level) == (
                status, error_code, gpa, level), f"batch, {case}"
            status, gpa, error_code, level, rule = scalar(self.scalar.gva_walk, gva, access)
            assert (STATUS[expected.status], expected.error_code, expected.gpa) == (status, error_code, gpa), f"scalar, {case}"
            if status:
                assert (expected.level, expected_rule(expected, access, rights)) == (
                    level, "not-present" if rule == "hole" else rule), f"scalar, {case}"
        self.compare_memory(why)

    def compare_memory(self, why):
        """Every byte of the three memories."""
        _, expected = words_to_pages(self.memory.words, self.gpas.tolist())
        for name, vcpu in (("scalar", self.scalar), ("batch", self.batch)):
            actual = np.array([np.frombuffer(vcpu.mem.read(gpa, 4096), np.uint64) for gpa in self.gpas.tolist()])
            wrong = np.argwhere(expected != actual)
            assert wrong.size == 0, (f"{name}, {why}: {len(wrong)} words of memory differ, first at "
                                     f"{int(self.gpas[wrong[0][0]]) + 8 * int(wrong[0][1]):#x}")


def expected_rule(result, access, rights):
    """The oracle's rule; where U and W are both missing the package names W, as its rule() documents."""
    if result.status == "non_canonical":
        return "non-canonical"
    if result.status == "lass_violation":
        return "lass"
    if result.rule == "user" and access & Access.WRITE and not result.error_code & 0x40 and not rights & 2:
        return "write"
    return result.rule


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("vendor", ["intel", "amd"])
@pytest.mark.parametrize("mode", MODES)
def test_oracle_scalar_and_batch_agree(mode, vendor, conformance):
    """All modes, vendors and conformances; random controls, MAXPHYADDR, 1G and PSE-36 support, and a hole."""
    for number in range(SEEDS):
        why = f"{mode} {vendor} {conformance} seed {number}"
        rng = np.random.default_rng([number, MODES.index(mode), vendor == "amd", conformance == "kvm"])
        cpu = CpuModel(vendor=vendor, conformance=conformance, maxphyaddr=int(rng.choice([32, 36, 38, 40, 46, 51, 52])),
                       gbpages=bool(rng.integers(2)), pse36=bool(rng.integers(2)))
        holes = [(0x104000, 0x105000)]
        tables = random_tables(rng, mode, gvas=400, maxphyaddr=cpu.maxphyaddr, holes=holes)
        words = {gpa: value for gpa, value in tables.words.items() if gpa >> 12 != 0x104}
        trio = Trio(words, [tables.cr3], cpu, None)
        for _ in range(3):
            trio.registers = random_registers(rng, mode, tables.cr3)
            if trio.load():
                trio.compare(tables.gvas, rng.choice(ACCESSES, len(tables.gvas)).tolist(), why)


def with_extensions(rng, registers, mode, cpu):
    """Registers with the controls of extensions at random."""
    registers["pkrs"] = int(rng.integers(0, 1 << 32))
    if cpu.conformance == "sdm":
        registers["cr4"] |= (1 << 24) * int(rng.integers(2))
    if mode not in ("4l", "5l"):
        return registers
    registers["cr3"] |= int(rng.integers(4)) << 61
    registers["cr4"] |= (1 << 28) * int(rng.integers(2))
    if cpu.conformance == "sdm":
        registers["cr4"] |= (1 << 27) * int(rng.integers(2))
        if rng.integers(3) == 0:                        # no processor has it beside LAM
            registers["efer"] |= 1 << 20
            registers["cr3"] &= ~(3 << 61)
            registers["cr4"] &= ~(1 << 28)
    return registers


def with_tags(rng, mode, gvas):
    """Some addresses with bits that LAM or UAI may take away."""
    if mode not in ("4l", "5l"):
        return gvas
    return [gva ^ int(rng.integers(1 << 16)) << 48 if rng.integers(2) else gva for gva in gvas]


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("mode", MODES)
def test_extensions_agree(mode, conformance):
    """LAM, UAI, LASS, PKS, shadow stacks and the encryption bit on the same tables."""
    for number in range(SEEDS):
        rng = np.random.default_rng([number, MODES.index(mode), conformance == "kvm", 1234])
        cpu = CpuModel(conformance=conformance, maxphyaddr=int(rng.choice([36, 40, 46])),
                       vendor=str(rng.choice(["intel", "amd"])), c_bit=int(rng.integers(36, 52)) if rng.integers(2) else None)
        tables = random_tables(rng, mode, gvas=400, maxphyaddr=cpu.maxphyaddr)
        trio = Trio(tables.words, [tables.cr3], cpu, None)
        for _ in range(4):
            trio.registers = with_extensions(rng, random_registers(rng, mode, tables.cr3), mode, cpu)
            accesses = ACCESSES
            if trio.registers["cr0"] & WP:              # else a write could make a shadow stack, and rows have no order
                trio.registers["cr4"] |= 1 << 23
                accesses = ACCESSES + SHADOW_STACKS
            if trio.load():
                trio.compare(with_tags(rng, mode, tables.gvas), rng.choice(accesses, len(tables.gvas)).tolist(),
                             f"{mode} {conformance} seed {number}")


@pytest.mark.parametrize("mode", MODES)
def test_every_maxphyaddr(mode):
    """32 to 52, with reserved address bits of every width in the tables."""
    for maxphyaddr in range(32, 53):
        rng = np.random.default_rng([maxphyaddr, MODES.index(mode)])
        tables = random_tables(rng, mode, gvas=150, maxphyaddr=maxphyaddr)
        cpu = CpuModel(maxphyaddr=maxphyaddr, vendor=str(rng.choice(["intel", "amd"])))
        trio = Trio(tables.words, [tables.cr3], cpu, random_registers(rng, mode, tables.cr3))
        if trio.load():
            trio.compare(tables.gvas, rng.choice(ACCESSES, len(tables.gvas)).tolist(), f"{mode} MAXPHYADDR {maxphyaddr}")


def test_reads_of_the_same_tables_in_every_mode():
    """One memory, four roots, registers of all modes in one batch by regs and ctx."""
    for number in range(SEEDS):
        rng = np.random.default_rng([number, 99])
        words, sets, gvas, ctx = {}, [], [], []
        for index, mode in enumerate(MODES):
            tables = random_tables(rng, mode, gvas=100, base=0x100000 * (index + 1))
            words.update(tables.words)
            sets.append((mode, random_registers(rng, mode, tables.cr3)))
            gvas += tables.gvas
            ctx += [index] * len(tables.gvas)
        memory, cpu = oracle.Memory(dict(words)), CpuModel(maxphyaddr=40)
        exists = {gpa >> 12 for gpa in words}
        memory.exists = lambda gpa, exists=exists: gpa >> 12 in exists
        judged = [oracle.Regs(**regs, pdptrs=oracle.load_pdptrs(memory, oracle_cpu(cpu), oracle.Regs(**regs))
                              if mode == "pae" else None) for mode, regs in sets]
        if judged[1].pdptrs is None:
            continue
        vcpu = Vcpu(GuestMemory.from_pages(*words_to_pages(words)), cpu=cpu)
        order = rng.permutation(len(gvas))
        accesses = rng.choice(ACCESSES, len(gvas)).astype(np.uint8)
        t = vcpu.gva_walk.translate(np.array(gvas, np.uint64)[order], accesses, regs=[Regs(**regs) for _, regs in sets],
                                    ctx=np.array(ctx, np.uint32)[order])
        for row, source in enumerate(order.tolist()):
            expected = oracle.translate(memory, oracle_cpu(cpu), judged[ctx[source]], gvas[source],
                                        **oracle_access(int(accesses[row])))
            assert (STATUS[expected.status], expected.error_code, INVALID if expected.gpa is None else expected.gpa) == (
                t.status[row], t.error_code[row], t.gpa[row]), f"seed {number}: {gvas[source]:#x}"


# ---- the same, steered by hypothesis --------------------------------------------------------------------------------

BITS = st.integers(0, 63)


@st.composite
def small_cases(draw):
    """Tables that map one address, with a few bits flipped in the entries of its walk; small enough to read."""
    mode = draw(st.sampled_from(MODES))
    gva = sign_extend(draw(st.sampled_from([0, 0x1000, 0x40201000, 0x7FFFFFF000, 2**63, 2**64 - 0x1000])), mode)
    level = draw(st.integers(1, 2 if mode in ("32", "pae") else 3))
    tables = PageTables(mode)
    tables.map(gva, draw(st.sampled_from([0, 0x40000000, 0x80000000])),
               draw(st.sampled_from(["p w u", "p w u a d", "p u", "p w", "p"])), level=level)
    for at in range(level, LEVELS[mode] + 1):
        for bit in draw(st.lists(BITS, max_size=2)):
            if bit < 8 * tables.entry_size:
                gpa = (tables.cr3 + tables.entry_size * index_of(gva, at, mode) if at == LEVELS[mode]
                       else walk_down(tables, gva, at))
                if gpa is not None:
                    tables.write(gpa, tables.read(gpa) ^ 1 << bit)
    registers = tables.regs()
    for name, mask in (("cr0", WP), ("cr4", SMEP), ("cr4", SMAP), ("cr4", PKE), ("cr4", 1 << 4), ("efer", NXE)):
        registers[name] ^= mask * draw(st.booleans())
    registers["pkru"] = draw(st.sampled_from([0, 0x55555555, 0xAAAAAAAA, 0xFFFFFFFF, 1, 2]))
    cpu = CpuModel(vendor=draw(st.sampled_from(["intel", "amd"])), maxphyaddr=draw(st.integers(32, 52)),
                   gbpages=draw(st.booleans()), pse36=draw(st.booleans()), conformance=draw(st.sampled_from(["sdm", "kvm"])))
    accesses = draw(st.lists(st.sampled_from(ACCESSES), min_size=1, max_size=4))
    return tables, cpu, registers, gva | draw(st.sampled_from([0, 8, 0xFFF])), accesses


def walk_down(tables, gva, level):
    try:
        return tables.entry_gpa(gva, level)
    except KeyError:
        return None


@seed(20260521)
@settings(max_examples=100 * SEEDS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(small_cases())
def test_small_tables(case):
    """Tables, registers and accesses chosen by hypothesis, which shrinks what it finds."""
    tables, cpu, registers, gva, accesses = case
    trio = Trio(tables.words(), tables.tables(), cpu, registers)
    if trio.load():
        trio.compare([gva] * len(accesses), accesses, f"{cpu} {registers}")
