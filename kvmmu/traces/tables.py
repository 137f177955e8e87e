"""Traces in Parquet files of others, by PyArrow (extra `arrow`): columns of any names and integer types."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import INVALID_GPA
from kvmmu.traces._arrow import pyarrow
from kvmmu.traces._sink import ROWS
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes
from kvmmu.traces.header import MAX_VCPUS, TraceError
from kvmmu.traces.named import Naming, Rows, kinds_of, parse_columns

__all__ = ["FORMAT", "ParquetTableFormat"]


class ParquetTableFormat:
    """A Parquet file that is no trace of kvmmu. Columns are integers, or text: kinds of accesses, hexadecimal numbers."""

    name = "parquet"

    def sniff(self, head: bytes, path: Path) -> int:
        return 60 if head.startswith(b"PAR1") else 0

    def open(self, path: Path, *, columns: Mapping[str, str | int] | str | None = None, vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open a Parquet file.

        Parameters
        ----------
        path : Path
        columns : mapping or str, optional
            Which columns are addr, op, size, ip, vcpu, gpa, access: `{"addr": "va", "op": "type"}` or "addr=va,op=type". Those
            that are not named are found by usual names.
        vcpus : int
            The most processors that there can be.
        """
        given = parse_columns(columns)
        pa = pyarrow()

        def read(notes: Notes) -> Iterator[Columns]:
            try:
                file = pa.parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
                names = file.schema_arrow.names
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise TraceError(f"{path}: not a whole Parquet file ({_described(error)})") from error
            except Exception as error:      # damage raises half a dozen types
                raise TraceError(f"{path}: not a whole Parquet file ({_described(error)})") from error
            with file:
                naming = Naming(path, names, given)
                rows = Rows(path, naming)
                batches = file.iter_batches(ROWS, columns=list(naming.fields.values()), use_threads=False)
                while True:
                    try:
                        batch = next(batches, None)
                    except Exception as error:
                        raise TraceError(f"{path}: is damaged behind row {rows.row} ({_described(error)})") from error
                    if batch is None:
                        return
                    yield from rows.add(*_arrays(pa, path, naming, batch, rows.row))

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, size=True, vcpu=True), vcpus=vcpus)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _arrays(pa: Any, path: Path, naming: Naming, batch: Any, row: int) -> tuple[dict[str, NDArray[Any]], Any]:
    """Return the columns of a batch as arrays of integers, and how an op was written."""
    columns: dict[str, NDArray[Any]] = {}
    spelled: Any = str
    for field, name in naming.fields.items():
        column = batch.column(batch.schema.names.index(name))
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if column.null_count:
            if field not in ("gpa", "ip"):
                first = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                raise TraceError(f"{path}: row {row + first}: {name} is null; allowed are nulls in gpa and ip")
            column = column.fill_null(_null_of(pa, field, column.type))
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            if field == "op":
                coded = column.dictionary_encode()
                words, indices = coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)
                columns[field] = kinds_of(words)[indices] if words else np.zeros(0, np.uint8)

                def spelled(place: int, words: list[str] = words, indices: NDArray[Any] = indices) -> str:
                    return str(words[indices[place]])
                continue
            try:
                column = pa.compute.cast(column, pa.uint64())
            except pa.ArrowInvalid as error:
                raise TraceError(f"{path}: row {row} or one of {len(column)} behind it: {name}: {_described(error)}") from None
        if field == "op" and pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        if not pa.types.is_integer(column.type):
            raise TraceError(f"{path}: column {name!r} is {column.type}; allowed is an integer type"
                             + (", a boolean or text" if field == "op" else " or text such as 0x7fff"))
        array = column.to_numpy(zero_copy_only=False)
        if field == "gpa" and array.dtype.kind == "i":
            array = array.astype(np.int64)
        columns[field] = array
    return columns, spelled


def _null_of(pa: Any, field: str, kind: Any) -> Any:
    """Return what a null is: no physical address, no instruction."""
    if field == "ip":
        return "0" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else 0
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return hex(INVALID_GPA)
    return INVALID_GPA if pa.types.is_uint64(kind) else -1


FORMAT = ParquetTableFormat()
