"""The reverse map: for each guest frame of a slot and each level, the leaf SPTEs of shadow pages that map it.

A slot has one list head for each page of each level (`_pte_list.pxd`), once a shadow MMU has a root. `rmap_add()` goes with
every leaf that becomes present, `rmap_remove()` with every leaf that goes.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport ROLE_SMM_SHIFT
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, memslots_of
from kvmmu.mmu.core._slots cimport gfn_to_memslot, kvm_memory_slot, level_index

cdef enum:
    RMAP_RECYCLE_THRESHOLD = 1000   # a longer list is emptied by whoever has added to it


cdef inline bint has_rmaps(const kvm_memory_slot *slot) noexcept nogil:
    return slot.rmap[0] is not NULL


cdef inline uint64_t *rmap_head(kvm_memory_slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Return the list of the page of gfn at this level; the slot must have rmaps."""
    return &slot.rmap[level - 1][level_index(slot, gfn, level)]


cdef inline kvm_memory_slot *slot_of_sp(kvm *k, const kvm_mmu_page *sp, uint64_t gfn) noexcept nogil:
    """Return the slot of a frame in the address space of a shadow page."""
    return gfn_to_memslot(memslots_of(k, <int>(sp.role >> ROLE_SMM_SHIFT)), gfn)


# Enter a leaf that is present already; returns how many leaves the list had. Needs one reserved descriptor
cdef size_t rmap_add(kvm *k, kvm_memory_slot *slot, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil
# Take out a leaf that goes. The page still knows its frame
cdef void rmap_remove(kvm *k, uint64_t sptep) noexcept nogil
