"""The walk of one address when nothing stands in its way: the short cut of scalar translations.

It succeeds where a walk of one stage reads all entries in the largest slot, finds them present and well formed, may make the
access and has no accessed or dirty bit to set; then it has changed nothing, and the answer is that of `kvm_pagewalk.gva_to_gpa`
in every field. Everything else it leaves to that one. Entries mean what `_gpte.pxd` and `_format.pxd` say, for both.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvmmu._bits cimport (
    ACCESS_WRITE_MASK, GVA_BITS_4_LEVEL, GVA_BITS_5_LEVEL, INVALID_GPA, PERMISSIONS_INDEX_SHIFT, PG_LEVEL_256T, PG_LEVEL_4K,
    PG_LEVEL_512G, PT32_PAE_INDEX_MASK, PT32_PAE_INDEX_SHIFT, PT_PRESENT_MASK, STATUS_OK,
)
from kvmmu._format cimport kvm_page_format, permission_fault
from kvmmu._gpte cimport (
    gpte_access, gpte_index, gpte_pkey, gpte_rights, gpte_to_gpa, guest_walker, guest_walker64, has_pdptrs, is_rsvd_bits_set,
    leaf_gpa, read_gpte,
)
from kvmmu._memory cimport guest_slot
from kvmmu._walk cimport kvm_pagewalk, walk_result

cdef struct plain_walk

ctypedef bint (*plain_walk_fn)(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                               walk_result *r) noexcept nogil

# The short cut of one walk, in that state of its format.
cdef struct plain_walk:
    # Whether it succeeded. IN access: without IMPLICIT. OUT r: every field if it did, else none
    plain_walk_fn gva_to_gpa
    uint64_t rsvd_mask          # what no level allows in an entry that is no large page, and bit 7
    bint four_levels            # the mode that is worth code of its own where it is called

# For a walk that has no short cut, one that never succeeds.
cdef void init_plain_walk(plain_walk *plain, const kvm_pagewalk *w) noexcept nogil


cdef inline bint walk_plainly(const guest_walker *walker, int level, const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva,
                              uint32_t access, walk_result *r) noexcept nogil:
    """IN walker: names the format, points nowhere; level: of the root, a constant, so that the compiler unrolls the loop."""
    cdef const guest_slot *slot = w.mem.slots
    cdef const kvm_page_format *fmt = w.fmt
    cdef uint64_t slot_gpa = slot.gpa, slot_size = slot.size, page_size_mask = w.page_size_mask
    cdef const uint8_t *hva = slot.hva
    cdef uint64_t addr = gva & w.gva_mask if level < PG_LEVEL_512G else gva
    cdef int canonical_shift = 0
    cdef uint64_t pte = w.vcpu.cr3
    cdef uint64_t rights = ~<uint64_t>0, upper = 0
    cdef uint64_t gpa, unset
    cdef uint32_t pte_access
    cdef uint8_t refs = 0
    if level == PG_LEVEL_512G:
        canonical_shift = 64 - GVA_BITS_4_LEVEL
    elif level == PG_LEVEL_256T:
        canonical_shift = 64 - GVA_BITS_5_LEVEL
    if <uint64_t>(<int64_t>(addr << canonical_shift) >> canonical_shift) != addr:
        return False
    if has_pdptrs(walker, level):                                                   # step 1
        pte = w.vcpu.pdptrs[(addr >> PT32_PAE_INDEX_SHIFT) & PT32_PAE_INDEX_MASK]
        if not pte & PT_PRESENT_MASK:
            return False
        level -= 1
    while True:                                                                     # step 2
        gpa = gpte_to_gpa(walker, pte) + gpte_index(walker, addr, level) * sizeof(walker.ptes[0])
        if gpa - slot_gpa >= slot_size:             # whole pages: an aligned entry lies in it if its first byte does
            return False
        pte = read_gpte(walker, hva + (gpa - slot_gpa))
        rights &= gpte_rights(walker, pte)
        refs += 1
        if level == PG_LEVEL_4K or pte & page_size_mask:                            # step 5
            break
        upper |= pte
        level -= 1
    # steps 3 and 4, for all entries: until here a word that is no entry led at worst to another word
    if not rights & PT_PRESENT_MASK or upper & plain.rsvd_mask or is_rsvd_bits_set(walker, fmt, pte, level):
        return False
    pte_access = gpte_access(walker, rights)
    if (fmt.permissions[access >> PERMISSIONS_INDEX_SHIFT] >> pte_access) & 1:              # step 6
        return False
    if w.vcpu.pkru and permission_fault(fmt, w.vcpu.pkru, pte_access, gpte_pkey(walker, pte), access):
        return False                                # a PKRU of 0 denies nothing
    unset = w.accessed_mask & ~rights                                               # step 7
    if access & ACCESS_WRITE_MASK:
        unset |= (w.accessed_mask << 1) & ~pte
    if unset:
        return False
    r.gpa = r.ngpa = leaf_gpa(walker, pte, level, addr, w.pse36_mask)
    r.pte = pte
    r.pte_gpa = gpa
    r.fault_gpa = INVALID_GPA
    r.exit_qualification = 0
    r.error_code = 0
    r.status = STATUS_OK
    r.level = <uint8_t>level
    r.pte_access = <uint8_t>pte_access
    r.refs = refs
    r.hole = False
    return True


cdef inline bint translate_plainly(const plain_walk *plain, const kvm_pagewalk *w, uint64_t gva, uint32_t access,
                                   walk_result *r) noexcept nogil:
    """plain.gva_to_gpa, and no call for 4-level paging."""
    if plain.four_levels:
        return walk_plainly(<const guest_walker64 *>NULL, PG_LEVEL_512G, plain, w, gva, access, r)
    return plain.gva_to_gpa(plain, w, gva, access, r)
