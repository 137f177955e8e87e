# SPDX-License-Identifier: Apache-2.0
"""The kernel of tests/embed/kernel.s: its image, what it needs around it, and runs on a live KVM."""

import mmap
import platform
import shutil
import struct
import subprocess

import numpy as np
from paths import ROOT

from kvmmu.oracles.ioctls import (
    DescriptorTable,
    FileDescriptors,
    GeneralRegs,
    MemoryRegion,
    RunHeader,
    Segment,
    Sregs,
    ioctl,
    load_cpuid,
    open_device,
)

SOURCE, IMAGE = ROOT / "tests" / "embed" / "kernel.s", ROOT / "tests" / "embed" / "kernel.hex"
RAM_SIZE = 2 << 20
PAGE = 4096
PML4, IDT, GDT, STACK, BASE, USER, LOG, VARS, SHARED, POOL = (
    0x1000, 0x5000, 0x6000, 0x7000, 0x8000, 0xA000, 0xC000, 0xD000, 0xE000, 0x20000)
TSS, TSS_SELECTOR = GDT + 0x100, 0x38
CODE, DATA = 0x08, 0x10
HANDLERS = {6: 0x277, 13: 0x263, 14: 0x18D}                # of system calls, general protection, page faults; of kernel.s
REGISTERS = {"cr0": 0x80010033, "cr3": PML4, "cr4": 0x20, "efer": 0xD00}
EXIT_HLT = 5


def assemble(folder):
    """(bytes, offsets by label) that `as` makes of the source; None where binutils for x86-64 are missing."""
    if platform.machine() != "x86_64" or not all(map(shutil.which, ("as", "objcopy", "nm"))):
        return None
    subprocess.run(["as", "--64", SOURCE, "-o", folder / "kernel.o"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", folder / "kernel.o", folder / "kernel.bin"], check=True)
    symbols = subprocess.run(["nm", folder / "kernel.o"], check=True, capture_output=True, text=True).stdout
    return (folder / "kernel.bin").read_bytes(), {name: int(at, 16) for at, _, name in map(str.split, symbols.splitlines())}


def image():
    """The bytes that are kept beside the source, with zeros at their end."""
    return bytes.fromhex(IMAGE.read_text())


def fill(ram):
    """Write the kernel, its tables and its descriptors. IN ram: uint8, RAM_SIZE."""
    words = ram.view(np.uint64)
    ram[BASE:BASE + len(image())] = np.frombuffer(image(), np.uint8)
    words[PML4 // 8] = 0x2007
    words[0x2000 // 8] = 0x3007
    words[0x3000 // 8] = 0x4007
    for page in range(512):                                 # identity; user code may read and run its page
        words[0x4000 // 8 + page] = page << 12 | (5 if page == USER >> 12 else 3)
    for vector, offset in HANDLERS.items():
        handler = BASE + offset
        ram[IDT + 16 * vector:IDT + 16 * vector + 16] = np.frombuffer(
            struct.pack("<HHBBHII", handler & 0xFFFF, CODE, 0, 0x8E, handler >> 16, 0, 0), np.uint8)
    tss = 0x67 | (TSS & 0xFFFFFF) << 16 | 0x8B << 40
    ram[GDT:GDT + 72] = np.frombuffer(struct.pack(
        "<9Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF, tss, 0), np.uint8)
    ram[TSS + 4:TSS + 12] = np.frombuffer(struct.pack("<Q", STACK + PAGE), np.uint8)
    words[VARS // 8] = POOL


def fault_log(ram):
    """(vector, CR2, error code, RIP) of each fault that the kernel saw."""
    words = ram.view(np.uint64)[LOG // 8:(LOG + PAGE) // 8]
    return [tuple(row) for row in words[4:].reshape(-1, 4)[:int(words[0])].tolist()]


def reports(ram):
    """What the user program reported."""
    words = ram.view(np.uint64)[VARS // 8:(VARS + PAGE) // 8]
    return words[64:64 + int(words[1]) // 8].tolist()


class LiveRun(FileDescriptors):
    """One VM with one vCPU that runs the kernel; a context manager."""

    def __init__(self):
        super().__init__()
        try:
            device = self._keep(open_device())
            self._vm = self._keep(ioctl(device, "KVM_CREATE_VM"))
            self._vcpu = self._keep(ioctl(self._vm, "KVM_CREATE_VCPU"))
            load_cpuid(device, self._vcpu)
            self._map = mmap.mmap(self._vcpu, ioctl(device, "KVM_GET_VCPU_MMAP_SIZE"))
            self._run = RunHeader.from_buffer(self._map)
            self.ram = np.frombuffer(mmap.mmap(-1, RAM_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
            fill(self.ram)
            ioctl(self._vm, "KVM_SET_USER_MEMORY_REGION", MemoryRegion(memory_size=RAM_SIZE, userspace_addr=self.ram.ctypes.data))
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self):
        sregs = Sregs()
        ioctl(self._vcpu, "KVM_GET_SREGS", sregs)
        for name, value in REGISTERS.items():
            setattr(sregs, name, value)
        common = {"limit": 0xFFFFFFFF, "present": 1, "dpl": 0, "s": 1, "g": 1}
        sregs.cs = Segment(selector=CODE, type=11, l=1, **common)
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(sregs, name, Segment(selector=DATA, type=3, db=1, **common))
        sregs.gdt = DescriptorTable(base=GDT, limit=71)
        sregs.idt = DescriptorTable(base=IDT, limit=16 * 32 - 1)
        sregs.tr = Segment(base=TSS, limit=0x67, selector=TSS_SELECTOR, type=11, present=1)
        sregs.ldt = Segment(unusable=1)
        ioctl(self._vcpu, "KVM_SET_SREGS", sregs)
        ioctl(self._vcpu, "KVM_SET_REGS", GeneralRegs(rip=BASE, rsp=STACK + PAGE, rflags=2))

    def run(self):
        """Run until the kernel halts; returns the reason of any other exit, with RIP."""
        ioctl(self._vcpu, "KVM_RUN")
        reason = self._run.exit_reason
        if reason == EXIT_HLT:
            return None
        regs, sregs = GeneralRegs(), Sregs()
        ioctl(self._vcpu, "KVM_GET_REGS", regs)
        ioctl(self._vcpu, "KVM_GET_SREGS", sregs)
        return f"exit {reason} ({self._run.exit.internal.suberror}) at RIP {regs.rip:#x}, CR2 {sregs.cr2:#x}, RSP {regs.rsp:#x}"

