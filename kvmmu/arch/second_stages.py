"""Second stages that L1 gives for a nested guest, as VMX (Ept) or SVM (Npt) describes them, and intercepts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvmmu.arch._bits import (
    EPTP_AD,
    EPTP_LEVEL,
    EPTP_LEVEL_SHIFT,
    EPTP_MT,
    EPTP_MT_UC,
    EPTP_MT_WB,
    EPTP_RSVD,
    EPTP_SHADOW_STACK,
    GPA_LIMIT,
    Cr0,
    Cr4,
    Efer,
)
from kvmmu.arch.arguments import check_bool, check_pages, check_word
from kvmmu.arch.words import fields_text, flags_text, hex_text

__all__ = ["Ept", "Intercepts", "Npt", "Pml", "Stage"]


@dataclass(frozen=True)
class Pml:
    """L1's page-modification log.

    Parameters
    ----------
    address : int
        Guest-physical address of a page of 512 logged addresses.
    index : int
        Next entry to fill, counting down from 511; beyond 511 the log is full.
    """

    address: int
    index: int = 511

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", check_pages("address", self.address, 0, GPA_LIMIT - 1))
        object.__setattr__(self, "index", check_word("index", self.index, 16))

    def __repr__(self) -> str:
        return fields_text(self, {"address": hex_text}, always=("index",))


@dataclass(frozen=True)
class Intercepts:
    """The page faults of L2 that L1 wants: bit 14 of the exception bitmap, turned over where the error code does not match.

    A fault exits if ((error_code & pfec_mask) == pfec_match) equals bit 14. SVM has the bitmap alone.
    """

    exception_bitmap: int = 0
    pfec_mask: int = 0
    pfec_match: int = 0

    def __post_init__(self) -> None:
        for name in ("exception_bitmap", "pfec_mask", "pfec_match"):
            object.__setattr__(self, name, check_word(name, getattr(self, name), 32))

    def __repr__(self) -> str:
        return fields_text(self, dict.fromkeys(("exception_bitmap", "pfec_mask", "pfec_match"), hex_text))

    def wants_page_fault(self, error_code: int) -> bool:
        """True if a #PF with this error code exits to L1."""
        error_code = check_word("error_code", error_code, 32)
        matches = error_code & self.pfec_mask == self.pfec_match
        return bool(self.exception_bitmap >> 14 & 1) == matches


@dataclass(frozen=True)
class Ept:
    """EPT12: extended page tables that L1 built.

    Parameters
    ----------
    eptp : int
        EPT pointer: memory type (0 or 6), walk length minus one (3 or 4) in bits 5:3, A/D enable in bit 6, supervisor
        shadow-stack control in bit 7, root.
    mbec : bool
        Mode-based execute control.
    execonly : bool
        Execute-only translations are supported.
    advanced_info : bool
        Exit qualifications have bits 11:9.
    page_2m, page_1g : bool
        Page sizes by capability; page_1g None is as the processor model's gbpages. 1G needs 2M, as on every processor.
    pml : Pml, optional
        Page-modification log; needs the A/D bits.
    intercepts : Intercepts
        Page faults of L2 that exit to L1.
    spptp : int, optional
        Sub-page write permissions: the root of the sub-page permission table, guest-physical, of a page.
    ve : int, optional
        EPT violations become virtualization exceptions (#VE): guest-physical address of the information area, of a page.
    """

    eptp: int
    mbec: bool = False
    execonly: bool = True
    advanced_info: bool = True
    page_2m: bool = True
    page_1g: bool | None = None
    pml: Pml | None = None
    intercepts: Intercepts = Intercepts()
    spptp: int | None = None
    ve: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eptp", check_word("eptp", self.eptp))
        for name in ("mbec", "execonly", "advanced_info", "page_2m"):
            object.__setattr__(self, name, check_bool(name, getattr(self, name)))
        if self.page_1g is not None:
            object.__setattr__(self, "page_1g", check_bool("page_1g", self.page_1g))
        _check_parts(self.pml, self.intercepts)
        if self.eptp & EPTP_MT not in (EPTP_MT_UC, EPTP_MT_WB):
            raise ValueError(f"eptp {self.eptp:#x}: memory type {self.eptp & EPTP_MT}, want {EPTP_MT_UC} or {EPTP_MT_WB}")
        if self.level not in (4, 5):
            raise ValueError(f"eptp {self.eptp:#x}: a walk of {self.level} levels, want 4 or 5 (bits 5:3 are 3 or 4)")
        if self.eptp & EPTP_RSVD:
            raise ValueError(f"eptp {self.eptp:#x}: bits 11:8 are reserved")
        for name in ("spptp", "ve"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_pages(name, getattr(self, name), 0, GPA_LIMIT - 1))
        if self.page_1g and not self.page_2m:
            raise ValueError("page_1g: 1G pages without 2M pages (page_2m=False) exist on no processor")
        if self.pml is not None and not self.ad:
            raise ValueError(f"pml: needs accessed and dirty bits, eptp {self.eptp:#x} has bit 6 clear")

    def __repr__(self) -> str:
        return fields_text(self, {"eptp": self._eptp_text, "spptp": hex_text, "ve": hex_text})

    def _eptp_text(self, eptp: int) -> str:
        return f"{eptp:#x} ({'WB' if eptp & EPTP_MT == EPTP_MT_WB else 'UC'}, {self.level} levels{', AD' if self.ad else ''})"

    @property
    def root(self) -> int:
        return self.eptp

    @property
    def level(self) -> int:
        """Levels of the walk."""
        return ((self.eptp & EPTP_LEVEL) >> EPTP_LEVEL_SHIFT) + 1

    @property
    def ad(self) -> bool:
        """Accessed and dirty bits are in use."""
        return bool(self.eptp & EPTP_AD)

    @property
    def supervisor_shadow_stack(self) -> bool:
        """Supervisor shadow-stack accesses need bit 60 of the leaf."""
        return bool(self.eptp & EPTP_SHADOW_STACK)

    def huge_page_level(self, gbpages: bool) -> int:
        """Largest page: 1 4K, 2 2M, 3 1G."""
        gbpages = check_bool("gbpages", gbpages)
        if not self.page_2m:
            return 1
        return 3 if (gbpages if self.page_1g is None else self.page_1g) else 2


@dataclass(frozen=True)
class Npt:
    """NPT12: nested page tables that L1 built.

    Parameters
    ----------
    ncr3 : int
        Nested CR3.
    cr4, efer : int
        L1's CR4 and EFER at VMRUN: they choose the format. WP is forced, SMAP and PKE are ignored.
    gmet : bool
        Guest-mode execute trap.
    intercepts : Intercepts
        Page faults of L2 that exit to L1.
    """

    ncr3: int
    cr4: int = int(Cr4.PAE)
    efer: int = int(Efer.LME | Efer.LMA | Efer.NX)
    gmet: bool = False
    intercepts: Intercepts = Intercepts()

    def __post_init__(self) -> None:
        for name in ("ncr3", "cr4", "efer"):
            object.__setattr__(self, name, check_word(name, getattr(self, name)))
        object.__setattr__(self, "gmet", check_bool("gmet", self.gmet))
        _check_parts(None, self.intercepts)

    def __repr__(self) -> str:
        return fields_text(self, _NPT_TEXTS, always=("cr4", "efer"))

    @property
    def root(self) -> int:
        return self.ncr3

    @property
    def cr0(self) -> int:
        """Return the CR0 that nested paging walks with, whatever L1's is."""
        return int(Cr0.PE | Cr0.WP | Cr0.PG)


def _check_parts(pml: object, intercepts: object) -> None:
    if not isinstance(pml, Pml | None):
        raise TypeError(f"pml: want a Pml or None, got {type(pml).__name__}")
    if not isinstance(intercepts, Intercepts):
        raise TypeError(f"intercepts: want Intercepts, got {type(intercepts).__name__}")


_NPT_TEXTS: dict[str, Callable[[int], str]] = {
    "ncr3": hex_text, "cr4": partial(flags_text, kind=Cr4), "efer": partial(flags_text, kind=Efer)}

Stage = Ept | Npt
