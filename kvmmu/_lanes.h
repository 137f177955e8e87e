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

#include <string.h>

#include "_gpte.h"

#define KVMMU_LANES ((size_t)64)

/* A prefix in one word: address in the host of the table of the last entry (level 1) or of the last entry itself (other levels),
 * rights so far, level of the last entry, and two notes. */
#define PREFIX_HVA_BITS 48
#define PREFIX_HVA_MASK ((UINT64_C(1) << PREFIX_HVA_BITS) - 1)
#define PREFIX_COLD_SHIFT 48     /* an accessed bit above the last entry is still to be set */
#define PREFIX_READONLY_SHIFT 49 /* the guest cannot write the last entry: its A/D bits stay */
#define PREFIX_LEVEL_SHIFT 56
#define PREFIX_LEVEL_MASK UINT64_C(7)
#define PREFIX_ACCESS_SHIFT 59
#define PREFIX_TABLE_SHIFT 63    /* level 1: the sign, for a cheap test */

/* The table of prefixes: by region, the part of an address above the indices of the last two levels. */
#define PREFIX_BITS 15
#define PREFIX_ASID_SHIFT 36 /* region bits of a 57-bit address */
#define PREFIX_ASID_BITS 28
#define PREFIX_ADDR_MASK ((UINT64_C(1) << GVA_BITS_5_LEVEL) - 1)

/* A directory: the tables of last entries of one level, by region, the part of an address above the indices of that level and
 * the one below it. A word is the address of the table in the host less a phase that all of them share, shifted up, and below it
 * a tag: region bits that its place does not tell, and the name of the directory, which is never 0. */
#define DIRECTORY_WORD_SHIFT 16
#define DIRECTORY_TAG_BITS (PAGE_SHIFT + DIRECTORY_WORD_SHIFT)
#define DIRECTORY_NAME_SHIFT 21 /* 57 - 21 - PREFIX_BITS */
#define DIRECTORY_NAMES (1 << (DIRECTORY_TAG_BITS - DIRECTORY_NAME_SHIFT))

/* Translations by page and access: the tag is page << TLB_ASID_BITS | asid; the value level, page frame, accesses known to pass. */
#define TLB_BITS 12
#define TLB_ASID_BITS 12
#define TLB_FRAME_SHIFT 16
#define TLB_LEVEL_SHIFT 56

struct kvmmu_prefix {
    uint64_t tag; /* region ^ asid << PREFIX_ASID_SHIFT; 0: none */
    uint64_t ref; /* PREFIX_* */
};

struct kvmmu_tlb_entry {
    uint64_t tag; /* 0: none */
    uint64_t page;
};

struct kvmmu_directory {
    uint64_t *words;  /* 1 << PREFIX_BITS */
    uint64_t name;    /* in its place */
    uint64_t phase;   /* of the addresses of tables within pages of the host */
    uint64_t nothing; /* address of a page of zeros with this phase */
    uint64_t like;    /* the prefixes of its tables; 0: there are none */
    int region_shift;
    int entry_shift;  /* address to offset in its table */
    int has_voids;    /* some words lead to nothing: prefixes of other levels */
};

/* What the lanes need of a walk. */
struct kvmmu_lane_walk {
    const struct kvm_page_format *fmt;
    uint64_t present_mask;
    uint64_t page_size_mask;
    uint64_t pse36_mask;
    uint64_t accessed_mask; /* 0: accessed and dirty bits do not count */
    uint32_t pkru;
    uint32_t asid;
};

struct kvmmu_lanes {
    uint64_t addr[KVMMU_LANES];
    uint64_t look[KVMMU_LANES];  /* kvm_page_format.looks of the access */
    uint64_t ref[KVMMU_LANES];
    uint64_t entry[KVMMU_LANES]; /* host address of the last entry */
    uint64_t pte[KVMMU_LANES];
    uint64_t pte_access[KVMMU_LANES];
    uint64_t gpa[KVMMU_LANES];
    uint64_t error[KVMMU_LANES]; /* error code of a fault, but for the bits that come from the access */
    uint64_t like;               /* of the directory */
    uint64_t voids;              /* entries from here on, of one page, are nothing; 0: there are none */
    /* bit n: of lane n */
    uint64_t noncanonical;
    uint64_t miss;  /* nothing is remembered */
    uint64_t apart; /* the prefix is not of the directory */
    uint64_t fault; /* the last entry is not present, malformed, or denies the access */
    uint64_t slow;  /* no fault, but A/D bits to set, or not a leaf */
};

/* Which last entries surely pass, whatever else they hold: (pte & care) == want. */
struct kvmmu_pass {
    uint64_t care;
    uint64_t want;
};

/* What surely passes each access. */
struct kvmmu_passes {
    struct kvmmu_pass of[KVMMU_ACCESS_BYTES];
};

typedef void (*kvmmu_start_fn)(struct kvmmu_lanes *, const uint64_t *gva, uint64_t gva_mask, int canonical_shift, int far,
                               const struct kvmmu_directory *);
typedef uint64_t (*kvmmu_sure_fn)(struct kvmmu_lanes *, const struct kvmmu_passes *, const uint8_t *access, int alike, uint64_t like,
                                  uint64_t *gpa);
typedef void (*kvmmu_judge_fn)(struct kvmmu_lanes *, const struct kvmmu_lane_walk *);
typedef uint64_t (*kvmmu_recall_fn)(const struct kvmmu_tlb_entry *, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                                    const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level);

typedef void (*kvmmu_emit_fn)(const struct kvmmu_lanes *, uint64_t fault, uint32_t access_mask, const uint64_t *from, uint64_t *gpa,
                              uint8_t *status, uint32_t *error_code);

struct kvmmu_lane_ops { /* [format] */
    kvmmu_start_fn start[3];
    kvmmu_sure_fn sure[3];
    kvmmu_judge_fn judge[3];
    kvmmu_recall_fn recall;
    kvmmu_emit_fn emit;
};

/* ---- vectors ------------------------------------------------------------------------------------------------------ */

#define VEC_LANES 4
typedef uint64_t word64 __attribute__((aligned(1), may_alias));
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

#define KVMMU_REGION_SHIFT(format) KVMMU_LEVEL_SHIFT(format, PG_LEVEL_2M)
/* IN place: kvmmu_prefix_place() of the walk, which keeps walks with the same regions apart. */
#define KVMMU_PREFIX_SLOT(region, place) (((region) ^ (region) >> PREFIX_BITS ^ (place)) & ((UINT64_C(1) << PREFIX_BITS) - 1))
#define KVMMU_TLB_GPA(value) ((value) >> (TLB_FRAME_SHIFT - PAGE_SHIFT) & PT64_BASE_ADDR_MASK)
#define KVMMU_TLB_SLOT(page, asid) (((page) ^ (page) >> TLB_BITS ^ (asid) << 3) & ((UINT64_C(1) << TLB_BITS) - 1))

#define KVMMU_DIRECTORY_SLOT(region) (((region) ^ (region) >> PREFIX_BITS) & ((UINT64_C(1) << PREFIX_BITS) - 1))
#define KVMMU_DIRECTORY_TAG(region) ((region) >> PREFIX_BITS & ((UINT64_C(1) << DIRECTORY_NAME_SHIFT) - 1))
#define DIRECTORY_TAG_MASK ((UINT64_C(1) << DIRECTORY_TAG_BITS) - 1)

/* Address of the entry of addr, from a prefix. */
#define KVMMU_TABLE_OFFSET(format, addr)                                                     \
    ((format) == KVMMU_FORMAT_32 ? ((addr) >> (PAGE_SHIFT - 2)) & PT32_INDEX_MASK << 2       \
                                 : ((addr) >> (PAGE_SHIFT - 3)) & PT64_INDEX_MASK << 3)
#define KVMMU_PREFIX_LEVEL(ref) ((ref) >> PREFIX_LEVEL_SHIFT & PREFIX_LEVEL_MASK)

KVMMU_INLINE uint64_t kvmmu_region(int format, uint64_t addr)
{
    return addr >> KVMMU_REGION_SHIFT(format);
}

KVMMU_INLINE uint64_t kvmmu_prefix_place(uint32_t asid)
{
    return asid * UINT64_C(0x9E3779B97F4A7C15) >> 40;
}

KVMMU_INLINE uint64_t kvmmu_prefix_slot(uint64_t region, uint32_t asid)
{
    return KVMMU_PREFIX_SLOT(region, kvmmu_prefix_place(asid));
}

KVMMU_INLINE uint64_t kvmmu_tlb_slot(uint64_t page, uint64_t asid)
{
    return KVMMU_TLB_SLOT(page, asid);
}

KVMMU_INLINE uint64_t kvmmu_tlb_gpa(uint64_t value)
{
    return KVMMU_TLB_GPA(value);
}

KVMMU_INLINE uint64_t kvmmu_prefix_level(uint64_t ref)
{
    return KVMMU_PREFIX_LEVEL(ref);
}

/* The lowest bit that is set; bits is not 0. */
KVMMU_INLINE size_t kvmmu_first_bit(uint64_t bits)
{
    return (size_t)__builtin_ctzll(bits);
}

/* Without the instruction, which not every CPU has, the compiler would call a function. */
KVMMU_INLINE int kvmmu_count_bits(uint64_t bits)
{
    bits -= bits >> 1 & UINT64_C(0x5555555555555555);
    bits = (bits & UINT64_C(0x3333333333333333)) + (bits >> 2 & UINT64_C(0x3333333333333333));
    return (int)(((bits + (bits >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f)) * UINT64_C(0x0101010101010101) >> 56);
}

KVMMU_INLINE uint64_t kvmmu_entry_hva(int format, uint64_t ref, uint64_t addr)
{
    return (ref & PREFIX_HVA_MASK) + (ref >> PREFIX_TABLE_SHIFT ? KVMMU_TABLE_OFFSET(format, addr) : 0);
}

KVMMU_INLINE uint64_t kvmmu_read_entry(int format, uint64_t hva)
{
    uint32_t half;
    uint64_t whole;
    if (format == KVMMU_FORMAT_32) {
        memcpy(&half, (const void *)(uintptr_t)hva, sizeof half);
        return half;
    }
    memcpy(&whole, (const void *)(uintptr_t)hva, sizeof whole);
    return whole;
}

KVMMU_INLINE uint64_t kvmmu_directory_slot(uint64_t region)
{
    return KVMMU_DIRECTORY_SLOT(region);
}

/* IN table: its address in the host, of the directory's phase */
KVMMU_INLINE uint64_t kvmmu_directory_word(const struct kvmmu_directory *d, uint64_t region, uint64_t table)
{
    return (table - d->phase) << DIRECTORY_WORD_SHIFT | KVMMU_DIRECTORY_TAG(region) | d->name;
}

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
        wide |= (addr + half) >> width;
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
    if (ONE_WORD(wide) | (ONE_WORD(wrong) & DIRECTORY_TAG_MASK))
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

/* Prefixes are alike in all but the address. */
#define PREFIX_LIKE_MASK (~PREFIX_HVA_MASK)

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

/* One lane that the directory does not know, after a remembered prefix that is like another: whether it surely passes.
 * IN pass: for its access. OUT ref, entry, gpa */
KVMMU_INLINE int kvmmu_pass_beside(int format, struct kvmmu_lanes *l, size_t lane, const struct kvmmu_prefix *prefixes, uint32_t asid,
                                   uint64_t like, const struct kvmmu_pass *pass, uint64_t *gpa)
{
    const uint64_t addr = l->addr[lane], region = kvmmu_region(format, addr), level = KVMMU_PREFIX_LEVEL(like);
    const struct kvmmu_prefix *p = &prefixes[kvmmu_prefix_slot(region, asid)];
    uint64_t entry, pte;
    if (p->tag != (region ^ (uint64_t)asid << PREFIX_ASID_SHIFT) || (p->ref ^ like) & PREFIX_LIKE_MASK)
        return 0;
    entry = kvmmu_entry_hva(format, p->ref, addr);
    pte = kvmmu_read_entry(format, entry);
    if ((pte & pass->care) != pass->want)
        return 0;
    l->ref[lane] = p->ref;
    l->entry[lane] = entry;
    gpa[lane] = kvmmu_leaf_gpa(format, pte, (uint32_t)level, addr, 0);
    return 1;
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

#define KVMMU_FORMAT_FUNCTIONS(format, name, target)                                                                                 \
    target static void start_##name(struct kvmmu_lanes *l, const uint64_t *gva, uint64_t gva_mask, int canonical_shift, int far,     \
                                    const struct kvmmu_directory *d)                                                                 \
    {                                                                                                                                \
        if (far)                                                                                                                     \
            start_body(format, 1, l, gva, gva_mask, canonical_shift, d);                                                             \
        else                                                                                                                         \
            start_body(format, 0, l, gva, gva_mask, canonical_shift, d);                                                             \
    }                                                                                                                                \
    target static uint64_t sure_##name(struct kvmmu_lanes *l, const struct kvmmu_passes *p, const uint8_t *access, int alike,        \
                                       uint64_t like, uint64_t *gpa)                                                                 \
    {                                                                                                                                \
        return alike ? sure_body(format, 1, l, p, access, like, gpa) : sure_body(format, 0, l, p, access, like, gpa);                \
    }                                                                                                                                \
    target static void judge_##name(struct kvmmu_lanes *l, const struct kvmmu_lane_walk *w)                                          \
    {                                                                                                                                \
        judge_any(format, l, w);                                                                                                     \
    }

#define KVMMU_LANE_FUNCTIONS(name, target)                                                                              \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_32, 32_##name, target)                                                          \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_64, 64_##name, target)                                                          \
    KVMMU_FORMAT_FUNCTIONS(KVMMU_FORMAT_EPT, ept_##name, target)                                                        \
    target static uint64_t recall_##name(const struct kvmmu_tlb_entry *tlb, const uint64_t *gva, const uint8_t *access, \
                                         size_t access_stride, const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level)\
    {                                                                                                                   \
        if (!ctx && !access_stride)                                                                                     \
            return recall_body(tlb, gva, access, 0, 0, asid, gpa, level);                                               \
        if (!ctx)                                                                                                       \
            return recall_body(tlb, gva, access, 1, 0, asid, gpa, level);                                               \
        return recall_body(tlb, gva, access, access_stride, ctx, asid, gpa, level);                                     \
    }                                                                                                                   \
    target static void emit_##name(const struct kvmmu_lanes *l, uint64_t fault, uint32_t access_mask, const uint64_t *from,\
                                   uint64_t *gpa, uint8_t *status, uint32_t *error_code)                                \
    {                                                                                                                   \
        emit_body(l, fault, access_mask, from, gpa, status, error_code);                                                \
    }                                                                                                                   \
    static const struct kvmmu_lane_ops lane_ops_##name = {{start_32_##name, start_64_##name, start_ept_##name},         \
                                                          {sure_32_##name, sure_64_##name, sure_ept_##name},                   \
                                                          {judge_32_##name, judge_64_##name, judge_ept_##name},         \
                                                          recall_##name, emit_##name};

KVMMU_LANE_FUNCTIONS(portable, )
#if defined(__x86_64__) && defined(__GNUC__)
#define KVMMU_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,bmi,bmi2,prefer-vector-width=512")))
#define KVMMU_AVX2 __attribute__((target("avx2,bmi,bmi2")))
KVMMU_LANE_FUNCTIONS(avx2, KVMMU_AVX2)
KVMMU_LANE_FUNCTIONS(avx512, KVMMU_AVX512)
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
