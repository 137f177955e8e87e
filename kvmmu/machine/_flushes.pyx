"""Invalidations by the guest, as `_flushes.pxd` describes them."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport CR3_PCID_MASK, CR4_PCIDE_MASK, PT64_BASE_ADDR_MASK, ROLE_GUEST_MODE_MASK
from kvmmu.arch._gpte cimport kvmmu_is_canonical
from kvmmu.machine._mmus cimport mmu_width
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine
from kvmmu.mmu.core._kvm cimport (
    PREV_ROOTS, REQ_MMU_SYNC, REQ_TLB_FLUSH, REQ_TLB_FLUSH_GUEST, ROOT_CURRENT, kvm, kvm_mmu, kvm_mmu_root, sp_hpa,
)
from kvmmu.mmu.kvm._entry cimport free_mmu_roots
from kvmmu.mmu.shadow._roots cimport free_shadow_roots, new_pgd, prev_roots_of
from kvmmu.mmu.shadow._sync cimport mmu_invalidate_addr
from kvmmu.tlb._tlb cimport (
    tlb_flush_pcid, tlb_flush_space, tlb_flush_space_of, tlb_invalidate_page_in, tlb_invlpg, tlb_invpcid_address,
)

cdef enum:
    INVPCID_ADDRESS = 0
    INVPCID_SINGLE = 1
    INVPCID_ALL_WITH_GLOBALS = 2
    INVVPID_ADDRESS = 0
    INVVPID_SINGLE_RETAINING_GLOBALS = 3


# ---- an address ----------------------------------------------------------------------------------------------------------

cdef int invalidate(Modes modes, kvm_mmu *mmu, uint64_t addr, uint32_t roots) except -1:
    """Let the tables that shadow the guest's agree with them at an address, if their MMU is active."""
    if mmu == modes.m.mmu:
        modes.kvm.sync()
        mmu_invalidate_addr(modes.m.vcpu, mmu, addr, roots)
    return 0


cdef int invalidate_gva(Modes modes, uint64_t gva, uint32_t roots) except -1:
    cdef machine *m = &modes.m
    cdef uint64_t addr = gva & m.hw.gva_mask
    cdef int shift = modes.widest_shift if m.hw.canonical_shift else 0
    if not kvmmu_is_canonical(addr, shift):
        return 0
    tlb_invlpg(m.tlb, addr)
    if not m.k.tdp_enabled:
        invalidate(modes, &m.vcpu.root_mmu, addr, roots)
    return 0


cdef int invalidate_ngpa(Modes modes, uint64_t ngpa, uint32_t roots) except -1:
    cdef machine *m = &modes.m
    if m.mmu == &m.vcpu.guest_mmu and ngpa >> mmu_width(m.mmu):
        return 0
    invalidate(modes, &m.vcpu.guest_mmu, ngpa, roots)
    m.vcpu.requests |= REQ_TLB_FLUSH
    return 0


# ---- a PCID --------------------------------------------------------------------------------------------------------------

cdef inline uint32_t active_pcid(const machine *m) noexcept nogil:
    return <uint32_t>(m.arch.cr3 & CR3_PCID_MASK) if m.arch.cr4 & CR4_PCIDE_MASK else 0


cdef void invalidate_pcid(machine *m, uint32_t pcid) noexcept nogil:
    """Let the tables that shadow the guest's agree with them at the next entry, those of one PCID; roots before are left."""
    if pcid == active_pcid(m):
        m.vcpu.requests |= REQ_MMU_SYNC | REQ_TLB_FLUSH
    if m.arch.cr4 & CR4_PCIDE_MASK:                     # else every load of CR3 synchronizes
        free_shadow_roots(m.k, &m.vcpu.root_mmu, prev_roots_of(&m.vcpu.root_mmu, pcid, CR3_PCID_MASK))


cdef int flush_by_pcid(Modes modes, int type, uint32_t pcid, uint64_t gva) except -1:
    cdef machine *m = &modes.m
    cdef bint shadowed = not m.k.tdp_enabled
    if type == INVPCID_ADDRESS:
        tlb_invpcid_address(m.tlb, pcid, gva)
        if shadowed:
            m.k.stats.invlpg += 1
            invalidate(modes, &m.vcpu.root_mmu, gva, prev_roots_of(&m.vcpu.root_mmu, pcid, CR3_PCID_MASK) | (
                <uint32_t>ROOT_CURRENT if pcid == active_pcid(m) else 0))
    elif type == INVPCID_SINGLE:
        tlb_flush_pcid(m.tlb, pcid)
        if shadowed:
            invalidate_pcid(m, pcid)
    else:
        tlb_flush_space(m.tlb, type == INVPCID_ALL_WITH_GLOBALS)
        if shadowed:
            m.vcpu.requests |= REQ_TLB_FLUSH_GUEST
    return 0


# ---- registers -----------------------------------------------------------------------------------------------------------

cdef int load_cr3(Modes modes, uint64_t before, bint noflush, bint pdptrs_changed) except -1:
    cdef machine *m = &modes.m
    cdef uint64_t cr3 = m.arch.cr3
    if not noflush:
        tlb_flush_pcid(m.tlb, active_pcid(m))
    if m.k.tdp_enabled:
        return 0
    modes.kvm.sync()
    if pdptrs_changed:
        free_shadow_roots(m.k, &m.vcpu.root_mmu, ROOT_CURRENT)
    if cr3 != before:
        new_pgd(m.vcpu, cr3)
    if not noflush:
        invalidate_pcid(m, active_pcid(m))
    return 0


cdef void leave_roots(machine *m) noexcept nogil:
    if not m.k.tdp_enabled:
        free_mmu_roots(m.vcpu, &m.vcpu.root_mmu)


cdef void flush_all(machine *m) noexcept nogil:
    tlb_flush_space(m.tlb, True)
    if not m.k.tdp_enabled:
        m.vcpu.requests |= REQ_TLB_FLUSH_GUEST


# ---- L1 invalidates what is L2's -----------------------------------------------------------------------------------------

cdef inline bint is_nested_space(uint64_t space) noexcept nogil:
    """True if a space of the TLB is a root under L1's second stage: a host address. Other spaces are roles, of 32 bits."""
    return space >> 32 != 0


cdef inline bint is_of_guest_mode(const kvm *k, const kvm_mmu_root *root) noexcept nogil:
    """True if a root is L2's."""
    return (k.pages[root.sp].role & <uint32_t>ROLE_GUEST_MODE_MASK) != 0


cdef void flush_ept(machine *m, bint every, uint64_t eptp) noexcept nogil:
    cdef kvm_mmu *mmu = &m.vcpu.guest_mmu
    cdef uint64_t mask = 0 if every else PT64_BASE_ADDR_MASK
    cdef uint32_t roots = prev_roots_of(mmu, eptp & mask, mask)
    cdef int i
    if mmu.root.valid and (mmu.root.pgd ^ eptp) & mask == 0:
        roots |= ROOT_CURRENT
        tlb_flush_space_of(m.tlb, sp_hpa(m.k, mmu.root.sp), True)
    for i in range(PREV_ROOTS):
        if (roots >> (i + 1)) & 1:
            tlb_flush_space_of(m.tlb, sp_hpa(m.k, mmu.prev_roots[i].sp), True)
    if every:
        for i in range(1, m.tlb.nr_spaces):
            if is_nested_space(m.tlb.spaces[i]):
                tlb_flush_space_of(m.tlb, m.tlb.spaces[i], True)
    free_shadow_roots(m.k, mmu, roots)


cdef void flush_vpid(machine *m, int type, uint64_t addr) noexcept nogil:
    cdef kvm_mmu *mmu = &m.vcpu.root_mmu
    cdef uint64_t space
    cdef uint32_t roots = 0
    cdef int i
    for i in range(1, m.tlb.nr_spaces):
        space = m.tlb.spaces[i]
        if not is_nested_space(space) and not space & ROLE_GUEST_MODE_MASK:
            continue
        if type == INVVPID_ADDRESS:
            tlb_invalidate_page_in(m.tlb, space, addr)
        else:
            tlb_flush_space_of(m.tlb, space, type != INVVPID_SINGLE_RETAINING_GLOBALS)
    if m.k.tdp_enabled:
        return
    for i in range(PREV_ROOTS):                         # L1 and L2 share this MMU
        if mmu.prev_roots[i].valid and is_of_guest_mode(m.k, &mmu.prev_roots[i]):
            roots |= <uint32_t>2 << i
    free_shadow_roots(m.k, mmu, roots)
