/* Rows through levels that are all LRU, none of them inclusive or exclusive. There a level that misses enters the key whatever the
 * levels behind it say: what a level holds depends on the keys that reach it alone. So each level takes all keys of a block of rows
 * that the levels before it missed, one after the other, and neither hits nor misses are branches.
 *
 *     keys of the block, one per run of rows of one page and class -> level 0 -> its misses -> level 1 -> ... -> page walks
 *
 * Compiled for AVX2 and for any processor. */
#ifndef KVMMU_TLB_LRU_ROWS_H
#define KVMMU_TLB_LRU_ROWS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kvmmu/tlb/_structure.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define KVMMU_LRU_AVX2 1
#define KVMMU_LRU_FOR_AVX2 __attribute__((target("avx2")))
#else
#define KVMMU_LRU_AVX2 0
#endif

#define KVMMU_LRU_INLINE static inline __attribute__((always_inline))
#define KVMMU_LRU_NOWHERE 255
#define KVMMU_LRU_CLASSES 18    /* kind, user, size */
#define KVMMU_LRU_UNMAPPED 18   /* class of rows without a page */
#define KVMMU_LRU_BLOCK 512     /* rows: their keys fit in the first-level cache */
#define KVMMU_LRU_MOST_WAYS 16  /* in vectors */
#define KVMMU_LRU_PAGE_MASK ((UINT64_C(1) << 45) - 1)

struct kvmmu_lru_rows {
    size_t rows;
    const uint64_t *gva;
    const uint8_t *access;      /* one per row, or one: stride 0 */
    const uint8_t *leaf;
    const uint8_t *is_global;   /* or NULL */
    size_t access_stride, leaf_stride;
    uint8_t *level;             /* OUT, or NULL */
    uint8_t *references;        /* OUT, or NULL */
    uint8_t class_of[256];      /* by access: class of a 4K page */
    int shifts[3];              /* by size */
    uint64_t tags[3][2];        /* by size and global: with the size, in their places in a key */
    uint64_t addr_mask;
    int count;                  /* levels */
    struct kvmmu_key_structure *levels[16];
    uint32_t asked[KVMMU_LRU_CLASSES + 1]; /* bit per level */
    uint32_t all_asked[3];      /* by size: what all its classes ask; 0 if that is not the same */
    uint64_t (*hits)[KVMMU_LRU_CLASSES];   /* by level */
    uint64_t *walks;
    uint64_t references_read, unmapped;
    int has_psc, root_level;
    int (*walk)(void *h, uint64_t addr, int size);
    void *h;
};

struct kvmmu_lru_block {
    uint64_t key[KVMMU_LRU_BLOCK + 4];
    uint16_t row[KVMMU_LRU_BLOCK + 4];      /* the first of a run */
    uint8_t class[KVMMU_LRU_BLOCK + 1];
    uint8_t found[KVMMU_LRU_BLOCK];
    uint8_t read[KVMMU_LRU_BLOCK];
    uint16_t waiting[KVMMU_LRU_BLOCK];      /* keys that no level has served so far */
    unsigned count, waits;
    int one_class;                          /* what all rows ask is that of this class; -1: of class[] */
    int is_mixed;                           /* rows are of several classes, which one_class does not tell */
    uint64_t of_class[KVMMU_LRU_CLASSES];   /* rows that no level has served so far, if is_mixed */
    uint32_t rare;                          /* bit per level that served less than 1 in 16 keys of the block before */
    _Alignas(64) uint64_t nobody[KVMMU_LRU_MOST_WAYS];  /* a set for keys that do not ask a level */
};

/* By way: -1 for the ways up to it, then 0. */
#define UP_TO_3(way, k) -((k) <= (way)), -((k) + 1 <= (way)), -((k) + 2 <= (way)), -((k) + 3 <= (way))
#define UP_TO(way) {UP_TO_3(way, 0), UP_TO_3(way, 4), UP_TO_3(way, 8), UP_TO_3(way, 12)}
static const _Alignas(64) int64_t kvmmu_lru_up_to[KVMMU_LRU_MOST_WAYS][KVMMU_LRU_MOST_WAYS] = {
    UP_TO(0), UP_TO(1), UP_TO(2), UP_TO(3), UP_TO(4), UP_TO(5), UP_TO(6), UP_TO(7),
    UP_TO(8), UP_TO(9), UP_TO(10), UP_TO(11), UP_TO(12), UP_TO(13), UP_TO(14), UP_TO(15)};

/* By which of four keys are that of the row before: the order that puts the others first, and their rows. */
struct kvmmu_lru_order {
    _Alignas(32) uint32_t halves[8];
    uint64_t rows;
};
#define ORDER(a, b, c, d) {{2 * (a), 2 * (a) + 1, 2 * (b), 2 * (b) + 1, 2 * (c), 2 * (c) + 1, 2 * (d), 2 * (d) + 1}, \
                           (a) | (b) << 16 | UINT64_C(c) << 32 | UINT64_C(d) << 48}
static const struct kvmmu_lru_order kvmmu_lru_pack[16] = {
    ORDER(0, 1, 2, 3), ORDER(1, 2, 3, 0), ORDER(0, 2, 3, 0), ORDER(2, 3, 0, 0),
    ORDER(0, 1, 3, 0), ORDER(1, 3, 0, 0), ORDER(0, 3, 0, 0), ORDER(3, 0, 0, 0),
    ORDER(0, 1, 2, 0), ORDER(1, 2, 0, 0), ORDER(0, 2, 0, 0), ORDER(2, 0, 0, 0),
    ORDER(0, 1, 0, 0), ORDER(1, 0, 0, 0), ORDER(0, 0, 0, 0), ORDER(0, 0, 0, 0)};

/* ---- keys -------------------------------------------------------------------------------------------------------------- */

/* Keys of rows start to stop. Rows that repeat the page and class of the one before are hits of the first level that they ask. */
static void kvmmu_lru_take_keys(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, size_t stop)
{
    const size_t access_stride = r->access_stride, leaf_stride = r->leaf_stride;
    uint64_t alike[KVMMU_LRU_CLASSES + 1] = {0};
    unsigned n = 0;
    b->one_class = -1;
    for (size_t i = start; i < stop; i++) {
        const unsigned leaf = r->leaf[i * leaf_stride] - 1u, size = leaf > 2 ? 0 : leaf, before = n ? n - 1 : 0;
        const unsigned place = leaf > 2 ? KVMMU_LRU_UNMAPPED : r->class_of[r->access[i * access_stride]] + size;
        const uint64_t tag = r->tags[size][r->is_global && r->is_global[i]];
        const uint64_t key = (r->gva[i] & r->addr_mask) >> r->shifts[size] | tag;
        const unsigned same = (n != 0) & (key == b->key[before]) & (place == b->class[before]) & (r->asked[place] != 0);
        b->key[n] = key;
        b->class[n] = (uint8_t)place;
        b->row[n] = (uint16_t)(i - start);
        alike[place] += same;
        n += !same;
    }
    for (unsigned place = 0; place < KVMMU_LRU_CLASSES; place++)
        if (alike[place])
            r->hits[__builtin_ctz(r->asked[place])][place] += alike[place];
    b->count = n;
}

/* The same where all rows ask the same levels, so that rows of one page are alike whatever their class. */
static void kvmmu_lru_take_keys_alike_any(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, size_t stop, unsigned size)
{
    const uint64_t *const gva = r->gva, mask = r->addr_mask, *const tags = r->tags[size];
    const uint8_t *const is_global = r->is_global;
    const int shift = r->shifts[size];
    uint64_t last = 0;
    unsigned n = 0;
    for (size_t i = start; i < stop; i++) {
        const uint64_t key = (gva[i] & mask) >> shift | tags[is_global && is_global[i]];
        b->key[n] = key;
        b->row[n] = (uint16_t)(i - start);
        n += key != last;
        last = key;
    }
    b->count = n;
}

#if KVMMU_LRU_AVX2
/* Four rows at a time: those whose key is not that of the row before are stored side by side. */
KVMMU_LRU_INLINE KVMMU_LRU_FOR_AVX2 void kvmmu_lru_take_keys_vectors(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start,
                                                                    size_t stop, unsigned size, const int some_global)
{
    const __m256i mask = _mm256_set1_epi64x((long long)r->addr_mask), zero = _mm256_setzero_si256();
    const __m256i local = _mm256_set1_epi64x((long long)r->tags[size][0]), global = _mm256_set1_epi64x((long long)r->tags[size][1]);
    const uint8_t *const is_global = some_global ? r->is_global + start : NULL;
    const __m128i shift = _mm_cvtsi32_si128(r->shifts[size]);
    const uint64_t *const gva = r->gva + start;
    const size_t rows = stop - start;
    __m256i before = _mm256_setzero_si256();
    unsigned n = 0;
    size_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const __m256i addr = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(gva + i)), mask);
        __m256i tag = local;
        if (some_global) {
            int32_t four;
            memcpy(&four, is_global + i, sizeof four);
            tag = _mm256_blendv_epi8(global, local, _mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), zero));
        }
        const __m256i key = _mm256_or_si256(_mm256_srl_epi64(addr, shift), tag);
        const __m256i one_before = _mm256_blend_epi32(_mm256_permute4x64_epi64(key, 0x90), _mm256_permute4x64_epi64(before, 0xFF), 3);
        const unsigned same = (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(key, one_before)));
        before = key;
        if (same == 15)
            continue;
        const __m256i order = _mm256_load_si256((const __m256i *)kvmmu_lru_pack[same].halves);
        const uint64_t row = i * UINT64_C(0x0001000100010001) + kvmmu_lru_pack[same].rows;
        _mm256_storeu_si256((__m256i *)(b->key + n), _mm256_permutevar8x32_epi32(key, order));
        memcpy(b->row + n, &row, sizeof row);
        n += 4 - (unsigned)__builtin_popcount(same);
    }
    uint64_t last = rows >= 4 ? (uint64_t)_mm256_extract_epi64(before, 3) : 0;
    for (; i < rows; i++) {
        const uint64_t key = (gva[i] & r->addr_mask) >> r->shifts[size] | r->tags[size][some_global && is_global[i]];
        b->key[n] = key;
        b->row[n] = (uint16_t)i;
        n += key != last;
        last = key;
    }
    b->count = n;
}

static KVMMU_LRU_FOR_AVX2 void kvmmu_lru_take_keys_alike_avx2(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start,
                                                             size_t stop, unsigned size)
{
    if (r->is_global)
        kvmmu_lru_take_keys_vectors(r, b, start, stop, size, 1);
    else
        kvmmu_lru_take_keys_vectors(r, b, start, stop, size, 0);
}
#endif

/* ---- one level: each key that waits is put first in its set ------------------------------------------------------------- */

KVMMU_LRU_INLINE size_t kvmmu_lru_set(uint64_t key, uint32_t sets, uint32_t set_mask)
{
    const uint64_t page = key & KVMMU_LRU_PAGE_MASK;
    return (size_t)(set_mask || sets == 1 ? (page & set_mask) : page % sets);
}

static void kvmmu_lru_ask_any(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, int level)
{
    struct kvmmu_key_structure *const s = r->levels[level];
    unsigned waits = 0;
    for (unsigned i = 0; i < b->waits; i++) {
        const unsigned entry = b->waiting[i];
        const uint64_t key = b->key[entry];
        uint32_t way = 0;
        int hit = 0;
        if (r->asked[b->class[entry]] >> level & 1) {
            uint64_t *const set = s->keys + kvmmu_lru_set(key, s->sets, s->set_mask) * s->stride;
            while (way < s->ways && set[way] != key)
                way++;
            hit = way < s->ways;
            if (!hit)
                s->replaced += set[--way] != 0;
            memmove(set + 1, set, way * sizeof *set);
            set[0] = key;
        }
        b->found[entry] = (uint8_t)(hit ? level : KVMMU_LRU_NOWHERE);
        b->waiting[waits] = (uint16_t)entry;
        waits += !hit;
        if (b->one_class < 0 && hit)
            r->hits[level][b->class[entry]]++;
    }
    b->waits = waits;
}

#if KVMMU_LRU_AVX2
/* How most keys of a block fare at a level: it has hardly any of them, it has them first in their sets, or neither. */
enum kvmmu_lru_habit { KVMMU_LRU_ANY, KVMMU_LRU_RARE, KVMMU_LRU_FRONT };

KVMMU_LRU_INLINE KVMMU_LRU_FOR_AVX2 void kvmmu_lru_ask_vectors(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, int level,
                                                              const int vectors, const int alike, const enum kvmmu_lru_habit habit)
{
    struct kvmmu_key_structure *const s = r->levels[level];
    const uint32_t sets = s->sets, set_mask = s->set_mask, stride = 4 * (unsigned)vectors;
    const unsigned last = s->ways - 1, all = b->waits;
    uint64_t *const keys = s->keys, *const hits = r->hits[level];
    unsigned waits = 0;
    uint64_t replaced = 0;
    for (unsigned i = 0; i < all; i++) {
        const unsigned entry = b->waiting[i];
        const uint64_t key = b->key[entry];
        const unsigned asks = alike ? 1 : r->asked[b->class[entry]] >> level & 1;
        uint64_t *const set = asks ? keys + kvmmu_lru_set(key, sets, set_mask) * stride : b->nobody;
        if (habit == KVMMU_LRU_FRONT && set[0] == key) { /* nothing moves */
            b->found[entry] = (uint8_t)level;
            continue;
        }
        const __m256i wanted = _mm256_set1_epi64x((long long)key);
        __m256i old[4], before = wanted;
        unsigned found = 0;
        for (int v = 0; v < vectors; v++) {
            old[v] = _mm256_load_si256((const __m256i *)set + v);
            found |= (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(old[v], wanted))) << (4 * v);
        }
        /* whether the last way is empty, from the register: memory is slow to give part of what was stored as a whole */
        const __m256i empty = _mm256_cmpeq_epi64(old[vectors - 1], _mm256_setzero_si256());
        if (habit == KVMMU_LRU_RARE && !found && last == stride - 1) { /* the usual case: all ways move by one */
            for (int v = 0; v < vectors; v++) {
                _mm256_store_si256((__m256i *)set + v, _mm256_blend_epi32(_mm256_permute4x64_epi64(old[v], 0x90),
                                                                          _mm256_permute4x64_epi64(before, 0xFF), 3));
                before = old[v];
            }
            replaced += !((unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(empty)) >> 3 & 1);
            b->waiting[waits++] = (uint16_t)entry;
            continue;
        }
        const unsigned way = (unsigned)__builtin_ctz(found | 1u << last);
        for (int v = 0; v < vectors; v++) {
            const __m256i lanes = _mm256_load_si256((const __m256i *)kvmmu_lru_up_to[way] + v);
            const __m256i moved = _mm256_blend_epi32(_mm256_permute4x64_epi64(old[v], 0x90),
                                                     _mm256_permute4x64_epi64(before, 0xFF), 3);
            _mm256_store_si256((__m256i *)set + v, _mm256_castpd_si256(_mm256_blendv_pd(
                _mm256_castsi256_pd(old[v]), _mm256_castsi256_pd(moved), _mm256_castsi256_pd(lanes))));
            before = old[v];
        }
        replaced += asks & !found & !((unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(empty)) >> (last & 3) & 1);
        const unsigned hit = asks & (found != 0);
        b->found[entry] = (uint8_t)((unsigned)level | (hit - 1)); /* KVMMU_LRU_NOWHERE is all ones; no branch */
        b->waiting[waits] = (uint16_t)entry;
        waits += !hit;
        if (!alike)
            hits[hit ? b->class[entry] : 0] += hit; /* rows without a page have no counter */
    }
    s->replaced += replaced;
    b->waits = waits;
}

/* Return 1 if most of a sample of the keys that wait are first in their sets, where nothing moves. */
static int kvmmu_lru_finds_first(const struct kvmmu_lru_rows *r, const struct kvmmu_lru_block *b, int level)
{
    enum { SAMPLE = 16, ENOUGH = 11 }; /* tuned by hand */
    const struct kvmmu_key_structure *const s = r->levels[level];
    unsigned found = 0;
    if (b->waits < 4 * SAMPLE)
        return 0;
    for (unsigned k = 0; k < SAMPLE; k++) {
        const uint64_t key = b->key[b->waiting[b->waits / SAMPLE * k]];
        found += s->keys[kvmmu_lru_set(key, s->sets, s->set_mask) * s->stride] == key;
    }
    return found >= ENOUGH;
}

KVMMU_LRU_INLINE KVMMU_LRU_FOR_AVX2 void kvmmu_lru_ask_ways(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, int level,
                                                           const int vectors)
{
    if (b->one_class < 0)
        kvmmu_lru_ask_vectors(r, b, level, vectors, 0, KVMMU_LRU_ANY);
    else if (b->rare >> level & 1)
        kvmmu_lru_ask_vectors(r, b, level, vectors, 1, KVMMU_LRU_RARE);
    else if (kvmmu_lru_finds_first(r, b, level))
        kvmmu_lru_ask_vectors(r, b, level, vectors, 1, KVMMU_LRU_FRONT);
    else
        kvmmu_lru_ask_vectors(r, b, level, vectors, 1, KVMMU_LRU_ANY);
}

static KVMMU_LRU_FOR_AVX2 void kvmmu_lru_ask_avx2(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, int level)
{
    switch (r->levels[level]->stride) {
    case 4:
        kvmmu_lru_ask_ways(r, b, level, 1);
        break;
    case 8:
        kvmmu_lru_ask_ways(r, b, level, 2);
        break;
    case 12:
        kvmmu_lru_ask_ways(r, b, level, 3);
        break;
    case 16:
        kvmmu_lru_ask_ways(r, b, level, 4);
        break;
    default:
        kvmmu_lru_ask_any(r, b, level);
    }
}
#endif

/* Rows by class. */
static void kvmmu_lru_count_classes(const struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, size_t stop, unsigned size)
{
    uint32_t counts[4][KVMMU_LRU_CLASSES] = {{0}};      /* apart, or each would wait for the one before */
    for (size_t i = start; i < stop; i++)
        counts[i & 3][r->class_of[r->access[i]]]++;
    memset(b->of_class, 0, sizeof b->of_class);
    for (unsigned place = size; place < KVMMU_LRU_CLASSES; place += 3)
        b->of_class[place] = counts[0][place - size] + counts[1][place - size] + counts[2][place - size] + counts[3][place - size];
}

/* The level has served all rows but those of keys that wait. */
static void kvmmu_lru_count_served(const struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, int level, unsigned size)
{
    uint64_t left[KVMMU_LRU_CLASSES] = {0};
    for (unsigned i = 0; i < b->waits; i++)
        left[r->class_of[r->access[start + b->row[b->waiting[i]]]] + size]++;
    for (unsigned place = size; place < KVMMU_LRU_CLASSES; place += 3) {
        r->hits[level][place] += b->of_class[place] - left[place];
        b->of_class[place] = left[place];
    }
}

/* The size of all rows of a block; 3: they differ, or have no page. */
static unsigned kvmmu_lru_size_of(const struct kvmmu_lru_rows *r, size_t start, size_t stop)
{
    const unsigned size = r->leaf[start * r->leaf_stride] - 1u;
    uint8_t differ = 0;
    if (r->leaf_stride)
        for (size_t i = start; i < stop; i++)
            differ |= r->leaf[i] ^ r->leaf[start];
    return differ || size > 2 ? 3 : size;
}

/* Keys of a block, and what is known of the classes of its rows. */
static void kvmmu_lru_begin(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, size_t stop, int portable)
{
    const unsigned size = kvmmu_lru_size_of(r, start, stop), place = r->class_of[r->access[start * r->access_stride]] + size;
    b->is_mixed = r->access_stride != 0;
    b->one_class = -1;
    if (size > 2 || !(b->is_mixed ? r->all_asked[size] : r->asked[place])) {
        kvmmu_lru_take_keys(r, b, start, stop);
        return;
    }
#if KVMMU_LRU_AVX2
    if (!portable)
        kvmmu_lru_take_keys_alike_avx2(r, b, start, stop, size);
    else
#endif
        kvmmu_lru_take_keys_alike_any(r, b, start, stop, size);
    b->one_class = (int)place;
    memset(b->class, (int)place, b->count);
    if (b->is_mixed)
        kvmmu_lru_count_classes(r, b, start, stop, size);
    else                                    /* rows that repeat the page of the one before are hits of the first level */
        r->hits[__builtin_ctz(r->asked[place])][place] += stop - start - b->count;
}

/* ---- a block ------------------------------------------------------------------------------------------------------------ */

/* The keys that no level has served are page walks. */
static void kvmmu_lru_walk(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start)
{
    if (r->references)
        memset(b->read, 0, b->count);
    if (b->one_class >= 0 && !b->is_mixed)
        r->walks[b->one_class] += b->waits;
    else if (b->one_class >= 0)
        for (unsigned place = 0; place < KVMMU_LRU_CLASSES; place++)
            r->walks[place] += b->of_class[place];
    if (b->one_class >= 0 && !r->has_psc && !r->references) {
        const int size = b->one_class % 3;
        r->references_read += (uint64_t)b->waits * (unsigned)(r->root_level > size ? r->root_level - size : 1);
        return;
    }
    for (unsigned i = 0; i < b->waits; i++) {
        const unsigned entry = b->waiting[i], place = b->class[entry];
        const int size = (int)(place % 3);
        int read;
        if (place == KVMMU_LRU_UNMAPPED) {
            r->unmapped++;
            continue;
        }
        if (b->one_class < 0)
            r->walks[place]++;
        if (r->has_psc)
            read = r->walk(r->h, r->gva[start + b->row[entry]] & r->addr_mask, size);
        else
            read = r->root_level > size ? r->root_level - size : 1;
        r->references_read += (unsigned)read;
        b->read[entry] = (uint8_t)read;
    }
}

/* The columns of results. */
static void kvmmu_lru_write(struct kvmmu_lru_rows *r, struct kvmmu_lru_block *b, size_t start, size_t stop)
{
    b->row[b->count] = (uint16_t)(stop - start);
    for (unsigned entry = 0; entry < b->count; entry++) {
        const size_t row = start + b->row[entry], more = b->row[entry + 1] - b->row[entry] - 1u;
        if (r->level) {
            r->level[row] = b->found[entry];
            if (more)
                memset(r->level + row + 1, __builtin_ctz(r->asked[b->class[entry]]), more);
        }
        if (r->references) {
            r->references[row] = b->read[entry];
            memset(r->references + row + 1, 0, more);
        }
    }
}

/* Let all rows go through the levels. portable: without vectors. */
static void kvmmu_lru_run(struct kvmmu_lru_rows *r, int portable)
{
    struct kvmmu_lru_block b;
#if KVMMU_LRU_AVX2
    portable |= !__builtin_cpu_supports("avx2");
#endif
    memset(b.nobody, 0, sizeof b.nobody);
    b.rare = 0;
    for (int level = 0; level < r->count; level++)
        r->levels[level]->last = 0;
    for (size_t start = 0, stop; start < r->rows; start = stop) {
        stop = r->rows - start < KVMMU_LRU_BLOCK ? r->rows : start + KVMMU_LRU_BLOCK;
        kvmmu_lru_begin(r, &b, start, stop, portable);
        for (unsigned entry = 0; entry < b.count; entry++)
            b.waiting[entry] = (uint16_t)entry;
        b.waits = b.count;
        memset(b.found, KVMMU_LRU_NOWHERE, b.count);
        for (int level = 0; level < r->count; level++) {
            const unsigned before = b.waits;
            if (b.one_class >= 0 && !(r->asked[b.one_class] >> level & 1))
                continue;
#if KVMMU_LRU_AVX2
            if (!portable)
                kvmmu_lru_ask_avx2(r, &b, level);
            else
#endif
                kvmmu_lru_ask_any(r, &b, level);
            if (b.one_class >= 0 && b.is_mixed)
                kvmmu_lru_count_served(r, &b, start, level, (unsigned)b.one_class % 3);
            else if (b.one_class >= 0)
                r->hits[level][b.one_class] += before - b.waits;
            b.rare &= ~(UINT32_C(1) << level);
            b.rare |= (uint32_t)(16 * (before - b.waits) < before) << level;
        }
        kvmmu_lru_walk(r, &b, start);
        if (r->level || r->references)
            kvmmu_lru_write(r, &b, start, stop);
    }
}

#endif /* KVMMU_TLB_LRU_ROWS_H */
