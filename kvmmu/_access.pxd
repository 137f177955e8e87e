"""One access of one virtual processor: TLB, the processor's walk of both stages, exits, and KVM's answers to them.

How it goes (`machine_access`):
    step 1: what was requested of the vCPU: leave obsolete roots, flush the TLB
    step 2: a TLB entry that allows the access is the answer
    step 3: the processor's walk, by the manuals: guest tables, each reached through the SPTEs, and the SPTEs of what they come to
    step 4: a fault of the guest's own tables belongs to the guest: the answer
    step 5: an exit: the page-modification log is read; then kvm_mmu_page_fault()
    step 6: EMULATE: KVM carries the access out with its own walk of the guest's tables: the answer; else step 1 again

The SPTEs are walked by the guest walker, over the host memory that they lie in.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._bits cimport PAGE_SIZE
from kvmmu._memory cimport guest_slot
from kvmmu._tlb cimport tlb
from kvmmu._walk cimport gva_to_gpa_fn, kvm_pagewalk, pml_log, vcpu_arch, walk_result
from kvmmu.mmu._kvm cimport kvm, kvm_mmu, kvm_vcpu

# What became of one access.
cdef struct access_result:
    uint64_t gpa                    # INVALID_GPA on a fault of the guest
    uint64_t hpa                    # INVALID_GPA on a fault, and for MMIO
    uint32_t error_code
    uint8_t status                  # STATUS_*
    uint8_t ret                     # RET_PF_* of the last exit; CONTINUE without one
    uint8_t exits

# Where the results of many go.
cdef struct access_columns:
    uint64_t *gpa
    uint64_t *hpa
    uint32_t *error_code
    uint8_t *status
    uint8_t *ret
    uint8_t *exits

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

# Bit i of a word: the access with index i in permissions[] is allowed, as far as that condition goes.
cdef struct rights_tables:
    uint16_t guest[16]              # by ACC_* of the guest's tables
    uint16_t nested[2][16]          # by ACC_USER of those, and ACC_* of the host's
    uint16_t keys[16]               # by protection key, of a user page
    uint16_t writes                 # which accesses write

# One vCPU on its host, as an access sees it. Owned by a Machine.
cdef struct machine:
    kvm *k
    kvm_vcpu *vcpu
    kvm_mmu *mmu                    # the active one
    tlb *tlb
    guest_slot *arena               # of the host memory that holds the SPTEs
    vcpu_arch *arch                 # the guest's registers
    vcpu_arch host                  # EPTP or nested CR3
    kvm_pagewalk hw                 # the processor's walk of the guest's tables
    kvm_pagewalk sw                 # KVM's
    cached_stage stage              # the processor's walk of SPTEs
    pml_log pml
    uint32_t pml_page               # of the arena; 0: none
    uint32_t rights_epoch           # of the registers that rights are made from; from 1
    rights_tables rights


cdef inline void use_arena(machine *m) noexcept nogil:
    """The SPTEs where they are now."""
    m.arena.gpa = m.k.arena_hpa
    m.arena.size = m.k.page_end * PAGE_SIZE
    m.arena.hva = <uint8_t *>m.k.sptes


cdef void cached_gva_to_gpa(const kvm_pagewalk *w, uint64_t gpa, uint32_t access, bint set_ad, walk_result *r) noexcept nogil
# The registers that rights depend on have changed
cdef void machine_load_rights(machine *m) noexcept nogil
# Whether a translation with these rights of both stages allows an access, by the rules themselves
cdef bint allows(const machine *m, uint32_t acc, uint32_t nacc, uint32_t pkey, uint32_t access) noexcept nogil
# Step 1: 0, or -1 for want of memory
cdef int machine_prepare_root(machine *m) noexcept nogil
cdef int machine_access(machine *m, uint64_t gva, uint32_t access, access_result *out) noexcept nogil
# All rows, in order: 0, or the negative errno of the row that failed. OUT row
cdef int machine_run(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                     const access_columns *out, size_t *row) noexcept nogil
# Step 6. IN addr: within the linear-address width
cdef void machine_emulate(machine *m, uint64_t addr, uint32_t access, access_result *out) noexcept nogil
# What the processor logged is dirty; its log is empty again
cdef void machine_drain_pml(machine *m) noexcept nogil
