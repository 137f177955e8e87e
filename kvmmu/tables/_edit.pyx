"""Changes to page tables, row by row.

A row is carried out in three steps:

    1. descend to the table of the row's level, from the lowest table that the row before passed too; a missing table takes a
       frame of the pool, a larger page in the way is split into pages of the next size
    2. release the tables below the entry, if the entry pointed to one
    3. store the entry; for a row that removes a page, release the tables that are empty now

The kernels store straight into guest memory. With `keeps_stores` each store is also listed, so that the caller can take all of
them back and repeat them by another hand (`PageTables(writer=)`).
"""

from libc.stdint cimport SIZE_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    KVMMU_BITS, PAGE_SIZE, PG_LEVEL_2M, PG_LEVEL_4K, PT32_BASE_ADDR_MASK, PT32_PSE36_LAST_SHIFT, PT32_PSE36_SHIFT,
    PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, kvmmu_level_shift
from kvmmu.memory._memory cimport gpa_to_hva, kvmmu_write64
from kvmmu.tables._edit cimport (
    BUILD_CANNOT_SPLIT, BUILD_DONE, BUILD_FRAME_OUTSIDE, BUILD_NO_FRAME, BUILD_NO_MEMORY, BUILD_NOT_MAPPED, BUILD_SMALLER_PAGES,
    BUILD_TABLE_OUTSIDE, build_status, builder, entry_store, frame_list, read_entry,
)

cdef enum:
    RESERVE = 1024              # elements that a list grows by at least


# ---- lists -------------------------------------------------------------------------------------------------------------

cdef bint grow(void **elements, size_t *capacity, size_t count, size_t size) noexcept nogil:
    """Make room for one more element. False: no memory."""
    cdef size_t wanted
    cdef void *larger
    if count < capacity[0]:
        return True
    if capacity[0] > (SIZE_MAX // 2 - RESERVE) // size:
        return False
    wanted = 2 * capacity[0] + RESERVE
    larger = realloc(elements[0], wanted * size)
    if larger is NULL:
        return False
    elements[0], capacity[0] = larger, wanted
    return True


cdef bint push_frame(frame_list *l, uint64_t gpa) noexcept nogil:
    if not grow(<void **>&l.frames, &l.capacity, l.count, sizeof(uint64_t)):
        return False
    l.frames[l.count] = gpa
    l.count += 1
    return True


# ---- entries -----------------------------------------------------------------------------------------------------------

cdef build_status store_entry(builder *b, uint8_t *hva, uint64_t gpa, uint64_t new) noexcept nogil:
    cdef entry_store *s
    if b.keeps_stores:
        if not grow(<void **>&b.stores, &b.store_capacity, b.store_count, sizeof(entry_store)):
            return BUILD_NO_MEMORY
        s = &b.stores[b.store_count]
        s.gpa, s.old, s.new = gpa, read_entry(b, hva), new
        b.store_count += 1
    if b.format == KVMMU_FORMAT_32:
        (<uint32_t *>hva)[0] = <uint32_t>new
    else:
        kvmmu_write64(hva, new)
    return BUILD_DONE


cdef inline uint64_t base_address(const builder *b, uint64_t entry) noexcept nogil:
    """The address in an entry that points to a table."""
    return entry & (PT32_BASE_ADDR_MASK if b.format == KVMMU_FORMAT_32 else PT64_BASE_ADDR_MASK)


cdef inline bint is_large(const builder *b, uint64_t entry, int level) noexcept nogil:
    return 1 < level <= b.large_level and (entry & PT_PAGE_SIZE_MASK) != 0


cdef inline size_t index_of(const builder *b, uint64_t addr, int level) noexcept nogil:
    return <size_t>(addr >> kvmmu_level_shift(b.format, level)) & (b.entries - 1)


cdef uint8_t *table_hva(const builder *b, uint64_t gpa) noexcept nogil:
    """The host address of a table that can be written, or NULL."""
    cdef bint readonly = False
    cdef uint8_t *hva = gpa_to_hva(b.mem, gpa, &readonly)
    return NULL if readonly else hva


# ---- tables ------------------------------------------------------------------------------------------------------------

cdef build_status take_frame(builder *b, uint64_t *gpa, uint8_t **hva) noexcept nogil:
    """A frame of the pool, cleared. OUT gpa, hva."""
    cdef build_status status
    cdef size_t i
    if not b.pool.count:
        return BUILD_NO_FRAME
    gpa[0] = b.pool.frames[b.pool.count - 1]
    hva[0] = table_hva(b, gpa[0])
    if hva[0] is NULL:
        return BUILD_FRAME_OUTSIDE
    if b.keeps_stores:
        for i in range(b.entries):
            if read_entry(b, hva[0] + i * b.entry_bytes):
                status = store_entry(b, hva[0] + i * b.entry_bytes, gpa[0] + i * b.entry_bytes, 0)
                if status != BUILD_DONE:
                    return status
    else:
        memset(hva[0], 0, PAGE_SIZE)
    b.pool.count -= 1
    b.made += 1
    return BUILD_DONE


cdef build_status split_page(builder *b, uint8_t *entry_hva, uint64_t entry_gpa, int level) noexcept nogil:
    """Replace a large page by a table of pages of the next size with the same rights."""
    cdef uint64_t entry = read_entry(b, entry_hva), frame = 0, step, part
    cdef uint8_t *table = NULL
    cdef build_status status
    cdef size_t i
    if b.format == KVMMU_FORMAT_32:
        if entry & KVMMU_BITS(PT32_PSE36_SHIFT, PT32_PSE36_LAST_SHIFT):
            return BUILD_CANNOT_SPLIT
    status = take_frame(b, &frame, &table)
    if status != BUILD_DONE:
        return status
    step = <uint64_t>1 << kvmmu_level_shift(b.format, level - 1)
    part = entry & ~PT_PAGE_SIZE_MASK if level == PG_LEVEL_2M else entry
    for i in range(b.entries):
        status = store_entry(b, table + i * b.entry_bytes, frame + i * b.entry_bytes, part + i * step)
        if status != BUILD_DONE:
            return status
    return store_entry(b, entry_hva, entry_gpa, frame | b.table_bits)


cdef build_status release_tables(builder *b, uint64_t entry, int level) noexcept nogil:
    """List the table that an entry of a level points to, and those below it, as released."""
    cdef uint64_t gpa = base_address(b, entry), below
    cdef uint8_t *table = table_hva(b, gpa)
    cdef build_status status
    cdef size_t i
    if table is NULL:
        return BUILD_DONE
    if level > PG_LEVEL_2M:
        for i in range(b.entries):
            below = read_entry(b, table + i * b.entry_bytes)
            if below & b.present_mask and not is_large(b, below, level - 1):
                status = release_tables(b, below, level - 1)
                if status != BUILD_DONE:
                    return status
    return BUILD_DONE if push_frame(&b.freed, gpa) else BUILD_NO_MEMORY


cdef build_status descend(builder *b, uint64_t addr, int target, bint make, uint8_t **hva, uint64_t *gpa) noexcept nogil:
    """Find the entry for addr in a table of the target level. OUT hva, gpa.

    IN make: make tables that are missing; without it, BUILD_NOT_MAPPED. Larger pages on the way are split.
    """
    cdef int level = b.levels
    cdef uint64_t entry, frame = 0
    cdef uint8_t *table = NULL
    cdef build_status status
    while level > b.path_level and (addr ^ b.path_addr) >> kvmmu_level_shift(b.format, level) == 0:
        level -= 1                              # the same entry of this level, whose table is known
    level = max(level, target)
    b.path_addr = addr
    b.path_level = level
    while level > target:
        gpa[0] = b.path_gpa[level] + index_of(b, addr, level) * b.entry_bytes
        hva[0] = b.path[level] + index_of(b, addr, level) * b.entry_bytes
        entry = read_entry(b, hva[0])
        if not entry & b.present_mask:
            if not make:
                return BUILD_NOT_MAPPED
            status = take_frame(b, &frame, &table)
            if status == BUILD_DONE:
                status = store_entry(b, hva[0], gpa[0], frame | (b.table_bits if level < b.levels else b.root_bits))
            if status != BUILD_DONE:
                return status
        else:
            if is_large(b, entry, level):
                status = split_page(b, hva[0], gpa[0], level)
                if status != BUILD_DONE:
                    return status
                entry = read_entry(b, hva[0])
            frame = base_address(b, entry)
            table = table_hva(b, frame)
            if table is NULL:
                return BUILD_TABLE_OUTSIDE
        level -= 1
        b.path[level], b.path_gpa[level] = table, frame
        b.path_level = level
    gpa[0] = b.path_gpa[level] + index_of(b, addr, level) * b.entry_bytes
    hva[0] = b.path[level] + index_of(b, addr, level) * b.entry_bytes
    return BUILD_DONE


cdef int find_page(builder *b, uint64_t addr) noexcept nogil:
    cdef int level = b.levels
    cdef uint64_t entry
    cdef uint8_t *table
    while level > b.path_level and (addr ^ b.path_addr) >> kvmmu_level_shift(b.format, level) == 0:
        level -= 1
    b.path_addr = addr
    b.path_level = level
    while True:
        entry = read_entry(b, b.path[level] + index_of(b, addr, level) * b.entry_bytes)
        if not entry & b.present_mask:
            return 0
        if level == PG_LEVEL_4K or is_large(b, entry, level):
            return level
        table = table_hva(b, base_address(b, entry))
        if table is NULL:
            return 0
        level -= 1
        b.path[level], b.path_gpa[level] = table, base_address(b, entry)
        b.path_level = level


cdef bint is_empty(const builder *b, const uint8_t *table, size_t cleared) noexcept nogil:
    """True if a table has no entries. IN cleared: one without, whose neighbours are the likeliest to have some."""
    cdef size_t i
    if read_entry(b, table + ((cleared - 1) & (b.entries - 1)) * b.entry_bytes):
        return False
    for i in range(1, b.entries):
        if read_entry(b, table + ((cleared + i) & (b.entries - 1)) * b.entry_bytes):
            return False
    return True


cdef build_status release_empty(builder *b, uint64_t addr, int level) noexcept nogil:
    """Release the table of addr at a level, if it is empty, and so on upwards. The path is known down to the level."""
    cdef build_status status
    while level < b.fixed_level and is_empty(b, b.path[level], index_of(b, addr, level)):
        if not push_frame(&b.freed, b.path_gpa[level]):
            return BUILD_NO_MEMORY
        level += 1
        b.path_level = level
        status = store_entry(b, b.path[level] + index_of(b, addr, level) * b.entry_bytes,
                             b.path_gpa[level] + index_of(b, addr, level) * b.entry_bytes, 0)
        if status != BUILD_DONE:
            return status
    return BUILD_DONE


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef inline uint64_t page_entry(const builder *b, uint64_t gpa, int level, uint64_t bits) noexcept nogil:
    """The entry of a page. IN bits: its rights and flags."""
    if level > PG_LEVEL_4K:
        bits |= PT_PAGE_SIZE_MASK
    if b.format == KVMMU_FORMAT_32:             # PSE-36: address bits 39:32 stand in bits 20:13
        return <uint32_t>(gpa | bits | gpa >> 32 << PT32_PSE36_SHIFT)
    return gpa | bits


cdef build_status map_row(builder *b, uint64_t gva, uint64_t target, int level, uint64_t bits) noexcept nogil:
    cdef uint8_t *hva = NULL
    cdef uint64_t gpa = 0, old
    cdef build_status status = descend(b, gva, level, True, &hva, &gpa)
    if status != BUILD_DONE:
        return status
    if level > PG_LEVEL_4K:
        old = read_entry(b, hva)
        if old & b.present_mask and not is_large(b, old, level):
            status = release_tables(b, old, level)
            if status != BUILD_DONE:
                return status
    return store_entry(b, hva, gpa, page_entry(b, target, level, bits))


cdef build_status unmap_row(builder *b, uint64_t gva, int level) noexcept nogil:
    cdef uint8_t *hva = NULL
    cdef uint64_t gpa = 0, old
    cdef build_status status = descend(b, gva, level, False, &hva, &gpa)
    if status == BUILD_NOT_MAPPED:
        return BUILD_DONE
    if status != BUILD_DONE:
        return status
    old = read_entry(b, hva)
    if not old & b.present_mask:
        return BUILD_DONE
    if level > PG_LEVEL_4K and not is_large(b, old, level):
        status = release_tables(b, old, level)
        if status != BUILD_DONE:
            return status
    status = store_entry(b, hva, gpa, 0)
    return release_empty(b, gva, level) if status == BUILD_DONE else status


cdef build_status protect_row(builder *b, uint64_t gva, int level, uint64_t clear, uint64_t bits) noexcept nogil:
    cdef uint8_t *hva = NULL
    cdef uint64_t gpa = 0, old
    cdef build_status status = descend(b, gva, level, False, &hva, &gpa)
    if status != BUILD_DONE:
        return status
    old = read_entry(b, hva)
    if not old & b.present_mask:
        return BUILD_NOT_MAPPED
    if level > PG_LEVEL_4K and not is_large(b, old, level):
        return BUILD_SMALLER_PAGES
    return store_entry(b, hva, gpa, old & ~clear | bits)
