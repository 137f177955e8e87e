"""Walks side by side, in C: see `_lanes.h`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._format cimport kvm_page_format

cdef extern from "kvmmu/walk/batch/kernels/_lanes.h" nogil:
    const size_t KVMMU_LANES
    const size_t KVMMU_LANES_ALIGNMENT
    enum:
        PREFIX_BITS
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
    const uint64_t PREFIX_TAG_COLD
    const uint64_t PREFIX_ADDR_MASK

    cdef struct kvmmu_prefix:
        uint64_t tag
        uint64_t ref

    cdef struct kvmmu_tlb_entry:
        uint64_t tag
        uint64_t page

    cdef struct kvmmu_lane_walk:
        const kvm_page_format *fmt
        uint64_t present_mask
        uint64_t page_size_mask
        uint64_t pse36_mask
        uint64_t accessed_mask
        uint32_t pkru
        uint32_t asid

    cdef struct kvmmu_stage:
        kvmmu_prefix *prefixes
        uint64_t place
        uint64_t space
        int level
        int region_shift
        uint64_t gva_mask
        uint64_t nothing

    cdef struct kvmmu_lanes:
        uint64_t ref[64]
        uint64_t entry[64]
        uint64_t pte[64]
        uint64_t look[64]
        uint64_t pte_access[64]
        uint64_t gpa[64]
        uint64_t error[64]
        int level
        uint64_t noncanonical
        uint64_t miss
        uint64_t cold
        uint64_t fault
        uint64_t slow

    ctypedef uint64_t (*kvmmu_find_fn)(kvmmu_lanes *, const kvmmu_stage *, const uint64_t *gva, bint far) noexcept
    ctypedef uint64_t (*kvmmu_read_fn)(kvmmu_lanes *, const kvmmu_stage *, const uint64_t *gva, const uint8_t *access,
                                       uint64_t *gpa, uint8_t *level, uint8_t *status, uint32_t *error_code) noexcept
    ctypedef void (*kvmmu_judge_fn)(kvmmu_lanes *, const kvmmu_lane_walk *, uint64_t gva_mask, const uint64_t *gva,
                                    const uint8_t *access, uint64_t *gpa) noexcept
    ctypedef uint64_t (*kvmmu_recall_fn)(const kvmmu_tlb_entry *, const uint64_t *gva, const uint8_t *access,
                                         const uint32_t *ctx, uint64_t space, uint64_t *gpa, uint8_t *level, uint8_t *status,
                                         uint32_t *error_code) noexcept

    ctypedef void (*kvmmu_emit_fn)(const kvmmu_lanes *, uint64_t fault, uint32_t access_mask, uint64_t *gpa, uint8_t *status,
                                   uint32_t *error_code) noexcept

    cdef struct kvmmu_lane_ops:
        kvmmu_find_fn find[3]
        kvmmu_read_fn read[3]
        kvmmu_judge_fn judge[3]
        kvmmu_recall_fn recall
        kvmmu_emit_fn emit

    void kvmmu_set_prefix(int format, kvmmu_lanes *l, size_t lane, uint64_t addr, uint64_t ref)
    void kvmmu_use_tables(int format, kvmmu_stage *s, uint32_t asid, int level)
    uint64_t kvmmu_prefix_place_of(const kvmmu_stage *s, uint64_t addr)
    bint kvmmu_learn_passes(int format, kvmmu_stage *s, const kvmmu_lane_walk *w, uint64_t sample,
                            const uint8_t *seconds)
    uint64_t kvmmu_region(int format, uint64_t addr)
    uint64_t kvmmu_prefix_slot(uint64_t region, uint32_t asid)
    uint64_t kvmmu_prefix_tag(uint64_t region, uint32_t asid)
    uint64_t kvmmu_tlb_slot(uint64_t page, uint64_t asid)
    uint64_t kvmmu_tlb_gpa(uint64_t value)
    uint64_t kvmmu_prefix_level(uint64_t ref)
    uint64_t kvmmu_entry_hva(int format, uint64_t ref, uint64_t addr)
    uint64_t kvmmu_read_entry(int format, uint64_t hva)
    size_t kvmmu_first_bit(uint64_t bits)
    int kvmmu_count_bits(uint64_t bits)
    const kvmmu_lane_ops *kvmmu_lane_ops_of(const char *name)
