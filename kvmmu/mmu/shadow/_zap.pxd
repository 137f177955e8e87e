"""Zapping of entries and shadow pages of a shadow MMU, and the limit on the number of pages.

A leaf that is zapped leaves the reverse map of its frame; the page below an upper entry loses a parent. A page is zapped in two
steps. `prepare_zap_page()` empties it, takes it out of its parents and of the accounts of its guest table, and marks it
invalid; pages that were prepared stand in a list of the caller's, still in the hash. `commit_zap()` flushes and frees them.
A root that a vCPU still uses is not freed but left invalid; who frees the root prepares it once more.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport ROLE_INVALID_MASK
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, page_list
from kvmmu.mmu.core._slots cimport kvm_memory_slot

cdef enum:
    KVM_MIN_FREE_MMU_PAGES = 5
    KVM_REFILL_PAGES = 25
    KVM_MIN_ALLOC_MMU_PAGES = 64
    KVM_PERMILLE_MMU_PAGES = 20

cdef inline bint is_obsolete_sp(const kvm *k, const kvm_mmu_page *sp) noexcept nogil:
    """Marked invalid, or of a generation that was zapped as a whole."""
    return (sp.role & <uint32_t>ROLE_INVALID_MASK) != 0 or sp.mmu_valid_gen != k.mmu_valid_gen


# Zap all leaves that map the page of this level; True if there were any
cdef bint zap_rmap(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int level) noexcept nogil
# Make an entry of any kind empty
cdef void drop_spte(kvm *k, uint64_t sptep) noexcept nogil
# The same; if invalid is not NULL, a child that nothing needs any more is zapped with it. Returns how many pages were zapped
cdef size_t zap_spte(kvm *k, uint64_t sptep, page_list *invalid) noexcept nogil
# Returns how many pages were zapped; others than sp may be among them
cdef size_t prepare_zap_page(kvm *k, uint32_t sp, page_list *invalid) noexcept nogil
cdef void commit_zap(kvm *k, page_list *invalid) noexcept nogil
# One flush for either reason
cdef void flush_or_zap(kvm *k, page_list *invalid, bint flush) noexcept nogil
cdef size_t zap_oldest_pages(kvm *k, size_t n) noexcept nogil
# 0, or -ENOSPC: not even zapping made room for the pages of a fault
cdef int make_pages_available(kvm *k) noexcept nogil
# Set the limit on shadow pages, and zap the oldest ones beyond it
cdef void change_mmu_pages(kvm *k, uint64_t limit) noexcept nogil
