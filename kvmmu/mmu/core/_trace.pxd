"""The ring that tracepoints of the MMU write to; `kvmmu.vm.tracepoints` makes text of it.

An event is a word each for up to seven fields, in the order of the tracepoint's own fields. Which events are on is a bit mask;
an event that is off costs one test.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef enum trace_event_id:
    TRACE_GET_PAGE              # mmu_valid_gen gfn role root_count unsync created
    TRACE_SYNC_PAGE             # mmu_valid_gen gfn role root_count unsync
    TRACE_UNSYNC_PAGE
    TRACE_PREPARE_ZAP_PAGE
    TRACE_MARK_MMIO_SPTE        # sptep gfn access gen
    TRACE_HANDLE_MMIO_PAGE_FAULT  # addr gfn access
    TRACE_FAST_PAGE_FAULT       # vcpu_id cr2_or_gpa error_code sptep old_spte new_spte ret
    TRACE_ZAP_ALL_FAST          # mmu_valid_gen n_used_mmu_pages
    TRACE_CHECK_MMIO_SPTE       # kvm_gen spte_gen spte
    TRACE_SET_SPTE              # gfn spte sptep level
    TRACE_SPTE_REQUESTED        # gfn pfn level
    TRACE_TDP_SPTE_CHANGED      # as_id gfn level old_spte new_spte
    TRACE_SPLIT_HUGE_PAGE       # gfn spte level errno
    TRACE_PAGETABLE_WALK        # addr pferr
    TRACE_PAGING_ELEMENT        # pte level
    TRACE_SET_ACCESSED_BIT      # gpa
    TRACE_SET_DIRTY_BIT         # gpa
    TRACE_WALKER_ERROR          # pferr

cdef struct trace_event:
    uint32_t id
    uint32_t vcpu
    uint64_t number             # of the event, from 0
    uint64_t args[7]

cdef struct trace_ring:
    trace_event *events
    size_t capacity             # 0: off
    uint64_t written
    uint32_t enabled            # bit per trace_event_id
    uint32_t vcpu               # who runs


cdef void trace_write(trace_ring *ring, uint32_t id, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f,
                      uint64_t g) noexcept nogil


cdef inline void trace(trace_ring *ring, uint32_t id, uint64_t a, uint64_t b=0, uint64_t c=0, uint64_t d=0, uint64_t e=0,
                       uint64_t f=0, uint64_t g=0) noexcept nogil:
    if ring.enabled & (<uint32_t>1 << id):
        trace_write(ring, id, a, b, c, d, e, f, g)
