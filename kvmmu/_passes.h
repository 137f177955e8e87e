/* Which last entries surely pass an access, as bits to compare: the rules of permissions, reserved bits and accessed and dirty bits,
 * worked out once for all entries after prefixes of one kind. Entries that do not surely pass are for the whole rule. */
#ifndef KVMMU_PASSES_H
#define KVMMU_PASSES_H

#include "_lane_state.h"

/* Which last entries surely pass, whatever else they hold: (pte & care) == want. */
struct kvmmu_pass {
    uint64_t care;
    uint64_t want;
};

/* What surely passes each access; and, but for implicit accesses, the same again: what passes all that can pass at all, and what
 * depends on the access, of an entry's low byte with NX as bit 7 and, as a bit that is not asked, whether the first part holds. */
struct kvmmu_passes {
    struct kvmmu_pass of[KVMMU_ACCESS_BYTES];
    struct kvmmu_pass fixed;
    uint8_t care[16]; /* [access >> 1] */
    uint8_t want[16];
    int in_bytes; /* False: there is no such second form */
};

#define PASS_BYTE_MASK (PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK | PT_DIRTY_MASK)
#define PASS_BYTE_FITS (UINT64_C(1) << 3)

#define KVMMU_PASS_NONE {0, 1}

/* What entries surely pass an access after such a prefix. False: that is no matter of single bits. IN sample: one of the entries. */
KVMMU_INLINE int kvmmu_sure_pass(int format, const struct kvmmu_lane_walk *w, uint64_t like, uint64_t look, uint64_t sample,
                                 struct kvmmu_pass *pass)
{
    const struct kvm_page_format *fmt = w->fmt;
    const uint64_t level = KVMMU_PREFIX_LEVEL(like), prefix_access = like >> PREFIX_ACCESS_SHIFT & ACC_ALL;
    const uint64_t large = level > PG_LEVEL_4K ? w->page_size_mask : 0;
    const uint64_t rsvd = fmt->rsvd_bits_mask[large != 0][level - 1], write = look >> KVMMU_LOOK_ACCESS_SHIFT & ACCESS_WRITE_MASK;
    uint64_t all = ACC_ALL, any = 0, count = 0, fixed;
    if (level == PG_LEVEL_4K ? rsvd != fmt->rsvd_bits_mask[1][0] : !large || format == KVMMU_FORMAT_32)
        return 0;
    pass->care = w->accessed_mask | (write ? w->accessed_mask << 1 : 0);
    pass->care |= large;
    pass->want = pass->care;
    pass->care |= rsvd;
    if (format == KVMMU_FORMAT_EPT) { /* entries whose rights and memory type are those of the sample */
        const uint64_t control = EPT_MT_XWR_MASK | EPT_USER_EXECUTABLE_MASK;
        const uint64_t acc = prefix_access & KVMMU_GPTE_ACCESS(format, KVMMU_GPTE_RIGHTS(format, sample));
        if (!(sample & w->present_mask) || KVMMU_BAD_MT_XWR(fmt->bad_mt_xwr, sample) || (look >> acc & 1))
            return 0;
        pass->care |= control;
        pass->want |= sample & control;
        return !(pass->want & rsvd);
    }
    for (uint64_t acc = 0; acc <= ACC_ALL; acc++) {
        if (!(acc & ACC_READ_MASK) || (look >> (acc & prefix_access) & 1))
            continue;
        all &= acc;
        any |= acc;
        count++;
    }
    fixed = all | (~any & ACC_ALL); /* rights that all of them have, or none */
    if (!count || count << kvmmu_count_bits(fixed) != ACC_ALL + 1)
        return 0;
    pass->care |= fixed & (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK);
    pass->want |= all & (ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK);
    if (format == KVMMU_FORMAT_32)
        return (all & ACC_EXEC_MASK) || !(fixed & ACC_EXEC_MASK);
    if (fixed & ACC_EXEC_MASK) {
        pass->care |= PT64_NX_MASK;
        pass->want |= all & ACC_EXEC_MASK ? 0 : PT64_NX_MASK;
    }
    if (fmt->pkru_mask && w->pkru) { /* key 0, if it denies nothing; the others are for the whole rule */
        if (w->pkru & 3)
            return 0;
        pass->care |= PT64_PKEY_MASK << PT64_PKEY_SHIFT;
    }
    /* a bit that must be clear because it is reserved and set because it is wanted: none passes */
    return !(pass->want & rsvd);
}

/* The second form of what surely passes. */
static void kvmmu_split_passes(struct kvmmu_passes *p)
{
    const struct kvmmu_pass none = KVMMU_PASS_NONE;
    const uint64_t by_access = PASS_BYTE_MASK | PT64_NX_MASK;
    int some = 0;
    p->fixed = none;
    for (size_t i = 0; i < sizeof p->care; i++) {
        const struct kvmmu_pass *one = &p->of[i << PERMISSIONS_INDEX_SHIFT];
        if (one->want & ~one->care)
            continue;
        if (!some++)
            p->fixed = *one;
        p->fixed.care &= one->care & ~(one->want ^ p->fixed.want);
    }
    p->fixed.want &= some ? p->fixed.care : ~UINT64_C(0);
    p->in_bytes = 1;
    for (size_t i = 0; i < sizeof p->care; i++) {
        const struct kvmmu_pass *one = &p->of[i << PERMISSIONS_INDEX_SHIFT];
        const uint64_t care = one->care & ~p->fixed.care, want = one->want & care;
        p->care[i] = (uint8_t)(PASS_BYTE_FITS | (care & PASS_BYTE_MASK) | care >> 63 << 7);
        p->want[i] = (uint8_t)(PASS_BYTE_FITS | (want & PASS_BYTE_MASK) | want >> 63 << 7);
        if (one->want & ~one->care)
            p->care[i] = 0, p->want[i] = 1;
        else if (care & ~by_access)
            p->in_bytes = 0;
    }
}

#endif /* KVMMU_PASSES_H */
