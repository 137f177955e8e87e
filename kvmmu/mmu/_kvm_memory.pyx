"""KvmMemory: memslots that follow a GuestMemory, and the zapping that their changes ask for."""

import threading

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport GPA_LIMIT, MEMSLOT_GEN_UPDATE_IN_PROGRESS, MMIO_SPTE_GEN_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G
from kvmmu._memory cimport GuestMemory, guest_slot
from kvmmu.mmu._kvm cimport (
    REQ_FREE_OBSOLETE_ROOTS, flush_remote_tlbs, free_kvm, kvm, make_all_vcpus_request, memslots_of, new_kvm, page_list,
)
from kvmmu.mmu._page cimport list_init
from kvmmu.mmu._shadow_range cimport shadow_zap_gfn_range, zap_obsolete_pages, zap_pages_of_gfns
from kvmmu.mmu._slots cimport (
    SLOT_VERSIONS, alloc_rmaps, free_memslot, gfn_to_memslot, insert_memslot, kvm_memory_slot, new_memslot, remove_memslot,
)
from kvmmu.mmu._spte cimport SpteFormat, pages_per_hpage
from kvmmu.mmu._tdp_range cimport tdp_invalidate_all_roots, tdp_zap_invalidated_roots, tdp_zap_leafs
from kvmmu.mmu._trace cimport TRACE_ZAP_ALL_FAST, trace
from kvmmu.mmu._zap cimport KVM_MIN_ALLOC_MMU_PAGES, KVM_PERMILLE_MMU_PAGES, change_mmu_pages, flush_or_zap

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

    def __cinit__(self):
        self.k = new_kvm()
        if self.k is NULL:
            raise MemoryError

    def __init__(self, host, GuestMemory mem, GuestMemory smm_mem, backing=None, slot_zap_all=True):
        cdef SpteFormat fmt = SpteFormat(host)
        self.host, self.lock = host, threading.RLock()
        self.backing = host.max_huge_page_level if backing is None else backing
        self.spaces = [mem] if smm_mem is mem else [mem, smm_mem]
        self.tables = [None] * len(self.spaces)
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

    # ---- memslots ----------------------------------------------------------------------------------------------------

    cdef int sync(self) except -1:
        """Let the memslots be what the memory is now. Whatever goes, or moves, takes all page tables with it."""
        cdef GuestMemory mem
        cdef bint same = True
        for as_id, mem in enumerate(self.spaces):
            same = same and self.tables[as_id] is mem.current()
        if same:
            return 0
        wanted = {}
        for as_id, mem in enumerate(self.spaces):
            for region in mem.current().regions:
                wanted[as_id, region] = None
        gone = [key for key in self.slots_by_region if key not in wanted]
        self._delete(gone)
        for key in wanted:
            if key not in self.slots_by_region:
                self._create(key)
        for as_id, mem in enumerate(self.spaces):
            self.tables[as_id] = mem.current()
        self.rebuild_ram()
        return 0

    def _delete(self, keys):
        cdef kvm_memory_slot *slot
        if not keys:
            return
        self.k.memslot_gen |= MEMSLOT_GEN_UPDATE_IN_PROGRESS
        for key in keys:
            slot = <kvm_memory_slot *><uintptr_t>self.slots_by_region[key]
            slot.invalid = True
        if self.k.slot_zap_all:
            zap_all_fast(self.k)
        for key in keys:
            slot = <kvm_memory_slot *><uintptr_t>self.slots_by_region.pop(key)
            if not self.k.slot_zap_all:
                zap_slot(self.k, slot)
            remove_memslot(&self.k.slots[key[0]], slot)
            free_memslot(slot)
        next_generation(self.k, 1)
        self._default_limit()

    def _default_limit(self):
        """As many shadow pages as the memory's size gives, unless the VMM has said how many."""
        cdef kvm_memory_slot *slot
        cdef uint64_t pages = 0
        for address in self.slots_by_region.values():
            slot = <kvm_memory_slot *><uintptr_t>address
            pages += slot.npages
        if not self.k.limit_requested:
            change_mmu_pages(self.k, max(<uint64_t>KVM_MIN_ALLOC_MMU_PAGES, pages * KVM_PERMILLE_MMU_PAGES // 1000))

    def set_nr_mmu_pages(self, n):
        """The limit on shadow pages; a few are always allowed."""
        with self.lock:
            self.k.limit_requested = True
            change_mmu_pages(self.k, max(n, KVM_MIN_ALLOC_MMU_PAGES))

    def _create(self, key):
        cdef uint64_t pfn = self.k.next_pfn
        as_id, region = key
        cdef uintptr_t hva = region.address
        cdef kvm_memory_slot *slot = new_memslot(
            self.next_slot_id, as_id, region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT, <uint8_t *>hva, self.backing,
            region.readonly, &pfn)
        if slot is NULL:
            raise MemoryError
        if self.k.has_shadow_roots and alloc_rmaps(slot):
            free_memslot(slot)
            raise MemoryError
        if pfn << PAGE_SHIFT > self.k.arena_hpa or insert_memslot(&self.k.slots[as_id], slot):
            free_memslot(slot)
            raise ValueError(f"slot {region}: {self.host.maxphyaddr} bits of host-physical address are too few to back it; "
                             f"want a Host with a larger maxphyaddr")
        self.k.next_pfn = pfn
        self.next_slot_id += 1
        self.slots_by_region[key] = <uintptr_t>slot
        next_generation(self.k, 1)
        self._default_limit()

    cdef int rebuild_ram(self) except -1:
        """Host-physical memory: every image of every slot, the largest slot's first image in front."""
        cdef size_t n = len(self.slots_by_region), i = 0
        cdef kvm_memory_slot *slot
        cdef kvm_memory_slot *largest = NULL
        cdef int version
        cdef guest_slot *slots = <guest_slot *>calloc(max(<size_t>1, n * SLOT_VERSIONS), sizeof(guest_slot))
        if slots is NULL:
            raise MemoryError
        ordered = sorted(self.slots_by_region.values(), key=lambda address: (<kvm_memory_slot *><uintptr_t>address).base_pfn)
        for address in ordered:
            slot = <kvm_memory_slot *><uintptr_t>address
            if largest is NULL or slot.npages > largest.npages:
                largest = slot
        fill_image(&slots[0], largest, 0)
        for address in ordered:
            slot = <kvm_memory_slot *><uintptr_t>address
            for version in range(SLOT_VERSIONS):
                if slot is not largest or version:
                    i += 1
                    fill_image(&slots[i], slot, version)
        free(self.ram_slots)
        self.ram_slots = slots
        self.ram.slots, self.ram.count = slots, i + 1
        return 0

    cdef kvm_memory_slot *slot_at(self, gpa, int as_id) except NULL:
        cdef kvm_memory_slot *slot = NULL
        self.sync()
        if 0 <= gpa < GPA_LIMIT:
            slot = gfn_to_memslot(memslots_of(self.k, as_id), <uint64_t>gpa >> PAGE_SHIFT)
        if slot is NULL:
            raise ValueError(f"gpa {gpa:#x}: no memory slot is there")
        return slot

    def _frames(self, gpa, size):
        """[(slot address, first frame, last frame + 1)] of the slots within [gpa, gpa + size), all address spaces."""
        cdef kvm_memory_slot *slot
        if gpa < 0 or size <= 0 or gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"want whole pages, got {size:#x} bytes at gpa {gpa:#x}")
        self.sync()
        parts = []
        for address in self.slots_by_region.values():
            slot = <kvm_memory_slot *><uintptr_t>address
            start = max(gpa >> PAGE_SHIFT, int(slot.base_gfn))
            end = min((gpa + size) >> PAGE_SHIFT, int(slot.base_gfn + slot.npages))
            if start < end:
                parts.append((address, start, end))
        return parts

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


cdef void fill_image(guest_slot *image, const kvm_memory_slot *slot, int version) noexcept nogil:
    image.gpa = (slot.base_pfn + version * slot.span) << PAGE_SHIFT
    image.size = slot.npages << PAGE_SHIFT
    image.hva = slot.hva
    image.readonly = False                          # SPTEs say what may be written
