"""The walk of guest page tables: one body for every format and for both stages.

    step 1: PAE: start from a PDPTE, a register of the vCPU. Under nested paging of SVM, and in its tables, it is a word in
            memory, reached and checked as any entry is
    step 2: read the entry of this level, at the address that the second stage gives; a table in a hole reads as not present
    step 3: not present      -> fault, P = 0
    step 4: reserved bits    -> fault, P and RSVD
    step 5: not a leaf       -> next level, step 2
    step 6: rights, protection key -> fault, P (and PK)
    step 7: accessed and dirty bits, all or nothing; a lost race restarts the walk
    step 8: the second stage of the final address (KVM does this before step 7)

A fault of the second stage ends the walk and belongs to L1.

Sources: SDM vol. 3, "Hierarchical Paging Structures: an Overview", "Determination of Access Rights", "Page-Fault
Exceptions", "Accessed and Dirty Flags", "The Extended Page Table Mechanism (EPT)"; APM vol. 2, "Page Translation and
Protection", "Nested Paging".
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport ACCESS_PFEC_MASK, ACCESS_USER_MASK, ACC_USER_MASK
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.memory._memory cimport guest_mem

# Registers of a vCPU that translation looks at. The PDPTEs are the vCPU's, not a walk's.
cdef struct vcpu_arch:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t rflags
    uint64_t pdptrs[4]
    uint64_t nested_pgd         # EPTP or nested CR3, while nested
    uint32_t pkru

# The part of the processor model that a walk depends on.
cdef struct cpu_caps:
    int maxphyaddr
    bint gbpages
    bint pse36
    bint amd
    bint kvm                    # conformance: what KVM's software walker does, else what the manuals say
    bint npt_host               # the host has nested paging of SVM, under which guests have no PDPTE registers

# L1's page-modification log.
cdef struct pml_log:
    uint64_t address            # guest-physical, of a page of 512 addresses
    uint16_t index              # next entry to fill, counting down; beyond 511: full
    uint32_t lock               # held while an entry is filled and the dirty bit behind it is set

cdef struct walk_result:
    uint64_t gpa                # INVALID_GPA on a fault
    uint64_t ngpa               # address after the first stage; INVALID_GPA where it failed
    uint64_t pte                # the leaf, or the entry that failed, of the stage that failed
    uint64_t pte_gpa            # where it lies; INVALID_GPA for a PDPTE register or none
    uint64_t fault_gpa          # second-stage fault: the address that it could not translate, else INVALID_GPA
    uint64_t exit_qualification  # second-stage fault: exit qualification, or EXITINFO1, else 0
    uint32_t error_code
    uint8_t status              # STATUS_*
    uint8_t level               # of pte; 0 without one
    uint8_t pte_access          # ACC_*: AND over the walk; 0 if an entry is not present
    uint8_t refs                # entries read, in both stages
    bint hole                   # pte lies in no slot

# One entry of a walk, for records and for a shadow MMU.
cdef struct walk_step:
    uint64_t pte                # as the walk left it
    uint64_t pte_gpa            # before the second stage
    int level
    uint32_t access             # ACC_* of this entry alone; 0 if it is not present
    bint sets_accessed          # this walk has set its A, its D
    bint sets_dirty

# The kinds of a kvm_pagewalk: what its gva_to_gpa walks.
cdef enum:
    WALK_TABLES
    WALK_DIRECT                     # paging off: identity, then the second stage if there is one
    WALK_SECOND_STAGE               # the second stage alone

cdef struct kvm_pagewalk

ctypedef void (*gva_to_gpa_fn)(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil
ctypedef int (*walk_steps_fn)(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil
ctypedef int (*walk_addr_fn)(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_result *r,
                             walk_step *steps) noexcept nogil

# How to walk one set of guest tables (kvm_pagewalk). All of it follows from the role and the processor model.
cdef struct kvm_pagewalk:
    gva_to_gpa_fn gva_to_gpa        # IN access: without IMPLICIT. OUT r: every field
    walk_steps_fn walk_steps        # the entries of the walk, root first, A/D untouched; returns their number (0 to 5)
    walk_addr_fn walk_addr          # both at once: the translation, with A/D, and the entries that it read
    const guest_mem *mem
    const vcpu_arch *vcpu
    const kvm_page_format *fmt
    const kvm_pagewalk *ngpa        # the second stage, of a first stage; else NULL
    uint8_t kind                    # WALK_*
    int format                      # KVMMU_FORMAT_* of the tables
    uint32_t second                 # which of the second stages of its batch ngpa is
    uint64_t cpu_role
    uint64_t gva_mask               # linear-address width outside long mode
    int canonical_shift             # 64 - linear-address width in long mode, else 0
    int level                       # of the root
    uint64_t present_mask           # any of these bits: the entry is present
    uint64_t page_size_mask         # bit 7 where it marks a leaf; 0 in 2-level paging without CR4.PSE
    uint64_t pse36_mask             # bits of a 4M PDE that are address bits 32 and up
    uint64_t accessed_mask          # A, and D one bit above it; 0: this format's A/D bits are off
    uint32_t pferr_mask             # access bits that an error code reports
    bint final_before_ad            # KVM: step 8 comes before step 7
    bint pdptes_in_memory           # PAE: step 1 reads memory
    uint64_t pdpte_rsvd_mask        # PAE: reserved bits of such a PDPTE; 0: not checked (KVM's second stage)
    # of a second stage
    bint is_nested
    uint64_t ngpa_rsvd_mask         # address bits that these tables cannot translate
    uint64_t fault_gpa_mask         # what of an address a fault reports: KVM's walker knows the page alone
    uint64_t stage_final, stage_page    # bits of the exit information
    uint32_t user_always            # NPT: every access is a user's, unless GMET
    uint32_t user_by_pte            # EPT: a final access is a user's by the rights of the first stage
    uint32_t table_access           # WRITE where a read of a guest paging-structure entry counts as a write
    uint8_t fault_status            # STATUS_* of a fault, and of one with RSVD
    uint8_t rsvd_status
    bint advanced_info              # exit qualification has bits 11:9
    pml_log *pml                    # NULL: no log

cdef inline uint64_t get_guest_pgd(const kvm_pagewalk *w) noexcept nogil:
    """Return the root register: CR3, EPTP or nested CR3."""
    return w.vcpu.nested_pgd if w.is_nested else w.vcpu.cr3


cdef inline uint32_t second_stage_access(const kvm_pagewalk *n, uint32_t access, bint final, uint32_t pte_access) noexcept nogil:
    """Return the access that the second stage sees. U: in EPT by the rights of the first stage; in NPT always, except under
    GMET."""
    access &= <uint32_t>ACCESS_PFEC_MASK
    if n.user_by_pte:
        access &= ~<uint32_t>ACCESS_USER_MASK
        if final and pte_access & ACC_USER_MASK:
            access |= n.user_by_pte
    return access | n.user_always


# Take the functions that walk tables of this kind and format
cdef void use_walker(kvm_pagewalk *w) noexcept nogil

# nGPA to GPA through the second stage n: 0 or the STATUS_* of its fault. IN final: the address of the access itself, else
# that of a table; pte_access: rights of the first stage. OUT gpa; r: the second-stage fields and refs, on a fault pte too.
cdef uint8_t translate_nested_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access,
                                  bint set_ad, uint64_t *gpa, walk_result *r) noexcept nogil
