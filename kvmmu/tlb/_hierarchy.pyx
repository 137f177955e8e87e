"""The levels of a `TlbHierarchy`, made and used from Python."""

import numpy as np

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu.arch._bits cimport PAGE_SHIFT
from kvmmu.memory._lock cimport MachineLock
from kvmmu.tlb._counts cimport counts_rows, words_at
from kvmmu.tlb._details cimport (
    DETAIL_LEVELS, MISS_CLASSES, MOST_REFERENCES, details_clear, details_free, details_new, tlb_details,
)
from kvmmu.tlb._levels cimport (
    CLASSES, INCLUSION_EXCLUSIVE, INCLUSION_INCLUSIVE, INCLUSION_NONE, KINDS, MOST_LEVELS, MOST_LINEAR_BITS, SIZES, UPPER_LEVELS,
    WAY_FASTEST, WAY_PORTABLE, WAY_SCALAR, remove_address, remove_all, run_levels, tlb_inclusion, tlb_level, tlb_rows, tlb_way,
)
from kvmmu.tlb._structure cimport (
    KEY_GLOBAL_SHIFT, KEY_TAG_BITS, KEY_TAG_SHIFT, KEY_VALID_SHIFT, MOST_ENTRIES, MOST_PLRU_WAYS, POLICY_FIFO, POLICY_LRU,
    POLICY_PLRU, POLICY_RANDOM, key_structure, structure_free, structure_init, structure_remove,
    structure_remove_all, tlb_policy,
)

cdef inline uint64_t tag_bits() noexcept nogil:
    return ((<uint64_t>1 << KEY_TAG_BITS) - 1) << KEY_TAG_SHIFT | <uint64_t>1 << KEY_GLOBAL_SHIFT


cdef inline uint64_t tag_of(uint32_t number, bint is_global) noexcept nogil:
    return (<uint64_t>1 << KEY_VALID_SHIFT | <uint64_t>number << KEY_TAG_SHIFT | <uint64_t>is_global << KEY_GLOBAL_SHIFT)


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
        In the order in which an access asks them: numbers as `_levels.pxd` and `_structure.pxd` have them.
    psc : dict of int to (sets, ways, policy)
        Paging-structure caches by level of their entries, 2 to 5.
    seed : int
        Of random replacement.
    details : {0, 1, 2}
        None are kept; those of levels and walks; stack distances of all accesses as well.
    """

    def __cinit__(self, levels=(), psc=(), seed=0, details=0, *args):
        cdef uint64_t entries[DETAIL_LEVELS]
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
        for i in range(self.h.count):
            entries[i] = <uint64_t>self.h.levels[i].s.sets * self.h.levels[i].s.ways
        if details:
            self.h.details = details_new(self.h.count, entries, details == 2)
            if self.h.details is NULL:
                raise MemoryError
        self.use(0, 0, 4, 9, 21)

    def __dealloc__(self):
        cdef int i
        details_free(self.h.details)
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
            uint8_t[::1] level=None, uint8_t[::1] references=None, how=None, const uint64_t[::1] ip=None):
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
        ip : ndarray of uint64, optional
            Addresses of the instructions, for the details.
        """
        cdef tlb_rows r
        cdef Py_ssize_t rows = gva.shape[0]
        cdef tlb_way way = WAY_PORTABLE if how == "portable" else WAY_SCALAR if how == "scalar" else WAY_FASTEST
        for name, size, one in (("access", access.shape[0], True), ("leaf", leaf.shape[0], True),
                                ("is_global", rows if is_global is None else is_global.shape[0], False),
                                ("level", rows if level is None else level.shape[0], False),
                                ("references", rows if references is None else references.shape[0], False),
                                ("ip", rows if ip is None else ip.shape[0], False)):
            if size != rows and not (one and size == 1):
                raise ValueError(f"{name}: want {rows} rows, got {size}")
        if not rows:
            return
        r.rows, r.gva, r.access, r.leaf = rows, &gva[0], &access[0], &leaf[0]
        r.access_stride, r.leaf_stride = access.shape[0] == rows and rows > 1, leaf.shape[0] == rows and rows > 1
        r.is_global, r.ip, r.level, r.references = NULL, NULL, NULL, NULL
        if is_global is not None:
            r.is_global = &is_global[0]
        if ip is not None:
            r.ip = &ip[0]
        if level is not None:
            r.level = &level[0]
        if references is not None:
            r.references = &references[0]
        with self.lock:
            with nogil:
                run_levels(&self.h, &r, way)
            if self.h.details is not NULL and self.h.details.out_of_memory:
                raise MemoryError("no memory is left for the details of a TLB hierarchy")

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

    def remove_upper_of(self, uint64_t gva, uint16_t tag):
        """Drop the entries of paging-structure caches of a tag that lead to an address."""
        cdef int level
        with self.lock:
            gva &= (<uint64_t>1 << MOST_LINEAR_BITS) - 1
            for level in range(2, self.h.root_level + 1):
                if self.h.psc[level - 2].keys is not NULL:
                    structure_remove(&self.h.psc[level - 2],
                                     gva >> (PAGE_SHIFT + self.h.index_bits * (level - 1)) | tag_of(tag, False))

    def remove_all(self):
        """Drop everything."""
        with self.lock:
            remove_all(&self.h, 0, 0, 0, 0)

    def counters(self):
        """Return ndarrays of uint64 by name: hits (level, kind, user, size), walks (kind, user, size), psc_hits (level from 2
        on), replaced (level); and the ints references, cached_references, unmapped."""
        cdef int i
        with self.lock:
            return {"hits": words_at(&self.h.hits[0][0], self.h.count * CLASSES).reshape(self.h.count, KINDS, 2, SIZES),
                    "walks": words_at(&self.h.walks[0], CLASSES).reshape(KINDS, 2, SIZES),
                    "psc_hits": words_at(&self.h.psc_hits[0], UPPER_LEVELS),
                    "replaced": np.array([self.h.levels[i].s.replaced for i in range(self.h.count)], np.uint64),
                    "references": int(self.h.references), "cached_references": int(self.h.cached_references),
                    "unmapped": int(self.h.unmapped)}

    def details(self):
        """dict of ndarrays of uint64, or None if none are kept: misses (level, class), by_references (walks), pages and ips (a
        row per key: key, walks), distances (accesses, by distance), and the ints first_uses, after_removals; ips and
        distances are None where there are none."""
        cdef const tlb_details *d
        with self.lock:
            d = self.h.details
            if d is NULL:
                return None
            if d.out_of_memory:
                raise MemoryError("no memory was left for the details of a TLB hierarchy")
            return {"misses": words_at(&d.misses[0][0], self.h.count * MISS_CLASSES).reshape(self.h.count, MISS_CLASSES),
                    "by_references": words_at(d.by_references, MOST_REFERENCES), "pages": counts_rows(&d.pages),
                    "ips": counts_rows(&d.ips) if d.has_ips else None,
                    "distances": words_at(d.distances.counts, d.distances.longest + 1 if d.distances.longest else 0) if d.curve
                    else None, "first_uses": int(d.distances.first_uses), "after_removals": int(d.distances.after_removals)}

    def clear_counters(self):
        """Set all counters to 0; what the levels hold stays."""
        cdef int i
        with self.lock:
            memset(self.h.hits, 0, sizeof(self.h.hits))
            memset(self.h.walks, 0, sizeof(self.h.walks))
            memset(self.h.psc_hits, 0, sizeof(self.h.psc_hits))
            for i in range(self.h.count):
                self.h.levels[i].s.replaced = 0
            self.h.references = self.h.cached_references = self.h.unmapped = 0
            if self.h.details is not NULL:
                details_clear(self.h.details)

    def keys(self, int number):
        """ndarray of uint64 (sets, ways): what a level holds."""
        cdef key_structure *s
        if not 0 <= number < self.h.count:
            raise ValueError(f"number: want 0 to {self.h.count - 1}, got {number}")
        with self.lock:
            s = &self.h.levels[number].s
            return words_at(s.keys, <Py_ssize_t>s.sets * s.stride).reshape(s.sets, s.stride)[:, :s.ways].copy()
