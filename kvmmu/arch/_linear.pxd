"""Linear-address pre-processing: tags that LAM and UAI take away, and halves that LASS keeps apart; see `_linear.h`."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "kvmmu/arch/_linear.h" nogil:
    enum:
        KVMMU_SHADOW_STACK_TO_LASS_SHIFT

    cdef struct kvmmu_linear_rules:
        uint64_t tag[2]
        uint64_t sign[2]
        uint64_t untagged
        uint32_t lass[2]
        uint32_t has_lass

    uint64_t kvmmu_untagged(const kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
    bint kvmmu_lass_violated(const kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
    uint64_t kvmmu_linear_address(const kvmmu_linear_rules *rules, uint64_t addr, uint32_t access)
