"""The state of one vCPU on its host that accesses and exits use."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport gva_to_gpa_fn, kvm_pagewalk, pml_log, vcpu_arch
from kvmmu.arch._bits cimport PAGE_SIZE
from kvmmu.arch._linear cimport kvmmu_linear_rules
from kvmmu.machine._rights cimport rights_tables
from kvmmu.memory._memory cimport guest_slot
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_vcpu
from kvmmu.tlb._tlb cimport tlb

# The result of one access.
cdef struct access_result:
    uint64_t gpa                    # INVALID_GPA on a fault of the guest
    uint64_t hpa                    # INVALID_GPA on a fault, and for MMIO
    uint64_t fault_gpa              # of a fault of L1's second stage: its address, and what the exit to L1 says
    uint64_t exit_qualification
    uint32_t error_code
    uint8_t status                  # STATUS_*
    uint8_t ret                     # RET_PF_* of the last exit; CONTINUE without one
    uint8_t exits

# A guest-physical mapping in the processor's cache. Guest tables are what it is for: many walks read the same ones.
cdef struct gpa_entry:
    uint64_t gfn
    uint64_t hpa
    uint32_t access
    uint32_t epoch                  # of the stage when the entry was made; in another epoch it is not valid

# The processor's walk of SPTEs, with its cache of guest-physical mappings.
cdef struct cached_stage:
    kvm_pagewalk w                  # first: the walker passes its address
    gva_to_gpa_fn walk              # of the format; w.gva_to_gpa looks into the entries before
    uint32_t epoch                  # from 1
    gpa_entry entries[512]

# One vCPU on its host. Owned by the Modes of a Machine.
cdef struct machine:
    kvm *k
    kvm_vcpu *vcpu
    kvm_mmu *mmu                    # the active one
    tlb *tlb
    guest_slot *arena               # of the host memory that holds the SPTEs
    vcpu_arch *arch                 # the guest's registers
    vcpu_arch host                  # EPTP, nested CR3, or CR3 as the processor has it
    uint64_t root_hpa               # of the root that they point to
    kvm_pagewalk hw                 # the processor's walk: of the guest's tables, or under shadow paging of the SPTEs
    kvm_pagewalk sw                 # KVM's walk of the guest's tables
    cached_stage stage              # the processor's walk of SPTEs, as its second stage
    bint pre_processes              # linear addresses of accesses are pre-processed, by these rules
    kvmmu_linear_rules linear
    const uint8_t *data             # the bytes that the access under way writes; NULL: they are not known
    size_t size                     # of data
    bint page_table_writing         # the instruction is of a kind that KVM expects to write page tables
    bint advanced_info              # L1 reads bits 11:9 of exit qualifications
    pml_log pml
    rights_tables rights


cdef inline void use_arena(machine *m) noexcept nogil:
    """Take the present place of the SPTEs, which move when their array grows."""
    m.arena.gpa = m.k.arena_hpa
    m.arena.size = m.k.page_end * PAGE_SIZE
    m.arena.hva = <uint8_t *>m.k.sptes
