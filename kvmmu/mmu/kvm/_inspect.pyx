"""Counters, tracepoints and page tables of a machine as dicts and arrays."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, kvm_stats
from kvmmu.mmu.core._trace cimport trace_event, trace_ring
from kvmmu.mmu.kvm._state cimport Kvm


_STATS = (
    "pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_guest pf_mmio_spte_created invlpg tlb_flush "
    "remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded mmu_recycled "
    "mmu_cache_miss mmu_unsync pages_4k pages_2m pages_1g nx_lpage_splits max_mmu_rmap_size "
    "max_mmu_page_hash_collisions exits mmio_exits insn_emulation insn_emulation_fail "
    "pml_full bugs").split()


def set_trace(Kvm machine not None, uint32_t mask, size_t capacity):
    """Record the events of a bit mask, the last `capacity` of them; 0 stops."""
    cdef trace_event *events = NULL
    with machine.lock:
        if mask and capacity:
            events = <trace_event *>calloc(capacity, sizeof(trace_event))
            if events is NULL:
                raise MemoryError
        free(machine.k.trace.events)
        machine.k.trace.events, machine.k.trace.capacity = events, capacity if events is not NULL else 0
        machine.k.trace.enabled = mask if events is not NULL else 0
        machine.k.trace.written = 0


def trace_events(Kvm machine not None):
    """Return (number of events ever, ndarray of uint64 (n, 10): number, vcpu, id, seven fields), oldest first."""
    cdef kvm *k = machine.k
    cdef trace_ring *ring = &k.trace
    cdef uint64_t i, n, first
    cdef trace_event *event
    cdef int j
    with machine.lock:
        n = min(ring.written, <uint64_t>ring.capacity)
        first = ring.written - n
        out = np.empty((n, 10), np.uint64)
        for i in range(n):
            event = &ring.events[(first + i) % ring.capacity]
            row = out[i]
            row[0], row[1], row[2] = event.number, event.vcpu, event.id
            for j in range(7):
                row[3 + j] = event.args[j]
        return int(ring.written), out


def pages(Kvm machine not None):
    """Return the pages of SPTEs in use: dict of arrays sp, gfn, role, root_count, nx, unsync, special (one row each), sptes
    (n, 512), translations (n, 512): gfn << 12 | ACC_* of the leaf entries of pages that shadow a guest's table, else 0."""
    cdef kvm *k = machine.k
    cdef const kvm_mmu_page *page
    cdef uint64_t[:, ::1] entries, leaves
    cdef uint32_t sp
    cdef Py_ssize_t i
    with machine.lock:
        rows = []
        for sp in range(1, <uint32_t>k.page_end):
            page = &k.pages[sp]
            if page.in_use and page.role:               # the log of dirty pages has no role
                rows.append((sp, page.gfn, page.role, page.root_count, page.nx_huge_page_disallowed, page.unsync, page.special))
        table = np.array(rows, np.uint64).reshape(len(rows), 7)
        sptes, translations = np.empty((len(rows), 512), np.uint64), np.zeros((len(rows), 512), np.uint64)
        entries, leaves = sptes, translations
        for i in range(entries.shape[0]):
            sp = <uint32_t>table[i, 0]
            memcpy(&entries[i, 0], &k.sptes[<uint64_t>sp * 512], 512 * sizeof(uint64_t))
            if k.pages[sp].shadowed_translation is not NULL:
                memcpy(&leaves[i, 0], k.pages[sp].shadowed_translation, 512 * sizeof(uint64_t))
    names = ("sp", "gfn", "role", "root_count", "nx", "unsync", "special")
    return {name: table[:, i].copy() for i, name in enumerate(names)} | {"sptes": sptes, "translations": translations}


def stats(Kvm machine not None):
    """Return the counters by KVM's names: dict of str to int."""
    cdef const int64_t *counters = <const int64_t *>&machine.k.stats
    with machine.lock:
        return {name: counters[i] for i, name in enumerate(_STATS)}


def clear_stats(Kvm machine not None):
    """Set the counters to zero, those of what is there now excepted."""
    cdef kvm_stats kept
    with machine.lock:
        kept = machine.k.stats
        memset(&machine.k.stats, 0, sizeof(kvm_stats))
        machine.k.stats.pages_4k, machine.k.stats.pages_2m, machine.k.stats.pages_1g = kept.pages_4k, kept.pages_2m, kept.pages_1g
        machine.k.stats.mmu_unsync, machine.k.stats.nx_lpage_splits = kept.mmu_unsync, kept.nx_lpage_splits
