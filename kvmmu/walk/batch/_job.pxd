"""One batch from Python: its columns, its walks, and the threads that share its rows."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk.batch._rows cimport batch, batch_columns


# The rows of a batch that a thread is at.
cdef struct place:
    size_t row
    size_t stop                         # of its piece
    size_t slice                        # rows to translate before the clock is read again


cdef class Job:
    """One batch. Threads run parts of it. It keeps alive what its pointers lead to."""
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
    # Check and take gva and access as exact_column() and exact_access() return them: no code of the caller's runs. Returns how
    # many rows there are
    cdef Py_ssize_t take_rows(self, gva, access) except -1
    cdef int take_columns(self, tuple names, list arrays, bint apart) except -1
    # Check and take the number of the walk of each row, below count. IN ctx: of exact_column(), or None
    cdef int take_contexts(self, ctx, uint64_t count) except -1
    # IN walks: owner of `first`, the walk of context 0, and of those that follow; alike: of batch; table: the table of slots
    # that they are over
    cdef void take_walks(self, walks, const kvm_pagewalk *first, const uint32_t *alike, uint64_t count, SlotTable table,
                         bint set_ad)
    # Translate the rows by so many threads. KeyboardInterrupt ends it in between.
    cdef int run_all(self, threads) except -1
    cdef size_t take_piece(self) noexcept nogil
    cdef int run_pieces(self) except -1
    cdef bint run_some(self, batch *part, place *at) noexcept nogil

cdef Job new_job()
