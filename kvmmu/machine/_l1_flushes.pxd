"""What L1 invalidates of L2's translations, in the TLB and in tables that shadow L1's or L2's. The caller holds the lock."""

from libc.stdint cimport uint64_t

from kvmmu.machine._state cimport machine

# INVEPT: roots that shadow L1's EPT with this EPTP are left. IN every: of any EPTP
cdef void flush_ept(machine *m, bint every, uint64_t eptp) noexcept nogil
# INVVPID: translations of L2's, whatever their VPID. IN type, addr: as of the instruction
cdef void flush_vpid(machine *m, int type, uint64_t addr) noexcept nogil
