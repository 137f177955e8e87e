"""Copies of the state of a virtual machine, as `_copy.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memcpy

from kvmmu.arch._bits cimport PAGE_SIZE, PG_LEVEL_2M, PG_LEVEL_4K, SPTE_ENT_PER_PAGE
from kvmmu.memory._alloc cimport kvmmu_alloc_table
from kvmmu.mmu.core._kvm cimport free_kvm, kvm, kvm_mmu_page, kvm_vcpu
from kvmmu.mmu.core._pte_list cimport pte_list_desc
from kvmmu.mmu.core._slots cimport free_memslot, kvm_memory_slot, level_index, slot_end, slot_table
from kvmmu.mmu.core._trace cimport trace_event


cdef bint copy_array(void **to, const void *from_, size_t n, size_t size, size_t capacity) noexcept nogil:
    """Set to[0] to a new array with the first n of `capacity` elements; NULL stays NULL. False for want of memory."""
    to[0] = NULL
    if from_ is NULL:
        return True
    to[0] = kvmmu_alloc_table(capacity, 1, size)
    if to[0] is NULL:
        return False
    memcpy(to[0], from_, n * size)
    return True


cdef inline bint copy_whole(void **to, const void *from_, size_t n, size_t size) noexcept nogil:
    return copy_array(to, from_, n, size, n)


cdef uint64_t pages_of(const kvm_memory_slot *slot, int level) noexcept nogil:
    """Return how many pages of this level the slot touches."""
    return level_index(slot, slot_end(slot) - 1, level) + 1


cdef kvm_memory_slot *copy_memslot(const kvm_memory_slot *slot) noexcept nogil:
    cdef kvm_memory_slot *copy = <kvm_memory_slot *>malloc(sizeof(kvm_memory_slot))
    cdef bint good = True
    cdef int i
    if copy is NULL:
        return NULL
    copy[0] = slot[0]
    good &= copy_whole(<void **>&copy.host_page, slot.host_page, slot.npages, 1)
    good &= copy_whole(<void **>&copy.dirty_bitmap, slot.dirty_bitmap, (slot.npages + 63) // 64, sizeof(uint64_t))
    good &= copy_whole(<void **>&copy.write_track, slot.write_track, slot.npages, sizeof(uint16_t))
    for i in range(2):
        good &= copy_whole(<void **>&copy.disallow_lpage[i], slot.disallow_lpage[i], pages_of(slot, PG_LEVEL_2M + i),
                           sizeof(int32_t))
    for i in range(3):
        good &= copy_whole(<void **>&copy.rmap[i], slot.rmap[i], pages_of(slot, PG_LEVEL_4K + i), sizeof(uint64_t))
    if not good:
        free_memslot(copy)
        return NULL
    return copy


cdef bint copy_memslots(slot_table *to, const slot_table *table) noexcept nogil:
    """False for want of memory; those that were copied are in the table."""
    cdef size_t i
    to.slots = <kvm_memory_slot **>calloc(table.capacity, sizeof(kvm_memory_slot *))
    to.last = NULL
    to.count = 0
    if to.slots is NULL and table.capacity:
        return False
    for i in range(table.count):
        to.slots[i] = copy_memslot(table.slots[i])
        if to.slots[i] is NULL:
            return False
        to.count += 1
    return True


cdef bint copy_pages(kvm *to, const kvm *k) noexcept nogil:
    """Copy the shadow pages and their entries; False for want of memory."""
    cdef kvm_mmu_page *page
    cdef const uint64_t *translation
    cdef size_t i
    if not copy_array(<void **>&to.sptes, k.sptes, k.page_end, PAGE_SIZE, k.page_capacity):
        return False
    if not copy_array(<void **>&to.pages, k.pages, k.page_end, sizeof(kvm_mmu_page), k.page_capacity):
        return False
    for i in range(k.page_end):
        to.pages[i].shadowed_translation = NULL
    to.page_end = k.page_end
    for i in range(k.page_end):
        page, translation = &to.pages[i], k.pages[i].shadowed_translation
        if not copy_whole(<void **>&page.shadowed_translation, translation, SPTE_ENT_PER_PAGE, sizeof(uint64_t)):
            return False
    return True


cdef kvm *copy_kvm(const kvm *k) noexcept nogil:
    cdef kvm *copy = <kvm *>malloc(sizeof(kvm))
    cdef size_t events
    cdef bint good
    if copy is NULL:
        return NULL
    copy[0] = k[0]
    copy.vcpus, copy.nr_vcpus, copy.vcpu_is_gone = NULL, 0, False
    copy.sptes, copy.pages, copy.page_end = NULL, NULL, 0           # `free_kvm()` must not find those of the original
    copy.slots[0].count = copy.slots[1].count = 0
    copy.slots[0].slots = copy.slots[1].slots = NULL
    events = k.trace.capacity if k.trace.written > k.trace.capacity else k.trace.written
    good = copy_array(<void **>&copy.lists.descs, k.lists.descs, k.lists.count, sizeof(pte_list_desc), k.lists.capacity)
    good &= copy_array(<void **>&copy.trace.events, k.trace.events, events, sizeof(trace_event), k.trace.capacity)
    good = good and copy_pages(copy, k) and copy_memslots(&copy.slots[0], &k.slots[0]) and (
        copy_memslots(&copy.slots[1], &k.slots[1]))
    if not good:
        free_kvm(copy)
        return NULL
    return copy


cdef void swap_kvm(kvm *a, kvm *b) noexcept nogil:
    cdef kvm kept = a[0]
    cdef kvm_vcpu **vcpus = b.vcpus
    cdef size_t nr_vcpus = b.nr_vcpus
    cdef bint is_gone = b.vcpu_is_gone
    a[0] = b[0]
    b[0] = kept
    a.vcpus, a.nr_vcpus, a.vcpu_is_gone = kept.vcpus, kept.nr_vcpus, kept.vcpu_is_gone
    b.vcpus, b.nr_vcpus, b.vcpu_is_gone = vcpus, nr_vcpus, is_gone
