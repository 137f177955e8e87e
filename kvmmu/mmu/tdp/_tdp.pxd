"""TdpMmu: host page tables from guest-physical addresses, for guests without nested paging.

One root for each role (address space, guest mode, level) that some vCPU used, held until it is invalidated. A fault never
looks at guest page tables, so the MMU's `w` is NULL. Every change of an entry goes through `tdp_set_spte()`, which counts,
traces and tears down what falls away.

How a fault is mapped (`tdp_mmu_map`):
    step 1: the size of the page that host and slot allow; one level smaller for each table that the NX mitigation left
    step 2: down from the root; a table that is missing is made, a huge page that is too large is split
    step 3: an entry that allows the access already is spurious
    step 4: MMIO without a slot, else make_spte()
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm, kvm_page_fault, kvm_vcpu

# A root of this role: an old one, or a new one; 0 for want of memory. Takes a reference
cdef uint32_t tdp_get_root(kvm *k, uint32_t role) noexcept nogil
cdef void tdp_put_root(kvm *k, uint32_t root) noexcept nogil
# page_fault of a TdpMmu
cdef int tdp_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# The one way to change an entry. IN gfn: first one that the entry maps
cdef void tdp_set_spte(kvm *k, uint64_t sptep, uint64_t gfn, int level, uint64_t new) noexcept nogil
# Put a table of 512 smaller entries in the place of a huge leaf; needs a reserved page and descriptor
cdef void tdp_split_huge_page(kvm *k, uint64_t sptep, uint64_t gfn, int level) noexcept nogil
