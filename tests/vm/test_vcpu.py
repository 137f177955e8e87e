# SPDX-License-Identifier: Apache-2.0
"""Registers of a vCPU: which values and transitions are legal, what they reload, and that a refusal changes nothing.

Sources: SDM vol. 3, "Control Registers", "Paging Modes and Control Bits", "PDPTE Registers", "Initializing IA-32e Mode",
"Process-Context Identifiers (PCIDs)"; vol. 2, "MOV-Move to/from Control Registers".
"""

import itertools
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import builders
import numpy as np
import pytest
from guest_modes import (
    CD,
    CET,
    ET,
    LA57,
    LMA,
    LME,
    LONG,
    MODES,
    NW,
    NXE,
    PAE,
    PAE_MODE,
    PAGES,
    PCIDE,
    PDS,
    PE,
    PG,
    PGE,
    PKE,
    ROOT,
    SMAP,
    SMEP,
    WP,
    machine,
    pae_memory,
    refused,
)

import kvmmu
from kvmmu import Access, CpuModel, GeneralProtection, GuestMemory, InvalidOpcode, PageFault, PageWalk, Regs, Vcpu

NOFLUSH = 1 << 63


# -- which states are legal ---------------------------------------------------------------------------------------------

def legal(cr0, cr4, efer):
    """CR0, CR4 and EFER go together, by the manual; one condition a line."""
    long_mode = bool(cr0 & PG and efer & LME)
    return not (
        cr0 & PG and not cr0 & PE
        or cr0 & NW and not cr0 & CD
        or long_mode and not cr4 & PAE
        or long_mode != bool(efer & LMA)
        or cr4 & PCIDE and not efer & LMA
        or cr4 & CET and not cr0 & WP)


def subsets(*bits):
    return [sum(chosen) for n in range(len(bits) + 1) for chosen in itertools.combinations(bits, n)]


STATES = list(itertools.product(subsets(PE, PG, WP, NW, CD), subsets(PAE, LA57, PCIDE, CET), subsets(LME, LMA, NXE)))


def test_set_regs_takes_exactly_the_legal_combinations():
    """Every combination of the control bits that depend on each other; a refused one changes nothing at all."""
    vcpu, taken = machine(), 0
    for cr0, cr4, efer in STATES:
        if legal(cr0, cr4, efer):
            vcpu.set_regs(cr0=cr0, cr4=cr4, efer=efer)
            assert (vcpu.regs.cr0, vcpu.regs.cr4, vcpu.regs.efer) == (cr0, cr4, efer)
            taken += 1
        else:
            before = vcpu.regs, vcpu.gva_walk.cpu_role.word, vcpu.gva_walk.init_count
            with pytest.raises(GeneralProtection):
                vcpu.set_regs(cr0=cr0, cr4=cr4, efer=efer, cr3=0x5000, pkru=1)
            assert (vcpu.regs, vcpu.gva_walk.cpu_role.word, vcpu.gva_walk.init_count) == before
    assert 100 < taken < len(STATES) / 2


@pytest.mark.parametrize(("good", "bad", "rule", "word"), [
    ({"cr0": PG | PE}, {"cr0": PG}, "cr0-pg-without-pe", "PE"),
    ({"cr0": NW | CD}, {"cr0": NW}, "cr0-nw-without-cd", "CD"),
    ({"cr0": 0xFFFFFFFF & ~PG}, {"cr0": 1 << 32}, "cr0-reserved", "63:32"),
    ({"cr4": PAE}, {"cr4": 1 << 26}, "cr4-reserved", "0x4000000"),
    ({"cr4": 1 << 14}, {"cr4": 1 << 15}, "cr4-reserved", "0x8000"),
    ({"cr4": 1 << 25}, {"cr4": 1 << 63}, "cr4-reserved", "0x8000000000000000"),
    ({"efer": NXE | 1}, {"efer": 1 << 9}, "efer-reserved", "0x200"),
    ({"cr4": CET, "cr0": WP}, {"cr4": CET}, "cet-without-wp", "CR0.WP"),
    (LONG, LONG | {"cr4": 0}, "long-mode-without-pae", "CR4.PAE"),
    (LONG, LONG | {"efer": LME}, "long-mode-without-lma", "EFER.LMA"),
    (LONG, LONG | {"efer": LMA}, "lma-without-long-mode", "EFER.LMA"),
    (LONG | {"cr4": PAE | PCIDE}, PAE_MODE | {"cr4": PAE | PCIDE}, "pcide-outside-long-mode", "long mode")])
def test_a_refusal_names_its_rule(good, bad, rule, word):
    vcpu = machine()
    error = refused(vcpu, vcpu.set_regs, **bad)
    assert (error.rule, word in str(error)) == (rule, True)
    vcpu.set_regs(**good)


@pytest.mark.parametrize("maxphyaddr", [32, 36, 46, 48, 52])
@pytest.mark.parametrize("mode", ["4l", "5l"])
def test_cr3_bits_from_maxphyaddr_up_are_reserved(mode, maxphyaddr):
    """CR3 holds a physical address: each bit from MAXPHYADDR up is refused, by set_regs and by MOV to CR3 alike."""
    vcpu = machine(MODES[mode], maxphyaddr=maxphyaddr, lam=False)
    for bit in range(12, 64):
        for load in (lambda value: vcpu.set_regs(cr3=value), lambda value: vcpu.mov_cr(3, value)):
            if bit < maxphyaddr:
                load(1 << bit)
                assert vcpu.regs.cr3 == vcpu.gva_walk.get_guest_pgd() == 1 << bit
            else:
                error = refused(vcpu, load, 1 << bit)
                assert (error.rule, f"MAXPHYADDR {maxphyaddr}" in str(error)) == ("cr3-reserved", True)


@pytest.mark.parametrize(("feature", "cr4", "efer", "outside"), [
    ("la57", LA57, 0, True), ("pcid", PCIDE, 0, False), ("smep", SMEP, 0, True), ("smap", SMAP, 0, True), ("pku", PKE, 0, True),
    ("nx", 0, NXE, True)])
def test_a_feature_named_off_has_no_control_bit(feature, cr4, efer, outside):
    """The bit is reserved on a model without the feature, whichever way it is written."""
    base = MODES["off"] if outside else LONG
    for has in (True, False):
        vcpu = machine(base, **{feature: has})
        writes = [lambda v=vcpu: v.set_regs(cr4=base["cr4"] | cr4, efer=base["efer"] | efer)]
        writes.append((lambda v=vcpu: v.mov_cr(4, base["cr4"] | cr4)) if cr4 else (lambda v=vcpu: v.wrmsr_efer(efer)))
        for write in writes:
            vcpu.set_regs(cr3=0, **base)
            if has:
                write()
                assert (vcpu.regs.cr4 & cr4, vcpu.regs.efer & efer) == (cr4, efer)
            else:
                assert f"{cr4 or efer:#x} is reserved" in str(refused(vcpu, write))


# -- transitions by the guest -------------------------------------------------------------------------------------------

def after(n, value, cr0, cr4, efer):
    """(cr0, cr4, efer) after MOV to CRn or (n = "efer") WRMSR, None for #GP; CR3[11:0] is 0. By the manual."""
    if n == 0:
        value |= ET
        if not cr0 & PG and value & PG and efer & LME:
            efer |= LMA
        if cr0 & PG and not value & PG:
            if cr4 & PCIDE:
                return None
            efer &= ~LMA
        result = value, cr4, efer
    elif n == 4:
        if efer & LMA and (cr4 ^ value) & LA57:
            return None
        result = cr0, value, efer
    else:
        if cr0 & PG and (efer ^ value) & LME:
            return None
        result = cr0, cr4, value & ~LMA | efer & LMA
    return result if legal(*result) else None


def test_every_transition_between_control_bits():
    """From every legal state, every value of CR0, CR4 and EFER: the state after it, or #GP and no change."""
    vcpu = machine()
    values = {0: subsets(PE, PG, WP, NW, CD), 4: subsets(PAE, LA57, PCIDE, CET), "efer": subsets(LME, LMA, NXE)}
    outcomes = {True: 0, False: 0}
    for cr0, cr4, efer in STATES:
        if not legal(cr0, cr4, efer):
            continue
        for n, value in ((n, value) for n, choices in values.items() for value in choices):
            vcpu.set_regs(cr0=cr0 | ET, cr4=cr4, efer=efer)
            assert (vcpu.regs.cr0, vcpu.regs.cr4, vcpu.regs.efer) == (cr0 | ET, cr4, efer)
            expected, got = after(n, value, cr0 | ET, cr4, efer), (cr0 | ET, cr4, efer)
            try:
                vcpu.wrmsr_efer(value) if n == "efer" else vcpu.mov_cr(n, value)
            except GeneralProtection:
                assert expected is None, (n, hex(value), got)
            else:
                got, before = (vcpu.regs.cr0, vcpu.regs.cr4, vcpu.regs.efer), got
                assert got == expected, (n, hex(value), before)
            outcomes[expected is None] += 1
            assert (vcpu.regs.cr0, vcpu.regs.cr4, vcpu.regs.efer) == got
    assert min(outcomes.values()) > 2000


def test_long_mode_entry_and_exit():
    """The manual's sequence: PAE, CR3, LME, then PG sets LMA; CR0.PG clears it; the role follows each step."""
    vcpu = machine()

    def role():
        return tuple(getattr(vcpu.gva_walk.cpu_role, name) for name in ("direct", "level", "efer_lma"))

    vcpu.mov_cr(4, PAE)
    vcpu.mov_cr(3, ROOT)
    vcpu.wrmsr_efer(LME | LMA)
    assert (vcpu.regs.efer, role()) == (LME, (True, 0, False)), "LMA is read-only"
    vcpu.mov_cr(0, PE | PG)
    assert (vcpu.regs.efer, role()) == (LME | LMA, (False, 4, True))
    refused(vcpu, vcpu.wrmsr_efer, 0)
    refused(vcpu, vcpu.mov_cr, 4, 0)
    refused(vcpu, vcpu.mov_cr, 4, PAE | LA57)
    vcpu.mov_cr(0, PE)
    assert (vcpu.regs.efer, role()) == (LME, (True, 0, False))
    vcpu.mov_cr(4, PAE | LA57)
    vcpu.mov_cr(0, PE | PG)
    assert role() == (False, 5, True)
    refused(vcpu, vcpu.mov_cr, 4, PAE)
    vcpu.mov_cr(0, PE)
    vcpu.wrmsr_efer(0)
    vcpu.mov_cr(0, PE | PG)
    assert (vcpu.regs.efer, role(), vcpu.pdptrs) == (0, (False, 3, False), (PDS[0] | 1, 0, 0, 0))


def test_enabling_pcide_needs_pcid_0_and_long_mode():
    vcpu = machine(LONG)
    vcpu.mov_cr(3, ROOT | 1)
    assert refused(vcpu, vcpu.mov_cr, 4, PAE | PCIDE).rule == "pcide-with-pcid"
    vcpu.mov_cr(3, ROOT)
    vcpu.mov_cr(4, PAE | PCIDE)
    vcpu.mov_cr(3, ROOT | 0xABC)
    assert refused(vcpu, vcpu.mov_cr, 0, PE).rule == "pg-off-with-pcide"
    vcpu.mov_cr(4, PAE)
    assert vcpu.regs.cr3 == ROOT | 0xABC
    pae = machine(PAE_MODE)
    assert refused(pae, pae.mov_cr, 4, PAE | PCIDE).rule == "pcide-outside-long-mode"


def test_cr3_bit_63():
    """With PCIDE it says "no flush" and is not stored; without, it is reserved; a VMM never sets it."""
    vcpu = machine(LONG, lam=False)
    assert refused(vcpu, vcpu.mov_cr, 3, NOFLUSH | ROOT).rule == "cr3-reserved"
    vcpu.mov_cr(4, PAE | PCIDE)
    vcpu.mov_cr(3, NOFLUSH | 0x5003)
    assert vcpu.regs.cr3 == vcpu.gva_walk.get_guest_pgd() == 0x5003
    refused(vcpu, vcpu.set_regs, cr3=NOFLUSH | ROOT)
    refused(vcpu, vcpu.mov_cr, 3, 1 << 62)


@pytest.mark.parametrize("mode", ["off", "32", "pae"])
def test_outside_long_mode_everything_has_32_bits(mode):
    """MOV to CR3 takes 32 bits; linear addresses wrap at 2**32, in the answer and in CR2; CR3[63:32] is not walked."""
    tables = builders.PageTables("32" if mode == "off" else mode)
    tables.map(0x5000, 0x9000)
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs() | MODES[mode])
    expected = 0x5123 if mode == "off" else 0x9123
    for cr3 in (tables.cr3, tables.cr3 | 1 << 40):
        vcpu.set_regs(cr3=cr3)
        for high in (0, 1 << 32, 0xFFFFFFFF << 32):
            assert vcpu.gva_walk.gva_to_gpa(high | 0x5123) == expected
    if mode != "off":
        with pytest.raises(PageFault) as caught:
            vcpu.gva_walk.gva_to_gpa(1 << 32 | 0x6123)
        assert caught.value.address == 0x6123
    assert "32 bits, got 0x100000000" in str(refused(vcpu, vcpu.mov_cr, 3, 1 << 32, error=ValueError))


def test_wrpkru_needs_pke():
    vcpu = machine(LONG)
    assert refused(vcpu, vcpu.wrpkru, 3, error=InvalidOpcode).rule == "wrpkru-without-pke"
    vcpu.mov_cr(4, PAE | PKE)
    vcpu.wrpkru(0xFFFFFFFF)
    assert vcpu.regs.pkru == 0xFFFFFFFF
    assert vcpu.gva_walk.permission_fault(15, 1, Access.USER) == 0x21
    vcpu.wrpkru(0)
    assert vcpu.gva_walk.permission_fault(15, 1, Access.USER) == 0


# -- roles, models, SMM -------------------------------------------------------------------------------------------------

def test_the_same_role_is_not_built_again():
    """CR3, PKRU, AC and bits that are no part of the role do no work; WP does, and the next access obeys it."""
    tables = builders.PageTables("4l")
    tables.map(0x5000, 0x9000, "p")
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs())
    count = vcpu.gva_walk.init_count
    with pytest.raises(PageFault, match="read-only"):
        vcpu.gva_walk.gva_to_gpa(0x5000, Access.WRITE)
    vcpu.mov_cr(4, vcpu.regs.cr4 | PGE)
    vcpu.mov_cr(3, tables.cr3 | 0x18)
    vcpu.set_regs(rflags=1 << 18 | 2, pkru=7)
    assert vcpu.gva_walk.init_count == count
    vcpu.mov_cr(0, vcpu.regs.cr0 & ~WP)
    assert vcpu.gva_walk.gva_to_gpa(0x5000, Access.WRITE) == 0x9000
    assert vcpu.gva_walk.translate(np.array([0x5000], np.uint64), Access.WRITE).status[0] == 0
    assert (vcpu.gva_walk.init_count, vcpu.gva_walk.cpu_role.cr0_wp) == (count + 1, False)
    vcpu.set_regs(cr0=vcpu.regs.cr0 | WP)
    with pytest.raises(PageFault, match="read-only"):
        vcpu.gva_walk.gva_to_gpa(0x5000, Access.WRITE)
    assert vcpu.ngpa_walk.init_count == 0


def test_a_new_model_builds_the_format_anew():
    """An equal role after a change of the model is built again; a model that forbids the registers is refused."""
    tables = builders.PageTables("4l")
    tables.map(0x5000, 1 << 45)
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()), cpu=CpuModel(maxphyaddr=48))
    vcpu.set_regs(**tables.regs() | {"cr4": PAE | SMEP})
    role, count = vcpu.gva_walk.cpu_role, vcpu.gva_walk.init_count
    assert vcpu.gva_walk.gva_to_gpa(0x5000) == 1 << 45
    vcpu.cpu = CpuModel(maxphyaddr=40)
    assert (vcpu.gva_walk.cpu_role, vcpu.gva_walk.init_count, vcpu.cpu.maxphyaddr) == (role, count + 1, 40)
    with pytest.raises(PageFault, match="reserved"):
        vcpu.gva_walk.gva_to_gpa(0x5000)
    for model in (CpuModel(smep=False), CpuModel(nx=False)):
        refused(vcpu, setattr, vcpu, "cpu", model)
    assert "want a CpuModel, got str" in str(refused(vcpu, setattr, vcpu, "cpu", "intel", error=TypeError))
    pae = machine(PAE_MODE)
    pae.set_regs(pdptrs=(1 << 45 | 1, 0, 0, 0))
    assert refused(pae, setattr, pae, "cpu", CpuModel(maxphyaddr=40)).rule == "pdpte-reserved"


def test_smm_is_another_address_space_with_a_role_of_its_own():
    vcpu = Vcpu(pae_memory(), smm_mem=pae_memory())
    vcpu.set_regs(cr3=ROOT, **PAE_MODE)
    normal = vcpu.gva_walk.cpu_role
    vcpu.smm = True
    vcpu.mem.write_u64(PDS[0], PAGES[1] | 0xE7)
    assert (vcpu.gva_walk.cpu_role.smm, normal.smm) == (True, False)
    assert vcpu.gva_walk.gva_to_gpa(0x77) == PAGES[1] + 0x77
    assert vcpu.gva_walk.translate(np.array([0x77], np.uint64), regs=[vcpu.regs]).gpa[0] == PAGES[1] + 0x77
    vcpu.mem.write_u64(ROOT, PDS[1] | 1)
    vcpu.mov_cr(3, ROOT)
    assert vcpu.pdptrs[0] == PDS[1] | 1, "PDPTEs come from the address space in force"
    vcpu.smm = False
    vcpu.mov_cr(3, ROOT)
    assert (vcpu.gva_walk.cpu_role, vcpu.pdptrs[0], vcpu.gva_walk.gva_to_gpa(0x77)) == (normal, PDS[0] | 1, PAGES[0] + 0x77)


def test_exactly_two_walks_hang_on_a_vcpu():
    """gva_walk and ngpa_walk; walk_mmu and nested_mmu stay removed, from the sources too."""
    vcpu = machine()
    assert sorted(name for name in dir(vcpu) if isinstance(getattr(vcpu, name), PageWalk)) == ["gva_walk", "ngpa_walk"]
    package = Path(kvmmu.__file__).parent
    sources = [file for file in package.rglob("*") if file.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h")]
    assert len(sources) > 20
    assert [file.name for file in sources if re.search("walk_mmu|nested_mmu", file.read_text())] == []


@pytest.mark.parametrize("call", [
    lambda w, g: w.translate(g), lambda w, g: w.gva_to_gpa(0), lambda w, g: w.walk_record(0), lambda w, g: w.span(0, 4),
    lambda w, g: w.translate_span(g, 4), lambda w, g: w.translate(g[:0]), lambda w, g: w.translate(g, regs=[Regs(1, 0, 0, 0)])])
def test_the_second_stage_is_not_in_use_outside_a_nested_guest(call):
    with pytest.raises(RuntimeError, match="not in use"):
        call(machine().ngpa_walk, np.zeros(1, np.uint64))


# -- values -------------------------------------------------------------------------------------------------------------

def test_regs_are_values():
    regs = Regs(np.uint64(1 << 31), 2, cr4=3, efer=4, pdptrs=np.arange(4, dtype=np.uint64))
    assert regs == Regs(1 << 31, 2, 3, 4, 0, 2, (0, 1, 2, 3))
    assert len({regs, Regs(1 << 31, 2, 3, 4, 0, 2, [0, 1, 2, 3]), replace(regs, rflags=6), replace(regs, pdptrs=None)}) == 3
    with pytest.raises(FrozenInstanceError):
        regs.cr0 = 0


@pytest.mark.parametrize(("call", "words"), [
    (lambda v: Regs(-1, 0, 0, 0), "cr0: want 0 to 0xf{16}, got -1"),
    (lambda v: Regs(0, 1 << 64, 0, 0), "cr3: want 0 to 0xf{16}, got 0x10{16}"),
    (lambda v: Regs(0, 0, 0, 0, pkru=1 << 32), "pkru: want 0 to 0xf{8}, got 0x10{8}"),
    (lambda v: Regs(0, 0, None, 0), "cr4: want an integer, got None"), (lambda v: Regs(0, 0, 1.5, 0), "cr4: want an integer"),
    (lambda v: Regs(0, 0, "32", 0), "cr4: want an integer"), (lambda v: Regs(0, 0, 0, 0, pdptrs=(1, 2, 3)), "want 4 .* got 3"),
    (lambda v: Regs(0, 0, 0, 0, pdptrs=7), "pdptrs: want 4 integers"),
    (lambda v: v.set_regs(cr2=0), "no register 'cr2'.*cr0, cr3"), (lambda v: v.set_regs(efer=2.0), "efer: want an integer"),
    (lambda v: v.mov_cr(2, 0), "n: want 0, 3 or 4, got 2"), (lambda v: v.mov_cr(3, -1), "value: want 0 to 0xf{16}, got -1"),
    (lambda v: v.mov_cr(0, 1 << 64), "value: want 0 to 0xf{16}, got"), (lambda v: v.mov_cr(3, None), "value: want an integer"),
    (lambda v: v.mov_cr(3, "4096"), "value: want an integer"), (lambda v: v.mov_cr(3, 4096.5), "value: want an integer"),
    (lambda v: v.wrpkru(1 << 32), "value: want 0 to 0xf{8}, got"),
    (lambda v: v.wrmsr_efer(-5), "value: want 0 to 0xf{16}, got -5"), (lambda v: v.gva_walk.get_pdptr(4), "0 to 3, got 4"),
    (lambda v: CpuModel(vendor="via"), "'intel' or 'amd', got 'via'"), (lambda v: CpuModel(maxphyaddr=53), "32 to 52, got 53"),
    (lambda v: CpuModel(conformance="bsd"), "'sdm' or 'kvm', got 'bsd'"), (lambda v: Vcpu(None), "mem: want a GuestMemory"),
    (lambda v: Vcpu(v.mem, tdp="vt"), "'ept', 'npt' or None, got 'vt'"),
    (lambda v: Vcpu(v.mem, cpu=3), "cpu: want a CpuModel, got int"),
    (lambda v: Vcpu(v.mem, smm_mem=3), "smm_mem: want a GuestMemory, got int")])
def test_errors_name_the_value_and_what_is_wanted(call, words):
    vcpu = machine()
    assert re.search(words, str(refused(vcpu, call, vcpu, error=(TypeError, ValueError))))


def test_repr_tells_registers_and_level():
    vcpu = machine(LONG)
    assert re.fullmatch(r"<Vcpu 0: Regs\(cr0=0x80000011 \(PE ET PG\), .*efer=0x500 \(LME LMA\)\), level 4, tdp ept>", repr(vcpu))
    assert repr(vcpu.gva_walk).startswith("<PageWalk level 4 of GuestMemory(")
