"""The trace format as Parquet files, by PyArrow (extra `arrow`): written, and read without trusting a byte of them."""

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvmmu.arch._bits import INVALID_GPA, PAGE_SHIFT, Op
from kvmmu.arch.arguments import check_bool, check_path, check_threads
from kvmmu.traces._arrow import pyarrow
from kvmmu.traces._files import NewFile, StrPath, no_such_trace, open_regular
from kvmmu.traces._places import MAX_USES, PlacedRows, addresses_of, find_places
from kvmmu.traces.header import Header, TraceError, checksum, with_totals
from kvmmu.traces.stream import COLUMNS, NEEDED, NULLABLE, PLACED, Chunk, PlacedChunk, Trace, columns_of, count_accesses

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["COMPRESSIONS", "LAYOUTS", "NoTraceError", "ParquetTrace", "ParquetWriter", "batch_columns", "is_parquet", "schema"]

KEY = b"kvmmu.trace"
CHECKSUM_KEY = b"kvmmu.trace.crc32"
COMPRESSIONS = ("lz4", "zstd", "snappy", "none")
ROW_GROUP = 1 << 18                     # rows; a group's columns fit into the second-level cache or nearly so
_MAGIC = b"PAR1"
_WHOLE_GROUP = 1 << 22                  # larger row groups are decoded in batches, so that memory stays bounded
_BYTES_PER_ROW, _BYTES_BESIDE = 32, 1 << 20            # of a column, decompressed: what any encoding takes, and more
# The others decode faster plain.
_DICTIONARY = ["addr", "page", "frame", "page_op", "page_access", "vcpu", "value", "gpa", "ip"]

# The two forms of `op`, `addr`, `access` and `gpa` in a file: as they are, or as places. A place is an offset in a page, and a
# row of the row group that has the use of the page. Older files have places of `addr` and `gpa` alone.
LAYOUTS = ("places", "plain")
_USES = {"page": "uint64", "frame": "uint64", "page_op": "uint8", "page_access": "uint8"}
_OLD_USES, _OLD_PLACED = ("page", "frame"), ("addr", "gpa")
_KNOWN = {"place": "uint32"} | _USES | COLUMNS


class NoTraceError(TraceError):
    """A whole Parquet file that is no trace."""


def schema(layout: str = "plain") -> Any:
    """Return the Arrow schema of a trace, without header."""
    pa = pyarrow()
    columns = COLUMNS if layout == "plain" else (
        {name: dtype for name, dtype in _KNOWN.items() if name not in PLACED})
    nullable = NULLABLE if layout == "plain" else ("ip",)
    return pa.schema([pa.field(name, getattr(pa, dtype)(), nullable=name in nullable) for name, dtype in columns.items()])


def is_parquet(path: StrPath) -> bool:
    """True if a path looks like Parquet: by its name, or by the first bytes of a regular file."""
    path = Path(path)
    if path.suffix == ".parquet":
        return not path.is_dir()
    if not path.is_file():
        return False
    with open_regular(path, TraceError) as file:
        return file.read(4) == _MAGIC


def batch_columns(batch: Any, known: Mapping[str, str] = COLUMNS) -> dict[str, Any]:
    """Return the columns of an Arrow record batch or table as arrays, those with nulls masked. IN known: their types by name.

    Raises
    ------
    TraceError
        A column of another type, or with nulls where the format has none.
    """
    pa = pyarrow()
    columns: dict[str, Any] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name not in known:
            raise TraceError(f"column {field.name!r} is unknown; allowed are {', '.join(known)}")
        if field.name in columns:
            raise TraceError(f"column {field.name!r} is there twice")
        if field.type != getattr(pa, known[field.name])():
            raise TraceError(f"column {field.name!r} is {field.type}; allowed is {known[field.name]}")
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], field.type)])
        if column.null_count and field.name not in NULLABLE:
            raise TraceError(f"column {field.name!r} has {column.null_count} nulls; allowed is none")
        columns[field.name] = _array(column)
    return columns


def _array(column: Any) -> Any:
    """Return an Arrow array without a copy, masked if it has nulls."""
    if not column.null_count:
        return column.to_numpy(zero_copy_only=True)
    valid, data = column.buffers()
    dtype = np.dtype(str(column.type))
    values = np.frombuffer(data, dtype, len(column), column.offset * dtype.itemsize)
    first = column.offset // 8
    bits = np.unpackbits(np.frombuffer(valid, np.uint8)[first:], count=column.offset % 8 + len(column), bitorder="little")
    return np.ma.masked_array(values, mask=bits[column.offset % 8:] == 0)


# ---- reading -----------------------------------------------------------------------------------------------------------

class ParquetTrace(Trace):
    """A trace in a Parquet file, read in row groups that are decoded ahead by other threads.

    Parameters
    ----------
    path : str or path-like
    decoders : int, optional
        Threads that decode; by default one per processor, at most four.
    lean : bool
        Leave columns undecoded that no row of a group needs: size and value of groups without events, vcpu of traces with one,
        ip. A trace without registers is read whole but for ip.

    Attributes
    ----------
    path : Path
    header : Header
    rows : int

    Raises
    ------
    TraceError
        Not a regular file, not a whole Parquet file, or not a trace; the message says what is wrong and what is allowed.
    FileNotFoundError
    OSError
        The file cannot be opened.
    ImportError
        PyArrow is not installed.
    """

    def __init__(self, path: StrPath, *, decoders: int | None = None, lean: bool = True) -> None:
        self._pa = pyarrow()
        self.path = Path(check_path("path", path, "a trace"))
        self._lean = check_bool("lean", lean)
        self._decoders = min(4, os.cpu_count() or 1) if decoders is None else check_threads("decoders", decoders)
        self._local = threading.local()
        try:
            open_regular(self.path, TraceError).close()
        except FileNotFoundError:
            raise no_such_trace(self.path, "trace") from None
        file = self._open()
        try:
            header = self._read_header(file)
        finally:
            file.close()
        sized = not header.registers                # accesses that cross a page touch two of those that are made for them
        self._unneeded = {"ip"} | (set() if sized else {"size", "value"}) | (set() if header.vcpus > 1 else {"vcpu"})
        self._starts = np.cumsum([0, *self._group_rows]).tolist()
        self.rows = self._starts[-1]
        if header.rows is not None and header.rows != self.rows:
            raise TraceError(f"{self.path}: has {self.rows} rows, its header says {header.rows}")
        super().__init__(header, ())

    def _open(self, metadata: Any = None) -> Any:
        try:
            return self._pa.parquet.ParquetFile(self.path, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
        except Exception as error:  # damage raises half a dozen types
            raise TraceError(f"{self.path}: not a whole Parquet file ({_described(error)})") from error

    def _read_header(self, file: Any) -> Header:
        """Read the header; also checks the schema and takes the sizes of the row groups."""
        try:
            found, metadata = file.schema_arrow, file.metadata
            self._metadata = metadata                               # one for all threads: it grows with the row groups
            pairs = metadata.metadata or {}
            self._group_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except Exception as error:
            raise TraceError(f"{self.path}: its footer is damaged ({_described(error)})") from error
        if any(rows < 0 for rows in self._group_rows):
            raise TraceError(f"{self.path}: its footer is damaged (a row group of {min(self._group_rows)} rows)")
        text = pairs.get(KEY)
        if text is None:
            raise NoTraceError(f"{self.path}: a Parquet file, but no trace: it has no metadata {KEY.decode()!r}")
        stated = pairs.get(CHECKSUM_KEY)
        if stated is not None and stated != checksum(text).encode():
            raise TraceError(f"{self.path}: its header is damaged "
                             f"(CRC-32 {checksum(text)}, stated is {stated.decode(errors='replace')})")
        columns: dict[str, int] = {}
        for place, field in enumerate(found):
            if field.name in columns:
                raise TraceError(f"{self.path}: column {field.name!r} is there twice")
            columns[field.name] = place
        self._uses: tuple[str, ...] = ()                                    # what places name, and the columns that it makes
        self._placed: tuple[str, ...] = ()
        if "place" in columns:
            old = "op" in columns and "page_op" not in columns
            self._uses, self._placed = (_OLD_USES, _OLD_PLACED) if old else (tuple(_USES), PLACED)
        self._known = {name: dtype for name, dtype in _KNOWN.items()        # others are somebody's own
                       if name in COLUMNS or self._uses and (name == "place" or name in self._uses)}
        for field in found:
            if field.name in self._known and field.type != getattr(self._pa, self._known[field.name])():
                raise TraceError(f"{self.path}: column {field.name!r} is {field.type}; allowed is {self._known[field.name]}")
        for name in [*(name for name in NEEDED if name not in self._placed), *self._uses]:
            if name not in columns:
                raise TraceError(f"{self.path}: column {name!r} is missing; there are {', '.join(columns)}")
        for name in self._placed:
            if name in columns:
                raise TraceError(f"{self.path}: column {name!r} is there beside places; allowed is one of them")
        self._names = [name for name in COLUMNS if name in columns or name in self._placed]
        try:
            return Header.from_json(text)
        except TraceError as error:
            raise TraceError(f"{self.path}: {error}") from None

    def _group_start(self, row: int) -> int:
        """Return the first row of the row group that a row lies in; the end of the trace behind all of them."""
        return int(self._starts[np.searchsorted(self._starts, row, side="right") - 1])

    def chunks(self) -> Generator[Chunk]:
        """Return the chunks, checked and in order. Closing the iterator ends the decoding threads."""
        return self._chunks_from(0)

    def _chunks_from(self, start: int, stop: int | None = None, placed: bool = False) -> Generator[Chunk]:
        """Yield the chunks of the rows from `start` to `stop`, which lie between row groups. IN placed: as PlacedChunks, if they
        can be."""
        ahead = self._decoders + 1
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(self._decoders, "kvmmu-decode") as pool:
            pending: deque[Future[list[Chunk]]] = deque()
            try:
                for group, rows in enumerate(self._group_rows):
                    if self._starts[group + 1] <= start or (stop is not None and self._starts[group] >= stop):
                        continue
                    if rows > _WHOLE_GROUP and not self._placed:
                        while pending:
                            yield from pending.popleft().result()
                        yield from self._batches(group, self._names)
                        continue
                    pending.append(pool.submit(self._whole_group, group, placed))
                    if len(pending) > ahead:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _file(self) -> Any:
        """Return the file as this thread reads it: PyArrow's readers are not for several threads at once."""
        if not hasattr(self._local, "file"):
            self._local.file = self._open(self._metadata)
        return self._local.file

    def _check_sizes(self, group: int) -> None:
        """Refuse a row group whose columns, decompressed, are larger than its rows can make them."""
        rows = self._metadata.row_group(group)
        if self._placed and rows.num_rows > MAX_USES:
            raise TraceError(f"has {rows.num_rows:,} rows; allowed with places are {MAX_USES:,}")
        allowed = rows.num_rows * _BYTES_PER_ROW + _BYTES_BESIDE
        for place in range(rows.num_columns):
            column = rows.column(place)
            if column.path_in_schema in self._known and column.total_uncompressed_size > allowed:
                raise TraceError(f"column {column.path_in_schema!r} takes {column.total_uncompressed_size:,} bytes for "
                                 f"{rows.num_rows:,} rows; allowed are {allowed:,}")

    def _whole_group(self, group: int, placed: bool = False) -> list[Chunk]:
        self._guarded(group, lambda: self._check_sizes(group))
        names = self._names
        if self._lean:
            names = [name for name in names if name not in self._unneeded]
        columns, places = self._guarded(group, lambda: self._decoded(group, names))
        if places is not None:
            chunk = self._guarded(group, lambda: self._placed_chunk(group, dict(columns), places)) if placed else None
            if chunk is not None:
                return [chunk]
            places.put(**(made := self._columns(len(places))))
            columns |= made
        clean = places is not None and places.legal and not places.has_events
        if not clean and (columns["op"] >= Op.MOV_CR3).any():
            columns |= self._guarded(group, lambda: self._of_events(group, columns["op"], columns))
        return [self._guarded(group, lambda: Chunk._checked(columns, self.header, self._starts[group], clean))]

    def _of_events(self, group: int, op: Any, columns: dict[str, Any]) -> dict[str, Any]:
        """Return what events have and `columns` lack. IN op: theirs."""
        wanted = ["size", "value"] if (op == Op.GUEST_WRITE).any() else ["value"]
        names = [name for name in wanted if name in self._names and name not in columns]
        return self._stored(group, names) if names else {}

    def _placed_chunk(self, group: int, columns: dict[str, Any], places: PlacedRows) -> PlacedChunk | None:
        """Return a row group as its places; None if rows are to be judged one by one, or have columns that no PlacedChunk has."""
        if not places.legal:
            return None
        rows, op, addr = places.events()
        if rows.size:
            columns |= self._of_events(group, op, columns)
        return PlacedChunk.of(places, columns, self.header, rows, op, addr)

    def _decoded(self, group: int, names: list[str]) -> tuple[dict[str, Any], PlacedRows | None]:
        """Return columns, and the rows that the others are made of, if they are places."""
        if not self._placed:
            return self._stored(group, names), None
        columns = self._stored(group, ["place", *(name for name in names if name not in self._placed)])
        place = columns.pop("place")
        uses = self._used(group, (int(place.max()) >> PAGE_SHIFT) + 1 if place.size else 0)
        if "page_op" in uses:
            return columns, PlacedRows(place, **uses)
        made = self._columns(place.size)
        addresses_of(place, **uses, **made)
        return columns | made, None

    def _columns(self, rows: int) -> dict[str, Any]:
        """Return room for the columns that places make."""
        # PyArrow's allocator, which keeps pages: those of new arrays would be cleared by the kernel each time
        dtypes = {name: np.dtype(COLUMNS[name]) for name in self._placed}
        return {name: np.frombuffer(self._pa.allocate_buffer(rows * dtype.itemsize), dtype) for name, dtype in dtypes.items()}

    def _stored(self, group: int, names: list[str]) -> dict[str, Any]:
        return batch_columns(self._file().read_row_group(group, columns=names, use_threads=False), self._known)

    def _used(self, group: int, count: int) -> dict[str, Any]:
        """Return what places name: of the columns the first rows alone, which are decoded until there are as many."""
        batches = self._file().iter_batches(max(count, 1), row_groups=[group], columns=list(self._uses), use_threads=False)
        batch = next(batches, None)
        return batch_columns(batch, self._known) if batch else {name: np.empty(0, self._known[name]) for name in self._uses}

    def _batches(self, group: int, names: list[str]) -> Iterator[Chunk]:
        """Yield a large row group, a part at a time."""
        first = self._starts[group]
        self._guarded(group, lambda: self._check_sizes(group))
        batches = self._guarded(group, lambda: self._file().iter_batches(
            ROW_GROUP, row_groups=[group], columns=names, use_threads=False))
        while (batch := self._guarded(group, lambda: next(batches, None))) is not None:
            columns = self._guarded(group, lambda batch=batch: batch_columns(batch))
            chunk = self._guarded(group, lambda columns=columns, first=first: Chunk.checked(columns, self.header, first))
            first += len(chunk)
            yield chunk
        if first != self._starts[group + 1]:
            raise TraceError(f"{self.path}: row group {group} ends at row {first}, not at {self._starts[group + 1]}")

    def _guarded(self, group: int, read: Any) -> Any:
        """Return what `read` returns; whatever it raises becomes a TraceError that tells the place."""
        start, stop = self._starts[group], self._starts[group + 1]
        try:
            return read()
        except TraceError as error:
            text = str(error)
            raise TraceError(text if text.startswith(str(self.path)) else f"{self.path}: row group {group}: {text}") from None
        except Exception as error:  # PyArrow's own, OSError, MemoryError of a length that is wrong
            raise TraceError(f"{self.path}: row group {group} (rows {start} to {stop}) is damaged "
                             f"({_described(error)})") from error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---- writing -----------------------------------------------------------------------------------------------------------

class ParquetWriter:
    """Writes a trace. The file appears in its place when it is complete; if an exception ends it there is none.

    It is written beside its place, under a name of its own, which is removed if the writer is not closed. Only a signal that the
    program does not handle leaves it behind.

    Parameters
    ----------
    path : str or path-like
        A new file, or a regular one that is replaced and leaves it its mode. A link stays, and its target is replaced.
    header : Header
        Its totals are counted here.
    compression : {"lz4", "zstd", "snappy", "none"}
        lz4 decodes two to three times as fast as zstd and takes half as much space again.
    layout : {"places", "plain"}
        How `op`, `addr`, `access` and `gpa` are stored: "places" is decoded faster, "plain" are the columns as they are, for
        other tools.
    inputs : iterable of str or path-like
        Files that `path` shall not be, under any name.

    Raises
    ------
    OSError
        `path` is a directory, a FIFO, a socket or a device, is one of the inputs, or cannot be written.

    Examples
    --------
    with ParquetWriter("out.parquet", header) as writer:
        writer.write(op=op, addr=addr, access=access, gpa=gpa)
    """

    def __init__(self, path: StrPath, header: Header, *, compression: str = "lz4", layout: str = "places",
                 inputs: Iterable[StrPath] = ()) -> None:
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression: want one of {', '.join(COMPRESSIONS)}, got {compression!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: want one of {', '.join(LAYOUTS)}, got {layout!r}")
        if not isinstance(header, Header):
            raise TypeError(f"header: want a Header, got {type(header).__name__}")
        self._pa = pyarrow()
        self.path = Path(check_path("path", path, "a trace"))
        self.header = header
        self.rows = self.accesses = 0
        self.vcpus = 1
        self._layout, self._schema = layout, schema(layout)
        self._file = NewFile(path, inputs)
        self._writer: Any = None                        # None once it is closed
        try:
            self._writer = self._pa.parquet.ParquetWriter(
                self._file.part, self._schema, compression=compression, use_dictionary=_DICTIONARY, write_page_checksum=True,
                write_statistics=False, store_schema=False)
        except BaseException:
            self._file.discard()
            raise

    def write(self, columns: Mapping[str, Any] | Chunk | None = None, /, **more: Any) -> None:
        """Write rows, checked as on reading.

        Parameters
        ----------
        columns : mapping of str to ndarray, or Chunk
            As for `Chunk.checked()`; also as keyword arguments.

        Raises
        ------
        TraceError
            A row breaks the format; nothing of these rows is written.
        ValueError
            The writer is closed.
        OSError
            The file cannot be written; the writer is closed, and there is no file.
        """
        if self._writer is None:
            raise ValueError(f"{self.path}: its writer is closed; rows go to a new one")
        if isinstance(columns, Chunk) and columns.is_checked(self.header) and not more:
            chunk = columns
        else:
            chunk = Chunk.checked(dict(columns_of(columns or {})) | more, self.header, self.rows)
        try:
            self._write_chunk(chunk)
        except BaseException as error:                  # half a row group may be in the file
            self._abandon()
            self._name_file(error)
            raise

    def _write_chunk(self, chunk: Chunk) -> None:
        for first in range(0, len(chunk), 2 * ROW_GROUP):
            self._writer.write_table(self._table(chunk, slice(first, first + 2 * ROW_GROUP)), row_group_size=2 * ROW_GROUP)
        self.rows += len(chunk)
        self.accesses += count_accesses(chunk.op)
        self.vcpus = max(self.vcpus, chunk.vcpus)

    def _table(self, chunk: Chunk, part: slice) -> Any:
        """Return a row group: some rows as Arrow has them."""
        pa, op, addr, gpa = self._pa, chunk.op[part], chunk.addr[part], chunk.gpa[part]
        rows, events = op.size, op >= Op.MOV_CR3 if chunk.has_events else None
        value = np.zeros(rows, np.uint64)
        if events is not None and chunk.value is not None:
            np.copyto(value, chunk.value[part], where=events)
        columns = {"op": op, "access": chunk.access[part],
                   "size": np.ones(rows, np.uint8) if chunk.size is None else chunk.size[part],
                   "vcpu": np.zeros(rows, np.uint16) if chunk.vcpu is None else chunk.vcpu[part],
                   "value": value,
                   "ip": pa.nulls(rows, pa.uint64()) if chunk.ip is None else pa.array(chunk.ip[part], mask=chunk.ip[part] == 0)}
        if events is not None and events.any():
            gpa = np.where(events, np.uint64(INVALID_GPA), gpa)
        if self._layout == "plain":
            unknown = None if chunk.all_known and events is None else gpa == np.uint64(INVALID_GPA)
            columns |= {"addr": addr, "gpa": pa.array(gpa, mask=unknown),
                        "value": pa.nulls(rows, pa.uint64()) if events is None else pa.array(value, mask=~events)}
        else:
            found: tuple[Any, ...] = find_places(op, addr, chunk.access[part], gpa)
            columns |= {"place": found[0]} | {name: np.pad(column, (0, rows - column.size), "edge")     # one run behind them
                                              for name, column in zip(_USES, found[1:], strict=True)}
        return pa.Table.from_arrays([pa.array(columns[name]) for name in self._schema.names], schema=self._schema)

    def close(self) -> None:
        """Write the header and put the file in its place; harmless if it was done before."""
        if self._writer is None:
            return
        try:
            text = with_totals(self.header, self.accesses, self.rows, self.vcpus).to_json().encode()
            self._writer.add_key_value_metadata({KEY.decode(): text.decode(), CHECKSUM_KEY.decode(): checksum(text)})
            self._writer.close()
            self._file.finish()
        except BaseException as error:
            self._abandon()
            self._name_file(error)
            raise
        self._writer = None

    def _abandon(self) -> None:
        """Close without a file."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception:  # it has failed, and nobody waits for its file
            pass
        finally:
            self._file.discard()

    def _name_file(self, error: BaseException) -> None:
        """Let an OSError of PyArrow tell the file that was to be written, not the temporary one."""
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            self._abandon()
