# SPDX-License-Identifier: Apache-2.0
"""Images by the real tool: a machine of QEMU that a boot sector put into long mode, dumped in every kind that this QEMU has."""

import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from qemu_guest import QEMU, SIZE, Machine

import kvmmu
from kvmmu.cli import main
from kvmmu.images import open_image

KINDS = {"elf": {}, "paging": {"paging": True}, "kdump-zlib": {"format": "kdump-zlib"}, "kdump-lzo": {"format": "kdump-lzo"},
         "kdump-snappy": {"format": "kdump-snappy"}, "kdump-raw-zlib": {"format": "kdump-raw-zlib"},
         "win-dmp": {"format": "win-dmp"}}

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """The dumps by kind, the monitor's `info tlb` and `info registers`, and answers to gva2gpa."""
    folder = tmp_path_factory.mktemp("qemu")
    machine = Machine(folder)
    try:
        deadline = time.monotonic() + 60
        while "EFER=0000000000000d01" not in machine.monitor("info registers"):
            assert time.monotonic() < deadline, "the boot sector did not come to long mode"
            time.sleep(0.2)
        machine.run("stop")
        found = {}
        for kind, arguments in KINDS.items():
            answer = machine.run("dump-guest-memory", protocol=f"file:{folder}/{kind}", **({"paging": False} | arguments))
            if "return" in answer:
                found[kind] = folder / kind
        machine.run("pmemsave", val=0, size=SIZE, filename=f"{folder}/pmem")
        addresses = [0x7C00, 0x200123, 0x400000, 0x40000000, 0xFFFFFFFFFFE00000, 0x8000, 1 << 47, 0xFFFF800000010000]
        gva2gpa = {gva: machine.monitor(f"gva2gpa {gva:#x}") for gva in addresses}
        return found | {"pmem": folder / "pmem", "ram": folder / "ram"}, machine.monitor("info tlb"), gva2gpa
    finally:
        machine.close()


def test_which_kinds_there_are(dumped):
    assert {"elf", "paging", "kdump-zlib"} <= set(dumped[0])


@pytest.mark.parametrize("kind", [*KINDS, "pmem", "ram"])
def test_every_kind_has_the_same_memory_and_tables(dumped, kind):
    """Memory, registers and what is mapped are those of the ELF core; gva2gpa is what QEMU says."""
    files, _, gva2gpa = dumped
    if kind not in files:
        pytest.skip(f"this QEMU cannot write {kind}")
    reference, image = open_image(files["elf"]), open_image(files[kind])
    assert image.damage == ()
    raw = kind in ("pmem", "ram")
    if not raw:
        assert image.vcpus == reference.vcpus
        assert len(image.vcpus) == 2
    vcpu = image.vcpu(cr3=0x10000) if raw else image.vcpu(0)
    assert list(vcpu.gva_walk.mappings()) == list(reference.vcpu(0).gva_walk.mappings())
    if kind == "paging":                        # what no vCPU maps is left out
        assert all(image.memory.read(gpa, size) == reference.memory.read(gpa, size) for gpa, size, _ in image.memory.slots)
    else:
        for start in range(0, SIZE, 1 << 20):
            assert image.memory.read(start, 1 << 20) == reference.memory.read(start, 1 << 20), hex(start)
    for gva, answer in gva2gpa.items():
        gpa = re.search("gpa: (?:0x)?([0-9a-f]+)", answer)
        t = vcpu.gva_walk.translate(np.array([gva], np.uint64), set_ad=False)
        assert (int(gpa[1], 16) if gpa else kvmmu.INVALID_GPA) == int(t.gpa[0]), hex(gva)


def test_pt_equals_info_tlb(dumped, capsys):
    """Line by line: address, where it leads to, and the bits of the leaf, as the monitor prints them."""
    files, tlb, _ = dumped
    expected = []
    for line in tlb.split("\n"):
        match = re.match("([0-9a-f]+): ([0-9a-f]+) (.{9})", line)
        if match:
            flags = match[3]
            gpa = int(match[2], 16) & ((1 << 52) - 1)
            expected.append((int(match[1], 16), gpa, "G" in flags[1], "D" in flags[3], "A" in flags[4]))
    assert len(expected) > 500
    assert main(["pt", str(files["elf"]), "--single", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mappings"]
    assert [(m["gva"], m["gpa"], m["global"], m["dirty"], m["accessed"]) for m in found] == expected


def test_writable_and_executable_pages(dumped, capsys):
    """From a dump to the list: what the boot sector made so, and nothing else."""
    assert main(["pt", str(dumped[0]["elf"]), "--wx", "--single", "--size", "4k", "--stop", "0x200000", "--json"]) == 0
    found = [m["gva"] >> 12 for m in json.loads(capsys.readouterr().out)["mappings"]]
    assert found == [n for n in range(512) if n % 4 and (n % 8 or n == 0 or n == 7)]


@pytest.mark.skipif(shutil.which("makedumpfile") is None, reason="makedumpfile is not installed")
def test_what_makedumpfile_rearranges(dumped, tmp_path):
    """makedumpfile -R makes a kdump-compressed file of the flattened one, with the same in it."""
    files = dumped[0]
    with files["kdump-zlib"].open("rb") as flat:
        subprocess.run(["makedumpfile", "-R", tmp_path / "dump"], stdin=flat, check=True, capture_output=True)
    assert (tmp_path / "dump").read_bytes()[:8] == b"KDUMP   "
    flat, plain = open_image(files["kdump-zlib"]), open_image(tmp_path / "dump")
    assert plain.damage == ()
    assert plain.vcpus == flat.vcpus
    for start in range(0, SIZE, 1 << 20):
        assert plain.memory.read(start, 1 << 20) == flat.memory.read(start, 1 << 20)
