"""The reverse map, as `_rmap.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport SPTE_ENT_PER_PAGE
from kvmmu.mmu.core._kvm cimport count_leaf, kvm, kvm_mmu_page, sp_level, sp_of
from kvmmu.mmu.core._page cimport sp_get_gfn, sp_set_translation
from kvmmu.mmu.core._pte_list cimport pte_list_add, pte_list_remove
from kvmmu.mmu.core._rmap cimport rmap_head, slot_of_sp
from kvmmu.mmu.core._slots cimport kvm_memory_slot


cdef size_t rmap_add(kvm *k, kvm_memory_slot *slot, uint64_t sptep, uint64_t gfn, uint32_t access) noexcept nogil:
    cdef kvm_mmu_page *sp = sp_of(k, sptep)
    cdef int level = sp_level(sp)
    cdef size_t count
    sp_set_translation(sp, <int>(sptep % SPTE_ENT_PER_PAGE), gfn, access)
    count_leaf(k, level, 1)
    count = pte_list_add(&k.lists, rmap_head(slot, gfn, level), sptep)
    k.stats.max_mmu_rmap_size = max(k.stats.max_mmu_rmap_size, <int64_t>count)
    return count


cdef void rmap_remove(kvm *k, uint64_t sptep) noexcept nogil:
    cdef kvm_mmu_page *sp = sp_of(k, sptep)
    cdef int level = sp_level(sp)
    cdef uint64_t gfn = sp_get_gfn(sp, <int>(sptep % SPTE_ENT_PER_PAGE))
    cdef kvm_memory_slot *slot = slot_of_sp(k, sp, gfn)
    count_leaf(k, level, -1)
    if slot is NULL or not pte_list_remove(&k.lists, rmap_head(slot, gfn, level), sptep):
        k.stats.bugs += 1
