# SPDX-License-Identifier: Apache-2.0
"""A guest of several vCPUs with its registers and tables, and rows of a trace of it that load registers and invalidate."""

import random
from dataclasses import replace

import numpy as np

from kvmmu import Access, GuestMemory, PageTables, TlbLevel
from kvmmu.arch._bits import CR3_NOFLUSH, Cr4
from kvmmu.traces import Header, Op, RegisterSet, Trace

LEVELS = [TlbLevel("I", 2, 2, kinds="fetch"), TlbLevel("D4", 2, 3, "plru", kinds=("load", "store"), pages="4k"),
          TlbLevel("D2", 1, 2, "fifo", kinds=("load", "store"), pages="2m"), TlbLevel("S", 3, 4, inclusion="inclusive")]
PSC = {2: TlbLevel("PDE", 1, 3), 3: TlbLevel("PDPTE", 1, 2)}
VCPUS = 2
GLOBAL = 0x7000_0000_0000


class Guest:
    """Two address spaces with small and large pages, some global ones, and a trace that runs on both of two vCPUs."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.mem = GuestMemory(64 << 20)
        self.spaces = [PageTables(self.mem, frames=range(base, base + (1 << 20), 4096)) for base in (32 << 20, 40 << 20)]
        self.pages = []                         # (gva, page, global)
        for tables in self.spaces:
            tables.map(np.arange(24, dtype=np.uint64) << np.uint64(12), np.arange(24, dtype=np.uint64) << np.uint64(12))
            for at in (1 << 30, 3 << 30):
                tables.map(at + (np.arange(4, dtype=np.uint64) << np.uint64(21)),
                           np.arange(4, dtype=np.uint64) << np.uint64(21), size=2 << 20)
            tables.map(GLOBAL + (np.arange(6, dtype=np.uint64) << np.uint64(12)), np.arange(6, dtype=np.uint64) << np.uint64(12),
                       global_=True)
        self.pages += [(number << 12, "4k", False) for number in range(24)]
        self.pages += [(at + (number << 21), "2m", False) for at in (1 << 30, 3 << 30) for number in range(4)]
        self.pages += [(GLOBAL + (number << 12), "4k", True) for number in range(6)]
        self.pages += [(5 << 30, None, False)]  # not mapped
        self.regs = [replace(self.spaces[0].regs(), cr4=self.spaces[0].regs().cr4 | int(Cr4.PCIDE | Cr4.PGE))] * VCPUS
        self.rows = []

    def header(self):
        registers = [RegisterSet(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer) for regs in self.regs]
        return Header(registers=tuple(registers), cpu={"vendor": "intel", "maxphyaddr": 46})

    def memory_rows(self):
        words = np.frombuffer(self.mem.read(0, 64 << 20), np.uint64)
        at = np.flatnonzero(words)
        yield Op.MEMORY, 0, 64 << 20, 8
        for i in at.tolist():
            yield Op.MEMORY_WORD, i * 8, int(words[i]), 8

    def trace(self, rows):
        table = [(int(op), addr, value, size, 0, 0, 0) for op, addr, value, size in self.memory_rows()]
        table += [(int(row["op"]), row["addr"], row.get("value", 0), row.get("size", 1), row.get("access", 0), row["vcpu"],
                   row.get("ip", 0)) for row in rows]
        columns = list(zip(*table, strict=True))
        types = (("op", np.uint8), ("addr", np.uint64), ("value", np.uint64), ("size", np.uint8), ("access", np.uint8),
                 ("vcpu", np.uint16), ("ip", np.uint64))
        arrays = {name: np.array(values, dtype) for (name, dtype), values in zip(types, columns, strict=True)}
        first = len(table) - len(rows)
        cut = first + len(rows) // 3
        return Trace(self.header(), [{name: array[:cut] for name, array in arrays.items()},
                                     {name: array[cut:] for name, array in arrays.items()}])


def some_rows(guest, count):
    rng, rows, cr4 = guest.rng, [], [guest.regs[0].cr4] * VCPUS
    while len(rows) < count:
        vcpu, draw = rng.randrange(VCPUS), rng.random()
        page = rng.choice(guest.pages)
        row = {"vcpu": vcpu, "page": page[0], "ip": rng.randrange(1, 5)}
        addr = page[0] + rng.randrange(4096 if page[1] != "2m" else 2 << 20)
        if draw < 0.85:
            op = rng.randrange(3)
            row |= {"op": op, "addr": addr, "access": (0, int(Access.WRITE), int(Access.FETCH))[op] | rng.choice([0, 4])}
            rows += [row] * rng.choice([1, 1, 3])
            continue
        operation = rng.choice([Op.MOV_CR3, Op.MOV_CR3, Op.MOV_CR4, Op.INVLPG, Op.INVLPG, Op.INVPCID, Op.PAGE_FAULT,
                                Op.HOST_INVALIDATE])
        row |= {"op": operation, "addr": addr}
        if operation == Op.MOV_CR3:
            row |= {"addr": 0, "value": rng.choice(guest.spaces).root | rng.randrange(3) | rng.choice([0, CR3_NOFLUSH])}
        elif operation == Op.MOV_CR4:
            cr4[vcpu] ^= int(rng.choice([Cr4.PGE, Cr4.SMEP, Cr4.PKE]))
            row |= {"addr": 0, "value": cr4[vcpu]}
        elif operation == Op.INVPCID:
            row["value"] = rng.randrange(4) | rng.randrange(3) << 4
        elif operation == Op.PAGE_FAULT:
            row["value"] = 6
        elif operation == Op.HOST_INVALIDATE:
            if rng.random() < 0.9:
                continue
            row |= {"addr": 0, "value": 4096}
        rows.append(row)
    return rows
