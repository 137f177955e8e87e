/* The kernels in C with vectors of the compiler; each source of an instruction set compiles them for that set.
 *
 * What an entry means is in _gpte.h, shared with the scalar walk. check_body() repeats steps 3 to 7 of the walk (_walk.pxd) for the last
 * entry: not present, reserved bits, not a leaf, rights and protection key, and which accessed and dirty bits are clear.
 * accept_body() accepts lanes whose entry passes all of them by the masks that kvmmu_make_accept_masks() has made.
 */
#ifndef KVMMU_BODIES_H
#define KVMMU_BODIES_H

#include "kvmmu/walk/batch/kernels/kernels.h"

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

#define VEC_LANES 4
typedef uint64_t word64 __attribute__((aligned(1), may_alias));
typedef uint32_t word32 __attribute__((aligned(1), may_alias));
typedef uint64_t vec __attribute__((vector_size(8 * VEC_LANES), aligned(8), may_alias));

typedef int64_t signed_vec __attribute__((vector_size(8 * VEC_LANES), aligned(8), may_alias));
typedef uint32_t half_vec __attribute__((vector_size(4 * 4), aligned(4), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(4), aligned(1), may_alias));

/* Elements of a narrower column, widened. */
#define WIDE(type, array) __builtin_convertvector(*(const type *)&(array)[i], vec)

#define VEC(array) (*(vec *)&(array)[i])
#define CVEC(array) (*(const vec *)&(array)[i])
#define SELECT(mask, yes, no) (((yes) & (mask)) | ((no) & ~(mask)))
#define EACH_VECTOR(i) for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += VEC_LANES)

/* All bits where the condition holds. */
#define WHERE(condition) ((vec)(condition))

/* One 64-bit word per lane: base[index]. */
#define GATHER(base, index) ((vec){(base)[(index)[0]], (base)[(index)[1]], (base)[(index)[2]], (base)[(index)[3]]})

/* Which lanes of a block a mask is of, one bit each. */
#define ONE_WORD(bits) ((bits)[0] | (bits)[1] | (bits)[2] | (bits)[3])

#define FIRST_BITS ((vec){1, 2, 4, 8})

/* Rounds of a loop one after the other: vectors made of single loads are slower. */
#define KVMMU_BY_ITSELF() __asm__ volatile("" ::: "memory")

/* ---- bodies ----------------------------------------------------------------------------------------------------- */

KVMMU_INLINE uint64_t find_body(int format, struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva, int far)
{
    const uint64_t offset_mask = format == KVMMU_FORMAT_32 ? PT32_INDEX_MASK << 2 : PT64_INDEX_MASK << 3;
    uint64_t miss = 0;
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++) {
        const uint64_t addr = gva[i] & s->gva_mask, addr_tag = addr >> s->tag_shift;
        const struct kvmmu_psc_entry *p = &s->psc[KVMMU_PSC_SLOT(addr_tag, s->walk_slot)];
        const int known = p->tag == (addr_tag ^ s->walk_tag);
        const uint64_t psce = known ? p->value : s->nothing;
        l->psce[i] = psce;
        l->entry[i] = (psce & PSCE_HVA_MASK) + (psce >> PSCE_TABLE_SHIFT ? addr >> s->entry_shift & offset_mask : 0);
        miss |= (uint64_t)!known << i;
        if (far)
            kvmmu_prefetch(l->entry[i]);
    }
    return miss;
}

KVMMU_INLINE uint64_t descend_body(int format, struct kvmmu_leaf_block *l, const struct kvmmu_descent *d, const uint64_t *gva, int far)
{
    const uint64_t level_mask = PSCE_LEVEL_MASK << PSCE_LEVEL_SHIFT, sign = UINT64_C(1) << 63;
    const struct kvmmu_descent own = *d;
    vec bits = FIRST_BITS, miss = bits & 0;
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++) {
        l->pte[i] = kvmmu_read_entry(format, l->entry[i]);
        KVMMU_BY_ITSELF();
    }
    EACH_VECTOR(i)
    {
        const vec upper = VEC(l->psce), entry = VEC(l->entry), pte = VEC(l->pte), gpa = pte & own.base, table = gpa + own.hva;
        const vec in_slot = WHERE((signed_vec)((gpa - own.gpa) ^ sign) < (int64_t)(own.size ^ sign)); /* unsigned */
        const vec leads = WHERE(((pte ^ own.want) & own.care) == 0) & in_slot;
        const vec ends = ~WHERE((upper & level_mask) == 0) & (WHERE((pte & own.present_mask) == 0) | ~WHERE((pte & own.page_size_mask) == 0));
        const vec acc = KVMMU_GPTE_ACCESS(format, KVMMU_GPTE_RIGHTS(format, pte)) << PSCE_ACCESS_SHIFT & upper;
        const vec here = SELECT(ends, (upper & ~(PSCE_HVA_MASK | sign)) | entry, own.nothing);
        VEC(l->pte) = entry;
        VEC(l->psce) = SELECT(leads, table | acc | own.psce, here);
        VEC(l->entry) = SELECT(leads, table + KVMMU_TABLE_OFFSET(format, CVEC(gva) & own.gva_mask), here & PSCE_HVA_MASK);
        miss |= ~(leads | ends) & bits;
        bits <<= VEC_LANES;
    }
    if (far)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++)
            kvmmu_prefetch(l->entry[i]);
    return ONE_WORD(miss);
}

KVMMU_INLINE uint64_t accept_body(int format, struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva, const uint8_t *access,
                                uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code, const uint64_t *ahead)
{
    const uint64_t base = s->base;
    uint64_t remaining = 0, slow = 0;
    if (status)
        memset(status, STATUS_OK, KVMMU_BLOCK_ROWS);
    if (error_code)
        memset(error_code, 0, KVMMU_BLOCK_ROWS * sizeof *error_code);
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++) {
        if (ahead)
            kvmmu_prefetch(ahead[i]);
        const uint64_t psce = l->psce[i], pte = kvmmu_read_entry(format, l->entry[i]), kind = psce >> PSCE_TABLE_SHIFT ? LEAF_IN_TABLE : LEAF_LARGE;
        const uint64_t rights = KVMMU_GPTE_ACCESS(format, KVMMU_GPTE_RIGHTS(format, pte)) & psce >> PSCE_ACCESS_SHIFT &
                                s->levels[psce >> PSCE_LEVEL_SHIFT & 15];
        const uint64_t index = access[i] >> PERMISSIONS_INDEX_SHIFT & 15, special = access[i] > KVMMU_COMMON_ACCESS_MAX;
        const uint64_t bits = format == KVMMU_FORMAT_EPT ? pte >> (EPT_ACCESSED_SHIFT - PT_ACCESSED_SHIFT) : pte;
        const uint64_t unset = (~bits & s->need[index]) != 0, misfit = ((pte ^ s->want) & s->care[kind]) != 0;
        const uint64_t bad = (s->denied[index >> 3][rights] >> (index & 7) & 1) | misfit | special;
        remaining |= (bad | unset) << i;
        slow |= (unset & ~bad) << i;
        l->pte[i] = pte;
        gpa[i] = (pte & base & ~s->offset[kind]) | (gva[i] & s->gva_mask & s->offset[kind]);
        if (level)
            level[i] = (uint8_t)kvmmu_psce_level(psce);
    }
    l->slow = slow;
    return remaining;
}

KVMMU_INLINE void emit_body(const struct kvmmu_leaf_block *l, uint64_t fault, uint32_t access_mask, uint64_t *gpa, uint8_t *status,
                            uint32_t *error_code)
{
    if (fault == ~UINT64_C(0)) {
        for (size_t i = 0; gpa && i < KVMMU_BLOCK_ROWS; i += VEC_LANES) {
            VEC(gpa) = ~(FIRST_BITS & 0);
            KVMMU_BY_ITSELF();
        }
        if (status)
            memset(status, STATUS_PAGE_FAULT, KVMMU_BLOCK_ROWS);
        for (size_t i = 0; error_code && i < KVMMU_BLOCK_ROWS; i++)
            error_code[i] = (uint32_t)(l->error[i] | (l->access_info[i] >> KVMMU_ACCESS_INFO_SHIFT & access_mask));
        return;
    }
    if (gpa && fault)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++)
            gpa[i] |= -(fault >> i & 1);
    if (status)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++)
            status[i] = (uint8_t)(fault >> i & 1 ? STATUS_PAGE_FAULT : STATUS_OK);
    if (error_code)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++) {
            uint64_t code = l->error[i] | (l->access_info[i] >> KVMMU_ACCESS_INFO_SHIFT & access_mask);
            error_code[i] = (uint32_t)(code & -(fault >> i & 1));
        }
}

/* Levels of the last entries of 64 lanes. */
enum lane_levels { LANES_OF_TABLES, LANES_OF_LARGE_PAGES, LANES_MIXED };

/* Rules that are left out where they cannot count: protection keys, and shadow stacks. */
enum seldom_rules { SELDOM_NONE, SELDOM_KEYS, SELDOM_ALL };

/* IN level: of all of them, if they are not mixed */
KVMMU_INLINE void check_body(int format, enum lane_levels levels, enum seldom_rules seldom, uint64_t level, struct kvmmu_leaf_block *l,
                             const struct kvmmu_leaf_rules *w, uint64_t gva_mask, const uint64_t *gva, const uint8_t *access_bytes, uint64_t *gpa)
{
    const struct kvm_page_format *fmt = w->fmt;
    const uint64_t bad_mt_xwr = fmt->bad_mt_xwr, present_mask = w->present_mask, page_size_mask = w->page_size_mask;
    const uint64_t pse36_mask = w->pse36_mask, accessed_mask = w->accessed_mask;
    /* the dirty bit is the one above the accessed bit */
    const uint64_t write_info = accessed_mask ? (uint64_t)ACCESS_WRITE_MASK << KVMMU_ACCESS_INFO_SHIFT : 0;
    const int write_shift = KVMMU_ACCESS_INFO_SHIFT + 1 - (format == KVMMU_FORMAT_EPT ? EPT_DIRTY_SHIFT : PT_DIRTY_SHIFT);
    const uint64_t keys = w->keys, address_mask = w->address_mask;
    const uint64_t accessed_clear_mask = accessed_mask ? UINT64_C(1) << PSCE_ACCESSED_CLEAR_SHIFT : 0;
    uint64_t rsvd[2][PT_MAX_LEVELS];
    vec bits = FIRST_BITS, fault = bits & 0, slow = bits & 0;

    memcpy(rsvd, fmt->rsvd_bits_mask, sizeof rsvd);
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++) {
        l->pte[i] = kvmmu_read_entry(format, l->entry[i]);
        l->access_info[i] = fmt->access_info[access_bytes[i] & (KVMMU_ACCESS_BYTES - 1)]; /* as checked, unless somebody writes there */
        KVMMU_BY_ITSELF();
    }
    EACH_VECTOR(i)
    {
        vec pte = VEC(l->pte), psce = VEC(l->psce), access_info = VEC(l->access_info), addr = CVEC(gva) & gva_mask, zero = pte & 0;
        vec acc = (psce >> PSCE_ACCESS_SHIFT) & KVMMU_GPTE_ACCESS(format, KVMMU_GPTE_RIGHTS(format, pte));
        vec need = accessed_mask | (access_info & write_info) >> write_shift;
        vec shadow_stack = zero;
        vec denied, not_leaf = zero, offset = zero + PAGE_OFFSET_MASK;
        vec r0 = zero + rsvd[0][level - 1], r1 = zero + rsvd[1][level - 1], high = zero, key, malformed, absent, bad;
        if (levels == LANES_OF_LARGE_PAGES) {
            not_leaf = WHERE((pte & page_size_mask) == 0);
            offset = zero + ((UINT64_C(1) << KVMMU_LEVEL_SHIFT(format, level)) - 1);
            high = zero + pse36_mask;
        } else if (levels == LANES_MIXED) {
            vec own_level = KVMMU_PSCE_LEVEL(psce), is_large = WHERE(own_level != PG_LEVEL_4K);
            for (int n = 1; n < PT_MAX_LEVELS; n++) {
                r0 = SELECT(WHERE(own_level == (uint64_t)n + 1), rsvd[0][n], r0);
                r1 = SELECT(WHERE(own_level == (uint64_t)n + 1), rsvd[1][n], r1);
            }
            not_leaf = is_large & WHERE((pte & page_size_mask) == 0);
            offset = ((1 + zero) << KVMMU_LEVEL_SHIFT(format, own_level)) - 1;
            high = is_large & pse36_mask;
        }
        if (seldom == SELDOM_ALL)
            shadow_stack = KVMMU_GPTE_SHADOW_STACK(format, psce >> PSCE_ACCESS_SHIFT, pte);
        denied = access_info >> (acc | shadow_stack) & 1;
        key = zero;
        if (seldom != SELDOM_NONE && format == KVMMU_FORMAT_64)
            key = KVMMU_PKEY_DENIED(keys + zero, acc, KVMMU_GPTE_PKEY(format, pte), access_info);
        malformed = ~WHERE(KVMMU_GPTE_MALFORMED(format, r0, r1, bad_mt_xwr + zero, pte) == 0);
        absent = WHERE((pte & present_mask) == 0);
        bad = absent | malformed | (~WHERE((denied | key) == 0) & ~not_leaf);
        fault |= bad & bits;
        VEC(l->error) = ~absent & (PFERR_PRESENT_MASK | SELECT(malformed, PFERR_RSVD_MASK, ~WHERE(key == 0) & PFERR_PK_MASK));
        slow |= ~WHERE(((need & ~pte) | not_leaf | (psce & accessed_clear_mask)) == 0) & bits;
        bits <<= VEC_LANES;
        VEC(l->pte_access) = acc;
        VEC(gpa) = KVMMU_LEAF_GPA(format, pte & address_mask, offset, addr, high);
    }
    l->fault = ONE_WORD(fault);
    l->slow = ONE_WORD(slow) & ~l->fault;
}

KVMMU_INLINE void check_any(int format, struct kvmmu_leaf_block *l, const struct kvmmu_leaf_rules *w, uint64_t gva_mask, const uint64_t *gva,
                            const uint8_t *access, uint64_t *gpa)
{
    const int keys = format == KVMMU_FORMAT_64 && w->fmt->pkru_mask && w->keys;
    const uint64_t level = KVMMU_PSCE_LEVEL(l->psce[0]);
    vec others = FIRST_BITS & 0;
    EACH_VECTOR(i)
        others |= CVEC(l->psce) ^ level << PSCE_LEVEL_SHIFT;
    if (KVMMU_PSCE_LEVEL(ONE_WORD(others)) || level < PG_LEVEL_4K) {
        if (w->shadow_stacks)
            check_body(format, LANES_MIXED, SELDOM_ALL, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
        else if (keys)
            check_body(format, LANES_MIXED, SELDOM_KEYS, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
        else
            check_body(format, LANES_MIXED, SELDOM_NONE, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
    } else if (level > PG_LEVEL_4K) {
        if (w->shadow_stacks)
            check_body(format, LANES_OF_LARGE_PAGES, SELDOM_ALL, level, l, w, gva_mask, gva, access, gpa);
        else if (keys)
            check_body(format, LANES_OF_LARGE_PAGES, SELDOM_KEYS, level, l, w, gva_mask, gva, access, gpa);
        else
            check_body(format, LANES_OF_LARGE_PAGES, SELDOM_NONE, level, l, w, gva_mask, gva, access, gpa);
    } else if (w->shadow_stacks) {
        check_body(format, LANES_OF_TABLES, SELDOM_ALL, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
    } else if (keys) {
        check_body(format, LANES_OF_TABLES, SELDOM_KEYS, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
    } else {
        check_body(format, LANES_OF_TABLES, SELDOM_NONE, PG_LEVEL_4K, l, w, gva_mask, gva, access, gpa);
    }
}

/* IN out: may be gva */
KVMMU_INLINE void pre_process_body(const struct kvmmu_linear_rules *rules, const uint64_t *gva, const uint8_t *access, uint64_t *out)
{
    uint64_t refused = 0, seen = 0;
    if (rules->has_lass)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++)
            refused |= (uint64_t)kvmmu_lass_violated(rules, gva[i], access[i]) << i;
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += sizeof(word64))
        seen |= *(const word64 *)&access[i];
    /* the seldom halves of the rule left out, as of most blocks: accesses without tags, and tags in the upper half */
    seen &= rules->untagged * UINT64_C(0x0101010101010101);
    if (!seen && !rules->tag[1]) {
        EACH_VECTOR(i)
        {
            const vec addr = CVEC(gva), tag = rules->tag[0] & WHERE((addr >> 63) == 0);
            VEC(out) = (addr & ~tag) | (WHERE((addr & rules->sign[0]) != 0) & tag);
        }
    } else if (!seen) {
        const uint64_t other_tag = rules->tag[0] ^ rules->tag[1], other_sign = rules->sign[0] ^ rules->sign[1];
        EACH_VECTOR(i)
        {
            const vec addr = CVEC(gva), upper = WHERE((addr >> 63) != 0), tag = rules->tag[0] ^ (upper & other_tag);
            VEC(out) = (addr & ~tag) | (WHERE((addr & (rules->sign[0] ^ (upper & other_sign))) != 0) & tag);
        }
    } else EACH_VECTOR(i)
    {
        const vec addr = CVEC(gva), upper = WHERE((addr >> 63) != 0), bytes = WIDE(byte_vec, access);
        const vec tagged = WHERE((bytes & rules->untagged) == 0);
        const vec tag = SELECT(upper, rules->tag[1], rules->tag[0]) & tagged, sign = SELECT(upper, rules->sign[1], rules->sign[0]);
        VEC(out) = (addr & ~tag) | (WHERE((addr & sign) != 0) & tag);
    }
    for (; refused; refused &= refused - 1)
        out[kvmmu_first_bit(refused)] = KVMMU_NO_LINEAR_ADDRESS;
}

KVMMU_INLINE uint64_t recall_body(const struct kvmmu_memo_entry *memo, const uint64_t *gva, const uint8_t *access, const uint32_t *ctx,
                                  uint64_t first_memo_id, uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code)
{
    const uint64_t *words = (const uint64_t *)memo;
    vec bits = FIRST_BITS, miss = bits & 0;
    if (status)
        memset(status, STATUS_OK, KVMMU_BLOCK_ROWS);
    if (error_code)
        memset(error_code, 0, KVMMU_BLOCK_ROWS * sizeof *error_code);
    EACH_VECTOR(i)
    {
        vec page = CVEC(gva) >> PAGE_SHIFT, memo_id = (bits & 0) + first_memo_id, a = WIDE(byte_vec, access), value, hit, slot;
        if (ctx)
            memo_id += WIDE(half_vec, ctx);
        slot = KVMMU_MEMO_SLOT(page, memo_id) * 2;
        value = GATHER(words + 1, slot);
        hit = WHERE(GATHER(words, slot) == (page << MEMO_ID_BITS | memo_id)) & value >> (a >> PERMISSIONS_INDEX_SHIFT & 15);
        hit &= ~WHERE(a > KVMMU_COMMON_ACCESS_MAX);
        VEC(gpa) = KVMMU_MEMO_GPA(value) | (CVEC(gva) & PAGE_OFFSET_MASK);
        if (level)
            *(byte_vec *)&level[i] = __builtin_convertvector(value >> MEMO_LEVEL_SHIFT, byte_vec);
        miss |= ((hit & 1) - 1) & bits;
        bits <<= VEC_LANES;
    }
    return ONE_WORD(miss);
}

/* ---- one set of functions for each instruction set ---------------------------------------------------------------- */

#define KVMMU_FORMAT_FUNCTIONS(format, name, target, find, accept)                                                                    \
    target static uint64_t find_##name(struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva, int far)            \
    {                                                                                                                               \
        return far ? find(format, l, s, gva, 1) : find(format, l, s, gva, 0);                                                       \
    }                                                                                                                               \
    target static uint64_t accept_##name(struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva, const uint8_t *access,\
                                       uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code, const uint64_t *ahead) \
    {                                                                                                                               \
        return accept(format, l, s, gva, access, gpa, level, status, error_code, ahead);                                              \
    }                                                                                                                               \
    target static void check_##name(struct kvmmu_leaf_block *l, const struct kvmmu_leaf_rules *w, uint64_t gva_mask, const uint64_t *gva, \
                                    const uint8_t *access, uint64_t *gpa)                                                           \
    {                                                                                                                               \
        check_any(format, l, w, gva_mask, gva, access, gpa);                                                                        \
    }

#define KVMMU_DESCEND(format, name, target)                                                                                         \
    target static uint64_t descend_##name(struct kvmmu_leaf_block *l, const struct kvmmu_descent *d, const uint64_t *gva, int far)    \
    {                                                                                                                               \
        return far ? descend_body(format, l, d, gva, 1) : descend_body(format, l, d, gva, 0);                                       \
    }

#define KVMMU_KERNELS(name, target, find, accept, recall)                                                                      \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_32, 32_##name, target, find, accept)                                                          \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_64, 64_##name, target, find, accept)                                                          \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_EPT, ept_##name, target, find, accept)                                                        \
    KVMMU_DESCEND(KVMMU_FORMAT_64, 64_##name, target)                                                                               \
    KVMMU_DESCEND(KVMMU_FORMAT_EPT, ept_##name, target)                                                                             \
    target static uint64_t recall_##name(const struct kvmmu_memo_entry *memo, const uint64_t *gva, const uint8_t *access,             \
                                         const uint32_t *ctx, uint64_t memo_id, uint64_t *gpa, uint8_t *level, uint8_t *status,       \
                                         uint32_t *error_code)                                                                      \
    {                                                                                                                               \
        return ctx ? recall_body(memo, gva, access, ctx, memo_id, gpa, level, status, error_code)                                      \
                   : recall(memo, gva, access, 0, memo_id, gpa, level, status, error_code);                                            \
    }                                                                                                                               \
    target static void emit_##name(const struct kvmmu_leaf_block *l, uint64_t fault, uint32_t access_mask, uint64_t *gpa,                \
                                   uint8_t *status, uint32_t *error_code)                                                           \
    {                                                                                                                               \
        emit_body(l, fault, access_mask, gpa, status, error_code);                                                                  \
    }                                                                                                                               \
    target static void pre_process_##name(const struct kvmmu_linear_rules *rules, const uint64_t *gva, const uint8_t *access,       \
                                          uint64_t *out)                                                                            \
    {                                                                                                                               \
        pre_process_body(rules, gva, access, out);                                                                                  \
    }                                                                                                                               \
    const struct kvmmu_kernels kvmmu_kernels_##name = {{find_32_##name, find_64_##name, find_ept_##name},                        \
                                                          {0, descend_64_##name, descend_ept_##name},                               \
                                                          {accept_32_##name, accept_64_##name, accept_ept_##name},                        \
                                                          {check_32_##name, check_64_##name, check_ept_##name},                     \
                                                          recall_##name, emit_##name, pre_process_##name};

#endif /* KVMMU_BODIES_H */
