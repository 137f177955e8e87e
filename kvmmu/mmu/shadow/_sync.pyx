"""Synchronization of unsync pages, as `_sync.pxd` describes it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    PAGE_SHIFT, PG_LEVEL_4K, ROLE_ACCESS_MASK, ROLE_DIRECT_MASK, ROLE_LEVEL_MASK, ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_MASK,
    SPTE_ENT_PER_PAGE,
)
from kvmmu.mmu.core._kvm cimport (
    PREV_ROOTS, ROOT_CURRENT, flush_remote_tlbs, kvm, kvm_mmu, kvm_mmu_page, kvm_vcpu, page_list, sp_level,
    spte_to_child,
)
from kvmmu.mmu.core._page cimport first_spte, list_init, spte_index
from kvmmu.mmu.core._rmap cimport slot_of_sp
from kvmmu.mmu.core._slots cimport kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_last_spte, is_shadow_present_pte
from kvmmu.mmu.core._unsync cimport clear_unsync, clear_unsync_child
from kvmmu.mmu.shadow._leaf cimport sync_spte
from kvmmu.mmu.shadow._zap cimport flush_or_zap, prepare_zap_page, zap_spte

cdef enum:
    UNSYNC_BATCH = 16


cdef int sync_page(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    # what may differ between the pages of one MMU
    cdef uint64_t free = ROLE_LEVEL_MASK | ROLE_ACCESS_MASK | ROLE_QUADRANT_MASK | ROLE_PASSTHROUGH_MASK
    cdef uint64_t role = k.pages[sp].role
    cdef int i, r, flush = 0
    if role & ROLE_DIRECT_MASK or vcpu.mmu.root_role & ROLE_DIRECT_MASK or (role ^ vcpu.mmu.root_role) & ~free:
        return -1
    for i in range(SPTE_ENT_PER_PAGE):
        r = sync_spte(vcpu, first_spte(sp) + i)
        if r < 0:
            return r
        flush |= r
    return flush


cdef size_t collect_unsync(kvm *k, uint32_t sp, uint32_t *found, size_t n, size_t max) noexcept nogil:
    """Collect up to max unsync pages below sp; clear the bits of parents that have no unsync child."""
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef uint64_t word, spte, sptep
    cdef uint32_t child
    cdef size_t before
    cdef int i, bit
    for i in range(8):
        word = page.unsync_child_bitmap[i]
        if word == 0:
            continue
        for bit in range(64):
            if not (word >> bit) & 1:
                continue
            if n == max:
                return n
            sptep = first_spte(sp) + 64 * i + bit
            spte = k.sptes[sptep]
            before = n
            if is_shadow_present_pte(spte) and not is_last_spte(spte, sp_level(page)):
                child = spte_to_child(k, spte)
                if k.pages[child].unsync_children:
                    n = collect_unsync(k, child, found, n, max)
                elif k.pages[child].unsync:
                    found[n] = child
                    n += 1
            if n == before:
                clear_unsync_child(k, sptep)
    return n


cdef void mmu_sync_children(kvm_vcpu *vcpu, uint32_t sp) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint32_t found[UNSYNC_BATCH]
    cdef page_list invalid
    cdef kvm_memory_slot *slot
    cdef bint is_protected, flush = False
    cdef size_t i, n
    cdef int r
    list_init(&invalid)
    while True:
        n = collect_unsync(k, sp, found, 0, UNSYNC_BATCH)
        if n == 0:
            break
        is_protected = False
        for i in range(n):
            slot = slot_of_sp(k, &k.pages[found[i]], k.pages[found[i]].gfn)
            if slot is not NULL:
                is_protected |= k.write_protect_gfn(k, slot, k.pages[found[i]].gfn, PG_LEVEL_4K)
        if is_protected:
            flush_remote_tlbs(k)
            flush = False
        for i in range(n):
            if not k.pages[found[i]].unsync:            # found twice, or zapped with another one
                continue
            clear_unsync(k, found[i])
            r = sync_page(vcpu, found[i])
            if r < 0:
                prepare_zap_page(k, found[i], &invalid)
            flush |= r > 0
    flush_or_zap(k, &invalid, flush)


cdef void sync_root(kvm_vcpu *vcpu, uint32_t root) noexcept nogil:
    """Synchronize a root, or the roots below one that no guest table stands behind."""
    cdef kvm *k = vcpu.kvm
    cdef uint64_t spte
    cdef int i
    if not k.pages[root].special:
        if k.pages[root].unsync_children:
            mmu_sync_children(vcpu, root)
        return
    for i in range(SPTE_ENT_PER_PAGE):
        spte = k.sptes[first_spte(root) + i]
        if is_shadow_present_pte(spte):
            sync_root(vcpu, spte_to_child(k, spte))


cdef void sync_roots(kvm_vcpu *vcpu) noexcept nogil:
    cdef kvm_mmu *mmu = vcpu.mmu
    if mmu.root_role & ROLE_DIRECT_MASK or not mmu.root.valid:
        return
    vcpu.mmio_gva = 0
    if mmu.root.sp:
        sync_root(vcpu, mmu.root.sp)


cdef void invalidate_addr_in_root(kvm_vcpu *vcpu, uint64_t addr, uint32_t root) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef uint64_t gfn = addr >> PAGE_SHIFT, sptep, spte
    cdef uint32_t sp = root
    cdef kvm_mmu_page *page
    cdef int r
    while sp:
        page = &k.pages[sp]
        sptep = first_spte(sp) + spte_index(gfn, sp_level(page))
        if page.unsync:
            r = sync_spte(vcpu, sptep)
            if r < 0:
                zap_spte(k, sptep, NULL)
            if r:
                flush_remote_tlbs(k)
        spte = k.sptes[sptep]
        if not (page.unsync_children or page.special) or not is_shadow_present_pte(spte) or is_last_spte(spte, sp_level(page)):
            return
        sp = spte_to_child(k, spte)


cdef void mmu_invalidate_addr(kvm_vcpu *vcpu, kvm_mmu *mmu, uint64_t addr, uint32_t roots) noexcept nogil:
    cdef int i
    if mmu.root_role & ROLE_DIRECT_MASK or not roots:
        return
    if vcpu.mmio_gva == addr >> PAGE_SHIFT << PAGE_SHIFT:
        vcpu.mmio_gva = 0
    if roots & ROOT_CURRENT and mmu.root.valid:
        invalidate_addr_in_root(vcpu, addr, mmu.root.sp)
    for i in range(PREV_ROOTS):
        if (roots >> (i + 1)) & 1 and mmu.prev_roots[i].valid:
            invalidate_addr_in_root(vcpu, addr, mmu.prev_roots[i].sp)
