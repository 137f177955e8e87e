"""Columns of batch translations, and the checks of what callers pass as columns."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import INVALID_GPA, Access, RetPf, Status
from kvmmu.arch.arguments import check_int, refuse_masked
from kvmmu.arch.faults import error_code_text
from kvmmu.arch.words import hex_text, name_text, rights_text
from kvmmu.walk._columns import COLUMNS
from kvmmu.walk.html import HTML_ROWS, table_html

__all__ = ["COLUMNS", "Accesses", "OneAccess", "Span", "Translation"]

ACCESS_VALID = int(Access.WRITE | Access.USER | Access.AC | Access.FETCH | Access.IMPLICIT | Access.SHADOW_STACK | Access.PROBE)
SPAN_MAX = 4096
ROWS_MAX = 1 << 48
_ADDRESSES = ("gpa", "gpa_next", "hpa", "ngpa", "pte_gpa", "fault_gpa")


class Translation:
    """Columns of a batch translation; None where a column was not asked for.

    Attributes
    ----------
    gpa : ndarray of uint64, shape (n,)
        End of the translation (bytes); INVALID_GPA where it failed.
    status : ndarray of uint8, shape (n,)
        `Status`.
    error_code : ndarray of uint32, shape (n,)
        The #PF error code as the CPU pushes it; 0 where status is not PAGE_FAULT.
    level : ndarray of uint8, shape (n,)
        Level of the leaf of the first stage (of the second one through `ngpa_walk`): 1 4K, 2 2M or 4M, 3 1G; 0 with paging off.
        On a fault that of the entry that failed, in the stage that failed.
    pte, pte_gpa : ndarray of uint64, shape (n,)
        The leaf, or the entry that failed, and where it lies (INVALID_GPA for a PDPTE register or none).
    pte_access : ndarray of uint8, shape (n,)
        Rights (`Acc`): the AND over the walk; 0 where an entry is not present.
    refs : ndarray of uint8, shape (n,)
        Paging-structure entries read, in both stages: 4; 24 for 4-on-4.
    ngpa : ndarray of uint64, shape (n,)
        The address after the first stage; INVALID_GPA where it failed. Without a second stage the same as `gpa`.
    fault_gpa : ndarray of uint64, shape (n,)
        The address that the second stage could not translate, else INVALID_GPA.
    exit_qualification : ndarray of uint64, shape (n,)
        Of a fault of the second stage: the exit qualification, or EXITINFO1 of a nested page fault; else 0.
    """

    __slots__ = tuple(COLUMNS)

    gpa: NDArray[np.uint64]
    status: NDArray[np.uint8]
    error_code: NDArray[np.uint32]
    level: NDArray[np.uint8]
    pte: NDArray[np.uint64]
    pte_gpa: NDArray[np.uint64]
    pte_access: NDArray[np.uint8]
    refs: NDArray[np.uint8]
    ngpa: NDArray[np.uint64]
    fault_gpa: NDArray[np.uint64]
    exit_qualification: NDArray[np.uint64]

    def __init__(self, **columns: NDArray[Any]) -> None:
        for name in COLUMNS:
            setattr(self, name, columns.pop(name, None))
        if columns:
            raise TypeError(f"Translation has no column {next(iter(columns))!r}, only {', '.join(COLUMNS)}")

    @classmethod
    def empty(cls, n: int, fields: str | Iterable[str] = ("gpa", "status", "error_code")) -> Self:
        """Uninitialised columns of n rows, for `out=`."""
        n = check_int("n", n, 0, ROWS_MAX)
        return cls(**{name: np.empty(n, COLUMNS[name]) for name in check_fields(fields)})

    def __repr__(self) -> str:
        columns = self._present()
        return f"Translation({_rows(columns)}: {', '.join(columns)})"

    def _repr_html_(self) -> str:
        return _columns_html("Translation", self._present())

    def _present(self) -> dict[str, NDArray[Any]]:
        return {name: column for name in COLUMNS if (column := getattr(self, name)) is not None}


class Span:
    """Columns of a batch of accesses that may cross a page.

    Attributes
    ----------
    gpa : ndarray of uint64, shape (n,)
        Where the first byte lies (bytes); INVALID_GPA where the access failed in its first page.
    gpa_next : ndarray of uint64, shape (n,)
        Where the first byte in the next page lies; INVALID_GPA where the access does not cross, or failed.
    status : ndarray of uint8, shape (n,)
        `Status` of the page that failed first, OK if none did.
    error_code : ndarray of uint32, shape (n,)
        Its #PF error code, else 0.
    address : ndarray of uint64, shape (n,)
        The linear address that CR2 takes: of the access where its first page failed, of the first byte of the next page
        where that one did; 0 where none did.
    """

    __slots__ = ("address", "error_code", "gpa", "gpa_next", "status")

    def __init__(self, gpa: NDArray[np.uint64], gpa_next: NDArray[np.uint64], status: NDArray[np.uint8],
                 error_code: NDArray[np.uint32], address: NDArray[np.uint64]) -> None:
        self.gpa, self.gpa_next, self.status = gpa, gpa_next, status
        self.error_code, self.address = error_code, address

    def __repr__(self) -> str:
        return f"Span({_rows(self._columns())})"

    def _repr_html_(self) -> str:
        return _columns_html("Span", self._columns())

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in ("gpa", "gpa_next", "status", "error_code", "address")}


class Accesses:
    """Columns of accesses of a machine; of a single access integers.

    Attributes
    ----------
    gpa : ndarray of uint64, shape (n,)
        Guest-physical address (bytes); INVALID_GPA where the guest's own tables fault.
    hpa : ndarray of uint64, shape (n,)
        Host-physical address; INVALID_GPA on a fault, for MMIO, and where the host let the access not through.
    status : ndarray of uint8, shape (n,)
        `Status`: OK, PAGE_FAULT or NON_CANONICAL; of a nested guest any: its second stage's faults are exits to L1.
    error_code : ndarray of uint32, shape (n,)
        The #PF error code, else 0.
    ret : ndarray of uint8, shape (n,)
        `RetPf` of the last exit; CONTINUE (0) where there was none. EMULATE: KVM carried the access out itself.
    exits : ndarray of uint8, shape (n,)
        Exits that it took.
    """

    __slots__ = ("error_code", "exits", "gpa", "hpa", "ret", "status")

    gpa: NDArray[np.uint64]
    hpa: NDArray[np.uint64]
    status: NDArray[np.uint8]
    error_code: NDArray[np.uint32]
    ret: NDArray[np.uint8]
    exits: NDArray[np.uint8]

    def __init__(self, gpa: Any, hpa: Any, status: Any, error_code: Any, ret: Any, exits: Any) -> None:
        self.gpa, self.hpa, self.status = gpa, hpa, status
        self.error_code, self.ret, self.exits = error_code, ret, exits

    @classmethod
    def empty(cls, n: int) -> Self:
        """Uninitialised columns of n rows, for `out=`."""
        n = check_int("n", n, 0, ROWS_MAX)
        return cls(np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, np.uint8), np.empty(n, np.uint32),
                   np.empty(n, np.uint8), np.empty(n, np.uint8))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def check(self, n: int) -> Self:
        """Itself, if every column has n rows of the right kind."""
        n = check_int("n", n, 0, ROWS_MAX)
        wanted = type(self).empty(0).arrays()
        for name, column in self.arrays().items():
            check_array(f"out.{name}", column, wanted[name].dtype, n)
        return self

    def __repr__(self) -> str:
        if not isinstance(self.gpa, np.ndarray):
            return f"Accesses({', '.join(f'{name}={_TEXTS[name](getattr(self, name))}' for name in _ACCESSES)})"
        return f"Accesses({_rows(self.arrays())})"

    def _repr_html_(self) -> str:
        columns = self.arrays() if isinstance(self.gpa, np.ndarray) else {
            name: np.array([getattr(self, name)]) for name in self.__slots__}
        return _columns_html("Accesses", {name: columns[name] for name in _ACCESSES})


class OneAccess(Protocol):
    """The `Accesses` of a single access for type checkers: its columns are integers."""

    @property
    def gpa(self) -> int: ...
    @property
    def hpa(self) -> int: ...
    @property
    def status(self) -> int: ...
    @property
    def error_code(self) -> int: ...
    @property
    def ret(self) -> int: ...
    @property
    def exits(self) -> int: ...


def _address_text(address: int) -> str:
    return "INVALID_GPA" if address == INVALID_GPA else hex(address)


_ACCESSES = ("gpa", "hpa", "status", "error_code", "ret", "exits")
_TEXTS: dict[str, Callable[[int], str]] = dict.fromkeys(_ADDRESSES, _address_text) | {
    "status": lambda status: name_text(status, Status), "error_code": error_code_text, "level": str, "pte": hex_text,
    "pte_access": rights_text, "refs": str, "exit_qualification": hex_text, "address": hex_text,
    "ret": lambda ret: name_text(ret, RetPf), "exits": str}


def _rows(columns: dict[str, NDArray[Any]]) -> str:
    """Return how many rows columns have, and of which status."""
    n = next(iter(columns.values())).size if columns else 0
    counts = np.bincount(columns["status"], minlength=1).tolist() if "status" in columns else []
    found = ", ".join(f"{count} {name_text(status, Status)}" for status, count in enumerate(counts) if count)
    return f"{n} rows" + (f", {found}" if found else "")


def _columns_html(title: str, columns: dict[str, NDArray[Any]]) -> str:
    """Return the first rows of columns as a table."""
    n = next(iter(columns.values())).size if columns else 0
    rows = zip(*(map(_TEXTS[name], column[:HTML_ROWS].tolist()) for name, column in columns.items()), strict=True)
    return table_html(f"{title}: {_rows(columns)}", tuple(columns), rows, n - HTML_ROWS)


def check_fields(fields: str | Iterable[str]) -> tuple[str, ...]:
    """fields as a tuple of known column names."""
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"fields: {name!r} is no column, want some of {', '.join(COLUMNS)}")
    return names


def check_array(name: str, array: object, dtype: np.dtype[Any], n: int | None = None) -> NDArray[Any]:
    """array itself if it is a C-contiguous 1-d ndarray of this dtype, and of length n if that is given."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: want an ndarray of {dtype}, got {type(array).__name__}")
    refuse_masked(name, array)
    if array.dtype != dtype:
        raise ValueError(f"{name}: want dtype {dtype}, got {array.dtype}")
    if array.ndim != 1 or (n is not None and array.size != n):
        raise ValueError(f"{name}: want shape ({'n' if n is None else n},), got {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: want a C-contiguous array; numpy.ascontiguousarray() makes a copy that is")
    return array


def check_access(access: int | NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    """access as a uint8 array of 1 or n rows with bits that are modelled."""
    if isinstance(access, np.ndarray):
        check_array("access", access, np.dtype(np.uint8), n)
        _check_access_bits(int(np.bitwise_or.reduce(access)) if access.size else 0)
        return access
    try:
        return np.array([check_one_access(access)], np.uint8)
    except TypeError:
        raise TypeError(f"access: want an Access or an ndarray of uint8, got {type(access).__name__}") from None


def check_one_access(access: int) -> int:
    """access as an int with bits that are modelled."""
    access = check_int("access", access, 0, 255)
    _check_access_bits(access)
    return access


def _check_access_bits(seen: int) -> None:
    if seen & ~ACCESS_VALID:
        raise ValueError(f"access: {seen & ~ACCESS_VALID:#x} is no Access bit; want READ WRITE USER AC FETCH IMPLICIT "
                         "SHADOW_STACK PROBE")


def check_one_size(size: int) -> int:
    """Return the size of one access in bytes as an int."""
    return check_int("size", size, 1, SPAN_MAX)


def check_size(size: int | NDArray[np.unsignedinteger], n: int) -> NDArray[np.uint64]:
    """Sizes of accesses in bytes as a uint64 array of 1 or n rows."""
    if isinstance(size, np.ndarray):
        if size.dtype.kind != "u":
            raise ValueError(f"size: want unsigned integers, got {size.dtype}")
        check_array("size", size, size.dtype, n)
    else:
        return np.array([check_one_size(size)], np.uint64)
    if size.size and not (int(size.min()) >= 1 and int(size.max()) <= SPAN_MAX):
        bad = size[(size < 1) | (size > SPAN_MAX)][0]
        raise ValueError(f"size: want 1 to {SPAN_MAX} bytes, got {int(bad)}")
    return size.astype(np.uint64)
