"""Roots of a shadow MMU: making, keeping and leaving them.

A root is one page for a guest with a 4- or 5-level table. Where the processor walks more levels than the guest has tables, an
MMU has a page of its own for each: pae_root with the four entries of PAE tables (level 3; also for 4-byte tables, whose
directory is shadowed in quarters, and with paging off), and above it pml4_root and pml5_root. An NPT of 4 levels under 5 is an
exception: its root is a shadow page with the role passthrough. A guest root that has no memory behind it gives the dummy root,
number 0: a page without entries.

A vCPU keeps the three roots that it used before the present one (`prev_roots`), to use them again without a search.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_vcpu

# Load the root of the registers, synchronized: 0, or a negative errno
cdef int load_shadow_root(kvm_vcpu *vcpu) noexcept nogil
cdef void free_shadow_roots(kvm *k, kvm_mmu *mmu, uint32_t roots) noexcept nogil
# Free roots that were zapped, and those without a guest's table
cdef void free_obsolete_roots(kvm *k, kvm_mmu *mmu) noexcept nogil
# Free previous roots that do not agree with the guest's tables; they are synchronized when they are loaded again
cdef void sync_prev_roots(kvm *k, kvm_mmu *mmu) noexcept nogil
# Take the root of another pgd or of other registers from the previous roots, if it is there
cdef void new_pgd(kvm_vcpu *vcpu, uint64_t pgd) noexcept nogil
# Return the previous roots whose pgd agrees with pgd in the bits of a mask, as a set (ROOTS_PREVIOUS)
cdef uint32_t prev_roots_of(const kvm_mmu *mmu, uint64_t pgd, uint64_t mask) noexcept nogil
# Return the root role of a shadow MMU. IN cpu_role: of the guest; level: that the processor walks, 0: that of the guest's role
cdef uint32_t shadow_root_role(const kvm *k, uint64_t cpu_role, int level, bint nested) noexcept nogil
