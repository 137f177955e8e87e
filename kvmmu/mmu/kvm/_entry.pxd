"""From an exit to a return code (`kvm_mmu_page_fault`), and the loading of roots before a vCPU runs."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_vcpu

# One exit. IN addr: guest-physical for a direct MMU; error_code: of #PF or #NPF, or decoded from an EPT violation. Returns
# RET_PF_*: EMULATE asks the caller to carry the access out, all others to run the vCPU again; or a negative errno
cdef int kvm_mmu_page_fault(kvm_vcpu *vcpu, uint64_t addr, uint64_t error_code) noexcept nogil
# Serve the requests to the active MMU, and load a root for it: 0, or a negative errno
cdef int prepare_mmu(kvm_vcpu *vcpu) noexcept nogil
# Free every root of an MMU, and clear the vCPU's MMIO cache
cdef void free_mmu_roots(kvm_vcpu *vcpu, kvm_mmu *mmu) noexcept nogil
# Account for a fault that KVM's walk has found, and synchronize the shadow entries that could hide it. The caller delivers it
cdef void account_guest_fault(kvm_vcpu *vcpu, uint64_t addr, const walk_result *r, bint by_ngpa_walk) noexcept nogil
# Zap the shadow pages of a frame, so that the guest may repeat a write instead of KVM carrying it out. True if there were
# some, and the guest is to repeat it. IN addr: of the exit; gfn: that is written
cdef bint unprotect_and_retry(kvm_vcpu *vcpu, uint64_t addr, uint64_t gfn) noexcept nogil
# Enter the frames that the processor logged in the dirty log. IN index: of the next entry of its log, counting down
cdef void drain_pml(kvm_vcpu *vcpu, uint16_t index) noexcept nogil
# Free all pages that a vCPU holds: roots, and its log, which is drained. It never runs again
cdef void free_vcpu_pages(kvm_vcpu *vcpu) noexcept nogil
# The role of a TdpMmu's root
cdef uint32_t tdp_root_role(const kvm *k, int level, bint smm, bint guest_mode, bint gmet) noexcept nogil
