/* One set-associative structure of keys, which _structure.pxd describes. */
#ifndef KVMMU_TLB_STRUCTURE_H
#define KVMMU_TLB_STRUCTURE_H

#include <stdint.h>

struct kvmmu_key_structure {
    uint64_t *keys;     /* [set * stride + way]; 0: empty, and beyond the last way */
    uint64_t *trees;    /* tree-PLRU: per set, a bit per node; 1 points to the right half */
    uint64_t last;      /* the key used last, if it is still there, else 0 */
    uint64_t random;    /* state of the generator */
    uint64_t replaced;  /* keys that others took the place of */
    uint32_t sets;
    uint32_t ways;
    uint32_t stride;    /* ways, rounded up to whole vectors */
    uint32_t set_mask;  /* sets - 1 where that is a power of two, else 0 */
    int policy;
};

#endif /* KVMMU_TLB_STRUCTURE_H */
