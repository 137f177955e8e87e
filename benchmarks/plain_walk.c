/* A 4-level walk as one would write it by hand: one address at a time, with present, large-page and bounds checks.
 *
 * No rights, no reserved bits, no accessed or dirty bits. Results as kvmmu's: address or all ones, status, error code. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct plain_result {
    uint64_t gpa;
    uint32_t error_code;
    uint8_t status;
};

static inline struct plain_result plain_walk(const uint8_t *memory, uint64_t size, uint64_t cr3, uint64_t gva)
{
    struct plain_result none = { ~0ull, 0, 1 };
    uint64_t entry = cr3;

    if ((uint64_t)((int64_t)(gva << 16) >> 16) != gva) {
        none.status = 2;
        return none;
    }
    for (int shift = 39;; shift -= 9) {
        uint64_t at = (entry & 0x000ffffffffff000ull) + (gva >> shift & 0x1ff) * 8;
        if (at > size - 8)
            return none;
        memcpy(&entry, memory + at, 8);
        if (!(entry & 1))
            return none;
        if (shift == 12 || (entry & 0x80 && shift <= 30)) {
            uint64_t offset = ((uint64_t)1 << shift) - 1;
            struct plain_result found = { (entry & 0x000ffffffffff000ull & ~offset) | (gva & offset), 0, 0 };
            return found;
        }
    }
}

void plain_walk_rows(const uint8_t *memory, uint64_t size, uint64_t cr3, const uint64_t *gva, uint64_t n, uint64_t *gpa,
                     uint8_t *status, uint32_t *error_code)
{
    for (uint64_t i = 0; i < n; i++) {
        struct plain_result r = plain_walk(memory, size, cr3, gva[i]);
        gpa[i] = r.gpa;
        status[i] = r.status;
        error_code[i] = r.error_code;
    }
}

/* The same, but each address waits for the result before it: the time of one walk from beginning to end. */
void plain_walk_chain(const uint8_t *memory, uint64_t size, uint64_t cr3, const uint64_t *gva, uint64_t n, uint64_t *gpa,
                      uint8_t *status, uint32_t *error_code)
{
    uint64_t last = 0;
    for (uint64_t i = 0; i < n; i++) {
        struct plain_result r = plain_walk(memory, size, cr3, gva[i] ^ (last >> 63));
        gpa[i] = last = r.gpa;
        status[i] = r.status;
        error_code[i] = r.error_code;
    }
}

/* uc_vmem_translate(uc, address, prot, &paddress) of the Unicorn library, row by row: the number that it translated. */
typedef int (*vmem_translate_fn)(void *uc, uint64_t address, int prot, uint64_t *paddress);

uint64_t vmem_translate_rows(void *function, void *uc, const uint64_t *gva, uint64_t n, uint64_t *gpa)
{
    vmem_translate_fn translate = (vmem_translate_fn)function;
    uint64_t good = 0;
    for (uint64_t i = 0; i < n; i++) {
        gpa[i] = ~0ull;
        good += translate(uc, gva[i], 1, &gpa[i]) == 0;
    }
    return good;
}
