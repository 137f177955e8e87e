# SPDX-License-Identifier: Apache-2.0
"""Second stages out of a VMCB and out of KVM's VMCS: each field from its place, and bad blocks told by name."""

import struct

import pytest

from kvmmu import Ept, GuestMemory, Intercepts, Npt, Pml, ept_from_vmcs12, npt_from_vmcb, regs_from_vmcb

BLOCK, SIZE = 0x3000, 0x8000
L1_CR4, L1_EFER = 0x750EF0, 0x1D01
# the fields `vmcb` in meta.json of the recordings ntoy, ndyn and nlin: what L1's real KVM had put into its VMCB
RECORDED = {
    "ntoy": {"nested_cr3": 0x103AF000, "cr0": 0x80050033, "cr3": 0x102C000, "cr4": 0xE0, "efer": 0x1D01, "asid": 1},
    "ndyn": {"nested_cr3": 0x1FEEB000, "cr0": 0x80050033, "cr3": 0x1000000, "cr4": 0xE0, "efer": 0x1D01, "asid": 7},
    "nlin": {"nested_cr3": 0x1629B000, "cr0": 0x80050033, "cr3": 0x2990000, "cr4": 0x710EF0, "efer": 0x1D01, "asid": 11},
}
VMCB_OFFSET = {"exceptions": 0x008, "asid": 0x058, "nested": 0x090, "nested_cr3": 0x0B0, "efer": 0x4D0, "cr4": 0x548,
               "cr3": 0x550, "cr0": 0x558, "rflags": 0x570}


def memory(words):
    """Memory with a block at BLOCK; words: {offset: (struct code, value)}."""
    mem = GuestMemory(SIZE)
    for offset, (code, value) in words.items():
        mem.write(BLOCK + offset, struct.pack("<" + code, value))
    return mem


def vmcb(**values):
    return memory({VMCB_OFFSET[name]: ("Q", value) for name, value in ({"nested": 1} | values).items()})


def vmcs(eptp=0x5E, *, revision=0x11E57ED0, primary=1 << 31, secondary=1 << 1, **more):
    return memory({0: ("I", revision), 120: ("Q", eptp), 748: ("I", primary), 804: ("I", secondary)} | more.get("words", {}))


@pytest.mark.parametrize("name", RECORDED)
def test_a_vmcb_like_the_recorded_one(name):
    """N_CR3 and L2's registers are those of the recording."""
    values = RECORDED[name]
    mem = vmcb(**values)
    assert npt_from_vmcb(mem, BLOCK, cr4=L1_CR4, efer=L1_EFER) == Npt(values["nested_cr3"], cr4=L1_CR4, efer=L1_EFER)
    regs = regs_from_vmcb(mem, BLOCK)
    assert {key: getattr(regs, key) for key in ("cr0", "cr3", "cr4", "efer")} == {
        key: values[key] for key in ("cr0", "cr3", "cr4", "efer")}


def test_every_field_of_a_vmcb_lies_apart():
    """Distinct values come out of distinct places; only the low half of the exception word is a bitmap."""
    values = {name: 0x1000 * (number + 1) for number, name in enumerate(VMCB_OFFSET)} | {"nested": 9}
    values["exceptions"] = 0xABCD00004000
    mem = vmcb(**values)
    npt, regs = npt_from_vmcb(mem, BLOCK, cr4=1, efer=2), regs_from_vmcb(mem, BLOCK)
    assert npt == Npt(values["nested_cr3"], cr4=1, efer=2, gmet=True, intercepts=Intercepts(0x4000))
    assert (regs.cr0, regs.cr3, regs.cr4, regs.efer, regs.rflags) == tuple(
        values[name] for name in ("cr0", "cr3", "cr4", "efer", "rflags"))


def test_a_vmcb_without_nested_paging_has_registers_only():
    mem = vmcb(nested=0, nested_cr3=0x5000, cr3=0x6000)
    with pytest.raises(ValueError, match="VMCB at 0x3000: NP_ENABLE is clear"):
        npt_from_vmcb(mem, BLOCK, cr4=L1_CR4, efer=L1_EFER)
    assert regs_from_vmcb(mem, BLOCK).cr3 == 0x6000


def test_encrypted_registers_are_refused():
    with pytest.raises(ValueError, match="SEV-ES"):
        regs_from_vmcb(vmcb(nested=7), BLOCK)


READERS = [("VMCB", lambda mem, gpa: npt_from_vmcb(mem, gpa, cr4=L1_CR4, efer=L1_EFER)), ("VMCB", regs_from_vmcb),
           ("VMCS", ept_from_vmcs12)]


@pytest.mark.parametrize(("name", "reader"), READERS)
@pytest.mark.parametrize(("gpa", "message"), [
    (BLOCK + 0x10, "_gpa: 0x3010 is not a multiple of 0x1000"), (-0x1000, "_gpa: want 0 to 0xfffffffffffff, got -0x1000"),
    (SIZE, ": no memory at 0x8000"), (1 << 52, "_gpa: want .* got 0x10000000000000")])
def test_a_bad_address_is_named(name, reader, gpa, message):
    with pytest.raises(ValueError, match=f"(?i:{name}){message}"):
        reader(GuestMemory(SIZE), gpa)


def test_the_vmcs_of_kvm():
    """EPT pointer and controls; capabilities are the defaults."""
    assert ept_from_vmcs12(vmcs(0x1234005E), BLOCK) == Ept(0x1234005E)
    words = {312: ("Q", 0x7000), 996: ("H", 200), 752: ("I", 0x4002), 756: ("I", 9), 760: ("I", 1)}
    ept = ept_from_vmcs12(vmcs(0x123400666 & ~0xFFF | 0x66, secondary=1 << 1 | 1 << 17 | 1 << 22, words=words), BLOCK)
    assert ept == Ept(0x123400066, mbec=True, pml=Pml(0x7000, 200), intercepts=Intercepts(0x4002, 9, 1))
    assert ept.level == 5


@pytest.mark.parametrize(("changes", "message"), [
    ({"revision": 0x12}, "revision 0x12 is not KVM's"), ({"revision": 0x91E57ED0}, "shadow VMCS"),
    ({"secondary": 0}, "EPT is not enabled"), ({"primary": 0}, "EPT is not enabled"),
    ({"eptp": 0x5000}, "VMCS at 0x3000: eptp 0x5000: a walk of 1 levels"), ({"eptp": 0x5059}, "memory type 1")])
def test_a_vmcs_without_a_usable_ept(changes, message):
    with pytest.raises(ValueError, match=message):
        ept_from_vmcs12(vmcs(**changes), BLOCK)
