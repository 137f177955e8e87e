# SPDX-License-Identifier: Apache-2.0
"""Register values of each paging mode, by the bits of the SDM, and a vCPU of two page directories in one of them."""

import pytest

from kvmmu import CpuModel, GeneralProtection, GuestMemory, Vcpu

PE, NW, CD, WP, PG, ET = 1 << 0, 1 << 29, 1 << 30, 1 << 16, 1 << 31, 1 << 4
PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE, CET = (1 << bit for bit in (4, 5, 7, 12, 17, 20, 21, 22, 23))
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
ROOT, PDS, PAGES = 0x1000, (0x2000, 0x3000), (0x800000, 0xA00000)
PROTECTED = {"cr0": PE | PG | ET, "cr4": 0, "efer": 0}
PAE_MODE = PROTECTED | {"cr4": PAE}
LONG = {"cr0": PE | PG | ET, "cr4": PAE, "efer": LME | LMA}
MODES = {"off": {"cr0": PE | ET, "cr4": 0, "efer": 0}, "32": PROTECTED, "pae": PAE_MODE, "4l": LONG,
         "5l": LONG | {"cr4": PAE | LA57}}


def pae_memory():
    """Two page directories, each one 2M page at address 0, and a PDPT at ROOT whose entry 0 names the first."""
    mem = GuestMemory(1 << 24)
    for pd, page in zip(PDS, PAGES, strict=True):
        mem.write_u64(pd, page | 0xE7)
    mem.write_u64(ROOT, PDS[0] | 1)
    return mem


def machine(regs=None, mem=None, **cpu):
    vcpu = Vcpu(pae_memory() if mem is None else mem, cpu=CpuModel(**cpu))
    vcpu.set_regs(**{"cr3": ROOT} | (MODES["off"] if regs is None else regs))
    return vcpu


def state(vcpu):
    """All that a refused instruction must leave alone."""
    walk = vcpu.gva_walk
    return (vcpu.regs, vcpu.pdptrs, vcpu.cpu, vcpu.smm, walk.cpu_role.word, walk.init_count, walk.get_guest_pgd(),
            tuple(walk.get_pdptr(i) for i in range(4)), walk.fmt.permissions.tobytes(), walk.fmt.rsvd_bits_mask.tobytes())


def refused(vcpu, call, *args, error=GeneralProtection, **kwargs):
    """The exception of an instruction that must fail, nothing having changed."""
    before = state(vcpu)
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert state(vcpu) == before
    return caught.value
