# SPDX-License-Identifier: Apache-2.0
"""INVEPT and INVVPID: operands, and what they take of TLB, roots and the roots before.

Sources: SDM vol. 3, "INVEPT-Invalidate Translations Derived from EPT", "INVVPID-Invalidate Translations Based on VPID".
"""

import pytest

from kvmmu import CpuModel, Ept, GuestMemory, Host, InvalidOpcode, Vcpu, Vm, VmFail

PAGE = 0x1000
ROOTS = (0x100000, 0x200000, 0x300000)
DATA = (0x10000, 0x11000, 0x12000)
L2 = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}


def eptp(root, ad=True):
    return root | 0x1E | (0x40 if ad else 0)


def machine(host=None, **cpu):
    """L1 with three EPTs: each maps L2's page 0x5000 to a page of its own, and 0x400000 where the leaf table lies."""
    mem = GuestMemory(16 << 20)
    for root, data in zip(ROOTS, DATA, strict=True):
        for level in range(3):
            mem.write_u64(root + PAGE * level, root + PAGE * (level + 1) | 7)
        mem.write_u64(root + 3 * PAGE + 8 * 5, data | 0x37)
    vm = Vm(mem, CpuModel(**cpu), host or Host(tdp="ept"), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    return vm, vcpu


def remap(vcpu, root, data):
    """L1 writes its leaf entry, by a store of its own."""
    vcpu.store(root + 3 * PAGE + 8 * 5, (data | 0x37).to_bytes(8, "little"))


def visit(vcpu, root):
    vcpu.enter_nested(Ept(eptp(root)), **L2)
    gpa = vcpu.access(0x5000).gpa
    vcpu.leave_nested()
    return gpa


def test_a_root_that_is_kept_is_old_until_invept():
    """L1 changes a leaf without a flush: a root that is found again says what it said, until INVEPT of its EPTP or of all."""
    for how in ("none", "other", "context", "global"):
        _, vcpu = machine()
        assert [visit(vcpu, root) for root in ROOTS[:2]] == list(DATA[:2])
        remap(vcpu, ROOTS[0], 0x20000)              # the table is write-protected, the write makes it unsync
        if how == "other":
            vcpu.invept(1, eptp(ROOTS[1]))
        elif how == "context":
            vcpu.invept(1, eptp(ROOTS[0]))
        elif how == "global":
            vcpu.invept(2)
        assert visit(vcpu, ROOTS[0]) == (0x20000 if how in ("context", "global") else DATA[0]), how


def roots(vcpu):
    mmu = vcpu.guest_mmu
    return ([mmu.root_hpa] if mmu.root_hpa is not None else []) + [hpa for _, hpa in mmu.prev_roots]


def test_roots_and_translations_that_go():
    """One EPTP takes its root alone, whether it is the present one or one before; all take all. A/D does not count."""
    for left in range(3):
        vm, vcpu = machine()
        for root in ROOTS:
            visit(vcpu, root)
        assert len(roots(vcpu)) == 3
        assert len(vcpu.tlb) == 1, "a root that is made flushes"
        vcpu.invept(1, eptp(ROOTS[left], ad=False))
        assert len(roots(vcpu)) == 2
        assert len(vcpu.tlb) == (left != 2)
        assert vm.audit() == []
        vcpu.invept(1, eptp(0x400000))
        assert len(roots(vcpu)) == 2
        vcpu.invept(2, 12345)
        assert (roots(vcpu), len(vcpu.tlb)) == ([], 0)
        assert vm.audit() == []
        assert [visit(vcpu, root) for root in ROOTS] == list(DATA)


def test_l1_keeps_its_translations():
    _, vcpu = machine()
    vcpu.access(0x7000)
    visit(vcpu, ROOTS[0])
    vcpu.access(0x7000)
    hits = vcpu.tlb.hits
    vcpu.invept(2)
    vcpu.invvpid(2, 0)
    assert vcpu.access(0x7000).gpa == 0x7000
    assert vcpu.tlb.hits == hits + 1


@pytest.mark.parametrize(("type", "address", "left"), [(0, 0x5123, 1), (0, 0x9000, 2), (1, 0, 0), (2, 0, 0), (3, 0, 0)])
def test_invvpid_takes_what_l2_had(type, address, left):
    """Entries of every root; the roots themselves stay."""
    _, vcpu = machine()
    for data in (DATA[0], DATA[0] + PAGE):
        vcpu.store(ROOTS[0] + 3 * PAGE + 8 * (5 + (data != DATA[0])), (data | 0x37).to_bytes(8, "little"))
    vcpu.enter_nested(Ept(eptp(ROOTS[0])), **L2)
    vcpu.access(0x5000)
    vcpu.access(0x6000)
    vcpu.leave_nested()
    before = len(vcpu.tlb)
    vcpu.invvpid(type, 0 if type == 2 else 7, address)
    assert len(vcpu.tlb) == before - 2 + left
    assert len(roots(vcpu)) == 1


def test_invvpid_3_keeps_global_translations():
    """L2 with paging, one of its pages global."""
    mem = GuestMemory(16 << 20)
    for root in ROOTS[:1]:
        for level in range(2):
            mem.write_u64(root + PAGE * level, root + PAGE * (level + 1) | 7)
        for i in range(8):
            mem.write_u64(root + 2 * PAGE + 8 * i, i << 21 | 0xB7)
    for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4000, 0x5067), (0x4008, 0x6167)):
        mem.write_u64(gpa, entry)
    vcpu = Vm(mem, host=Host(tdp="ept"), backing="4k").create_vcpu()
    vcpu.set_regs(cr0=1)
    for type, left in ((3, 1), (1, 0), (0, 1)):
        vcpu.enter_nested(Ept(eptp(ROOTS[0])), cr0=0x80010001, cr3=0x1000, cr4=0xA0, efer=0xD00)
        assert (vcpu.access(0).gpa, vcpu.access(PAGE).gpa) == (0x5000, 0x6000)
        vcpu.leave_nested()
        before = len(vcpu.tlb)
        vcpu.invvpid(type, 1, PAGE)
        assert len(vcpu.tlb) == before - 2 + left


def test_invvpid_under_shadow_paging_leaves_the_roots_of_l2():
    """L1 and L2 share an MMU there: the roots before that are L2's go, L1's stay."""
    mem = GuestMemory(16 << 20)
    for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4000, 0x5067)):
        for base in (0, 0x100000):
            mem.write_u64(base + gpa, entry + base)
    vm = Vm(mem, host=Host(tdp=None), backing="4k")
    vcpu = vm.create_vcpu()
    regs = {"cr0": 0x80010001, "cr4": 0x20, "efer": 0xD00}
    vcpu.set_regs(cr3=0x1000, **regs)
    assert vcpu.access(0).gpa == 0x5000
    vcpu.enter_nested(None, cr3=0x101000, **regs)
    assert vcpu.access(0).gpa == 0x105000
    vcpu.leave_nested()
    assert vcpu.access(0).gpa == 0x5000
    assert len(vcpu.mmu.prev_roots) == 1
    vcpu.invvpid(1, 5)
    assert vcpu.mmu.prev_roots == []
    assert vm.audit() == []
    assert vcpu.access(0).gpa == 0x5000
    with pytest.raises(InvalidOpcode, match="INVEPT"):
        vcpu.invept(2)


@pytest.mark.parametrize("running", [False, True])
def test_operands(running):
    """What the instructions refuse; nothing is flushed then."""
    _, vcpu = machine(la57=False, maxphyaddr=40)
    if running:
        visit(vcpu, ROOTS[0])
    bad = [(0, 0), (3, 0), (1, 0), (1, eptp(ROOTS[0]) | 1), (1, eptp(ROOTS[0]) | 0x100), (1, eptp(1 << 40)), (1, ROOTS[0] | 0x16)]
    for type, operand in bad:
        with pytest.raises(VmFail, match="INVEPT") as failed:
            vcpu.invept(type, operand)
        assert (failed.value.number, failed.value.rule) == (28, "invept")
    for type, vpid, address in ((4, 1, 0), (0, 0, 0), (1, 0, 0), (3, 0, 0), (0, 1 << 16, 0), (2, 1 << 16, 0), (0, 1, 1 << 47)):
        with pytest.raises(VmFail, match="INVVPID") as failed:
            vcpu.invvpid(type, vpid, address)
        assert failed.value.number == 28
    vcpu.invvpid(2, 0)
    vcpu.invvpid(1, 0xFFFF, 1 << 63)
    vcpu.invept(2, 1 << 63)
    if running:
        assert visit(vcpu, ROOTS[0]) == DATA[0]
    for call in (lambda: vcpu.invept(-1), lambda: vcpu.invept(1, 1 << 64), lambda: vcpu.invvpid(0, -1)):
        with pytest.raises(ValueError, match="want 0 to"):
            call()
    with pytest.raises(TypeError, match="vpid: want an integer"):
        vcpu.invvpid(1, 1.5)


def test_who_has_the_instructions():
    """Not AMD's processors, not L1 on a host without EPT or NPT; and L2 exits instead."""
    vcpu = Vcpu(GuestMemory(PAGE), CpuModel(vendor="amd"))
    for call in (lambda: vcpu.invept(2), lambda: vcpu.invvpid(2, 0)):
        with pytest.raises(InvalidOpcode):
            call()
    _, vcpu = machine()
    vcpu.enter_nested(Ept(eptp(ROOTS[0])), **L2)
    for call in (lambda: vcpu.invept(2), lambda: vcpu.invvpid(2, 0)):
        with pytest.raises(ValueError, match="L2 runs"):
            call()
