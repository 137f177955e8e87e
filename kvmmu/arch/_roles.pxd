"""Roles: what the registers say about the shape of the guest's tables, packed into one 64-bit word.

Low half the page role, high half the extended role; the bits are `ROLE_*` of `_bits.h`. Equal words mean equal formats, so a
word that did not change is the licence to do no work.
"""

from libc.stdint cimport uint64_t

from kvmmu.arch._bits cimport (
    ACC_ALL, CR0_PG_MASK, CR0_WP_MASK, CR4_LA57_MASK, CR4_LAM_SUP_MASK, CR4_LASS_MASK, CR4_PAE_MASK, CR4_PKE_MASK, CR4_PKS_MASK,
    CR4_PSE_MASK, CR4_SMAP_MASK, CR4_SMEP_MASK, EFER_LMA_MASK, EFER_NX_MASK, EFER_UAIE_MASK, ROLE_ACCESS_SHIFT,
    ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_LA57_MASK,
    ROLE_EXT_CR4_LAM_SUP_MASK, ROLE_EXT_CR4_LASS_MASK, ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PKS_MASK, ROLE_EXT_CR4_PSE_MASK,
    ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EFER_LMA_MASK, ROLE_EXT_EFER_UAIE_MASK, ROLE_EXT_HAS_PFERR_FETCH_MASK,
    ROLE_EXT_VALID_MASK, ROLE_GUEST_MODE_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_LEVEL_SHIFT, ROLE_SMAP_ANDNOT_WP_MASK,
    ROLE_SMM_SHIFT,
)

cdef struct kvm_mmu_role_regs:
    uint64_t cr0
    uint64_t cr4
    uint64_t efer


cdef inline uint64_t calc_cpu_role(const kvm_mmu_role_regs *regs, bint smm, bint guest_mode) noexcept nogil:
    """Return the cpu_role of these registers. Pure."""
    cdef uint64_t role = (ACC_ALL << ROLE_ACCESS_SHIFT) | ROLE_EXT_VALID_MASK
    cdef bint lma, wp, nx, smep, smap
    role |= <uint64_t>smm << ROLE_SMM_SHIFT
    if guest_mode:
        role |= ROLE_GUEST_MODE_MASK
    if not regs.cr0 & CR0_PG_MASK:
        return role | ROLE_DIRECT_MASK

    lma = (regs.efer & EFER_LMA_MASK) != 0
    nx = (regs.efer & EFER_NX_MASK) != 0
    wp = (regs.cr0 & CR0_WP_MASK) != 0
    smep = (regs.cr4 & CR4_SMEP_MASK) != 0
    smap = (regs.cr4 & CR4_SMAP_MASK) != 0
    if nx:
        role |= ROLE_EFER_NX_MASK
    if wp:
        role |= ROLE_CR0_WP_MASK
    if smep:
        role |= ROLE_CR4_SMEP_MASK
    if smap:
        role |= ROLE_EXT_CR4_SMAP_MASK
        if not wp:
            role |= ROLE_SMAP_ANDNOT_WP_MASK
    if regs.cr4 & CR4_PSE_MASK:
        role |= ROLE_EXT_CR4_PSE_MASK
    if nx or smep:
        role |= ROLE_EXT_HAS_PFERR_FETCH_MASK
    if not regs.cr4 & CR4_PAE_MASK:
        return role | ROLE_HAS_4_BYTE_GPTE_MASK | (<uint64_t>2 << ROLE_LEVEL_SHIFT)
    if not lma:
        return role | (<uint64_t>3 << ROLE_LEVEL_SHIFT)

    role |= ROLE_EXT_EFER_LMA_MASK
    if regs.cr4 & CR4_PKE_MASK:
        role |= ROLE_EXT_CR4_PKE_MASK
    if regs.cr4 & CR4_PKS_MASK:
        role |= ROLE_EXT_CR4_PKS_MASK
    if regs.cr4 & CR4_LASS_MASK:
        role |= ROLE_EXT_CR4_LASS_MASK
    if regs.cr4 & CR4_LAM_SUP_MASK:
        role |= ROLE_EXT_CR4_LAM_SUP_MASK
    if regs.efer & EFER_UAIE_MASK:
        role |= ROLE_EXT_EFER_UAIE_MASK
    if regs.cr4 & CR4_LA57_MASK:
        return role | ROLE_EXT_CR4_LA57_MASK | (<uint64_t>5 << ROLE_LEVEL_SHIFT)
    return role | (<uint64_t>4 << ROLE_LEVEL_SHIFT)
