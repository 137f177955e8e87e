"""The audit: every invariant of the page tables of a machine, checked entry by entry.

    pages    each one is reached from a root once, knows its parent, has the level, frame and role of its place
    entries  W, MMU-writable and host-writable; reserved bits; A/D type; no executable huge page under the NX mitigation
    leaves   map the host page that is behind the frame now, no larger than slot and host allow, with no right that role, slot,
             host, write tracking or dirty log deny
    MMIO     entries of the present generation stand where no slot is
    lists    have the counts that the counters tell
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvmmu._bits cimport (
    MMIO_SPTE_GEN_MASK, PG_LEVEL_4K, PT64_INDEX_BITS, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT, ROLE_INVALID_MASK,
    ROLE_LEVEL_MASK, ROLE_SMM_SHIFT, SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE, SPTE_BASE_ADDR_MASK, PAGE_SHIFT,
)
from kvmmu._format cimport PageFormat
from kvmmu.mmu._kvm cimport KVM_TDP_MMU, invalidation_under_way, kvm, memslots_of, spte_to_child
from kvmmu.mmu._page cimport first_spte
from kvmmu.mmu._rmap cimport pte_list_count, pte_list_first
from kvmmu.mmu._slots cimport (
    HOST_READONLY, HOST_UNMAPPED, gfn_to_memslot, host_page_of, host_pfn_of, is_write_tracked, kvm_memory_slot,
    max_mapping_level,
)
from kvmmu.mmu._spte cimport (
    SpteFormat, audit_spte, get_mmio_spte_generation, get_mmio_spte_gfn, is_last_spte, is_mmio_spte, is_shadow_present_pte,
    is_writable_pte, pages_per_hpage, spte_access, spte_ad_need_write_protect, spte_to_pfn,
)
from kvmmu.mmu._state cimport Kvm

_ENTRY_FAULTS = ((1, "W, MMU-writable and host-writable contradict each other"), (2, "reserved bits are set"),
                 (4, "the A/D type is not that of the role"), (8, "rights are saved, yet not taken away"),
                 (16, "a huge page is executable under the NX mitigation"))


cdef class _Audit:
    """One audit on its way."""
    cdef kvm *k
    cdef PageFormat fmt
    cdef list errors
    cdef int64_t leaves[4]
    cdef size_t pages
    cdef size_t nx

    cdef report(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte, text):
        self.errors.append(f"page {sp} level {level} gfn {gfn:#x} spte {spte:#x}: {text}")

    cdef page(self, uint32_t sp, uint64_t base):
        """A page, and all below it. IN base: the first frame that it maps."""
        cdef kvm *k = self.k
        cdef uint32_t role = k.pages[sp].role
        cdef int level = <int>(role & ROLE_LEVEL_MASK), i
        cdef uint64_t spte, gfn
        cdef uint8_t bad
        self.pages += 1
        self.nx += k.pages[sp].nx_huge_page_disallowed
        for i in range(SPTE_ENT_PER_PAGE):
            spte = k.sptes[first_spte(sp) + i]
            if spte == SHADOW_NONPRESENT_VALUE:
                continue
            gfn = base + (<uint64_t>i << (PT64_INDEX_BITS * (level - 1)))
            if not is_shadow_present_pte(spte):
                self.special(sp, gfn, level, spte)
                continue
            bad = audit_spte(&k.spte, self.fmt, spte, level, role)
            if bad:
                for bit, text in _ENTRY_FAULTS:
                    if bad & bit:
                        self.report(sp, gfn, level, spte, text)
            if is_last_spte(spte, level):
                self.leaves[min(level, 3)] += 1
                self.leaf(sp, gfn, level, spte)
            else:
                self.table(sp, i, gfn, level, spte)

    cdef special(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte):
        cdef kvm *k = self.k
        if not is_mmio_spte(&k.spte, spte):
            self.report(sp, gfn, level, spte, "neither empty, nor present, nor MMIO")
            return
        if level != PG_LEVEL_4K or get_mmio_spte_gfn(&k.spte, spte) != gfn:
            self.report(sp, gfn, level, spte, f"MMIO entry of gfn {get_mmio_spte_gfn(&k.spte, spte):#x}")
        if get_mmio_spte_generation(spte) == k.memslot_gen & MMIO_SPTE_GEN_MASK and (
                gfn_to_memslot(memslots_of(k, k.pages[sp].role >> ROLE_SMM_SHIFT), gfn) is not NULL):
            self.report(sp, gfn, level, spte, "MMIO entry of this generation, and a slot is there")

    cdef table(self, uint32_t sp, int i, uint64_t gfn, int level, uint64_t spte):
        cdef kvm *k = self.k
        cdef uint64_t hpa = spte & SPTE_BASE_ADDR_MASK
        cdef uint32_t child
        if level == PG_LEVEL_4K or hpa <= k.arena_hpa or (hpa - k.arena_hpa) >> PAGE_SHIFT >= k.page_end:
            self.report(sp, gfn, level, spte, "points to no page of entries")
            return
        child = spte_to_child(k, spte)
        if not k.pages[child].in_use or not k.pages[child].tdp_mmu_page:
            self.report(sp, gfn, level, spte, f"points to page {child}, which is free")
        elif k.pages[child].role != k.pages[sp].role - 1 or k.pages[child].gfn != gfn:
            self.report(sp, gfn, level, spte, f"points to a page of role {k.pages[child].role:#x}, gfn {k.pages[child].gfn:#x}")
        elif pte_list_count(&k.lists, k.pages[child].parents) != 1 or (
                pte_list_first(&k.lists, k.pages[child].parents) != first_spte(sp) + i):
            self.report(sp, gfn, level, spte, f"page {child} does not know its parent")
        else:
            self.page(child, gfn)

    cdef leaf(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte):
        cdef kvm *k = self.k
        cdef uint32_t role = k.pages[sp].role, acc = spte_access(&k.spte, spte)
        cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(k, role >> ROLE_SMM_SHIFT), gfn)
        cdef uint8_t host
        cdef bint dirty
        if slot is NULL or gfn + pages_per_hpage(level) > slot.base_gfn + slot.npages:
            self.report(sp, gfn, level, spte, "maps what no slot has")
            return
        host = host_page_of(slot, gfn)
        if host & HOST_UNMAPPED or host_pfn_of(slot, gfn, host) != spte_to_pfn(spte):
            self.report(sp, gfn, level, spte, f"the frame is backed by {host_pfn_of(slot, gfn, host):#x}, or by nothing")
        if max_mapping_level(slot, gfn, k.spte.max_huge_page_level, host) < level:
            self.report(sp, gfn, level, spte, "larger than slot and host allow")
        if invalidation_under_way(k, gfn):
            self.report(sp, gfn, level, spte, "mapped during its invalidation")
        if acc & ~((role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT):
            self.report(sp, gfn, level, spte, f"rights {acc} beyond those of the role")
        if spte & k.spte.host_writable_mask and (slot.readonly or host & HOST_READONLY):
            self.report(sp, gfn, level, spte, "host-writable, and the host page is read-only")
        if is_writable_pte(spte):
            if is_write_tracked(slot, gfn):
                self.report(sp, gfn, level, spte, "writable, and writes are tracked")
            if slot.dirty_log and level > PG_LEVEL_4K:
                self.report(sp, gfn, level, spte, "writable and huge under the dirty log")
        if slot.dirty_log and level == PG_LEVEL_4K:
            dirty = (slot.dirty_bitmap[(gfn - slot.base_gfn) >> 6] >> ((gfn - slot.base_gfn) & 63)) & 1
            if k.spte.pml and not spte_ad_need_write_protect(spte):
                if spte & k.spte.dirty_mask and not dirty:
                    self.report(sp, gfn, level, spte, "dirty, and not in the dirty log")
            elif is_writable_pte(spte) and not dirty:
                self.report(sp, gfn, level, spte, "writable, and not in the dirty log")


def audit(Kvm machine):
    """What is wrong with the page tables of a machine: one line each."""
    cdef _Audit run = _Audit()
    cdef kvm *k = machine.k
    cdef uint32_t root
    cdef size_t roots = 0
    run.k, run.errors = k, []
    with machine.lock:
        machine.sync()
        root = k.tdp_mmu_roots.head
        while root:
            roots += 1
            run.fmt = (<SpteFormat>machine.fmt).tdp_format(int(k.pages[root].role & ROLE_LEVEL_MASK))
            if k.pages[root].root_count == 0:
                run.errors.append(f"root {root} has no references")
            if k.pages[root].role & ROLE_INVALID_MASK:
                run.pages += 1                      # on its way out, and empty
                for i in range(SPTE_ENT_PER_PAGE):
                    if k.sptes[first_spte(root) + i] != SHADOW_NONPRESENT_VALUE:
                        run.report(root, 0, 0, k.sptes[first_spte(root) + i], "an invalid root still maps")
            else:
                run.page(root, 0)
            root = k.pages[root].next
        for name, want, have in (
                ("pages_4k", run.leaves[1], k.stats.pages_4k), ("pages_2m", run.leaves[2], k.stats.pages_2m),
                ("pages_1g", run.leaves[3], k.stats.pages_1g), ("pages", run.pages, roots + k.tdp_mmu_pages.count),
                ("roots", roots, k.tdp_mmu_roots.count), ("nx_lpage_splits", run.nx, k.stats.nx_lpage_splits),
                ("NX list", run.nx, k.possible_nx_huge_pages[KVM_TDP_MMU].count), ("bugs", 0, k.stats.bugs)):
            if want != have:
                run.errors.append(f"{name}: {have} counted, {want} there")
    return run.errors
