"""Processor models, registers and second stages of vCPUs. Python code decides which of them are legal."""

from kvmmu.embed._structs cimport kvmmu_cpu, kvmmu_memory, kvmmu_registers, kvmmu_second_stage, kvmmu_vcpu

# They take the GIL, the second one only for what `loads_quickly()` does not cover
cdef int c_vcpu_create(kvmmu_memory handle, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept nogil
cdef int c_set_registers(kvmmu_vcpu handle, const kvmmu_registers *registers) noexcept nogil
cdef int c_set_second_stage(kvmmu_vcpu handle, const kvmmu_second_stage *stage) noexcept nogil
