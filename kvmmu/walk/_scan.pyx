"""Scan whole page tables for what they map.

The scan goes down from the root, as the steps of `_walk.pxd` say, to each entry that is present and well formed, whatever rights
it gives. It changes nothing. A table that is reached again at the same level is not scanned again when nothing is mapped below
it, so that tables that point to each other cost no more than the pages that they map. Under a second stage the tables are read
through it, and each leaf is cut at the leaves of the second stage.
"""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from kvmmu._walk cimport WALK_DIRECT, WALK_SECOND_STAGE, kvm_pagewalk, table_access, translate_nested_gpa, walk_result
from kvmmu.arch._bits cimport (
    ACC_ALL, ACCESS_PROBE_MASK, CR3_PAE_PDPT_MASK, GVA32_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G, PG_LEVEL_4K,
    PT32_INDEX_BITS, PT64_INDEX_BITS, PT_GLOBAL_MASK, PT_PRESENT_MASK, STATUS_OK,
)
from kvmmu.arch._gpte cimport (
    KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT, kvmmu_gpte_access, kvmmu_gpte_malformed, kvmmu_gpte_pkey,
    kvmmu_gpte_rights, kvmmu_leaf_gpa, kvmmu_level_shift,
)
from kvmmu.memory._memory cimport gpa_to_hva, hash_gfn, kvmmu_read32, kvmmu_read64
from kvmmu.walk._register_sets cimport WalkCopy

from kvmmu.walk.mapped import MAPPING as _MAPPING

# How a scan ends.
cdef enum:
    SCAN_DONE
    SCAN_NO_MEMORY
    SCAN_LIMIT
    SCAN_STOPPED                # by a signal handler that raised

cdef enum:
    PT32_LARGE_SHIFT = PAGE_SHIFT + PT32_INDEX_BITS
    PT64_LARGE_SHIFT = PAGE_SHIFT + PT64_INDEX_BITS

cdef size_t FIRST_ROWS = 4096
cdef size_t FIRST_TABLES = 1024
# Leaves that a scan may read for each row that is allowed: some give no row of their own. A table of the second stage that a leaf
# is cut by counts as one.
cdef size_t LEAVES_PER_ROW = 64
cdef size_t LEAVES_PER_LOOK = 1 << 16   # between two looks at signals
cdef uint64_t SECOND_STAGE_KEY = 0x800  # beside the level in the key of a table

# A row of `mapped.MAPPING`.
cdef struct mapping:
    uint64_t gva
    uint64_t gpa
    uint64_t ngpa
    uint64_t size
    uint64_t pte_gpa
    uint8_t level
    uint8_t pte_access
    uint8_t second_access
    uint8_t pkey
    uint8_t accessed
    uint8_t dirty
    uint8_t global_
    uint8_t page_shift          # of the page, the smaller one of both stages

# A table of a level, by what is known of it.
cdef struct seen_table:
    uint64_t key                # gfn and level; 0: free
    uint8_t maps                # something is mapped below it, as far as the first stage goes

cdef struct scan:
    const kvm_pagewalk *w       # the tables that are scanned
    const kvm_pagewalk *n       # the second stage under them, or NULL
    uint64_t first, last        # linear addresses wanted
    bint merge
    mapping *rows
    size_t count, capacity, limit, leaves
    size_t put                  # rows, joined ones too
    PyObject *error             # that a signal handler raised
    seen_table *seen
    size_t tables, table_capacity
    int end                     # SCAN_*
    mapping leaf                # of the first stage, being cut by the second one


cdef int look_at_signals(scan *s) noexcept with gil:
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        Py_INCREF(error)
        s.error, s.end = <PyObject *>error, SCAN_STOPPED
        return -1
    return 0


cdef inline int count_leaf(scan *s) noexcept nogil:
    """Count a leaf, or a table that one is cut by. Returns -1 if there were enough of them, or a signal ends the scan."""
    s.leaves += 1
    if s.leaves // LEAVES_PER_ROW > s.limit:
        s.end = SCAN_LIMIT
        return -1
    return look_at_signals(s) if s.leaves % LEAVES_PER_LOOK == 0 else 0


# ---- tables that were seen ---------------------------------------------------------------------------------------------

cdef inline seen_table *place_of(seen_table *seen, size_t capacity, uint64_t key) noexcept nogil:
    cdef size_t h = hash_gfn(key) & (capacity - 1)
    while seen[h].key and seen[h].key != key:
        h = (h + 1) & (capacity - 1)
    return &seen[h]


cdef int remember(scan *s, uint64_t key, bint maps) noexcept nogil:
    """Note whether something is mapped below a table."""
    cdef seen_table *grown
    cdef seen_table *place
    cdef size_t i
    if 2 * s.tables >= s.table_capacity:
        grown = <seen_table *>calloc(2 * s.table_capacity, sizeof(seen_table))
        if grown is NULL:
            s.end = SCAN_NO_MEMORY
            return -1
        for i in range(s.table_capacity):
            if s.seen[i].key:
                place_of(grown, 2 * s.table_capacity, s.seen[i].key)[0] = s.seen[i]
        free(s.seen)
        s.seen, s.table_capacity = grown, 2 * s.table_capacity
    place = place_of(s.seen, s.table_capacity, key)
    s.tables += place.key == 0
    place.key, place.maps = key, maps
    return 0


# ---- entries -----------------------------------------------------------------------------------------------------------

cdef inline uint64_t entry_size(const kvm_pagewalk *w) noexcept nogil:
    return sizeof(uint32_t) if w.format == KVMMU_FORMAT_32 else sizeof(uint64_t)


cdef inline int table_entries(const kvm_pagewalk *w) noexcept nogil:
    return 1 << (PT32_INDEX_BITS if w.format == KVMMU_FORMAT_32 else PT64_INDEX_BITS)


cdef inline uint64_t table_gpa(const kvm_pagewalk *w, uint64_t pte) noexcept nogil:
    return pte & w.base_mask


cdef inline bint is_usable(const kvm_pagewalk *w, uint64_t pte, int level) noexcept nogil:
    """True if an entry is present and well formed."""
    return pte & w.present_mask != 0 and not kvmmu_gpte_malformed(
        w.format, w.fmt.rsvd_bits_mask[0][level - 1], w.fmt.rsvd_bits_mask[1][level - 1], w.fmt.bad_mt_xwr, pte)


cdef inline bint is_leaf(const kvm_pagewalk *w, uint64_t pte, int level) noexcept nogil:
    return level == PG_LEVEL_4K or pte & w.page_size_mask != 0


cdef bint host_gpa(const kvm_pagewalk *n, uint64_t ngpa, uint64_t *gpa) noexcept nogil:
    """Find where a table of the first stage lies; False if the second stage does not map it, with whatever rights."""
    cdef walk_result r
    gpa[0] = ngpa
    if n is NULL:
        return True
    r.refs = 0
    r.error_code = 0
    return translate_nested_gpa(n, ngpa, table_access(n, <uint32_t>ACCESS_PROBE_MASK), False, 0, False, gpa, &r) == STATUS_OK


cdef inline uint64_t entry_at(const kvm_pagewalk *w, const uint8_t *page, uint64_t gpa, int i) noexcept nogil:
    """Entry i of a table. IN page: its bytes, or NULL: it is not in one piece."""
    cdef bint readonly = False
    cdef const uint8_t *hva = page + i * entry_size(w)
    if page is NULL:
        hva = gpa_to_hva(w.mem, gpa + i * entry_size(w), &readonly)
        if hva is NULL:
            return 0
    return kvmmu_read32(hva) if w.format == KVMMU_FORMAT_32 else kvmmu_read64(hva)


cdef const uint8_t *page_at(const kvm_pagewalk *w, uint64_t gpa) noexcept nogil:
    """The bytes of a page, if they lie in one piece, else NULL."""
    cdef bint readonly = False
    cdef const uint8_t *first = gpa_to_hva(w.mem, gpa, &readonly)
    cdef const uint8_t *last = gpa_to_hva(w.mem, gpa + PAGE_SIZE - sizeof(uint64_t), &readonly)
    if first is NULL or last is NULL or last - first != PAGE_SIZE - sizeof(uint64_t):
        return NULL
    return first


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef int put_row(scan *s, const mapping *row) noexcept nogil:
    cdef mapping *grown
    cdef mapping *before
    s.put += 1
    if s.merge and s.count:
        before = &s.rows[s.count - 1]
        if (before.gva + before.size == row.gva and before.gpa + before.size == row.gpa and
                before.ngpa + before.size == row.ngpa and before.level == row.level and
                before.pte_access == row.pte_access and before.second_access == row.second_access and
                before.pkey == row.pkey and before.accessed == row.accessed and before.dirty == row.dirty and
                before.global_ == row.global_):
            before.size += row.size
            return 0
    if s.count == s.limit:
        s.end = SCAN_LIMIT
        return -1
    if s.count == s.capacity:
        grown = <mapping *>realloc(s.rows, 2 * s.capacity * sizeof(mapping))
        if grown is NULL:
            s.end = SCAN_NO_MEMORY
            return -1
        s.rows, s.capacity = grown, 2 * s.capacity
    s.rows[s.count] = row[0]
    s.count += 1
    return 0


cdef int cut_leaf(scan *s, uint64_t table, int level, uint64_t rights, uint64_t base, uint64_t first,
                  uint64_t last) noexcept nogil:
    """Put what a table of the second stage maps of the addresses first to last, which the leaf of the first stage maps.

    IN base: the address of its first entry; s.leaf: gva and gpa are those of the address ngpa.
    """
    cdef const kvm_pagewalk *n = s.n
    cdef int shift = kvmmu_level_shift(n.format, level), i
    cdef int begin = <int>((first - base) >> shift)
    cdef int end = <int>min((last - base) >> shift, <uint64_t>(table_entries(n) - 1))
    cdef const uint8_t *page = page_at(n, table)
    cdef uint64_t pte, start, stop, entry_rights, key = table | SECOND_STAGE_KEY | <uint64_t>level
    cdef size_t put = s.put
    cdef mapping row
    if place_of(s.seen, s.table_capacity, key).key:     # nothing is mapped below it
        return 0
    if count_leaf(s):
        return -1
    for i in range(begin, end + 1):
        pte = entry_at(n, page, table, i)
        if not is_usable(n, pte, level):
            continue
        start = base + (<uint64_t>i << shift)
        stop = min(start + (<uint64_t>1 << shift) - 1, last)
        start = max(start, first)
        entry_rights = rights & kvmmu_gpte_rights(n.format, pte)
        if not is_leaf(n, pte, level):
            if cut_leaf(s, table_gpa(n, pte), level - 1, entry_rights, base + (<uint64_t>i << shift), start, stop):
                return -1
            continue
        row = s.leaf
        row.gva += start - s.leaf.ngpa
        row.ngpa = s.leaf.gpa + (start - s.leaf.ngpa)
        row.gpa = kvmmu_leaf_gpa(n.format, pte & n.address_mask, level, start, n.pse36_mask)
        row.size = stop - start + 1
        row.page_shift = min(row.page_shift, <uint8_t>shift)
        row.second_access = <uint8_t>kvmmu_gpte_access(n.format, entry_rights)
        if put_row(s, &row):
            return -1
    if s.put == put and end - begin == table_entries(n) - 1 and remember(s, key, False):
        return -1
    return 0


cdef int cut_from_root(scan *s) noexcept nogil:
    """Put what the second stage maps of the leaf of the first one."""
    cdef const kvm_pagewalk *n = s.n
    cdef uint64_t first = s.leaf.ngpa, last, pdpte, at, size = s.leaf.size
    cdef int i
    cdef uint64_t span = <uint64_t>1 << (kvmmu_level_shift(n.format, n.level) +
                                         (PT32_INDEX_BITS if n.format == KVMMU_FORMAT_32 else PT64_INDEX_BITS))
    if first & n.ngpa_rsvd_mask:
        return 0
    if has_pdptes(n):
        span = GVA32_MASK + 1
    first &= span - 1                   # tables take the low bits of an address, whatever lies above
    s.leaf.gpa, s.leaf.ngpa = s.leaf.ngpa, first
    last = first + min(size, span - first) - 1
    if not has_pdptes(n):
        return cut_leaf(s, table_gpa(n, n.vcpu.nested_pgd), n.level, ~<uint64_t>0, 0, first, last)
    for i in range(4):
        at = <uint64_t>i << kvmmu_level_shift(n.format, PG_LEVEL_1G)
        if at > last or at + (<uint64_t>1 << kvmmu_level_shift(n.format, PG_LEVEL_1G)) <= first:
            continue
        pdpte = read_pdpte(n, NULL, i)
        if pdpte & PT_PRESENT_MASK and cut_leaf(
                s, table_gpa(n, pdpte), PG_LEVEL_1G - 1, ~<uint64_t>0, at, max(first, at),
                min(last, at + (<uint64_t>1 << kvmmu_level_shift(n.format, PG_LEVEL_1G)) - 1)):
            return -1
    return 0


cdef int put_leaf(scan *s, const kvm_pagewalk *w, uint64_t gva, uint64_t pte, uint64_t pte_gpa, int level,
                  uint64_t rights) noexcept nogil:
    """Put the part of a leaf that is wanted."""
    cdef uint64_t size = <uint64_t>1 << kvmmu_level_shift(w.format, level)
    cdef uint64_t start = max(gva, s.first), stop = min(gva + (size - 1), s.last)
    cdef mapping *leaf = &s.leaf
    if count_leaf(s):
        return -1
    leaf.gva, leaf.size = start, stop - start + 1
    leaf.gpa = leaf.ngpa = kvmmu_leaf_gpa(w.format, pte & w.address_mask, level, start, w.pse36_mask)
    leaf.pte_gpa, leaf.level, leaf.page_shift = pte_gpa, <uint8_t>level, <uint8_t>kvmmu_level_shift(w.format, level)
    leaf.pte_access = <uint8_t>kvmmu_gpte_access(w.format, rights)
    leaf.second_access = <uint8_t>ACC_ALL
    leaf.pkey = <uint8_t>kvmmu_gpte_pkey(w.format, pte)
    leaf.accessed = pte & w.accessed_mask != 0
    leaf.dirty = pte & (w.accessed_mask << 1) != 0
    leaf.global_ = w.format != KVMMU_FORMAT_EPT and pte & PT_GLOBAL_MASK != 0
    return put_row(s, leaf) if s.n is NULL else cut_from_root(s)


# ---- the scan ----------------------------------------------------------------------------------------------------------

cdef inline bint has_pdptes(const kvm_pagewalk *w) noexcept nogil:
    return w.format == KVMMU_FORMAT_64 and w.level == PG_LEVEL_1G


cdef uint64_t read_pdpte(const kvm_pagewalk *w, const kvm_pagewalk *n, int i) noexcept nogil:
    """A PDPTE, or 0 if it is not present, malformed, or cannot be read."""
    cdef uint64_t pte, gpa
    if w.is_nested or w.pdptes_in_memory:
        gpa = (w.vcpu.nested_pgd if w.is_nested else w.vcpu.cr3) & CR3_PAE_PDPT_MASK
        if not host_gpa(n, gpa, &gpa):
            return 0
        pte = entry_at(w, NULL, gpa, i)
    else:
        pte = w.vcpu.pdptrs[i]
    return pte if pte & PT_PRESENT_MASK and not pte & w.pdpte_rsvd_mask else 0


cdef uint64_t extend(const kvm_pagewalk *w, uint64_t addr) noexcept nogil:
    """The canonical form of an address that tables translate."""
    cdef int shift = w.canonical_shift
    if shift and addr >> (63 - shift) & 1:
        return addr | ~(~<uint64_t>0 >> shift)
    return addr


cdef int scan_table(scan *s, uint64_t ngpa, int level, uint64_t rights, uint64_t base) noexcept nogil:
    """Put what a table maps; returns -1 at the end of the scan, 1 if there was something, whether wanted or not, else 0.

    IN base: the address of its first entry, not extended.
    """
    cdef const kvm_pagewalk *w = s.w
    cdef uint64_t key = ngpa | <uint64_t>level, pte, entry_rights, gva, gpa, size
    cdef const seen_table *seen = place_of(s.seen, s.table_capacity, key)
    cdef int shift = kvmmu_level_shift(w.format, level), i, below
    cdef const uint8_t *page
    cdef bint maps = False, whole = True
    if seen.key and not seen.maps:
        return 0
    if host_gpa(s.n, ngpa, &gpa):
        page = page_at(w, gpa)
        size = (<uint64_t>1 << shift) - 1
        for i in range(table_entries(w)):
            gva = extend(w, base + (<uint64_t>i << shift))
            if gva > s.last or gva + size < s.first:
                whole = False
                continue
            pte = entry_at(w, page, gpa, i)
            if not is_usable(w, pte, level):
                continue
            entry_rights = rights & kvmmu_gpte_rights(w.format, pte)
            if is_leaf(w, pte, level):
                maps = True
                if put_leaf(s, w, gva, pte, ngpa + i * entry_size(w), level, entry_rights):
                    return -1
                continue
            below = scan_table(s, table_gpa(w, pte), level - 1, entry_rights, base + (<uint64_t>i << shift))
            if below < 0:
                return -1
            maps = maps or below
    if (maps or whole) and remember(s, key, maps):
        return -1
    return maps or not whole


cdef void scan_all(scan *s) noexcept nogil:
    """The whole scan, from the root. OUT s: rows, count, end."""
    cdef const kvm_pagewalk *w = s.w
    cdef uint64_t pdpte
    cdef int i
    if w.kind == WALK_DIRECT:
        s.leaf.gva = s.leaf.gpa = s.leaf.ngpa = s.first
        s.leaf.size = min(s.last, w.gva_mask) - s.first + 1
        s.leaf.pte_gpa = ~<uint64_t>0
        s.leaf.pte_access = s.leaf.second_access = <uint8_t>ACC_ALL
        if s.first > w.gva_mask:
            return
        if s.n is NULL:
            put_row(s, &s.leaf)
        else:
            cut_from_root(s)
        return
    if not has_pdptes(w):
        scan_table(s, table_gpa(w, w.vcpu.nested_pgd if w.is_nested else w.vcpu.cr3), w.level, ~<uint64_t>0, 0)
        return
    for i in range(4):
        pdpte = read_pdpte(w, s.n, i)
        if pdpte and scan_table(s, table_gpa(w, pdpte), w.level - 1, ~<uint64_t>0,
                                <uint64_t>i << kvmmu_level_shift(w.format, w.level)) < 0:
            return


cdef object rows_of(scan *s):
    rows = np.empty(s.count, _MAPPING)
    cdef uint8_t[::1] view = rows.view(np.uint8)
    if s.count:
        memcpy(&view[0], s.rows, s.count * sizeof(mapping))
    return rows


cdef int large_shift(WalkCopy walk):
    cdef const kvm_pagewalk *w = walk.w.ngpa if walk.w.kind == WALK_SECOND_STAGE else &walk.w
    return PT32_LARGE_SHIFT if w.format == KVMMU_FORMAT_32 else PT64_LARGE_SHIFT


cdef object scan_rows(WalkCopy walk, uint64_t first, uint64_t last, bint merge, size_t limit):
    cdef scan s
    s.w, s.n = &walk.w, walk.w.ngpa
    if walk.w.kind == WALK_SECOND_STAGE:
        s.w, s.n = walk.w.ngpa, NULL
    s.first, s.last, s.merge, s.limit = first, last, merge, limit
    s.count, s.capacity, s.leaves, s.tables, s.table_capacity, s.end = 0, FIRST_ROWS, 0, 0, FIRST_TABLES, SCAN_DONE
    s.leaf.level = s.leaf.pkey = s.leaf.accessed = s.leaf.dirty = s.leaf.global_ = 0
    s.leaf.page_shift = <uint8_t>PAGE_SHIFT
    s.put, s.error = 0, NULL
    s.rows = <mapping *>realloc(NULL, FIRST_ROWS * sizeof(mapping))
    s.seen = <seen_table *>calloc(FIRST_TABLES, sizeof(seen_table))
    try:
        if s.rows is NULL or s.seen is NULL:
            raise MemoryError
        with nogil:
            scan_all(&s)
        if s.error is not NULL:
            error = <object>s.error
            Py_DECREF(error)
            raise error
        if s.end == SCAN_NO_MEMORY:
            raise MemoryError("there is no memory for so many mappings")
        if s.end == SCAN_LIMIT:
            raise ValueError(f"limit: the tables map more than {limit} ranges, or over {LEAVES_PER_ROW} leaves for each "
                             "of as many; ask for a part of them (start, stop), or allow more (limit)")
        return rows_of(&s)
    finally:
        free(s.rows)
        free(s.seen)
