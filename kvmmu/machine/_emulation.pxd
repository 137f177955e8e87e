"""Accesses that KVM carries out itself, by its own walk of the guest's tables."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.machine._state cimport access_result, machine

# Step 6 of an access. IN addr: within the linear-address width
cdef void machine_emulate(machine *m, uint64_t addr, uint32_t access, access_result *out) noexcept nogil
# True if an instruction that KVM does not expect to write page tables is repeated, now that the frame is not shadowed
cdef bint repeats_write(machine *m, uint64_t addr, uint32_t access, uint64_t exit_addr) noexcept nogil
