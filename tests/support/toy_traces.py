# SPDX-License-Identifier: Apache-2.0
"""Traces made by hand: their headers, tables and rows, and a vCPU over the same tables."""

import os
from pathlib import Path

import numpy as np
from paths import DATA

import kvmmu
from kvmmu import CpuModel, GuestMemory, Vcpu
from kvmmu.traces import Header, Op, RegisterSet

CLIPS = DATA / "linux"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(kvmmu.__file__).parents[1])}
ROOT, OTHER = 0x1000, 0x5000
LONG_MODE = {"cr0": 0x80050033, "cr4": 0x20, "efer": 0xD01}


def tables(root=ROOT, frame=0x100):
    """{gpa: entry} that map 0 to 2 MiB, 4K pages, to frame, frame + 1 ...; with room for all in four pages from root."""
    entries = {root: root + 0x1007, root + 0x1000: root + 0x2007, root + 0x2000: root + 0x3007}
    return entries | {root + 0x3000 + 8 * i: (frame + i) << 12 | 7 for i in range(512)}


def memory_rows(entries, regions=((0x1000, 0x8000),)):
    """Set-up rows for some entries."""
    rows = [(Op.MEMORY, gpa, size) for gpa, size in regions] + [(Op.MEMORY_WORD, gpa, value) for gpa, value in entries.items()]
    return rows_of(*rows)


def rows_of(*rows):
    """Columns of rows (op, addr, value) for events, (op, addr, access, gpa) for accesses; a dict says more."""
    table = []
    for row in rows:
        op, addr, *rest = row
        if op >= Op.MOV_CR3:
            table.append({"op": op, "addr": addr, "value": rest[0] if rest else 0, "size": 8}
                         | (rest[1] if len(rest) > 1 else {}))
        else:
            table.append({"op": op, "addr": addr, "access": rest[0], "gpa": rest[1], "size": 1}
                         | (rest[2] if len(rest) > 2 else {}))
    dtypes = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "vcpu": np.uint16, "value": np.uint64,
              "gpa": np.uint64}
    return {name: np.array([int(row.get(name) or 0) for row in table], dtype) for name, dtype in dtypes.items()}


def header(**fields):
    return Header(**{"registers": (RegisterSet(cr3=ROOT, **LONG_MODE),), "cpu": {"maxphyaddr": 48}} | fields)


def machine():
    """A vCPU over the hand-made tables."""
    mem = GuestMemory(0x10000)
    for gpa, entry in tables().items():
        mem.write_u64(gpa, entry)
    vcpu = Vcpu(mem, cpu=CpuModel(maxphyaddr=48))
    vcpu.set_regs(cr3=ROOT, **LONG_MODE)
    return vcpu
