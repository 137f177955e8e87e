"""Processor models and second stages of a C program; see `_models.pxd`."""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from kvmmu.arch._bits cimport GPA_BITS, MAXPHYADDR_MAX, MAXPHYADDR_MIN
from kvmmu.embed._structs cimport (
    CPU_SIZE_1_0, KVMMU_CPU_AMD, KVMMU_CPU_KVM, KVMMU_CPU_NO_GBPAGES, KVMMU_CPU_NO_LA57, KVMMU_CPU_NO_LAM, KVMMU_CPU_NO_LASS,
    KVMMU_CPU_NO_NX, KVMMU_CPU_NO_PCID, KVMMU_CPU_NO_PKS, KVMMU_CPU_NO_PKU, KVMMU_CPU_NO_PSE36, KVMMU_CPU_NO_SHSTK,
    KVMMU_CPU_NO_SMAP, KVMMU_CPU_NO_SMEP, KVMMU_CPU_NO_UAI, KVMMU_CPU_STRICT, KVMMU_E_ARGUMENT, KVMMU_E_VERSION,
    KVMMU_FEATURE_AUTOIBRS, KVMMU_FEATURE_CET, KVMMU_FEATURE_FFXSR, KVMMU_FEATURE_FRED, KVMMU_FEATURE_FSGSBASE,
    KVMMU_FEATURE_INTWB, KVMMU_FEATURE_KL, KVMMU_FEATURE_LMSLE, KVMMU_FEATURE_MCOMMIT, KVMMU_FEATURE_SMX, KVMMU_FEATURE_SVM,
    KVMMU_FEATURE_TCE, KVMMU_FEATURE_UINTR, KVMMU_FEATURE_UMIP, KVMMU_FEATURE_VMX, KVMMU_FEATURE_XSAVE, KVMMU_OK,
    KVMMU_STAGE_EPT, KVMMU_STAGE_GMET, KVMMU_STAGE_MBEC, KVMMU_STAGE_NO_1G, KVMMU_STAGE_NO_2M, KVMMU_STAGE_NO_ADVANCED_INFO,
    KVMMU_STAGE_NO_EXECONLY, KVMMU_STAGE_NPT, KVMMU_STAGE_PML, KVMMU_STAGE_SPP, KVMMU_STAGE_VE, kvmmu_cpu, kvmmu_second_stage,
)

from kvmmu import CpuModel, Ept, Npt, Pml

cdef enum:
    DEFAULT_MAXPHYADDR = 48

# Features of a CpuModel, and the flags without them
_LACKS = {"gbpages": KVMMU_CPU_NO_GBPAGES, "pse36": KVMMU_CPU_NO_PSE36, "la57": KVMMU_CPU_NO_LA57, "nx": KVMMU_CPU_NO_NX,
          "smep": KVMMU_CPU_NO_SMEP, "smap": KVMMU_CPU_NO_SMAP, "pku": KVMMU_CPU_NO_PKU, "pcid": KVMMU_CPU_NO_PCID,
          "lam": KVMMU_CPU_NO_LAM, "shstk": KVMMU_CPU_NO_SHSTK, "pks": KVMMU_CPU_NO_PKS, "lass": KVMMU_CPU_NO_LASS,
          "uai": KVMMU_CPU_NO_UAI}
_FEATURES = {"umip": KVMMU_FEATURE_UMIP, "fsgsbase": KVMMU_FEATURE_FSGSBASE, "xsave": KVMMU_FEATURE_XSAVE,
             "cet": KVMMU_FEATURE_CET, "fred": KVMMU_FEATURE_FRED, "vmx": KVMMU_FEATURE_VMX, "smx": KVMMU_FEATURE_SMX,
             "kl": KVMMU_FEATURE_KL, "uintr": KVMMU_FEATURE_UINTR, "svm": KVMMU_FEATURE_SVM, "lmsle": KVMMU_FEATURE_LMSLE,
             "ffxsr": KVMMU_FEATURE_FFXSR, "tce": KVMMU_FEATURE_TCE, "mcommit": KVMMU_FEATURE_MCOMMIT,
             "intwb": KVMMU_FEATURE_INTWB, "autoibrs": KVMMU_FEATURE_AUTOIBRS}
cdef uint32_t CPU_FLAGS = sum(_LACKS.values()) | KVMMU_CPU_AMD | KVMMU_CPU_KVM | KVMMU_CPU_STRICT
cdef uint32_t FEATURES = sum(_FEATURES.values())
cdef uint32_t EPT_FLAGS = (
    KVMMU_STAGE_EPT | KVMMU_STAGE_MBEC | KVMMU_STAGE_NO_EXECONLY | KVMMU_STAGE_NO_ADVANCED_INFO | KVMMU_STAGE_NO_2M |
    KVMMU_STAGE_NO_1G | KVMMU_STAGE_PML | KVMMU_STAGE_SPP | KVMMU_STAGE_VE)
cdef uint32_t NPT_FLAGS = KVMMU_STAGE_NPT | KVMMU_STAGE_GMET


# ---- processors --------------------------------------------------------------------------------------------------------

cdef int read_cpu(const kvmmu_cpu *cpu, kvmmu_cpu *known) noexcept nogil:
    memset(known, 0, sizeof(kvmmu_cpu))
    known.size, known.maxphyaddr = sizeof(kvmmu_cpu), DEFAULT_MAXPHYADDR
    if cpu is NULL:
        return KVMMU_OK
    if cpu.size != sizeof(kvmmu_cpu) and cpu.size != CPU_SIZE_1_0:
        return KVMMU_E_VERSION
    memcpy(known, cpu, cpu.size)
    known.size = sizeof(kvmmu_cpu)
    known.maxphyaddr = known.maxphyaddr or DEFAULT_MAXPHYADDR
    if known.flags & ~CPU_FLAGS or not MAXPHYADDR_MIN <= known.maxphyaddr <= MAXPHYADDR_MAX:
        return KVMMU_E_ARGUMENT
    if known.c_bit and not MAXPHYADDR_MIN <= known.c_bit < GPA_BITS:
        return KVMMU_E_ARGUMENT
    if known.features & ~(FEATURES if known.flags & KVMMU_CPU_STRICT else 0):
        return KVMMU_E_ARGUMENT
    return KVMMU_OK


cdef int fill_cpu(kvmmu_cpu *cpu, model) except -1:
    memset(cpu, 0, sizeof(kvmmu_cpu))
    cpu.size, cpu.maxphyaddr, cpu.c_bit = sizeof(kvmmu_cpu), model.maxphyaddr, model.c_bit or 0
    flags = (KVMMU_CPU_AMD if model.vendor == "amd" else 0) | (KVMMU_CPU_KVM if model.conformance == "kvm" else 0)
    for name, bit in _LACKS.items():
        flags |= 0 if getattr(model, name) else bit
    if model.features is not None:
        flags |= KVMMU_CPU_STRICT
        cpu.features = sum(_FEATURES[name] for name in model.features)
    cpu.flags = flags
    return 0


cdef object model_of(const kvmmu_cpu *cpu):
    cdef uint32_t flags = cpu.flags, features = cpu.features
    strict = {name for name, bit in _FEATURES.items() if features & bit} if flags & KVMMU_CPU_STRICT else None
    return CpuModel(vendor="amd" if flags & KVMMU_CPU_AMD else "intel", conformance="kvm" if flags & KVMMU_CPU_KVM else "sdm",
                    maxphyaddr=cpu.maxphyaddr, c_bit=cpu.c_bit or None, features=strict,
                    **{name: not flags & bit for name, bit in _LACKS.items()})


# ---- second stages -----------------------------------------------------------------------------------------------------

cdef int check_stage(const kvmmu_second_stage *stage) noexcept nogil:
    cdef uint32_t kind = stage.flags & <uint32_t>(KVMMU_STAGE_EPT | KVMMU_STAGE_NPT)
    if stage.size != sizeof(kvmmu_second_stage):
        return KVMMU_E_VERSION
    if stage.reserved or kind not in (KVMMU_STAGE_EPT, KVMMU_STAGE_NPT):
        return KVMMU_E_ARGUMENT
    if stage.flags & ~(EPT_FLAGS if kind == KVMMU_STAGE_EPT else NPT_FLAGS):
        return KVMMU_E_ARGUMENT
    return KVMMU_OK


cdef object stage_of(const kvmmu_second_stage *stage):
    cdef uint32_t flags = stage.flags
    if flags & KVMMU_STAGE_NPT:
        return Npt(int(stage.root), int(stage.cr4), int(stage.efer), gmet=flags & KVMMU_STAGE_GMET != 0)
    return Ept(
        int(stage.root), mbec=flags & KVMMU_STAGE_MBEC != 0, execonly=not flags & KVMMU_STAGE_NO_EXECONLY,
        advanced_info=not flags & KVMMU_STAGE_NO_ADVANCED_INFO, page_2m=not flags & KVMMU_STAGE_NO_2M,
        page_1g=False if flags & KVMMU_STAGE_NO_1G else None,
        pml=Pml(int(stage.pml_address), int(stage.pml_index)) if flags & KVMMU_STAGE_PML else None,
        spptp=int(stage.spptp) if flags & KVMMU_STAGE_SPP else None, ve=int(stage.ve_area) if flags & KVMMU_STAGE_VE else None)
