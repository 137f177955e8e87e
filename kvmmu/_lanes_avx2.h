/* What of `_lanes.h` is worth instructions that C has no words for. The twin of each function there gives the same answers. */
#ifndef KVMMU_LANES_AVX2_H
#define KVMMU_LANES_AVX2_H

#include <immintrin.h>

#define KVMMU_AVX2 __attribute__((target("avx2,bmi,bmi2")))

/* 32 bytes, of row 4 * k + j at 8 * j + k, from the order of rows; and back. */
KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_across(__m256i rows)
{
    const __m128i columns = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(rows, _mm256_broadcastsi128_si256(columns)),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

KVMMU_AVX2 KVMMU_INLINE __m256i kvmmu_along(__m256i columns)
{
    const __m128i rows = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(columns, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)),
                               _mm256_broadcastsi128_si256(rows));
}

/* KVMMU_TLB_SLOT(), before it is cut to size. */
#define KVMMU_TLB_SLOT_AVX2(page, space) \
    _mm256_xor_si256(_mm256_xor_si256(page, _mm256_srli_epi64(page, TLB_BITS)), _mm256_slli_epi64(space, 3))

/* sure_body() for 8-byte entries of guests: what depends on the access is a byte of each entry, compared for 32 rows at once. */
KVMMU_AVX2 static uint64_t kvmmu_sure_bytes(struct kvmmu_lanes *l, const struct kvmmu_passes *p, const uint8_t *access, uint64_t like,
                                            uint64_t *gpa)
{
    const uint64_t offset_bits = (UINT64_C(1) << KVMMU_LEVEL_SHIFT(KVMMU_FORMAT_64, KVMMU_PREFIX_LEVEL(like))) - 1;
    const __m256i offset = _mm256_set1_epi64x((long long)offset_bits);
    const __m256i base = _mm256_set1_epi64x((long long)(PT64_BASE_ADDR_MASK & ~offset_bits));
    const __m256i fixed_care = _mm256_set1_epi64x((long long)p->fixed.care);
    const __m256i fixed_want = _mm256_set1_epi64x((long long)p->fixed.want);
    const __m256i low = _mm256_set1_epi64x((long long)(PASS_BYTE_MASK << 56));
    const __m256i nx = _mm256_set1_epi64x((long long)PT64_NX_MASK);
    const __m256i fits = _mm256_set1_epi64x((long long)(PASS_BYTE_FITS << 56));
    const __m256i cares = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p->care));
    const __m256i wants = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p->want));
    uint64_t odd = 0;

    for (size_t half = 0; half < KVMMU_LANES; half += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(access + half));
        const __m256i implicit = _mm256_set1_epi8((char)ACCESS_IMPLICIT_MASK);
        __m256i has = _mm256_setzero_si256(), good;
        const __m256i index = _mm256_and_si256(_mm256_srli_epi16(bytes, PERMISSIONS_INDEX_SHIFT), _mm256_set1_epi8(15));
        const __m256i a = kvmmu_across(index);
        for (size_t i = half; i < half + 32; i += 4) {
            const uint64_t *e = l->entry + i;
            const __m256i pte = _mm256_setr_epi64x(*(const word64 *)(uintptr_t)e[0], *(const word64 *)(uintptr_t)e[1],
                                                   *(const word64 *)(uintptr_t)e[2], *(const word64 *)(uintptr_t)e[3]);
            const __m256i fixed = _mm256_cmpeq_epi64(_mm256_and_si256(pte, fixed_care), fixed_want);
            __m256i byte = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi64(pte, 56), low), _mm256_and_si256(pte, nx));
            byte = _mm256_or_si256(byte, _mm256_and_si256(fixed, fits));
            has = _mm256_or_si256(_mm256_srli_epi64(has, 8), byte);
            byte = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(l->addr + i)), offset);
            _mm256_storeu_si256((__m256i *)(gpa + i), _mm256_or_si256(_mm256_and_si256(pte, base), byte));
        }
        good = _mm256_cmpeq_epi8(_mm256_and_si256(has, _mm256_shuffle_epi8(cares, a)), _mm256_shuffle_epi8(wants, a));
        /* implicit accesses have no place in the tables */
        good = _mm256_andnot_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, implicit), implicit), kvmmu_along(good));
        odd |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(good) << half;
    }
    return odd;
}

KVMMU_AVX2 static uint64_t sure_64_avx2(struct kvmmu_lanes *, const struct kvmmu_passes *, const uint8_t *, int alike, uint64_t like,
                                        uint64_t *gpa);

KVMMU_AVX2 static uint64_t kvmmu_sure_64(struct kvmmu_lanes *l, const struct kvmmu_passes *p, const uint8_t *access, int alike,
                                         uint64_t like, uint64_t *gpa)
{
    return alike || !p->in_bytes ? sure_64_avx2(l, p, access, alike, like, gpa) : kvmmu_sure_bytes(l, p, access, like, gpa);
}

KVMMU_AVX2 static uint64_t recall_avx2(const struct kvmmu_tlb_entry *, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                                       const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level);

#define KVMMU_ONE_ENTRY(tlb, slot) _mm_loadu_si128((const __m128i *)((tlb) + (slot)))
#define KVMMU_TWO_ENTRIES(tlb, first, second) \
    _mm256_inserti128_si256(_mm256_castsi128_si256(KVMMU_ONE_ENTRY(tlb, first)), KVMMU_ONE_ENTRY(tlb, second), 1)

/* recall_body() for gpa alone: an entry is one load. */
KVMMU_AVX2 KVMMU_INLINE uint64_t kvmmu_recall_whole(const struct kvmmu_tlb_entry *tlb, const uint64_t *gva, const uint8_t *access,
                                                    size_t access_stride, const uint32_t *ctx, uint32_t asid, uint64_t *gpa)
{
    const __m256i first_space = _mm256_set1_epi64x(asid), page_offset = _mm256_set1_epi64x((long long)PAGE_OFFSET_MASK);
    const __m256i base = _mm256_set1_epi64x((long long)PT64_BASE_ADDR_MASK), slots = _mm256_set1_epi64x((1 << TLB_BITS) - 1);
    const __m256i top = _mm256_set1_epi64x(63);
    __m256i space = first_space, a = _mm256_set1_epi64x(access[0]), any = a;
    uint64_t hits = 0;
    for (size_t i = 0; i < KVMMU_LANES; i += 4) {
        const __m256i addr = _mm256_loadu_si256((const __m256i *)(gva + i)), page = _mm256_srli_epi64(addr, PAGE_SHIFT);
        __m256i slot, even, odd, tag, value, passes;
        if (ctx)
            space = _mm256_add_epi64(_mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)(ctx + i))), first_space);
        if (access_stride) {
            a = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)*(const word32 *)(access + i)));
            any = _mm256_or_si256(any, a);
        }
        slot = _mm256_and_si256(KVMMU_TLB_SLOT_AVX2(page, space), slots);
        even = KVMMU_TWO_ENTRIES(tlb, _mm256_extract_epi64(slot, 0), _mm256_extract_epi64(slot, 2));
        odd = KVMMU_TWO_ENTRIES(tlb, _mm256_extract_epi64(slot, 1), _mm256_extract_epi64(slot, 3));
        tag = _mm256_unpacklo_epi64(even, odd);
        value = _mm256_unpackhi_epi64(even, odd);
        passes = _mm256_sllv_epi64(value, _mm256_sub_epi64(top, _mm256_srli_epi64(a, PERMISSIONS_INDEX_SHIFT)));
        passes = _mm256_and_si256(passes, _mm256_cmpeq_epi64(tag, _mm256_or_si256(_mm256_slli_epi64(page, TLB_ASID_BITS), space)));
        hits |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(passes)) << i;
        value = _mm256_and_si256(_mm256_srli_epi64(value, TLB_FRAME_SHIFT - PAGE_SHIFT), base);
        _mm256_storeu_si256((__m256i *)(gpa + i), _mm256_or_si256(value, _mm256_and_si256(addr, page_offset)));
    }
    any = _mm256_and_si256(any, _mm256_set1_epi64x((long long)ACCESS_IMPLICIT_MASK));
    return _mm256_testz_si256(any, any) ? ~hits : recall_avx2(tlb, gva, access, access_stride, ctx, asid, gpa, 0);
}

KVMMU_AVX2 static uint64_t kvmmu_recall(const struct kvmmu_tlb_entry *tlb, const uint64_t *gva, const uint8_t *access, size_t access_stride,
                                        const uint32_t *ctx, uint32_t asid, uint64_t *gpa, uint8_t *level)
{
    if (level)
        return recall_avx2(tlb, gva, access, access_stride, ctx, asid, gpa, level);
    if (!access_stride)
        return kvmmu_recall_whole(tlb, gva, access, 0, ctx, asid, gpa);
    return ctx ? kvmmu_recall_whole(tlb, gva, access, 1, ctx, asid, gpa) : kvmmu_recall_whole(tlb, gva, access, 1, 0, asid, gpa);
}

#endif /* KVMMU_LANES_AVX2_H */
