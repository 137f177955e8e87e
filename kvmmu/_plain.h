/* The short cut of scalar walks: entries are gathered as an AND and an OR on the way down, and judged once at the end. */
#ifndef KVMMU_PLAIN_H
#define KVMMU_PLAIN_H

#include "_gpte.h"
#include "_memory.h"

#if defined(__GNUC__)
#define KVMMU_LIKELY(x) __builtin_expect(!!(x), 1)
#define KVMMU_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define KVMMU_LIKELY(x) (x)
#define KVMMU_UNLIKELY(x) (x)
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define KVMMU_UNROLL _Pragma("GCC unroll 5")
#elif defined(__clang__)
#define KVMMU_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVMMU_UNROLL
#endif

#define KVMMU_PLAIN_ACCESSES 32 /* (ACCESS_VALID_MASK >> PERMISSIONS_INDEX_SHIFT) + 1 */

/* What one access asks of the entries of a walk. */
struct kvmmu_plain_access {
    uint64_t mask;   /* of the AND of all entries ... */
    uint64_t wanted; /* ... what it must be; beyond mask: the short cut does not know this access */
    uint64_t denied; /* set in no entry */
    uint64_t leaf;   /* set in the leaf */
};

/* The short cut of one walk. */
struct kvmmu_plain_walk {
    uintptr_t base;           /* host address of guest-physical 0, were the largest slot to reach there; wraps */
    uint64_t slot_gpa;
    uint64_t slot_size;       /* whole pages */
    uint64_t page_size_mask;
    uint64_t pse36_mask;
    uint64_t gva_mask;
    uint64_t rsvd_upper;      /* what some level does not allow in an entry that is no leaf */
    uint64_t rsvd_leaf[3];    /* [level - 1] */
    uint32_t pkru_mask;
    struct kvmmu_plain_access accesses[KVMMU_PLAIN_ACCESSES]; /* [access >> PERMISSIONS_INDEX_SHIFT], IMPLICIT included */
};

/* A translation in two registers. */
struct kvmmu_translation {
    uint64_t gpa;        /* INVALID_GPA on a fault */
    uint32_t error_code; /* of a #PF, else 0 */
    uint8_t status;      /* STATUS_* */
    uint8_t level;       /* of the leaf, or of the entry that failed; 0 without one */
};

/* A walk that succeeds and changes nothing, over entries of the largest slot. A gpa of INVALID_GPA: any other walk.
 * IN format, root: constants; pte: what leads to the table of level root; access: of ACCESS_VALID_MASK. */
KVMMU_INLINE struct kvmmu_translation kvmmu_plain(int format, int root, const struct kvmmu_plain_walk *p, uint64_t pte,
                                                  uint32_t pkru, uint64_t addr, uint32_t access)
{
    const struct kvmmu_translation none = { INVALID_GPA, 0, STATUS_PAGE_FAULT, 0 };
    struct kvmmu_translation found = { 0, 0, STATUS_OK, 0 };
    const struct kvmmu_plain_access *a = &p->accesses[access >> PERMISSIONS_INDEX_SHIFT];
    const uint64_t base_mask = format == KVMMU_FORMAT_32 ? PT32_BASE_ADDR_MASK : PT64_BASE_ADDR_MASK;
    const uint64_t index_mask = format == KVMMU_FORMAT_32 ? PT32_INDEX_MASK : PT64_INDEX_MASK;
    const uint64_t size = format == KVMMU_FORMAT_32 ? sizeof(uint32_t) : sizeof(uint64_t);
    const uint64_t page_size_mask = format == KVMMU_FORMAT_32 ? p->page_size_mask : PT_PAGE_SIZE_MASK;
    uint64_t all = ~UINT64_C(0), any = 0, bad;
    int level;

    if (root >= PG_LEVEL_512G) {
        const int canonical_shift = 64 - (root == PG_LEVEL_512G ? GVA_BITS_4_LEVEL : GVA_BITS_5_LEVEL);
        if (KVMMU_UNLIKELY((uint64_t)((int64_t)(addr << canonical_shift) >> canonical_shift) != addr))
            return none;
    } else {
        addr &= p->gva_mask;
    }
    /* A word that is no entry leads at worst to another word of the slot: the AND remembers it. */
    KVMMU_UNROLL
    for (level = root; level >= PG_LEVEL_4K; level--) {
        uint64_t gpa = (pte & base_mask) + (addr >> KVMMU_LEVEL_SHIFT(format, level) & index_mask) * size;
        const void *hva = (const void *)(p->base + (uintptr_t)gpa);
        if (KVMMU_UNLIKELY(gpa - p->slot_gpa >= p->slot_size)) /* an aligned entry lies in it if its first byte does */
            return none;
        pte = format == KVMMU_FORMAT_32 ? kvmmu_read32(hva) : kvmmu_read64(hva);
        all &= pte;
        if (level == PG_LEVEL_4K || (level <= PG_LEVEL_1G && pte & page_size_mask))
            break;
        any |= pte;
    }
    bad = ((all & a->mask) ^ a->wanted) | (any & p->rsvd_upper) | ((any | pte) & a->denied) |
          (pte & p->rsvd_leaf[level - 1]) | (~pte & a->leaf);
    if (KVMMU_UNLIKELY(bad))
        return none;
    if (KVMMU_UNLIKELY(pkru) &&
        kvmmu_pkey_denied(p->pkru_mask, pkru, all & ACC_USER_MASK, kvmmu_gpte_pkey(format, pte), kvmmu_explicit_access(access)))
        return none;
    found.gpa = kvmmu_leaf_gpa(format, pte, (uint32_t)level, addr, p->pse36_mask);
    found.level = (uint8_t)level;
    return found;
}

#endif /* KVMMU_PLAIN_H */
