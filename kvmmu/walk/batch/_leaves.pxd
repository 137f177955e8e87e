"""May these leaves be used: the last entries of 64 rows of one stage, and their accessed and dirty bits."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport PG_LEVEL_4K
from kvmmu.walk.batch._kernels cimport PSC_BITS, kvmmu_kernels, kvmmu_leaf_block
from kvmmu.walk.batch._psc cimport cached_walk

cdef enum:
    # Of 64 lanes so many or fewer that are not accepted are checked one by one; for more, the whole rule for all 64 is taken.
    # Tuned by hand.
    MAX_REMAINING_IN_BLOCK = 16
    # Tables of last entries up to which these are not prefetched: 384 KiB, a share of a second-level cache. Tuned by hand
    MAX_NEAR_TABLES = 96
    # Tables found from which on most are no longer cached when they are asked for again
    DESCENT_TABLES = 5 << PSC_BITS - 3


cdef inline uint64_t lane_bit(size_t lane) noexcept nogil:
    return <uint64_t>1 << lane


cdef inline bint are_far(const cached_walk *s) noexcept nogil:
    """True if last entries are probably not in the cache of the CPU."""
    return s.found > MAX_NEAR_TABLES


cdef inline bint can_descend(const cached_walk *s) noexcept nogil:
    """True if entries of level 2 tell where most last entries are."""
    return s.descent.care and s.checker.level == PG_LEVEL_4K


# Look up where last entries lie by tables of level 2, as seek_leaves() does
cdef uint64_t descend(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva,
                      bint far) noexcept nogil


cdef inline uint64_t seek_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva,
                                 bint far) noexcept nogil:
    """Look up where the last entries of 64 addresses lie. Returns the lanes that are not cached. IN far: as in
    `kernels/kernels.h`"""
    if s.found <= DESCENT_TABLES or not can_descend(s):
        return kernels.find[s.w.format](l, &s.checker, gva, far)
    return descend(kernels, s, l, gva, far)


# Find where the last entries of 64 addresses lie. OUT l.noncanonical, l.miss, l.accessed_clear. IN wanted: lanes that count;
# far: as in `kernels/kernels.h`
cdef void find_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva, uint64_t wanted,
                      bint far) noexcept nogil
# Make the accept masks of this stage: s.has_masks. False: it has none now. IN gva: one of its addresses
cdef bint make_accept_masks(cached_walk *s, uint64_t gva) noexcept nogil
# Make the accept masks of all walks that are alike: what they accept passes by each of them. IN gva: as above; alike: of batch
cdef bint make_common_masks(cached_walk *s, uint64_t gva, const kvm_pagewalk *walks, const uint32_t *alike,
                            uint64_t count) noexcept nogil
# Check the leaves of 64 lanes. OUT l.fault, l.slow; gpa, of the lanes that are in neither. IN held: lanes that do not count;
# access: of each lane; whole: pte, pte_access and so on of all lanes are wanted
cdef void check_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, uint64_t held, const uint64_t *gva,
                       const uint8_t *access, bint whole, uint64_t *gpa) noexcept nogil
# Set accessed and dirty bits of the leaves of these lanes. Returns the lanes that the scalar walk must take
cdef uint64_t set_bits_of(cached_walk *s, kvmmu_leaf_block *l, uint64_t lanes) noexcept nogil
