"""Leaves and MMIO entries under audit, as `_leaf.pxd` describes it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport MMIO_SPTE_GEN_MASK, PG_LEVEL_2M, PG_LEVEL_4K, ROLE_DIRECT_MASK, ROLE_SMM_SHIFT
from kvmmu.arch._format cimport PageFormat
from kvmmu.mmu.core._kvm cimport invalidation_under_way, kvm, memslots_of
from kvmmu.mmu.core._slots cimport (
    HOST_LEVEL_MASK, HOST_READONLY, HOST_UNMAPPED, gfn_to_memslot, host_page_of, host_pfn_of, is_slot_dirty,
    is_write_tracked, kvm_memory_slot, lpage_disallowed,
)
from kvmmu.mmu.core._spte cimport (
    audit_spte, get_mmio_spte_generation, get_mmio_spte_gfn, is_mmio_spte, is_mmu_writable_spte, is_writable_pte,
    pages_per_hpage, spte_access, spte_ad_need_write_protect, spte_to_pfn,
)

_ENTRY_FAULTS = ((1, "W, MMU-writable and host-writable contradict each other"), (2, "reserved bits are set"),
                 (4, "the A/D type is not that of the role"), (8, "rights are saved, yet not taken away"),
                 (16, "a huge page is executable under the NX mitigation"))


cdef class _Findings:

    cdef report(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte, text):
        self.errors.append(f"page {sp} level {level} gfn {gfn:#x} spte {spte:#x}: {text}")

    cdef check(self, name, want, have):
        if want != have:
            self.errors.append(f"{name}: {have} counted, {want} there")

    cdef entry(self, PageFormat fmt, uint32_t sp, uint64_t gfn, int level, uint64_t spte):
        cdef uint8_t bad = audit_spte(&self.k.spte, fmt, spte, level, self.k.pages[sp].role)
        if bad:
            for bit, text in _ENTRY_FAULTS:
                if bad & bit:
                    self.report(sp, gfn, level, spte, text)

    cdef not_present(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte):
        cdef kvm *k = self.k
        if not is_mmio_spte(&k.spte, spte):
            self.report(sp, gfn, level, spte, "neither empty, nor present, nor MMIO")
            return
        if level != PG_LEVEL_4K or get_mmio_spte_gfn(&k.spte, spte) != gfn:
            self.report(sp, gfn, level, spte, f"MMIO entry of gfn {get_mmio_spte_gfn(&k.spte, spte):#x}")
        # the synchronization of a page gives the entries of its own gfns the present generation without a look at the slots
        if k.pages[sp].role & ROLE_DIRECT_MASK and get_mmio_spte_generation(spte) == k.memslot_gen & MMIO_SPTE_GEN_MASK and (
                gfn_to_memslot(memslots_of(k, k.pages[sp].role >> ROLE_SMM_SHIFT), gfn) is not NULL):
            self.report(sp, gfn, level, spte, "MMIO entry of this generation, and a slot is there")

    cdef leaf(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte, uint32_t access):
        cdef kvm *k = self.k
        cdef uint32_t acc = spte_access(&k.spte, spte)
        cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(k, k.pages[sp].role >> ROLE_SMM_SHIFT), gfn)
        cdef uint8_t host
        self.leaves[min(level, 3)] += 1
        if slot is NULL or gfn + pages_per_hpage(level) > slot.base_gfn + slot.npages:
            self.report(sp, gfn, level, spte, "maps what no slot has")
            return
        host = host_page_of(slot, gfn)
        if host & HOST_UNMAPPED or host_pfn_of(slot, gfn, host) != spte_to_pfn(spte):
            self.report(sp, gfn, level, spte, f"the frame is backed by {host_pfn_of(slot, gfn, host):#x}, or by nothing")
        if level > min(k.spte.max_huge_page_level, <int>(host & HOST_LEVEL_MASK)):
            self.report(sp, gfn, level, spte, "larger than the host allows")
        if invalidation_under_way(k, gfn):
            self.report(sp, gfn, level, spte, "mapped during its invalidation")
        if acc & ~access:
            self.report(sp, gfn, level, spte, f"rights {acc} beyond those of the role or of the guest's tables, {access}")
        if spte & k.spte.host_writable_mask and (slot.readonly or host & HOST_READONLY):
            self.report(sp, gfn, level, spte, "host-writable, and the host page is read-only")
        if is_writable_pte(spte) or is_mmu_writable_spte(&k.spte, spte):
            if level >= PG_LEVEL_2M and lpage_disallowed(slot, gfn, level):     # one that was write-protected may stay
                self.report(sp, gfn, level, spte, "writable, and larger than the tables in it allow")
            if level == PG_LEVEL_4K and (slot.id, gfn) in self.synced:
                self.report(sp, gfn, level, spte, "writable, and the table in the frame is shadowed and in sync")
            if is_write_tracked(slot, gfn):
                self.report(sp, gfn, level, spte, "writable, and writes are tracked")
        self.dirty_log(slot, sp, gfn, level, spte)

    cdef dirty_log(self, const kvm_memory_slot *slot, uint32_t sp, uint64_t gfn, int level, uint64_t spte):
        cdef kvm *k = self.k
        cdef bint dirty
        cdef int i
        if not slot.dirty_log:
            return
        if level > PG_LEVEL_4K:
            dirty = slot.log_began_full         # then it may be, as long as all of it is in the log
            for i in range(<int>pages_per_hpage(level)):
                dirty &= is_slot_dirty(slot, gfn + i)
            if is_writable_pte(spte) and not dirty:
                self.report(sp, gfn, level, spte, "writable and huge under the dirty log")
            return
        dirty = is_slot_dirty(slot, gfn)
        if k.spte.pml and not spte_ad_need_write_protect(spte):
            if spte & k.spte.dirty_mask and not dirty and (
                    k.pages[sp].role >> ROLE_SMM_SHIFT, gfn) not in self.logged:
                self.report(sp, gfn, level, spte, "dirty, and not in the dirty log")
        elif is_writable_pte(spte) and not dirty:
            self.report(sp, gfn, level, spte, "writable, and not in the dirty log")
