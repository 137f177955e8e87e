"""Processor models and second stages of a C program, as the Python objects that have their rules."""

from kvmmu.embed._structs cimport kvmmu_cpu, kvmmu_second_stage

# KVMMU_E_* where a structure cannot be one of its kind. OUT known: all of it, with what its version had not; NULL: the defaults
cdef int read_cpu(const kvmmu_cpu *cpu, kvmmu_cpu *known) noexcept nogil
cdef int check_stage(const kvmmu_second_stage *stage) noexcept nogil
# A CpuModel as a structure, and the other way round. ValueError: features of another vendor
cdef int fill_cpu(kvmmu_cpu *cpu, model) except -1
cdef object model_of(const kvmmu_cpu *cpu)
# The Ept or Npt. ValueError: VM entry refuses it
cdef object stage_of(const kvmmu_second_stage *stage)
