/* What a batch caches of walks (paging-structure-cache entries, and the memo of whole translations), and the state of 64 rows. */
#ifndef KVMMU_STATE_H
#define KVMMU_STATE_H

#include <string.h>

#include "kvmmu/arch/_gpte.h"
#include "kvmmu/memory/_memory.h"

#define KVMMU_BLOCK_ROWS ((size_t)64)

#define KVMMU_ALIGNED(n) __attribute__((aligned(n)))

/* The value of a paging-structure-cache entry: the host address of the table of the last entry (level 1, and whole tables) or of the
 * last entry itself, the rights so far, the level of the last entry, and four flags. */
#define PSCE_HVA_BITS 48
#define PSCE_HVA_MASK ((UINT64_C(1) << PSCE_HVA_BITS) - 1)
#define PSCE_ACCESSED_CLEAR_SHIFT 48 /* an accessed bit above the last entry is clear */
#define PSCE_READONLY_SHIFT 49       /* the guest cannot write the last entry: its A/D bits stay */
#define PSCE_WRITE_REFUSED_SHIFT 50  /* the second stage is asked for each update of the last entry, and refuses it */
#define PSCE_LEVEL_SHIFT 56
#define PSCE_LEVEL_MASK UINT64_C(7)
#define PSCE_ACCESS_SHIFT 59
#define PSCE_TABLE_SHIFT 63 /* the address is that of a table: the sign, for a cheap test */

/* The cache is looked up by the part of an address above the index of the last level. */
#define PSC_BITS 15
#define PSC_WALK_ID_SHIFT 43 /* bits of that part, whether the address is canonical or not */
#define PSC_WALK_ID_BITS 18
#define PSC_TAG_LEVEL_SHIFT 61 /* level of the tables, less 1, modulo 4 */
#define PSC_TAG_ACCESSED_CLEAR (UINT64_C(1) << 63) /* the flag of the value, for look-ups by tag alone */
#define PSC_ADDR_MASK ((UINT64_C(1) << GVA_BITS_5_LEVEL) - 1)

/* The memo of translations: the tag is page << MEMO_ID_BITS | memo id of the walk; `page` holds the level, the page frame, and the
 * accesses that are known to pass. */
#define MEMO_BITS 12
#define MEMO_ID_BITS PAGE_SHIFT
#define MEMO_FRAME_SHIFT 16
#define MEMO_LEVEL_SHIFT 56

struct kvmmu_psc_entry {
    uint64_t tag;   /* of kvmmu_psc_tag(), and PSC_TAG_ACCESSED_CLEAR; 0: none */
    uint64_t value; /* PSCE_* */
};

struct kvmmu_memo_entry {
    uint64_t tag; /* 0: none */
    uint64_t page;
};

/* The rules of a step from entries of level 2, in tables that are cached, to last entries: which of them pass, and one slot that tables
 * may lie in. */
struct kvmmu_descent {
    uint64_t gva_mask;
    uint64_t base;         /* address bits of an entry */
    uint64_t want, care;   /* what an entry of level 2 holds in these bits that leads to a table, and has its accessed bit */
    uint64_t nothing;      /* address of an entry of zeros, which does not */
    uint64_t gpa, size;    /* of the slot */
    uint64_t hva;          /* where gpa 0 would be, if it were in the slot */
    uint64_t psce;         /* of a table in it, without its address and rights */
    uint64_t present_mask, page_size_mask;
};

/* What the leaf check needs of a walk. */
struct kvmmu_leaf_rules {
    const struct kvm_page_format *fmt;
    uint64_t present_mask;
    uint64_t page_size_mask;
    uint64_t pse36_mask;
    uint64_t accessed_mask; /* 0: accessed and dirty bits do not count */
    uint64_t address_mask;  /* of an entry: all but the encryption bit */
    uint64_t keys;          /* the registers of protection keys */
    uint32_t walk_id;
    int format;  /* KVMMU_FORMAT_* */
    int sets_ad; /* 0: rows with accessed or dirty bits to set are left to the scalar walk */
    int shadow_stacks; /* some accesses are to shadow stacks */
    int logs;    /* a page that becomes dirty takes an entry of a log, which the scalar walk alone fills */
};

/* The accept masks of one stage of a walk (_accept_masks.h), and where its cached entries are. A leaf that is not accepted may pass by
 * the whole rule. Leaves are of two kinds: in tables of last entries, and large pages of one size.
 * Where most last entries are of a higher level (large pages, absent tables), whole tables of that level are cached, too: a tag then
 * covers all that such a table does, and an entry that leads to another table is not accepted. */
enum { LEAF_IN_TABLE, LEAF_LARGE, LEAF_KINDS };

struct kvmmu_leaf_checker {
    struct kvmmu_psc_entry *psc;
    uint64_t walk_slot;    /* spreads walks with the same tags over the cache */
    uint64_t walk_tag;     /* of the walk: kvmmu_psc_tag(0, ...) */
    int level;             /* of the tables of last entries */
    int tag_shift;
    int entry_shift;       /* address to offset in its table */
    uint64_t gva_mask;
    uint64_t base;         /* address bits of an entry */
    uint64_t nothing;      /* psce of addresses that have none: the address of an entry of zeros, of no kind */
    uint64_t want;         /* what an accepted entry holds in the bits of care */
    uint64_t care[LEAF_KINDS];
    uint64_t offset[LEAF_KINDS];
    uint8_t levels[16];    /* [bits 59:56 of a psce: level, and ACC_READ_MASK]: ACC_ALL where it is of one of the kinds */
    uint8_t denied[2][16]; /* [access >> 4][ACC_*]: bit n: the access with n in its next three bits is not allowed */
    uint8_t need[16];      /* [access >> 1]: PT_ACCESSED_MASK, PT_DIRTY_MASK, whatever the format */
};

/* Vectors that lie across lines of the cache would take twice as long. */
#define KVMMU_BLOCK_ALIGNMENT 64

struct kvmmu_leaf_block {
    uint64_t psce[KVMMU_BLOCK_ROWS] KVMMU_ALIGNED(KVMMU_BLOCK_ALIGNMENT);
    uint64_t entry[KVMMU_BLOCK_ROWS]; /* host address of the last entry */
    uint64_t pte[KVMMU_BLOCK_ROWS];
    uint64_t access_info[KVMMU_BLOCK_ROWS]; /* kvm_page_format.access_info of the access */
    uint64_t pte_access[KVMMU_BLOCK_ROWS];
    uint64_t gpa[KVMMU_BLOCK_ROWS];
    uint64_t error[KVMMU_BLOCK_ROWS]; /* error code of a fault, but for the bits that come from the access */
    int level; /* of kvmmu_leaf_checker, when psce was looked up */
    /* bit n: of lane n */
    uint64_t noncanonical;
    uint64_t miss;           /* nothing is cached */
    uint64_t accessed_clear; /* an accessed bit above the last entry is clear */
    uint64_t fault;          /* the last entry is not present, malformed, or denies the access */
    uint64_t slow;           /* no fault, but A/D bits to set, or not a leaf */
};

#define KVMMU_ADDR_TAG_SHIFT(format) KVMMU_LEVEL_SHIFT(format, PG_LEVEL_2M)
/* IN spread: kvmmu_walk_spread() of the walk, which keeps walks with the same tags apart. */
#define KVMMU_PSC_SLOT(addr_tag, spread) (((addr_tag) ^ (addr_tag) >> PSC_BITS ^ (spread)) & ((UINT64_C(1) << PSC_BITS) - 1))
#define KVMMU_MEMO_GPA(value) ((value) >> (MEMO_FRAME_SHIFT - PAGE_SHIFT) & PT64_BASE_ADDR_MASK)
#define KVMMU_MEMO_SPREAD(walk_id) ((walk_id) << 3)
#define KVMMU_MEMO_SLOT(page, walk_id) (((page) ^ (page) >> MEMO_BITS ^ KVMMU_MEMO_SPREAD(walk_id)) & ((UINT64_C(1) << MEMO_BITS) - 1))

/* Offset of the entry of addr in its table, the last one of its walk. */
#define KVMMU_TABLE_OFFSET(format, addr)                                                     \
    ((format) == KVMMU_FORMAT_32 ? ((addr) >> (PAGE_SHIFT - 2)) & PT32_INDEX_MASK << 2       \
                                 : ((addr) >> (PAGE_SHIFT - 3)) & PT64_INDEX_MASK << 3)
#define KVMMU_PSCE_LEVEL(psce) ((psce) >> PSCE_LEVEL_SHIFT & PSCE_LEVEL_MASK)

KVMMU_INLINE uint64_t kvmmu_addr_tag(int format, uint64_t addr)
{
    return addr >> KVMMU_ADDR_TAG_SHIFT(format);
}

KVMMU_INLINE uint64_t kvmmu_walk_spread(uint32_t walk_id)
{
    return walk_id * UINT64_C(0x9E3779B97F4A7C15) >> 40;
}

KVMMU_INLINE uint64_t kvmmu_psc_slot(uint64_t addr_tag, uint32_t walk_id)
{
    return KVMMU_PSC_SLOT(addr_tag, kvmmu_walk_spread(walk_id));
}

KVMMU_INLINE uint64_t kvmmu_psc_tag(uint64_t addr_tag, uint32_t walk_id)
{
    return addr_tag ^ (uint64_t)walk_id << PSC_WALK_ID_SHIFT;
}

KVMMU_INLINE uint64_t kvmmu_memo_slot(uint64_t page, uint64_t walk_id)
{
    return KVMMU_MEMO_SLOT(page, walk_id);
}

KVMMU_INLINE uint64_t kvmmu_memo_gpa(uint64_t value)
{
    return KVMMU_MEMO_GPA(value);
}

KVMMU_INLINE uint64_t kvmmu_psce_level(uint64_t psce)
{
    return KVMMU_PSCE_LEVEL(psce);
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

KVMMU_INLINE uint64_t kvmmu_entry_hva(int format, uint64_t psce, uint64_t addr)
{
    return (psce & PSCE_HVA_MASK) + (psce >> PSCE_TABLE_SHIFT ? KVMMU_TABLE_OFFSET(format, addr) : 0);
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

/* Fetch the word at an address of the host, which may be any. */
KVMMU_INLINE void kvmmu_prefetch(uint64_t hva)
{
    __builtin_prefetch((const void *)(uintptr_t)hva, 0, 3);
}

/* Give one lane a paging-structure-cache entry. */
KVMMU_INLINE void kvmmu_set_psce(int format, struct kvmmu_leaf_block *l, size_t lane, uint64_t addr, uint64_t psce)
{
    l->psce[lane] = psce;
    l->entry[lane] = kvmmu_entry_hva(format, psce, addr);
}

#endif /* KVMMU_STATE_H */
