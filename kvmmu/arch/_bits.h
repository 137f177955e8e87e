/* Every architectural number of kvmmu, once.
 *
 * _SHIFT first, _MASK derived. Python sees these values through _bits.pyx, Cython through _bits.pxd.
 * Sources: SDM vol. 3, "Paging" and "VMX Support for Address Translation"; APM vol. 2, "Page Translation and Protection".
 */
#ifndef KVMMU_BITS_H
#define KVMMU_BITS_H

#include <stdint.h>

#define KVMMU_BIT(n) (UINT64_C(1) << (n))
/* bits a through b inclusive */
#define KVMMU_BITS(a, b) ((~UINT64_C(0) >> (63 - (b))) & (~UINT64_C(0) << (a)))

/* ---- levels, counted from the leaf ---------------------------------------------------------------------------- */
#define PG_LEVEL_NONE 0
#define PG_LEVEL_4K 1
#define PG_LEVEL_2M 2
#define PG_LEVEL_1G 3
#define PG_LEVEL_512G 4
#define PG_LEVEL_256T 5
#define PT_MAX_LEVELS 5

#define PAGE_SHIFT 12
#define PAGE_SIZE KVMMU_BIT(PAGE_SHIFT)
#define PAGE_OFFSET_MASK (PAGE_SIZE - 1)
#define GPA_BITS 52
#define GPA_LIMIT KVMMU_BIT(GPA_BITS)
#define INVALID_GPA (~UINT64_C(0))

/* ---- paging-structure entries: 64-bit and what both widths share ---------------------------------------------- */
#define PT_PRESENT_SHIFT 0
#define PT_WRITABLE_SHIFT 1
#define PT_USER_SHIFT 2
#define PT_ACCESSED_SHIFT 5
#define PT_DIRTY_SHIFT 6
#define PT_PAGE_SIZE_SHIFT 7
#define PT_GLOBAL_SHIFT 8
#define PT_AMD_MBZ_SHIFT 8 /* of a PML4E or PML5E: must be zero on AMD */
#define PT_PRESENT_MASK KVMMU_BIT(PT_PRESENT_SHIFT)
#define PT_WRITABLE_MASK KVMMU_BIT(PT_WRITABLE_SHIFT)
#define PT_USER_MASK KVMMU_BIT(PT_USER_SHIFT)
#define PT_ACCESSED_MASK KVMMU_BIT(PT_ACCESSED_SHIFT)
#define PT_DIRTY_MASK KVMMU_BIT(PT_DIRTY_SHIFT)
#define PT_PAGE_SIZE_MASK KVMMU_BIT(PT_PAGE_SIZE_SHIFT)
#define PT_GLOBAL_MASK KVMMU_BIT(PT_GLOBAL_SHIFT)
#define PT_AMD_MBZ_MASK KVMMU_BIT(PT_AMD_MBZ_SHIFT)

#define PT64_INDEX_BITS 9
#define PT64_INDEX_MASK (KVMMU_BIT(PT64_INDEX_BITS) - 1)
#define PT64_BASE_ADDR_MASK KVMMU_BITS(PAGE_SHIFT, GPA_BITS - 1)
#define PT64_PKEY_SHIFT 59
#define PT64_PKEY_MASK KVMMU_BITS(0, 3) /* after the shift */
#define PT64_NX_SHIFT 63
#define PT64_NX_MASK KVMMU_BIT(PT64_NX_SHIFT)
#define PT64_2M_RSVD_MASK KVMMU_BITS(13, 20) /* below the address of a 2M page, above its PAT bit */
#define PT64_1G_RSVD_MASK KVMMU_BITS(13, 29)
#define PAE_PDPTE_RSVD_MASK (KVMMU_BITS(1, 2) | KVMMU_BITS(5, 8))
#define PAE_RSVD_LIMIT_SHIFT 62 /* PAE reserves MAXPHYADDR..62, long mode only MAXPHYADDR..51 */

#define PT32_INDEX_BITS 10
#define PT32_INDEX_MASK (KVMMU_BIT(PT32_INDEX_BITS) - 1)
#define PT32_BASE_ADDR_MASK KVMMU_BITS(PAGE_SHIFT, 31)
#define PT32_PSE36_SHIFT 13      /* PDE bit that becomes physical-address bit 32 */
#define PT32_PSE36_LAST_SHIFT 20 /* PDE bit that becomes physical-address bit 39 */
#define PT32_PSE36_TO_PA_SHIFT (32 - PT32_PSE36_SHIFT)
#define PT32_PSE36_KVM_BITS 4 /* KVM always takes four bits, whatever MAXPHYADDR */
#define PT32_4M_RSVD_LAST_SHIFT 21
#define PT32_PAE_INDEX_SHIFT 30
#define PT32_PAE_INDEX_MASK KVMMU_BITS(0, 1)

/* ---- EPT entries ---------------------------------------------------------------------------------------------- */
#define EPT_READABLE_SHIFT 0
#define EPT_WRITABLE_SHIFT 1
#define EPT_EXECUTABLE_SHIFT 2
#define EPT_MT_SHIFT 3
#define EPT_USER_EXECUTABLE_SHIFT 10
#define EPT_READABLE_MASK KVMMU_BIT(EPT_READABLE_SHIFT)
#define EPT_WRITABLE_MASK KVMMU_BIT(EPT_WRITABLE_SHIFT)
#define EPT_EXECUTABLE_MASK KVMMU_BIT(EPT_EXECUTABLE_SHIFT)
#define EPT_USER_EXECUTABLE_MASK KVMMU_BIT(EPT_USER_EXECUTABLE_SHIFT)
#define EPT_TABLE_RSVD_MASK KVMMU_BITS(3, 6)
#define EPT_2M_RSVD_MASK KVMMU_BITS(12, 20) /* no PAT bit: bit 12 is reserved too */
#define EPT_1G_RSVD_MASK KVMMU_BITS(12, 29)
#define EPT_MT_XWR_MASK KVMMU_BITS(0, 5)
#define EPT_RWX_MASK (EPT_READABLE_MASK | EPT_WRITABLE_MASK | EPT_EXECUTABLE_MASK)
#define EPT_SHADOW_STACK_SHIFT 60
#define EPT_SHADOW_STACK_MASK KVMMU_BIT(EPT_SHADOW_STACK_SHIFT) /* of a leaf: supervisor shadow-stack accesses are allowed */
#define EPT_SUB_PAGE_MASK KVMMU_BIT(61)     /* of a 4K leaf: writes that it refuses are looked up in the SPPT */
#define EPT_ACCESSED_SHIFT 8
#define EPT_DIRTY_SHIFT 9
#define EPT_ACCESSED_MASK KVMMU_BIT(EPT_ACCESSED_SHIFT)
#define EPT_DIRTY_MASK KVMMU_BIT(EPT_DIRTY_SHIFT)
#define EPT_EXECUTABLE_TO_ACC_SHIFT 1      /* bit 2 to ACC_EXEC */
#define EPT_USER_EXECUTABLE_TO_ACC_SHIFT 8 /* bit 10 to ACC_USER_EXEC */

#define EPTP_MT_MASK KVMMU_BITS(0, 2)
#define EPTP_MT_UC 0
#define EPTP_MT_WB 6
#define EPTP_LEVEL_SHIFT 3 /* walk length minus one */
#define EPTP_LEVEL_MASK KVMMU_BITS(3, 5)
#define EPTP_AD_MASK KVMMU_BIT(6)
#define EPTP_SHADOW_STACK_MASK KVMMU_BIT(7) /* supervisor shadow-stack control */
#define EPTP_RSVD_MASK KVMMU_BITS(8, 11)

/* ---- sub-page permission table: SDM vol. 3, "Sub-Page Write Permissions" --------------------------------------- */
#define SPPT_LEVELS 4
#define SPPT_VALID_MASK KVMMU_BIT(0)
#define SPPT_RSVD_MASK KVMMU_BITS(1, 11)
#define SPPT_VECTOR_RSVD_MASK UINT64_C(0xaaaaaaaaaaaaaaaa) /* the odd bits of a vector */
#define SPPT_SUB_PAGE_SHIFT 7                              /* of an address: 128 bytes */
#define SPPT_SUB_PAGE_MASK KVMMU_BITS(0, 4)                /* after the shift */

/* ---- #VE: SDM vol. 3, "Convertible EPT Violations", "Virtualization-Exception Information" ---------------------- */
#define VE_REASON_OFFSET 0
#define VE_BUSY_OFFSET 4
#define VE_QUALIFICATION_OFFSET 8
#define VE_GVA_OFFSET 16
#define VE_GPA_OFFSET 24
#define VE_EPTP_INDEX_OFFSET 32
#define VE_AREA_BYTES 34
#define VE_BUSY UINT64_C(0xffffffff)
#define EXIT_REASON_EPT_VIOLATION 48

/* ---- exits of the second stage --------------------------------------------------------------------------------- */
#define EPT_VIOLATION_ACC_READ_MASK KVMMU_BIT(0)
#define EPT_VIOLATION_ACC_WRITE_MASK KVMMU_BIT(1)
#define EPT_VIOLATION_ACC_INSTR_MASK KVMMU_BIT(2)
#define EPT_VIOLATION_PROT_READ_MASK KVMMU_BIT(3)
#define EPT_VIOLATION_PROT_WRITE_MASK KVMMU_BIT(4)
#define EPT_VIOLATION_PROT_EXEC_MASK KVMMU_BIT(5)
#define EPT_VIOLATION_PROT_USER_EXEC_MASK KVMMU_BIT(6)
#define EPT_VIOLATION_GVA_VALID_MASK KVMMU_BIT(7)
#define EPT_VIOLATION_GVA_TRANSLATED_MASK KVMMU_BIT(8)
#define EPT_VIOLATION_GVA_USER_MASK KVMMU_BIT(9)
#define EPT_VIOLATION_GVA_WRITABLE_MASK KVMMU_BIT(10)
#define EPT_VIOLATION_GVA_NX_MASK KVMMU_BIT(11)
#define EPT_VIOLATION_NMI_UNBLOCKING_MASK KVMMU_BIT(12)
#define EPT_VIOLATION_SHADOW_STACK_MASK KVMMU_BIT(13)
#define EPT_VIOLATION_PROT_SHADOW_STACK_MASK KVMMU_BIT(14)
#define SPP_EVENT_NOT_VALID_MASK KVMMU_BIT(11) /* a miss; clear: a reserved bit */
#define PFERR_GUEST_FINAL_MASK KVMMU_BIT(32)
#define PFERR_GUEST_PAGE_MASK KVMMU_BIT(33)
#define PML_ENTITY_NUM 512

/* ---- rights of a translation (ACC_*): what permissions[] is indexed by ---------------------------------------- */
#define ACC_READ_MASK KVMMU_BIT(0)
#define ACC_WRITE_MASK KVMMU_BIT(1)
#define ACC_USER_MASK KVMMU_BIT(2)
#define ACC_USER_EXEC_MASK ACC_USER_MASK
#define ACC_EXEC_SHIFT 3
#define ACC_EXEC_MASK KVMMU_BIT(ACC_EXEC_SHIFT)
#define ACC_ALL (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK | ACC_EXEC_MASK)
/* the entries make a shadow-stack address; counts for shadow-stack accesses alone, and no column shows it */
#define ACC_SHADOW_STACK_SHIFT 4
#define ACC_SHADOW_STACK_MASK KVMMU_BIT(ACC_SHADOW_STACK_SHIFT)
#define ACC_WRITE_TO_SHADOW_STACK_SHIFT 3

/* ---- page-fault error code ------------------------------------------------------------------------------------ */
#define PFERR_PRESENT_MASK KVMMU_BIT(0)
#define PFERR_WRITE_MASK KVMMU_BIT(1)
#define PFERR_USER_MASK KVMMU_BIT(2)
#define PFERR_RSVD_SHIFT 3
#define PFERR_RSVD_MASK KVMMU_BIT(PFERR_RSVD_SHIFT)
#define PFERR_FETCH_MASK KVMMU_BIT(4)
#define PFERR_PK_MASK KVMMU_BIT(5)
#define PFERR_SS_MASK KVMMU_BIT(6)

/* ---- an access: error-code bits W, U, F in place; AC sits where permissions[] wants "SMAP does not apply" ------ */
#define ACCESS_WRITE_MASK PFERR_WRITE_MASK
#define ACCESS_USER_MASK PFERR_USER_MASK
#define ACCESS_AC_MASK PFERR_RSVD_MASK
#define ACCESS_FETCH_MASK PFERR_FETCH_MASK
#define ACCESS_IMPLICIT_MASK KVMMU_BIT(5)
#define ACCESS_SHADOW_STACK_MASK KVMMU_BIT(6)
#define ACCESS_PROBE_MASK KVMMU_BIT(7) /* no access: neither rights nor accessed and dirty bits count */
#define ACCESS_PFEC_MASK (ACCESS_WRITE_MASK | ACCESS_USER_MASK | ACCESS_FETCH_MASK)
#define ACCESS_PLAIN_MASK (ACCESS_PFEC_MASK | ACCESS_AC_MASK | ACCESS_IMPLICIT_MASK)
#define ACCESS_MACHINE_MASK (ACCESS_PLAIN_MASK | ACCESS_SHADOW_STACK_MASK) /* of a processor that runs a guest */
#define ACCESS_VALID_MASK (ACCESS_PLAIN_MASK | ACCESS_SHADOW_STACK_MASK | ACCESS_PROBE_MASK)
/* In the walk of an EPT, where nothing is implicit: a write that the sub-page permission table allows. */
#define ACCESS_SUB_PAGE_MASK ACCESS_IMPLICIT_MASK
#define PERMISSIONS_INDEX_SHIFT 1
#define PERMISSIONS_COUNT 16

/* ---- status of a translation ---------------------------------------------------------------------------------- */
#define STATUS_OK 0
#define STATUS_PAGE_FAULT 1
#define STATUS_NON_CANONICAL 2
#define STATUS_EPT_VIOLATION 3
#define STATUS_EPT_MISCONFIG 4
#define STATUS_NESTED_PAGE_FAULT 5
#define STATUS_PML_FULL 6
#define STATUS_LASS_VIOLATION 7
#define STATUS_SPP_EVENT 8
#define STATUS_VIRT_EXCEPTION 9

/* ---- registers ------------------------------------------------------------------------------------------------ */
#define CR0_PE_MASK KVMMU_BIT(0)
#define CR0_MP_MASK KVMMU_BIT(1)
#define CR0_EM_MASK KVMMU_BIT(2)
#define CR0_TS_MASK KVMMU_BIT(3)
#define CR0_ET_MASK KVMMU_BIT(4)
#define CR0_NE_MASK KVMMU_BIT(5)
#define CR0_WP_MASK KVMMU_BIT(16)
#define CR0_AM_MASK KVMMU_BIT(18)
#define CR0_NW_MASK KVMMU_BIT(29)
#define CR0_CD_MASK KVMMU_BIT(30)
#define CR0_PG_MASK KVMMU_BIT(31)

#define CR3_PCID_MASK KVMMU_BITS(0, 11)
#define CR3_PAE_PDPT_MASK KVMMU_BITS(5, 31)
#define CR3_LAM_U57_MASK KVMMU_BIT(61)
#define CR3_LAM_U48_MASK KVMMU_BIT(62)
#define CR3_NOFLUSH_MASK KVMMU_BIT(63)

#define CR4_VME_MASK KVMMU_BIT(0)
#define CR4_PVI_MASK KVMMU_BIT(1)
#define CR4_TSD_MASK KVMMU_BIT(2)
#define CR4_DE_MASK KVMMU_BIT(3)
#define CR4_PSE_MASK KVMMU_BIT(4)
#define CR4_PAE_MASK KVMMU_BIT(5)
#define CR4_MCE_MASK KVMMU_BIT(6)
#define CR4_PGE_MASK KVMMU_BIT(7)
#define CR4_PCE_MASK KVMMU_BIT(8)
#define CR4_OSFXSR_MASK KVMMU_BIT(9)
#define CR4_OSXMMEXCPT_MASK KVMMU_BIT(10)
#define CR4_LA57_MASK KVMMU_BIT(12)
#define CR4_PCIDE_MASK KVMMU_BIT(17)
#define CR4_SMEP_MASK KVMMU_BIT(20)
#define CR4_SMAP_MASK KVMMU_BIT(21)
#define CR4_PKE_MASK KVMMU_BIT(22)
#define CR4_CET_MASK KVMMU_BIT(23)
#define CR4_PKS_MASK KVMMU_BIT(24)
#define CR4_LASS_MASK KVMMU_BIT(27)
#define CR4_LAM_SUP_MASK KVMMU_BIT(28)
/* bits 0 to 10: what 64-bit processors have in common; of those below, and of VME to OSXMMEXCPT but PSE, PAE and PGE, none
   has a say in paging */
#define CR4_COMMON_MASK KVMMU_BITS(0, 10)
#define CR4_UMIP_MASK KVMMU_BIT(11)
#define CR4_VMXE_MASK KVMMU_BIT(13)
#define CR4_SMXE_MASK KVMMU_BIT(14)
#define CR4_FSGSBASE_MASK KVMMU_BIT(16)
#define CR4_OSXSAVE_MASK KVMMU_BIT(18)
#define CR4_KL_MASK KVMMU_BIT(19)
#define CR4_UINTR_MASK KVMMU_BIT(25)
#define CR4_FRED_MASK KVMMU_BIT(32)

#define EFER_SCE_MASK KVMMU_BIT(0)
#define EFER_LME_MASK KVMMU_BIT(8)
#define EFER_LMA_MASK KVMMU_BIT(10)
#define EFER_NX_MASK KVMMU_BIT(11)
#define EFER_SVME_MASK KVMMU_BIT(12)
#define EFER_LMSLE_MASK KVMMU_BIT(13)
#define EFER_FFXSR_MASK KVMMU_BIT(14)
#define EFER_TCE_MASK KVMMU_BIT(15)
#define EFER_MCOMMIT_MASK KVMMU_BIT(17)
#define EFER_INTWB_MASK KVMMU_BIT(18)
#define EFER_UAIE_MASK KVMMU_BIT(20)
#define EFER_AUTOIBRS_MASK KVMMU_BIT(21)

#define RFLAGS_FIXED_MASK KVMMU_BIT(1)
#define RFLAGS_AC_SHIFT 18
#define RFLAGS_AC_MASK KVMMU_BIT(RFLAGS_AC_SHIFT)

#define PKRU_AD_MASK KVMMU_BIT(0)
#define PKRU_WD_MASK KVMMU_BIT(1)
#define PKRU_BITS_PER_KEY 2
#define PKRU_KEYS 16
#define PKRU_SHIFT 32 /* the two key registers in one word: PKRS below PKRU */

#define MAXPHYADDR_MIN 32
#define MAXPHYADDR_MAX 52
#define GVA32_MASK KVMMU_BITS(0, 31)
#define GVA_BITS_4_LEVEL 48
#define GVA_BITS_5_LEVEL 57
#define UAI_ADDRESS_BITS 57 /* upper address ignore: the bits that count */

/* ---- page role (low 32 bits of a cpu_role) and extended role (high 32 bits) ------------------------------------ */
#define ROLE_LEVEL_SHIFT 0
#define ROLE_LEVEL_MASK KVMMU_BITS(0, 3)
#define ROLE_HAS_4_BYTE_GPTE_MASK KVMMU_BIT(4)
#define ROLE_QUADRANT_SHIFT 5
#define ROLE_QUADRANT_MASK KVMMU_BITS(5, 6)
#define ROLE_DIRECT_MASK KVMMU_BIT(7)
#define ROLE_ACCESS_SHIFT 8
#define ROLE_ACCESS_MASK KVMMU_BITS(8, 11)
#define ROLE_INVALID_MASK KVMMU_BIT(12)
#define ROLE_EFER_NX_MASK KVMMU_BIT(13)
#define ROLE_CR0_WP_MASK KVMMU_BIT(14)
#define ROLE_SMAP_ANDNOT_WP_MASK KVMMU_BIT(15)
#define ROLE_AD_DISABLED_MASK KVMMU_BIT(16)
#define ROLE_GUEST_MODE_MASK KVMMU_BIT(17)
#define ROLE_PASSTHROUGH_MASK KVMMU_BIT(18)
#define ROLE_IS_MIRROR_MASK KVMMU_BIT(19)
#define ROLE_CR4_SMEP_MASK KVMMU_BIT(20)
#define ROLE_SMM_SHIFT 24
#define ROLE_SMM_MASK KVMMU_BITS(24, 31)
#define ROLE_EXT_VALID_MASK KVMMU_BIT(32)
#define ROLE_EXT_EXECONLY_MASK KVMMU_BIT(33)
#define ROLE_EXT_CR4_PSE_MASK KVMMU_BIT(34)
#define ROLE_EXT_CR4_PKE_MASK KVMMU_BIT(35)
#define ROLE_EXT_CR4_SMAP_MASK KVMMU_BIT(36)
#define ROLE_EXT_CR4_LA57_MASK KVMMU_BIT(37)
#define ROLE_EXT_EFER_LMA_MASK KVMMU_BIT(38)
#define ROLE_EXT_HAS_PFERR_FETCH_MASK KVMMU_BIT(39)
#define ROLE_EXT_CR4_PKS_MASK KVMMU_BIT(40)
#define ROLE_EXT_CR4_LASS_MASK KVMMU_BIT(41)
#define ROLE_EXT_CR4_LAM_SUP_MASK KVMMU_BIT(42)
#define ROLE_EXT_CR3_LAM_U48_MASK KVMMU_BIT(43)
#define ROLE_EXT_CR3_LAM_U57_MASK KVMMU_BIT(44)
#define ROLE_EXT_EFER_UAIE_MASK KVMMU_BIT(45)
#define ROLE_EXT_SHADOW_STACK_MASK KVMMU_BIT(46) /* of an EPT: supervisor shadow-stack control */

/* ---- rows of a trace: docs/trace-format.md ------------------------------------------------------------------- */
#define OP_LOAD 0
#define OP_STORE 1
#define OP_FETCH 2
#define OP_KIND_MASK KVMMU_BITS(0, 1)
#define OP_MMIO_SHIFT 2 /* of an access: the page is not RAM */
#define OP_MMIO_MASK KVMMU_BIT(OP_MMIO_SHIFT)
#define OP_EVENT 16 /* rows from here on are events */
#define OP_MOV_CR3 16
#define OP_MOV_CR0 17
#define OP_MOV_CR4 18
#define OP_WRMSR_EFER 19
#define OP_WRPKRU 20
#define OP_SET_CPL_AC 21
#define OP_INVLPG 22
#define OP_INVPCID 23
#define OP_GUEST_WRITE 24
#define OP_VMENTER 25
#define OP_VMEXIT 26
#define OP_HOST_INVALIDATE 27
#define OP_PAGE_FAULT 28
#define OP_NPT_FAULT 29
#define OP_SET_REGS 30
#define OP_RESTART 31
#define OP_MEMORY 32
#define OP_MEMORY_WORD 33
#define OP_WRMSR_PKRS 34
#define OP_LAST OP_WRMSR_PKRS

/* ---- host page tables: entries of KVM (SPTEs) -------------------------------------------------------------------
 *
 * Software bits are KVM's own choice. A non-present SPTE keeps bit 63, so that EPT would not raise #VE.
 */
#define SPTE_ENT_PER_PAGE 512
#define SPTE_MMU_PRESENT_MASK KVMMU_BIT(11)
#define SPTE_TDP_AD_MASK KVMMU_BITS(60, 61)
#define SPTE_TDP_AD_DISABLED KVMMU_BIT(60)
#define SPTE_TDP_AD_WRPROT_ONLY KVMMU_BIT(61)
#define SPTE_BASE_ADDR_MASK PT64_BASE_ADDR_MASK
#define SHADOW_NONPRESENT_VALUE KVMMU_BIT(63)
#define FROZEN_SPTE (SHADOW_NONPRESENT_VALUE | KVMMU_BIT(5) | KVMMU_BIT(7) | KVMMU_BIT(8))
#define LEGACY_SPTE_HOST_WRITABLE KVMMU_BIT(9)
#define LEGACY_SPTE_MMU_WRITABLE KVMMU_BIT(10)
#define EPT_SPTE_HOST_WRITABLE KVMMU_BIT(53)
#define EPT_SPTE_MMU_WRITABLE KVMMU_BIT(55)
#define EPT_SUPPRESS_VE_MASK KVMMU_BIT(63)
#define EPT_MT_WB_MASK (UINT64_C(6) << EPT_MT_SHIFT)
#define EPT_IPAT_MASK KVMMU_BIT(6)
#define SPTE_ACC_TRACK_SAVED_SHIFT 52
#define SPTE_ACC_TRACK_BITS_MASK (EPT_READABLE_MASK | EPT_EXECUTABLE_MASK | EPT_USER_EXECUTABLE_MASK)

#define MMIO_SPTE_GEN_BITS 18
#define MMIO_SPTE_GEN_MASK (KVMMU_BIT(MMIO_SPTE_GEN_BITS) - 1)
#define MMIO_SPTE_GEN_LOW_BITS 7
#define MMIO_SPTE_GEN_LOW_SHIFT 3
#define MMIO_SPTE_GEN_HIGH_SHIFT 52
#define MMIO_SPTE_GEN_LOW_MASK KVMMU_BITS(3, 9)
#define MMIO_SPTE_GEN_HIGH_MASK KVMMU_BITS(52, 62)
#define LEGACY_MMIO_VALUE (KVMMU_BIT(51) | PT_PRESENT_MASK)
#define EPT_MMIO_VALUE (EPT_WRITABLE_MASK | EPT_EXECUTABLE_MASK) /* a misconfiguration */
#define L1TF_BITS 5 /* physical-address bits inverted by being set, and saved this much higher */
#define MEMSLOT_GEN_UPDATE_IN_PROGRESS KVMMU_BIT(63)

/* what became of a fault (RET_PF_*) */
#define RET_PF_CONTINUE 0
#define RET_PF_RETRY 1
#define RET_PF_EMULATE 2
#define RET_PF_WRITE_PROTECTED 3
#define RET_PF_INVALID 4
#define RET_PF_FIXED 5
#define RET_PF_SPURIOUS 6

/* ---- relations that the code relies on ------------------------------------------------------------------------ */
_Static_assert(PT_PRESENT_MASK == ACC_READ_MASK && PT_WRITABLE_MASK == ACC_WRITE_MASK && PT_USER_MASK == ACC_USER_MASK,
               "gpte_access() takes P, W and U from an entry as they stand");
_Static_assert(ACC_WRITE_MASK << ACC_WRITE_TO_SHADOW_STACK_SHIFT == ACC_SHADOW_STACK_MASK &&
                   PT_DIRTY_SHIFT > ACC_SHADOW_STACK_SHIFT && EPT_WRITABLE_MASK == PT_WRITABLE_MASK,
               "gpte_shadow_stack() shifts W and D to ACC_SHADOW_STACK");
_Static_assert(PT64_NX_SHIFT - ACC_EXEC_SHIFT == 60, "gpte_access() shifts NX to ACC_EXEC");
_Static_assert((ACCESS_PLAIN_MASK & ~ACCESS_IMPLICIT_MASK) >> PERMISSIONS_INDEX_SHIFT == PERMISSIONS_COUNT - 1,
               "an access indexes permissions[] by a shift alone");
_Static_assert(ACCESS_SHADOW_STACK_MASK == PFERR_SS_MASK, "an error code takes SS of the access as it stands");
_Static_assert(PT_DIRTY_MASK == PT_ACCESSED_MASK << 1 && EPT_DIRTY_MASK == EPT_ACCESSED_MASK << 1,
               "a walk keeps the accessed bit alone, the dirty bit is the next one");
_Static_assert(EPT_EXECUTABLE_MASK << EPT_EXECUTABLE_TO_ACC_SHIFT == ACC_EXEC_MASK &&
               EPT_USER_EXECUTABLE_MASK >> EPT_USER_EXECUTABLE_TO_ACC_SHIFT == ACC_USER_EXEC_MASK,
               "gpte_access() shifts EPT rights into place");
_Static_assert(ACC_READ_MASK * EPT_VIOLATION_PROT_READ_MASK == EPT_VIOLATION_PROT_READ_MASK &&
               ACC_WRITE_MASK * EPT_VIOLATION_PROT_READ_MASK == EPT_VIOLATION_PROT_WRITE_MASK,
               "an exit qualification takes R and W of the rights as they stand");
_Static_assert(MMIO_SPTE_GEN_LOW_MASK >> MMIO_SPTE_GEN_LOW_SHIFT == KVMMU_BIT(MMIO_SPTE_GEN_LOW_BITS) - 1 &&
                   MMIO_SPTE_GEN_HIGH_MASK >> MMIO_SPTE_GEN_HIGH_SHIFT == MMIO_SPTE_GEN_MASK >> MMIO_SPTE_GEN_LOW_BITS,
               "the two parts of an MMIO generation make 18 bits");
_Static_assert(((SPTE_ACC_TRACK_BITS_MASK << SPTE_ACC_TRACK_SAVED_SHIFT) &
                (EPT_SPTE_HOST_WRITABLE | EPT_SPTE_MMU_WRITABLE | SPTE_TDP_AD_MASK | EPT_SUPPRESS_VE_MASK |
                 SPTE_BASE_ADDR_MASK)) == 0,
               "saved rights of an access-tracked SPTE have bits of their own");
_Static_assert((FROZEN_SPTE & SPTE_MMU_PRESENT_MASK) == 0 && FROZEN_SPTE != SHADOW_NONPRESENT_VALUE,
               "a frozen SPTE is neither present nor empty");

#endif /* KVMMU_BITS_H */
