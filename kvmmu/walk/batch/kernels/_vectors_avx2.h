/* Words and bytes of rows, in vectors. */
#ifndef KVMMU_VECTORS_AVX2_H
#define KVMMU_VECTORS_AVX2_H

#include <immintrin.h>

#include "kvmmu/walk/batch/kernels/_state.h"

#define KVMMU_AVX2 __attribute__((target("avx2,bmi,bmi2,prfchw")))

#define WORDS(value) _mm256_set1_epi64x((long long)(value))
#define LOAD(address) _mm256_loadu_si256((const __m256i *)(address))
#define STORE(address, value) _mm256_storeu_si256((__m256i *)(address), value)
#define BYTES(table) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table)))
#define PICK(no, yes, sign) \
    _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(no), _mm256_castsi256_pd(yes), _mm256_castsi256_pd(sign)))
#define EIGHT_BITS UINT64_C(0x8040201008040201)
#define SIGNS(words) (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(words))

#define ALIGNED KVMMU_ALIGNED(32)
#define ROWS_AHEAD 256 /* columns will be written this far from now */
/* The compiler would unroll loops until constants no longer fit the registers. */
#define SHORT_LOOP(i, step) _Pragma("GCC unroll 1") for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += step)

/* Bytes of 32 rows are not in their order: in each half, and for each 8 rows after another, stand rows 0, 1, 4, 5, or 2, 3, 6, 7. */
KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_rows_of_bytes(__m256i bytes)
{
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)),
                               _mm256_broadcastsi128_si256(order));
}

KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_bytes_of_rows(__m256i rows)
{
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(rows, _mm256_broadcastsi128_si256(order)),
                                       _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

/* Of four words, and four others: two bytes of each, and the highest of each of the others, to where they stand among those of
 * eight rows; those of the next four rows stand 16 bits higher. */
KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_some_bytes(__m256i pte, int high, __m256i psce)
{
    const char b = (char)high, d = (char)(high + 8);
    const __m128i of_pte = _mm_setr_epi8(0, 8, -1, -1, b, d, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i of_psce = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 7, 15, -1, -1, -1, -1, -1, -1);
    return _mm256_or_si256(_mm256_shuffle_epi8(pte, _mm256_broadcastsi128_si256(of_pte)),
                           _mm256_shuffle_epi8(psce, _mm256_broadcastsi128_si256(of_psce)));
}

struct kvmmu_row_bytes {
    __m256i low, high, top;
};

/* Bytes of 32 rows, each kind by itself. IN mixed: what kvmmu_some_bytes() made of them, 8 rows in 4 words */
KVMMU_AVX2 KVMMU_INLINE struct kvmmu_row_bytes kvmmu_row_bytes(const uint64_t *mixed)
{
    const __m256i first = LOAD(mixed), second = LOAD(mixed + 4), third = LOAD(mixed + 8), fourth = LOAD(mixed + 12);
    const __m256i front = _mm256_unpacklo_epi32(first, second), back = _mm256_unpacklo_epi32(third, fourth);
    return (struct kvmmu_row_bytes){_mm256_unpacklo_epi64(front, back), _mm256_unpackhi_epi64(front, back),
                                    _mm256_unpacklo_epi64(_mm256_unpackhi_epi32(first, second), _mm256_unpackhi_epi32(third, fourth))};
}

/* 64 rows of the columns of those that pass, but for gpa; and what comes after them. */
KVMMU_AVX2 KVMMU_INLINE void kvmmu_clear_columns(const uint64_t *gpa, uint8_t *status, uint32_t *error_code)
{
    const __m256i zero = _mm256_setzero_si256();
    if (status) {
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += 32)
            STORE(status + i, zero);
        __builtin_prefetch(status + ROWS_AHEAD, 1, 3);
    }
    if (error_code)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += 8) {
            STORE(error_code + i, zero);
            __asm__ volatile("" ::: "memory"); /* not a call or a string instruction for so little */
            __builtin_prefetch(error_code + ROWS_AHEAD + i, 1, 3);
        }
    for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i += 8)
        __builtin_prefetch(gpa + ROWS_AHEAD + i, 1, 3);
}

#endif /* KVMMU_VECTORS_AVX2_H */
