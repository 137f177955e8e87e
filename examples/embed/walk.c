/* A plain C program that starts the Python interpreter once, and then translates addresses of a guest without it.
 *
 *     cc walk.c -I$(python3 -c "import kvmmu; print(kvmmu.get_include())") $(python3-config --includes) \
 *         $(python3-config --ldflags --embed) -pthread -o walk && ./walk
 */
#include <Python.h>

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <kvmmu/kvmmu.h>

#define RAM_SIZE (1u << 20)
#define LEAF 0x4067u /* page 0x4000: present, writable, user, accessed, dirty */

static uint64_t ram[RAM_SIZE / sizeof(uint64_t)];
static kvmmu_memory memory;

/* 4-level tables: linear 0x400000 leads to guest-physical 0x4000, the page after it to 0x5000, which is read-only. */
static void write_tables(void)
{
    ram[0x1000 / 8] = 0x2007;
    ram[0x2000 / 8] = 0x3007;
    ram[0x3000 / 8 + 2] = 0x6007;
    ram[0x6000 / 8] = LEAF;
    ram[0x6000 / 8 + 1] = 0x5005;
}

static int check(const char *what, int code)
{
    if (code != KVMMU_OK)
        fprintf(stderr, "%s: %s\n", what, kvmmu_error_text(code));
    return code;
}

static kvmmu_vcpu make_vcpu(void)
{
    kvmmu_registers registers = { sizeof(kvmmu_registers), 0, 0x80010001, 0x1000, 0x20, 0xD00, 2, { 0, 0, 0, 0 }, 0, 0 };
    kvmmu_vcpu vcpu = 0;

    if (check("vcpu_create", kvmmu_vcpu_create(memory, NULL, &vcpu)) || check("set_registers", kvmmu_set_registers(vcpu, &registers)))
        return 0;
    return vcpu;
}

/* Each thread has a vCPU of its own over the memory that all share. */
static void *translate_in_thread(void *argument)
{
    uint64_t *good = (uint64_t *)argument;
    kvmmu_vcpu vcpu = make_vcpu();
    kvmmu_result result;
    int i;

    for (i = 0; i < 100000; i++)
        if (kvmmu_translate(vcpu, 0x400000 + (uint64_t)i % 4096, KVMMU_ACCESS_USER, &result) == KVMMU_OK)
            *good += result.status == KVMMU_STATUS_OK;
    kvmmu_vcpu_free(vcpu);
    return NULL;
}

static void show(kvmmu_vcpu vcpu, uint64_t gva, uint32_t access)
{
    kvmmu_result result;

    if (check("translate", kvmmu_translate(vcpu, gva, access, &result)))
        return;
    if (result.status == KVMMU_STATUS_OK)
        printf("%#" PRIx64 " -> %#" PRIx64 "\n", gva, result.gpa);
    else
        printf("%#" PRIx64 " -> status %u, error code %#" PRIx32 "\n", gva, (unsigned)result.status, result.error_code);
}

/* The same guest under an EPT: its page 0x4000 lies at host-physical 0x84000, and the next one is read-only there. */
static int run_nested(kvmmu_vcpu vcpu)
{
    static const uint64_t addresses[2] = { 0x400123, 0x401123 };
    kvmmu_second_stage stage;
    kvmmu_nested_result result;
    uint64_t page;
    int i;

    memset(&stage, 0, sizeof stage);
    stage.size = sizeof stage;
    stage.flags = KVMMU_STAGE_EPT;
    stage.root = 0x8000 | 3 << 3 | 6; /* four levels, write-back */
    ram[0x8000 / 8] = 0x9007;
    ram[0x9000 / 8] = 0xA007;
    ram[0xA000 / 8] = 0xB007;
    for (page = 0; page < 8; page++)
        ram[0xB000 / 8 + page] = page << 12 | 0x37;
    ram[0xB000 / 8 + 4] = 0x84037;
    ram[0xB000 / 8 + 5] &= ~UINT64_C(2);
    ram[0x6000 / 8 + 1] |= 2; /* the guest itself may write there */
    if (check("set_second_stage", kvmmu_set_second_stage(vcpu, &stage)))
        return 1;
    for (i = 0; i < 2; i++) {
        if (check("translate_nested", kvmmu_translate_nested(vcpu, addresses[i], KVMMU_ACCESS_WRITE | KVMMU_ACCESS_USER, &result)))
            return 1;
        if (result.exit_reason == KVMMU_EXIT_NONE)
            printf("%#" PRIx64 " -> %#" PRIx64 " -> %#" PRIx64 "\n", addresses[i], result.ngpa, result.gpa);
        else
            printf("%#" PRIx64 " -> exit reason %" PRIu32 ", qualification %#" PRIx64 ", guest-physical address %#" PRIx64 "\n",
                   addresses[i], result.exit_reason, result.exit_qualification, result.fault_gpa);
    }
    return check("set_second_stage", kvmmu_set_second_stage(vcpu, NULL));
}

static int run(void)
{
    static const uint64_t addresses[3] = { 0x400010, 0x401010, 0x402010 };
    kvmmu_vcpu vcpu = make_vcpu();
    kvmmu_result results[3];
    kvmmu_mapping mapping;
    kvmmu_record record;
    pthread_t threads[2];
    uint64_t good[2] = { 0, 0 };
    uint32_t i;

    if (!vcpu)
        return 1;
    show(vcpu, 0x400123, KVMMU_ACCESS_READ);
    show(vcpu, 0x401123, KVMMU_ACCESS_WRITE | KVMMU_ACCESS_USER); /* read-only: #PF */
    show(vcpu, 0x0000900000000000, KVMMU_ACCESS_READ);            /* not canonical: #GP */

    if (check("lookup", kvmmu_lookup(vcpu, 0x401123, KVMMU_ACCESS_PROBE, &mapping)))
        return 1;
    printf("page of %" PRIu64 " bytes, rights %u, accessed %u\n", mapping.size, (unsigned)mapping.rights, (unsigned)mapping.accessed);
    if (check("record", kvmmu_walk_record(vcpu, 0x401123, KVMMU_ACCESS_WRITE, &record)))
        return 1;
    for (i = 0; i < record.count; i++)
        printf("level %u: entry %u at %#" PRIx64 " is %#" PRIx64 "\n", (unsigned)record.steps[i].level,
               (unsigned)record.steps[i].index, record.steps[i].entry_gpa, record.steps[i].entry);
    if (check("translate_many", kvmmu_translate_many(vcpu, 3, addresses, NULL, KVMMU_ACCESS_USER, results, NULL)))
        return 1;
    for (i = 0; i < 3; i++)
        printf("status %u\n", (unsigned)results[i].status);

    for (i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, translate_in_thread, &good[i]))
            return 1;
    for (i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("two threads: %" PRIu64 " translations\n", good[0] + good[1]);
    if (run_nested(vcpu))
        return 1;
    return check("vcpu_free", kvmmu_vcpu_free(vcpu));
}

int main(void)
{
    PyThreadState *state;
    int code;

    Py_Initialize();
    code = kvmmu_import();
    if (code != KVMMU_OK) {
        if (PyErr_Occurred())
            PyErr_Print();
        return check("import", code) != 0;
    }
    state = PyEval_SaveThread(); /* from here on no thread holds the GIL */
    write_tables();
    code = check("memory_create", kvmmu_memory_create(&memory)) || check("memory_add", kvmmu_memory_add(memory, 0, ram, RAM_SIZE, 0)) ||
           run() || check("memory_free", kvmmu_memory_free(memory));
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() < 0 || code;
}
