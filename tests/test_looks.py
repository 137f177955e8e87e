# SPDX-License-Identifier: Apache-2.0
"""What objects look like: addresses in hexadecimal, flags and enums by name, tables for notebooks."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import kvmmu
from kvmmu import Access, Cr0, Cr4, Efer, Ept, GuestMemory, Intercepts, Npt, PageTables, Pml, Regs, Status, Vcpu
from kvmmu.arch.words import flags_text
from kvmmu.replay.result import Mismatch
from kvmmu.traces import RegisterSet, Stage

LINUX = Regs(cr0=0x80050033, cr3=0x10A000, cr4=0x3506F0, efer=0xD01, pkru=0x55555554, pdptrs=(0x1001, 0, 0, 0))
GVA = 0xFFFF800000000000


@pytest.fixture
def vcpu():
    tables = PageTables(GuestMemory(1 << 20))
    tables.map(0x400000, 0x7F000, write=False)
    tables.map(GVA, 0x41000, user=False, exec=False, global_=True)
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    return vcpu


@pytest.fixture
def nested(vcpu):
    below = PageTables(vcpu.mem, "ept", frames=range(0xC0000, 0x100000, 4096))
    below.map(np.arange(0, 0x40000, 4096), np.arange(0, 0x40000, 4096))
    below.map(np.arange(0xF0000, 1 << 20, 4096), np.arange(0xF0000, 1 << 20, 4096))
    vcpu.enter_nested(below.second_stage())
    return vcpu


@pytest.mark.parametrize(("value", "expected"), [
    (LINUX, "Regs(cr0=0x80050033 (PE MP ET NE WP AM PG), cr3=0x10a000, cr4=0x3506f0 (PSE PAE MCE PGE OSFXSR OSXMMEXCPT FSGSBASE "
            "OSXSAVE SMEP SMAP), efer=0xd01 (SCE LME LMA NX), pkru=0x55555554, pdptrs=(0x1001, 0x0, 0x0, 0x0))"),
    (Regs(0, 0, 0, 0, rflags=0x40002), "Regs(cr0=0x0, cr3=0x0, cr4=0x0, efer=0x0, rflags=0x40002)"),
    (Ept(0x1005E, pml=Pml(0x7000, 3)), "Ept(eptp=0x1005e (WB, 4 levels, AD), pml=Pml(address=0x7000, index=3))"),
    (Ept(0x10020, mbec=True), "Ept(eptp=0x10020 (UC, 5 levels), mbec=True)"),
    (Npt(0x7000, intercepts=Intercepts(1 << 14)),
     "Npt(ncr3=0x7000, cr4=0x20 (PAE), efer=0xd00 (LME LMA NX), intercepts=Intercepts(exception_bitmap=0x4000))"),
    (kvmmu.CpuModel(), "CpuModel(vendor='intel', maxphyaddr=48, conformance='sdm')"),
    (kvmmu.CpuModel("amd", la57=False), "CpuModel(vendor='amd', maxphyaddr=48, conformance='sdm', la57=False)"),
    (kvmmu.Host(), "Host(tdp='ept', maxphyaddr=52)"),
    (kvmmu.Host(None, max_page="2m"), "Host(tdp=None, maxphyaddr=52, max_page='2m')"),
    (RegisterSet(0x80000001, 0x5000, 0x20, 0x500, second_stage=Stage(eptp=0x101E)),
     "RegisterSet(cr0=0x80000001 (PE PG), cr3=0x5000, cr4=0x20 (PAE), efer=0x500 (LME LMA), second_stage=Stage(eptp=0x101e))"),
    (kvmmu.ExceptionInjected(0x6, 0x400123, "L2"), "ExceptionInjected(error_code=0x6 (W U), cr2=0x400123, into='L2')"),
    (kvmmu.VmxExit(48, 0x182, 0x40000, 0x123000),
     "VmxExit(reason=EPT_VIOLATION, exit_qualification=0x182, guest_physical_address=0x40000, guest_linear_address=0x123000)"),
    (kvmmu.SvmExit(0x400, 0x100000006, 0x40000),
     "SvmExit(reason=NPF, exit_info_1=0x100000006 (W U final), exit_info_2=0x40000)"),
])
def test_values(value, expected):
    assert expected == repr(value)


@pytest.mark.parametrize("kind", [Cr0, Cr4, Efer])
def test_every_flag_by_its_name(kind):
    for flag in kind:
        assert f"{flag.value:#x} ({flag.name})" == flags_text(flag.value, kind)
    unnamed, first = 1 << 63, next(iter(kind))
    assert f"{unnamed | first.value:#x} ({first.name})" == flags_text(unnamed | first.value, kind)


def test_flags_in_place_of_numbers():
    """Names of flags are registers, alone and joined; they are kept as plain integers."""
    vcpu = Vcpu(GuestMemory(0x2000))
    vcpu.set_regs(cr0=Cr0.PE | Cr0.PG, cr3=0x1000, cr4=Cr4.PAE, efer=Efer.LME | Efer.LMA | Efer.NX)
    assert (0x80000001, 0x20, 0xD00) == (vcpu.regs.cr0, vcpu.regs.cr4, vcpu.regs.efer)
    assert {int} == {type(vcpu.regs.cr0), type(vcpu.regs.cr4), type(Regs(Cr0.PE, 0, Cr4.PAE, Efer.NX).efer)}
    vcpu.mov_cr(0, Cr0.PE | Cr0.PG | Cr0.WP)
    vcpu.wrmsr_efer(Efer.LME)
    assert Efer.LME | Efer.LMA == vcpu.regs.efer


def test_vcpu_and_walk(vcpu, nested):
    assert nested is vcpu
    assert "in L2 under Ept(eptp=0x" in repr(vcpu)
    vcpu.leave_nested()
    assert re.fullmatch(r"<Vcpu 0: Regs\(cr0=0x80010001 \(PE WP PG\), cr3=0x[0-9a-f]+, cr4=0x20 \(PAE\), "
                        r"efer=0xd00 \(LME LMA NX\)\), level 4, tdp ept>", repr(vcpu))
    assert re.fullmatch(r"<PageFormat: reserved bits of a 4K 0xf000000000000, 2M 0x\w+, 1G 0x\w+ page>", repr(vcpu.gva_walk.fmt))
    assert repr(vcpu.gva_walk.prepare([vcpu.regs, vcpu.regs])) == "<RegisterSets: 2 sets>"
    assert re.fullmatch(r"<TdpMmu root_role CpuRole\(0x[0-9a-f]{16}: level 4, direct .*\)>", repr(vcpu.mmu))
    assert repr(vcpu.tlb) == "<Tlb 128x12, 128x8, 4x4: 0 entries, 0 hits, 0 misses>"


def test_columns(vcpu):
    gva = np.array([0x400000, 0x500000, GVA, 1 << 60], np.uint64)
    t = vcpu.gva_walk.translate(gva, Access.READ, fields=("gpa", "status", "error_code", "pte_access", "pte_gpa", "level"))
    assert repr(t) == ("Translation(4 rows, 2 OK, 1 PAGE_FAULT, 1 NON_CANONICAL: gpa, status, error_code, level, pte_gpa, "
                       "pte_access)")
    assert repr(kvmmu.Translation()) == "Translation(0 rows: )"
    rows = cells(t._repr_html_())
    assert rows[0] == ["gpa", "status", "error_code", "level", "pte_gpa", "pte_access"]
    assert rows[1][:4] == ["0x7f000", "OK", "0x0", "1"]
    assert rows[1][5] == "r-xu"
    assert rows[3][5] == "rw--"
    assert rows[4][:2] == ["INVALID_GPA", "NON_CANONICAL"]
    spans = vcpu.gva_walk.translate_span(gva, 4)
    assert repr(spans) == "Span(4 rows, 2 OK, 1 PAGE_FAULT, 1 NON_CANONICAL)"
    assert cells(spans._repr_html_())[2][2] == "PAGE_FAULT"


def test_accesses(vcpu):
    one = vcpu.access(0x400123)
    assert re.fullmatch(r"Accesses\(gpa=0x7f123, hpa=0x\w+, status=OK, error_code=0x0, ret=FIXED, exits=\d+\)", repr(one))
    assert cells(one._repr_html_())[1][0] == "0x7f123"
    many = vcpu.access(np.array([0x400000, 0x500000], np.uint64), Access.USER)
    assert repr(many) == "Accesses(2 rows, 1 OK, 1 PAGE_FAULT)"
    assert cells(many._repr_html_())[2] == ["INVALID_GPA", "INVALID_GPA", "PAGE_FAULT", "0x4 (U)", "CONTINUE", "0"]


def test_mappings(vcpu):
    found = vcpu.gva_walk.mappings()
    first, last = found
    assert repr(first).startswith("Mapping(gva=0x400000, gpa=0x7f000, size=0x1000, level=1, pte_access=r-xu, accessed=False,")
    assert repr(last).endswith("rights=rw--)")
    assert repr(vcpu.gva_walk.lookup(GVA, Access.PROBE)) == (
        "Lookup(gpa=0x41000, size=0x1000, pte_access=rw--, accessed=False, dirty=False, global_=True, pkey=0)")
    rows = cells(found._repr_html_())
    assert rows[1][:5] == ["0x400000", "0x1000", "0x7f000", "1", "r-xu"]
    tables = PageTables(GuestMemory(1 << 20))
    for page in range(30):
        tables.map(page << 13, page << 12)
    vcpu = Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    html = vcpu.gva_walk.mappings()._repr_html_()
    assert len(cells(html)) == 21
    assert "10 more rows" in html


def test_walk_record(vcpu):
    record = vcpu.gva_walk.walk_record(0x400123, Access.USER | Access.WRITE)
    assert repr(record) == "<WalkRecord: user write of 0x400123, 4 steps -> #PF 0x7 (P W U): the page is read-only>"
    assert re.fullmatch(r"<WalkStep PTE \[ 0\] at 0x\w+: 0x\w+ r-xu>", repr(record.steps[-1]))
    rows = cells(record._repr_html_())
    assert [row[0] for row in rows[1:]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert rows[4][4:6] == ["r-xu", "r-xu"]


def test_walk_record_in_two_dimensions(nested):
    """The table of a nested walk has its entries of both stages, and ends where the second stage fails."""
    record = nested.gva_walk.walk_record(0x400123)
    assert record.status == Status.EPT_VIOLATION
    rows = cells(record._repr_html_())
    assert [row[0].strip() for row in rows[1:]].count("PTE") == 6           # five of the second stage, and the guest's
    assert "EPT violation" in rows[-1][2]


def test_reports(tmp_path):
    """Text of files is escaped, and numbers have separators."""
    name = tmp_path / "a<b>&c.npy"
    np.save(name, np.arange(0x400000, 0x480000, 64, dtype=np.uint64))
    report = kvmmu.replay(name, pager=kvmmu.Pager())
    assert repr(report) == ("<SyntheticReport a<b>&c.npy (mode 4l): 8,192 accesses, 128 pages touched, "
                            "4.000 references per walk, 128 first-touch faults>")
    html = report._repr_html_()
    assert "a<b>" not in html
    assert ["accesses", "8,192"] in cells(html)
    assert ["load", "8,192"] in cells(html)
    recorded = kvmmu.Report("guest", "dyn", "4l", 1000, verified=999, mismatches=1,
                            examples=[Mismatch(5, 0x400000, "gpa 0x1000", "#PF")], complete=False)
    assert repr(recorded) == "<Report guest, dyn (mode 4l): 1,000 accesses, stopped early, 999 verified, 1 mismatches>"
    rows = cells(recorded._repr_html_())
    assert ["mismatches", "1"] in rows
    assert ["access 5: recorded gpa 0x1000\n  walked: #PF"] in rows
    assert repr(recorded.examples[0]) == "<Mismatch: access 5: recorded gpa 0x1000   walked: #PF>"


def cells(html):
    """Rows of all tables in HTML, each a list of texts; raises if it is not well formed."""
    tables = ElementTree.fromstring(f"<div>{html}</div>").iter("table")
    return [["".join(cell.itertext()) for cell in row] for table in tables for row in table.iter("tr")]
