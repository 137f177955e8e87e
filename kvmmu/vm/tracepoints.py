"""The kvmmmu tracepoints: events of the host's MMU, in KVM's words and as ftrace prints them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvmmu.arch._bits import EPT_MT, EPT_SUPPRESS_VE, EptPte, Pte, RetPf
from kvmmu.arch._roles import CpuRole
from kvmmu.arch.arguments import check_int
from kvmmu.arch.faults import error_code_text
from kvmmu.mmu.host import Host, RoleBits
from kvmmu.mmu.kvm._inspect import set_trace, trace_events
from kvmmu.mmu.kvm._state import Kvm

__all__ = ["TraceEvent", "Tracepoints"]

# In the order of their numbers.
_FIELDS = {
    "kvm_mmu_get_page": "mmu_valid_gen gfn role root_count unsync created",
    "kvm_mmu_sync_page": "mmu_valid_gen gfn role root_count unsync",
    "kvm_mmu_unsync_page": "mmu_valid_gen gfn role root_count unsync",
    "kvm_mmu_prepare_zap_page": "mmu_valid_gen gfn role root_count unsync",
    "mark_mmio_spte": "sptep gfn access gen",
    "handle_mmio_page_fault": "addr gfn access",
    "fast_page_fault": "vcpu_id cr2_or_gpa error_code sptep old_spte new_spte ret",
    "kvm_mmu_zap_all_fast": "mmu_valid_gen mmu_used_pages",
    "check_mmio_spte": "kvm_gen spte_gen spte",
    "kvm_mmu_set_spte": "gfn spte sptep level",
    "kvm_mmu_spte_requested": "gfn pfn level",
    "kvm_tdp_mmu_spte_changed": "as_id gfn level old_spte new_spte",
    "kvm_mmu_split_huge_page": "gfn spte level errno",
    "kvm_mmu_pagetable_walk": "addr pferr",
    "kvm_mmu_paging_element": "pte level",
    "kvm_mmu_set_accessed_bit": "gpa",
    "kvm_mmu_set_dirty_bit": "gpa",
    "kvm_mmu_walker_error": "pferr",
}
_NAMES = tuple(_FIELDS)
_CAPACITY_MAX = 1 << 32


@dataclass(frozen=True)
class TraceEvent:
    """One event.

    Attributes
    ----------
    number : int
        From 0, in the order in which they happened.
    vcpu : int
        Who ran.
    name : str
    fields : dict of str to int
        By the names of the tracepoint; `sptep` is a host-physical address.
    role_bits : RoleBits
        Of the kernel whose roles are printed.
    """

    number: int
    vcpu: int
    name: str
    fields: dict[str, int]
    role_bits: RoleBits = field(default=Host().role_bits, repr=False)

    @property
    def text(self) -> str:
        """The fields as the tracepoint prints them."""
        return _text(self.name, self.fields, self.role_bits)

    def __repr__(self) -> str:
        return f"<TraceEvent {self.number} vCPU {self.vcpu} {self.name}: {self.text}>"

    def __str__(self) -> str:
        who = f"kvm-vcpu{self.vcpu}-{self.vcpu} [000] ....."
        return f"{who} {self.number / 1e6:.6f}: {self.name}: {self.text}"


class Tracepoints:
    """The tracepoints of a machine that are on, and the events they recorded. `vm.trace = Tracepoints(...)` begins.

    Parameters
    ----------
    *names : str
        Names of tracepoints, all by default: kvm_mmu_set_spte, kvm_tdp_mmu_spte_changed, fast_page_fault, ...
    capacity : int
        How many events are kept, 1 to 2**32; the oldest go first.
    """

    names = _NAMES

    def __init__(self, *names: str, capacity: int = 1 << 16) -> None:
        for name in names:
            if name not in _NAMES:
                raise ValueError(f"names: {name!r} is no tracepoint; there are {', '.join(_NAMES)}")
        capacity = check_int("capacity", capacity, 1, _CAPACITY_MAX)
        self.mask = sum(1 << _NAMES.index(name) for name in set(names or _NAMES))
        self.capacity = capacity
        self._kvm: Kvm | None = None

    def attach(self, kvm: Kvm) -> None:
        """Begin to record; earlier events are dropped."""
        set_trace(kvm, self.mask, self.capacity)
        self._kvm = kvm

    @property
    def lost(self) -> int:
        """Events that were dropped because newer ones needed their place."""
        if self._kvm is None:
            return 0
        written, rows = trace_events(self._kvm)
        return written - len(rows)

    def __iter__(self) -> Iterator[TraceEvent]:
        if self._kvm is None:
            return
        for number, vcpu, event, *args in trace_events(self._kvm)[1].tolist():
            name = _NAMES[event]
            fields = dict(zip(_FIELDS[name].split(), args, strict=False))
            if "sptep" in fields:
                fields["sptep"] = self._kvm.arena_hpa + 8 * fields["sptep"]
            if "errno" in fields:
                fields["errno"] = fields["errno"] - (1 << 64) if fields["errno"] >> 63 else fields["errno"]
            yield TraceEvent(number, vcpu, name, fields, self._kvm.host.role_bits)

    def events(self, *names: str) -> list[TraceEvent]:
        """Return the events kept, oldest first; of the given names alone, if any are given."""
        return [event for event in self if not names or event.name in names]

    def text(self) -> str:
        """Return all events as ftrace prints them, a line per event."""
        return "".join(f"{event}\n" for event in self)

    def __repr__(self) -> str:
        return f"<Tracepoints {bin(self.mask).count('1')} on>"


def _letters(access: int, letters: Iterable[tuple[int, str]]) -> str:
    return "".join(letter if access & bit else "-" for bit, letter in letters)


def _page(f: dict[str, int], role_bits: RoleBits) -> str:
    role = CpuRole(f["role"])
    access = _letters(role.access, role_bits.access_letters)
    return (f"sp gen {f['mmu_valid_gen']} gfn {f['gfn']:x} l{role.level} {4 if role.has_4_byte_gpte else 8}-byte q{role.quadrant}"
            f"{' direct' if role.direct else ''} {access}{' invalid' if role.invalid else ''} "
            f"{'' if role.efer_nx else '!'}nxe {'!' if role.ad_disabled else ''}ad root {f['root_count']} "
            f"{'unsync' if f['unsync'] else 'sync'}")


def _spte_letters(spte: int) -> str:
    """Return r, w, x, u of an entry, by the layout that its bits show: EPT entries alone suppress #VE and are write-back."""
    if spte & EPT_SUPPRESS_VE and spte & EPT_MT == EptPte.WB:
        rights: tuple[tuple[int, str], ...] = ((EptPte.READABLE, "r"), (EptPte.WRITABLE, "w"), (EptPte.EXECUTABLE, "x"))
    else:
        rights = ((Pte.PRESENT, "r"), (Pte.WRITABLE, "w"), (Pte.NX, "x"), (Pte.USER, "u"))
        spte ^= Pte.NX
    return "".join(letter if spte & bit else "-" for bit, letter in rights)


def _text(name: str, f: dict[str, int], role_bits: RoleBits) -> str:
    match name:
        case "kvm_mmu_get_page":
            return f"{_page(f, role_bits)} {'new' if f['created'] else 'existing'}"
        case "kvm_mmu_sync_page" | "kvm_mmu_unsync_page" | "kvm_mmu_prepare_zap_page":
            return _page(f, role_bits)
        case "mark_mmio_spte":
            return f"sptep:{f['sptep']:x} gfn {f['gfn']:x} access {f['access']:x} gen {f['gen']:x}"
        case "handle_mmio_page_fault":
            return f"addr:{f['addr']:x} gfn {f['gfn']:x} access {f['access']:x}"
        case "fast_page_fault":
            return (f"vcpu {f['vcpu_id']} gva {f['cr2_or_gpa']:x} error_code {error_code_text(f['error_code'])} "
                    f"sptep {f['sptep']:x} old {f['old_spte']:#x} new {f['new_spte']:x} "
                    f"spurious {int(f['ret'] == RetPf.SPURIOUS)} fixed {int(f['ret'] == RetPf.FIXED)}")
        case "kvm_mmu_zap_all_fast":
            return f"kvm-mmu-valid-gen {f['mmu_valid_gen']} used_pages {f['mmu_used_pages']:x}"
        case "check_mmio_spte":
            return (f"spte {f['spte']:x} kvm_gen {f['kvm_gen']:x} spte-gen {f['spte_gen']:x} "
                    f"valid {int(f['kvm_gen'] == f['spte_gen'])}")
        case "kvm_mmu_set_spte":
            return f"gfn {f['gfn']:x} spte {f['spte']:x} ({_spte_letters(f['spte'])}) level {f['level']} at {f['sptep']:x}"
        case "kvm_mmu_spte_requested":
            return f"gfn {f['gfn']:x} pfn {f['pfn']:x} level {f['level']}"
        case "kvm_tdp_mmu_spte_changed":
            return (f"as id {f['as_id']} gfn {f['gfn']:x} level {f['level']} old_spte {f['old_spte']:x} "
                    f"new_spte {f['new_spte']:x}")
        case "kvm_mmu_split_huge_page":
            return f"gfn {f['gfn']:x} spte {f['spte']:x} level {f['level']} errno {f['errno']}"
        case "kvm_mmu_pagetable_walk":
            return f"addr {f['addr']:x} pferr {f['pferr']:x} {error_code_text(f['pferr'])}"
        case "kvm_mmu_paging_element":
            return f"pte {f['pte']:x} level {f['level']}"
        case "kvm_mmu_walker_error":
            return f"pferr {f['pferr']:x} {error_code_text(f['pferr'])}"
        case _:
            return f"gpa {f['gpa']:x}"
