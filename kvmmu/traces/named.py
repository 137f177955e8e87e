"""Columns of other names and types than the trace format has, as rows: what CSV, Parquet and numpy files share."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, INVALID_GPA, OP_KIND, Access, Op
from kvmmu.traces._sink import MODIFY, Sink, add_rows
from kvmmu.traces.header import MAX_VCPUS, TraceError

__all__ = ["KINDS", "Naming", "Rows", "kinds_of", "parse_columns"]

FIELDS = ("addr", "op", "access", "size", "ip", "vcpu", "gpa")
# Names that columns of others have, in the order in which they are looked for; upper or lower case.
SYNONYMS = {
    "addr": ("addr", "address", "va", "vaddr", "gva", "virtual_address", "virt_addr", "linear", "linear_address", "mem_addr"),
    "op": ("op", "type", "kind", "rw", "access_type", "operation", "is_write", "is_store", "write"),
    "access": ("access",),
    "size": ("size", "bytes", "length", "len", "width", "access_size"),
    "ip": ("ip", "pc", "rip", "eip", "instruction_pointer"),
    "vcpu": ("vcpu", "cpu", "core", "tid", "thread", "thread_id"),
    "gpa": ("gpa", "pa", "paddr", "phys", "phys_addr", "physical_address"),
}
KINDS = {**dict.fromkeys(("0", "r", "l", "load", "read", "rd", "ld", "false"), int(Op.LOAD)),
         **dict.fromkeys(("1", "w", "s", "store", "write", "wr", "st", "true"), int(Op.STORE)),
         **dict.fromkeys(("2", "i", "f", "x", "fetch", "ifetch", "instr", "instruction", "exec", "execute"), int(Op.FETCH)),
         **dict.fromkeys(("m", "rw", "modify", "rmw", "update"), MODIFY),
         "4": int(Op.LOAD_MMIO), "5": int(Op.STORE_MMIO), "6": int(Op.FETCH_MMIO)}
_NUMBERED = ("tid", "thread", "thread_id")      # any numbers: vCPUs in order of appearance
_MAX_SIZE = 65535


def parse_columns(columns: Mapping[str, str | int] | str | None) -> dict[str, str | int]:
    """Check which of a file's columns is which of the format: {"addr": "va", "op": "type"}, or "addr=va,op=type"."""
    if columns is None:
        return {}
    if isinstance(columns, str):
        pairs = [part.split("=", 1) for part in columns.split(",") if part]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"columns: is {columns!r}; allowed is NAME=COLUMN,..., NAME one of {', '.join(FIELDS)}")
        columns = {pair[0].strip(): pair[1].strip() for pair in pairs}
    for name, column in columns.items():
        if name not in FIELDS:
            raise ValueError(f"columns: {name!r} is unknown; allowed are {', '.join(FIELDS)}")
        if not isinstance(column, (str, int)):
            raise TypeError(f"columns: {name} is {column!r}; allowed is the name of a column, or its number from 0")
    return dict(columns)


class Naming:
    """The names that columns of the format have in a file.

    Parameters
    ----------
    path : Path
    names : list of str
        Of the file's columns, in order.
    given : dict
        As of parse_columns().
    there : str, optional
        The names for messages, if there is more to say of them.

    Attributes
    ----------
    fields : dict of str to str
        Columns of the file by their names in the format.

    Raises
    ------
    TraceError
        There is no address, or a column that was named is not there.
    """

    def __init__(self, path: Path, names: list[str], given: Mapping[str, str | int], there: str | None = None) -> None:
        there = there or ", ".join(names)
        self.fields: dict[str, str] = {}
        lower = {name.strip().lower(): name for name in reversed(names)}
        for field, wanted in given.items():
            if isinstance(wanted, int) or wanted not in names and wanted.isdecimal():
                if not 0 <= int(wanted) < len(names):
                    raise TraceError(f"{path}: {field} shall be column {wanted}; there are {len(names)}, from 0")
                wanted = names[int(wanted)]
            if wanted not in names:
                raise TraceError(f"{path}: {field} shall be column {wanted!r}; there are {there}")
            self.fields[field] = wanted
        taken = set(self.fields.values())
        for field, synonyms in SYNONYMS.items():
            found = next((lower[name] for name in synonyms if name in lower and lower[name] not in taken), None)
            if field not in self.fields and found is not None:
                self.fields[field] = found
                taken.add(found)
        if "addr" not in self.fields:
            raise TraceError(f"{path}: no column is an address; there are {there}. Say which is: columns={{'addr': NAME}}, "
                             f"--columns addr=NAME. Names that are known: {', '.join(SYNONYMS['addr'])}")

    @property
    def numbered(self) -> bool:
        """True if vCPUs are threads, any numbers."""
        return self.fields.get("vcpu", "").strip().lower() in _NUMBERED


class Rows:
    """Columns of a file, a part at a time, as rows of the format.

    Parameters
    ----------
    path : Path
        For messages.
    naming : Naming
    first : int
        Number of the first row.
    place : callable
        Where a row stands in the file, for messages.

    Attributes
    ----------
    row : int
        Number of the next row.
    """

    def __init__(self, path: Path, naming: Naming, first: int = 0,
                 place: Callable[[int], str] = lambda row: f"row {row}") -> None:
        self._path, self._naming, self.row, self._place = path, naming, first, place
        self._threads: dict[int, int] = {}
        fields = naming.fields
        self._sink = Sink(vcpu="vcpu" in fields, gpa="gpa" in fields, size="size" in fields)

    def add(self, columns: Mapping[str, NDArray[Any]], spelled: Callable[[int], str] = str) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield chunks of some rows.

        Parameters
        ----------
        columns : mapping of str to ndarray
            By their names in the format. Integers of any width; op as of kinds_of() if it was words.
        spelled : callable
            The op of a row as it was written, for messages.

        Raises
        ------
        TraceError
            A value is not allowed; the message has its row. The rows before were yielded.
        """
        count = len(columns["addr"])
        stop, reason = count, ""
        ready: dict[str, NDArray[Any]] = {}
        for field, column in columns.items():
            array, bad, allowed = getattr(self, "_" + field)(column)
            ready[field] = array
            if bad is not None and bad[:stop].any():
                stop = int(np.argmax(bad))
                shown = self._shown(field, column, stop, spelled)
                reason = f"{self._place(self.row + stop)}: {self._naming.fields[field]} is {shown}; allowed is {allowed}"
        ready.setdefault("op", np.full(count, int(Op.LOAD), np.uint8))
        if "access" in ready:
            stop, reason = self._check_access(ready, stop, reason)
        position = 0
        cut = {field: np.ascontiguousarray(array[:stop]) for field, array in ready.items()}
        while position < stop:
            position = add_rows(self._sink, cut["op"], cut["addr"], position,
                                **{field: cut.get(field) for field in ("access", "size", "ip", "vcpu", "gpa")})
            yield self._sink.take()
        self.row += stop
        if reason:
            raise TraceError(f"{self._path}: {reason}")

    @staticmethod
    def _shown(field: str, column: NDArray[Any], row: int, spelled: Callable[[int], str]) -> str:
        return repr(spelled(row)) if field == "op" and spelled is not str else str(column[row])

    def _check_access(self, ready: dict[str, NDArray[Any]], stop: int, reason: str) -> tuple[int, str]:
        """Set WRITE and FETCH by the kind of the access; the other bits shall be those that accesses have."""
        op, access = ready["op"], ready["access"]
        given = np.uint8(int(Access.USER | Access.AC | Access.IMPLICIT))
        bad = access & ~np.uint8(int(Access.WRITE | Access.FETCH) | int(given)) != 0
        if bad[:stop].any():
            stop = int(np.argmax(bad))
            reason = (f"{self._place(self.row + stop)}: access is {access[stop]}; "
                      "allowed is a sum of WRITE 2, USER 4, AC 8, FETCH 16, IMPLICIT 32")
        kind = op & np.uint8(OP_KIND)
        ready["access"] = ((access & given) | np.where((kind == 1) | (kind == 3), np.uint8(int(Access.WRITE)), np.uint8(0))
                           | np.where(kind == 2, np.uint8(int(Access.FETCH)), np.uint8(0)))
        return stop, reason

    def _addr(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        return column.astype(np.uint64), None, ""       # two's complement of negative numbers

    _ip = _addr

    def _gpa(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        gpa = column.astype(np.uint64)
        return gpa, (gpa >= np.uint64(GPA_LIMIT)) & (gpa != np.uint64(INVALID_GPA)), "below 2**52, or null"

    def _size(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        return column.astype(np.uint32), (column < 0) | (column > _MAX_SIZE), f"0 to {_MAX_SIZE} bytes"

    def _op(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        known = np.isin(column, list(set(KINDS.values())))
        return column.astype(np.uint8), ~known, "one of " + ", ".join(sorted(KINDS))

    def _access(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        return column.astype(np.uint8), (column < 0) | (column > 255), "a byte"

    def _vcpu(self, column: NDArray[Any]) -> tuple[NDArray[Any], Any, str]:
        if not self._naming.numbered:
            return column.astype(np.uint16), (column < 0) | (column >= MAX_VCPUS), f"0 to {MAX_VCPUS - 1}"
        threads, places = np.unique(column, return_inverse=True)
        order = np.argsort(np.array([np.argmax(column == thread) for thread in threads], np.int64)) if threads.size < 64 \
            else np.arange(threads.size)
        for place in order.tolist():
            self._threads.setdefault(int(threads[place]), len(self._threads))
        numbers = np.array([self._threads[int(thread)] for thread in threads], np.int64)
        vcpu = numbers[places.reshape(-1)] if threads.size else np.zeros(0, np.int64)
        return vcpu.astype(np.uint16), vcpu >= MAX_VCPUS, f"one of at most {MAX_VCPUS} threads"


def kinds_of(words: list[str]) -> NDArray[np.uint8]:
    """Return the kinds of accesses that words name; 255 for those that name none."""
    return np.array([KINDS.get(word.strip().lower(), 255) for word in words], np.uint8)
