"""The ring of trace events: the oldest go first when it is full."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._trace cimport trace_event, trace_ring


cdef void trace_write(trace_ring *ring, uint32_t id, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f,
                      uint64_t g) noexcept nogil:
    cdef trace_event *event
    if ring.capacity == 0:
        return
    event = &ring.events[ring.written % ring.capacity]
    event.id, event.vcpu, event.number = id, ring.vcpu, ring.written
    event.args[0], event.args[1], event.args[2], event.args[3] = a, b, c, d
    event.args[4], event.args[5], event.args[6] = e, f, g
    ring.written += 1
