"""Traces of other tools: what their readers share. `docs/formats.md` tells of each format, and how to add one.

A reader turns a file into chunks of rows (see `stream`). Such a file has neither registers nor page tables.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvmmu.traces._sink import Sink
from kvmmu.traces.compressed import BLOCK_BYTES, ByteStream
from kvmmu.traces.header import MAX_VCPUS, Header, TraceError
from kvmmu.traces.stream import Chunk, Trace, checked_chunks

__all__ = [
    "Brings", "ForeignTrace", "Format", "LineReader", "Notes", "foreign_header", "option_error", "text_chunks", "whole_lines",
    "whole_records",
]

Columns = Mapping[str, Any]

_MAX_LINE = 1 << 16                 # bytes; longer lines are no text that a tracer wrote
_EXCERPT = 60                       # bytes of a broken line that a message shows


class Format(Protocol):
    """The contract of a format, which the entry points `kvmmu.traces` fulfil and `open_trace` relies on.

    Attributes
    ----------
    name : str
        As in `open_trace(path, format=name)`.
    """

    name: str

    def sniff(self, head: bytes, path: Path) -> int:
        """Say how sure it is that this file has the format.

        Parameters
        ----------
        head : bytes
            The first bytes of the file, decompressed, at most 65,536; empty for a directory.
        path : Path

        Returns
        -------
        int
            0: it does not. 100: there is no doubt, by a magic number for example. 50: it looks so.
        """
        ...

    def open(self, path: Path, **options: Any) -> Trace:
        """Open a file of the format. Options are those that the caller of `open_trace` gave."""
        ...


def foreign_header(source: str, path: Path, vcpus: int) -> Header:
    """Return the header of a trace that brings no registers.

    Parameters
    ----------
    source : str
        Name of the format.
    path : Path
    vcpus : int
        More than the highest vCPU that the rows may name.
    """
    return Header(registers=(), vcpus=vcpus, name=path.name, source=source)


@dataclass(frozen=True)
class Brings:
    """The columns that rows of a format may have besides the address.

    Attributes
    ----------
    gpa, ip, size, vcpu, tables : bool
        Physical addresses, instruction pointers, sizes, processors, page tables.
    """

    gpa: bool = False
    ip: bool = False
    size: bool = False
    vcpu: bool = False
    tables: bool = False


@dataclass
class Notes:
    """The rows that a reader passed over, by kind. It grows while chunks are read."""

    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, count: int = 1) -> None:
        if count:
            self.skipped[kind] = self.skipped.get(kind, 0) + count


class ForeignTrace(Trace):
    """A trace of another tool. Its chunks can be read several times; each time the file is opened.

    Parameters
    ----------
    source : str
        Name of the format.
    path : Path
    read : callable
        Takes Notes, returns an iterator of columns. Opens and closes the file.
    brings : Brings
    vcpus : int
        More than the highest vCPU; by default 1, or as many as there can be.
    with_events : callable, optional
        Takes nothing, returns the same trace with its events.
    tells_registers : bool
        There are events, and they tell what registers each vCPU begins with and loads.

    Attributes
    ----------
    path : Path
    tells_registers : bool
    header : Header
    brings : Brings
    notes : Notes
        Of the last reading.
    """

    def __init__(self, source: str, path: Path, read: Callable[[Notes], Iterator[Columns]], brings: Brings, *,
                 vcpus: int | None = None, with_events: "Callable[[], ForeignTrace] | None" = None,
                 tells_registers: bool = False) -> None:
        super().__init__(foreign_header(source, path, vcpus or (MAX_VCPUS if brings.vcpu else 1)), ())
        self.path, self._read, self.brings, self.notes = path, read, brings, Notes()
        self._with_events, self.tells_registers = with_events, tells_registers

    def with_events(self) -> "ForeignTrace":
        """Return the trace with the events that its file tells, which need memory and registers to be replayed."""
        return self if self._with_events is None else self._with_events()

    def columns(self) -> Generator[dict[str, Any]]:
        """Yield the chunks as mappings of column names to arrays, not checked."""
        self.notes = Notes()
        for columns in self._read(self.notes):
            yield dict(columns)

    def chunks(self) -> Generator[Chunk]:
        """Return the chunks, checked."""
        return checked_chunks(self.columns(), self.header)


def option_error(format: str, name: str, value: Any, allowed: str) -> ValueError:
    """Return the error of a caller whose value for an option of a format is not allowed."""
    return ValueError(f"{name}: is {value!r}; allowed for {format} is {allowed}")


# ---- binary ------------------------------------------------------------------------------------------------------------

def whole_records(stream: ByteStream, itemsize: int, what: str) -> Generator[tuple[bytes | bytearray, int]]:
    """Yield blocks of whole records, and the offset of each.

    Raises
    ------
    TraceError
        The file is damaged, or it ends inside a record. The records before were yielded.
    """
    offset = left = 0
    for block in stream.blocks(BLOCK_BYTES // itemsize * itemsize):
        left = len(block) % itemsize
        if len(block) > left:
            yield block[:len(block) - left] if left else block, offset
        offset += len(block)
    if left:
        raise TraceError(f"{stream.path}: ends at byte {offset}, inside a record of {itemsize} bytes that begins at byte "
                         f"{offset - left}: {what} is cut off")


# ---- text --------------------------------------------------------------------------------------------------------------

class LineReader(Protocol):
    """A compiled parser of lines."""

    line: int
    skipped: int

    def run(self, text: bytes | bytearray, start: int, sink: Sink) -> tuple[int, str | None]: ...


def whole_lines(stream: ByteStream) -> Generator[tuple[bytes | bytearray, int]]:
    """Yield blocks of whole lines that end with a line feed, and the offset of each. The last line need not have one in the file.

    Raises
    ------
    TraceError
        The file is damaged, or a line is too long. The lines before were yielded.
    """
    rest: bytes | bytearray = b""
    offset = 0
    for block in stream.blocks():
        end = block.rfind(b"\n") + 1
        if not end:
            rest = rest + block
        else:
            text = rest + block[:end] if rest else block if end == len(block) else block[:end]
            rest = block[end:]
            yield text, offset
            offset += len(text)
        if len(rest) > _MAX_LINE:
            raise TraceError(f"{stream.path}: a line from byte {offset} on has more than {_MAX_LINE} bytes: that is no text of a "
                             "tracer")
    if rest:
        yield rest + b"\n", offset


def text_chunks(stream: ByteStream, parser: LineReader, sink: Sink, notes: Notes) -> Generator[Columns]:
    """Yield rows of a text.

    Raises
    ------
    TraceError
        The file is damaged, or a line is broken; the message has its number. The rows before were yielded.
    """
    seen = 0
    for text, offset in whole_lines(stream):
        position = 0
        while position < len(text):
            position, reason = parser.run(text, position, sink)
            notes.add("lines", parser.skipped - seen)
            seen = parser.skipped
            if len(sink):
                yield sink.take()
            if reason is not None:
                line = bytes(text[position:position + _EXCERPT]).split(b"\n")[0]
                raise TraceError(f"{stream.path}: line {parser.line} (byte {offset + position}) {reason}: {line!r}")
