"""Shadow pages: the arena, the hash and the lists that find them, and their parents.

How the pieces are used by a shadow MMU: reserve at the start of a fault (`reserve_pages()`, `reserve_descs()`); look for a page
of (gfn, role) from `hash_first()` on; if there is none, `new_shadow_page()` makes one, hashed and last of `active_mmu_pages`.
`link_parent()` and `unlink_parent()` go with every entry that starts or stops to point to a page. An indirect page of level 3 or
less has frame and rights of each entry (`shadowed_translation`), because its role does not determine them. `free_page()` takes a
page that nothing points to and whose entries are accounted for; it empties them. A TdpMmu uses `alloc_page()`, the lists and
`link_parent()`, and no hash.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    ACC_ALL, PAGE_SHIFT, PT64_INDEX_BITS, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT, ROLE_DIRECT_MASK,
    ROLE_PASSTHROUGH_MASK, SPTE_ENT_PER_PAGE,
)
from kvmmu.memory._memory cimport hash_gfn
from kvmmu.mmu.core._kvm cimport KVM_MMU_HASH_BUCKETS, kvm, kvm_mmu_page, page_list, sp_level


cdef inline uint64_t first_spte(uint32_t sp) noexcept nogil:
    """Return the number of the first entry of a page."""
    return <uint64_t>sp * SPTE_ENT_PER_PAGE


cdef inline void list_init(page_list *pages) noexcept nogil:
    pages.head = pages.tail = 0
    pages.count = 0


cdef inline uint64_t spte_index(uint64_t gfn, int level) noexcept nogil:
    """Return the index of the entry for a frame in a page of this level."""
    return (gfn >> (PT64_INDEX_BITS * (level - 1))) & (SPTE_ENT_PER_PAGE - 1)


cdef inline bint sp_has_gptes(const kvm_mmu_page *sp) noexcept nogil:
    """True if a guest page table stands behind this page."""
    return not sp.role & (ROLE_DIRECT_MASK | ROLE_PASSTHROUGH_MASK)


cdef inline uint64_t sp_get_gfn(const kvm_mmu_page *sp, int index) noexcept nogil:
    """Return the guest frame that an entry of the page maps, or would map."""
    if sp.role & ROLE_PASSTHROUGH_MASK:
        return sp.gfn
    if sp.shadowed_translation is not NULL:
        return sp.shadowed_translation[index] >> PAGE_SHIFT
    return sp.gfn + (<uint64_t>index << (PT64_INDEX_BITS * (sp_level(sp) - 1)))


cdef inline uint32_t sp_get_access(const kvm_mmu_page *sp, int index) noexcept nogil:
    """Return the rights that the guest's tables give an entry of the page."""
    if sp.shadowed_translation is not NULL:
        return <uint32_t>(sp.shadowed_translation[index] & ACC_ALL)
    return <uint32_t>((sp.role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)


cdef inline void sp_set_translation(kvm_mmu_page *sp, int index, uint64_t gfn, uint32_t access) noexcept nogil:
    if sp.shadowed_translation is not NULL:
        sp.shadowed_translation[index] = (gfn << PAGE_SHIFT) | access


cdef inline uint32_t hash_bucket(uint64_t gfn) noexcept nogil:
    return <uint32_t>(hash_gfn(gfn) & (KVM_MMU_HASH_BUCKETS - 1))


cdef inline uint32_t hash_first(const kvm *k, uint64_t gfn) noexcept nogil:
    """Return the first page of the bucket of gfn; go on with `hash_next`, and compare gfn and role: 0 ends."""
    return k.hash[hash_bucket(gfn)]


# Make sure that n pages can be made without growing the arena: 0, or -1 for want of memory or of host-physical addresses
cdef int reserve_pages(kvm *k, size_t n) noexcept nogil
# A page of empty entries, in no list; needs a reserved one
cdef uint32_t alloc_page(kvm *k, uint64_t gfn, uint32_t role) noexcept nogil
cdef void free_page(kvm *k, uint32_t sp) noexcept nogil
# Make every entry empty
cdef void clear_page(kvm *k, uint32_t sp) noexcept nogil
# alloc_page(), hashed and in active_mmu_pages; 0 for want of memory for shadowed_translation
cdef uint32_t new_shadow_page(kvm *k, uint64_t gfn, uint32_t role) noexcept nogil
cdef void unhash_page(kvm *k, uint32_t sp) noexcept nogil
# Undo new_shadow_page()
cdef void forget_new_page(kvm *k, uint32_t sp) noexcept nogil

cdef void list_append(kvm *k, page_list *pages, uint32_t sp) noexcept nogil
cdef void list_remove(kvm *k, page_list *pages, uint32_t sp) noexcept nogil
# The same for possible_nx_huge_pages[kind]; harmless if it is there already, or not there
cdef void track_possible_nx_huge_page(kvm *k, uint32_t sp, int kind) noexcept nogil
cdef void untrack_possible_nx_huge_page(kvm *k, uint32_t sp, int kind) noexcept nogil

cdef void link_parent(kvm *k, uint32_t child, uint64_t sptep) noexcept nogil
cdef void unlink_parent(kvm *k, uint32_t child, uint64_t sptep) noexcept nogil
