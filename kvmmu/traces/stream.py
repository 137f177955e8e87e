"""The trace format: what its rows mean, checked. `docs/trace-format.md` defines it.

A trace is a header and a stream of chunks, each a set of columns with one row per access or event. Files are one source of
them (`parquet`), a program that makes them is another.
"""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, INVALID_GPA, PAGE_SIZE, Access, Op
from kvmmu.arch.arguments import check_word
from kvmmu.traces._places import PlacedRows
from kvmmu.traces._rows import scan
from kvmmu.traces.header import Header, TraceError

__all__ = ["Chunk", "Trace"]

COLUMNS = {"op": "uint8", "addr": "uint64", "access": "uint8", "size": "uint8", "vcpu": "uint16", "value": "uint64",
           "gpa": "uint64", "ip": "uint64"}
NULLABLE = ("value", "gpa", "ip")
NEEDED = ("op", "addr", "access")
PLACED = ("op", "addr", "access", "gpa")            # what places make

_U8 = np.uint8
_KIND = _U8(3)
_NOT_AN_ACCESS_BIT = _U8(0xFF & ~int(Access.WRITE | Access.USER | Access.AC | Access.FETCH | Access.IMPLICIT))
_FIRST_EVENT = int(Op.MOV_CR3)
_PAGE_MASK = PAGE_SIZE - 1
_VALUED = np.zeros(256, bool)           # events whose value counts
_VALUED[[Op.MOV_CR3, Op.MOV_CR0, Op.MOV_CR4, Op.WRMSR_EFER, Op.WRPKRU, Op.WRMSR_PKRS, Op.SET_CPL_AC, Op.INVPCID,
         Op.GUEST_WRITE, Op.VMENTER, Op.VMEXIT, Op.HOST_INVALIDATE, Op.PAGE_FAULT, Op.NPT_FAULT, Op.SET_REGS, Op.MEMORY,
         Op.MEMORY_WORD]] = True
_KNOWN = np.zeros(256, bool)
_KNOWN[[int(op) for op in Op]] = True


# ---- rows --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows of a trace, checked. Make one with `Chunk.checked()`.

    Attributes
    ----------
    op, access : ndarray of uint8, shape (n,)
    addr, gpa : ndarray of uint64, shape (n,)
        gpa is INVALID_GPA where none was recorded; in events it means nothing.
    size : ndarray of uint8, vcpu : ndarray of uint16, value : ndarray of uint64; or None
        None where it was not read because nothing depends on it.
    ip : ndarray of uint64, or None
        Linear address of the instruction that made the access; 0 where it is not known, None if none was read.
    has_events, all_known : bool
        There are events; every access has a gpa.
    vcpus : int
        One more than the highest vCPU.
    """

    op: NDArray[np.uint8]
    addr: NDArray[np.uint64]
    access: NDArray[np.uint8]
    gpa: NDArray[np.uint64]
    size: NDArray[np.uint8] | None
    vcpu: NDArray[np.uint16] | None
    value: NDArray[np.uint64] | None
    has_events: bool
    all_known: bool
    vcpus: int
    ip: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return self.op.size

    def __repr__(self) -> str:
        return f"<Chunk: {len(self)} rows{', with events' if self.has_events else ''}>"

    @classmethod
    def checked(cls, columns: Mapping[str, Any], header: Header, first: int = 0) -> Self:
        """Check columns and make a chunk of them.

        Parameters
        ----------
        columns : mapping of str to ndarray
            One-dimensional, of the format's dtypes and one length: `op`, `addr`, `access`; `gpa` with INVALID_GPA for null, `ip`
            with 0 for null, and `value` as masked arrays or plain; those left out are null or 0, `size` 1.
        header : Header
        first : int
            Number of the first row, for messages.

        Raises
        ------
        TraceError
            The message names row, column and value.
        """
        return cls._checked(columns, header, check_word("first", first, 63))

    @classmethod
    def _checked(cls, columns: Mapping[str, Any], header: Header, first: int, clean: bool = False) -> Self:
        """As `checked()`. IN clean: it is known that `scan()` finds nothing in the rows."""
        chunk = cls(**_RowCheck(columns, header, first).run(clean))
        object.__setattr__(chunk, "_checked_with", header)
        return chunk

    def is_checked(self, header: Header) -> bool:
        """True if `checked()` made this very chunk for a trace with this header. A replace() is to be checked again."""
        return getattr(self, "_checked_with", None) is header


class PlacedChunk(Chunk):
    """Rows that are places, checked; accesses have recorded addresses. Their columns are made when somebody asks for them."""

    places: PlacedRows

    @classmethod
    def of(cls, places: PlacedRows, columns: Mapping[str, Any], header: Header,
           rows: NDArray[np.uint32], op: NDArray[np.uint8], addr: NDArray[np.uint64]) -> Self | None:
        """Return a chunk; None if its rows are to be judged one by one, or have columns that it does not keep.

        Parameters
        ----------
        places : PlacedRows
            Legal.
        columns : mapping of str to ndarray
            The others: size, vcpu, value.
        rows, op, addr : ndarray
            The events.
        """
        size, vcpu, value = (columns.get(name) for name in ("size", "vcpu", "value"))
        vcpus = 1 if vcpu is None else int(vcpu.max(initial=0)) + 1
        if columns.keys() - {"size", "vcpu", "value"} or vcpus > header.vcpus or size is not None and not size.all():
            return None
        if rows.size:
            if value is None or isinstance(value, np.ma.MaskedArray):
                return None
            size = np.ones(len(places), np.uint8) if size is None else size
            try:
                Chunk.checked({"op": op, "addr": addr, "access": np.zeros(rows.size, np.uint8), "size": size[rows],
                               "value": value[rows]}, header)
            except TraceError:                          # which is to tell the number of the row
                return None
        chunk = cls.__new__(cls)
        told = {"places": places, "size": size, "vcpu": vcpu, "value": value, "has_events": rows.size > 0, "all_known": True,
                "vcpus": vcpus}
        for name, found in told.items():
            object.__setattr__(chunk, name, found)
        return chunk

    def __len__(self) -> int:
        return len(self.places)

    def __getattr__(self, name: str) -> Any:
        if name not in PLACED:
            raise AttributeError(f"a PlacedChunk has no {name!r}")
        columns = {made: np.empty(len(self), COLUMNS[made]) for made in PLACED}
        self.places.put(**columns)
        for made, column in columns.items():
            object.__setattr__(self, made, column)
        return columns[name]


class _RowCheck:
    """Columns held to the format."""

    def __init__(self, columns: Mapping[str, Any], header: Header, first: int) -> None:
        self.header, self.first = header, first
        self.columns: dict[str, Any] = {}
        length = None
        for name in columns:
            if name not in COLUMNS:
                raise TraceError(f"column {name!r} is unknown; allowed are {', '.join(COLUMNS)}")
        for name in NEEDED:
            if name not in columns:
                raise TraceError(f"column {name!r} is missing; there are {', '.join(columns) or 'none'}")
        for name, column in columns.items():
            if column is None:
                if name in NEEDED:
                    raise TraceError(f"column {name!r} is None; allowed is a one-dimensional array of {COLUMNS[name]}")
                continue
            if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype != np.dtype(COLUMNS[name]):
                what = f"{column.dtype} of shape {column.shape}" if isinstance(column, np.ndarray) else type(column).__name__
                raise TraceError(f"column {name!r} is {what}; allowed is a one-dimensional array of {COLUMNS[name]}")
            length = column.size if length is None else length
            if column.size != length:
                raise TraceError(f"column {name!r} has {column.size} rows, others have {length}")
            self.columns[name] = column
        self.null_value: NDArray[np.bool_] | None = None
        for name, column in list(self.columns.items()):
            if isinstance(column, np.ma.MaskedArray):
                mask = np.ma.getmaskarray(column)
                if name == "gpa":
                    mask = mask & (np.asarray(self.columns["op"]) < _FIRST_EVENT)
                    column = np.asarray(column)             # in events it means nothing
                    if mask.any():
                        column = np.where(mask, np.uint64(INVALID_GPA), column)
                elif name == "value":
                    self.null_value = mask
                elif name == "ip":
                    column = np.where(mask, np.uint64(0), np.asarray(column))
                elif mask.any():
                    raise TraceError(f"row {first + int(np.argmax(mask))}: {name} is null; "
                                     f"allowed are nulls in {', '.join(NULLABLE)}")
                column = np.asarray(column)
            self.columns[name] = np.ascontiguousarray(column)
        self.length = length or 0

    def refuse(self, name: str, bad: NDArray[np.bool_], allowed: str, rows: NDArray[np.int64] | None = None) -> None:
        """Raise for the first row where `bad` is true. IN rows: the rows that `bad` is about, if not all."""
        if bad.any():
            row = int(np.argmax(bad))
            row = int(rows[row]) if rows is not None else row
            value = int(self.columns[name][row])
            raise TraceError(f"row {self.first + row}: {name} is {value} ({value:#x}); allowed is {allowed}")

    def run(self, clean: bool = False) -> dict[str, Any]:
        op, access, gpa = self.columns["op"], self.columns["access"], self.columns.get("gpa")
        size, vcpu, value = (self.columns.get(name) for name in ("size", "vcpu", "value"))
        vcpus = 1
        if vcpu is not None and vcpu.size:
            vcpus = int(vcpu.max()) + 1
            if vcpus > self.header.vcpus:
                self.refuse("vcpu", vcpu >= self.header.vcpus, f"below {self.header.vcpus}, the vCPUs of the header")
        has_events, broken, unknown, beyond = (False,) * 4 if clean else scan(op, access, gpa)
        if broken:
            self._judge_rows(op, access)
        if gpa is not None and beyond:
            self.refuse("gpa", (op < _FIRST_EVENT) & (gpa >= np.uint64(GPA_LIMIT)) & (gpa != np.uint64(INVALID_GPA)),
                        "below 2**52, or null")
        if size is not None:
            self.refuse("size", (size == 0) & (op < _FIRST_EVENT), "at least one byte")
        if gpa is None:
            gpa = np.full(self.length, INVALID_GPA, np.uint64)
        if has_events:
            size = np.ones(self.length, np.uint8) if size is None else size
            if value is None:
                value, self.null_value = np.zeros(self.length, np.uint64), np.ones(self.length, bool)
            self.columns |= {"size": size, "value": value}
            self._check_events(np.flatnonzero(op >= _FIRST_EVENT))
        return {"op": op, "addr": self.columns["addr"], "access": access, "gpa": gpa, "size": size, "vcpu": vcpu, "value": value,
                "has_events": has_events, "all_known": not unknown, "vcpus": vcpus, "ip": self.columns.get("ip")}

    def _judge_rows(self, op: NDArray[np.uint8], access: NDArray[np.uint8]) -> None:
        self.refuse("op", ~_KNOWN[op], "an access (0, 1, 2, with MMIO 4, 5, 6) or an event (16 to 33)")
        accesses = op < _FIRST_EVENT
        self.refuse("access", accesses & ((access & _NOT_AN_ACCESS_BIT) != 0),
                    "a sum of WRITE 2, USER 4, AC 8, FETCH 16, IMPLICIT 32")
        asked = ((access >> _U8(1)) & _U8(1)) | ((access >> _U8(3)) & _U8(2))
        self.refuse("access", accesses & (asked != (op & _KIND)), "WRITE (2) for stores alone and FETCH (16) for fetches alone")
        self.refuse("access", ~accesses & (access != 0), "0 in an event")
        raise AssertionError("a row breaks a rule that none of these is")

    def _check_events(self, rows: NDArray[np.int64]) -> None:
        op, addr, value, size = (self.columns[name][rows] for name in ("op", "addr", "value", "size"))
        if self.null_value is not None:
            self.refuse("op", self.null_value[rows] & _VALUED[op], "one without value: its value is null", rows)
        for event in np.unique(op).tolist():
            here = op == event
            self._check_event(Op(event), rows[here], addr[here], value[here], size[here])

    def _check_event(self, event: Op, rows: NDArray[np.int64], addr: NDArray[np.uint64], value: NDArray[np.uint64],
                     size: NDArray[np.uint8]) -> None:
        if event in (Op.SET_REGS, Op.VMENTER, Op.VMEXIT):
            self.refuse("value", value >= len(self.header.contexts),
                        f"below {len(self.header.contexts)}, the register sets of the header", rows)
        elif event == Op.GUEST_WRITE:
            self.refuse("size", ~np.isin(size, (1, 2, 4, 8)), "1, 2, 4 or 8 bytes for a GUEST_WRITE", rows)
            self.refuse("addr", addr % size != 0, "a multiple of the size for a GUEST_WRITE", rows)
            self.refuse("value", value & ~(np.uint64(INVALID_GPA) >> (np.uint64(64) - np.uint64(8) * size)) != 0,
                        "a value of the size for a GUEST_WRITE", rows)
        elif event in (Op.MEMORY, Op.HOST_INVALIDATE):
            self.refuse("addr", addr & np.uint64(_PAGE_MASK) != 0, f"a multiple of 4096 for {event.name}", rows)
            self.refuse("value", (value & np.uint64(_PAGE_MASK) != 0) | (value == 0) | (value > GPA_LIMIT),
                        f"a number of bytes for {event.name}, a positive multiple of 4096", rows)
            self.refuse("addr", (addr >= np.uint64(GPA_LIMIT)) | (addr + value > np.uint64(GPA_LIMIT)),
                        f"below 2**52 up to its end for {event.name}", rows)
        elif event == Op.MEMORY_WORD:
            self.refuse("addr", addr & np.uint64(7) != 0, "a multiple of 8 for MEMORY_WORD", rows)
        elif event == Op.PAGE_FAULT:
            self.refuse("value", value >> np.uint64(32) != 0, "an error code of 32 bits", rows)
        elif event in (Op.WRPKRU, Op.WRMSR_PKRS):
            self.refuse("value", value >> np.uint64(32) != 0, f"32 bits for {event.name}", rows)
        elif event == Op.SET_CPL_AC:
            self.refuse("value", value & ~np.uint64(3 | 1 << 18) != 0, "CPL in bits 1:0 and EFLAGS.AC in bit 18", rows)
        elif event == Op.INVPCID:
            self.refuse("value", value >> np.uint64(16) != 0, "a type in bits 3:0 and a PCID in bits 15:4", rows)
            self.refuse("value", value & np.uint64(15) > 3, "a type of 0 to 3 in bits 3:0", rows)


class Trace:
    """A header and the chunks that go with it.

    Parameters
    ----------
    header : Header
    chunks : iterable
        Chunks, Arrow record batches, or mappings of column names to arrays (see `Chunk.checked()`). Taken once, in order.
    """

    def __init__(self, header: Header, chunks: Iterable[Any]) -> None:
        if not isinstance(header, Header):
            raise TypeError(f"header: want a Header, got {type(header).__name__}")
        self.header = header
        self._chunks = chunks

    def chunks(self) -> Generator[Chunk]:
        """Return the chunks, checked."""
        return checked_chunks(self._chunks, self.header)


def checked_chunks(chunks: Iterable[Any], header: Header) -> Generator[Chunk]:
    """Yield chunks of what an iterable gives: checked Chunks as they are; other Chunks, Arrow record batches and mappings
    checked."""
    first = 0
    for item in chunks:
        whole = isinstance(item, Chunk) and item.is_checked(header)
        chunk = item if whole else Chunk.checked(columns_of(item), header, first)
        first += len(chunk)
        yield chunk


def columns_of(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if isinstance(item, Chunk):
        return {name: getattr(item, name) for name in COLUMNS if getattr(item, name) is not None}
    if hasattr(item, "schema") and hasattr(item, "columns"):
        from kvmmu.traces.parquet import batch_columns

        return batch_columns(item)
    raise TraceError(f"a chunk is a {type(item).__name__}; "
                     "allowed is a mapping of column names to arrays, or an Arrow record batch")


def count_accesses(op: NDArray[np.uint8]) -> int:
    """Return how many rows are accesses."""
    return int(np.count_nonzero(op < _FIRST_EVENT))
