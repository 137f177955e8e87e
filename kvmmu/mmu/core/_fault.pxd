"""What every MMU does with a fault: host look-up, size of the mapping, the leaf SPTE, fast page faults, MMIO.

The order of one fault: `init_fault()`; `page_fault_handle_page_track()`; `fast_page_fault()`; `faultin_pfn()`, which is the
last that may end it early; then the MMU's own part, which calls `hugepage_adjust()`, `disallowed_hugepage_adjust()` on its way
down, and `fault_make_spte()` for the leaf. `top_level_fault()` in `_entry` wraps all of it for an exit.

A shadow MMU sets `gfn`, `slot` and `max_level` of the fault from the guest's walk before it calls `faultin_pfn()`.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm, kvm_page_fault, kvm_vcpu
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# One entry of the way from a root to a leaf.
cdef struct spte_walk:
    uint64_t sptep
    uint64_t spte
    int level                       # 0: there is no root

cdef void init_fault(kvm_vcpu *vcpu, kvm_page_fault *fault, uint64_t addr, uint64_t error_code) noexcept nogil
# A direct MMU knows the frame at once
cdef void init_direct_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# Whether this is a write to a frame that holds shadowed upper tables
cdef bint page_fault_handle_page_track(const kvm_page_fault *fault) noexcept nogil
# RET_PF_*: CONTINUE if pfn and map_writable are set, or if there is no slot and an MMIO SPTE is to be made. IN access: ACC_*
cdef int faultin_pfn(kvm_vcpu *vcpu, kvm_page_fault *fault, uint32_t access) noexcept nogil
cdef void hugepage_adjust(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# A table stands where the huge page would go, because of the NX mitigation: map one level smaller
cdef void disallowed_hugepage_adjust(kvm_page_fault *fault, uint64_t spte, int level) noexcept nogil
# The first entry for addr that is a leaf or not present
cdef void walk_sptes(const kvm *k, uint32_t root, uint64_t addr, spte_walk *walk) noexcept nogil
# RET_PF_*: INVALID if the fault needs the slow path. Only for direct MMUs
cdef int fast_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# Whether the frame had to be write-protected. OUT spte. IN role: of the page it goes into; old: what stands there;
# can_unsync: a shadowed leaf table may become unsync for it
cdef bint fault_make_spte(kvm *k, uint32_t role, kvm_memory_slot *slot, uint32_t access, uint64_t gfn, uint64_t pfn,
                          uint64_t old, bint prefetch, bint can_unsync, bint synchronizing, bint host_writable,
                          uint64_t *spte) noexcept nogil
# An MMIO entry of the present generation, not stored yet
cdef uint64_t fault_make_mmio_spte(kvm *k, uint64_t gfn, uint32_t access) noexcept nogil
cdef void trace_mark_mmio_spte(kvm *k, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil
# RET_PF_*: of a fault with RSVD. INVALID: a stale generation, take the slow path. -EINVAL: reserved bits in a real entry
cdef int handle_mmio_page_fault(kvm_vcpu *vcpu, uint64_t addr, bint direct) noexcept nogil
# KVM or the VMM writes to a frame: the host page becomes one of its own
cdef void host_writes(kvm *k, kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
# KVM reads a frame: the host has the zero page there if it had none
cdef void host_reads(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
# What the host has done to a frame since it was mapped: it is a new page now
cdef void move_host_page(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
