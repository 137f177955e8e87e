"""PageFiller: demand paging over arrays, as a guest kernel's page-fault handler does it. `Pager` supplies the frames."""

from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from kvmmu.arch._bits cimport PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_2M, PG_LEVEL_4K, PT64_BASE_ADDR_MASK
from kvmmu.arch._gpte cimport kvmmu_is_canonical, kvmmu_level_shift
from kvmmu.memory._memory cimport SlotTable, hash_gfn
from kvmmu.tables._builder cimport TableBuilder
from kvmmu.tables._edit cimport (
    BUILD_DONE, BUILD_NO_MEMORY, builder, descend, find_page, frame_list, map_row, push_frame, read_entry,
)

cdef enum:
    FIRST_CAPACITY = 1 << 10
    NO_SMALL_FRAME = 100        # beside build_status
    NO_LARGE_FRAME = 101
    REPLACES = 102

BEFORE_PROMOTION = int(REPLACES)
OUT_OF_SMALL_FRAMES = int(NO_SMALL_FRAME)
OUT_OF_LARGE_FRAMES = int(NO_LARGE_FRAME)

# How often the pages of a region have been touched for the first time.
cdef struct region_count:
    uint64_t key                # number of the region + 1; 0: free
    uint64_t count

# Demand paging of one set of tables.
cdef struct filler:
    builder *b
    int level                   # of the pages that a fault maps
    uint64_t threshold
    int unused_bits             # of a linear address, at its upper end
    bint canonical
    uint64_t bits               # the entry of a page, without its address
    frame_list small
    frame_list large
    region_count *regions       # an open-addressing table, at most half full
    size_t region_mask
    size_t region_total
    uint64_t faults
    uint64_t small_pages
    uint64_t large_pages
    uint64_t replaced
    bint pauses                 # before a large page replaces small ones


cdef bint double_regions(filler *f) noexcept nogil:
    cdef size_t capacity = 2 * (f.region_mask + 1), i, place
    cdef region_count *regions = <region_count *>calloc(capacity, sizeof(region_count))
    if regions is NULL:
        return False
    for i in range(f.region_mask + 1):
        if f.regions[i].key:
            place = hash_gfn(f.regions[i].key) & (capacity - 1)
            while regions[place].key:
                place = (place + 1) & (capacity - 1)
            regions[place] = f.regions[i]
    free(f.regions)
    f.regions, f.region_mask = regions, capacity - 1
    return True


cdef region_count *region_of(filler *f, uint64_t addr) noexcept nogil:
    """The counter of the region of addr, which may be new; NULL: no memory."""
    cdef uint64_t key = (addr >> kvmmu_level_shift(f.b.format, PG_LEVEL_2M)) + 1
    cdef size_t place
    if 2 * f.region_total >= f.region_mask and not double_regions(f):
        return NULL
    place = hash_gfn(key) & f.region_mask
    while f.regions[place].key and f.regions[place].key != key:
        place = (place + 1) & f.region_mask
    if not f.regions[place].key:
        f.regions[place].key = key
        f.region_total += 1
    return &f.regions[place]


cdef int fill_region(filler *f, uint64_t addr, region_count *region) noexcept nogil:
    """Map the whole region of an address by one page; the frames of the small pages in it are free again."""
    cdef int shift = kvmmu_level_shift(f.b.format, PG_LEVEL_2M)
    cdef uint64_t start = addr >> shift << shift, entry, gpa = 0
    cdef uint8_t *hva = NULL
    cdef size_t i
    cdef int status
    if not f.large.count:
        return NO_LARGE_FRAME
    if descend(f.b, start, PG_LEVEL_4K, False, &hva, &gpa) == BUILD_DONE:
        for i in range(f.b.entries):
            entry = read_entry(f.b, hva + i * f.b.entry_bytes)
            if entry & f.b.present_mask:
                if not push_frame(&f.small, entry & PT64_BASE_ADDR_MASK):
                    return BUILD_NO_MEMORY
                f.small_pages -= 1
    status = map_row(f.b, start, f.large.frames[f.large.count - 1], PG_LEVEL_2M, f.bits)
    if status == BUILD_DONE:
        f.large.count -= 1
        f.large_pages += 1
        f.replaced += region.count != 0
        region.count = 0
    return status


cdef int fill(filler *f, uint64_t addr) noexcept nogil:
    """Map the page of an address that no page maps; returns a status."""
    cdef region_count *region = NULL
    cdef uint64_t step = <uint64_t>1 << kvmmu_level_shift(f.b.format, f.level)
    cdef int status
    if not f.small.count:
        return NO_SMALL_FRAME
    if f.threshold:
        region = region_of(f, addr)
        if region is NULL:
            return BUILD_NO_MEMORY
        if region.count + 1 >= f.threshold:
            return REPLACES if f.pauses and region.count else fill_region(f, addr, region)
    status = map_row(f.b, addr & ~(step - 1), f.small.frames[f.small.count - 1], f.level, f.bits)
    if status == BUILD_DONE:
        f.small.count -= 1
        f.small_pages += 1
        if region is not NULL:
            region.count += 1
    return status


cdef int touch(filler *f, uint64_t addr) noexcept nogil:
    cdef int status
    if f.canonical:
        if not kvmmu_is_canonical(addr, f.unused_bits):
            return BUILD_DONE
    else:
        addr = addr << f.unused_bits >> f.unused_bits
    if find_page(f.b, addr):
        return BUILD_DONE
    status = fill(f, addr)
    f.faults += status == BUILD_DONE
    return status


cdef class PageFiller(TableBuilder):
    """Page tables that fill as pages are touched.

    Parameters
    ----------
    mem, format, levels, large_level, fixed_level, keeps_stores
        As for `TableBuilder`.
    level : int
        Of the pages that a fault maps.
    threshold : int
        4K pages of a region of the next size that are touched before one page replaces them; 0: none ever does.
    addr_bits : int
        Width of linear addresses.
    canonical : bool
        Addresses that are not canonical are passed over; else the bits above the width do not count.
    bits : int
        The entry of a 4K page, without its address.

    Attributes
    ----------
    faults, small_pages, large_pages, replaced : int
        First touches; pages mapped now by `level`'s size and the next one; how often a large page replaced small ones.
    """

    cdef filler f

    def __cinit__(self, mem, format, levels, large_level, fixed_level, keeps_stores, int level, uint64_t threshold,
                  int addr_bits, bint canonical, uint64_t bits):
        if not 1 <= level <= large_level or threshold and level != 1 or not 32 <= addr_bits <= 64:
            raise ValueError(f"no such pages: level {level}, threshold {threshold}, addresses of {addr_bits} bits")
        self.f.b = &self.b
        self.f.level, self.f.threshold, self.f.canonical, self.f.bits = level, threshold, canonical, bits
        self.f.unused_bits = 64 - addr_bits
        self.f.regions = <region_count *>calloc(FIRST_CAPACITY, sizeof(region_count))
        if self.f.regions is NULL:
            raise MemoryError
        self.f.region_mask = FIRST_CAPACITY - 1

    def __dealloc__(self):
        free(self.f.small.frames)
        free(self.f.large.frames)
        free(self.f.regions)

    @property
    def faults(self):
        return int(self.f.faults)

    @property
    def small_pages(self):
        return int(self.f.small_pages)

    @property
    def large_pages(self):
        return int(self.f.large_pages)

    @property
    def replaced(self):
        return int(self.f.replaced)

    def supply_pages(self, const uint64_t[::1] frames not None, bint large):
        """Add frames for pages; the last one is used first. IN large: for pages that replace those of a region."""
        cdef Py_ssize_t i
        for i in range(frames.shape[0]):
            if not push_frame(&self.f.large if large else &self.f.small, frames[i]):
                raise MemoryError

    def take_pages(self):
        """List the frames for pages that are not used, which are none then."""
        cdef size_t i
        frames = [int(self.f.small.frames[i]) for i in range(self.f.small.count)]
        self.f.small.count = 0
        return frames

    def touch_rows(self, const uint64_t[::1] gva not None, const uint8_t[::1] size, Py_ssize_t start,
                   Py_ssize_t pauses_from=PY_SSIZE_T_MAX):
        """Touch addresses from row start on, and map the pages that are not mapped yet.

        Parameters
        ----------
        gva : ndarray of uint64
            Linear addresses (bytes).
        size : ndarray of uint8, or None
            Bytes of each access; one that reaches into the next page touches that too.
        pauses_from : int
            Stop, with BEFORE_PROMOTION, at a row from this one on that makes a large page replace small ones.

        Returns
        -------
        int, int
            Rows that are done, and the status of the row that stopped.
        """
        cdef Py_ssize_t i, n = gva.shape[0]
        cdef int status = BUILD_DONE
        cdef uint64_t addr, last = ~<uint64_t>0
        cdef bint sized = size is not None
        cdef filler *f = &self.f
        cdef SlotTable _table = self._begin_rows((not sized or size.shape[0] == n) and 0 <= start <= n)
        i = start
        with nogil:
            while i < n:
                f.pauses = i >= pauses_from
                addr = gva[i]
                if addr >> PAGE_SHIFT != last:
                    status = touch(f, addr)
                    if status != BUILD_DONE:
                        break
                    last = addr >> PAGE_SHIFT
                if sized and (addr & PAGE_OFFSET_MASK) + size[i] > PAGE_SIZE:
                    status = touch(f, (addr & ~PAGE_OFFSET_MASK) + PAGE_SIZE)
                    if status != BUILD_DONE:
                        break
                    last = (addr >> PAGE_SHIFT) + 1
                i += 1
        return i, status
