"""Faults of the guest in an access, as exceptions with the last entry of the walk that failed."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.machine._state cimport access_result
from kvmmu.walk.pagewalk cimport PageWalk

# The exception for an access that ended so, not raised. The processor walks by the manuals, KVM by its own rules: the walk is
# made by the rules of the processor model, and by the other ones if it ends otherwise (see `CpuModel.conformance`). IN
# gva_walk: of the vCPU; access: EFLAGS.AC added
cdef object fault_of_access(PageWalk gva_walk, uint64_t gva, uint32_t access, const access_result *out)
