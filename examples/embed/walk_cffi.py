"""Translate through kvmmu.h with cffi: a C function of one's own that loops over addresses, compiled when the script runs."""

import importlib.util
import sys
import tempfile

import cffi
import numpy as np

import kvmmu
import kvmmu.embed.c_api

builder = cffi.FFI()
builder.cdef("""
    typedef struct { uint32_t size, flags; uint64_t cr0, cr3, cr4, efer, rflags; uint64_t pdptrs[4]; uint32_t pkru, reserved; }
        kvmmu_registers;
    typedef struct { uint64_t gpa; uint32_t error_code; uint8_t status, level; uint16_t reserved; } kvmmu_result;
    int use_table(uintptr_t address);
    int kvmmu_memory_create(uint64_t *out);
    int kvmmu_memory_add(uint64_t memory, uint64_t gpa, void *host, uint64_t size, uint32_t flags);
    int kvmmu_memory_free(uint64_t memory);
    int kvmmu_vcpu_create(uint64_t memory, const void *cpu, uint64_t *out);
    int kvmmu_vcpu_free(uint64_t vcpu);
    int kvmmu_set_registers(uint64_t vcpu, const kvmmu_registers *registers);
    uint64_t count_mapped(uint64_t vcpu, uint64_t first, uint64_t pages);
""")
builder.set_source("walk_with_kvmmu", """
    #include <kvmmu/kvmmu.h>

    static int use_table(uintptr_t address)
    {
        return kvmmu_use_table((const kvmmu_api *)address);
    }

    static uint64_t count_mapped(uint64_t vcpu, uint64_t first, uint64_t pages)
    {
        uint64_t i, found = 0;
        kvmmu_result result;
        for (i = 0; i < pages; i++)
            if (kvmmu_translate(vcpu, first + 4096 * i, KVMMU_ACCESS_USER, &result) == KVMMU_OK)
                found += result.status == KVMMU_STATUS_OK;
        return found;
    }
""", include_dirs=[kvmmu.get_include()])


def main():
    with tempfile.TemporaryDirectory() as folder:
        spec = importlib.util.spec_from_file_location("walk_with_kvmmu", builder.compile(tmpdir=folder))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    ffi, lib = module.ffi, module.lib

    def check(code):
        if code:
            sys.exit(f"kvmmu: code {code}")

    ram = np.zeros(1 << 17, np.uint64)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3010, 0x6007), (0x6000, 0x4067), (0x6008, 0x5005)):
        ram[gpa // 8] = entry
    memory, vcpu = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.use_table(kvmmu.embed.c_api.address))
    check(lib.kvmmu_memory_create(memory))
    check(lib.kvmmu_memory_add(memory[0], 0, ffi.from_buffer(ram), ram.nbytes, 0))
    check(lib.kvmmu_vcpu_create(memory[0], ffi.NULL, vcpu))
    registers = ffi.new("kvmmu_registers *", {"size": ffi.sizeof("kvmmu_registers"), "cr0": 0x80010001, "cr3": 0x1000,
                                              "cr4": 0x20, "efer": 0xD00, "rflags": 2})
    check(lib.kvmmu_set_registers(vcpu[0], registers))
    print(f"{lib.count_mapped(vcpu[0], 0x400000, 512)} of 512 pages are mapped for user code")
    check(lib.kvmmu_vcpu_free(vcpu[0]))
    check(lib.kvmmu_memory_free(memory[0]))


if __name__ == "__main__":
    main()
