"""Levels of TLBs, as `_levels.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu.arch._bits cimport ACCESS_FETCH_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, PAGE_SHIFT
from kvmmu.tlb._details cimport details_remove, details_remove_all, details_take
from kvmmu.tlb._levels cimport (
    INCLUSION_EXCLUSIVE, INCLUSION_INCLUSIVE, KINDS, MOST_LINEAR_BITS, NOWHERE, SIZES, UPPER_LEVELS, WAY_PORTABLE,
    tlb_level, tlb_levels, tlb_rows, tlb_way,
)
from kvmmu.tlb._structure cimport (
    KEY_SIZE_SHIFT, key_structure, structure_insert, structure_remove, structure_remove_all, structure_use,
)

cdef extern from "kvmmu/tlb/_lru_rows.h" nogil:
    cdef struct lru_rows "kvmmu_lru_rows":
        size_t rows
        const uint64_t *gva
        const uint8_t *access
        const uint8_t *leaf
        const uint8_t *is_global
        size_t access_stride, leaf_stride
        uint8_t *level
        uint8_t *references
        uint8_t class_of[256]
        int shifts[3]
        uint64_t tags[3][2]
        uint64_t addr_mask
        int count
        key_structure *levels[16]
        uint32_t asked[19]
        uint32_t all_asked[3]
        uint64_t (*hits)[18]
        uint64_t *walks
        uint64_t references_read, unmapped
        int has_psc, root_level
        int (*walk)(void *h, uint64_t addr, int size) noexcept nogil
        void *h
    void kvmmu_lru_run(lru_rows *r, int portable)

cdef enum:
    DETAIL_ROWS = 2048                  # whose results are held until their details are taken
    FEW_ROWS = 48                       # fewer go through the levels one by one


# ---- one access --------------------------------------------------------------------------------------------------------

cdef inline int kind_of(uint8_t access) noexcept nogil:
    """Return the kind of an access: load, store, fetch."""
    return 2 if access & ACCESS_FETCH_MASK else (access & ACCESS_WRITE_MASK) != 0


cdef inline int class_of(uint8_t access) noexcept nogil:
    """Return the place of an access to a 4K page in a row of counters: by kind, user, size."""
    return (kind_of(access) * 2 + ((access & ACCESS_USER_MASK) != 0)) * SIZES


cdef inline int size_of(uint64_t key) noexcept nogil:
    return <int>(key >> KEY_SIZE_SHIFT & 3)


cdef void drop_above(tlb_levels *h, const tlb_level *level, uint64_t key) noexcept nogil:
    cdef int i
    for i in range(h.count):
        if level.above[size_of(key)] >> i & 1:
            structure_remove(&h.levels[i].s, key)


cdef void fill(tlb_levels *h, int number, uint64_t key) noexcept nogil:
    """Enter a key that a level does not hold, and let those that it replaces go where they belong."""
    cdef tlb_level *level
    cdef uint64_t victim
    while True:
        level = &h.levels[number]
        victim = structure_insert(&level.s, key)
        if not victim:
            return
        if level.inclusion == INCLUSION_INCLUSIVE:
            drop_above(h, level, victim)
        number = level.below[size_of(victim)]
        if number < 0 or h.levels[number].inclusion != INCLUSION_EXCLUSIVE or structure_use(&h.levels[number].s, victim):
            return
        key = victim


cdef int look_up(tlb_levels *h, uint64_t key, const uint8_t *path, int depth) noexcept nogil:
    """The number of the level that holds a key, or NOWHERE; the levels on the path hold it from now on."""
    cdef int place = 0, found = NOWHERE, number
    while place < depth:
        number = path[place]
        if structure_use(&h.levels[number].s, key):
            found = number
            break
        place += 1
    if found != NOWHERE and place and h.levels[found].inclusion == INCLUSION_EXCLUSIVE:
        structure_remove(&h.levels[found].s, key)
    while place:
        place -= 1
        number = path[place]
        if h.levels[number].inclusion != INCLUSION_EXCLUSIVE:
            fill(h, number, key)
    return found


cdef int walk(tlb_levels *h, uint64_t addr, int size) noexcept nogil:
    """The number of entries that a page walk reads. Those above the leaf are cached from then on."""
    cdef int leaf = size + 1, level = leaf + 1, read
    cdef uint64_t page
    cdef key_structure *s
    while level <= h.root_level:
        s = &h.psc[level - 2]
        page = addr >> (PAGE_SHIFT + h.index_bits * (level - 1)) | h.local_tag
        if s.keys is not NULL and (s.last == page or structure_use(s, page)):
            h.psc_hits[level - 2] += 1
            h.cached_references += <uint64_t>(h.root_level + 1 - level)
            break
        level += 1
    read = level - leaf
    while level > leaf + 1:                             # those that were read
        level -= 1
        if h.psc[level - 2].keys is not NULL:
            structure_insert(&h.psc[level - 2], addr >> (PAGE_SHIFT + h.index_bits * (level - 1)) | h.local_tag)
    return read


cdef void run_rows(tlb_levels *h, const tlb_rows *r) noexcept nogil:
    """Let rows go through the levels, one by one."""
    cdef const uint8_t *is_global = r.is_global
    cdef uint64_t mask = (<uint64_t>1 << MOST_LINEAR_BITS) - 1, key, addr
    cdef int kind, size, depth, found, read, first
    cdef uint8_t bits
    cdef const uint8_t *path
    cdef size_t i
    for i in range(r.rows):
        size = r.leaf[i * r.leaf_stride] - 1
        bits = r.access[i * r.access_stride]
        found, read = NOWHERE, 0
        if size < 0 or size >= SIZES:
            h.unmapped += 1
        else:
            kind = kind_of(bits)
            addr = r.gva[i] & mask
            key = addr >> h.shifts[size] | <uint64_t>size << KEY_SIZE_SHIFT
            key |= h.global_tag if is_global is not NULL and is_global[i] else h.local_tag
            path, depth = h.path[kind][size], h.depth[kind][size]
            first = path[0]
            if depth and h.levels[first].s.last == key:  # no structure changes: its key was the last one used there
                found = first
            else:
                found = look_up(h, key, path, depth)
            if found != NOWHERE:
                h.hits[found][class_of(bits) + size] += 1
            else:
                h.walks[class_of(bits) + size] += 1
                read = walk(h, addr, size)
                h.references += <uint64_t>read
        if r.level is not NULL:
            r.level[i] = <uint8_t>found
        if r.references is not NULL:
            r.references[i] = <uint8_t>read


cdef int walk_of_lru(void *h, uint64_t addr, int size) noexcept nogil:
    return walk(<tlb_levels *>h, addr, size)


cdef void run_lru_rows(tlb_levels *h, const tlb_rows *rows, bint portable) noexcept nogil:
    """The same where all levels are LRU, none inclusive or exclusive."""
    cdef lru_rows own
    cdef lru_rows *r = &own
    cdef int kind, size, i, bits
    r.rows, r.gva, r.access, r.leaf, r.is_global = rows.rows, rows.gva, rows.access, rows.leaf, rows.is_global
    r.access_stride, r.leaf_stride = rows.access_stride, rows.leaf_stride
    r.level, r.references = rows.level, rows.references
    r.addr_mask = (<uint64_t>1 << MOST_LINEAR_BITS) - 1
    r.count = h.count
    memset(r.asked, 0, sizeof(r.asked))
    for size in range(SIZES):
        r.shifts[size] = h.shifts[size]
        r.tags[size][0] = <uint64_t>size << KEY_SIZE_SHIFT | h.local_tag
        r.tags[size][1] = <uint64_t>size << KEY_SIZE_SHIFT | h.global_tag
    for bits in range(256):
        r.class_of[bits] = <uint8_t>class_of(<uint8_t>bits)
    for i in range(h.count):
        r.levels[i] = &h.levels[i].s
        for kind in range(2 * KINDS):
            for size in range(SIZES):
                if h.levels[i].kinds >> (kind // 2) & 1 and h.levels[i].sizes >> size & 1:
                    r.asked[kind * SIZES + size] |= <uint32_t>1 << i
    for size in range(SIZES):
        r.all_asked[size] = r.asked[size]
        for kind in range(2 * KINDS):
            if r.asked[kind * SIZES + size] != r.asked[size]:
                r.all_asked[size] = 0
    r.hits, r.walks = h.hits, h.walks
    r.references_read = r.unmapped = 0
    r.walk, r.h, r.root_level, r.has_psc = walk_of_lru, h, h.root_level, 0
    for i in range(UPPER_LEVELS):
        r.has_psc |= h.psc[i].keys is not NULL
    kvmmu_lru_run(r, portable)
    h.references += r.references_read
    h.unmapped += r.unmapped


cdef void run_fitting(tlb_levels *h, const tlb_rows *rows, tlb_way how) noexcept nogil:
    """The same in the way that is the fastest for these levels and so many rows."""
    if how == WAY_PORTABLE and h.is_lru:
        run_lru_rows(h, rows, True)
    elif how == WAY_FASTEST and h.is_lru and rows.rows >= FEW_ROWS:
        run_lru_rows(h, rows, False)
    else:
        run_rows(h, rows)


cdef void take_details(tlb_levels *h, const tlb_rows *r) noexcept nogil:
    """Keep what rows tell. Their results are known."""
    cdef uint64_t mask = (<uint64_t>1 << MOST_LINEAR_BITS) - 1, key
    cdef const uint64_t *ip = NULL
    cdef int kind, size
    cdef size_t i
    for i in range(r.rows):
        size = r.leaf[i * r.leaf_stride] - 1
        if size < 0 or size >= SIZES:
            continue
        kind = kind_of(r.access[i * r.access_stride])
        key = (r.gva[i] & mask) >> h.shifts[size] | <uint64_t>size << KEY_SIZE_SHIFT
        key |= h.global_tag if r.is_global is not NULL and r.is_global[i] else h.local_tag
        if r.ip is not NULL:
            ip = &r.ip[i]
        details_take(h.details, key, h.path[kind][size], h.depth[kind][size], r.level[i], r.references[i], ip)


cdef void run_levels(tlb_levels *h, const tlb_rows *rows, tlb_way how) noexcept nogil:
    cdef uint8_t level[DETAIL_ROWS]
    cdef uint8_t references[DETAIL_ROWS]
    cdef tlb_rows part
    cdef size_t start = 0
    if h.details is NULL:
        run_fitting(h, rows, how)
        return
    while start < rows.rows:
        part = rows[0]
        part.rows = min(rows.rows - start, <size_t>DETAIL_ROWS)
        part.gva += start
        part.access += start * rows.access_stride
        part.leaf += start * rows.leaf_stride
        if rows.is_global is not NULL:
            part.is_global += start
        if rows.ip is not NULL:
            part.ip += start
        if rows.level is not NULL:
            part.level += start
        else:
            part.level = &level[0]
        if rows.references is not NULL:
            part.references += start
        else:
            part.references = &references[0]
        run_fitting(h, &part, how)
        take_details(h, &part)
        start += part.rows


# ---- invalidation ------------------------------------------------------------------------------------------------------

cdef void remove_all(tlb_levels *h, uint64_t mask, uint64_t value, uint64_t psc_mask, uint64_t psc_value) noexcept nogil:
    """Drop keys with key & mask == value, and entries of paging-structure caches likewise."""
    cdef int i
    for i in range(h.count):
        structure_remove_all(&h.levels[i].s, mask, value)
    for i in range(UPPER_LEVELS):
        if h.psc[i].keys is not NULL:
            structure_remove_all(&h.psc[i], psc_mask, psc_value)
    if h.details is not NULL:
        details_remove_all(h.details, mask, value)


cdef void remove_address(tlb_levels *h, uint64_t addr, uint64_t tag) noexcept nogil:
    """Drop the page around an address, of every size."""
    cdef int i, size
    cdef uint64_t key
    addr &= (<uint64_t>1 << MOST_LINEAR_BITS) - 1
    for size in range(SIZES):
        key = addr >> h.shifts[size] | <uint64_t>size << KEY_SIZE_SHIFT | tag
        for i in range(h.count):
            if h.levels[i].sizes >> size & 1:
                structure_remove(&h.levels[i].s, key)
        if h.details is not NULL:
            details_remove(h.details, key)
