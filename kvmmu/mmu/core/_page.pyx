"""Shadow pages: arena, hash, lists and parents, as `_page.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    PAGE_SIZE, PG_LEVEL_1G, ROLE_DIRECT_MASK, ROLE_LEVEL_MASK, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE,
)
from kvmmu.memory._alloc cimport kvmmu_grow_array
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, page_list
from kvmmu.mmu.core._page cimport first_spte, hash_bucket
from kvmmu.mmu.core._pte_list cimport pte_list_add, pte_list_remove

cdef enum:
    FIRST_PAGES = 64
    LIST_LINKS = 0                  # prev and next
    NX_LINKS = 1                    # nx_prev and nx_next


# ---- the arena ---------------------------------------------------------------------------------------------------------

cdef void clear_page(kvm *k, uint32_t sp) noexcept nogil:
    cdef uint64_t *sptes = &k.sptes[first_spte(sp)]
    cdef int i
    for i in range(SPTE_ENT_PER_PAGE):
        sptes[i] = SHADOW_NONPRESENT_VALUE


cdef int reserve_pages(kvm *k, size_t n) noexcept nogil:
    cdef size_t capacity
    cdef uint64_t *sptes
    cdef kvm_mmu_page *pages
    if k.pages_in_use + n < k.page_capacity:
        return 0
    capacity = max(<size_t>FIRST_PAGES, 2 * k.page_capacity) + n
    if capacity > k.arena_hpa // PAGE_SIZE:             # the upper half of the address space
        return -1
    sptes = <uint64_t *>kvmmu_grow_array(k.sptes, capacity, PAGE_SIZE)
    if sptes is NULL:
        return -1
    k.sptes = sptes
    pages = <kvm_mmu_page *>kvmmu_grow_array(k.pages, capacity, sizeof(kvm_mmu_page))
    if pages is NULL:
        return -1
    k.pages, k.page_capacity = pages, capacity
    if k.page_end == 0:                                 # the dummy root
        memset(&k.pages[0], 0, sizeof(kvm_mmu_page))
        clear_page(k, 0)
        k.page_end = k.pages_in_use = 1
    return 0


cdef uint32_t alloc_page(kvm *k, uint64_t gfn, uint32_t role) noexcept nogil:
    cdef uint32_t sp = k.free_page
    cdef kvm_mmu_page *page
    if sp:
        k.free_page = k.pages[sp].hash_next
    else:
        sp = <uint32_t>k.page_end
        k.page_end += 1
    k.pages_in_use += 1
    page = &k.pages[sp]
    memset(page, 0, sizeof(kvm_mmu_page))
    page.gfn, page.role = gfn, role
    page.in_use = True
    page.mmu_valid_gen = k.mmu_valid_gen
    clear_page(k, sp)
    return sp


cdef void free_page(kvm *k, uint32_t sp) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sp]
    free(page.shadowed_translation)
    memset(page, 0, sizeof(kvm_mmu_page))
    clear_page(k, sp)                                   # whoever still walks it finds nothing
    page.hash_next = k.free_page
    k.free_page = sp
    k.pages_in_use -= 1


# ---- the hash ----------------------------------------------------------------------------------------------------------

cdef uint32_t new_shadow_page(kvm *k, uint64_t gfn, uint32_t role) noexcept nogil:
    cdef uint64_t *translation = NULL
    cdef uint32_t sp, bucket = hash_bucket(gfn)
    if not role & ROLE_DIRECT_MASK and role & ROLE_LEVEL_MASK <= PG_LEVEL_1G:
        translation = <uint64_t *>calloc(SPTE_ENT_PER_PAGE, sizeof(uint64_t))
        if translation is NULL:
            return 0
    sp = alloc_page(k, gfn, role)
    k.pages[sp].shadowed_translation = translation
    k.pages[sp].hash_next = k.hash[bucket]
    k.hash[bucket] = sp
    list_append(k, &k.active_mmu_pages, sp)
    k.n_used_mmu_pages += 1
    return sp


cdef void unhash_page(kvm *k, uint32_t sp) noexcept nogil:
    cdef uint32_t *link = &k.hash[hash_bucket(k.pages[sp].gfn)]
    while link[0]:
        if link[0] == sp:
            link[0] = k.pages[sp].hash_next
            return
        link = &k.pages[link[0]].hash_next


cdef void forget_new_page(kvm *k, uint32_t sp) noexcept nogil:
    unhash_page(k, sp)
    list_remove(k, &k.active_mmu_pages, sp)
    k.n_used_mmu_pages -= 1
    free_page(k, sp)


# ---- lists -------------------------------------------------------------------------------------------------------------

cdef inline uint32_t *link_of(kvm *k, uint32_t sp, int links, bint forward) noexcept nogil:
    """Return the link of a page to the next one of a list, or to the one before."""
    if links == NX_LINKS:
        return &k.pages[sp].nx_next if forward else &k.pages[sp].nx_prev
    return &k.pages[sp].next if forward else &k.pages[sp].prev


cdef inline void append_by(kvm *k, page_list *pages, uint32_t sp, int links) noexcept nogil:
    link_of(k, sp, links, False)[0] = pages.tail
    link_of(k, sp, links, True)[0] = 0
    if pages.tail:
        link_of(k, pages.tail, links, True)[0] = sp
    else:
        pages.head = sp
    pages.tail = sp
    pages.count += 1


cdef inline void remove_by(kvm *k, page_list *pages, uint32_t sp, int links) noexcept nogil:
    cdef uint32_t prev = link_of(k, sp, links, False)[0], next = link_of(k, sp, links, True)[0]
    if prev:
        link_of(k, prev, links, True)[0] = next
    else:
        pages.head = next
    if next:
        link_of(k, next, links, False)[0] = prev
    else:
        pages.tail = prev
    link_of(k, sp, links, False)[0] = link_of(k, sp, links, True)[0] = 0
    pages.count -= 1


cdef void list_append(kvm *k, page_list *pages, uint32_t sp) noexcept nogil:
    append_by(k, pages, sp, LIST_LINKS)


cdef void list_remove(kvm *k, page_list *pages, uint32_t sp) noexcept nogil:
    remove_by(k, pages, sp, LIST_LINKS)


cdef void track_possible_nx_huge_page(kvm *k, uint32_t sp, int kind) noexcept nogil:
    if k.pages[sp].nx_huge_page_disallowed:
        return
    k.pages[sp].nx_huge_page_disallowed = True
    append_by(k, &k.possible_nx_huge_pages[kind], sp, NX_LINKS)
    k.stats.nx_lpage_splits += 1


cdef void untrack_possible_nx_huge_page(kvm *k, uint32_t sp, int kind) noexcept nogil:
    if not k.pages[sp].nx_huge_page_disallowed:
        return
    k.pages[sp].nx_huge_page_disallowed = False
    remove_by(k, &k.possible_nx_huge_pages[kind], sp, NX_LINKS)
    k.stats.nx_lpage_splits -= 1


# ---- parents -----------------------------------------------------------------------------------------------------------

cdef void link_parent(kvm *k, uint32_t child, uint64_t sptep) noexcept nogil:
    pte_list_add(&k.lists, &k.pages[child].parents, sptep)


cdef void unlink_parent(kvm *k, uint32_t child, uint64_t sptep) noexcept nogil:
    pte_list_remove(&k.lists, &k.pages[child].parents, sptep)
