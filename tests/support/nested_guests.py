# SPDX-License-Identifier: Apache-2.0
"""A machine of L1 whose guest L2 has one page that the second stage moves."""

from builders import PageTables

from kvmmu import GuestMemory

L1 = {"cr0": 0x80010033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
SIZE = 1 << 24
GVA, NGPA, GPA = 0x7000_1000, 0x40_0000, 0x60_0000
ROOT2 = 0x80_0000
PRESENT = 0x27                  # P W U A
EPT_RWX = 0x7
EPT_WB_LEAF = EPT_RWX | 6 << 3


def guest(levels=4, stage=4, *, kind="ept", leaf=None):
    """A machine whose L2 tables map GVA to NGPA, and whose second stage is the identity, but for NGPA -> GPA."""
    mem = GuestMemory(SIZE)
    tables = PageTables("5l" if levels == 5 else "4l", base=0x10_0000)
    tables.map(GVA, NGPA, "p w u a d")
    for gpa, value in tables.words().items():
        mem.write_u64(gpa, value)
    entry, top, leaf = (EPT_RWX, EPT_RWX, EPT_WB_LEAF if leaf is None else leaf) if kind == "ept" else (PRESENT, PRESENT, PRESENT)
    free = ROOT2
    path = []
    for _ in range(stage - 1):
        path.append(free)
        free += 0x1000
    for table, following in zip(path, [*path[1:], free], strict=True):
        mem.write_u64(table, following | (entry if table != path[0] else top))
    for i in range(8):                                         # PD entries: tables of 4K leaves
        table = free + 0x1000 * i
        mem.write_u64(path[-1] + 8 * i, table | entry)
        for k in range(512):
            gpa = i << 21 | k << 12
            mem.write_u64(table + 8 * k, (GPA if gpa == NGPA else gpa) | leaf)
    return mem, {**L1, **tables.regs(), "cr3": tables.cr3}


def eptp(stage=4, ad=False):
    return ROOT2 | 6 | (stage - 1) << 3 | (0x40 if ad else 0)
