"""Exits: their error codes, their handling by KVM, and faults that KVM hands to the guest."""

from libc.stdint cimport uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.machine._state cimport access_result, machine

# Step 5 of an access. IN addr: linear. RET_PF_*, or a negative errno
cdef int handle_exit(machine *m, uint64_t addr, const walk_result *r) noexcept nogil
# The fault that KVM's walk has found: the guest's #PF, or an exit to L1, which the exit at hand tells more of. False: it is
# not there any more
cdef bint take_guest_fault(machine *m, uint64_t addr, const walk_result *exit_, access_result *out) noexcept nogil
cdef void set_fault(access_result *out, const walk_result *r) noexcept nogil
# What the processor logged is dirty; its log is empty again
cdef void machine_drain_pml(machine *m) noexcept nogil
