"""The state of the levels of a hierarchy as arrays, and levels that go on from it.

    hits, walks         counters, as `_levels.pxd` has them
    counts              references, cached_references, unmapped, psc_hits
    level0.keys         (sets, ways), of each level; pscN.keys likewise, N the level of the cached entries
    level0.trees        of tree-PLRU
    level0.words        last, random, replaced
    misses, by_references, distances, details
                        of the details; the last one: has_ips, first_uses, after_removals
    pages, ips          a row per key: key, count
    asked0.keys         of each level, the keys that it was asked for; all.keys: of all accesses, with stack distances
    asked0.stack        by time of the last use: number of the key + 1, or 2**32 - 1 for an empty entry
    asked0.last         the key used last, or 0
"""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy

from kvmmu.tlb._counts cimport counts_add, counts_rows, key_counts, words_at
from kvmmu.tlb._details cimport MISS_CLASSES, MOST_REFERENCES, details_clear, tlb_details
from kvmmu.tlb._hierarchy cimport TlbLevels
from kvmmu.tlb._levels cimport CLASSES, SIZES, UPPER_LEVELS, tlb_levels
from kvmmu.tlb._recency cimport recency, recency_free, recency_init, recency_load
from kvmmu.tlb._structure cimport KEY_GLOBAL_SHIFT, KEY_SIZE_SHIFT, KEY_VALID_SHIFT, POLICY_PLRU, key_structure

cdef enum:
    MOST_KEYS = 1 << 30                 # of one stack
    WORDS = 3                           # of a structure
    COUNTS = 3                          # beside those of paging-structure caches


# ---- saving ----------------------------------------------------------------------------------------------------------------

cdef int save_structure(dict state, str name, const key_structure *s) except -1:
    keys = words_at(s.keys, <size_t>s.sets * s.stride).reshape(s.sets, s.stride)
    state[f"{name}.keys"] = keys[:, :s.ways].copy()
    state[f"{name}.words"] = np.array([s.last, s.random, s.replaced], np.uint64)
    if s.policy == POLICY_PLRU:
        state[f"{name}.trees"] = words_at(s.trees, s.sets)
    return 0


cdef int save_recency(dict state, str name, const recency *r) except -1:
    cdef uint32_t[::1] out
    cdef uint32_t slot, to = 0
    stack = np.empty(r.in_use, np.uint32)
    out = stack
    for slot in range(r.next_slot):
        if r.nodes_at[slot]:
            out[to] = r.nodes_at[slot]
            to += 1
    state[f"{name}.keys"] = words_at(r.keys, r.nodes)
    state[f"{name}.stack"] = stack
    state[f"{name}.last"] = np.array([r.last], np.uint64)
    return 0


cdef int save_details(dict state, const tlb_details *d) except -1:
    cdef int i
    if d.out_of_memory:
        raise MemoryError("no memory was left for the details of a TLB hierarchy")
    state["misses"] = words_at(&d.misses[0][0], d.count * MISS_CLASSES).reshape(d.count, MISS_CLASSES)
    state["by_references"] = words_at(d.by_references, MOST_REFERENCES)
    state["details"] = np.array([d.has_ips, d.distances.first_uses, d.distances.after_removals], np.uint64)
    state["pages"], state["ips"] = counts_rows(&d.pages), counts_rows(&d.ips)
    for i in range(d.count):
        save_recency(state, f"asked{i}", &d.asked[i])
    if d.curve:
        state["distances"] = words_at(d.distances.counts, d.distances.longest + 1 if d.distances.longest else 0)
        save_recency(state, "all", &d.all)
    return 0


def save_levels(TlbLevels levels not None):
    """Return all that levels hold and have counted, but for the tags in force: a dict of arrays."""
    cdef tlb_levels *h = &levels.h
    cdef int i
    state = {}
    with levels.lock:
        state["hits"] = words_at(&h.hits[0][0], h.count * CLASSES).reshape(h.count, CLASSES)
        state["walks"] = words_at(h.walks, CLASSES)
        state["counts"] = np.array([h.references, h.cached_references, h.unmapped]
                                   + [h.psc_hits[i] for i in range(UPPER_LEVELS)], np.uint64)
        for i in range(h.count):
            save_structure(state, f"level{i}", &h.levels[i].s)
        for i in range(UPPER_LEVELS):
            if h.psc[i].keys is not NULL:
                save_structure(state, f"psc{i + 2}", &h.psc[i])
        if h.details is not NULL:
            save_details(state, h.details)
    return state


# ---- restoring -------------------------------------------------------------------------------------------------------------

cdef object array_of(dict state, str name, tuple shape, dtype=np.uint64):
    """Return an array of the state, taken out of it. IN shape: None for any length."""
    found = state.pop(name, None)
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.ndim != len(shape) or any(
            want is not None and size != want for size, want in zip(found.shape, shape)):
        raise ValueError(f"{name}: want {np.dtype(dtype)} of shape {shape}, got "
                         + ("nothing" if found is None else f"{found.dtype} of shape {found.shape}"))
    return np.ascontiguousarray(found)


cdef int put_words(uint64_t *to, object array) except -1:
    cdef const uint64_t[::1] rows = array.reshape(-1)
    if rows.shape[0]:
        memcpy(to, &rows[0], rows.shape[0] * sizeof(uint64_t))
    return 0


cdef int check_keys(str name, object keys, bint tagged) except -1:
    """Keys are pages of one of the sizes; those of structures are tagged, and 0 is an empty way."""
    full = keys[keys != 0] if tagged else keys
    size = full >> np.uint64(KEY_SIZE_SHIFT) & np.uint64(3)
    upper = full >> np.uint64(KEY_VALID_SHIFT if tagged else KEY_GLOBAL_SHIFT)
    if (size >= SIZES).any() or (upper != tagged).any():
        raise ValueError(f"{name}: a key that is no page")
    return 0


cdef int put_structure(dict state, str name, key_structure *s, bint of_pages) except -1:
    cdef size_t set_
    keys = array_of(state, f"{name}.keys", (s.sets, s.ways))
    words = array_of(state, f"{name}.words", (WORDS,))
    if of_pages:
        check_keys(f"{name}.keys", keys, True)
    for set_ in range(s.sets):
        put_words(&s.keys[set_ * s.stride], keys[set_])
    if s.policy == POLICY_PLRU:
        put_words(s.trees, array_of(state, f"{name}.trees", (s.sets,)))
    s.last, s.random, s.replaced = words[0], words[1], words[2]
    return 0


cdef int put_recency(dict state, str name, recency *r) except -1:
    cdef const uint64_t[::1] keys
    cdef const uint32_t[::1] stack
    cdef uint64_t last
    cdef int failed
    keys_array = array_of(state, f"{name}.keys", (None,))
    stack_array = array_of(state, f"{name}.stack", (None,), np.uint32)
    last = array_of(state, f"{name}.last", (1,))[0]
    if max(len(keys_array), len(stack_array)) > MOST_KEYS:
        raise ValueError(f"{name}: more than {int(MOST_KEYS)} keys")
    check_keys(f"{name}.keys", keys_array, True)
    keys, stack = keys_array, stack_array
    recency_free(r)
    if recency_init(r):
        raise MemoryError
    failed = recency_load(r, &keys[0] if len(keys) else NULL, <uint32_t>len(keys), &stack[0] if len(stack) else NULL,
                          <uint32_t>len(stack), last)
    if failed:
        raise MemoryError if failed == -1 else ValueError(f"{name}: not the keys and the stack of accesses")
    return 0


cdef int put_counts(key_counts *c, object rows) except -1:
    cdef const uint64_t[:, ::1] counted = rows
    cdef Py_ssize_t i
    for i in range(counted.shape[0]):
        if not counts_add(c, counted[i, 0], counted[i, 1]):
            raise MemoryError
    return 0


cdef int put_details(dict state, tlb_details *d) except -1:
    cdef int i
    details_clear(d)
    put_words(&d.misses[0][0], array_of(state, "misses", (d.count, MISS_CLASSES)))
    put_words(d.by_references, array_of(state, "by_references", (MOST_REFERENCES,)))
    words = array_of(state, "details", (WORDS,))
    pages, ips = array_of(state, "pages", (None, 2)), array_of(state, "ips", (None, 2))
    check_keys("pages", pages[:, 0], False)
    put_counts(&d.pages, pages)
    put_counts(&d.ips, ips)
    for i in range(d.count):
        put_recency(state, f"asked{i}", &d.asked[i])
    if d.curve:
        distances = array_of(state, "distances", (None,))
        if len(distances) > MOST_KEYS or len(distances) == 1:
            raise ValueError(f"distances: {len(distances)} rows")
        if len(distances):
            d.distances.counts = <uint64_t *>calloc(len(distances), sizeof(uint64_t))
            if d.distances.counts is NULL:
                raise MemoryError
            put_words(d.distances.counts, distances)
            d.distances.limit, d.distances.longest = len(distances), len(distances) - 1
        put_recency(state, "all", &d.all)
    d.has_ips, d.distances.first_uses, d.distances.after_removals = bool(words[0]), words[1], words[2]
    return 0


def restore_levels(TlbLevels levels not None, state):
    """Go on from a state that `save_levels()` returned of levels of the same shape. The tags in force stay.

    Raises
    ------
    ValueError
        It is of another shape, or none. What the levels hold is undefined then.
    """
    cdef tlb_levels *h = &levels.h
    cdef int i
    left = dict(state)
    with levels.lock:
        put_words(&h.hits[0][0], array_of(left, "hits", (h.count, CLASSES)))
        put_words(h.walks, array_of(left, "walks", (CLASSES,)))
        counts = array_of(left, "counts", (COUNTS + UPPER_LEVELS,))
        h.references, h.cached_references, h.unmapped = counts[0], counts[1], counts[2]
        put_words(h.psc_hits, counts[COUNTS:])
        for i in range(h.count):
            put_structure(left, f"level{i}", &h.levels[i].s, True)
        for i in range(UPPER_LEVELS):
            if h.psc[i].keys is not NULL:
                put_structure(left, f"psc{i + 2}", &h.psc[i], False)
        if h.details is not NULL:
            put_details(left, h.details)
    if left:
        raise ValueError(f"{', '.join(sorted(left))}: levels of this shape have no such part")
