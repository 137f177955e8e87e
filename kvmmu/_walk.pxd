"""The walk of guest page tables: one body for every format.

    step 1: PAE: start from a PDPTE register
    step 2: read the entry of this level; a table in a hole reads as not present
    step 3: not present      -> #PF, P = 0
    step 4: reserved bits    -> #PF, P and RSVD
    step 5: not a leaf       -> next level, step 2
    step 6: rights, protection key -> #PF, P (and PK)
    step 7: accessed and dirty bits, all or nothing; a lost race restarts the walk

Sources: SDM vol. 3, "Hierarchical Paging Structures: an Overview", "Determination of Access Rights", "Page-Fault
Exceptions", "Accessed and Dirty Flags"; APM vol. 2, "Page Translation and Protection".
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._format cimport kvm_page_format
from kvmmu._memory cimport guest_mem

# Registers of a vCPU that translation looks at. The PDPTEs are the vCPU's, not a walk's.
cdef struct vcpu_arch:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t rflags
    uint64_t pdptrs[4]
    uint32_t pkru

# What of the processor model a walk depends on.
cdef struct cpu_caps:
    int maxphyaddr
    bint gbpages
    bint pse36
    bint amd
    bint kvm                    # conformance: what KVM's software walker does, else what the manuals say

cdef struct walk_result:
    uint64_t gpa                # INVALID_GPA on a fault
    uint64_t pte                # the leaf, or the entry that failed
    uint64_t pte_gpa            # where it lies; INVALID_GPA for a PDPTE register or none
    uint32_t error_code
    uint8_t status              # STATUS_*
    uint8_t level               # of pte; 0 without one
    uint8_t pte_access          # ACC_*: AND over the walk; 0 if an entry is not present
    uint8_t refs                # entries read
    bint hole                   # pte lies in no slot

# One entry of a walk, for records.
cdef struct walk_step:
    uint64_t pte
    uint64_t pte_gpa
    int level
    uint32_t access             # ACC_* of this entry alone; 0 if it is not present

cdef struct kvm_pagewalk

ctypedef void (*gva_to_gpa_fn)(const kvm_pagewalk *w, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil
ctypedef int (*walk_steps_fn)(const kvm_pagewalk *w, uint64_t gva, uint32_t access, walk_step *steps) noexcept nogil

# How to walk one set of guest tables (kvm_pagewalk). All of it follows from the role and the processor model.
cdef struct kvm_pagewalk:
    gva_to_gpa_fn gva_to_gpa        # IN access: without IMPLICIT. OUT r: every field
    walk_steps_fn walk_steps        # the entries of the walk, root first, A/D untouched; returns their number (0 to 5)
    const guest_mem *mem
    const vcpu_arch *vcpu
    const kvm_page_format *fmt
    uint64_t cpu_role
    uint64_t gva_mask               # linear-address width outside long mode
    int canonical_shift             # 64 - linear-address width in long mode, else 0
    int level                       # of the root
    uint64_t page_size_mask         # bit 7 where it marks a leaf; 0 in 2-level paging without CR4.PSE
    uint64_t pse36_mask             # bits of a 4M PDE that are address bits 32 and up
    uint32_t pferr_mask             # access bits that an error code reports

cdef void init_pagewalk(kvm_pagewalk *w, uint64_t cpu_role, const cpu_caps *caps) noexcept nogil
cdef void init_page_format(kvm_page_format *fmt, uint64_t cpu_role, const cpu_caps *caps) noexcept nogil
cdef int pse36_bits(const cpu_caps *caps) noexcept nogil
