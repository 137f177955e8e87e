"""The container of a recording: numpy archives, `.npz` or `.npz.zst`, read without trusting a byte of them.

numpy.load() is not used: it allocates what a header claims before it has seen the data, and it reports damage with
whatever exception the decoder at hand happens to raise. Here the headers of all members are read and checked first. Then every
member is read whole and its CRC checked. What decompressors give is limited.
"""

import errno
import io
import math
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.extras import missing_extra
from kvmmu.traces._files import all_there, limit_of, open_regular

if TYPE_CHECKING:
    import zipfile

StrPath = str | PathLike[str]
Arrays = dict[str, NDArray[Any]]

LIMIT_VARIABLE = "KVMMU_RECORDING_LIMIT"
_LIMIT = 2 << 30                        # bytes of a file, decompressed
_DIRECTORY_BYTES = 1 << 17              # of a zip file, with its comment
_MEMBERS = 1 << 10
_ZSTD_SUFFIX = ".zst"
_ZSTD_WINDOW_LOG = 27       # what `zstd --long` writes
_ZSTD_PIECE = 1 << 12       # of input: gives 128 MiB at most, at 128 KiB for a block of 4 bytes
_READ_BYTES = 1 << 20
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12          # methods of zip files
_PIECE = {_STORED: _READ_BYTES, _DEFLATED: _READ_BYTES}
_SMALL_PIECE = 1 << 12      # the others give all that so much input holds: of lzma 30 MB
_ZIP_MAGIC = b"PK"
_NPY_PREFIX_BYTES = 1 << 14  # more than numpy's own limit on the header of an array
_NPY_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class RecordingError(ValueError):
    """A recording is damaged or not in the documented layout: the message says which file, array and value."""


class NpyHeader(NamedTuple):
    """The header of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)


Headers = Mapping[str, NpyHeader | None]            # None: an array that is not wanted


def find_npz(path: StrPath) -> Path | None:
    """Return `path`, or `path` with `.zst` appended, whichever there is; None if neither is."""
    path = Path(path)
    return next(iter(all_there((path, path.with_name(path.name + _ZSTD_SUFFIX)))), None)


def open_npz(path: StrPath, wanted: Collection[str] | None = None, check: Callable[[Headers], object] | None = None) -> Arrays:
    """Read every array of a numpy archive.

    Parameters
    ----------
    path : str or path-like
        A `.npz` or `.npz.zst` file; `.zst` may be left out.
    wanted : collection of str, optional
        Arrays to read; others are passed over unread.
    check : callable, optional
        Called with what the headers say, before any data are read.

    Returns
    -------
    dict of str to ndarray
        The arrays by name: private, C-contiguous, aligned and writable.

    Raises
    ------
    FileNotFoundError
        Neither `path` nor `path`.zst is there.
    RecordingError
        The file is truncated or corrupt, is no regular file, an array holds Python objects (nothing is ever unpickled), or the
        arrays are larger than 2 GiB together; the environment variable KVMMU_RECORDING_LIMIT sets another number of bytes.
    OSError
        The file cannot be opened or read.
    ImportError
        The file is `.zst` and this machine has no reader for it.
    """
    file = find_npz(path)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, nor one with {_ZSTD_SUFFIX} appended")
    limit = limit_of(LIMIT_VARIABLE, _LIMIT)
    try:
        with open_regular(file, RecordingError) as source:
            content = _unzstd(file, source, limit) if file.suffix == _ZSTD_SUFFIX else source
            return _Archive(file, content, limit).read(wanted, check)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


def _too_large(file: Path, size: str, limit: int) -> RecordingError:
    return RecordingError(f"{file}: holds {size} bytes; allowed are {limit:,}, a limit against hostile files. "
                          f"Set {LIMIT_VARIABLE} to a larger number of bytes if it is what you want to read")


def _described(error: BaseException) -> str:
    return "MemoryError: it takes more than this machine gives" if isinstance(error, MemoryError) else (
        f"{type(error).__name__}: {error}")


def _disk_failure(error: BaseException) -> OSError | None:
    """Return the OSError that an exception is or hides, if it tells of the disk. A damaged directory makes seeks fail with
    EINVAL."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW) else None


# ---- numpy archives ----------------------------------------------------------------------------------------------------

class _SmallReads:
    """A file for zipfile that reads no directory beyond a limit, until `lifted` is set."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.lifted = False
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, n: int = -1) -> bytes:
        if self.lifted:
            return bytes(self._file.read(n))
        content = bytes(self._file.read(_DIRECTORY_BYTES + 1 if n < 0 else min(n, _DIRECTORY_BYTES + 1)))
        if len(content) > _DIRECTORY_BYTES:
            raise ValueError(f"its directory is longer than {_DIRECTORY_BYTES} bytes, which is all that is allowed")
        return content


class _Bzip2:
    """A decompressor for zipfile that gives no more than a member says; zipfile's own gives 46 MB for 40 bytes."""

    def __init__(self, size: int) -> None:
        import bz2

        self._inner = bz2.BZ2Decompressor()
        self._left = size

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def decompress(self, data: bytes) -> bytes:
        piece = self._inner.decompress(data, self._left + 1)
        if len(piece) > self._left:
            raise ValueError("it holds more bytes than it says")
        self._left -= len(piece)
        return piece


class _Member(NamedTuple):
    """An array whose header was read: the open member, the data that came with the header, and where it goes."""

    reader: Any
    header: NpyHeader
    begun: bytes
    size: int
    piece: int


class _Archive:
    """A numpy archive that is being read."""

    def __init__(self, file: Path, content: Any, limit: int) -> None:
        self._file = file
        self._limit = limit
        import zipfile  # takes as long to load as a tenth of the package

        source = _SmallReads(content)
        try:
            self._zip = zipfile.ZipFile(source)
        except Exception as error:  # damaged directories raise a dozen types
            if failure := _disk_failure(error):
                raise failure from None
            raise RecordingError(f"{file}: not a whole numpy archive ({_described(error)})") from error
        source.lifted = True

    def read(self, wanted: Collection[str] | None, check: Callable[[Headers], object] | None) -> Arrays:
        members = self._wanted_members(wanted)
        opened = {name: self._guarded(name, self._open, info) for name, info in members.items() if info is not None}
        if check is not None:
            check({name: opened[name].header if name in opened else None for name in members})
        return {name: self._guarded(name, self._body, member) for name, member in opened.items()}

    def _wanted_members(self, wanted: Collection[str] | None) -> "dict[str, zipfile.ZipInfo | None]":
        """Return members by name, None for those that are not wanted; their number and sizes are within the limits."""
        infos = self._zip.infolist()
        if len(infos) > _MEMBERS:
            raise RecordingError(f"{self._file}: has {len(infos)} arrays; allowed are {_MEMBERS}")
        members: dict[str, zipfile.ZipInfo | None] = {}
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in members:
                raise RecordingError(f"{self._file}: {name}: present twice; an array may appear once")
            members[name] = info if wanted is None or name in wanted else None
        total = sum(info.file_size for info in members.values() if info is not None)
        if total > self._limit:
            raise _too_large(self._file, f"arrays of {total:,}", self._limit)
        return members

    def _guarded(self, name: str, read: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return read(argument)
        except Exception as error:  # so do damaged members: zlib, lzma, bz2, struct, tokenize, numpy
            if failure := _disk_failure(error):
                raise failure from None
            raise RecordingError(f"{self._file}: {name}: not a whole numpy array ({_described(error)})") from error

    def _open(self, info: "zipfile.ZipInfo") -> _Member:
        """Read the header of an array and hold it against the size of the member."""
        reader: Any = self._zip.open(info)
        if info.compress_type == _BZIP2:
            reader._decompressor = _Bzip2(info.file_size)
        prefix = b""
        while len(prefix) < min(_NPY_PREFIX_BYTES, info.file_size):
            piece = reader.read(_SMALL_PIECE)
            if not piece:
                break
            prefix += piece
        head = io.BytesIO(prefix[:_NPY_PREFIX_BYTES])
        version = np.lib.format.read_magic(head)
        if version not in _NPY_HEADER_READERS:
            raise ValueError(f"npy version {version}; allowed are {sorted(_NPY_HEADER_READERS)}")
        shape, fortran_order, dtype = _NPY_HEADER_READERS[version](head)
        if dtype.hasobject:
            raise ValueError(f"dtype {dtype} means pickled objects; allowed are numbers and strings")
        size = info.file_size - head.tell()
        expected = math.prod(shape) * dtype.itemsize
        if size != expected:
            raise ValueError(f"{size} bytes of data; shape {shape} of {dtype} takes {expected}")
        return _Member(reader, NpyHeader(dtype, shape, fortran_order), prefix[head.tell():], size,
                       _PIECE.get(info.compress_type, _SMALL_PIECE))

    @staticmethod
    def _body(member: _Member) -> NDArray[Any]:
        """Read an array. Reading up to its end makes zipfile compare the CRC. Pieces of zeros take no memory."""
        content = np.zeros(member.size, np.uint8)
        piece = np.empty(min(member.piece, member.size), np.uint8)
        filled = len(member.begun)
        content[:filled] = np.frombuffer(member.begun, np.uint8)
        with member.reader as reader:
            while count := reader.readinto(memoryview(piece)[:member.size - filled]):
                if piece[:count].max():
                    content[filled:filled + count] = piece[:count]
                filled += count
        if filled < member.size:
            raise ValueError(f"it ends after {filled} of {member.size} bytes")
        header = member.header
        array = content.view(header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")
        return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"])


# ---- zstd --------------------------------------------------------------------------------------------------------------

class _Output:
    """The output of a decompressor: a zip file within a limit, or an exception."""

    def __init__(self, file: Path, limit: int) -> None:
        self.content = io.BytesIO()
        self._file, self._limit = file, limit

    def take(self, piece: bytes) -> None:
        self.content.write(piece)
        size = self.content.tell()
        if size > self._limit:
            raise _too_large(self._file, f"more than {self._limit:,}", self._limit)
        if size - len(piece) < len(_ZIP_MAGIC) <= size and not self.content.getbuffer()[:2] == _ZIP_MAGIC:
            raise RecordingError(f"{self._file}: not a whole numpy archive (what is compressed is no zip file)")


def _unzstd(file: Path, source: BinaryIO, limit: int) -> io.BytesIO:
    """Return the decompressed bytes of `source`, by the first zstd reader that this machine has."""
    for reader in (_unzstd_stdlib, _unzstd_package, _unzstd_tool):
        output = _Output(file, limit)
        source.seek(0)
        try:
            reader(source, output)
        except ImportError:
            continue
        except (OSError, RecordingError):
            raise
        except Exception as error:  # each reader has its own type for damage
            raise RecordingError(f"{file}: not a whole zstd stream ({_described(error)})") from error
        return output.content
    raise missing_extra(f"{file}: reading .zst needs Python 3.14, the zstd command line tool, or the package zstandard", "zstd")


def _unzstd_stdlib(source: BinaryIO, output: _Output) -> None:
    from compression import zstd

    _unzstd_frames(source, output, lambda: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}))


def _unzstd_package(source: BinaryIO, output: _Output) -> None:
    import zstandard

    _unzstd_frames(source, output, zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG).decompressobj)


def _unzstd_frames(source: BinaryIO, output: _Output, new_decoder: Callable[[], Any]) -> None:
    """Decompress one frame after the other, each by a decoder of its own."""
    decoder = new_decoder()
    while piece := source.read(_ZSTD_PIECE):
        while piece:
            if decoder.eof:
                decoder = new_decoder()
            output.take(decoder.decompress(piece))
            piece = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise ValueError("the stream ends inside a frame")


def _unzstd_tool(source: BinaryIO, output: _Output) -> None:
    import shutil
    import subprocess
    tool = shutil.which("zstd")
    if tool is None:
        raise ImportError("no zstd command line tool")
    command = [tool, "-dcq", f"--long={_ZSTD_WINDOW_LOG}"]
    with subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while piece := process.stdout.read(_READ_BYTES):
                output.take(piece)
        except BaseException:
            process.kill()
            raise
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise ValueError(message)
