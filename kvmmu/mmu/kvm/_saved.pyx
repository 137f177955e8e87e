"""The state of a Kvm at one moment, as `_saved.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport free

from kvmmu.arch._bits cimport PAGE_SIZE
from kvmmu.memory._alloc cimport kvmmu_alloc_table
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport SlotTable, guest_slot
from kvmmu.mmu.core._copy cimport copy_kvm, swap_kvm
from kvmmu.mmu.core._kvm cimport free_kvm
from kvmmu.mmu.core._slots cimport SLOT_VERSIONS, kvm_memory_slot
from kvmmu.mmu.kvm._memslots cimport Memslots
from kvmmu.mmu.kvm._state cimport Kvm


cdef class SavedKvm:
    """The state of a virtual machine at one moment. Made by a snapshot."""

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a SavedKvm is made by Vm.snapshot()")

    def __dealloc__(self):
        free_kvm(self.k)
        free(self.ram_slots)

    def __reduce__(self):
        raise TypeError("a SavedKvm cannot be copied or pickled")

    cdef SavedKvm ready(self, SlotTable table, SlotTable smm_table):
        cdef SavedKvm fresh = SavedKvm.__new__(SavedKvm, maker())
        cdef kvm_memory_slot *slot
        cdef size_t i, as_id, n = 0
        cdef uintptr_t hva
        fresh.k = copy_kvm(self.k)
        fresh.ram_slots = <guest_slot *>kvmmu_alloc_table(max(1, len(self.regions)), SLOT_VERSIONS, sizeof(guest_slot))
        if fresh.k is NULL or fresh.ram_slots is NULL:
            raise MemoryError
        fresh.next_slot_id = self.next_slot_id
        fresh.table, fresh.smm_table = table or self.table, smm_table or self.smm_table
        places = [{region.gpa: region for region in each.regions} for each in (fresh.table, fresh.smm_table)]
        fresh.slots_by_region = {}
        fresh.regions = []
        for as_id in range(2):
            for i in range(fresh.k.slots[as_id].count):
                slot = fresh.k.slots[as_id].slots[i]
                region = places[as_id][self.regions[n][1].gpa]
                hva = region.address
                slot.hva = <uint8_t *>hva
                fresh.slots_by_region[<int>as_id, region] = <uintptr_t>slot
                fresh.regions.append((<int>as_id, region))
                n += 1
        return fresh


cdef SavedKvm save_kvm(Kvm owner):
    cdef SavedKvm saved = SavedKvm.__new__(SavedKvm, maker())
    cdef Memslots memslots = owner.memslots
    cdef size_t i, as_id
    if owner.k.mmu_invalidate_start != owner.k.mmu_invalidate_end:
        raise RuntimeError("an invalidation is under way, which nobody would end in what the snapshot makes; end it first")
    saved.k = copy_kvm(owner.k)
    if saved.k is NULL:
        raise MemoryError
    keys = {address: key for key, address in memslots.slots_by_region.items()}
    saved.regions = []
    for as_id in range(2):
        for i in range(owner.k.slots[as_id].count):
            saved.regions.append(keys[<uintptr_t>owner.k.slots[as_id].slots[i]])
    saved.next_slot_id = memslots.next_slot_id
    saved.table, saved.smm_table = memslots.table, memslots.smm_table
    return saved


cdef int put_kvm(Kvm owner, SavedKvm fresh) except -1:
    cdef Memslots memslots = owner.memslots
    swap_kvm(owner.k, fresh.k)
    memslots.slots_by_region, fresh.slots_by_region = fresh.slots_by_region, memslots.slots_by_region
    memslots.next_slot_id = fresh.next_slot_id
    memslots.table, fresh.table = fresh.table, memslots.table
    memslots.smm_table, fresh.smm_table = fresh.smm_table, memslots.smm_table
    memslots.numbers[0], memslots.numbers[1] = memslots.table.number, memslots.smm_table.number
    memslots.rebuild_ram(fresh.ram_slots)
    fresh.ram_slots = NULL
    owner.arena_slot.gpa = owner.k.arena_hpa
    owner.arena_slot.size = owner.k.page_end * PAGE_SIZE
    owner.arena_slot.hva = <uint8_t *>owner.k.sptes
    return 0
