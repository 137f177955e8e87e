"""The audit of a TLB: its entries agree with the host's pages, or a flush is requested.

An entry may disagree with the guest's tables: the guest has to flush. It may not map a host page that the frame has lost, nor
allow writes that KVM has forbidden: KVM has to flush whenever it takes one of the two away.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.arch._bits cimport ACC_WRITE_MASK, PAGE_SHIFT, PG_LEVEL_4K, ROLE_INVALID_MASK
from kvmmu.machine._machine cimport Machine
from kvmmu.mmu.core._kvm cimport REQ_FREE_OBSOLETE_ROOTS, REQ_TLB_FLUSH, kvm, kvm_mmu_page, memslots_of
from kvmmu.mmu.core._page cimport hash_first, sp_has_gptes
from kvmmu.mmu.core._rmap cimport slot_of_sp
from kvmmu.mmu.core._slots cimport (
    HOST_READONLY, HOST_UNMAPPED, gfn_to_memslot, host_page_of, host_pfn_of, is_slot_dirty, is_write_tracked,
    kvm_memory_slot, lpage_disallowed,
)
from kvmmu.mmu.core._spte cimport pages_per_hpage
from kvmmu.tlb._tlb cimport TLB_LEVELS, tlb, tlb_array, tlb_entry


cdef bint holds_synced_table(kvm *k, const kvm_memory_slot *slot, uint64_t gfn) noexcept:
    cdef uint32_t sp = hash_first(k, gfn)
    cdef const kvm_mmu_page *page
    while sp:
        page = &k.pages[sp]
        if page.gfn == gfn and sp_has_gptes(page) and not page.role & <uint32_t>ROLE_INVALID_MASK and not page.unsync and (
                slot_of_sp(k, page, gfn) == slot):
            return True
        sp = page.hash_next
    return False


cdef fault_of_entry(kvm *k, int as_id, const tlb_entry *entry, int level):
    """Return the fault of an entry, or None."""
    cdef uint64_t first = entry.gpa >> PAGE_SHIFT, gfn
    cdef kvm_memory_slot *slot = gfn_to_memslot(memslots_of(k, as_id), first)
    cdef uint8_t host
    cdef bint writes = entry.nacc & ACC_WRITE_MASK and entry.dirty
    if slot is NULL or first + pages_per_hpage(level) > slot.base_gfn + slot.npages:
        return "no slot is there"
    for gfn in range(first, first + pages_per_hpage(level)):
        host = host_page_of(slot, gfn)
        if host & HOST_UNMAPPED or host_pfn_of(slot, gfn, host) != (entry.hpa >> PAGE_SHIFT) + (gfn - first):
            return f"gfn {gfn:#x} is backed by {host_pfn_of(slot, gfn, host):#x}, or by nothing"
        if not writes:
            continue
        if slot.readonly or host & HOST_READONLY:
            return f"lets gfn {gfn:#x} be written, which is read-only in the host"
        if is_write_tracked(slot, gfn):
            return f"lets gfn {gfn:#x} be written, and writes are tracked"
        if holds_synced_table(k, slot, gfn):
            return f"lets gfn {gfn:#x} be written, and the table in the frame is shadowed and in sync"
        if slot.dirty_log and not k.spte.pml and not is_slot_dirty(slot, gfn):
            return f"lets gfn {gfn:#x} be written, which is not in the dirty log"
    if writes and level > PG_LEVEL_4K and lpage_disallowed(slot, first, level):
        return "may be written, and is larger than the tables in it allow"
    return None


def audit_tlb(Machine machine not None):
    """Return the faults of the TLB of a vCPU: one line each."""
    cdef kvm *k = machine.modes.m.k
    cdef const tlb *t = machine.modes.m.tlb
    cdef const tlb_array *a
    cdef size_t j
    cdef int i
    errors = []
    with machine.kvm.lock:
        machine.kvm.sync()
        if machine.modes.m.vcpu.requests & (REQ_TLB_FLUSH | REQ_FREE_OBSOLETE_ROOTS):     # a flush comes first
            return errors
        for i in range(TLB_LEVELS):
            a = &t.arrays[i]
            for j in range(a.sets * a.ways if a.valid else 0):
                if a.keys[j] == 0:
                    continue
                wrong = fault_of_entry(k, a.entries[j].as_id, &a.entries[j], i + 1)
                if wrong is not None:
                    errors.append(f"TLB of vCPU {machine.modes.m.vcpu.id} key {a.keys[j]:#x} gpa {a.entries[j].gpa:#x} "
                                  f"hpa {a.entries[j].hpa:#x} level {i + 1}: {wrong}")
    return errors
