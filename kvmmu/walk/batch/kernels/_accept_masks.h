/* Accept masks: the leaf check of one stage (steps 3 to 7 of the walk in _walk.pxd: present, reserved bits, leaf, rights and protection
 * key, accessed and dirty bits), worked out once as bits to compare and tables of bytes. They accept only leaves that pass; the whole
 * rule decides over the others. */
#ifndef KVMMU_ACCEPT_MASKS_H
#define KVMMU_ACCEPT_MASKS_H

#include "kvmmu/walk/batch/kernels/_state.h"

/* Look tables of this level up. */
KVMMU_INLINE void kvmmu_use_tables(int format, struct kvmmu_leaf_checker *s, uint32_t walk_id, int level)
{
    s->level = level;
    s->tag_shift = KVMMU_LEVEL_SHIFT(format, level + 1);
    s->entry_shift = KVMMU_LEVEL_SHIFT(format, level) - (format == KVMMU_FORMAT_32 ? 2 : 3);
    /* one table covers many tags of the lowest level: apart from those */
    s->walk_slot = kvmmu_walk_spread(walk_id + ((uint32_t)(level - 1) << PSC_WALK_ID_BITS));
    s->walk_tag = kvmmu_psc_tag(0, walk_id) ^ (uint64_t)((level - 1) & 3) << PSC_TAG_LEVEL_SHIFT;
}

/* Where the cache holds the table of an address. */
KVMMU_INLINE uint64_t kvmmu_psc_slot_of(const struct kvmmu_leaf_checker *s, uint64_t addr)
{
    const uint64_t addr_tag = addr >> s->tag_shift;
    return KVMMU_PSC_SLOT(addr_tag, s->walk_slot);
}

/* Make the accept masks. Returns 0 if what passes is not a matter of single bits. IN sample: an entry, whose memory type is that of
 * accepted entries (EPT); seconds: NULL, or the access that this stage is asked for, by access >> 1. */
static int kvmmu_make_accept_masks(int format, struct kvmmu_leaf_checker *s, const struct kvmmu_leaf_rules *w, uint64_t sample,
                              const uint8_t *seconds)
{
    const struct kvm_page_format *fmt = w->fmt;
    const uint64_t level = s->level > PG_LEVEL_4K ? (uint64_t)s->level : PG_LEVEL_2M; /* of large pages */
    const uint64_t memory_type = format == KVMMU_FORMAT_EPT ? EPT_MT_XWR_MASK & ~EPT_RWX_MASK : 0;
    const uint64_t *rsvd_large = &fmt->rsvd_bits_mask[1][level - 1], *rsvd_table = &fmt->rsvd_bits_mask[1][0];
    uint64_t care = memory_type;
    if (fmt->rsvd_bits_mask[0][0] != *rsvd_table)
        return 0;
    s->want = (sample & memory_type) | w->page_size_mask;
    for (uint64_t rights = EPT_READABLE_MASK; memory_type && rights <= EPT_RWX_MASK; rights += EPT_WRITABLE_MASK)
        if (KVMMU_BAD_MT_XWR(fmt->bad_mt_xwr, (sample & memory_type) | rights))
            return 0; /* every combination of rights with the right to read must be a good one */
    if (format == KVMMU_FORMAT_64 && fmt->pkru_mask && w->keys) { /* key 0, if it denies nothing */
        if ((w->keys | w->keys >> PKRU_SHIFT) & 3)
            return 0;
        care |= PT64_PKEY_MASK << PT64_PKEY_SHIFT;
    }
    if (s->want & (*rsvd_table | *rsvd_large))
        return 0; /* what is wanted is reserved */
    s->care[LEAF_LARGE] = care | *rsvd_large | w->page_size_mask | w->pse36_mask;
    s->offset[LEAF_LARGE] = (UINT64_C(1) << KVMMU_LEVEL_SHIFT(format, level)) - 1;
    s->care[LEAF_IN_TABLE] = s->level == PG_LEVEL_4K ? care | *rsvd_table : s->care[LEAF_LARGE];
    s->offset[LEAF_IN_TABLE] = s->level == PG_LEVEL_4K ? PAGE_OFFSET_MASK : s->offset[LEAF_LARGE];
    memset(s->denied, 0, sizeof s->denied);
    for (uint64_t i = 0; i < 16; i++) {
        const uint64_t access = seconds ? seconds[i] : i << PERMISSIONS_INDEX_SHIFT, of_level = i & PSCE_LEVEL_MASK;
        const int of_a_kind = of_level == (uint64_t)s->level || (of_level == level && w->page_size_mask);
        s->levels[i] = i > PSCE_LEVEL_MASK && of_a_kind ? ACC_ALL : 0;
        s->need[i] = w->accessed_mask ? PT_ACCESSED_MASK | (access & ACCESS_WRITE_MASK ? PT_DIRTY_MASK : 0) : 0;
        for (uint64_t acc = 0; acc <= ACC_ALL; acc++)
            if (!(acc & ACC_READ_MASK) || (fmt->access_info[access] >> acc & 1))
                s->denied[i >> 3][acc] |= (uint8_t)(1 << (i & 7));
    }
    return 1;
}

/* Accept only what another walk of the same tables accepts, too. Returns 0 if that is not a matter of single bits. IN w: its rules. */
static int kvmmu_narrow_accept_masks(int format, struct kvmmu_leaf_checker *s, const struct kvmmu_leaf_rules *w)
{
    struct kvmmu_leaf_checker other = *s;
    if (!kvmmu_make_accept_masks(format, &other, w, s->want, NULL))
        return 0;
    for (size_t kind = 0; kind < LEAF_KINDS; kind++)
        s->care[kind] |= other.care[kind];
    for (size_t acc = 0; acc < sizeof s->denied[0]; acc++) {
        s->denied[0][acc] |= other.denied[0][acc];
        s->denied[1][acc] |= other.denied[1][acc];
    }
    return 1;
}

#endif /* KVMMU_ACCEPT_MASKS_H */
