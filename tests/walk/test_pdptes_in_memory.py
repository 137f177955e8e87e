# SPDX-License-Identifier: Apache-2.0
"""PDPTEs of a PAE guest: registers by VMX and without nested paging, words in memory under nested paging of SVM.

Sources: SDM vol. 3, "PDPTE Registers"; APM vol. 2, "Nested Paging", on guests in legacy PAE mode: PDPEs are not loaded when
CR3 is written, but read and checked by each walk.
"""

import numpy as np
import oracle
import oracle_nested
import pytest
from builders import random_tables, words_to_pages
from machines import oracle_access
from nested_matrix import random_controls

from kvmmu import (
    Access,
    CpuModel,
    Ept,
    GeneralProtection,
    GuestFault,
    GuestMemory,
    Host,
    NestedPageFault,
    Npt,
    PageFault,
    Status,
    Vcpu,
    Vm,
)

TABLES, PDPT, PDS, PAGES, BAD = 0x10000, 0x2000, (0x3000, 0x4000), (0x200000, 0x400000), 0x4003
PE, CD, PG, PGE, PAE = 1 << 0, 1 << 30, 1 << 31, 1 << 7, 1 << 5
REGS = {"cr0": PE | PG, "cr3": PDPT, "cr4": PAE, "efer": 0}
USED, UNUSED = 0x123, 0x40000123                # through PDPTE 0, and through PDPTE 1

# The host, and what runs: L1, or L2 under these.
EPT, NPT = Ept(TABLES | 0x1E), Npt(TABLES, cr4=PAE, efer=0xD00)
GUESTS = [(host, stage) for host in (None, "ept", "npt") for stage in ("L1", None)]
GUESTS += [("ept", EPT), ("ept", NPT), ("npt", EPT), ("npt", NPT)]
NAMES = [f"{host} {stage if stage in ('L1', None) else type(stage).__name__}" for host, stage in GUESTS]


def in_memory(host, stage):
    return isinstance(stage, Npt) or (host == "npt" and not isinstance(stage, Ept))


def memory():
    """A PDPT that names two directories of one 2M page each, and an identity second stage of 16 MiB in 2M pages."""
    mem = GuestMemory(16 << 20)
    for gpa, entry in ((PDPT, PDS[0] | 1), (PDPT + 8, PDS[1] | 1), (PDS[0], PAGES[0] | 0xE7), (PDS[1], PAGES[1] | 0xE7),
                       (TABLES, TABLES + 0x1000 | 7), (TABLES + 0x1000, TABLES + 0x2000 | 7)):
        mem.write_u64(gpa, entry)
    for i in range(8):
        mem.write_u64(TABLES + 0x2000 + 8 * i, i << 21 | 0xB7)
    return mem


class Guest:
    """One vCPU that enters the guest in PAE paging, by walks alone (machine False) or on a machine."""

    def __init__(self, host, stage, conformance, machine):
        self.stage, self.machine = stage, machine
        self.mem = memory()
        cpu = CpuModel(vendor="amd" if host == "npt" else "intel", conformance=conformance)
        self.vm = Vm(self.mem, cpu, Host(tdp=host), backing="4k")
        self.vcpu = self.vm.create_vcpu()

    def enter(self):
        if self.stage == "L1":
            self.vcpu.set_regs(**REGS)
        else:
            self.vcpu.set_regs(cr0=PE)
            self.vcpu.enter_nested(self.stage, **REGS)
        return self

    def write(self, gpa, value):
        self.vm.write_guest_physical(gpa, value.to_bytes(8, "little"))

    def read(self, gva):
        """The address, or the error code of the #PF; a walk and a machine say the same."""
        got = outcome(lambda: self.vcpu.gva_walk.gva_to_gpa(gva))
        t = self.vcpu.gva_walk.translate(np.array([gva], np.uint64))
        assert got == (int(t.gpa[0]) if t.status[0] == Status.OK else -int(t.error_code[0]))
        record = self.vcpu.gva_walk.walk_record(gva)
        assert got == (record.gpa if record.status == Status.OK else -record.error_code)
        contexts = self.vcpu.gva_walk.prepare([self.vcpu.regs])
        assert self.vcpu.gva_walk.translate(np.array([gva], np.uint64), regs=contexts).gpa[0] == t.gpa[0]
        if self.machine:
            self.vcpu.invlpg(gva)
            assert got == outcome(lambda: self.vcpu.access(gva).gpa)
        return got


def outcome(call):
    try:
        return call()
    except PageFault as fault:
        return -fault.error_code


@pytest.fixture(params=GUESTS, ids=NAMES)
def kind(request):
    return request.param


@pytest.fixture(params=["sdm", "kvm"])
def guest(request, kind):
    host, stage = kind
    return Guest(host, stage, request.param, machine=not (host == "npt" and isinstance(stage, Ept)))


def test_an_illegal_pdpte_at_entry(kind, guest):
    """Registers: entry is refused, whatever the PDPTE is used for. In memory: the access through it faults with P and RSVD.

    Without L1's nested paging KVM itself checks PDPTEs when L2 is entered, on an NPT host too.
    """
    guest.write(PDPT + 8, BAD)
    if not in_memory(*kind) or kind[1] is None:
        with pytest.raises(GeneralProtection, match="PDPTE 1"):
            guest.enter()
        return
    guest.enter()
    assert guest.vcpu.regs.pdptrs is None
    assert guest.vcpu.pdptrs == (PDS[0] | 1, BAD, 0, 0), "as they are in memory"
    assert (guest.read(USED), guest.read(UNUSED)) == (PAGES[0] | 0x123, -9)


def test_a_pdpte_changed_in_memory(kind, guest):
    """Registers are stale until loaded; a word in memory counts at once, be it legal, illegal or not present."""
    guest.enter()
    assert (guest.read(USED), guest.read(UNUSED)) == (PAGES[0] | 0x123, PAGES[1] | 0x123)
    for value, seen in ((PDS[0] | 1, PAGES[0] | 0x123), (BAD, -9), (1 << 50 | PDS[1] | 1, -9), (BAD & ~1, 0)):
        guest.write(PDPT + 8, value)
        assert guest.read(UNUSED) == (seen if in_memory(*kind) else PAGES[1] | 0x123), hex(value)
        assert guest.vcpu.gva_walk.get_pdptr(1) == (value if in_memory(*kind) else PDS[1] | 1)


@pytest.mark.parametrize(("n", "value"), [(3, PDPT), (0, PE | PG | CD), (4, PAE | PGE)])
def test_loads_of_control_registers(kind, guest, n, value):
    """MOV to CR3, CR0 and CR4 load and check registers; there is nothing to load or to check in memory."""
    guest.enter()
    guest.read(UNUSED)
    guest.write(PDPT + 8, BAD)
    if in_memory(*kind):
        guest.vcpu.mov_cr(n, value)
        assert (guest.read(USED), guest.read(UNUSED)) == (PAGES[0] | 0x123, -9)
    else:
        with pytest.raises(GeneralProtection, match="PDPTE 1"):
            guest.vcpu.mov_cr(n, value)
        assert guest.read(UNUSED) == PAGES[1] | 0x123
    guest.write(PDPT + 8, PDS[0] | 1)
    guest.vcpu.mov_cr(n, value)
    assert guest.read(UNUSED) == PAGES[0] | 0x123


def test_a_pdpt_in_a_hole(kind):
    """Registers cannot be loaded from there; in memory every access finds nothing present."""
    host, stage = kind
    if stage not in ("L1", None):
        return
    vcpu = Vcpu(memory(), tdp=host)
    if host == "npt":
        vcpu.set_regs(**REGS | {"cr3": 0x80000000})
        assert outcome(lambda: vcpu.gva_walk.gva_to_gpa(0)) == outcome(lambda: vcpu.access(0)) == 0
    else:
        with pytest.raises(GeneralProtection, match="hole"):
            vcpu.set_regs(**REGS | {"cr3": 0x80000000})


@pytest.mark.parametrize(("conformance", "address"), [("sdm", 0x40002020), ("kvm", 0x40002000)])
@pytest.mark.parametrize("machine", [False, True])
def test_the_nested_fault_of_a_missing_pdpt_is_the_access_s(machine, conformance, address):
    """VMRUN and MOV to CR3 do not look; the access exits to L1, as a user's write to a table."""
    guest = Guest("npt", NPT, conformance, machine)
    guest.vcpu.set_regs(cr0=PE)
    guest.vcpu.enter_nested(NPT, **REGS | {"cr3": 0x40002020})
    guest.vcpu.mov_cr(3, 0x40002020)
    assert guest.vcpu.pdptrs is None
    with pytest.raises(NestedPageFault) as fault:
        guest.vcpu.access(UNUSED) if machine else guest.vcpu.gva_walk.gva_to_gpa(UNUSED)
    assert fault.value.exit_qualification == 1 << 33 | 6
    assert fault.value.fault_gpa & ~0xFFF == address & ~0xFFF
    if not machine:
        assert fault.value.fault_gpa == address
        assert guest.vcpu.gva_walk.walk_record(UNUSED).status == Status.NESTED_PAGE_FAULT


def test_the_guest_s_accessed_bits_and_entries_of_a_walk():
    """A PDPTE has no accessed bit; the second stage's page of it becomes dirty, as that of any table."""
    guest = Guest("npt", NPT, "sdm", False)
    guest.mem.write_u64(TABLES + 0x2000, 0x7 | 0x80)
    guest.enter()
    record = guest.vcpu.gva_walk.walk_record(USED)
    assert [(step.level, step.gpa) for step in record.steps] == [(3, PDPT), (2, PDS[0])]
    assert record.refs == 2 + 3 * 3
    assert guest.vcpu.gva_walk.gva_to_gpa(USED) == PAGES[0] | 0x123
    assert guest.mem.read_u64(PDPT) == PDS[0] | 1
    assert guest.mem.read_u64(TABLES + 0x2000) == 0xE7


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("nested", [False, True])
def test_every_engine_against_the_oracle(nested, conformance):
    """Adversarial tables with many a bad PDPTE: batches, single rows, scalar calls, records and the machine, on an NPT host."""
    statuses = set()
    for number in range(8):
        rng = np.random.default_rng([number, nested, 21])
        tables = random_tables(rng, "pae", gvas=300, maxphyaddr=36, memsize=16 << 20)
        for i in range(4):
            if rng.random() < 0.5:
                tables.words[tables.cr3 + 8 * i] ^= 1 << int(rng.choice([0, 1, 2, 3, 5, 8, 9, 35, 36, 63]))
        registers = random_controls(rng, "pae", tables.cr3)
        access = rng.choice([0, 2, 4, 6, 8, 10, 16, 20, 32, 34], len(tables.gvas)).astype(np.uint8)
        gva = np.array(tables.gvas, np.uint64)
        words = dict(tables.words)
        if nested:
            words |= {0x3F000000: 0x3F001007, 0x3F001000: 0x3F002007}
            words |= {0x3F002000 + 8 * i: i << 21 | 0xE7 for i in range(512)}
        cpu = CpuModel(maxphyaddr=36, vendor="amd", conformance=conformance)
        stage = Npt(0x3F000000, cr4=PAE, efer=0xD00) if nested else None

        def new(cpu=cpu, stage=stage, registers=registers, words=words):
            mem = GuestMemory.from_pages(*words_to_pages(words))
            vcpu = Vcpu(mem, cpu, tdp="npt")
            if stage is None:
                vcpu.set_regs(**registers)
            else:
                vcpu.enter_nested(stage, **registers)
            return mem, vcpu

        memory_ = oracle.Memory(dict(words), size=1 << 36)
        judge = oracle.Cpu(vendor="amd", maxphyaddr=36, conformance=conformance)
        regs = oracle.Regs(*(registers[name] for name in ("cr0", "cr3", "cr4", "efer", "pkru")))
        want = []
        for address, kind in zip(tables.gvas, access.tolist(), strict=True):
            how = oracle_access(Access(kind))
            r = (oracle.translate(memory_, judge, regs, address, **how) if stage is None else oracle_nested.translate_nested(
                memory_, judge, regs, oracle_nested.Npt(stage.ncr3, stage.cr4, stage.efer), address, **how))
            want.append((r.gpa if r.status == "ok" else None, r.error_code, r.level))
            statuses.add((r.status, r.error_code & 9 if r.level == 3 else -1))

        mem, vcpu = new()
        rows = [vcpu.gva_walk.translate(gva[i:i + 1], access[i:i + 1], fields=("gpa", "error_code", "level", "status"))
                for i in range(gva.size)]
        assert [triple(t, 0) for t in rows] == want
        assert {gpa: mem.read_u64(gpa) for gpa in words} == {gpa: memory_.words[gpa] for gpa in words}
        mem, vcpu = new()
        got = []
        for address, kind in zip(tables.gvas, access.tolist(), strict=True):
            record = vcpu.gva_walk.walk_record(address, kind)
            got.append((record.gpa, record.error_code, record.level))
            try:
                assert vcpu.gva_walk.gva_to_gpa(address, kind) == record.gpa
            except GuestFault:
                assert record.gpa is None
        assert [row for row in got if row[0] is None] == [row for row in want if row[0] is None]
        assert [row[:2] for row in got] == [row[:2] for row in want]
        # on tables that no walk changes any more, in which order rows come is of no account
        whole = vcpu.gva_walk.translate(gva, access, fields=("gpa", "error_code", "level", "status"))
        alone = [vcpu.gva_walk.translate(gva[i:i + 1], access[i:i + 1], fields=("gpa", "error_code", "level", "status"))
                 for i in range(gva.size)]
        assert [triple(whole, i) for i in range(gva.size)] == [triple(t, 0) for t in alone]
        if conformance == "sdm" and not nested:
            mem, vcpu = new()
            for i in range(gva.size):
                vcpu.invlpg(tables.gvas[i])
                r = vcpu.access(gva[i:i + 1], access[i:i + 1])
                assert (int(r.gpa[0]) if r.status[0] == Status.OK else None, int(r.error_code[0])) == want[i][:2]
    assert {("ok", -1), ("page_fault", 0), ("page_fault", 9)} <= statuses


def triple(t, i):
    return (int(t.gpa[i]) if t.status[i] == Status.OK else None), int(t.error_code[i]), int(t.level[i])
