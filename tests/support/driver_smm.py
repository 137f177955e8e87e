# SPDX-License-Identifier: Apache-2.0
"""A guest under shadow paging whose system-management mode has memory of its own, with tables like those outside."""

from driver_shadow import ShadowDriver
from machine_driver import PAGE

from kvmmu import Host

SMM_CONFIGURATIONS = {"shadow, smm memory": Host(tdp=None, maxphyaddr=46)}


class SmmDriver(ShadowDriver):
    """The same address spaces in two memories, the one in force decides."""

    vcpu = None

    def make_smm_memory(self):
        self.smm_mem, _ = self.make_memory()
        return self.smm_mem

    @property
    def smm(self):
        return self.vcpu is not None and self.vcpu.smm

    @property
    def mem(self):
        return self.smm_mem if self.smm else self.main_mem

    @mem.setter
    def mem(self, mem):
        self.main_mem = mem

    def slot_of(self, gpa):
        for slot in self.vm.slots:
            if slot["as_id"] == self.smm and slot["gpa"] <= gpa < slot["gpa"] + slot["size"]:
                return slot
        return None

    def host_address(self, gpa):
        return self.vm.kvm.host_page(gpa, int(self.smm))[0] * PAGE + gpa % PAGE

    def wrote(self, gpa, size):
        if not self.smm:                                    # the logs are those of the slots outside
            super().wrote(gpa, size)

    def store_entry(self, gpa, value):
        if not self.smm:
            super().store_entry(gpa, value)
            return
        self.vm.kvm.note_write(gpa, self.entry_size, 1)     # as `write_guest_physical()` does outside
        self.mem.write(gpa, value.to_bytes(self.entry_size, "little"))
        self.vm.kvm.track_write(gpa, self.entry_size, 1)
        self.note(gpa, self.entry_size)

    def toggle_smm(self):
        for walker in self.walkers:
            walker.smm = not self.vcpu.smm
        super().toggle_smm()

    def slot_change(self):
        if not self.smm and self.mode != "pae":             # the PDPT that is loaded in SMM must be there outside, too
            super().slot_change()

    def dirty_log_on(self):
        if not self.smm:
            super().dirty_log_on()

    def write_protect(self):
        outcome = self.outcome(self.pick(self.gva))[0]
        if outcome[0] == 0 and self.slot_of(outcome[1]) is not None:
            self.vm.kvm.write_protect_gfn(outcome[1] >> 12, int(self.smm))

    OPERATIONS = tuple((name, 6 if name == "toggle_smm" else weight) for name, weight in ShadowDriver.OPERATIONS)
    ALWAYS = (*ShadowDriver.ALWAYS, "toggle_smm")
