"""vCPUs and registers: what Python code decides, which processor models there are and which registers are legal."""

from kvmmu.embed._structs cimport kvmmu_cpu, kvmmu_memory, kvmmu_registers, kvmmu_vcpu

# They take the GIL, the second one only for what `loads_quickly()` does not cover
cdef int c_vcpu_create(kvmmu_memory handle, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept nogil
cdef int c_set_registers(kvmmu_vcpu handle, const kvmmu_registers *registers) noexcept nogil
