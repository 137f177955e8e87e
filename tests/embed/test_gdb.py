# SPDX-License-Identifier: Apache-2.0
"""The commands for GDB, over the stub of a QEMU that a boot sector put into long mode."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qemu_guest import QEMU, Machine

import kvmmu
from kvmmu.embed import gdb_path

GDB = shutil.which("gdb")
SITE = [str(Path(kvmmu.__file__).parents[1]), *(path for path in sys.path if path.endswith("site-packages"))]
WALKS = """\
supervisor read of 0x200123
  PML4E [   0] at 0x000000010000: 0x0000000000011027 rwxu A
  PDPTE [   0] at 0x000000011000: 0x0000000000013027 rwxu A
  PDE   [   1] at 0x000000013008: 0x00000000002001e7 rwxu A D G PS
  -> gpa 0x200123 (2M page)
supervisor write of 0x8123
  PML4E [   0] at 0x000000010000: 0x0000000000011027 rwxu A
  PDPTE [   0] at 0x000000011000: 0x0000000000013027 rwxu A
  PDE   [   0] at 0x000000013000: 0x0000000000015027 rwxu A
  PTE   [   8] at 0x000000015040: 0x8000000000008005 r--u
  -> #PF 0x3 (P W): the page is read-only
user fetch of 0x123456789000
  PML4E [  36] at 0x000000010120: 0x0000000000000000 ----
  -> #PF 0x14 (U F): the entry is not present
"""


def why_not():
    """Why GDB cannot run the commands here, or None."""
    if QEMU is None:
        return "qemu-system-x86_64 is not installed"
    if GDB is None:
        return "gdb is not installed"
    done = gdb("python import numpy, kvmmu")
    return None if "Error" not in done and "error" not in done else f"the Python of this GDB is another one: {done.strip()}"


def gdb(*commands):
    """What GDB prints for commands."""
    words = [word for command in commands for word in ("-ex", command)]
    done = subprocess.run([GDB, "-nx", "-q", "-batch", *words], capture_output=True, text=True, check=False, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(SITE)})
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """(machine, the commands that connect GDB to it), stopped in its loop."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("qemu")
    machine = Machine(folder)
    try:
        deadline = time.monotonic() + 60
        while "EFER=0000000000000d01" not in machine.monitor("info registers"):
            assert time.monotonic() < deadline, "the boot sector did not come to long mode"
            time.sleep(0.2)
        machine.run("stop")
        machine.monitor(f"gdbserver unix:{folder}/gdb,server=on,wait=off")
        yield machine, (f"target remote {folder}/gdb", f"source {gdb_path()}")
    finally:
        machine.close()


def test_walk(target):
    """Every entry, and the fault, of reads, writes and fetches."""
    _, connect = target
    found = gdb(*connect, "kvmmu walk 0x200123", "kvmmu walk 0x8123 w", "kvmmu walk 0x123456789000 xu")
    assert WALKS in found


def test_pt_equals_info_tlb(target):
    """Page by page, what the monitor of QEMU lists."""
    machine, connect = target
    found, part = gdb(*connect, "kvmmu pt -single", "echo PART\n", "kvmmu pt 0 0x8000 -wx -single").split("PART")
    mine = [int(gva, 16) for gva in re.findall(r"^  (0x[0-9a-f]+)-", found, re.MULTILINE)]
    expected = [int(gva, 16) for gva in re.findall(r"^([0-9a-f]+): [0-9a-f]+ ", machine.monitor("info tlb"), re.MULTILINE)]
    assert len(expected) > 500
    assert expected == mine
    assert [n << 12 for n in range(8) if n % 4 and (n % 8 or n == 0 or n == 7)] == [
        int(gva, 16) for gva in re.findall(r"^  (0x[0-9a-f]+)-", part, re.MULTILINE)]


def test_addresses_agree_with_gva2gpa(target):
    """$kvmmu_gpa() is what QEMU says."""
    machine, connect = target
    addresses = (0x7C00, 0x200123, 0x400000, 0x40000000, 0xFFFFFFFFFFE00000, 1 << 47)
    answers = [re.search("gpa: (?:0x)?([0-9a-f]+)", machine.monitor(f"gva2gpa {gva:#x}")) for gva in addresses]
    found = re.findall("^[$][0-9]+ = (.*)", gdb(*connect, *(f"print/x $kvmmu_gpa({gva:#x})" for gva in addresses)), re.MULTILINE)
    assert [f"{int(answer[1], 16):#x}" if answer else "0xffffffffffffffff" for answer in answers] == found
    assert None in answers


def test_registers_can_be_given(target):
    """Another CR3 is another address space; an illegal one is an error of the command."""
    _, connect = target
    found = gdb(*connect, "kvmmu pt cr3=0x300000", "kvmmu walk 0x7c00 cr3=0x10000000000000")
    assert "nothing is mapped" in found
    assert "kvmmu: #GP: CR3" in found


def test_wrong_commands(target):
    _, connect = target
    found = gdb(*connect, "kvmmu walk", "kvmmu walk 1 q", "kvmmu pt -nonsense", "kvmmu memory nowhere", "kvmmu", "help kvmmu pt")
    assert 2 == found.count("kvmmu walk ADDRESS [rwxuai] [cr3=VALUE ...]\n")
    assert 1 == found.count("kvmmu pt [START [STOP]] [-wx] [-user] [-single] [cr3=VALUE ...]\n")
    assert "kvmmu memory auto|qemu|direct: got 'nowhere'\n" in found
    assert "'help kvmmu' has more\n" in found
    assert "-user: only what" in found
    assert "no physical memory mode" in gdb(f"source {gdb_path()}", "kvmmu walk 0 cr0=0x80000011 cr3=0x1000 cr4=0x20 efer=0x500")


def test_target_memory_stays(target):
    """Accessed and dirty bits of the target are not touched."""
    machine, connect = target
    before = machine.monitor("xp /512gx 0x13000")
    gdb(*connect, "kvmmu walk 0x8123 w", "kvmmu pt")
    assert before == machine.monitor("xp /512gx 0x13000")
