"""The TLB, as `_tlb.pxd` describes it."""

import operator

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from kvmmu.arch._bits cimport PAGE_SHIFT, PT32_INDEX_BITS, PT64_INDEX_BITS
from kvmmu.memory._alloc cimport kvmmu_alloc_table
from kvmmu.memory._lock cimport MachineLock
from kvmmu.tlb._tlb cimport (
    TLB_GLOBAL_SHIFT, TLB_LEVELS, TLB_MAX_ENTRIES, TLB_PCID_BITS, TLB_SPACE_SHIFT, TLB_SPACES, TLB_SPLIT_SIZES, TLB_VPN_BITS,
    tlb, tlb_array, tlb_entry, tlb_lookup, tlb_page,
)
from kvmmu.walk._arguments cimport check_scalar_word

from kvmmu.arch.arguments import check_bool, check_choice, check_int, check_word


cdef int tlb_init(tlb *t, const size_t *sets, const size_t *ways) noexcept nogil:
    cdef int i
    memset(t, 0, sizeof(tlb))
    t.nr_spaces = 1
    for i in range(TLB_LEVELS):
        if sets[i] == 0 or sets[i] & (sets[i] - 1) or ways[i] == 0 or sets[i] > TLB_MAX_ENTRIES // ways[i]:
            tlb_free(t)
            return -1
        t.arrays[i].shift = PAGE_SHIFT + PT64_INDEX_BITS * i
        t.arrays[i].sets, t.arrays[i].ways = sets[i], ways[i]
        t.arrays[i].keys = <uint64_t *>kvmmu_alloc_table(sets[i], ways[i], sizeof(uint64_t))
        t.arrays[i].entries = <tlb_entry *>kvmmu_alloc_table(sets[i], ways[i], sizeof(tlb_entry))
        if t.arrays[i].keys is NULL or t.arrays[i].entries is NULL:
            tlb_free(t)
            return -1
    return 0


cdef void tlb_free(tlb *t) noexcept nogil:
    cdef int i
    for i in range(TLB_LEVELS):
        free(t.arrays[i].keys)
        free(t.arrays[i].entries)
    memset(t, 0, sizeof(tlb))


cdef int tlb_copy(tlb *to, const tlb *t) noexcept nogil:
    cdef size_t n
    cdef int i
    to[0] = t[0]
    for i in range(TLB_LEVELS):                         # `tlb_free()` must not find those of the original
        to.arrays[i].keys, to.arrays[i].entries = NULL, NULL
    for i in range(TLB_LEVELS):
        n = t.arrays[i].sets * t.arrays[i].ways
        to.arrays[i].keys = <uint64_t *>kvmmu_alloc_table(n, 1, sizeof(uint64_t))
        to.arrays[i].entries = <tlb_entry *>kvmmu_alloc_table(n, 1, sizeof(tlb_entry))
        if to.arrays[i].keys is NULL or to.arrays[i].entries is NULL:
            tlb_free(to)
            return -1
        memcpy(to.arrays[i].keys, t.arrays[i].keys, n * sizeof(uint64_t))
        memcpy(to.arrays[i].entries, t.arrays[i].entries, n * sizeof(tlb_entry))
    return 0


cdef void tlb_swap(tlb *a, tlb *b) noexcept nogil:
    cdef tlb kept = a[0]
    a[0] = b[0]
    b[0] = kept


cdef void tlb_flush_all(tlb *t) noexcept nogil:
    cdef int i
    for i in range(TLB_LEVELS):
        if t.arrays[i].valid:
            memset(t.arrays[i].keys, 0, t.arrays[i].sets * t.arrays[i].ways * sizeof(uint64_t))
            t.arrays[i].valid = 0
    memset(t.split, 0, sizeof(t.split))


cdef void tlb_use(tlb *t, uint64_t space, uint32_t pcid) noexcept nogil:
    cdef int i = 1
    while i < t.nr_spaces and t.spaces[i] != space:
        i += 1
    if i == t.nr_spaces:
        if i == TLB_SPACES:
            tlb_flush_all(t)
            i = t.nr_spaces = 1
        t.spaces[i] = space
        t.nr_spaces += 1
    t.local_tag = (<uint64_t>i << TLB_SPACE_SHIFT) | (<uint64_t>pcid << TLB_VPN_BITS)
    t.global_tag = (<uint64_t>i << TLB_SPACE_SHIFT) | (<uint64_t>1 << TLB_GLOBAL_SHIFT)


cdef inline int split_shift(int size) noexcept nogil:
    """Return log2 of a size of split[]."""
    if size == 0:
        return PAGE_SHIFT + PT64_INDEX_BITS
    return PAGE_SHIFT + PT32_INDEX_BITS if size == 1 else PAGE_SHIFT + 2 * PT64_INDEX_BITS


cdef inline uint64_t split_bit(uint64_t gva, int shift) noexcept nogil:
    cdef uint64_t page = gva >> shift
    return <uint64_t>1 << ((page ^ (page >> 6) ^ (page >> 12)) & 63)


cdef tlb_entry *tlb_fill(tlb *t, uint64_t gva, int level, bint is_global) noexcept nogil:
    cdef tlb_array *a = &t.arrays[level - 1]
    cdef uint64_t page = tlb_page(a.shift, gva), key = page | (t.global_tag if is_global else t.local_tag)
    cdef size_t base = (page & (a.sets - 1)) * a.ways, way, victim = 0
    cdef uint32_t age, oldest = 0
    for way in range(a.ways):
        if a.keys[base + way] == 0 or a.keys[base + way] == key:
            victim = way
            break
        age = t.clock - a.entries[base + way].stamp         # modulo 2**32: the clock may wrap
        if age >= oldest:
            oldest, victim = age, way
    if a.keys[base + victim] == 0:
        a.valid += 1
    elif a.keys[base + victim] != key:
        t.evictions += 1
    t.clock += 1
    a.keys[base + victim] = key
    a.entries[base + victim].stamp = t.clock
    return &a.entries[base + victim]


cdef void tlb_remember_split(tlb *t, uint64_t gva, int page_shift) noexcept nogil:
    cdef int i
    for i in range(TLB_SPLIT_SIZES):
        if split_shift(i) == page_shift:
            t.split[i] |= split_bit(gva, page_shift)


cdef void drop_key(tlb *t, uint64_t gva, uint64_t tag) noexcept nogil:
    cdef tlb_array *a
    cdef uint64_t page
    cdef size_t base, way
    cdef int i
    for i in range(TLB_LEVELS):
        a = &t.arrays[i]
        page = tlb_page(a.shift, gva)
        base = (page & (a.sets - 1)) * a.ways
        for way in range(a.ways):
            if a.keys[base + way] == (page | tag):
                a.keys[base + way] = 0
                a.valid -= 1


cdef void drop_pieces(tlb *t, uint64_t gva, int shift, uint64_t tag) noexcept nogil:
    """Drop the smaller entries of the guest's page of 2**shift bytes around gva."""
    cdef tlb_array *a
    cdef uint64_t first, pages
    cdef size_t j
    cdef int i
    for i in range(TLB_LEVELS):
        a = &t.arrays[i]
        if a.valid == 0 or a.shift >= shift:
            continue
        pages = <uint64_t>1 << (shift - a.shift)
        first = tlb_page(a.shift, gva) & ~(pages - 1)
        for j in range(a.sets * a.ways):
            if (a.keys[j] & ~(pages - 1)) == (first | tag) and a.entries[j].page_shift == shift:
                a.keys[j] = 0
                a.valid -= 1


cdef void drop_page(tlb *t, uint64_t gva, uint64_t tag) noexcept nogil:
    """Drop the entries of the guest's page around gva, whole or in pieces."""
    cdef int i
    drop_key(t, gva, tag)
    for i in range(TLB_SPLIT_SIZES):
        if t.split[i] & split_bit(gva, split_shift(i)):
            drop_pieces(t, gva, split_shift(i), tag)


cdef void drop_matching(tlb *t, uint64_t mask, uint64_t value) noexcept nogil:
    """Drop entries whose key is value under mask."""
    cdef tlb_array *a
    cdef size_t j
    cdef int i
    for i in range(TLB_LEVELS):
        a = &t.arrays[i]
        if a.valid == 0:
            continue
        for j in range(a.sets * a.ways):
            if a.keys[j] and (a.keys[j] & mask) == value:
                a.keys[j] = 0
                a.valid -= 1


cdef inline uint64_t space_bits() noexcept nogil:
    return ~((<uint64_t>1 << TLB_SPACE_SHIFT) - 1)


cdef inline uint64_t tag_of(const tlb *t, uint32_t pcid) noexcept nogil:
    return (t.local_tag & space_bits()) | (<uint64_t>pcid << TLB_VPN_BITS)


cdef void tlb_drop(tlb *t, uint64_t gva) noexcept nogil:
    drop_key(t, gva, t.local_tag)
    drop_key(t, gva, t.global_tag)


cdef void tlb_invlpg(tlb *t, uint64_t gva) noexcept nogil:
    drop_page(t, gva, t.local_tag)
    drop_page(t, gva, t.global_tag)


cdef void tlb_invpcid_address(tlb *t, uint32_t pcid, uint64_t gva) noexcept nogil:
    drop_page(t, gva, tag_of(t, pcid))


cdef void tlb_flush_pcid(tlb *t, uint32_t pcid) noexcept nogil:
    drop_matching(t, ~((<uint64_t>1 << TLB_VPN_BITS) - 1), tag_of(t, pcid))


cdef void tlb_flush_space(tlb *t, bint globals_too) noexcept nogil:
    cdef uint64_t mask = space_bits()
    if not globals_too:
        mask |= <uint64_t>1 << TLB_GLOBAL_SHIFT
    drop_matching(t, mask, t.local_tag & space_bits())


cdef uint64_t space_number(const tlb *t, uint64_t space) noexcept nogil:
    """Return the number of a space in its place in a key, 0 of one that has none."""
    cdef int i
    for i in range(1, t.nr_spaces):
        if t.spaces[i] == space:
            return <uint64_t>i << TLB_SPACE_SHIFT
    return 0


cdef void tlb_flush_space_of(tlb *t, uint64_t space, bint globals_too) noexcept nogil:
    cdef uint64_t number = space_number(t, space), mask = space_bits()
    if not globals_too:
        mask |= <uint64_t>1 << TLB_GLOBAL_SHIFT
    if number:
        drop_matching(t, mask, number)


cdef void tlb_invalidate_page_in(tlb *t, uint64_t space, uint64_t gva) noexcept nogil:
    """Drop a page of every PCID, and global ones."""
    cdef uint64_t number = space_number(t, space), vpn_mask = (<uint64_t>1 << TLB_VPN_BITS) - 1
    cdef uint64_t address = gva & ((vpn_mask << PAGE_SHIFT) | (((<uint64_t>1 << PAGE_SHIFT) - 1)))
    cdef tlb_array *a
    cdef size_t j
    cdef int i, shift
    if number == 0:
        return
    for i in range(TLB_LEVELS):
        a = &t.arrays[i]
        if a.valid == 0:
            continue
        for j in range(a.sets * a.ways):
            shift = max(a.shift, <int>a.entries[j].page_shift)
            if a.keys[j] & space_bits() == number and (a.keys[j] & vpn_mask) << a.shift >> shift == address >> shift:
                a.keys[j] = 0
                a.valid -= 1


# ---- Tlb ---------------------------------------------------------------------------------------------------------------

_GEOMETRY = ((128, 12), (128, 8), (4, 4))


def _shape(geometry):
    """Return [(sets, ways)] of 4K, 2M and 1G, checked."""
    try:
        rows = [tuple(map(operator.index, row)) for row in geometry]
    except TypeError:
        rows = []
    if len(rows) != TLB_LEVELS or any(len(row) != 2 for row in rows):
        raise ValueError(f"geometry: want three pairs of integers, (sets, ways) of 4K, 2M and 1G pages, got {geometry!r}")
    for sets, ways in rows:
        if not (sets >= 1 and sets & (sets - 1) == 0 and ways >= 1 and sets * ways <= TLB_MAX_ENTRIES):
            raise ValueError(f"geometry: want sets a power of two, ways at least 1, and at most {TLB_MAX_ENTRIES} entries, "
                             f"got {sets} sets of {ways}")
    return rows


cdef class Tlb:
    """A set-associative TLB for 4K, 2M and 1G pages.

    Parameters
    ----------
    geometry : sequence of (int, int)
        Sets (a power of two) and ways, for 4K, 2M and 1G pages; at most 2**24 entries each.

    Attributes
    ----------
    hits, misses, evictions : int

    Notes
    -----
    Every method waits for the lock of the machine that uses the TLB; see `Vm`.
    """

    def __cinit__(self, *args, **kwargs):
        self.lock = MachineLock()
        set_geometry(self, _GEOMETRY)

    def __init__(self, geometry=_GEOMETRY):
        rows = _shape(geometry)
        with self.lock:
            set_geometry(self, rows)

    def __dealloc__(self):
        tlb_free(&self.t)

    @property
    def hits(self):
        return int(self.t.hits)

    @property
    def misses(self):
        return int(self.t.misses)

    @property
    def evictions(self):
        return int(self.t.evictions)

    def __len__(self):
        with self.lock:
            return int(self.t.arrays[0].valid + self.t.arrays[1].valid + self.t.arrays[2].valid)

    def __repr__(self):
        shape = ", ".join(f"{self.t.arrays[i].sets}x{self.t.arrays[i].ways}" for i in range(TLB_LEVELS))
        return f"<Tlb {shape}: {len(self)} entries, {self.hits} hits, {self.misses} misses>"

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled; its method copy() makes "
                        f"another one")

    def copy(self):
        """Return another TLB with the same geometry, entries and counters."""
        cdef Tlb copy = Tlb.__new__(Tlb)
        cdef tlb same
        with self.lock:
            if tlb_copy(&same, &self.t):
                raise MemoryError
        tlb_swap(&copy.t, &same)
        tlb_free(&same)
        return copy

    def use(self, space=0, pcid=0):
        """Put a space (any 64-bit number) and a PCID in force."""
        cdef uint64_t number = check_scalar_word("space", space)
        cdef uint32_t tag = check_word("pcid", pcid, TLB_PCID_BITS)
        with self.lock:
            tlb_use(&self.t, number, tag)

    def fill(self, gva, hpa, level=1, is_global=False, page_shift=None):
        """Enter a translation of the page of `level` around gva, part of a guest's page of 2**page_shift bytes (21, 22 or 30)."""
        cdef uint64_t addr = check_scalar_word("gva", gva), page = check_scalar_word("hpa", hpa)
        cdef int size = check_int("level", level, 1, TLB_LEVELS)
        cdef bint kept = check_bool("is_global", is_global)
        cdef int shift = self.t.arrays[size - 1].shift, whole = shift
        cdef tlb_entry *entry
        if page_shift is not None and page_shift != shift:
            whole = check_choice("page_shift", page_shift, (21, 22, 30))
            if whole < shift:
                raise ValueError(f"page_shift: want no less than that of level {size}, {shift}, got {page_shift}")
        with self.lock:
            entry = tlb_fill(&self.t, addr, size, kept)
            entry.hpa = page                            # all else is that of the entry that was there
            entry.page_shift = <uint8_t>whole
            if whole > shift:
                tlb_remember_split(&self.t, addr, whole)

    def lookup(self, gva):
        """Return (hpa of the page, level) of the entry for gva, or None."""
        cdef int level = 0
        cdef uint64_t addr = check_scalar_word("gva", gva)
        cdef tlb_entry *entry
        with self.lock:
            entry = tlb_lookup(&self.t, addr, &level)
            return None if entry is NULL else (int(entry.hpa), level)

    def invlpg(self, gva):
        """Drop entries of the guest's page around gva: of the PCID in force, and global ones."""
        cdef uint64_t addr = check_scalar_word("gva", gva)
        with self.lock:
            tlb_invlpg(&self.t, addr)

    def invpcid(self, type, pcid=0, gva=0):
        """INVPCID: 0 an address of a PCID, 1 a PCID, 2 all, 3 all but global ones; in the space in force."""
        cdef int how = check_int("type", type, 0, 3)
        cdef uint32_t tag = check_word("pcid", pcid, TLB_PCID_BITS)
        cdef uint64_t addr = check_scalar_word("gva", gva)
        with self.lock:
            if how == 0:
                tlb_invpcid_address(&self.t, tag, addr)
            elif how == 1:
                tlb_flush_pcid(&self.t, tag)
            else:
                tlb_flush_space(&self.t, how == 2)

    def flush(self):
        """Drop everything, in every space."""
        with self.lock:
            tlb_flush_all(&self.t)


cdef int set_geometry(Tlb self, rows) except -1:
    """Give a TLB checked (sets, ways), without entries. IN self: with its lock held, or not used by anybody yet."""
    cdef size_t sets[3]
    cdef size_t ways[3]
    cdef tlb fresh
    cdef int i
    for i in range(TLB_LEVELS):
        sets[i], ways[i] = rows[i]
    if tlb_init(&fresh, sets, ways):
        raise MemoryError
    tlb_free(&self.t)
    self.t = fresh
    tlb_use(&self.t, 0, 0)
    return 0
