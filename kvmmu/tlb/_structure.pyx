"""One set-associative structure of keys, as `_structure.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from kvmmu.memory._alloc cimport kvmmu_alloc_lines, kvmmu_alloc_table
from kvmmu.tlb._structure cimport (
    KEY_PAGE_BITS, MOST_ENTRIES, POLICY_FIFO, POLICY_LRU, POLICY_PLRU, key_structure, tlb_policy,
)

cdef uint32_t VECTOR_KEYS = 4         # of 256 bits
# Knuth's multiplicative generator of 64 bits (MMIX).
cdef uint64_t MULTIPLIER = 6364136223846793005ULL
cdef uint64_t INCREMENT = 1442695040888963407ULL


cdef int structure_init(key_structure *s, uint32_t sets, uint32_t ways, tlb_policy policy, uint64_t seed) noexcept nogil:
    memset(s, 0, sizeof(key_structure))
    if sets == 0 or ways == 0 or sets > MOST_ENTRIES // ways:
        return -1
    s.sets, s.ways, s.policy, s.random = sets, ways, policy, seed
    s.stride = (ways + VECTOR_KEYS - 1) // VECTOR_KEYS * VECTOR_KEYS
    s.set_mask = sets - 1 if sets & (sets - 1) == 0 else 0
    s.keys = <uint64_t *>kvmmu_alloc_lines(sets, s.stride, sizeof(uint64_t))
    if policy == POLICY_PLRU:
        s.trees = <uint64_t *>kvmmu_alloc_table(sets, 1, sizeof(uint64_t))
    if s.keys is NULL or (policy == POLICY_PLRU and s.trees is NULL):
        structure_free(s)
        return -1
    return 0


cdef void structure_free(key_structure *s) noexcept nogil:
    free(s.keys)
    free(s.trees)
    memset(s, 0, sizeof(key_structure))


cdef inline uint32_t set_of(const key_structure *s, uint64_t key) noexcept nogil:
    cdef uint64_t page = key & ((<uint64_t>1 << KEY_PAGE_BITS) - 1)
    if s.set_mask or s.sets == 1:
        return <uint32_t>page & s.set_mask
    return <uint32_t>(page % s.sets)


cdef inline uint32_t way_of(const uint64_t *keys, uint32_t ways, uint64_t key) noexcept nogil:
    """The way that holds a key; the number of ways if none does."""
    cdef uint32_t way
    for way in range(ways):
        if keys[way] == key:
            return way
    return ways


cdef inline void move_to_front(uint64_t *keys, uint32_t way, uint64_t key) noexcept nogil:
    """Put a key first; those before its way move back by one."""
    while way:
        keys[way] = keys[way - 1]
        way -= 1
    keys[0] = key


# ---- tree-PLRU: the left half of an odd number of ways is the larger one ------------------------------------------------

cdef void point_away(uint64_t *tree, uint32_t ways, uint32_t way) noexcept nogil:
    """Make every node on the path to a way point to its other half."""
    cdef uint32_t low = 0, high = ways, middle, node = 1
    while high - low > 1:
        middle = (low + high + 1) // 2
        if way < middle:
            tree[0] |= <uint64_t>1 << node
            high, node = middle, 2 * node
        else:
            tree[0] &= ~(<uint64_t>1 << node)
            low, node = middle, 2 * node + 1


cdef uint32_t pointed_way(uint64_t tree, uint32_t ways) noexcept nogil:
    cdef uint32_t low = 0, high = ways, middle, node = 1
    while high - low > 1:
        middle = (low + high + 1) // 2
        if tree >> node & 1:
            low, node = middle, 2 * node + 1
        else:
            high, node = middle, 2 * node
    return low


# ---- keys --------------------------------------------------------------------------------------------------------------

cdef bint structure_use(key_structure *s, uint64_t key) noexcept nogil:
    cdef uint32_t number = set_of(s, key), way
    cdef uint64_t *keys = &s.keys[<size_t>number * s.stride]
    way = way_of(keys, s.ways, key)
    if way == s.ways:
        return False
    if s.policy == POLICY_LRU:
        move_to_front(keys, way, key)
    elif s.policy == POLICY_PLRU:
        point_away(&s.trees[number], s.ways, way)
    s.last = key
    return True


cdef uint64_t structure_insert(key_structure *s, uint64_t key) noexcept nogil:
    cdef uint32_t number = set_of(s, key), way
    cdef uint64_t *keys = &s.keys[<size_t>number * s.stride]
    cdef uint64_t victim
    s.last = key
    if s.policy == POLICY_LRU or s.policy == POLICY_FIFO:
        victim = keys[s.ways - 1]
        move_to_front(keys, s.ways - 1, key)
        s.replaced += victim != 0
        return victim
    way = way_of(keys, s.ways, 0)
    if way == s.ways:
        if s.policy == POLICY_PLRU:
            way = pointed_way(s.trees[number], s.ways)
        else:
            s.random = s.random * MULTIPLIER + INCREMENT
            way = <uint32_t>((s.random >> 33) % s.ways)
    victim = keys[way]
    keys[way] = key
    s.replaced += victim != 0
    if s.policy == POLICY_PLRU:
        point_away(&s.trees[number], s.ways, way)
    return victim


cdef inline void empty_way(const key_structure *s, uint64_t *keys, uint32_t way) noexcept nogil:
    """Make a way empty; where ways are in order, the empty one goes to their end."""
    if s.policy == POLICY_LRU or s.policy == POLICY_FIFO:
        while way + 1 < s.ways:
            keys[way] = keys[way + 1]
            way += 1
    keys[way] = 0


cdef bint structure_remove(key_structure *s, uint64_t key) noexcept nogil:
    cdef uint64_t *keys = &s.keys[<size_t>set_of(s, key) * s.stride]
    cdef uint32_t way = way_of(keys, s.ways, key)
    if way == s.ways:
        return False
    if s.last == key:
        s.last = 0
    empty_way(s, keys, way)
    return True


cdef void structure_remove_all(key_structure *s, uint64_t mask, uint64_t value) noexcept nogil:
    cdef uint64_t *keys = s.keys
    cdef uint32_t way
    for _ in range(s.sets):
        way = 0
        while way < s.ways:
            if keys[way] and keys[way] & mask == value:
                empty_way(s, keys, way)
                if s.policy == POLICY_LRU or s.policy == POLICY_FIFO:
                    continue                            # the next one stands here now
            way += 1
        keys += s.stride
    if s.last & mask == value:
        s.last = 0
