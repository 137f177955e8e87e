"""A recording: the page tables of a real guest and every memory access it made, with the physical addresses reached.

One directory per recording. `meta.json` holds the registers; `static_trace` and `dyn_trace` the accesses of two
phases, dictionary coded per page; `tables` and `dyn_tables` the page tables; `gva2gpa`, `info_tlb` and
`kvm_translate` what QEMU and KVM said about single addresses. All but the first are `.npz` or `.npz.zst`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch.arguments import check_int, check_name, check_path
from kvmmu.traces import _schema
from kvmmu.traces._files import all_there, kind_of, no_such_trace, open_regular
from kvmmu.traces._npz import Arrays, RecordingError, StrPath, find_npz, open_npz

PHASES = ("static", "dyn")
MODES = ("4l", "5l", "pae", "32")
REGISTERS = ("cr0", "cr2", "cr3", "cr4", "efer", "cpl", "ip")
QEMU_TCG_MAXPHYADDR = 40
MAXPHYADDR = range(32, 53)
META = "meta.json"
ARCHIVES = ("static_trace", "dyn_trace", "tables", "dyn_tables", "gva2gpa", "info_tlb", "kvm_translate")
_META_BYTES = 1 << 20
_BUNDLED = {"recording": "l4", "lackey": "lackey/sort.lackey.xz"}
_TRACE_FILES = " or ".join(f"{phase}_trace.npz[.zst]" for phase in PHASES)

# The access byte of kvmmu: what `kind` and `priv` of the recording contribute to it.
ACCESS_OF_KIND = np.array([0, 2, 16], np.uint8)    # load, store WRITE, fetch FETCH
ACCESS_OF_PRIV = np.array([0, 4, 8], np.uint8)     # supervisor, user USER, supervisor with SMAP off AC


class Events(NamedTuple):
    """Register events, each before access `pos`: arrays of one length.

    `pos` uint64; `code` uint8: 1 CR3 load, 2 CR4 load, 3 INVLPG, 4 CR0 load, 7 world switch; `val` uint64: the new
    register value, the address of an INVLPG, or 1 VMRUN, 0 #VMEXIT; `aux` uint64: nested CR3 of a world switch.
    """

    pos: np.ndarray
    code: np.ndarray
    val: np.ndarray
    aux: np.ndarray


class Faults(NamedTuple):
    """Page faults taken: access `pos` (uint64) is the first of the handler; `cr2` uint64, `err` and `ctx` uint32."""

    pos: np.ndarray
    cr2: np.ndarray
    err: np.ndarray
    ctx: np.ndarray


class NptFaults(NamedTuple):
    """Nested page faults, each before access `pos`: `gpa` is EXITINFO2, `info1` EXITINFO1; all uint64."""

    pos: np.ndarray
    gpa: np.ndarray
    info1: np.ndarray


class Writes(NamedTuple):
    """Stores to table pages: access `pos` stored the 8-byte word `val` at `gpa` (bytes, aligned); all uint64."""

    pos: np.ndarray
    gpa: np.ndarray
    val: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """One phase of a recording, checked and in memory. Make one with `Recording.open()`.

    Attributes
    ----------
    path : Path
        The directory.
    name : str
        The scenario's name.
    meta : dict
        `meta.json` as it is.
    phase : str
        "static": the tables do not change, and `table_data` is their state at the end. "dyn": `table_data` is their
        state at the start, and `writes` are to be applied along the trace.
    phases : tuple of str
        The phases that the directory holds.
    mode : str
        Paging mode at the stop point: "4l", "5l", "pae" or "32".
    nested : bool
        Part of the trace runs inside an SVM guest.
    maxphyaddr : int
        Physical address bits of the CPU.
    pkru, pkrs : int
        Key registers of the traced process in the static phase; 0 where they are unknown.
    registers : dict of str to int
        cr0, cr2, cr3, cr4, efer, cpl and ip at the stop point.
    vmcb : dict of str to int, or None
        VMCB of the nested guest at the stop point: gpa, nested_cr3, cr0, cr3, cr4, efer, ...
    ctx : ndarray of uint64, shape (C, 6)
        Contexts: guest (1 inside the SVM guest), cr3, nested cr3, cr0, cr4, efer.
    pages_gva, pages_gpa : ndarray of uint64, shape (R,)
        Page rows: linear and physical address of the page, in bytes.
    pages_ctx : ndarray of uint32, shape (R,)
        Row of `ctx`.
    pages_io : ndarray of uint8, shape (R,)
        1 where the page is MMIO.
    pidx : ndarray of uint16 or uint32, shape (N,)
        Page row of each access.
    off : ndarray of uint16, shape (N,)
        Offset in the page, in bytes.
    kind : ndarray of uint8, shape (N,)
        0 load, 1 store, 2 instruction fetch.
    size : ndarray of uint8, shape (N,)
        Bytes accessed; may cross into the next page, then the physical address is that of the first byte.
    priv : ndarray of uint8, shape (N,)
        0 supervisor, 1 user, 2 supervisor with SMAP off or EFLAGS.AC set.
    events : Events
        Register loads, INVLPGs and world switches.
    faults : Faults
        Page faults.
    npt_faults : NptFaults
        Nested page faults.
    table_pfn : ndarray of uint64, shape (P,)
        Guest page numbers of the table pages, each once.
    table_level : ndarray of uint32, shape (P,)
        Bit n: the page is used as a level-n table (1 = leaf tables); bit 10 + n: as one of the nested page tables.
    table_data : ndarray of uint8, shape (P, 4096), C-contiguous
        Contents of the table pages.
    writes : Writes
        Stores to table pages; empty in the static phase.
    """

    path: Path
    name: str
    meta: dict[str, Any]
    phase: str
    phases: tuple[str, ...]
    mode: str
    nested: bool
    maxphyaddr: int
    pkru: int
    pkrs: int
    registers: dict[str, int]
    vmcb: dict[str, int] | None
    ctx: np.ndarray
    pages_gva: np.ndarray
    pages_gpa: np.ndarray
    pages_ctx: np.ndarray
    pages_io: np.ndarray
    pidx: np.ndarray
    off: np.ndarray
    kind: np.ndarray
    size: np.ndarray
    priv: np.ndarray
    events: Events
    faults: Faults
    npt_faults: NptFaults
    table_pfn: np.ndarray
    table_level: np.ndarray
    table_data: np.ndarray
    writes: Writes

    @classmethod
    def open(cls, path: StrPath, phase: str | None = None) -> Self:
        """Read and check one phase.

        Parameters
        ----------
        path : str or path-like
            The directory of a recording, or the trace file of one of its phases.
        phase : {"static", "dyn"}, optional
            Which phase; by default that of the trace file given, else "static" if there is one.

        Returns
        -------
        Recording

        Raises
        ------
        RecordingError
            A file is missing, truncated, corrupt, outside the layout, not a regular file, or larger than the limit of
            `open_npz()`; the message names it, the array and the value.
        FileNotFoundError
            `path` does not exist.
        OSError
            A file cannot be opened or read; it is named.
        ValueError
            `phase` is neither "static" nor "dyn", or contradicts `path`.
        ImportError
            A file is `.zst` and this machine has no reader for it.
        """
        root, phase = _locate(Path(check_path("path", path, "a recording")), phase)
        phases = tuple(p for p in PHASES if find_npz(root / f"{p}_trace.npz"))
        phase = _choose_phase(root, phases, phase)
        meta = _Meta(root / META)
        trace = _read_trace(root, phase)
        recording = cls(path=root, phase=phase, phases=phases, pkru=meta.key_register("pkru") if phase == "static" else 0,
                        pkrs=meta.key_register("pkrs") if phase == "static" else 0,
                        **meta.fields(), **trace, **_read_tables(root, phase, trace["pidx"].size))
        object.__setattr__(recording, "_whole", True)
        return recording

    def check(self) -> None:
        """Raise RecordingError unless every number by which a replay indexes is within its bounds.

        `open()` has checked that and more; a Recording that `dataclasses.replace()` made has not been checked.
        """
        if getattr(self, "_whole", False):
            return
        columns = {"ctx": self.ctx, **{name: getattr(self, name) for name in ("pidx", "off", "kind", "size", "priv")},
                   **{f"page_{name}": getattr(self, f"pages_{name}") for name in ("gva", "gpa", "ctx", "io")}}
        for prefix, group in (("ev", self.events), ("pf", self.faults), ("npf", self.npt_faults), ("w", self.writes)):
            columns |= {f"{prefix}_{name}": array for name, array in group._asdict().items()}
        _schema.check_bounds(self.path, columns)

    def __len__(self) -> int:
        """Count the accesses."""
        return self.pidx.size

    def __repr__(self) -> str:
        return f"<Recording {self.name} {self.phase}: {len(self)} accesses, mode {self.mode}>"

    def columns(self, start: int = 0, stop: int | None = None) -> Arrays:
        """Decode the accesses `start` to `stop` (as in a slice) into plain columns.

        Returns
        -------
        dict of str to ndarray
            `gva` and `gpa` uint64 (bytes), `kind`, `size`, `priv` and `io` uint8, `ctx` uint32; one row per access.
        """
        rows = _slice(start, stop)
        pidx = self.pidx[rows]
        off = self.off[rows]
        return {"gva": self.pages_gva[pidx] + off, "gpa": self.pages_gpa[pidx] + off, "kind": self.kind[rows],
                "size": self.size[rows], "priv": self.priv[rows], "io": self.pages_io[pidx],
                "ctx": self.pages_ctx[pidx]}

    def access_bytes(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Give the access byte of kvmmu for the accesses `start` to `stop` (as in a slice).

        Returns
        -------
        ndarray of uint8
            WRITE 2 for a store, FETCH 16 for a fetch; USER 4 for a user access, AC 8 where SMAP does not apply.
        """
        rows = _slice(start, stop)
        access: NDArray[np.uint8] = ACCESS_OF_KIND[self.kind[rows]] | ACCESS_OF_PRIV[self.priv[rows]]
        return access

    def gva2gpa(self) -> Arrays:
        """Read QEMU's `gva2gpa` answers at the stop point: `gva` and `gpa` uint64 (bytes), `mapped` uint8."""
        return _read_answers(self.path, "gva2gpa.npz", _schema.GVA2GPA)

    def info_tlb(self) -> Arrays:
        """Read QEMU's `info tlb` at the stop point: `gva` and `gpa` uint64 (bytes), `flags` uint16 of the leaf entry.

        Bits of `flags`: 0 NX, 1 G, 2 entry bit 7, 3 D, 4 A, 5 PCD, 6 PWT, 7 U, 8 W.
        """
        return _read_answers(self.path, "info_tlb.npz", _schema.INFO_TLB)

    def kvm_translate(self) -> Arrays:
        """Read the KVM_TRANSLATE answers for the nested guest: `gva` and `gpa` uint64 (bytes), `valid` uint8."""
        return _read_answers(self.path, "kvm_translate.npz", _schema.KVM_TRANSLATE)


def _slice(start: int, stop: int | None) -> slice:
    last = (1 << 63) - 1
    return slice(check_int("start", start, -last, last), None if stop is None else check_int("stop", stop, -last, last))


def bundled(name: str = "recording") -> Path:
    """Return where data that ships inside the package lies.

    Parameters
    ----------
    name : {"recording", "lackey"}
        The directory of a recording of a Linux guest, or a trace by Valgrind's lackey of `sort`.
    """
    import importlib.resources
    check_name("name", name, _BUNDLED)
    return Path(str(importlib.resources.files("kvmmu"))) / "data" / _BUNDLED[name]


def recording_files(path: StrPath) -> list[Path]:
    """Return the files of a recording that are there, those included that no phase reads. IN path: as for `Recording.open()`."""
    path = Path(path)
    root = path if path.is_dir() else path.parent
    return all_there(root / name for name in (META, *(f"{stem}.npz{zst}" for stem in ARCHIVES for zst in ("", ".zst"))))


def _locate(path: Path, phase: str | None) -> tuple[Path, str | None]:
    """Return the directory of the recording, and the phase asked for by argument or by the name of a trace file."""
    if phase not in (None, *PHASES):
        raise ValueError(f"phase must be one of {PHASES}, not {phase!r}")
    if path.is_dir():
        return path, phase
    if find_npz(path) is None:
        raise no_such_trace(path, "recording")
    kind = kind_of(path.stat().st_mode) if path.exists() else None
    if kind is not None:
        raise RecordingError(f"{path}: is {kind}; allowed is a directory or {_TRACE_FILES}")
    named = path.name.split("_trace.npz")[0]
    if named not in PHASES:
        raise RecordingError(f"{path}: neither a directory nor {_TRACE_FILES}")
    if phase not in (None, named):
        raise ValueError(f"{path}: is the {named} phase, and phase {phase!r} was asked for")
    return path.parent, named


def _choose_phase(root: Path, phases: tuple[str, ...], phase: str | None) -> str:
    if not phases:
        raise RecordingError(f"{root}: not a recording: it holds no {_TRACE_FILES}")
    if phase is not None and phase not in phases:
        raise RecordingError(f"{root}: no phase {phase!r}; available is {', '.join(phases)}")
    return phase or phases[0]


def _load(root: Path, name: str, schema: dict[str, _schema.Column]) -> tuple[Path, Arrays]:
    """Open the archive `name` of the recording; return the file that was read and its arrays of the schema."""
    file = find_npz(root / name)
    if file is None:
        raise RecordingError(f"{root / name}: missing, also with .zst appended")
    return file, open_npz(file, schema.keys(), lambda headers: _schema.Checker(file, headers, schema))


def _read_trace(root: Path, phase: str) -> dict[str, Any]:
    file, arrays = _load(root, f"{phase}_trace.npz", _schema.TRACE)
    _schema.check_trace(file, arrays)
    return {
        "ctx": arrays["ctx"],
        **{f"pages_{name}": arrays[f"page_{name}"] for name in ("gva", "gpa", "ctx", "io")},
        **{name: arrays[name] for name in ("pidx", "off", "kind", "size", "priv")},
        "events": Events(*(arrays[f"ev_{name}"] for name in Events._fields)),
        "faults": Faults(*(arrays[f"pf_{name}"] for name in Faults._fields)),
        "npt_faults": NptFaults(*(arrays[f"npf_{name}"] for name in NptFaults._fields)),
    }


def _read_tables(root: Path, phase: str, accesses: int) -> dict[str, Any]:
    schema = _schema.TABLES if phase == "static" else _schema.TABLES | _schema.WRITES
    file, arrays = _load(root, "tables.npz" if phase == "static" else "dyn_tables.npz", schema)
    _schema.check_tables(file, arrays)
    if phase == "static":
        writes = Writes(*(np.empty(0, np.uint64) for _ in Writes._fields))
    else:
        _schema.check_writes(file, arrays, accesses)
        writes = Writes(*(arrays[f"w_{name}"] for name in Writes._fields))
    return {"table_pfn": arrays["pfn"], "table_level": arrays["level"], "table_data": arrays["data"], "writes": writes}


def _read_answers(root: Path, name: str, schema: dict[str, _schema.Column]) -> Arrays:
    file, arrays = _load(root, name, schema)
    _schema.check_answers(file, arrays, schema)
    return {column: arrays[column] for column in schema}


class _Meta:
    """`meta.json`, checked: what the reader needs of it, as numbers."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with open_regular(file, RecordingError) as source:
                content = source.read(_META_BYTES + 1)
        except FileNotFoundError:
            raise RecordingError(f"{file}: missing; every recording has one") from None
        if len(content) > _META_BYTES:
            raise RecordingError(f"{file}: is longer than {_META_BYTES} bytes, which is all that is allowed")
        import json
        try:
            self._values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RecordingError(f"{file}: not JSON ({error})") from error
        if not isinstance(self._values, dict):
            raise RecordingError(f"{file}: is a {type(self._values).__name__}; allowed is an object")

    def _number(self, values: dict[str, Any], key: str) -> int:
        """Return the integer under `key`: JSON number or hexadecimal string."""
        value = values.get(key)
        try:
            number = int(value, 16) if isinstance(value, str) else value
        except ValueError:
            number = None
        if type(number) is not int or not 0 <= number < 1 << 64:
            raise RecordingError(f"{self._file}: {key}: is {value!r}; allowed is a 64-bit number or hexadecimal string")
        return number

    def key_register(self, name: str) -> int:
        """PKRU or PKRS of the workload; 0 where nothing tells it."""
        key = f"{name}_workload"
        value = 0 if self._values.get(key) is None else self._number(self._values, key)
        if value >> 32:
            raise RecordingError(f"{self._file}: {key}: is {value:#x}; allowed is a number of 32 bits")
        return value

    @property
    def _vmcb(self) -> dict[str, int] | None:
        vmcb = self._values.get("vmcb")
        if vmcb is not None and not isinstance(vmcb, dict):
            raise RecordingError(f"{self._file}: vmcb: is {vmcb!r}; allowed is an object")
        return vmcb and {key: self._number(vmcb, key) for key in vmcb}

    @property
    def _mode(self) -> str:
        mode = self._values.get("mode")
        if mode not in MODES:
            raise RecordingError(f"{self._file}: mode: is {mode!r}; allowed is one of {MODES}")
        return str(mode)

    @property
    def _maxphyaddr(self) -> int:
        stated = re.search(r"\bphys-bits=(\d{1,2})\b", str(self._values.get("cpu", "")))
        bits = int(stated[1]) if stated else QEMU_TCG_MAXPHYADDR
        if bits not in MAXPHYADDR:
            raise RecordingError(f"{self._file}: cpu: phys-bits is {bits}; allowed is {MAXPHYADDR[0]} to {MAXPHYADDR[-1]}")
        return bits

    def fields(self) -> dict[str, Any]:
        """Return the attributes of a Recording that come from here."""
        vmcb = self._vmcb
        return {"name": str(self._values.get("scenario", self._file.parent.name)), "meta": self._values,
                "mode": self._mode, "nested": vmcb is not None, "maxphyaddr": self._maxphyaddr, "vmcb": vmcb,
                "registers": {name: self._number(self._values, name) for name in REGISTERS}}
