"""The fast path of scalar translations: the walk of one address that needs no update and does not fault.

It repeats steps 2 to 6 of the walk (`_walk.pxd`), and the question of step 7, as an AND and an OR over all entries. It succeeds
where a walk of one stage reads all entries in the largest slot, finds them present and well formed, may make the access and has
no accessed or dirty bit to set; then it has changed nothing, and the answer is that of `kvm_pagewalk.gva_to_gpa`. Everything
else is left to that one. The walk itself is C (`_fast.h`); `_gpte.h` and `_format.h` say for both what entries mean.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, vcpu_arch
from kvmmu.arch._bits cimport PG_LEVEL_512G
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.arch._gpte cimport KVMMU_FORMAT_64
from kvmmu.arch._linear cimport kvmmu_linear_rules
from kvmmu.memory._memory cimport guest_mem

cdef extern from "kvmmu/walk/_fast.h" nogil:
    enum:
        KVMMU_FAST_ACCESSES

    cdef struct kvmmu_fast_access:
        uint64_t mask
        uint64_t wanted
        uint64_t upper_denied
        uint64_t leaf_wanted
        uint64_t leaf_mask[4]

    cdef struct kvmmu_fast_tables:
        const uint8_t *hva
        uint64_t slot_gpa
        uint64_t slot_size
        uint64_t page_size_mask
        uint64_t pse36_mask
        uint64_t gva_mask
        uint64_t pdpte_rsvd_mask
        const kvm_page_format *fmt
        kvmmu_linear_rules linear
        kvmmu_fast_access accesses[32]

    cdef struct kvmmu_translation:
        uint64_t gpa
        uint32_t error_code
        uint8_t status
        uint8_t level

    kvmmu_translation kvmmu_fast_walk(int format, int root, const kvmmu_fast_tables *p, uint64_t pte, uint64_t keys,
                                      uint64_t addr,
                                      uint32_t access)

ctypedef kvmmu_translation (*fast_walk_fn)(const kvmmu_fast_tables *p, const vcpu_arch *arch, uint64_t gva,
                                           uint32_t access) noexcept nogil

# The short cut of one walk, in this state of its format and of its memory.
cdef struct fast_walk:
    kvmmu_fast_tables p
    fast_walk_fn gva_to_gpa
    bint four_levels            # the mode that is worth code of its own where it is called

# For a walk that has no short cut, one that never succeeds. IN w: mem may be NULL, until use_fast_memory().
cdef void init_fast_walk(fast_walk *fast, const kvm_pagewalk *w) noexcept nogil
cdef void use_fast_memory(fast_walk *fast, const guest_mem *mem) noexcept nogil


cdef inline kvmmu_translation translate_fast(const fast_walk *fast, const vcpu_arch *arch, uint64_t gva,
                                             uint32_t access) noexcept nogil:
    """Return the translation; a gpa of INVALID_GPA where the short cut does not succeed. IN access: of ACCESS_PLAIN_MASK."""
    if fast.four_levels:
        return kvmmu_fast_walk(KVMMU_FORMAT_64, PG_LEVEL_512G, &fast.p, arch.cr3, arch.keys, gva, access)
    return fast.gva_to_gpa(&fast.p, arch, gva, access)
