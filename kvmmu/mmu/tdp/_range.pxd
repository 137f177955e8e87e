"""TdpMmu over ranges of frames: zap, age, write protection, dirty bits, splitting, recovery. All valid roots of an address space.

A function that returns a need to flush leaves the flush to the caller; the others need none, or say so.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# Zap the leaves that map any of [start, end); True if there were any, and a flush is needed
cdef bint tdp_zap_leafs(kvm *k, int as_id, uint64_t start, uint64_t end) noexcept nogil
# Make every root invalid. The caller asks the vCPUs to leave theirs
cdef void tdp_invalidate_all_roots(kvm *k) noexcept nogil
# Take down invalid roots, leaf tables first; those in use stay, empty, until their vCPUs leave. Flushes by itself
cdef void tdp_zap_invalidated_roots(kvm *k) noexcept nogil
# True if any leaf of [start, end) was accessed. IN clear: make them old. No flush
cdef bint tdp_age_gfn_range(kvm *k, int as_id, uint64_t start, uint64_t end, bint clear) noexcept nogil
# Clear W of leaves of min_level and above, so that a fast page fault can set it again; flush if True
cdef bint tdp_wrprot_slot(kvm *k, const kvm_memory_slot *slot, int min_level) noexcept nogil
# Clear D, or W where the entry's type has no D, of all leaves of a slot; flush if True
cdef bint tdp_clear_dirty_slot(kvm *k, const kvm_memory_slot *slot) noexcept nogil
# The same for the 4K leaves of up to 64 frames. IN wrprot: W in any case
cdef bint tdp_clear_dirty_pt_masked(kvm *k, const kvm_memory_slot *slot, uint64_t gfn, uint64_t mask, bint wrprot) noexcept nogil
# Clear W and MMU-writable of every leaf that maps the frame, down to min_level; flush if True
cdef bint tdp_write_protect_gfn(kvm *k, const kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil
# Split leaves of [start, end) above target_level: 0, or -ENOMEM. Flushes by itself
cdef int tdp_try_split_huge_pages(kvm *k, int as_id, uint64_t start, uint64_t end, int target_level) noexcept nogil
# Replace every table by a huge leaf where slot and host allow it; flush if True
cdef bint tdp_recover_huge_pages(kvm *k, const kvm_memory_slot *slot) noexcept nogil
# Zap up to n of the tables that the NX mitigation made, oldest first; returns how many. Flushes by itself
cdef size_t tdp_recover_nx_huge_pages(kvm *k, size_t n) noexcept nogil
