# SPDX-License-Identifier: Apache-2.0
"""What a change of mode does to the machine, and whose rules a fault of it is told by."""

import numpy as np
import pytest
from builders import PageTables

from kvmmu import Access, CpuModel, Ept, GuestMemory, Host, Npt, PageFault, Vm

PAGE, MB2 = 0x1000, 0x200000
CR4_PAE, CR4_PSE, EFER_LONG, EFER_NX = 1 << 5, 1 << 4, 0xD00, 0x800


def test_a_root_is_not_taken_for_tables_of_another_paging_mode():
    """L1 leaves long mode for PAE with the same nested CR3: role and root table are equal, and the tables are others."""
    mem = GuestMemory(16 * MB2)
    pae = PageTables("pae", base=MB2)
    for page in range(64):
        pae.map(page * PAGE, 4 * MB2 + page * PAGE, flags="p w u a d")
    for gpa, page in zip(*pae.pages(), strict=True):
        mem.write(int(gpa), page.tobytes())
    root = pae.regs()["cr3"]
    vcpu = Vm(mem, cpu=CpuModel(maxphyaddr=40), host=Host(tdp="npt", maxphyaddr=46)).create_vcpu()
    off = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}
    vcpu.enter_nested(Npt(root, cr4=CR4_PAE, efer=EFER_LONG), **off)
    vcpu.access(np.array([0x5000], np.uint64), Access.READ)
    long_root = vcpu.shadow_mmu.root_hpa
    vcpu.enter_nested(Npt(root, cr4=CR4_PAE, efer=EFER_NX), **off)
    r = vcpu.access(np.array([0x5000], np.uint64), Access.READ)
    assert r.gpa.tolist() == [4 * MB2 + 0x5000]
    assert vcpu.shadow_mmu.root_hpa != long_root
    assert vcpu.vm.stats["bugs"] == 0


def test_a_fault_by_kvms_rules_tells_kvms_reason():
    """KVM takes four bits of PSE-36, to 64 GiB; the processor as many as its addresses have."""
    mem = GuestMemory(4 * MB2)
    mem.write(PAGE, (3 << 22 | 1 << 17 | 0xE7).to_bytes(4, "little"))
    vcpu = Vm(mem, cpu=CpuModel(maxphyaddr=40), host=Host(tdp=None, maxphyaddr=46)).create_vcpu()
    vcpu.set_regs(cr0=0x80000001, cr3=PAGE, cr4=CR4_PSE)
    assert vcpu.gva_walk.gva_to_gpa(0x123) == (1 << 36) + (3 << 22) + 0x123
    with pytest.raises(PageFault, match="reserved") as caught:
        vcpu.write_guest(0x123, b"x")
    assert caught.value.rule == "reserved"
    with pytest.raises(PageFault, match="reserved"):
        vcpu.store(0x123, b"x")


@pytest.mark.parametrize(("tdp", "stage", "message"), [
    ("npt", Ept(0x101E), "tdp='ept'"),
    ("ept", Npt(0x1000, cr4=CR4_PAE, efer=EFER_LONG, gmet=True), "gmet=False"),
])
def test_rights_that_the_host_cannot_tell_are_refused(tdp, stage, message):
    """An EPT host takes L1's NPT, as long as it has bits for its rights."""
    vcpu = Vm(GuestMemory(MB2), cpu=CpuModel(maxphyaddr=40), host=Host(tdp=tdp, maxphyaddr=46)).create_vcpu()
    vcpu.enter_nested(stage, cr0=1)
    assert vcpu.gva_walk.translate(np.array([0x5000], np.uint64)).status.tolist() != [0]
    with pytest.raises(ValueError, match=message):
        vcpu.access(0x5000)
