"""The walk over arrays: the same answers as one call per row."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._lanes cimport kvmmu_lane_ops, kvmmu_lanes, kvmmu_prefix, kvmmu_tlb_entry
from kvmmu._prefixes cimport WalkCache, lane_space, sure_passes
from kvmmu._walk cimport kvm_pagewalk

# Columns of a batch; a NULL column is not wanted.
cdef struct batch_columns:
    uint64_t *gpa
    uint8_t *status
    uint32_t *error_code
    uint8_t *level
    uint64_t *pte
    uint64_t *pte_gpa
    uint8_t *pte_access
    uint8_t *refs
    uint64_t *ngpa
    uint64_t *fault_gpa
    uint64_t *exit_qualification

cdef struct walk_spaces:
    const kvm_pagewalk *w
    lane_space first
    lane_space second

# Up to 64 rows of one walk on their way: first stage in a, second stage in b.
cdef struct block:
    walk_spaces *spaces
    const kvm_pagewalk *w           # NULL: free
    size_t count
    bint contiguous                 # the rows are base, base + 1, ...
    size_t base
    bint halfway                    # the first stage is done
    uint64_t held                   # lanes whose row was written already, or that hold no row
    # of the first stage:
    uint64_t failed                 # lanes that fault
    uint64_t unknown                # lanes that the scalar walk must take
    uint64_t cold                   # lanes that set accessed or dirty bits after the second stage
    size_t rows[64]                 # where they are not
    const uint64_t *gva             # 64 of each: the caller's own, or
    const uint8_t *access
    uint64_t own_gva[64]
    uint8_t own_access[64]
    uint8_t second_access[64]
    kvmmu_lanes a
    kvmmu_lanes b

# One batch, or a thread's part of it. IN walks: one, or one per context; ctx: NULL, or the context of each row (checked by
# the caller); access: one value (access_stride 0) or one per row (access_stride 1).
cdef struct batch:
    const kvm_pagewalk *walks
    const uint32_t *ctx
    const uint64_t *gva
    const uint8_t *access
    size_t access_stride
    bint set_ad
    const batch_columns *out
    # filled by begin_batch()
    bint more                       # a column beside gpa, status and error_code is wanted
    bint lanes                      # False: row by row
    bint recalls                    # translations are remembered
    size_t skip                     # chunks to go before trying again whether that helps
    size_t patience
    size_t tried, missed
    uint32_t asid                   # of the first walk's prefixes; then the second stages'
    uint32_t space                  # of the first walk's translations
    uint64_t count                  # walks
    const kvmmu_lane_ops *ops
    kvmmu_prefix *prefixes
    kvmmu_tlb_entry *tlb
    block *blocks                   # 3
    walk_spaces *spaces             # of the walks of late
    size_t last_space
    sure_passes *sure               # 2: of the first stage, of the second
    size_t turn

# Get ready: IN count: of walks. Nothing that earlier batches remembered counts.
cdef void begin_batch(batch *b, WalkCache cache, uint64_t count, size_t rows) noexcept nogil
cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil


cdef class Job:
    """One batch, so that threads can run parts of it."""
    cdef object arrays                  # these two keep alive what the pointers point to
    cdef object alive
    cdef batch whole
    cdef uint64_t count
    cdef batch_columns columns
