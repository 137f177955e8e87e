"""From an exit to a return code (`kvm_mmu_page_fault`), and the loading of roots before a vCPU runs."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu._kvm cimport kvm, kvm_vcpu

# One exit. IN addr: guest-physical for a direct MMU; error_code: of #PF or #NPF, or decoded from an EPT violation. Returns
# RET_PF_*: EMULATE asks the caller to carry the access out, all others to run the vCPU again; or a negative errno
cdef int kvm_mmu_page_fault(kvm_vcpu *vcpu, uint64_t addr, uint64_t error_code) noexcept nogil
# Make the MMU of a vCPU a TdpMmu of this role; no work if it is one
cdef int load_tdp_mmu(kvm_vcpu *vcpu, uint32_t role) noexcept nogil
cdef void free_mmu_root(kvm_vcpu *vcpu) noexcept nogil
# The role of a TdpMmu's root
cdef uint32_t tdp_root_role(const kvm *k, int level, bint smm, bint guest_mode, bint gmet) noexcept nogil
