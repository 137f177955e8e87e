"""Where the tables of last entries lie, for blocks of lanes: one word for each.

A directory holds the prefixes of one walk that are of one kind: of one level, with the same rights, no accessed bit to set above
them, in tables of guest memory whose addresses in the host have one phase within a page. It says at once where the last
entries of most of 64 addresses are. Lanes it does not know ask the table of prefixes; where many of them do, the directory is
given up for one of their kind.

At level 1 a region is what one prefix covers. At higher levels (large pages, absent tables) it is all that one table covers,
and an entry that turns out to lead to another table is for the prefixes too.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu._bits cimport PAGE_SIZE
from kvmmu._lanes cimport kvmmu_lanes
from kvmmu._prefixes cimport lane_space, sure_passes


# IN s: of init_space(); sure: for its blocks
cdef void init_directory(lane_space *s, sure_passes *sure) noexcept nogil
# Before a block starts.
cdef void ready_directory(lane_space *s) noexcept nogil
# The prefixes of these lanes, which the directory does not know; those that stay unknown are in l.miss afterwards.
cdef void find_missing(lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil
# The prefix that is remembered for this lane, or that is found now; False: unknown
cdef bint find_own(lane_space *s, kvmmu_lanes *l, size_t lane) noexcept nogil
# Lanes that the directory leads to nothing.
cdef uint64_t void_lanes(const kvmmu_lanes *l) noexcept nogil


cdef inline bint is_void(const kvmmu_lanes *l, size_t lane) noexcept nogil:
    return l.voids and l.entry[lane] - l.voids < PAGE_SIZE
