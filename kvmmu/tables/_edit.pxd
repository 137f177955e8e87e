"""Changes to page tables: the state of one set of tables, and what adds, removes and changes its entries.

The caller sets `mem` and the path of the root before a run of rows, and keeps the slots alive while it lasts.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from kvmmu.arch._bits cimport PG_LEVEL_4K
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.memory._memory cimport guest_mem, kvmmu_read32, kvmmu_read64

# Why a row could not be carried out.
cdef enum build_status:
    BUILD_DONE
    BUILD_NO_FRAME              # the pool of frames is empty: fill it and go on with the same row
    BUILD_FRAME_OUTSIDE         # a frame of the pool lies in no writable slot
    BUILD_TABLE_OUTSIDE         # an entry points to a table that lies in no writable slot
    BUILD_CANNOT_SPLIT          # a 4M page above 4 GiB has no 4K form
    BUILD_NOT_MAPPED
    BUILD_SMALLER_PAGES         # a table of smaller pages lies where a page of this size was expected
    BUILD_NO_MEMORY             # of the host, for the lists below

# A store to an entry, as it was and as it is.
cdef struct entry_store:
    uint64_t gpa
    uint64_t old
    uint64_t new

# A growing list of frames.
cdef struct frame_list:
    uint64_t *frames
    size_t count
    size_t capacity

cdef struct builder:
    const guest_mem *mem
    int format
    int levels
    int large_level             # highest level of pages
    int fixed_level             # tables from this level up are never released
    size_t entry_bytes
    size_t entries              # of a table
    uint64_t root
    uint64_t table_bits         # of an entry that points to a table
    uint64_t root_bits          # the same, in the root table
    uint64_t present_mask       # an entry with one of these bits is present
    frame_list pool             # zeroed or not, taken from the end
    frame_list freed            # tables that are no more in use
    bint keeps_stores
    entry_store *stores
    size_t store_count
    size_t store_capacity
    # tables that the last address passed, by level; those above path_level are known
    uint64_t path_addr
    int path_level
    uint8_t *path[6]
    uint64_t path_gpa[6]
    uint64_t made               # tables


cdef inline uint64_t read_entry(const builder *b, const uint8_t *hva) noexcept nogil:
    return kvmmu_read32(hva) if b.format == KVMMU_FORMAT_32 else kvmmu_read64(hva)

cdef inline int level_of(const builder *b, uint8_t level) noexcept nogil:
    """A level of pages, whatever another thread has made of the column since it was checked."""
    return min(max(<int>level, PG_LEVEL_4K), b.large_level)


cdef build_status descend(builder *b, uint64_t addr, int target, bint make, uint8_t **hva, uint64_t *gpa) noexcept nogil
# Level of the page that maps addr; 0: none does
cdef int find_page(builder *b, uint64_t addr) noexcept nogil
cdef build_status map_row(builder *b, uint64_t gva, uint64_t target, int level, uint64_t bits) noexcept nogil
cdef build_status unmap_row(builder *b, uint64_t gva, int level) noexcept nogil
cdef build_status protect_row(builder *b, uint64_t gva, int level, uint64_t clear, uint64_t bits) noexcept nogil
# A frame of the pool, cleared. OUT gpa, hva
cdef build_status take_frame(builder *b, uint64_t *gpa, uint8_t **hva) noexcept nogil
cdef build_status store_entry(builder *b, uint8_t *hva, uint64_t gpa, uint64_t new) noexcept nogil
# The host address of a table that can be written, or NULL
cdef uint8_t *table_hva(const builder *b, uint64_t gpa) noexcept nogil
cdef bint push_frame(frame_list *l, uint64_t gpa) noexcept nogil
