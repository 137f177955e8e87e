"""Memories by their handles. Nothing here takes the GIL."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.embed._structs cimport c_memory, kvmmu_callbacks, kvmmu_memory

# The memory of a handle, or NULL. The lock is held
cdef c_memory *find_memory(kvmmu_memory handle) noexcept nogil

cdef int c_memory_create(kvmmu_memory *out) noexcept nogil
cdef int c_memory_create_callbacks(const kvmmu_callbacks *callbacks, kvmmu_memory *out) noexcept nogil
cdef int c_memory_add(kvmmu_memory handle, uint64_t gpa, void *host, uint64_t size, uint32_t flags) noexcept nogil
cdef int c_memory_remove(kvmmu_memory handle, uint64_t gpa) noexcept nogil
cdef int c_memory_free(kvmmu_memory handle) noexcept nogil
