/* The fast path of scalar walks: entries are gathered as an AND and an OR on the way down. kvmmu_fast_leaf() checks them at the end, in
 * place of steps 3 to 7 of the walk (_walk.pxd). */
#ifndef KVMMU_FAST_H
#define KVMMU_FAST_H

#include "kvmmu/arch/_gpte.h"
#include "kvmmu/arch/_linear.h"
#include "kvmmu/memory/_memory.h"

#define KVMMU_UNLIKELY(x) __builtin_expect(!!(x), 0)
#if defined(__clang__)
#define KVMMU_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVMMU_UNROLL _Pragma("GCC unroll 5")
#endif

#define KVMMU_FAST_ACCESSES 32 /* (ACCESS_PLAIN_MASK >> PERMISSIONS_INDEX_SHIFT) + 1 */

/* What one access asks of the entries of a walk; 64 bytes. */
struct kvmmu_fast_access {
    uint64_t mask;         /* of the AND of all entries ... */
    uint64_t wanted;       /* ... what it must be; beyond mask: the short cut does not know this access */
    uint64_t upper_denied; /* set in no entry above the leaf */
    uint64_t leaf_wanted;  /* what the leaf must be ... */
    uint64_t leaf_mask[4]; /* ... in these bits; [level - 1] */
};

/* The short cut of one walk. */
struct kvmmu_fast_tables {
    const uint8_t *hva; /* the largest slot */
    uint64_t slot_gpa;
    uint64_t slot_size; /* whole pages */
    uint64_t page_size_mask;
    uint64_t pse36_mask;
    uint64_t gva_mask;
    uint64_t pdpte_rsvd_mask; /* PAE with PDPTEs in memory */
    const struct kvm_page_format *fmt;
    struct kvmmu_linear_rules linear; /* of walks that pre-process addresses */
    struct kvmmu_fast_access accesses[KVMMU_FAST_ACCESSES]; /* [access >> PERMISSIONS_INDEX_SHIFT], IMPLICIT included */
};

/* A translation in two registers. */
struct kvmmu_translation {
    uint64_t gpa;        /* INVALID_GPA on a fault */
    uint32_t error_code; /* of a #PF, else 0 */
    uint8_t status;      /* STATUS_* */
    uint8_t level;       /* of the leaf, or of the entry that failed; 0 without one */
};

/* The end of such a walk. IN level: of pte, the leaf, a constant; all, any: AND of all entries, OR of those above it. */
KVMMU_INLINE struct kvmmu_translation kvmmu_fast_leaf(int format, int level, const struct kvmmu_fast_tables *p, uint64_t pte,
                                                      uint64_t all, uint64_t any, uint64_t keys, uint64_t addr, uint32_t access)
{
    const struct kvmmu_fast_access *a = &p->accesses[access >> PERMISSIONS_INDEX_SHIFT];
    struct kvmmu_translation t = { INVALID_GPA, 0, STATUS_OK, (uint8_t)level };

    if (KVMMU_UNLIKELY(((all & a->mask) ^ a->wanted) | (any & a->upper_denied) |
                       ((pte & a->leaf_mask[level - 1]) ^ a->leaf_wanted)))
        return t;
    if (KVMMU_UNLIKELY(keys) &&
        kvmmu_pkey_denied(keys, all & ACC_USER_MASK, kvmmu_gpte_pkey(format, pte), p->fmt->access_info[access]))
        return t;
    t.gpa = kvmmu_leaf_gpa(format, pte, (uint32_t)level, addr, p->pse36_mask);
    return t;
}

/* A walk that succeeds and changes nothing, over entries of the largest slot. A gpa of INVALID_GPA: any other walk.
 * IN format, root: constants; pte: what leads to the table of level root; access: of ACCESS_PLAIN_MASK. */
KVMMU_INLINE struct kvmmu_translation kvmmu_fast_walk(int format, int root, const struct kvmmu_fast_tables *p, uint64_t pte,
                                                  uint64_t keys, uint64_t addr, uint32_t access)
{
    const struct kvmmu_translation none = { INVALID_GPA, 0, STATUS_OK, 0 };
    const uint64_t base_mask = format == KVMMU_FORMAT_32 ? PT32_BASE_ADDR_MASK : PT64_BASE_ADDR_MASK;
    const uint64_t index_mask = format == KVMMU_FORMAT_32 ? PT32_INDEX_MASK : PT64_INDEX_MASK;
    const uint64_t size = format == KVMMU_FORMAT_32 ? sizeof(uint32_t) : sizeof(uint64_t);
    const uint64_t page_size_mask = format == KVMMU_FORMAT_32 ? p->page_size_mask : PT_PAGE_SIZE_MASK;
    uint64_t all = ~UINT64_C(0), any = 0;
    int level;

    if (root >= PG_LEVEL_512G) {
        if (KVMMU_UNLIKELY(!kvmmu_is_canonical(addr, 64 - (root == PG_LEVEL_512G ? GVA_BITS_4_LEVEL : GVA_BITS_5_LEVEL))))
            return none;
    } else {
        addr &= p->gva_mask;
    }
    /* A word that is no entry leads at worst to another word of the slot: the AND remembers it. */
    KVMMU_UNROLL
    for (level = root; level >= PG_LEVEL_4K; level--) {
        uint64_t offset = (pte & base_mask) + (addr >> KVMMU_LEVEL_SHIFT(format, level) & index_mask) * size - p->slot_gpa;
        if (KVMMU_UNLIKELY(offset >= p->slot_size)) /* an aligned entry lies in the slot if its first byte does */
            return none;
        pte = format == KVMMU_FORMAT_32 ? kvmmu_read32(p->hva + offset) : kvmmu_read64(p->hva + offset);
        all &= pte;
        if (level == PG_LEVEL_4K)
            return kvmmu_fast_leaf(format, PG_LEVEL_4K, p, pte, all, any, keys, addr, access);
        if (level <= PG_LEVEL_1G && KVMMU_UNLIKELY(pte & page_size_mask))
            return kvmmu_fast_leaf(format, level, p, pte, all, any, keys, addr, access);
        any |= pte;
    }
    return none;
}

#endif /* KVMMU_FAST_H */
