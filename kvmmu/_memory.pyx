"""GuestMemory: memslots over the guest-physical address space."""

from bisect import bisect_right

import numpy as np

from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport GPA_LIMIT, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from kvmmu._memory cimport guest_mem, guest_page, guest_slot, hash_gfn

# Beyond so many pages outside the largest slot (64 MiB of index) look-ups search the slot table instead.
cdef size_t MAX_INDEXED_PAGES = 1 << 20
cdef int ENTRY_ALIGNMENT = 8


cdef const guest_slot *find_slot(const guest_mem *mem, uint64_t gpa) noexcept nogil:
    """The slot of gpa, other than slots[0]; NULL in a hole."""
    cdef uint64_t gfn = gpa >> PAGE_SHIFT
    cdef uint64_t h
    cdef size_t low = 1, high = mem.count, middle
    if mem.pages is not NULL:
        h = hash_gfn(gfn) & mem.page_mask
        while mem.pages[h].slot is not NULL:
            if mem.pages[h].gfn == gfn:
                return mem.pages[h].slot
            h = (h + 1) & mem.page_mask
        return NULL
    while low < high:
        middle = (low + high) // 2
        if mem.slots[middle].gpa <= gpa:
            low = middle + 1
        else:
            high = middle
    if low == 1 or gpa - mem.slots[low - 1].gpa >= mem.slots[low - 1].size:
        return NULL
    return &mem.slots[low - 1]


cdef class SlotTable:
    def __cinit__(self, list regions):
        """regions: _Region objects, ascending by gpa; at least one."""
        cdef size_t i, total = 0, capacity = 1
        cdef uint64_t page, h
        cdef size_t count = len(regions)
        largest = max(regions, key=lambda region: region.size)
        ordered = [largest] + [region for region in regions if region is not largest]
        self.slots = <guest_slot *>calloc(count, sizeof(guest_slot))
        if self.slots is NULL:
            raise MemoryError
        for i, region in enumerate(ordered):
            self.slots[i].gpa = region.gpa
            self.slots[i].size = region.size
            self.slots[i].hva = <uint8_t *><uintptr_t>region.address
            self.slots[i].readonly = region.readonly
            if i:
                total += <size_t>(self.slots[i].size >> PAGE_SHIFT)
        self.mem.slots = self.slots
        self.mem.count = count
        if count == 1 or total > MAX_INDEXED_PAGES:
            return
        while capacity < 2 * total:
            capacity *= 2
        self.pages = <guest_page *>calloc(capacity, sizeof(guest_page))
        if self.pages is NULL:
            raise MemoryError
        self.mem.pages = self.pages
        self.mem.page_mask = capacity - 1
        for i in range(1, count):
            for page in range(self.slots[i].gpa >> PAGE_SHIFT, (self.slots[i].gpa + self.slots[i].size) >> PAGE_SHIFT):
                h = hash_gfn(page) & self.mem.page_mask
                while self.pages[h].slot is not NULL:
                    h = (h + 1) & self.mem.page_mask
                self.pages[h].gfn = page
                self.pages[h].slot = &self.slots[i]

    def __dealloc__(self):
        free(self.slots)
        free(self.pages)


class _Region:
    """One memslot as Python sees it: its place, its bytes (a uint8 array over the caller's buffer) and its rights."""

    __slots__ = ("address", "data", "gpa", "readonly", "size")

    def __init__(self, gpa, data, readonly):
        self.gpa = gpa
        self.data = data
        self.size = data.size
        self.readonly = readonly or not data.flags.writeable
        self.address = data.ctypes.data

    @property
    def end(self):
        return self.gpa + self.size

    def __repr__(self):
        return f"[{self.gpa:#x}, {self.end:#x}){' read-only' if self.readonly else ''}"


def _as_bytes(size_or_buffer):
    """A C-contiguous uint8 array: zeroed of the given size, or over the buffer without a copy."""
    if isinstance(size_or_buffer, (int, np.integer)):
        size = int(size_or_buffer)
        _check_size(size, "size")
        return np.zeros(size, np.uint8)
    try:
        view = memoryview(size_or_buffer)
    except TypeError:
        raise TypeError(
            f"want a size in bytes or an object with the buffer protocol, got {type(size_or_buffer).__name__}") from None
    if not view.c_contiguous:
        raise ValueError("the buffer of a slot must be C-contiguous; numpy.ascontiguousarray() makes a copy that is")
    _check_size(view.nbytes, "the buffer's size")
    data = np.frombuffer(view, np.uint8)
    if data.flags.writeable and data.ctypes.data % ENTRY_ALIGNMENT:
        raise ValueError(
            f"a writable buffer must be {ENTRY_ALIGNMENT}-byte aligned for atomic A/D updates, this one starts at "
            f"{data.ctypes.data:#x}; pass it read-only (memoryview.toreadonly()) or copy it")
    return data


def _check_size(size, what):
    if size <= 0 or size & PAGE_OFFSET_MASK:
        raise ValueError(f"{what} is {size:#x} bytes, want a positive multiple of {PAGE_SIZE:#x}")


def _check_range(gpa, size):
    if gpa < 0 or gpa & PAGE_OFFSET_MASK:
        raise ValueError(f"gpa {gpa:#x} is not a multiple of {PAGE_SIZE:#x}")
    if gpa + size > GPA_LIMIT:
        raise ValueError(f"a slot at {gpa:#x} of {size:#x} bytes ends beyond 52 bits ({GPA_LIMIT:#x})")


cdef class GuestMemory:
    """Guest-physical memory: a small table of slots; everything else is a hole.

    Parameters
    ----------
    size_or_buffer : int or buffer
        One slot at GPA 0: that many zeroed bytes, or the caller's buffer without a copy (a read-only buffer makes a
        read-only slot). A multiple of 4096 bytes, contiguous; writable buffers 8-byte aligned.

    Raises
    ------
    ValueError
        A size that is not a positive multiple of 4096, or a buffer that is not contiguous or not aligned.
    TypeError
        Neither a size nor a buffer.

    Notes
    -----
    Little-endian hosts only. A hole reads as zero, which is a not-present entry in every format. Walks that run in other
    threads while a slot is added finish on the slots that they started with.
    """

    def __init__(self, size_or_buffer):
        data = _as_bytes(size_or_buffer)
        _check_range(0, data.size)
        self.regions = []
        self._install([_Region(0, data, False)])

    cdef _install(self, list regions):
        regions = sorted(self.regions + regions, key=lambda region: region.gpa)
        for lower, upper in zip(regions, regions[1:]):
            if lower.end > upper.gpa:
                raise ValueError(f"slots overlap: {lower} and {upper}")
        self._set(regions)

    cdef _set(self, list regions):
        self.table = SlotTable(regions)
        self.regions = regions
        self.starts = [region.gpa for region in regions]

    @classmethod
    def from_pages(cls, gpas, pages):
        """Memory of single pages; all else is hole.

        Parameters
        ----------
        gpas : array_like of uint64, shape (n,)
            Page-aligned guest-physical addresses (bytes), each once, n >= 1.
        pages : ndarray of uint8, shape (n, 4096), or uint64, shape (n, 512)
            Their contents; copied.

        Returns
        -------
        GuestMemory

        Raises
        ------
        ValueError
            Wrong shapes or dtypes, an address that is unaligned, repeated or beyond 52 bits.
        """
        gpas = np.asarray(gpas)
        pages = np.asarray(pages)
        if gpas.ndim != 1 or gpas.size == 0 or gpas.dtype.kind not in "ui":
            raise ValueError(f"gpas: want integers of shape (n,), n >= 1, got {gpas.dtype} {gpas.shape}")
        if (pages.dtype, pages.shape) not in ((np.uint8, (gpas.size, 4096)), (np.uint64, (gpas.size, 512))):
            raise ValueError(
                f"pages: want uint8 ({gpas.size}, 4096) or uint64 ({gpas.size}, 512), got {pages.dtype} {pages.shape}")
        order = np.argsort(gpas, kind="stable")
        gpas = gpas[order]
        data = np.ascontiguousarray(pages[order]).reshape(-1).view(np.uint8)
        breaks = np.flatnonzero(np.diff(gpas.astype(np.uint64)) != PAGE_SIZE) + 1
        regions = []
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), gpas.size]):
            gpa = int(gpas[start])
            _check_range(gpa, (stop - start) * PAGE_SIZE)
            regions.append(_Region(gpa, data[start * PAGE_SIZE:stop * PAGE_SIZE], False))
        cdef GuestMemory self = cls.__new__(cls)
        self.regions = []
        self._install(regions)
        return self

    @classmethod
    def from_slots(cls, slots):
        """Memory of several slots, made at once.

        Parameters
        ----------
        slots : iterable of (int, int or buffer)
            For each, its first guest-physical address and what `add_slot()` takes there; at least one.

        Returns
        -------
        GuestMemory

        Raises
        ------
        ValueError
            No slot, or one that `add_slot()` would refuse.
        """
        regions = []
        for gpa, size_or_buffer in slots:
            data = _as_bytes(size_or_buffer)
            gpa = int(gpa)
            _check_range(gpa, data.size)
            regions.append(_Region(gpa, data, False))
        if not regions:
            raise ValueError("slots: want at least one")
        cdef GuestMemory self = cls.__new__(cls)
        self.regions = []
        self._install(regions)
        return self

    def add_slot(self, gpa, size_or_buffer, readonly=False):
        """Add a slot.

        Parameters
        ----------
        gpa : int
            First guest-physical address (bytes), page-aligned.
        size_or_buffer : int or buffer
            As for the constructor.
        readonly : bool
            The guest cannot write here: A/D updates of tables in it are skipped. `write()` still can if the buffer is
            writable.

        Raises
        ------
        ValueError
            Unaligned, beyond 52 bits, or overlapping another slot.
        """
        data = _as_bytes(size_or_buffer)
        gpa = int(gpa)
        _check_range(gpa, data.size)
        self._install([_Region(gpa, data, bool(readonly))])

    def remove_slot(self, gpa):
        """Remove the slot at gpa.

        Returns
        -------
        ndarray of uint8
            Its bytes: the caller's buffer, or what was zeroed for it; `add_slot()` takes it again.

        Raises
        ------
        ValueError
            No slot begins there, or it is the last one.
        """
        gone = [region for region in self.regions if region.gpa == gpa]
        if not gone:
            raise ValueError(f"no slot begins at gpa {gpa:#x}; there are {', '.join(map(str, self.regions))}")
        if len(self.regions) == 1:
            raise ValueError(f"the slot {gone[0]} is the last one: memory without slots is none")
        self._set([region for region in self.regions if region is not gone[0]])
        return gone[0].data

    @property
    def slots(self):
        """List of (gpa, size in bytes, readonly), ascending."""
        return [(region.gpa, region.size, region.readonly) for region in self.regions]

    def _pieces(self, gpa, size):
        """(offset into the request, the uint8 array there, or None for a hole) for [gpa, gpa + size)."""
        if gpa < 0 or size < 0 or gpa + size > GPA_LIMIT:
            raise ValueError(f"{size} ({size:#x}) bytes at gpa {gpa:#x} are not within 52 bits of guest-physical address")
        at = gpa
        first = max(bisect_right(self.starts, gpa) - 1, 0)
        for region in self.regions[first:bisect_right(self.starts, gpa + size)]:
            if region.end <= at or region.gpa >= gpa + size:
                continue
            if region.gpa > at:
                yield at - gpa, region.gpa - at, None
                at = region.gpa
            stop = min(region.end, gpa + size)
            yield at - gpa, stop - at, region.data[at - region.gpa:stop - region.gpa]
            at = stop
        if at < gpa + size:
            yield at - gpa, gpa + size - at, None

    def read(self, gpa, n):
        """The n bytes at gpa; holes read as zero."""
        pieces = list(self._pieces(int(gpa), n))
        out = bytearray(n)
        for offset, length, data in pieces:
            if data is not None:
                out[offset:offset + length] = data.tobytes()
        return bytes(out)

    def is_backed(self, gpa, n=1):
        """Whether all n bytes at gpa lie in slots."""
        return all(data is not None for _, _, data in self._pieces(int(gpa), n))

    def write(self, gpa, data):
        """Write bytes as the host does, read-only slots included; all or nothing.

        Raises
        ------
        ValueError
            Part of the range is a hole, or lies over a buffer that is itself read-only.
        """
        view = np.frombuffer(data, np.uint8)
        pieces = list(self._pieces(int(gpa), view.size))
        for offset, length, target in pieces:
            if target is None:
                raise ValueError(f"write to a hole: [{gpa + offset:#x}, {gpa + offset + length:#x}) has no slot")
            if not target.flags.writeable:
                raise ValueError(f"the buffer of the slot at {gpa + offset:#x} is read-only")
        for offset, length, target in pieces:
            target[:] = view[offset:offset + length]

    def read_u64(self, gpa):
        """The little-endian 64-bit word at gpa; 0 in a hole."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u64(self, gpa, value):
        """Write a little-endian 64-bit word; errors as `write()`."""
        if not 0 <= value < 1 << 64:
            raise ValueError(f"value: want 64 bits, got {value:#x}")
        self.write(gpa, int(value).to_bytes(8, "little"))

    def __repr__(self):
        total = sum(region.size for region in self.regions)
        return f"GuestMemory({len(self.regions)} slot{'s' if len(self.regions) != 1 else ''}, {total:#x} bytes)"
