"""The inner loop of replay: blocks of rows in, counters and mismatches out.

The loop of rows (`_replay.pyx`) cuts its rows into blocks within which neither tables nor registers change. A block is translated
by one call and then compared with the recorded addresses. Where table writes follow each other closely, a stretch has accesses
and writes: those accesses that the memo has are recalled together, the others are walked in order with the writes.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.tlb._stream cimport TlbStream, tlb_stream
from kvmmu.walk.batch._rows cimport batch, batch_columns
from kvmmu.walk.batch._schedule cimport Workspace
from kvmmu.walk.pagewalk cimport PageWalk

cdef enum:
    BLOCK = 8192                    # rows whose scratch columns stay in the second-level cache
    LEVELS = 4                      # of leaves: paging off, 4K, 2M or 4M, 1G
    STATUSES = 7
    ERROR_CODES = 128               # P to SS
    WRITE_SIZE_MAX = 8
    MOST_EXPLAINED = 64
    STRETCH = 64                    # accesses that are recalled at once, and writes among them
    NEAR_WRITE = 32                 # rows before a write that make no block of their own

# The outcome of a write.
cdef enum:
    WRITTEN
    WRITE_TO_HOLE                   # or to a read-only slot
    WRITE_MALFORMED                 # no 1, 2, 4 or 8 bytes, or not aligned to them

# The rows at hand.
cdef struct replay_rows:
    size_t n
    const uint8_t *op
    const uint64_t *addr
    const uint8_t *access
    const uint64_t *gpa
    const uint8_t *size             # these three: NULL where there is no such column
    const uint16_t *vcpu
    const uint64_t *value
    bint all_known                  # each access has a recorded address

# Rows of a recording or of places, decoded.
cdef struct decoded_rows:
    uint8_t op[BLOCK]
    uint64_t addr[BLOCK]
    uint8_t access[BLOCK]
    uint64_t gpa[BLOCK]
    uint8_t size[BLOCK]
    uint64_t value[BLOCK]

# A write to guest memory that can be done.
cdef struct guest_write:
    uint64_t gpa
    uint8_t *hva
    uint64_t value
    size_t size

# Accesses, and the writes among them.
cdef struct stretch:
    size_t accesses
    size_t writes
    uint8_t op[STRETCH]             # these five: of accesses
    uint64_t gva[STRETCH]
    uint8_t access[STRETCH]
    uint64_t truth[STRETCH]
    uint8_t writes_before[STRETCH]
    guest_write write[STRETCH]

# The results of a block of rows, row by row.
cdef struct block_result:
    uint64_t gpa[BLOCK]
    uint8_t level[BLOCK]
    uint8_t status[BLOCK]
    uint32_t error_code[BLOCK]

# An access whose walk did not end at its recorded address.
cdef struct mismatch:
    uint64_t position               # number of the access
    uint64_t gva
    uint64_t truth
    uint32_t ctx                    # its register set
    uint8_t access

cdef struct replay_counters:
    uint64_t levels[LEVELS]         # walks that ended as recorded, by level of their leaf
    uint64_t verified
    uint64_t unchecked              # walked, without a recorded address
    uint64_t mismatches
    uint64_t writes
    uint64_t kinds[3]
    uint64_t mmio
    uint64_t statuses[STATUSES]     # of unchecked rows
    uint64_t error_codes[ERROR_CODES]   # of unchecked rows that end in a #PF
    uint64_t crossings              # unchecked rows that reach into the next page
    uint64_t next_levels[LEVELS]    # walks of those next pages, and of rows that fail there, by level of their leaf


cdef class BlockWalker:
    cdef PageWalk walk
    cdef block_result result
    cdef batch_columns columns
    cdef batch rows_under_way       # goes on from block to block until tables or walks change
    cdef bint begun
    cdef Workspace work
    cdef bint running               # without the GIL
    cdef bint broken                # a row whose address is not recorded, where all are said to be
    cdef replay_counters counters
    cdef uint64_t next_gva[BLOCK]       # of walk_next_pages()
    cdef uint8_t next_access[BLOCK]
    cdef uint8_t row_level[BLOCK]
    cdef uint32_t next_row[BLOCK]
    cdef TlbStream fed              # TLBs that take all rows, or None
    cdef tlb_stream *stream         # of it, or NULL
    cdef mismatch bad[MOST_EXPLAINED]
    cdef Py_ssize_t bad_count
    cdef readonly Py_ssize_t explain
    cdef stretch between            # of walk_stretch()
    cdef int check_idle(self) except -1
    # Walk n <= BLOCK rows whose columns start at the pointers. IN first: number of the first of them, for mismatches; count: of
    # walks; all_known: no truth is INVALID_GPA, which means that the address was not recorded
    cdef void walk_block(self, const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         const uint64_t *truth, uint64_t first, size_t n, uint64_t count, bint all_known) noexcept nogil
    # Walk accesses from row `start` on, which is one, and do the writes among them, up to row `limit` or another event at most.
    # Returns how many rows are done; 0: they have to be done one block and one write at a time. IN ctx: of 64 rows of one set, or
    # NULL; first and count: as above
    cdef size_t walk_stretch(self, const kvm_pagewalk *walks, const uint32_t *ctx, const replay_rows *rows, size_t start,
                             size_t limit, uint64_t first, uint64_t count) noexcept nogil
    # Parts of it, on `between`
    cdef void gather_stretch(self, const kvm_pagewalk *w, const replay_rows *rows, size_t start, size_t limit) noexcept nogil
    cdef size_t finish_stretch(self, uint64_t misses, uint64_t count) noexcept nogil
    # Parts of both
    cdef void begin(self, uint64_t count) noexcept nogil
    cdef void take_rows(self, const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                        uint64_t count, bint all_known) noexcept nogil
    cdef void count_rows(self, const uint64_t *truth, uint64_t first, size_t n, bint all_known) noexcept nogil
    cdef void count_kinds(self, const uint8_t *op, size_t n) noexcept nogil
    # Take back from the counters what is no verified walk of a block, and note it
    cdef void judge_rows(self, const uint64_t *truth, uint64_t first, size_t n, bint all_known) noexcept nogil
    # Walk the next pages of those rows of the last block that reach into them. IN gva, access, size: of the block's rows, all
    # of one register set, n <= BLOCK; shifts: of the page of a leaf, by level. A walk that fails counts as that of its row,
    # which was unchecked.
    cdef void walk_next_pages(self, const uint64_t *gva, const uint8_t *access, const uint8_t *size, const int *shifts,
                              size_t n) noexcept nogil
    # Store the low bytes of a value: WRITTEN, WRITE_TO_HOLE or WRITE_MALFORMED
    cdef int write_guest(self, const kvm_pagewalk *w, uint64_t gpa, uint64_t value, size_t size) noexcept nogil
    cdef void do_write(self, const guest_write *write) noexcept nogil
