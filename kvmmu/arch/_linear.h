/* Linear-address pre-processing: what becomes of an address before its canonical check. LAM and UAI take tags away, LASS refuses
 * addresses of the wrong half.
 *
 * Sources: SDM vol. 3, "Linear-Address Pre-Processing", "Linear-Address Masking (LAM)", "Linear-Address-Space Separation (LASS)"; APM
 * vol. 2, "Upper Address Ignore". */
#ifndef KVMMU_LINEAR_H
#define KVMMU_LINEAR_H

#include "kvmmu/arch/_format.h"

#define KVMMU_SHADOW_STACK_TO_LASS_SHIFT 2 /* SHADOW_STACK to above the indices of permissions[] */
_Static_assert(ACCESS_SHADOW_STACK_MASK >> KVMMU_SHADOW_STACK_TO_LASS_SHIFT == PERMISSIONS_COUNT,
               "accesses to shadow stacks follow the others in lass[]");

/* The rules that registers set for linear addresses; the index is bit 63. */
struct kvmmu_linear_rules {
    uint64_t tag[2];   /* bits of a data address that become copies of the bit below them */
    uint64_t sign[2];  /* that bit */
    uint64_t untagged; /* accesses with one of these bits have no tag: fetches, implicit ones, what is no access; under UAI those to
                        * shadow stacks, which go through no segment */
    uint32_t lass[2];  /* bit n: an access of this number violates LASS: access >> 1, and 16 more for shadow stacks */
    uint32_t has_lass;
};

/* Not canonical in any mode: the place of an address that is refused, where many are looked at side by side. */
#define KVMMU_NO_LINEAR_ADDRESS KVMMU_BIT(63)

/* Return the address without its tag. */
KVMMU_INLINE uint64_t kvmmu_untagged(const struct kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
{
    const uint64_t tag = access & rules->untagged ? 0 : rules->tag[addr >> 63];
    return (addr & ~tag) | (addr & rules->sign[addr >> 63] ? tag : 0);
}

/* True if LASS refuses the address, which may have a tag. */
KVMMU_INLINE int kvmmu_lass_violated(const struct kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
{
    const uint32_t resolved = kvmmu_resolved_access(access);
    const uint32_t number = (resolved >> PERMISSIONS_INDEX_SHIFT & (PERMISSIONS_COUNT - 1)) |
                            (resolved & (uint32_t)ACCESS_SHADOW_STACK_MASK) >> KVMMU_SHADOW_STACK_TO_LASS_SHIFT;
    return access & (uint32_t)ACCESS_PROBE_MASK ? 0 : (int)(rules->lass[addr >> 63] >> number & 1);
}

/* Return the linear address that is translated, or KVMMU_NO_LINEAR_ADDRESS where LASS refuses it. */
KVMMU_INLINE uint64_t kvmmu_linear_address(const struct kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
{
    return kvmmu_lass_violated(rules, addr, access) ? KVMMU_NO_LINEAR_ADDRESS : kvmmu_untagged(rules, addr, access);
}

#endif /* KVMMU_LINEAR_H */
