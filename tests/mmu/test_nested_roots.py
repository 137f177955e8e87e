# SPDX-License-Identifier: Apache-2.0
"""Roots of tables that shadow L1's or the guest's."""

import pytest
from builders import PageTables, mode_regs
from shadow_guests import shadow_pages

from kvmmu import CpuModel, GuestMemory, Host, NestedPageFault, Npt, Vm

MB2 = 0x200000
NGPA, GPA, OTHER = 0x400000, 0x10000, 0x11000


@pytest.mark.parametrize(("maxphyaddr", "mode", "level"), [
    (40, "4l", 4), (40, "5l", 5), (40, "pae", 4), (40, "32", 4), (52, "4l", 5), (52, "5l", 5), (52, "pae", 5), (52, "32", 5)])
def test_the_shadow_of_npt_has_the_levels_of_the_host_and_never_less_than_l1(maxphyaddr, mode, level):
    """Every table of L1's is shadowed by a page of its own level, so that KVM sees each of them change."""
    mem = GuestMemory(16 * MB2)
    tables = PageTables(mode, base=8 * MB2)
    tables.map(NGPA, GPA)
    for gpa, value in tables.words().items():
        mem.write_u64(gpa, value)
    vm = Vm(mem, cpu=CpuModel(maxphyaddr=maxphyaddr, vendor="amd"), host=Host(tdp="npt", maxphyaddr=52))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=0x21, cr3=0, cr4=0, efer=0)
    regs = mode_regs(mode, tables.cr3)
    vcpu.enter_nested(Npt(tables.cr3, cr4=regs["cr4"], efer=regs["efer"]))
    assert vcpu.access(NGPA).gpa == GPA
    assert vcpu.guest_mmu.root_role & 15 == level
    levels = {"32": 2, "pae": 2, "4l": 4, "5l": 5}[mode]
    for above in range(1, levels + 1):
        table = tables.entry_gpa(NGPA, above) >> 12
        assert [page["level"] for page in shadow_pages(vm) if page["gfn"] == table and not page["direct"]
                and not page["role"] >> 18 & 1 and page["entries"]] == [above]
    for above in range(2, levels + 1):
        gpa = tables.entry_gpa(NGPA, above)
        entry = mem.read_u64(gpa)
        vm.write_guest_physical(gpa, bytes(8))
        with pytest.raises(NestedPageFault):
            vcpu.access(NGPA)
        vm.write_guest_physical(gpa, entry.to_bytes(8, "little"))
        assert vcpu.access(NGPA).gpa == GPA
        assert vm.audit(guest_tables=True) == []


def test_pdptes_that_a_load_of_cr4_changes_give_another_root():
    """PAE: MOV to CR4 with another PGE loads the PDPTEs again; a root of the ones before is left."""
    mem = GuestMemory(16 * MB2)
    tables, others = (PageTables("pae", base=base) for base in (8 * MB2, 9 * MB2))
    tables.map(NGPA, GPA)
    others.map(NGPA, OTHER)
    for gpa, value in (tables.words() | others.words()).items():
        mem.write_u64(gpa, value)
    vm = Vm(mem, host=Host(tdp=None, maxphyaddr=46))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**tables.regs())
    assert vcpu.access(NGPA).gpa == GPA
    vm.write_guest_physical(tables.cr3, others.pdptrs()[0].to_bytes(8, "little"))
    assert vcpu.access(NGPA).gpa == GPA
    vcpu.mov_cr(4, vcpu.regs.cr4 ^ 1 << 7)
    assert vcpu.access(NGPA).gpa == OTHER
    assert vm.audit(guest_tables=True) == []
