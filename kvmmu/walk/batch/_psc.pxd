"""What a batch remembers of walks, so that a row reads the last entry of its walk alone.

A prefix is the upper part of a walk: where its last entry lies, and the rights so far. It holds for a addr_tag, the addresses
that share all but the indices of the last two levels; a walk that ends higher (a large page, a fault) has its last entry there.
Prefixes are found without touching accessed and dirty bits; where only a walk with side effects can tell, there is none.

Prefixes live as long as a batch. Within it the tables change by accessed and dirty bits alone, which no prefix depends on:
one with unset accessed bits says so, and the rows that would set them are walked one by one.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._lanes cimport kvmmu_leaf_rules, kvmmu_psc_entry, kvmmu_leaf_checker, kvmmu_memo_entry

# How long to do without something that did not pay: ever longer, up to a limit.
cdef struct backoff:
    int left                    # blocks to go
    int next_length

cdef enum:
    MAX_BACKOFF = 31

# What a batch, or a thread's part of it, keeps its memory in.
cdef struct walk_tables:
    kvmmu_psc_entry *psc[2]   # of the first stage, of the second; 1 << PSC_BITS each
    kvmmu_memo_entry *memo

# One walk of a batch, with its part of the table of psc.
cdef struct cached_walk:
    const kvm_pagewalk *w
    cached_walk *second          # the second stage under w, or NULL
    kvmmu_leaf_rules rules        # lane.walk_id: names this walk in the table
    bint sets_ad                # False: rows with accessed or dirty bits to set are walked one by one
    size_t found                # psc so far
    # the upper part of the last walk that came to level 2, for addresses that share it
    uint64_t upper              # part of the address; beyond all of them: none
    uint64_t upper_pte          # what leads to the table of level 2
    uint64_t upper_rights
    uint8_t *touched            # NULL, or which words of memory psc depend on
    # of blocks: see `_leaf.pxd`
    kvmmu_leaf_checker checker
    bint has_masks                  # what surely passes
    backoff mask_backoff               # for asking it

# Address in the host of the table that the last entry of addr lies in; 0: it lies in none, or in the root, whose addr_tag
# would not
# tell whether an address is canonical.
cdef uint64_t table_of(const cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil
# A prefix that was found: for the whole table, if it is of the level of s.checker, above the lowest.
cdef void remember_table(cached_walk *s, uint64_t psce, uint64_t addr) noexcept nogil

# What the last entry of a walk says.
cdef enum:
    LEAF_OK
    LEAF_FAULT
    LEAF_SLOW                 # accessed or dirty bits to set, or not a leaf any more, or nothing known

cdef struct leaf_result:
    uint64_t gpa
    uint64_t pte
    uint32_t pte_access
    uint32_t error              # of a fault: P, RSVD, PK of the error code

cdef inline void reset_backoff(backoff *p, int first) noexcept nogil:
    """It pays, or nothing is known. IN first: blocks to go after a first time that it does not"""
    p.left, p.next_length = 0, first


cdef inline bint is_backing_off(backoff *p) noexcept nogil:
    """Whether this block is one to do without; one less is to go then."""
    if not p.left:
        return False
    p.left -= 1
    return True


cdef inline void back_off(backoff *p) noexcept nogil:
    """It did not pay."""
    p.left = p.next_length
    p.next_length = min(2 * p.next_length + 1, MAX_BACKOFF)


cdef inline bint is_canonical(const kvm_pagewalk *w, uint64_t addr) noexcept nogil:
    return <uint64_t>(<int64_t>(addr << w.canonical_shift) >> w.canonical_shift) == addr


# IN second: NULL, or what is remembered of the second stage; stage: which of the tables it takes, 0 or 1
cdef void init_cached_walk(cached_walk *s, const kvm_pagewalk *w, walk_tables *tables, int stage, cached_walk *second,
                           uint32_t walk_id,
                           bint set_ad, uint8_t *touched) noexcept nogil
# The prefix of addr, remembered or found now; 0: unknown. IN addr: masked, canonical
cdef uint64_t psce_of(cached_walk *s, uint64_t addr) noexcept nogil
# Find the prefix of addr again; 0: unknown
cdef uint64_t find_psce(cached_walk *s, uint64_t addr) noexcept nogil
# The rules of the last entry for one row: JUDGED_*. IN psce: but for the address; entry: kvmmu_entry_hva(); access_info:
# kvm_page_format.access_info of the access
cdef int check_leaf(const cached_walk *s, uint64_t psce, uint64_t entry, uint64_t addr, uint32_t access_info,
                    leaf_result *out) noexcept nogil


# Words of memory that something remembered depends on: one bit for each of many, so that a clear bit is sure.
cdef enum:
    TOUCHED_SHIFT = 64 - 15
    TOUCHED_BYTES = 1 << 12


cdef inline uint64_t touched_bit(uint64_t hva) noexcept nogil:
    return ((hva >> 3) * <uint64_t>0x9E3779B97F4A7C15ULL) >> TOUCHED_SHIFT


cdef inline void mark_word(uint8_t *touched, uint64_t hva) noexcept nogil:
    """Note a word of at most 8 bytes, aligned to its size."""
    cdef uint64_t bit = touched_bit(hva)
    if touched is not NULL:
        touched[bit >> 3] |= <uint8_t>(1 << (bit & 7))


cdef inline bint is_marked(const uint8_t *touched, uint64_t hva) noexcept nogil:
    cdef uint64_t bit = touched_bit(hva)
    return (touched[bit >> 3] >> (bit & 7)) & 1


cdef inline void forget_upper(cached_walk *s) noexcept nogil:
    s.upper = ~<uint64_t>0


# Remember nothing of what these hold.
cdef void forget_all(walk_tables *tables) noexcept nogil


cdef class WalkCache:
    """The tables of one batch, or of one thread of it."""
    cdef walk_tables tables
    cdef uint32_t next_walk_id             # of psc
    cdef uint32_t next_memo_id            # of translations
    # Names for count walks, used by nobody before; 0: too many. Nothing that was remembered counts any more.
    cdef uint32_t take_walk_ids(self, uint64_t count) noexcept nogil
    cdef uint32_t take_memo_ids(self, uint64_t count) noexcept nogil

cdef WalkCache new_walk_cache()
