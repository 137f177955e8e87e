"""Memories of a C program; see `_memories.pxd`, and `_structs.pxd` for who may touch what."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_OFFSET_MASK
from kvmmu.embed._structs cimport (
    INDEX_MASK, KIND_MEMORY, KVMMU_E_ARGUMENT, KVMMU_E_BUSY, KVMMU_E_HANDLE, KVMMU_E_MEMORY, KVMMU_E_NULL, KVMMU_E_VERSION,
    KVMMU_MEMORY_READONLY, KVMMU_OK, MAX_HANDLES, c_memory, kvmmu_callbacks, kvmmu_memory,
)
from kvmmu.embed._vcpus cimport give_back_vcpus, lock_handles, new_handle, take_vcpus, unlock_handles, use_slots
from kvmmu.memory._memory cimport guest_slot

cdef enum:
    LEAST_CACHE_PAGES = 64
    MOST_CACHE_PAGES = 1 << 20
    ENTRY_ALIGNMENT = 8                 # of memory in which accessed and dirty bits are set

cdef c_memory *memory_table[MAX_HANDLES]
cdef size_t first_free = 1              # no free place lies before it


cdef c_memory *find_memory(kvmmu_memory handle) noexcept nogil:
    cdef c_memory *memory = memory_table[handle & INDEX_MASK]
    return memory if memory is not NULL and memory.id == handle else NULL


cdef c_memory *new_memory(size_t *index) noexcept nogil:
    """Return a free memory with one slot that has no bytes, or NULL. The lock is held."""
    global first_free
    cdef c_memory *memory
    cdef size_t i = first_free
    while i < MAX_HANDLES and memory_table[i] is not NULL and memory_table[i].id:
        i += 1
    first_free = i
    if i == MAX_HANDLES:
        return NULL
    if memory_table[i] is NULL:
        memory_table[i] = <c_memory *>calloc(1, sizeof(c_memory))
    memory = memory_table[i]
    if memory is NULL:
        return NULL
    memset(memory, 0, sizeof(c_memory))
    memory.slots = <guest_slot *>calloc(1, sizeof(guest_slot))
    index[0] = i
    return memory if memory.slots is not NULL else NULL


cdef int create(const kvmmu_callbacks *callbacks, kvmmu_memory *out) noexcept nogil:
    cdef c_memory *memory
    cdef size_t i
    lock_handles()
    memory = new_memory(&i)
    if memory is not NULL:
        if callbacks is not NULL:
            memory.callbacks, memory.has_callbacks = callbacks[0], True
        memory.id = out[0] = new_handle(KIND_MEMORY, i)
    unlock_handles()
    return KVMMU_E_MEMORY if memory is NULL else KVMMU_OK


cdef int c_memory_create(kvmmu_memory *out) noexcept nogil:
    if out is NULL:
        return KVMMU_E_NULL
    return create(NULL, out)


cdef int c_memory_create_callbacks(const kvmmu_callbacks *callbacks, kvmmu_memory *out) noexcept nogil:
    cdef size_t pages
    if callbacks is NULL or out is NULL:
        return KVMMU_E_NULL
    if callbacks.size != sizeof(kvmmu_callbacks):
        return KVMMU_E_VERSION
    if callbacks.read is NULL:
        return KVMMU_E_NULL
    pages = callbacks.cache_pages
    if pages and (pages < LEAST_CACHE_PAGES or pages > MOST_CACHE_PAGES):
        return KVMMU_E_ARGUMENT
    if callbacks.memory_size & PAGE_OFFSET_MASK or callbacks.memory_size > GPA_LIMIT:
        return KVMMU_E_ARGUMENT
    return create(callbacks, out)


cdef int c_memory_free(kvmmu_memory handle) noexcept nogil:
    global first_free
    cdef c_memory *memory
    cdef int code = KVMMU_OK
    lock_handles()
    memory = find_memory(handle)
    if memory is NULL:
        code = KVMMU_E_HANDLE
    elif memory.vcpus:
        code = KVMMU_E_BUSY
    else:
        memory.id = 0
        free(memory.slots)
        memory.slots = NULL
        first_free = min(first_free, <size_t>(handle & INDEX_MASK))
    unlock_handles()
    return code


# ---- slots -------------------------------------------------------------------------------------------------------------

cdef bint is_slot(uint64_t gpa, const void *host, uint64_t size, bint readonly) noexcept nogil:
    if not size or (gpa | size) & PAGE_OFFSET_MASK or gpa >= GPA_LIMIT or size > GPA_LIMIT - gpa:
        return False
    if size - 1 > ~<uintptr_t>0 - <uintptr_t>host:          # it would end beyond the address space
        return False
    return readonly or not <uintptr_t>host % ENTRY_ALIGNMENT


cdef void put_in_order(guest_slot *slots, size_t count) noexcept nogil:
    """Put the largest slot first, and the others after it by address."""
    cdef size_t i, j, largest = 0
    cdef guest_slot slot
    for i in range(1, count):
        if slots[i].size > slots[largest].size:
            largest = i
    slots[0], slots[largest] = slots[largest], slots[0]
    for i in range(2, count):
        slot = slots[i]
        j = i
        while j > 1 and slots[j - 1].gpa > slot.gpa:
            slots[j] = slots[j - 1]
            j -= 1
        slots[j] = slot


cdef int replace_slots(c_memory *memory, guest_slot *slots, size_t count) noexcept nogil:
    """Walk other slots from now on. If no vCPU is in use elsewhere it takes the array over, else it returns KVMMU_E_*."""
    cdef int code = take_vcpus(memory)
    if code == KVMMU_OK:
        put_in_order(slots, count)
        free(memory.slots)
        memory.slots, memory.count = slots, count
        use_slots(memory)
    give_back_vcpus(memory)
    return code


cdef int add(c_memory *memory, const guest_slot *slot) noexcept nogil:
    cdef guest_slot *slots
    cdef size_t i
    cdef int code
    for i in range(memory.count):
        if memory.slots[i].gpa < slot.gpa + slot.size and slot.gpa < memory.slots[i].gpa + memory.slots[i].size:
            return KVMMU_E_ARGUMENT
    slots = <guest_slot *>calloc(memory.count + 1, sizeof(guest_slot))
    if slots is NULL:
        return KVMMU_E_MEMORY
    for i in range(memory.count):
        slots[i] = memory.slots[i]
    slots[memory.count] = slot[0]
    code = replace_slots(memory, slots, memory.count + 1)
    if code != KVMMU_OK:
        free(slots)
    return code


cdef int c_memory_add(kvmmu_memory handle, uint64_t gpa, void *host, uint64_t size, uint32_t flags) noexcept nogil:
    cdef c_memory *memory
    cdef guest_slot slot
    cdef int code = KVMMU_E_HANDLE
    if host is NULL:
        return KVMMU_E_NULL
    slot.gpa, slot.size, slot.hva, slot.readonly = gpa, size, <uint8_t *>host, flags & KVMMU_MEMORY_READONLY
    if flags & ~<uint32_t>KVMMU_MEMORY_READONLY or not is_slot(gpa, host, size, slot.readonly):
        return KVMMU_E_ARGUMENT
    lock_handles()
    memory = find_memory(handle)
    if memory is not NULL:
        code = KVMMU_E_ARGUMENT if memory.has_callbacks else add(memory, &slot)
    unlock_handles()
    return code


cdef int remove(c_memory *memory, uint64_t gpa) noexcept nogil:
    cdef guest_slot *slots
    cdef size_t i, n = 0
    cdef int code = KVMMU_E_ARGUMENT
    slots = <guest_slot *>calloc(max(memory.count, <size_t>1), sizeof(guest_slot))
    if slots is NULL:
        return KVMMU_E_MEMORY
    for i in range(memory.count):
        if memory.slots[i].gpa != gpa:
            slots[n] = memory.slots[i]
            n += 1
    if n < memory.count:
        code = replace_slots(memory, slots, n)
    if code != KVMMU_OK:
        free(slots)
    return code


cdef int c_memory_remove(kvmmu_memory handle, uint64_t gpa) noexcept nogil:
    cdef c_memory *memory
    cdef int code = KVMMU_E_HANDLE
    lock_handles()
    memory = find_memory(handle)
    if memory is not NULL:
        code = remove(memory, gpa)
    unlock_handles()
    return code
