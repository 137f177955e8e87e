"""Any trace file, opened by what is in it: the formats of kvmmu, of other tools, and those that other packages add."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np

from kvmmu.arch._bits import INVALID_GPA, Op
from kvmmu.arch.arguments import check_path
from kvmmu.traces._files import no_such_trace
from kvmmu.traces._npz import StrPath
from kvmmu.traces._sink import PageSet
from kvmmu.traces.compressed import HEAD_BYTES, compression_of, open_bytes
from kvmmu.traces.foreign import ForeignTrace, Format
from kvmmu.traces.header import TraceError
from kvmmu.traces.parquet import NoTraceError, ParquetTrace, is_parquet
from kvmmu.traces.stream import Trace

__all__ = ["GROUP", "Count", "UnknownFormatError", "describe_trace", "find_format", "formats", "open_trace"]

GROUP = "kvmmu.traces"              # of entry points
# The formats that come with kvmmu: module and name of the object in it.
_OWN = (("lackey", "FORMAT"), ("champsim", "FORMAT"), ("drmemtrace", "FORMAT"), ("pinatrace", "FORMAT"),
        ("qemu_plugin", "FORMAT"), ("qemu_execlog", "FORMAT"), ("perf_script", "FORMAT"), ("ftrace", "FORMAT"),
        ("tables", "FORMAT"), ("csv", "FORMAT"), ("numpy_arrays", "FORMAT"), ("numpy_arrays", "RAW"))
_SHOWN = 48                         # bytes of an unknown file in the message
_LEAST_SCORE = 1


class UnknownFormatError(TraceError):
    """A file is in no trace format that is known.

    Attributes
    ----------
    path : Path
    head : bytes
        Its first bytes, decompressed.
    """

    def __init__(self, path: Path, head: bytes, message: str) -> None:
        super().__init__(message)
        self.path, self.head = path, head


class _KvmmuParquet:
    """kvmmu's own trace format."""

    name = "kvmmu"

    def sniff(self, head: bytes, path: Path) -> int:
        if not head.startswith(b"PAR1") and not (path.suffix == ".parquet" and path.is_file() and not _is_text(head)):
            return 0
        try:
            ParquetTrace(path)
        except NoTraceError:
            return 20
        except (TraceError, ImportError):
            pass                        # open() says what is wrong
        return 100

    def open(self, path: Path, **options: Any) -> Trace:
        return ParquetTrace(path, **options)


def _is_text(head: bytes) -> bool:
    return bool(head) and all(byte >= 32 or byte in b"\t\r\n" for byte in head[:_SHOWN])


def formats() -> dict[str, Format]:
    """Return the formats that can be read, by name: those of kvmmu and those of entry points `kvmmu.traces`."""
    return dict(_all_formats())


@cache
def _all_formats() -> dict[str, Format]:
    found: dict[str, Format] = {"kvmmu": _KvmmuParquet()}
    for module, attribute in _OWN:
        own = getattr(import_module(f"kvmmu.traces.{module}"), attribute)
        found[own.name] = own
    from importlib.metadata import entry_points  # takes 10 ms

    for point in entry_points(group=GROUP):
        try:
            if point.name in found:
                raise TypeError(f"there is a format {point.name!r} already")
            found[point.name] = _of_entry_point(point)
        except Exception as error:      # of another package, and no reason to read nothing
            warn(f"the trace format {point.name!r} ({point.value}) cannot be used: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _of_entry_point(point: Any) -> Format:
    """Return the format that an entry point names: an object with name, sniff and open, or a class or function that makes one."""
    loaded = point.load()
    made = loaded if hasattr(loaded, "sniff") and hasattr(loaded, "open") and not isinstance(loaded, type) else loaded()
    for part in ("sniff", "open"):
        if not callable(getattr(made, part, None)):
            raise TypeError(f"entry point {point.name!r} of {GROUP} ({point.value}) has no {part}(); wanted are name, "
                            "sniff(head, path) and open(path, **options)")
    return made     # type: ignore[no-any-return]


def find_format(path: StrPath, format: str | None = None) -> Format:
    """Tell the format of a file by its first bytes.

    Parameters
    ----------
    path : str or path-like
    format : str, optional
        Name of the format; the file is not looked at then.

    Raises
    ------
    TraceError
        No format fits; the message lists those that can be read and shows the first bytes.
    ValueError
        There is no format of that name.
    FileNotFoundError
    """
    known = formats()
    check_path("path", path, "a trace")
    if format is not None:
        if format not in known:
            raise ValueError(f"format: is {format!r}; allowed is {', '.join(sorted(known))}")
        return known[format]
    path = Path(path)
    if not path.exists():
        raise no_such_trace(path, "trace")
    head = _head_of(path)
    scores = {name: candidate.sniff(head, path) for name, candidate in known.items()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] < _LEAST_SCORE:
        raise UnknownFormatError(path, head, _unknown(path, head, sorted(known)))
    return known[best]


def _head_of(path: Path) -> bytes:
    if path.is_dir():
        return b""
    with open_bytes(path) as stream:
        head = stream.peek(HEAD_BYTES)
        if not head:
            stream.read(1)          # raises if that is for damage
        return head


def _unknown(path: Path, head: bytes, names: list[str]) -> str:
    if path.is_dir():
        begins = f"it is a directory of {', '.join(sorted(entry.name for entry in path.iterdir())[:5]) or 'nothing'}"
    elif not head:
        begins = "it is empty"
    else:
        shown = head[:_SHOWN]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
        with path.open("rb") as file:
            compression = compression_of(file.read(16))
        inside = "" if compression == "none" else f" (decompressed {compression})"
        begins = f"it begins with{inside} {shown.hex(' ')} |{text}|"
    return (f"{path}: is in no format that is known; {begins}. Formats that can be read: {', '.join(names)}, and recordings "
            "(a directory with static_trace.npz or dyn_trace.npz). If it is one of them, name it: format=NAME, --format NAME")


def open_trace(path: StrPath, format: str | None = None, **options: Any) -> Trace:
    """Open a trace of any format that is known.

    Parameters
    ----------
    path : str or path-like
        A file, compressed by gzip, xz, bzip2 or zstd or not, or the folder of a drmemtrace.
    format : str, optional
        Its format; told by its first bytes otherwise.
    **options
        Of the format: see docs/formats.md.

    Returns
    -------
    Trace
        Its chunks are read from the file as they are asked for, in constant memory.

    Raises
    ------
    TraceError
        The format is not known, or the file is damaged at its beginning. Damage behind it ends the chunks with a TraceError.
    ValueError, TypeError
        An option that the format does not have, or not with this value.
    FileNotFoundError
    ImportError
        An optional package is needed; the message names the extra.
    """
    found = find_format(path, format)
    path = Path(path)
    if not path.exists():
        raise no_such_trace(path, "trace")
    return found.open(path, **options)


# ---- describing --------------------------------------------------------------------------------------------------------

def describe_trace(path: StrPath, format: str | None = None, **options: Any) -> dict[str, Any]:
    """Read a trace once and say what is in it.

    Parameters
    ----------
    path, format, **options
        As for open_trace().

    Returns
    -------
    dict
        `path`, `format`, `compression` ("none", "gzip", "xz", "bzip2", "zstd"), `bytes` of the file, `accesses`, `kinds`
        {"load", "store", "fetch"}, `events` (other rows, but for those of the memory at the start), `pages_touched` (distinct,
        of 4096 bytes), `vcpus` that have rows, `lowest` and `highest` address, `brings` {"gpa", "ip", "size", "tables"}: what the
        rows tell, `skipped`: what the reader passed over, by kind, and `damage`: None, or the message of the damage that ended
        the reading.
    """
    found = find_format(path, format)
    path = Path(path)
    if found.name == _KvmmuParquet.name:
        options = {"lean": False} | options         # sizes count
    trace = found.open(path, **options)
    count = Count()
    damage = None
    try:
        for columns in _columns_of(trace):
            count.add(columns)
    except TraceError as error:
        damage = str(error)
    return {
        "path": str(path), "format": found.name, "compression": _compression(path),
        "bytes": sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()),
        **count.result(), "skipped": dict(trace.notes.skipped) if isinstance(trace, ForeignTrace) else {}, "damage": damage}


def _compression(path: Path) -> str:
    if path.is_dir() or is_parquet(path):
        return "none"
    with path.open("rb") as file:
        return compression_of(file.read(16))


def _columns_of(trace: Trace) -> Iterator[dict[str, Any]]:
    if isinstance(trace, ForeignTrace):
        yield from trace.columns()
        return
    for chunk in trace.chunks():
        columns: dict[str, Any] = {"op": chunk.op, "addr": chunk.addr, "size": chunk.size, "vcpu": chunk.vcpu}
        if chunk.all_known or (chunk.gpa != np.uint64(INVALID_GPA)).any():
            columns["gpa"] = chunk.gpa
        if chunk.ip is not None and chunk.ip.any():
            columns["ip"] = chunk.ip
        yield {name: column for name, column in columns.items() if column is not None}


class Count:
    """Sums over the rows of a trace."""

    def __init__(self) -> None:
        self.pages = PageSet()
        self.kinds = np.zeros(256, np.int64)
        self.vcpus: set[int] = set()
        self.brought: set[str] = set()
        self.lowest, self.highest = None, None      # type: int | None, int | None

    def add(self, columns: dict[str, Any]) -> None:
        op, addr = columns["op"], columns["addr"]
        self.kinds += np.bincount(op, minlength=256)
        self.pages.add(op, addr, columns.get("size"))
        accesses = addr if int(op.max(initial=0)) < Op.MOV_CR3 else addr[op < Op.MOV_CR3]
        if accesses.size:
            low, high = int(accesses.min()), int(accesses.max())
            self.lowest = low if self.lowest is None else min(low, self.lowest)
            self.highest = high if self.highest is None else max(high, self.highest)
        self.brought.update(columns.keys() & {"gpa", "ip", "size"})
        if columns.get("vcpu") is None:
            self.vcpus.add(0)
        else:
            self.vcpus.update(np.flatnonzero(np.bincount(columns["vcpu"])).tolist())

    def result(self) -> dict[str, Any]:
        kinds = {"load": (Op.LOAD, Op.LOAD_MMIO), "store": (Op.STORE, Op.STORE_MMIO), "fetch": (Op.FETCH, Op.FETCH_MMIO)}
        return {
            "accesses": int(self.kinds[:Op.MOV_CR3].sum()),
            "kinds": {name: int(self.kinds[list(ops)].sum()) for name, ops in kinds.items()},
            "events": int(self.kinds[Op.MOV_CR3:Op.MEMORY].sum()), "pages_touched": len(self.pages), "vcpus": len(self.vcpus),
            "lowest": self.lowest, "highest": self.highest,
            "brings": {name: name in self.brought for name in ("gpa", "ip", "size")}
            | {"tables": bool(self.kinds[Op.MEMORY_WORD] or self.kinds[Op.MEMORY])}}
