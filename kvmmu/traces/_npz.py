"""The container of a recording: numpy archives, `.npz` or `.npz.zst`, read without trusting a byte of them.

numpy.load() is not used: it allocates what a header claims before it has seen the data, and it reports damage with
whatever exception the decoder at hand happens to raise. Here every member is read whole, its CRC checked, and only
then parsed.
"""

import io
import math
import shutil
import subprocess
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

StrPath = str | PathLike[str]
Arrays = dict[str, NDArray[Any]]

_ZSTD_SUFFIX = ".zst"
_ZSTD_WINDOW_LOG = 27       # what `zstd --long` writes
_READ_BYTES = 1 << 20
_NPY_PREFIX_BYTES = 1 << 14  # more than numpy's own limit on the header of an array
_NPY_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class RecordingError(ValueError):
    """A recording is damaged or not in the documented layout: the message says which file, array and value."""


def find_npz(path: StrPath) -> Path | None:
    """Return `path`, or `path` with `.zst` appended, whichever is a file; None if neither is."""
    path = Path(path)
    compressed = path.with_name(path.name + _ZSTD_SUFFIX)
    return next((file for file in (path, compressed) if file.is_file()), None)


def open_npz(path: StrPath) -> Arrays:
    """Read every array of a numpy archive.

    Parameters
    ----------
    path : str or path-like
        A `.npz` or `.npz.zst` file; `.zst` may be left out.

    Returns
    -------
    dict of str to ndarray
        The arrays by name: private, C-contiguous, aligned and writable.

    Raises
    ------
    FileNotFoundError
        Neither `path` nor `path`.zst is a file.
    RecordingError
        The file is truncated or corrupt, or an array holds Python objects (nothing is ever unpickled).
    ImportError
        The file is `.zst` and this machine has no reader for it.
    """
    file = find_npz(path)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, nor one with {_ZSTD_SUFFIX} appended")
    content = _unzstd(file) if file.suffix == _ZSTD_SUFFIX else file.read_bytes()
    return _read_archive(file, content)


def _read_archive(file: Path, content: bytes) -> Arrays:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:  # damaged directories raise a dozen types
        raise RecordingError(f"{file}: not a whole numpy archive ({_described(error)})") from error
    arrays = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in arrays:
            raise RecordingError(f"{file}: {name}: present twice; an array may appear once")
        try:
            arrays[name] = _parse_npy(_read_member(archive, info))
        except Exception as error:  # so do damaged members: zlib, lzma, bz2, struct, tokenize, numpy
            raise RecordingError(f"{file}: {name}: not a whole numpy array ({_described(error)})") from error
    return arrays


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[np.uint8]:
    """One member as uint8[n]. Reading up to its end makes zipfile compare the CRC."""
    content = np.empty(info.file_size, np.uint8)
    view = memoryview(content)
    filled = 0
    with archive.open(info) as member:
        while count := member.readinto(view[filled:filled + _READ_BYTES]):  # type: ignore[attr-defined]
            filled += count
    if filled < info.file_size:
        raise ValueError(f"it ends after {filled} of {info.file_size} bytes")
    return content


def _parse_npy(content: NDArray[np.uint8]) -> NDArray[Any]:
    head = io.BytesIO(content[:_NPY_PREFIX_BYTES])
    version = np.lib.format.read_magic(head)
    if version not in _NPY_HEADER_READERS:
        raise ValueError(f"npy version {version}; allowed are {sorted(_NPY_HEADER_READERS)}")
    shape, fortran_order, dtype = _NPY_HEADER_READERS[version](head)
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype} means pickled objects; allowed are numbers and strings")
    body = content[head.tell():]
    expected = math.prod(shape) * dtype.itemsize
    if body.size != expected:
        raise ValueError(f"{body.size} bytes of data; shape {shape} of {dtype} takes {expected}")
    array = body.view(dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"])


def _unzstd(file: Path) -> bytes:
    """The decompressed bytes of `file`, by the first zstd reader that this machine has."""
    for reader in (_unzstd_stdlib, _unzstd_package, _unzstd_tool):
        try:
            return reader(file)
        except ImportError:
            continue
        except OSError:
            raise
        except Exception as error:  # each reader has its own type for damage
            raise RecordingError(f"{file}: not a whole zstd stream ({_described(error)})") from error
    raise ImportError(f"{file}: reading .zst needs Python 3.14, the extra kvmmu[zstd] "
                      "(pip install 'kvmmu[zstd]') or the zstd command line tool")


def _unzstd_stdlib(file: Path) -> bytes:
    from compression import zstd

    return zstd.decompress(file.read_bytes(), options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def _unzstd_package(file: Path) -> bytes:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
    rest = file.read_bytes()
    frames: list[bytes] = []
    while rest or not frames:
        frame = decoder.decompressobj()
        frames.append(frame.decompress(rest))
        if not frame.eof:
            raise ValueError("the stream ends inside a frame")
        rest = frame.unused_data
    return b"".join(frames)


def _unzstd_tool(file: Path) -> bytes:
    tool = shutil.which("zstd")
    if tool is None:
        raise ImportError("no zstd command line tool")
    done = subprocess.run([tool, "-dcq", f"--long={_ZSTD_WINDOW_LOG}", "--", file], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    return done.stdout
