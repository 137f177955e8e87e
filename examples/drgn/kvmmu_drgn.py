"""Walk the page tables of what drgn debugs: a live kernel, a vmcore, or any program with physical memory.

    $ drgn -c vmcore -s vmlinux
    >>> import kvmmu_drgn
    >>> vcpu = kvmmu_drgn.vcpu_of(prog)                         # the kernel's address space
    >>> print(vcpu.gva_walk.walk_record(prog["init_task"].address_of_()))
    >>> task = kvmmu_drgn.vcpu_of(prog, find_task(prog, 1))     # and that of a process
    >>> print(task.gva_walk.mappings(0, 1 << 47).where(writable=True, executable=True))
"""

import contextlib

import drgn
import numpy as np

import kvmmu

PAGE = 4096
PHYSICAL_MASK = ((1 << 52) - 1) & ~(PAGE - 1)
REGISTERS = {"cr0": 0x80010033, "cr4": 0x20, "efer": 0xD00}     # what the walk depends on: PG and WP, PAE, long mode and NX
LA57 = 1 << 12


def memory_of(prog):
    """Return the physical memory of a program, page by page as walks come to it. What drgn cannot read is zero."""
    def read(gpas):
        pages = np.zeros((gpas.size, PAGE), np.uint8)
        for row, gpa in enumerate(gpas.tolist()):
            with contextlib.suppress(drgn.FaultError):
                pages[row] = np.frombuffer(prog.read(gpa, PAGE, physical=True), np.uint8)
        return pages

    return kvmmu.GuestMemory.from_callbacks(read)


def vcpu_of(prog, task=None, *, cr3=None, la57=None):
    """Return a vCPU whose CR3 leads to page tables of the program.

    Parameters
    ----------
    task : drgn.Object, optional
        A struct task_struct pointer: its address space. By default the kernel's own, swapper_pg_dir.
    cr3 : int, optional
        The root, where the program is no Linux kernel.
    la57 : bool, optional
        5-level paging; by default what the kernel says.
    """
    if cr3 is None:
        from drgn.helpers.linux.mm import virt_to_phys

        root = prog["init_mm"].pgd if task is None else task.mm.pgd
        cr3 = int(virt_to_phys(root)) & PHYSICAL_MASK
    if la57 is None:
        la57 = prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL != 0 and "__pgtable_l5_enabled" in prog and bool(
            prog["__pgtable_l5_enabled"])
    vcpu = kvmmu.Vcpu(memory_of(prog), kvmmu.CpuModel(maxphyaddr=52))
    vcpu.set_regs(**REGISTERS | {"cr3": cr3, "cr4": REGISTERS["cr4"] | (LA57 if la57 else 0)})
    return vcpu
