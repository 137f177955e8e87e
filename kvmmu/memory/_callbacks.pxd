"""Guest memory behind callbacks, of which the pages that were asked for are kept."""

from libc.stdint cimport uint64_t

from kvmmu.memory._memory cimport GuestMemory, SlotTable, missing_pages


cdef class CachedPages(SlotTable):
    """Pages that callbacks gave, one slot each. Pages are added while others walk it; nothing is ever taken from it."""
    cdef missing_pages misses
    cdef size_t count, capacity     # pages that it has, and has room for
    cdef list chunks                # arrays that hold them
    cdef bint readonly
    cdef bint has(self, uint64_t gfn)
    cdef int add(self, uint64_t gfn, uint64_t address) except -1


cdef class CallbackMemory(GuestMemory):
    cdef CachedPages cached
    cdef object reader, writer      # the callbacks; writer may be None
    cdef object lock, owner         # held by the thread that is in a callback
    cdef uint64_t size              # bytes from 0 on that are memory
    cdef size_t cache_pages
    cdef int kept                   # not 0: some batch is under way, and no page may go
    cdef uint64_t takes             # how often somebody took the pages that were missing
    cdef dict takes_at_start        # of the last walk of each thread, by its ident
    cdef int use(self, CachedPages cached) except -1
    cdef object ask(self, gfns)
    cdef int take(self, gfns, pages) except -1
