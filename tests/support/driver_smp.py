# SPDX-License-Identifier: Apache-2.0
"""Guests on two processors: shadow pages are common to both, TLBs and flushes are each one's own."""

from driver_nested import L1_REGISTERS, NESTED_CONFIGURATIONS, NestedDriver
from driver_shadow import SHADOW_CONFIGURATIONS, ShadowDriver

from kvmmu import CpuModel, Vcpu

SMP_CONFIGURATIONS = {f"{name}, two processors": configuration for name, configuration in (
    SHADOW_CONFIGURATIONS | NESTED_CONFIGURATIONS).items() if name in ("shadow", "nested ept", "nested npt")}


class TwoProcessors:
    """What the model knows of a processor, twice; operations are of the one that is in force."""

    OF_EACH = ("vcpu", "walkers", "root", "used", "seen", "touched", "now", "changed", "nested", "l1_root")
    l1_root = 0
    other = None

    def __init__(self, configuration, mode="4l", seed=0):
        super().__init__(configuration, mode, seed)
        self.other = {name: getattr(self, name) for name in self.OF_EACH}
        self.root, self.nested = 0, False
        self.used, self.seen, self.touched, self.now = {}, {}, {}, {}
        self.second_vcpu()
        self.forget()

    def switch(self):
        """Go on with the other processor."""
        here = {name: getattr(self, name) for name in self.OF_EACH}
        for name, value in self.other.items():
            setattr(self, name, value)
        self.other = here

    def change(self):
        super().change()
        if self.other is not None:
            self.other["now"].clear()
            self.other["changed"] = True

    def note(self, gpa, size):
        super().note(gpa, size)
        entries = range(gpa & -self.entry_size, gpa + size, self.entry_size)
        for pcid in self.other["used"]:
            self.other["touched"].setdefault(pcid, set()).update(entries)

    def remember(self):
        super().remember()
        if self.other is not None and self.other["changed"]:
            self.switch()
            super().remember()
            self.switch()

    def zap_all(self):
        super().zap_all()
        self.switch()
        self.forget()
        self.switch()

    def step(self, audit=True):
        if self.rng.random() < 0.3:
            self.switch()
        super().step(audit)


class ShadowTwoProcessors(TwoProcessors, ShadowDriver):
    """Under shadow paging."""

    def second_vcpu(self):
        self.vcpu = self.vm.create_vcpu()
        cpu = CpuModel(maxphyaddr=40, conformance="kvm")
        self.walkers = [Vcpu(self.mem, cpu) for _ in self.roots]
        self.vcpu.set_regs(**self.registers)


class NestedTwoProcessors(TwoProcessors, NestedDriver):
    """Under L1's EPT or NPT."""

    def second_vcpu(self):
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_regs(**L1_REGISTERS)
