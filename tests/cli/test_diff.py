# SPDX-License-Identifier: Apache-2.0
"""kvmmu diff: each way in which the conformances differ for the tables of an image, and nothing else."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, PageTables, Vcpu
from kvmmu.cli import main
from kvmmu.report.conformance import differences

ROOT = Path(__file__).parents[2]
CR0, PSE, NXE = 0x80000001, 1 << 4, 1 << 11


def paging_32(mem, maxphyaddr=40, efer=0):
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=maxphyaddr))
    vcpu.set_regs(cr0=CR0, cr3=0x1000, cr4=PSE, efer=efer)
    return vcpu


def test_the_fetch_bit():
    """2-level paging with NXE: every fetch that faults, of a page and of a gap."""
    mem = GuestMemory(0x10000)
    mem.write_u64(0x1000, 0x2067)
    mem.write_u64(0x2000, 0x3065)
    found = differences(paging_32(mem, efer=NXE))
    assert [str(difference) for difference in found] == [
        "supervisor fetch of 0x1000: sdm #PF 0x0, kvm #PF 0x10 (F)",
        "user fetch of 0x1000: sdm #PF 0x4 (U), kvm #PF 0x14 (U F)"]
    assert differences(paging_32(mem)) == []


def test_address_bits_of_4m_pages():
    mem = GuestMemory(0x10000)
    for i, bits in enumerate((0, 1 << 13, 1 << 17, 1 << 18, 1 << 21)):
        mem.write(0x1000 + 4 * i, (0x87 | bits).to_bytes(4, "little"))
    found = differences(paging_32(mem), [Access.READ])
    assert [(d.sdm, d.kvm, d.count, d.examples) for d in found] == [
        ("a page", "#PF 0x9 (P RSVD)", 2, ((2 << 22, 1 << 36, None), (3 << 22, 1 << 37, None)))]
    assert str(found[0]) == "supervisor read of 0x800000: sdm a page at 0x1000000000, kvm #PF 0x9 (P RSVD), and 1 more"
    assert differences(paging_32(mem, 36)) == []


@pytest.mark.parametrize("mode", ["pae", "4l", "5l"])
def test_other_modes_have_no_differences(mode):
    mem = GuestMemory(4 << 20)
    rng = np.random.default_rng(4)
    tables = PageTables(mem, mode)
    for gva in rng.integers(0, 1 << 19, 200).tolist():
        tables.map(gva << 12, int(rng.integers(1 << 9)) << 12, write=bool(gva & 1), user=bool(gva & 2))
    vcpu = Vcpu(mem, CpuModel(maxphyaddr=46))
    vcpu.set_regs(tables.regs())
    before = mem.read(0, 4 << 20)
    assert differences(vcpu) == []
    assert mem.read(0, 4 << 20) == before


def test_the_command(tmp_path, capsys):
    path = tmp_path / "ram.raw"
    mem = bytearray(0x10000)
    mem[0x1000:0x1004] = (0x87 | 1 << 17).to_bytes(4, "little")
    path.write_bytes(mem)
    where = [str(path), "--format", "raw", "--cr3", "0x1000", "--cr0", hex(CR0), "--cr4", hex(PSE)]
    assert main(["diff", *where]) == 1
    assert "  user write of 0x0: sdm a page at 0x1000000000, kvm #PF 0xf (P W U RSVD)\n" in capsys.readouterr().out
    assert main(["diff", *where, "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["differences"][0]
    assert first == {"access": "supervisor read", "sdm": "a page", "kvm": "#PF 0x9 (P RSVD)", "count": 1,
                     "examples": [{"gva": 0, "sdm_gpa": 1 << 36, "kvm_gpa": None}]}
    assert path.read_bytes() == mem
    assert main(["diff", "bundled"]) == 0
    assert capsys.readouterr().out.endswith("the answers are the same\n")


def test_nested_guests_are_refused():
    vcpu = Vcpu(GuestMemory(0x10000))
    vcpu.set_regs(cr0=1)
    vcpu.enter_nested(kvmmu.Ept(0x1E), cr0=1)
    with pytest.raises(ValueError, match="runs a nested guest"):
        differences(vcpu)


def test_the_page_has_a_section_for_every_use_of_the_choice():
    """Whoever lets a walk depend on the conformance in one more place adds an example to docs/conformance.md, and counts here."""
    uses = {}
    for path in [*sorted((ROOT / "kvmmu" / "walk").glob("*.pyx")), ROOT / "kvmmu" / "_walk.pyx"]:
        count = len(re.findall(r"\bcaps\.kvm\b", path.read_text()))
        if count:
            uses[path.name] = count
    # pagewalk sets it; _setup: 4M pages, accessed flags, fetches, fault address, 48 bits of EPT, reads of tables, advanced info,
    # tags, shadow stacks twice; _second_stage: PDPTEs, and what L1 has not
    assert uses == {"_setup.pyx": 10, "_second_stage.pyx": 2, "pagewalk.pyx": 1}
    page = (ROOT / "docs" / "conformance.md").read_text()
    sections = re.findall(r"^### .*\n(?:(?!^##).*\n)*?```python", page, re.MULTILINE)
    assert len(sections) == 9 + 2 + 1                       # and the load of PDPTEs, which is told by fault_gpa_mask
