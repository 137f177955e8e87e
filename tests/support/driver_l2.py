# SPDX-License-Identifier: Apache-2.0
"""L2 with page tables of its own that are driven at random, under an EPT or NPT of L1's that stays as it is.

L1's tables map every address to itself, by pages of one size, so that L2's pages are split by L1's as well as by the host's.
"""

from builders import PageTables
from driver_nested import L1_REGISTERS, EptTables
from machine_driver import HIGH, HOLE, MB2, PAGE, RAM, ROM, Driver

from kvmmu import Ept, Host, Npt

STAGE_TABLES = 14 * MB2
L2_CONFIGURATIONS = {
    "L2, ept of 4k": (Host(tdp="ept", maxphyaddr=46), {"level": 1}),
    "L2, ept of 2m": (Host(tdp="ept", maxphyaddr=46), {"level": 2}),
    "L2, ept without ad": (Host(tdp="ept", maxphyaddr=46), {"level": 1, "ad": False}),
    "L2, npt of 4k": (Host(tdp="npt", maxphyaddr=46), {"level": 1}),
    "L2, npt of 2m": (Host(tdp="npt", maxphyaddr=46), {"level": 2}),
}


class L2Driver(Driver):
    """One machine whose guest is L2."""

    emulates_reads = True

    def __init__(self, configuration, mode="4l", seed=0):
        host, self.options = configuration
        super().__init__(host, mode, seed)

    def begin(self, registers):
        """L1 runs without paging, and enters L2."""
        level, is_ept = self.options["level"], self.host.tdp == "ept"
        tables = (EptTables if is_ept else PageTables)("4l", base=STAGE_TABLES)
        for start, size in ((0, RAM), (ROM, MB2), (HOLE, MB2), (HIGH, MB2)):
            for gpa in range(start, start + size, PAGE if level == 1 else MB2):
                tables.map(gpa, gpa, level=level)
        for gpa, page in zip(*tables.pages(), strict=True):
            self.mem.write(int(gpa), page.tobytes())
        if is_ept:
            self.stage = Ept(tables.cr3 | 0x1E | (1 << 6 if self.options.get("ad", True) else 0))
        else:
            self.stage = Npt(tables.cr3, cr4=1 << 5, efer=0xD00)
        self.vcpu.set_regs(**L1_REGISTERS)
        self.vcpu.enter_nested(self.stage, **registers)

    def toggle_guest_mode(self):
        """L1 runs, and L2 again: VPIDs are not in use, so that nothing is remembered."""
        regs = self.vcpu.regs
        self.vcpu.leave_nested()
        self.vcpu.enter_nested(self.stage, cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pdptrs=regs.pdptrs)
        self.flush()

    def toggle_smm(self):
        """System-management mode is entered outside of L2."""
