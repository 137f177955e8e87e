"""Operations on guest frames in the tables of both MMUs: zap, write protection, the generation of MMIO entries."""

from libc.stdint cimport uint64_t

from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot

# The host takes pages away, and an mmu notifier says so: leaves that map [start, end) of a slot go. Flushes by itself
cdef void unmap_gfns(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil
# All page tables go: roots are invalid at once, their contents after that
cdef void zap_all_fast(kvm *k) noexcept nogil
# Leaves that map a slot, and pages that shadow tables in it, go
cdef void zap_slot(kvm *k, kvm_memory_slot *slot) noexcept nogil
# Memslots changed: MMIO entries of the generations before are stale. IN count: how many changes
cdef void next_generation(kvm *k, uint64_t count) noexcept nogil
# Take W, and MMU-writable, from every leaf of any MMU that maps the frame at min_level or above; flush if True
cdef bint slot_gfn_write_protect(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil
