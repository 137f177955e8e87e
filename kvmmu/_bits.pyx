"""The numbers of `_bits.h` as Python sees them: nothing is typed a second time."""

from enum import IntEnum, IntFlag


class Access(IntFlag):
    """An intended access; combine with ``|``. READ is 0.

    AC says that EFLAGS.AC is 1 at this access (SMAP does not apply to it); IMPLICIT is an implicit supervisor access
    (descriptor tables, TSS): it clears AC and USER.
    """

    READ = 0
    WRITE = ACCESS_WRITE_MASK
    USER = ACCESS_USER_MASK
    AC = ACCESS_AC_MASK
    FETCH = ACCESS_FETCH_MASK
    IMPLICIT = ACCESS_IMPLICIT_MASK
    SHADOW_STACK = ACCESS_SHADOW_STACK_MASK


class Acc(IntFlag):
    """Rights that a translation grants: the AND over the entries of the walk."""

    READ = ACC_READ_MASK
    WRITE = ACC_WRITE_MASK
    USER = ACC_USER_MASK
    EXEC = ACC_EXEC_MASK


class Pferr(IntFlag):
    """Page-fault error code."""

    PRESENT = PFERR_PRESENT_MASK
    WRITE = PFERR_WRITE_MASK
    USER = PFERR_USER_MASK
    RSVD = PFERR_RSVD_MASK
    FETCH = PFERR_FETCH_MASK
    PK = PFERR_PK_MASK
    SS = PFERR_SS_MASK


class EptQual(IntFlag):
    """Exit qualification of an EPT violation."""

    ACC_READ = EPT_VIOLATION_ACC_READ_MASK
    ACC_WRITE = EPT_VIOLATION_ACC_WRITE_MASK
    ACC_INSTR = EPT_VIOLATION_ACC_INSTR_MASK
    PROT_READ = EPT_VIOLATION_PROT_READ_MASK
    PROT_WRITE = EPT_VIOLATION_PROT_WRITE_MASK
    PROT_EXEC = EPT_VIOLATION_PROT_EXEC_MASK
    PROT_USER_EXEC = EPT_VIOLATION_PROT_USER_EXEC_MASK
    GVA_VALID = EPT_VIOLATION_GVA_VALID_MASK
    GVA_TRANSLATED = EPT_VIOLATION_GVA_TRANSLATED_MASK
    GVA_USER = EPT_VIOLATION_GVA_USER_MASK
    GVA_WRITABLE = EPT_VIOLATION_GVA_WRITABLE_MASK
    GVA_NX = EPT_VIOLATION_GVA_NX_MASK
    NMI_UNBLOCKING = EPT_VIOLATION_NMI_UNBLOCKING_MASK


class NpfInfo(IntFlag):
    """EXITINFO1 of a nested page fault: an error code, and which stage of the walk."""

    PRESENT = PFERR_PRESENT_MASK
    WRITE = PFERR_WRITE_MASK
    USER = PFERR_USER_MASK
    RSVD = PFERR_RSVD_MASK
    FETCH = PFERR_FETCH_MASK
    GUEST_FINAL = PFERR_GUEST_FINAL_MASK
    GUEST_PAGE = PFERR_GUEST_PAGE_MASK


class Status(IntEnum):
    """Outcome of a translation."""

    OK = STATUS_OK
    PAGE_FAULT = STATUS_PAGE_FAULT
    NON_CANONICAL = STATUS_NON_CANONICAL
    EPT_VIOLATION = STATUS_EPT_VIOLATION
    EPT_MISCONFIG = STATUS_EPT_MISCONFIG
    NESTED_PAGE_FAULT = STATUS_NESTED_PAGE_FAULT
    PML_FULL = STATUS_PML_FULL


class RetPf(IntEnum):
    """What became of a fault of the host's page tables, in KVM's words."""

    CONTINUE = RET_PF_CONTINUE
    RETRY = RET_PF_RETRY
    EMULATE = RET_PF_EMULATE
    WRITE_PROTECTED = RET_PF_WRITE_PROTECTED
    INVALID = RET_PF_INVALID
    FIXED = RET_PF_FIXED
    SPURIOUS = RET_PF_SPURIOUS


class Cr0(IntFlag):
    """CR0."""

    PE = CR0_PE_MASK
    ET = CR0_ET_MASK
    WP = CR0_WP_MASK
    NW = CR0_NW_MASK
    CD = CR0_CD_MASK
    PG = CR0_PG_MASK


class Cr4(IntFlag):
    """CR4, the bits that paging looks at."""

    PSE = CR4_PSE_MASK
    PAE = CR4_PAE_MASK
    PGE = CR4_PGE_MASK
    LA57 = CR4_LA57_MASK
    PCIDE = CR4_PCIDE_MASK
    SMEP = CR4_SMEP_MASK
    SMAP = CR4_SMAP_MASK
    PKE = CR4_PKE_MASK
    CET = CR4_CET_MASK


class Efer(IntFlag):
    """IA32_EFER."""

    SCE = EFER_SCE_MASK
    LME = EFER_LME_MASK
    LMA = EFER_LMA_MASK
    NX = EFER_NX_MASK
    SVME = EFER_SVME_MASK
    LMSLE = EFER_LMSLE_MASK
    FFXSR = EFER_FFXSR_MASK
    TCE = EFER_TCE_MASK
    AUTOIBRS = EFER_AUTOIBRS_MASK


# Under the names that C has for them; an assignment would be one to the C constant.
globals().update(
    INVALID_GPA=int(INVALID_GPA),
    GPA_LIMIT=int(GPA_LIMIT),
    PAGE_SIZE=int(PAGE_SIZE),
    CR3_NOFLUSH=int(CR3_NOFLUSH_MASK),
    CR3_PCID=int(CR3_PCID_MASK),
    CR3_PAE_PDPT=int(CR3_PAE_PDPT_MASK),
    EPTP_MT=int(EPTP_MT_MASK),
    EPTP_MT_UC=int(EPTP_MT_UC),
    EPTP_MT_WB=int(EPTP_MT_WB),
    EPTP_LEVEL=int(EPTP_LEVEL_MASK),
    EPTP_LEVEL_SHIFT=int(EPTP_LEVEL_SHIFT),
    EPTP_AD=int(EPTP_AD_MASK),
    PT_PRESENT=int(PT_PRESENT_MASK),
    PAE_PDPTE_RSVD=int(PAE_PDPTE_RSVD_MASK),
    RFLAGS_FIXED=int(RFLAGS_FIXED_MASK),
    RFLAGS_AC=int(RFLAGS_AC_MASK),
    MAXPHYADDR_MIN=int(MAXPHYADDR_MIN),
    MAXPHYADDR_MAX=int(MAXPHYADDR_MAX),
)
