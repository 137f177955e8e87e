"""KVM's ioctls: the numbers and structures of x86-64, from the kernel's public KVM API documentation."""

import ctypes
import errno
import fcntl
import os
import struct
from typing import Any, Self

__all__ = [
    "API_VERSION", "DEVICE", "MAX_CPUID_ENTRIES", "Cpuid", "CpuidEntry", "CpuidHeader", "DescriptorTable", "DirtyLog",
    "EnableCap", "FileDescriptors", "GeneralRegs", "MemoryRegion", "RunHeader", "Segment", "Sregs", "StatsDescriptor",
    "StatsHeader", "Translation", "ioctl", "load_cpuid", "open_device"]

DEVICE = "/dev/kvm"
API_VERSION = 12
MAX_CPUID_ENTRIES = 256
_VENDOR_LEAF, _ADDRESS_SIZES_LEAF = 0, 0x80000008
_VENDORS = {"intel": b"GenuineIntel", "amd": b"AuthenticAMD"}


class Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        *((name, ctypes.c_uint8) for name in ("unusable", "padding")),
    ]


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, DescriptorTable) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]


class GeneralRegs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((f"r{n}", ctypes.c_uint64) for n in range(8, 16)),
        ("rip", ctypes.c_uint64),
        ("rflags", ctypes.c_uint64),
    ]


class MemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    ]


class DirtyLog(ctypes.Structure):
    """struct kvm_dirty_log."""

    _fields_ = [("slot", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("dirty_bitmap", ctypes.c_uint64)]


class EnableCap(ctypes.Structure):
    """struct kvm_enable_cap."""

    _fields_ = [("cap", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("args", ctypes.c_uint64 * 4), ("pad", ctypes.c_uint8 * 64)]


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", ctypes.c_uint32 * 3),
    ]


class CpuidHeader(ctypes.Structure):
    """struct kvm_cpuid2 without its entries: the part that the ioctl numbers count."""

    _fields_ = [("nent", ctypes.c_uint32), ("padding", ctypes.c_uint32)]


class Cpuid(ctypes.Structure):
    """struct kvm_cpuid2 with room for the entries."""

    _fields_ = [("header", CpuidHeader), ("entries", CpuidEntry * MAX_CPUID_ENTRIES)]


class Translation(ctypes.Structure):
    """struct kvm_translation."""

    _fields_ = [
        ("linear_address", ctypes.c_uint64),
        ("physical_address", ctypes.c_uint64),
        *((name, ctypes.c_uint8) for name in ("valid", "writeable", "usermode")),
        ("padding", ctypes.c_uint8 * 5),
    ]


class _IoExit(ctypes.Structure):
    _fields_ = [
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    ]


class _MmioExit(ctypes.Structure):
    _fields_ = [
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    ]


class _InternalExit(ctypes.Structure):
    _fields_ = [("suberror", ctypes.c_uint32), ("ndata", ctypes.c_uint32)]


class _Exit(ctypes.Union):
    _fields_ = [("io", _IoExit), ("mmio", _MmioExit), ("internal", _InternalExit)]


class RunHeader(ctypes.Structure):
    """The beginning of struct kvm_run: all that the exits known here need."""

    _fields_ = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("exit", _Exit),
    ]


class StatsHeader(ctypes.Structure):
    """struct kvm_stats_header."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")]


class StatsDescriptor(ctypes.Structure):
    """struct kvm_stats_desc without the name that follows it."""

    _fields_ = [
        ("flags", ctypes.c_uint32),
        ("exponent", ctypes.c_int16),
        ("size", ctypes.c_uint16),
        ("offset", ctypes.c_uint32),
        ("bucket_size", ctypes.c_uint32),
    ]


def _number(direction: int, number: int, struct: "type[ctypes.Structure] | None" = None) -> int:
    """The number of a KVM ioctl; `direction` is the sum of 1 (user space writes) and 2 (user space reads)."""
    size = 0 if struct is None else ctypes.sizeof(struct)
    return direction << 30 | size << 16 | 0xAE << 8 | number


_NUMBERS = {
    "KVM_GET_API_VERSION": _number(0, 0x00),
    "KVM_CREATE_VM": _number(0, 0x01),
    "KVM_CHECK_EXTENSION": _number(0, 0x03),
    "KVM_GET_VCPU_MMAP_SIZE": _number(0, 0x04),
    "KVM_GET_SUPPORTED_CPUID": _number(3, 0x05, CpuidHeader),
    "KVM_CREATE_VCPU": _number(0, 0x41),
    "KVM_GET_DIRTY_LOG": _number(1, 0x42, DirtyLog),
    "KVM_SET_NR_MMU_PAGES": _number(0, 0x44),
    "KVM_SET_USER_MEMORY_REGION": _number(1, 0x46, MemoryRegion),
    "KVM_RUN": _number(0, 0x80),
    "KVM_GET_REGS": _number(2, 0x81, GeneralRegs),
    "KVM_SET_REGS": _number(1, 0x82, GeneralRegs),
    "KVM_GET_SREGS": _number(2, 0x83, Sregs),
    "KVM_SET_SREGS": _number(1, 0x84, Sregs),
    "KVM_TRANSLATE": _number(3, 0x85, Translation),
    "KVM_SET_CPUID2": _number(1, 0x90, CpuidHeader),
    "KVM_GET_CPUID2": _number(3, 0x91, CpuidHeader),
    "KVM_ENABLE_CAP": _number(1, 0xA3, EnableCap),
    "KVM_GET_STATS_FD": _number(0, 0xCE),
}


def ioctl(fd: int, name: str, argument: Any = 0) -> int:
    """Issue the KVM ioctl `name`; an OSError says which one failed and why."""
    try:
        return int(fcntl.ioctl(fd, _NUMBERS[name], argument))
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from None


def open_device() -> int:
    """A file descriptor of /dev/kvm, of the API version known here.

    Raises
    ------
    OSError
        There is no such device, it may not be opened, or it has another version.
    """
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"open {DEVICE}: {os.strerror(error.errno or 0)}") from None
    version = ioctl(device, "KVM_GET_API_VERSION")
    if version != API_VERSION:
        os.close(device)
        raise OSError(errno.ENOTSUP, f"KVM_GET_API_VERSION: version {version}, need {API_VERSION}")
    return device


def load_cpuid(device: int, vcpu: int, *, vendor: str | None = None,
               maxphyaddr: int | None = None) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """Give a vCPU every feature that KVM supports, but for what is named; returns what it now reports: (eax, ebx, ecx, edx) by
    (function, index)."""
    table = Cpuid(header=CpuidHeader(nent=MAX_CPUID_ENTRIES))
    ioctl(device, "KVM_GET_SUPPORTED_CPUID", table)
    for entry in table.entries[:table.header.nent]:
        if entry.function == _VENDOR_LEAF and vendor is not None:
            entry.ebx, entry.edx, entry.ecx = struct.unpack("<3I", _VENDORS[vendor])
        elif entry.function == _ADDRESS_SIZES_LEAF and maxphyaddr is not None:
            entry.eax = entry.eax & ~0xFF | maxphyaddr
    ioctl(vcpu, "KVM_SET_CPUID2", table)
    table.header.nent = MAX_CPUID_ENTRIES
    ioctl(vcpu, "KVM_GET_CPUID2", table)
    return {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[:table.header.nent]}


class FileDescriptors:
    """The holder of the file descriptors of a VM, and closes them at the end of a `with` block."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Destroy the VM. Harmless when repeated."""
        while self._fds:
            os.close(self._fds.pop())

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd
