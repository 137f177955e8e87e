"""Operations on guest frames in the tables of both MMUs, as `_gfns.pxd` describes them."""

from libc.stdint cimport uint64_t

from kvmmu.arch._bits cimport MEMSLOT_GEN_UPDATE_IN_PROGRESS, MMIO_SPTE_GEN_MASK
from kvmmu.mmu.core._kvm cimport REQ_FREE_OBSOLETE_ROOTS, flush_remote_tlbs, kvm, make_all_vcpus_request, page_list
from kvmmu.mmu.core._page cimport list_init
from kvmmu.mmu.core._slots cimport kvm_memory_slot
from kvmmu.mmu.core._trace cimport TRACE_ZAP_ALL_FAST, trace
from kvmmu.mmu.shadow._range cimport shadow_write_protect_gfn, shadow_zap_gfn_range, zap_obsolete_pages, zap_pages_of_gfns
from kvmmu.mmu.shadow._zap cimport flush_or_zap
from kvmmu.mmu.tdp._range cimport tdp_invalidate_all_roots, tdp_write_protect_gfn, tdp_zap_invalidated_roots, tdp_zap_leafs

cdef void unmap_gfns(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil:
    cdef bint flush = shadow_zap_gfn_range(k, slot, start, end)
    flush |= tdp_zap_leafs(k, slot.as_id, start, end)
    if flush:
        flush_remote_tlbs(k)


cdef void zap_all_fast(kvm *k) noexcept nogil:
    trace(&k.trace, TRACE_ZAP_ALL_FAST, k.mmu_valid_gen, k.n_used_mmu_pages)
    k.mmu_valid_gen = 1 - k.mmu_valid_gen
    tdp_invalidate_all_roots(k)
    make_all_vcpus_request(k, REQ_FREE_OBSOLETE_ROOTS)
    zap_obsolete_pages(k)
    if k.tdp_enabled:
        tdp_zap_invalidated_roots(k)


cdef void zap_slot(kvm *k, kvm_memory_slot *slot) noexcept nogil:
    cdef page_list invalid
    cdef bint flush
    list_init(&invalid)
    flush = shadow_zap_gfn_range(k, slot, slot.base_gfn, slot.base_gfn + slot.npages)
    flush |= tdp_zap_leafs(k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages)
    zap_pages_of_gfns(k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages, &invalid)
    flush_or_zap(k, &invalid, flush)


cdef void next_generation(kvm *k, uint64_t count) noexcept nogil:
    cdef uint64_t before = k.memslot_gen & MMIO_SPTE_GEN_MASK
    k.memslot_gen = (k.memslot_gen & ~MEMSLOT_GEN_UPDATE_IN_PROGRESS) + count
    # after a wrap entries of long ago would look new
    if k.memslot_gen & MMIO_SPTE_GEN_MASK < before or count > MMIO_SPTE_GEN_MASK:
        zap_all_fast(k)


cdef bint slot_gfn_write_protect(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil:
    cdef bint flush = shadow_write_protect_gfn(k, slot, gfn, min_level)
    if k.tdp_enabled:
        flush |= tdp_write_protect_gfn(k, slot, gfn, min_level)
    return flush
