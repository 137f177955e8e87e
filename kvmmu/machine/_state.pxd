"""One virtual processor on its host, as accesses and exits see it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport gva_to_gpa_fn, kvm_pagewalk, pml_log, vcpu_arch
from kvmmu.arch._bits cimport PAGE_SIZE
from kvmmu.machine._rights cimport rights_tables
from kvmmu.memory._memory cimport guest_slot
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu, kvm_vcpu
from kvmmu.tlb._tlb cimport tlb

# What became of one access.
cdef struct access_result:
    uint64_t gpa                    # INVALID_GPA on a fault of the guest
    uint64_t hpa                    # INVALID_GPA on a fault, and for MMIO
    uint64_t fault_gpa              # of a fault of L1's second stage: its address, and what the exit to L1 says
    uint64_t exit_qualification
    uint32_t error_code
    uint8_t status                  # STATUS_*
    uint8_t ret                     # RET_PF_* of the last exit; CONTINUE without one
    uint8_t exits

# A translation of the second stage that the processor remembers, for the sake of guest tables: many walks cross the same ones.
cdef struct gpa_entry:
    uint64_t gfn
    uint64_t hpa
    uint32_t access
    uint32_t epoch                  # of the last flush; an entry of another one is none

# The processor's walk of SPTEs, with what it remembers.
cdef struct cached_stage:
    kvm_pagewalk w                  # first: the walker passes its address
    gva_to_gpa_fn walk              # of the format; w.gva_to_gpa looks into the entries before
    uint32_t epoch                  # from 1
    gpa_entry entries[512]

# One vCPU on its host, as an access sees it. Owned by a Machine.
cdef struct machine:
    kvm *k
    kvm_vcpu *vcpu
    kvm_mmu *mmu                    # the active one
    tlb *tlb
    guest_slot *arena               # of the host memory that holds the SPTEs
    vcpu_arch *arch                 # the guest's registers
    vcpu_arch host                  # EPTP, nested CR3, or CR3 as the processor has it
    uint64_t root_hpa               # of the root that they point to
    kvm_pagewalk hw                 # the processor's walk: of the guest's tables, or under shadow paging of what stands for them
    kvm_pagewalk sw                 # KVM's walk of the guest's tables
    cached_stage stage              # the processor's walk of SPTEs, as its second stage
    const uint8_t *data             # what the access under way writes; NULL: bytes that nobody knows
    size_t size                     # of data
    bint page_table_writing         # the instruction is of a kind that KVM expects to write page tables
    bint advanced_info              # L1 reads bits 11:9 of exit qualifications
    pml_log pml
    rights_tables rights


cdef inline void use_arena(machine *m) noexcept nogil:
    """The SPTEs where they are now."""
    m.arena.gpa = m.k.arena_hpa
    m.arena.size = m.k.page_end * PAGE_SIZE
    m.arena.hva = <uint8_t *>m.k.sptes
