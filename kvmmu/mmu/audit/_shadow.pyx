"""Shadow pages under audit, as `_shadow.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    ACC_WRITE_MASK, PAGE_SHIFT, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT,
    ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_GUEST_MODE_MASK, ROLE_HAS_4_BYTE_GPTE_MASK,
    ROLE_INVALID_MASK, ROLE_LEVEL_MASK, ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_MASK, ROLE_QUADRANT_SHIFT,
    SHADOW_NONPRESENT_VALUE, SPTE_BASE_ADDR_MASK, SPTE_ENT_PER_PAGE,
)
from kvmmu.arch._format cimport PageFormat
from kvmmu.mmu.audit._guest cimport audit_guest_entry, shadowed_walk
from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.core._kvm cimport (
    KVM_MMU_HASH_BUCKETS, KVM_SHADOW_MMU, PREV_ROOTS, kvm, kvm_mmu, kvm_mmu_page, page_list, slot_table, sp_level,
    spte_to_child,
)
from kvmmu.mmu.core._page cimport first_spte, hash_bucket, sp_get_access, sp_get_gfn, sp_has_gptes
from kvmmu.mmu.core._pte_list cimport pte_list_count, pte_list_get
from kvmmu.mmu.core._rmap cimport slot_of_sp
from kvmmu.mmu.core._slots cimport kvm_memory_slot, level_index, lpage_disallowed
from kvmmu.mmu.core._spte cimport SpteFormat, is_last_spte, is_shadow_present_pte, pages_per_hpage
from kvmmu.mmu.shadow._zap cimport is_obsolete_sp
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault


cdef bint is_page_of_entries(const kvm *k, uint64_t spte) noexcept:
    cdef uint64_t hpa = spte & SPTE_BASE_ADDR_MASK
    return hpa > k.arena_hpa and (hpa - k.arena_hpa) >> PAGE_SHIFT < k.page_end


cdef inline bint is_valid(const kvm_mmu_page *page) noexcept:
    return not page.role & <uint32_t>ROLE_INVALID_MASK


cdef inline bint is_shadow_page(const kvm_mmu_page *page) noexcept:
    return page.in_use and not page.tdp_mmu_page and not page.special


cdef class _Shadow:
    """The state of one audit of shadow pages."""
    cdef _Findings f
    cdef kvm *k
    cdef SpteFormat sptes
    cdef bint guest_tables
    cdef list pages                 # that the hash knows
    cdef dict roots                 # page: references
    cdef set used                   # special pages that are part of a root
    cdef dict parents               # page: entries that point to it
    cdef bytearray mapped           # by SPTE number: how often it stands in a reverse map
    cdef size_t unsync

    cdef tell(self, uint32_t sp, text):
        cdef const kvm_mmu_page *page = &self.k.pages[sp]
        self.f.errors.append(f"shadow page {sp} role {page.role:#x} gfn {page.gfn:#x}: {text}")

    # ---- hash and lists ----------------------------------------------------------------------------------------------

    cdef hash(self):
        cdef kvm *k = self.k
        cdef uint32_t sp
        cdef size_t bucket, n
        places = {}
        for bucket in range(<size_t>KVM_MMU_HASH_BUCKETS):
            sp, n = k.hash[bucket], 0
            while sp:
                n += 1
                if n > k.page_end or not is_shadow_page(&k.pages[sp]):
                    self.tell(sp, f"hash bucket {bucket} goes in circles, or holds a page that is free")
                    break
                if hash_bucket(k.pages[sp].gfn) != bucket:
                    self.tell(sp, f"is in hash bucket {bucket}")
                if is_valid(&k.pages[sp]):
                    other = places.setdefault((k.pages[sp].gfn, k.pages[sp].role), sp)
                    if other != sp:
                        self.tell(sp, f"page {other} is the same")
                self.pages.append(sp)
                sp = k.pages[sp].hash_next
        self.f.check("shadow pages in use", len(self.pages), k.n_used_mmu_pages)

    cdef active(self):
        cdef kvm *k = self.k
        cdef uint32_t sp = k.active_mmu_pages.head, before = 0
        cdef size_t n = 0
        hashed = set(self.pages)
        listed = set()
        while sp and n <= k.page_end:
            n += 1
            listed.add(sp)
            if k.pages[sp].prev != before:
                self.tell(sp, "the list of active pages does not lead back")
            if sp not in hashed:
                self.tell(sp, "is in the list of active pages, and not in the hash")
            elif is_obsolete_sp(k, &k.pages[sp]):
                self.tell(sp, "is in the list of active pages, and obsolete")
            before, sp = sp, k.pages[sp].next
        self.f.check("active pages", n, k.active_mmu_pages.count)
        for sp in hashed - listed:
            if is_valid(&k.pages[sp]):
                self.tell(sp, "is not in the list of active pages")
            elif k.pages[sp].root_count == 0:
                self.tell(sp, "was zapped, is no root, and still there")

    cdef nx_list(self):
        cdef kvm *k = self.k
        cdef page_list *pages = &k.possible_nx_huge_pages[KVM_SHADOW_MMU]
        cdef uint32_t sp = pages.head
        cdef size_t n = 0
        while sp and n <= pages.count:
            n += 1
            if not is_shadow_page(&k.pages[sp]) or not k.pages[sp].nx_huge_page_disallowed:
                self.tell(sp, "is in the list of the NX mitigation, and was not made for it")
            sp = k.pages[sp].nx_next
        self.f.check("pages in the list of the NX mitigation", n, pages.count)

    # ---- roots -------------------------------------------------------------------------------------------------------

    cdef count_root(self, const kvm_mmu *mmu, uint32_t sp, text):
        cdef kvm *k = self.k
        cdef uint64_t spte
        cdef uint32_t child, same = <uint32_t>~(ROLE_LEVEL_MASK | ROLE_QUADRANT_MASK | ROLE_PASSTHROUGH_MASK | ROLE_INVALID_MASK)
        cdef int i
        if not k.pages[sp].special:
            self.roots[sp] = self.roots.get(sp, 0) + 1
            return
        self.used.add(sp)
        for i in range(SPTE_ENT_PER_PAGE):
            spte = k.sptes[first_spte(sp) + i]
            if spte == SHADOW_NONPRESENT_VALUE:
                continue
            if not is_shadow_present_pte(spte) or not is_page_of_entries(k, spte):
                self.f.report(sp, 0, sp_level(&k.pages[sp]), spte, f"{text}: points to no page")
                continue
            child = spte_to_child(k, spte)
            if not k.pages[child].special:
                if (k.pages[child].role ^ mmu.root_role) & same or sp_level(&k.pages[child]) != PG_LEVEL_2M:
                    self.tell(child, f"{text}: entry {i} is not of its role, {mmu.root_role:#x}")
                if mmu.root_role & ROLE_HAS_4_BYTE_GPTE_MASK and (
                        (k.pages[child].role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT != <uint32_t>i):
                    self.tell(child, f"{text}: entry {i} is another quarter of the directory")
            self.count_root(mmu, child, text)

    cdef count_roots(self, const kvm_mmu *mmu, text):
        cdef kvm *k = self.k
        cdef uint32_t sp = mmu.root.sp
        cdef int i
        if mmu.root.valid and sp:
            self.count_root(mmu, sp, text)
            if not k.pages[sp].special and (k.pages[sp].role ^ mmu.root_role) & <uint32_t>~ROLE_INVALID_MASK:
                self.tell(sp, f"{text} has another role, {mmu.root_role:#x}")
        for i in range(PREV_ROOTS):
            if not mmu.prev_roots[i].valid:
                continue
            if mmu.prev_roots[i].sp == 0 or k.pages[mmu.prev_roots[i].sp].special:
                self.f.errors.append(f"{text}: a root before is of special pages")
            else:
                self.count_root(mmu, mmu.prev_roots[i].sp, text)

    cdef audit_roots(self):
        cdef kvm *k = self.k
        cdef size_t i
        cdef uint32_t sp
        cdef int j
        for i in range(k.nr_vcpus):
            if k.vcpus[i].root_mmu.page_fault != tdp_page_fault:
                self.count_roots(&k.vcpus[i].root_mmu, f"root of vCPU {k.vcpus[i].id}")
            self.count_roots(&k.vcpus[i].guest_mmu, f"nested root of vCPU {k.vcpus[i].id}")
        for sp in self.pages:
            if self.roots.get(sp, 0) != k.pages[sp].root_count:
                self.tell(sp, f"is a root {k.pages[sp].root_count} times, and {self.roots.get(sp, 0)} vCPUs have it")
        for sp in range(1, <uint32_t>k.page_end):
            if not k.pages[sp].in_use or not k.pages[sp].special:
                continue
            if k.pages[sp].parents:
                self.tell(sp, "a special page has parents")
            for j in range(SPTE_ENT_PER_PAGE):
                if sp not in self.used and k.sptes[first_spte(sp) + j] != SHADOW_NONPRESENT_VALUE:
                    self.f.report(sp, 0, 0, k.sptes[first_spte(sp) + j], "a special page that nobody uses has entries")

    # ---- slots -------------------------------------------------------------------------------------------------------

    cdef count_tables(self):
        """Tables that are shadowed, in the counters of slots and in their own."""
        cdef kvm *k = self.k
        cdef kvm_memory_slot *slot
        cdef uint32_t sp
        cdef size_t n = 0, as_id, i
        cdef int level
        track, lpage = {}, {}
        for sp in self.pages:
            if not is_valid(&k.pages[sp]) or not sp_has_gptes(&k.pages[sp]):
                continue
            n += 1
            slot = slot_of_sp(k, &k.pages[sp], k.pages[sp].gfn)
            if slot is NULL:
                self.tell(sp, "shadows a table where no slot is")
                continue
            if sp_level(&k.pages[sp]) > PG_LEVEL_4K:
                place = slot.id, k.pages[sp].gfn
                track[place] = track.get(place, 0) + 1
            if not k.pages[sp].unsync:
                self.f.synced.add((slot.id, k.pages[sp].gfn))
            for level in range(PG_LEVEL_2M, PG_LEVEL_1G + 1):
                place = slot.id, level, level_index(slot, k.pages[sp].gfn, level)
                lpage[place] = lpage.get(place, 0) + 1
        self.f.check("indirect_shadow_pages", n, k.indirect_shadow_pages)
        for as_id in range(2):
            for i in range(k.slots[as_id].count):
                self.slot_counters(k.slots[as_id].slots[i], track, lpage)
        for place in track:
            self.f.errors.append(f"slot {place[0]} gfn {place[1]:#x}: holds shadowed upper tables, and writes are not tracked")

    cdef slot_counters(self, const kvm_memory_slot *slot, dict track, dict lpage):
        cdef uint64_t gfn, size, end = slot.base_gfn + slot.npages
        cdef int level
        if slot.write_track is not NULL:
            for gfn in range(slot.base_gfn, end):
                if slot.write_track[gfn - slot.base_gfn]:
                    self.f.check(f"slot {slot.id} gfn {gfn:#x}: shadowed upper tables", track.pop((slot.id, gfn), 0),
                                 slot.write_track[gfn - slot.base_gfn])
        for level in range(PG_LEVEL_2M, PG_LEVEL_1G + 1):
            size = pages_per_hpage(level)
            gfn = slot.base_gfn & ~(size - 1)
            while gfn < end:
                edge = gfn < slot.base_gfn or gfn + size > end
                want = edge + lpage.get((slot.id, level, level_index(slot, gfn, level)), 0)
                if want != lpage_disallowed(slot, gfn, level):
                    self.f.check(f"slot {slot.id} gfn {gfn:#x}: reasons against a page of level {level}", want,
                                 lpage_disallowed(slot, gfn, level))
                gfn += size

    cdef reverse_maps(self):
        cdef kvm *k = self.k
        cdef const slot_table *table
        cdef const kvm_memory_slot *slot
        cdef uint64_t gfn
        cdef size_t as_id, i
        cdef int level
        for as_id in range(2):
            table = &k.slots[as_id]
            for i in range(table.count):
                slot = table.slots[i]
                for level in range(PG_LEVEL_4K, PG_LEVEL_1G + 1):
                    if slot.rmap[level - 1] is NULL:
                        continue
                    gfn = slot.base_gfn & ~(pages_per_hpage(level) - 1)
                    while gfn < slot.base_gfn + slot.npages:
                        if slot.rmap[level - 1][level_index(slot, gfn, level)]:
                            self.reverse_map(slot, gfn, level)
                        gfn += pages_per_hpage(level)

    cdef reverse_map(self, const kvm_memory_slot *slot, uint64_t gfn, int level):
        cdef kvm *k = self.k
        cdef uint64_t head = slot.rmap[level - 1][level_index(slot, gfn, level)], sptep, spte
        cdef kvm_mmu_page *page
        cdef size_t i
        for i in range(pte_list_count(&k.lists, head)):
            sptep = pte_list_get(&k.lists, head, i)
            page = &k.pages[sptep // SPTE_ENT_PER_PAGE]
            spte = k.sptes[sptep]
            self.mapped[sptep] = min(<int>self.mapped[sptep] + 1, 2)
            text = f"slot {slot.id} gfn {gfn:#x} level {level}: the reverse map holds entry {sptep % SPTE_ENT_PER_PAGE} " \
                   f"of page {sptep // SPTE_ENT_PER_PAGE}, "
            if not is_shadow_page(page) or sp_level(page) != level:
                self.f.errors.append(text + "which is no shadow page of this level")
            elif not is_shadow_present_pte(spte) or not is_last_spte(spte, level):
                self.f.errors.append(text + f"which is no leaf: {spte:#x}")
            elif sp_get_gfn(page, <int>(sptep % SPTE_ENT_PER_PAGE)) != gfn or slot_of_sp(k, page, gfn) != slot:
                self.f.errors.append(text + f"which maps gfn {sp_get_gfn(page, <int>(sptep % SPTE_ENT_PER_PAGE)):#x}")

    # ---- pages -------------------------------------------------------------------------------------------------------

    cdef page(self, uint32_t sp):
        cdef kvm *k = self.k
        cdef const kvm_mmu_page *page = &k.pages[sp]
        cdef const kvm_pagewalk *w = NULL
        cdef PageFormat fmt
        cdef uint64_t spte, gfn, sptep
        cdef int i, level = sp_level(page)
        self.f.nx[KVM_SHADOW_MMU] += page.nx_huge_page_disallowed
        self.unsync += page.unsync
        if page.unsync and (level != PG_LEVEL_4K or not sp_has_gptes(page) or not is_valid(page)):
            self.tell(sp, "is unsync, and no leaf table of the guest's")
        if (page.shadowed_translation is NULL) != ((page.role & ROLE_DIRECT_MASK) != 0 or level > PG_LEVEL_1G):
            self.tell(sp, "remembers frames of its entries without need, or forgets them")
        self.unsync_bitmap(sp)
        if self.guest_tables and is_valid(page) and sp_has_gptes(page) and not page.unsync:
            w = shadowed_walk(k, sp)
        fmt = self.sptes.shadow_format(
            5, (page.role & ROLE_CR4_SMEP_MASK) != 0, k.spte.ept and (page.role & ROLE_GUEST_MODE_MASK) != 0)
        for i in range(SPTE_ENT_PER_PAGE):
            sptep = first_spte(sp) + i
            spte = k.sptes[sptep]
            if spte == SHADOW_NONPRESENT_VALUE:
                continue
            gfn = sp_get_gfn(page, i)
            if not is_valid(page):
                self.f.report(sp, gfn, level, spte, "an invalid page still maps")
            if not is_shadow_present_pte(spte):
                self.f.not_present(sp, gfn, level, spte)
            else:
                self.f.entry(fmt, sp, gfn, level, spte)
                if is_last_spte(spte, level):
                    self.leaf(sp, i, gfn, level, spte)
                elif not self.table(sp, i, gfn, level, spte):
                    continue
            if w is not NULL:
                audit_guest_entry(self.f, w, sp, i, spte)

    cdef leaf(self, uint32_t sp, int i, uint64_t gfn, int level, uint64_t spte):
        cdef const kvm_mmu_page *page = &self.k.pages[sp]
        cdef uint32_t access = sp_get_access(page, i), own = <uint32_t>((page.role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)
        cdef int n = self.mapped[first_spte(sp) + i]
        if gfn & (pages_per_hpage(level) - 1):
            self.f.report(sp, gfn, level, spte, "the frame is none of such a page")
        if n != 1:
            self.f.report(sp, gfn, level, spte, f"{'not' if n == 0 else 'more than once'} in the reverse map of its frame")
        if access & ~own & ~<uint32_t>(0 if page.role & ROLE_CR0_WP_MASK else ACC_WRITE_MASK):
            self.f.report(sp, gfn, level, spte, f"rights {access} beyond those of the page, {own}")
        self.f.leaf(sp, gfn, level, spte, access)

    cdef bint table(self, uint32_t sp, int i, uint64_t gfn, int level, uint64_t spte) except? False:
        """Audit an entry that points to a page; True if there is such a page."""
        cdef kvm *k = self.k
        cdef const kvm_mmu_page *page = &k.pages[sp]
        cdef const kvm_mmu_page *child
        cdef uint32_t number, want = (page.role - 1) & ~<uint32_t>ROLE_PASSTHROUGH_MASK, own
        if level == PG_LEVEL_4K or not is_page_of_entries(k, spte):
            self.f.report(sp, gfn, level, spte, "points to no page of entries")
            return False
        number = spte_to_child(k, spte)
        child = &k.pages[number]
        if not is_shadow_page(child) or not is_valid(child):
            self.f.report(sp, gfn, level, spte, f"points to page {number}, which is free, or was zapped")
            return False
        self.parents[number] = self.parents.get(number, 0) + 1
        own = <uint32_t>ROLE_ACCESS_MASK | (0 if page.role & ROLE_DIRECT_MASK else <uint32_t>ROLE_DIRECT_MASK)
        if page.role & ROLE_HAS_4_BYTE_GPTE_MASK:
            want &= ~<uint32_t>ROLE_QUADRANT_MASK
            if level - 1 == PG_LEVEL_4K:
                want |= <uint32_t>(i & 1) << ROLE_QUADRANT_SHIFT
        if (child.role ^ want) & ~own:
            self.f.report(sp, gfn, level, spte, f"points to page {number} of role {child.role:#x}, want {want:#x}")
        if page.role & (ROLE_DIRECT_MASK | ROLE_PASSTHROUGH_MASK) and child.gfn != gfn:
            self.f.report(sp, gfn, level, spte, f"points to page {number} of gfn {child.gfn:#x}")
        if (child.role & ROLE_ACCESS_MASK) & ~page.role and not child.role & ROLE_DIRECT_MASK:
            self.f.report(sp, gfn, level, spte, f"points to page {number} with rights beyond its own, {child.role:#x}")
        if (child.unsync or child.unsync_children) and not (page.unsync_child_bitmap[i >> 6] >> (i & 63)) & 1:
            self.f.report(sp, gfn, level, spte, f"page {number} is unsync, or has unsync children, and its parent does not know")
        return True

    cdef unsync_bitmap(self, uint32_t sp):
        cdef const kvm_mmu_page *page = &self.k.pages[sp]
        n = sum(int(page.unsync_child_bitmap[i]).bit_count() for i in range(8))
        if n != page.unsync_children:
            self.tell(sp, f"{page.unsync_children} unsync children counted, {n} marked")

    cdef audit_parents(self, uint32_t sp):
        cdef kvm *k = self.k
        cdef uint64_t head = k.pages[sp].parents, sptep
        cdef size_t i, n = pte_list_count(&k.lists, head)
        seen = set()
        for i in range(n):
            sptep = pte_list_get(&k.lists, head, i)
            seen.add(sptep)
            if not is_shadow_page(&k.pages[sptep // SPTE_ENT_PER_PAGE]) or not is_shadow_present_pte(k.sptes[sptep]) or (
                    is_last_spte(k.sptes[sptep], sp_level(&k.pages[sptep // SPTE_ENT_PER_PAGE]))) or (
                    spte_to_child(k, k.sptes[sptep]) != sp):
                self.tell(sp, f"entry {sptep % SPTE_ENT_PER_PAGE} of page {sptep // SPTE_ENT_PER_PAGE} is called a parent, "
                              f"and points elsewhere: {k.sptes[sptep]:#x}")
        if len(seen) != int(n) or len(seen) != self.parents.get(sp, 0):
            self.tell(sp, f"{self.parents.get(sp, 0)} entries point here, and {n} are called parents")


cdef size_t audit_shadow(_Findings f, SpteFormat sptes, bint guest_tables) except? 0:
    cdef _Shadow run = _Shadow()
    cdef kvm *k = f.k
    cdef uint32_t sp
    cdef size_t others = 0
    run.f, run.k, run.sptes, run.guest_tables = f, k, sptes, guest_tables
    run.pages, run.roots, run.used, run.parents = [], {}, set(), {}
    run.mapped = bytearray(int(k.page_end * SPTE_ENT_PER_PAGE))
    run.hash()
    run.active()
    run.nx_list()
    run.audit_roots()
    run.count_tables()
    run.reverse_maps()
    for sp in run.pages:
        run.page(sp)
    for sp in run.pages:
        run.audit_parents(sp)
    f.check("mmu_unsync", run.unsync, k.stats.mmu_unsync)
    for sp in range(1, <uint32_t>k.page_end):
        if k.pages[sp].in_use and (k.pages[sp].special or not (k.pages[sp].tdp_mmu_page or k.pages[sp].role)):
            others += 1                             # special pages, and logs of dirty pages
    return len(run.pages) + others
