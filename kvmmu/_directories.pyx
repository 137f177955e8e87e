"""Where the tables of last entries lie; see `_directories.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from kvmmu._bits cimport PAGE_OFFSET_MASK, PG_LEVEL_1G, PG_LEVEL_4K, PT32_INDEX_MASK, PT64_INDEX_MASK
from kvmmu._directories cimport is_void
from kvmmu._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_64, kvmmu_level_shift
from kvmmu._lanes cimport (
    DIRECTORY_NAME_SHIFT, DIRECTORY_NAMES, KVMMU_LANES, PREFIX_COLD_SHIFT, PREFIX_HVA_MASK, PREFIX_LIKE_MASK, kvmmu_directory,
    kvmmu_directory_slot, kvmmu_directory_word, kvmmu_first_bit, kvmmu_lanes, kvmmu_prefix_level, kvmmu_set_prefix,
    kvmmu_want_prefix,
)
from kvmmu._prefixes cimport clear_directories, lane_space, no_table, prefix_of, sure_passes

# Blocks to go without another directory, at most.
cdef int MAX_PATIENCE = 31


cdef void take_name(lane_space *s) noexcept nogil:
    """A name for the directory that no word has."""
    if s.table.next_name == DIRECTORY_NAMES:
        clear_directories(s.table)
    s.directory.name = <uint64_t>s.table.next_name << DIRECTORY_NAME_SHIFT
    s.table.next_name += 1
    s.times_cleared = s.table.times_cleared
    s.directory.has_voids = False


cdef void set_shape(lane_space *s, uint64_t phase, int level) noexcept nogil:
    cdef kvmmu_directory *d = &s.directory
    cdef uint64_t start = (<uint64_t><uintptr_t>s.table.nothing + PAGE_OFFSET_MASK) & ~<uint64_t>PAGE_OFFSET_MASK
    d.words = s.table.words
    d.phase, d.nothing = phase, start + phase
    d.region_shift = kvmmu_level_shift(s.w.format, level + 1)
    d.entry_shift = kvmmu_level_shift(s.w.format, level) - (2 if s.w.format == KVMMU_FORMAT_32 else 3)


cdef void init_directory(lane_space *s, sure_passes *sure) noexcept nogil:
    s.sure = sure
    s.sure.known = False
    s.sure.beside_like = 0
    s.sure.beside_misses = 0
    s.sure.rest = s.sure.patience = 0
    s.strangers = 0
    s.rest = s.patience = 0
    s.directory.like = 0
    set_shape(s, 0, PG_LEVEL_4K)
    take_name(s)


cdef uint64_t table_of(const lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil:
    """The table that the last entry of addr lies in; 0: none that is a page of the guest's."""
    cdef uint64_t hva = ref & PREFIX_HVA_MASK
    cdef int level = <int>kvmmu_prefix_level(ref), format = s.w.format
    if level == PG_LEVEL_4K:
        return hva
    if hva == no_table() or (format == KVMMU_FORMAT_64 and s.w.level == PG_LEVEL_1G and level == PG_LEVEL_1G):
        return 0
    addr >>= kvmmu_level_shift(format, level)
    if format == KVMMU_FORMAT_32:
        return hva - (addr & PT32_INDEX_MASK) * sizeof(uint32_t)
    return hva - (addr & PT64_INDEX_MASK) * sizeof(uint64_t)


cdef void adopt(lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil:
    """A new directory, of prefixes like this one."""
    cdef uint64_t table = table_of(s, ref, addr)
    if not table or (ref >> PREFIX_COLD_SHIFT) & 1:
        return
    s.directory.like = ref & PREFIX_LIKE_MASK
    set_shape(s, table & PAGE_OFFSET_MASK, <int>kvmmu_prefix_level(ref))
    take_name(s)
    s.sure.known = False


cdef void ready_directory(lane_space *s) noexcept nogil:
    if s.times_cleared != s.table.times_cleared:
        take_name(s)
    if s.strangers > KVMMU_LANES // 2:
        if s.rest:
            s.rest -= 1
        else:
            s.rest = s.patience = min(2 * s.patience + 1, MAX_PATIENCE)
            adopt(s, s.stranger, s.stranger_addr)
    s.strangers = 0


cdef bint note(lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil:
    """A prefix that was found: into the directory, if it is of its kind. False: it is not."""
    cdef kvmmu_directory *d = &s.directory
    cdef uint64_t table, region
    if not d.like:
        adopt(s, ref, addr)
    region = addr >> d.region_shift
    if d.like == ref & PREFIX_LIKE_MASK:
        table = table_of(s, ref, addr)
        if table and table & PAGE_OFFSET_MASK == d.phase:
            d.words[kvmmu_directory_slot(region)] = kvmmu_directory_word(d, region, table)
        return True
    s.strangers += 1
    s.stranger, s.stranger_addr = ref, addr
    if kvmmu_prefix_level(d.like) == PG_LEVEL_4K and kvmmu_prefix_level(ref) != PG_LEVEL_4K:
        d.words[kvmmu_directory_slot(region)] = kvmmu_directory_word(d, region, d.nothing)
        d.has_voids = True
    return False


cdef bint find_own(lane_space *s, kvmmu_lanes *l, size_t lane) noexcept nogil:
    cdef uint64_t addr = l.addr[lane], ref = prefix_of(s, addr)
    if not ref:
        l.miss |= <uint64_t>1 << lane
        return False
    if not note(s, ref, addr):
        l.apart |= <uint64_t>1 << lane
    kvmmu_set_prefix(s.w.format, l, lane, ref)
    return True


cdef void find_missing(lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    cdef uint64_t soon = lanes & l.miss
    lanes &= l.miss
    l.miss = 0
    while soon:
        kvmmu_want_prefix(s.w.format, s.prefixes, s.lane.asid, l.addr[kvmmu_first_bit(soon)])
        soon &= soon - 1
    while lanes:
        find_own(s, l, kvmmu_first_bit(lanes))
        lanes &= lanes - 1
    l.like = s.directory.like               # the first that was found may have made it


cdef uint64_t void_lanes(const kvmmu_lanes *l) noexcept nogil:
    cdef uint64_t lanes = 0
    cdef size_t lane
    if l.voids:
        for lane in range(KVMMU_LANES):
            lanes |= <uint64_t>is_void(l, lane) << lane
    return lanes
