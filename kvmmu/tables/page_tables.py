"""PageTables: guest page tables and second stages, made to order."""

from collections.abc import Callable
from typing import Any, Literal, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch._bits import EPTP_AD, EPTP_LEVEL_SHIFT, EPTP_MT_WB, PAGE_SIZE, PT64_PKEY, Cr0, Cr4, Efer, EptPte, Pte
from kvmmu.arch.arguments import check_bool, check_name, check_word
from kvmmu.arch.registers import RegisterValues, Regs
from kvmmu.arch.second_stages import Ept, Npt
from kvmmu.memory._lock import MachineLock
from kvmmu.memory._memory import GuestMemory
from kvmmu.tables._builder import STATUS_NAMES, TableBuilder
from kvmmu.tables._page_set import PageSet
from kvmmu.tables.frames import FrameList, FrameSource, frame_source
from kvmmu.tables.layout import Frames, Page, plan_tables
from kvmmu.tables.modes import FORMAT_32, FORMAT_EPT, MODES, Mode
from kvmmu.tables.rows import Flag, Rows, either_mask, entry_mask, gpa_bits, key_bits

__all__ = ["Mode", "PageTables"]

_FRAMES_AT_ONCE = 256                   # that are asked for


_LEGACY_FLAGS: dict[str, int] = {
    "write": Pte.WRITABLE, "user": Pte.USER, "global_": Pte.GLOBAL, "accessed": Pte.ACCESSED, "dirty": Pte.DIRTY}
_EPT_FLAGS: dict[str, int] = {"write": EptPte.WRITABLE, "accessed": EptPte.ACCESSED, "dirty": EptPte.DIRTY}


class PageTables:
    """Page tables in guest memory, written by the host, the VMM or the guest itself.

    Parameters
    ----------
    mem : GuestMemory
        Where the tables lie.
    mode : {"32", "pae", "4l", "5l", "ept", "ept5"}
        Format and levels. The first four are guest page tables, and NPTs of a host in that mode.
    frames : range, sequence of int, or an object with `take(n)` and `give(frames)`; optional
        Frames for tables, as guest-physical addresses (bytes). By default `FreeFrames(mem)`: pages of the memory that hold zeros,
        from its end downwards. A frame is cleared when a table is made in it.
    writer : {"host", "vmm", "guest"}
        Whose stores they are: "host" changes memory and nobody learns of it; "vmm" is `vm.host_write()`; "guest" is
        `vcpu.store()`, so that the entries of shadowed tables are tracked and shadow paging pays for them.
    vm : Vm, optional
        For "vmm".
    vcpu : Vcpu, optional
        For "guest". Its registers at the time must let it write the tables.
    direct_map : int
        For "guest": the linear address at which the guest has mapped guest-physical address 0.

    Attributes
    ----------
    mem, mode

    Raises
    ------
    ValueError
        An argument that is none of the above.
    MemoryError
        There is no frame for the root.

    Notes
    -----
    Threads may change the same tables: a call waits until that of another thread has ended.

    Examples
    --------
    >>> mem = GuestMemory(1 << 20)
    >>> tables = PageTables(mem)
    >>> tables.map(0xFFFF800000000000, 0x4000, write=False)
    >>> vcpu = Vcpu(mem)
    >>> vcpu.set_regs(tables.regs())
    """

    @classmethod
    def for_addresses(cls, mem: GuestMemory | None, gva: ArrayLike | PageSet, page: Page = "4k", frames: Frames = "linear",
                      seed: int = 0, *, mode: Mode = "4l", thp_share: float = 0.5) -> Self:
        """Make tables that map every address of a trace.

        Parameters
        ----------
        mem : GuestMemory or None
            Its largest slot takes the pages from the beginning and the tables from the end. None: a new memory with room for
            the tables alone; the pages lie behind it, where a walk reaches them and a host has none.
        gva : array of integers, or PageSet
            Linear addresses (bytes) in any order, as often as they come.
        page : {"4k", "2m", "1g", "thp"}
            Size of the pages. "thp": 2M where at least `thp_share` of the 4K pages of a 2M region are touched, else 4K.
            Under mode "32" large pages are 4M.
        frames : {"linear", "random"}
            Pages of a size lie in the order of their addresses, or shuffled.
        seed : int
            For "random".
        mode : {"32", "pae", "4l", "5l", "ept", "ept5"}
            As for the constructor.
        thp_share : float
            More than 0, at most 1.

        Raises
        ------
        ValueError
            An address that the mode cannot map, or memory that is too small; the message says what is needed.
        """
        plan = plan_tables(mem, gva, page, frames, seed, mode, thp_share)
        made = cls(plan.mem, mode, frames=plan.source)
        for size, addr in plan.pages.items():
            made.map(addr, plan.frames[size], size)
        return made

    def __init__(self, mem: GuestMemory, mode: Mode = "4l", *, frames: FrameSource | FrameList | None = None,
                 writer: Literal["host", "vmm", "guest"] = "host", vm: Any = None, vcpu: Any = None, direct_map: int = 0) -> None:
        if not isinstance(mem, GuestMemory):
            raise TypeError(f"mem: want a GuestMemory, got {type(mem).__name__}")
        check_name("mode", mode, MODES)
        self.mem, self.mode = mem, mode
        self._shape = shape = MODES[mode]
        self._store = _store_function(writer, vm, vcpu, direct_map)
        self._frames = frame_source(frames, mem, shape.below)
        self._lock = MachineLock()                      # of the tables, not of a machine
        self._own: set[int] = set()
        self._at_once = _FRAMES_AT_ONCE
        self._builder = self._make_builder(self._store is not None)
        self._supply()
        self._finish(*self._settle(0, self._builder.make_root()), "the root")

    def _make_builder(self, keeps_stores: bool) -> TableBuilder:
        shape = self._shape
        return TableBuilder(self.mem, shape.format, shape.levels, max(shape.sizes.values()), shape.fixed_level, keeps_stores)

    # ---- what they are -------------------------------------------------------------------------------------------------

    @property
    def root(self) -> int:
        """CR3, EPTP or nested CR3: the value that selects these tables."""
        if self._shape.format != FORMAT_EPT:
            return self._builder.root
        return self._builder.root | EPTP_MT_WB | (self._shape.levels - 1) << EPTP_LEVEL_SHIFT | EPTP_AD

    @property
    def table_frames(self) -> list[int]:
        """Guest-physical addresses of all tables, ascending."""
        return sorted(self._own)

    def regs(self, **over: Unpack[RegisterValues]) -> Regs:
        """Return registers that walk these tables: paging on, CR0.WP set, XD in use where entries have it.

        Parameters
        ----------
        **over
            Fields of `Regs` that are to be different.

        Raises
        ------
        ValueError
            These are tables of EPT.
        """
        if self._shape.format == FORMAT_EPT:
            raise ValueError(f"mode {self.mode!r} is a second stage: want second_stage()")
        efer = Efer(0) if self.mode == "32" else Efer.NX if self.mode == "pae" else Efer.LME | Efer.LMA | Efer.NX
        cr4 = {"32": Cr4.PSE, "5l": Cr4.PAE | Cr4.LA57}.get(self.mode, Cr4.PAE)
        values: dict[str, Any] = {"cr0": int(Cr0.PE | Cr0.WP | Cr0.PG), "cr3": self.root, "cr4": int(cr4), "efer": int(efer)}
        return Regs(**{**values, **over})

    def second_stage(self, **over: Any) -> Ept | Npt:
        """Return these tables as a second stage: an `Ept`, or of the other modes an `Npt` of a host in that mode.

        Parameters
        ----------
        **over
            Fields of `Ept` or `Npt` that are to be different.
        """
        if self._shape.format == FORMAT_EPT:
            return Ept(**{"eptp": self.root} | over)
        regs = self.regs()
        return Npt(**{"ncr3": self.root, "cr4": regs.cr4, "efer": regs.efer} | over)

    def __repr__(self) -> str:
        return f"PageTables({self.mode!r}, root {self.root:#x}, {len(self._own)} tables)"

    # ---- pages ---------------------------------------------------------------------------------------------------------

    def map(self, gva: int | ArrayLike, gpa: int | ArrayLike, size: int | ArrayLike = PAGE_SIZE, *, write: Flag = True,
            user: Flag = True, exec: Flag = True, pkey: int | ArrayLike = 0, global_: Flag = False, accessed: Flag = False,
            dirty: Flag = False) -> None:
        """Map pages; scalars, or arrays of one length, of which each row is a page.

        Parameters
        ----------
        gva : int or array of integers, shape (n,)
            Linear addresses (bytes), of EPT guest-physical ones; multiples of size.
        gpa : int or array of integers, shape (n,)
            Where the pages lie (bytes); multiples of size.
        size : int or array of integers, shape (n,)
            4096, and by mode 2 MiB ("32": 4 MiB) and 1 GiB ("4l", "5l", "ept", "ept5").
        write, user, exec : bool or array of bool, shape (n,)
            Rights. In EPT every page can be read, and user together with exec is execution in user mode (MBEC).
        pkey : int or array of integers, shape (n,)
            Protection key, "4l" and "5l".
        global_, accessed, dirty : bool or array of bool, shape (n,)
            Flags of the entry.

        Raises
        ------
        ValueError
            An address that is unaligned, not canonical or too wide; a size or flag that the mode has not. Nothing was mapped.
        MemoryError
            No frames are left for tables. Earlier rows are mapped.

        Notes
        -----
        Entries of tables grant every right, so that those of a page are its own. A mapping that is in the way is replaced: a
        larger page is split, tables under a larger new page are released.
        """
        rows = Rows(self._shape, gva, size)
        target = rows.addresses("gpa", gpa, gpa_bits(self._shape, rows))
        bits = self._page_bits(rows, exec, pkey, {"write": write, "user": user, "global_": global_, "accessed": accessed,
                                                  "dirty": dirty})
        self._run(lambda start: self._builder.map_rows(rows.gva, target, rows.level, bits, start), rows)

    def unmap(self, gva: int | ArrayLike, size: int | ArrayLike = PAGE_SIZE) -> None:
        """Remove the mappings of pages; scalars or arrays as for `map()`.

        Parameters
        ----------
        gva, size
            Whatever maps the range of a row goes: a larger page is split and the rest of it stays, smaller pages go with their
            tables. Tables that are empty then are released. A range without a mapping is none the worse.

        Raises
        ------
        ValueError, MemoryError
            As `map()`; a split needs a frame.
        """
        rows = Rows(self._shape, gva, size)
        self._run(lambda start: self._builder.unmap_rows(rows.gva, rows.level, start), rows)

    def protect(self, gva: int | ArrayLike, size: int | ArrayLike = PAGE_SIZE, *, write: bool | None = None,
                user: bool | None = None, exec: bool | None = None, pkey: int | None = None, global_: bool | None = None,
                accessed: bool | None = None, dirty: bool | None = None) -> None:
        """Change rights and flags of pages that are mapped; what is None stays.

        Parameters
        ----------
        gva, size
            Pages, as for `map()`. A larger page is split.
        write, user, exec, pkey, global_, accessed, dirty
            As for `map()`, for all rows.

        Raises
        ------
        ValueError
            As `map()`, or a row that is not mapped, or mapped by smaller pages; rows before it are changed.
        """
        rows = Rows(self._shape, gva, size)
        clear, bits = self._change_bits(exec, user, pkey, {"write": write, "user": user, "global_": global_,
                                                           "accessed": accessed, "dirty": dirty})
        self._run(lambda start: self._builder.protect_rows(rows.gva, rows.level, clear, bits, start), rows)

    # ---- bits of entries -----------------------------------------------------------------------------------------------

    def _page_bits(self, rows: Rows, exec_: Flag, pkey: int | ArrayLike, flags: dict[str, Flag]) -> NDArray[np.uint64]:
        """The entries of pages without their addresses: one row, or one per page."""
        self._check_flags(exec_, pkey, flags)
        ept = self._shape.format == FORMAT_EPT
        bits = np.full(1, EptPte.READABLE | EptPte.WB if ept else Pte.PRESENT, np.uint64)
        for name, mask in (_EPT_FLAGS if ept else _LEGACY_FLAGS).items():
            bits = bits | either_mask(rows, name, flags[name], mask, 0)
        if ept:
            bits = bits | either_mask(rows, "exec", exec_, EptPte.EXECUTABLE, 0)
            bits = bits | (either_mask(rows, "user", flags["user"], EptPte.USER_EXECUTABLE, 0) & either_mask(
                rows, "exec", exec_, EptPte.USER_EXECUTABLE, 0))
        else:
            bits = bits | either_mask(rows, "exec", exec_, 0, Pte.NX) | key_bits(rows, pkey)
        return np.ascontiguousarray(bits)

    def _change_bits(self, exec_: bool | None, user: bool | None, pkey: int | None, flags: dict[str, bool | None]
                     ) -> tuple[int, int]:
        """(bits to clear, bits to set) of a change of rights."""
        for name, flag in (flags | {"exec": exec_, "user": user}).items():
            if flag is not None:
                check_bool(name, flag)
        self._check_flags(exec_, pkey, flags)
        ept = self._shape.format == FORMAT_EPT
        clear = bits = 0
        for name, mask in (_EPT_FLAGS if ept else _LEGACY_FLAGS).items():
            if flags[name] is not None:
                clear |= mask
                bits |= mask if flags[name] else 0
        if ept:
            if (exec_ is None) != (user is None):
                raise ValueError("exec, user: of EPT entries they make one right, execution in user mode; want both or neither")
            if exec_ is not None:
                clear |= EptPte.EXECUTABLE | EptPte.USER_EXECUTABLE
                bits |= (EptPte.EXECUTABLE if exec_ else 0) | (EptPte.USER_EXECUTABLE if exec_ and user else 0)
            return clear, bits
        if exec_ is not None:
            clear |= Pte.NX
            bits |= 0 if exec_ else Pte.NX
        if pkey is not None:
            clear |= PT64_PKEY
            bits |= int(key_bits(None, pkey)[0])
        return clear & entry_mask(self._shape), bits

    def _check_flags(self, exec_: Any, pkey: Any, flags: dict[str, Any]) -> None:
        """Refuse what entries of this mode cannot say."""
        if self.mode == "32" and exec_ is not None and not np.all(exec_):
            raise ValueError("exec: entries of mode '32' have no XD bit; want True")
        if self.mode not in ("4l", "5l") and pkey is not None and np.any(pkey):
            raise ValueError(f"pkey: entries of mode {self.mode!r} have no protection key; want 0")
        if self._shape.format == FORMAT_EPT and flags["global_"] is not None and np.any(flags["global_"]):
            raise ValueError("global_: entries of EPT have no global bit; want False")

    # ---- rows and frames -----------------------------------------------------------------------------------------------

    def _run(self, kernel: Callable[[int], tuple[int, int]], rows: Rows) -> None:
        """Carry out rows, with more frames whenever there are none left."""
        with self._lock:
            done = 0
            while True:
                try:
                    done, status = self._settle(*kernel(done))
                finally:
                    self._repeat_stores()
                if not self._wants_frames(status):
                    break
                if not self._supply():
                    raise MemoryError(f"no frame is left for page tables: {done} of {rows.gva.size} rows are done, "
                                      f"{int(rows.gva[done]):#x} is not; give more frames, or memory with pages of zeros")
            self._finish(done, status, f"{int(rows.gva[done]):#x}" if done < rows.gva.size else "")

    @staticmethod
    def _wants_frames(status: int) -> bool:
        return STATUS_NAMES[status] == "no frame"

    def _supply(self) -> bool:
        """Ask for frames. False: there are none."""
        frames = self._frames.take(self._at_once)
        for frame in frames:
            if not 0 <= frame < self._shape.below or frame % PAGE_SIZE:
                raise ValueError(f"frames: {frame:#x} cannot hold a table of mode {self.mode!r}; want page-aligned addresses "
                                 f"below {self._shape.below:#x}")
        self._own.update(frames)
        self._builder.supply(np.array(frames[::-1], np.uint64))
        return bool(frames)

    def _settle(self, done: int, status: int) -> tuple[int, int]:
        """Give the frames of released tables back."""
        released = [frame for frame in dict.fromkeys(self._builder.take_released()) if frame in self._own]
        self._own.difference_update(released)
        self._frames.give(released)
        return done, status

    def _finish(self, done: int, status: int, place: str) -> None:
        """Return unused frames; raise for a row that could not be carried out."""
        unused = self._builder.take_pool()
        self._own.difference_update(unused)
        self._frames.give(unused)
        name = STATUS_NAMES[status]
        if name == "no frame":
            raise MemoryError(f"no frame is left for {place}")
        if name == "no memory":
            raise MemoryError
        if name != "done":
            raise ValueError(f"{place}: {name}; {done} rows are done")

    def _repeat_stores(self) -> None:
        """Store by the writer's hand what the kernel stored."""
        if self._store is not None:
            size = 4 if self._shape.format == FORMAT_32 else 8
            for gpa, value in self._builder.take_stores(True):
                self._store(gpa, value.to_bytes(size, "little"))


def _store_function(writer: str, vm: Any, vcpu: Any, direct_map: int) -> Callable[[int, bytes], object] | None:
    """Return the function that stores bytes at a guest-physical address; None for the host, whose kernel does."""
    check_name("writer", writer, ("host", "vmm", "guest"))
    offset = check_word("direct_map", direct_map)
    if writer == "host":
        return None
    if writer == "vmm":
        if not hasattr(vm, "host_write"):
            raise TypeError(f"vm: writer 'vmm' needs a Vm, got {type(vm).__name__}")
        return lambda gpa, data: vm.host_write(gpa, data)
    if not hasattr(vcpu, "store"):
        raise TypeError(f"vcpu: writer 'guest' needs a Vcpu, got {type(vcpu).__name__}")
    return lambda gpa, data: vcpu.store((gpa + offset) % (1 << 64), data)
