"""The walk over arrays: the same answers as one call per row."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu._prefixes cimport WalkCache
from kvmmu._rows cimport batch, batch_columns, block, waiting_rows, walk_spaces


cdef class Workspace:
    """Scratch memory of one batch, or of one thread's part of it."""
    cdef WalkCache cache
    cdef void *block_memory
    cdef block *blocks                  # in it
    cdef walk_spaces *spaces
    cdef waiting_rows *waiting
    cdef uint8_t *touched

# Get ready; nothing remembered before counts. IN count: of walks; rows: about how many are to come; watch: the caller changes
# tables between calls of translate_rows(), and asks depends_on() whether that takes a new begin_batch().
cdef void begin_batch(batch *b, Workspace work, uint64_t count, size_t rows, bint watch) noexcept nogil
cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil
# Whether something remembered may depend on the aligned word at hva.
cdef bint depends_on(const batch *b, const uint8_t *hva) noexcept nogil


cdef class Job:
    """One batch, so that threads can run parts of it."""
    cdef object gva                     # these keep alive what the pointers point to
    cdef object access
    cdef object arrays
    cdef object alive
    cdef uint8_t one_access             # of all rows
    cdef batch whole
    cdef uint64_t count
    cdef uint64_t next_row              # that no thread has taken yet
    cdef size_t take_piece(self, size_t piece) noexcept nogil
    cdef batch_columns columns
    # The arguments of `PageWalk.translate()`, checked. Returns how many rows there are.
    cdef Py_ssize_t take_rows(self, gva, access) except -1
    # `out`, or new columns.
    cdef object take_columns(self, out, fields, Py_ssize_t rows)
