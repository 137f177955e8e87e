/* The kernels for AVX2, BMI and BMI2. */
#include "kvmmu/walk/batch/kernels/_bodies.h"
#if defined(__x86_64__)
#include "kvmmu/walk/batch/kernels/_bodies_avx2.h"

KVMMU_KERNELS(avx2, KVMMU_AVX2, find_words, accept_words, recall_words)
#endif
