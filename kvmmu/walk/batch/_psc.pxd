"""The paging-structure cache of a batch: with it a row reads only the last entry of its walk.

An entry of the cache (`psce`) holds the upper part of a walk: where its last entry lies, and the rights so far. It serves all
addresses with the same tag, those that share all but the index of the last level and the offset in the page; a walk that ends
higher (a large page, a fault) has its last entry there. Entries are found without setting accessed and dirty bits; where only a
walk that sets them can tell, there is none.

Entries live as long as a batch. Within it the tables change by accessed and dirty bits alone, on which no entry depends: one
with a clear accessed bit in its upper part says so, and the rows that would set the bit are walked one by one.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._kernels cimport (
    kvmmu_descent, kvmmu_leaf_checker, kvmmu_leaf_rules, kvmmu_memo_entry, kvmmu_psc_entry,
)

# A way that did not pay is left alone for a number of blocks, which doubles up to a limit.
cdef struct backoff:
    int left                    # blocks to go
    int next_length

cdef enum:
    MAX_BACKOFF = 31            # one try in 32 blocks: about 3% more work where a way never pays

# The memory of the cache of a batch, or of a thread's part of it.
cdef struct walk_tables:
    kvmmu_psc_entry *psc[2]     # of the first stage, of the second; 1 << PSC_BITS each
    kvmmu_memo_entry *memo

# The words of memory that cached entries depend on, as a filter: a clear bit means that none depends on the words of this bit.
# Words of last entries have the one translation in the memo that depends on them, so that a write to them forgets it alone.
cdef enum:
    TOUCHED_BITS = 15               # 4 KiB stay in the first-level cache, and 2,000 words set 6% of the bits
    TOUCHED_BYTES = 1 << (TOUCHED_BITS - 3)
    MANY_DEPEND = 0xFFFF            # no slot of the memo

cdef struct touched_words:
    uint8_t bits[TOUCHED_BYTES]
    # of a set bit: the slot of the memo whose entry alone depends on its words; MANY_DEPEND: others, or not only the memo
    uint16_t dependent[8 * TOUCHED_BYTES]

# One stage of a walk of a batch, with what is cached of it.
cdef struct cached_walk:
    const kvm_pagewalk *w
    cached_walk *second         # the second stage under w, or NULL
    kvmmu_leaf_rules rules      # rules.walk_id tells its entries in the cache from those of other walks
    size_t found                # entries so far
    kvmmu_leaf_checker directories      # where tables of level 2 are cached, without masks
    kvmmu_descent descent       # from them; care 0: there is none
    touched_words *touched      # NULL, or the words of memory that entries depend on
    # of 64 rows: see `_leaves.pxd`
    kvmmu_leaf_checker checker
    bint has_masks              # the accept masks are made
    backoff mask_backoff        # from them

# Address in the host of the table that the last entry of addr lies in; 0: it lies in none, or in the root, whose tag would
# not tell whether an address is canonical.
cdef uint64_t table_of(const cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil
# Cache the whole table of an entry, if it is of the level of s.checker, above the lowest.
cdef void remember_table(cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil


cdef inline void reset_backoff(backoff *p, int first) noexcept nogil:
    """Note that the way pays, or that nothing is known. IN first: blocks to leave it alone after the first failure"""
    p.left, p.next_length = 0, first


cdef inline bint is_backing_off(backoff *p) noexcept nogil:
    """True if this block does without the way. Counts the block."""
    if not p.left:
        return False
    p.left -= 1
    return True


cdef inline void back_off(backoff *p) noexcept nogil:
    """Note that the way did not pay."""
    p.left = p.next_length
    p.next_length = min(2 * p.next_length + 1, MAX_BACKOFF)


# IN second: the second stage under w, or NULL; stage: which table of the cache it uses, 0 or 1; shadow_stacks: some accesses are
# to shadow stacks
cdef void init_cached_walk(cached_walk *s, const kvm_pagewalk *w, walk_tables *tables, int stage, cached_walk *second,
                           uint32_t walk_id, bint set_ad, bint shadow_stacks, touched_words *touched) noexcept nogil
# Return the psce of addr, cached or found now; 0: it cannot be known. IN addr: masked, canonical
cdef uint64_t psce_of(cached_walk *s, uint64_t addr) noexcept nogil
# Cache the psce of addr
cdef void remember_psce(cached_walk *s, uint64_t addr, uint64_t psce) noexcept nogil
# Find the psce of addr anew, and cache it; 0: it cannot be known
cdef uint64_t find_psce(cached_walk *s, uint64_t addr) noexcept nogil


cdef inline uint64_t touched_bit(uint64_t hva) noexcept nogil:
    return ((hva >> 3) * <uint64_t>0x9E3779B97F4A7C15ULL) >> (64 - TOUCHED_BITS)


cdef inline bint is_marked(const touched_words *t, uint64_t bit) noexcept nogil:
    return (t.bits[bit >> 3] >> (bit & 7)) & 1


cdef inline void mark_word(touched_words *t, uint64_t hva, uint16_t dependent) noexcept nogil:
    """Note a word of at most 8 bytes, aligned to its size. IN dependent: as in touched_words"""
    cdef uint64_t bit = touched_bit(hva)
    if t is NULL:
        return
    if is_marked(t, bit) and t.dependent[bit] != dependent:
        dependent = MANY_DEPEND
    t.dependent[bit] = dependent
    t.bits[bit >> 3] |= <uint8_t>(1 << (bit & 7))


# Empty the tables.
cdef void forget_all(walk_tables *tables) noexcept nogil


cdef class WalkCache:
    """The cache of one batch, or of one thread of it."""
    cdef walk_tables tables
    cdef uint32_t next_walk_id          # in the paging-structure cache
    cdef uint32_t next_memo_id          # in the memo of translations
    # Return the first of `count` ids that nothing in the tables has; 0: there are not so many
    cdef uint32_t take_walk_ids(self, uint64_t count) noexcept nogil
    cdef uint32_t take_memo_ids(self, uint64_t count) noexcept nogil

cdef WalkCache new_walk_cache()
