"""The words of its memory that a walk of two stages changes; see `_nested_walk.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, second_stage_access, table_access, translate_nested_gpa, walk_result, walk_step
from kvmmu.arch._bits cimport (
    ACC_ALL, INVALID_GPA, PML_ENTITY_NUM, PT_MAX_LEVELS, STATUS_OK,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.embed._structs cimport KVMMU_E_CALLBACK, KVMMU_OK, c_vcpu
from kvmmu.memory._memory cimport gpa_to_hva, guest_mem, kvmmu_read32, kvmmu_read64

cdef enum:
    MOST_LOGGED = 6                     # pages that become dirty for one access: 5 tables, and its own
    VE_WORDS = 5                        # of an information area


cdef bint read_word(const guest_mem *mem, watched_word *word) noexcept nogil:
    cdef bint readonly = False
    cdef const uint8_t *hva = gpa_to_hva(mem, word.gpa, &readonly)
    if hva is NULL:
        return False
    word.value = kvmmu_read32(hva) if word.size == sizeof(uint32_t) else kvmmu_read64(hva)
    return True


cdef void watch(const guest_mem *mem, uint64_t gpa, uint32_t size, watched_words *watched) noexcept nogil:
    cdef watched_word *word
    cdef int i
    for i in range(watched.count):
        if watched.words[i].gpa == gpa and watched.words[i].size >= size:
            return
    if watched.count == MAX_WATCHED:
        return
    word = &watched.words[watched.count]
    word.gpa, word.size = gpa, size
    watched.count += read_word(mem, word)


cdef inline uint32_t entry_size(const kvm_pagewalk *w) noexcept nogil:
    return sizeof(uint32_t) if w.format == KVMMU_FORMAT_32 else sizeof(uint64_t)


cdef void watch_entries(const kvm_pagewalk *n, uint64_t ngpa, uint32_t access, watched_words *watched) noexcept nogil:
    """Note the entries by which the second stage translates an address."""
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef int i, count = n.walk_steps(n, ngpa & n.gva_mask, access, steps)
    for i in range(count):
        if steps[i].pte_gpa != INVALID_GPA:
            watch(n.mem, steps[i].pte_gpa, entry_size(n), watched)


cdef void watch_log(const kvm_pagewalk *n, watched_words *watched) noexcept nogil:
    cdef uint32_t i
    if n.pml is NULL or n.pml.index >= PML_ENTITY_NUM:
        return
    for i in range(MOST_LOGGED):
        if i <= n.pml.index:
            watch(n.mem, n.pml.address + (n.pml.index - i) * sizeof(uint64_t), sizeof(uint64_t), watched)


cdef void watch_walk(const c_vcpu *v, uint64_t gva, uint32_t access, watched_words *watched) noexcept nogil:
    cdef const kvm_pagewalk *w = &v.w
    cdef const kvm_pagewalk *n = &v.n
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef walk_result r, s
    cdef uint64_t gpa
    cdef int i, count = w.walk_steps(w, gva, access, steps)
    watched.count = 0
    for i in range(count):
        if steps[i].pte_gpa == INVALID_GPA:         # a PDPTE register
            continue
        watch_entries(n, steps[i].pte_gpa, second_stage_access(n, table_access(n, access), False, 0), watched)
        s.refs = 0
        if translate_nested_gpa(n, steps[i].pte_gpa, table_access(n, access), False, 0, False, &gpa, &s) == STATUS_OK:
            watch(n.mem, gpa, entry_size(w), watched)
    w.gva_to_gpa(w, gva, access, False, &r)
    if r.ngpa != INVALID_GPA:
        watch_entries(n, r.ngpa, second_stage_access(n, access, True, <uint32_t>ACC_ALL), watched)
    watch_log(n, watched)
    if n.raises_ve:
        for i in range(VE_WORDS):
            watch(n.mem, n.ve_area + i * sizeof(uint64_t), sizeof(uint64_t), watched)


cdef void watch_table(const c_vcpu *v, uint64_t ngpa, uint32_t access, watched_words *watched) noexcept nogil:
    watched.count = 0
    watch_entries(&v.n, ngpa, access, watched)
    watch_log(&v.n, watched)


cdef int store_changes(const c_vcpu *v, const watched_words *watched) noexcept nogil:
    cdef watched_word word
    cdef int i
    for i in range(watched.count):
        word = watched.words[i]
        if not read_word(&v.mem, &word) or word.value == watched.words[i].value:
            continue
        if v.cache.callbacks.write(v.cache.callbacks.opaque, word.gpa, &word.value, word.size):
            return KVMMU_E_CALLBACK
    return KVMMU_OK
