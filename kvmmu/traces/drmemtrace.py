"""Traces of DynamoRIO's drmemtrace: one file, an archive of chunks, or a folder with a file for each thread."""

import heapq
import zipfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvmmu.traces._binary import Drmemtrace, Threads
from kvmmu.traces._sink import Sink
from kvmmu.traces.compressed import HEAD_BYTES, ByteStream, open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, whole_records
from kvmmu.traces.header import MAX_VCPUS, TraceError

__all__ = ["ENTRY", "FORMAT", "DrmemtraceFormat"]

ENTRY = np.dtype([("type", "<u2"), ("size", "<u2"), ("addr", "<u8")])           # packed: 12 bytes
ENTRY_32 = np.dtype([("type", "<u2"), ("size", "<u2"), ("addr", "<u4")])        # of a 32-bit program
_HEADER, _LAST_TYPE = 25, 49
_MOST_VERSIONS = 1000               # a header's version is a small number
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_FILES = MAX_VCPUS


class DrmemtraceFormat:
    """Entries of 12 bytes (8 of 32-bit programs). Threads are vCPUs in order of appearance, cores if a file is of a core.

    Markers of physical addresses become `gpa`, for the accesses to that page behind them.
    """

    name = "drmemtrace"

    def sniff(self, head: bytes, path: Path) -> int:
        if path.is_dir():
            return 90 if next(iter(_files_of(path)), None) else 0
        if head.startswith(_ZIP_MAGIC):
            return 95 if _is_archive(path) else 0
        return 95 if _width(head) else 0

    def open(self, path: Path, *, fetch: bool = True, vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open a drmemtrace.

        Parameters
        ----------
        path : Path
            A file: raw, compressed, or a `.zip` of chunks. A folder: of such files, merged by their timestamps.
        fetch : bool
            Read instruction fetches too.
        vcpus : int
            The most threads that there can be.
        """
        files = [path] if not path.is_dir() else list(_files_of(path))
        if not files:
            raise TraceError(f"{path}: has no file of a drmemtrace, nor has {path / 'trace'}")

        def read(notes: Notes) -> Iterator[Columns]:
            threads = Threads()
            sink = Sink(vcpu=True, gpa=True)
            with ExitStack() as opened:
                readers = []
                for core, file in enumerate(files):
                    stream = opened.enter_context(_open_any(file))
                    width = _width(stream.peek())
                    if not width:
                        stream.read(1)          # raises if it is damaged
                        raise TraceError(f"{file}: does not begin with the header of a drmemtrace, an entry of type {_HEADER}")
                    readers.append(_File(stream, Drmemtrace(threads, core=core, fetch=fetch, narrow=width == 8), width, sink))
                yield from _merged(readers, sink) if len(readers) > 1 else readers[0].rows()
                for reader in readers:
                    notes.add("prefetches", reader.entries.prefetches)
                    notes.add("cache flushes", reader.entries.flushes)
                    notes.add("files without footer", not reader.entries.footers)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, size=True, vcpu=True), vcpus=vcpus)


# ---- files -------------------------------------------------------------------------------------------------------------

class _File:
    """The rows of one file."""

    def __init__(self, stream: ByteStream, entries: Drmemtrace, width: int, sink: Sink) -> None:
        self.stream, self.entries, self._width, self._sink = stream, entries, width, sink

    def rows(self) -> Iterator[Columns]:
        """Yield chunks of a file that is alone."""
        for block, offset in whole_records(self.stream, self._width, "an entry"):
            position = 0
            while position < len(block):
                position, _, reason = self.entries.run(block, position, self._sink)
                if len(self._sink):
                    yield self._sink.take()
                self._raise(reason, offset + position)

    def segments(self) -> Generator[bool]:
        """Fill the sink. Yields True at a timestamp, False when the sink is full."""
        for block, offset in whole_records(self.stream, self._width, "an entry"):
            position = 0
            while position < len(block):
                position, at_timestamp, reason = self.entries.run(block, position, self._sink, True)
                self._raise(reason, offset + position)
                if position < len(block) or at_timestamp:
                    yield at_timestamp

    def _raise(self, reason: str | None, offset: int) -> None:
        if reason is not None:
            raise TraceError(f"{self.stream.path}: the entry at byte {offset} {reason}")


def _merged(files: list[_File], sink: Sink) -> Iterator[Columns]:
    """Yield chunks of several files, in the order of their timestamps."""
    parts = [file.segments() for file in files]
    waiting = [(0, place) for place in range(len(files))]       # begin all: their first timestamps are behind their headers
    damage: TraceError | None = None
    try:
        while waiting:
            _, place = heapq.heappop(waiting)
            for at_timestamp in parts[place]:
                if at_timestamp:
                    heapq.heappush(waiting, (files[place].entries.timestamp, place))
                    break
                yield sink.take()
    except TraceError as error:
        damage = error
    if len(sink):
        yield sink.take()
    if damage is not None:
        raise damage


def _width(head: bytes) -> int:
    """Return the bytes of an entry, by the first entries: 12 or 8; 0 if these are no entries."""
    for dtype in (ENTRY, ENTRY_32):
        entries = np.frombuffer(head, dtype, min(len(head) // dtype.itemsize, 64))
        if entries.size and entries["type"][0] == _HEADER and entries["size"][0] == 0 and entries["addr"][0] < _MOST_VERSIONS \
                and (entries["type"] <= _LAST_TYPE).all():
            return dtype.itemsize
    return 0


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield the trace files in a folder, or in its folder `trace`, by name."""
    for place in (folder, folder / "trace"):
        if not place.is_dir():
            continue
        found = 0
        for file in sorted(place.iterdir()):
            if file.is_file() and _is_trace(file):
                found += 1
                if found > _MAX_FILES:
                    raise TraceError(f"{place}: has more than {_MAX_FILES} files, the processors that a trace may have")
                yield file
        if found:
            return


def _is_trace(file: Path) -> bool:
    try:
        with file.open("rb") as raw:
            if raw.read(4) == _ZIP_MAGIC:
                return _is_archive(file)
        with open_bytes(file) as stream:
            return _width(stream.peek(HEAD_BYTES)) > 0
    except TraceError:
        if ".trace." in file.name or ".memtrace." in file.name:         # of a trace, and not readable
            raise
        return False


# ---- archives ----------------------------------------------------------------------------------------------------------

class _Members:
    """The members of an archive, one after the other, as a file."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except OSError:
            raise
        except Exception as error:      # damaged directories raise a dozen types
            raise TraceError(f"{path}: is not a whole zip archive ({error})") from None
        self._names = sorted((info.filename for info in self._archive.infolist()), reverse=True)
        self._member: Any = None

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer from its start; 0 at the end."""
        while True:
            if self._member is None:
                if not self._names:
                    return 0
                self._member = self._opened(self._names.pop())
            try:
                data = self._member.read(len(buffer))
            except Exception as error:      # zlib, bz2, lzma, zipfile and struct have each their own
                raise ValueError(f"member {self._member.name}: {error}") from error
            if data:
                buffer[:len(data)] = data
                return len(data)
            self._member.close()
            self._member = None

    def _opened(self, name: str) -> Any:
        try:
            return self._archive.open(name)
        except Exception as error:
            raise ValueError(f"member {name}: {error}") from error

    def close(self) -> None:
        self._archive.close()


def _is_archive(path: Path) -> bool:
    """True if the first chunk of a zip archive begins with the header of a trace."""
    try:
        with ByteStream(path, _archive_file(path), "zip") as stream:
            return _width(stream.peek(1200)) > 0
    except TraceError:
        return False


def _archive_file(path: Path) -> BinaryIO:
    return _Members(path)       # type: ignore[return-value]


def _open_any(path: Path) -> ByteStream:
    with path.open("rb") as file:
        archived = file.read(4) == _ZIP_MAGIC
    return ByteStream(path, _archive_file(path), "zip") if archived else open_bytes(path)


FORMAT = DrmemtraceFormat()
