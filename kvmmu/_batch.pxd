"""The walk over arrays: the same answers as one call per row."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

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

# IN walks: one, or one per context; ctx: NULL, or the context of each row (checked by the caller); access: one value
# (access_stride 0) or one per row (access_stride 1).
cdef void translate_rows(const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         size_t access_stride, size_t start, size_t stop, bint set_ad, const batch_columns *out) noexcept nogil


cdef class Job:
    """One batch, so that threads can run parts of it."""
    cdef object arrays                  # these two keep alive what the pointers point to
    cdef object alive
    cdef const kvm_pagewalk *walks
    cdef const uint32_t *ctx
    cdef const uint64_t *gva
    cdef const uint8_t *access
    cdef size_t access_stride
    cdef batch_columns columns
    cdef bint set_ad
