"""KvmMemory: memslots that follow a GuestMemory, and the zapping that their changes ask for."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, qsort

from kvmmu.arch._bits cimport (
    GPA_BITS, GPA_LIMIT, MEMSLOT_GEN_UPDATE_IN_PROGRESS, MMIO_SPTE_GEN_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G,
)
from kvmmu.memory._alloc cimport kvmmu_alloc_table
from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport GuestMemory, SlotTable, guest_slot
from kvmmu.mmu.core._kvm cimport (
    REQ_FREE_OBSOLETE_ROOTS, flush_remote_tlbs, free_kvm, kvm, make_all_vcpus_request, memslots_of, new_kvm, page_list,
    remove_vcpu,
)
from kvmmu.mmu.core._page cimport list_init
from kvmmu.mmu.core._slots cimport (
    SLOT_VERSIONS, alloc_rmaps, append_memslot, first_memslot_at, free_memslot, gfn_to_memslot, kvm_memory_slot,
    new_memslot, remove_invalid_memslots, reserve_memslots, slot_table, sort_memslots,
)
from kvmmu.mmu.core._spte cimport SpteFormat, pages_per_hpage
from kvmmu.mmu.core._trace cimport TRACE_ZAP_ALL_FAST, trace
from kvmmu.mmu.kvm._entry cimport free_vcpu_pages
from kvmmu.mmu.shadow._range cimport shadow_zap_gfn_range, zap_obsolete_pages, zap_pages_of_gfns
from kvmmu.mmu.shadow._zap cimport KVM_MIN_ALLOC_MMU_PAGES, KVM_PERMILLE_MMU_PAGES, change_mmu_pages, flush_or_zap
from kvmmu.mmu.tdp._range cimport tdp_invalidate_all_roots, tdp_zap_invalidated_roots, tdp_zap_leafs

cdef uint64_t FIRST_PFN = pages_per_hpage(PG_LEVEL_1G)  # so that no host-physical address is a guest-physical one by chance


cdef void unmap_gfns(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil:
    """What an mmu notifier makes of frames whose host page goes."""
    cdef bint flush = shadow_zap_gfn_range(k, slot, start, end)
    flush |= tdp_zap_leafs(k, slot.as_id, start, end)
    if flush:
        flush_remote_tlbs(k)


cdef void zap_all_fast(kvm *k) noexcept nogil:
    trace(&k.trace, TRACE_ZAP_ALL_FAST, k.mmu_valid_gen, k.n_used_mmu_pages)
    k.mmu_valid_gen = 1 - k.mmu_valid_gen
    tdp_invalidate_all_roots(k)
    make_all_vcpus_request(k, REQ_FREE_OBSOLETE_ROOTS)
    zap_obsolete_pages(k)
    if k.tdp_enabled:
        tdp_zap_invalidated_roots(k)


cdef void zap_slot(kvm *k, kvm_memory_slot *slot) noexcept nogil:
    """Leaves that map a memslot, and pages that shadow tables in it."""
    cdef page_list invalid
    cdef bint flush
    list_init(&invalid)
    flush = shadow_zap_gfn_range(k, slot, slot.base_gfn, slot.base_gfn + slot.npages)
    flush |= tdp_zap_leafs(k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages)
    zap_pages_of_gfns(k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages, &invalid)
    flush_or_zap(k, &invalid, flush)


cdef void next_generation(kvm *k, uint64_t count) noexcept nogil:
    """Memslots changed: MMIO entries of the generations before are stale. At a wrap they would look new, so all goes."""
    cdef uint64_t before = k.memslot_gen & MMIO_SPTE_GEN_MASK
    k.memslot_gen = (k.memslot_gen & ~MEMSLOT_GEN_UPDATE_IN_PROGRESS) + count
    if k.memslot_gen & MMIO_SPTE_GEN_MASK < before or count > MMIO_SPTE_GEN_MASK:
        zap_all_fast(k)


cdef class KvmMemory:
    """Memslots that follow a GuestMemory, and the state that hangs on them. What a host does with them is in `Kvm`."""

    def __cinit__(self, host, GuestMemory mem not None, GuestMemory smm_mem not None, backing=None, slot_zap_all=True,
                  MachineLock lock=None):
        cdef SpteFormat fmt = SpteFormat(host)
        level = host.max_huge_page_level if backing is None else backing
        if level not in (1, 2, 3):
            raise ValueError(f"backing: want 1, 2 or 3, got {backing!r}")
        self.k = new_kvm()
        if self.k is NULL:
            raise MemoryError
        self.host, self.lock = host, MachineLock() if lock is None else lock
        self.backing = level
        self.spaces = [mem] if smm_mem is mem else [mem, smm_mem]
        self.tables = [False] * len(self.spaces)        # no table: sync() takes those of the memory
        self.slots_by_region = {}
        self.fmt = fmt
        self.k.spte = fmt.f
        self.k.arena_hpa = <uint64_t>1 << (fmt.f.maxphyaddr - 1)
        self.k.next_pfn = FIRST_PFN
        self.k.one_address_space = smm_mem is mem
        self.k.tdp_enabled = host.tdp is not None
        self.k.slot_zap_all = bool(slot_zap_all)
        self.k.smep_andnot_wp = host.role_bits.smep_andnot_wp
        self.k.unmap_gfns = unmap_gfns
        self.arena.slots = &self.arena_slot
        self.arena.count = 1
        self.sync()

    def __dealloc__(self):
        free_kvm(self.k)
        free(self.ram_slots)

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    cdef void reap(self) noexcept:
        """Leave the vCPUs that nobody runs any more."""
        cdef size_t i = self.k.nr_vcpus
        self.k.vcpu_is_gone = False
        while i > 0:
            i -= 1
            if self.k.vcpus[i].gone:
                free_vcpu_pages(self.k.vcpus[i])
                remove_vcpu(self.k, i)

    # ---- memslots ----------------------------------------------------------------------------------------------------

    cdef int sync(self) except -1:
        """Let the memslots be what the memory is now: all of it, or nothing if it cannot be backed. Whatever goes, or moves,
        takes all page tables with it."""
        cdef GuestMemory mem
        cdef SlotTable table
        cdef guest_slot *ram
        cdef bint same = True
        if self.k.vcpu_is_gone:
            self.reap()
        for as_id, mem in enumerate(self.spaces):
            same = same and self.tables[as_id] is mem.current()
        if same:
            return 0
        tables = [(<GuestMemory>space).current() for space in self.spaces]
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
        self.tables = tables
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
        self._default_limit()

    def _default_limit(self):
        """As many shadow pages as the memory's size gives, unless the VMM has said how many."""
        cdef size_t i, as_id
        cdef uint64_t pages = 0
        for as_id in range(2):
            for i in range(self.k.slots[as_id].count):
                pages += self.k.slots[as_id].slots[i].npages
        if not self.k.limit_requested:
            change_mmu_pages(self.k, max(<uint64_t>KVM_MIN_ALLOC_MMU_PAGES, pages * KVM_PERMILLE_MMU_PAGES // 1000))

    def set_nr_mmu_pages(self, n):
        """The limit on shadow pages; a few are always allowed."""
        with self.lock:
            self.sync()
            change_mmu_pages(self.k, max(n, KVM_MIN_ALLOC_MMU_PAGES))
            self.k.limit_requested = True

    def _make(self, keys):
        """The addresses of new memslots for regions, by key, not used yet."""
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
        self._default_limit()

    cdef void rebuild_ram(self, guest_slot *slots) noexcept:
        """Host-physical memory: every image of every slot, the largest slot's first image in front. IN slots: zeroed, and room
        for all of them."""
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

    def _frames(self, gpa, size):
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

    def readonly_slot(self, gpa, size):
        """Where the first slot that is read-only to the guest begins in [gpa, gpa + size); None without one."""
        cdef const slot_table *table
        cdef uint64_t first, last
        cdef size_t i
        if gpa < 0 or size <= 0 or gpa + size > GPA_LIMIT:
            return None
        with self.lock:
            self.sync()
            table = &self.k.slots[0]
            first, last = gpa >> PAGE_SHIFT, (gpa + size - 1) >> PAGE_SHIFT
            for i in range(first_memslot_at(table, first), table.count):
                if table.slots[i].base_gfn > last:
                    break
                if table.slots[i].readonly:
                    return int(table.slots[i].base_gfn << PAGE_SHIFT)
        return None

    def sync_slots(self):
        """Take the slots that the memory has now.

        Raises
        ------
        ValueError
            The host has too few physical addresses for those that are new; the memslots are as before.
        """
        with self.lock:
            self.sync()

    def slots(self):
        """One dict per memslot: id, as_id, gpa, size, pfn, readonly, dirty_log."""
        cdef kvm_memory_slot *slot
        rows = []
        with self.lock:
            self.sync()
            for address in self.slots_by_region.values():
                slot = <kvm_memory_slot *><uintptr_t>address
                rows.append({"id": int(slot.id), "as_id": int(slot.as_id), "gpa": int(slot.base_gfn << PAGE_SHIFT),
                             "size": int(slot.npages << PAGE_SHIFT), "pfn": int(slot.base_pfn), "readonly": bool(slot.readonly),
                             "dirty_log": bool(slot.dirty_log)})
        return sorted(rows, key=lambda row: (row["as_id"], row["gpa"]))


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
