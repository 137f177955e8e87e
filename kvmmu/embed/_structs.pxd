"""The structures behind the handles of `kvmmu.h`: the public structures, memories and vCPUs.

A handle is a number: an index in bits 15:0, a kind in bits 23:16, and above them a count that never repeats. The structures of
vCPUs and memories are never given back to the allocator, only used again, so that a thread with a stale handle may look into one.

A vCPU is used by its owner alone. Whoever is not the owner may read `owner`, and take it when it is 0; `id` says then whether
it is still the vCPU that was meant. Memories, and the tables of both, are changed under one lock. Nobody who holds the lock takes
the GIL or runs a callback.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from kvmmu._walk cimport kvm_pagewalk, pml_log, vcpu_arch
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.memory._memory cimport guest_mem, guest_page, guest_slot, missing_pages
from kvmmu.walk._fast cimport fast_walk

cdef extern from *:
    """
    #define KVMMU_TYPES_ONLY
    """

cdef extern from "kvmmu/include/kvmmu/kvmmu.h" nogil:
    enum:
        KVMMU_API_VERSION
        KVMMU_OK
        KVMMU_E_NULL
        KVMMU_E_ARGUMENT
        KVMMU_E_HANDLE
        KVMMU_E_THREAD
        KVMMU_E_BUSY
        KVMMU_E_MEMORY
        KVMMU_E_CALLBACK
        KVMMU_E_REGISTERS
        KVMMU_E_PYTHON
        KVMMU_E_VERSION
        KVMMU_E_IMPORT
        KVMMU_ACCESS_WRITE
        KVMMU_ACCESS_USER
        KVMMU_ACCESS_AC
        KVMMU_ACCESS_FETCH
        KVMMU_ACCESS_IMPLICIT
        KVMMU_ACCESS_SHADOW_STACK
        KVMMU_ACCESS_PROBE
        KVMMU_ACCESS_NO_AD
        KVMMU_MEMORY_READONLY
        KVMMU_CPU_AMD
        KVMMU_CPU_KVM
        KVMMU_CPU_NO_GBPAGES
        KVMMU_CPU_NO_PSE36
        KVMMU_CPU_NO_LA57
        KVMMU_CPU_NO_NX
        KVMMU_CPU_NO_SMEP
        KVMMU_CPU_NO_SMAP
        KVMMU_CPU_NO_PKU
        KVMMU_CPU_NO_PCID
        KVMMU_CPU_NO_LAM
        KVMMU_CPU_NO_SHSTK
        KVMMU_CPU_NO_PKS
        KVMMU_CPU_NO_LASS
        KVMMU_CPU_NO_UAI
        KVMMU_CPU_STRICT
        KVMMU_FEATURE_UMIP
        KVMMU_FEATURE_FSGSBASE
        KVMMU_FEATURE_XSAVE
        KVMMU_FEATURE_CET
        KVMMU_FEATURE_FRED
        KVMMU_FEATURE_VMX
        KVMMU_FEATURE_SMX
        KVMMU_FEATURE_KL
        KVMMU_FEATURE_UINTR
        KVMMU_FEATURE_SVM
        KVMMU_FEATURE_LMSLE
        KVMMU_FEATURE_FFXSR
        KVMMU_FEATURE_TCE
        KVMMU_FEATURE_MCOMMIT
        KVMMU_FEATURE_INTWB
        KVMMU_FEATURE_AUTOIBRS
        KVMMU_REGISTERS_PDPTRS
        KVMMU_STAGE_EPT
        KVMMU_STAGE_NPT
        KVMMU_STAGE_MBEC
        KVMMU_STAGE_NO_EXECONLY
        KVMMU_STAGE_NO_ADVANCED_INFO
        KVMMU_STAGE_NO_2M
        KVMMU_STAGE_NO_1G
        KVMMU_STAGE_PML
        KVMMU_STAGE_SPP
        KVMMU_STAGE_VE
        KVMMU_STAGE_GMET
        KVMMU_EXIT_NONE
        KVMMU_EXIT_EPT_VIOLATION
        KVMMU_EXIT_EPT_MISCONFIG
        KVMMU_EXIT_PML_FULL
        KVMMU_EXIT_SPP_EVENT
        KVMMU_EXIT_NPF
        KVMMU_READ_DONE
        KVMMU_READ_HOLE
        KVMMU_MAX_STEPS

    const char *KVMMU_CAPSULE_NAME

    ctypedef uint64_t kvmmu_memory
    ctypedef uint64_t kvmmu_vcpu

    ctypedef struct kvmmu_callbacks:
        uint32_t size
        uint32_t cache_pages
        uint64_t memory_size
        void *opaque
        int (*read)(void *opaque, uint64_t gpa, void *page) noexcept nogil
        int (*write)(void *opaque, uint64_t gpa, const void *data, size_t n) noexcept nogil

    ctypedef struct kvmmu_cpu:
        uint32_t size
        uint32_t maxphyaddr
        uint32_t flags
        uint32_t c_bit
        uint32_t features

    ctypedef struct kvmmu_registers:
        uint32_t size
        uint32_t flags
        uint64_t cr0
        uint64_t cr3
        uint64_t cr4
        uint64_t efer
        uint64_t rflags
        uint64_t pdptrs[4]
        uint32_t pkru
        uint32_t pkrs

    ctypedef struct kvmmu_second_stage:
        uint32_t size
        uint32_t flags
        uint64_t root
        uint64_t cr4
        uint64_t efer
        uint64_t spptp
        uint64_t ve_area
        uint64_t pml_address
        uint32_t pml_index
        uint32_t reserved

    ctypedef struct kvmmu_result:
        uint64_t gpa
        uint32_t error_code
        uint8_t status
        uint8_t level
        uint16_t reserved

    ctypedef struct kvmmu_nested_result:
        uint64_t gpa
        uint64_t ngpa
        uint64_t linear
        uint64_t pte
        uint64_t pte_gpa
        uint64_t fault_gpa
        uint64_t exit_qualification
        uint32_t error_code
        uint32_t exit_reason
        uint8_t status
        uint8_t level
        uint8_t rights
        uint8_t reads

    ctypedef struct kvmmu_mapping:
        uint64_t gpa
        uint64_t size
        uint64_t pte
        uint64_t pte_gpa
        uint32_t error_code
        uint8_t status
        uint8_t level
        uint8_t rights
        uint8_t pkey
        uint8_t accessed
        uint8_t dirty
        uint8_t global_ "global"

    ctypedef struct kvmmu_step:
        uint64_t entry
        uint64_t entry_gpa
        uint16_t index
        uint8_t level
        uint8_t rights

    ctypedef struct kvmmu_record:
        kvmmu_mapping end
        uint32_t count
        kvmmu_step *steps

    ctypedef struct kvmmu_api:
        uint32_t version
        uint32_t size
        int (*memory_create)(kvmmu_memory *out) noexcept nogil
        int (*memory_create_callbacks)(const kvmmu_callbacks *callbacks, kvmmu_memory *out) noexcept nogil
        int (*memory_add)(kvmmu_memory memory, uint64_t gpa, void *host, uint64_t size, uint32_t flags) noexcept nogil
        int (*memory_remove)(kvmmu_memory memory, uint64_t gpa) noexcept nogil
        int (*memory_free)(kvmmu_memory memory) noexcept nogil
        int (*vcpu_create)(kvmmu_memory memory, const kvmmu_cpu *cpu, kvmmu_vcpu *out) noexcept nogil
        int (*vcpu_release)(kvmmu_vcpu vcpu) noexcept nogil
        int (*vcpu_free)(kvmmu_vcpu vcpu) noexcept nogil
        int (*set_registers)(kvmmu_vcpu vcpu, const kvmmu_registers *registers) noexcept nogil
        int (*get_registers)(kvmmu_vcpu vcpu, kvmmu_registers *out) noexcept nogil
        int (*translate)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil
        int (*translate_many)(kvmmu_vcpu vcpu, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                              kvmmu_result *out, size_t *done) noexcept nogil
        int (*lookup)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_mapping *out) noexcept nogil
        int (*record)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_record *out) noexcept nogil
        int (*invalidate)(kvmmu_vcpu vcpu, uint64_t gpa, uint64_t size) noexcept nogil
        const char *(*error_text)(int code) noexcept nogil
        int (*set_second_stage)(kvmmu_vcpu vcpu, const kvmmu_second_stage *stage) noexcept nogil
        int (*get_second_stage)(kvmmu_vcpu vcpu, kvmmu_second_stage *out) noexcept nogil
        int (*translate_nested)(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access, kvmmu_nested_result *out) noexcept nogil

cdef extern from "kvmmu/embed/_handles.h" nogil:
    uintptr_t kvmmu_this_thread()
    uintptr_t kvmmu_owner(const uintptr_t *owner)
    bint kvmmu_take(uintptr_t *owner, uintptr_t self)
    void kvmmu_let_go(uintptr_t *owner)
    void *KVMMU_TABLE_LOAD(void **place)
    void KVMMU_TABLE_STORE(void **place, void *value)

cdef enum:
    INDEX_MASK = 0xffff
    KIND_MEMORY = 1
    KIND_VCPU = 2
    KIND_SHIFT = 16
    COUNT_SHIFT = 24
    MAX_HANDLES = 1 << 16               # of each kind, and the index 0, which is none
    CPU_SIZE_1_0 = 12                   # of the kvmmu_cpu of version 1.0, which ends with its flags

# The pages that one vCPU has read by callbacks. It belongs to the vCPU: nobody else reads or changes it.
cdef struct page_cache:
    guest_mem mem
    missing_pages misses                # that a walk found missing
    const kvmmu_callbacks *callbacks
    guest_slot *slots                   # slots[0] has no bytes, page i is slots[i + 1]
    guest_page *pages
    uint8_t *bytes                      # of page i at i * PAGE_SIZE
    size_t count, capacity

# Slots of the embedder's, or callbacks.
cdef struct c_memory:
    uint64_t id                         # the handle; 0: free
    size_t vcpus                        # that are over it
    size_t count                        # of slots
    guest_slot *slots                   # slots[0] is the largest, the others ascend by gpa; one without bytes if there is none
    bint has_callbacks
    kvmmu_callbacks callbacks

cdef struct c_vcpu:
    uint64_t id                         # the handle; 0: free
    size_t index                        # of its place in the table
    uintptr_t owner                     # kvmmu_this_thread() of its thread; 0: nobody
    bint busy                           # one of its callbacks may be under way
    bint borrowed                       # it was nobody's before `take_vcpus()`
    uint32_t ac                         # ACCESS_AC_MASK if the registers have EFLAGS.AC
    fast_walk fast
    kvm_pagewalk w
    vcpu_arch arch
    kvm_page_format fmt
    # its second stage, if stage.flags is not 0
    kvmmu_second_stage stage
    kvm_pagewalk n
    vcpu_arch narch
    kvm_page_format nfmt
    pml_log pml
    guest_mem mem                       # that it walks: the slots of its memory, or its cache
    page_cache *cache                   # NULL without callbacks
    c_memory *memory
    kvmmu_registers registers           # in force
    uint64_t cr3_fixed                  # bits of CR3 that Python code has to look at
    void *python                        # a reference to its kvmmu.Vcpu, of a free one too
