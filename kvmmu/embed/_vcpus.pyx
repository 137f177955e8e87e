"""vCPUs by their handles; see `_vcpus.pxd` for the contract and `_structs.pxd` for who may touch what."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from kvmmu._walk cimport kvm_pagewalk, translate_nested_gpa, walk_result, walk_step
from kvmmu.arch._bits cimport ACCESS_USER_MASK, INVALID_GPA, PT_MAX_LEVELS, STATUS_OK
from kvmmu.arch._format cimport resolved_access
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.embed._nested_walk cimport store_changes, watch_table, watch_walk, watched_words
from kvmmu.embed._page_cache cimport cache_clear, cache_fetch, cache_forget, cache_free, cache_make_room
from kvmmu.embed._structs cimport (
    COUNT_SHIFT, INDEX_MASK, KIND_SHIFT, KIND_VCPU, KVMMU_ACCESS_NO_AD, KVMMU_ACCESS_PROBE, KVMMU_E_ARGUMENT, KVMMU_E_BUSY,
    KVMMU_E_CALLBACK, KVMMU_E_HANDLE, KVMMU_E_NULL, KVMMU_E_THREAD, KVMMU_E_VERSION, KVMMU_OK, KVMMU_TABLE_LOAD,
    KVMMU_TABLE_STORE, MAX_HANDLES, c_memory, c_vcpu, kvmmu_let_go, kvmmu_owner, kvmmu_registers, kvmmu_result, kvmmu_take,
    kvmmu_this_thread, kvmmu_vcpu,
)
from kvmmu.memory._memory cimport gpa_to_hva, kvmmu_lock, kvmmu_read64, kvmmu_unlock
from kvmmu.walk._fast cimport kvmmu_translation, translate_fast, use_fast_memory

cdef enum:
    MOST_ATTEMPTS = 64                  # of one walk behind callbacks, each of which reads a page at least

cdef uint32_t handles_lock
cdef uint64_t handles_made
cdef size_t vcpus_made                  # indices below 1 + vcpus_made have a vCPU, free or not
cdef void *vcpu_table[MAX_HANDLES]      # of c_vcpu
cdef c_vcpu NO_VCPU                     # where there is none: it has no owner, and no handle has its id

ctypedef int (*translate_fn)(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil


cdef void empty_table() noexcept:
    cdef size_t i
    for i in range(MAX_HANDLES):
        vcpu_table[i] = &NO_VCPU


empty_table()


# ---- handles -----------------------------------------------------------------------------------------------------------

cdef void lock_handles() noexcept nogil:
    kvmmu_lock(&handles_lock)


cdef void unlock_handles() noexcept nogil:
    kvmmu_unlock(&handles_lock)


cdef uint64_t new_handle(uint64_t kind, size_t index) noexcept nogil:
    global handles_made
    handles_made += 1
    return handles_made << COUNT_SHIFT | kind << KIND_SHIFT | index


cdef c_vcpu *take_vcpu(kvmmu_vcpu handle, int *code) noexcept nogil:
    """Return the vCPU of a handle, after taking it if it belongs to nobody; or NULL and KVMMU_E_*."""
    cdef c_vcpu *v = <c_vcpu *>KVMMU_TABLE_LOAD(&vcpu_table[handle & INDEX_MASK])
    cdef uintptr_t self = kvmmu_this_thread()
    cdef bint taken = False
    code[0] = KVMMU_E_HANDLE
    if v == &NO_VCPU:
        return NULL
    if kvmmu_owner(&v.owner) != self:
        if not kvmmu_take(&v.owner, self):
            code[0] = KVMMU_E_THREAD                # or of a vCPU that was freed, whose place another one has
            return NULL
        taken = True
    if v.id == handle:                              # not 0: handles have a kind
        code[0] = KVMMU_OK
        return v
    if taken:
        kvmmu_let_go(&v.owner)
    return NULL


cdef inline c_vcpu *find_vcpu(kvmmu_vcpu handle, int *code) noexcept nogil:
    """Return the vCPU of a handle, as `take_vcpu()` does. Short if it belongs to this thread."""
    cdef c_vcpu *v = <c_vcpu *>KVMMU_TABLE_LOAD(&vcpu_table[handle & INDEX_MASK])
    if kvmmu_owner(&v.owner) == kvmmu_this_thread() and v.id == handle:
        return v
    return take_vcpu(handle, code)


cdef c_vcpu *own_vcpu(kvmmu_vcpu handle, bint idle, int *code) noexcept nogil:
    cdef c_vcpu *v = find_vcpu(handle, code)
    code[0] = code[0] if v is NULL else KVMMU_OK
    if v is not NULL and idle and v.busy:
        code[0] = KVMMU_E_BUSY
        return NULL
    return v


cdef c_vcpu *vcpu_asked(kvmmu_vcpu handle, bint idle, const void *argument, int *code) noexcept nogil:
    cdef c_vcpu *v = own_vcpu(handle, idle, code)
    if v is not NULL and argument is NULL:
        code[0] = KVMMU_E_NULL
        return NULL
    return v


cdef c_vcpu *take_free_vcpu() noexcept nogil:
    global vcpus_made
    cdef c_vcpu *v
    cdef size_t i
    cdef uintptr_t self = kvmmu_this_thread()
    for i in range(1, vcpus_made + 1):
        v = <c_vcpu *>vcpu_table[i]
        if not v.id and kvmmu_take(&v.owner, self):
            if not v.id:
                return v
            kvmmu_let_go(&v.owner)
    if vcpus_made + 1 == MAX_HANDLES:
        return NULL
    v = <c_vcpu *>calloc(1, sizeof(c_vcpu))
    if v is NULL:
        return NULL
    kvmmu_take(&v.owner, self)
    vcpus_made += 1
    v.index = vcpus_made
    KVMMU_TABLE_STORE(&vcpu_table[vcpus_made], v)
    return v


cdef kvmmu_vcpu open_vcpu(c_vcpu *v) noexcept nogil:
    v.id = new_handle(KIND_VCPU, v.index)
    v.memory.vcpus += 1
    return v.id


cdef int c_vcpu_release(kvmmu_vcpu handle) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = own_vcpu(handle, True, &code)
    if v is NULL:
        return code
    kvmmu_let_go(&v.owner)
    return KVMMU_OK


cdef int c_vcpu_free(kvmmu_vcpu handle) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = own_vcpu(handle, True, &code)
    if v is NULL:
        return code
    lock_handles()
    v.memory.vcpus -= 1
    v.memory, v.id = NULL, 0
    unlock_handles()
    cache_free(v.cache)
    v.cache = NULL
    kvmmu_let_go(&v.owner)
    return KVMMU_OK


# ---- memory ------------------------------------------------------------------------------------------------------------

cdef void use_memory(c_vcpu *v) noexcept nogil:
    if v.cache is not NULL:
        v.mem = v.cache.mem
    else:
        memset(&v.mem, 0, sizeof(v.mem))
        v.mem.slots, v.mem.count = v.memory.slots, max(v.memory.count, <size_t>1)
    v.w.mem = v.n.mem = &v.mem
    use_fast_memory(&v.fast, &v.mem)


cdef int take_vcpus(const c_memory *memory) noexcept nogil:
    cdef c_vcpu *v
    cdef size_t i
    cdef uintptr_t self = kvmmu_this_thread()
    for i in range(1, vcpus_made + 1):
        v = <c_vcpu *>vcpu_table[i]
        if v.memory != memory:                      # changes under the lock alone
            continue
        if kvmmu_owner(&v.owner) == self:
            if v.busy:
                return KVMMU_E_BUSY
        elif kvmmu_take(&v.owner, self):
            v.borrowed = True
        else:
            return KVMMU_E_THREAD
    return KVMMU_OK


cdef void give_back_vcpus(const c_memory *memory) noexcept nogil:
    cdef c_vcpu *v
    cdef size_t i
    for i in range(1, vcpus_made + 1):
        v = <c_vcpu *>vcpu_table[i]
        if v.memory == memory and kvmmu_owner(&v.owner) == kvmmu_this_thread() and v.borrowed:
            v.borrowed = False
            kvmmu_let_go(&v.owner)


cdef void use_slots(const c_memory *memory) noexcept nogil:
    cdef c_vcpu *v
    cdef size_t i
    for i in range(1, vcpus_made + 1):
        v = <c_vcpu *>vcpu_table[i]
        if v.memory == memory:
            use_memory(v)


cdef int c_invalidate(kvmmu_vcpu handle, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = own_vcpu(handle, True, &code)
    if v is NULL:
        return code
    if v.cache is NULL:
        return KVMMU_OK
    if not size:
        cache_clear(v.cache)
    elif size - 1 > ~<uint64_t>0 - gpa:
        return KVMMU_E_ARGUMENT
    else:
        cache_forget(v.cache, gpa, size)
    return KVMMU_OK


# ---- walks -------------------------------------------------------------------------------------------------------------

cdef int enter(c_vcpu *v) noexcept nogil:
    if v.cache is NULL:
        return KVMMU_OK
    if v.busy:
        return KVMMU_E_BUSY
    v.busy = True
    cache_make_room(v.cache, v.stage.flags != 0)
    return KVMMU_OK


cdef int fetch_again(c_vcpu *v, int attempt) noexcept nogil:
    if v.cache is NULL:
        return KVMMU_OK
    return KVMMU_E_CALLBACK if attempt == MOST_ATTEMPTS else cache_fetch(v.cache)


cdef void leave(c_vcpu *v) noexcept nogil:
    if v.cache is not NULL:
        v.busy = False


cdef int store_entries(c_vcpu *v, const walk_step *steps, int n) noexcept nogil:
    """Give the entries in which a walk has set bits to the write callback. If that fails, all pages are forgotten."""
    cdef uint32_t half
    cdef int i, answer
    for i in range(n):
        if not steps[i].sets_accessed and not steps[i].sets_dirty:
            continue
        half = <uint32_t>steps[i].pte
        if v.w.format == KVMMU_FORMAT_32:
            answer = v.cache.callbacks.write(v.cache.callbacks.opaque, steps[i].pte_gpa, &half, sizeof(uint32_t))
        else:
            answer = v.cache.callbacks.write(v.cache.callbacks.opaque, steps[i].pte_gpa, &steps[i].pte, sizeof(uint64_t))
        if answer:
            cache_clear(v.cache)
            return KVMMU_E_CALLBACK
    return KVMMU_OK


cdef int nested_behind_callbacks(c_vcpu *v, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    """Walk without changes until every page is there, and then with them."""
    cdef watched_words watched
    cdef int attempt = 0, code = enter(v)
    if code != KVMMU_OK:
        return code
    set_ad = set_ad and v.cache.callbacks.write is not NULL
    while True:
        v.w.gva_to_gpa(&v.w, gva, access, False, r)
        if set_ad:
            watch_walk(v, gva, access, &watched)
        code = fetch_again(v, attempt)
        if code != 1:
            break
        attempt += 1
    if code == KVMMU_OK and set_ad:
        v.w.gva_to_gpa(&v.w, gva, access, True, r)
        code = store_changes(v, &watched)
        if code != KVMMU_OK:
            cache_clear(v.cache)
    leave(v)
    return code


cdef int walk_behind_callbacks(c_vcpu *v, uint64_t gva, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef int n = 0, attempt = 0, code = enter(v)
    if code != KVMMU_OK:
        return code
    set_ad = set_ad and v.cache.callbacks.write is not NULL
    while True:
        if set_ad:
            n = v.w.walk_addr(&v.w, gva, access, r, steps)
        else:
            v.w.gva_to_gpa(&v.w, gva, access, False, r)
        code = fetch_again(v, attempt)
        if code != 1:
            break
        attempt += 1
    if code == KVMMU_OK:
        code = store_entries(v, steps, n)
    leave(v)
    return code


cdef int walk_row(c_vcpu *v, uint64_t gva, uint32_t access, walk_result *r) noexcept nogil:
    cdef uint32_t resolved = resolved_access((access | v.ac) & <uint32_t>ANY_ACCESS)
    cdef bint set_ad = not access & (KVMMU_ACCESS_NO_AD | KVMMU_ACCESS_PROBE)
    if v.cache is not NULL:
        if v.stage.flags:
            return nested_behind_callbacks(v, gva, resolved, set_ad, r)
        return walk_behind_callbacks(v, gva, resolved, set_ad, r)
    v.w.gva_to_gpa(&v.w, gva, resolved, set_ad, r)
    return KVMMU_OK


cdef int translate_slowly(c_vcpu *v, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil:
    cdef walk_result r
    cdef int code = walk_row(v, gva, access, &r)
    if code == KVMMU_OK:
        out.gpa, out.error_code, out.status, out.level = r.gpa, r.error_code, r.status, r.level
        out.reserved = 0
    return code


cdef inline int translate_plain_row(c_vcpu *v, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil:
    """Translate for an access that the short cut knows."""
    cdef kvmmu_translation t = translate_fast(&v.fast, &v.arch, gva, (access | v.ac) & <uint32_t>PLAIN_ACCESS)
    if t.gpa == INVALID_GPA:
        return translate_slowly(v, gva, access, out)
    out.gpa, out.error_code, out.status, out.level = t.gpa, t.error_code, t.status, t.level
    out.reserved = 0
    return KVMMU_OK


cdef int translate_checked(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = take_vcpu(handle, &code)
    if v is NULL:
        return code
    if out is NULL:
        return KVMMU_E_NULL
    if not is_access(access):
        return KVMMU_E_ARGUMENT
    return translate_plain_row(v, gva, access, out) if is_plain_access(access) else translate_slowly(v, gva, access, out)


cdef translate_fn the_rest = translate_checked      # by a pointer, lest it be inlined


cdef int c_translate(kvmmu_vcpu handle, uint64_t gva, uint32_t access, kvmmu_result *out) noexcept nogil:
    """Translate by the short cut where the handle is good and its mode is that of most guests. All else is
    left to `translate_checked()`, whose calls would cost this function the saving of registers."""
    cdef const c_vcpu *v = <const c_vcpu *>KVMMU_TABLE_LOAD(&vcpu_table[handle & INDEX_MASK])
    cdef kvmmu_translation t
    if (kvmmu_owner(&v.owner) == kvmmu_this_thread() and v.id == handle and v.fast.four_levels and out is not NULL and
            is_plain_access(access)):
        t = translate_fast(&v.fast, &v.arch, gva, (access | v.ac) & <uint32_t>PLAIN_ACCESS)
        if t.gpa != INVALID_GPA:
            out.gpa, out.error_code, out.status, out.level, out.reserved = t.gpa, 0, t.status, t.level, 0
            return KVMMU_OK
    return the_rest(handle, gva, access, out)


cdef int translate_others(c_vcpu *v, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                          kvmmu_result *out, size_t *done) noexcept nogil:
    """Translate rows of which some are accesses to shadow stacks, or none at all."""
    cdef size_t i
    cdef int code
    for i in range(n):
        code = translate_slowly(v, gva[i], access if accesses is NULL else access | (accesses[i] & <uint32_t>ANY_ACCESS), &out[i])
        if code != KVMMU_OK:
            return code
        if done is not NULL:
            done[0] = i + 1
    return KVMMU_OK


cdef int c_translate_many(kvmmu_vcpu handle, size_t n, const uint64_t *gva, const uint8_t *accesses, uint32_t access,
                          kvmmu_result *out, size_t *done) noexcept nogil:
    cdef int code
    cdef uint32_t every = access
    cdef size_t i
    cdef c_vcpu *v
    if done is not NULL:
        done[0] = 0
    v = own_vcpu(handle, True, &code)
    if v is NULL:
        return code
    if n and (gva is NULL or out is NULL):
        return KVMMU_E_NULL
    if accesses is not NULL:
        for i in range(n):
            every |= accesses[i]
    if not is_access(every):
        return KVMMU_E_ARGUMENT
    if not is_plain_access(every):
        return translate_others(v, n, gva, accesses, access, out, done)
    for i in range(n):
        if accesses is not NULL:                    # somebody may have changed it meanwhile
            every = access | (accesses[i] & <uint32_t>PLAIN_ACCESS)
        code = translate_plain_row(v, gva[i], every, &out[i])
        if code != KVMMU_OK:
            return code
        if done is not NULL:
            done[0] = i + 1
    return KVMMU_OK


cdef bint table_gpa(c_vcpu *v, uint64_t ngpa, bint set_ad, uint64_t *gpa) noexcept nogil:
    """Translate the address of PDPTEs that are to be loaded. False: the second stage does not let them be read.

    By the manuals that is a read without a linear address under EPT; KVM takes it for an access to a paging-structure entry.
    """
    cdef const kvm_pagewalk *n = &v.n
    cdef walk_result r
    cdef uint32_t access = 0
    gpa[0] = ngpa
    if not v.stage.flags:
        return True
    if n.fault_gpa_mask != ~<uint64_t>0:
        access = n.table_access | <uint32_t>ACCESS_USER_MASK
    r.refs = 0
    r.error_code = 0
    return translate_nested_gpa(n, ngpa, access, False, 0, set_ad, gpa, &r) == STATUS_OK


cdef int read_words(c_vcpu *v, uint64_t gpa, uint64_t *words, int n) noexcept nogil:
    cdef int code = enter(v), attempt = 0, i
    cdef bint readonly = False, whole, changes = v.stage.flags != 0
    cdef const uint8_t *hva
    cdef uint64_t first
    cdef watched_words watched
    if code != KVMMU_OK:
        return code
    if v.cache is not NULL and v.cache.callbacks.write is NULL:
        changes = False
    while True:
        whole = table_gpa(v, gpa, False, &first)
        for i in range(n):
            hva = gpa_to_hva(&v.mem, first + i * sizeof(uint64_t), &readonly) if whole else NULL
            whole = whole and hva is not NULL
            words[i] = 0 if hva is NULL else kvmmu_read64(hva)
        if changes and v.cache is not NULL:
            watch_table(v, gpa, 0, &watched)
        code = fetch_again(v, attempt)
        if code != 1:
            break
        attempt += 1
    if code == KVMMU_OK and changes:
        table_gpa(v, gpa, True, &first)             # the accessed bits of the second stage
        if v.cache is not NULL:
            code = store_changes(v, &watched)
            if code != KVMMU_OK:
                cache_clear(v.cache)
    leave(v)
    return code if code != KVMMU_OK else whole


cdef int c_get_registers(kvmmu_vcpu handle, kvmmu_registers *out) noexcept nogil:
    cdef int code
    cdef c_vcpu *v = vcpu_asked(handle, False, out, &code)
    if v is NULL:
        return code
    if out.size != sizeof(kvmmu_registers):
        return KVMMU_E_VERSION
    out[0] = v.registers
    return KVMMU_OK
