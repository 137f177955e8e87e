"""The kernels in C, and the table of them that batches use: see `kernels/kernels.h` and `kernels/_state.h`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._format cimport kvm_page_format
from kvmmu.arch._linear cimport kvmmu_linear_rules

cdef extern from "kvmmu/walk/batch/kernels/kernels.h" nogil:
    const size_t KVMMU_BLOCK_ROWS
    const size_t KVMMU_BLOCK_ALIGNMENT
    enum:
        PSC_BITS
        PSC_WALK_ID_BITS
        PSCE_TABLE_SHIFT
        PSCE_ACCESSED_CLEAR_SHIFT
        PSCE_READONLY_SHIFT
        PSCE_WRITE_REFUSED_SHIFT
        PSCE_LEVEL_SHIFT
        PSCE_ACCESS_SHIFT
        MEMO_BITS
        MEMO_ID_BITS
        MEMO_FRAME_SHIFT
        MEMO_LEVEL_SHIFT

    const uint64_t PSCE_HVA_MASK
    const uint64_t PSC_TAG_ACCESSED_CLEAR
    const uint64_t PSC_ADDR_MASK

    cdef struct kvmmu_psc_entry:
        uint64_t tag
        uint64_t value

    cdef struct kvmmu_memo_entry:
        uint64_t tag
        uint64_t page

    cdef struct kvmmu_leaf_rules:
        const kvm_page_format *fmt
        uint64_t present_mask
        uint64_t page_size_mask
        uint64_t pse36_mask
        uint64_t accessed_mask
        uint64_t address_mask
        uint64_t keys
        uint32_t walk_id
        int format
        bint sets_ad
        bint logs
        bint shadow_stacks

    cdef struct kvmmu_leaf_checker:
        kvmmu_psc_entry *psc
        uint64_t walk_slot
        uint64_t walk_tag
        int level
        int tag_shift
        uint64_t gva_mask
        uint64_t base
        uint64_t nothing

    cdef struct kvmmu_leaf_block:
        uint64_t psce[64]
        uint64_t entry[64]
        uint64_t pte[64]
        uint64_t access_info[64]
        uint64_t pte_access[64]
        uint64_t gpa[64]
        uint64_t error[64]
        int level
        uint64_t noncanonical
        uint64_t miss
        uint64_t accessed_clear
        uint64_t fault
        uint64_t slow

    cdef struct kvmmu_descent:
        uint64_t gva_mask
        uint64_t base
        uint64_t want
        uint64_t care
        uint64_t nothing
        uint64_t gpa
        uint64_t size
        uint64_t hva
        uint64_t psce
        uint64_t present_mask
        uint64_t page_size_mask

    ctypedef uint64_t (*kvmmu_descend_fn)(kvmmu_leaf_block *, const kvmmu_descent *, const uint64_t *gva, bint far) noexcept
    ctypedef uint64_t (*kvmmu_find_fn)(kvmmu_leaf_block *, const kvmmu_leaf_checker *, const uint64_t *gva, bint far) noexcept
    ctypedef uint64_t (*kvmmu_accept_fn)(kvmmu_leaf_block *, const kvmmu_leaf_checker *, const uint64_t *gva,
                                         const uint8_t *access,
                                         uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code,
                                         const uint64_t *ahead) noexcept
    ctypedef void (*kvmmu_check_fn)(kvmmu_leaf_block *, const kvmmu_leaf_rules *, uint64_t gva_mask, const uint64_t *gva,
                                    const uint8_t *access, uint64_t *gpa) noexcept
    ctypedef uint64_t (*kvmmu_recall_fn)(const kvmmu_memo_entry *, const uint64_t *gva, const uint8_t *access,
                                         const uint32_t *ctx, uint64_t memo_id, uint64_t *gpa, uint8_t *level, uint8_t *status,
                                         uint32_t *error_code) noexcept

    ctypedef void (*kvmmu_emit_fn)(const kvmmu_leaf_block *, uint64_t fault, uint32_t access_mask, uint64_t *gpa, uint8_t *status,
                                   uint32_t *error_code) noexcept

    ctypedef void (*kvmmu_pre_process_fn)(const kvmmu_linear_rules *, const uint64_t *gva, const uint8_t *access,
                                          uint64_t *out) noexcept

    cdef struct kvmmu_kernels:
        kvmmu_find_fn find[3]
        kvmmu_descend_fn descend[3]
        kvmmu_accept_fn accept[3]
        kvmmu_check_fn check[3]
        kvmmu_recall_fn recall
        kvmmu_emit_fn emit
        kvmmu_pre_process_fn pre_process

    void kvmmu_prefetch(uint64_t hva)
    void kvmmu_set_psce(int format, kvmmu_leaf_block *l, size_t lane, uint64_t addr, uint64_t psce)
    void kvmmu_use_tables(int format, kvmmu_leaf_checker *s, uint32_t walk_id, int level)
    uint64_t kvmmu_psc_slot_of(const kvmmu_leaf_checker *s, uint64_t addr)
    bint kvmmu_make_accept_masks(int format, kvmmu_leaf_checker *s, const kvmmu_leaf_rules *w, uint64_t sample,
                                 const uint8_t *seconds)
    bint kvmmu_narrow_accept_masks(int format, kvmmu_leaf_checker *s, const kvmmu_leaf_rules *w)
    uint64_t kvmmu_addr_tag(int format, uint64_t addr)
    uint64_t kvmmu_psc_slot(uint64_t addr_tag, uint32_t walk_id)
    uint64_t kvmmu_psc_tag(uint64_t addr_tag, uint32_t walk_id)
    uint64_t kvmmu_memo_slot(uint64_t page, uint64_t walk_id)
    uint64_t kvmmu_memo_gpa(uint64_t value)
    uint64_t kvmmu_psce_level(uint64_t psce)
    uint64_t kvmmu_entry_hva(int format, uint64_t psce, uint64_t addr)
    uint64_t kvmmu_read_entry(int format, uint64_t hva)
    size_t kvmmu_first_bit(uint64_t bits)
    int kvmmu_count_bits(uint64_t bits)
    const kvmmu_kernels *kvmmu_kernels_of(const char *name)

# The table in use
cdef const kvmmu_kernels *kernels_in_use() noexcept nogil
