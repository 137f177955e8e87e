/* The kernels for any CPU, and the choice among the tables. */
#include "kvmmu/walk/batch/kernels/_bodies.h"

KVMMU_KERNELS(portable, , find_body, accept_body, recall_body)

const struct kvmmu_kernels *kvmmu_kernels_of(const char *name)
{
    if (!strcmp(name, "portable"))
        return &kvmmu_kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        return &kvmmu_kernels_avx2;
    if (!strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return &kvmmu_kernels_avx512;
#endif
    return NULL;
}
