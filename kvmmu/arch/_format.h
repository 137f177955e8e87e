/* The description of a page-table format and the tests of an entry against it, without branches, for one entry or for lanes. */
#ifndef KVMMU_FORMAT_H
#define KVMMU_FORMAT_H

#include <stdint.h>

#include "kvmmu/arch/_bits.h"

#define KVMMU_INLINE static inline __attribute__((always_inline))

#define KVMMU_ACCESS_BYTES 64 /* an access byte without SHADOW_STACK; a power of two */
#define KVMMU_ACCESS_INFO_SHIFT 16

struct kvm_page_format {
    uint64_t rsvd_bits_mask[2][5];       /* [bit 7 of the entry][level - 1]: bits that must be zero */
    uint64_t bad_mt_xwr;                 /* EPT: bit n set: an entry whose low six bits are n is malformed */
    uint32_t pkru_mask;                  /* AD and WD for each error code with U of the translation as bit 3, at that bit */
    uint16_t permissions[16];            /* [access >> 1]: bit n set: rights n (ACC_*) do not allow it */
    uint32_t access_info[KVMMU_ACCESS_BYTES];  /* [access byte]: its permissions; from bit 16 the access with IMPLICIT resolved */
};

/* The capitals below are arithmetic alone: on a 64-bit word, or on a vector of them. */

/* AD and WD of a protection key that deny the access. The offset is the error code with the U bit of the translation as RSVD. */
#define KVMMU_PKEY_DENIED(pkru_mask, pkru, pte_access, pte_pkey, access)      \
    (((pkru) >> ((pte_pkey)*PKRU_BITS_PER_KEY)) &                             \
     ((pkru_mask) >> (((access)&ACCESS_PFEC_MASK) | ((pte_access)&ACC_USER_MASK) << (PFERR_RSVD_SHIFT - 2))) & 3)

/* What of an entry its format reserves; not zero: malformed, if it is present. */
#define KVMMU_RSVD_BITS(rsvd0, rsvd1, pte) \
    ((pte) & (((rsvd1) & -((pte) >> PT_PAGE_SIZE_SHIFT & 1)) | ((rsvd0) & (((pte) >> PT_PAGE_SIZE_SHIFT & 1) - 1))))

/* EPT: 1 for a bad memory type or combination of rights of a present entry; user execute counts as execute. */
#define KVMMU_BAD_MT_XWR(bad_mt_xwr, pte)                                                                                  \
    ((bad_mt_xwr) >>                                                                                                       \
         (((pte) | ((pte) & EPT_USER_EXECUTABLE_MASK) >> (EPT_USER_EXECUTABLE_SHIFT - EPT_EXECUTABLE_SHIFT)) &             \
          EPT_MT_XWR_MASK) &                                                                                               \
     1)

/* An access with IMPLICIT resolved: an implicit access is a supervisor's, and EFLAGS.AC does not count for it. The result is below
 * KVMMU_ACCESS_BYTES whatever the byte is, which somebody may have changed since it was checked. */
KVMMU_INLINE uint32_t kvmmu_explicit_access(uint32_t access)
{
    uint32_t implicit = -(uint32_t)((access & (uint32_t)ACCESS_IMPLICIT_MASK) != 0);
    return access & (KVMMU_ACCESS_BYTES - 1) & ~(implicit & (uint32_t)(ACCESS_AC_MASK | ACCESS_USER_MASK | ACCESS_IMPLICIT_MASK));
}

KVMMU_INLINE uint64_t kvmmu_pkey_denied(uint64_t pkru_mask, uint64_t pkru, uint64_t pte_access, uint64_t pte_pkey, uint64_t access)
{
    return KVMMU_PKEY_DENIED(pkru_mask, pkru, pte_access, pte_pkey, access);
}

KVMMU_INLINE uint64_t kvmmu_rsvd_bits(uint64_t rsvd0, uint64_t rsvd1, uint64_t pte)
{
    return KVMMU_RSVD_BITS(rsvd0, rsvd1, pte);
}

KVMMU_INLINE uint64_t kvmmu_bad_mt_xwr(uint64_t bad_mt_xwr, uint64_t pte)
{
    return KVMMU_BAD_MT_XWR(bad_mt_xwr, pte);
}

#endif /* KVMMU_FORMAT_H */
