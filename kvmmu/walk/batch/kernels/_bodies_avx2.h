/* find_body(), accept_body(), and recall_body() of one context, with instructions that the compiler does not choose by itself.
 *
 * Addresses go from vectors to loads by way of memory, a loop before they are used, so that none waits for another.
 */
#ifndef KVMMU_BODIES_AVX2_H
#define KVMMU_BODIES_AVX2_H

#include "kvmmu/walk/batch/kernels/_vectors_avx2.h"

KVMMU_AVX2 KVMMU_INLINE uint64_t find_words(int format, struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva, int far)
{
    const int tag_shift = s->tag_shift, entry_shift = s->entry_shift;
    const char *psc = (const char *)s->psc;
    const __m256i gva_mask = WORDS(s->gva_mask), zero = _mm256_setzero_si256();
    const __m256i slots = WORDS(((UINT64_C(1) << PSC_BITS) - 1) * sizeof(struct kvmmu_psc_entry));
    const __m256i place = WORDS(s->walk_slot * sizeof(struct kvmmu_psc_entry)), walk_tag = WORDS(s->walk_tag);
    const __m256i hva_mask = WORDS(PSCE_HVA_MASK), nothing = WORDS(s->nothing);
    const __m256i index_mask = WORDS(format == KVMMU_FORMAT_32 ? PT32_INDEX_MASK << 2 : PT64_INDEX_MASK << 3);
    uint64_t slot[KVMMU_BLOCK_ROWS] ALIGNED, known_lanes = 0;

    SHORT_LOOP(i, 4)
    {
        const __m256i addr = _mm256_and_si256(LOAD(gva + i), gva_mask);
        const __m256i near = _mm256_xor_si256(_mm256_srli_epi64(addr, tag_shift - 4), place);
        STORE(slot + i, _mm256_and_si256(_mm256_xor_si256(near, _mm256_srli_epi64(addr, tag_shift + PSC_BITS - 4)), slots));
    }
    SHORT_LOOP(i, 4)
    {
        const __m256i addr = _mm256_and_si256(LOAD(gva + i), gva_mask);
        const __m256i even = _mm256_loadu2_m128i((const __m128i *)(psc + slot[i + 2]), (const __m128i *)(psc + slot[i]));
        const __m256i odd = _mm256_loadu2_m128i((const __m128i *)(psc + slot[i + 3]), (const __m128i *)(psc + slot[i + 1]));
        const __m256i known = _mm256_cmpeq_epi64(_mm256_unpacklo_epi64(even, odd),
                                                 _mm256_xor_si256(_mm256_srli_epi64(addr, tag_shift), walk_tag));
        const __m256i psce = PICK(nothing, _mm256_unpackhi_epi64(even, odd), known);
        const __m256i index = _mm256_and_si256(_mm256_srli_epi64(addr, entry_shift), index_mask);
        known_lanes |= (uint64_t)SIGNS(known) << i;
        STORE(l->psce + i, psce);
        STORE(l->entry + i, _mm256_add_epi64(_mm256_and_si256(psce, hva_mask), _mm256_and_si256(index, _mm256_cmpgt_epi64(zero, psce))));
    }
    if (far)
        for (size_t i = 0; i < KVMMU_BLOCK_ROWS; i++)
            kvmmu_prefetch(l->entry[i]);
    return ~known_lanes;
}

/* ACC_* by the bytes of an entry. */
KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_rights_avx2(int format, __m256i low, __m256i high)
{
    const __m256i nibble = _mm256_set1_epi8(15), in_place = _mm256_set1_epi8(ACC_READ_MASK | ACC_WRITE_MASK | ACC_USER_MASK);
    const __m128i ept_low = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11); /* X is ACC_EXEC */
    const __m128i ept_high = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);    /* A, D, user execute */
    const __m256i exec = _mm256_set1_epi8(ACC_EXEC_MASK);
    if (format == KVMMU_FORMAT_EPT)
        return _mm256_or_si256(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(ept_low), _mm256_and_si256(low, nibble)),
                               _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(ept_high), _mm256_and_si256(high, nibble)));
    low = _mm256_and_si256(low, in_place);
    if (format == KVMMU_FORMAT_32)
        return _mm256_or_si256(low, exec);
    return _mm256_or_si256(low, _mm256_andnot_si256(_mm256_srli_epi16(high, 4), exec));
}

KVMMU_AVX2 KVMMU_INLINE uint64_t accept_words(int format, struct kvmmu_leaf_block *l, const struct kvmmu_leaf_checker *s, const uint64_t *gva,
                                           const uint8_t *access, uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code,
                                           const uint64_t *ahead)
{
    const int high = format == KVMMU_FORMAT_EPT ? 1 : 7; /* byte of an entry with a right that the lowest has not */
    const __m256i gva_mask = WORDS(s->gva_mask), zero = _mm256_setzero_si256();
    const __m256i base = WORDS(s->base);
    const __m256i care_table = WORDS(s->care[LEAF_IN_TABLE]), care_large = WORDS(s->care[LEAF_LARGE]), want = WORDS(s->want);
    const __m256i offset_table = WORDS(s->offset[LEAF_IN_TABLE]), offset_large = WORDS(s->offset[LEAF_LARGE]);
    const __m256i nibble = _mm256_set1_epi8(15), bit_of = WORDS(EIGHT_BITS);
    const __m256i special = _mm256_set1_epi8((char)~KVMMU_COMMON_ACCESS_MAX), level_mask = _mm256_set1_epi8(PSCE_LEVEL_MASK);
    uint64_t mixed[KVMMU_BLOCK_ROWS / 2] ALIGNED, fits = 0, passes = 0, set = 0;

    kvmmu_clear_columns(gpa, status, error_code);
    SHORT_LOOP(i, 8)
    {
        __m256i mix[2];
        _Pragma("GCC unroll 2") for (size_t k = i; k < i + 8; k += 4)
        {
            const __m256i addr = _mm256_and_si256(LOAD(gva + k), gva_mask), psce = LOAD(l->psce + k);
            const __m256i offset = PICK(offset_large, offset_table, psce);
            __m256i pte, wrong;
            if (ahead)
                _Pragma("GCC unroll 4") for (size_t n = k; n < k + 4; n++)
                    kvmmu_prefetch(ahead[n]);
            if (format == KVMMU_FORMAT_32)
                pte = _mm256_cvtepu32_epi64(_mm_setr_epi32(
                    (int)*(const word32 *)(uintptr_t)l->entry[k], (int)*(const word32 *)(uintptr_t)l->entry[k + 1],
                    (int)*(const word32 *)(uintptr_t)l->entry[k + 2], (int)*(const word32 *)(uintptr_t)l->entry[k + 3]));
            else
                pte = _mm256_setr_epi64x(
                    (long long)*(const word64 *)(uintptr_t)l->entry[k], (long long)*(const word64 *)(uintptr_t)l->entry[k + 1],
                    (long long)*(const word64 *)(uintptr_t)l->entry[k + 2], (long long)*(const word64 *)(uintptr_t)l->entry[k + 3]);
            wrong = _mm256_and_si256(_mm256_xor_si256(pte, want), PICK(care_large, care_table, psce));
            fits |= (uint64_t)SIGNS(_mm256_cmpeq_epi64(wrong, zero)) << k;
            STORE(l->pte + k, pte);
            mix[(k - i) / 4] = kvmmu_some_bytes(pte, high, psce);
            pte = _mm256_andnot_si256(offset, _mm256_and_si256(pte, base));
            STORE(gpa + k, _mm256_or_si256(pte, _mm256_and_si256(addr, offset)));
        }
        STORE(mixed + i / 2, _mm256_or_si256(mix[0], _mm256_slli_epi32(mix[1], 16)));
    }
    _Pragma("GCC unroll 2") for (size_t start = 0; start < KVMMU_BLOCK_ROWS; start += 32)
    {
        const struct kvmmu_row_bytes row = kvmmu_row_bytes(mixed + start / 2);
        const __m256i before = row.top, last = row.high, bytes = kvmmu_bytes_of_rows(LOAD(access + start));
        const __m256i a = _mm256_and_si256(_mm256_srli_epi16(bytes, PERMISSIONS_INDEX_SHIFT), nibble);
        __m256i low = row.low, rights, denied, unset;
        rights = _mm256_and_si256(kvmmu_rights_avx2(format, low, last), _mm256_srli_epi16(before, PSCE_ACCESS_SHIFT - 56));
        rights = _mm256_and_si256(rights, _mm256_shuffle_epi8(BYTES(s->levels), _mm256_and_si256(before, nibble)));
        denied = _mm256_blendv_epi8(_mm256_shuffle_epi8(BYTES(s->denied[0]), rights), _mm256_shuffle_epi8(BYTES(s->denied[1]), rights),
                                    _mm256_slli_epi16(a, 4));
        denied = _mm256_or_si256(_mm256_and_si256(denied, _mm256_shuffle_epi8(bit_of, a)), _mm256_and_si256(bytes, special));
        if (format == KVMMU_FORMAT_EPT)
            low = _mm256_slli_epi16(last, PT_ACCESSED_SHIFT - (EPT_ACCESSED_SHIFT - 8));
        denied = kvmmu_rows_of_bytes(_mm256_cmpeq_epi8(denied, zero));
        unset = _mm256_andnot_si256(low, _mm256_shuffle_epi8(BYTES(s->need), a));
        unset = kvmmu_rows_of_bytes(_mm256_cmpeq_epi8(unset, zero));
        passes |= (uint64_t)(uint32_t)_mm256_movemask_epi8(denied) << start;
        set |= (uint64_t)(uint32_t)_mm256_movemask_epi8(unset) << start;
        if (level)
            STORE(level + start, _mm256_and_si256(kvmmu_rows_of_bytes(before), level_mask));
    }
    passes &= fits;
    l->slow = passes & ~set;
    return ~(passes & set);
}

/* IN ctx: NULL */
KVMMU_AVX2 KVMMU_INLINE uint64_t recall_words(const struct kvmmu_memo_entry *memo, const uint64_t *gva, const uint8_t *access,
                                              const uint32_t *ctx, uint64_t memo_id, uint64_t *gpa, uint8_t *level, uint8_t *status,
                                              uint32_t *error_code)
{
    const char *entries = (const char *)memo;
    const __m256i memo_id_words = WORDS(memo_id), page_offset = WORDS(PAGE_OFFSET_MASK), base = WORDS(PT64_BASE_ADDR_MASK);
    const __m256i slots = WORDS(((UINT64_C(1) << MEMO_BITS) - 1) * sizeof *memo), place = WORDS(KVMMU_MEMO_SPREAD(memo_id) * sizeof *memo);
    const __m256i nibble = _mm256_set1_epi8(15), to_sign = _mm256_set1_epi8(127 - KVMMU_COMMON_ACCESS_MAX), bit_of = WORDS(EIGHT_BITS);
    const __m256i zero = _mm256_setzero_si256();
    uint64_t slot[KVMMU_BLOCK_ROWS] ALIGNED, mixed[KVMMU_BLOCK_ROWS / 2] ALIGNED, known = 0, passes = 0;
    (void)ctx;

    kvmmu_clear_columns(gpa, status, error_code);
    SHORT_LOOP(i, 4)
    {
        const __m256i addr = LOAD(gva + i), near = _mm256_xor_si256(_mm256_srli_epi64(addr, PAGE_SHIFT - 4), place);
        STORE(slot + i, _mm256_and_si256(_mm256_xor_si256(near, _mm256_srli_epi64(addr, PAGE_SHIFT + MEMO_BITS - 4)), slots));
    }
    SHORT_LOOP(i, 8)
    {
        __m256i mix[2];
        _Pragma("GCC unroll 2") for (size_t k = i; k < i + 8; k += 4)
        {
            const __m256i addr = LOAD(gva + k), offset = _mm256_and_si256(addr, page_offset);
            const __m256i even = _mm256_loadu2_m128i((const __m128i *)(entries + slot[k + 2]), (const __m128i *)(entries + slot[k]));
            const __m256i odd = _mm256_loadu2_m128i((const __m128i *)(entries + slot[k + 3]), (const __m128i *)(entries + slot[k + 1]));
            const __m256i tag = _mm256_unpacklo_epi64(even, odd), value = _mm256_unpackhi_epi64(even, odd);
            const __m256i wanted = _mm256_xor_si256(_mm256_xor_si256(addr, offset), memo_id_words);
            known |= (uint64_t)SIGNS(_mm256_cmpeq_epi64(tag, wanted)) << k;
            mix[(k - i) / 4] = kvmmu_some_bytes(value, 1, value);
            STORE(gpa + k, _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi64(value, MEMO_FRAME_SHIFT - PAGE_SHIFT), base), offset));
        }
        STORE(mixed + i / 2, _mm256_or_si256(mix[0], _mm256_slli_epi32(mix[1], 16)));
    }
    _Pragma("GCC unroll 2") for (size_t start = 0; start < KVMMU_BLOCK_ROWS; start += 32)
    {
        const struct kvmmu_row_bytes row = kvmmu_row_bytes(mixed + start / 2);
        const __m256i bytes = kvmmu_bytes_of_rows(LOAD(access + start));
        const __m256i a = _mm256_and_si256(_mm256_srli_epi16(bytes, PERMISSIONS_INDEX_SHIFT), nibble);
        __m256i pass = _mm256_blendv_epi8(row.low, row.high, _mm256_slli_epi16(a, 4));
        pass = _mm256_cmpeq_epi8(_mm256_and_si256(pass, _mm256_shuffle_epi8(bit_of, a)), zero); /* is not known to */
        pass = _mm256_or_si256(pass, _mm256_adds_epu8(bytes, to_sign)); /* the sign counts */
        passes |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(kvmmu_rows_of_bytes(pass)) << start;
        if (level)
            STORE(level + start, kvmmu_rows_of_bytes(row.top));
    }
    return ~(known & passes);
}

#endif /* KVMMU_BODIES_AVX2_H */
