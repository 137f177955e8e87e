"""The rules of last entries, for a block of lanes, and their accessed and dirty bits."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu._lanes cimport kvmmu_lane_ops, kvmmu_lanes
from kvmmu._prefixes cimport lane_space

# Of 64 lanes so many or fewer that are not like the others are dealt with one after the other.
cdef enum:
    FEW_ODD = 16


cdef inline uint64_t lane_bit(size_t lane) noexcept nogil:
    return <uint64_t>1 << lane


# OUT l.fault, l.slow; gpa, of the lanes that are in neither. IN held: lanes that do not count; access: of each lane;
# whole: pte, pte_access and so on of all lanes are wanted.
cdef void judge_block(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t held, const uint8_t *access,
                      bint whole, uint64_t *gpa) noexcept nogil
# Set the bits of the leaves of these lanes. Returns the lanes that the scalar walk must take.
cdef uint64_t set_bits_of(lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil
