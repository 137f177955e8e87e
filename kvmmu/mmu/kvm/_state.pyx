"""Kvm carries out what the host and its VMM do to a machine's page tables. Its fields are in `_state.pxd`.

Host memory: pages behind a slot (`set_backing()`), MMU notifiers (`invalidate()`, `begin_invalidation()`, `age()`).
Dirty log: switched on and off (`set_dirty_log()`), read (`dirty_log()`), cleared (`clear_dirty_log()`).
Maintenance: eager splitting of huge pages (`split_huge_pages()`), huge pages made again after a dirty log
(`recover_huge_pages()`) and after the NX mitigation (`recover_nx_huge_pages()`), zapping of everything (`zap_all_fast()`).
"""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from kvmmu.arch._bits cimport GPA_LIMIT, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport GuestMemory
from kvmmu.mmu.core._fault cimport host_writes, move_host_page
from kvmmu.mmu.core._kvm cimport KVM_SHADOW_MMU, KVM_TDP_MMU, flush_remote_tlbs, free_kvm, kvm, new_kvm, remove_vcpu
from kvmmu.mmu.core._slots cimport (
    HOST_LEVEL_MASK, HOST_READONLY, HOST_UNMAPPED, slot_table, first_memslot_at, alloc_host_pages, host_page_of, host_pfn_of,
    kvm_memory_slot, mark_slot_dirty, set_dirty_log,
)
from kvmmu.mmu.core._spte cimport SpteFormat, pages_per_hpage
from kvmmu.mmu.kvm._entry cimport free_vcpu_pages
from kvmmu.mmu.kvm._gfns cimport next_generation, slot_gfn_write_protect, unmap_gfns, zap_all_fast
from kvmmu.mmu.kvm._memslots cimport check_space, new_memslots
from kvmmu.mmu.shadow._range cimport (
    shadow_age_gfn_range, shadow_recover_nx_huge_pages, shadow_wrprot_pt_masked, shadow_wrprot_slot, shadow_zap_collapsible,
)
from kvmmu.mmu.shadow._track cimport track_write
from kvmmu.mmu.shadow._zap cimport KVM_MIN_ALLOC_MMU_PAGES, change_mmu_pages
from kvmmu.mmu.tdp._range cimport (
    tdp_age_gfn_range, tdp_clear_dirty_pt_masked, tdp_clear_dirty_slot, tdp_recover_huge_pages, tdp_recover_nx_huge_pages,
    tdp_try_split_huge_pages, tdp_wrprot_slot,
)


cdef int break_up(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) except -1:
    """Break up the host pages that reach over an edge of [start, end), inside and outside."""
    cdef uint64_t gfn, first, last, size, edge
    cdef int level
    cdef bint broken
    for level in (PG_LEVEL_1G, PG_LEVEL_2M):
        size = pages_per_hpage(level)
        for edge in (start - start % size, (end - 1) - (end - 1) % size):
            if edge >= start and edge + size <= end:
                continue
            first = max(edge, slot.base_gfn)
            last = min(edge + size, slot.base_gfn + slot.npages)
            broken = False
            for gfn in range(first, last):
                if slot.host_page[gfn - slot.base_gfn] & HOST_LEVEL_MASK == level:
                    slot.host_page[gfn - slot.base_gfn] -= 1
                    broken = True
            if broken:      # the frames are where they were; a huge mapping of them goes all the same
                unmap_gfns(k, slot, first, last)
    return 0


cdef int limit_level(kvm_memory_slot *slot, uint64_t start, uint64_t end) except -1:
    """Lower the level of the neighbours of small pages, which cannot be parts of a huge one."""
    cdef uint64_t gfn, first, last, size
    cdef int level
    for level in (PG_LEVEL_1G, PG_LEVEL_2M):
        size = pages_per_hpage(level)
        first = max(start - start % size, slot.base_gfn)
        last = min((end + size - 1) // size * size, slot.base_gfn + slot.npages)
        for gfn in range(first, last):
            if slot.host_page[gfn - slot.base_gfn] & HOST_LEVEL_MASK == level:
                slot.host_page[gfn - slot.base_gfn] -= 1
    return 0


cdef class Kvm:
    """One virtual machine but for its vCPUs: its page tables, its memslots and the pages of its host. Made by a Vm.

    Parameters
    ----------
    host : Host
    mem, smm_mem : GuestMemory
        Memory of the two address spaces; the same object makes them one.
    backing : int, optional
        Level of the pages that the host has behind the slots; by default its largest.
    slot_zap_all : bool
        A memslot that goes takes all page tables with it.
    """

    def __cinit__(self, host, GuestMemory mem not None, GuestMemory smm_mem not None, backing=None, slot_zap_all=True,
                  MachineLock lock=None):
        cdef SpteFormat fmt = SpteFormat(host)
        level = host.max_huge_page_level if backing is None else backing
        if level not in (1, 2, 3):
            raise ValueError(f"backing: want 1, 2 or 3, got {backing!r}")
        self.k = new_kvm()
        if self.k is NULL:
            raise MemoryError
        self.host, self.lock, self.backing, self.fmt = host, MachineLock() if lock is None else lock, level, fmt
        self.k.spte = fmt.f
        self.k.arena_hpa = <uint64_t>1 << (fmt.f.maxphyaddr - 1)
        self.k.tdp_enabled = host.tdp is not None
        self.k.slot_zap_all = bool(slot_zap_all)
        self.k.smep_andnot_wp = host.role_bits.smep_andnot_wp
        self.k.unmap_gfns, self.k.write_protect_gfn = unmap_gfns, slot_gfn_write_protect
        self.arena.slots = &self.arena_slot
        self.arena.count = 1
        self.memslots = new_memslots(self.k, mem, smm_mem, level, host)
        self.memslots.sync()

    def __dealloc__(self):
        free_kvm(self.k)

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    cdef int sync(self) except -1:
        if self.k.vcpu_is_gone:
            self.reap()
        return self.memslots.sync()

    cdef void reap(self) noexcept:
        """Free the vCPUs that nobody runs any more."""
        cdef size_t i = self.k.nr_vcpus
        self.k.vcpu_is_gone = False
        while i > 0:
            i -= 1
            if self.k.vcpus[i].gone:
                free_vcpu_pages(self.k.vcpus[i])
                remove_vcpu(self.k, i)

    # ---- memslots ----------------------------------------------------------------------------------------------------

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
        """Return one dict per memslot: id, as_id, gpa, size, pfn, readonly, dirty_log."""
        cdef kvm_memory_slot *slot
        rows = []
        with self.lock:
            self.sync()
            for address in self.memslots.slots_by_region.values():
                slot = <kvm_memory_slot *><uintptr_t>address
                rows.append({"id": int(slot.id), "as_id": int(slot.as_id), "gpa": int(slot.base_gfn << PAGE_SHIFT),
                             "size": int(slot.npages << PAGE_SHIFT), "pfn": int(slot.base_pfn), "readonly": bool(slot.readonly),
                             "dirty_log": bool(slot.dirty_log)})
        return sorted(rows, key=lambda row: (row["as_id"], row["gpa"]))

    def readonly_slot(self, gpa, size):
        """Return the begin of the first slot in [gpa, gpa + size) that is read-only to the guest; None without one."""
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

    def set_nr_mmu_pages(self, n):
        """Set the limit on shadow pages; a few are always allowed."""
        with self.lock:
            self.sync()
            change_mmu_pages(self.k, max(n, KVM_MIN_ALLOC_MMU_PAGES))
            self.k.limit_requested = True

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
            for address, start, end in self.memslots.frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if alloc_host_pages(slot):
                    raise MemoryError
                break_up(self.k, slot, start, end)
                unmap_gfns(self.k, slot, start, end)
                for gfn in range(start, end):           # a new page, alike in all frames that it has
                    slot.host_page[gfn - slot.base_gfn] = <uint8_t>level

    def invalidate(self, gpa, size, how):
        """The host takes pages away: "unmap" (nothing there until the next access), "move" (other pages at once) or "protect".

        "readonly" is "protect" without the copying that makes huge pages small: mprotect() by a VMM.
        """
        cdef kvm_memory_slot *slot
        cdef uint64_t gfn, start, end
        cdef uint8_t *page
        if how not in ("unmap", "move", "protect", "readonly"):
            raise ValueError(f"how: want 'unmap', 'move' or 'protect', got {how!r}")
        with self.lock:
            for address, start, end in self.memslots.frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if alloc_host_pages(slot):
                    raise MemoryError
                unmap_gfns(self.k, slot, start, end)
                break_up(self.k, slot, start, end)     # a notification of its own
                for gfn in range(start, end):
                    page = &slot.host_page[gfn - slot.base_gfn]
                    if page[0] & HOST_UNMAPPED and how != "unmap":
                        pass                            # nothing there to be moved or protected
                    elif how in ("protect", "readonly"):
                        page[0] |= HOST_READONLY
                    else:
                        move_host_page(slot, gfn)
                        page[0] &= ~(HOST_READONLY | HOST_UNMAPPED)
                        if how == "unmap":
                            page[0] |= HOST_UNMAPPED
                    if how in ("unmap", "protect"):
                        page[0] = (page[0] & ~HOST_LEVEL_MASK) | PG_LEVEL_4K
                if how in ("unmap", "protect"):
                    limit_level(slot, start, end)

    def host_page(self, gpa, as_id=0):
        """Return (host frame, level, unmapped, readonly) of the host page behind gpa."""
        cdef kvm_memory_slot *slot
        cdef uint8_t page
        with self.lock:
            slot = self.memslots.slot_at(gpa, as_id)
            page = host_page_of(slot, <uint64_t>gpa >> PAGE_SHIFT)
            return (int(host_pfn_of(slot, <uint64_t>gpa >> PAGE_SHIFT, page)), int(page & HOST_LEVEL_MASK),
                    bool(page & HOST_UNMAPPED), bool(page & HOST_READONLY))

    def begin_invalidation(self, gpa, size):
        """Begin an invalidation by an mmu notifier: faults on these pages retry until `end_invalidation()`."""
        cdef kvm_memory_slot *slot
        with self.lock:
            if self.k.mmu_invalidate_start != self.k.mmu_invalidate_end:
                raise ValueError("an invalidation is under way already")
            parts = self.memslots.frames(gpa, size)
            self.k.mmu_invalidate_start, self.k.mmu_invalidate_end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
            for address, start, end in parts:
                slot = <kvm_memory_slot *><uintptr_t>address
                unmap_gfns(self.k, slot, start, end)

    def end_invalidation(self):
        """End the invalidation by an mmu notifier."""
        with self.lock:
            self.k.mmu_invalidate_start = self.k.mmu_invalidate_end = 0

    def age(self, gpa, size, clear):
        """True if any page was accessed since it was last made old; clear: make all of them old. Nothing is flushed."""
        young = False
        cdef kvm_memory_slot *slot
        with self.lock:
            for address, start, end in self.memslots.frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                young |= bool(shadow_age_gfn_range(self.k, slot, start, end, bool(clear)))
                young |= bool(tdp_age_gfn_range(self.k, slot.as_id, start, end, bool(clear)))
        return young

    # ---- dirty log ---------------------------------------------------------------------------------------------------

    def set_dirty_log(self, gpa, on, as_id=0, created=False, dirty=(), full=False):
        """Start or stop the dirty log of the slot at gpa.

        created: the slot is new, and nothing maps it. dirty: pages of it, by number, that the log begins with. full: the log
        begins with all pages, and a page is protected when it is cleared.
        """
        cdef kvm_memory_slot *slot
        cdef uint64_t i
        with self.lock:
            slot = self.memslots.slot_at(gpa, as_id)
            for i in dirty:
                if i >= slot.npages:
                    raise ValueError(f"dirty: page {i} of a slot of {slot.npages}")
            if slot.dirty_log == bool(on):
                return
            if set_dirty_log(slot, bool(on)):
                raise MemoryError
            if created:
                for i in dirty:
                    mark_slot_dirty(slot, slot.base_gfn + i)
                return
            next_generation(self.k, 1)
            if on and full:
                slot.log_began_full = True
                for i in range(slot.npages):
                    mark_slot_dirty(slot, slot.base_gfn + i)
                return
            if slot.readonly:                           # none of it is mapped for writing
                return
            if not on:
                flush = bool(shadow_zap_collapsible(self.k, slot))
                if tdp_recover_huge_pages(self.k, slot) or flush:
                    flush_remote_tlbs(self.k)
                return
            if self.host.eager_split:
                tdp_try_split_huge_pages(self.k, slot.as_id, slot.base_gfn, slot.base_gfn + slot.npages, PG_LEVEL_4K)
            if self.k.spte.pml:
                tdp_clear_dirty_slot(self.k, slot)
            shadow_wrprot_slot(self.k, slot, PG_LEVEL_4K)
            tdp_wrprot_slot(self.k, slot, PG_LEVEL_2M if self.k.spte.pml else PG_LEVEL_4K)
            flush_remote_tlbs(self.k)                   # in any case: see clear_dirty_words()

    def dirty_log(self, gpa, clear, as_id=0):
        """Return the frames (uint64, ascending) written since the log was last cleared."""
        cdef kvm_memory_slot *slot
        cdef uint64_t[::1] words
        with self.lock:
            slot = self.logged_slot(gpa, as_id)
            bitmap = np.empty((slot.npages + 63) // 64, np.uint64)
            words = bitmap
            memcpy(&words[0], slot.dirty_bitmap, words.shape[0] * sizeof(uint64_t))
            if clear:
                self.clear_dirty_words(slot, bitmap)
            bits = np.unpackbits(bitmap.view(np.uint8), bitorder="little")
            return np.flatnonzero(bits).astype(np.uint64) + np.uint64(slot.base_gfn)

    cdef kvm_memory_slot *logged_slot(self, gpa, as_id) except NULL:
        cdef kvm_memory_slot *slot = self.memslots.slot_at(gpa, as_id)
        if not slot.dirty_log:
            raise ValueError(f"the slot that holds gpa {gpa:#x} has no dirty log; set_dirty_log() starts one")
        return slot

    def clear_dirty_log(self, gpa, size, pages, as_id=0):
        """Clear pages of [gpa, gpa + size), all or those of the frames `pages` (uint64), in the log of the slot at gpa."""
        cdef kvm_memory_slot *slot
        cdef uint64_t first, last
        with self.lock:
            slot = self.logged_slot(gpa, as_id)
            first, last = (gpa >> PAGE_SHIFT) - slot.base_gfn, ((gpa + size) >> PAGE_SHIFT) - slot.base_gfn
            if (gpa | size) & (PAGE_SIZE - 1) or last > slot.npages or first > last:
                raise ValueError(f"gpa {gpa:#x}, size {size:#x}: want whole pages of the slot that begins at "
                                 f"{slot.base_gfn << PAGE_SHIFT:#x} and has {slot.npages << PAGE_SHIFT:#x} bytes")
            bits = np.zeros((slot.npages + 63) // 64 * 64, np.uint8)
            if pages is None:
                bits[first:last] = 1
            else:
                numbers = pages - np.uint64(slot.base_gfn)              # below the slot they become large
                if not ((numbers >= first) & (numbers < last)).all():
                    raise ValueError(f"pages: want frames of [{gpa:#x}, {gpa + size:#x}), got {pages!r}")
                bits[numbers] = 1
            self.clear_dirty_words(slot, np.packbits(bits, bitorder="little").view(np.uint64))

    cdef int clear_dirty_words(self, kvm_memory_slot *slot, const uint64_t[::1] wanted) except -1:
        """Clear the pages of the log that have a bit set in `wanted`, and protect them: the next write to each is logged."""
        cdef uint64_t word, first, last
        cdef size_t i
        cdef int bit
        cdef bint flush = False
        for i in range((slot.npages + 63) // 64):
            word = slot.dirty_bitmap[i] & wanted[i]
            slot.dirty_bitmap[i] ^= word
            if word == 0:
                continue
            flush = True                    # a page that was aged may be writable in a TLB alone: flush in any case
            if slot.log_began_full:
                first = last = 64
                for bit in range(64):
                    if (word >> bit) & 1:
                        first, last = min(first, <uint64_t>bit), bit
                first, last = slot.base_gfn + 64 * i + first, slot.base_gfn + 64 * i + last
                if self.host.eager_split:
                    tdp_try_split_huge_pages(self.k, slot.as_id, first, last + 1, PG_LEVEL_4K)
                slot_gfn_write_protect(self.k, slot, first, PG_LEVEL_2M)
                if first // pages_per_hpage(PG_LEVEL_2M) != last // pages_per_hpage(PG_LEVEL_2M):
                    slot_gfn_write_protect(self.k, slot, last, PG_LEVEL_2M)
            shadow_wrprot_pt_masked(self.k, slot, slot.base_gfn + 64 * i, word)
            tdp_clear_dirty_pt_masked(self.k, slot, slot.base_gfn + 64 * i, word, not self.k.spte.pml)
        if flush:
            flush_remote_tlbs(self.k)
        return 0

    def note_write(self, gpa, size, as_id=0, dirty=True):
        """Give bytes of the guest that KVM or the VMM writes a private host page. dirty: KVM writes, and logs the frame."""
        cdef kvm_memory_slot *slot
        cdef uint64_t gfn, start, end
        check_space(as_id)
        first, last = gpa - gpa % PAGE_SIZE, gpa + size + -(gpa + size) % PAGE_SIZE
        with self.lock:
            for address, start, end in self.memslots.frames(first, last - first):
                slot = <kvm_memory_slot *><uintptr_t>address
                if slot.as_id != as_id and not self.k.one_address_space:
                    continue
                for gfn in range(start, end):
                    host_writes(self.k, slot, gfn)
                    if dirty:
                        mark_slot_dirty(slot, gfn)

    def track_write(self, gpa, size, as_id=0):
        """Drop the shadow of bytes of the guest that were written."""
        cdef kvm_memory_slot *slot
        cdef uint64_t at, end, start, stop, part
        check_space(as_id)
        first, last = gpa - gpa % PAGE_SIZE, gpa + size + -(gpa + size) % PAGE_SIZE
        with self.lock:
            for address, start, stop in self.memslots.frames(first, last - first):
                slot = <kvm_memory_slot *><uintptr_t>address
                if slot.as_id != as_id and not self.k.one_address_space:
                    continue
                at, end = max(<uint64_t>gpa, start << PAGE_SHIFT), min(<uint64_t>(gpa + size), stop << PAGE_SHIFT)
                while at < end:
                    part = min(end - at, PAGE_SIZE - (at & PAGE_OFFSET_MASK))
                    track_write(self.k, as_id, at, part, False)
                    at += part

    # ---- inspection --------------------------------------------------------------------------------------------------

    @property
    def arena_hpa(self):
        """Host-physical address of the pages of SPTEs: page n lies n * 4096 bytes behind it."""
        return int(self.k.arena_hpa)

    # ---- maintenance -------------------------------------------------------------------------------------------------

    def zap_all_fast(self):
        """Zap all page tables: roots are invalid at once, their contents are zapped after that."""
        with self.lock:
            zap_all_fast(self.k)

    def recover_nx_huge_pages(self, ratio):
        """Zap the oldest 1/ratio of the tables of the NX mitigation, as the recovery worker does in one period; how many."""
        cdef size_t n
        if ratio < 1:
            raise ValueError(f"ratio: want at least 1, got {ratio}")
        with self.lock:
            n = -(-int(self.k.possible_nx_huge_pages[KVM_SHADOW_MMU].count) // ratio)
            zapped = int(shadow_recover_nx_huge_pages(self.k, n))
            n = -(-int(self.k.possible_nx_huge_pages[KVM_TDP_MMU].count) // ratio)
            return zapped + int(tdp_recover_nx_huge_pages(self.k, n))

    def split_huge_pages(self, gpa, size, level):
        """Split huge mappings of [gpa, gpa + size) by the TdpMmu down to a level. Those of a shadow MMU stay."""
        cdef kvm_memory_slot *slot
        with self.lock:
            for address, start, end in self.memslots.frames(gpa, size):
                slot = <kvm_memory_slot *><uintptr_t>address
                if tdp_try_split_huge_pages(self.k, slot.as_id, start, end, level):
                    raise MemoryError

    def recover_huge_pages(self):
        """Replace tables by huge mappings wherever slots and host allow it."""
        cdef kvm_memory_slot *slot
        cdef bint flush = False
        with self.lock:
            self.sync()
            for address in self.memslots.slots_by_region.values():
                slot = <kvm_memory_slot *><uintptr_t>address
                if not slot.dirty_log:
                    flush |= shadow_zap_collapsible(self.k, slot)
                    flush |= tdp_recover_huge_pages(self.k, slot)
            if flush:
                flush_remote_tlbs(self.k)

    def write_protect_gfn(self, gfn, as_id=0):
        """Write-protect every mapping of a frame, so that no fast page fault makes it writable; True if one was writable."""
        cdef kvm_memory_slot *slot
        with self.lock:
            slot = self.memslots.slot_at(gfn << PAGE_SHIFT, as_id)
            if not slot_gfn_write_protect(self.k, slot, gfn, PG_LEVEL_4K):
                return False
            flush_remote_tlbs(self.k)
            return True

    def advance_generation(self, count):
        """Count memslot updates without making them: MMIO entries become stale; when 18 bits wrap, all page tables are zapped."""
        with self.lock:
            next_generation(self.k, count)

    @property
    def generation(self):
        """The generation of the memslots."""
        return int(self.k.memslot_gen)
