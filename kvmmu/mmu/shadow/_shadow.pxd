"""ShadowMmu: pages that shadow the guest's tables, found by frame and role, and the mapping of a fault.

The order of one fault (`shadow_page_fault`):
    step 1: walk the guest's tables; an access that they deny is the guest's own fault
    step 2: a write to a frame that holds shadowed upper tables is carried out by KVM
    step 3: the host page
    step 4: CR0.WP clear: a supervisor may write a read-only page, so it is mapped writable, and for the supervisor alone
    step 5: from the root to the level of the guest's leaf: a page for each of the guest's tables; synchronized before it is
            linked, and linked only if the guest's entry has not changed since the walk
    step 6: below, if the host page is smaller than the guest's: direct pages
    step 7: the leaf, and its neighbours

A page shadows one guest table under one role; a 4-byte table of 1024 entries has several, by quadrant.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm_page_fault, kvm_vcpu

# The page of (gfn, role), found or made; needs a reserved page; 0 for want of memory. IN vcpu: whose walk it shadows
cdef uint32_t get_shadow_page(kvm_vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil
# RET_PF_*, or a negative errno. A fault of the guest's is in vcpu.guest_fault; RETRY is returned
cdef int shadow_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
cdef int nonpaging_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
