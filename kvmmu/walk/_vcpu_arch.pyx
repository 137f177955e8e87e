"""The registers of one vCPU as the walks read them; see `_vcpu_arch.pxd`."""

from libc.stdint cimport uint64_t

from kvmmu._walk cimport vcpu_arch
from kvmmu.arch._bits cimport CR0_PG_MASK, CR3_LAM_U48_MASK, CR3_LAM_U57_MASK, EFER_LMA_MASK
from kvmmu.arch._format cimport key_registers
from kvmmu.arch._roles cimport calc_cpu_role, kvm_mmu_role_regs
from kvmmu.memory._maker cimport check_maker, maker

from kvmmu.arch.registers import Regs


cdef class VcpuArch:
    """The registers of one vCPU as the walks read them. Made by a Vcpu."""

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a VcpuArch is made by a Vcpu")

    def load(self, regs not None):
        """Take the registers of a `Regs`, all at once."""
        cdef vcpu_arch arch = self.arch
        if not isinstance(regs, Regs):
            raise TypeError(f"regs: want a Regs, got {type(regs).__name__}")
        load_arch(&arch, regs)
        self.arch = arch
        self.loads += 1


def new_arch():
    """Registers of a vCPU, all 0."""
    return VcpuArch.__new__(VcpuArch, maker())


cdef int load_arch(vcpu_arch *arch, regs) except -1:
    arch.cr0, arch.cr3, arch.cr4, arch.efer = regs.cr0, regs.cr3, regs.cr4, regs.efer
    arch.keys, arch.rflags = key_registers(regs.pkru, regs.pkrs), regs.rflags
    pdptrs = regs.pdptrs
    for i in range(4):
        arch.pdptrs[i] = pdptrs[i] if pdptrs is not None else 0
    return 0


cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept:
    cdef kvm_mmu_role_regs regs
    regs.cr0, regs.cr4, regs.efer = arch.cr0, arch.cr4, arch.efer
    return calc_cpu_role(&regs, smm, guest_mode)


cdef uint64_t lam_of(const vcpu_arch *arch) noexcept:
    if not arch.cr0 & CR0_PG_MASK or not arch.efer & EFER_LMA_MASK:
        return 0
    return arch.cr3 & (CR3_LAM_U48_MASK | CR3_LAM_U57_MASK)
