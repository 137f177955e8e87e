"""Checkpoints: the state of a replay in a file, from which another run goes on. `docs/scale.md` describes the file."""

import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.files import NewFile, no_such, writing
from kvmmu.replay.result import ReplayInterrupted, Report
from kvmmu.traces import Chunk, Recording, RecordingError, Trace
from kvmmu.traces._npz import StrPath, open_npz
from kvmmu.traces.conversion import recording_header

__all__ = ["CheckpointError", "Checkpoints", "Saved", "check_seconds", "fingerprint", "restoring"]

_VERSION = 1
_HEADER = "header"
_MOST_HEADER = 1 << 26                  # bytes
_ENDS = 1 << 16                         # bytes of a file that are looked at, at its beginning and at its end
_FINGERPRINT_ROWS = 4096
Arrays = Mapping[str, NDArray[Any]]


class CheckpointError(ValueError):
    """A file is no whole checkpoint, or one of another trace or other arguments; the message says which."""


class Saved(NamedTuple):
    """The state of a replay: plain data for JSON, and arrays."""

    plain: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


@contextmanager
def restoring() -> Iterator[None]:
    """Turn whatever does not fit into a replay, in the block, into a CheckpointError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise CheckpointError("the state of the checkpoint does not fit this replay "
                              f"({type(error).__name__}: {error})") from error


# ---- the file ----------------------------------------------------------------------------------------------------------

def write_file(path: StrPath, header: dict[str, Any], arrays: Arrays) -> None:
    """Write a checkpoint in place of the one that is there: whole, or not at all."""
    import json
    import zipfile
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with writing(path) as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in {_HEADER: text, **arrays}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        with open(part, "rb") as file:
            os.fsync(file.fileno())                     # before its name says that it is whole


def read_file(path: StrPath) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a checkpoint: its header and its arrays.

    Raises
    ------
    CheckpointError
        It is none, or damaged.
    FileNotFoundError, OSError
    """
    import json
    try:
        arrays = open_npz(path)
    except RecordingError as error:
        raise CheckpointError(str(error)) from error
    except FileNotFoundError:
        raise no_such(path, "checkpoint") from None
    text = arrays.pop(_HEADER, None)
    if text is None or text.dtype != np.uint8 or text.ndim != 1 or text.size > _MOST_HEADER:
        raise CheckpointError(f"{os.fspath(path)}: no checkpoint: it has no header")
    try:
        header = json.loads(text.tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{os.fspath(path)}: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or not all(isinstance(header.get(name), dict) for name in ("trace", "replay", "state")):
        raise CheckpointError(f"{os.fspath(path)}: no checkpoint: its header lacks trace, replay or state")
    if header.get("version") != _VERSION:
        raise CheckpointError(f"{os.fspath(path)}: a checkpoint of version {header.get('version')!r}; known is {_VERSION}")
    return header, arrays


# ---- which trace -------------------------------------------------------------------------------------------------------

def identity_of(source: Recording | Trace) -> dict[str, Any]:
    """Return what tells a trace from others: of a recording a digest; else its header, and sizes, times and ends of files.

    A name is none of it: files may be renamed.
    """
    from hashlib import sha256
    if isinstance(source, Recording):
        return {"name": source.name, "phase": source.phase, "sha256": _digest_of_recording(source)}
    path = getattr(source, "path", None)
    found: dict[str, Any] = {"header": sha256(replace(source.header, name="").to_json().encode()).hexdigest()}
    files = _files_of(source)
    return found | _files_identity(Path(path), files) if path is not None and files else found


def _digest_of_recording(recording: Recording) -> str:
    from hashlib import sha256
    digest = sha256(recording_header(recording).to_json().encode())
    for value in vars(recording).values():
        for array in value if isinstance(value, tuple) else (value,):
            if isinstance(array, np.ndarray):
                digest.update(repr((array.dtype.str, array.shape)).encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _files_of(source: Recording | Trace) -> list[Path]:
    """Return the files that a recording or a trace is read from."""
    path = getattr(source, "path", None)
    if path is None or not Path(path).exists():
        return []
    return sorted(file for file in Path(path).rglob("*") if file.is_file()) if Path(path).is_dir() else [Path(path)]


def _files_identity(path: Path, files: list[Path]) -> dict[str, Any]:
    from hashlib import sha256
    digest, size, changed = sha256(), 0, 0
    for file in files:
        with open(file, "rb") as content:
            there = os.fstat(content.fileno())
            digest.update(f"{file.relative_to(path)} {there.st_size}\n".encode())
            digest.update(content.read(_ENDS))
            content.seek(max(0, there.st_size - _ENDS))
            digest.update(content.read(_ENDS))
        size, changed = size + there.st_size, max(changed, there.st_mtime_ns)
    return {"files": len(files), "bytes": size, "changed_ns": changed, "sha256_of_ends": digest.hexdigest()}


def fingerprint(chunk: Chunk) -> list[int]:
    """Return a number of first rows of a trace, and a checksum of them: options of a reader may make others of the same file."""
    rows = min(len(chunk), _FINGERPRINT_ROWS)
    total = 0
    for column in (chunk.op, chunk.addr, chunk.access):
        total = zlib.crc32(np.ascontiguousarray(column[:rows]).view(np.uint8).data, total)
    return [rows, total]


# ---- a replay under way ------------------------------------------------------------------------------------------------

def check_seconds(name: str, value: Any) -> float:
    """Return a number of seconds, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}: want a number of seconds, 0 or more, got {value!r}")
    return float(value)


class Checkpoints:
    """The checkpoints of one replay; without a path it makes none.

    In the block of a `with` statement, SIGINT and SIGTERM stop the replay by a KeyboardInterrupt where its state is whole: at
    once outside of `busy()`, else at its end. A second signal stops it there and then. What was installed for a signal is called
    first; a signal that is ignored stays so. All of that is so in the main thread, and if there is a path. Without one it is
    so of SIGINT alone, if `waits` is set.

    Parameters
    ----------
    source : Recording or Trace
    settings : dict
        Arguments of the replay that its result depends on, as plain data.
    path : str or path-like, optional
        Where the state goes.
    every : float
        Seconds between two checkpoints, 0 or more.
    resume : str or path-like, optional
        A checkpoint to go on from.
    waits : bool

    Attributes
    ----------
    saved : Saved or None
        The state of that checkpoint.

    Raises
    ------
    CheckpointError
        `resume` is no whole checkpoint, or one of another trace or of other arguments.
    OSError
        `path` cannot be written, or `resume` cannot be read.
    """

    def __init__(self, source: Recording | Trace, settings: dict[str, Any], path: StrPath | None = None, every: float = 60.0,
                 resume: StrPath | None = None, waits: bool = False) -> None:
        self._path, self._every, self._waits = path, every, waits or path is not None
        self.saved: Saved | None = None
        self._resting, self._pending, self._number = True, False, 0
        self._handlers: dict[int, Any] = {}
        self._due = time.perf_counter() + every
        self._header: dict[str, Any] = {}
        if path is None and resume is None:
            return
        self._header = {"version": _VERSION, "trace": identity_of(source), "replay": settings}
        if resume is not None:
            header, arrays = read_file(resume)
            self._check(header, os.fspath(resume))
            self.saved = Saved(header["state"], arrays)
        if path is not None:
            NewFile(path, _files_of(source)).discard()  # so that what cannot be written is told now

    def _check(self, header: dict[str, Any], path: str) -> None:
        """Refuse a checkpoint of another trace or of other arguments."""
        if header["trace"] != self._header["trace"]:
            other = [name for name in {**header["trace"], **self._header["trace"]}
                     if header["trace"].get(name) != self._header["trace"].get(name)]
            raise CheckpointError(f"{path}: a checkpoint of another trace, or of this one before it was changed "
                                  f"({', '.join(other)} of the trace differ)")
        for name in {**header["replay"], **self._header["replay"]}:
            was, now = header["replay"].get(name), self._header["replay"].get(name)
            if was != now:
                place, was, now = _first_difference(name, was, now)
                raise CheckpointError(f"{path}: {place}: the checkpoint was made with {_shortened(was)}, asked for is "
                                      f"{_shortened(now)}; want the same arguments")

    # ---- signals -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if not self._waits:
            return self
        import signal
        try:
            names = ("SIGINT",) if self._path is None else ("SIGINT", "SIGTERM")
            for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
                before = signal.getsignal(number)
                if before is not None and before is not signal.SIG_IGN:
                    signal.signal(number, self._signalled)
                    self._handlers[number] = before
        except ValueError:
            pass                                        # not in the main thread
        return self

    def __exit__(self, *error: object) -> None:
        import signal
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if not self._resting and not self._pending:
            self._pending = True
            self._number = number
            return
        self._stop(number, frame)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        before = self._handlers.get(number)
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    # ---- between pieces of work ----------------------------------------------------------------------------------------

    def busy(self) -> "_Busy":
        """Return a block within which the state of the replay is not whole."""
        return _Busy(self)

    @property
    def writes(self) -> bool:
        """True if checkpoints are written."""
        return self._path is not None

    def tick(self, state: Callable[[], Saved | None]) -> None:
        """Write a checkpoint if it is time to."""
        if self._path is not None and time.perf_counter() >= self._due:
            with self.busy():
                self._write(state)

    def interruption(self, state: Callable[[], Saved | None], report: Report, done: str = "") -> ReplayInterrupted:
        """Return the exception that ends a replay behind an interrupt; writes a checkpoint if the state is whole.

        IN done: what the message says was done, if that are no accesses.
        """
        if self._path is None:
            return ReplayInterrupted(report, done=done)
        if self._resting:
            self._resting, self._pending = False, False
            try:
                self._write(state)
            except OSError as error:
                return ReplayInterrupted(report, None, f"; no checkpoint could be written: {error}", done)
        if not os.path.exists(self._path):
            return ReplayInterrupted(report, done=done)
        return ReplayInterrupted(report, self._path, f"; {os.fspath(self._path)} is a checkpoint to resume from", done)

    def _write(self, state: Callable[[], Saved | None]) -> None:
        assert self._path is not None
        saved = state()
        if saved is not None:
            write_file(self._path, self._header | {"state": saved.plain}, saved.arrays)
            self._due = time.perf_counter() + self._every


class _Busy:
    def __init__(self, owner: Checkpoints) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        self._owner._resting = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        owner = self._owner
        if error is not None:
            return                                      # the state is not whole
        owner._resting = True
        if owner._pending:
            owner._pending = False
            owner._stop(owner._number, None)


def _first_difference(place: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the first place within plain data where two values differ, and what both have there."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                return _first_difference(f"{place}.{name}", was.get(name), now.get(name))
    if isinstance(was, list) and isinstance(now, list):
        for number, (old, new) in enumerate(zip_longest(was, now)):
            if old != new:
                return _first_difference(f"{place}[{number}]", old, new)
    return place, was, now


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
