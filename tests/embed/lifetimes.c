/* kvmmu.h with the GIL held, with an exception set, in a thread without the GIL, and after the end of the interpreter. */
#include <Python.h>

#include <pthread.h>
#include <stdio.h>

#include <kvmmu/kvmmu.h>

#define EXPECT(code, call)                                                        \
    do {                                                                          \
        int found = (call);                                                       \
        if (found != (code)) {                                                    \
            fprintf(stderr, "line %d: %d, not %d\n", __LINE__, found, (code));    \
            return 1;                                                             \
        }                                                                         \
    } while (0)

static uint64_t ram[1 << 15];
static kvmmu_memory memory;
/* The identity for the first 2M, at 0x8000 */
static kvmmu_second_stage stage = { sizeof(kvmmu_second_stage), KVMMU_STAGE_EPT, 0x801E, 0, 0, 0, 0, 0, 0, 0 };
static kvmmu_registers registers = { sizeof(kvmmu_registers), 0, 0x80010001, 0x1000, 0x20, 0xD00, 2, { 0, 0, 0, 0 }, 0, 0 };

static int use(void)
{
    kvmmu_registers illegal = registers;
    kvmmu_second_stage wrong = stage;
    kvmmu_vcpu vcpu;
    kvmmu_result result;

    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &vcpu));
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    illegal.cr4 = 0;
    EXPECT(KVMMU_E_REGISTERS, kvmmu_set_registers(vcpu, &illegal));
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x123, KVMMU_ACCESS_WRITE, &result));
    EXPECT(0x5123, (int)result.gpa);
    wrong.root = 0;
    EXPECT(KVMMU_E_ARGUMENT, kvmmu_set_second_stage(vcpu, &wrong));
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, &stage));
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x123, KVMMU_ACCESS_WRITE, &result));
    EXPECT(0x5123, (int)result.gpa);
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(vcpu));
    return 0;
}

static void *use_in_thread(void *failed)
{
    *(int *)failed = use();
    return NULL;
}

static int after_the_end(kvmmu_vcpu vcpu)
{
    kvmmu_registers other = registers;
    kvmmu_vcpu made;
    kvmmu_result result;

    EXPECT(0, Py_IsInitialized());
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x123, KVMMU_ACCESS_WRITE, &result));
    EXPECT(0x5123, (int)result.gpa);
    other.cr3 = 0x7000; /* no tables */
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &other));
    EXPECT(KVMMU_OK, kvmmu_translate(vcpu, 0x123, KVMMU_ACCESS_WRITE, &result));
    EXPECT(KVMMU_STATUS_PAGE_FAULT, result.status);
    other.cr4 = 0x200020;
    EXPECT(KVMMU_E_PYTHON, kvmmu_set_registers(vcpu, &other));
    EXPECT(KVMMU_E_PYTHON, kvmmu_set_second_stage(vcpu, NULL));
    EXPECT(KVMMU_E_PYTHON, kvmmu_vcpu_create(memory, NULL, &made));
    EXPECT(KVMMU_E_PYTHON, kvmmu_import());
    EXPECT(KVMMU_OK, kvmmu_vcpu_free(vcpu));
    EXPECT(KVMMU_OK, kvmmu_memory_free(memory));
    return 0;
}

int main(void)
{
    PyThreadState *state;
    pthread_t thread;
    kvmmu_vcpu vcpu;
    int failed = 0;

    ram[0x1000 / 8] = 0x2007;
    ram[0x2000 / 8] = 0x3007;
    ram[0x3000 / 8] = 0x4007;
    ram[0x4000 / 8] = 0x5007;
    ram[0x8000 / 8] = 0x9007;
    ram[0x9000 / 8] = 0xA007;
    ram[0xA000 / 8] = 0xB7;
    EXPECT(KVMMU_E_PYTHON, kvmmu_import());
    Py_Initialize();
    EXPECT(KVMMU_OK, kvmmu_import());
    EXPECT(KVMMU_OK, kvmmu_memory_create(&memory));
    EXPECT(KVMMU_OK, kvmmu_memory_add(memory, 0, ram, sizeof ram, 0));
    PyErr_SetString(PyExc_KeyError, "of the caller");
    EXPECT(0, use());
    EXPECT(1, PyErr_ExceptionMatches(PyExc_KeyError));
    PyErr_Clear();

    state = PyEval_SaveThread();
    EXPECT(0, pthread_create(&thread, NULL, use_in_thread, &failed));
    pthread_join(thread, NULL);
    EXPECT(0, failed);
    EXPECT(0, use());
    EXPECT(KVMMU_OK, kvmmu_vcpu_create(memory, NULL, &vcpu));
    EXPECT(KVMMU_OK, kvmmu_set_second_stage(vcpu, &stage));
    EXPECT(KVMMU_OK, kvmmu_set_registers(vcpu, &registers));
    PyEval_RestoreThread(state);
    EXPECT(0, Py_FinalizeEx());
    if (after_the_end(vcpu))
        return 1;
    printf("done\n");
    return 0;
}
