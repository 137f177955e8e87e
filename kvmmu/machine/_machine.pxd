"""Machine, TdpMmu and ShadowMmu, the Python faces of one vCPU on its host."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._format cimport PageFormat
from kvmmu.machine._access cimport access_columns
from kvmmu.machine._modes cimport MachineModes
from kvmmu.mmu.core._kvm cimport kvm_mmu


cdef class Mmu:
    """A builder of a vCPU's host page tables. Made by a Machine."""
    cdef Machine machine
    cdef kvm_mmu *mmu
    cdef readonly PageFormat fmt
    cdef readonly object w


cdef class TdpMmu(Mmu):
    """Two-dimensional paging, outside of L1's nested paging."""


cdef class ShadowMmu(Mmu):
    """Tables that shadow tables of the guest's."""


cdef class Machine(MachineModes):
    """All of one vCPU but its registers' rules. Made by a Vcpu."""
    cdef readonly TdpMmu tdp_mmu        # None without two-dimensional paging
    cdef readonly ShadowMmu shadow_mmu
    cdef object take_registers          # called before a use that no method of the Vcpu led to
    cdef int prepare(self) except -1
    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out) except -1
    cdef int fail(self, int errno, what) except -1
    # With the lock held, as all below
    cdef int invalidate(self, kvm_mmu *mmu, uint64_t addr, bint current, uint32_t prev_roots) except -1
    cdef int invalidate_by_pcid(self, int type, uint32_t pcid, uint64_t gva) except -1
    cdef int invalidate_pcid(self, uint32_t pcid) except -1
    cdef int load_cr3(self, uint64_t before, bint noflush, bint pdptrs_changed) except -1
    cdef int sync_all(self) except -1
    # IN addr: where they go, within one page
    cdef int set_data(self, uint64_t addr, const uint8_t[::1] data) except -1
