"""Translate from a function that Numba compiles: it calls the function table of kvmmu.h without Python in between."""

import ctypes

import numpy as np
from numba import njit
from walk_ctypes import Registers, load

api = load()
# Numba passes integers and addresses: an array's address is its ctypes.data.
translate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)(
    ctypes.cast(api.translate, ctypes.c_void_p).value)
RESULT = np.dtype([("gpa", np.uint64), ("error_code", np.uint32), ("status", np.uint8), ("level", np.uint8),
                   ("reserved", np.uint16)])


@njit
def count_mapped(vcpu, first, pages, result):
    """Return how many of the pages from `first` on user code may read. IN result: one RESULT to be written to."""
    found = 0
    for i in range(pages):
        if translate(vcpu, first + 4096 * i, 4, result.ctypes) == 0 and result[0].status == 0:
            found += 1
    return found


def main():
    ram = np.zeros(1 << 17, np.uint64)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3010, 0x6007), (0x6000, 0x4067), (0x6008, 0x5005)):
        ram[gpa // 8] = entry
    memory, vcpu = ctypes.c_uint64(), ctypes.c_uint64()
    registers = Registers(size=ctypes.sizeof(Registers), cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00, rflags=2)
    assert api.memory_create(ctypes.byref(memory)) == 0
    assert api.memory_add(memory, 0, ram.ctypes.data, ram.nbytes, 0) == 0
    assert api.vcpu_create(memory, None, ctypes.byref(vcpu)) == 0
    assert api.set_registers(vcpu, ctypes.byref(registers)) == 0
    found = count_mapped(np.uint64(vcpu.value), np.uint64(0x400000), 512, np.zeros(1, RESULT))
    print(f"{found} of 512 pages are mapped for user code")
    assert api.vcpu_free(vcpu) == 0
    assert api.memory_free(memory) == 0


if __name__ == "__main__":
    main()
