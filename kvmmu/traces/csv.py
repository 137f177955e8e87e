"""Traces as text in columns, CSV or TSV, by PyArrow (extra `arrow`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.traces._arrow import pyarrow
from kvmmu.traces.compressed import ByteStream, open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, option_error, whole_lines
from kvmmu.traces.header import MAX_VCPUS, TraceError
from kvmmu.traces.named import SYNONYMS, Naming, Rows, kinds_of, parse_columns

__all__ = ["FORMAT", "CsvFormat"]

_DELIMITERS = (",", "\t", ";", "|", " ")
_WIDE = ("addr", "ip", "gpa")       # fields of 64 bits without sign
_BASE = "base=16 (--option base=16)"
_BLOCK = 1 << 20                    # bytes of text that become one batch


class CsvFormat:
    """Rows of text with named columns, or one column of addresses. Numbers are decimal, or hexadecimal behind 0x."""

    name = "csv"

    def sniff(self, head: bytes, path: Path) -> int:
        if not head or b"\0" in head:
            return 0
        line = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip("\r\ufeff")
        names = [name.strip().strip('"').lower() for name in line.split(_delimiter_of(line))]
        if any(name in SYNONYMS["addr"] for name in names):
            return 60
        named = any(suffix.lower() in (".csv", ".tsv") for suffix in path.suffixes)
        lines = [part.strip() for part in head.split(b"\n")[:100]][:-1]
        if lines and all(_number(part.decode("latin-1"), 10) is not None for part in lines):
            return 30
        return 25 if named else 0

    def open(self, path: Path, *, columns: Mapping[str, str | int] | str | None = None, delimiter: str | None = None,
             header: bool | None = None, base: int = 10, vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open a table of text.

        Parameters
        ----------
        path : Path
        columns : mapping or str, optional
            Which columns are addr, op, size, ip, vcpu, gpa, access: `{"addr": "va", "op": "type"}` or "addr=va,op=type". Those
            that are not named are found by usual names. A number counts columns from 0.
        delimiter : str, optional
            Told by the first line otherwise.
        header : bool, optional
            The first line has names. By default it does if its address is no number, or it has a column's usual name.
        base : {10, 16}
            16: addresses are hexadecimal without 0x.
        vcpus : int
            The most processors that there can be.
        """
        given = parse_columns(columns)
        if base not in (10, 16):
            raise option_error(self.name, "base", base, "10 or 16")
        if delimiter is not None and len(delimiter) != 1:
            raise option_error(self.name, "delimiter", delimiter, "one character")
        pyarrow()

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                table = _Table(path, stream, given, delimiter, header, base)
                try:
                    yield from table.fast()
                    return
                except _Refused as refused:
                    delivered = refused.rows
            with open_bytes(path) as stream:        # a field is no number, or a line has other fields: find it
                yield from _Table(path, stream, given, delimiter, header, base).careful(delivered)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, size=True, vcpu=True), vcpus=vcpus)


def _delimiter_of(line: str) -> str:
    return next((mark for mark in _DELIMITERS if mark in line), ",")


def _number(text: str, base: int) -> int | None:
    """Return a number of a field; None if it is none in this base."""
    try:
        return int(text, 16 if base == 16 or text[:2].lower() == "0x" else 10)
    except ValueError:
        return None


def _is_hexadecimal(text: str) -> bool:
    """True if a text is rather an address in hexadecimal without 0x than a name: no name begins with a digit."""
    return _number(text, 16) is not None and (text[0].isdigit() or len(text) >= 8 and any(mark.isdigit() for mark in text))


def _has_names(path: Path, fields: list[str], given: Mapping[str, str | int], base: int) -> bool:
    """True if the first line of a file has names: its address is no number, or one of its fields is a name.

    Raises
    ------
    TraceError
        Its address is a hexadecimal number, and the base is 10.
    """
    chosen = str(given.get("addr", "0" if len(fields) == 1 else ""))
    place = chosen if chosen.isdecimal() or chosen in fields else chosen.removeprefix("f")      # f0, f1: columns without names
    if not place.isdecimal() or int(place) >= len(fields):
        if chosen in fields or any(field.lower() in SYNONYMS["addr"] for field in fields):
            return True
        return all(_number(field, base) is None for field in fields)
    address = fields[int(place)]
    if address == "" or _number(address, base) is not None:
        return False
    if base == 10 and _is_hexadecimal(address):
        raise TraceError(f"{path}: line 1: the address is {address!r}, no decimal number; say {_BASE} if it is hexadecimal "
                         "without 0x, header=yes (--option header=yes) if it is a name")
    return True


class _Refused(Exception):
    """PyArrow does not take a batch. `rows`: those before it."""

    def __init__(self, rows: int, reason: str) -> None:
        super().__init__(reason)
        self.rows = rows


class _Lines:
    """The whole lines of a stream as a file for PyArrow; it ends before damage, which `damage` is then."""

    closed = False

    def __init__(self, stream: ByteStream) -> None:
        self._blocks = whole_lines(stream)
        self._ready = memoryview(b"")
        self.damage: TraceError | None = None

    def read(self, size: int = -1) -> bytes:
        if not self._ready and self.damage is None:
            try:
                self._ready = memoryview(next(self._blocks, (b"", 0))[0])
            except TraceError as error:
                self.damage = error
        size = len(self._ready) if size < 0 else size
        data, self._ready = bytes(self._ready[:size]), self._ready[size:]
        return data

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self._blocks.close()


class _Table:
    """A file of text in columns."""

    def __init__(self, path: Path, stream: ByteStream, given: Mapping[str, str | int], delimiter: str | None, header: bool | None,
                 base: int) -> None:
        self._pa = pyarrow()
        self._path, self._base = path, base
        head = stream.peek()
        if not head:
            stream.read(1)          # raises if that is for damage
            raise TraceError(f"{path}: is empty")
        line = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip("\r\ufeff")
        self._delimiter = delimiter or _delimiter_of(line)
        fields = [field.strip().strip('"') for field in line.split(self._delimiter)]
        self._header = _has_names(path, fields, given, base) if header is None else header
        names = fields if self._header else [f"f{place}" for place in range(len(fields))]
        if len(set(names)) < len(names):
            raise TraceError(f"{path}: two of its columns have one name: {', '.join(names)}")
        if not given and not self._header and len(names) == 1:
            given = {"addr": 0}
        self._names = names
        self._naming = Naming(path, names, given, None if self._header else (
            f"{', '.join(names)}, in the first line {', '.join(map(repr, fields))}; if these are names, say header=yes "
            "(--option header=yes)"))
        self._lines = _Lines(stream)

    def _open(self, types: Mapping[str, Any], on_invalid: Any = None) -> Any:
        csv = self._pa.csv
        return csv.open_csv(
            self._pa.PythonFile(self._lines, mode="r"),
            read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=self._names,
                                         skip_rows=1 if self._header else 0),
            parse_options=csv.ParseOptions(delimiter=self._delimiter, invalid_row_handler=on_invalid),
            convert_options=csv.ConvertOptions(column_types=types, include_columns=list(types), strings_can_be_null=True))

    def fast(self) -> Iterator[Columns]:
        """Yield chunks; raises _Refused where PyArrow finds a field or a line that it does not take."""
        pa = self._pa
        text = pa.dictionary(pa.int32(), pa.string())
        wide = pa.string() if self._base == 16 else pa.uint64()
        types = {column: text if field == "op" else wide if field in _WIDE else pa.int64()
                 for field, column in self._naming.fields.items()}
        rows = Rows(self._path, self._naming)
        try:
            batches = self._open(types)
            while True:
                try:
                    batch = batches.read_next_batch()
                except StopIteration:
                    break
                if batch.num_rows:
                    yield from rows.add(*self._arrays(batch))
        except (pa.ArrowException, TraceError) as error:
            raise _Refused(rows.row, str(error)) from None
        if self._lines.damage is not None:
            raise self._lines.damage

    def _arrays(self, batch: Any) -> tuple[dict[str, NDArray[Any]], Any]:
        columns: dict[str, NDArray[Any]] = {}
        spelled: Any = str
        for field, name in self._naming.fields.items():
            column = batch.column(name)
            if field == "gpa" and column.null_count and self._base == 10:
                column = column.fill_null(0xFFFF_FFFF_FFFF_FFFF)
            if column.null_count:
                raise self._pa.ArrowInvalid(f"{name} is empty")
            if field == "op":
                words = column.dictionary.to_pylist()
                indices = column.indices.to_numpy(zero_copy_only=False)
                columns[field] = kinds_of(words)[indices] if words else np.zeros(0, np.uint8)

                def spelled(row: int, words: list[str] = words, indices: NDArray[Any] = indices) -> str:
                    return str(words[indices[row]])
            elif self._pa.types.is_string(column.type):
                prefixed = self._pa.compute.binary_join_element_wise("0x", column, "")
                columns[field] = self._pa.compute.cast(prefixed, self._pa.uint64()).to_numpy(zero_copy_only=False)
            else:
                columns[field] = column.to_numpy(zero_copy_only=False)
        return columns, spelled

    def careful(self, delivered: int) -> Iterator[Columns]:
        """Yield chunks behind the first `delivered` rows up to the line that was refused; raises a TraceError with its number."""
        numbers: list[int] = []                             # of the lines of a batch
        rows = Rows(self._path, self._naming, delivered, lambda row: f"line {numbers[row - rows.row]}")
        batch: dict[str, list[Any]] = {field: [] for field in self._naming.fields}
        places = {field: self._names.index(name) for field, name in self._naming.fields.items()}
        left, number, reason = delivered + self._header, 0, ""
        while not reason and (data := self._lines.read()):
            for line in data.split(b"\n")[:-1]:
                number += 1
                left -= line.strip(b"\r") != b""
                if left >= 0 or line.strip(b"\r") == b"":
                    continue
                values, reason = self._values(line.decode("utf-8", "replace").rstrip("\r"), places)
                if reason:
                    break
                numbers.append(number)
                for field, value in values.items():
                    batch[field].append(value)
            yield from self._flush(rows, batch)
            numbers.clear()
        if reason:
            raise TraceError(f"{self._path}: line {number}: {reason}")
        if self._lines.damage is not None:
            raise self._lines.damage

    def _flush(self, rows: Rows, batch: dict[str, list[Any]]) -> Iterator[Columns]:
        types = {"addr": np.uint64, "ip": np.uint64, "gpa": np.uint64}
        columns: dict[str, NDArray[Any]] = {}
        words = batch.get("op", [])
        for field, values in batch.items():
            columns[field] = kinds_of(values) if field == "op" else np.array(values, types.get(field, np.int64))
        if batch["addr"]:
            yield from rows.add(columns, lambda row: str(words[row]))
        for field in batch:
            batch[field] = []

    def _values(self, line: str, places: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        fields = [field.strip().strip('"') for field in line.split(self._delimiter)]
        if len(fields) != len(self._names):
            return {}, f"has {len(fields)} fields, the first line {len(self._names)}: {line[:80]!r}"
        values: dict[str, Any] = {}
        for field, place in places.items():
            text = fields[place]
            wide = field in _WIDE
            if field == "op":
                values[field] = text
                continue
            value = _number(text, self._base if wide else 10)
            if value is None and field == "gpa" and not text:
                value = 0xFFFF_FFFF_FFFF_FFFF
            if value is None or not (0 <= value < 1 << 64 if wide else -1 << 63 <= value < 1 << 63):
                allowed = f"a number of {'64 bits' if wide else '63 bits with sign'}"
                if wide and value is None and _number(text, 16) is not None:
                    allowed += f"; hexadecimal without 0x takes {_BASE}"
                return {}, f"{self._naming.fields[field]} is {text!r}; allowed is {allowed}"
            values[field] = value
        return values, ""


FORMAT = CsvFormat()
