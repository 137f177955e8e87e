"""Design: the MMU that a workload is to run on."""

from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath

from kvmmu.arch.arguments import check_name
from kvmmu.replay.machine_start import Backing
from kvmmu.tlb.hierarchy import TlbHierarchy, tlb_of

__all__ = ["HOSTS", "PAGE_POLICIES", "Design", "host_page_of"]

HOSTS = ("native", "ept", "npt", "shadow", "nested-ept", "nested-npt")
PAGE_POLICIES = ("own", "4k", "2m", "1g", "thp")
TWO_STAGES = ("ept", "npt", "nested-ept", "nested-npt")


def host_page_of(page: str) -> Backing:
    """Return the size of the host's pages below the pages of a policy."""
    return "4k" if page == "4k" else "1g" if page == "1g" else "2m"


@dataclass(frozen=True)
class Design:
    """One MMU design.

    Parameters
    ----------
    name : str
        By default made of the others.
    host : {"native", "ept", "npt", "shadow", "nested-ept", "nested-npt"}
        What is below the workload: nothing; a host with two-dimensional paging or shadow paging; or a guest hypervisor with EPT
        or NPT on a host with the same.
    page : {"own", "4k", "2m", "1g", "thp"}
        Pages of the workload. "own": the page tables that the trace brings. Else tables are made for its addresses; "thp" has 2M
        pages where half of the 4K pages of a 2M region are touched. The host backs guest memory with pages at least as large.
    tlb : TlbHierarchy, str or path-like
        A hierarchy, a preset by its name, or a TOML file by its path.
    tlb_name : str
        By default that of the preset or file.
    """

    name: str = ""
    host: str = "ept"
    page: str = "4k"
    tlb: "TlbHierarchy | str | PathLike[str]" = "skylake"
    tlb_name: str = ""

    def __post_init__(self) -> None:
        check_name("host", self.host, HOSTS)
        check_name("page", self.page, PAGE_POLICIES)
        for name in ("name", "tlb_name"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: want a str, got {type(getattr(self, name)).__name__}")
        hierarchy = tlb_of("tlb", self.tlb)
        if not self.tlb_name:
            named = "TLB" if isinstance(self.tlb, TlbHierarchy) else PurePath(self.tlb).name.removesuffix(".toml")
            object.__setattr__(self, "tlb_name", named)
        object.__setattr__(self, "tlb", hierarchy)
        if not self.name:
            object.__setattr__(self, "name", f"{self.host} {self.page} {self.tlb_name}")

    @property
    def hierarchy(self) -> TlbHierarchy:
        """The TLB hierarchy."""
        assert isinstance(self.tlb, TlbHierarchy)
        return self.tlb

    @property
    def two_stages(self) -> bool:
        """True if the processor walks two stages."""
        return self.host in TWO_STAGES

    @property
    def host_page(self) -> Backing | None:
        """Size of the pages that the host backs guest memory with; None without a host."""
        return None if self.host == "native" else host_page_of(self.page)
