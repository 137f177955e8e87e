/* What lanes hold, and what a batch remembers for them: prefixes and translations; and where each is found. */
#ifndef KVMMU_LANE_STATE_H
#define KVMMU_LANE_STATE_H

#include <string.h>

#include "kvmmu/arch/_gpte.h"
#include "kvmmu/memory/_memory.h"

#define KVMMU_LANES ((size_t)64)

#define KVMMU_ALIGNED(n) __attribute__((aligned(n)))

/* A prefix in one word: address in the host of the table of the last entry (level 1, and whole tables) or of the last entry itself,
 * rights so far, level of the last entry, and three notes. */
#define PREFIX_HVA_BITS 48
#define PREFIX_HVA_MASK ((UINT64_C(1) << PREFIX_HVA_BITS) - 1)
#define PREFIX_COLD_SHIFT 48     /* an accessed bit above the last entry is still to be set */
#define PREFIX_READONLY_SHIFT 49 /* the guest cannot write the last entry: its A/D bits stay */
#define PREFIX_REFUSED_SHIFT 50  /* the second stage does not let the guest write the last entry, and is asked for each update */
#define PREFIX_LEVEL_SHIFT 56
#define PREFIX_LEVEL_MASK UINT64_C(7)
#define PREFIX_ACCESS_SHIFT 59
#define PREFIX_TABLE_SHIFT 63    /* of a table: the sign, for a cheap test */

/* The table of prefixes: by region, the part of an address above the indices of the last two levels. */
#define PREFIX_BITS 15
#define PREFIX_ASID_SHIFT 43 /* bits of a region, whether the address is canonical or not */
#define PREFIX_ASID_BITS 18
#define PREFIX_TAG_LEVEL_SHIFT 61 /* level of the tables, less 1, modulo 4 */
#define PREFIX_TAG_COLD (UINT64_C(1) << 63) /* as PREFIX_COLD_SHIFT says, for those that look at tags alone */
#define PREFIX_ADDR_MASK ((UINT64_C(1) << GVA_BITS_5_LEVEL) - 1)

/* Translations by page and access: the tag is page << TLB_ASID_BITS | asid; the value level, page frame, accesses known to pass. */
#define TLB_BITS 12
#define TLB_ASID_BITS PAGE_SHIFT
#define TLB_FRAME_SHIFT 16
#define TLB_LEVEL_SHIFT 56

struct kvmmu_prefix {
    uint64_t tag; /* of kvmmu_prefix_tag(), and PREFIX_TAG_COLD; 0: none */
    uint64_t ref; /* PREFIX_* */
};

struct kvmmu_tlb_entry {
    uint64_t tag; /* 0: none */
    uint64_t page;
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

/* One stage of a walk: where its prefixes are, and what surely passes after those of two kinds, tables of last entries and large
 * pages of one size (see _passes.h). What does not surely pass may pass yet.
 * Where most last entries are of a higher level (large pages, absent tables), the prefixes that count are of whole tables of that
 * level, too: a region is then all that such a table covers, and an entry that leads to another table is none of theirs. */
enum { STAGE_TABLE, STAGE_LARGE, STAGE_KINDS };

struct kvmmu_stage {
    struct kvmmu_prefix *prefixes;
    uint64_t place;        /* of the walk among them */
    uint64_t space;        /* of kvmmu_prefix_tag() */
    int level;             /* of the tables of last entries */
    int region_shift;
    int entry_shift;       /* address to offset in its table */
    uint64_t gva_mask;
    uint64_t nothing;      /* for addresses without a prefix: the address of an entry of zeros, of no kind */
    uint64_t want;         /* what an entry that passes holds in the bits of care */
    uint64_t care[STAGE_KINDS];
    uint64_t offset[STAGE_KINDS];
    uint8_t levels[16];    /* [low half of a prefix's highest byte: level, and ACC_READ_MASK]: ACC_ALL where it is of one of the kinds */
    uint8_t denied[2][16]; /* [access >> 4][ACC_*]: bit n: the access with n in its next three bits is not allowed */
    uint8_t need[16];      /* [access >> 1]: PT_ACCESSED_MASK, PT_DIRTY_MASK, whatever the format */
};

/* Vectors of lanes that lie across lines of the cache would take twice as long. */
#define KVMMU_LANES_ALIGNMENT 64

struct kvmmu_lanes {
    uint64_t ref[KVMMU_LANES] KVMMU_ALIGNED(KVMMU_LANES_ALIGNMENT);
    uint64_t entry[KVMMU_LANES]; /* host address of the last entry */
    uint64_t pte[KVMMU_LANES];
    uint64_t look[KVMMU_LANES];  /* kvm_page_format.looks of the access */
    uint64_t pte_access[KVMMU_LANES];
    uint64_t gpa[KVMMU_LANES];
    uint64_t error[KVMMU_LANES]; /* error code of a fault, but for the bits that come from the access */
    int level;                   /* of kvmmu_stage, when the prefixes were found */
    /* bit n: of lane n */
    uint64_t noncanonical;
    uint64_t miss;  /* nothing is remembered */
    uint64_t cold;  /* an accessed bit above the last entry is still to be set */
    uint64_t fault; /* the last entry is not present, malformed, or denies the access */
    uint64_t slow;  /* no fault, but A/D bits to set, or not a leaf */
};

#define KVMMU_REGION_SHIFT(format) KVMMU_LEVEL_SHIFT(format, PG_LEVEL_2M)
/* IN place: kvmmu_prefix_place() of the walk, which keeps walks with the same regions apart. */
#define KVMMU_PREFIX_SLOT(region, place) (((region) ^ (region) >> PREFIX_BITS ^ (place)) & ((UINT64_C(1) << PREFIX_BITS) - 1))
#define KVMMU_TLB_GPA(value) ((value) >> (TLB_FRAME_SHIFT - PAGE_SHIFT) & PT64_BASE_ADDR_MASK)
#define KVMMU_TLB_PLACE(asid) ((asid) << 3)
#define KVMMU_TLB_SLOT(page, asid) (((page) ^ (page) >> TLB_BITS ^ KVMMU_TLB_PLACE(asid)) & ((UINT64_C(1) << TLB_BITS) - 1))

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

KVMMU_INLINE uint64_t kvmmu_prefix_tag(uint64_t region, uint32_t asid)
{
    return region ^ (uint64_t)asid << PREFIX_ASID_SHIFT;
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
#if defined(__SANITIZE_THREAD__) /* else the compiler may take entries of several lanes at once */
    const void *p = (const void *)(uintptr_t)hva;
    return format == KVMMU_FORMAT_32 ? kvmmu_read32(p) : kvmmu_read64(p);
#endif
    uint32_t half;
    uint64_t whole;
    if (format == KVMMU_FORMAT_32) {
        memcpy(&half, (const void *)(uintptr_t)hva, sizeof half);
        return half;
    }
    memcpy(&whole, (const void *)(uintptr_t)hva, sizeof whole);
    return whole;
}

#endif /* KVMMU_LANE_STATE_H */
