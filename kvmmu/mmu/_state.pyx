"""Kvm: memslots that follow a GuestMemory, the host's notifiers, dirty logs, and the maintenance of a machine's page tables."""

import threading

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport (
    GPA_LIMIT, MEMSLOT_GEN_UPDATE_IN_PROGRESS, MMIO_SPTE_GEN_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K,
)
from kvmmu._memory cimport GuestMemory, guest_slot
from kvmmu.mmu._kvm cimport flush_remote_tlbs, free_kvm, kvm, memslots_of, new_kvm
from kvmmu.mmu._fault cimport move_host_page
from kvmmu.mmu._slots cimport (
    HOST_LEVEL_MASK, HOST_READONLY, HOST_UNMAPPED, SLOT_VERSIONS, alloc_host_pages, free_memslot, gfn_to_memslot,
    host_page_of, host_pfn_of, insert_memslot, kvm_memory_slot, mark_slot_dirty, new_memslot, remove_memslot, set_dirty_log,
)
from kvmmu.mmu._spte cimport SpteFormat, pages_per_hpage
from kvmmu.mmu._tdp_range cimport (
    tdp_age_gfn_range, tdp_clear_dirty_pt_masked, tdp_clear_dirty_slot, tdp_invalidate_all_roots, tdp_recover_huge_pages,
    tdp_recover_nx_huge_pages, tdp_try_split_huge_pages, tdp_wrprot_slot, tdp_write_protect_gfn, tdp_zap_invalidated_roots,
    tdp_zap_leafs,
)
from kvmmu.mmu._trace cimport TRACE_ZAP_ALL_FAST, trace

cdef uint64_t FIRST_PFN = pages_per_hpage(PG_LEVEL_1G)  # so that no host-physical address is a guest-physical one by chance


cdef void unmap_gfns(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil:
    """What an mmu notifier makes of frames whose host page goes."""
    if tdp_zap_leafs(k, slot.as_id, start, end):
        flush_remote_tlbs(k)


cdef void zap_all_fast(kvm *k) noexcept nogil:
    k.mmu_valid_gen = 1 - k.mmu_valid_gen
    trace(&k.trace, TRACE_ZAP_ALL_FAST, k.mmu_valid_gen, k.n_used_mmu_pages)
    tdp_invalidate_all_roots(k)
    tdp_zap_invalidated_roots(k)


cdef void next_generation(kvm *k, uint64_t count) noexcept nogil:
    """Memslots changed: MMIO entries of the generations before are stale. At a wrap they would look new, so all goes."""
    cdef uint64_t before = k.memslot_gen & MMIO_SPTE_GEN_MASK
    k.memslot_gen = (k.memslot_gen & ~MEMSLOT_GEN_UPDATE_IN_PROGRESS) + count
    if k.memslot_gen & MMIO_SPTE_GEN_MASK < before or count > MMIO_SPTE_GEN_MASK:
        zap_all_fast(k)


cdef class Kvm:
    """The page tables of one virtual machine and all that decides over them. Made by a Vm.

    Parameters
    ----------
    host : Host
    mem, smm_mem : GuestMemory
        Memory of the two address spaces; the same object makes them one.
    backing : int, optional
        Level of the pages that the host has behind the slots; by default its largest.
    """

    def __cinit__(self):
        self.k = new_kvm()
        if self.k is NULL:
            raise MemoryError

    def __init__(self, host, GuestMemory mem, GuestMemory smm_mem, backing=None):
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
        self.k.n_max_mmu_pages = ~<uint64_t>0
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
            same = same and self.tables[as_id] is mem.table
        if same:
            return 0
        wanted = {}
        for as_id, mem in enumerate(self.spaces):
            for region in mem.regions:
                wanted[as_id, region] = None
        gone = [key for key in self.slots_by_region if key not in wanted]
        self._delete(gone)
        for key in wanted:
            if key not in self.slots_by_region:
                self._create(key)
        for as_id, mem in enumerate(self.spaces):
            self.tables[as_id] = mem.table
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
        zap_all_fast(self.k)
        for key in keys:
            slot = <kvm_memory_slot *><uintptr_t>self.slots_by_region.pop(key)
            remove_memslot(&self.k.slots[key[0]], slot)
            free_memslot(slot)
        next_generation(self.k, 1)

    def _create(self, key):
        cdef uint64_t pfn = self.k.next_pfn
        as_id, region = key
        cdef uintptr_t hva = region.address
        cdef kvm_memory_slot *slot = new_memslot(
            self.next_slot_id, as_id, region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT, <uint8_t *>hva, self.backing,
            region.readonly, &pfn)
        if slot is NULL:
            raise MemoryError
        if pfn << PAGE_SHIFT > self.k.arena_hpa or insert_memslot(&self.k.slots[as_id], slot):
            free_memslot(slot)
            raise ValueError(f"slot {region}: {self.host.maxphyaddr} bits of host-physical address are too few to back it; "
                             f"want a Host with a larger maxphyaddr")
        self.k.next_pfn = pfn
        self.next_slot_id += 1
        self.slots_by_region[key] = <uintptr_t>slot
        next_generation(self.k, 1)

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

    # ---- the host ----------------------------------------------------------------------------------------------------

    def set_backing(self, gpa, size, level):
        """Let the host back [gpa, gpa + size) by pages of a level: what was mapped is invalidated first."""
        cdef kvm_memory_slot *slot
        cdef uint64_t gfn, start, end
        if level not in (1, 2, 3):
            raise ValueError(f"level: want 1, 2 or 3, got {level}")
        step = int(pages_per_hpage(level))
        if (gpa >> PAGE_SHIFT) % step or (size >> PAGE_SHIFT) % step:
            raise ValueError(f"want whole pages of level {level}, got {size:#x} bytes at {gpa:#x}")
        if level > self.backing:
            raise ValueError(f"level {level}: the machine was made for host pages of level {self.backing} at most")
        with self.lock:
            for address, start, end in self._frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if alloc_host_pages(slot):
                    raise MemoryError
                self._break_up(address, start, end)
                unmap_gfns(self.k, slot, start, end)
                for gfn in range(start, end):           # a new page, alike in all frames that it has
                    slot.host_page[gfn - slot.base_gfn] = <uint8_t>level
            self.k.mmu_invalidate_seq += 1

    def _break_up(self, address, start, end):
        """Host pages that reach over an edge of [start, end) become small where they are inside and outside."""
        cdef kvm_memory_slot *slot = <kvm_memory_slot *><uintptr_t>address
        cdef uint64_t gfn, first, last, size
        cdef int level
        for level in (PG_LEVEL_1G, PG_LEVEL_2M):
            size = pages_per_hpage(level)
            for edge in {start - start % size, (end - 1) - (end - 1) % size}:
                if edge >= start and edge + size <= end:
                    continue
                first = max(<uint64_t>edge, slot.base_gfn)
                last = min(<uint64_t>edge + size, slot.base_gfn + slot.npages)
                for gfn in range(first, last):
                    if slot.host_page[gfn - slot.base_gfn] & HOST_LEVEL_MASK == level:
                        slot.host_page[gfn - slot.base_gfn] -= 1
                # the frames are where they were; a huge mapping of them goes all the same
                unmap_gfns(self.k, slot, first, last)

    def invalidate(self, gpa, size, how):
        """The host takes pages away: "unmap" (nothing there until the next access), "move" (other pages at once) or "protect"."""
        cdef kvm_memory_slot *slot
        cdef uint64_t gfn, start, end
        cdef uint8_t *page
        if how not in ("unmap", "move", "protect"):
            raise ValueError(f"how: want 'unmap', 'move' or 'protect', got {how!r}")
        with self.lock:
            for address, start, end in self._frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if alloc_host_pages(slot):
                    raise MemoryError
                self._break_up(address, start, end)
                unmap_gfns(self.k, slot, start, end)
                for gfn in range(start, end):
                    page = &slot.host_page[gfn - slot.base_gfn]
                    if how == "protect":
                        page[0] |= HOST_READONLY
                    else:
                        move_host_page(slot, gfn)
                        page[0] &= ~(HOST_READONLY | HOST_UNMAPPED)
                        if how == "unmap":
                            page[0] |= HOST_UNMAPPED
                    if how != "move":
                        page[0] = (page[0] & ~HOST_LEVEL_MASK) | PG_LEVEL_4K
                if how != "move":
                    self._limit_level(address, start, end)
            self.k.mmu_invalidate_seq += 1

    def _limit_level(self, address, start, end):
        """Neighbours of small pages cannot be parts of a huge one."""
        cdef kvm_memory_slot *slot = <kvm_memory_slot *><uintptr_t>address
        cdef uint64_t gfn, first, last
        for level in (3, 2):
            size = int(pages_per_hpage(level))
            first = max(start - start % size, int(slot.base_gfn))
            last = min(end + -end % size, int(slot.base_gfn + slot.npages))
            for gfn in range(first, last):
                if slot.host_page[gfn - slot.base_gfn] & HOST_LEVEL_MASK == level:
                    slot.host_page[gfn - slot.base_gfn] -= 1

    def host_page(self, gpa, as_id=0):
        """(host frame, level, unmapped, readonly) of what the host has behind gpa now."""
        cdef kvm_memory_slot *slot
        cdef uint8_t page
        with self.lock:
            slot = self.slot_at(gpa, as_id)
            page = host_page_of(slot, <uint64_t>gpa >> PAGE_SHIFT)
            return (int(host_pfn_of(slot, <uint64_t>gpa >> PAGE_SHIFT, page)), int(page & HOST_LEVEL_MASK),
                    bool(page & HOST_UNMAPPED), bool(page & HOST_READONLY))

    def begin_invalidation(self, gpa, size):
        """An mmu notifier has started: faults on these pages retry until `end_invalidation()`."""
        cdef kvm_memory_slot *slot
        with self.lock:
            if self.k.mmu_invalidate_start != self.k.mmu_invalidate_end:
                raise ValueError("an invalidation is under way already")
            parts = self._frames(gpa, size)
            self.k.mmu_invalidate_start, self.k.mmu_invalidate_end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
            for address, start, end in parts:
                slot = <kvm_memory_slot *><uintptr_t>address
                unmap_gfns(self.k, slot, start, end)

    def end_invalidation(self):
        """The mmu notifier is done."""
        with self.lock:
            self.k.mmu_invalidate_start = self.k.mmu_invalidate_end = 0
            self.k.mmu_invalidate_seq += 1

    def age(self, gpa, size, clear):
        """Whether any page was accessed since the last time; clear: and make all of them old. Nothing is flushed."""
        young = False
        cdef kvm_memory_slot *slot
        with self.lock:
            for address, start, end in self._frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                young |= bool(tdp_age_gfn_range(self.k, slot.as_id, start, end, bool(clear)))
        return young

    # ---- dirty log ---------------------------------------------------------------------------------------------------

    def set_dirty_log(self, gpa, on, as_id=0):
        """Start or stop the dirty log of the slot at gpa."""
        cdef kvm_memory_slot *slot
        with self.lock:
            slot = self.slot_at(gpa, as_id)
            if slot.dirty_log == bool(on):
                return
            if set_dirty_log(slot, bool(on)):
                raise MemoryError
            next_generation(self.k, 1)
            if not on:
                if tdp_recover_huge_pages(self.k, slot):
                    flush_remote_tlbs(self.k)
                return
            if self.host.eager_split:
                tdp_try_split_huge_pages(self.k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages, PG_LEVEL_4K)
            if self.k.spte.pml:
                tdp_clear_dirty_slot(self.k, slot)
            tdp_wrprot_slot(self.k, slot, PG_LEVEL_2M if self.k.spte.pml else PG_LEVEL_4K)
            flush_remote_tlbs(self.k)                   # in any case: see dirty_log()

    def dirty_log(self, gpa, clear, as_id=0):
        """Frames (uint64, ascending) written since the log was last cleared."""
        cdef kvm_memory_slot *slot
        cdef uint64_t word
        cdef size_t i, words
        cdef bint flush = False
        with self.lock:
            slot = self.slot_at(gpa, as_id)
            if not slot.dirty_log:
                raise ValueError(f"the slot that holds gpa {gpa:#x} has no dirty log; set_dirty_log() starts one")
            words = (slot.npages + 63) // 64
            bitmap = np.array(<uint64_t[:words]>slot.dirty_bitmap)
            if clear:
                for i in range(words):
                    word = slot.dirty_bitmap[i]
                    slot.dirty_bitmap[i] = 0
                    if word:                # a page that was aged may be writable in a TLB alone: flush in any case
                        flush = True
                        tdp_clear_dirty_pt_masked(self.k, slot, slot.base_gfn + 64 * i, word, not self.k.spte.pml)
                if flush:
                    flush_remote_tlbs(self.k)
            bits = np.unpackbits(bitmap.view(np.uint8), bitorder="little")
            return np.flatnonzero(bits).astype(np.uint64) + np.uint64(slot.base_gfn)

    def note_write(self, gpa, size, as_id=0):
        """Bytes of the guest were written by KVM or the VMM: the host page becomes a private one, the frame is dirty."""
        cdef kvm_memory_slot *slot
        cdef uint64_t gfn, end = ((gpa + size - 1) >> PAGE_SHIFT) + 1
        with self.lock:
            self.sync()
            for gfn in range(<uint64_t>gpa >> PAGE_SHIFT, end):
                slot = gfn_to_memslot(memslots_of(self.k, as_id), gfn)
                if slot is NULL:
                    continue
                if slot.host_page is not NULL and slot.host_page[gfn - slot.base_gfn] & (HOST_UNMAPPED | HOST_READONLY):
                    unmap_gfns(self.k, slot, gfn, gfn + 1)
                    if slot.host_page[gfn - slot.base_gfn] & HOST_READONLY:
                        move_host_page(slot, gfn)
                    slot.host_page[gfn - slot.base_gfn] &= ~(HOST_UNMAPPED | HOST_READONLY)
                mark_slot_dirty(slot, gfn)

    # ---- what one sees -----------------------------------------------------------------------------------------------

    @property
    def arena_hpa(self):
        """Host-physical address of the pages of SPTEs: page n is n * 4096 bytes further."""
        return int(self.k.arena_hpa)

    # ---- maintenance -------------------------------------------------------------------------------------------------

    def zap_all_fast(self):
        """All page tables go: roots are invalid at once, their contents after that."""
        with self.lock:
            zap_all_fast(self.k)

    def recover_nx_huge_pages(self, ratio):
        """What the recovery worker does in one period: zap the oldest 1/ratio of the tables of the NX mitigation."""
        cdef size_t n
        if ratio < 1:
            raise ValueError(f"ratio: want at least 1, got {ratio}")
        with self.lock:
            n = -(-int(self.k.possible_nx_huge_pages[1].count) // ratio)
            return int(tdp_recover_nx_huge_pages(self.k, n))

    def split_huge_pages(self, gpa, size, level):
        """Split huge mappings of [gpa, gpa + size) down to a level."""
        cdef kvm_memory_slot *slot
        with self.lock:
            for address, start, end in self._frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if tdp_try_split_huge_pages(self.k, slot.as_id, start, end, level):
                    raise MemoryError

    def recover_huge_pages(self):
        """Put huge mappings where slots and host allow them, in the place of tables."""
        cdef kvm_memory_slot *slot
        cdef bint flush = False
        with self.lock:
            self.sync()
            for address in self.slots_by_region.values():
                slot = <kvm_memory_slot *><uintptr_t>address
                if not slot.dirty_log:
                    flush |= tdp_recover_huge_pages(self.k, slot)
            if flush:
                flush_remote_tlbs(self.k)

    def write_protect_gfn(self, gfn, as_id=0):
        """Take W from every mapping of a frame, not to come back by a fast page fault; whether there was one."""
        cdef kvm_memory_slot *slot
        with self.lock:
            slot = self.slot_at(gfn << PAGE_SHIFT, as_id)
            if not tdp_write_protect_gfn(self.k, slot, gfn, PG_LEVEL_4K):
                return False
            flush_remote_tlbs(self.k)
            return True

    def advance_generation(self, count):
        """Count memslot updates without making them; MMIO entries grow stale, and all goes when 18 bits wrap."""
        with self.lock:
            next_generation(self.k, count)

    @property
    def generation(self):
        """Of the memslots."""
        return int(self.k.memslot_gen)


cdef void fill_image(guest_slot *image, const kvm_memory_slot *slot, int version) noexcept nogil:
    image.gpa = (slot.base_pfn + version * slot.span) << PAGE_SHIFT
    image.size = slot.npages << PAGE_SHIFT
    image.hva = slot.hva
    image.readonly = False                          # SPTEs say what may be written
