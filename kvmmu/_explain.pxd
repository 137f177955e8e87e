"""What is behind a walk, for people."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._format cimport PageFormat
from kvmmu._walk cimport kvm_pagewalk, walk_result

# The entries of a walk as WalkStep objects, root first
cdef list walk_steps(const kvm_pagewalk *w, uint64_t addr, uint32_t access)
# The rule, as one word, behind an error code; behind an EPT violation or a nested page fault
cdef object entry_rule(PageFormat fmt, const walk_result *r, uint64_t error_code, uint32_t access)
cdef object second_stage_rule(PageFormat fmt, const walk_result *r, uint32_t access)
