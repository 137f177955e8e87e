"""The inner loop of replay: recorded accesses and table writes in, counters and the first mismatch out."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmmu._bits cimport PG_LEVEL_NONE, PT_MAX_LEVELS, STATUS_OK
from kvmmu._memory cimport gpa_to_hva
from kvmmu._contexts cimport Contexts
from kvmmu._pagewalk cimport PageWalk
from kvmmu._walk cimport walk_result

ctypedef fused page_index:
    uint16_t
    uint32_t

# What walking one access came to.
cdef struct replay_counters:
    uint64_t levels[6]              # accesses that ended on a leaf of this level; 0: paging off
    uint64_t verified
    uint64_t writes


cdef class Replayer:
    """Walks a recording in order. Tables live in the walk's memory; writes to them are applied as the trace goes.

    Parameters
    ----------
    walk : PageWalk
    contexts : Contexts
        One per context of the recording.
    recording
        An object with the columns of `traces.Recording`, checked by it.
    access_of : ndarray of uint8, shape (9,)
        Access byte for kind * 3 + priv.
    """

    cdef PageWalk walk
    cdef Contexts contexts
    cdef object pidx
    cdef const uint64_t[::1] page_gva
    cdef const uint64_t[::1] page_gpa
    cdef const uint32_t[::1] page_ctx
    cdef const uint16_t[::1] off
    cdef const uint8_t[::1] kind
    cdef const uint8_t[::1] priv
    cdef const uint8_t[::1] access_of
    cdef const uint64_t[::1] w_pos
    cdef const uint64_t[::1] w_gpa
    cdef const uint64_t[::1] w_val
    cdef size_t next_write
    cdef replay_counters counters

    def __init__(self, PageWalk walk, Contexts contexts, recording, access_of):
        self.walk, self.contexts = walk, contexts
        self.page_gva, self.page_gpa, self.page_ctx = recording.pages_gva, recording.pages_gpa, recording.pages_ctx
        self.pidx, self.off, self.kind, self.priv = recording.pidx, recording.off, recording.kind, recording.priv
        self.w_pos, self.w_gpa, self.w_val = recording.writes.pos, recording.writes.gpa, recording.writes.val
        self.access_of = access_of

    @property
    def page_sizes(self):
        """Accesses by level of their leaf: a list, index 0 paging off to 5."""
        return [int(self.counters.levels[level]) for level in range(PG_LEVEL_NONE, PT_MAX_LEVELS + 1)]

    @property
    def verified(self):
        """Accesses whose walk ended at the recorded address."""
        return int(self.counters.verified)

    @property
    def writes(self):
        """Table writes applied so far."""
        return int(self.counters.writes)

    def settle(self, uint64_t pos):
        """Apply the table writes made by accesses before pos.

        Raises
        ------
        ValueError
            A write lies outside guest memory.
        """
        self.contexts.use_memory(self.walk.mem)
        if not self.apply_writes(pos):
            gpa = int(self.w_gpa[self.next_write])
            raise ValueError(f"table write {self.next_write} goes to gpa {gpa:#x}, which is no table page")

    cdef bint apply_writes(self, uint64_t pos) noexcept nogil:
        cdef uint8_t *hva
        cdef bint readonly = False
        cdef uint64_t value
        while self.next_write < <size_t>self.w_pos.shape[0] and self.w_pos[self.next_write] < pos:
            hva = gpa_to_hva(self.contexts.walks[0].mem, self.w_gpa[self.next_write], &readonly)
            if hva is NULL or readonly:
                return False
            value = self.w_val[self.next_write]
            memcpy(hva, &value, sizeof(value))
            self.next_write += 1
            self.counters.writes += 1
        return True

    def run(self, size_t start, size_t stop):
        """Walk the accesses start to stop, up to the first whose walk does not end at its recorded address.

        Returns
        -------
        int
            Row of that access, not counted as verified; `stop` if there is none.

        Raises
        ------
        ValueError
            A write lies outside guest memory.
        """
        if not start <= stop <= <size_t>self.off.shape[0]:
            raise ValueError(f"rows {start} to {stop} are not within the {self.off.shape[0]} accesses")
        self.contexts.use_memory(self.walk.mem)
        if self.pidx.dtype.itemsize == 2:
            row = self.run_rows[uint16_t](self.pidx, start, stop)
        else:
            row = self.run_rows[uint32_t](self.pidx, start, stop)
        self.settle(row)                        # raises if it was a write that stopped the loop
        return row

    cdef size_t run_rows(self, const page_index[::1] pidx, size_t start, size_t stop):
        cdef walk_result r
        cdef size_t i = start
        cdef uint32_t row
        cdef uint64_t gva
        cdef const uint64_t *w_pos = &self.w_pos[0] if self.w_pos.shape[0] else NULL
        cdef size_t writes = self.w_pos.shape[0]
        with nogil:
            while i < stop:
                if self.next_write < writes and w_pos[self.next_write] < i and not self.apply_writes(i):
                    break
                row = pidx[i]
                gva = self.page_gva[row] + self.off[i]
                self.contexts.walks[self.page_ctx[row]].gva_to_gpa(
                    &self.contexts.walks[self.page_ctx[row]], gva, self.access_of[self.kind[i] * 3 + self.priv[i]], True, &r)
                if r.status != STATUS_OK or r.gpa != self.page_gpa[row] + self.off[i]:
                    break
                self.counters.verified += 1
                self.counters.levels[r.level] += 1
                i += 1
        return i
