/* Walks side by side: 64 addresses of one set of tables at a time.
 *
 * A lane starts from what is remembered of the upper levels of its walk (its prefix: where the last entry lies, and the rights
 * so far) and reads that last entry live. Most lanes of a batch have prefixes of one kind; where the tables of their last
 * entries lie is in a directory, a word for each. The loops have a constant count and no branches, so that the compiler makes
 * vector code of them; each is compiled once for every instruction set below and chosen by a run-time check of the CPU.
 * What an entry means is in _gpte.h, shared with the scalar walk.
 */
#ifndef KVMMU_LANES_H
#define KVMMU_LANES_H

#include "_passes.h"

typedef void (*kvmmu_start_fn)(struct kvmmu_lanes *, const uint64_t *gva, uint64_t gva_mask, int canonical_shift, int far,
                               const struct kvmmu_directory *);
typedef uint64_t (*kvmmu_sure_fn)(struct kvmmu_lanes *, const struct kvmmu_passes *, const uint8_t *access, int alike, uint64_t like,
                                  uint64_t *gpa);
typedef uint64_t (*kvmmu_beside_fn)(struct kvmmu_lanes *, uint64_t lanes, const struct kvmmu_prefix *, uint32_t asid, uint64_t like,
                                    const struct kvmmu_pass *, const uint8_t *access, uint64_t *gpa);
typedef void (*kvmmu_judge_fn)(struct kvmmu_lanes *, const struct kvmmu_lane_walk *);
typedef uint64_t (*kvmmu_recall_fn)(const struct kvmmu_tlb_entry *, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                                    const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level);

typedef void (*kvmmu_emit_fn)(const struct kvmmu_lanes *, uint64_t fault, uint32_t access_mask, const uint64_t *from, uint64_t *gpa,
                              uint8_t *status, uint32_t *error_code);

struct kvmmu_lane_ops { /* [format] */
    kvmmu_start_fn start[3];
    kvmmu_sure_fn sure[3];
    kvmmu_beside_fn beside[3];
    kvmmu_judge_fn judge[3];
    kvmmu_recall_fn recall;
    kvmmu_emit_fn emit;
};

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

#define VEC_LANES 4
typedef uint64_t word64 __attribute__((aligned(1), may_alias));
typedef uint32_t word32 __attribute__((aligned(1), may_alias));
typedef uint64_t vec __attribute__((vector_size(8 * VEC_LANES), aligned(8), may_alias));

typedef uint32_t half_vec __attribute__((vector_size(4 * 4), aligned(4), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(4), aligned(1), may_alias));

/* Elements of a narrower column, widened. */
#define WIDE(type, array) __builtin_convertvector(*(const type *)&(array)[i], vec)

#define VEC(array) (*(vec *)&(array)[i])
#define CVEC(array) (*(const vec *)&(array)[i])
#define SELECT(mask, yes, no) (((yes) & (mask)) | ((no) & ~(mask)))
#define EACH_VECTOR(i) for (size_t i = 0; i < KVMMU_LANES; i += VEC_LANES)

/* All bits where the condition holds. */
#define WHERE(condition) ((vec)(condition))

/* One 64-bit word per lane: base[index]. */
#define GATHER(base, index) ((vec){(base)[(index)[0]], (base)[(index)[1]], (base)[(index)[2]], (base)[(index)[3]]})

/* Which lanes of a block a mask is of, one bit each. */
#define ONE_WORD(bits) ((bits)[0] | (bits)[1] | (bits)[2] | (bits)[3])

#define FIRST_BITS ((vec){1, 2, 4, 8})

/* ---- bodies ----------------------------------------------------------------------------------------------------- */

/* Lanes that the directory does not know, or whose address is not canonical: the seldom half of start_body(). Their entry is one
 * that reads as zero, until a prefix is found. */
static void kvmmu_sort_out(struct kvmmu_lanes *l, int canonical_shift, const struct kvmmu_directory *d)
{
    for (size_t i = 0; i < KVMMU_LANES; i++) {
        uint64_t addr = l->addr[i], region = addr >> d->region_shift, word = d->words[KVMMU_DIRECTORY_SLOT(region)];
        if (canonical_shift && (uint64_t)((int64_t)(addr << canonical_shift) >> canonical_shift) != addr)
            l->noncanonical |= UINT64_C(1) << i;
        else if (((word ^ (KVMMU_DIRECTORY_TAG(region) | d->name)) & DIRECTORY_TAG_MASK) == 0)
            continue;
        l->miss |= UINT64_C(1) << i;
        l->entry[i] = d->nothing;
    }
    l->miss &= ~l->noncanonical;
}

/* Addresses into the lanes, and where their last entries lie, as far as the directory knows.
 * IN far: they are probably not in the cache; then they are on their way there afterwards. */
KVMMU_INLINE void start_body(int format, int far, struct kvmmu_lanes *l, const uint64_t *gva, uint64_t gva_mask, int canonical_shift,
                             const struct kvmmu_directory *d)
{
    const uint64_t *words = d->words;
    const uint64_t name = d->name, phase = d->phase, like = d->like, mask = canonical_shift ? gva_mask : gva_mask & PREFIX_ADDR_MASK;
    const uint64_t half = canonical_shift ? UINT64_C(1) << (63 - canonical_shift) : 0;
    const uint64_t offset_mask = format == KVMMU_FORMAT_32 ? PT32_INDEX_MASK << 2 : PT64_INDEX_MASK << 3;
    const int width = canonical_shift ? 64 - canonical_shift : GVA_BITS_5_LEVEL;
    const int region_shift = d->region_shift, entry_shift = d->entry_shift;
    vec wide = FIRST_BITS & 0, wrong = wide, likes = wide + like;
    for (size_t i = 0; i < KVMMU_LANES; i += 8)
        __builtin_prefetch(gva + 2 * KVMMU_LANES + i, 0, 3);
    EACH_VECTOR(i)
    {
        vec addr = CVEC(gva) & mask, region = addr >> region_shift, slot = KVMMU_DIRECTORY_SLOT(region);
        vec word = GATHER(words, slot) ^ (KVMMU_DIRECTORY_TAG(region) | name), entry;
        wide |= addr + half;
        wrong |= word;
        entry = (word >> DIRECTORY_WORD_SHIFT) + phase + (addr >> entry_shift & offset_mask);
        VEC(l->addr) = addr;
        VEC(l->ref) = likes;
        VEC(l->entry) = entry;
        if (far)
            for (int n = 0; n < VEC_LANES; n++)
                __builtin_prefetch((const void *)(uintptr_t)entry[n], 0, 3);
    }
    l->like = like;
    l->voids = d->has_voids ? d->nothing : 0;
    l->miss = l->apart = l->noncanonical = 0;
    if (ONE_WORD(wide) >> width | (ONE_WORD(wrong) & DIRECTORY_TAG_MASK))
        kvmmu_sort_out(l, canonical_shift, d);
}

/* The place of a prefix will be looked at soon. */
KVMMU_INLINE void kvmmu_want_prefix(int format, const struct kvmmu_prefix *prefixes, uint32_t asid, uint64_t addr)
{
    __builtin_prefetch(&prefixes[kvmmu_prefix_slot(kvmmu_region(format, addr), asid)], 1, 3);
}

/* A prefix for one lane after all. */
KVMMU_INLINE void kvmmu_set_prefix(int format, struct kvmmu_lanes *l, size_t lane, uint64_t ref)
{
    l->ref[lane] = ref;
    l->entry[lane] = kvmmu_entry_hva(format, ref, l->addr[lane]);
    __builtin_prefetch((const void *)(uintptr_t)l->entry[lane], 0, 3);
}

/* Read the last entries; those that surely pass have their address in gpa. Returns the other lanes.
 * IN like: of the directory that the entries come from; alike: all accesses are the same. */
KVMMU_INLINE uint64_t sure_body(int format, int alike, struct kvmmu_lanes *l, const struct kvmmu_passes *p,
                                const uint8_t *access, uint64_t like, uint64_t *gpa)
{
    const uint64_t *words = (const uint64_t *)p->of;
    const uint64_t offset = (UINT64_C(1) << KVMMU_LEVEL_SHIFT(format, KVMMU_PREFIX_LEVEL(like))) - 1;
    const uint64_t base_mask = (format == KVMMU_FORMAT_32 ? PT32_BASE_ADDR_MASK : PT64_BASE_ADDR_MASK) & ~offset;
    vec bits = FIRST_BITS, odd = bits & 0, care = odd + p->of[access[0]].care, want = odd + p->of[access[0]].want;
    EACH_VECTOR(i)
    {
        vec entry = CVEC(l->entry), pte;
        if (format == KVMMU_FORMAT_32)
            pte = (vec){kvmmu_read_entry(format, entry[0]), kvmmu_read_entry(format, entry[1]), kvmmu_read_entry(format, entry[2]),
                        kvmmu_read_entry(format, entry[3])};
        else
            pte = (vec){*(const word64 *)(uintptr_t)entry[0], *(const word64 *)(uintptr_t)entry[1], *(const word64 *)(uintptr_t)entry[2],
                        *(const word64 *)(uintptr_t)entry[3]};
        if (!alike) {
            vec index = WIDE(byte_vec, access) * 2;
            care = GATHER(words, index);
            want = GATHER(words + 1, index);
        }
        odd |= ~WHERE((pte & care) == want) & bits;
        bits <<= VEC_LANES;
        VEC(gpa) = (pte & base_mask) | (CVEC(l->addr) & offset);
    }
    return ONE_WORD(odd);
}

/* Lanes that the directory does not know, after remembered prefixes that are like another. Returns those that do not surely pass.
 * IN lanes: which; of: what passes, by access. OUT ref, entry, gpa of the lanes that pass */
KVMMU_INLINE uint64_t beside_body(int format, struct kvmmu_lanes *l, uint64_t lanes, const struct kvmmu_prefix *prefixes, uint32_t asid,
                                  uint64_t like, const struct kvmmu_pass *of, const uint8_t *access, uint64_t *gpa)
{
    const uint64_t place = kvmmu_prefix_place(asid), space = (uint64_t)asid << PREFIX_ASID_SHIFT, level = KVMMU_PREFIX_LEVEL(like);
    const int others = KVMMU_PREFIX_LEVEL(l->like) != PG_LEVEL_4K; /* entries may lead to further tables */
    uint64_t left = lanes;
    for (; lanes; lanes &= lanes - 1) {
        const size_t lane = kvmmu_first_bit(lanes);
        const uint64_t addr = l->addr[lane], region = kvmmu_region(format, addr);
        const struct kvmmu_prefix *p = &prefixes[KVMMU_PREFIX_SLOT(region, place)];
        const struct kvmmu_pass *pass = &of[access[lane]];
        uint64_t entry, pte;
        if (!others && !(l->apart >> lane & 1) && (!l->voids || l->entry[lane] - l->voids >= PAGE_SIZE))
            continue; /* its prefix is the directory's */
        if ((p->tag ^ region ^ space) | ((p->ref ^ like) & PREFIX_LIKE_MASK))
            continue;
        entry = kvmmu_entry_hva(format, p->ref, addr);
        pte = kvmmu_read_entry(format, entry);
        if ((pte & pass->care) != pass->want)
            continue;
        left ^= lanes & -lanes;
        l->ref[lane] = p->ref;
        l->entry[lane] = entry;
        gpa[lane] = kvmmu_leaf_gpa(format, pte, (uint32_t)level, addr, 0);
    }
    return left;
}

/* 64 rows of the three common columns: lanes that pass, and lanes that fault. IN access_mask: what of an access its error code tells. */
KVMMU_INLINE void emit_body(const struct kvmmu_lanes *l, uint64_t fault, uint32_t access_mask, const uint64_t *from, uint64_t *gpa,
                            uint8_t *status, uint32_t *error_code)
{
    if (gpa)
        for (size_t i = 0; i < KVMMU_LANES; i++)
            gpa[i] = from[i] | -(fault >> i & 1);
    if (status)
        for (size_t i = 0; i < KVMMU_LANES; i++)
            status[i] = (uint8_t)(fault >> i & 1 ? STATUS_PAGE_FAULT : STATUS_OK);
    if (error_code)
        for (size_t i = 0; i < KVMMU_LANES; i++) {
            uint64_t code = l->error[i] | (l->look[i] >> KVMMU_LOOK_ACCESS_SHIFT & access_mask);
            error_code[i] = (uint32_t)(code & -(fault >> i & 1));
        }
}

/* The rules of the last entry, for all lanes. */
KVMMU_INLINE void judge_body(int format, int large, int keys, struct kvmmu_lanes *l, const struct kvmmu_lane_walk *w)
{
    const struct kvm_page_format *fmt = w->fmt;
    const uint64_t bad_mt_xwr = fmt->bad_mt_xwr, present_mask = w->present_mask, page_size_mask = w->page_size_mask;
    const uint64_t pse36_mask = w->pse36_mask, accessed_mask = w->accessed_mask;
    /* the dirty bit is the one above the accessed bit */
    const uint64_t write_look = accessed_mask ? (uint64_t)ACCESS_WRITE_MASK << KVMMU_LOOK_ACCESS_SHIFT : 0;
    const int write_shift = KVMMU_LOOK_ACCESS_SHIFT + 1 - (format == KVMMU_FORMAT_EPT ? EPT_DIRTY_SHIFT : PT_DIRTY_SHIFT);
    const uint64_t pkru = w->pkru, pkru_mask = fmt->pkru_mask;
    const uint64_t cold_mask = accessed_mask ? UINT64_C(1) << PREFIX_COLD_SHIFT : 0;
    uint64_t rsvd[2][PT_MAX_LEVELS];
    vec bits = FIRST_BITS, fault = bits & 0, slow = bits & 0;

    memcpy(rsvd, fmt->rsvd_bits_mask, sizeof rsvd);
    for (size_t i = 0; i < KVMMU_LANES; i++)
        l->pte[i] = kvmmu_read_entry(format, l->entry[i]);
    EACH_VECTOR(i)
    {
        vec pte = VEC(l->pte), ref = VEC(l->ref), look = VEC(l->look), addr = VEC(l->addr), zero = pte & 0;
        vec acc = (ref >> PREFIX_ACCESS_SHIFT) & KVMMU_GPTE_ACCESS(format, KVMMU_GPTE_RIGHTS(format, pte));
        vec access = look >> KVMMU_LOOK_ACCESS_SHIFT;
        vec need = accessed_mask | (look & write_look) >> write_shift;
        vec denied = look >> acc & 1, not_leaf = zero, offset = zero + PAGE_OFFSET_MASK;
        vec r0 = zero + rsvd[0][0], r1 = r0, high = zero, key, malformed, absent, bad;
        if (large) {
            vec level = KVMMU_PREFIX_LEVEL(ref), is_large = WHERE(level != PG_LEVEL_4K);
            r1 = zero + rsvd[1][0];
            for (int n = 1; n < PT_MAX_LEVELS; n++) {
                r0 = SELECT(WHERE(level == (uint64_t)n + 1), rsvd[0][n], r0);
                r1 = SELECT(WHERE(level == (uint64_t)n + 1), rsvd[1][n], r1);
            }
            not_leaf = is_large & WHERE((pte & page_size_mask) == 0);
            offset = ((1 + zero) << KVMMU_LEVEL_SHIFT(format, level)) - 1;
            high = is_large & pse36_mask;
        }
        key = zero;
        if (keys)
            key = KVMMU_PKEY_DENIED(pkru_mask + zero, pkru + zero, acc, KVMMU_GPTE_PKEY(format, pte), access);
        malformed = ~WHERE(KVMMU_GPTE_MALFORMED(format, r0, r1, bad_mt_xwr + zero, pte) == 0);
        absent = WHERE((pte & present_mask) == 0);
        bad = absent | malformed | (~WHERE((denied | key) == 0) & ~not_leaf);
        fault |= bad & bits;
        VEC(l->error) = ~absent & (PFERR_PRESENT_MASK | SELECT(malformed, PFERR_RSVD_MASK, ~WHERE(key == 0) & PFERR_PK_MASK));
        slow |= ~WHERE(((need & ~pte) | not_leaf | (ref & cold_mask)) == 0) & bits;
        bits <<= VEC_LANES;
        VEC(l->pte_access) = acc;
        VEC(l->gpa) = KVMMU_LEAF_GPA(format, pte, offset, addr, high);
    }
    l->fault = ONE_WORD(fault);
    l->slow = ONE_WORD(slow) & ~l->fault;
}

KVMMU_INLINE void judge_any(int format, struct kvmmu_lanes *l, const struct kvmmu_lane_walk *w)
{
    const int keys = format == KVMMU_FORMAT_64 && w->fmt->pkru_mask && w->pkru;
    vec tables = ~(FIRST_BITS & 0);
    EACH_VECTOR(i)
        tables &= CVEC(l->ref);
    /* level 1 has no large pages: bit 7 is its PAT bit and reserves nothing */
    if (!((tables[0] & tables[1] & tables[2] & tables[3]) >> PREFIX_TABLE_SHIFT) || w->fmt->rsvd_bits_mask[0][0] != w->fmt->rsvd_bits_mask[1][0]) {
        if (keys)
            judge_body(format, 1, 1, l, w);
        else
            judge_body(format, 1, 0, l, w);
    } else if (keys) {
        judge_body(format, 0, 1, l, w);
    } else {
        judge_body(format, 0, 0, l, w);
    }
}

/* Known translations of 64 rows: bit n is set where row n has none. OUT gpa: right where the bit is clear. */
KVMMU_INLINE uint64_t recall_body(const struct kvmmu_tlb_entry *tlb, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                                  const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level)
{
    const uint64_t *words = (const uint64_t *)tlb;
    vec bits = FIRST_BITS, miss = bits & 0;
    EACH_VECTOR(i)
    {
        vec page = CVEC(gva) >> PAGE_SHIFT, space = (bits & 0) + asid, value, a, hit, slot;
        if (ctx)
            space += WIDE(half_vec, ctx);
        if (access_stride)
            a = WIDE(byte_vec, access);
        else
            a = (bits & 0) + access[0];
        a &= ~(WHERE((a & ACCESS_IMPLICIT_MASK) != 0) & (ACCESS_AC_MASK | ACCESS_USER_MASK | ACCESS_IMPLICIT_MASK));
        slot = KVMMU_TLB_SLOT(page, space) * 2;
        value = GATHER(words + 1, slot);
        hit = WHERE(GATHER(words, slot) == (page << TLB_ASID_BITS | space)) & value >> (a >> PERMISSIONS_INDEX_SHIFT);
        VEC(gpa) = KVMMU_TLB_GPA(value) | (CVEC(gva) & PAGE_OFFSET_MASK);
        if (level)
            *(byte_vec *)&level[i] = __builtin_convertvector(value >> TLB_LEVEL_SHIFT, byte_vec);
        miss |= ((hit & 1) - 1) & bits;
        bits <<= VEC_LANES;
    }
    return ONE_WORD(miss);
}

/* ---- one set of functions for each instruction set ---------------------------------------------------------------- */

#define KVMMU_FORMAT_FUNCTIONS(format, name, target)                                                                             \
    target static void start_##name(struct kvmmu_lanes *l, const uint64_t *gva, uint64_t gva_mask, int canonical_shift, int far, \
                                    const struct kvmmu_directory *d)                                                             \
    {                                                                                                                            \
        if (far)                                                                                                                 \
            start_body(format, 1, l, gva, gva_mask, canonical_shift, d);                                                         \
        else                                                                                                                     \
            start_body(format, 0, l, gva, gva_mask, canonical_shift, d);                                                         \
    }                                                                                                                            \
    target static uint64_t sure_##name(struct kvmmu_lanes *l, const struct kvmmu_passes *p, const uint8_t *access, int alike,    \
                                       uint64_t like, uint64_t *gpa)                                                             \
    {                                                                                                                            \
        return alike ? sure_body(format, 1, l, p, access, like, gpa) : sure_body(format, 0, l, p, access, like, gpa);            \
    }                                                                                                                            \
    target static uint64_t beside_##name(struct kvmmu_lanes *l, uint64_t lanes, const struct kvmmu_prefix *prefixes, uint32_t asid,   \
                                         uint64_t like, const struct kvmmu_pass *of, const uint8_t *access, uint64_t *gpa)           \
    {                                                                                                                            \
        return beside_body(format, l, lanes, prefixes, asid, like, of, access, gpa);                                             \
    }                                                                                                                            \
    target static void judge_##name(struct kvmmu_lanes *l, const struct kvmmu_lane_walk *w)                                      \
    {                                                                                                                            \
        judge_any(format, l, w);                                                                                                 \
    }

#define KVMMU_LANE_FUNCTIONS(name, target, sure_64, recall)                                                                      \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_32, 32_##name, target)                                                                   \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_64, 64_##name, target)                                                                   \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_EPT, ept_##name, target)                                                                 \
    target static uint64_t recall_##name(const struct kvmmu_tlb_entry *tlb, const uint64_t *gva, const uint8_t *access,          \
                                         size_t access_stride, const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level) \
    {                                                                                                                            \
        if (!ctx && !access_stride)                                                                                              \
            return recall_body(tlb, gva, access, 0, 0, asid, gpa, level);                                                        \
        if (!ctx)                                                                                                                \
            return recall_body(tlb, gva, access, 1, 0, asid, gpa, level);                                                        \
        return recall_body(tlb, gva, access, access_stride, ctx, asid, gpa, level);                                              \
    }                                                                                                                            \
    target static void emit_##name(const struct kvmmu_lanes *l, uint64_t fault, uint32_t access_mask, const uint64_t *from,      \
                                   uint64_t *gpa, uint8_t *status, uint32_t *error_code)                                         \
    {                                                                                                                            \
        emit_body(l, fault, access_mask, from, gpa, status, error_code);                                                         \
    }                                                                                                                            \
    static const struct kvmmu_lane_ops lane_ops_##name = {{start_32_##name, start_64_##name, start_ept_##name},                  \
                                                          {sure_32_##name, sure_64, sure_ept_##name},                            \
                                                          {beside_32_##name, beside_64_##name, beside_ept_##name},               \
                                                          {judge_32_##name, judge_64_##name, judge_ept_##name},                  \
                                                          recall, emit_##name};

KVMMU_LANE_FUNCTIONS(portable, , sure_64_portable, recall_portable)
#if defined(__x86_64__) && defined(__GNUC__)
#define KVMMU_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,bmi,bmi2,prefer-vector-width=512")))
#include "_lanes_avx2.h"
KVMMU_LANE_FUNCTIONS(avx2, KVMMU_AVX2, kvmmu_sure_64, kvmmu_recall)
KVMMU_LANE_FUNCTIONS(avx512, KVMMU_AVX512, kvmmu_sure_64, kvmmu_recall)
#endif

/* The functions for an instruction set by name; NULL where the CPU, or this build, does not have it. */
static const struct kvmmu_lane_ops *kvmmu_lane_ops_of(const char *name)
{
    if (!strcmp(name, "portable"))
        return &lane_ops_portable;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        return &lane_ops_avx2;
    if (!strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return &lane_ops_avx512;
#endif
    return NULL;
}

#endif /* KVMMU_LANES_H */
