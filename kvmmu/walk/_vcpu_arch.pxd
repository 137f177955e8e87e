"""The registers of one vCPU as the walks read them, and the role that follows from them."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport vcpu_arch
from kvmmu.arch._bits cimport PFERR_RSVD_SHIFT, RFLAGS_AC_SHIFT


cdef class VcpuArch:
    """The registers of one vCPU as the walks read them."""
    cdef vcpu_arch arch
    cdef uint64_t loads             # how often they were loaded


cdef inline uint32_t rflags_ac(const vcpu_arch *arch) noexcept nogil:
    """Return EFLAGS.AC as a bit of Access."""
    return <uint32_t>((arch.rflags >> RFLAGS_AC_SHIFT) & 1) << PFERR_RSVD_SHIFT


# Take the registers of a Regs; nested_pgd stays
cdef int load_arch(vcpu_arch *arch, regs) except -1
# The LAM bits of CR3, where they count
cdef uint64_t lam_of(const vcpu_arch *arch) noexcept
# The role of a first stage
cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept
