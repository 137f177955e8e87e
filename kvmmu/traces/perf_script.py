"""Memory samples of Linux perf, as text: `perf script -F comm,tid,cpu,time,event,ip,addr,phys_addr`."""

import re
from collections.abc import Iterator
from pathlib import Path

from kvmmu.traces._sink import Sink
from kvmmu.traces._text_events import PerfScript
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, option_error, text_chunks
from kvmmu.traces.header import MAX_VCPUS

__all__ = ["FORMAT", "PerfScriptFormat"]

_ROW = re.compile(rb".*\s\d+\.\d+:\s+(\d+\s+)?\S+:\s+[0-9a-f]{1,16}(\s|$)")
_FIELDS = ("comm", "pid", "tid", "cpu", "time", "period", "event", "addr", "data_src", "weight", "ip", "sym", "dso", "phys_addr",
           "data_page_size", "code_page_size")


class PerfScriptFormat:
    """Lines such as `sort 4084 [001] 1053.881246: cpu/mem-loads/P: 5601a77ad548 ffffffff81775dda`.

    A sample is a store if the event's name or its data source says so, a fetch if the address is that of the instruction, else
    a load. It is of the vCPU that is the processor in brackets, else of one for each thread.
    """

    name = "perf-script"

    def sniff(self, head: bytes, path: Path) -> int:
        lines = [line for line in head.split(b"\n")[:200] if line.strip() and not line.startswith(b"#")]
        rows = sum(_ROW.match(line[:512]) is not None and b"kvm" not in line for line in lines)
        return 75 if rows and rows >= len(lines) // 2 else 0

    def open(self, path: Path, *, fields: str = "comm,tid,cpu,time,event,ip,addr,phys_addr", strict: bool = False,
             vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open the text of `perf script`.

        Parameters
        ----------
        path : Path
        fields : str
            What `perf script -F` was given. Needed only with `weight`, or for `phys_addr` without `ip`.
        strict : bool
            Refuse lines that are not samples.
        vcpus : int
            The most processors that there can be.
        """
        printed = {part.strip().lstrip("+") for part in fields.split(",") if part.strip()}
        if "addr" not in printed or printed - set(_FIELDS):
            raise option_error(self.name, "fields", fields, f"a list with addr, of {', '.join(_FIELDS)}")

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                parser = PerfScript(weight="weight" in printed, ip="ip" in printed, phys="phys_addr" in printed, strict=strict)
                yield from text_chunks(stream, parser, Sink(vcpu=True, gpa=True, size=False), notes)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, vcpu=True), vcpus=vcpus)


FORMAT = PerfScriptFormat()
