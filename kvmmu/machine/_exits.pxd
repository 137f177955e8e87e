"""Exits: their error codes, their handling by KVM, and faults that KVM hands to the guest."""

from libc.stdint cimport uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.machine._state cimport access_result, machine

# Do step 5 of an access: RET_PF_*, or a negative errno. IN addr: linear
cdef int handle_exit(machine *m, uint64_t addr, const walk_result *r) noexcept nogil
# Set the fault that KVM's walk has found: the guest's #PF, or an exit to L1, with details of the exit under way. False: the
# walk does not fault any more
cdef bint take_guest_fault(machine *m, uint64_t addr, const walk_result *exit_, access_result *out) noexcept nogil
cdef void set_fault(access_result *out, const walk_result *r) noexcept nogil
# Enter what the processor logged in the dirty log; its log is empty then
cdef void machine_drain_pml(machine *m) noexcept nogil
