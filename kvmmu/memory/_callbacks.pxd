"""Guest memory behind callbacks, of which the pages that were asked for are kept."""

from libc.stdint cimport uint8_t, uint64_t

from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport GuestMemory, SlotTable, missing_pages


cdef class CachedPages(SlotTable):
    """Pages that callbacks gave, one slot each. Pages are added while others walk it; nothing is ever taken from it."""
    cdef missing_pages misses
    cdef size_t count, capacity     # pages that it has, and has room for
    cdef list chunks                # arrays that hold them
    cdef uint8_t **given            # of each page, what the target has of it; the page itself where nobody changes it
    cdef bint readonly
    cdef bint has(self, uint64_t gfn)
    cdef int add(self, uint64_t gfn, uint8_t *address, uint8_t *given) except -1


cdef class CallbackMemory(GuestMemory):
    cdef CachedPages cached
    cdef object reader, writer      # the callbacks; writer may be None
    cdef MachineLock lock           # held by whoever changes what is kept, or is in a callback
    cdef bint busy                  # the lock is held
    cdef uint64_t size              # bytes from 0 on that are memory
    cdef size_t cache_pages
    cdef int kept                   # not 0: some batch is under way, and no page may go
    cdef uint64_t takes             # how often somebody took the pages that were missing
    cdef object here                # of each thread: `takes` when its last walk began
    cdef int check_made(self) except -1
    cdef int begin_anew(self) except -1
    cdef int use(self, CachedPages cached) except -1
    cdef int get(self, gfns) except -1
    cdef object ask(self, gfns)
    cdef int take(self, gfns, pages) except -1
    cdef object copies_of(self, numbers)
    cdef int put_pages(self, gfns, pages) except -1
    cdef int put_changed(self) except -1
