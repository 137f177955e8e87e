# SPDX-License-Identifier: Apache-2.0
"""The example for drgn, over a program whose physical memory is ours."""

import importlib.util

import numpy as np
import pytest
from paths import ROOT

import kvmmu

drgn = pytest.importorskip("drgn", reason="drgn is not installed")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("kvmmu_drgn", ROOT / "examples" / "drgn" / "kvmmu_drgn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["4l", "5l"])
def test_tables_of_a_program(example, mode):
    """Walks and mappings are those of the same memory without drgn, and nothing of it changes."""
    mem = kvmmu.GuestMemory(1 << 20)
    tables = kvmmu.PageTables(mem, mode=mode)
    for i in range(50):
        tables.map(0x7F00_0000_0000 + 0x20_3000 * i, 0x1000 * i, write=i % 2 == 0, exec=i % 3 == 0)
    ram = mem.read(0, 1 << 20)
    prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    prog.add_memory_segment(0, len(ram), lambda address, count, offset, physical: ram[offset:offset + count], physical=True)
    vcpu = example.vcpu_of(prog, cr3=tables.root, la57=mode == "5l")
    direct = kvmmu.Vcpu(mem)
    direct.set_regs(tables.regs())
    assert list(direct.gva_walk.mappings()) == list(vcpu.gva_walk.mappings())
    for gva in (0x7F00_0000_0000, 0x7F00_0020_3123, 0x1000):
        assert str(direct.gva_walk.walk_record(gva, 2)) == str(vcpu.gva_walk.walk_record(gva, 2))
    beyond = np.array([0x7F00_0000_0000], np.uint64)
    assert kvmmu.INVALID_GPA == int(example.vcpu_of(prog, cr3=1 << 30, la57=False).gva_walk.translate(beyond).gpa[0])
