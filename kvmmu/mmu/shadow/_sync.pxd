"""Unsync pages become what the guest's tables say: all of a root when the guest flushes, one address when it says so.

`mmu_sync_children()` first write-protects every table that it is about to compare, so that none can change behind it.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm_mmu, kvm_vcpu

# Entries of an unsync page, compared: 1: flush; 0; -1: the page is of no use under these registers, zap it
cdef int sync_page(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil
# Every unsync page below sp
cdef void mmu_sync_children(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil
# Below the present root
cdef void sync_roots(kvm_vcpu *vcpu) noexcept nogil
# The entries of unsync pages on the way to addr, from a root
cdef void invalidate_addr_in_root(kvm_vcpu *vcpu, uint64_t addr, uint32_t root) noexcept nogil
# What KVM does for INVLPG (all roots), and when it delivers a fault (the present one)
cdef void mmu_invalidate_addr(kvm_vcpu *vcpu, kvm_mmu *mmu, uint64_t addr, bint current, uint32_t prev_roots) noexcept nogil
