"""Registers of a vCPU, the processor model, and which values are legal.

Sources: SDM vol. 3, "Control Registers", "Paging Modes and Control Bits", "Enabling Protection Keys", "PDPTE Registers", "WRMSR"
and "MOV to control registers"; APM vol. 2, "Control Registers" and "Extended Feature Enable Register (EFER)".
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol, SupportsIndex, TypedDict

from kvmmu.arch._bits import (
    CR3_LAM_U48,
    CR3_LAM_U57,
    CR3_NOFLUSH,
    CR3_PAE_PDPT,
    CR3_PCID,
    GPA_BITS,
    GVA_BITS_4_LEVEL,
    GVA_BITS_5_LEVEL,
    MAXPHYADDR_MAX,
    MAXPHYADDR_MIN,
    PAE_PDPTE_RSVD,
    PT_PRESENT,
    RFLAGS_FIXED,
    Cr0,
    Cr4,
    Efer,
)
from kvmmu.arch.arguments import check_bool, check_int, check_name, check_word, check_words
from kvmmu.arch.faults import GeneralProtection, InvalidOpcode
from kvmmu.arch.words import fields_text, flags_text, hex_text

__all__ = ["FEATURES", "CpuModel", "RegisterValues", "Regs"]

class TableSpace(Protocol):
    """Memory that PDPTEs are loaded from: guest-physical, or L2's through a second stage."""

    def is_backed(self, gpa: int, n: int) -> bool: ...

    def read_u64(self, gpa: int) -> int: ...


_U64 = (1 << 64) - 1
_NOT_IN_KVM = ("pks", "lass", "uai")
_FEATURES = ("gbpages", "pse36", "la57", "nx", "smep", "smap", "pku", "pcid", "lam", "shstk", "pks", "lass", "uai")
# Features whose control bits have no say in translation, by their names: the vendors that define them, and the bits.
FEATURES: dict[str, tuple[tuple[str, ...], Cr4 | Efer]] = {
    "umip": (("intel", "amd"), Cr4.UMIP), "fsgsbase": (("intel", "amd"), Cr4.FSGSBASE), "xsave": (("intel", "amd"), Cr4.OSXSAVE),
    "cet": (("intel", "amd"), Cr4.CET), "fred": (("intel", "amd"), Cr4.FRED),
    "vmx": (("intel",), Cr4.VMXE), "smx": (("intel",), Cr4.SMXE), "kl": (("intel",), Cr4.KL), "uintr": (("intel",), Cr4.UINTR),
    "svm": (("amd",), Efer.SVME), "lmsle": (("amd",), Efer.LMSLE), "ffxsr": (("amd",), Efer.FFXSR), "tce": (("amd",), Efer.TCE),
    "mcommit": (("amd",), Efer.MCOMMIT), "intwb": (("amd",), Efer.INTWB), "autoibrs": (("amd",), Efer.AUTOIBRS),
}

# Flags as plain integers: operators of an IntFlag make members, and take ten times as long.
_PE, _ET, _WP, _NW, _CD, _PG = map(int, (Cr0.PE, Cr0.ET, Cr0.WP, Cr0.NW, Cr0.CD, Cr0.PG))
_PSE, _PAE, _PGE, _LA57, _PCIDE, _SMEP, _PKE, _CET = map(
    int, (Cr4.PSE, Cr4.PAE, Cr4.PGE, Cr4.LA57, Cr4.PCIDE, Cr4.SMEP, Cr4.PKE, Cr4.CET))
_LME, _LMA = int(Efer.LME), int(Efer.LMA)

_WIDTHS = {"cr0": 64, "cr3": 64, "cr4": 64, "efer": 64, "pkru": 32, "rflags": 64, "pkrs": 32}
_LARGEST = {name: (1 << bits) - 1 for name, bits in _WIDTHS.items()}
_TEXTS = dict.fromkeys((*_WIDTHS, "pdptrs"), hex_text) | {
    name: partial(flags_text, kind=kind) for name, kind in (("cr0", Cr0), ("cr4", Cr4), ("efer", Efer))}


@dataclass(frozen=True)
class CpuModel:
    """The guest's processor.

    Parameters
    ----------
    vendor : {"intel", "amd"}
        Bit 8 of PML4E and PML5E is reserved on AMD.
    maxphyaddr : int
        Physical-address width, 32 to 52.
    gbpages : bool
        1G pages (CPUID.80000001H:EDX.Page1GB).
    pse36 : bool
        4M pages above 4 GiB.
    conformance : {"sdm", "kvm"}
        "sdm": what the manuals say; "kvm": what KVM's software walker does where it differs.
    la57, nx, smep, smap, pku, pcid : bool
        Features whose control bits may be set.
    lam, shstk, pks, lass : bool
        Likewise: linear-address masking, shadow stacks, supervisor protection keys, linear-address-space separation. KVM offers
        no guest the last two, so that they do not exist under conformance "kvm".
    uai : bool
        AMD's upper address ignore, which KVM does not offer either.
    c_bit : int, optional
        AMD's memory encryption: the position of the encryption bit, 32 to 51, which is no address bit of CR3 and of entries,
        and not reserved. `maxphyaddr` is then the width after its reduction.
    features : collection of str, optional
        Strictness about control bits without a say in translation: the processor has these of `FEATURES`, and the bits of others
        are reserved. By default none is: registers of any machine are legal, of whichever vendor.
    """

    vendor: Literal["intel", "amd"] = "intel"
    maxphyaddr: int = 48
    gbpages: bool = True
    pse36: bool = True
    conformance: Literal["sdm", "kvm"] = "sdm"
    la57: bool = True
    nx: bool = True
    smep: bool = True
    smap: bool = True
    pku: bool = True
    pcid: bool = True
    lam: bool = True
    shstk: bool = True
    pks: bool = True
    lass: bool = True
    uai: bool = True
    c_bit: int | None = None
    features: Collection[str] | None = None

    def __post_init__(self) -> None:
        check_name("vendor", self.vendor, ("intel", "amd"))
        check_name("conformance", self.conformance, ("sdm", "kvm"))
        width = check_int("maxphyaddr", self.maxphyaddr, MAXPHYADDR_MIN, MAXPHYADDR_MAX)
        object.__setattr__(self, "maxphyaddr", width)
        for name in _FEATURES:
            object.__setattr__(self, name, check_bool(name, getattr(self, name)))
        if self.c_bit is not None:
            object.__setattr__(self, "c_bit", check_int("c_bit", self.c_bit, MAXPHYADDR_MIN, GPA_BITS - 1))
        if self.features is not None:
            names = sorted(name for name, (vendors, _) in FEATURES.items() if self.vendor in vendors)
            if isinstance(self.features, str) or not set(self.features) <= set(names):
                raise ValueError(f"features: want None or a collection of {', '.join(names)}, got {self.features!r}")
            object.__setattr__(self, "features", frozenset(self.features))

    def __repr__(self) -> str:
        return fields_text(self, {}, always=("vendor", "maxphyaddr", "conformance"))

    @cached_property
    def rsvd_gpa_bits(self) -> int:
        """Physical-address bits that this processor does not have, up to bit 63."""
        return _U64 & ~((1 << self.maxphyaddr) - 1) & ~self.encryption_mask

    @cached_property
    def rsvd_cr4_bits(self) -> int:
        """Bits of CR4 that are undefined, not modelled, or of a feature that this processor lacks."""
        lacks = sum(int(bit) for name, bit in _CR4_FEATURES.items() if not self.has(name))
        return _U64 & ~(_CR4_DEFINED | _bits_of(Cr4, self.features)) | lacks

    @cached_property
    def rsvd_efer_bits(self) -> int:
        """Bits of IA32_EFER that are undefined, not modelled, or of a feature that this processor lacks."""
        lacks = sum(int(bit) for name, bit in _EFER_FEATURES.items() if not self.has(name))
        return _U64 & ~(_EFER_DEFINED | _bits_of(Efer, self.features)) | lacks

    @property
    def encryption_mask(self) -> int:
        """Return the encryption bit as a mask, 0 without one."""
        return 0 if self.c_bit is None else 1 << self.c_bit

    def has(self, feature: str) -> bool:
        """True if a guest has one of the features that `conformance` may take away."""
        return bool(getattr(self, feature)) and not (self.conformance == "kvm" and feature in _NOT_IN_KVM)


@dataclass(frozen=True)
class Regs:
    """One set of registers. Frozen and hashable; legality is checked where it is used, not here.

    Parameters
    ----------
    cr0, cr3, cr4, efer : int
    pkru : int
        32 bits: access- and write-disable of 16 keys.
    rflags : int
        Only AC (bit 18) matters, and only to scalar calls.
    pdptrs : tuple of 4 int, optional
        PAE: the PDPTE registers; None loads them from memory at CR3. Under nested paging of SVM there are none.
    pkrs : int
        IA32_PKRS, 32 bits: the same as `pkru` for supervisor pages.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int = 0
    rflags: int = int(RFLAGS_FIXED)
    pdptrs: tuple[int, ...] | None = None
    pkrs: int = 0

    def __post_init__(self) -> None:
        for name, bits in _WIDTHS.items():
            value = getattr(self, name)
            number = check_word(name, value, bits)
            if number is not value:
                object.__setattr__(self, name, number)
        if self.pdptrs is not None:
            object.__setattr__(self, "pdptrs", check_words("pdptrs", self.pdptrs, 4))

    def __repr__(self) -> str:
        return fields_text(self, _TEXTS)

    @property
    def is_long_mode(self) -> bool:
        return bool(self.efer & _LMA)

    @property
    def is_pae_paging(self) -> bool:
        """Paging with PDPTE registers: CR0.PG and CR4.PAE without long mode."""
        return bool(not self.efer & _LMA and self.cr0 & _PG and self.cr4 & _PAE)


def with_registers(regs: Regs, **values: Any) -> Regs:
    """Return registers of which some have other values, checked as a `Regs` checks them.

    What `dataclasses.replace()` returns, in a tenth of its time: the others are legal already.
    """
    for name, value in values.items():
        if name != "pdptrs":
            values[name] = check_int(name, value, 0, _LARGEST[name])
        elif value is not None:
            values[name] = check_words(name, value, 4)
    changed = object.__new__(type(regs))
    object.__setattr__(changed, "__dict__", {**regs.__dict__, **values})
    return changed


class RegisterValues(TypedDict, total=False):
    """Registers by name, for calls that load some of them."""

    cr0: SupportsIndex
    cr3: SupportsIndex
    cr4: SupportsIndex
    efer: SupportsIndex
    pkru: SupportsIndex
    pkrs: SupportsIndex
    rflags: SupportsIndex
    pdptrs: Sequence[SupportsIndex] | None


def _gp(rule: str, message: str) -> GeneralProtection:
    return GeneralProtection(f"#GP: {message}", rule=rule)


def _bits_of(kind: type[Cr4 | Efer], features: Collection[str] | None) -> int:
    """Bits of CR4 or EFER that belong to features, by default to all of them."""
    bits = 0
    for name in FEATURES if features is None else features:
        bit = FEATURES[name][1]
        bits |= int(bit) if isinstance(bit, kind) else 0
    return bits


# Features that change translation, and their bits.
_CR4_FEATURES = {"la57": Cr4.LA57, "pcid": Cr4.PCIDE, "smep": Cr4.SMEP, "smap": Cr4.SMAP, "pku": Cr4.PKE, "shstk": Cr4.CET,
                 "pks": Cr4.PKS, "lass": Cr4.LASS, "lam": Cr4.LAM_SUP}
_EFER_FEATURES = {"nx": Efer.NX, "uai": Efer.UAIE}
_LAM_BITS = CR3_LAM_U48 | CR3_LAM_U57
# Bits that every processor has or a model may have. CET is also a name of FEATURES: strict models have it by that.
_CR4_DEFINED = int(Cr4.COMMON) | sum(int(bit) for name, bit in _CR4_FEATURES.items() if name != "shstk")
_EFER_DEFINED = int(Efer.SCE | Efer.LME | Efer.LMA) | sum(map(int, _EFER_FEATURES.values()))


def check_cr0(value: int) -> None:
    """#GP unless CR0 is legal by itself."""
    if value >> 32:
        raise _gp("cr0-reserved", f"CR0 {value:#x}: bits 63:32 are reserved")
    if value & _PG and not value & _PE:
        raise _gp("cr0-pg-without-pe", f"CR0 {value:#x}: PG needs PE")
    if value & _NW and not value & _CD:
        raise _gp("cr0-nw-without-cd", f"CR0 {value:#x}: NW needs CD")


def check_cr4(cpu: CpuModel, value: int) -> None:
    """#GP unless CR4 is legal for this model."""
    reserved = value & cpu.rsvd_cr4_bits
    if reserved:
        raise _gp("cr4-reserved", f"CR4 {value:#x}: {reserved:#x} is reserved, or a feature that the model lacks")


def check_efer(cpu: CpuModel, value: int) -> None:
    """#GP unless EFER is legal for this model."""
    reserved = value & cpu.rsvd_efer_bits
    if reserved:
        raise _gp("efer-reserved", f"EFER {value:#x}: {reserved:#x} is reserved, or a feature that the model lacks")


def check_cr3(cpu: CpuModel, regs: Regs) -> None:
    """#GP unless CR3 is legal: it is physical, so reserved bits are those from MAXPHYADDR up, but for the encryption bit and, on
    processors with LAM, its two bits.

    Outside long mode CR3 is a 32-bit register to the guest; wider values can only come from the host and obey the same limit.
    """
    reserved = regs.cr3 & cpu.rsvd_gpa_bits
    if cpu.lam:
        reserved &= ~_LAM_BITS
    if reserved:
        raise _gp("cr3-reserved", f"CR3 {regs.cr3:#x}: {reserved:#x} is reserved with MAXPHYADDR {cpu.maxphyaddr}")


def check_combination(regs: Regs) -> None:
    """#GP unless CR0, CR4 and EFER go together."""
    cr0, cr4, efer = regs.cr0, regs.cr4, regs.efer
    if cr0 & _PG and efer & _LME:
        if not cr4 & _PAE:
            raise _gp("long-mode-without-pae", "paging with EFER.LME needs CR4.PAE")
        if not efer & _LMA:
            raise _gp("long-mode-without-lma", "paging with EFER.LME means EFER.LMA, which is clear")
    elif efer & _LMA:
        raise _gp("lma-without-long-mode", "EFER.LMA is set without CR0.PG and EFER.LME")
    if cr4 & _PCIDE and not efer & _LMA:
        raise _gp("pcide-outside-long-mode", "CR4.PCIDE needs long mode")
    if cr4 & _CET and not cr0 & _WP:
        raise _gp("cet-without-wp", "CR4.CET needs CR0.WP")


def paging_mode(cr0: int, cr4: int, efer: int) -> str:
    """Return the paging mode of registers: "off", "32", "pae", "4l" or "5l"."""
    if not cr0 & Cr0.PG:
        return "off"
    if not cr4 & Cr4.PAE:
        return "32"
    if not efer & Efer.LMA:
        return "pae"
    return "5l" if cr4 & Cr4.LA57 else "4l"


def pdpte_gpas(cr3: int) -> tuple[int, ...]:
    """Return where the four PDPTEs at a CR3 lie in guest-physical memory: one behind the other, in one page."""
    base = cr3 & CR3_PAE_PDPT
    return (base, base + 8, base + 16, base + 24)


def load_pdptrs(cpu: CpuModel, cr3: int, mem: TableSpace) -> tuple[int, ...]:
    """Return the four PDPTEs at CR3, all checked, even unused ones; #GP if a present one has a reserved bit or no memory is
    there.

    Source: SDM vol. 3, "PDPTE Registers".
    """
    gpas = pdpte_gpas(cr3)
    if not mem.is_backed(gpas[0], 32):
        raise _gp("pdpt-in-hole", f"CR3 {cr3:#x}: the PDPTEs lie in a hole of guest memory")
    pdptrs = tuple(mem.read_u64(gpa) for gpa in gpas)
    check_pdptrs(cpu, pdptrs)
    return pdptrs


def check_pdptrs(cpu: CpuModel, pdptrs: tuple[int, ...]) -> None:
    """#GP if a present PDPTE has a reserved bit: 1, 2, 5 to 8, or MAXPHYADDR to 63."""
    for i, pdpte in enumerate(pdptrs):
        reserved = pdpte & (cpu.rsvd_gpa_bits | PAE_PDPTE_RSVD)
        if pdpte & PT_PRESENT and reserved:
            raise _gp("pdpte-reserved", f"PDPTE {i} is {pdpte:#x}: {reserved:#x} is reserved with MAXPHYADDR {cpu.maxphyaddr}")


def admit(cpu: CpuModel, regs: Regs, mem: TableSpace | None) -> Regs:
    """Return the registers with PDPTEs loaded where they count; #GP if they are illegal as a whole.

    mem None: a guest under nested paging of SVM, whose PDPTEs are read and checked by each walk.
    Source: APM vol. 2, "Nested Paging", on guests in legacy PAE mode.
    """
    check_cr0(regs.cr0)
    check_cr4(cpu, regs.cr4)
    check_efer(cpu, regs.efer)
    check_cr3(cpu, regs)
    check_combination(regs)
    if mem is None or not regs.is_pae_paging:
        return regs if regs.pdptrs is None else with_registers(regs, pdptrs=None)
    if regs.pdptrs is None:
        return with_registers(regs, pdptrs=load_pdptrs(cpu, regs.cr3, mem))
    check_pdptrs(cpu, regs.pdptrs)
    return regs


def is_canonical(cpu: CpuModel, address: int) -> bool:
    """True if a linear address is canonical for the processor's widest paging, whatever CR4.LA57 says.

    That is what instructions check that invalidate translations, so that a host can do it for a guest with another CR4.LA57.
    """
    width = GVA_BITS_5_LEVEL if cpu.la57 else GVA_BITS_4_LEVEL
    return address >> (width - 1) in (0, (1 << (65 - width)) - 1)


# ---- what the guest's own instructions may do --------------------------------------------------------------------------

_RELOADS_PDPTRS = {0: _CD | _NW | _PG, 4: _PAE | _PGE | _PSE | _SMEP}


def after_mov_cr(cpu: CpuModel, regs: Regs, n: int, value: int, mem: TableSpace | None) -> Regs:
    """Return the registers after MOV to CRn; #GP if the transition is illegal.

    Source: SDM vol. 2, "MOV-Move to/from Control Registers"; vol. 3, "PDPTE Registers", "Initializing IA-32e Mode".
    """
    if n == 3:
        return _after_mov_cr3(cpu, regs, value, mem)
    if n == 0:
        after = _after_mov_cr0(regs, value | _ET)
        changed = regs.cr0 ^ after.cr0
    else:
        after = _after_mov_cr4(cpu, regs, value)
        changed = regs.cr4 ^ after.cr4
    check_combination(after)
    reload = after.is_pae_paging and (changed & _RELOADS_PDPTRS[n] or regs.pdptrs is None)
    return admit(cpu, with_registers(after, pdptrs=None if reload or not after.is_pae_paging else regs.pdptrs), mem)


def _after_mov_cr0(regs: Regs, value: int) -> Regs:
    check_cr0(value)
    enables, disables = ~regs.cr0 & value & _PG, regs.cr0 & ~value & _PG
    efer = regs.efer
    if enables and efer & _LME:
        if not regs.cr4 & _PAE:
            raise _gp("long-mode-without-pae", "enabling paging with EFER.LME needs CR4.PAE")
        efer |= _LMA
    if disables:
        if regs.cr4 & _PCIDE:
            raise _gp("pg-off-with-pcide", "CR0.PG cannot be cleared while CR4.PCIDE is set")
        efer &= ~_LMA
    return with_registers(regs, cr0=value, efer=efer)


def _after_mov_cr4(cpu: CpuModel, regs: Regs, value: int) -> Regs:
    check_cr4(cpu, value)
    changed = regs.cr4 ^ value
    if regs.is_long_mode:
        if regs.cr4 & ~value & _PAE:
            raise _gp("pae-off-in-long-mode", "CR4.PAE cannot be cleared in long mode")
        if changed & _LA57:
            raise _gp("la57-change-in-long-mode", "CR4.LA57 cannot change in long mode")
    if changed & value & _PCIDE and regs.cr3 & CR3_PCID:
        raise _gp("pcide-with-pcid", f"CR4.PCIDE cannot be set while CR3[11:0] is {regs.cr3 & CR3_PCID:#x}")
    return with_registers(regs, cr4=value)


def _after_mov_cr3(cpu: CpuModel, regs: Regs, value: int, mem: TableSpace | None) -> Regs:
    if not regs.is_long_mode and value >> 32:
        raise ValueError(f"outside long mode MOV to CR3 has 32 bits, got {value:#x}")
    if regs.cr4 & _PCIDE:
        value &= ~CR3_NOFLUSH                   # says "keep the TLB" and is not stored
    return admit(cpu, with_registers(regs, cr3=value, pdptrs=None), mem)


def after_wrmsr_efer(cpu: CpuModel, regs: Regs, value: int) -> Regs:
    """Return the registers after WRMSR to IA32_EFER; #GP if the transition is illegal. LMA is read-only: what is written is
    ignored.

    Source: SDM vol. 3, "Initializing IA-32e Mode"; APM vol. 2, "Extended Feature Enable Register (EFER)".
    """
    value = value & ~_LMA | regs.efer & _LMA
    check_efer(cpu, value)
    if regs.cr0 & _PG and (regs.efer ^ value) & _LME:
        raise _gp("lme-change-while-paging", "EFER.LME cannot change while CR0.PG is set")
    return with_registers(regs, efer=value)


def after_wrmsr_pkrs(cpu: CpuModel, regs: Regs, value: int) -> Regs:
    """Return the registers after WRMSR to IA32_PKRS; #GP without PKS, or for a value of more than 32 bits.

    Source: SDM vol. 3, "Protection Keys"; vol. 4, "IA32_PKRS".
    """
    if not cpu.has("pks"):
        raise _gp("pkrs-without-pks", "the processor model has no IA32_PKRS")
    if value >> 32:
        raise _gp("pkrs-reserved", f"IA32_PKRS {value:#x}: bits 63:32 are reserved")
    return with_registers(regs, pkrs=value)


def after_wrpkru(regs: Regs, value: int) -> Regs:
    """Return the registers after WRPKRU; #UD without CR4.PKE."""
    if not regs.cr4 & _PKE:
        raise InvalidOpcode("#UD: WRPKRU needs CR4.PKE", rule="wrpkru-without-pke")
    return with_registers(regs, pkru=value)
