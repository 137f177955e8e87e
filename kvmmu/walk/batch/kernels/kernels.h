/* The functions that work on 64 rows at a time, one table of them for each instruction set.
 *
 * The rows of a block are of one walk. Each starts from a cached entry of its upper levels (a paging-structure-cache entry: where the
 * last entry lies, and the rights so far), and its last entry is read from memory. Leaves that the accept masks accept need few
 * instructions (_accept_masks.h); the whole rule is there for the others. The loops have a constant count and no branches.
 */
#ifndef KVMMU_KERNELS_H
#define KVMMU_KERNELS_H

#include "kvmmu/arch/_linear.h"
#include "kvmmu/walk/batch/kernels/_accept_masks.h"

/* Look the upper levels up. OUT psce, entry. Returns the lanes whose entry is not cached, or has an accessed bit clear above it.
 * IN far: last entries are probably not in the cache of the CPU, and are prefetched. */
typedef uint64_t (*kvmmu_find_fn)(struct kvmmu_leaf_block *, const struct kvmmu_leaf_checker *, const uint64_t *gva, int far);
/* Go from entries of level 2 to last entries. Returns the lanes for which an entry of level 2 does not tell the last one. IN psce, entry: of
 * level 2, looked up by find(). OUT psce, entry; pte: where the entry of level 2 lies. Not of 32-bit tables, which are few. */
typedef uint64_t (*kvmmu_descend_fn)(struct kvmmu_leaf_block *, const struct kvmmu_descent *, const uint64_t *gva, int far);
/* Read the last entries, and compare them with the accept masks. Returns the lanes that are not accepted. OUT pte; gpa: of accepted
 * lanes; slow: lanes not accepted for an accessed or dirty bit alone; level (or NULL): of all; status, error_code (or NULL): as if
 * all were accepted. IN ahead: NULL, or 64 addresses to prefetch meanwhile: as many misses as a CPU can have under way go on, which
 * prefetches one behind the other would wait for. */
typedef uint64_t (*kvmmu_accept_fn)(struct kvmmu_leaf_block *, const struct kvmmu_leaf_checker *, const uint64_t *gva,
                                    const uint8_t *access, uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code,
                                    const uint64_t *ahead);
/* Read the last entries, and check them by the whole rule, as check_leaf() does one. OUT pte, pte_access, access_info, error, fault,
 * slow; gpa: of lanes that pass. */
typedef void (*kvmmu_check_fn)(struct kvmmu_leaf_block *, const struct kvmmu_leaf_rules *, uint64_t gva_mask, const uint64_t *gva,
                               const uint8_t *access, uint64_t *gpa);
/* Look translations of 64 rows up in the memo. Returns the rows that have none. OUT gpa, level: of the others; status, error_code: as
 * if all had one. IN ctx: NULL, or of each row; memo_id: of the only context, or of context 0. */
typedef uint64_t (*kvmmu_recall_fn)(const struct kvmmu_memo_entry *, const uint64_t *gva, const uint8_t *access, const uint32_t *ctx,
                                    uint64_t memo_id, uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code);
/* Write 64 rows of the three columns (or NULL) of lanes that pass and of lanes that fault. IN access_mask: bits of an access that its
 * error code reports; gpa: holds the addresses of lanes that pass already. */
typedef void (*kvmmu_emit_fn)(const struct kvmmu_leaf_block *, uint64_t fault, uint32_t access_mask, uint64_t *gpa, uint8_t *status,
                              uint32_t *error_code);

/* Take the tags from the addresses of 64 rows; those that LASS refuses become KVMMU_NO_LINEAR_ADDRESS. */
typedef void (*kvmmu_pre_process_fn)(const struct kvmmu_linear_rules *, const uint64_t *gva, const uint8_t *access, uint64_t *out);

struct kvmmu_kernels { /* [KVMMU_FORMAT_*] */
    kvmmu_find_fn find[3];
    kvmmu_descend_fn descend[3];
    kvmmu_accept_fn accept[3];
    kvmmu_check_fn check[3];
    kvmmu_recall_fn recall;
    kvmmu_emit_fn emit;
    kvmmu_pre_process_fn pre_process;
};

#define KVMMU_OF_THE_LIBRARY __attribute__((visibility("hidden")))

extern const struct kvmmu_kernels kvmmu_kernels_portable KVMMU_OF_THE_LIBRARY;
#if defined(__x86_64__)
extern const struct kvmmu_kernels kvmmu_kernels_avx2 KVMMU_OF_THE_LIBRARY;
extern const struct kvmmu_kernels kvmmu_kernels_avx512 KVMMU_OF_THE_LIBRARY;
#endif

/* The functions for an instruction set by name; NULL where the CPU, or this build, does not have it. */
const struct kvmmu_kernels *kvmmu_kernels_of(const char *name) KVMMU_OF_THE_LIBRARY;

#endif /* KVMMU_KERNELS_H */
