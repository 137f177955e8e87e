# SPDX-License-Identifier: Apache-2.0
"""Machines over random memory: whatever the guest's tables and L1's hold, every access ends, and the audit finds nothing.

What an access comes to is checked elsewhere; here the tables make no sense, and point at themselves and each other.
"""

from random_guests import MODES, PAGE, random_accesses, random_gvas, random_memory, random_regs, random_stage

OPERATIONS = 60
ROWS = (1, 5, 60)
REGISTERS = ("cr0", "cr3", "cr4", "efer", "pdptrs")


def random_host(kvmmu, rng):
    """A host of any kind."""
    tdp = (None, "ept", "npt")[int(rng.integers(3))]
    return kvmmu.Host(tdp=tdp, maxphyaddr=int(rng.choice((40, 46, 52))), ad=bool(rng.integers(4)) or tdp is None,
                      nx_huge_pages=bool(rng.integers(2)), max_page=str(rng.choice(("4k", "2m", "1g"))),
                      kernel=str(rng.choice(("7.3", "7.3", "6.18"))) if tdp is None else "7.3")


class WildMachine:
    """One machine, and what may happen to it."""

    def __init__(self, kvmmu, rng, counts):
        self.kvmmu, self.rng, self.counts = kvmmu, rng, counts
        self.mode = str(rng.choice(MODES, p=(0.06, 0.2, 0.2, 0.36, 0.18)))
        self.maxphyaddr = int(rng.choice((36, 40)))
        self.mem, self.frames = random_memory(kvmmu, rng, self.mode, self.maxphyaddr, counts)
        self.vm = kvmmu.Vm(self.mem, cpu=kvmmu.CpuModel(maxphyaddr=self.maxphyaddr, gbpages=bool(rng.integers(2))),
                           host=random_host(kvmmu, rng), backing=str(rng.choice(("4k", "2m", "1g"))),
                           slot_zap_all=bool(rng.integers(2)))
        self.vcpu = self.vm.create_vcpu()
        self.gvas = random_gvas(rng, 40, self.mode)
        self.saved = None
        counts[f"wild machines, tdp {self.vm.host.tdp}"] += 1

    def registers(self):
        r = random_regs(self.kvmmu, self.rng, self.mode, self.frames, self.maxphyaddr)
        registers = {name: getattr(r, name) for name in REGISTERS}
        if self.vm.host.tdp is None:
            registers["cr4"] &= ~(1 << 22)              # no protection keys
        return registers

    def op_registers(self):
        self.vcpu.leave_nested()
        self.vcpu.set_regs(**self.registers())

    def op_enter(self):
        stage = random_stage(self.kvmmu, self.rng, self.frames, self.maxphyaddr)
        if self.vm.host.tdp is None or self.rng.random() < 0.1:
            stage = None
        self.vcpu.enter_nested(stage, **self.registers())

    def op_cr3(self):
        self.vcpu.mov_cr(3, int(self.rng.choice(self.frames)) * PAGE)

    def op_access(self):
        n = int(self.rng.choice(ROWS))
        gva = self.rng.choice(self.gvas, n) if self.rng.random() < 0.7 else random_gvas(self.rng, n, self.mode)
        self.vcpu.access(gva, random_accesses(self.rng, n))
        self.counts["wild machine accesses"] += n

    def op_store(self):
        data = self.rng.bytes(int(self.rng.choice((1, 2, 4, 8))))
        gva = int(self.rng.choice(self.gvas))
        how = self.rng.choice((self.vcpu.store, self.vcpu.write_guest))
        how(gva & ~7, data)

    def op_write_table(self):
        gpa = int(self.rng.choice(self.frames)) * PAGE + 8 * int(self.rng.integers(512))
        word = int(self.rng.choice(self.frames)) * PAGE | int(self.rng.choice((0, 1, 7, 0x67, 0xE7)))
        self.vm.write_guest_physical(gpa, word.to_bytes(8, "little"))

    def op_silent_write(self):
        gpa = int(self.rng.choice(self.frames)) * PAGE + 8 * int(self.rng.integers(512))
        self.mem.write_u64(gpa, int(self.rng.integers(1 << 63)))

    def op_invlpg(self):
        self.vcpu.invlpg(int(self.rng.choice(self.gvas)))

    def op_invalidate_addr(self):
        walk = self.vcpu.gva_walk if self.rng.random() < 0.5 else self.vcpu.ngpa_walk
        self.vcpu.invalidate_addr(walk, int(self.rng.choice(self.gvas)), str(self.rng.choice(("current", "all"))))

    def op_unmap(self):
        self.vm.invalidate(int(self.rng.choice(self.frames)) * PAGE, PAGE)

    def op_age(self):
        self.vm.age(int(self.rng.choice(self.frames)) * PAGE, PAGE)

    def op_zap(self):
        self.vm.zap_all()

    def op_limit(self):
        self.vm.set_nr_mmu_pages(int(self.rng.choice((20, 40, 1000))))

    def op_slots(self):
        slot = self.vm.slots[int(self.rng.integers(len(self.vm.slots)))]
        if self.rng.random() < 0.5:
            self.vm.set_dirty_log(slot["gpa"], bool(self.rng.integers(2)))
        elif slot["gpa"]:
            self.vm.move_slot(slot["gpa"], slot["gpa"])

    def op_snapshot(self):
        self.saved = self.vm.snapshot(), self.vcpu
        self.counts["wild snapshots"] += 1

    def op_restore(self):
        if self.saved is None:
            return
        snapshot, self.vcpu = self.saved
        self.vm.restore(snapshot)
        self.counts["wild restores"] += 1

    def op_clone(self):
        """Go on with a clone, or with the original, after the same accesses of both."""
        twin = self.vcpu.clone()
        n = int(self.rng.choice(ROWS))
        gva, access = self.rng.choice(self.gvas, n), random_accesses(self.rng, n)
        mine, others = self.vcpu.access(gva, access), twin.access(gva, access)
        for name in ("gpa", "hpa", "status", "ret", "exits"):
            if getattr(mine, name).tobytes() != getattr(others, name).tobytes():
                raise AssertionError(f"{name} of a clone: {getattr(others, name)}, of the original {getattr(mine, name)}")
        assert twin.vm.audit() == []
        if self.rng.random() < 0.5:
            self.vm, self.vcpu, self.mem, self.saved = twin.vm, twin, twin.vm.mem, None
        self.counts["wild clones"] += 1

    def op_copy(self):
        """Copies of memory that are written on either side, and of which one goes on when the other is gone."""
        gpa = int(self.rng.choice(self.frames)) * PAGE
        page = self.mem.read(gpa, PAGE)
        first = self.mem.copy()
        second = first.copy()
        word = self.rng.bytes(8)
        first.write(gpa, word)
        assert (second.read(gpa, PAGE), self.mem.read(gpa, PAGE)) == (page, page)
        del first
        second.write(gpa + 8, word)
        assert self.mem.read(gpa, PAGE) == page
        self.counts["wild copies of memory"] += 1

    def step(self):
        operations = [name for name in dir(self) if name.startswith("op_")] + ["op_access"] * 12
        operation = str(self.rng.choice(operations))
        try:
            getattr(self, operation)()
        except (self.kvmmu.GuestFault, ValueError) as refused:
            self.counts[f"wild {operation} refused: {type(refused).__name__}"] += 1
        self.counts["wild operations"] += 1


def wild_machine(kvmmu, rng, counts):
    """Drive one machine."""
    machine = WildMachine(kvmmu, rng, counts)
    for _ in range(OPERATIONS):
        machine.step()
    assert machine.vm.audit() == []
    assert machine.vm.stats["bugs"] == 0
