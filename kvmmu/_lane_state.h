/* What lanes hold, and what a batch remembers for them: prefixes, directories, translations; and where each is found. */
#ifndef KVMMU_LANE_STATE_H
#define KVMMU_LANE_STATE_H

#include <string.h>

#include "_gpte.h"

#define KVMMU_LANES ((size_t)64)

/* A prefix in one word: address in the host of the table of the last entry (level 1) or of the last entry itself (other levels),
 * rights so far, level of the last entry, and three notes. */
#define PREFIX_HVA_BITS 48
#define PREFIX_HVA_MASK ((UINT64_C(1) << PREFIX_HVA_BITS) - 1)
#define PREFIX_LIKE_MASK (~PREFIX_HVA_MASK) /* what prefixes that differ in their address alone agree in */
#define PREFIX_COLD_SHIFT 48     /* an accessed bit above the last entry is still to be set */
#define PREFIX_READONLY_SHIFT 49 /* the guest cannot write the last entry: its A/D bits stay */
#define PREFIX_REFUSED_SHIFT 50  /* the second stage does not let the guest write the last entry, and is asked for each update */
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

#endif /* KVMMU_LANE_STATE_H */
