"""Make walks from the registers of a C program; see `_registers.pxd`.

Each vCPU has a `kvmmu.Vcpu` beside it, whose `set_regs()` checks the registers and makes the walk. The walk is copied from there,
and reads the memory of the C program. A second stage is copied in the same way.
"""

from cpython.exc cimport PyErr_Fetch, PyErr_Restore, PyErr_SetInterrupt
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, CR0_PG_MASK, CR3_PAE_PDPT_MASK, CR4_PAE_MASK, EFER_LMA_MASK, PAGE_SIZE, RFLAGS_AC_MASK,
)
from kvmmu.arch._format cimport key_registers
from kvmmu.embed._memories cimport find_memory
from kvmmu.embed._page_cache cimport cache_free, cache_new
from kvmmu.embed._models cimport check_stage, model_of, read_cpu, stage_of
from kvmmu.embed._structs cimport (
    KVMMU_E_ARGUMENT, KVMMU_E_HANDLE, KVMMU_E_MEMORY, KVMMU_E_NULL, KVMMU_E_PYTHON, KVMMU_E_REGISTERS, KVMMU_E_VERSION,
    KVMMU_OK, KVMMU_REGISTERS_PDPTRS, KVMMU_STAGE_NPT, c_memory, c_vcpu, kvmmu_cpu, kvmmu_let_go, kvmmu_memory,
    kvmmu_registers, kvmmu_second_stage, kvmmu_vcpu,
)
from kvmmu.embed._vcpus cimport (
    lock_handles, open_vcpu, own_vcpu, read_words, take_free_vcpu, unlock_handles, use_memory, vcpu_asked,
)
from kvmmu.memory._memory cimport GuestMemory
from kvmmu.walk._fast cimport init_fast_walk
from kvmmu.walk._register_sets cimport WalkCopy
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu import GeneralProtection, Regs, Vcpu

cdef extern from "Python.h" nogil:
    bint Py_IsInitialized()

cdef GuestMemory NOWHERE = GuestMemory(int(PAGE_SIZE))      # of the Python objects, which never walk


cdef bint is_pae_paging(const kvmmu_registers *registers) noexcept nogil:
    return registers.cr0 & CR0_PG_MASK != 0 and registers.cr4 & CR4_PAE_MASK != 0 and registers.efer & EFER_LMA_MASK == 0


cdef bint has_pdptrs(const kvmmu_registers *registers, const kvmmu_second_stage *stage) noexcept nogil:
    """True if PDPTE registers count: in PAE paging, but not under nested paging of SVM, where walks read the words in memory."""
    return is_pae_paging(registers) and not stage.flags & KVMMU_STAGE_NPT


# ---- registers ---------------------------------------------------------------------------------------------------------

cdef bint loads_quickly(const c_vcpu *v, const kvmmu_registers *registers) noexcept nogil:
    """True if the role stays what it is, and no bit of CR3 changes that could be illegal or mean more than an address."""
    return (registers.cr0 == v.registers.cr0 and registers.cr4 == v.registers.cr4 and registers.efer == v.registers.efer and
            not (registers.cr3 ^ v.registers.cr3) & v.cr3_fixed and not is_pae_paging(registers))


cdef void note_registers(c_vcpu *v, const kvmmu_registers *registers) noexcept nogil:
    cdef int i
    cdef bint counts = has_pdptrs(registers, &v.stage)
    v.registers = registers[0]
    v.registers.flags = KVMMU_REGISTERS_PDPTRS if counts else 0
    for i in range(4):
        v.registers.pdptrs[i] = v.arch.pdptrs[i] if counts else 0
    v.ac = <uint32_t>ACCESS_AC_MASK if registers.rflags & RFLAGS_AC_MASK else 0


cdef object regs_of(const kvmmu_registers *registers, const kvmmu_second_stage *stage):
    pdptrs = tuple(int(registers.pdptrs[i]) for i in range(4)) if has_pdptrs(registers, stage) else None
    return Regs(int(registers.cr0), int(registers.cr3), int(registers.cr4), int(registers.efer), int(registers.pkru),
                int(registers.rflags), pdptrs, int(registers.pkrs))


cdef int copy_stage(c_vcpu *v, SecondStage second, const kvmmu_second_stage *stage) except -1:
    memset(&v.stage, 0, sizeof(kvmmu_second_stage))
    v.stage.size = sizeof(kvmmu_second_stage)
    if second is None:
        return 0
    v.stage = stage[0]
    v.n, v.narch, v.nfmt, v.pml = second.n, second.arch, second.fmt.fmt, second.pml
    v.n.vcpu, v.n.fmt = &v.narch, &v.nfmt
    v.n.pml = &v.pml if second.n.pml is not NULL else NULL
    return 0


cdef int load(c_vcpu *v, const kvmmu_registers *registers, const kvmmu_second_stage *other) except -1:
    """Load registers by the Python object. IN other: a second stage to be in force with them, or none with flags 0; NULL: the one
    that is. Raises GeneralProtection, or ValueError of a second stage."""
    cdef PageWalk walk
    cdef WalkCopy copy
    cdef const kvmmu_second_stage *stage = other
    if other is NULL:
        stage = &v.stage
    vcpu = <object>v.python
    regs = regs_of(registers, stage)
    if other is NULL:
        vcpu.set_regs(regs)
    else:
        change_stage(v, stage_of(other) if other.flags else None, regs)
    walk = vcpu.gva_walk
    copy = walk.now(NOWHERE.current())
    if other is not NULL:
        copy_stage(v, copy.second, other)
    v.w, v.arch, v.fmt = copy.w, copy.arch, copy.fmt.fmt
    v.w.vcpu, v.w.fmt, v.w.ngpa = &v.arch, &v.fmt, &v.n if v.stage.flags else NULL
    v.w.mem = NULL
    init_fast_walk(&v.fast, &v.w)
    use_memory(v)
    note_registers(v, registers)
    return 0


cdef int change_stage(c_vcpu *v, stage, regs) except -1:
    """Run a guest under another second stage, or under none. If its registers are illegal nothing has changed."""
    vcpu = <object>v.python
    names = ("cr0", "cr3", "cr4", "efer", "pkru", "rflags", "pdptrs", "pkrs")
    if stage is not None:
        vcpu.enter_nested(stage, **{name: getattr(regs, name) for name in names})
        return 0
    before, old = vcpu.regs, vcpu.gva_walk.second
    vcpu.leave_nested()
    try:
        vcpu.set_regs(regs)
    except GeneralProtection:
        if old is not None:
            vcpu.enter_nested(old.stage, **{name: getattr(before, name) for name in names})
        raise
    return 0


cdef int code_of(error):
    """Return the code for an exception that ends here."""
    if isinstance(error, GeneralProtection):
        return KVMMU_E_REGISTERS
    if isinstance(error, ValueError):
        return KVMMU_E_ARGUMENT
    if isinstance(error, MemoryError):
        return KVMMU_E_MEMORY
    if isinstance(error, KeyboardInterrupt):
        PyErr_SetInterrupt()                        # for whoever runs Python code next
    return KVMMU_E_PYTHON


cdef int load_with_gil(c_vcpu *v, const kvmmu_registers *registers, const kvmmu_second_stage *other) noexcept with gil:
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *traceback
    cdef int code = KVMMU_OK
    PyErr_Fetch(&kind, &value, &traceback)          # the caller's, if it holds the GIL with an exception set
    try:
        load(v, registers, other)
    except BaseException as error:
        code = code_of(error)
    PyErr_Restore(kind, value, traceback)
    return code


cdef int c_set_registers(kvmmu_vcpu handle, const kvmmu_registers *registers) noexcept nogil:
    cdef int code
    cdef kvmmu_registers loaded
    cdef c_vcpu *v = vcpu_asked(handle, True, registers, &code)
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
    if has_pdptrs(&loaded, &v.stage) and not loaded.flags & KVMMU_REGISTERS_PDPTRS:
        code = read_words(v, loaded.cr3 & CR3_PAE_PDPT_MASK, loaded.pdptrs, 4)
        if code != 1:
            return KVMMU_E_REGISTERS if code == 0 else code
    if not Py_IsInitialized():
        return KVMMU_E_PYTHON
    return load_with_gil(v, &loaded, NULL)


cdef int c_set_second_stage(kvmmu_vcpu handle, const kvmmu_second_stage *stage) noexcept nogil:
    cdef int code
    cdef kvmmu_registers registers
    cdef kvmmu_second_stage other
    cdef c_vcpu *v = own_vcpu(handle, True, &code)
    if v is NULL:
        return code
    memset(&other, 0, sizeof(kvmmu_second_stage))
    if stage is not NULL:
        code = check_stage(stage)
        if code != KVMMU_OK:
            return code
        other = stage[0]
    registers = v.registers                         # PDPTEs are 0 if there were none
    if not Py_IsInitialized():
        return KVMMU_E_PYTHON
    return load_with_gil(v, &registers, &other)


# ---- vCPUs -------------------------------------------------------------------------------------------------------------

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
    copy_stage(v, None, NULL)
    load(v, &registers, NULL)
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
    cdef kvmmu_cpu known
    cdef int code
    if out is NULL:
        return KVMMU_E_NULL
    code = read_cpu(cpu, &known)
    if code != KVMMU_OK:
        return code
    if not Py_IsInitialized():
        return KVMMU_E_PYTHON
    lock_handles()
    memory = find_memory(handle)
    if memory is not NULL:
        memory.vcpus += 1                           # so that nobody frees it meanwhile
    unlock_handles()
    if memory is NULL:
        return KVMMU_E_HANDLE
    code = create_with_gil(memory, &known, out)
    lock_handles()
    memory.vcpus -= 1                               # open_vcpu() has counted the vCPU
    unlock_handles()
    return code
