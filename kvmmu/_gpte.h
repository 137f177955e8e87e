/* What an entry of each format means. The format is a constant at every use, so that the compiler keeps one branch. */
#ifndef KVMMU_GPTE_H
#define KVMMU_GPTE_H

#include "_format.h"

enum kvmmu_format { KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT };

/* The entry with every restricting bit inverted, so that rights accumulate by AND. */
KVMMU_INLINE uint64_t kvmmu_gpte_rights(int format, uint64_t pte)
{
    return format == KVMMU_FORMAT_64 ? pte ^ PT64_NX_MASK : pte;
}

/* ACC_* of accumulated rights: P, W and U stand in place; execute is NX inverted, and always there without NX.
 * EPT: R and W stand in place; X and the user-execute bit are shifted there. */
KVMMU_INLINE uint64_t kvmmu_gpte_access(int format, uint64_t rights)
{
    uint64_t rwu = rights & (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK);
    if (format == KVMMU_FORMAT_EPT)
        return (rights & (ACC_READ_MASK | ACC_WRITE_MASK)) | ((rights << EPT_EXECUTABLE_TO_ACC_SHIFT) & ACC_EXEC_MASK) |
               ((rights >> EPT_USER_EXECUTABLE_TO_ACC_SHIFT) & ACC_USER_EXEC_MASK);
    if (format == KVMMU_FORMAT_32)
        return rwu | ACC_EXEC_MASK;
    return rwu | ((rights >> (PT64_NX_SHIFT - ACC_EXEC_SHIFT)) & ACC_EXEC_MASK);
}

KVMMU_INLINE uint32_t kvmmu_gpte_pkey(int format, uint64_t pte)
{
    return format == KVMMU_FORMAT_64 ? (uint32_t)((pte >> PT64_PKEY_SHIFT) & PT64_PKEY_MASK) : 0;
}

KVMMU_INLINE uint32_t kvmmu_level_shift(int format, uint32_t level)
{
    return PAGE_SHIFT + (format == KVMMU_FORMAT_32 ? PT32_INDEX_BITS : PT64_INDEX_BITS) * (level - 1);
}

/* Physical address of addr in the page that a leaf entry of this level maps. IN pse36_mask: address bits in the low half of a 4M PDE. */
KVMMU_INLINE uint64_t kvmmu_leaf_gpa(int format, uint64_t pte, uint32_t level, uint64_t addr, uint64_t pse36_mask)
{
    uint64_t offset = (UINT64_C(1) << kvmmu_level_shift(format, level)) - 1;
    uint64_t base = (format == KVMMU_FORMAT_32 ? PT32_BASE_ADDR_MASK : PT64_BASE_ADDR_MASK) & ~offset;
    uint64_t high = format == KVMMU_FORMAT_32 && level > PG_LEVEL_4K ? (pte & pse36_mask) << PT32_PSE36_TO_PA_SHIFT : 0;
    return (pte & base) | high | (addr & offset);
}

/* Whether a present entry is malformed. IN rsvd0, rsvd1: reserved bits of its level with bit 7 clear, set. */
KVMMU_INLINE uint64_t kvmmu_gpte_malformed(int format, uint64_t rsvd0, uint64_t rsvd1, uint64_t bad_mt_xwr, uint64_t pte)
{
    uint64_t rsvd = kvmmu_rsvd_bits(rsvd0, rsvd1, pte);
    return format == KVMMU_FORMAT_EPT ? rsvd | kvmmu_bad_mt_xwr(bad_mt_xwr, pte) : rsvd;
}

#endif /* KVMMU_GPTE_H */
