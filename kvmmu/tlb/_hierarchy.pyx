"""Levels of TLBs, as `_hierarchy.pxd` describes them."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmmu.arch._bits cimport ACCESS_FETCH_MASK, ACCESS_USER_MASK, ACCESS_WRITE_MASK, PAGE_SHIFT
from kvmmu.memory._lock cimport MachineLock
from kvmmu.tlb._hierarchy cimport (
    CLASSES, INCLUSION_EXCLUSIVE, INCLUSION_INCLUSIVE, INCLUSION_NONE, KINDS, MOST_LEVELS, NOWHERE, SIZES, UPPER_LEVELS,
    tlb_inclusion, tlb_level, tlb_levels,
)
from kvmmu.tlb._structure cimport (
    KEY_GLOBAL_SHIFT, KEY_SIZE_SHIFT, KEY_TAG_BITS, KEY_TAG_SHIFT, KEY_VALID_SHIFT, MOST_ENTRIES,
    MOST_PLRU_WAYS, POLICY_FIFO, POLICY_LRU, POLICY_PLRU, POLICY_RANDOM, key_structure,
    structure_free, structure_init, structure_insert, structure_remove, structure_remove_all, structure_use, tlb_policy,
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
        uint64_t (*hits)[18]
        uint64_t *walks
        uint64_t references_read, unmapped
        int has_psc, root_level
        int (*walk)(void *h, uint64_t addr, int size) noexcept nogil
        void *h
    void kvmmu_lru_run(lru_rows *r, int portable)

cdef int MOST_LINEAR_BITS = 57


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
            break
        level += 1
    read = level - leaf
    while level > leaf + 1:                             # those that were read
        level -= 1
        if h.psc[level - 2].keys is not NULL:
            structure_insert(&h.psc[level - 2], addr >> (PAGE_SHIFT + h.index_bits * (level - 1)) | h.local_tag)
    return read


cdef void run_rows(tlb_levels *h, Py_ssize_t rows, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                   const uint8_t *leaf, size_t leaf_stride, const uint8_t *is_global, uint8_t *level,
                   uint8_t *references) noexcept nogil:
    """Let rows go through the levels. is_global, level and references may be NULL."""
    cdef uint64_t mask = (<uint64_t>1 << MOST_LINEAR_BITS) - 1, key, addr
    cdef int kind, size, depth, found, read, first
    cdef uint8_t bits
    cdef const uint8_t *path
    cdef Py_ssize_t i
    for i in range(rows):
        size = leaf[i * leaf_stride] - 1
        bits = access[i * access_stride]
        found, read = NOWHERE, 0
        if size < 0 or size >= SIZES:
            h.unmapped += 1
        else:
            kind = kind_of(bits)
            addr = gva[i] & mask
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
        if level is not NULL:
            level[i] = <uint8_t>found
        if references is not NULL:
            references[i] = <uint8_t>read


cdef int walk_of_lru(void *h, uint64_t addr, int size) noexcept nogil:
    return walk(<tlb_levels *>h, addr, size)


cdef void run_lru_rows(tlb_levels *h, lru_rows *r, bint portable) noexcept nogil:
    """The same where all levels are LRU, none inclusive or exclusive. IN r: rows, columns and results."""
    cdef int kind, size, i, bits
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
    r.hits, r.walks = h.hits, h.walks
    r.references_read = r.unmapped = 0
    r.walk, r.h, r.root_level, r.has_psc = walk_of_lru, h, h.root_level, 0
    for i in range(UPPER_LEVELS):
        r.has_psc |= h.psc[i].keys is not NULL
    kvmmu_lru_run(r, portable)
    h.references += r.references_read
    h.unmapped += r.unmapped


# ---- invalidation ------------------------------------------------------------------------------------------------------

cdef void remove_all(tlb_levels *h, uint64_t mask, uint64_t value, uint64_t psc_mask, uint64_t psc_value) noexcept nogil:
    """Drop keys with key & mask == value, and entries of paging-structure caches likewise."""
    cdef int i
    for i in range(h.count):
        structure_remove_all(&h.levels[i].s, mask, value)
    for i in range(UPPER_LEVELS):
        if h.psc[i].keys is not NULL:
            structure_remove_all(&h.psc[i], psc_mask, psc_value)


cdef void remove_address(tlb_levels *h, uint64_t addr, uint64_t tag) noexcept nogil:
    """Drop the page around an address, of every size."""
    cdef int i, size
    addr &= (<uint64_t>1 << MOST_LINEAR_BITS) - 1
    for size in range(SIZES):
        for i in range(h.count):
            if h.levels[i].sizes >> size & 1:
                structure_remove(&h.levels[i].s, addr >> h.shifts[size] | <uint64_t>size << KEY_SIZE_SHIFT | tag)


cdef inline uint64_t tag_bits() noexcept nogil:
    return ((<uint64_t>1 << KEY_TAG_BITS) - 1) << KEY_TAG_SHIFT | <uint64_t>1 << KEY_GLOBAL_SHIFT


cdef inline uint64_t tag_of(uint32_t number, bint is_global) noexcept nogil:
    return (<uint64_t>1 << KEY_VALID_SHIFT | <uint64_t>number << KEY_TAG_SHIFT | <uint64_t>is_global << KEY_GLOBAL_SHIFT)


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef object words(const uint64_t *from_, Py_ssize_t count):
    """Return a copy of some words as an ndarray."""
    cdef uint64_t[::1] out
    found = np.empty(count, np.uint64)
    if count:
        out = found
        memcpy(&out[0], from_, count * sizeof(uint64_t))
    return found


cdef int check_shape(uint32_t sets, uint32_t ways, int policy) except -1:
    if not (sets and ways and sets <= MOST_ENTRIES // ways):
        raise ValueError(f"a level of {sets} sets of {ways} ways: want 1 to {int(MOST_ENTRIES)} entries")
    if policy not in (POLICY_LRU, POLICY_FIFO, POLICY_PLRU, POLICY_RANDOM):
        raise ValueError(f"policy: {policy} is none")
    if policy == POLICY_PLRU and ways > MOST_PLRU_WAYS:
        raise ValueError(f"ways: {ways}; tree-PLRU has at most {int(MOST_PLRU_WAYS)}")
    return 0


cdef class TlbLevels:
    """The levels of a `TlbHierarchy`, compiled. Tags are numbers below 2**15 that the caller gives out.

    Parameters
    ----------
    levels : sequence of (sets, ways, policy, inclusion, kinds, sizes)
        In the order in which an access asks them: numbers as `_hierarchy.pxd` and `_structure.pxd` have them.
    psc : dict of int to (sets, ways, policy)
        Paging-structure caches by level of their entries, 2 to 5.
    seed : int
        Of random replacement.
    """

    def __cinit__(self, levels=(), psc=(), seed=0, *args):
        cdef tlb_level *level
        cdef uint32_t sets, ways
        cdef int i, k, size, kind
        self.lock = MachineLock()
        levels, caches = list(levels), dict(psc)
        if len(levels) > MOST_LEVELS:
            raise ValueError(f"levels: {len(levels)}; at most {MOST_LEVELS} are allowed")
        for i, (sets, ways, policy, inclusion, kinds, sizes) in enumerate(levels):
            check_shape(sets, ways, policy)
            if inclusion not in (INCLUSION_NONE, INCLUSION_INCLUSIVE, INCLUSION_EXCLUSIVE):
                raise ValueError(f"inclusion: {inclusion!r} is none")
            level = &self.h.levels[i]
            if structure_init(&level.s, sets, ways, <tlb_policy><int>policy, <uint64_t>seed + <uint64_t>i):
                raise MemoryError
            self.h.count = i + 1
            level.inclusion, level.kinds, level.sizes = <tlb_inclusion><int>inclusion, <uint32_t>kinds, <uint32_t>sizes
            self.h.is_lru = (i == 0 or self.h.is_lru) and policy == POLICY_LRU and inclusion == INCLUSION_NONE
        for number, (sets, ways, policy) in caches.items():
            i = number
            if not 2 <= i <= 5:
                raise ValueError(f"psc: want 2 to 5, got {i}")
            check_shape(sets, ways, policy)
            if structure_init(&self.h.psc[i - 2], sets, ways, <tlb_policy><int>policy,
                              <uint64_t>seed + <uint64_t>(MOST_LEVELS + i)):
                raise MemoryError
        for i in range(self.h.count):
            level = &self.h.levels[i]
            for size in range(SIZES):
                level.below[size] = -1
                if not level.sizes >> size & 1:
                    continue
                for k in range(self.h.count):
                    if k == i or not (self.h.levels[k].kinds & level.kinds and self.h.levels[k].sizes >> size & 1):
                        continue
                    if k < i:
                        level.above[size] |= <uint32_t>1 << k
                    elif level.below[size] < 0:
                        level.below[size] = <int8_t>k
                for kind in range(KINDS):
                    if level.kinds >> kind & 1:
                        self.h.path[kind][size][self.h.depth[kind][size]] = <uint8_t>i
                        self.h.depth[kind][size] += 1
        self.use(0, 0, 4, 9, 21)

    def __dealloc__(self):
        cdef int i
        for i in range(self.h.count):
            structure_free(&self.h.levels[i].s)
        for i in range(UPPER_LEVELS):
            structure_free(&self.h.psc[i])

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    def use(self, uint16_t tag, uint16_t global_tag, int root_level, int index_bits, int large_shift):
        """Put tags and a paging mode in force."""
        if tag >> KEY_TAG_BITS or global_tag >> KEY_TAG_BITS or not 2 <= root_level <= 5 or (
                index_bits not in (9, 10) or large_shift not in (21, 22)):
            raise ValueError("a tag, a root level or the bits of an index are out of range")
        with self.lock:
            self.h.local_tag, self.h.global_tag = tag_of(tag, False), tag_of(global_tag, True)
            self.h.root_level, self.h.index_bits = root_level, index_bits
            self.h.shifts[0], self.h.shifts[1], self.h.shifts[2] = PAGE_SHIFT, large_shift, PAGE_SHIFT + 18

    def run(self, const uint64_t[::1] gva, const uint8_t[::1] access, const uint8_t[::1] leaf, const uint8_t[::1] is_global=None,
            uint8_t[::1] level=None, uint8_t[::1] references=None, how=None):
        """Let accesses go through the levels.

        Parameters
        ----------
        gva : ndarray of uint64, C-contiguous, as all are
        access : ndarray of uint8
            Access bits; one, or one per row.
        leaf : ndarray of uint8
            Level of the leaf, 1 to 3; one, or one per row. Anything else: no page.
        is_global : ndarray of uint8, optional
        level, references : ndarray of uint8, optional
            OUT: number of the level that hit, 255 for a walk; entries that the walk read.
        how : {None, "portable", "scalar"}
            Not the fastest way that there is, but without vectors, or the one for all hierarchies: for tests.
        """
        cdef lru_rows r
        cdef Py_ssize_t rows = gva.shape[0]
        cdef const uint8_t *kept = NULL
        cdef uint8_t *found = NULL
        cdef uint8_t *read = NULL
        for name, size, one in (("access", access.shape[0], True), ("leaf", leaf.shape[0], True),
                                ("is_global", rows if is_global is None else is_global.shape[0], False),
                                ("level", rows if level is None else level.shape[0], False),
                                ("references", rows if references is None else references.shape[0], False)):
            if size != rows and not (one and size == 1):
                raise ValueError(f"{name}: want {rows} rows, got {size}")
        if not rows:
            return
        if is_global is not None:
            kept = &is_global[0]
        if level is not None:
            found = &level[0]
        if references is not None:
            read = &references[0]
        cdef bint portable = how == "portable"
        cdef bint fast = self.h.is_lru and how != "scalar"
        r.rows, r.gva, r.access, r.leaf, r.is_global = rows, &gva[0], &access[0], &leaf[0], kept
        r.access_stride, r.leaf_stride = access.shape[0] == rows and rows > 1, leaf.shape[0] == rows and rows > 1
        r.level, r.references = found, read
        with self.lock, nogil:
            if fast:
                run_lru_rows(&self.h, &r, portable)
            else:
                run_rows(&self.h, rows, r.gva, r.access, r.access_stride, r.leaf, r.leaf_stride, kept, found, read)

    def remove_address(self, uint64_t gva, uint16_t tag, bint is_global):
        """Drop the page around an address under a tag, of every size."""
        with self.lock:
            remove_address(&self.h, gva, tag_of(tag, is_global))

    def remove_tag(self, uint16_t tag, bint is_global):
        """Drop all pages of a tag, and entries of paging-structure caches if it is not that of global pages."""
        cdef uint64_t value = tag_of(tag, is_global)
        with self.lock:
            remove_all(&self.h, tag_bits(), value & tag_bits(), tag_bits(), value & tag_bits())

    def remove_upper(self, uint16_t tag):
        """Drop the entries of paging-structure caches of a tag."""
        cdef uint64_t value = tag_of(tag, False)
        cdef int i
        with self.lock:
            for i in range(UPPER_LEVELS):
                if self.h.psc[i].keys is not NULL:
                    structure_remove_all(&self.h.psc[i], tag_bits(), value & tag_bits())

    def remove_all(self):
        """Drop everything."""
        with self.lock:
            remove_all(&self.h, 0, 0, 0, 0)

    def counters(self):
        """dict of ndarrays of uint64: hits (level, kind, user, size), walks (kind, user, size), psc_hits (level from 2 on),
        replaced (level), and the ints references, unmapped."""
        cdef int i
        with self.lock:
            return {"hits": words(&self.h.hits[0][0], self.h.count * CLASSES).reshape(self.h.count, KINDS, 2, SIZES),
                    "walks": words(&self.h.walks[0], CLASSES).reshape(KINDS, 2, SIZES),
                    "psc_hits": words(&self.h.psc_hits[0], UPPER_LEVELS),
                    "replaced": np.array([self.h.levels[i].s.replaced for i in range(self.h.count)], np.uint64),
                    "references": int(self.h.references), "unmapped": int(self.h.unmapped)}

    def clear_counters(self):
        """Set all counters to 0; what the levels hold stays."""
        cdef int i
        with self.lock:
            memset(self.h.hits, 0, sizeof(self.h.hits))
            memset(self.h.walks, 0, sizeof(self.h.walks))
            memset(self.h.psc_hits, 0, sizeof(self.h.psc_hits))
            for i in range(self.h.count):
                self.h.levels[i].s.replaced = 0
            self.h.references = self.h.unmapped = 0

    def keys(self, int number):
        """ndarray of uint64 (sets, ways): what a level holds."""
        cdef key_structure *s
        if not 0 <= number < self.h.count:
            raise ValueError(f"number: want 0 to {self.h.count - 1}, got {number}")
        with self.lock:
            s = &self.h.levels[number].s
            return words(s.keys, <Py_ssize_t>s.sets * s.stride).reshape(s.sets, s.stride)[:, :s.ways].copy()
