"""Traces as numpy arrays: `.npy` of addresses or of records, `.npz` of columns, and plain 64-bit numbers."""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.traces._sink import ROWS
from kvmmu.traces.compressed import ByteStream, open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, option_error
from kvmmu.traces.header import MAX_VCPUS, TraceError
from kvmmu.traces.named import Naming, Rows, kinds_of, parse_columns

__all__ = ["FORMAT", "RAW", "NumpyFormat", "RawFormat"]

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK\x03\x04"
_HEADER_BYTES = 1 << 14             # more than numpy's own limit on the header of an array
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_WORD = 32                      # bytes of a kind of access that is text
_ALL = Brings(gpa=True, ip=True, size=True, vcpu=True)


class NumpyFormat:
    """`.npy`: one dimension, of integers (addresses) or of records with named fields. `.npz`: arrays of one length by name."""

    name = "numpy"

    def sniff(self, head: bytes, path: Path) -> int:
        if head.startswith(_NPY_MAGIC):
            return 95
        if not head.startswith(_ZIP_MAGIC):
            return 0
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:               # damaged directories raise a dozen types
            return 40 if path.suffix == ".npz" else 0
        return 90 if names and all(name.endswith(".npy") for name in names) else 0

    def open(self, path: Path, *, columns: Mapping[str, str | int] | str | None = None, vcpus: int = MAX_VCPUS) -> ForeignTrace:
        """Open numpy arrays.

        Parameters
        ----------
        path : Path
        columns : mapping or str, optional
            Which fields or arrays are addr, op, size, ip, vcpu, gpa, access: `{"addr": "va"}` or "addr=va".
        vcpus : int
            The most processors that there can be.
        """
        given = parse_columns(columns)

        def read(notes: Notes) -> Iterator[Columns]:
            with path.open("rb") as file:
                archived = file.read(4) == _ZIP_MAGIC
            yield from _of_archive(path, given) if archived else _of_array(path, given)

        return ForeignTrace(self.name, path, read, _ALL, vcpus=vcpus)


class RawFormat:
    """Addresses as plain numbers of 64 bits, one after the other, without any header."""

    name = "u64"

    def sniff(self, head: bytes, path: Path) -> int:
        return 35 if any(suffix.lower() == ".u64" for suffix in path.suffixes) and len(head) >= 8 else 0

    def open(self, path: Path, *, order: str = "little") -> ForeignTrace:
        """Open plain numbers.

        Parameters
        ----------
        path : Path
        order : {"little", "big"}
            Of the bytes of a number.
        """
        if order not in ("little", "big"):
            raise option_error(self.name, "order", order, "'little' or 'big'")

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                part = _Array(stream, np.dtype("<u8" if order == "little" else ">u8"), None)
                rows = Rows(path, Naming(path, ["addr"], {}))
                for array in part.parts():
                    yield from rows.add({"addr": array})

        return ForeignTrace(self.name, path, read, Brings())


# ---- arrays ------------------------------------------------------------------------------------------------------------

class _Array:
    """The data of an array, read a part at a time.

    Parameters
    ----------
    stream : ByteStream
        At the data.
    dtype : dtype
    length : int or None
        None: to the end of the file.
    """

    def __init__(self, stream: ByteStream, dtype: np.dtype[Any], length: int | None) -> None:
        self._stream, self.dtype, self.length = stream, dtype, length

    @classmethod
    def of_npy(cls, stream: ByteStream) -> "_Array":
        """Read and check the header of a `.npy` file."""
        place = stream.path
        head = io.BytesIO(stream.peek(_HEADER_BYTES))
        try:
            version = np.lib.format.read_magic(head)
            if version not in _HEADER_READERS:
                raise ValueError(f"npy version {version}; allowed are {sorted(_HEADER_READERS)}")
            shape, _, dtype = _HEADER_READERS[version](head)
        except Exception as error:      # numpy's parser raises what Python's tokenizer and struct do
            stream.read(1)              # raises if that is for damage
            raise TraceError(f"{place}: not a whole numpy array ({type(error).__name__}: {error})") from None
        if dtype.hasobject:
            raise TraceError(f"{place}: dtype {dtype} means pickled objects; allowed are integers, and records of them")
        if len(shape) != 1 or dtype.itemsize == 0:
            raise TraceError(f"{place}: has the shape {shape} of {dtype}; allowed is one dimension")
        if prod(shape) < 0 or prod(shape) * dtype.itemsize >= 1 << 63:
            raise TraceError(f"{place}: has the shape {shape} of {dtype}, more than any file")
        stream.read(head.tell())
        return cls(stream, dtype, shape[0])

    def parts(self, rows: int = ROWS) -> Iterator[NDArray[Any]]:
        """Yield the array, a part at a time; a TraceError behind the elements before damage."""
        itemsize = self.dtype.itemsize
        # of records that are large a part has fewer; a single one of megabytes is no row of a trace
        rows = max(1, min(rows, (16 << 20) // itemsize))
        left = self.length
        while left is None or left:
            count = rows if left is None else min(rows, left)
            data = self._stream.read(count * itemsize)
            whole = len(data) // itemsize
            if whole:
                yield np.frombuffer(data, self.dtype, whole)
            if left is not None:
                left -= whole
            if whole < count:
                if left is None and not len(data) % itemsize:
                    if self._stream.read(1):
                        raise AssertionError("a stream gave more behind its end")
                    return
                self._stream.read(1)
                raise TraceError(f"{self._stream.path}: ends at byte {self._stream.offset}, inside an element of {itemsize} bytes"
                                 if left is None else f"{self._stream.path}: ends at byte {self._stream.offset}; {left} elements "
                                 f"of {self.length} are missing")
        if self._stream.read(1):
            raise TraceError(f"{self._stream.path}: goes on behind its {self.length} elements, at byte {self._stream.offset - 1}")


def _of_array(path: Path, given: Mapping[str, str | int]) -> Iterator[Columns]:
    with open_bytes(path) as stream:
        array = _Array.of_npy(stream)
        names = list(array.dtype.names or ["addr"])
        naming = Naming(path, names, given)
        rows = Rows(path, naming)
        for part in array.parts():
            yield from rows.add({field: _integers(path, name, field, part[name] if array.dtype.names else part)
                                 for field, name in naming.fields.items()})


def _of_archive(path: Path, given: Mapping[str, str | int]) -> Iterator[Columns]:
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        except OSError:
            raise
        except Exception as error:      # damaged directories raise a dozen types
            raise TraceError(f"{path}: not a whole numpy archive ({error})") from None
        naming = Naming(path, names, given)
        arrays: dict[str, _Array] = {}
        for field, name in naming.fields.items():
            try:
                member: Any = opened.enter_context(archive.open(f"{name}.npy"))
            except Exception as error:      # the directory and the member tell different things, or it is encrypted
                raise TraceError(f"{path}: {name}: {error}") from None
            arrays[field] = _Array.of_npy(ByteStream(path / f"{name}.npy", member, "none"))
        lengths = {naming.fields[field]: array.length for field, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise TraceError(f"{path}: its arrays have different lengths: "
                             + ", ".join(f"{name} {length}" for name, length in lengths.items()))
        rows = Rows(path, naming)
        parts = {field: array.parts(1 << 16) for field, array in arrays.items()}
        if any(array.dtype.itemsize > 256 for array in arrays.values()):
            raise TraceError(f"{path}: an array has elements of more than 256 bytes; allowed are integers and short words")
        while True:
            columns: dict[str, NDArray[Any]] = {}
            damage: TraceError | None = None
            for field, part in parts.items():
                try:
                    columns[field] = _integers(path, naming.fields[field], field, next(part, np.empty(0, np.uint64)))
                except TraceError as error:
                    damage = damage or error
                    columns[field] = np.empty(0, np.uint64)
            shortest = min(column.size for column in columns.values())
            if shortest:
                yield from rows.add({field: column[:shortest] for field, column in columns.items()})
            if damage is not None:
                raise damage
            if not shortest:
                return


def _integers(path: Path, name: str, field: str, column: NDArray[Any]) -> NDArray[Any]:
    """Return a column as integers of this machine's byte order; kinds of accesses may be words."""
    if column.ndim != 1:
        raise TraceError(f"{path}: {name!r} has elements of the shape {column.shape[1:]} of {column.dtype}; allowed is one "
                         "number each")
    if field == "op" and column.dtype.kind in "SU" and column.dtype.itemsize <= 4 * _MAX_WORD:
        words, places = np.unique(column, return_inverse=True)
        return kinds_of([word.decode("latin-1") if isinstance(word, bytes) else str(word) for word in words.tolist()])[places]
    if field == "op" and column.dtype.kind == "b":
        return column.astype(np.uint8)
    if column.dtype.kind not in "iu":
        raise TraceError(f"{path}: {name!r} is {column.dtype}; allowed is an integer type"
                         f"{', bool or words' if field == 'op' else ''}")
    return np.ascontiguousarray(column, column.dtype.newbyteorder("="))


FORMAT = NumpyFormat()
RAW = RawFormat()
