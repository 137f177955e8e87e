"""Leaf entries of shadow pages: made by a fault, prefetched, synchronized with the guest's entry."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm_page_fault, kvm_vcpu
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# Replace an entry by a leaf: RET_PF_*. IN access: ACC_* by the guest's tables; gfn, pfn: first ones of the page;
# fault: NULL for a prefetch
cdef int mmu_set_spte(kvm_vcpu *vcpu, kvm_memory_slot *slot, uint64_t sptep, uint32_t access, uint64_t gfn, uint64_t pfn,
                      const kvm_page_fault *fault) noexcept nogil
# Map the neighbours of an entry of a level-1 page that the guest's tables allow; needs reserved descriptors
cdef void pte_prefetch(kvm_vcpu *vcpu, uint64_t sptep) noexcept nogil
# Synchronize an entry of an indirect level-1 page with the guest's entry: 1: flush; -1: the guest's table is not there
cdef int sync_spte(kvm_vcpu *vcpu, uint64_t sptep) noexcept nogil
