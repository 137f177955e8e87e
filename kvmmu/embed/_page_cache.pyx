"""Pages behind the callbacks of a C program; see `_page_cache.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_SHIFT, PAGE_SIZE
from kvmmu.embed._structs cimport (
    KVMMU_E_CALLBACK, KVMMU_E_MEMORY, KVMMU_OK, KVMMU_READ_DONE, KVMMU_READ_HOLE, kvmmu_callbacks, page_cache,
)
from kvmmu.memory._memory cimport guest_page, guest_slot, hash_gfn

cdef enum:
    DEFAULT_PAGES = 1024
    PAGES_OF_A_WALK = 8                 # no walk of one stage reads more
    # nor one of two: 5 tables and the address through 5 levels each, 5 tables, 4 of sub-page permissions, a log, a #VE area
    PAGES_OF_TWO_STAGES = 6 * 5 + 5 + 4 + 2


cdef page_cache *cache_new(const kvmmu_callbacks *callbacks) noexcept nogil:
    cdef page_cache *cache = <page_cache *>calloc(1, sizeof(page_cache))
    cdef size_t indexed = 1
    if cache is NULL:
        return NULL
    cache.callbacks = callbacks
    cache.capacity = callbacks.cache_pages or DEFAULT_PAGES
    while indexed < 2 * cache.capacity:
        indexed *= 2
    cache.slots = <guest_slot *>calloc(cache.capacity + 1, sizeof(guest_slot))
    cache.pages = <guest_page *>calloc(indexed, sizeof(guest_page))
    cache.bytes = <uint8_t *>calloc(cache.capacity, PAGE_SIZE)
    if cache.slots is NULL or cache.pages is NULL or cache.bytes is NULL:
        cache_free(cache)
        return NULL
    cache.misses.limit = (callbacks.memory_size or GPA_LIMIT) >> PAGE_SHIFT
    cache.mem.slots, cache.mem.count = cache.slots, 2       # 2: find_slot() is asked
    cache.mem.pages, cache.mem.page_mask = cache.pages, indexed - 1
    cache.mem.missing = &cache.misses
    return cache


cdef void cache_free(page_cache *cache) noexcept nogil:
    if cache is NULL:
        return
    free(cache.misses.gfns)
    free(cache.slots)
    free(cache.pages)
    free(cache.bytes)
    free(cache)


cdef void forget_misses(page_cache *cache) noexcept nogil:
    if cache.misses.gfns is not NULL:
        memset(cache.misses.gfns, 0, cache.misses.capacity * sizeof(uint64_t))
    cache.misses.count, cache.misses.failed = 0, False


cdef void index_page(page_cache *cache, size_t i) noexcept nogil:
    cdef const guest_slot *slot = &cache.slots[i + 1]
    cdef uint64_t gfn = slot.gpa >> PAGE_SHIFT
    cdef size_t h = hash_gfn(gfn) & cache.mem.page_mask
    while cache.pages[h].slot is not NULL:
        h = (h + 1) & cache.mem.page_mask
    cache.pages[h].gfn, cache.pages[h].slot = gfn, slot


cdef void index_all(page_cache *cache) noexcept nogil:
    cdef size_t i
    memset(cache.pages, 0, (cache.mem.page_mask + 1) * sizeof(guest_page))
    for i in range(cache.count):
        index_page(cache, i)


cdef void cache_clear(page_cache *cache) noexcept nogil:
    cache.count = 0
    index_all(cache)


cdef void cache_forget(page_cache *cache, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef size_t i = 0
    cdef guest_slot *slot
    cdef guest_slot *last
    while i < cache.count:
        slot = &cache.slots[i + 1]
        if slot.gpa + (PAGE_SIZE - 1) < gpa or slot.gpa > gpa + (size - 1):
            i += 1
            continue
        last = &cache.slots[cache.count]            # takes its place
        if last != slot:
            memcpy(slot.hva, last.hva, PAGE_SIZE)
            slot.gpa, slot.readonly = last.gpa, last.readonly
        cache.count -= 1
    index_all(cache)


cdef void cache_make_room(page_cache *cache, bint two_stages) noexcept nogil:
    if cache.count + (PAGES_OF_TWO_STAGES if two_stages else PAGES_OF_A_WALK) > cache.capacity:
        cache_clear(cache)


cdef int read_page(page_cache *cache, uint64_t gfn) noexcept nogil:
    """Add a page that is not there. A hole is a page of zeros, which nothing is stored in."""
    cdef uint8_t *page = cache.bytes + cache.count * PAGE_SIZE
    cdef guest_slot *slot = &cache.slots[cache.count + 1]
    cdef int answer
    memset(page, 0, PAGE_SIZE)
    answer = cache.callbacks.read(cache.callbacks.opaque, gfn << PAGE_SHIFT, page)
    if answer != KVMMU_READ_DONE and answer != KVMMU_READ_HOLE:
        return KVMMU_E_CALLBACK
    slot.gpa, slot.size, slot.hva = gfn << PAGE_SHIFT, PAGE_SIZE, page
    slot.readonly = cache.callbacks.write is NULL
    if answer == KVMMU_READ_HOLE:
        memset(page, 0, PAGE_SIZE)
        slot.readonly = True
    cache.count += 1
    index_page(cache, cache.count - 1)
    return KVMMU_OK


cdef int cache_fetch(page_cache *cache) noexcept nogil:
    cdef int code = KVMMU_OK
    cdef size_t i
    if cache.misses.failed:
        forget_misses(cache)
        return KVMMU_E_MEMORY
    if not cache.misses.count:
        return KVMMU_OK
    for i in range(cache.misses.capacity):
        if cache.misses.gfns[i] and code == KVMMU_OK:
            code = KVMMU_E_MEMORY if cache.count == cache.capacity else read_page(cache, cache.misses.gfns[i] - 1)
    forget_misses(cache)
    return 1 if code == KVMMU_OK else code
