"""INVEPT and INVVPID by L1; see `_l1_flushes.pxd`."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport PT64_BASE_ADDR_MASK, ROLE_GUEST_MODE_MASK
from kvmmu.machine._state cimport machine
from kvmmu.mmu.core._kvm cimport PREV_ROOTS, kvm, kvm_mmu, kvm_mmu_root, sp_hpa
from kvmmu.mmu.shadow._roots cimport ROOT_CURRENT, free_shadow_roots, prev_roots_of
from kvmmu.tlb._tlb cimport tlb_flush_space_of, tlb_invalidate_page_in

cdef enum:
    INVVPID_ADDRESS = 0
    INVVPID_SINGLE_RETAINING_GLOBALS = 3


cdef inline bint is_nested_space(uint64_t space) noexcept nogil:
    """True if a space of the TLB is a root under L1's second stage, which is a host address; others are roles, of 32 bits."""
    return space >> 32 != 0


cdef inline bint is_of_guest_mode(const kvm *k, const kvm_mmu_root *root) noexcept nogil:
    """True if a root is L2's."""
    return (k.pages[root.sp].role & <uint32_t>ROLE_GUEST_MODE_MASK) != 0


cdef void flush_ept(machine *m, bint every, uint64_t eptp) noexcept nogil:
    cdef kvm_mmu *mmu = &m.vcpu.guest_mmu
    cdef uint64_t mask = 0 if every else PT64_BASE_ADDR_MASK
    cdef uint32_t roots = prev_roots_of(mmu, eptp & mask, mask) << 1
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
