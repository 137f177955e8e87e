"""A shadow MMU over ranges of frames, by their reverse maps: unmap, age, write protection; and whole generations of pages.

A function that returns a need to flush leaves the flush to the caller.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu.mmu.core._kvm cimport kvm, page_list
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# Zap the leaves that map any of [start, end); flush if True
cdef bint shadow_zap_gfn_range(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil
# True if any leaf of [start, end) was accessed. IN clear: make them old. No flush
cdef bint shadow_age_gfn_range(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end, bint clear) noexcept nogil
# Take W, and MMU-writable, from every leaf that maps the frame at min_level or above; flush if True
cdef bint shadow_write_protect_gfn(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil
# Clear W of leaves of min_level and above, for the dirty log; flush if True
cdef bint shadow_wrprot_slot(kvm *k, kvm_memory_slot *slot, int min_level) noexcept nogil
# The same for the 4K leaves of up to 64 frames
cdef bint shadow_wrprot_pt_masked(kvm *k, kvm_memory_slot *slot, uint64_t gfn, uint64_t mask) noexcept nogil
# Zap the leaves of direct pages that slot and host would allow to be larger; flush if True
cdef bint shadow_zap_collapsible(kvm *k, kvm_memory_slot *slot) noexcept nogil
# Zap every page that shadows a table in [start, end): prepared, not committed; returns how many
cdef size_t zap_pages_of_gfns(kvm *k, int as_id, uint64_t start, uint64_t end, page_list *invalid) noexcept nogil
# Zap the pages of all generations but the present one
cdef void zap_obsolete_pages(kvm *k) noexcept nogil
# Zap up to n of the pages that the NX mitigation made, oldest first; returns how many. Flushes by itself
cdef size_t shadow_recover_nx_huge_pages(kvm *k, size_t n) noexcept nogil
