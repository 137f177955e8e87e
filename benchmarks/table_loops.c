/* Loops of a C program outside the tree over the function table of kvmmu.h. */
#include <kvmmu/kvmmu.h>

int open_guest(const kvmmu_api *table, void *ram, uint64_t size, uint64_t cr0, uint64_t cr3, uint64_t cr4, uint64_t efer,
               kvmmu_memory *memory, kvmmu_vcpu *vcpu);
int walk_rows(kvmmu_vcpu vcpu, const uint64_t *gva, size_t n, uint32_t access, kvmmu_result *out);
int walk_many(kvmmu_vcpu vcpu, const uint64_t *gva, size_t n, uint32_t access, kvmmu_result *out);

int open_guest(const kvmmu_api *table, void *ram, uint64_t size, uint64_t cr0, uint64_t cr3, uint64_t cr4, uint64_t efer,
               kvmmu_memory *memory, kvmmu_vcpu *vcpu)
{
    kvmmu_registers registers = { sizeof(kvmmu_registers), 0, cr0, cr3, cr4, efer, 2, { 0, 0, 0, 0 }, 0, 0 };
    return kvmmu_use_table(table) || kvmmu_memory_create(memory) || kvmmu_memory_add(*memory, 0, ram, size, 0) ||
           kvmmu_vcpu_create(*memory, NULL, vcpu) || kvmmu_set_registers(*vcpu, &registers);
}

/* A call for each address. */
int walk_rows(kvmmu_vcpu vcpu, const uint64_t *gva, size_t n, uint32_t access, kvmmu_result *out)
{
    size_t i;
    int code = 0;
    for (i = 0; i < n; i++)
        code |= kvmmu_translate(vcpu, gva[i], access, &out[i]);
    return code;
}

/* One call for all of them: the loop is in the package. */
int walk_many(kvmmu_vcpu vcpu, const uint64_t *gva, size_t n, uint32_t access, kvmmu_result *out)
{
    return kvmmu_translate_many(vcpu, n, gva, NULL, access, out, NULL);
}
