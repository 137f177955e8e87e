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

from kvmmu.arch._bits cimport (
    ACCESS_FETCH_MASK, ACCESS_PFEC_MASK, ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK,
    ACC_ALL, ACC_EXEC_MASK, ACC_READ_MASK, ACC_USER_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, CR0_PE_MASK,
    EPT_SHADOW_STACK_MASK, EPT_SUB_PAGE_MASK, EPT_SUPPRESS_VE_MASK, EPT_VIOLATION_ACC_INSTR_MASK,
    EPT_VIOLATION_ACC_READ_MASK, EPT_VIOLATION_ACC_WRITE_MASK, EPT_VIOLATION_GVA_NX_MASK, EPT_VIOLATION_GVA_USER_MASK,
    EPT_VIOLATION_GVA_VALID_MASK, EPT_VIOLATION_GVA_WRITABLE_MASK, EPT_VIOLATION_PROT_EXEC_MASK, EPT_VIOLATION_PROT_READ_MASK,
    EPT_VIOLATION_PROT_SHADOW_STACK_MASK, EPT_VIOLATION_PROT_USER_EXEC_MASK, EPT_VIOLATION_SHADOW_STACK_MASK, INVALID_GPA,
    PAGE_OFFSET_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, PG_LEVEL_4K, ROLE_CR4_SMEP_MASK, ROLE_EXT_SHADOW_STACK_MASK,
    STATUS_EPT_VIOLATION, STATUS_LASS_VIOLATION, STATUS_NESTED_PAGE_FAULT, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT,
    STATUS_PML_FULL, STATUS_SPP_EVENT, STATUS_VIRT_EXCEPTION,
)
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.arch._gpte cimport kvmmu_is_canonical
from kvmmu.arch._linear cimport kvmmu_lass_violated, kvmmu_linear_rules, kvmmu_untagged
from kvmmu.memory._memory cimport gpa_to_hva, guest_mem, kvmmu_write64
from kvmmu.memory._vmx_memory cimport take_ve_area

# Registers of a vCPU that translation looks at. The PDPTEs are the vCPU's, not a walk's.
cdef struct vcpu_arch:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t rflags
    uint64_t pdptrs[4]
    uint64_t nested_pgd         # EPTP or nested CR3, while nested
    uint64_t keys               # the registers of protection keys: key_registers()

# The part of the processor model that a walk depends on.
cdef struct cpu_caps:
    int maxphyaddr
    bint gbpages
    bint pse36
    bint amd
    bint kvm                    # conformance: what KVM's software walker does, else what the manuals say
    bint npt_host               # the host has nested paging of SVM, under which guests have no PDPTE registers
    uint64_t encryption_mask    # the encryption bit of AMD, which is no address bit of CR3 and entries; 0: none

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
    uint8_t shadow_stack        # ACC_SHADOW_STACK or 0, of a shadow-stack access that got as far as step 6

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
    gva_to_gpa_fn gva_to_gpa        # IN access: resolved_access(). OUT r: every field
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
    uint64_t lam                    # LAM bits of CR3
    bint pre_processes              # addresses are pre-processed, by these rules
    kvmmu_linear_rules linear
    uint64_t gva_mask               # linear-address width outside long mode
    int canonical_shift             # 64 - linear-address width in long mode, else 0
    int level                       # of the root
    uint64_t present_mask           # any of these bits: the entry is present
    uint64_t base_mask              # of an entry, or of the root: where the table lies that it leads to
    uint64_t address_mask           # all bits but the encryption bit
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
    int maxphyaddr
    bint sub_pages                  # writes that it refuses are looked up in the sub-page permission table at spptp
    uint64_t spptp
    bint raises_ve                  # its violations become virtualization exceptions, by the information area at ve_area
    uint64_t ve_area

cdef inline uint64_t get_guest_pgd(const kvm_pagewalk *w) noexcept nogil:
    """Return the root register: CR3, EPTP or nested CR3."""
    return w.vcpu.nested_pgd if w.is_nested else w.vcpu.cr3


cdef inline uint32_t second_stage_access(const kvm_pagewalk *n, uint32_t access, bint final, uint32_t pte_access) noexcept nogil:
    """Return the access that the second stage sees. U: in EPT by the rights of the first stage; in NPT always, except under
    GMET."""
    access &= <uint32_t>(ACCESS_PFEC_MASK | ACCESS_SHADOW_STACK_MASK | ACCESS_PROBE_MASK)
    if n.user_by_pte:
        access &= ~<uint32_t>ACCESS_USER_MASK
        if final and pte_access & ACC_USER_MASK:
            access |= n.user_by_pte
    return access | n.user_always


cdef inline uint64_t linear_address(const kvm_pagewalk *w, uint64_t gva, uint32_t access) noexcept nogil:
    """Return the address that is translated, in the width of the mode and without a tag: what CR2 takes."""
    return kvmmu_untagged(&w.linear, gva, access) if w.pre_processes else gva & w.gva_mask


cdef inline uint32_t table_access(const kvm_pagewalk *n, uint32_t access) noexcept nogil:
    """Return the access to a paging-structure entry of the first stage, by a walk for this access."""
    return n.table_access | <uint32_t>ACCESS_USER_MASK | (access & <uint32_t>ACCESS_PROBE_MASK)


cdef inline bint is_sub_page_write(const kvm_pagewalk *n, uint32_t access, const walk_result *s) noexcept nogil:
    """True if a write that EPT refuses is looked up in the sub-page permission table: to a readable 4K page that says so."""
    return (access & ACCESS_WRITE_MASK and s.status == STATUS_PAGE_FAULT and s.error_code & PFERR_PRESENT_MASK and
            not s.error_code & PFERR_RSVD_MASK and s.level == PG_LEVEL_4K and s.pte & EPT_SUB_PAGE_MASK and
            s.pte_access & (ACC_READ_MASK | ACC_WRITE_MASK) == ACC_READ_MASK)


cdef inline uint8_t second_stage_fault(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access,
                                       const walk_result *s, walk_result *r) noexcept nogil:
    """Write the fault of a second stage with the result s into r. Returns its status. IN access: as the second stage saw it."""
    cdef uint64_t info
    r.pte, r.pte_gpa, r.level, r.hole = s.pte, s.pte_gpa, s.level, s.hole
    r.pte_access, r.shadow_stack = s.pte_access, s.shadow_stack
    r.fault_gpa = ngpa & n.fault_gpa_mask
    r.exit_qualification = 0
    if s.status == STATUS_PML_FULL:
        return STATUS_PML_FULL
    if s.status == STATUS_SPP_EVENT:
        r.exit_qualification = s.exit_qualification
        return STATUS_SPP_EVENT
    if n.fault_status == STATUS_NESTED_PAGE_FAULT:
        r.exit_qualification = s.error_code | (n.stage_final if final else n.stage_page)
        return STATUS_NESTED_PAGE_FAULT
    if s.error_code & PFERR_RSVD_MASK:
        return n.rsvd_status
    if access & ACCESS_WRITE_MASK:
        info = EPT_VIOLATION_ACC_WRITE_MASK
    elif access & ACCESS_FETCH_MASK:
        info = EPT_VIOLATION_ACC_INSTR_MASK
    else:
        info = EPT_VIOLATION_ACC_READ_MASK
    info |= EPT_VIOLATION_GVA_VALID_MASK | (n.stage_final if final else n.stage_page)
    info |= (s.pte_access & 3) * EPT_VIOLATION_PROT_READ_MASK
    if s.pte_access & ACC_EXEC_MASK:
        info |= EPT_VIOLATION_PROT_EXEC_MASK
    if s.pte_access & ACC_USER_EXEC_MASK and n.cpu_role & ROLE_CR4_SMEP_MASK:
        info |= EPT_VIOLATION_PROT_USER_EXEC_MASK
    if access & ACCESS_SHADOW_STACK_MASK:
        info |= EPT_VIOLATION_SHADOW_STACK_MASK
    if n.cpu_role & ROLE_EXT_SHADOW_STACK_MASK and s.error_code & PFERR_PRESENT_MASK and s.pte & EPT_SHADOW_STACK_MASK:
        info |= EPT_VIOLATION_PROT_SHADOW_STACK_MASK
    if final and n.advanced_info:
        if pte_access & ACC_USER_MASK:
            info |= EPT_VIOLATION_GVA_USER_MASK
        if pte_access & ACC_WRITE_MASK:
            info |= EPT_VIOLATION_GVA_WRITABLE_MASK
        if not pte_access & ACC_EXEC_MASK:
            info |= EPT_VIOLATION_GVA_NX_MASK
    r.exit_qualification = info
    return n.fault_status


cdef inline void convert_ept_violation(const kvm_pagewalk *w, uint64_t gva, bint set_ad, walk_result *r) noexcept nogil:
    """Make an EPT violation a virtualization exception of the guest, where the entry behind it and the guest let it be one."""
    if not w.ngpa.raises_ve or r.status != STATUS_EPT_VIOLATION or not r.level or r.pte & EPT_SUPPRESS_VE_MASK:
        return
    if w.vcpu.cr0 & CR0_PE_MASK and take_ve_area(w.ngpa.mem, w.ngpa.ve_area, r.exit_qualification, gva, r.fault_gpa, set_ad):
        r.status = STATUS_VIRT_EXCEPTION


cdef inline bint pre_process(const kvm_pagewalk *w, uint64_t *gva, uint32_t access, uint8_t *status) noexcept nogil:
    """Take the tag from an address. False: it is refused. OUT status: why"""
    status[0] = STATUS_LASS_VIOLATION
    if kvmmu_lass_violated(&w.linear, gva[0], access):
        return False
    status[0] = STATUS_NON_CANONICAL
    gva[0] = kvmmu_untagged(&w.linear, gva[0], access)
    return kvmmu_is_canonical(gva[0], w.canonical_shift)


cdef inline void set_no_walk(walk_result *r, uint64_t gpa, uint8_t status) noexcept nogil:
    """Set a result that no entry was read for."""
    r.gpa = r.ngpa = gpa
    r.pte = 0
    r.pte_gpa = r.fault_gpa = INVALID_GPA
    r.exit_qualification = 0
    r.error_code = 0
    r.status = status
    r.level = 0
    r.pte_access = <uint8_t>ACC_ALL if status == STATUS_OK else 0
    r.refs = 0
    r.hole = False
    r.shadow_stack = 0


cdef inline void log_dirty(const kvm_pagewalk *w, uint64_t gpa) noexcept nogil:
    """Write a page that is about to become dirty to the next entry of L1's page-modification log, which is not full."""
    cdef bint readonly = False
    cdef uint8_t *hva = gpa_to_hva(w.mem, w.pml.address + w.pml.index * sizeof(uint64_t), &readonly)
    if hva is not NULL and not readonly:
        kvmmu_write64(hva, gpa & ~PAGE_OFFSET_MASK)


# Take the functions that walk tables of this kind and format
cdef void use_walker(kvm_pagewalk *w) noexcept nogil

# nGPA to GPA through the second stage n: 0 or the STATUS_* of its fault. IN final: the address of the access itself, else
# that of a table; pte_access: rights of the first stage. OUT gpa; r: the second-stage fields and refs, on a fault pte too.
cdef uint8_t translate_nested_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access,
                                  bint set_ad, uint64_t *gpa, walk_result *r) noexcept nogil
