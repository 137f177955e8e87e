"""Logs of QEMU's plugin execlog: `qemu-x86_64 -plugin libexeclog.so -d plugin -D FILE PROGRAM`, qemu-system-x86_64 likewise."""

import re
from collections.abc import Iterator
from pathlib import Path

from kvmmu.traces._sink import Sink
from kvmmu.traces._text import Execlog
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, text_chunks
from kvmmu.traces.header import MAX_VCPUS

__all__ = ["FORMAT", "QemuExeclogFormat"]

_ROW = re.compile(rb'\d+, 0x[0-9a-f]+, 0x[0-9a-f]+, "')
_PHYSICAL = re.compile(rb", (?:load|store), 0x[0-9a-f]+, (?!load, 0x|store, 0x)[^,\n>]+(?:,|\n|\r|$)")


class QemuExeclogFormat:
    """Lines such as `0, 0x40101c, 0x8b48, "movq (%rax), %rbx", load, 0x7ffd`: instructions and what they accessed.

    Of a whole system QEMU tells only the physical addresses of data, with the name of the device: these rows have the physical
    address as `addr` and as `gpa`. Sizes are not told.
    """

    name = "qemu-execlog"

    def sniff(self, head: bytes, path: Path) -> int:
        lines = [line for line in head.split(b"\n")[:200] if line.strip()]
        rows = sum(_ROW.match(line) is not None for line in lines)
        return 90 if rows and rows >= len(lines) // 2 else 0

    def open(self, path: Path, *, fetch: bool | None = None, strict: bool = False, vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open a log of execlog.

        Parameters
        ----------
        path : Path
        fetch : bool, optional
            Read instruction fetches too. Their addresses are linear always: by default they are left out where those of data are
            physical.
        strict : bool
            Refuse lines that are not rows; other parts of QEMU may write into the log.
        vcpus : int
            The most processors that there can be.
        """
        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                fetches = _PHYSICAL.search(stream.peek()) is None if fetch is None else fetch
                sink = Sink(vcpu=True, gpa=True, size=False)
                yield from text_chunks(stream, Execlog(fetch=fetches, strict=strict), sink, notes)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, vcpu=True), vcpus=vcpus)


FORMAT = QemuExeclogFormat()
