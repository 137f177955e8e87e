"""The pages behind callbacks that one vCPU keeps. Nothing here takes the GIL."""

from libc.stdint cimport uint64_t

from kvmmu.embed._structs cimport kvmmu_callbacks, page_cache

# NULL without memory. IN callbacks: valid as long as the cache
cdef page_cache *cache_new(const kvmmu_callbacks *callbacks) noexcept nogil
cdef void cache_free(page_cache *cache) noexcept nogil
# Forget every page, or those of [gpa, gpa + size); not within a call
cdef void cache_clear(page_cache *cache) noexcept nogil
cdef void cache_forget(page_cache *cache, uint64_t gpa, uint64_t size) noexcept nogil
# Forget every page if there is no room for those of one walk of one stage, or of two
cdef void cache_make_room(page_cache *cache, bint two_stages) noexcept nogil
# Read what the last walk missed: 1 if there was something, and the walk is to be repeated; 0; or KVMMU_E_*
cdef int cache_fetch(page_cache *cache) noexcept nogil
