"""The walk of one address when nothing stands in its way; see `_plain.pxd`. The steps are those listed in `_walk.pxd`."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._bits cimport (
    PG_LEVEL_1G, PG_LEVEL_256T, PG_LEVEL_2M, PG_LEVEL_512G, PT_PAGE_SIZE_MASK, ROLE_DIRECT_MASK, ROLE_HAS_4_BYTE_GPTE_MASK,
)
from kvmmu._gpte cimport guest_walker32, guest_walker64
from kvmmu._plain cimport plain_walk, walk_plainly
from kvmmu._walk cimport kvm_pagewalk, walk_result


cdef bint plain_walk_2_levels(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                              walk_result *r) noexcept nogil:
    return walk_plainly(<const guest_walker32 *>NULL, PG_LEVEL_2M, plain, w, gva, access, r)


cdef bint plain_walk_pae(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                         walk_result *r) noexcept nogil:
    return walk_plainly(<const guest_walker64 *>NULL, PG_LEVEL_1G, plain, w, gva, access, r)


cdef bint plain_walk_4_levels(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                              walk_result *r) noexcept nogil:
    return walk_plainly(<const guest_walker64 *>NULL, PG_LEVEL_512G, plain, w, gva, access, r)


cdef bint plain_walk_5_levels(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                              walk_result *r) noexcept nogil:
    return walk_plainly(<const guest_walker64 *>NULL, PG_LEVEL_256T, plain, w, gva, access, r)


cdef bint no_plain_walk(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                        walk_result *r) noexcept nogil:
    return False


cdef void init_plain_walk(plain_walk *plain, const kvm_pagewalk *w) noexcept nogil:
    cdef int level
    plain.gva_to_gpa = no_plain_walk
    plain.four_levels = False
    plain.rsvd_mask = PT_PAGE_SIZE_MASK
    if w.ngpa is not NULL or w.is_nested or not w.cpu_role or w.cpu_role & ROLE_DIRECT_MASK:
        return
    for level in range(PG_LEVEL_2M if w.level == PG_LEVEL_1G else w.level):         # PAE: PDPTEs were checked when loaded
        plain.rsvd_mask |= w.fmt.rsvd_bits_mask[0][level]
    if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK:
        plain.gva_to_gpa = plain_walk_2_levels
    elif w.level == PG_LEVEL_1G:
        plain.gva_to_gpa = plain_walk_pae
    elif w.level == PG_LEVEL_512G:
        plain.gva_to_gpa = plain_walk_4_levels
        plain.four_levels = True
    elif w.level == PG_LEVEL_256T:
        plain.gva_to_gpa = plain_walk_5_levels
