"""GuestMemory: memslots over the guest-physical address space."""

import numpy as np

from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_SHIFT, PAGE_SIZE
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport (
    NEVER_SEEN, NO_TABLE, guest_mem, guest_page, guest_slot, hash_gfn, kvmmu_lock, kvmmu_unlock, missing_pages,
)

from kvmmu.arch.arguments import (
    check_bool, check_bytes, check_gpa, check_int, check_integers, check_length, check_pages, check_word, refuse_masked,
)
from kvmmu.memory._mapping import new_bytes, put_pages
from kvmmu.memory._regions import _Region, _Regions, _regions_of
from kvmmu.memory.saved_bytes import copies_of

# Beyond so many pages outside the largest slot (64 MiB of index) look-ups search the slot table instead.
cdef size_t MAX_INDEXED_PAGES = 1 << 20
cdef uint64_t last_number = NEVER_SEEN          # of slot tables
_callback_memory = None                         # CallbackMemory, told by its module: the package loads both
_NAMED = 8                                      # slots that a message lists


cdef void note_missing(missing_pages *missing, uint64_t gfn) noexcept nogil:
    """Note a page that callbacks are to be asked for."""
    cdef uint64_t *grown
    cdef size_t i, h, capacity
    if gfn >= missing.limit:
        return
    kvmmu_lock(&missing.lock)
    if 2 * missing.count >= missing.capacity:
        capacity = max(<size_t>256, 2 * missing.capacity)
        grown = <uint64_t *>calloc(capacity, sizeof(uint64_t))
        if grown is NULL:
            missing.failed = True
            kvmmu_unlock(&missing.lock)
            return
        for i in range(missing.capacity):
            if missing.gfns[i]:
                h = hash_gfn(missing.gfns[i]) & (capacity - 1)
                while grown[h]:
                    h = (h + 1) & (capacity - 1)
                grown[h] = missing.gfns[i]
        free(missing.gfns)
        missing.gfns, missing.capacity = grown, capacity
    h = hash_gfn(gfn + 1) & (missing.capacity - 1)
    while missing.gfns[h] and missing.gfns[h] != gfn + 1:
        h = (h + 1) & (missing.capacity - 1)
    missing.count += missing.gfns[h] == 0
    missing.gfns[h] = gfn + 1
    kvmmu_unlock(&missing.lock)


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
        if mem.missing is not NULL:
            note_missing(mem.missing, gfn)
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
    def __cinit__(self, mark=None, regions=None, *args):
        """regions: list of _Region objects, ascending by gpa."""
        global last_number
        cdef size_t i, total = 0, capacity = 1
        cdef uint64_t page, h
        check_maker(mark, "a SlotTable is made by a GuestMemory")
        cdef size_t count = len(regions)
        self.regions = regions
        self.slots = <guest_slot *>calloc(max(count, <size_t>1), sizeof(guest_slot))
        if self.slots is NULL:
            raise MemoryError
        largest = max(regions, key=_size_of, default=None)
        ordered = regions and [largest] + [region for region in regions if region is not largest]
        for i, region in enumerate(ordered):
            self.slots[i].gpa = region.gpa
            self.slots[i].size = region.size
            self.slots[i].hva = <uint8_t *><uintptr_t>region.address
            self.slots[i].readonly = region.readonly
            if i:
                total += <size_t>(self.slots[i].size >> PAGE_SHIFT)
        self.mem.slots = self.slots
        self.mem.count = max(count, <size_t>1)              # none: one without bytes
        last_number += 1
        self.number = last_number
        if count <= 1 or total > MAX_INDEXED_PAGES:
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


def use_callback_memory(kind):
    """Let `GuestMemory.from_callbacks()` make objects of this class."""
    global _callback_memory
    _callback_memory = kind


def _size_of(region):
    return region.size


cdef bytes read_bytes(GuestMemory mem, gpa, n):
    """The n bytes at gpa, both checked."""
    pieces = list(mem._pieces(gpa, n))
    try:
        out = bytearray(n)
    except MemoryError:
        raise MemoryError(f"n: there is no memory for {n:#x} bytes") from None
    for offset, length, data in pieces:
        if data is not None:
            out[offset:offset + length] = data.tobytes()
    return bytes(out)


cdef class GuestMemory:
    """Guest-physical memory: a small table of slots; everything else is a hole.

    Parameters
    ----------
    size_or_buffer : int or buffer
        One slot at GPA 0: that many zeroed bytes, whole pages, or the caller's buffer without a copy (a read-only buffer makes
        a read-only slot). Contiguous; writable buffers 8-byte aligned. Of a buffer that ends within a page, that page is a slot
        of its own: a copy, with zeros behind.

    Raises
    ------
    ValueError
        A size that is not a positive multiple of 4096, or a buffer that is empty, not contiguous or not aligned.
    TypeError
        Neither a size nor a buffer.

    Notes
    -----
    Little-endian hosts only. A hole reads as zero, which is a not-present entry in every format. Walks that run in other
    threads while a slot is added or removed finish on the slots that they started with.

    The memory exports its buffers: a bytearray cannot be resized, an mmap not closed, before `remove_slot()` and the end of
    the walks that read it. What no export holds off is undefined: a file under an mmap that somebody truncates ends the
    process (SIGBUS) when a walk or `read()` comes to the missing part, and `ndarray.resize(refcheck=False)` frees bytes that
    are in use.
    """

    def __cinit__(self, *args, **kwargs):
        self.regions = _Regions()

    def __init__(self, size_or_buffer):
        regions = _Regions()
        for region in _regions_of(0, size_or_buffer, False):
            regions.add(region)
        self.regions = regions
        self.forget_table()

    cdef SlotTable current(self):
        cdef SlotTable table
        cdef uint64_t changes
        while self.table is None:
            if not self.regions.count and not self.empty:
                raise RuntimeError("this GuestMemory has no slots: a subclass with an __init__() of its own has to call "
                                   "super().__init__()")
            changes = self.changes
            table = SlotTable.__new__(SlotTable, maker(), list(self.regions))
            if changes == self.changes:         # else somebody changed slots while Python collected garbage
                self.table, self.number = table, table.number
        return self.table

    cdef SlotTable walked(self):
        return self.current()

    cdef bint fetch_missing(self, SlotTable table) except -1:
        return False

    cdef int keep(self, bint on) except -1:
        return 0

    cdef int forget_table(self) except -1:
        """Slots have changed. Whoever walks the table that was keeps it."""
        self.changes += 1
        self.table, self.number = None, NO_TABLE
        return 0

    def __reduce__(self):
        raise TypeError("a GuestMemory cannot be copied or pickled: the bytes of its slots are its caller's; "
                        "its method copy() makes another one, with bytes of its own")

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
        gpas = check_integers("gpas", gpas, 0, GPA_LIMIT - PAGE_SIZE)
        refuse_masked("pages", pages)
        pages = np.asarray(pages)
        if gpas.ndim != 1 or gpas.size == 0:
            raise ValueError(f"gpas: want integers of shape (n,), n >= 1, got shape {gpas.shape}")
        if (pages.dtype, pages.shape) not in ((np.uint8, (gpas.size, 4096)), (np.uint64, (gpas.size, 512))):
            raise ValueError(
                f"pages: want uint8 ({gpas.size}, 4096) or uint64 ({gpas.size}, 512), got {pages.dtype} {pages.shape}")
        order = np.argsort(gpas, kind="stable")
        gpas = gpas[order]
        places = np.empty(gpas.size, np.uint64)
        places[order] = np.arange(gpas.size, dtype=np.uint64)
        data = new_bytes(gpas.size * PAGE_SIZE)
        put_pages(data, places, np.ascontiguousarray(pages).view(np.uint8))     # pages of zeros take no memory
        breaks = np.flatnonzero(np.diff(gpas) != PAGE_SIZE) + 1
        regions = _Regions()
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), gpas.size]):
            gpa = check_pages("gpas", int(gpas[start]))
            part = data[start * PAGE_SIZE:stop * PAGE_SIZE]
            regions.add(_Region(gpa, part, memoryview(part), False))
        cdef GuestMemory self = cls.__new__(cls)
        self.regions = regions
        return self

    @classmethod
    def from_slots(cls, slots):
        """Memory of several slots, made at once.

        Parameters
        ----------
        slots : iterable of (int, int or buffer)
            For each, its first guest-physical address and what `add_slot()` takes there; none: all of it is a hole.

        Returns
        -------
        GuestMemory

        Raises
        ------
        ValueError
            One that `add_slot()` would refuse.
        """
        cdef GuestMemory self = cls.__new__(cls)
        for gpa, size_or_buffer in slots:
            self.add_slot(gpa, size_or_buffer)
        self.empty = not self.regions.count
        return self

    @classmethod
    def from_callbacks(cls, read, write=None, *, size=None, cache_pages=1 << 16):
        """Memory whose pages are asked for when they are needed: of a live target, or of what has to be unpacked.

        Parameters
        ----------
        read : function
            read(gpas) with page-aligned addresses, ascending, uint64 (n,): returns their bytes, uint8 (n, 4096), uint64 (n, 512)
            or bytes. A batch collects what it misses and asks once for each level of the tables.
        write : function, optional
            write(gpas, pages) stores pages, uint8 (n, 4096), a copy. Without it the memory is read-only: walks set no A/D bits.
            With it they are set in pages that are kept. It is given the pages that walks have changed by `flush()`, and in one
            call before a walk, `read()` or `write()` that finds too many pages kept and forgets them.
        size : int, optional
            Bytes from 0 on that are memory, whole pages; what lies beyond is hole. By default all 52 bits.
        cache_pages : int
            Pages that are kept for later calls; one call may keep more while it runs, and a few always stay.

        Returns
        -------
        GuestMemory
            For walks, `read()`, `write()`, and `drop_cached()` after the target has changed. A machine, a replay or a page-table
            builder refuses it: these read and write the bytes of slots where they lie, for as long as they run, and an SPTE
            stands for such a place. Pages behind callbacks have none of their own, and go when too many are kept.

        Notes
        -----
        What a callback raises comes to the caller, with a note. A callback that uses the memory that it serves gets a
        RuntimeError. Other threads wait while one is in a callback; the child of a fork() in such a moment gets a RuntimeError.

        With a write callback each page takes twice its size: what walks have changed is told by comparison. Bits that a walk in
        another thread sets while pages are forgotten may be lost.
        """
        return _callback_memory(read, write, size=size, cache_pages=cache_pages)

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
        gpa = check_pages("gpa", gpa, 0, GPA_LIMIT - PAGE_SIZE)
        readonly = check_bool("readonly", readonly)
        added = []
        try:
            for region in _regions_of(gpa, size_or_buffer, readonly):
                self.regions.add(region)
                added.append(region)
        except BaseException:
            for region in added:
                self.regions.remove(region)
            raise
        self.forget_table()

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
        gpa = check_gpa("gpa", gpa)
        region = self.regions.find(gpa)
        if region is None:
            slots = [str(region) for region, _ in zip(self.regions, range(_NAMED))]
            if self.regions.count > _NAMED:
                slots.append(f"{self.regions.count - _NAMED} more")
            raise ValueError(f"no slot begins at gpa {gpa:#x}; there are {', '.join(slots)}")
        if self.regions.count == 1:
            raise ValueError(f"the slot {region} is the last one: memory without slots is none")
        self.regions.remove(region)
        self.forget_table()
        return region.data

    @property
    def slots(self):
        """List of (gpa, size in bytes, readonly), ascending."""
        return [(region.gpa, region.size, region.readonly) for region in self.regions]

    def _pieces(self, gpa, size):
        """(offset into the request, the uint8 array there, or None for a hole) for [gpa, gpa + size)."""
        at = gpa
        for region in self.regions.following(gpa):
            if region.gpa >= gpa + size:
                break
            if region.end <= at:
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
        gpa = check_gpa("gpa", gpa)
        return read_bytes(self, gpa, check_length("n", n, gpa))

    def drop_cached(self):
        """Forget the pages that were read by callbacks: the next look asks for them anew, as after the target ran.

        Accessed and dirty bits that walks have set since the last `flush()` are forgotten, too.

        Raises
        ------
        ValueError
            This is no memory of callbacks.
        """
        raise ValueError("memory of slots keeps no copies; only that of from_callbacks() does")

    def flush(self):
        """Give the pages in which walks have set accessed and dirty bits to the write callback.

        Raises
        ------
        ValueError
            There is no write callback, or no callback at all.
        """
        raise ValueError("memory of slots keeps no copies; only that of from_callbacks() does")

    def copy(self):
        """Return another memory with the same slots, whose bytes are its own from now on.

        Returns
        -------
        GuestMemory

        Raises
        ------
        ValueError
            This is memory of callbacks: its bytes are the target's.

        Notes
        -----
        Copy-on-write as far as it goes. A copy of memory over an image, or of what `copy()` returned, maps the same file and
        takes the pages that were changed since. The first copy of other memory takes its pages that were ever written, or all of
        a caller's own buffer. A file that its owner mapped read-only is shared. Who writes meanwhile may be copied in part.
        """
        cdef GuestMemory copy = GuestMemory.__new__(GuestMemory)
        regions = list(self.regions)
        if not regions:
            self.current()                      # raises unless it is empty on purpose
        for region, data in zip(regions, copies_of([region.data for region in regions])):
            copy.regions.add(_Region(region.gpa, data, memoryview(data), region.readonly))
        copy.empty = self.empty
        return copy

    def is_backed(self, gpa, n=1):
        """True if all n bytes at gpa lie in slots."""
        gpa = check_gpa("gpa", gpa)
        return all(data is not None for _, _, data in self._pieces(gpa, check_length("n", n, gpa)))

    def write(self, gpa, data):
        """Write bytes as the host does, read-only slots included; all or nothing.

        Raises
        ------
        ValueError
            Part of the range is a hole, or lies over a buffer that is itself read-only.
        """
        gpa = check_gpa("gpa", gpa)
        view = check_bytes("data", data)
        check_length("data", view.size, gpa)
        pieces = list(self._pieces(gpa, view.size))
        for offset, length, target in pieces:
            if target is None:
                raise ValueError(f"write to a hole: [{gpa + offset:#x}, {gpa + offset + length:#x}) has no slot")
            if not target.flags.writeable:
                raise ValueError(f"the buffer of the slot at {gpa + offset:#x} is read-only")
        for offset, length, target in pieces:
            target[:] = view[offset:offset + length]

    def read_u64(self, gpa):
        """The little-endian 64-bit word at gpa; 0 in a hole."""
        return int.from_bytes(read_bytes(self, check_int("gpa", gpa, 0, GPA_LIMIT - 8), 8), "little")

    def write_u64(self, gpa, value):
        """Write a little-endian 64-bit word; errors as `write()`."""
        self.write(check_int("gpa", gpa, 0, GPA_LIMIT - 8), check_word("value", value).to_bytes(8, "little"))

    def __repr__(self):
        total = sum(region.size for region in self.regions)
        return f"GuestMemory({self.regions.count} slot{'s' if self.regions.count != 1 else ''}, {total:#x} bytes)"
