"""Memslots: the memslots of one virtual machine, as `_memslots.pxd` describes them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, qsort

from kvmmu.arch._bits cimport GPA_BITS, GPA_LIMIT, MEMSLOT_GEN_UPDATE_IN_PROGRESS, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G
from kvmmu.memory._alloc cimport kvmmu_alloc_table
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport NEVER_SEEN, GuestMemory, SlotTable, guest_slot
from kvmmu.mmu.core._kvm cimport kvm, memslots_of
from kvmmu.mmu.core._slots cimport (
    SLOT_VERSIONS, alloc_rmaps, append_memslot, first_memslot_at, free_memslot, gfn_to_memslot, kvm_memory_slot,
    new_memslot, remove_invalid_memslots, reserve_memslots, slot_table, sort_memslots,
)
from kvmmu.mmu.core._spte cimport pages_per_hpage
from kvmmu.mmu.kvm._gfns cimport next_generation, zap_all_fast, zap_slot
from kvmmu.mmu.kvm._memslots cimport Memslots
from kvmmu.mmu.shadow._zap cimport KVM_MIN_ALLOC_MMU_PAGES, KVM_PERMILLE_MMU_PAGES, change_mmu_pages

cdef uint64_t FIRST_PFN = pages_per_hpage(PG_LEVEL_1G)  # so that no host-physical address is a guest-physical one by chance


cdef Memslots new_memslots(kvm *k, GuestMemory mem, GuestMemory smm_mem, int backing, host):
    cdef Memslots slots = Memslots.__new__(Memslots, maker())
    slots.k, slots.mem, slots.smm_mem, slots.backing, slots.host = k, mem, smm_mem, backing, host
    slots.numbers[0] = slots.numbers[1] = NEVER_SEEN    # sync() takes the tables of the memory
    k.next_pfn = FIRST_PFN
    k.one_address_space = smm_mem is mem
    return slots


cdef class Memslots:

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "Memslots are made by a Kvm")
        self.slots_by_region = {}

    def __dealloc__(self):
        free(self.ram_slots)

    def __reduce__(self):
        raise TypeError("Memslots cannot be copied or pickled")

    cdef int sync(self) except -1:
        if self.numbers[0] == self.mem.number and self.numbers[1] == self.smm_mem.number:
            return 0
        return self.follow()

    cdef int follow(self) except -1:
        """Make the memslots what the memory is now: all of it, or nothing if it cannot be backed."""
        cdef SlotTable table
        cdef guest_slot *ram
        tables = [self.mem.current()] if self.smm_mem is self.mem else [self.mem.current(), self.smm_mem.current()]
        wanted = {}
        for as_id, table in enumerate(tables):
            for region in table.regions:
                wanted[as_id, region] = None
        gone = [key for key in self.slots_by_region if key not in wanted]
        made = self._make([key for key in wanted if key not in self.slots_by_region])
        ram = <guest_slot *>kvmmu_alloc_table(max(1, len(wanted)), SLOT_VERSIONS, sizeof(guest_slot))
        if ram is NULL:
            free_slots(made.values())
            raise MemoryError
        self._delete(gone)
        self._insert(made)
        self.table, self.smm_table = tables[0], tables[-1]
        self.numbers[0], self.numbers[1] = self.table.number, self.smm_table.number
        self.rebuild_ram(ram)
        return 0

    def _delete(self, keys):
        cdef kvm_memory_slot *slot
        cdef int as_id
        if not keys:
            return
        self.k.memslot_gen |= MEMSLOT_GEN_UPDATE_IN_PROGRESS
        addresses = [self.slots_by_region[key] for key in keys]
        for address in addresses:
            slot = <kvm_memory_slot *><uintptr_t>address
            slot.invalid = True
        if self.k.slot_zap_all:
            zap_all_fast(self.k)
        else:
            for address in addresses:
                zap_slot(self.k, <kvm_memory_slot *><uintptr_t>address)
        for as_id in range(2):
            remove_invalid_memslots(&self.k.slots[as_id])
        free_slots(addresses)
        for key in keys:
            del self.slots_by_region[key]
        next_generation(self.k, 1)
        self.default_limit()

    cdef int default_limit(self) except -1:
        """Limit the number of shadow pages by the size of memory, unless the VMM has said how many."""
        cdef size_t i, as_id
        cdef uint64_t pages = 0
        for as_id in range(2):
            for i in range(self.k.slots[as_id].count):
                pages += self.k.slots[as_id].slots[i].npages
        if not self.k.limit_requested:
            change_mmu_pages(self.k, max(<uint64_t>KVM_MIN_ALLOC_MMU_PAGES, pages * KVM_PERMILLE_MMU_PAGES // 1000))
        return 0

    def _make(self, keys):
        """Return the addresses of new memslots for regions, by key; they are not in force yet."""
        cdef uint64_t pfn = self.k.next_pfn
        cdef kvm_memory_slot *slot
        cdef uintptr_t hva
        made = {}
        counts = [0, 0]
        try:
            for as_id, region in keys:
                hva = region.address
                slot = new_memslot(self.next_slot_id + <uint32_t>len(made), as_id, region.gpa >> PAGE_SHIFT,
                                   region.size >> PAGE_SHIFT, <uint8_t *>hva, self.backing, region.readonly, &pfn)
                if slot is NULL:
                    raise MemoryError
                made[as_id, region] = <uintptr_t>slot
                counts[as_id] += 1
                if self.k.has_shadow_roots and alloc_rmaps(slot):
                    raise MemoryError
                if pfn << PAGE_SHIFT > self.k.arena_hpa:
                    raise ValueError(f"slot {region}: {self.host.maxphyaddr} bits of host-physical address are too few to back "
                                     f"it; want a Host with a larger maxphyaddr")
            for as_id, count in enumerate(counts):
                if reserve_memslots(&self.k.slots[<int>as_id], count):
                    raise MemoryError
        except BaseException:
            free_slots(made.values())
            raise
        return made

    def _insert(self, made):
        """Put memslots of `_make()` in force."""
        cdef kvm_memory_slot *slot
        cdef int as_id
        for address in made.values():
            slot = <kvm_memory_slot *><uintptr_t>address
            append_memslot(&self.k.slots[slot.as_id], slot)
            self.k.next_pfn = slot.base_pfn + SLOT_VERSIONS * slot.span
            self.next_slot_id += 1
        for as_id in range(2):
            sort_memslots(&self.k.slots[as_id])
        self.slots_by_region.update(made)
        for _ in made:
            next_generation(self.k, 1)
        self.default_limit()

    cdef void rebuild_ram(self, guest_slot *slots) noexcept:
        """Make host-physical memory anew: every image of every slot, the largest slot's first image in front. IN slots: zeroed,
        with room for all of them."""
        cdef size_t as_id, i, n = 0, largest = 0
        cdef const kvm_memory_slot *slot
        cdef int version
        for as_id in range(2):
            for i in range(self.k.slots[as_id].count):
                slot = self.k.slots[as_id].slots[i]
                for version in range(SLOT_VERSIONS):
                    fill_image(&slots[n], slot, version)
                    if slots[n].size > slots[largest].size or (
                            slots[n].size == slots[largest].size and slots[n].gpa < slots[largest].gpa):
                        largest = n
                    n += 1
        slots[0], slots[largest] = slots[largest], slots[0]
        if n > 1:
            qsort(&slots[1], n - 1, sizeof(guest_slot), compare_images)
        free(self.ram_slots)
        self.ram_slots = slots
        self.ram.slots, self.ram.count = slots, max(n, <size_t>1)

    cdef kvm_memory_slot *slot_at(self, gpa, int as_id) except NULL:
        cdef kvm_memory_slot *slot = NULL
        check_space(as_id)
        self.sync()
        if 0 <= gpa < GPA_LIMIT:
            slot = gfn_to_memslot(memslots_of(self.k, as_id), <uint64_t>gpa >> PAGE_SHIFT)
        if slot is NULL:
            raise ValueError(f"gpa {gpa:#x}: no memory slot is there")
        return slot

    cdef list frames(self, gpa, size):
        """[(slot address, first frame, last frame + 1)] of the slots within [gpa, gpa + size), all address spaces."""
        cdef kvm_memory_slot *slot
        cdef const slot_table *table
        cdef uint64_t first, last
        cdef size_t i, as_id
        if gpa < 0 or size <= 0 or gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"want whole pages, got {size:#x} bytes at gpa {gpa:#x}")
        if gpa + size > GPA_LIMIT:
            raise ValueError(f"{size:#x} bytes at gpa {gpa:#x} end beyond {GPA_BITS} bits of guest-physical address")
        self.sync()
        first, last = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        parts = []
        for as_id in range(2):
            table = &self.k.slots[as_id]
            for i in range(first_memslot_at(table, first), table.count):
                slot = table.slots[i]
                if slot.base_gfn >= last:
                    break
                parts.append((<uintptr_t>slot, max(first, slot.base_gfn), min(last, slot.base_gfn + slot.npages)))
        return parts


cdef int check_space(int as_id) except -1:
    if as_id not in (0, 1):
        raise ValueError(f"as_id: want 0, or 1 for SMM, got {as_id}")
    return 0


cdef free_slots(addresses):
    for address in addresses:
        free_memslot(<kvm_memory_slot *><uintptr_t>address)


cdef int compare_images(const void *a, const void *b) noexcept nogil:
    cdef uint64_t first = (<const guest_slot *>a).gpa, second = (<const guest_slot *>b).gpa
    return (first > second) - (first < second)


cdef void fill_image(guest_slot *image, const kvm_memory_slot *slot, int version) noexcept nogil:
    image.gpa = (slot.base_pfn + version * slot.span) << PAGE_SHIFT
    image.size = slot.npages << PAGE_SHIFT
    image.hva = slot.hva
    image.readonly = False                          # SPTEs say what may be written
