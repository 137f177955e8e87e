"""Stack distances of keys, as `_recency.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from kvmmu.memory._memory cimport hash_gfn
from kvmmu.tlb._recency cimport AFTER_REMOVAL, FIRST_USE, NODE_EMPTY, SLOT_NONE, recency

cdef enum:
    FIRST_LIMIT = 1 << 10               # a power of two, as all limits
    MOST_NODES = 1 << 30


cdef int recency_init(recency *r) noexcept nogil:
    memset(r, 0, sizeof(recency))
    r.keys = <uint64_t *>calloc(FIRST_LIMIT, sizeof(uint64_t))
    r.slots = <uint32_t *>calloc(FIRST_LIMIT, sizeof(uint32_t))
    r.table = <uint32_t *>calloc(2 * FIRST_LIMIT, sizeof(uint32_t))
    r.nodes_at = <uint32_t *>calloc(2 * FIRST_LIMIT, sizeof(uint32_t))
    r.tree = <uint32_t *>calloc(2 * FIRST_LIMIT + 1, sizeof(uint32_t))
    r.empty = <uint32_t *>calloc(FIRST_LIMIT, sizeof(uint32_t))
    r.node_limit, r.slot_limit, r.empty_limit, r.table_mask = FIRST_LIMIT, 2 * FIRST_LIMIT, FIRST_LIMIT, 2 * FIRST_LIMIT - 1
    if (r.keys is NULL or r.slots is NULL or r.table is NULL or r.nodes_at is NULL or r.tree is NULL or r.empty is NULL):
        recency_free(r)
        return -1
    return 0


cdef void recency_free(recency *r) noexcept nogil:
    free(r.keys)
    free(r.slots)
    free(r.table)
    free(r.nodes_at)
    free(r.tree)
    free(r.empty)
    memset(r, 0, sizeof(recency))


# ---- keys --------------------------------------------------------------------------------------------------------------

cdef uint64_t place_of(const recency *r, uint64_t key) noexcept nogil:
    """Return the place of a key in the hash table, or the free one where it belongs."""
    cdef uint64_t place = hash_gfn(key) & r.table_mask
    while r.table[place] and r.keys[r.table[place] - 1] != key:
        place = (place + 1) & r.table_mask
    return place


cdef bint more_nodes(recency *r) noexcept nogil:
    """Make room for twice as many keys."""
    cdef uint32_t limit = 2 * r.node_limit, node
    cdef uint64_t *keys
    cdef uint32_t *slots
    cdef uint32_t *table
    if limit > MOST_NODES:
        return False
    keys = <uint64_t *>realloc(r.keys, limit * sizeof(uint64_t))
    if keys is NULL:
        return False
    r.keys = keys
    slots = <uint32_t *>realloc(r.slots, limit * sizeof(uint32_t))
    if slots is NULL:
        return False
    r.slots = slots
    table = <uint32_t *>calloc(2 * <size_t>limit, sizeof(uint32_t))
    if table is NULL:
        return False
    free(r.table)
    r.table, r.table_mask, r.node_limit = table, 2 * <uint64_t>limit - 1, limit
    for node in range(r.nodes):
        r.table[place_of(r, r.keys[node])] = node + 1
    return True


# ---- the heap of empty slots -------------------------------------------------------------------------------------------

cdef bint push_empty(recency *r, uint32_t slot) noexcept nogil:
    cdef uint32_t i = r.empty_count, up
    cdef uint32_t *grown
    if i == r.empty_limit:
        grown = <uint32_t *>realloc(r.empty, 2 * <size_t>r.empty_limit * sizeof(uint32_t))
        if grown is NULL:
            return False
        r.empty, r.empty_limit = grown, 2 * r.empty_limit
    r.empty_count += 1
    while i:
        up = (i - 1) // 2
        if r.empty[up] >= slot:
            break
        r.empty[i] = r.empty[up]
        i = up
    r.empty[i] = slot
    return True


cdef uint32_t pop_empty(recency *r) noexcept nogil:
    """Take the last empty slot; there is one."""
    cdef uint32_t top = r.empty[0], slot, i = 0, down
    r.empty_count -= 1
    slot = r.empty[r.empty_count]
    while True:
        down = 2 * i + 1
        if down >= r.empty_count:
            break
        if down + 1 < r.empty_count and r.empty[down + 1] > r.empty[down]:
            down += 1
        if r.empty[down] <= slot:
            break
        r.empty[i] = r.empty[down]
        i = down
    r.empty[i] = slot
    return top


# ---- slots -------------------------------------------------------------------------------------------------------------

cdef inline void count_slot(recency *r, uint32_t slot, uint32_t change) noexcept nogil:
    """Add to the count of a slot; -1 as an unsigned number subtracts."""
    cdef uint32_t i = slot + 1
    while i <= r.slot_limit:
        r.tree[i] += change
        i += i & (~i + 1)
    r.in_use += change


cdef inline uint32_t used_before(const recency *r, uint32_t slot) noexcept nogil:
    """Return the number of slots in use before one."""
    cdef uint32_t i = slot, count = 0
    while i:
        count += r.tree[i]
        i &= i - 1
    return count


cdef void forget_all(recency *r) noexcept nogil:
    """Begin with no slot in use, as nothing is alive."""
    memset(r.nodes_at, 0, r.slot_limit * sizeof(uint32_t))
    memset(r.tree, 0, (<size_t>r.slot_limit + 1) * sizeof(uint32_t))
    r.next_slot = r.in_use = r.empty_count = 0
    r.last = 0


cdef bint renumber(recency *r) noexcept nogil:
    """Number the slots in use from 0 on; where those are more than half, make room for twice as many."""
    cdef uint32_t limit = r.slot_limit, slot, to = 0, i, up, node
    cdef uint32_t *nodes_at
    cdef uint32_t *tree
    if 2 * r.in_use > limit:
        if limit >= MOST_NODES:
            return False
        nodes_at = <uint32_t *>realloc(r.nodes_at, 2 * <size_t>limit * sizeof(uint32_t))
        if nodes_at is NULL:
            return False
        r.nodes_at = nodes_at
        tree = <uint32_t *>realloc(r.tree, (2 * <size_t>limit + 1) * sizeof(uint32_t))
        if tree is NULL:
            return False
        r.tree, limit = tree, 2 * limit
    r.empty_count = 0
    for slot in range(r.next_slot):
        node = r.nodes_at[slot]
        if not node:
            continue
        r.nodes_at[to] = node
        if node == NODE_EMPTY:
            push_empty(r, to)                           # there was room for it before
        else:
            r.slots[node - 1] = to
        to += 1
    memset(&r.nodes_at[to], 0, (limit - to) * sizeof(uint32_t))
    r.slot_limit, r.next_slot = limit, to
    for i in range(1, limit + 1):
        r.tree[i] = i <= to
    for i in range(1, limit + 1):
        up = i + (i & (~i + 1))
        if up <= limit:
            r.tree[up] += r.tree[i]
    return True


# ---- use and removal ---------------------------------------------------------------------------------------------------

cdef uint32_t recency_use(recency *r, uint64_t key) noexcept nogil:
    cdef uint64_t place
    cdef uint32_t node, slot = SLOT_NONE, distance = FIRST_USE
    if key == r.last:
        return 1
    if r.out_of_memory or r.next_slot == r.slot_limit and not renumber(r):
        r.out_of_memory = True
        return FIRST_USE
    place = place_of(r, key)
    if r.table[place]:
        node = r.table[place] - 1
        slot = r.slots[node]
        distance = AFTER_REMOVAL
    else:
        if r.nodes == r.node_limit:
            if not more_nodes(r):
                r.out_of_memory = True
                return FIRST_USE
            place = place_of(r, key)
        node = r.nodes
        r.nodes += 1
        r.keys[node] = key
        r.table[place] = node + 1
    if slot != SLOT_NONE:
        distance = r.in_use - used_before(r, slot)
    else:
        r.alive += 1
    if r.empty_count and (slot == SLOT_NONE or r.empty[0] > slot):
        count_slot(r, r.empty[0], <uint32_t>-1)
        r.nodes_at[r.empty[0]] = 0
        pop_empty(r)
        if slot != SLOT_NONE:
            r.nodes_at[slot] = NODE_EMPTY
            push_empty(r, slot)                         # one was taken, so there is room
    elif slot != SLOT_NONE:
        count_slot(r, slot, <uint32_t>-1)
        r.nodes_at[slot] = 0
    r.nodes_at[r.next_slot] = node + 1
    r.slots[node] = r.next_slot
    count_slot(r, r.next_slot, 1)
    r.next_slot += 1
    r.last = key
    return distance


cdef void empty_slot(recency *r, uint32_t node) noexcept nogil:
    cdef uint32_t slot = r.slots[node]
    r.slots[node] = SLOT_NONE
    r.nodes_at[slot] = NODE_EMPTY
    r.alive -= 1
    if not push_empty(r, slot):
        r.out_of_memory = True
    if r.last == r.keys[node]:
        r.last = 0


cdef void recency_remove(recency *r, uint64_t key) noexcept nogil:
    cdef uint64_t place = place_of(r, key)
    if r.table[place] and r.slots[r.table[place] - 1] != SLOT_NONE:
        empty_slot(r, r.table[place] - 1)
        if not r.alive:
            forget_all(r)


cdef void recency_remove_all(recency *r, uint64_t mask, uint64_t value) noexcept nogil:
    cdef uint32_t slot, node, before = r.alive
    for slot in range(r.next_slot):
        node = r.nodes_at[slot]
        if node and node != NODE_EMPTY and r.keys[node - 1] & mask == value:
            empty_slot(r, node - 1)
    if before and not r.alive:
        forget_all(r)


# ---- an earlier state --------------------------------------------------------------------------------------------------

cdef int load_nodes(recency *r, const uint64_t *keys, uint32_t nodes) noexcept nogil:
    cdef uint64_t place
    cdef uint32_t node
    for node in range(nodes):
        if node == r.node_limit and not more_nodes(r):
            return -1
        place = place_of(r, keys[node])
        if not keys[node] or r.table[place]:
            return -2
        r.keys[node], r.slots[node], r.table[place] = keys[node], SLOT_NONE, node + 1
        r.nodes = node + 1
    return 0


cdef int recency_load(recency *r, const uint64_t *keys, uint32_t nodes, const uint32_t *stack, uint32_t slots,
                      uint64_t last) noexcept nogil:
    cdef uint32_t slot, node = 0
    cdef int failed = load_nodes(r, keys, nodes)
    if failed:
        return failed
    for slot in range(slots):
        if r.next_slot == r.slot_limit and not renumber(r):
            return -1
        node = stack[slot]
        if node == NODE_EMPTY:
            if not push_empty(r, slot):
                return -1
        elif not 0 < node <= nodes or r.slots[node - 1] != SLOT_NONE:
            return -2
        else:
            r.slots[node - 1] = slot
            r.alive += 1
        r.nodes_at[slot] = node
        count_slot(r, slot, 1)
        r.next_slot = slot + 1
    if slots and not r.alive or last and (not slots or node == NODE_EMPTY or r.keys[node - 1] != last):
        return -2
    r.last = last
    return 0


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef class Recency:
    """Stack distances of keys, for tests of what the TLB hierarchies use."""

    cdef recency r

    def __cinit__(self):
        if recency_init(&self.r):
            raise MemoryError

    def __dealloc__(self):
        recency_free(&self.r)

    def __reduce__(self):
        raise TypeError("a Recency cannot be copied or pickled")

    def use(self, uint64_t key):
        """Use a key; returns its distance, 0 for its first use, -1 for the first one after its removal."""
        cdef uint32_t distance
        if not key:
            raise ValueError("key: want 1 or more, got 0")
        distance = recency_use(&self.r, key)
        if self.r.out_of_memory:
            raise MemoryError
        return -1 if distance == AFTER_REMOVAL else distance

    def remove(self, uint64_t key):
        """Remove a key, if it is there."""
        recency_remove(&self.r, key)

    def remove_all(self, uint64_t mask, uint64_t value):
        """Remove the keys with key & mask == value."""
        recency_remove_all(&self.r, mask, value)
