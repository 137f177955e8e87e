"""vCPUs and registers: what Python code decides, which processor models there are and which registers are legal."""

from libc.stdint cimport uint32_t

from kvmmu.embed._structs cimport kvmmu_cpu, kvmmu_memory, kvmmu_registers, kvmmu_vcpu

# KVMMU_CPU_* of a CpuModel
cdef uint32_t flags_of_model(cpu) except? 0
# They take the GIL, the second one only for what `loads_quickly()` does not cover
cdef int c_vcpu_create(kvmmu_memory handle, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept nogil
cdef int c_set_registers(kvmmu_vcpu handle, const kvmmu_registers *registers) noexcept nogil
