"""Emulated writes, as `_track.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    PAGE_OFFSET_MASK, PAGE_SHIFT, PG_LEVEL_4K, PT64_INDEX_BITS, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_QUADRANT_MASK,
    ROLE_QUADRANT_SHIFT, ROLE_SMM_SHIFT, SPTE_ENT_PER_PAGE,
)
from kvmmu.memory._memory cimport kvmmu_read32, kvmmu_read64
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, memslots_of, page_list, sp_level
from kvmmu.mmu.core._page cimport first_spte, hash_first, list_init, sp_has_gptes
from kvmmu.mmu.core._slots cimport gfn_to_memslot, kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_shadow_present_pte
from kvmmu.mmu.shadow._range cimport zap_pages_of_gfns
from kvmmu.mmu.shadow._zap cimport commit_zap, flush_or_zap, is_obsolete_sp, prepare_zap_page, zap_spte

cdef enum:
    WRITE_FLOODING = 3


cdef inline uint64_t gpte_size_of(const kvm_mmu_page *sp) noexcept nogil:
    return sizeof(uint32_t) if sp.role & ROLE_HAS_4_BYTE_GPTE_MASK else sizeof(uint64_t)


cdef bint is_misaligned(const kvm_mmu_page *sp, uint64_t gpa, size_t size) noexcept nogil:
    """True unless the write is four bytes or more within one entry, or one byte at its start: a guest may clear a flag there."""
    cdef uint64_t offset = gpa & PAGE_OFFSET_MASK, whole = gpte_size_of(sp)
    if size == 1 and offset & (whole - 1) == 0:
        return False
    return size < sizeof(uint32_t) or ((offset ^ (offset + size - 1)) & ~(whole - 1)) != 0


cdef bint is_flooded(kvm_mmu_page *sp) noexcept nogil:
    if sp_level(sp) == PG_LEVEL_4K:                     # goes unsync instead
        return False
    sp.write_flooding_count += 1
    return sp.write_flooding_count >= WRITE_FLOODING


cdef int written_sptes(const kvm_mmu_page *sp, uint64_t gpa, int *index) noexcept nogil:
    """Return how many entries shadow the guest's entry at gpa. OUT index: of the first one."""
    cdef uint64_t entry = gpa & PAGE_OFFSET_MASK, quadrant
    cdef int n = 1
    if not sp.role & ROLE_HAS_4_BYTE_GPTE_MASK:
        index[0] = <int>(entry // sizeof(uint64_t))
        return 1
    entry //= sizeof(uint32_t)
    if sp_level(sp) > PG_LEVEL_4K:                      # 4M are two entries of 2M, and the directory four pages
        entry, n = 2 * entry, 2
    quadrant = entry >> PT64_INDEX_BITS
    if quadrant != (sp.role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT:
        return 0
    index[0] = <int>(entry & (SPTE_ENT_PER_PAGE - 1))
    return n


cdef uint64_t written_value(kvm *k, int as_id, uint64_t gpa, size_t size) noexcept nogil:
    """Return the entry that was written; 0 for a write of another size."""
    cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(k, as_id), gpa >> PAGE_SHIFT)
    cdef const uint8_t *hva
    if slot is NULL or (size != sizeof(uint32_t) and size != sizeof(uint64_t)) or (
            (gpa & PAGE_OFFSET_MASK) + size > PAGE_OFFSET_MASK + 1):
        return 0
    hva = slot.hva + (gpa - (slot.base_gfn << PAGE_SHIFT))
    return kvmmu_read32(hva) if size == sizeof(uint32_t) else kvmmu_read64(hva)


cdef void track_write(kvm *k, int as_id, uint64_t gpa, size_t size, bint pae) noexcept nogil:
    cdef uint64_t gfn = gpa >> PAGE_SHIFT, value
    cdef uint32_t sp
    cdef kvm_mmu_page *page
    cdef page_list invalid
    cdef bint flush = False
    cdef int i, n, first = 0
    if k.indirect_shadow_pages == 0:
        return
    if pae and size == sizeof(uint32_t):
        gpa, size = gpa & ~<uint64_t>(sizeof(uint64_t) - 1), sizeof(uint64_t)
    value = written_value(k, as_id, gpa, size)
    k.stats.mmu_pte_write += 1
    list_init(&invalid)
    sp = hash_first(k, gfn)
    while sp:
        page = &k.pages[sp]
        if page.gfn == gfn and sp_has_gptes(page) and not is_obsolete_sp(k, page) and (
                k.one_address_space or <int>(page.role >> ROLE_SMM_SHIFT) == as_id):
            if is_misaligned(page, gpa, size) or is_flooded(page):
                prepare_zap_page(k, sp, &invalid)
                k.stats.mmu_flooded += 1
            else:
                n = written_sptes(page, gpa, &first)
                for i in range(first, first + n):
                    flush |= is_shadow_present_pte(k.sptes[first_spte(sp) + i])
                    zap_spte(k, first_spte(sp) + i, NULL)
                    if value and sp_level(page) != PG_LEVEL_4K:
                        k.stats.mmu_pde_zapped += 1
        sp = page.hash_next                             # prepared pages stay in the hash
    flush_or_zap(k, &invalid, flush)


cdef bint unprotect_gfn(kvm *k, int as_id, uint64_t gfn) noexcept nogil:
    cdef page_list invalid
    cdef bint found
    list_init(&invalid)
    if k.indirect_shadow_pages == 0:
        return False
    found = zap_pages_of_gfns(k, as_id, gfn, gfn + 1, &invalid) != 0
    commit_zap(k, &invalid)
    return found
