"""Roots of a shadow MMU: making, keeping and leaving them.

A root is one page for a guest with a 4- or 5-level table. Where the hardware wants another top than the guest has, special pages
stand there, one of each kind for an MMU: the four entries of PAE tables (level 3; also for 4-byte tables, whose directory is
shadowed in quarters, and with paging off), and above them a level 4 and a level 5 where the processor walks that many. A guest
root that has no memory behind it gives the dummy root, number 0: a page without entries.

A vCPU keeps the three roots that it used before the present one (`prev_roots`), to come back to them without looking.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_vcpu

cdef enum:
    ROOT_CURRENT = 1
    ROOTS_ALL = 15                  # bit i + 1: prev_roots[i]

# The root that the registers ask for, synchronized: 0, or a negative errno
cdef int load_shadow_root(kvm_vcpu *vcpu) noexcept nogil
cdef void free_shadow_roots(kvm *k, kvm_mmu *mmu, uint32_t roots) noexcept nogil
# Roots that were zapped, and those of special pages
cdef void free_obsolete_roots(kvm *k, kvm_mmu *mmu) noexcept nogil
# Roots before the present one that do not agree with the guest's tables: left, which is the shortest way to make them
cdef void sync_prev_roots(kvm *k, kvm_mmu *mmu) noexcept nogil
# Another root table, or other registers: take a root from the ones before if there is one. IN sync: the guest flushes as well
cdef void new_pgd(kvm_vcpu *vcpu, uint64_t pgd, bint sync) noexcept nogil
# Roots before the present one, by a mask of bits that their pgd must agree in with pgd
cdef uint32_t prev_roots_of(const kvm_mmu *mmu, uint64_t pgd, uint64_t mask) noexcept nogil
# Root role of a shadow MMU. IN cpu_role: of the guest; level: that the processor walks, 0: what the guest's role makes it
cdef uint32_t shadow_root_role(const kvm *k, uint64_t cpu_role, int level, bint nested) noexcept nogil
