"""Guest memory behind callbacks: of a live target, or of a file that has to be unpacked.

Walks over such memory see the pages that are there, and note those that are missing (`find_slot()` in `_memory.pyx`). Whoever
walked then has all of them fetched by one call, and repeats what failed, until nothing is missing.
"""

import threading

import numpy as np

from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE
from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._maker cimport maker
from kvmmu.memory._memory cimport GuestMemory, SlotTable, guest_page, guest_slot, hash_gfn, kvmmu_lock, kvmmu_unlock

from kvmmu.arch.arguments import check_bytes, check_gpa, check_int, check_length, check_pages, check_word, refuse_masked
from kvmmu.memory._memory import use_callback_memory

cdef size_t FIRST_PAGES = 256
_MOST_PAGES = 1 << 32
_FEW = 16                           # pages that read() keeps
cdef size_t LEAST_KEPT = 64         # more than any walk of one address reads: it cannot lose its own pages again and again
_INNER_USE = "a callback of a GuestMemory used the memory that it serves"
_AT_ONCE = 1 << 16                  # pages that read() and write() ask for by one call


cdef class CachedPages(SlotTable):
    def __cinit__(self, mark=None, regions=None, size_t capacity=0, uint64_t limit=0, bint readonly=True, *args):
        cdef size_t indexed = 1
        while indexed < 2 * capacity:
            indexed *= 2
        free(self.slots)                            # of the base class: one without bytes, as slots[0] here
        self.mem.slots = self.slots = <guest_slot *>calloc(capacity + 2, sizeof(guest_slot))
        self.mem.pages = self.pages = <guest_page *>calloc(indexed, sizeof(guest_page))
        self.given = <uint8_t **>calloc(capacity + 1, sizeof(uint8_t *))
        if self.slots is NULL or self.pages is NULL or self.given is NULL:
            raise MemoryError
        self.mem.count, self.mem.page_mask = 2, indexed - 1     # 2: find_slot() is asked
        self.mem.missing = &self.misses
        self.misses.limit = limit >> PAGE_SHIFT
        self.capacity, self.readonly, self.chunks = capacity, readonly, []

    def __dealloc__(self):
        free(self.misses.gfns)
        free(self.given)

    cdef bint has(self, uint64_t gfn):
        cdef size_t h = hash_gfn(gfn) & self.mem.page_mask
        while self.pages[h].slot is not NULL:
            if self.pages[h].gfn == gfn:
                return True
            h = (h + 1) & self.mem.page_mask
        return False

    cdef int add(self, uint64_t gfn, uint8_t *address, uint8_t *given) except -1:
        """Add a page that it does not have. Walks see all of it, or nothing."""
        if self.count >= self.capacity:
            raise RuntimeError(f"a table of {self.capacity} pages is full")
        cdef size_t h = hash_gfn(gfn) & self.mem.page_mask
        cdef guest_slot *slot = &self.slots[1 + self.count]
        slot.gpa, slot.size, slot.readonly = gfn << PAGE_SHIFT, PAGE_SIZE, self.readonly
        slot.hva = address
        self.given[self.count] = given
        while self.pages[h].slot is not NULL:
            h = (h + 1) & self.mem.page_mask
        self.pages[h].gfn = gfn
        publish_slot(&self.pages[h].slot, slot)
        self.count += 1
        return 0


cdef extern from * nogil:
    """
    #define publish_slot(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)
    """
    void publish_slot(const guest_slot **place, const guest_slot *value)


cdef class CallbackMemory(GuestMemory):
    """Memory behind callbacks, made by `GuestMemory.from_callbacks()`."""

    def __cinit__(self, *args, **kwargs):
        self.lock, self.here = MachineLock(), threading.local()

    def __init__(self, read, write=None, *, size=None, cache_pages=1 << 16):
        for name, callback in (("read", read), ("write", write)):
            if not callable(callback) and not (name == "write" and callback is None):
                raise TypeError(f"{name}: want a function, got {type(callback).__name__}")
        bytes_of_it = GPA_LIMIT if size is None else check_pages("size", size)
        kept = check_int("cache_pages", cache_pages, 1, _MOST_PAGES)
        with _Locked(self, False):
            self.size, self.cache_pages = bytes_of_it, kept
            self.reader, self.writer = read, write
            self.begin_anew()

    def drop_cached(self):
        """Forget every page that was read: the next look asks for it anew, as after the target ran.

        Accessed and dirty bits that walks have set since the last `flush()` are forgotten, too.
        """
        with _Locked(self):
            self.begin_anew()

    cdef int begin_anew(self) except -1:
        """Use an empty table. The lock is held."""
        return self.use(CachedPages.__new__(CachedPages, maker(), [], FIRST_PAGES, self.size, self.writer is None))

    cdef int use(self, CachedPages cached) except -1:
        self.cached = cached
        self.number = cached.number
        return 0

    cdef int check_made(self) except -1:
        if self.cached is None:
            raise RuntimeError("this GuestMemory has no callbacks: a subclass with an __init__() of its own has to call "
                               "super().__init__()")
        return 0

    cdef SlotTable current(self):
        raise ValueError("mem: memory of callbacks can be walked, read and written; machines, replays and page-table builders "
                         "need slots: GuestMemory(size), from_pages(), add_slot()")

    cdef SlotTable walked(self):
        self.check_made()
        if self.busy and self.lock.owner == <unsigned long>threading.get_ident():
            raise RuntimeError(_INNER_USE)
        trim(self)
        self.here.takes = self.takes
        return self.cached

    cdef int keep(self, bint on) except -1:
        self.kept += 1 if on else -1
        return 0

    # ---- pages that are missing ----------------------------------------------------------------------------------------

    cdef bint fetch_missing(self, SlotTable table) except -1:
        cdef CachedPages cached = <CachedPages>table
        cdef size_t i
        cdef list gfns = []
        if not cached.misses.count and not cached.misses.failed:
            if self.takes == getattr(self.here, "takes", None):
                return False
            with _Locked(self):                     # another thread took what this walk missed, and has it now
                return True
        kvmmu_lock(&cached.misses.lock)             # nobody waits for the GIL while he holds it
        for i in range(cached.misses.capacity):
            if cached.misses.gfns[i]:
                gfns.append(cached.misses.gfns[i] - 1)
        if cached.misses.gfns is not NULL:
            memset(cached.misses.gfns, 0, cached.misses.capacity * sizeof(uint64_t))
        cached.misses.count = 0
        self.takes += 1
        failed, cached.misses.failed = cached.misses.failed, False
        kvmmu_unlock(&cached.misses.lock)
        if failed and not gfns:
            raise MemoryError("there is no memory to note missing pages")
        self.fetch(np.sort(np.array(gfns, np.uint64)))
        return True

    def fetch(self, gfns):
        """Ask for frames, but for those that are there."""
        gfns = np.unique(np.asarray(gfns, np.uint64))
        with _Locked(self):
            self.get(gfns[gfns < (self.size >> PAGE_SHIFT)])

    cdef int get(self, gfns) except -1:
        """Ask for frames below the size, each once, but for those that are there. The lock is held."""
        wanted = [gfn for gfn in gfns.tolist() if not self.cached.has(gfn)]
        if wanted:
            numbers = np.array(wanted, np.uint64)
            self.take(numbers, self.ask(numbers))
        return 0

    cdef object ask(self, gfns):
        """The pages behind frames, as uint8 (n, 4096). The lock is held."""
        n = gfns.size
        try:
            pages = self.reader(gfns << np.uint64(PAGE_SHIFT))
        except Exception as error:
            error.add_note(f"in read() of a GuestMemory, asked for {n} pages from gpa {int(gfns[0]) << PAGE_SHIFT:#x} on")
            raise
        return _pages_of(pages, n)

    cdef int take(self, gfns, pages) except -1:
        """Keep pages that are not kept. The lock is held."""
        cdef CachedPages old, grown
        cdef uint8_t *address
        cdef uint8_t *given
        cdef size_t i, n = gfns.size, capacity
        own = np.array(pages, np.uint8, order="C", copy=True)
        same = own if self.writer is None else own.copy()       # of memory that nobody changes
        if own.ctypes.data % sizeof(uint64_t):
            raise MemoryError("an array that is not aligned")
        address, given = <uint8_t *><uintptr_t>own.ctypes.data, <uint8_t *><uintptr_t>same.ctypes.data
        numbers = gfns.tolist()
        old = self.cached
        capacity = old.capacity
        if old.count + n > capacity:
            while old.count + n > capacity:
                capacity *= 2
            grown = CachedPages.__new__(CachedPages, maker(), [], capacity, self.size, self.writer is None)
            for i in range(old.count):
                grown.add(old.slots[1 + i].gpa >> PAGE_SHIFT, old.slots[1 + i].hva, old.given[i])
            grown.chunks = list(old.chunks)
            self.use(grown)
        self.cached.chunks.append((own, same))
        for i in range(n):
            self.cached.add(numbers[i], address + i * PAGE_SIZE, given + i * PAGE_SIZE)
        return 0

    # ---- bytes ---------------------------------------------------------------------------------------------------------

    @property
    def slots(self):
        """List of (gpa, size in bytes, readonly): one, of all that callbacks are asked for; none of size 0."""
        return [(0, int(self.size), self.writer is None)] if self.size else []

    def add_slot(self, gpa, size_or_buffer, readonly=False):
        """Refused: all of this memory lies behind callbacks."""
        raise ValueError("gpa: memory of callbacks has no slots of its own")

    def remove_slot(self, gpa):
        """Refused likewise."""
        raise ValueError("gpa: memory of callbacks has no slots of its own")

    def copy(self):
        """Refused: the bytes are the target's, and the callbacks those of one memory."""
        raise ValueError("memory of callbacks has no bytes of its own that could be copied; read() what is wanted, and make "
                         "memory of it with from_pages()")

    def is_backed(self, gpa, n=1):
        """True if all n bytes at gpa lie below its size."""
        gpa = check_gpa("gpa", gpa)
        return gpa + check_length("n", n, gpa) <= self.size

    def read(self, gpa, n):
        """The n bytes at gpa, from pages that are kept and by callbacks; beyond its size they are zero."""
        gpa = check_gpa("gpa", gpa)
        n = check_length("n", n, gpa)
        self.check_made()
        end = min(gpa + n, int(self.size))
        try:
            out = bytearray(n)
        except MemoryError:
            raise MemoryError(f"n: there is no memory for {n:#x} bytes") from None
        first = gpa >> PAGE_SHIFT
        while first << PAGE_SHIFT < end:
            count = min(_AT_ONCE, (end - (first << PAGE_SHIFT) + PAGE_SIZE - 1) >> PAGE_SHIFT)
            data = self.pages_of(first, count).reshape(-1)
            start, stop = max(gpa, first << PAGE_SHIFT), min(end, (first + count) << PAGE_SHIFT)
            out[start - gpa:stop - gpa] = data[start - (first << PAGE_SHIFT):stop - (first << PAGE_SHIFT)].tobytes()
            first += count
        return bytes(out)

    def pages_of(self, first, count):
        """The bytes of frames; those that are not kept are asked for, and kept if they are few."""
        trim(self)
        with _Locked(self):
            return self.copies_of(np.arange(first, first + count, dtype=np.uint64))

    cdef object copies_of(self, numbers):
        """The bytes of frames. The lock is held."""
        cdef size_t i, count = numbers.size
        if count <= _FEW:
            self.get(numbers)
        pages = np.empty((count, PAGE_SIZE), np.uint8)
        missing = np.ones(count, bool)
        for i, gfn in enumerate(numbers.tolist()):
            missing[i] = not copy_page(self.cached, gfn, pages[i])
        if missing.any():
            pages[missing] = self.ask(numbers[missing])
        return pages

    def write(self, gpa, data):
        """Write bytes by the callback, and to the pages that are kept.

        Raises
        ------
        ValueError
            There is no write callback, or part of the range lies beyond the size.
        """
        gpa = check_gpa("gpa", gpa)
        view = check_bytes("data", data)
        end = gpa + check_length("data", view.size, gpa)
        self.check_made()
        if self.writer is None:
            raise ValueError("data: memory without a write callback is read-only")
        if end > self.size:
            raise ValueError(f"write to a hole: memory ends at {int(self.size):#x}")
        first = gpa & ~PAGE_OFFSET_MASK
        while first < end:
            count = min(_AT_ONCE, (end - first + PAGE_SIZE - 1) >> PAGE_SHIFT)
            start, stop = max(gpa, first), min(end, first + count * PAGE_SIZE)
            trim(self)
            with _Locked(self):
                numbers = np.arange(first >> PAGE_SHIFT, (first >> PAGE_SHIFT) + count, dtype=np.uint64)
                pages = self.copies_of(numbers)
                pages.reshape(-1)[start - first:stop - first] = view[start - gpa:stop - gpa]
                self.put_pages(numbers, pages)
                for i, gfn in enumerate(numbers.tolist()):
                    at = first + i * PAGE_SIZE
                    put_bytes(self.cached, gfn, pages[i], max(start - at, 0), min(stop - at, <int>PAGE_SIZE))
            first += count * PAGE_SIZE

    cdef int put_pages(self, gfns, pages) except -1:
        """Give copies of whole pages to the callback, and note that it has them. The lock is held."""
        try:
            self.writer(gfns << np.uint64(PAGE_SHIFT), pages.copy())
        except Exception as error:
            error.add_note(f"in write() of a GuestMemory, given {gfns.size} pages from gpa {int(gfns[0]) << PAGE_SHIFT:#x} on")
            raise
        for i, gfn in enumerate(gfns.tolist()):
            note_given(self.cached, gfn, pages[i])
        return 0

    cdef int put_changed(self) except -1:
        """Give the pages that walks have changed to the callback. The lock is held."""
        gfns = np.sort(changed_frames(self.cached))
        for start in range(0, gfns.size, _AT_ONCE):
            part = gfns[start:start + _AT_ONCE]
            pages = np.empty((part.size, PAGE_SIZE), np.uint8)
            for i, gfn in enumerate(part.tolist()):
                copy_page(self.cached, gfn, pages[i])
            self.put_pages(part, pages)
        return 0

    def flush(self):
        """Give the pages that walks have set accessed and dirty bits in to the write callback.

        Raises
        ------
        ValueError
            There is no write callback.
        """
        self.check_made()
        if self.writer is None:
            raise ValueError("write: memory without a write callback is read-only")
        with _Locked(self):
            self.put_changed()

    def read_u64(self, gpa):
        """The little-endian 64-bit word at gpa; 0 beyond its size."""
        return int.from_bytes(self.read(check_int("gpa", gpa, 0, GPA_LIMIT - 8), 8), "little")

    def write_u64(self, gpa, value):
        """Write a little-endian 64-bit word; errors as `write()`."""
        self.write(check_int("gpa", gpa, 0, GPA_LIMIT - 8), check_word("value", value).to_bytes(8, "little"))

    def __repr__(self):
        if self.cached is None:
            return "GuestMemory(callbacks, not initialized)"
        return f"GuestMemory(callbacks, {int(self.size):#x} bytes, {self.cached.count} pages kept)"


cdef bint is_full(CallbackMemory mem) except -1:
    mem.check_made()
    return not mem.kept and mem.cached.count > max(mem.cache_pages, LEAST_KEPT)


cdef int trim(CallbackMemory mem) except -1:
    """Begin anew where more pages are kept than shall be, unless a batch that needs them is under way.

    Pages that walks have changed go to the write callback before; all of them stay if it fails.
    """
    if is_full(mem):
        with _Locked(mem):
            if is_full(mem):                    # else another thread did it
                if mem.writer is not None:
                    mem.put_changed()
                mem.begin_anew()
    return 0


class _Locked:
    """The lock of a memory, for all that changes what is kept, callbacks included; it cannot be taken twice."""

    __slots__ = ("made", "mem")

    def __init__(self, CallbackMemory mem, made=True):
        self.mem, self.made = mem, made

    def __enter__(self):
        cdef CallbackMemory mem = self.mem
        if self.made:
            mem.check_made()
        try:
            mem.lock.acquire()
        except RuntimeError:
            if not mem.lock.torn:
                raise
            raise RuntimeError("this memory was in a callback of another thread when the process was forked; make a new one "
                               "here, or fork while no thread uses it") from None
        if mem.busy:
            mem.lock.release()
            raise RuntimeError(_INNER_USE)
        mem.busy = True

    def __exit__(self, *exception):
        cdef CallbackMemory mem = self.mem
        mem.busy = False
        mem.lock.release()


def _pages_of(pages, n):
    """Return what read() returned, as uint8 (n, 4096)."""
    want = f"read: want {n} pages of {PAGE_SIZE} bytes"
    if pages is None or isinstance(pages, str):
        raise TypeError(f"{want}, got {type(pages).__name__}")
    refuse_masked("read", pages)
    try:
        array = np.asarray(pages) if isinstance(pages, np.ndarray) else np.frombuffer(pages, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise TypeError(f"{want}, got {type(pages).__name__}") from None
    if array.dtype != np.uint8 and array.dtype != np.uint64:
        raise ValueError(f"{want}, got dtype {array.dtype}")
    if array.nbytes != n * PAGE_SIZE or (array.ndim > 1 and array.shape[0] != n):
        raise ValueError(f"{want}, got shape {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(n, PAGE_SIZE)


cdef guest_slot *kept_slot(CachedPages cached, uint64_t gfn) noexcept:
    cdef size_t h = hash_gfn(gfn) & cached.mem.page_mask
    while cached.pages[h].slot is not NULL:
        if cached.pages[h].gfn == gfn:
            return <guest_slot *>cached.pages[h].slot
        h = (h + 1) & cached.mem.page_mask
    return NULL


cdef bint copy_page(CachedPages cached, uint64_t gfn, uint8_t[::1] out) except -1:
    """Copy a page that is kept; False if it is not."""
    cdef guest_slot *slot = kept_slot(cached, gfn)
    cdef size_t i
    if slot is NULL:
        return False
    for i in range(PAGE_SIZE):
        out[i] = slot.hva[i]
    return True


cdef int put_bytes(CachedPages cached, uint64_t gfn, const uint8_t[::1] data, size_t start, size_t stop) except -1:
    """Store the bytes [start, stop) of a page, if it is kept. Other bytes stay: walks may have changed them meanwhile."""
    cdef guest_slot *slot = kept_slot(cached, gfn)
    cdef size_t i
    if slot is not NULL:
        for i in range(start, stop):
            slot.hva[i] = data[i]
    return 0


cdef int note_given(CachedPages cached, uint64_t gfn, const uint8_t[::1] data) except -1:
    """Note what the target has of a page, if it is kept."""
    cdef guest_slot *slot = kept_slot(cached, gfn)
    if slot is not NULL:
        memcpy(cached.given[slot - cached.slots - 1], &data[0], PAGE_SIZE)
    return 0


cdef object changed_frames(CachedPages cached):
    """The frames whose bytes are not those that the target has."""
    return np.array([cached.slots[1 + i].gpa >> PAGE_SHIFT for i in range(cached.count)
                     if memcmp(cached.slots[1 + i].hva, cached.given[i], PAGE_SIZE)], np.uint64)


use_callback_memory(CallbackMemory)
