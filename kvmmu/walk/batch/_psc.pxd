"""What a batch remembers of walks, so that a row reads the last entry of its walk alone.

A prefix is the upper part of a walk: where its last entry lies, and the rights so far. It holds for a region, the addresses
that share all but the indices of the last two levels; a walk that ends higher (a large page, a fault) has its last entry there.
Prefixes are found without touching accessed and dirty bits; where only a walk with side effects can tell, there is none.

Prefixes live as long as a batch. Within it the tables change by accessed and dirty bits alone, which no prefix depends on:
one with unset accessed bits says so, and the rows that would set them are walked one by one.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.walk.batch._lanes cimport kvmmu_lane_walk, kvmmu_prefix, kvmmu_stage, kvmmu_tlb_entry

# How long to do without something that did not pay: ever longer, up to a limit.
cdef struct patience:
    int rest                    # blocks to go
    int next

cdef enum:
    MAX_PATIENCE = 31

# What a batch, or a thread's part of it, keeps its memory in.
cdef struct walk_tables:
    kvmmu_prefix *prefixes[2]   # of the first stage, of the second; 1 << PREFIX_BITS each
    kvmmu_tlb_entry *tlb

# One walk of a batch, with its part of the table of prefixes.
cdef struct lane_space:
    const kvm_pagewalk *w
    lane_space *second          # the second stage under w, or NULL
    kvmmu_lane_walk lane        # lane.asid: names this walk in the table
    bint sets_ad                # False: rows with accessed or dirty bits to set are walked one by one
    size_t found                # prefixes so far
    # the upper part of the last walk that came to level 2, for addresses that share it
    uint64_t upper              # part of the address; beyond all of them: none
    uint64_t upper_pte          # what leads to the table of level 2
    uint64_t upper_rights
    uint8_t *touched            # NULL, or which words of memory prefixes depend on
    # of blocks: see `_leaf.pxd`
    kvmmu_stage stage
    bint known                  # what surely passes
    patience sure               # for asking it

# Address in the host of the table that the last entry of addr lies in; 0: it lies in none, or in the root, whose region would not
# tell whether an address is canonical.
cdef uint64_t table_of(const lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil
# A prefix that was found: for the whole table, if it is of the level of s.stage, above the lowest.
cdef void remember_table(lane_space *s, uint64_t ref, uint64_t addr) noexcept nogil

# What the last entry of a walk says.
cdef enum:
    JUDGED_OK
    JUDGED_FAULT
    JUDGED_SLOW                 # accessed or dirty bits to set, or not a leaf any more, or nothing known

cdef struct judged_entry:
    uint64_t gpa
    uint64_t pte
    uint32_t pte_access
    uint32_t error              # of a fault: P, RSVD, PK of the error code

cdef inline void start_patience(patience *p, int first) noexcept nogil:
    """It pays, or nothing is known. IN first: blocks to go after a first time that it does not"""
    p.rest, p.next = 0, first


cdef inline bint is_resting(patience *p) noexcept nogil:
    """Whether this block is one to do without; one less is to go then."""
    if not p.rest:
        return False
    p.rest -= 1
    return True


cdef inline void rest_longer(patience *p) noexcept nogil:
    """It did not pay."""
    p.rest = p.next
    p.next = min(2 * p.next + 1, MAX_PATIENCE)


cdef inline bint is_canonical(const kvm_pagewalk *w, uint64_t addr) noexcept nogil:
    return <uint64_t>(<int64_t>(addr << w.canonical_shift) >> w.canonical_shift) == addr


# IN second: NULL, or what is remembered of the second stage; stage: which of the tables it takes, 0 or 1
cdef void init_space(lane_space *s, const kvm_pagewalk *w, walk_tables *tables, int stage, lane_space *second, uint32_t asid,
                     bint set_ad, uint8_t *touched) noexcept nogil
# The prefix of addr, remembered or found now; 0: unknown. IN addr: masked, canonical
cdef uint64_t prefix_of(lane_space *s, uint64_t addr) noexcept nogil
# Find the prefix of addr again; 0: unknown
cdef uint64_t find_prefix(lane_space *s, uint64_t addr) noexcept nogil
# The rules of the last entry for one row: JUDGED_*. IN ref: but for the address; entry: kvmmu_entry_hva(); look:
# kvm_page_format.looks of the access
cdef int judge_one(const lane_space *s, uint64_t ref, uint64_t entry, uint64_t addr, uint32_t look,
                   judged_entry *out) noexcept nogil


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


cdef inline void forget_upper(lane_space *s) noexcept nogil:
    s.upper = ~<uint64_t>0


# Remember nothing of what these hold.
cdef void forget_all(walk_tables *tables) noexcept nogil


cdef class WalkCache:
    """The tables of one batch, or of one thread of it."""
    cdef walk_tables tables
    cdef uint32_t next_asid             # of prefixes
    cdef uint32_t next_space            # of translations
    # Names for count walks, used by nobody before; 0: too many. Nothing that was remembered counts any more.
    cdef uint32_t take_asids(self, uint64_t count) noexcept nogil
    cdef uint32_t take_spaces(self, uint64_t count) noexcept nogil

cdef WalkCache new_walk_cache()
