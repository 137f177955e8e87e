"""The part of a page fault that both MMUs share: host look-up, size of the mapping, the leaf SPTE, fast page faults, MMIO.

The order of one fault: `init_fault()`; `page_fault_handle_page_track()`; `fast_page_fault()`; `faultin_pfn()`, which is the
last that may end it early; then the MMU's own part, which calls `hugepage_adjust()`, `disallowed_hugepage_adjust()` at each
level, and `fault_make_spte()` for the leaf. `kvm_mmu_page_fault()` of `kvm/_entry` does all of it for an exit.

Huge pages that must not be executable (`nx_huge_pages`, the mitigation of iTLB multihit): `hugepage_adjust()` decides that a
fetch gets a page of 4 KiB, and by `disallowed_hugepage_adjust()` a later fault goes on through the table that is there then.

A shadow MMU sets `gfn`, `slot` and `max_level` of the fault from the guest's walk before it calls `faultin_pfn()`.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm, kvm_page_fault, kvm_vcpu
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# The last entry of a walk from a root towards a leaf.
cdef struct spte_walk:
    uint64_t sptep
    uint64_t spte
    int level                       # 0: there is no root

cdef void init_fault(kvm_vcpu *vcpu, kvm_page_fault *fault, uint64_t addr, uint64_t error_code) noexcept nogil
# The same for a direct MMU, whose addresses are frames already
cdef void init_direct_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# True if this is a write to a frame that holds shadowed upper tables
cdef bint page_fault_handle_page_track(const kvm_page_fault *fault) noexcept nogil
# RET_PF_*: CONTINUE if pfn and map_writable are set, or if there is no slot and an MMIO SPTE is to be made. IN access: ACC_*
cdef int faultin_pfn(kvm_vcpu *vcpu, kvm_page_fault *fault, uint32_t access) noexcept nogil
cdef void hugepage_adjust(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# Map one level smaller where the NX mitigation has put a table in the place of the huge page
cdef void disallowed_hugepage_adjust(kvm_page_fault *fault, uint64_t spte, int level) noexcept nogil
# Find the first entry for addr that is a leaf or not present
cdef void walk_sptes(const kvm *k, uint32_t root, uint64_t addr, spte_walk *walk) noexcept nogil
# RET_PF_*: INVALID if the fault needs the slow path. Only for direct MMUs
cdef int fast_page_fault(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil
# Make a leaf; True if the frame had to be write-protected. OUT spte. IN role: of the page it goes into; old: the entry there;
# can_unsync: a shadowed leaf table may become unsync for it
cdef bint fault_make_spte(kvm *k, uint32_t role, kvm_memory_slot *slot, uint32_t access, uint64_t gfn, uint64_t pfn,
                          uint64_t old, bint prefetch, bint can_unsync, bint synchronizing, bint host_writable,
                          uint64_t *spte) noexcept nogil
# Return an MMIO entry of the present generation, not stored yet
cdef uint64_t fault_make_mmio_spte(kvm *k, uint64_t gfn, uint32_t access) noexcept nogil
cdef void trace_mark_mmio_spte(kvm *k, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil
# True if addr is in the vCPU's MMIO cache, its last MMIO page. IN direct: addr is guest-physical, else linear
cdef bint is_mmio_cached(const kvm_vcpu *vcpu, uint64_t addr, bint direct) noexcept nogil
# Handle a fault with RSVD: RET_PF_*. INVALID: a stale generation, take the slow path. -EINVAL: reserved bits in a real entry
cdef int handle_mmio_page_fault(kvm_vcpu *vcpu, uint64_t addr, bint direct) noexcept nogil
# Give a frame a host page of its own, for a write by KVM or the VMM
cdef void host_writes(kvm *k, kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
# Give a frame the zero page if it has no host page, for a read by KVM
cdef void host_reads(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
# Give a frame another host page: the next image of its slot
cdef void move_host_page(kvm_memory_slot *slot, uint64_t gfn) noexcept nogil
