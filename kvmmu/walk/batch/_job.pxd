"""The walk over arrays: the same answers as one call per row."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk.batch._psc cimport WalkCache
from kvmmu.walk.batch._rows cimport batch, batch_columns, block, deferred_rows, cached_walks


cdef class Workspace:
    """Scratch memory of one batch, or of one thread's part of it."""
    cdef WalkCache cache
    cdef void *block_memory
    cdef block *blocks                  # in it
    cdef cached_walks *cached
    cdef deferred_rows *deferred
    cdef uint8_t *touched

cdef Workspace new_workspace()
# Get ready; nothing remembered before counts. IN count: of walks; rows: about how many are to come; watch: the caller changes
# tables between calls of translate_rows(), and asks depends_on() whether that takes a new begin_batch().
cdef void begin_batch(batch *b, Workspace work, uint64_t count, size_t rows, bint watch) noexcept nogil
cdef void translate_rows(batch *b, size_t start, size_t stop) noexcept nogil
# Whether something remembered may depend on the aligned word at hva.
cdef bint depends_on(const batch *b, const uint8_t *hva) noexcept nogil


# The rows of a batch that a thread walks at the moment.
cdef struct place:
    size_t row
    size_t stop                         # of its piece
    size_t slice                        # rows to walk before it access_info at the clock


cdef class Job:
    """One batch, which threads can run parts of. What its pointers lead to belongs to it."""
    cdef object gva                     # these keep alive what the pointers point to
    cdef object access
    cdef object ctx
    cdef list arrays
    cdef object walks
    cdef SlotTable table
    cdef uint8_t one_access             # of all rows
    cdef batch whole
    cdef uint64_t next_row              # that no thread has taken yet
    cdef size_t rows
    cdef size_t piece
    cdef uint32_t stopped
    cdef batch_columns columns
    # The arguments of `PageWalk.translate()`, plain, checked: no code of the caller's runs. Returns how many rows there are.
    cdef Py_ssize_t take_rows(self, gva, access) except -1
    cdef int take_columns(self, tuple names, list arrays, bint apart) except -1
    # The number of the walk of each row, below count. IN ctx: plain, or None
    cdef int take_contexts(self, ctx, uint64_t count) except -1
    # IN walks: what owns `first`, the walk of context 0, and those that follow; table: that they are over
    cdef void take_walks(self, walks, const kvm_pagewalk *first, uint64_t count, SlotTable table, bint set_ad)
    # Translate the rows by so many threads. KeyboardInterrupt ends it in between.
    cdef int run_all(self, threads) except -1
    cdef size_t take_piece(self) noexcept nogil
    cdef int run_pieces(self) except -1
    cdef bint run_some(self, batch *part, place *at) noexcept nogil

cdef Job new_job()
