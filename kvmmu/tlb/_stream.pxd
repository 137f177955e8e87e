"""Blocks of translated accesses that go through several TLB hierarchies, as they come out of a replay.

A block is told in three steps: `stream_begin()` with its rows, `stream_insert()` with the rows of next pages that some of them
reach into, and `stream_run()`. Rows of different vCPUs ask different levels; each vCPU's rows keep their order.

Under two-dimensional paging a page walk translates the guest-physical address of each guest entry that it reads, and that of the
access. These translations ask the nested levels of a hierarchy, each of which has a host walk behind it.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.tlb._levels cimport tlb_levels

cdef enum:
    STREAM_ROWS = 8192                  # of a block
    STREAM_BUFFER = 16384               # with the next pages of all of them
    MOST_WALK_REFS = 40                 # of both stages; 35 on 5 levels over 5

cdef struct stream_hierarchy:
    tlb_levels **levels                 # by vCPU
    tlb_levels **nested                 # by vCPU, or NULL: one stage
    uint8_t host_leaf                   # level of the host's pages
    uint64_t walks_by_refs[MOST_WALK_REFS]      # of both stages

cdef struct tlb_stream:
    size_t hierarchies, vcpus
    stream_hierarchy *each
    uint8_t *has_global                 # by vCPU: CR4.PGE
    bint any_global, two_stages
    size_t rows
    const uint64_t *gva                 # of the block; from here on the caller's, or those below
    const uint8_t *access
    const uint64_t *gpa
    const uint64_t *ip                  # of the chunk, or NULL
    const uint64_t *block_ip            # of the block
    uint64_t *pte                       # STREAM_ROWS, for the caller to have the leaf entries written to
    # STREAM_BUFFER each; of a block
    uint64_t *own_gva
    uint64_t *own_gpa
    uint64_t *own_ip
    uint8_t *own_access
    uint8_t *leaf
    uint8_t *is_global
    # of the rows of one vCPU
    uint64_t *part_gva
    uint64_t *part_gpa
    uint64_t *part_ip
    uint8_t *part_access
    uint8_t *part_leaf
    uint8_t *part_global
    # of the levels
    uint8_t *found
    uint8_t *references
    # of two stages: guest-physical addresses that walks translate
    uint64_t *host_addr                 # 6 per row
    uint8_t *host_references
    uint32_t *host_stop                 # by row: behind its last address
    void *memory                        # that all of these lie in

cdef class TlbStream:
    cdef tlb_stream s
    cdef list owners                    # of the levels
    cdef const uint64_t[::1] chunk_ip
    cdef int make_buffers(self) except -1

# IN status: NULL if every row has a translation; first: its number in the chunk
cdef void stream_begin(tlb_stream *s, const uint64_t *gva, const uint8_t *access, const uint64_t *gpa, const uint8_t *level,
                       const uint8_t *status, size_t first, size_t n) noexcept nogil
# Copy the rows: from here on the caller may change the arrays that stream_begin() was told
cdef void stream_hold(tlb_stream *s) noexcept nogil
# Rows of next pages. IN row: by which row of the block each is made, ascending
cdef void stream_insert(tlb_stream *s, const uint32_t *row, const uint64_t *gva, const uint8_t *access, const uint64_t *gpa,
                        const uint8_t *level, const uint8_t *status, size_t n) noexcept nogil
# IN walks: one per register set; sets: the set of each vCPU; vcpu: of each row that stream_begin() was told, or NULL
cdef void stream_run(tlb_stream *s, const kvm_pagewalk *walks, const uint32_t *sets, const uint32_t *vcpu) noexcept nogil
