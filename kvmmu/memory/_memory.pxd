"""Guest-physical memory for the walkers: a slot table with one checked look-up.

`gpa_to_hva()` is the only way from a guest-physical address to a host pointer. Slots are page-aligned and made of whole
pages, and every caller asks for an aligned 4- or 8-byte entry, which therefore lies in one slot if its first byte does.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "kvmmu/memory/_memory.h" nogil:
    bint kvmmu_cmpxchg64(void *p, uint64_t old, uint64_t val)
    bint kvmmu_cmpxchg32(void *p, uint32_t old, uint32_t val)
    uint64_t kvmmu_read64(const void *p)
    void kvmmu_write64(void *p, uint64_t v)
    uint32_t kvmmu_read32(const void *p)
    void kvmmu_lock(uint32_t *lock)
    void kvmmu_unlock(uint32_t *lock)
    uint32_t kvmmu_load32(const uint32_t *p)
    void kvmmu_keep_copies()
    void kvmmu_store32(uint32_t *p, uint32_t v)
    void kvmmu_store(uint8_t *to, const uint8_t *from_, size_t n)
    uint64_t kvmmu_load64(const void *p)

cdef struct guest_slot:
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    bint readonly               # the guest cannot write: A/D updates are skipped

# A page of a slot other than the first one, in an open-addressing table keyed by frame number.
cdef struct guest_page:
    uint64_t gfn
    const guest_slot *slot      # NULL: free

# Pages that walks missed in memory of callbacks.
cdef struct missing_pages:
    uint32_t lock
    uint64_t limit              # frames from here on are holes
    uint64_t *gfns              # open addressing: frame + 1, 0 free
    size_t count, capacity
    bint failed                 # there was no memory for one

cdef struct guest_mem:
    const guest_slot *slots     # slots[0] is the largest, the others ascend by gpa
    size_t count
    const guest_page *pages     # NULL: too many pages to index, search the slots
    uint64_t page_mask
    missing_pages *missing      # NULL: what is not there is a hole

cdef const guest_slot *find_slot(const guest_mem *mem, uint64_t gpa) noexcept nogil


cdef inline uint64_t hash_gfn(uint64_t gfn) noexcept nogil:
    return (gfn * <uint64_t>0x9E3779B97F4A7C15ULL) >> 32


cdef inline uint8_t *gpa_to_hva(const guest_mem *mem, uint64_t gpa, bint *readonly) noexcept nogil:
    """Host address of the aligned entry at gpa, NULL in a hole. OUT readonly."""
    cdef const guest_slot *slot = mem.slots
    cdef uint64_t offset = gpa - slot.gpa
    if offset >= slot.size:
        if mem.count == 1:
            return NULL
        slot = find_slot(mem, gpa)
        if slot is NULL:
            return NULL
        offset = gpa - slot.gpa
    readonly[0] = slot.readonly
    return slot.hva + offset


# Numbers of slot tables: of a memory that has none at the moment, and of what has not seen any. Tables have numbers from 2 on.
cdef enum:
    NO_TABLE = 0
    NEVER_SEEN = 1


cdef class SlotTable:
    """The C arrays behind one state of a GuestMemory. Immutable.

    Lifetime: it keeps the buffers of its slots, and their exports. Who walks one without the GIL, or runs Python code between
    two walks, has a reference to it; who only remembers which one it walked last has its number, and compares that first.
    """
    cdef guest_mem mem
    cdef guest_slot *slots
    cdef guest_page *pages
    cdef list regions               # of the slots, ascending
    cdef uint64_t number            # of no other table


cdef class GuestMemory:
    cdef SlotTable table            # None: slots changed, and nobody has walked since
    cdef uint64_t number            # of table, or NO_TABLE
    cdef uint64_t changes           # of slots
    cdef object regions             # _Regions
    cdef bint empty                 # without slots on purpose
    # The table of the slots as they are now. RuntimeError without slots, ValueError of memory of callbacks
    cdef SlotTable current(self)
    # The same for a walk that calls `fetch_missing()` after it failed, and begins anew where that is True
    cdef SlotTable walked(self)
    cdef bint fetch_missing(self, SlotTable table) except -1
    # Whether pages that are kept may not go
    cdef int keep(self, bint on) except -1
    cdef int forget_table(self) except -1
