"""Stack distances of keys: how many distinct keys were used since the last use of each, itself included.

A fully associative LRU structure of n entries holds a key exactly if its distance is at most n (Mattson et al., "Evaluation
Techniques for Storage Hierarchies", 1970), so one pass tells the misses of all sizes. An invalidation leaves an empty entry,
which the next miss fills: the keys below it in the stack stay where they are. The entry that a key leaves becomes the empty one.

Keys are numbered as they come. Each use takes a new slot; a Fenwick tree counts the slots in use from a slot on.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    FIRST_USE = 0                       # in place of a distance: the key was never used before
    AFTER_REMOVAL = 0xFFFFFFFF          # it was removed since
    SLOT_NONE = 0xFFFFFFFF              # slot of a key that was removed
    NODE_EMPTY = 0xFFFFFFFF             # in nodes_at: a removed key's

cdef struct recency:
    uint64_t *keys                      # by node
    uint32_t *slots                     # by node: where it stands, or SLOT_NONE
    uint32_t nodes, node_limit
    uint32_t *table                     # hash table of node + 1; 0: free
    uint64_t table_mask
    uint32_t *nodes_at                  # by slot: node + 1, NODE_EMPTY, 0: not in use
    uint32_t *tree                      # Fenwick tree of slots in use, from 1 on
    uint32_t slot_limit, next_slot
    uint32_t in_use                     # slots
    uint32_t alive                      # keys that were not removed
    uint32_t *empty                     # heap of the slots of removed keys, the last one first
    uint32_t empty_count, empty_limit
    uint64_t last                       # the key used last; 0: none, or removed
    bint out_of_memory                  # distances are wrong from here on

cdef int recency_init(recency *r) noexcept nogil         # -1 without memory
cdef void recency_free(recency *r) noexcept nogil
# Use a key, which is not 0. Returns its distance, FIRST_USE or AFTER_REMOVAL
cdef uint32_t recency_use(recency *r, uint64_t key) noexcept nogil
cdef void recency_remove(recency *r, uint64_t key) noexcept nogil
# Remove the keys with key & mask == value
cdef void recency_remove_all(recency *r, uint64_t mask, uint64_t value) noexcept nogil
# Put keys and the stack of an earlier state in place of those of an empty one. IN keys: by node; stack: from the slot used the
# longest time ago on, node + 1 or NODE_EMPTY; last: as in the struct. Returns -1 without memory, -2 if that is no state
cdef int recency_load(recency *r, const uint64_t *keys, uint32_t nodes, const uint32_t *stack, uint32_t slots,
                      uint64_t last) noexcept nogil
