"""One access of one virtual processor: TLB, the processor's walk, exits, and KVM's answers to them.

How it goes (`machine_access`):
    step 1: what was requested of the vCPU: leave obsolete roots, flush the TLB
    step 2: a TLB entry that allows the access is the answer
    step 3: the processor's walk, by the manuals. Two-dimensional paging: guest tables, each reached through the SPTEs, and the
            SPTEs of what they come to. Shadow paging: the SPTEs, which stand for the guest's tables
    step 4: two-dimensional: a fault of the guest's own tables belongs to the guest: the answer
    step 5: an exit: the page-modification log is read; then kvm_mmu_page_fault(). What its walk of the tables that are shadowed
            finds is a fault of the guest: the answer
    step 6: EMULATE: KVM carries the access out with its own walk of the guest's tables: the answer; else step 1 again

The SPTEs are walked by the guest walker, over the host memory that they lie in.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.machine._state cimport access_result, machine

# Where the results of many go.
cdef struct access_columns:
    uint64_t *gpa
    uint64_t *hpa
    uint32_t *error_code
    uint8_t *status
    uint8_t *ret
    uint8_t *exits


cdef void cached_gva_to_gpa(const kvm_pagewalk *w, uint64_t gpa, uint32_t access, bint set_ad, walk_result *r) noexcept nogil
cdef int machine_access(machine *m, uint64_t gva, uint32_t access, access_result *out) noexcept nogil
# All rows, in order: 0, or the negative errno of the row that failed. OUT row: that one
cdef int machine_run(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                     const access_columns *out, size_t *row) noexcept nogil
# Rows from row[0] on, for about so many nanoseconds. OUT row: the next one, or the one that failed
cdef int machine_run_for(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                         const access_columns *out, size_t *row, uint64_t nanoseconds) noexcept nogil
# A write that the processor carried out: its bytes reach memory
cdef void machine_store(machine *m, const access_result *out) noexcept nogil
