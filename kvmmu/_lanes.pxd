"""Walks side by side, in C: see `_lanes.h`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._format cimport kvm_page_format

cdef extern from "_lanes.h" nogil:
    const size_t KVMMU_LANES
    enum:
        PREFIX_BITS
        DIRECTORY_NAME_SHIFT
        DIRECTORY_NAMES
        PREFIX_ASID_SHIFT
        PREFIX_ASID_BITS
        PREFIX_TABLE_SHIFT
        PREFIX_COLD_SHIFT
        PREFIX_READONLY_SHIFT
        PREFIX_REFUSED_SHIFT
        PREFIX_LEVEL_SHIFT
        PREFIX_ACCESS_SHIFT
        TLB_BITS
        TLB_ASID_BITS
        TLB_FRAME_SHIFT
        TLB_LEVEL_SHIFT

    const uint64_t PREFIX_HVA_MASK
    const uint64_t PREFIX_LIKE_MASK
    const uint64_t PREFIX_ADDR_MASK

    cdef struct kvmmu_prefix:
        uint64_t tag
        uint64_t ref

    cdef struct kvmmu_tlb_entry:
        uint64_t tag
        uint64_t page

    cdef struct kvmmu_directory:
        uint64_t *words
        uint64_t name
        uint64_t phase
        uint64_t nothing
        uint64_t like
        int region_shift
        int entry_shift
        bint has_voids

    cdef struct kvmmu_lane_walk:
        const kvm_page_format *fmt
        uint64_t present_mask
        uint64_t page_size_mask
        uint64_t pse36_mask
        uint64_t accessed_mask
        uint32_t pkru
        uint32_t asid

    cdef struct kvmmu_lanes:
        uint64_t addr[64]
        uint64_t look[64]
        uint64_t ref[64]
        uint64_t entry[64]
        uint64_t pte[64]
        uint64_t pte_access[64]
        uint64_t gpa[64]
        uint64_t error[64]
        uint64_t like
        uint64_t voids
        uint64_t noncanonical
        uint64_t miss
        uint64_t apart
        uint64_t fault
        uint64_t slow

    cdef struct kvmmu_pass:
        uint64_t care
        uint64_t want

    cdef struct kvmmu_passes:
        kvmmu_pass of[64]

    ctypedef void (*kvmmu_start_fn)(kvmmu_lanes *, const uint64_t *gva, uint64_t gva_mask, int canonical_shift, bint far,
                                    const kvmmu_directory *) noexcept
    ctypedef uint64_t (*kvmmu_sure_fn)(kvmmu_lanes *, const kvmmu_passes *, const uint8_t *access, bint alike, uint64_t like,
                                       uint64_t *gpa) noexcept
    ctypedef uint64_t (*kvmmu_beside_fn)(kvmmu_lanes *, uint64_t lanes, const kvmmu_prefix *, uint32_t asid, uint64_t like,
                                         const kvmmu_pass *, const uint8_t *access, uint64_t *gpa) noexcept
    ctypedef void (*kvmmu_judge_fn)(kvmmu_lanes *, const kvmmu_lane_walk *) noexcept
    ctypedef uint64_t (*kvmmu_recall_fn)(const kvmmu_tlb_entry *, const uint64_t *gva, const uint8_t *access,
                                         size_t access_stride, const uint32_t *ctx, uint32_t asid, uint64_t *gpa,
                                         uint8_t *level) noexcept

    ctypedef void (*kvmmu_emit_fn)(const kvmmu_lanes *, uint64_t fault, uint32_t access_mask, const uint64_t *start,
                                   uint64_t *gpa, uint8_t *status, uint32_t *error_code) noexcept

    cdef struct kvmmu_lane_ops:
        kvmmu_start_fn start[3]
        kvmmu_sure_fn sure[3]
        kvmmu_beside_fn beside[3]
        kvmmu_judge_fn judge[3]
        kvmmu_recall_fn recall
        kvmmu_emit_fn emit

    void kvmmu_set_prefix(int format, kvmmu_lanes *l, size_t lane, uint64_t ref)
    bint kvmmu_sure_pass(int format, const kvmmu_lane_walk *w, uint64_t like, uint64_t look, uint64_t sample,
                         kvmmu_pass *p)
    uint64_t kvmmu_directory_slot(uint64_t region)
    uint64_t kvmmu_directory_word(const kvmmu_directory *d, uint64_t region, uint64_t table)
    void kvmmu_want_prefix(int format, const kvmmu_prefix *prefixes, uint32_t asid, uint64_t addr)
    void kvmmu_split_passes(kvmmu_passes *p)
    uint64_t kvmmu_region(int format, uint64_t addr)
    uint64_t kvmmu_prefix_slot(uint64_t region, uint32_t asid)
    uint64_t kvmmu_tlb_slot(uint64_t page, uint64_t asid)
    uint64_t kvmmu_tlb_gpa(uint64_t value)
    uint64_t kvmmu_prefix_level(uint64_t ref)
    uint64_t kvmmu_entry_hva(int format, uint64_t ref, uint64_t addr)
    uint64_t kvmmu_read_entry(int format, uint64_t hva)
    size_t kvmmu_first_bit(uint64_t bits)
    int kvmmu_count_bits(uint64_t bits)
    const kvmmu_lane_ops *kvmmu_lane_ops_of(const char *name)
