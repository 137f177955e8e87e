/* Two LRU levels of 4K pages in plain C: 64 entries in 4 ways, 1536 entries in 12 ways. A set is an array in the order of use; a
 * hit moves its page to the front. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define L1_SETS 16
#define L1_WAYS 4
#define L2_SETS 128
#define L2_WAYS 12

struct plain_tlb {
    uint64_t l1[L1_SETS][L1_WAYS];
    uint64_t l2[L2_SETS][L2_WAYS];
    uint64_t l1_hits, l2_hits, walks;
};

/* Put a page first in a set. Returns 1 if it was there. */
static int use(uint64_t *set, int ways, uint64_t page)
{
    int way = 0;
    while (way < ways && set[way] != page)
        way++;
    const int hit = way < ways;
    if (!hit)
        way = ways - 1;
    for (; way > 0; way--)
        set[way] = set[way - 1];
    set[0] = page;
    return hit;
}

void plain_tlb_run(struct plain_tlb *t, const uint64_t *addr, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint64_t page = (addr[i] >> 12) + 1; /* 0 is an empty way */
        if (use(t->l1[(page - 1) % L1_SETS], L1_WAYS, page))
            t->l1_hits++;
        else if (use(t->l2[(page - 1) % L2_SETS], L2_WAYS, page))
            t->l2_hits++;
        else
            t->walks++;
    }
}

size_t plain_tlb_size(void)
{
    return sizeof(struct plain_tlb);
}
