"""Synchronization of unsync pages with the guest's tables: all of a root when the guest flushes, or one address.

`mmu_sync_children()` write-protects every table before it compares it, so that the table cannot change afterwards.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm_mmu, kvm_vcpu

# Synchronize an unsync page: 1: flush; 0; -1: the page is of no use under these registers, zap it
cdef int sync_page(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil
# Synchronize every unsync page below sp
cdef void mmu_sync_children(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil
# Synchronize all below the present root
cdef void sync_roots(kvm_vcpu *vcpu) noexcept nogil
# Synchronize the entries for addr of the unsync pages below a root
cdef void invalidate_addr_in_root(kvm_vcpu *vcpu, uint64_t addr, uint32_t root) noexcept nogil
# Synchronize the entries for addr under these roots, for INVLPG (ROOTS_ALL) and when KVM delivers a fault (ROOT_CURRENT)
cdef void mmu_invalidate_addr(kvm_vcpu *vcpu, kvm_mmu *mmu, uint64_t addr, uint32_t roots) noexcept nogil
