"""vCPUs by their handles, and what is asked of them. Nothing here takes the GIL."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.embed._structs cimport (
    KVMMU_ACCESS_AC, KVMMU_ACCESS_FETCH, KVMMU_ACCESS_IMPLICIT, KVMMU_ACCESS_NO_AD, KVMMU_ACCESS_PROBE,
    KVMMU_ACCESS_SHADOW_STACK, KVMMU_ACCESS_USER, KVMMU_ACCESS_WRITE, c_memory, c_vcpu, kvmmu_registers, kvmmu_result, kvmmu_vcpu,
)

# The accesses that the short cut knows, and those that kvmmu.h knows
cdef enum:
    PLAIN_ACCESS = (KVMMU_ACCESS_WRITE | KVMMU_ACCESS_USER | KVMMU_ACCESS_AC | KVMMU_ACCESS_FETCH | KVMMU_ACCESS_IMPLICIT)
    ANY_ACCESS = PLAIN_ACCESS | KVMMU_ACCESS_SHADOW_STACK | KVMMU_ACCESS_PROBE

# The lock of all memories, and of the tables of handles
cdef void lock_handles() noexcept nogil
cdef void unlock_handles() noexcept nogil
# The next number of a handle. The lock is held
cdef uint64_t new_handle(uint64_t kind, size_t index) noexcept nogil

# The vCPU of a handle, which belongs to this thread now, or NULL and KVMMU_E_*. IN idle: KVMMU_E_BUSY within its callbacks
cdef c_vcpu *own_vcpu(kvmmu_vcpu handle, bint idle, int *code) noexcept nogil
# The same for a function that wants this argument: KVMMU_E_NULL without it
cdef c_vcpu *vcpu_asked(kvmmu_vcpu handle, bint idle, const void *argument, int *code) noexcept nogil
# A free vCPU that belongs to this thread and to nobody else, or NULL. `open_vcpu()` gives it a handle; the lock is held
cdef c_vcpu *take_free_vcpu() noexcept nogil
cdef kvmmu_vcpu open_vcpu(c_vcpu *v) noexcept nogil
# Take all vCPUs of a memory, or none: KVMMU_E_THREAD, KVMMU_E_BUSY. The lock is held. Then give back those that were nobody's
cdef int take_vcpus(const c_memory *memory) noexcept nogil
cdef void give_back_vcpus(const c_memory *memory) noexcept nogil
# Walk the slots of the memory as they are now. The vCPUs are taken, or this one is
cdef void use_slots(const c_memory *memory) noexcept nogil
cdef void use_memory(c_vcpu *v) noexcept nogil
# n words at gpa, which is aligned, and which the second stage translates: 1 if all are memory, 0 if not, or KVMMU_E_*
cdef int read_words(c_vcpu *v, uint64_t gpa, uint64_t *words, int n) noexcept nogil

# Begin and end what may run callbacks: KVMMU_E_BUSY
cdef int enter(c_vcpu *v) noexcept nogil
cdef void leave(c_vcpu *v) noexcept nogil
# Read what a walk missed: 1 if the walk is to be repeated, 0 if it is complete, or KVMMU_E_*. IN attempt: number of that walk
cdef int fetch_again(c_vcpu *v, int attempt) noexcept nogil
# Walk for an access that has passed `is_access()`: KVMMU_E_*. OUT r: every field
cdef int walk_row(c_vcpu *v, uint64_t gva, uint32_t access, walk_result *r) noexcept nogil


cdef inline bint is_plain_access(uint32_t access) noexcept nogil:
    return not access & ~<uint32_t>(PLAIN_ACCESS | KVMMU_ACCESS_NO_AD)


cdef inline bint is_access(uint32_t access) noexcept nogil:
    return not access & ~<uint32_t>(ANY_ACCESS | KVMMU_ACCESS_NO_AD)


cdef int c_vcpu_release(kvmmu_vcpu handle) noexcept nogil
cdef int c_vcpu_free(kvmmu_vcpu handle) noexcept nogil
cdef int c_get_registers(kvmmu_vcpu handle, kvmmu_registers *out) noexcept nogil
cdef int c_translate(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil
cdef int c_translate_many(kvmmu_vcpu handle, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                          kvmmu_result *out, size_t *done) noexcept nogil
cdef int c_invalidate(kvmmu_vcpu handle, uint64_t gpa, uint64_t size) noexcept nogil
