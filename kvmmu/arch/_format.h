/* The description of a page-table format and the tests of an entry against it, without branches, for one entry or for lanes. */
#ifndef KVMMU_FORMAT_H
#define KVMMU_FORMAT_H

#include <stdint.h>

#include "kvmmu/arch/_bits.h"

#define KVMMU_INLINE static inline __attribute__((always_inline))

#define KVMMU_ACCESS_BYTES 256
/* The parts of access_info[], all that a format says of one access: which rights deny it (bit n: rights n, ACC_* and
 * ACC_SHADOW_STACK), the access with IMPLICIT resolved, and AD and WD of keys that count for it, in supervisor and in user pages. */
#define KVMMU_ACCESS_INFO_SHIFT 32
#define KVMMU_ACCESS_KEYS_SHIFT 40
#define KVMMU_ACCESS_KEYS_USER_SHIFT 4 /* as high as ACC_USER_MASK is, above the other */

struct kvm_page_format {
    uint64_t rsvd_bits_mask[2][5];       /* [bit 7 of the entry][level - 1]: bits that must be zero */
    uint64_t bad_mt_xwr;                 /* EPT: bit n set: an entry whose low six bits are n is malformed */
    /* AD and WD for each error code with U of the translation as bit 3, at that bit: of PKRU with U, of PKRS without */
    uint32_t pkru_mask;
    uint16_t permissions[16];            /* [access >> 1]: bit n set: rights n (ACC_*) do not allow it */
    uint64_t access_info[KVMMU_ACCESS_BYTES]; /* [access byte] */
};

/* Accesses beyond this are implicit, to shadow stacks, or none at all: fast forms that do not know these leave them to others. */
#define KVMMU_COMMON_ACCESS_MAX (ACCESS_IMPLICIT_MASK - 1)
enum { KVMMU_USER_SHIFT = 2, KVMMU_AC_SHIFT = 3, KVMMU_IMPLICIT_SHIFT = 5 };
_Static_assert(ACCESS_USER_MASK == KVMMU_BIT(KVMMU_USER_SHIFT) && ACCESS_AC_MASK == KVMMU_BIT(KVMMU_AC_SHIFT) &&
                   ACCESS_IMPLICIT_MASK == KVMMU_BIT(KVMMU_IMPLICIT_SHIFT),
               "IMPLICIT is shifted to what it clears");

/* The capitals below are arithmetic alone: on a 64-bit word, or on a vector of them. */

/* AD and WD of a protection key that deny the access. IN keys: PKRS, and PKRU from PKRU_SHIFT; access_info: of the access. */
#define KVMMU_PKEY_DENIED(keys, pte_access, pte_pkey, access_info)                                                \
    (((keys) >> ((pte_pkey)*PKRU_BITS_PER_KEY | ((pte_access)&ACC_USER_MASK) << KVMMU_USER_TO_PKRU_SHIFT)) &      \
     ((access_info) >> KVMMU_ACCESS_KEYS_SHIFT >> ((pte_access)&ACC_USER_MASK)) & 3)
#define KVMMU_USER_TO_PKRU_SHIFT 3
_Static_assert(ACC_USER_MASK << KVMMU_USER_TO_PKRU_SHIFT == PKRU_SHIFT && ACC_USER_MASK == KVMMU_ACCESS_KEYS_USER_SHIFT,
               "U of a translation, shifted, is how far to shift the key registers");

/* What of an entry its format reserves; not zero: malformed, if it is present. */
#define KVMMU_RSVD_BITS(rsvd0, rsvd1, pte) \
    ((pte) & (((rsvd1) & -((pte) >> PT_PAGE_SIZE_SHIFT & 1)) | ((rsvd0) & (((pte) >> PT_PAGE_SIZE_SHIFT & 1) - 1))))

/* EPT: 1 for a bad memory type or combination of rights of a present entry; user execute counts as execute. */
#define KVMMU_BAD_MT_XWR(bad_mt_xwr, pte)                                                                                  \
    ((bad_mt_xwr) >>                                                                                                       \
         (((pte) | ((pte) & EPT_USER_EXECUTABLE_MASK) >> (EPT_USER_EXECUTABLE_SHIFT - EPT_EXECUTABLE_SHIFT)) &             \
          EPT_MT_XWR_MASK) &                                                                                               \
     1)

/* An access with IMPLICIT resolved: an implicit access is a supervisor's, and EFLAGS.AC does not count for it. IMPLICIT itself stays,
 * because linear addresses of such accesses have no tags. */
KVMMU_INLINE uint32_t kvmmu_resolved_access(uint32_t access)
{
    const uint32_t implicit = access & (uint32_t)ACCESS_IMPLICIT_MASK;
    return access & ~(implicit >> (KVMMU_IMPLICIT_SHIFT - KVMMU_USER_SHIFT) | implicit >> (KVMMU_IMPLICIT_SHIFT - KVMMU_AC_SHIFT));
}

/* The same without IMPLICIT: what indexes permissions[], shifted. */
KVMMU_INLINE uint32_t kvmmu_explicit_access(uint32_t access)
{
    return kvmmu_resolved_access(access) & ~(uint32_t)ACCESS_IMPLICIT_MASK;
}

KVMMU_INLINE uint64_t kvmmu_pkey_denied(uint64_t keys, uint64_t pte_access, uint64_t pte_pkey, uint64_t access_info)
{
    return KVMMU_PKEY_DENIED(keys, pte_access, pte_pkey, access_info);
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
