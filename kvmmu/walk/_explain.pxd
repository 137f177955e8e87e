"""Records and faults of a walk, for people."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.walk._register_sets cimport WalkCopy

# These need the table of slots that the walk is over kept as long as they run. IN access: EFLAGS.AC added.
# The whole walk of an address, as a WalkRecord
cdef object record_of(WalkCopy walk, uint64_t addr, uint32_t access)
# The exception behind a result
cdef object fault_behind(WalkCopy walk, const walk_result *r, uint64_t addr, uint32_t access)
# The rule behind a fault, as one word
cdef object rule_of(WalkCopy walk, const walk_result *r, uint32_t access)
