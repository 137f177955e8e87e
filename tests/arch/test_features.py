# SPDX-License-Identifier: Apache-2.0
"""Control bits without a say in translation, and the canonical check of instructions that invalidate.

Sources: SDM vol. 3, "Control Registers", "Extended Feature Enable Register"; vol. 2, "INVPCID", "INVLPG"; "Flexible Return and
Event Delivery"; APM vol. 2, "CR4 Register", "Extended Feature Enable Register (EFER)".
"""

import re
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from kvmmu import CpuModel, Cr0, GeneralProtection, GuestMemory, Host, InvalidOpcode, Regs, Vcpu, Vm
from kvmmu.arch.registers import FEATURES, with_registers

LONG = {"cr0": 0x80010033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}
# From the manuals, by name: vendors, register, bit.
BITS = {
    "umip": ("intel amd", "cr4", 11), "vmx": ("intel", "cr4", 13), "smx": ("intel", "cr4", 14),
    "fsgsbase": ("intel amd", "cr4", 16), "xsave": ("intel amd", "cr4", 18), "kl": ("intel", "cr4", 19),
    "cet": ("intel amd", "cr4", 23), "uintr": ("intel", "cr4", 25), "fred": ("intel amd", "cr4", 32),
    "svm": ("amd", "efer", 12), "lmsle": ("amd", "efer", 13), "ffxsr": ("amd", "efer", 14), "tce": ("amd", "efer", 15),
    "mcommit": ("amd", "efer", 17), "intwb": ("amd", "efer", 18), "autoibrs": ("amd", "efer", 21),
}
REFUSED = {"cr4": (15, 26, 29, 30, 31, 33, 63), "efer": (*range(1, 8), 9, 16, 19, *range(22, 64))}


def memory():
    mem = GuestMemory(0x8000)
    for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4000, 0x5067)):
        mem.write_u64(gpa, entry)
    return mem


def loads(vcpu, register, bit):
    """Whether a bit may be set: by a VMM, and by the guest's own instruction."""
    vcpu.set_regs(**LONG)
    value = LONG[register] | 1 << bit
    load = (lambda: vcpu.mov_cr(4, value)) if register == "cr4" else (lambda: vcpu.wrmsr_efer(value))
    done = []
    for call in (load, lambda: vcpu.set_regs(**{register: value})):
        try:
            call()
        except GeneralProtection as error:
            assert error.rule == f"{register}-reserved"
            done.append(False)
        else:
            assert getattr(vcpu.regs, register) == value
            assert vcpu.gva_walk.gva_to_gpa(0x123, 4) == 0x5123, "translation does not depend on it"
            done.append(True)
    assert done[0] == done[1]
    return done[0]


def test_the_features_are_those_of_the_manuals():
    assert set(FEATURES) == set(BITS)
    for name, (vendors, bit) in FEATURES.items():
        assert (" ".join(vendors), int(bit)) == (BITS[name][0], 1 << BITS[name][2]), name


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_every_bit_by_default(vendor):
    """Bits of either vendor are legal, all others are not."""
    vcpu = Vcpu(memory(), CpuModel(vendor=vendor))
    for name, (_, register, bit) in BITS.items():
        assert loads(vcpu, register, bit), name
    for register, bits in REFUSED.items():
        for bit in bits:
            assert not loads(vcpu, register, bit), f"{register} bit {bit}"


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_strict_models(vendor):
    """A processor with named features has the bits of these, and no other ones."""
    mine = [name for name, (vendors, _, _) in BITS.items() if vendor in vendors.split()]
    none = Vcpu(memory(), CpuModel(vendor=vendor, features=()))
    full = Vcpu(memory(), CpuModel(vendor=vendor, features=mine))
    for name, (_, register, bit) in BITS.items():
        assert not loads(none, register, bit), name
        assert loads(full, register, bit) == (name in mine), name
        if name in mine:
            assert loads(Vcpu(memory(), CpuModel(vendor=vendor, features={name})), register, bit)
            rest = [other for other in mine if other != name]
            assert not loads(Vcpu(memory(), CpuModel(vendor=vendor, features=rest)), register, bit)


def test_features_are_checked_and_kept_as_a_set():
    cpu = CpuModel(features=["fred", "umip", "fred"])
    assert cpu.features == frozenset({"fred", "umip"})
    assert hash(cpu) == hash(CpuModel(features=("umip", "fred")))
    assert replace(cpu, la57=False).features == cpu.features
    for features in ("fred", ["nothing"], ["mcommit"]):
        with pytest.raises(ValueError, match="features: want None or a collection of cet, fred"):
            CpuModel(features=features)


def test_another_model_refuses_registers_in_force():
    vcpu = Vcpu(memory())
    vcpu.set_regs(**LONG | {"cr4": 0x20 | 1 << 32})
    with pytest.raises(GeneralProtection, match="0x100000000"):
        vcpu.cpu = CpuModel(features=())
    assert vcpu.cpu == CpuModel()


def test_named_features_are_refused_as_ever():
    """Those with a say in translation have fields of their own."""
    for name, bit in (("la57", 12), ("pcid", 17), ("smep", 20), ("smap", 21), ("pku", 22)):
        vcpu = Vcpu(memory(), CpuModel(**{name: False}))
        vcpu.set_regs(**LONG)
        with pytest.raises(GeneralProtection, match="cr4-reserved|lacks"):
            vcpu.set_regs(cr4=0x20 | 1 << bit)
    with pytest.raises(InvalidOpcode):
        Vcpu(memory()).wrpkru(0)


# ---- canonical addresses of INVPCID and INVLPG -----------------------------------------------------------------------------

ADDRESSES = {1 << 46: 48, (1 << 64) - (1 << 47): 48, 1 << 47: 57, 1 << 50: 57, 0xFF00000000000000: 57, 1 << 56: 64, 1 << 57: 64,
             0xFE00000000000000: 64, 1 << 63: 64}


@pytest.mark.parametrize("cr4_la57", [False, True])
@pytest.mark.parametrize("la57", [False, True])
@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_invpcid_checks_by_the_widest_paging(tdp, la57, cr4_la57):
    """For each address the width that it needs; the processor's widest decides, and CR4.LA57 does not."""
    if cr4_la57 and not la57:
        return
    mem = memory()
    mem.write_u64(0x6000, 0x1067)
    vcpu = Vm(mem, CpuModel(la57=la57), Host(tdp=tdp)).create_vcpu()
    vcpu.set_regs(**LONG | ({"cr3": 0x6000, "cr4": 0x1020} if cr4_la57 else {}))
    for running in (False, True):
        if running:
            assert vcpu.access(0x123).gpa == 0x5123
        for address, width in ADDRESSES.items():
            legal = width <= (57 if la57 else 48)
            for kind in range(4):
                try:
                    vcpu.invpcid(kind, 0, address)
                except GeneralProtection as error:
                    assert (kind, legal, error.rule) == (0, False, "invpcid")
                else:
                    assert legal or kind, f"{address:#x}"


@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_invlpg_of_an_address_that_is_not_canonical_does_nothing(tdp):
    """No #GP, and translations stay; so do those of the address that has the same low bits."""
    mem = memory()
    vm = Vm(mem, CpuModel(), Host(tdp=tdp), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**LONG)
    assert vcpu.access(0x123).gpa == 0x5123
    entries, hits = len(vcpu.tlb), vcpu.tlb.hits
    for address in (1 << 57, 1 << 63, 1 << 50, 1 << 47):
        vcpu.invlpg(address)
    assert vcpu.access(0x123).gpa == 0x5123
    assert (len(vcpu.tlb), vcpu.tlb.hits) == (entries, hits + 1)
    vcpu.invlpg(0)
    assert len(vcpu.tlb) == entries - 1


@pytest.mark.parametrize("values", [
    {"cr3": 0x5000}, {"cr3": np.uint64(1 << 63)}, {"cr0": Cr0.PE | Cr0.PG, "efer": 0}, {"pdptrs": [1, 2, 3, 4]}, {"pdptrs": None},
    {"pkru": 0xFFFFFFFF, "pkrs": 1, "rflags": 1 << 18}, {}])
def test_changed_registers_are_those_that_replace_makes(values):
    """with_registers(): equal, of equal hash, of plain integers, and the registers that it began with are the same."""
    before = Regs(1, 2, 3, 4, pdptrs=(5, 6, 7, 8))

    after = with_registers(before, **values)

    expected = replace(before, **values)
    assert (expected, hash(expected)) == (after, hash(after))
    assert all(type(getattr(after, field.name)) in (int, tuple, type(None)) for field in fields(Regs))
    assert Regs(1, 2, 3, 4, pdptrs=(5, 6, 7, 8)) == before
    with pytest.raises(FrozenInstanceError):
        after.cr3 = 1


@pytest.mark.parametrize(("name", "value"), [
    ("cr3", 1 << 64), ("cr3", -1), ("cr0", True), ("cr4", 1.0), ("pkru", 1 << 32), ("pkrs", -1), ("pdptrs", (1, 2)),
    ("pdptrs", "1234"), ("pdptrs", (0, 0, 0, 1 << 64))])
def test_changed_registers_are_checked_as_replace_checks_them(name, value):
    """with_registers(): the same error with the same text."""
    before = Regs(1, 2, 3, 4)
    with pytest.raises((TypeError, ValueError)) as expected:
        replace(before, **{name: value})
    with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
        with_registers(before, **{name: value})
