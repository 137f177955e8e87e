"""Translate through the function table of kvmmu.h with ctypes: no compiler, one call for each address."""

import ctypes

import kvmmu.embed.c_api


class Registers(ctypes.Structure):
    """kvmmu_registers."""

    _fields_ = [("size", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                *((name, ctypes.c_uint64) for name in ("cr0", "cr3", "cr4", "efer", "rflags")),
                ("pdptrs", ctypes.c_uint64 * 4), ("pkru", ctypes.c_uint32), ("pkrs", ctypes.c_uint32)]


class Result(ctypes.Structure):
    """kvmmu_result."""

    _fields_ = [("gpa", ctypes.c_uint64), ("error_code", ctypes.c_uint32), ("status", ctypes.c_uint8), ("level", ctypes.c_uint8),
                ("reserved", ctypes.c_uint16)]


class SecondStage(ctypes.Structure):
    """kvmmu_second_stage."""

    _fields_ = [("size", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                *((name, ctypes.c_uint64) for name in ("root", "cr4", "efer", "spptp", "ve_area", "pml_address")),
                ("pml_index", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]


class NestedResult(ctypes.Structure):
    """kvmmu_nested_result."""

    _fields_ = [*((name, ctypes.c_uint64) for name in ("gpa", "ngpa", "linear", "pte", "pte_gpa", "fault_gpa",
                                                       "exit_qualification")),
                ("error_code", ctypes.c_uint32), ("exit_reason", ctypes.c_uint32),
                *((name, ctypes.c_uint8) for name in ("status", "level", "rights", "reads")), ("reserved", ctypes.c_uint8 * 4)]


HANDLE, WORD, FLAGS, POINTER = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
CODE = ctypes.c_int
FUNCTIONS = {                               # in the order of kvmmu_api; ctypes lets go of the GIL in each call
    "memory_create": (CODE, POINTER), "memory_create_callbacks": (CODE, POINTER, POINTER),
    "memory_add": (CODE, HANDLE, WORD, POINTER, WORD, FLAGS), "memory_remove": (CODE, HANDLE, WORD),
    "memory_free": (CODE, HANDLE),
    "vcpu_create": (CODE, HANDLE, POINTER, POINTER), "vcpu_release": (CODE, HANDLE), "vcpu_free": (CODE, HANDLE),
    "set_registers": (CODE, HANDLE, POINTER), "get_registers": (CODE, HANDLE, POINTER),
    "translate": (CODE, HANDLE, WORD, FLAGS, POINTER),
    "translate_many": (CODE, HANDLE, ctypes.c_size_t, POINTER, POINTER, FLAGS, POINTER, POINTER),
    "lookup": (CODE, HANDLE, WORD, FLAGS, POINTER), "record": (CODE, HANDLE, WORD, FLAGS, POINTER),
    "invalidate": (CODE, HANDLE, WORD, WORD), "error_text": (ctypes.c_char_p, CODE),
    "set_second_stage": (CODE, HANDLE, POINTER), "get_second_stage": (CODE, HANDLE, POINTER),
    "translate_nested": (CODE, HANDLE, WORD, FLAGS, POINTER)}


class Api(ctypes.Structure):
    """kvmmu_api."""

    _fields_ = [("version", ctypes.c_uint32), ("size", ctypes.c_uint32),
                *((name, ctypes.CFUNCTYPE(*types)) for name, types in FUNCTIONS.items())]


def load():
    """Return the table of functions."""
    api = Api.from_address(kvmmu.embed.c_api.address)
    if api.version >> 16 != 1 or api.size < ctypes.sizeof(Api):
        raise ImportError(f"kvmmu has version {api.version:#x} of its function table, this program is for 1.1")
    return api


def main():
    api = load()

    def check(code):
        if code:
            raise RuntimeError(api.error_text(code).decode())

    ram = (ctypes.c_uint64 * (1 << 17))()
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3010, 0x6007), (0x6000, 0x4067), (0x6008, 0x5005)):
        ram[gpa // 8] = entry
    memory, vcpu = ctypes.c_uint64(), ctypes.c_uint64()
    check(api.memory_create(ctypes.byref(memory)))
    check(api.memory_add(memory, 0, ram, ctypes.sizeof(ram), 0))
    check(api.vcpu_create(memory, None, ctypes.byref(vcpu)))
    registers = Registers(size=ctypes.sizeof(Registers), cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00, rflags=2)
    check(api.set_registers(vcpu, ctypes.byref(registers)))
    result = Result()
    for gva, access in ((0x400123, 0), (0x401123, 6)):
        check(api.translate(vcpu, gva, access, ctypes.byref(result)))
        print(f"{gva:#x} -> {result.gpa:#x}" if result.status == 0 else
              f"{gva:#x} -> status {result.status}, error code {result.error_code:#x}")
    check(api.vcpu_free(vcpu))
    check(api.memory_free(memory))


if __name__ == "__main__":
    main()
