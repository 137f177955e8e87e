"""A live KVM vCPU as an oracle: ``KVM_TRANSLATE`` on page tables that the caller writes.

The vCPU never runs. ``KVM_TRANSLATE`` walks the guest's page tables with KVM's software walker, so what it answers is
the ``conformance="kvm"`` behaviour and not the behaviour of the processor underneath. Ioctl numbers and structure
layouts are those of x86-64 in the kernel's public KVM API documentation.

What ``KVM_TRANSLATE`` does, each found by experiment on a Linux 6.18 kernel of an AMD machine:

- It is a supervisor-mode data read whatever the vCPU's CPL. ``writeable`` is always 1 and ``usermode`` always 0, also
  for a translation that fails: neither says anything about the page.
- It honours SMAP: with CR4.SMAP set and RFLAGS.AC clear a user page does not translate; AC set lifts that. SMEP, CR0.WP
  and the R/W bits have no influence on a read.
- It checks reserved bits, NX with EFER.NXE clear among them.
- It ignores canonicality: only bits 47:0 of the linear address count.
- It sets the accessed bits of every level, and only when the whole walk succeeds. It never sets a dirty bit.
- It is never stale: entries that user space rewrites between two calls are seen by the second one.
- A table outside the memory slot reads as not present; a leaf may point anywhere below MAXPHYADDR.
- About 75,000 translations a second from Python, 25,000 changes of the registers.

A KVM may take the registers of 32-bit or PAE paging and silently keep CR0.PG clear, after which every address
translates to itself. `LiveKvm.set_sregs` reads the registers back, so that no such answer passes for a translation.
"""

import errno
import mmap
import platform
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch.arguments import check_int, check_integers, check_pages, check_word
from kvmmu.oracles.ioctls import FileDescriptors, GeneralRegs, MemoryRegion, Segment, Sregs, ioctl, load_cpuid, open_device

INVALID_GPA = 2**64 - 1

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE, CR4_LA57 = 1 << 5, 1 << 12
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1

CPUID_VENDOR, CPUID_AMD_FEATURES, CPUID_ADDRESS_SIZES = 0x0, 0x80000001, 0x80000008
CPUID_PDPE1GB = 1 << 26
AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")

SEGMENT_CODE, SEGMENT_DATA = 11, 3


TRANSLATION_DTYPE = np.dtype(
    [
        ("linear_address", np.uint64),
        ("physical_address", np.uint64),
        ("valid", np.uint8),
        ("writeable", np.uint8),
        ("usermode", np.uint8),
        ("padding", np.uint8, 5),
    ]
)
"""struct kvm_translation."""


class LiveKvm(FileDescriptors):
    """One VM with one vCPU and one memory slot at GPA 0; a context manager.

    Parameters
    ----------
    size : int, default 64 MiB
        Bytes of guest memory, a multiple of 4096. The memory is anonymous and sparse: untouched pages cost nothing.

    Attributes
    ----------
    memory : numpy.ndarray of uint8
        The guest memory itself, shared with the VM. An array taken from it stays valid after `close()`.
    words : numpy.ndarray of uint64
        The same memory as 8-byte words.
    maxphyaddr : int
        The physical-address width that the vCPU's CPUID reports.
    gbpages : bool
        Whether the vCPU's CPUID reports 1-GiB pages.
    vendor : str
        "amd" or "intel": the vendor whose paging rules KVM applies to the vCPU.

    Raises
    ------
    OSError
        If a step fails; the message names the step, `errno` says why.

    Examples
    --------
    >>> with LiveKvm() as live:  # doctest: +SKIP
    ...     live.words[0x1000 // 8] = 0x2003
    ...     live.set_sregs(cr0=0x80010011, cr3=0x1000, cr4=0x20, efer=0x500)
    ...     live.translate(0x1234)
    (18446744073709551615, False, True, False)
    """

    def __init__(self, size: int = 64 << 20) -> None:
        size = check_pages("size", size, mmap.PAGESIZE)
        super().__init__()
        try:
            self._vm_fd, self._vcpu_fd = self._create_vcpu()
            self.memory = self._create_memory(size)
            self.words = self.memory.view(np.uint64)
            self.set_cpuid()
        except BaseException:
            self.close()
            raise

    def _create_vcpu(self) -> list[int]:
        """Open the device, check its version and return the file descriptors of a new VM and its vCPU."""
        vm = self._keep(ioctl(self._keep(open_device()), "KVM_CREATE_VM"))
        return [vm, self._keep(ioctl(vm, "KVM_CREATE_VCPU"))]

    def _create_memory(self, size: int) -> NDArray[np.uint8]:
        """Map `size` bytes, make them the VM's memory at GPA 0 and return them as an array."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
        region = MemoryRegion(memory_size=size, userspace_addr=memory.ctypes.data)
        ioctl(self._vm_fd, "KVM_SET_USER_MEMORY_REGION", region)
        return memory

    def set_cpuid(self) -> None:
        """Give the vCPU every feature that KVM supports, and read back what it now reports."""
        self._cpuid = load_cpuid(self._fds[0], self._vcpu_fd)
        self.maxphyaddr = self.cpuid(CPUID_ADDRESS_SIZES)[0] & 0xFF
        self.gbpages = bool(self.cpuid(CPUID_AMD_FEATURES)[3] & CPUID_PDPE1GB)
        _, ebx, ecx, edx = self.cpuid(CPUID_VENDOR)
        name = b"".join(register.to_bytes(4, "little") for register in (ebx, edx, ecx))
        self.vendor = "amd" if name in AMD_VENDORS else "intel"

    def cpuid(self, function: int, index: int = 0) -> tuple[int, int, int, int]:
        """Return (eax, ebx, ecx, edx) of a CPUID leaf of the vCPU; zeros for a leaf that it does not have."""
        return self._cpuid.get((check_word("function", function, 32), check_word("index", index, 32)), (0, 0, 0, 0))

    def set_sregs(self, cr0: int, cr3: int, cr4: int, efer: int, cpl: int = 0) -> None:
        """Put the vCPU into 4-level long mode with these registers.

        Parameters
        ----------
        cr0, cr3, cr4, efer : int
            The registers; EFER.LMA is taken as given.
        cpl : int, default 0
            The privilege level of the code and stack segments.

        Raises
        ------
        ValueError
            If the registers do not select 4-level paging.
        OSError
            If KVM refuses the registers, with EINVAL, or takes them but keeps others, with ENOTSUP.
        """
        registers = {"cr0": cr0, "cr3": cr3, "cr4": cr4, "efer": efer}
        wanted = {name: check_word(name, value) for name, value in registers.items()}
        cpl = check_int("cpl", cpl, 0, 3)
        self._require_4_level(**wanted)
        sregs = Sregs()
        ioctl(self._vcpu_fd, "KVM_GET_SREGS", sregs)
        segment = {"limit": 0xFFFFFFFF, "present": 1, "dpl": cpl, "s": 1, "g": 1}
        sregs.cs = Segment(selector=8 | cpl, type=SEGMENT_CODE, l=1, **segment)
        sregs.ss = Segment(selector=16 | cpl, type=SEGMENT_DATA, db=1, **segment)
        for name, value in wanted.items():
            setattr(sregs, name, value)
        ioctl(self._vcpu_fd, "KVM_SET_SREGS", sregs)
        self._check_sregs(wanted)

    @staticmethod
    def _require_4_level(cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Raise a ValueError unless the registers select 4-level paging."""
        paging = cr0 & CR0_PE and cr0 & CR0_PG and cr4 & CR4_PAE
        if not paging or cr4 & CR4_LA57 or efer & (EFER_LME | EFER_LMA) != EFER_LME | EFER_LMA:
            raise ValueError(
                f"CR0 {cr0:#x}, CR3 {cr3:#x}, CR4 {cr4:#x}, EFER {efer:#x} do not select 4-level paging, the only mode "
                "supported: set CR0.PE, CR0.PG, CR4.PAE, EFER.LME and EFER.LMA, and clear CR4.LA57"
            )

    def _check_sregs(self, wanted: dict[str, int]) -> None:
        """Raise an OSError unless the vCPU holds the registers that were just set."""
        sregs = Sregs()
        ioctl(self._vcpu_fd, "KVM_GET_SREGS", sregs)
        held = {name: getattr(sregs, name) for name in wanted}
        kept = [f"{name} {held[name]:#x} for {wanted[name]:#x}" for name in wanted if held[name] != wanted[name]]
        if kept:
            raise OSError(errno.ENOTSUP, f"KVM_SET_SREGS: succeeded, but the vCPU holds {', '.join(kept)}")

    def set_rflags(self, rflags: int) -> None:
        """Set RFLAGS; only AC (bit 18) matters to a translation."""
        rflags = check_word("rflags", rflags)
        regs = GeneralRegs()
        ioctl(self._vcpu_fd, "KVM_GET_REGS", regs)
        regs.rflags = rflags | RFLAGS_FIXED
        ioctl(self._vcpu_fd, "KVM_SET_REGS", regs)

    def _translate(self, gvas: ArrayLike) -> NDArray[Any]:
        """Issue KVM_TRANSLATE for every address and return the records that KVM filled in."""
        gvas = check_integers("gvas", gvas, 0, INVALID_GPA)
        records = np.zeros(gvas.size, dtype=TRANSLATION_DTYPE)
        records["linear_address"] = gvas.ravel()
        view, step = memoryview(records.view(np.uint8)), TRANSLATION_DTYPE.itemsize
        for start in range(0, len(view), step):
            ioctl(self._vcpu_fd, "KVM_TRANSLATE", view[start : start + step])
        records["physical_address"][records["valid"] == 0] = INVALID_GPA
        return records

    def translate(self, gva: int) -> tuple[int, bool, bool, bool]:
        """Translate one linear address.

        Parameters
        ----------
        gva : int
            The linear address; bits 63:48 are ignored by KVM.

        Returns
        -------
        gpa : int
            The guest-physical address, or ``INVALID_GPA``.
        valid, writeable, usermode : bool
            What KVM reports; the latter two are constants and say nothing about the page.
        """
        record = self._translate(check_word("gva", gva))[0]
        return int(record["physical_address"]), bool(record["valid"]), bool(record["writeable"]), bool(record["usermode"])

    def translate_many(self, gvas: ArrayLike) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Translate an array of linear addresses.

        Parameters
        ----------
        gvas : array_like of uint64, shape (n,)
            The linear addresses.

        Returns
        -------
        gpa : numpy.ndarray of uint64, shape (n,)
            The guest-physical addresses; ``INVALID_GPA`` where the translation failed.
        valid : numpy.ndarray of bool, shape (n,)
            Where it succeeded.
        """
        records = self._translate(gvas)
        return records["physical_address"].copy(), records["valid"] != 0


def available() -> str | None:
    """Say whether live translation works here.

    Returns
    -------
    str or None
        None if a vCPU entered 4-level long mode, else the reason why not.
    """
    if platform.machine() != "x86_64":
        return f"the driver knows the KVM structures of x86_64 only, this machine is {platform.machine()}"
    try:
        with LiveKvm(size=mmap.PAGESIZE) as live:
            live.set_sregs(cr0=CR0_PG | CR0_ET | CR0_PE, cr3=0, cr4=CR4_PAE, efer=EFER_LME | EFER_LMA)
            live.translate(0)
    except OSError as error:
        return str(error)
    return None
