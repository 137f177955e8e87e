"""From the registers of a C program to a walk; see `_registers.pxd`.

Each vCPU has a `kvmmu.Vcpu` beside it, whose `set_regs()` judges the registers and makes the walk. The walk is copied from there,
and reads the memory of the C program.
"""

from cpython.exc cimport PyErr_Fetch, PyErr_Restore, PyErr_SetInterrupt
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, CR0_PG_MASK, CR3_PAE_PDPT_MASK, CR4_PAE_MASK, EFER_LMA_MASK, MAXPHYADDR_MAX, MAXPHYADDR_MIN, PAGE_SIZE,
    RFLAGS_AC_MASK,
)
from kvmmu.arch._format cimport key_registers
from kvmmu.embed._memories cimport find_memory
from kvmmu.embed._page_cache cimport cache_free, cache_new
from kvmmu.embed._structs cimport (
    KVMMU_CPU_AMD, KVMMU_CPU_KVM, KVMMU_CPU_NO_GBPAGES, KVMMU_CPU_NO_LA57, KVMMU_CPU_NO_NX, KVMMU_CPU_NO_PCID,
    KVMMU_CPU_NO_PKU, KVMMU_CPU_NO_PSE36, KVMMU_CPU_NO_SMAP, KVMMU_CPU_NO_SMEP, KVMMU_E_ARGUMENT, KVMMU_E_HANDLE,
    KVMMU_E_MEMORY, KVMMU_E_NULL, KVMMU_E_PYTHON, KVMMU_E_REGISTERS, KVMMU_E_VERSION, KVMMU_OK, KVMMU_REGISTERS_PDPTRS,
    c_memory, c_vcpu, kvmmu_cpu, kvmmu_let_go, kvmmu_memory, kvmmu_registers, kvmmu_vcpu,
)
from kvmmu.embed._vcpus cimport lock_handles, open_vcpu, read_words, take_free_vcpu, unlock_handles, use_memory, vcpu_asked
from kvmmu.memory._memory cimport GuestMemory
from kvmmu.walk._fast cimport init_fast_walk
from kvmmu.walk._register_sets cimport WalkCopy
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu import CpuModel, GeneralProtection, Regs, Vcpu

cdef extern from "Python.h" nogil:
    bint Py_IsInitialized()

cdef enum:
    DEFAULT_MAXPHYADDR = 48

cdef uint32_t CPU_FLAGS = (
    KVMMU_CPU_AMD | KVMMU_CPU_KVM | KVMMU_CPU_NO_GBPAGES | KVMMU_CPU_NO_PSE36 | KVMMU_CPU_NO_LA57 | KVMMU_CPU_NO_NX |
    KVMMU_CPU_NO_SMEP | KVMMU_CPU_NO_SMAP | KVMMU_CPU_NO_PKU | KVMMU_CPU_NO_PCID)
cdef GuestMemory NOWHERE = GuestMemory(int(PAGE_SIZE))      # of the Python objects, which never walk


cdef bint is_pae_paging(const kvmmu_registers *registers) noexcept nogil:
    return registers.cr0 & CR0_PG_MASK != 0 and registers.cr4 & CR4_PAE_MASK != 0 and registers.efer & EFER_LMA_MASK == 0


# ---- registers ---------------------------------------------------------------------------------------------------------

cdef bint loads_quickly(const c_vcpu *v, const kvmmu_registers *registers) noexcept nogil:
    """True if the role stays what it is, and no bit of CR3 changes that could be illegal or mean more than an address."""
    return (registers.cr0 == v.registers.cr0 and registers.cr4 == v.registers.cr4 and registers.efer == v.registers.efer and
            not (registers.cr3 ^ v.registers.cr3) & v.cr3_fixed and not is_pae_paging(registers))


cdef void note_registers(c_vcpu *v, const kvmmu_registers *registers) noexcept nogil:
    cdef int i
    cdef bint pae = is_pae_paging(registers)
    v.registers = registers[0]
    v.registers.flags = KVMMU_REGISTERS_PDPTRS if pae else 0
    for i in range(4):
        v.registers.pdptrs[i] = v.arch.pdptrs[i] if pae else 0
    v.ac = <uint32_t>ACCESS_AC_MASK if registers.rflags & RFLAGS_AC_MASK else 0


cdef int load(c_vcpu *v, const kvmmu_registers *registers) except -1:
    """Load registers by the Python object. Raises GeneralProtection."""
    cdef PageWalk walk
    cdef WalkCopy copy
    vcpu = <object>v.python
    pdptrs = tuple(int(registers.pdptrs[i]) for i in range(4)) if is_pae_paging(registers) else None
    vcpu.set_regs(Regs(int(registers.cr0), int(registers.cr3), int(registers.cr4), int(registers.efer), int(registers.pkru),
                       int(registers.rflags), pdptrs, int(registers.pkrs)))
    walk = vcpu.gva_walk
    copy = walk.now(NOWHERE.current())
    v.w, v.arch, v.fmt = copy.w, copy.arch, copy.fmt.fmt
    v.w.vcpu, v.w.fmt, v.w.ngpa = &v.arch, &v.fmt, NULL
    v.w.mem = NULL
    init_fast_walk(&v.fast, &v.w)
    use_memory(v)
    note_registers(v, registers)
    return 0


cdef int code_of(error):
    """Return the code for an exception that ends here."""
    if isinstance(error, GeneralProtection):
        return KVMMU_E_REGISTERS
    if isinstance(error, MemoryError):
        return KVMMU_E_MEMORY
    if isinstance(error, KeyboardInterrupt):
        PyErr_SetInterrupt()                        # for whoever runs Python code next
    return KVMMU_E_PYTHON


cdef int load_with_gil(c_vcpu *v, const kvmmu_registers *registers) noexcept with gil:
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *traceback
    cdef int code = KVMMU_OK
    PyErr_Fetch(&kind, &value, &traceback)          # the caller's, if it holds the GIL with an exception set
    try:
        load(v, registers)
    except BaseException as error:
        code = code_of(error)
    PyErr_Restore(kind, value, traceback)
    return code


cdef int c_set_registers(kvmmu_vcpu handle, const kvmmu_registers *registers) noexcept nogil:
    cdef int code
    cdef kvmmu_registers loaded
    cdef c_vcpu *v = vcpu_asked(handle, registers, &code)
    if v is NULL:
        return code
    if registers.size != sizeof(kvmmu_registers):
        return KVMMU_E_VERSION
    if registers.flags & ~<uint32_t>KVMMU_REGISTERS_PDPTRS:
        return KVMMU_E_ARGUMENT
    loaded = registers[0]
    if loads_quickly(v, &loaded):
        v.arch.cr3, v.arch.keys, v.arch.rflags = loaded.cr3, key_registers(loaded.pkru, loaded.pkrs), loaded.rflags
        note_registers(v, &loaded)
        return KVMMU_OK
    if is_pae_paging(&loaded) and not loaded.flags & KVMMU_REGISTERS_PDPTRS:
        code = read_words(v, loaded.cr3 & CR3_PAE_PDPT_MASK, loaded.pdptrs, 4)
        if code != 1:
            return KVMMU_E_REGISTERS if code == 0 else code
    if not Py_IsInitialized():
        return KVMMU_E_PYTHON
    return load_with_gil(v, &loaded)


# ---- vCPUs -------------------------------------------------------------------------------------------------------------

# Features of a CpuModel, and the flags without them
_LACKS = {"gbpages": KVMMU_CPU_NO_GBPAGES, "pse36": KVMMU_CPU_NO_PSE36, "la57": KVMMU_CPU_NO_LA57, "nx": KVMMU_CPU_NO_NX,
          "smep": KVMMU_CPU_NO_SMEP, "smap": KVMMU_CPU_NO_SMAP, "pku": KVMMU_CPU_NO_PKU, "pcid": KVMMU_CPU_NO_PCID}


cdef uint32_t flags_of_model(cpu) except? 0:
    flags = (KVMMU_CPU_AMD if cpu.vendor == "amd" else 0) | (KVMMU_CPU_KVM if cpu.conformance == "kvm" else 0)
    for name, bit in _LACKS.items():
        flags |= 0 if getattr(cpu, name) else bit
    return flags


cdef object model_of(const kvmmu_cpu *cpu):
    cdef uint32_t flags = 0 if cpu is NULL else cpu.flags
    cdef uint32_t width = 0 if cpu is NULL else cpu.maxphyaddr
    return CpuModel(vendor="amd" if flags & KVMMU_CPU_AMD else "intel", conformance="kvm" if flags & KVMMU_CPU_KVM else "sdm",
                    maxphyaddr=width or DEFAULT_MAXPHYADDR, **{name: not flags & bit for name, bit in _LACKS.items()})


cdef int prepare(c_vcpu *v, const kvmmu_cpu *cpu, c_memory *memory) except -1:
    """Make a vCPU that nobody else uses: its processor, and the registers of a reset. The memory cannot be freed meanwhile."""
    cdef kvmmu_registers registers
    cdef object old
    model = model_of(cpu)
    vcpu = Vcpu(NOWHERE, model)
    if v.python is not NULL:
        old = <object>v.python
        v.python = NULL
        Py_DECREF(old)
    Py_INCREF(vcpu)
    v.python = <void *>vcpu
    v.busy = v.borrowed = False
    v.cr3_fixed = int(model.rsvd_gpa_bits)
    if memory.has_callbacks:
        v.cache = cache_new(&memory.callbacks)
        if v.cache is NULL:
            raise MemoryError
    memset(&registers, 0, sizeof(registers))
    registers.size = sizeof(kvmmu_registers)
    registers.cr0, registers.rflags = int(vcpu.regs.cr0), int(vcpu.regs.rflags)
    load(v, &registers)
    return 0


cdef int create_with_gil(c_memory *memory, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept with gil:
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *traceback
    cdef int code = KVMMU_OK
    cdef c_vcpu *v
    PyErr_Fetch(&kind, &value, &traceback)
    lock_handles()
    v = take_free_vcpu()
    if v is not NULL:
        v.memory = memory                           # from here on nobody else changes its slots
    unlock_handles()
    if v is NULL:
        code = KVMMU_E_MEMORY
    else:
        try:
            prepare(v, cpu, memory)
        except BaseException as error:
            code = code_of(error)
        lock_handles()
        if code == KVMMU_OK:
            out[0] = open_vcpu(v)
        else:
            cache_free(v.cache)
            v.cache, v.memory = NULL, NULL
        unlock_handles()
        kvmmu_let_go(&v.owner)
    PyErr_Restore(kind, value, traceback)
    return code


cdef int c_vcpu_create(kvmmu_memory handle, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept nogil:
    cdef c_memory *memory
    cdef int code
    if out is NULL:
        return KVMMU_E_NULL
    if cpu is not NULL:
        if cpu.size != sizeof(kvmmu_cpu):
            return KVMMU_E_VERSION
        if cpu.flags & ~CPU_FLAGS or (cpu.maxphyaddr and not MAXPHYADDR_MIN <= cpu.maxphyaddr <= MAXPHYADDR_MAX):
            return KVMMU_E_ARGUMENT
    if not Py_IsInitialized():
        return KVMMU_E_PYTHON
    lock_handles()
    memory = find_memory(handle)
    if memory is not NULL:
        memory.vcpus += 1                           # so that nobody frees it meanwhile
    unlock_handles()
    if memory is NULL:
        return KVMMU_E_HANDLE
    code = create_with_gil(memory, cpu, out)
    lock_handles()
    memory.vcpus -= 1                               # open_vcpu() has counted the vCPU
    unlock_handles()
    return code
