/* What an entry of each format means. The format is a constant at every use, so that the compiler keeps one branch. */
#ifndef KVMMU_GPTE_H
#define KVMMU_GPTE_H

#include "kvmmu/arch/_format.h"

enum kvmmu_format { KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT };

/* The capitals are arithmetic alone: on a 64-bit word, or on a vector of them. */

/* The entry with every restricting bit inverted, so that rights accumulate by AND. */
#define KVMMU_GPTE_RIGHTS(format, pte) ((pte) ^ ((format) == KVMMU_FORMAT_64 ? PT64_NX_MASK : 0))

/* ACC_* of accumulated rights: P, W and U stand in place; execute is NX inverted, and always there without NX.
 * EPT: R and W stand in place; X and the user-execute bit are shifted there. */
#define KVMMU_GPTE_ACCESS(format, rights)                                                                    \
    ((format) == KVMMU_FORMAT_EPT  ? ((rights) & (ACC_READ_MASK | ACC_WRITE_MASK)) |                         \
                                         ((rights) << EPT_EXECUTABLE_TO_ACC_SHIFT & ACC_EXEC_MASK) |         \
                                         ((rights) >> EPT_USER_EXECUTABLE_TO_ACC_SHIFT & ACC_USER_EXEC_MASK) \
     : (format) == KVMMU_FORMAT_32 ? ((rights) & (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK)) | ACC_EXEC_MASK \
                                   : ((rights) & (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK)) |         \
                                         ((rights) >> (PT64_NX_SHIFT - ACC_EXEC_SHIFT) & ACC_EXEC_MASK))

/* ACC_SHADOW_STACK if a leaf has the form of a shadow-stack page: W clear and D set; in EPT the bit of its own. IN upper: rights of
 * the entries above it, all of which must have W. */
#define KVMMU_GPTE_SHADOW_STACK(format, upper, pte)                                                              \
    ((upper) << ACC_WRITE_TO_SHADOW_STACK_SHIFT & ACC_SHADOW_STACK_MASK &                                        \
     (pte) >> (((format) == KVMMU_FORMAT_EPT ? EPT_SHADOW_STACK_SHIFT : PT_DIRTY_SHIFT) - ACC_SHADOW_STACK_SHIFT) & \
     ~((pte) << ACC_WRITE_TO_SHADOW_STACK_SHIFT & ((format) == KVMMU_FORMAT_EPT ? 0 : ~UINT64_C(0))))

#define KVMMU_GPTE_PKEY(format, pte) ((pte) >> PT64_PKEY_SHIFT & ((format) == KVMMU_FORMAT_64 ? PT64_PKEY_MASK : 0))

#define KVMMU_LEVEL_SHIFT(format, level) \
    (PAGE_SHIFT + ((format) == KVMMU_FORMAT_32 ? PT32_INDEX_BITS : PT64_INDEX_BITS) * ((level)-1))

/* Physical address of addr in the page that a leaf entry maps. IN offset: mask of the offset in such a page;
 * pse36_mask: address bits in the low half of a 4M PDE, 0 for other entries. */
#define KVMMU_LEAF_GPA(format, pte, offset, addr, pse36_mask)                                                   \
    (((pte) & ((format) == KVMMU_FORMAT_32 ? PT32_BASE_ADDR_MASK : PT64_BASE_ADDR_MASK) & ~(offset)) |          \
     ((format) == KVMMU_FORMAT_32 ? ((pte) & (pse36_mask)) << PT32_PSE36_TO_PA_SHIFT : (pte)&0) | ((addr) & (offset)))

/* Not zero: a present entry is malformed. IN rsvd0, rsvd1: reserved bits of its level with bit 7 clear, set. */
#define KVMMU_GPTE_MALFORMED(format, rsvd0, rsvd1, bad_mt_xwr, pte) \
    (KVMMU_RSVD_BITS(rsvd0, rsvd1, pte) | ((format) == KVMMU_FORMAT_EPT ? KVMMU_BAD_MT_XWR(bad_mt_xwr, pte) : (pte)&0))

KVMMU_INLINE int kvmmu_level_shift(int format, int level)
{
    return KVMMU_LEVEL_SHIFT(format, level);
}

KVMMU_INLINE uint64_t kvmmu_gpte_rights(int format, uint64_t pte)
{
    return KVMMU_GPTE_RIGHTS(format, pte);
}

KVMMU_INLINE uint64_t kvmmu_gpte_access(int format, uint64_t rights)
{
    return KVMMU_GPTE_ACCESS(format, rights);
}

KVMMU_INLINE uint64_t kvmmu_gpte_shadow_stack(int format, uint64_t upper, uint64_t pte)
{
    return KVMMU_GPTE_SHADOW_STACK(format, upper, pte);
}

KVMMU_INLINE uint32_t kvmmu_gpte_pkey(int format, uint64_t pte)
{
    return (uint32_t)KVMMU_GPTE_PKEY(format, pte);
}

KVMMU_INLINE uint64_t kvmmu_leaf_gpa(int format, uint64_t pte, uint32_t level, uint64_t addr, uint64_t pse36_mask)
{
    uint64_t offset = (UINT64_C(1) << KVMMU_LEVEL_SHIFT(format, level)) - 1;
    uint64_t high = level > PG_LEVEL_4K ? pse36_mask : 0;
    return KVMMU_LEAF_GPA(format, pte, offset, addr, high);
}

KVMMU_INLINE uint64_t kvmmu_gpte_malformed(int format, uint64_t rsvd0, uint64_t rsvd1, uint64_t bad_mt_xwr, uint64_t pte)
{
    return KVMMU_GPTE_MALFORMED(format, rsvd0, rsvd1, bad_mt_xwr, pte);
}

/* True if all bits above the linear-address width are copies of its highest bit. IN shift: 64 less that width; 0: any address is. */
KVMMU_INLINE int kvmmu_is_canonical(uint64_t addr, int shift)
{
    return (uint64_t)((int64_t)(addr << shift) >> shift) == addr;
}

/* The number of the PDPTE of an address in PAE paging. */
KVMMU_INLINE uint64_t kvmmu_pdpte_index(uint64_t addr)
{
    return addr >> PT32_PAE_INDEX_SHIFT & PT32_PAE_INDEX_MASK;
}

/* Return the address in memory of PDPTE number `index` of PAE paging. IN root: CR3, or nested CR3 */
KVMMU_INLINE uint64_t kvmmu_pdpte_gpa(uint64_t root, uint64_t index)
{
    return (root & CR3_PAE_PDPT_MASK) + index * sizeof(uint64_t);
}

/* True if PDPTE leads to a page directory. IN rsvd_mask: its reserved bits */
KVMMU_INLINE int kvmmu_is_good_pdpte(uint64_t pdpte, uint64_t rsvd_mask)
{
    return (pdpte & (PT_PRESENT_MASK | rsvd_mask)) == PT_PRESENT_MASK;
}

#endif /* KVMMU_GPTE_H */
