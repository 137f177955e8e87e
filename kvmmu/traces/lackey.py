"""Traces of Valgrind's lackey: `valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM`."""

from collections.abc import Iterator
from pathlib import Path

from kvmmu.traces._sink import Sink
from kvmmu.traces._text import Lackey
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, text_chunks

__all__ = ["FORMAT", "LackeyFormat"]


class LackeyFormat:
    """Lines such as `I  0401ab70,3` and ` L 1fff000778,8`. A modify (M) is a load and a store."""

    name = "lackey"

    def sniff(self, head: bytes, path: Path) -> int:
        lines = head.split(b"\n")[:2000]
        rows = sum(line[:3] in (b"I  ", b" L ", b" S ", b" M ") and b"," in line for line in lines)
        noise = sum(line.startswith((b"==", b"--", b"**")) for line in lines)
        if not rows and noise > 1 and b"Lackey" in head:
            return 70
        return 90 if rows > 1 and rows + noise > len(lines) // 2 else 60 if rows > 1 or rows and len(lines) < 3 else 0

    def open(self, path: Path, *, fetch: bool = True, strict: bool = False) -> ForeignTrace:
        """Open a lackey trace.

        Parameters
        ----------
        path : Path
        fetch : bool
            Read instruction fetches too.
        strict : bool
            Refuse lines that are neither rows nor Valgrind's own (`==123== ...`), which are passed over always. Otherwise lines
            of the program are passed over, too.
        """
        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                yield from text_chunks(stream, Lackey(fetch=fetch, strict=strict), Sink(), notes)

        return ForeignTrace(self.name, path, read, Brings(ip=True, size=True))


FORMAT = LackeyFormat()
