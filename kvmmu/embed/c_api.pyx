"""The function table of `kvmmu.h`, for `kvmmu_import()` and for those who call it through ctypes, cffi or Numba."""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uintptr_t

from kvmmu.embed._lookups cimport c_get_second_stage, c_lookup, c_record, c_translate_nested
from kvmmu.embed._memories cimport (
    c_memory_add, c_memory_create, c_memory_create_callbacks, c_memory_free, c_memory_remove,
)
from kvmmu.embed._registers cimport c_set_registers, c_set_second_stage, c_vcpu_create
from kvmmu.embed._structs cimport KVMMU_API_VERSION, KVMMU_CAPSULE_NAME, kvmmu_api
from kvmmu.embed._vcpus cimport (
    c_get_registers, c_invalidate, c_translate, c_translate_many, c_vcpu_free, c_vcpu_release,
)

__all__ = ["VERSION", "address", "error_text", "table"]

cdef const char *NO_CODE = "no code of kvmmu"
cdef const char *TEXTS[12]
TEXTS[:] = [
    "no error",
    "a pointer that must not be NULL is NULL",
    "a value is out of range, not aligned, overlaps another one, or has unknown flags",
    "no such memory or vCPU, or it was freed",
    "the vCPU, or one of the memory, belongs to another thread",
    "used by its own callback, or a memory that has vCPUs is freed",
    "the host has no memory left, or there are too many handles",
    "a callback failed, or returned what none may return",
    "the processor refuses these registers (#GP)",
    "the Python interpreter is not running, or raised an exception",
    "compiled for another version of kvmmu, or a structure of unknown size",
    "kvmmu_import() was not called, or failed",
]


cdef const char *c_error_text(int code) noexcept nogil:
    return TEXTS[-code] if -12 < code <= 0 else NO_CODE


cdef kvmmu_api API


cdef void fill(kvmmu_api *api) noexcept:
    api.version, api.size = KVMMU_API_VERSION, sizeof(kvmmu_api)
    api.memory_create, api.memory_create_callbacks = c_memory_create, c_memory_create_callbacks
    api.memory_add, api.memory_remove, api.memory_free = c_memory_add, c_memory_remove, c_memory_free
    api.vcpu_create, api.vcpu_release, api.vcpu_free = c_vcpu_create, c_vcpu_release, c_vcpu_free
    api.set_registers, api.get_registers = c_set_registers, c_get_registers
    api.translate, api.translate_many = c_translate, c_translate_many
    api.lookup, api.record, api.invalidate = c_lookup, c_record, c_invalidate
    api.error_text = c_error_text
    api.set_second_stage, api.get_second_stage, api.translate_nested = c_set_second_stage, c_get_second_stage, c_translate_nested


fill(&API)


def error_text(int code):
    """Return the meaning of a code that a function returned."""
    return c_error_text(code).decode()


# The table lies there for as long as the process runs.
table = PyCapsule_New(&API, KVMMU_CAPSULE_NAME, NULL)
address = <uintptr_t>&API
VERSION = int(KVMMU_API_VERSION)
