/* The kernels for AVX-512 F, VL, BW and DQ: the code for AVX2, and vectors of 512 bits where the compiler makes them. */
#include "kvmmu/walk/batch/kernels/_bodies.h"
#if defined(__x86_64__)
#include "kvmmu/walk/batch/kernels/_bodies_avx2.h"

#define KVMMU_AVX512 \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,bmi,bmi2,prfchw,prefer-vector-width=512")))

KVMMU_KERNELS(avx512, KVMMU_AVX512, find_words, accept_words, recall_words)
#endif
