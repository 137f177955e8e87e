/* What a careless program does to kvmmu.h. Each check has a code as its answer; misuse() returns the line of the first one that has
 * another, or 0. */
#include <kvmmu/kvmmu.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define RAM_SIZE (1u << 20)
#define THREADS 4
#define ROUNDS 20000

#define EXPECT(code, call)         \
    do {                           \
        if ((call) != (code))      \
            return __LINE__;       \
    } while (0)
#define CHECK(condition) EXPECT(1, !!(condition))

static uint64_t *ram;

static void write_tables(void)
{
    memset(ram, 0, RAM_SIZE);
    ram[0x1000 / 8] = 0x2007;
    ram[0x2000 / 8] = 0x3007;
    ram[0x3000 / 8 + 2] = 0x6007;
    ram[0x6000 / 8] = 0x4007;
}

static kvmmu_registers paging(void)
{
    kvmmu_registers registers = { sizeof(kvmmu_registers), 0, 0x80010001, 0x1000, 0x20, 0xD00, 2, { 0, 0, 0, 0 }, 0, 0 };
    return registers;
}

/* An EPT of four levels at 0x8000, which maps the first 2M to themselves. */
static kvmmu_second_stage ept(void)
{
    kvmmu_second_stage stage;
    memset(&stage, 0, sizeof stage);
    stage.size = sizeof stage;
    stage.flags = KVMMU_STAGE_EPT;
    stage.root = 0x8000 | 6 | 3 << 3;
    return stage;
}

static void write_ept(void)
{
    ram[0x8000 / 8] = 0x9007;
    ram[0x9000 / 8] = 0xA007;
    ram[0xA000 / 8] = 0xB7; /* a page of 2M, write-back */
}

/* ---- arguments ------------------------------------------------------------------------------------------------------- */

static int null_pointers(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    kvmmu_result result;
    uint64_t gva = 0x400000;
    kvmmu_callbacks callbacks;

    memset(&callbacks, 0, sizeof callbacks);
    callbacks.size = sizeof callbacks;
    EXPECT(KVMMU_E_IMPORT, kvmmu_use_table(NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_memory_create(NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_memory_create_callbacks(NULL, &memory));
    EXPECT(KVMMU_E_NULL, kvmmu_memory_create_callbacks(&callbacks, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_memory_create_callbacks(&callbacks, &memory)); /* read is NULL */
    EXPECT(KVMMU_E_NULL, kvmmu_memory_add(memory, 0x200000, NULL, 4096, 0));
    EXPECT(KVMMU_E_NULL, kvmmu_vcpu_create(memory, NULL, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_set_registers(vcpu, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_get_registers(vcpu, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_translate(vcpu, 0, 0, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_translate_many(vcpu, 1, NULL, NULL, 0, &result, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_translate_many(vcpu, 1, &gva, NULL, 0, NULL, NULL));
    EXPECT(KVMMU_OK, kvmmu_translate_many(vcpu, 0, NULL, NULL, 0, NULL, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_lookup(vcpu, 0, 0, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_walk_record(vcpu, 0, 0, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_translate_nested(vcpu, 0, 0, NULL));
    EXPECT(KVMMU_E_NULL, kvmmu_get_second_stage(vcpu, NULL));
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, NULL)); /* there is none */
    return 0;
}

static int bad_values(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    kvmmu_registers registers = paging();
    kvmmu_cpu cpu = { sizeof(kvmmu_cpu), 0, 0, 0, 0 };
    kvmmu_vcpu other;
    kvmmu_result result;
    kvmmu_nested_result nested;
    kvmmu_mapping mapping;
    kvmmu_record record;
    uint64_t gva = 0x400000;
    uint8_t access = 1;
    size_t done = 9;

    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200001, ram, 4096, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200000, ram, 4095, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200000, ram, 0, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200000, ram, 4096, 2));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200000, (char *)ram + 1, 4096, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, RAM_SIZE - 4096, ram, 8192, 0)); /* overlaps */
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, UINT64_C(1) << 52, ram, 4096, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, 0x200000, ram, ~UINT64_C(4095), 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(memory, (UINT64_C(1) << 52) - 4096, ram, 8192, 0));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_remove(memory, 4096));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_translate(vcpu, gva, 1, &result));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_translate(vcpu, gva, 0x80000000u, &result));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_translate_nested(vcpu, gva, 1, &nested));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_translate_many(vcpu, 1, &gva, &access, 0, &result, &done));
    CHECK(done == 0);
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_lookup(vcpu, gva, KVMMU_ACCESS_PROBE | 1, &mapping));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_walk_record(vcpu, gva, 1, &record));
    cpu.maxphyaddr = 31;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.maxphyaddr = 53;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.maxphyaddr = 48;
    cpu.flags = 1u << 31;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.flags = 0;
    cpu.c_bit = 31;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.c_bit = 52;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.c_bit = 0;
    cpu.features = KVMMU_FEATURE_VMX; /* without KVMMU_CPU_STRICT */
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.flags = KVMMU_CPU_STRICT;
    cpu.features = 1u << 16;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.features = KVMMU_FEATURE_SVM; /* of another vendor */
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_vcpu_create(memory, &cpu, &other));
    registers.flags = 2;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_registers(vcpu, &registers));
    return 0;
}

static int wrong_versions(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    static kvmmu_api table;
    kvmmu_registers registers = paging();
    kvmmu_cpu cpu = { sizeof(kvmmu_cpu) + 8, 0, 0, 0, 0 };
    kvmmu_second_stage stage = ept();
    kvmmu_callbacks callbacks;
    kvmmu_vcpu other;

    table = *kvmmu_table;
    table.version += 1u << 16;
    EXPECT(KVMMU_E_VERSION, kvmmu_use_table(&table));
    table.version = 0;
    EXPECT(KVMMU_E_VERSION, kvmmu_use_table(&table));
    table.version = KVMMU_API_VERSION;
    table.size -= (uint32_t)sizeof(void *);
    EXPECT(KVMMU_E_VERSION, kvmmu_use_table(&table));
    CHECK(kvmmu_table != &table);
    table.size = (uint32_t)sizeof table;
    table.version += 1; /* a later minor version is fine */
    EXPECT(KVMMU_OK, kvmmu_use_table(&table));
    memset(&callbacks, 0, sizeof callbacks);
    EXPECT(KVMMU_E_VERSION, kvmmu_memory_create_callbacks(&callbacks, &memory));
    EXPECT(KVMMU_E_VERSION, kvmmu_vcpu_create(memory, &cpu, &other));
    cpu.size = 8;
    EXPECT(KVMMU_E_VERSION, kvmmu_vcpu_create(memory, &cpu, &other));
    stage.size -= 8;
    EXPECT(KVMMU_E_VERSION, kvmmu_set_second_stage(vcpu, &stage));
    EXPECT(KVMMU_E_VERSION, kvmmu_get_second_stage(vcpu, &stage));
    registers.size = 8;
    EXPECT(KVMMU_E_VERSION, kvmmu_set_registers(vcpu, &registers));
    EXPECT(KVMMU_E_VERSION, kvmmu_get_registers(vcpu, &registers));
    return 0;
}

static int illegal_registers(kvmmu_vcpu vcpu)
{
    kvmmu_registers registers = paging(), found;
    kvmmu_result result;

    found.size = sizeof found;
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    registers.cr4 = 0; /* long mode needs PAE */
    EXPECT(KVMMU_E_REGISTERS, kvmmu_set_registers(vcpu, &registers));
    registers = paging();
    registers.cr3 = UINT64_C(1) << 51;
    EXPECT(KVMMU_E_REGISTERS, kvmmu_set_registers(vcpu, &registers));
    registers = paging();
    registers.efer = 0;
    registers.cr3 = 0xFFFFF000; /* PAE, and the PDPTEs lie in a hole */
    EXPECT(KVMMU_E_REGISTERS, kvmmu_set_registers(vcpu, &registers));
    EXPECT(KVMMU_OK, kvmmu_get_registers(vcpu, &found));
    CHECK(found.cr3 == 0x1000 && found.cr4 == 0x20 && found.efer == 0xD00);
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400123, 0, &result));
    CHECK(result.status == KVMMU_STATUS_OK && result.gpa == 0x4123);
    return 0;
}

/* What no second stage may be, and what is left of one that is taken away. */
static int second_stages(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    static const uint32_t bad_flags[] = { 0, KVMMU_STAGE_EPT | KVMMU_STAGE_NPT, KVMMU_STAGE_EPT | KVMMU_STAGE_GMET,
                                          KVMMU_STAGE_NPT | KVMMU_STAGE_MBEC, KVMMU_STAGE_EPT | 1u << 31,
                                          KVMMU_STAGE_EPT | KVMMU_STAGE_NO_2M };
    kvmmu_second_stage stage = ept(), found;
    kvmmu_registers registers = paging();
    kvmmu_nested_result nested;
    kvmmu_mapping mapping;
    kvmmu_record record;
    kvmmu_cpu cpu = { sizeof(kvmmu_cpu), 0, KVMMU_CPU_KVM, 0, 0 };
    kvmmu_vcpu other;
    size_t i;

    write_ept();
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    for (i = 0; i < sizeof bad_flags / sizeof *bad_flags; i++) {
        stage.flags = bad_flags[i];
        if (stage.flags & KVMMU_STAGE_NO_2M)
            EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, &stage)); /* 1G pages need pages of 2M: there are none either */
        else
            EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    }
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, NULL));
    stage = ept();
    stage.root = 0x8000; /* no levels */
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    stage.root = UINT64_C(1) << 60 | 6 | 3 << 3;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    stage = ept();
    stage.reserved = 1;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    stage = ept();
    stage.flags |= KVMMU_STAGE_PML; /* without accessed and dirty bits */
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    stage = ept();
    stage.flags |= KVMMU_STAGE_SPP;
    stage.spptp = 1;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &stage));
    found.size = sizeof found;
    EXPECT(KVMMU_OK, kvmmu_get_second_stage(vcpu, &found));
    CHECK(found.flags == 0);

    stage = ept();
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, &stage));
    EXPECT(KVMMU_OK, kvmmu_get_second_stage(vcpu, &found));
    CHECK(found.flags == KVMMU_STAGE_EPT && found.root == stage.root);
    EXPECT(KVMMU_OK, kvmmu_translate_nested(vcpu, 0x400123, KVMMU_ACCESS_WRITE, &nested));
    CHECK(nested.gpa == 0x4123 && nested.ngpa == 0x4123 && nested.linear == 0x400123 && nested.exit_reason == KVMMU_EXIT_NONE);
    ram[0xA000 / 8] &= ~UINT64_C(2);
    EXPECT(KVMMU_OK, kvmmu_translate_nested(vcpu, 0x400123, KVMMU_ACCESS_WRITE, &nested));
    CHECK(nested.status == KVMMU_STATUS_EPT_VIOLATION && nested.exit_reason == KVMMU_EXIT_EPT_VIOLATION);
    CHECK(nested.fault_gpa == 0x4123 && nested.gpa == KVMMU_INVALID_GPA && (nested.exit_qualification & 0x1BF) == 0x1AA);
    ram[0xA000 / 8] = 0;
    EXPECT(KVMMU_OK, kvmmu_translate_nested(vcpu, 0x400123, 0, &nested));
    CHECK(nested.status == KVMMU_STATUS_EPT_VIOLATION && nested.fault_gpa == 0x1000);
    EXPECT(KVMMU_OK, kvmmu_lookup(vcpu, 0x400123, KVMMU_ACCESS_PROBE, &mapping));
    CHECK(mapping.status == KVMMU_STATUS_EPT_VIOLATION && mapping.size == 0);
    EXPECT(KVMMU_OK, kvmmu_walk_record(vcpu, 0x400123, 0, &record));
    CHECK(record.end.status == KVMMU_STATUS_EPT_VIOLATION && record.count == 1);
    registers.efer = 0;
    registers.cr3 = 0x1000; /* PAE, and the second stage does not reach the PDPTEs */
    EXPECT(KVMMU_E_REGISTERS, kvmmu_set_registers(vcpu, &registers));
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, NULL));
    EXPECT(KVMMU_OK, kvmmu_translate_nested(vcpu, 0x400123, 0, &nested));
    CHECK(nested.status == KVMMU_STATUS_OK && nested.fault_gpa == KVMMU_INVALID_GPA);

    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, &cpu, &other)); /* KVM offers no sub-page permissions */
    stage = ept();
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(other, &stage));
    stage.flags |= KVMMU_STAGE_SPP;
    stage.spptp = 0xC000;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(other, &stage));
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(other)); /* with a second stage; a vCPU in its place has none */
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &other));
    EXPECT(KVMMU_OK, kvmmu_get_second_stage(other, &found));
    CHECK(found.flags == 0);
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(other));
    cpu.size = 12; /* a structure of version 1.0 */
    cpu.c_bit = cpu.features = ~0u;
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, &cpu, &other));
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(other));
    write_tables();
    return 0;
}

/* ---- handles --------------------------------------------------------------------------------------------------------- */

static int freed_handles(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    static const uint64_t numbers[] = { 0, 1, 0x10001, 0x20001, 0x20000, ~UINT64_C(0), 0xFFFF, 0x123456789abcdef };
    kvmmu_registers registers = paging();
    kvmmu_second_stage stage = ept();
    kvmmu_vcpu other, again;
    kvmmu_memory empty;
    kvmmu_result result;
    kvmmu_nested_result nested;
    kvmmu_mapping mapping;
    kvmmu_record record;
    size_t i;

    for (i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        EXPECT(KVMMU_E_HANDLE, kvmmu_translate(numbers[i], 0, 0, &result));
        EXPECT(KVMMU_E_HANDLE, kvmmu_vcpu_free(numbers[i]));
        EXPECT(KVMMU_E_HANDLE, kvmmu_memory_free(numbers[i]));
        EXPECT(KVMMU_E_HANDLE, kvmmu_memory_add(numbers[i], 0, ram, 4096, 0));
        EXPECT(KVMMU_E_HANDLE, kvmmu_vcpu_create(numbers[i], NULL, &other));
    }
    EXPECT(KVMMU_E_HANDLE, kvmmu_translate(memory, 0, 0, &result)); /* one kind for the other */
    EXPECT(KVMMU_E_HANDLE, kvmmu_memory_free(vcpu));

    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &other));
    EXPECT(KVMMU_E_BUSY, kvmmu_memory_free(memory));
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(other));
    EXPECT(KVMMU_E_HANDLE, kvmmu_vcpu_free(other));
    EXPECT(KVMMU_E_HANDLE, kvmmu_vcpu_release(other));
    EXPECT(KVMMU_E_HANDLE, kvmmu_translate(other, 0, 0, &result));
    EXPECT(KVMMU_E_HANDLE, kvmmu_translate_many(other, 0, NULL, NULL, 0, NULL, NULL));
    EXPECT(KVMMU_E_HANDLE, kvmmu_lookup(other, 0, 0, &mapping));
    EXPECT(KVMMU_E_HANDLE, kvmmu_walk_record(other, 0, 0, &record));
    EXPECT(KVMMU_E_HANDLE, kvmmu_translate_nested(other, 0, 0, &nested));
    EXPECT(KVMMU_E_HANDLE, kvmmu_set_second_stage(other, NULL));
    EXPECT(KVMMU_E_HANDLE, kvmmu_get_second_stage(other, &stage));
    EXPECT(KVMMU_E_HANDLE, kvmmu_set_registers(other, &registers));
    EXPECT(KVMMU_E_HANDLE, kvmmu_get_registers(other, &registers));
    EXPECT(KVMMU_E_HANDLE, kvmmu_invalidate(other, 0, 0));
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &again)); /* may have the place of the other one, not its handle */
    CHECK(again != other);
    EXPECT(KVMMU_E_HANDLE, kvmmu_translate(other, 0, 0, &result));
    EXPECT(KVMMU_OK, kvmmu_translate(again, 0, 0, &result));
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(again));

    EXPECT(KVMMU_OK, kvmmu_memory_create(&empty));
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(empty, NULL, &other));
    EXPECT(KVMMU_OK, kvmmu_set_registers(other, &registers));
    EXPECT(KVMMU_OK, kvmmu_translate(other, 0x400000, 0, &result)); /* all of it is a hole */
    CHECK(result.status == KVMMU_STATUS_PAGE_FAULT && result.error_code == 0);
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(other));
    EXPECT(KVMMU_OK, kvmmu_memory_free(empty));
    EXPECT(KVMMU_E_HANDLE, kvmmu_memory_free(empty));
    EXPECT(KVMMU_E_HANDLE, kvmmu_memory_add(empty, 0, ram, 4096, 0));
    return 0;
}

/* Host memory goes as soon as its slot is removed: nothing looks there any more. */
static int removed_slots(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    kvmmu_result result;
    uint64_t *table = (uint64_t *)calloc(1, 4096), old = ram[0x3000 / 8 + 2];

    CHECK(table != NULL);
    table[0] = 0x5007;
    ram[0x3000 / 8 + 2] = (UINT64_C(1) << 40) | 7;
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400000, 0, &result));
    CHECK(result.status == KVMMU_STATUS_PAGE_FAULT);
    EXPECT(KVMMU_OK, kvmmu_memory_add(memory, UINT64_C(1) << 40, table, 4096, 0));
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400000, 0, &result));
    CHECK(result.status == KVMMU_STATUS_OK && result.gpa == 0x5000);
    EXPECT(KVMMU_OK, kvmmu_memory_remove(memory, UINT64_C(1) << 40));
    free(table);
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400000, 0, &result));
    CHECK(result.status == KVMMU_STATUS_PAGE_FAULT);
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_remove(memory, UINT64_C(1) << 40));
    ram[0x3000 / 8 + 2] = old;
    return 0;
}

/* ---- callbacks ------------------------------------------------------------------------------------------------------- */

struct target {
    kvmmu_memory memory;
    kvmmu_vcpu vcpu;
    int answer;       /* of read */
    int write_answer; /* of write */
    int lies;         /* every read of a page has other bytes */
    int uses;         /* the vCPU, within the callback */
    int codes[11];
    unsigned reads, writes;
};

static int read_page(void *opaque, uint64_t gpa, void *page)
{
    struct target *t = (struct target *)opaque;
    kvmmu_registers registers = paging();
    kvmmu_result result;
    kvmmu_mapping mapping;
    kvmmu_record record;
    kvmmu_nested_result nested;
    kvmmu_second_stage stage = ept();
    uint64_t gva = 0;

    t->reads++;
    if (t->uses) {
        t->codes[0] = kvmmu_translate(t->vcpu, 0, 0, &result);
        t->codes[1] = kvmmu_translate_many(t->vcpu, 1, &gva, NULL, 0, &result, NULL);
        t->codes[2] = kvmmu_lookup(t->vcpu, 0, 0, &mapping);
        t->codes[3] = kvmmu_walk_record(t->vcpu, 0, 0, &record);
        t->codes[4] = kvmmu_set_registers(t->vcpu, &registers);
        t->codes[5] = kvmmu_vcpu_free(t->vcpu);
        t->codes[6] = kvmmu_vcpu_release(t->vcpu);
        t->codes[7] = kvmmu_invalidate(t->vcpu, 0, 0);
        t->codes[8] = kvmmu_translate_nested(t->vcpu, 0, 0, &nested);
        t->codes[9] = kvmmu_set_second_stage(t->vcpu, &stage);
        t->codes[10] = kvmmu_set_second_stage(t->vcpu, NULL);
        if (kvmmu_memory_free(t->memory) != KVMMU_E_BUSY)
            t->codes[0] = 1;
    }
    if (t->lies) {
        uint64_t *words = (uint64_t *)page;
        int i;
        for (i = 0; i < 512; i++)
            words[i] = (((uint64_t)rand() << 24 ^ (uint64_t)rand()) & UINT64_C(0xFFFFFFFF000)) | 7;
        return t->answer;
    }
    if (gpa < RAM_SIZE)
        memcpy(page, (char *)ram + gpa, 4096);
    return t->answer;
}

static int write_entry(void *opaque, uint64_t gpa, const void *data, size_t n)
{
    struct target *t = (struct target *)opaque;
    t->writes++;
    if (t->write_answer)
        return t->write_answer;
    if (gpa < RAM_SIZE)
        memcpy((char *)ram + gpa, data, n);
    return 0;
}

static int callbacks_that_fail(void)
{
    struct target t;
    kvmmu_callbacks callbacks = { sizeof(kvmmu_callbacks), 64, 0, &t, read_page, write_entry };
    kvmmu_registers registers = paging();
    kvmmu_result result, results[3];
    uint64_t addresses[3] = { 0x400000, 0x400010, 0x9000000 };
    kvmmu_mapping mapping;
    kvmmu_record record;
    kvmmu_second_stage stage = ept();
    kvmmu_nested_result nested;
    size_t done;
    int i;

    memset(&t, 0, sizeof t);
    write_tables();
    callbacks.cache_pages = 63;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_create_callbacks(&callbacks, &t.memory));
    callbacks.cache_pages = 64;
    callbacks.memory_size = 4097;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_create_callbacks(&callbacks, &t.memory));
    callbacks.memory_size = 0;
    EXPECT(KVMMU_OK, kvmmu_memory_create_callbacks(&callbacks, &t.memory));
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_memory_add(t.memory, 0, ram, 4096, 0));
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(t.memory, NULL, &t.vcpu));
    EXPECT(KVMMU_OK, kvmmu_set_registers(t.vcpu, &registers));

    t.answer = -1; /* fails */
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate(t.vcpu, 0x400000, 0, &result));
    EXPECT(KVMMU_E_CALLBACK, kvmmu_lookup(t.vcpu, 0x400000, 0, &mapping));
    EXPECT(KVMMU_E_CALLBACK, kvmmu_walk_record(t.vcpu, 0x400000, 0, &record));
    t.answer = 4096; /* answers what none may answer */
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate_many(t.vcpu, 3, addresses, NULL, 0, results, &done));
    CHECK(done == 0);
    t.answer = KVMMU_READ_HOLE; /* holes, though bytes were written */
    EXPECT(KVMMU_OK, kvmmu_translate(t.vcpu, 0x400000, 0, &result));
    CHECK(result.status == KVMMU_STATUS_PAGE_FAULT && result.error_code == 0);
    EXPECT(KVMMU_OK, kvmmu_invalidate(t.vcpu, 0, 0));
    t.answer = 0;
    t.write_answer = -5; /* the bits are stored nowhere */
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate(t.vcpu, 0x400000, 0, &result));
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate(t.vcpu, 0x400000, 0, &result)); /* and the next walk sets them again */
    EXPECT(KVMMU_OK, kvmmu_translate(t.vcpu, 0x400000, KVMMU_ACCESS_NO_AD, &result));
    CHECK(result.gpa == 0x4000 && !(ram[0x6000 / 8] & 0x20));
    t.write_answer = 0;
    EXPECT(KVMMU_OK, kvmmu_translate_many(t.vcpu, 3, addresses, NULL, KVMMU_ACCESS_WRITE, results, &done));
    CHECK(done == 3 && results[1].gpa == 0x4010 && results[2].status == KVMMU_STATUS_PAGE_FAULT);
    CHECK(ram[0x6000 / 8] == 0x4067 && ram[0x1000 / 8] == 0x2027);

    EXPECT(KVMMU_OK, kvmmu_invalidate(t.vcpu, 0x6008, 1)); /* one page; the others are kept */
    t.reads = 0;
    EXPECT(KVMMU_OK, kvmmu_translate(t.vcpu, 0x400000, 0, &result));
    CHECK(t.reads == 1 && result.gpa == 0x4000);
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_invalidate(t.vcpu, 4096, ~UINT64_C(0)));

    t.uses = 1; /* uses what it serves */
    EXPECT(KVMMU_OK, kvmmu_invalidate(t.vcpu, 0, 0));
    EXPECT(KVMMU_OK, kvmmu_translate(t.vcpu, 0x400000, 0, &result));
    for (i = 0; i < 11; i++)
        CHECK(t.codes[i] == KVMMU_E_BUSY);
    CHECK(result.gpa == 0x4000);
    t.uses = 0;
    write_ept();
    stage.root |= 1 << 6; /* accessed and dirty bits */
    stage.flags |= KVMMU_STAGE_PML | KVMMU_STAGE_VE;
    stage.pml_address = 0xD000;
    stage.pml_index = 3;
    stage.ve_area = 0xE000;
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(t.vcpu, &stage));
    EXPECT(KVMMU_OK, kvmmu_invalidate(t.vcpu, 0, 0));
    t.write_answer = 1;
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate_nested(t.vcpu, 0x400000, KVMMU_ACCESS_WRITE, &nested));
    t.write_answer = 0;
    t.writes = 0;
    EXPECT(KVMMU_OK, kvmmu_translate_nested(t.vcpu, 0x400000, KVMMU_ACCESS_WRITE, &nested));
    CHECK(nested.gpa == 0x4000 && nested.ngpa == 0x4000 && nested.exit_reason == KVMMU_EXIT_NONE);
    CHECK(t.writes >= 3 && (ram[0xA000 / 8] & 0x300) == 0x300 && ram[0x8000 / 8] == 0x9107);
    t.answer = -1;
    EXPECT(KVMMU_OK, kvmmu_invalidate(t.vcpu, 0, 0));
    EXPECT(KVMMU_E_CALLBACK, kvmmu_translate_nested(t.vcpu, 0x400000, 0, &nested));
    EXPECT(KVMMU_E_CALLBACK, kvmmu_lookup(t.vcpu, 0x400000, 0, &mapping));
    t.answer = 0;

    t.lies = 1; /* garbage that is different each time: some answer, in time */
    for (i = 0; i < 3000; i++) {
        uint64_t gva = (uint64_t)rand() << 16 ^ (uint64_t)rand();
        EXPECT(KVMMU_OK, kvmmu_translate(t.vcpu, gva & UINT64_C(0x7FFFFFFFFFFF), (uint32_t)(i % 2) * 2, &result));
        EXPECT(KVMMU_OK, kvmmu_walk_record(t.vcpu, gva & UINT64_C(0x7FFFFFFFFFFF), 0, &record));
        if (i == 1500) {
            EXPECT(KVMMU_OK, kvmmu_set_second_stage(t.vcpu, NULL));
            EXPECT(KVMMU_OK, kvmmu_set_registers(t.vcpu, &registers));
        }
    }
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(t.vcpu));
    EXPECT(KVMMU_OK, kvmmu_memory_free(t.memory));
    return 0;
}

/* ---- threads --------------------------------------------------------------------------------------------------------- */

struct worker {
    kvmmu_memory memory;
    kvmmu_vcpu shared;
    kvmmu_vcpu *churned;
    int line;
    unsigned refused, done;
};

/* Every thread uses the same vCPU, lets go of it now and then, and uses handles that another thread frees. */
static int work(struct worker *w)
{
    kvmmu_result result;
    int i, code;

    for (i = 0; i < ROUNDS; i++) {
        kvmmu_vcpu stale = __atomic_load_n(w->churned, __ATOMIC_RELAXED);
        code = kvmmu_translate(w->shared, 0x400000, KVMMU_ACCESS_WRITE, &result);
        if (code == KVMMU_OK) {
            w->done++;
            CHECK(result.gpa == 0x4000);
            if (i % 8 == 0)
                EXPECT(KVMMU_OK, kvmmu_vcpu_release(w->shared));
        } else {
            CHECK(code == KVMMU_E_THREAD);
            w->refused++;
        }
        code = kvmmu_translate(stale, 0x400000, 0, &result);
        CHECK(code == KVMMU_OK || code == KVMMU_E_THREAD || code == KVMMU_E_HANDLE);
        if (code == KVMMU_OK)
            CHECK(kvmmu_vcpu_release(stale) == KVMMU_OK);
    }
    code = kvmmu_vcpu_release(w->shared);
    CHECK(code == KVMMU_OK || code == KVMMU_E_THREAD);
    return 0;
}

static void *run_worker(void *argument)
{
    struct worker *w = (struct worker *)argument;
    w->line = work(w);
    return NULL;
}

static int threads(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    kvmmu_registers registers = paging();
    struct worker workers[THREADS];
    pthread_t ids[THREADS];
    kvmmu_vcpu churned = 0;
    unsigned i, done = 0;
    uint64_t *page = (uint64_t *)calloc(1, 4096);

    CHECK(page != NULL);
    write_tables();
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    EXPECT(KVMMU_OK, kvmmu_vcpu_release(vcpu)); /* before anybody starts, who might be done with it by then */
    memset(workers, 0, sizeof workers);
    for (i = 0; i < THREADS; i++) {
        workers[i].memory = memory;
        workers[i].shared = vcpu;
        workers[i].churned = &churned;
        CHECK(pthread_create(&ids[i], NULL, run_worker, &workers[i]) == 0);
    }
    for (i = 0; i < 300; i++) { /* vCPUs come and go, and so do slots */
        kvmmu_vcpu mine;
        int code;
        EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &mine));
        __atomic_store_n(&churned, mine, __ATOMIC_RELAXED);
        do
            code = kvmmu_set_registers(mine, &registers);
        while (code == KVMMU_E_THREAD);
        CHECK(code == KVMMU_OK);
        code = kvmmu_memory_add(memory, UINT64_C(1) << 32, page, 4096, 0);
        CHECK(code == KVMMU_OK || code == KVMMU_E_THREAD);
        while (code == KVMMU_OK && kvmmu_memory_remove(memory, UINT64_C(1) << 32) == KVMMU_E_THREAD)
            ;
        do
            code = kvmmu_vcpu_free(mine);
        while (code == KVMMU_E_THREAD);
        CHECK(code == KVMMU_OK);
    }
    for (i = 0; i < THREADS; i++) {
        pthread_join(ids[i], NULL);
        if (workers[i].line)
            return workers[i].line;
        done += workers[i].done;
    }
    CHECK(done > 0);
    free(page);
    return 0;
}

static void *use_and_keep(void *argument)
{
    kvmmu_result result;
    kvmmu_vcpu vcpu = *(kvmmu_vcpu *)argument;
    intptr_t code = kvmmu_translate(vcpu, 0x400000, 0, &result);
    return (void *)code;
}

static int another_thread(kvmmu_memory memory, kvmmu_vcpu vcpu)
{
    kvmmu_result result;
    pthread_t id;
    void *code;

    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400000, 0, &result));
    CHECK(pthread_create(&id, NULL, use_and_keep, &vcpu) == 0);
    pthread_join(id, &code);
    CHECK((intptr_t)code == KVMMU_E_THREAD);
    EXPECT(KVMMU_OK, kvmmu_vcpu_release(vcpu));
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x400000, 0, &result));
    EXPECT(KVMMU_OK, kvmmu_memory_add(memory, UINT64_C(1) << 33, ram, 4096, KVMMU_MEMORY_READONLY)); /* the caller's own */
    EXPECT(KVMMU_OK, kvmmu_memory_remove(memory, UINT64_C(1) << 33));
    return 0;
}

/* ---- all of it ------------------------------------------------------------------------------------------------------- */

static int before_import(void)
{
    kvmmu_memory memory;
    kvmmu_result result;
    if (kvmmu_table != NULL)
        return 0;
    EXPECT(KVMMU_E_IMPORT, kvmmu_memory_create(&memory));
    EXPECT(KVMMU_E_IMPORT, kvmmu_translate(1, 0, 0, &result));
    EXPECT(KVMMU_E_IMPORT, kvmmu_set_second_stage(1, NULL));
    CHECK(kvmmu_error_text(KVMMU_E_NULL) != NULL);
    return 0;
}

#define RUN(call)              \
    do {                       \
        int line = (call);     \
        if (line)              \
            return line;       \
    } while (0)

int misuse(const kvmmu_api *table);

int misuse(const kvmmu_api *table)
{
    kvmmu_registers registers = paging();
    kvmmu_memory memory;
    kvmmu_vcpu vcpu;
    int code;

    RUN(before_import());
    EXPECT(KVMMU_OK, kvmmu_use_table(table));
    ram = (uint64_t *)malloc(RAM_SIZE);
    CHECK(ram != NULL);
    write_tables();
    EXPECT(KVMMU_OK, kvmmu_memory_create(&memory));
    EXPECT(KVMMU_OK, kvmmu_memory_add(memory, 0, ram, RAM_SIZE, 0));
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &vcpu));
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    RUN(null_pointers(memory, vcpu));
    RUN(bad_values(memory, vcpu));
    RUN(illegal_registers(vcpu));
    RUN(second_stages(memory, vcpu));
    RUN(freed_handles(memory, vcpu));
    RUN(removed_slots(memory, vcpu));
    RUN(callbacks_that_fail());
    RUN(threads(memory, vcpu));
    RUN(another_thread(memory, vcpu));
    RUN(wrong_versions(memory, vcpu));
    EXPECT(KVMMU_OK, kvmmu_use_table(table));
    for (code = -20; code < 3; code++)
        CHECK(kvmmu_error_text(code) != NULL && kvmmu_error_text(code)[0]);
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(vcpu));
    EXPECT(KVMMU_OK, kvmmu_memory_free(memory));
    free(ram);
    return 0;
}
