# SPDX-License-Identifier: Apache-2.0
"""Tables of random words: each access of a machine comes to what one of the walks says that KVM or a processor makes.

The guest may do anything here but change its tables and what they mean: EFER and CR4.PSE stay, since KVM's shadow pages do
not tell entries made under other ones. KVMMU_GARBAGE_GUESTS is how many guests, KVMMU_GARBAGE_SEED the first seed.
"""

import dataclasses
import os
from collections import Counter

import numpy as np
import pytest
from random_guests import MODES, PAGE, random_gvas, random_memory, random_regs, random_stage

import kvmmu
from kvmmu import Access, CpuModel, GuestFault, Host, Npt, RetPf, Vcpu, Vm

GUESTS = int(os.environ.get("KVMMU_GARBAGE_GUESTS", "120"))
SEED = int(os.environ.get("KVMMU_GARBAGE_SEED", "1"))
REGISTERS = ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")
CR0_WP, CR4_PSE, CR4_SMAP, CR4_PKE, EFER_LMA = 1 << 16, 1 << 4, 1 << 21, 1 << 22, 1 << 10
DIRTY = 1 << 6
KINDS = (Access.READ, Access.WRITE, Access.FETCH)
RINGS = (0, 0, Access.USER, Access.USER, Access.AC, Access.IMPLICIT)


class Guest:
    """One memory three times: below a machine, and for the walks of a processor and of KVM."""

    def __init__(self, seed, counts):
        self.rng = rng = np.random.default_rng(seed)
        self.mode = str(rng.choice(MODES, p=(0.02, 0.2, 0.2, 0.4, 0.18)))
        self.maxphyaddr = int(rng.choice((36, 40)))
        content = int(rng.integers(1 << 63))
        memories = [random_memory(kvmmu, np.random.default_rng(content), self.mode, self.maxphyaddr, counts, kinds=("plain",))
                    for _ in range(3)]
        self.mems, self.frames = [mem for mem, _ in memories], memories[0][1]
        self.tdp = (None, "ept", "npt")[int(rng.integers(3))]
        host = Host(tdp=self.tdp, maxphyaddr=int(rng.choice((40, 46, 52))), nx_huge_pages=bool(rng.integers(2)),
                    max_page=str(rng.choice(("4k", "2m", "1g"))))
        cpu = CpuModel(vendor=str(rng.choice(("intel", "amd"))), maxphyaddr=self.maxphyaddr, gbpages=bool(rng.integers(2)))
        self.vm = Vm(self.mems[0], cpu=cpu, host=host, backing=str(rng.choice(("4k", "2m"))))
        self.machine = self.vm.create_vcpu()
        self.walks = [Vcpu(self.mems[1], cpu=cpu, tdp=self.tdp),
                      Vcpu(self.mems[2], cpu=dataclasses.replace(cpu, conformance="kvm"), tdp=self.tdp)]
        self.gvas = random_gvas(rng, 25, self.mode)
        self.first = self.registers()
        self.counts = counts
        self.undirtied = set()                          # entries whose D may be clear in the machine's memory
        self.differ = False                             # KVM and a processor may have left other A and D bits

    @property
    def may_be_endless(self):
        """KVM lets the guest try forever: beyond 4 GiB of 2-level and PAE tables of L1's, and without memory at a PDPT."""
        if self.tdp is None:
            return self.mode == "pae" and not self.mems[0].is_backed(self.machine.regs.cr3, 1)
        return isinstance(self.under, Npt) and not self.under.efer & EFER_LMA

    def registers(self):
        regs = random_regs(kvmmu, self.rng, self.mode, self.frames, self.maxphyaddr)
        registers = {name: getattr(regs, name) for name in REGISTERS}
        if self.tdp is None:
            registers["cr4"] &= ~CR4_PKE
            if registers["cr4"] & CR4_SMAP:             # KVM's own mappings for CR0.WP=0 ignore SMAP
                registers["cr0"] |= CR0_WP
        return registers

    def stage(self):
        """A second stage of L1's that the host can shadow, or none."""
        if self.tdp is None or self.rng.random() < 0.3:
            return None
        while True:
            stage = random_stage(kvmmu, self.rng, self.frames, self.maxphyaddr)
            if isinstance(stage, Npt):
                if self.tdp == "npt" or not stage.gmet:
                    return stage
            elif self.tdp == "ept":
                return dataclasses.replace(stage, pml=None)

    def use(self, registers, stage):
        """Whether all three take these registers, as none of them or all must."""
        taken = []
        for vcpu in (self.machine, *self.walks):
            try:
                if stage is None:
                    vcpu.leave_nested()
                    vcpu.set_regs(**registers)
                else:
                    vcpu.enter_nested(stage, **registers)
                taken.append(True)
            except (GuestFault, ValueError):
                taken.append(False)
        assert len(set(taken)) == 1
        return taken[0]

    def access(self):
        """One access of each."""
        gva = np.array([self.rng.choice(self.gvas)], np.uint64)
        access = int(self.rng.choice(KINDS)) | int(self.rng.choice(RINGS))
        r = self.machine.access(gva, np.array([access], np.uint8))
        outcomes = []
        for vcpu in self.walks:
            t = vcpu.gva_walk.translate(gva, access)
            outcomes.append((int(t.status[0]), int(t.gpa[0]), int(t.error_code[0])))
        outcome = int(r.status[0]), int(r.gpa[0]), int(r.error_code[0])
        self.counts["accesses"] += 1
        if outcome[:2] == (0, kvmmu.INVALID_GPA):
            assert r.ret[0] in (RetPf.RETRY, RetPf.FIXED)
            assert self.may_be_endless
            self.counts["endless"] += 1
            self.differ = True
            return
        assert outcome in outcomes, f"{int(gva[0]):#x}, access {access:#x}: exits {int(r.exits[0])}, {self.machine.regs}"
        self.differ |= outcomes[0] != outcomes[1]
        # KVM emulates an access of the last MMIO page without a walk, which would set D
        if self.tdp is None and access & Access.WRITE and outcome[0] == 0 and not self.mems[0].is_backed(outcome[1], 1):
            self.undirtied |= {step.gpa for step in self.walks[0].gva_walk.walk_record(int(gva[0]), access).steps[-1:]}
        # what a fault leaves in L1's tables is KVM's choice
        self.differ |= outcome[0] != 0 and self.machine.mmu_is_nested

    def page(self, number, frame):
        """The bytes of a page of one of the memories."""
        content = bytearray(self.mems[number].read(frame * PAGE, PAGE))
        for gpa in self.undirtied:
            if gpa // PAGE == frame:
                content[gpa % PAGE] |= DIRTY
        return content

    def run(self):
        for _ in range(6):
            registers, stage = self.registers(), self.stage()
            if self.tdp is None:
                registers |= {"cr4": registers["cr4"] & ~CR4_PSE | self.first["cr4"] & CR4_PSE, "efer": self.first["efer"]}
            self.under = stage
            if not self.use(registers, stage):
                continue
            for _ in range(60):
                self.access()
            if self.differ:
                return
            for frame in self.frames.tolist():
                assert self.page(0, frame) == self.page(1, frame), f"frame {frame:#x}"
            self.counts["rounds with equal memory"] += 1


@pytest.mark.parametrize("part", range(4))
def test_garbage(part):
    counts = Counter()
    for number in range(part, GUESTS, 4):
        guest = Guest((SEED, number), counts)
        try:
            guest.run()
        except Exception as error:
            error.add_note(f"guest {number} of seed {SEED}: mode {guest.mode}, host {guest.vm.host}")
            raise
        assert guest.vm.stats["bugs"] == 0
    assert counts["accesses"] > 100 * (GUESTS // 4)
    assert counts["rounds with equal memory"] > GUESTS // 4
    assert counts["endless"] < counts["accesses"] // 50
