# SPDX-License-Identifier: Apache-2.0
"""The dump of host page tables, as rows, as text, and by the command."""

import json

import numpy as np
import pytest
from builders import PageTables

from kvmmu import Access, GuestMemory, Host, Vm
from kvmmu.cli import main
from kvmmu.report.spte_tree import spte_runs, spte_text

PAGE, MB2 = 0x1000, 0x200000


def machine(**host):
    vm = Vm(GuestMemory(8 * MB2), host=Host(**host), backing="2m")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    return vm, vcpu


@pytest.mark.parametrize(("host", "flags"), [
    ({"tdp": "ept"}, "rwxu A D hostw mmuw"), ({"tdp": "ept", "mbec": False}, "rwx- A D hostw mmuw"),
    ({"tdp": "ept", "ad": False}, "rwxu A hostw mmuw ad-off"), ({"tdp": "npt"}, "rwxu A D hostw mmuw"),
    ({"tdp": "npt", "nx_huge_pages": True}, "rw-u A D hostw mmuw")])
def test_runs_of_like_entries_are_one(host, flags):
    """Three neighbours in a run, one apart; the tables above each on a line of its own."""
    vm, vcpu = machine(**host)
    vcpu.access(np.array([0, MB2, 2 * MB2, 5 * MB2], np.uint64), 0)
    runs = list(spte_runs(vm))
    assert ["table", "table", "leaf", "leaf"] == [run.kind for run in runs]
    assert [4, 3, 2, 2] == [run.level for run in runs]
    assert [(0, 3, 0), (5, 1, 5 * 512)] == [(run.index, run.count, run.gfn) for run in runs[2:]]
    assert {flags} == {run.flags for run in runs[2:]}
    pfn = vm.slots[0]["pfn"]
    assert [pfn << 12, (pfn + 5 * 512) << 12] == [run.hpa for run in runs[2:]]
    assert 4 == sum(run.count for run in runs if run.kind == "leaf") == vm.stats["pages_2m"]


def test_text_tells_roots_tables_leaves_and_mmio():
    vm, vcpu = machine(tdp="ept")
    vcpu.access(np.array([0x3000, 0x80000000], np.uint64), Access.WRITE)
    lines = spte_text(vm).splitlines()
    assert lines[0].startswith(f"root at hpa {vcpu.mmu.root_hpa:#x}: ")
    assert "level 4" in lines[0]
    assert any("gpa 0x000000000000-0x0000001fffff hpa" in line and line.endswith("2M page rwxu A D hostw mmuw") for line in lines)
    assert any("gpa 0x000080000000-0x000080000fff mmio 4K page" in line for line in lines)
    assert 4 == sum("table at hpa" in line for line in lines)


@pytest.mark.parametrize(("mode", "tables"), [("32", [3, 2, 2, 2, 2, 1]), ("pae", [3, 2, 1]), ("4l", [4, 3, 2, 1]),
                                              ("5l", [5, 4, 3, 2, 1])])
def test_the_tree_of_shadow_paging_is_by_linear_addresses(mode, tables):
    """Whatever tables stand behind it: each page once, from the top; a leaf maps another frame than its address says."""
    mem = GuestMemory(8 * MB2)
    guest = PageTables(mode, base=7 * MB2)
    guest.map(0x40001000, 0x3000, "p w u a d")
    for gpa, page in zip(*guest.pages(), strict=True):
        mem.write(int(gpa), page.tobytes())
    vm = Vm(mem, host=Host(tdp=None), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**guest.regs())
    hpa = vcpu.access(0x40001234, Access.WRITE).hpa
    runs = list(spte_runs(vm))
    leaf, = (run for run in runs if run.kind == "leaf")
    assert (0x40001, hpa & ~0xFFF, "gva") == (leaf.gfn, leaf.hpa, leaf.space)
    assert "gva 0x000040001000-0x000040001fff hpa" in spte_text(vm)
    pages = vm.sptes()
    assert tables == [int(role) & 15 for role in pages["role"]]
    assert {run.sp for run in runs} <= set(pages["sp"].tolist())
    row = pages["sp"].tolist().index(leaf.sp)
    assert 0x3000 == int(pages["translations"][row, 1]) & ~0xFFF


def test_an_empty_machine_has_no_tree():
    vm, _ = machine(tdp="ept")
    assert "" == spte_text(vm)


@pytest.mark.parametrize("tdp", ["ept", "npt"])
def test_the_command(capsys, tdp):
    """Text ends with the counters; JSON has the same leaves."""
    assert 0 == main(["spt", "bundled", "--tdp", tdp])
    out = capsys.readouterr().out
    assert out.startswith("root at hpa ")
    assert 0 == main(["spt", "bundled", "--tdp", tdp, "--json"])
    plain = json.loads(capsys.readouterr().out)
    leaves = sum(run["count"] for run in plain["sptes"] if run["kind"] == "leaf")
    assert leaves == plain["stats"]["pages_2m"] == plain["stats"]["pf_fixed"]
    assert f"pages_2m {leaves}" in out
    assert 0 == main(["spt", "bundled", "--backing", "4k", "--nx-huge-pages"])
    assert "pages_4k" in capsys.readouterr().out
