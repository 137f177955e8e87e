"""Lists of SPTEs: the reverse map of a guest frame, and the parents of a shadow page.

An SPTE is named by its number: shadow page * 512 + index (`sptep`). A list is one word, its head: 0 is empty; an even head
holds a single SPTE; an odd one names a chain of descriptors with PTE_LIST_EXT entries each. Order is that of insertion, as
far as removals let it be: the last entry takes the place of the one that goes.

`_rmap` has such a head for each (slot, gfn, level), over the leaf SPTEs that map the frame; `kvm_mmu_page.parents` is one over
the entries that point to the page. To visit a list that the visit changes, take `pte_list_first()` until it is empty; otherwise
`pte_list_get()` by number.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PTE_LIST_EXT = 14

cdef struct pte_list_desc:
    uint32_t next                   # descriptor after this one; 0: none
    uint32_t count
    uint64_t sptes[14]

# All descriptors of one virtual machine.
cdef struct pte_list_pool:
    pte_list_desc *descs            # [0] is not used
    size_t count
    size_t capacity
    uint32_t free                   # first of the free ones


cdef void free_pool(pte_list_pool *pool) noexcept nogil
# Make sure that n additions need no memory: 0, or -1
cdef int reserve_descs(pte_list_pool *pool, size_t n) noexcept nogil
# Append an entry; returns how many entries the list had. Needs one reserved descriptor
cdef size_t pte_list_add(pte_list_pool *pool, uint64_t *head, uint64_t sptep) noexcept nogil
# True if it was there
cdef bint pte_list_remove(pte_list_pool *pool, uint64_t *head, uint64_t sptep) noexcept nogil
cdef size_t pte_list_count(const pte_list_pool *pool, uint64_t head) noexcept nogil
# IN i: below the count
cdef uint64_t pte_list_get(const pte_list_pool *pool, uint64_t head, size_t i) noexcept nogil


cdef inline uint64_t pte_list_first(const pte_list_pool *pool, uint64_t head) noexcept nogil:
    """The first entry of a list that is not empty."""
    return pte_list_get(pool, head, 0)
