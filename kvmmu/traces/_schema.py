"""The schema of a recording's arrays as tables, and the checks that hold arrays to it.

Two kinds of wrong data: what would make a reader index out of bounds or misread a code is refused here, and so is a physical
address that no processor has, beyond 52 bits. Other recorded addresses and table entries are ground truth to be verified by a
walk, so any value of them passes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmu.traces._npz import Arrays, RecordingError

PAGE_BYTES = 4096
MAX_PFN = (1 << 40) - 1      # 52 physical address bits
GPA_LIMIT = 1 << 52
EVENT_CODES = (1, 2, 3, 4, 7)


class Column(NamedTuple):
    """One array: the dtypes allowed and its shape, where a word stands for a length shared by all that use the word."""

    dtypes: tuple[str, ...]
    shape: tuple[str | int, ...]


def _columns(length: str, **dtypes: str) -> dict[str, Column]:
    return {name: Column(tuple(allowed.split()), (length,)) for name, allowed in dtypes.items()}


TRACE = {
    **_columns("accesses", pidx="uint16 uint32", off="uint16", kind="uint8", size="uint8", priv="uint8"),
    **_columns("page rows", page_gva="uint64", page_gpa="uint64", page_ctx="uint32", page_io="uint8"),
    "ctx": Column(("uint64",), ("contexts", 6)),
    **_columns("events", ev_pos="uint64", ev_code="uint8", ev_val="uint64", ev_aux="uint64"),
    **_columns("page faults", pf_pos="uint64", pf_cr2="uint64", pf_err="uint32", pf_ctx="uint32"),
    **_columns("NPT faults", npf_pos="uint64", npf_gpa="uint64", npf_info1="uint64"),
}
TABLES = {
    **_columns("table pages", pfn="uint64", level="uint32"),
    "data": Column(("uint8",), ("table pages", PAGE_BYTES)),
}
WRITES = _columns("table writes", w_pos="uint64", w_gpa="uint64", w_val="uint64")
GVA2GPA = _columns("answers", gva="uint64", gpa="uint64", mapped="uint8")
INFO_TLB = _columns("entries", gva="uint64", gpa="uint64", flags="uint16")
KVM_TRANSLATE = _columns("answers", gva="uint64", gpa="uint64", valid="uint8")


class Checker:
    """The arrays of one file, held to a schema: dtypes, shapes and common lengths on construction, values on request.

    Headers do on construction: nothing is read of the data before they are right.

    Attributes
    ----------
    lengths : dict of str to int
        What the words of the schema's shapes stand for in this file.
    """

    def __init__(self, file: Path, arrays: Mapping[str, Any], schema: dict[str, Column]) -> None:
        self._file = file
        self._arrays = arrays
        self.lengths: dict[str, int] = {}
        for name, column in schema.items():
            self._check_layout(name, column)

    def _check_layout(self, name: str, column: Column) -> None:
        if name not in self._arrays:
            raise self._error(name, f"missing; the file has {', '.join(sorted(self._arrays)) or 'no arrays'}")
        array = self._arrays[name]
        if not hasattr(array, "dtype"):
            raise self._error(name, f"is a {type(array).__name__}; allowed is an array")
        if array.dtype not in [np.dtype(allowed) for allowed in column.dtypes]:
            raise self._error(name, f"dtype is {array.dtype.str}; allowed is {' or '.join(column.dtypes)}")
        if array.ndim != len(column.shape):
            raise self._error(name, f"has {array.ndim} dimensions; allowed is {len(column.shape)}")
        for length, allowed in zip(array.shape, column.shape, strict=True):
            expected = self.lengths.setdefault(allowed, length) if isinstance(allowed, str) else allowed
            if length != expected:
                raise self._error(name, f"has shape {array.shape}; allowed is {expected} "
                                        f"({allowed}) instead of {length}")

    def _error(self, place: str, problem: str) -> RecordingError:
        return RecordingError(f"{self._file}: {place}: {problem}")

    def refuse(self, name: str, bad: NDArray[np.bool_], allowed: str) -> None:
        """Raise for the first row of array `name` where `bad` is true."""
        if bad.any():
            row = int(np.argmax(bad))
            value = int(self._arrays[name][row].flat[0])
            raise self._error(f"{name}[{row}]", f"is {value} ({value:#x}); allowed is {allowed}")

    def at_least_one(self, name: str, meaning: str) -> None:
        """Check that array `name` has a row."""
        if not self._arrays[name].size:
            raise self._error(name, f"has no row; allowed is at least one {meaning}")

    def below(self, name: str, bound: int, meaning: str) -> None:
        """Check that every value of `name` is less than `bound`."""
        values = self._arrays[name]
        if values.size and values.max() >= bound:
            self.refuse(name, values >= bound, f"below {bound}, {meaning}")

    def physical(self, name: str) -> None:
        """Check that every value of `name` is an address that a processor can have."""
        self.below(name, GPA_LIMIT, "the physical addresses of 52 bits")

    def positions(self, name: str, bound: int, meaning: str) -> None:
        """Check that the values of `name` are places in the trace: ascending, and less than `bound`."""
        values = self._arrays[name]
        descends = np.zeros(values.size, bool)
        descends[1:] = values[1:] < values[:-1]
        self.refuse(name, descends, "not less than the position before it")
        self.below(name, bound, meaning)


def check_trace(file: Path, arrays: Arrays) -> None:
    """Raise RecordingError unless `arrays` is a trace that can be replayed without a further check."""
    check = Checker(file, arrays, TRACE)
    accesses, contexts = check.lengths["accesses"], check.lengths["contexts"]
    check.at_least_one("ctx", "register context")
    check.below("pidx", check.lengths["page rows"], "the number of page rows")
    check.below("off", PAGE_BYTES, "the bytes of a page")
    check.below("kind", 3, "of 0 load, 1 store, 2 fetch")
    check.below("priv", 3, "of 0 supervisor, 1 user, 2 supervisor with SMAP off")
    check.refuse("size", arrays["size"] == 0, "at least one byte")
    check.physical("page_gpa")
    check.physical("npf_gpa")
    check.below("page_ctx", contexts, "the number of contexts")
    check.below("page_io", 2, "of 0 memory, 1 MMIO")
    check.refuse("ctx", arrays["ctx"][:, 0] > 1, "0 or 1 in the first column (guest)")
    check.refuse("ev_code", ~np.isin(arrays["ev_code"], EVENT_CODES), f"one of {EVENT_CODES}")
    check.below("pf_ctx", contexts, "the number of contexts")
    check.positions("ev_pos", accesses + 1, "an access or the end of the trace")
    check.positions("npf_pos", accesses + 1, "an access or the end of the trace")
    check.positions("pf_pos", accesses, "the number of accesses")


def check_bounds(file: Path, arrays: Arrays) -> None:
    """Raise RecordingError unless a loop can index by the numbers in `arrays`, those of a trace and of its table writes.

    Less than `check_trace()`: for a Recording that a program changed, which may contradict itself.
    """
    check = Checker(file, arrays, TRACE | WRITES)
    check.below("pidx", check.lengths["page rows"], "the number of page rows")
    check.below("kind", 3, "of 0 load, 1 store, 2 fetch")
    check.below("priv", 3, "of 0 supervisor, 1 user, 2 supervisor with SMAP off")
    check.below("page_ctx", check.lengths["contexts"], "the number of contexts")
    check.below("page_io", 2, "of 0 memory, 1 MMIO")
    check.below("pf_ctx", check.lengths["contexts"], "the number of contexts")
    check.refuse("w_gpa", arrays["w_gpa"] % 8 != 0, "a multiple of 8")
    for name in ("ev_pos", "npf_pos", "pf_pos"):
        check.positions(name, check.lengths["accesses"] + 1, "an access or the end of the trace")


def check_tables(file: Path, arrays: Arrays) -> None:
    """Raise RecordingError unless `arrays` is a set of table pages."""
    check = Checker(file, arrays, TABLES)
    check.at_least_one("pfn", "table page")
    pfn = arrays["pfn"]
    check.below("pfn", MAX_PFN + 1, "the page numbers of 52 physical address bits")
    repeated = np.ones(pfn.size, bool)
    repeated[np.unique(pfn, return_index=True)[1]] = False
    check.refuse("pfn", repeated, "a page number that no earlier row has")


def check_writes(file: Path, arrays: Arrays, accesses: int) -> None:
    """Raise RecordingError unless `arrays` also holds a log of aligned stores to its table pages."""
    check = Checker(file, arrays, WRITES)
    check.positions("w_pos", accesses, "the number of accesses")
    gpa = arrays["w_gpa"]
    check.refuse("w_gpa", gpa % 8 != 0, "a multiple of 8")
    check.refuse("w_gpa", ~np.isin(gpa // PAGE_BYTES, arrays["pfn"]), "an address inside a page of pfn")


def check_answers(file: Path, arrays: Arrays, schema: dict[str, Column]) -> None:
    """Raise RecordingError unless `arrays` is one of the monitor's or KVM's tables of translations."""
    check = Checker(file, arrays, schema)
    check.physical("gpa")
    for flag in {"mapped", "valid"} & schema.keys():
        check.below(flag, 2, "of 0 no, 1 yes")
