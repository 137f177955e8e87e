"""Machine: one vCPU on its host, as its Vcpu uses it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.machine._access cimport access_columns
from kvmmu.machine._mmus cimport ShadowMmu, TdpMmu
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine
from kvmmu.mmu.kvm._state cimport Kvm


cdef class Machine:
    """All of one vCPU but its registers' rules. Made by a Vcpu."""
    cdef readonly Kvm kvm
    cdef Modes modes
    cdef machine *m                     # of the modes
    cdef readonly TdpMmu tdp_mmu        # None without two-dimensional paging
    cdef readonly ShadowMmu shadow_mmu
    # IN stride: 0, one access for all rows; 1
    # IN shadow_stacks: some accesses are to shadow stacks
    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out,
                 bint shadow_stacks) except -1
    cdef int check_access_bits(self, uint32_t access) except -1
    # IN addr: where they go, within one page. With the lock held
    cdef int set_data(self, uint64_t addr, const uint8_t[::1] data) except -1
