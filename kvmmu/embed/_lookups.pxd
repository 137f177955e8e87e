"""Look-ups, records of walks, and the second stage in force. Nothing here takes the GIL."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.embed._structs cimport kvmmu_mapping, kvmmu_nested_result, kvmmu_record, kvmmu_second_stage, kvmmu_vcpu

cdef int c_get_second_stage(kvmmu_vcpu handle, kvmmu_second_stage *out) noexcept nogil
cdef int c_translate_nested(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_nested_result *out) noexcept nogil
cdef int c_lookup(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_mapping *out) noexcept nogil
cdef int c_record(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_record *out) noexcept nogil
