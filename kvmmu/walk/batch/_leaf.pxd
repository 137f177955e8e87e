"""Blocks of lanes, one stage: where the last entries lie, what they say, and their accessed and dirty bits."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport ROLE_CR4_SMEP_MASK
from kvmmu.walk.batch._lanes cimport kvmmu_kernels, kvmmu_leaf_block
from kvmmu.walk.batch._psc cimport cached_walk

# Of 64 lanes so many or fewer that are not like the others are dealt with one after the other.
cdef enum:
    MAX_REMAINING_IN_BLOCK = 16


cdef inline uint64_t lane_bit(size_t lane) noexcept nogil:
    return <uint64_t>1 << lane


# Where the last entries of 64 addresses lie. OUT l.noncanonical, l.miss, l.accessed_clear. IN wanted: lanes that count; far:
# as in _lanes.h
cdef void find_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva, uint64_t wanted,
                      bint far) noexcept nogil
# Learn what surely passes in this stage: s.has_masks. False: it cannot be known now. IN gva: one of its addresses
cdef bint make_accept_masks(cached_walk *s, uint64_t gva) noexcept nogil
# OUT l.fault, l.slow; gpa, of the lanes that are in neither. IN held: lanes that do not count; access: of each lane;
# whole: pte, pte_access and so on of all lanes are wanted.
cdef void check_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, uint64_t held, const uint64_t *gva,
                       const uint8_t *access, bint whole, uint64_t *gpa) noexcept nogil
# Step 7 of the walk for an address with nothing else to set than bits of its leaf. False: not so, or the race is lost.
# IN entry: address of the leaf in the host; pte: what it was; access_info: of the access
cdef bint set_leaf_bits(const cached_walk *s, uint64_t psce, uint64_t entry, uint64_t pte, uint64_t access_info) noexcept nogil
# Set the bits of the leaves of these lanes. Returns the lanes that the scalar walk must take.
cdef uint64_t set_bits_of(cached_walk *s, kvmmu_leaf_block *l, uint64_t lanes) noexcept nogil


cdef inline bint rights_count(const kvm_pagewalk *n) noexcept nogil:
    """Whether rights of the first stage decide what this second one grants: MBEC."""
    return n.user_by_pte and n.cpu_role & ROLE_CR4_SMEP_MASK
