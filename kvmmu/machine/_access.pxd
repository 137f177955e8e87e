"""One access of one virtual processor: TLB, the processor's walk, exits, and KVM's answers to them.

The steps of `machine_access()`:
    step 1: serve the requests to the vCPU: leave obsolete roots, flush the TLB
    step 2: a TLB entry that allows the access is the answer
    step 3: the processor's walk, by the manuals. Two-dimensional paging: guest tables, each reached through the SPTEs, and the
            SPTEs of the resulting address. Shadow paging: the SPTEs, which shadow the guest's tables
    step 4: two-dimensional: a fault of the guest's own tables belongs to the guest: the answer
    step 5: an exit: the page-modification log is read; then kvm_mmu_page_fault(). If its walk of the shadowed tables finds a
            fault of the guest, that is the answer
    step 6: EMULATE: KVM carries the access out with its own walk of the guest's tables: the answer; else step 1 again

The SPTEs are walked by the guest walker, over the host memory that they lie in.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.machine._state cimport access_result, machine

# The columns that the results of many accesses go to.
cdef struct access_columns:
    uint64_t *gpa
    uint64_t *hpa
    uint32_t *error_code
    uint8_t *status
    uint8_t *ret
    uint8_t *exits


# gva_to_gpa of a cached_stage
cdef void cached_gva_to_gpa(const kvm_pagewalk *w, uint64_t gpa, uint32_t access, bint set_ad, walk_result *r) noexcept nogil
# One access: 0, or a negative errno
cdef int machine_access(machine *m, uint64_t gva, uint32_t access, access_result *out) noexcept nogil
# Access all rows in order: 0, or the negative errno of the row that failed. OUT row: that one
cdef int machine_run(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                     const access_columns *out, size_t *row) noexcept nogil
# The same where addresses have tags, or some accesses are to shadow stacks, which no TLB entry allows
cdef int machine_run_each(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                          const access_columns *out, size_t *row) noexcept nogil
# Return the address of an access without its tag. IN access: with IMPLICIT
cdef uint64_t machine_linear_address(const machine *m, uint64_t gva, uint32_t access) noexcept nogil
# Access rows from row[0] on, for about so many nanoseconds. IN each: by machine_run_each(). OUT row: the next one, or the one
# that failed
cdef int machine_run_for(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                         const access_columns *out, size_t *row, bint each, uint64_t nanoseconds) noexcept nogil
# Write the bytes of an access to memory, if the processor carried it out
cdef void machine_store(machine *m, const access_result *out) noexcept nogil
