"""What leaves the processor: exits, faults that go to the guest, and accesses that KVM carries out itself."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.machine._state cimport access_result, machine

# Step 5 of an access. IN addr: linear. RET_PF_*, or a negative errno
cdef int handle_exit(machine *m, uint64_t addr, const walk_result *r) noexcept nogil
# The fault that KVM's walk has found: the guest's #PF, or an exit to L1, which the exit at hand tells more of. False: it is
# not there any more
cdef bint take_guest_fault(machine *m, uint64_t addr, const walk_result *exit_, access_result *out) noexcept nogil
cdef void set_fault(access_result *out, const walk_result *r) noexcept nogil
# Whether an instruction that KVM does not expect to write page tables is repeated, now that the frame is not shadowed
cdef bint repeats_write(machine *m, uint64_t addr, uint32_t access, uint64_t exit_addr) noexcept nogil
# Step 6. IN addr: within the linear-address width
cdef void machine_emulate(machine *m, uint64_t addr, uint32_t access, access_result *out) noexcept nogil
# What the processor logged is dirty; its log is empty again
cdef void machine_drain_pml(machine *m) noexcept nogil
