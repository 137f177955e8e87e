/* kvmmu for C and C++: x86 address translation over memory of yours. C99 or later, C++11 or later.
 *
 *     #include <Python.h>
 *     #include <kvmmu/kvmmu.h>                     // with `python -c "import kvmmu; print(kvmmu.get_include())"` as -I
 *
 *     kvmmu_import();                              // once in each source file, with the GIL held
 *     kvmmu_memory_create(&memory);
 *     kvmmu_memory_add(memory, 0, ram, size, 0);
 *     kvmmu_vcpu_create(memory, NULL, &vcpu);
 *     kvmmu_set_registers(vcpu, &registers);
 *     kvmmu_translate(vcpu, gva, KVMMU_ACCESS_WRITE | KVMMU_ACCESS_USER, &result);
 *
 * Results. Every function returns KVMMU_OK or a negative KVMMU_E_* code, and then has changed nothing but what its description names.
 * A fault of the guest is no error: the call returns KVMMU_OK, and the result has the status and the error code of the fault.
 *
 * Handles. A kvmmu_memory and a kvmmu_vcpu are numbers, of which 0 is none. A number that is no handle, or of something that was
 * freed, gives KVMMU_E_HANDLE. No number is used twice.
 *
 * Threads. A vCPU belongs to the thread that makes the first call with it, until that thread calls kvmmu_vcpu_release(). In the
 * meantime other threads get KVMMU_E_THREAD. Use one vCPU for each thread; they may share a memory. Accessed and dirty bits in host
 * memory are set by compare-and-set. Functions that change the slots of a memory need all vCPUs of it: released, or the caller's own.
 *
 * The GIL. kvmmu_import() needs it. No other function needs it to be held, and each may be called with it held. Three take it for
 * themselves: kvmmu_vcpu_create(), kvmmu_set_second_stage(), and kvmmu_set_registers() where CR0, CR4, EFER, or bits of CR3 beyond the
 * physical-address width change, or under PAE paging. A program with threads that call these lets go of it first
 * (PyEval_SaveThread()). After Py_Finalize() these return KVMMU_E_PYTHON, and all others work on.
 *
 * Callbacks run in the thread that made the call, without the GIL being taken. A callback that uses the vCPU that it serves, or
 * frees it, gets KVMMU_E_BUSY. Callbacks return; they do not longjmp() or throw.
 *
 * Versions. KVMMU_API_VERSION is (major << 16) + minor. Programs go on working with every later minor version without being compiled
 * again; kvmmu_import() refuses another major version, or an older minor one, with KVMMU_E_VERSION. A structure that grows takes the
 * sizes that it had before. What 1.1 added to 1.0: kvmmu_set_second_stage(), kvmmu_get_second_stage(), kvmmu_translate_nested() and
 * their structures; KVMMU_ACCESS_SHADOW_STACK, and KVMMU_ACCESS_PROBE in every function; c_bit and features of a kvmmu_cpu, and its
 * flags from KVMMU_CPU_NO_LAM on.
 */
#ifndef KVMMU_KVMMU_H
#define KVMMU_KVMMU_H

#include <stddef.h>
#include <stdint.h>

#define KVMMU_API_MAJOR 1u
#define KVMMU_API_MINOR 1u
#define KVMMU_API_VERSION (KVMMU_API_MAJOR << 16 | KVMMU_API_MINOR)
#define KVMMU_CAPSULE_MODULE "kvmmu.embed.c_api"
#define KVMMU_CAPSULE_ATTRIBUTE "table"
#define KVMMU_CAPSULE_NAME "kvmmu.embed.c_api.table"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what functions return ------------------------------------------------------------------------------------------- */

#define KVMMU_OK 0
#define KVMMU_E_NULL (-1)      /* a pointer that must not be NULL is NULL */
#define KVMMU_E_ARGUMENT (-2)  /* a value is out of range, not aligned, overlaps another one, or has unknown flags */
#define KVMMU_E_HANDLE (-3)    /* no such memory or vCPU, or it was freed */
#define KVMMU_E_THREAD (-4)    /* the vCPU, or one of the memory, belongs to another thread */
#define KVMMU_E_BUSY (-5)      /* used by its own callback; or a memory that has vCPUs is freed */
#define KVMMU_E_MEMORY (-6)    /* the host has no memory left, or there are 65,535 handles */
#define KVMMU_E_CALLBACK (-7)  /* a callback failed, or returned what none may return */
#define KVMMU_E_REGISTERS (-8) /* the processor refuses these registers (#GP) */
#define KVMMU_E_PYTHON (-9)    /* the interpreter is not running, or raised an exception that has no code here */
#define KVMMU_E_VERSION (-10)  /* compiled for another version, or a structure whose `size` is unknown */
#define KVMMU_E_IMPORT (-11)   /* kvmmu_import() was not called in this source file, or failed */

/* ---- numbers --------------------------------------------------------------------------------------------------------- */

#define KVMMU_INVALID_GPA UINT64_MAX

/* an access; EFLAGS.AC of the registers is added */
#define KVMMU_ACCESS_READ 0u
#define KVMMU_ACCESS_WRITE 2u
#define KVMMU_ACCESS_USER 4u      /* CPL 3 */
#define KVMMU_ACCESS_AC 8u        /* EFLAGS.AC: SMAP does not apply */
#define KVMMU_ACCESS_FETCH 16u
#define KVMMU_ACCESS_IMPLICIT 32u /* a supervisor access whatever the CPL is, as to a descriptor table */
#define KVMMU_ACCESS_SHADOW_STACK 64u /* to a shadow stack, with WRITE for a write; judged so whatever CR4.CET is */
#define KVMMU_ACCESS_PROBE 128u       /* no access: neither rights nor accessed and dirty bits count, whatever is beside it */
/* beside an access: store no accessed and dirty bits */
#define KVMMU_ACCESS_NO_AD 256u

/* `status` of a result */
#define KVMMU_STATUS_OK 0u
#define KVMMU_STATUS_PAGE_FAULT 1u    /* #PF */
#define KVMMU_STATUS_NON_CANONICAL 2u /* #GP, or #SS of a stack access */
/* under a second stage alone: exits, for which kvmmu_translate_nested() has reason, qualification and address */
#define KVMMU_STATUS_EPT_VIOLATION 3u
#define KVMMU_STATUS_EPT_MISCONFIG 4u
#define KVMMU_STATUS_NESTED_PAGE_FAULT 5u /* #NPF */
#define KVMMU_STATUS_PML_FULL 6u
#define KVMMU_STATUS_LASS_VIOLATION 7u /* as NON_CANONICAL, by CR4.LASS */
#define KVMMU_STATUS_SPP_EVENT 8u
#define KVMMU_STATUS_VIRT_EXCEPTION 9u /* #VE of the guest instead of an exit; the information area is filled */

/* `exit_reason` of a nested result: of VMX, and the exit code of SVM */
#define KVMMU_EXIT_NONE 0u
#define KVMMU_EXIT_EPT_VIOLATION 48u
#define KVMMU_EXIT_EPT_MISCONFIG 49u
#define KVMMU_EXIT_PML_FULL 62u
#define KVMMU_EXIT_SPP_EVENT 66u
#define KVMMU_EXIT_NPF 0x400u

/* `rights` of a mapping or a step */
#define KVMMU_RIGHT_READ 1u
#define KVMMU_RIGHT_WRITE 2u
#define KVMMU_RIGHT_USER 4u
#define KVMMU_RIGHT_EXEC 8u

/* `flags` of kvmmu_memory_add() */
#define KVMMU_MEMORY_READONLY 1u /* accessed and dirty bits are not stored there */

/* `flags` of a kvmmu_cpu */
#define KVMMU_CPU_AMD 1u /* bit 8 of PML4Es and PML5Es is reserved */
#define KVMMU_CPU_KVM 2u /* what KVM's software walker does where it differs from the manuals */
#define KVMMU_CPU_NO_GBPAGES 4u
#define KVMMU_CPU_NO_PSE36 8u
#define KVMMU_CPU_NO_LA57 16u
#define KVMMU_CPU_NO_NX 32u
#define KVMMU_CPU_NO_SMEP 64u
#define KVMMU_CPU_NO_SMAP 128u
#define KVMMU_CPU_NO_PKU 256u
#define KVMMU_CPU_NO_PCID 512u
#define KVMMU_CPU_NO_LAM 1024u
#define KVMMU_CPU_NO_SHSTK 2048u
#define KVMMU_CPU_NO_PKS 4096u
#define KVMMU_CPU_NO_LASS 8192u
#define KVMMU_CPU_NO_UAI 16384u
#define KVMMU_CPU_STRICT 32768u /* control bits without a say in translation are reserved, but for those of `features` */

/* `features` of a kvmmu_cpu: those of the vendor */
#define KVMMU_FEATURE_UMIP 1u
#define KVMMU_FEATURE_FSGSBASE 2u
#define KVMMU_FEATURE_XSAVE 4u
#define KVMMU_FEATURE_CET 8u
#define KVMMU_FEATURE_FRED 16u
#define KVMMU_FEATURE_VMX 32u
#define KVMMU_FEATURE_SMX 64u
#define KVMMU_FEATURE_KL 128u
#define KVMMU_FEATURE_UINTR 256u
#define KVMMU_FEATURE_SVM 512u
#define KVMMU_FEATURE_LMSLE 1024u
#define KVMMU_FEATURE_FFXSR 2048u
#define KVMMU_FEATURE_TCE 4096u
#define KVMMU_FEATURE_MCOMMIT 8192u
#define KVMMU_FEATURE_INTWB 16384u
#define KVMMU_FEATURE_AUTOIBRS 32768u

/* `flags` of kvmmu_registers */
#define KVMMU_REGISTERS_PDPTRS 1u /* pdptrs count in PAE paging; without it they are loaded from memory at CR3 */

/* `flags` of a kvmmu_second_stage: EPT or NPT, and what either may have */
#define KVMMU_STAGE_EPT 1u
#define KVMMU_STAGE_NPT 2u
#define KVMMU_STAGE_MBEC 4u              /* EPT: mode-based execute control */
#define KVMMU_STAGE_NO_EXECONLY 8u       /* EPT: no execute-only translations */
#define KVMMU_STAGE_NO_ADVANCED_INFO 16u /* EPT: exit qualifications without bits 11:9 */
#define KVMMU_STAGE_NO_2M 32u            /* EPT: no pages of 2M, which NO_1G goes with */
#define KVMMU_STAGE_NO_1G 64u            /* EPT: no pages of 1G */
#define KVMMU_STAGE_PML 128u             /* EPT: pml_address and pml_index count */
#define KVMMU_STAGE_SPP 256u             /* EPT: spptp counts */
#define KVMMU_STAGE_VE 512u              /* EPT: ve_area counts */
#define KVMMU_STAGE_GMET 1024u           /* NPT: guest-mode execute trap */

/* what a read callback returns */
#define KVMMU_READ_DONE 0
#define KVMMU_READ_HOLE 1 /* there is no memory: it reads as zeros */

#define KVMMU_MAX_STEPS 5

/* ---- structures ------------------------------------------------------------------------------------------------------ */

typedef uint64_t kvmmu_memory;
typedef uint64_t kvmmu_vcpu;

/* Guest memory behind callbacks. Each vCPU keeps copies of pages that it has read, until kvmmu_invalidate(). */
typedef struct kvmmu_callbacks {
    uint32_t size;        /* sizeof(kvmmu_callbacks) */
    uint32_t cache_pages; /* pages that a vCPU keeps, 64 to 1,048,576; 0: 1,024 */
    uint64_t memory_size; /* bytes from guest-physical address 0 on, whole pages; what lies beyond is a hole; 0: all 52 bits */
    void *opaque;         /* the first argument of both */
    /* Fill page, 4,096 bytes that are zero, with the guest-physical page at gpa. Returns KVMMU_READ_DONE or KVMMU_READ_HOLE; any other
     * value is a failure. */
    int (*read)(void *opaque, uint64_t gpa, void *page);
    /* Store an entry of a page table in which accessed or dirty bits were set, or a word of a second stage's log or #VE information
     * area; n is 4 or 8. Returns 0; any other value is a failure. NULL: nothing is stored. */
    int (*write)(void *opaque, uint64_t gpa, const void *data, size_t n);
} kvmmu_callbacks;

typedef struct kvmmu_cpu {
    uint32_t size;       /* sizeof(kvmmu_cpu) */
    uint32_t maxphyaddr; /* physical-address width, 32 to 52; 0: 48 */
    uint32_t flags;      /* KVMMU_CPU_* */
    /* since 1.1; a size of 12 is that of a structure without them */
    uint32_t c_bit;    /* AMD's encryption bit, 32 to 51, no address bit of CR3 and entries; 0: none */
    uint32_t features; /* KVMMU_FEATURE_*, with KVMMU_CPU_STRICT */
} kvmmu_cpu;

typedef struct kvmmu_registers {
    uint32_t size;  /* sizeof(kvmmu_registers) */
    uint32_t flags; /* KVMMU_REGISTERS_* */
    uint64_t cr0;
    uint64_t cr3;
    uint64_t cr4;
    uint64_t efer;
    uint64_t rflags; /* only AC counts, bit 18 */
    uint64_t pdptrs[4];
    uint32_t pkru;
    uint32_t pkrs;
} kvmmu_registers;

/* A second stage, which translates guest-physical addresses further. Its tables, and all that has an address below, lie in the
 * memory of the vCPU, as the tables and pages of the guest do behind it. */
typedef struct kvmmu_second_stage {
    uint32_t size;        /* sizeof(kvmmu_second_stage) */
    uint32_t flags;       /* KVMMU_STAGE_* */
    uint64_t root;        /* EPTP, or nested CR3 */
    uint64_t cr4;         /* NPT: CR4 and EFER of the hypervisor at VMRUN, which choose the format; else 0 */
    uint64_t efer;
    uint64_t spptp;       /* root of the sub-page permission table, of a page */
    uint64_t ve_area;     /* information area of virtualization exceptions, of a page */
    uint64_t pml_address; /* page-modification log, of a page */
    uint32_t pml_index;   /* its next entry, counting down from 511; beyond 511: full */
    uint32_t reserved;    /* 0 */
} kvmmu_second_stage;

typedef struct kvmmu_result {
    uint64_t gpa;        /* KVMMU_INVALID_GPA on a fault */
    uint32_t error_code; /* of a #PF, as the processor pushes it, else 0 */
    uint8_t status;      /* KVMMU_STATUS_* */
    uint8_t level;       /* of the leaf, or of the entry that failed: 1 4K, 2 2M or 4M, 3 1G; 0 without one */
    uint16_t reserved;
} kvmmu_result;

/* The same with all that an exit tells. */
typedef struct kvmmu_nested_result {
    uint64_t gpa;                /* KVMMU_INVALID_GPA on a fault */
    uint64_t ngpa;               /* after the first stage; KVMMU_INVALID_GPA where it failed */
    uint64_t linear;             /* the linear address that was translated, without a tag: CR2 of a #PF */
    uint64_t pte;                /* the leaf, or the entry that failed, of the stage that failed */
    uint64_t pte_gpa;            /* where it lies; KVMMU_INVALID_GPA for a PDPTE register or none */
    uint64_t fault_gpa;          /* what the second stage did not translate; KVMMU_INVALID_GPA without a fault of it */
    uint64_t exit_qualification; /* or EXITINFO1; of a #VE what its information area has; 0 without a fault of the second stage */
    uint32_t error_code;         /* of a #PF, else 0 */
    uint32_t exit_reason;        /* KVMMU_EXIT_*; none of a #VE */
    uint8_t status;              /* KVMMU_STATUS_* */
    uint8_t level;               /* of pte: 1 4K, 2 2M or 4M, 3 1G, 4, 5; 0 without one */
    uint8_t rights;              /* KVMMU_RIGHT_*: the AND over the walk of that stage */
    uint8_t reads;               /* entries read, in both stages */
    uint8_t reserved[4];
} kvmmu_nested_result;

typedef struct kvmmu_mapping {
    uint64_t gpa;     /* KVMMU_INVALID_GPA on a fault */
    uint64_t size;    /* bytes of the page, the smaller one of both stages; 4,096 with paging off; 0 on a fault */
    uint64_t pte;     /* the leaf, or the entry that failed */
    uint64_t pte_gpa; /* where it lies; KVMMU_INVALID_GPA for a PDPTE register or none */
    uint32_t error_code;
    uint8_t status;
    uint8_t level;
    uint8_t rights; /* KVMMU_RIGHT_*: the AND over the walk, and of the rights of the second stage but for USER */
    uint8_t pkey;
    uint8_t accessed;
    uint8_t dirty;
    uint8_t global;
    uint8_t reserved[5];
} kvmmu_mapping;

/* One entry of a walk. */
typedef struct kvmmu_step {
    uint64_t entry;
    uint64_t entry_gpa; /* KVMMU_INVALID_GPA for a PDPTE register */
    uint16_t index;     /* of the entry in its table */
    uint8_t level;
    uint8_t rights; /* KVMMU_RIGHT_* of the entry alone; 0 if it is not present */
    uint8_t reserved[4];
} kvmmu_step;

typedef struct kvmmu_record {
    kvmmu_mapping end;
    uint32_t count; /* of steps */
    uint32_t reserved;
    kvmmu_step steps[KVMMU_MAX_STEPS]; /* root first */
} kvmmu_record;

/* ---- the functions --------------------------------------------------------------------------------------------------- */

/* The table behind the capsule. Later minor versions append to it. */
typedef struct kvmmu_api {
    uint32_t version; /* KVMMU_API_VERSION of the library */
    uint32_t size;    /* sizeof(kvmmu_api) of the library */
    int (*memory_create)(kvmmu_memory *out);
    int (*memory_create_callbacks)(const kvmmu_callbacks *callbacks, kvmmu_memory *out);
    int (*memory_add)(kvmmu_memory memory, uint64_t gpa, void *host, uint64_t size, uint32_t flags);
    int (*memory_remove)(kvmmu_memory memory, uint64_t gpa);
    int (*memory_free)(kvmmu_memory memory);
    int (*vcpu_create)(kvmmu_memory memory, const kvmmu_cpu *cpu, kvmmu_vcpu *out);
    int (*vcpu_release)(kvmmu_vcpu vcpu);
    int (*vcpu_free)(kvmmu_vcpu vcpu);
    int (*set_registers)(kvmmu_vcpu vcpu, const kvmmu_registers *registers);
    int (*get_registers)(kvmmu_vcpu vcpu, kvmmu_registers *out);
    int (*translate)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_result *out);
    int (*translate_many)(kvmmu_vcpu vcpu, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                          kvmmu_result *out, size_t *done);
    int (*lookup)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_mapping *out);
    int (*record)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_record *out);
    int (*invalidate)(kvmmu_vcpu vcpu, uint64_t gpa, uint64_t size);
    const char *(*error_text)(int code);
    /* since 1.1 */
    int (*set_second_stage)(kvmmu_vcpu vcpu, const kvmmu_second_stage *stage);
    int (*get_second_stage)(kvmmu_vcpu vcpu, kvmmu_second_stage *out);
    int (*translate_nested)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_nested_result *out);
} kvmmu_api;

#ifdef __cplusplus
}
#endif

#ifndef KVMMU_TYPES_ONLY

/* The table that the functions below call; NULL before kvmmu_import(). */
static const kvmmu_api *kvmmu_table = NULL;

/* Use a table that came some other way than by kvmmu_import(). */
static inline int kvmmu_use_table(const kvmmu_api *table)
{
    if (table == NULL)
        return KVMMU_E_IMPORT;
    if (table->version >> 16 != KVMMU_API_MAJOR || table->version < KVMMU_API_VERSION || table->size < sizeof(kvmmu_api))
        return KVMMU_E_VERSION;
    kvmmu_table = table;
    return KVMMU_OK;
}

#ifdef Py_PYTHON_H
/* Import kvmmu; the GIL is held. KVMMU_E_IMPORT: a Python exception is set that says why. */
static inline int kvmmu_import(void)
{
    PyObject *module, *capsule;
    const kvmmu_api *table;

    if (!Py_IsInitialized())
        return KVMMU_E_PYTHON;
    module = PyImport_ImportModule(KVMMU_CAPSULE_MODULE);
    if (module == NULL)
        return KVMMU_E_IMPORT;
    capsule = PyObject_GetAttrString(module, KVMMU_CAPSULE_ATTRIBUTE);
    Py_DECREF(module);
    if (capsule == NULL)
        return KVMMU_E_IMPORT;
    table = (const kvmmu_api *)PyCapsule_GetPointer(capsule, KVMMU_CAPSULE_NAME);
    Py_DECREF(capsule);
    return kvmmu_use_table(table);
}
#endif

/* Make a memory without slots. */
static inline int kvmmu_memory_create(kvmmu_memory *out)
{
    return kvmmu_table ? kvmmu_table->memory_create(out) : KVMMU_E_IMPORT;
}

/* Make a memory behind callbacks. The structure is copied. */
static inline int kvmmu_memory_create_callbacks(const kvmmu_callbacks *callbacks, kvmmu_memory *out)
{
    return kvmmu_table ? kvmmu_table->memory_create_callbacks(callbacks, out) : KVMMU_E_IMPORT;
}

/* Add a slot: host memory of yours at guest-physical address gpa, whole pages, until it is removed. Writable memory is aligned to 8
 * bytes. Slots do not overlap. All else is a hole, which reads as zeros. */
static inline int kvmmu_memory_add(kvmmu_memory memory, uint64_t gpa, void *host, uint64_t size, uint32_t flags)
{
    return kvmmu_table ? kvmmu_table->memory_add(memory, gpa, host, size, flags) : KVMMU_E_IMPORT;
}

/* Remove the slot that begins at gpa. Nothing reads its host memory any more. */
static inline int kvmmu_memory_remove(kvmmu_memory memory, uint64_t gpa)
{
    return kvmmu_table ? kvmmu_table->memory_remove(memory, gpa) : KVMMU_E_IMPORT;
}

/* Free a memory without vCPUs. KVMMU_E_BUSY: it has some; free them first. */
static inline int kvmmu_memory_free(kvmmu_memory memory)
{
    return kvmmu_table ? kvmmu_table->memory_free(memory) : KVMMU_E_IMPORT;
}

/* Make a vCPU over a memory, with the registers of a reset: paging is off. cpu NULL: an Intel processor with every feature. */
static inline int kvmmu_vcpu_create(kvmmu_memory memory, const kvmmu_cpu *cpu, kvmmu_vcpu *out)
{
    return kvmmu_table ? kvmmu_table->vcpu_create(memory, cpu, out) : KVMMU_E_IMPORT;
}

/* Let another thread use a vCPU. */
static inline int kvmmu_vcpu_release(kvmmu_vcpu vcpu)
{
    return kvmmu_table ? kvmmu_table->vcpu_release(vcpu) : KVMMU_E_IMPORT;
}

/* Free a vCPU. */
static inline int kvmmu_vcpu_free(kvmmu_vcpu vcpu)
{
    return kvmmu_table ? kvmmu_table->vcpu_free(vcpu) : KVMMU_E_IMPORT;
}

/* Load registers, as a whole, without the rules of a transition. KVMMU_E_REGISTERS: they are illegal, or a second stage does not reach
 * the PDPTEs, and nothing changed. */
static inline int kvmmu_set_registers(kvmmu_vcpu vcpu, const kvmmu_registers *registers)
{
    return kvmmu_table ? kvmmu_table->set_registers(vcpu, registers) : KVMMU_E_IMPORT;
}

/* OUT: the registers in force. out->size is set by the caller; flags tells whether pdptrs count. */
static inline int kvmmu_get_registers(kvmmu_vcpu vcpu, kvmmu_registers *out)
{
    return kvmmu_table ? kvmmu_table->get_registers(vcpu, out) : KVMMU_E_IMPORT;
}

/* Translate guest-physical addresses by a second stage from now on; NULL: by none. The registers stay in force: those of the guest
 * under it are loaded next. Under NPT there are no PDPTE registers; they are 0 after it, until registers are loaded.
 * KVMMU_E_ARGUMENT: VM entry, or this processor model, refuses such a stage, and nothing changed. */
static inline int kvmmu_set_second_stage(kvmmu_vcpu vcpu, const kvmmu_second_stage *stage)
{
    return kvmmu_table ? kvmmu_table->set_second_stage(vcpu, stage) : KVMMU_E_IMPORT;
}

/* OUT: the second stage in force, with pml_index as it is now; flags 0: none. out->size is set by the caller. */
static inline int kvmmu_get_second_stage(kvmmu_vcpu vcpu, kvmmu_second_stage *out)
{
    return kvmmu_table ? kvmmu_table->get_second_stage(vcpu, out) : KVMMU_E_IMPORT;
}

/* Translate one address, and set accessed and dirty bits as the processor does. */
static inline int kvmmu_translate(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_result *out)
{
    return kvmmu_table ? kvmmu_table->translate(vcpu, gva, access, out) : KVMMU_E_IMPORT;
}

/* The same, with all that an exit tells. It needs no second stage. */
static inline int kvmmu_translate_nested(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_nested_result *out)
{
    return kvmmu_table ? kvmmu_table->translate_nested(vcpu, gva, access, out) : KVMMU_E_IMPORT;
}

/* Translate n addresses in order. accesses: one for each, or NULL; `access` is added to each of them. done: how many results there
 * are, also where a callback failed; may be NULL. */
static inline int kvmmu_translate_many(kvmmu_vcpu vcpu, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                                       kvmmu_result *out, size_t *done)
{
    return kvmmu_table ? kvmmu_table->translate_many(vcpu, n, gva, accesses, access, out, done) : KVMMU_E_IMPORT;
}

/* Translate one address, and tell what a TLB would keep: size, rights, key, and bits of the leaf, after they were set. */
static inline int kvmmu_lookup(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_mapping *out)
{
    return kvmmu_table ? kvmmu_table->lookup(vcpu, gva, access, out) : KVMMU_E_IMPORT;
}

/* Record the walk of one address, entry by entry of the guest's tables. It sets no accessed and dirty bits. */
static inline int kvmmu_walk_record(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_record *out)
{
    return kvmmu_table ? kvmmu_table->record(vcpu, gva, access, out) : KVMMU_E_IMPORT;
}

/* Forget the pages of [gpa, gpa + size) that a vCPU has read by callbacks; size 0: all. Host memory is never copied: nothing to do.
 * Translations are not kept: changes of page tables count at once. */
static inline int kvmmu_invalidate(kvmmu_vcpu vcpu, uint64_t gpa, uint64_t size)
{
    return kvmmu_table ? kvmmu_table->invalidate(vcpu, gpa, size) : KVMMU_E_IMPORT;
}

/* The meaning of a code that a function returned, in English. */
static inline const char *kvmmu_error_text(int code)
{
    return kvmmu_table ? kvmmu_table->error_text(code) : "kvmmu_import() was not called, or failed";
}

#endif /* KVMMU_TYPES_ONLY */
#endif /* KVMMU_KVMMU_H */
