"""KVM's events in the text of ftrace: /sys/kernel/tracing/trace, `trace-cmd report`, or `perf script` of kvm:kvm_page_fault."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvmmu.traces._sink import Sink
from kvmmu.traces._text_events import EVENTS, Ftrace
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, option_error, text_chunks
from kvmmu.traces.header import MAX_VCPUS

__all__ = ["FORMAT", "FtraceFormat"]

_EVENT = re.compile(rb"\s(?:kvm:|kvmmmu:)?((?:kvm|fast_page_fault|handle_mmio|mark_mmio|check_mmio|vcpu)\w*):(?:\s|$)")
_DEFAULT = ("kvm_page_fault", "kvm_mmu_pagetable_walk", "fast_page_fault", "handle_mmio_page_fault")


class FtraceFormat:
    """Page faults that KVM handled, as accesses: `kvm_page_fault`, or events of kvmmmu.

    The address of a kvm_page_fault is guest-physical under EPT and NPT: its row has it as `addr` and as `gpa`. Error codes may be
    #PF or #NPF error codes or exit qualifications of EPT violations, as different processors report.
    """

    name = "ftrace"

    def sniff(self, head: bytes, path: Path) -> int:
        if b"\0" in head:
            return 0
        found = len(_EVENT.findall(head))
        if head.startswith(b"# tracer:") or head.startswith(b"cpus="):
            return 85 if found else 15
        return 80 if found and found >= head.count(b"\n") // 3 else 0

    def open(self, path: Path, *, events: Iterable[str] | str | None = None, shadow: bool = False, strict: bool = False,
             vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open the text of ftrace.

        Parameters
        ----------
        path : Path
        events : iterable of str, or str, optional
            Which become rows: kvm_page_fault, kvm_mmu_pagetable_walk, fast_page_fault, handle_mmio_page_fault. They tell of the
            same access: by default it is the first of these that the beginning of the file has.
        shadow : bool
            Addresses of kvm_page_fault are linear: KVM ran with shadow paging.
        strict : bool
            Refuse lines that are not such events.
        vcpus : int
            The most processors that there can be.
        """
        names = None if events is None else events.replace(",", " ").split() if isinstance(events, str) else list(events)
        for name in names or ():
            if name not in EVENTS:
                raise option_error(self.name, "events", name, ", ".join(EVENTS))

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                chosen = names
                if chosen is None:
                    there = {found.decode() for found in _EVENT.findall(stream.peek())}
                    chosen = [next((name for name in _DEFAULT if name in there), _DEFAULT[0])]
                parser = Ftrace(events=sum({EVENTS[name] for name in chosen}), shadow=shadow, strict=strict)
                yield from text_chunks(stream, parser, Sink(vcpu=True, gpa=True, size=False), notes)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, vcpu=True), vcpus=vcpus)


FORMAT = FtraceFormat()
