"""Roots of a shadow MMU, as `_roots.pxd` describes them."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport (
    CR3_PAE_PDPT_MASK, PAGE_SHIFT, PG_LEVEL_1G, PT32_BASE_ADDR_MASK, PT64_BASE_ADDR_MASK, PT64_INDEX_BITS, PT_PRESENT_MASK,
    ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_INVALID_MASK,
    ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT, ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_SHIFT, SHADOW_NONPRESENT_VALUE,
    SPTE_MMU_PRESENT_MASK,
)
from kvmmu.memory._memory cimport gpa_to_hva, kvmmu_read64
from kvmmu.mmu.core._kvm cimport (
    PREV_ROOTS, REQ_LOAD_MMU_PGD, REQ_TLB_FLUSH, ROOT_CURRENT, kvm, kvm_mmu, kvm_mmu_page, kvm_mmu_root, kvm_vcpu,
    memslots_of, page_list, slot_table, sp_hpa, spte_to_child,
)
from kvmmu.mmu.core._page cimport alloc_page, clear_page, first_spte, list_init, reserve_pages
from kvmmu.mmu.core._pte_list cimport reserve_descs
from kvmmu.mmu.core._slots cimport alloc_rmaps, gfn_to_memslot, kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_shadow_present_pte, make_nonleaf_spte
from kvmmu.mmu.shadow._shadow cimport get_shadow_page
from kvmmu.mmu.shadow._sync cimport sync_roots
from kvmmu.mmu.shadow._zap cimport commit_zap, is_obsolete_sp, make_pages_available, prepare_zap_page

cdef enum:
    PAGES_OF_A_ROOT = 8
    PAE_ROOTS = 4


# ---- roles -----------------------------------------------------------------------------------------------------------------

cdef uint32_t shadow_root_role(const kvm *k, uint64_t cpu_role, int level, bint nested) noexcept nogil:
    cdef uint32_t role = <uint32_t>cpu_role
    cdef int guest_level = <int>(role & ROLE_LEVEL_MASK)
    if level == 0:
        level = max(guest_level, <int>PG_LEVEL_1G)
    role = (role & ~<uint32_t>ROLE_LEVEL_MASK) | (<uint32_t>level << ROLE_LEVEL_SHIFT)
    if level == 5 and guest_level == 4:
        role |= <uint32_t>ROLE_PASSTHROUGH_MASK
    if not nested:
        role |= <uint32_t>ROLE_EFER_NX_MASK             # shadow entries need NX, whatever the guest's registers say
        if k.smep_andnot_wp and role & ROLE_CR0_WP_MASK:
            role &= ~<uint32_t>ROLE_CR4_SMEP_MASK
    return role


# ---- making ----------------------------------------------------------------------------------------------------------------

cdef inline uint64_t root_gfn(const kvm_mmu *mmu, uint64_t pgd) noexcept nogil:
    """Return the frame of the guest's root table; outside long mode the upper half of the register is ignored."""
    return (pgd & (PT64_BASE_ADDR_MASK if mmu.w.level > PG_LEVEL_1G else PT32_BASE_ADDR_MASK)) >> PAGE_SHIFT


cdef inline bint is_visible_gfn(kvm_vcpu *vcpu, uint64_t gfn) noexcept nogil:
    cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), gfn)
    return slot is not NULL and not slot.invalid


cdef int alloc_all_rmaps(kvm *k) noexcept nogil:
    """Give every slot reverse maps: they are needed from the first root on."""
    cdef slot_table *table
    cdef size_t as_id, i
    if k.has_shadow_roots:
        return 0
    for as_id in range(2):
        table = &k.slots[as_id]
        for i in range(table.count):
            if alloc_rmaps(table.slots[i]):
                return -ENOMEM
    k.has_shadow_roots = True
    return 0


cdef uint32_t top_page(kvm *k, kvm_mmu *mmu, int level) noexcept nogil:
    """Return the MMU's own page of a level that no guest table stands behind, cleared."""
    cdef uint32_t *sp = &mmu.pae_root if level == PG_LEVEL_1G else &mmu.pml4_root if level == PG_LEVEL_1G + 1 else &mmu.pml5_root
    if sp[0] == 0:
        sp[0] = alloc_page(k, 0, <uint32_t>(level | ROLE_DIRECT_MASK))
        k.pages[sp[0]].special = True
    clear_page(k, sp[0])
    return sp[0]


cdef uint32_t root_page(kvm_vcpu *vcpu, uint64_t gfn, int quadrant, int level) noexcept nogil:
    """Return the page of a guest table that a root begins with, with a reference more."""
    cdef uint32_t role = (vcpu.mmu.root_role & ~<uint32_t>ROLE_LEVEL_MASK) | (<uint32_t>level << ROLE_LEVEL_SHIFT), sp
    role |= <uint32_t>quadrant << ROLE_QUADRANT_SHIFT
    if level != <int>(vcpu.mmu.root_role & ROLE_LEVEL_MASK):
        role &= ~<uint32_t>ROLE_PASSTHROUGH_MASK
    sp = get_shadow_page(vcpu, gfn, role)
    if sp:
        vcpu.kvm.pages[sp].root_count += 1
    return sp


cdef uint64_t pdpte_of(const kvm_pagewalk *w, uint64_t pgd, int i) noexcept nogil:
    """Return a PDPTE: a register, or under nested NPT a word in memory (0 in a hole)."""
    cdef bint readonly = False
    cdef const unsigned char *hva
    if not w.pdptes_in_memory:
        return w.vcpu.pdptrs[i]
    hva = gpa_to_hva(w.mem, (pgd & CR3_PAE_PDPT_MASK) + i * sizeof(uint64_t), &readonly)
    return 0 if hva is NULL else kvmmu_read64(hva)


cdef int alloc_pae_root(kvm_vcpu *vcpu, uint64_t pgd, uint32_t *root) noexcept nogil:
    """Make a root of four pages of level 2 under pae_root, and above it the levels that the processor walks."""
    cdef kvm *k = vcpu.kvm
    cdef kvm_mmu *mmu = vcpu.mmu
    cdef const kvm_pagewalk *w = mmu.w
    cdef bint direct = (mmu.root_role & ROLE_DIRECT_MASK) != 0
    cdef int i, level, levels = <int>(mmu.root_role & ROLE_LEVEL_MASK)
    cdef uint32_t top = top_page(k, mmu, PG_LEVEL_1G), sp
    cdef uint64_t pdpte, gfn
    for i in range(PAE_ROOTS):
        if direct:
            gfn = <uint64_t>i << (2 * PT64_INDEX_BITS)
        elif mmu.root_role & ROLE_HAS_4_BYTE_GPTE_MASK:
            gfn = root_gfn(mmu, pgd)
        else:
            pdpte = pdpte_of(w, pgd, i)
            gfn = (pdpte & PT64_BASE_ADDR_MASK) >> PAGE_SHIFT
            if not pdpte & PT_PRESENT_MASK or not is_visible_gfn(vcpu, gfn):
                continue
        sp = root_page(vcpu, gfn, i if mmu.root_role & ROLE_HAS_4_BYTE_GPTE_MASK else 0, 2)
        if sp == 0:
            return -ENOMEM
        k.sptes[first_spte(top) + i] = SPTE_MMU_PRESENT_MASK | PT_PRESENT_MASK | sp_hpa(k, sp)
        if levels > PG_LEVEL_1G:
            k.sptes[first_spte(top) + i] = make_nonleaf_spte(&k.spte, sp_hpa(k, sp), False)
    for level in range(PG_LEVEL_1G + 1, levels + 1):
        sp = top_page(k, mmu, level)
        k.sptes[first_spte(sp)] = make_nonleaf_spte(&k.spte, sp_hpa(k, top), False)
        top = sp
    root[0] = top
    return 0


cdef int alloc_root(kvm_vcpu *vcpu, uint64_t pgd) noexcept nogil:
    cdef kvm_mmu *mmu = vcpu.mmu
    cdef int level = <int>(mmu.root_role & ROLE_LEVEL_MASK), r
    cdef uint64_t gfn = root_gfn(mmu, pgd)
    cdef bint direct = (mmu.root_role & ROLE_DIRECT_MASK) != 0
    mmu.root.pgd = pgd
    mmu.root.sp = 0
    if not direct and not is_visible_gfn(vcpu, gfn):
        mmu.root.valid = True                           # the dummy root
        return 0
    if direct or mmu.w.level <= PG_LEVEL_1G:
        r = alloc_pae_root(vcpu, pgd, &mmu.root.sp)
        if r:
            return r
    else:
        mmu.root.sp = root_page(vcpu, gfn, 0, level)
        if mmu.root.sp == 0:
            return -ENOMEM
    mmu.root.valid = True
    return 0


cdef int load_shadow_root(kvm_vcpu *vcpu) noexcept nogil:
    cdef kvm *k = vcpu.kvm
    cdef kvm_mmu *mmu = vcpu.mmu
    cdef int r
    if mmu.root.valid:
        return 0
    if alloc_all_rmaps(k) or reserve_pages(k, PAGES_OF_A_ROOT) or reserve_descs(&k.lists, PAGES_OF_A_ROOT):
        return -ENOMEM
    r = make_pages_available(k)
    if r:
        return r
    if mmu.root_role & ROLE_DIRECT_MASK:
        r = alloc_root(vcpu, 0)
    else:
        r = alloc_root(vcpu, mmu.w.vcpu.nested_pgd if mmu.w.is_nested else mmu.w.vcpu.cr3)
    if r:
        return r
    sync_roots(vcpu)
    vcpu.requests |= REQ_TLB_FLUSH
    return 0


# ---- leaving ---------------------------------------------------------------------------------------------------------------

cdef void put_root_page(kvm *k, uint32_t sp, page_list *invalid) noexcept nogil:
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef uint64_t i
    if page.special:
        for i in range(first_spte(sp), first_spte(sp + 1)):
            if is_shadow_present_pte(k.sptes[i]):
                put_root_page(k, spte_to_child(k, k.sptes[i]), invalid)
                k.sptes[i] = SHADOW_NONPRESENT_VALUE
        return
    page.root_count -= 1
    if page.root_count == 0 and is_obsolete_root_page(page):
        prepare_zap_page(k, sp, invalid)


cdef inline bint is_obsolete_root_page(const kvm_mmu_page *page) noexcept nogil:
    """True if a root was zapped while it was in use."""
    return (page.role & <uint32_t>ROLE_INVALID_MASK) != 0


cdef void free_root(kvm *k, kvm_mmu_root *root, page_list *invalid) noexcept nogil:
    if root.valid and root.sp:
        put_root_page(k, root.sp, invalid)
    root.valid = False
    root.sp = 0


cdef void free_shadow_roots(kvm *k, kvm_mmu *mmu, uint32_t roots) noexcept nogil:
    cdef page_list invalid
    cdef int i
    list_init(&invalid)
    for i in range(PREV_ROOTS):
        if (roots >> (i + 1)) & 1:
            free_root(k, &mmu.prev_roots[i], &invalid)
    if roots & ROOT_CURRENT:
        free_root(k, &mmu.root, &invalid)
    commit_zap(k, &invalid)


cdef bint is_obsolete_root(const kvm *k, const kvm_mmu_root *root) noexcept nogil:
    """True if a root was zapped, or has no guest's table at its top: such pages have no generation."""
    if not root.valid:
        return False
    return root.sp == 0 or k.pages[root.sp].special or is_obsolete_sp(k, &k.pages[root.sp])


cdef void free_obsolete_roots(kvm *k, kvm_mmu *mmu) noexcept nogil:
    cdef uint32_t roots = 0
    cdef int i
    if is_obsolete_root(k, &mmu.root):
        roots |= ROOT_CURRENT
    for i in range(PREV_ROOTS):
        if is_obsolete_root(k, &mmu.prev_roots[i]):
            roots |= <uint32_t>1 << (i + 1)
    if roots:
        free_shadow_roots(k, mmu, roots)


cdef void sync_prev_roots(kvm *k, kvm_mmu *mmu) noexcept nogil:
    cdef uint32_t roots = 0
    cdef int i
    for i in range(PREV_ROOTS):
        if mmu.prev_roots[i].valid and mmu.prev_roots[i].sp and k.pages[mmu.prev_roots[i].sp].unsync_children:
            roots |= <uint32_t>1 << (i + 1)
    if roots:
        free_shadow_roots(k, mmu, roots)


# ---- switching -------------------------------------------------------------------------------------------------------------

cdef bint is_root_usable(const kvm *k, const kvm_mmu *mmu, const kvm_mmu_root *root, uint64_t pgd) noexcept nogil:
    return root.valid and root.sp != 0 and root.pgd == pgd and (
        k.pages[root.sp].role == mmu.root_role and not is_obsolete_sp(k, &k.pages[root.sp]))


cdef bint fast_pgd_switch(kvm *k, kvm_mmu *mmu, uint64_t pgd) noexcept nogil:
    """Make a root of (pgd, root_role) the present one if it is or was; else there is no present one, and the oldest is freed."""
    cdef kvm_mmu_root kept
    cdef int i
    if mmu.root.valid and (mmu.root.sp == 0 or k.pages[mmu.root.sp].special):
        free_shadow_roots(k, mmu, ROOT_CURRENT)         # special pages have their contents once
    if is_root_usable(k, mmu, &mmu.root, pgd):
        return True
    if mmu.root.valid:
        for i in range(PREV_ROOTS):                     # the present one moves to the front of those before
            kept = mmu.root
            mmu.root = mmu.prev_roots[i]
            mmu.prev_roots[i] = kept
            if is_root_usable(k, mmu, &mmu.root, pgd):
                return True
        free_shadow_roots(k, mmu, ROOT_CURRENT)
        return False
    for i in range(PREV_ROOTS):
        if is_root_usable(k, mmu, &mmu.prev_roots[i], pgd):
            mmu.root = mmu.prev_roots[i]
            while i < PREV_ROOTS - 1:
                mmu.prev_roots[i] = mmu.prev_roots[i + 1]
                i += 1
            mmu.prev_roots[i].valid = False
            mmu.prev_roots[i].sp = 0
            return True
    return False


cdef void new_pgd(kvm_vcpu *vcpu, uint64_t pgd) noexcept nogil:
    cdef kvm_mmu *mmu = vcpu.mmu
    if not fast_pgd_switch(vcpu.kvm, mmu, pgd):
        return
    vcpu.requests |= REQ_LOAD_MMU_PGD
    vcpu.mmio_gva = 0
    if not mmu.root_role & ROLE_DIRECT_MASK:
        vcpu.kvm.pages[mmu.root.sp].write_flooding_count = 0


cdef uint32_t prev_roots_of(const kvm_mmu *mmu, uint64_t pgd, uint64_t mask) noexcept nogil:
    cdef uint32_t roots = 0
    cdef int i
    for i in range(PREV_ROOTS):
        if mmu.prev_roots[i].valid and mmu.prev_roots[i].pgd & mask == pgd & mask:
            roots |= <uint32_t>1 << (i + 1)
    return roots
