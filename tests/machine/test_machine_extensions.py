# SPDX-License-Identifier: Apache-2.0
"""LAM and shadow stacks of a guest of the machine, and what KVM offers no guest."""

import numpy as np
import pytest

from kvmmu import Access, CpuModel, Ept, GeneralProtection, GuestMemory, Host, PageFault, Status, Vcpu, Vm

P, W, U, A, D = 1, 2, 4, 0x20, 0x40
LAM_U48, CET, PKS, LASS, UAIE = 1 << 62, 1 << 23, 1 << 24, 1 << 27, 1 << 20
LONG = {"cr0": 0x80010033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
TAG = 0x1234 << 48
SHADOW_WRITE = Access.SHADOW_STACK | Access.WRITE | Access.USER


def machine(tdp, cpu=None, **registers):
    """A vCPU of a machine, and its tables: page 0x5000 at 0, a user's shadow stack, 0x6000 at 0x1000."""
    mem = GuestMemory(0x10000)
    for gpa, entry in ((0x1000, 0x2000 | P | W | U | A), (0x2000, 0x3000 | P | W | U | A), (0x3000, 0x4000 | P | W | U | A),
                       (0x4000, 0x5000 | P | W | U | A | D), (0x4008, 0x6000 | P | U | A | D)):
        mem.write_u64(gpa, entry)
    vcpu = Vm(mem, cpu=cpu or CpuModel(), host=Host(tdp=tdp)).create_vcpu()
    vcpu.set_regs(**LONG | registers)
    return vcpu


@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_tagged_addresses(tdp):
    """A tag is gone before the TLB is asked, in arrays and in scalar calls; fetches and implicit accesses have none."""
    vcpu = machine(tdp, cr3=0x1000 | LAM_U48)
    user, supervisor = int(Access.USER), int(Access.READ)
    for _ in range(2):
        r = vcpu.access(np.array([TAG | 8, 8, TAG | 16, TAG | 16], np.uint64),
                        np.array([user, user, user | int(Access.FETCH), int(Access.IMPLICIT)], np.uint8))
        assert r.status.tolist() == [Status.OK, Status.OK, Status.NON_CANONICAL, Status.NON_CANONICAL]
        assert r.gpa.tolist()[:2] == [0x5008, 0x5008]
        assert vcpu.access(TAG | 8, supervisor).gpa == 0x5008
    hits = vcpu.access(np.full(100, TAG | 8, np.uint64), user)
    assert not hits.status.any()
    assert not hits.exits.any()
    with pytest.raises(GeneralProtection):
        vcpu.access(TAG | 8, Access.FETCH)
    with pytest.raises(PageFault) as fault:
        vcpu.access(TAG | 0x9008, Access.USER)
    assert fault.value.address == 0x9008
    vcpu.mov_cr(3, 0x1000)
    with pytest.raises(GeneralProtection):
        vcpu.access(TAG | 8, Access.USER)
    assert vcpu.access(8, Access.USER).gpa == 0x5008


@pytest.mark.parametrize("tdp", ["ept", "npt"])
def test_shadow_stacks(tdp):
    """Each access walks; ordinary ones beside it hit the TLB as always."""
    vcpu = machine(tdp, cr4=0x20 | CET)
    assert vcpu.access(0x1008, Access.USER).gpa == 0x6008
    assert vcpu.access(0x1008, SHADOW_WRITE).gpa == 0x6008
    for access, gva, code in ((SHADOW_WRITE, 8, 0x47), (SHADOW_WRITE & ~Access.USER, 0x1008, 0x43),
                              (Access.USER | Access.WRITE, 0x1008, 7)):
        with pytest.raises(PageFault) as fault:
            vcpu.access(gva, access)
        assert fault.value.error_code == code
    rows = np.resize(np.array([0x1008, 8], np.uint64), 200)
    r = vcpu.access(rows, int(SHADOW_WRITE))
    assert np.array_equal(r.status, np.resize(np.array([Status.OK, Status.PAGE_FAULT], np.uint8), 200))
    assert set(r.error_code.tolist()) == {0, 0x47}
    assert r.gpa[0] == 0x6008
    alone = vcpu.gva_walk.translate(rows, int(SHADOW_WRITE))
    assert np.array_equal(alone.error_code, r.error_code)


def test_shadow_paging_has_no_shadow_stacks():
    vcpu = machine(None, cr4=0x20 | CET)
    for gva in (0x1008, np.array([0x1008], np.uint64)):
        with pytest.raises(ValueError, match="two-dimensional"):
            vcpu.access(gva, int(SHADOW_WRITE))
    assert vcpu.access(0x1008, Access.USER).gpa == 0x6008


@pytest.mark.parametrize("tdp", ["ept", None])
@pytest.mark.parametrize(("registers", "cpu", "words"), [
    ({"cr4": 0x20 | PKS}, {}, "cr4"), ({"cr4": 0x20 | LASS}, {}, "cr4"), ({"efer": 0xD00 | UAIE}, {}, "efer"),
    ({}, {"c_bit": 51}, "c_bit")])
def test_what_kvm_does_not_offer(tdp, registers, cpu, words):
    """The walks of the vCPU have it, its machine does not."""
    vcpu = machine(tdp, CpuModel(**cpu), **registers)
    assert vcpu.gva_walk.gva_to_gpa(8, Access.USER) == 0x5008
    with pytest.raises(ValueError, match=words):
        vcpu.access(8, Access.USER)


@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_writes_of_what_kvm_does_not_offer(tdp):
    """Refused behind the first access, all or nothing; the vCPU goes on as it was. The walks of a vCPU alone take them."""
    vcpu = machine(tdp)
    assert vcpu.access(8, Access.USER).gpa == 0x5008
    regs, cpu = vcpu.regs, vcpu.cpu
    loads = [(lambda: vcpu.wrmsr_efer(0xD00 | UAIE), "efer 0x100d00: KVM offers no guest upper address ignore"),
             (lambda: vcpu.mov_cr(4, 0x20 | LASS), "cr4 0x8000020: KVM offers no guest PKS and LASS; want 0x8000000 clear"),
             (lambda: vcpu.mov_cr(4, 0x20 | PKS | LASS), "want 0x9000000 clear"),
             (lambda: vcpu.set_regs(cr4=0x20 | PKS, pkrs=4), "want 0x1000000 clear"),
             (lambda: vcpu.set_regs(**LONG | {"efer": 0xD00 | UAIE}), "efer"),
             (lambda: vcpu.enter_nested(None, cr4=0x20 | LASS), "cr4"),
             (lambda: setattr(vcpu, "cpu", CpuModel(c_bit=51)), "c_bit 51: the machine has no memory encryption; want None")]
    if tdp == "ept":
        loads.append((lambda: vcpu.enter_nested(Ept(0x801E), **LONG | {"cr4": 0x20 | LASS}), "cr4"))
    for load, words in loads:
        with pytest.raises(ValueError, match=words):
            load()
        assert (vcpu.regs, vcpu.cpu, vcpu.mmu_is_nested) == (regs, cpu, False)
        assert vcpu.access(8, Access.USER).gpa == vcpu.gva_walk.gva_to_gpa(8, Access.USER) == 0x5008
        assert (vcpu.guest_mmu is None) == (tdp is None)
    assert vcpu.vm.audit() == []
    alone = Vcpu(vcpu.mem, tdp=tdp)
    alone.set_regs(**LONG)
    alone.mov_cr(4, 0x20 | LASS)
    alone.wrmsr_efer(0xD00 | UAIE)
    assert alone.gva_walk.gva_to_gpa(8, Access.USER) == 0x5008
    with pytest.raises(ValueError, match="cr4"):
        alone.access(8, Access.USER)
    alone.wrmsr_efer(0xD00)                             # what is off can stay off, and what is on be taken off
    alone.mov_cr(4, 0x20)
    assert alone.access(8, Access.USER).gpa == 0x5008


@pytest.mark.parametrize("stage", [{"spptp": 0x9000}, {"ve": 0x9000}, {"eptp": 0x801E | 1 << 7}])
def test_what_kvm_does_not_offer_l1(stage):
    """Sub-page permissions, #VE and supervisor shadow-stack control: the walk has them, the machine refuses to shadow them."""
    vcpu = machine("ept")
    for gpa, entry in ((0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0xB7)):
        vcpu.mem.write_u64(gpa, entry)
    vcpu.enter_nested(Ept(**{"eptp": 0x801E} | stage), **LONG)
    assert vcpu.gva_walk.gva_to_gpa(8, Access.USER) == 0x5008
    for gva in (8, np.array([8], np.uint64)):
        with pytest.raises(ValueError, match="KVM offers L1 no supervisor shadow-stack control, sub-page permissions and #VE"):
            vcpu.access(gva, int(Access.USER))
    vcpu.enter_nested(Ept(0x801E), **LONG)
    assert vcpu.access(8, Access.USER).gpa == 0x5008
    assert vcpu.vm.audit() == []


def test_probes_are_no_accesses():
    vcpu = Vcpu(GuestMemory(0x10000), CpuModel(), tdp="ept")
    for access in (Access.PROBE, Access.PROBE | Access.USER):
        with pytest.raises(ValueError, match="PROBE"):
            vcpu.access(8, access)
        with pytest.raises(ValueError, match="PROBE"):
            vcpu.access(np.zeros(3, np.uint64), int(access))
