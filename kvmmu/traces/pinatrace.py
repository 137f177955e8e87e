"""Traces of Pin's example tool pinatrace: `pin -t pinatrace.so -- PROGRAM` writes pinatrace.out."""

import re
from collections.abc import Iterator
from pathlib import Path

from kvmmu.traces._sink import Sink
from kvmmu.traces._text import Pinatrace
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, text_chunks

__all__ = ["FORMAT", "PinatraceFormat"]

_ROW = re.compile(rb"\s*((0x)?[0-9a-fA-F]+|\(nil\)):?\s+[RWLS]\s+((0x)?[0-9a-fA-F]+|\(nil\))(\s|$)")
_LEAST = 0.9                        # of the first lines are rows


class PinatraceFormat:
    """Lines such as `0x7f1c: R 0x7ffd`; a size in decimal and a value may follow. Lines that begin with # are passed over."""

    name = "pinatrace"

    def sniff(self, head: bytes, path: Path) -> int:
        lines = [line for line in head.split(b"\n")[:500] if line.strip() and not line.startswith(b"#")]
        if len(lines) > 1 and len(head) > 1000:
            lines.pop()             # it may be cut off
        rows = sum(_ROW.match(line) is not None for line in lines)
        return 85 if rows and rows >= _LEAST * len(lines) else 0

    def open(self, path: Path) -> ForeignTrace:
        """Open a pinatrace."""
        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                yield from text_chunks(stream, Pinatrace(), Sink(), notes)

        return ForeignTrace(self.name, path, read, Brings(ip=True, size=True))


FORMAT = PinatraceFormat()
