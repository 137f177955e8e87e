"""The rows of a recording, decoded piece by piece: its accesses, and in their places the events between them.

A recording keeps its accesses by page number, and table writes, faults and register loads in columns of their own, each with
the number of the access that it comes before. Here they become rows of the trace format, in the order in which they happened.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

# The columns that rows are written to.
cdef struct row_columns:
    uint8_t *op
    uint64_t *addr
    uint8_t *access
    uint64_t *gpa                   # of events 0
    uint8_t *size                   # of accesses it is written if `sizes` is asked for
    uint64_t *value                 # of events alone

# A page of the recording, by its number.
cdef struct page_row:
    uint64_t gva
    uint64_t gpa
    uint32_t ctx
    uint8_t mmio                    # OP_MMIO_MASK or 0

# An event, as a row of the trace.
cdef struct event_row:
    uint8_t op
    uint64_t addr
    uint64_t value

# The registers of a context.
cdef struct register_row:
    uint64_t guest                  # 1 inside the nested guest
    uint64_t cr3
    uint64_t ncr3
    uint64_t cr0
    uint64_t cr4
    uint64_t efer


cdef class RecordedRows:
    cdef list kept                  # the arrays behind the pointers
    cdef Py_ssize_t rows_of_last    # of the last of them
    # accesses
    cdef size_t accesses
    cdef const void *pidx           # of two bytes, or of four
    cdef bint short_pidx
    cdef const uint16_t *off
    cdef const uint8_t *kind
    cdef const uint8_t *priv
    cdef const uint8_t *size        # NULL: no sizes are wanted
    cdef page_row *pages            # one for each number of two bytes at least
    cdef uint32_t last_page
    # events: each column and how many there are
    cdef const uint64_t *ev_pos
    cdef const uint8_t *ev_code
    cdef const uint64_t *ev_val
    cdef const uint64_t *ev_aux
    cdef size_t events
    cdef const uint64_t *pf_pos
    cdef const uint64_t *pf_cr2
    cdef const uint32_t *pf_err
    cdef const uint32_t *pf_ctx
    cdef size_t faults
    cdef const uint64_t *npf_pos
    cdef const uint64_t *npf_gpa
    cdef const uint64_t *npf_info1
    cdef size_t npt_faults
    cdef const uint64_t *w_pos
    cdef const uint64_t *w_gpa
    cdef const uint64_t *w_val
    cdef size_t writes
    # registers
    cdef register_row *contexts
    cdef uint32_t last_context
    cdef register_row start         # in force before the first row
    cdef register_row regs          # in force now, as the rows so far tell
    cdef uint32_t context           # of the last access
    cdef long last_guest, last_host     # contexts that a world switch goes back to; -1: none
    # how far the rows have come
    cdef size_t pos                 # next access
    cdef size_t next_event, next_fault, next_npt_fault, next_write
    cdef size_t next_place          # the access that the next event comes before, table writes aside
    cdef bint context_changes       # the next access is of another context
    cdef event_row *pending         # events before access pos that are not rows yet
    cdef size_t pending_count, pending_at, pending_room
    cdef bint failed                # there was no memory for one
    cdef const void *column(self, str name, array, dtype, Py_ssize_t rows) except? NULL
    cdef int take_contexts(self, recording) except -1
    cdef int take_pages(self, recording) except -1
    cdef int take_accesses(self, recording, bint sizes) except -1
    cdef int take_events(self, recording) except -1
    # Write at most `most` rows, to be found at the start of the columns; returns how many. None: that was all, or `failed`
    cdef size_t fill(self, const row_columns *out, size_t most) noexcept nogil
    cdef size_t put_accesses(self, const row_columns *out, size_t n, size_t stop) noexcept nogil
    cdef size_t put_pending(self, const row_columns *out, size_t n, size_t most) noexcept nogil
    cdef void gather_events(self) noexcept nogil
    cdef void gather_npt_faults(self) noexcept nogil
    cdef void switch_world(self, uint64_t enters, uint64_t ncr3, const register_row *following, long number) noexcept nogil
    cdef void force(self, uint32_t number) noexcept nogil
    cdef void use(self, uint32_t number) noexcept nogil
    cdef void emit(self, int op, uint64_t addr, uint64_t value) noexcept nogil
    cdef void find_next_place(self) noexcept nogil
    cdef uint32_t page_at(self, size_t access) noexcept nogil
