"""TLB hierarchies: levels of any shape, and what a stream of accesses costs in them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch._bits import Access
from kvmmu.arch.arguments import check_bool, check_bools, check_choice, check_int, check_integers, check_name, check_word
from kvmmu.arch.files import read_regular
from kvmmu.tlb._hierarchy import TlbLevels
from kvmmu.tlb._saved import restore_levels, save_levels
from kvmmu.tlb.counters import KINDS, MODES, PAGES, Kind, PageSize, TlbStats, details_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["PAGE_LEVELS", "TlbHierarchy", "TlbLevel", "tlb_of"]

PAGE_LEVELS = {"4k": 1, "2m": 2, "1g": 3}
POLICIES = ("lru", "fifo", "plru", "random")
INCLUSIONS = ("none", "inclusive", "exclusive")
_MOST_ENTRIES, _MOST_LEVELS, _MOST_PLRU_WAYS = 1 << 24, 16, 64
_TAGS = 1 << 15
_PCID_BITS = 12


@dataclass(frozen=True)
class TlbLevel:
    """One structure of a TLB hierarchy.

    Attributes
    ----------
    name : str
    sets, ways : int
        At least 1, at most 2**24 entries. The set of a page is its number, in pages of its own size, modulo `sets`.
    policy : {"lru", "fifo", "plru", "random"}
        Which entry of a full set a new one replaces: the one used or entered the longest time ago, the one that a tree of bits
        points to (at most 64 ways), or any. "plru" and "random" take empty ways in order.
    kinds : tuple of {"load", "store", "fetch"}
        Accesses that ask this level.
    pages : tuple of {"4k", "2m", "1g"}
        Sizes of the pages that it holds.
    inclusion : {"none", "inclusive", "exclusive"}
        "inclusive": what it replaces leaves the levels before it, too. "exclusive": it takes what the level before it replaces,
        nothing else, and a hit moves the entry to the levels before it.
    """

    name: str
    sets: int
    ways: int
    policy: Literal["lru", "fifo", "plru", "random"] = "lru"
    kinds: Sequence[Kind] = KINDS
    pages: Sequence[PageSize] = PAGES
    inclusion: Literal["none", "inclusive", "exclusive"] = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: want a text of one character or more, got {self.name!r}")
        where = f"level {self.name!r}: "
        object.__setattr__(self, "sets", check_int(f"{where}sets", self.sets, 1, _MOST_ENTRIES))
        object.__setattr__(self, "ways", check_int(f"{where}ways", self.ways, 1, _MOST_ENTRIES))
        if self.sets * self.ways > _MOST_ENTRIES:
            raise ValueError(f"{where}{self.sets} sets of {self.ways} ways; at most {_MOST_ENTRIES} entries are allowed")
        check_name(f"{where}policy", self.policy, POLICIES)
        if self.policy == "plru" and self.ways > _MOST_PLRU_WAYS:
            raise ValueError(f"{where}ways: {self.ways}; policy \"plru\" has at most {_MOST_PLRU_WAYS}")
        check_name(f"{where}inclusion", self.inclusion, INCLUSIONS)
        object.__setattr__(self, "kinds", _some_of(f"{where}kinds", self.kinds, KINDS))
        object.__setattr__(self, "pages", _some_of(f"{where}pages", self.pages, PAGES))

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.sets * self.ways


def _some_of(name: str, chosen: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen ones of some names, in their order; at least one."""
    if isinstance(chosen, str):
        chosen = (chosen,)
    if not isinstance(chosen, Iterable):
        raise TypeError(f"{name}: want some of {', '.join(names)}, got {chosen!r}")
    chosen = tuple(chosen)
    for one in chosen:
        check_name(name, one, names)
    if not chosen:
        raise ValueError(f"{name}: want some of {', '.join(names)}, got none")
    return tuple(one for one in names if one in chosen)


def _bits(chosen: Sequence[str], names: tuple[str, ...]) -> int:
    return sum(1 << names.index(one) for one in chosen)


class TlbHierarchy:
    """A hierarchy of TLBs and paging-structure caches that streams of accesses go through.

    An access asks the levels that have its kind and page size, in their order. A hit fills those asked before, a page walk fills
    all of them, the lowest one first. Pages are those of the page tables: an access brings its page size along.

    Parameters
    ----------
    levels : sequence of TlbLevel
        At most 16. An exclusive level needs one before it for each of its kinds and sizes.
    psc : mapping of int to TlbLevel, optional
        Paging-structure caches by the level of the entries that they hold: 2 PDEs, 3 PDPTEs, 4 PML4Es, 5 PML5Es. A walk begins
        below the lowest cached entry of its address. Kinds, pages and inclusion do not count. Without: every walk reads all
        entries.
    seed : int
        Of "random" replacement: the same seed and the same accesses give the same counters.
    details : bool
        Keep `TlbDetails`: why levels miss, and the pages and instructions whose accesses take walks. That takes time for each
        access and memory for each page.
    curve : bool
        Keep stack distances as well: the misses of fully associative TLBs of all sizes.
    nested : TlbHierarchy, optional
        Levels and paging-structure caches for the guest-physical addresses that page walks translate under two-dimensional
        paging. Without: the host's tables are walked for each, from their root.

    Notes
    -----
    Entries are tagged with an address space (a VPID, an ASID, the number of a VM) and a PCID; global pages with the space alone.
    Invalidation is that of the SDM, vol. 3, "Operations that Invalidate TLBs and Paging-Structure Caches".
    """

    def __init__(self, levels: Sequence[TlbLevel], *, psc: Mapping[int, TlbLevel] | None = None, seed: int = 0,
                 details: bool = False, curve: bool = False, nested: "TlbHierarchy | None" = None) -> None:
        levels = tuple(levels)
        if not all(isinstance(level, TlbLevel) for level in levels):
            raise TypeError(f"levels: want TlbLevels, got {levels!r}")
        if len(levels) > _MOST_LEVELS:
            raise ValueError(f"levels: {len(levels)}; at most {_MOST_LEVELS} are allowed")
        names = [level.name for level in levels]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"levels: {names.count(name)} have the name {name!r}")
        psc = dict(psc or {})
        for number, cache in psc.items():
            check_choice("psc", number, (2, 3, 4, 5))
            if not isinstance(cache, TlbLevel):
                raise TypeError(f"psc[{number}]: want a TlbLevel, got {cache!r}")
        _check_exclusive(levels)
        self._levels, self._psc, self._seed = levels, psc, check_word("seed", seed)
        if nested is not None and not isinstance(nested, TlbHierarchy):
            raise TypeError(f"nested: want a TlbHierarchy or None, got {type(nested).__name__}")
        self._nested = nested
        details, curve = check_bool("details", details), check_bool("curve", curve)
        self._details = 2 if curve else int(details)
        self._core = TlbLevels(
            [(level.sets, level.ways, POLICIES.index(level.policy), INCLUSIONS.index(level.inclusion), _bits(level.kinds, KINDS),
              _bits(level.pages, PAGES)) for level in levels],
            {number: (cache.sets, cache.ways, POLICIES.index(cache.policy)) for number, cache in psc.items()}, self._seed,
            self._details)
        self._tags: dict[tuple[int, int], int] = {}
        self._globals: dict[int, int] = {}
        self.use()

    @property
    def levels(self) -> tuple[TlbLevel, ...]:
        """The levels, in the order in which they are asked."""
        return self._levels

    @property
    def psc(self) -> dict[int, TlbLevel]:
        """The paging-structure caches by level."""
        return dict(self._psc)

    @property
    def nested(self) -> "TlbHierarchy | None":
        """The hierarchy of guest-physical addresses, or None."""
        return self._nested

    def _nested_or_none(self) -> "TlbHierarchy":
        """Return the hierarchy of guest-physical addresses, or one that holds nothing."""
        return TlbHierarchy([]) if self._nested is None else self._nested

    def _another(self, *, details: bool | None = None, curve: bool | None = None) -> "TlbHierarchy":
        """Return an empty hierarchy of the same shape, with the same details unless they are given."""
        return TlbHierarchy(self._levels, psc=self._psc, seed=self._seed, nested=self._nested,
                            details=self._details > 0 if details is None else details,
                            curve=self._details > 1 if curve is None else curve)

    # ---- from files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Self:
        """Read a hierarchy from a TOML file: `[[level]]` tables with the fields of `TlbLevel`, `[psc.2]` and so on, `seed`.

        A file without levels is refused: a hierarchy that has none is made of `TlbHierarchy([])`.
        """
        return cls._from_text(read_regular(path), str(path))

    @classmethod
    def preset(cls, name: str) -> Self:
        """Make the hierarchy of a processor: one of `presets()`. Their files name the source of each figure."""
        check_name("name", name, cls.presets())
        return cls._from_text((_presets() / f"{name}.toml").read_bytes(), f"preset {name}")

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names of the processors whose hierarchies are known."""
        return tuple(sorted(entry.name.removesuffix(".toml") for entry in _presets().iterdir()
                            if entry.name.endswith(".toml")))

    @classmethod
    def _from_text(cls, content: bytes, where: str) -> Self:
        import tomllib

        try:
            found = tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not TOML ({error})") from error
        return cls._from_tables(found, where, ("level", "psc", "seed", "nested"))

    @classmethod
    def _from_tables(cls, found: dict[str, Any], where: str, known: tuple[str, ...]) -> Self:
        for key in found:
            check_name(f"{where}: key", key, known)
        nested = found.get("nested")
        if nested is not None:
            if not isinstance(nested, dict):
                raise ValueError(f"{where}: nested: want tables nested.level and nested.psc.N")
            nested = cls._from_tables(nested, f"{where}: nested", ("level", "psc", "seed"))
        tables, caches = found.get("level", []), found.get("psc", {})
        if not isinstance(tables, list) or not isinstance(caches, dict):
            raise ValueError(f"{where}: want [[level]] tables and [psc.N] tables")
        psc = {}
        for number, table in caches.items():
            if number not in ("2", "3", "4", "5"):
                raise ValueError(f"{where}: psc.{number}: want 2 to 5, the level of the cached entries")
            psc[int(number)] = _level_of(table, f"{where}: psc.{number}", f"psc{number}")
        if not tables:
            raise ValueError(f"{where}: has no level; want one or more [[level]] tables with name, sets and ways")
        try:
            return cls([_level_of(table, f"{where}: level {i}") for i, table in enumerate(tables)], psc=psc,
                       seed=found.get("seed", 0), nested=nested)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}".replace(f"{where}: {where}", where)) from error

    # ---- what is in force, and what is dropped --------------------------------------------------------------------------

    def use(self, space: int = 0, pcid: int = 0, mode: str = "4l") -> None:
        """Put an address space, a PCID and a paging mode ("32", "pae", "4l", "5l") in force. Nothing is dropped.

        Raises
        ------
        ValueError
            Also if these are more than 32,768 different spaces and PCIDs.
        """
        space, pcid = check_word("space", space), check_word("pcid", pcid, _PCID_BITS)
        check_name("mode", mode, MODES)
        self._core.use(self._tag(space, pcid), self._global_tag(space), *MODES[mode])
        self._space, self._pcid, self._mode = space, pcid, mode

    def mov_cr3(self, pcid: int = 0, *, keep: bool = False) -> None:
        """MOV to CR3 in the space in force: drop what is not global of the PCID, unless bit 63 of the source says to keep it."""
        keep = check_bool("keep", keep)
        self.use(self._space, pcid, self._mode)
        if not keep:
            self._core.remove_tag(self._tag(self._space, self._pcid), False)

    def invlpg(self, gva: int) -> None:
        """INVLPG: drop the page around gva, global or of the PCID in force, and the PCID's paging-structure caches."""
        gva, tag = check_word("gva", gva), self._tag(self._space, self._pcid)
        self._core.remove_address(gva, tag, False)
        self._core.remove_address(gva, self._global_tag(self._space), True)
        self._core.remove_upper(tag)

    def invpcid(self, type: int, pcid: int = 0, gva: int = 0) -> None:
        """INVPCID: 0 an address of a PCID, 1 a PCID, 2 all with global pages, 3 all without; in the space in force."""
        type = check_int("type", type, 0, 3)
        pcid, gva = check_word("pcid", pcid, _PCID_BITS), check_word("gva", gva)
        if type in (0, 1):
            tag = self._tags.get((self._space, pcid))
            if tag is None:
                return                                  # nothing was ever entered under it
            if type == 0:
                self._core.remove_address(gva, tag, False)
                self._core.remove_upper(tag)
            else:
                self._core.remove_tag(tag, False)
            return
        self._flush_space(self._space, type == 2)

    def flush_space(self, space: int) -> None:
        """Drop everything of an address space, global pages as well: INVVPID of a single context, a new ASID."""
        self._flush_space(check_word("space", space), True)

    def flush_in_force(self) -> None:
        """Drop everything of the space in force, as a MOV to CR4 does that changes PGE."""
        self._flush_space(self._space, True)

    def page_fault(self, gva: int) -> None:
        """A #PF at gva: drop the page around it, and the paging-structure entries that lead to it, of the PCID in force."""
        gva, tag = check_word("gva", gva), self._tag(self._space, self._pcid)
        self._core.remove_address(gva, tag, False)
        self._core.remove_upper_of(gva, tag)

    def flush(self) -> None:
        """Drop everything, in every space."""
        self._core.remove_all()

    def _flush_space(self, space: int, with_global: bool) -> None:
        # other threads may add some meanwhile, but for a copy, which is one step
        for (other, _), tag in self._tags.copy().items():
            if other == space:
                self._core.remove_tag(tag, False)
        if with_global and space in self._globals:
            self._core.remove_tag(self._globals[space], True)

    def _tag(self, space: int, pcid: int) -> int:
        tag = self._tags.setdefault((space, pcid), len(self._tags))
        if tag >= _TAGS:
            del self._tags[space, pcid]
            raise ValueError(f"space {space}, pcid {pcid}: more than {_TAGS} different ones; numbers that were used before "
                             "can be used again")
        return tag

    def _global_tag(self, space: int) -> int:
        return self._globals.setdefault(space, len(self._globals))      # no more than there are tags

    # ---- accesses -------------------------------------------------------------------------------------------------------

    def access(self, gva: ArrayLike, access: ArrayLike = Access.READ, level: ArrayLike = 1, *,
               is_global: ArrayLike | None = None, ip: ArrayLike | None = None,
               out: Mapping[str, NDArray[np.uint8]] | None = None) -> None:
        """Let accesses go through the hierarchy; `stats()` tells what they met.

        Parameters
        ----------
        gva : array_like of int
            Linear addresses, in the order of the accesses.
        access : int or array_like of int
            `Access` bits: WRITE, FETCH and USER count.
        level : int or array_like of int
            Level of the leaf that maps each address, 1 to 3, as `PageWalk.translate()` gives it; anything else is no page, and
            is counted as unmapped.
        is_global : array_like of bool, optional
            Whether the page is global.
        ip : array_like of int, optional
            Addresses of the instructions, for the details.
        out : mapping of str to ndarray of uint8, optional
            Columns to fill: "level", the number of the level that hit or 255 for a walk; "refs", the entries that the walk read.
        """
        rows = np.ascontiguousarray(check_integers("gva", gva, 0, (1 << 64) - 1, copy=False)).reshape(-1)
        bits, leaf = (_byte_column(name, values, rows.size) for name, values in (("access", access), ("level", level)))
        kept = None
        if is_global is not None:
            kept = np.ascontiguousarray(_flag_column(is_global, rows.size)).view(np.uint8)
        ips = None
        if ip is not None:
            ips = np.ascontiguousarray(check_integers("ip", ip, 0, (1 << 64) - 1, copy=False)).reshape(-1)
            if ips.size != rows.size:
                raise ValueError(f"ip: want {rows.size} rows, got {ips.size}")
        out = dict(out or {})
        for name, column in out.items():
            check_name("out", name, ("level", "refs"))
            if not isinstance(column, np.ndarray) or column.dtype != np.uint8 or column.shape != rows.shape or (
                    not column.flags.c_contiguous or not column.flags.writeable):
                raise ValueError(f"out[{name!r}]: want a writable contiguous array of uint8 of {rows.size} rows")
        if out:
            written = list(out.values())
            if len(written) == 2 and np.may_share_memory(written[0], written[1]):
                raise ValueError("out['level'] and out['refs'] share memory: what is written to the one changes the other")
            rows, bits, leaf, kept, ips = (_apart(column, written) for column in (rows, bits, leaf, kept, ips))
        self._core.run(rows, bits, leaf, kept, out.get("level"), out.get("refs"), ip=ips)

    def stats(self) -> TlbStats:
        """Return the counters since they were cleared."""
        found = self._core.counters()
        return TlbStats(tuple(level.name for level in self._levels), found["hits"], found["walks"], found["references"],
                        {number: int(found["psc_hits"][number - 2]) for number in sorted(self._psc)},
                        tuple(found["replaced"].tolist()), found["unmapped"], found["cached_references"],
                        details_of(self._core.details(), self._mode))

    def clear_stats(self) -> None:
        """Set all counters to 0. What the levels hold stays."""
        self._core.clear_counters()

    def _saved(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return all that was entered and counted: plain data for JSON, and arrays. What is in force is not part of it."""
        return {"tags": [list(tag) for tag in self._tags.copy()], "globals": list(self._globals)}, save_levels(self._core)

    def _restore(self, plain: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `_saved()` of a hierarchy of the same shape returned; `use()` is to be called behind it.

        Raises
        ------
        ValueError
            It is none of this shape.
        """
        tags = {(check_word("space", space), check_word("pcid", pcid, _PCID_BITS)): number
                for number, (space, pcid) in enumerate(plain["tags"])}
        spaces = {check_word("space", space): number for number, space in enumerate(plain["globals"])}
        if len(tags) != len(plain["tags"]) or len(spaces) != len(plain["globals"]) or max(len(tags), len(spaces)) > _TAGS:
            raise ValueError("tags: want different ones, and no more than there are numbers")
        restore_levels(self._core, arrays)
        self._tags, self._globals = tags, spaces

    def _made_of(self) -> dict[str, Any]:
        """Return what `_remade()` makes an empty hierarchy of the same shape of. It can be pickled."""
        return {"levels": self._levels, "psc": self._psc, "seed": self._seed, "details": self._details > 0,
                "curve": self._details > 1, "nested": None if self._nested is None else self._nested._made_of()}

    @classmethod
    def _remade(cls, made_of: dict[str, Any]) -> Self:
        nested = made_of["nested"]
        return cls(**made_of | {"nested": None if nested is None else cls._remade(nested)})

    def _shape(self) -> dict[str, Any]:
        """Return what makes two hierarchies behave alike, as plain data for JSON."""
        def plain(level: TlbLevel) -> list[Any]:
            return [level.name, level.sets, level.ways, level.policy, list(level.kinds), list(level.pages), level.inclusion]

        return {"levels": [plain(level) for level in self._levels], "seed": self._seed, "details": self._details,
                "psc": {str(number): plain(cache) for number, cache in sorted(self._psc.items())}}

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.name} {level.sets}x{level.ways}" for level in self._levels)
        return f"TlbHierarchy({levels})"

    def __reduce__(self) -> Any:
        raise TypeError("a TlbHierarchy cannot be copied or pickled; make another of the same levels")


def _presets() -> "Traversable":
    """Return the folder of the presets."""
    from importlib.resources import files  # brings tempfile and random

    return files("kvmmu") / "data" / "tlb"


def _apart(column: Any, written: list[NDArray[np.uint8]]) -> Any:
    """Return a column, or a copy if it shares memory with one that is written while it is read."""
    shared = column is not None and any(np.may_share_memory(column, other) for other in written)
    return column.copy() if shared else column


def _byte_column(name: str, values: ArrayLike, rows: int) -> NDArray[np.uint8]:
    column = np.ascontiguousarray(check_integers(name, values, 0, 255, np.uint8, copy=False)).reshape(-1)
    if column.size not in (1, rows):
        raise ValueError(f"{name}: want 1 row or {rows}, got {column.size}")
    return column


def _flag_column(values: Any, rows: int) -> NDArray[np.bool_]:
    flags = check_bools("is_global", values).reshape(-1)
    if flags.size not in (1, rows):
        raise ValueError(f"is_global: want 1 row or {rows}, got {flags.size}")
    return np.broadcast_to(flags, (rows,))


def _check_exclusive(levels: tuple[TlbLevel, ...]) -> None:
    for i, level in enumerate(levels):
        if level.inclusion != "exclusive":
            continue
        for kind in level.kinds:
            for page in level.pages:
                if not any(kind in other.kinds and page in other.pages for other in levels[:i]):
                    raise ValueError(f"level {level.name!r}: is exclusive, and no level before it has {kind} of {page} pages")


def _level_of(table: Any, where: str, name: str | None = None) -> TlbLevel:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: want a table, got {table!r}")
    if name is not None:
        table = {"name": name} | table
    known = [one.name for one in fields(TlbLevel)]
    for key in table:
        check_name(f"{where}: key", key, known)
    missing = [key for key in ("name", "sets", "ways") if key not in table]
    if missing:
        raise ValueError(f"{where}: has no {' and no '.join(missing)}")
    try:
        return TlbLevel(**table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def tlb_of(name: str, tlb: Any) -> TlbHierarchy:
    """Return the hierarchy that an argument means: one, a preset by its name, or a TOML file by its path.

    Those that are named keep details.
    """
    if isinstance(tlb, TlbHierarchy):
        return tlb
    if isinstance(tlb, str) and tlb in TlbHierarchy.presets():
        return TlbHierarchy.preset(tlb)._another(details=True)
    if isinstance(tlb, PathLike) or isinstance(tlb, str) and tlb.endswith(".toml"):
        return TlbHierarchy.from_toml(tlb)._another(details=True)
    presets = ", ".join(TlbHierarchy.presets())
    if isinstance(tlb, str):
        raise ValueError(f"{name}: want a path that ends in .toml, or one of {presets}; got {tlb!r}")
    raise TypeError(f"{name}: want a TlbHierarchy, a path, or one of {presets}; got {type(tlb).__name__}")
