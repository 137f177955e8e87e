"""Events of the MMU in the short form of the recorded scenarios: without host addresses and page frames."""

from collections.abc import Callable

from kvmmu import CpuRole, TraceEvent

__all__ = ["event_text"]

PFN_MASK = (1 << 52) - (1 << 12)
ENTRIES = 512
NX_SHIFT = 63
_ROLE_LETTERS = ((2, "w"), (4, "u"), (8, "x"))              # the order of the recorded kernel, which had no bit for reads


def _page(f: dict[str, int]) -> str:
    role = CpuRole(f["role"])
    access = "".join(letter if role.access & bit else "-" for bit, letter in _ROLE_LETTERS)
    return (f"sp gen {f['mmu_valid_gen']} gfn {f['gfn']:x} l{role.level} {4 if role.has_4_byte_gpte else 8}-byte q{role.quadrant}"
            f"{' direct' if role.direct else ''} {access}{' invalid' if role.invalid else ''} "
            f"{'' if role.efer_nx else '!'}nxe {'!' if role.ad_disabled else ''}ad root {f['root_count']} "
            f"{'unsync' if f['unsync'] else 'sync'}")


def _set_spte(f: dict[str, int]) -> str:
    spte = f["spte"]
    letters = "".join((
        "r" if spte & 1 else "-", "w" if spte & 2 else "-", "-" if spte >> NX_SHIFT else "x", "u" if spte & 4 else "-"))
    return f"set_spte gfn {f['gfn']:x} l{f['level']} idx {f['sptep'] // 8 % ENTRIES} bits {spte & ~PFN_MASK:x} {letters}"


_TEXTS: dict[str, Callable[[dict[str, int]], str]] = {
    "kvm_mmu_get_page": lambda f: f"get_page {_page(f)} {'new' if f['created'] else 'existing'}",
    "kvm_mmu_sync_page": lambda f: f"sync_page {_page(f)}",
    "kvm_mmu_unsync_page": lambda f: f"unsync_page {_page(f)}",
    "kvm_mmu_prepare_zap_page": lambda f: f"zap_page {_page(f)}",
    "kvm_mmu_zap_all_fast": lambda f: f"zap_all_fast kvm-mmu-valid-gen {f['mmu_valid_gen']} used_pages {f['mmu_used_pages']:x}",
    "kvm_mmu_set_spte": _set_spte,
    "kvm_mmu_spte_requested": lambda f: f"spte_req gfn {f['gfn']:x} l{f['level']}",
    "kvm_mmu_set_accessed_bit": lambda f: f"set_A {f['gpa']:x}",
    "kvm_mmu_set_dirty_bit": lambda f: f"set_D {f['gpa']:x}",
    "kvm_mmu_pagetable_walk": lambda f: f"walk {f['addr']:x} pferr {f['pferr']:x}",
    "kvm_mmu_paging_element": lambda f: f"elem l{f['level']} {f['pte']:x}",
    "kvm_mmu_walker_error": lambda f: f"walk_error {f['pferr']:x}",
}


def event_text(event: TraceEvent) -> str:
    """An event as recorded; "" for one that recordings do not have."""
    text = _TEXTS.get(event.name)
    return "" if text is None else text(event.fields)
