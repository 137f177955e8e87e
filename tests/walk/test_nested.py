"""Transitions into and out of a nested guest, and what the two walks are meanwhile."""

import numpy as np
import pytest
from builders import PageTables
from nested_guests import EPT_WB_LEAF, GPA, GVA, NGPA, ROOT2, SIZE, eptp, guest

import kvmmu
from kvmmu import Access, CpuModel, Ept, EptViolation, GeneralProtection, NestedPageFault, Npt, Regs, Vcpu


def machine(mem, **model):
    vcpu = Vcpu(mem, cpu=CpuModel(maxphyaddr=48, **model))
    vcpu.set_regs(cr0=0x80010033, cr3=0x10_0000, cr4=0x20, efer=0xD00)
    return vcpu


@pytest.mark.parametrize(("levels", "stage", "refs"), [(4, 4, 24), (5, 4, 29), (4, 5, 29), (5, 5, 35)])
def test_references(levels, stage, refs):
    """4-on-4 reads 24 entries, 5-on-5 35; the record numbers as many."""
    mem, l2 = guest(levels, stage)
    vcpu = machine(mem)
    vcpu.enter_nested(Ept(eptp(stage)), **l2)
    t = vcpu.gva_walk.translate(np.array([GVA], np.uint64), Access.USER, fields=("gpa", "ngpa", "refs", "status"))
    assert (t.status[0], t.gpa[0], t.ngpa[0], t.refs[0]) == (0, GPA, NGPA, refs)
    record = vcpu.gva_walk.walk_record(GVA, Access.USER)
    assert record.refs == refs == sum(1 + len(step.nested.steps) for step in record.steps) + len(record.final.steps)


def test_enter_and_leave_are_one_gva_walk():
    """One object, re-initialised: the role tells guest mode; L1's registers come back; leaving twice is harmless."""
    mem, l2 = guest()
    vcpu = machine(mem)
    walk, regs = vcpu.gva_walk, vcpu.regs
    assert not vcpu.mmu_is_nested
    vcpu.enter_nested(Ept(eptp()), **l2)
    assert vcpu.gva_walk is walk
    assert walk.cpu_role.guest_mode
    assert vcpu.mmu_is_nested
    assert vcpu.ngpa_walk.cpu_role.level == 4
    assert vcpu.ngpa_walk.get_guest_pgd() == eptp()
    assert walk.gva_to_gpa(GVA, Access.USER) == GPA
    vcpu.leave_nested()
    vcpu.leave_nested()
    assert vcpu.regs == regs
    assert not walk.cpu_role.guest_mode
    assert not vcpu.mmu_is_nested
    with pytest.raises(RuntimeError, match="not in use"):
        vcpu.ngpa_walk.gva_to_gpa(0)


def test_translate_gpa_is_total():
    """The identity outside nesting and for ngpa_walk's own addresses; the second stage for gva_walk under one."""
    mem, l2 = guest()
    vcpu = machine(mem)
    assert vcpu.translate_gpa(vcpu.gva_walk, NGPA) == NGPA
    vcpu.enter_nested(None, cr0=0x11, efer=0)
    assert vcpu.translate_gpa(vcpu.gva_walk, NGPA) == NGPA
    assert not vcpu.mmu_is_nested
    vcpu.enter_nested(Ept(eptp()), **l2)
    assert vcpu.translate_gpa(vcpu.gva_walk, NGPA) == GPA
    assert vcpu.translate_gpa(vcpu.ngpa_walk, NGPA) == NGPA
    with pytest.raises(EptViolation) as caught:
        vcpu.translate_gpa(vcpu.gva_walk, SIZE * 2, Access.WRITE)
    assert caught.value.fault_gpa == SIZE * 2


@pytest.mark.parametrize("user", [False, True])
def test_mbec_toggled_between_entries(user):
    """An entry that only supervisors may execute (X without bit 10): MBEC makes user-mode addresses fault, and a new role."""
    mem, l2 = guest(leaf=EPT_WB_LEAF)
    vcpu = machine(mem)
    gva = np.array([GVA], np.uint64)
    statuses, roles = [], []
    for mbec in (False, True, False):
        vcpu.enter_nested(Ept(eptp(), mbec=mbec), **l2)
        t = vcpu.gva_walk.translate(gva, Access.FETCH | (Access.USER if user else 0))
        statuses.append(int(t.status[0]))
        roles.append(vcpu.ngpa_walk.cpu_role.cr4_smep)
    assert roles == [False, True, False]
    assert statuses == [0, int(kvmmu.Status.EPT_VIOLATION), 0]      # by U/S of L2's page, not by CPL: the page is a user page


def test_gmet_toggled_between_entries():
    """GMET: a supervisor fetch from a U=1 nested page faults; without it every access is a user's."""
    mem, l2 = guest(kind="npt")
    tables = PageTables("4l", base=0x10_0000)
    tables.map(GVA, NGPA, "p w a d")                                # a supervisor page of L2
    for gpa, value in tables.words().items():
        mem.write_u64(gpa, value)
    vcpu = machine(mem, vendor="amd")
    outcomes = []
    for gmet in (False, True, False):
        vcpu.enter_nested(Npt(ROOT2, gmet=gmet), **l2)
        try:
            outcomes.append(vcpu.gva_walk.gva_to_gpa(GVA, Access.FETCH))
        except NestedPageFault as fault:
            outcomes.append(hex(fault.exit_qualification))
    assert outcomes == [GPA, "0x100000011", GPA]


def test_paging_off_in_l2():
    """CR0.PG=0: the address is L2's physical one, and under MBEC a user-mode address."""
    mem, _ = guest()
    vcpu = machine(mem)
    vcpu.enter_nested(Ept(eptp()), cr0=0x11, cr4=0, efer=0)
    assert vcpu.gva_walk.gva_to_gpa(NGPA + 5) == GPA + 5
    vcpu.enter_nested(Ept(eptp(), mbec=True), cr0=0x11, cr4=0, efer=0)
    with pytest.raises(EptViolation):
        vcpu.gva_walk.gva_to_gpa(NGPA, Access.FETCH)


@pytest.mark.parametrize(("conformance", "qualification"), [("sdm", 0x1), ("kvm", 0x83)])
def test_pdptes_load_through_the_second_stage(conformance, qualification):
    """A PAE guest's PDPTEs: read at L2's physical CR3; if that is not mapped, L1 sees the exit and nothing changed (row D17)."""
    mem, _ = guest()
    mem.write_u64(GPA, 0x50_0001)
    mem.write_u64(GPA + 8, 0x51_0001)
    vcpu = machine(mem, conformance=conformance)
    pae = {"cr0": 0x80010033, "cr4": 0x20, "efer": 0}
    vcpu.enter_nested(Ept(eptp()), cr3=NGPA, **pae)
    assert vcpu.pdptrs == (0x50_0001, 0x51_0001, 0, 0)
    vcpu.leave_nested()
    regs = vcpu.regs
    with pytest.raises(EptViolation) as caught:
        vcpu.enter_nested(Ept(eptp()), cr3=SIZE * 4, **pae)
    assert caught.value.exit_qualification == qualification
    assert vcpu.regs == regs
    assert not vcpu.mmu_is_nested
    vcpu.enter_nested(Ept(eptp()), cr3=SIZE * 4, pdptrs=(1, 0, 0, 0), **pae)        # VM entry may bring them along
    assert vcpu.pdptrs == (1, 0, 0, 0)


def test_entries_that_are_refused():
    """Errors of the caller name what is allowed; illegal registers of L2 leave L1 running."""
    mem, l2 = guest()
    vcpu = machine(mem)
    for bad in (ROOT2 | 6, ROOT2 | 1 | 3 << 3, eptp() | 0x100):
        with pytest.raises(ValueError, match="eptp"):
            Ept(bad)
    with pytest.raises(ValueError, match="page_1g"):
        Ept(eptp(), page_2m=False, page_1g=True)
    with pytest.raises(ValueError, match="tdp=None"):
        Vcpu(mem, tdp=None).enter_nested(Ept(eptp()))
    with pytest.raises(ValueError, match="MAXPHYADDR"):
        vcpu.enter_nested(Npt(1 << 50), **l2)
    with pytest.raises(TypeError, match="Ept"):
        vcpu.enter_nested("ept", **l2)
    with pytest.raises(GeneralProtection):
        vcpu.enter_nested(Ept(eptp()), **{**l2, "cr0": 1 << 31})
    with pytest.raises(TypeError, match="cr9"):
        vcpu.enter_nested(Ept(eptp()), cr9=0)
    with pytest.raises(RuntimeError, match="not in use"):
        vcpu.ngpa_walk.gva_to_gpa(0)
    assert not vcpu.mmu_is_nested
    assert not vcpu.gva_walk.cpu_role.guest_mode


def test_rows_choose_their_second_stage():
    """A batch mixes L1, L2 under EPT, and a plain Regs under what is in force."""
    mem, l2 = guest()
    vcpu = machine(mem)
    regs = Regs(**l2)
    vcpu.enter_nested(Ept(eptp()), **l2)
    t = vcpu.gva_walk.translate(np.full(3, GVA, np.uint64), Access.USER, regs=[regs, (regs, None), (regs, Ept(eptp(ad=True)))],
                                ctx=np.arange(3, dtype=np.uint32))
    assert t.gpa.tolist() == [GPA, NGPA, GPA]
    with pytest.raises(ValueError, match="first stage"):
        vcpu.ngpa_walk.translate(np.zeros(1, np.uint64), regs=[regs])


@pytest.mark.parametrize("rows", [1, 500])
@pytest.mark.parametrize("kind", ["ept", "npt"])
def test_ngpa_walk_reports_the_leaf_of_the_second_stage(kind, rows):
    """Through ngpa_walk, level, pte, pte_gpa and pte_access are those of the second stage, in whatever way a row is found."""
    mem, l2 = guest(kind=kind)
    vcpu = machine(mem)
    vcpu.enter_nested(Ept(eptp()) if kind == "ept" else Npt(ROOT2, cr4=0x20, efer=0xD00), **l2)
    t = vcpu.ngpa_walk.translate(np.full(rows, NGPA, np.uint64), Access.USER,
                                 fields=("gpa", "level", "pte", "pte_gpa", "pte_access"))
    entry_gpa = ROOT2 + 0x3000 + 0x1000 * (NGPA >> 21) + 8 * (NGPA >> 12 & 511)
    assert set(t.gpa.tolist()) == {GPA}
    assert set(t.level.tolist()) == {1}
    assert set(t.pte_gpa.tolist()) == {entry_gpa}
    assert set(t.pte.tolist()) == {mem.read_u64(entry_gpa)}
    assert set(t.pte_access.tolist()) == {0xB if kind == "ept" else 0xF}
    for n in (1, rows, 4 * rows):
        levels = vcpu.ngpa_walk.translate(np.full(n, NGPA, np.uint64), Access.USER, fields=("gpa", "level")).level
        assert set(levels.tolist()) == {1}
