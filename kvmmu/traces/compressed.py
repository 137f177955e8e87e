"""Files as streams of bytes, decompressed as they are read: gzip, xz, bzip2 and zstd, told by their first bytes.

No more than a block is held, whatever a file claims to contain. Damage ends a stream behind the bytes that came before it.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from kvmmu.arch.extras import missing_extra
from kvmmu.traces._files import open_regular
from kvmmu.traces.header import TraceError

__all__ = ["BLOCK_BYTES", "ByteStream", "compression_of", "open_bytes"]

BLOCK_BYTES = 4 << 20               # of a block, decompressed; the fastest of 1, 2, 4, 8 MiB for .gz, by little
HEAD_BYTES = 1 << 16                # what formats are told by
_INPUT_BYTES = 1 << 18              # compressed bytes that are read at a time
_XZ_MEMORY = 1 << 29                # a dictionary of `xz -9` takes 65 MiB; a file can ask for 1.5 GiB and more
_ZSTD_WINDOW = 1 << 27              # what `zstd --long` writes
_WHOLE = 1 << 62
_SHORT_STEPS = (4096, 1)            # bytes that a decoder is asked for where it failed with longer ones
_DECODERS = ("gzip", "xz", "bzip2", "zstd")
_MAGIC = (("gzip", b"\x1f\x8b"), ("xz", b"\xfd7zXZ\x00"), ("bzip2", b"BZh"), ("zstd", b"\x28\xb5\x2f\xfd"))
_UNREADABLE = ((b"\x04\x22\x4d\x18", "lz4", "lz4 -d"), (b"\xff\x06\x00\x00sNaPpY", "framed snappy", "snzip -d"),
               (b"\x5d\x00\x00", "LZMA without container", "xz -d --format=lzma"))


def compression_of(head: bytes) -> str:
    """Return the compression that a file's first bytes tell: "gzip", "xz", "bzip2", "zstd" or "none"."""
    for name, magic in _MAGIC:
        if head.startswith(magic):
            return name
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:      # a skippable frame
        return "zstd"
    return "none"


class _Source(Protocol):
    """A source of decompressed bytes: fills a buffer from its start, 0 at the end. Raises anything where damaged."""

    def fill(self, buffer: memoryview) -> int: ...


class _Plain:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def fill(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)      # type: ignore[attr-defined, no-any-return]


class _Members:
    """Concatenated streams of gzip, xz or bzip2, by decoders that take a limit on what they return."""

    def __init__(self, file: BinaryIO, decoder: Callable[[], Any], magic: bytes, rest_of: Callable[[Any], bytes]) -> None:
        self._file, self._new, self._magic, self._rest_of = file, decoder, magic, rest_of
        self._decoder: Any = None
        self._input = b""
        self._first = True

    def fill(self, buffer: memoryview) -> int:
        while True:
            if self._decoder is None and not self._begin():
                return 0
            data = self._decoder.decompress(self._input, len(buffer))
            self._input = self._rest_of(self._decoder)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data, None
            elif not data and not self._input:
                self._input = self._file.read(_INPUT_BYTES)
                if not self._input:
                    raise EOFError("it ends inside the compressed data")
            if data:
                buffer[:len(data)] = data
                return len(data)

    def _begin(self) -> bool:
        """Start the next stream; False if there is none."""
        while True:
            if not self._first:
                self._input = self._input.lstrip(b"\0")         # padding
            if len(self._input) >= len(self._magic):
                break
            more = self._file.read(_INPUT_BYTES)
            if not more:
                if self._input:
                    raise ValueError(f"{len(self._input)} bytes behind the compressed data are not its format")
                return False
            self._input += more
        if not self._input.startswith(self._magic):
            raise ValueError("what follows the compressed data is not its format")
        self._decoder, self._first = self._new(), False
        return True


class _Zstd:
    """zstd frames, by the package zstandard."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._frames = _ZstdFrames(file)
        decoder: Any = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._reader = decoder.stream_reader(self._frames, read_across_frames=True, read_size=_INPUT_BYTES)

    def fill(self, buffer: memoryview) -> int:
        count: int = self._reader.readinto(buffer)
        if not count:
            self._frames.check_end()
        return count


class _ZstdFrames:
    """A file of zstd frames that notes where frames end: zstandard's reader takes a cut file for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = 0              # bytes that are not looked at
        self._part = b""            # of a header that is not whole yet
        self._state = "magic"
        self._checksum = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._look_at(data)
        return data

    def check_end(self) -> None:
        if self._state != "magic" or self._part or self._left:
            raise EOFError("it ends inside a frame")

    def _look_at(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
                position += step
                continue
            want = {"magic": 4, "skippable": 4, "descriptor": 1, "block": 3}[self._state] - len(self._part)
            self._part += data[position:position + want]
            position += min(want, len(data) - position)
            if len(self._part) == {"magic": 4, "skippable": 4, "descriptor": 1, "block": 3}[self._state]:
                part, self._part = self._part, b""
                getattr(self, "_" + self._state)(part)

    def _magic(self, part: bytes) -> None:
        self._state = "skippable" if part[1:] == b"\x2a\x4d\x18" else "descriptor"

    def _skippable(self, part: bytes) -> None:
        self._left, self._state = int.from_bytes(part, "little"), "magic"

    def _descriptor(self, part: bytes) -> None:
        """Read the rest of the frame's header: window, dictionary, size of the content."""
        descriptor = part[0]
        single = descriptor >> 5 & 1
        size = (single, 2, 4, 8)[descriptor >> 6]
        self._left = (1 - single) + (0, 1, 2, 4)[descriptor & 3] + size
        self._checksum = 4 * (descriptor >> 2 & 1)
        self._state = "block"

    def _block(self, part: bytes) -> None:
        header = int.from_bytes(part, "little")
        self._left = 1 if header >> 1 & 3 == 1 else header >> 3         # a block of one repeated byte has one
        if header & 1:
            self._left += self._checksum
            self._state = "magic"


def _source_of(path: Path, file: BinaryIO, compression: str) -> _Source:
    if compression == "gzip":
        return _Members(file, lambda: zlib.decompressobj(31), b"\x1f\x8b", lambda decoder: decoder.unconsumed_tail)
    if compression == "xz":
        return _Members(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), b"\xfd7zXZ\x00", lambda _: b"")
    if compression == "bzip2":
        return _Members(file, bz2.BZ2Decompressor, b"BZh", lambda _: b"")
    if compression == "zstd":
        try:
            return _Zstd(file)
        except ImportError:
            raise missing_extra(f"{path}: reading .zst needs the package zstandard", "zstd") from None
    return _Plain(file)


class ByteStream:
    """The bytes of a file, decompressed.

    Parameters
    ----------
    path : Path
        For messages.
    file : binary file
        Closed by close().
    compression : str, optional
        As of compression_of(); by default told by the first bytes.

    Attributes
    ----------
    compression : str
    offset : int
        Decompressed bytes that were read.
    """

    def __init__(self, path: Path, file: BinaryIO, compression: str | None = None) -> None:
        self.path, self._file = path, file
        self.offset = 0
        self._ahead: bytes = b""
        self._damage: TraceError | None = None
        self._produced = 0                      # bytes that came from the source
        self._steps = [_WHOLE, *_SHORT_STEPS]   # how many bytes it is asked for, at most; the first one now
        if compression is None:
            head = file.read(16)
            file.seek(0)
            compression = compression_of(head)
            for magic, name, tool in _UNREADABLE:
                if head.startswith(magic):
                    raise TraceError(f"{path}: is compressed by {name}, which is not read here; decompress it first ({tool})")
        self.compression = compression
        self._source = _source_of(path, file, compression)

    def peek(self, size: int = HEAD_BYTES) -> bytes:
        """Return the bytes that read() gives next, fewer than `size` only at the end or before damage."""
        if len(self._ahead) < size:
            self._ahead += self._fill(size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int) -> bytes | bytearray:
        """Return the next bytes, fewer than `size` only at the end or before damage.

        Raises
        ------
        TraceError
            The file is damaged here. The bytes before were returned.
        """
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            if len(data) < size:
                data += self._fill(size - len(data))
        else:
            data = self._fill(size)         # type: ignore[assignment]
        if not data and self._damage is not None:
            raise self._damage
        self.offset += len(data)
        return data

    def _fill(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        filled = 0
        while filled < size and self._damage is None:
            try:
                count = self._source.fill(view[filled:filled + self._steps[0]])
            except Exception as error:      # each decoder has its own types for damage
                if isinstance(error, EOFError) or not self._begin_again():
                    self._note(error, filled)
                    break
                continue
            if not count:
                break
            filled += count
            self._produced += count
        view.release()
        del buffer[filled:]
        return buffer

    def _begin_again(self) -> bool:
        """Decompress the file again up to here, to go on in shorter steps: a decoder that fails drops what it made in the call.

        False if that is done already, or no use.
        """
        if self.compression not in _DECODERS or len(self._steps) == 1:
            return False
        del self._steps[0]
        self._file.seek(0)
        self._source = _source_of(self.path, self._file, self.compression)
        scratch = memoryview(bytearray(min(self._produced, BLOCK_BYTES)))
        left = self._produced
        while left:
            left -= self._source.fill(scratch[:left])
        return True

    def _note(self, error: Exception, filled: int) -> None:
        place = self.offset + len(self._ahead) + filled
        kind = "" if self.compression == "none" else f" of its decompressed {self.compression} data"
        self._damage = TraceError(f"{self.path}: is damaged behind byte {place}{kind} ({type(error).__name__}: {error})")

    def blocks(self, size: int = BLOCK_BYTES) -> Generator[bytes | bytearray]:
        """Yield the rest, `size` bytes at a time. Compressed files are decompressed ahead by another thread.

        Raises
        ------
        TraceError
            The file is damaged. The bytes before were yielded.
        """
        first = self.read(size)
        if self.compression == "none" or len(first) < size:
            while first:
                yield first
                first = self.read(size)
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1, "kvmmu-decompress") as pool:
            block = first
            while block:
                following = pool.submit(self.read, size)
                yield block
                block = following.result()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def open_bytes(path: Path) -> ByteStream:
    """Open a regular file. Raises OSError as open() does, and TraceError for a directory, a FIFO or a device."""
    file = open_regular(path, TraceError)
    try:
        return ByteStream(path, file)
    except BaseException:
        file.close()
        raise
