/* SPDX-License-Identifier: Apache-2.0 */
/* A plugin of QEMU's TCG that records memory accesses for kvmmu: `docs/formats.md` has the layout of the file and the commands.
 *
 * Build: cc -O2 -shared -fPIC -I DIRECTORY_OF_qemu-plugin.h $(pkg-config --cflags glib-2.0) -o kvmmu_trace.so kvmmu_trace.c
 * Use: qemu-system-x86_64 -plugin ./kvmmu_trace.so,out=FILE[,fetch=off][,block=N][,skip=N][,limit=N][,start=FILE] ...
 *
 * All versions since QEMU 4.2 tell linear and physical address, size, kind and processor of data accesses, and linear addresses of
 * instructions. Values of stores need API version 4 (QEMU 9.2), registers version 3 (QEMU 9.1).
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <qemu-plugin.h>

#define MAX_VCPUS 65536
#define UNKNOWN_GPA ((UINT64_C(1) << 52) - 1)
#define PAGE_OFFSET UINT64_C(4095)

enum kind { LOAD, STORE, FETCH, VALUE, CR3, CR0, CR4, EFER, CPL };

struct record {
    uint64_t address;               /* VALUE: what was stored; CR3 to EFER: the register; CPL: 1:0 CPL, 18 EFLAGS.AC */
    uint64_t info;                  /* 51:0 gpa, 55:52 size or its logarithm, 59:56 kind, 60 I/O */
};

struct block {
    char magic[4];                  /* "KVMB" */
    uint16_t vcpu;
    uint16_t zero;
    uint32_t count;
    uint32_t zero_too;
};

struct header {
    char magic[8];                  /* "kvmmuQT1" */
    uint32_t bytes;                 /* of this header */
    uint32_t flags;                 /* 1: system emulation, 2: fetches, 4: values, 8: registers */
    uint32_t vcpus;                 /* the most that there can be; 0: not known */
    uint32_t api;                   /* version of the plugin API */
    char target[16];
    char zero[24];
};

#if QEMU_PLUGIN_VERSION >= 3
#define CR0_PE 1u
#define CR0_PG (1u << 31)
#define EFLAGS_VM (1u << 17)
#define EFLAGS_AC (1u << 18)

enum { IS_CR0, IS_CR3, IS_CR4, IS_EFER, IS_CS, IS_EFLAGS, WATCHED };

static const char *const watched[WATCHED] = {"cr0", "cr3", "cr4", "efer", "cs", "eflags"};
#endif

struct vcpu {
    struct record *records;
    uint32_t count;
#if QEMU_PLUGIN_VERSION >= 3
    struct qemu_plugin_register *handles[WATCHED];      /* of those in `watched`; NULL: QEMU does not have it */
    uint64_t now[WATCHED];
    uint64_t told[CPL + 1];                             /* by kind: the last record's */
    bool is_told[CPL + 1];
    GByteArray *bytes;
#endif
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static FILE *out;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct vcpu *vcpus[MAX_VCPUS];
static uint32_t block_records = 4096;
static uint64_t skip, limit = UINT64_MAX, written;      /* records: under the lock, a block at a time */
static bool fetches = true, is_system;
static const char *start_path;                          /* nothing is recorded before this file is there; NULL: all is */
static atomic_bool recording = true;                      /* set while no vCPU runs, or by a vCPU before it runs */

/* Write a vCPU's records. Called with the lock held. */
static void flush_locked(unsigned int index)
{
    struct vcpu *vcpu = vcpus[index];
    struct block block = {"KVMB", (uint16_t)index, 0, vcpu->count, 0};

    memcpy(block.magic, "KVMB", 4);
    if (vcpu->count && written >= skip && written - skip < limit) {
        fwrite(&block, sizeof block, 1, out);
        fwrite(vcpu->records, sizeof(struct record), vcpu->count, out);
    }
    written += vcpu->count;
    vcpu->count = 0;
}

static struct vcpu *vcpu_at(unsigned int index)
{
    if (index >= MAX_VCPUS) {
        return NULL;
    }
    if (!vcpus[index]) {
        struct vcpu *vcpu = calloc(1, sizeof *vcpu);

        if (!vcpu || !(vcpu->records = calloc(block_records, sizeof(struct record)))) {
            fprintf(stderr, "kvmmu_trace: no memory for vCPU %u\n", index);
            abort();
        }
        vcpus[index] = vcpu;        /* only the vCPU's own thread sets and reads it before the end */
    }
    return vcpus[index];
}

static void record(unsigned int index, uint64_t address, uint64_t info)
{
    struct vcpu *vcpu = recording ? vcpu_at(index) : NULL;

    if (!vcpu) {
        return;
    }
    vcpu->records[vcpu->count++] = (struct record){address, info};
    if (vcpu->count == block_records) {
        pthread_mutex_lock(&lock);
        flush_locked(index);
        pthread_mutex_unlock(&lock);
    }
}

static uint64_t info_of(enum kind kind, uint64_t size, uint64_t gpa, bool io)
{
    return (gpa & UNKNOWN_GPA) | size << 52 | (uint64_t)kind << 56 | (uint64_t)io << 60;
}

static void on_access(unsigned int index, qemu_plugin_meminfo_t meminfo, uint64_t address, void *userdata)
{
    struct qemu_plugin_hwaddr *hwaddr;
    uint64_t gpa;
    unsigned int log = qemu_plugin_mem_size_shift(meminfo);
    bool store = qemu_plugin_mem_is_store(meminfo);

    (void)userdata;
    if (!recording) {
        return;
    }
    hwaddr = is_system ? qemu_plugin_get_hwaddr(meminfo, address) : NULL;
    gpa = hwaddr ? qemu_plugin_hwaddr_phys_addr(hwaddr) : UNKNOWN_GPA;
    record(index, address, info_of(store ? STORE : LOAD, log, gpa, hwaddr && qemu_plugin_hwaddr_is_io(hwaddr)));
#if QEMU_PLUGIN_VERSION >= 4
    if (store && log <= 4 && hwaddr && !qemu_plugin_hwaddr_is_io(hwaddr)) {
        qemu_plugin_mem_value value = qemu_plugin_mem_get_value(meminfo);

        if (log == 4) {
            record(index, value.data.u128.low, info_of(VALUE, 3, gpa, false));
            if ((gpa & PAGE_OFFSET) <= PAGE_OFFSET + 1 - 16) {  /* where the next page lies is not known */
                record(index, value.data.u128.high, info_of(VALUE, 3, gpa + 8, false));
            }
        } else {
            uint64_t stored = log == 0 ? value.data.u8 : log == 1 ? value.data.u16 : log == 2 ? value.data.u32 : value.data.u64;

            record(index, stored, info_of(VALUE, log, gpa, false));
        }
    }
#endif
}

/* userdata of an instruction: its size in the low bits, as a pointer; its address is read from memory that is never freed. */
struct instruction {
    uint64_t address;
    uint64_t size;
};

static void on_fetch(unsigned int index, void *userdata)
{
    const struct instruction *instruction = userdata;

    record(index, instruction->address, info_of(FETCH, instruction->size, UNKNOWN_GPA, false));
}

#if QEMU_PLUGIN_VERSION >= 3
static void on_vcpu(qemu_plugin_id_t id, unsigned int index)
{
    struct vcpu *vcpu = vcpu_at(index);
    GArray *registers = qemu_plugin_get_registers();

    (void)id;
    for (guint i = 0; vcpu && i < registers->len; i++) {
        qemu_plugin_reg_descriptor *descriptor = &g_array_index(registers, qemu_plugin_reg_descriptor, i);

        for (int k = 0; k < WATCHED; k++) {
            if (!strcmp(descriptor->name, watched[k])) {
                vcpu->handles[k] = descriptor->handle;
            }
        }
    }
    if (vcpu && !vcpu->bytes) {
        vcpu->bytes = g_byte_array_new();
    }
    g_array_free(registers, TRUE);
}

/* Read the registers into `now`. Outside of 64-bit mode QEMU tells 32 bits of each. */
static void read_registers(struct vcpu *vcpu)
{
    for (int k = 0; k < WATCHED; k++) {
        uint64_t value = 0;

        g_byte_array_set_size(vcpu->bytes, 0);
        if (vcpu->handles[k] && qemu_plugin_read_register(vcpu->handles[k], vcpu->bytes) > 0) {
            memcpy(&value, vcpu->bytes->data, vcpu->bytes->len < 8 ? vcpu->bytes->len : 8);
            if (vcpu->bytes->len < 8 && (uint32_t)vcpu->now[k] == (uint32_t)value) {
                value = vcpu->now[k];
            }
            vcpu->now[k] = value;
        }
    }
}

static void tell(struct vcpu *vcpu, unsigned int index, enum kind kind, uint64_t value)
{
    if (!vcpu->is_told[kind] || vcpu->told[kind] != value) {
        vcpu->is_told[kind] = true;
        vcpu->told[kind] = value;
        record(index, value, info_of(kind, 0, 0, false));
    }
}

static void on_block(unsigned int index, void *userdata)
{
    struct vcpu *vcpu = recording ? vcpu_at(index) : NULL;
    uint64_t cr0, cpl;

    (void)userdata;
    if (!vcpu || !vcpu->bytes || !vcpu->handles[IS_CR3]) {
        return;
    }
    read_registers(vcpu);
    cr0 = vcpu->now[IS_CR0];
    if (vcpu->handles[IS_CR0] && vcpu->handles[IS_CR4] && vcpu->handles[IS_EFER]) {
        if (!(cr0 & CR0_PG)) {          /* the order in which paging can be left and entered, if several change at once */
            tell(vcpu, index, CR0, cr0);
        }
        tell(vcpu, index, EFER, vcpu->now[IS_EFER]);
        tell(vcpu, index, CR4, vcpu->now[IS_CR4]);
    }
    tell(vcpu, index, CR3, vcpu->now[IS_CR3]);
    if (vcpu->handles[IS_CR0] && vcpu->handles[IS_CR4] && vcpu->handles[IS_EFER]) {
        tell(vcpu, index, CR0, cr0);
    }
    if (vcpu->handles[IS_CR0] && vcpu->handles[IS_CS] && vcpu->handles[IS_EFLAGS]) {
        cpl = !(cr0 & CR0_PE) ? 0 : vcpu->now[IS_EFLAGS] & EFLAGS_VM ? 3 : vcpu->now[IS_CS] & 3;
        tell(vcpu, index, CPL, cpl | (vcpu->now[IS_EFLAGS] & EFLAGS_AC));
    }
}
#endif

/* A vCPU that was stopped or halted is about to run. After QMP's `stop` all of them come through here before they run again, so
 * that a trace begins where guest memory was saved: between `stop` and `cont`. */
static void on_resume(qemu_plugin_id_t id, unsigned int index)
{
    (void)id;
    (void)index;
    if (!recording && !access(start_path, F_OK)) {
        recording = true;
    }
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t count = qemu_plugin_tb_n_insns(tb);
    struct instruction *instructions = fetches ? calloc(count, sizeof *instructions) : NULL;

    (void)id;
#if QEMU_PLUGIN_VERSION >= 3
    if (is_system) {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_R_REGS, NULL);
    }
#endif
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

        if (instructions) {         /* QEMU may run a block at any time: its instructions stay until the end */
            instructions[i] = (struct instruction){qemu_plugin_insn_vaddr(insn), qemu_plugin_insn_size(insn)};
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_fetch, QEMU_PLUGIN_CB_NO_REGS, &instructions[i]);
        }
        qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
    }
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *userdata)
{
    (void)id;
    (void)userdata;
    pthread_mutex_lock(&lock);
    for (unsigned int index = 0; index < MAX_VCPUS; index++) {
        if (vcpus[index]) {
            flush_locked(index);
        }
    }
    if (fclose(out)) {
        perror("kvmmu_trace");
    }
    out = fopen("/dev/null", "wb");  /* threads that still run write nowhere */
    pthread_mutex_unlock(&lock);
}

static bool number_of(const char *text, uint64_t *number)
{
    char *end;

    *number = strtoull(text, &end, 0);
    return *text && !*end;
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    struct header header = {.bytes = sizeof header, .api = QEMU_PLUGIN_VERSION};
    const char *path = "kvmmu.qtrace";

    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value++ - argv[i]) : 0;
        uint64_t number;

        if (length == 3 && !strncmp(argv[i], "out", 3)) {
            path = value;
        } else if (length == 5 && !strncmp(argv[i], "fetch", 5) && (!strcmp(value, "on") || !strcmp(value, "off"))) {
            fetches = !strcmp(value, "on");
        } else if (length == 5 && !strncmp(argv[i], "block", 5) && number_of(value, &number) && number && number <= 65536) {
            block_records = (uint32_t)number;
        } else if (length == 4 && !strncmp(argv[i], "skip", 4) && number_of(value, &number)) {
            skip = number;
        } else if (length == 5 && !strncmp(argv[i], "limit", 5) && number_of(value, &number)) {
            limit = number;
        } else if (length == 5 && !strncmp(argv[i], "start", 5) && *value) {
            start_path = value;
        } else {
            fprintf(stderr, "kvmmu_trace: %s is no option; allowed are out=FILE, fetch=on|off, block=1 to 65536, skip=N, limit=N, "
                            "start=FILE\n", argv[i]);
            return -1;
        }
    }
    if (start_path) {
        if (!access(start_path, F_OK)) {
            fprintf(stderr, "kvmmu_trace: start=%s is there already; remove it, and make it when the recording is to begin\n",
                    start_path);
            return -1;
        }
        recording = false;
        qemu_plugin_register_vcpu_resume_cb(id, on_resume);
    }
    out = fopen(path, "wb");
    if (!out) {
        perror(path);
        return -1;
    }
    is_system = info->system_emulation;
    memcpy(header.magic, "kvmmuQT1", 8);
    snprintf(header.target, sizeof header.target, "%s", info->target_name);
    header.vcpus = is_system ? (uint32_t)info->system.max_vcpus : 0;
    header.flags = (is_system ? 1 : 0) | (fetches ? 2 : 0);
#if QEMU_PLUGIN_VERSION >= 4
    header.flags |= is_system ? 4 : 0;
#endif
#if QEMU_PLUGIN_VERSION >= 3
    header.flags |= is_system ? 8 : 0;
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu);
#endif
    fwrite(&header, sizeof header, 1, out);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
