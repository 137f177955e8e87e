"""Recorded page faults held against the walk, and counted by code."""

from libc.stdint cimport uint8_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk

cdef enum:
    FAULT_CODES = 512               # that are counted: all that a walk can reproduce, and more

# Recorded faults of one code.
cdef struct fault_count:
    uint8_t op                      # OP_PAGE_FAULT or OP_NPT_FAULT
    uint64_t code                   # error code or EXITINFO1
    uint64_t count

cdef struct fault_counts:
    fault_count of_code[FAULT_CODES]

# True if an access to gva faults with this error code, as far as the code tells of the access. No accessed bits are stored
cdef bint reproduces_page_fault(const kvm_pagewalk *w, uint64_t gva, uint64_t code) noexcept nogil
# True if the NPT n faults with this EXITINFO1 and EXITINFO2. No accessed bits are stored
cdef bint reproduces_npt_fault(const kvm_pagewalk *n, uint64_t gpa, uint64_t info) noexcept nogil
# Count a fault; False if there is no room for its code
cdef bint count_fault(fault_counts *counts, int op, uint64_t code) noexcept nogil
# Return the counts that are not 0 by (op, code)
cdef dict faults_found(fault_counts *faults)
# Take up counts that faults_found() returned
cdef int restore_faults(fault_counts *faults, counts) except -1
